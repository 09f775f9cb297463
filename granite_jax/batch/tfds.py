"""Prepared TensorFlow Datasets, read without TensorFlow where their audio is a tensor of samples."""

import contextlib
import functools
import io
from typing import Any

import numpy as np

from granite_jax.errors import AudioError, GraniteError, one_line
from granite_jax.waveform import SAMPLING_RATE

AUDIO = ("audio", "speech", "voice")
"""Names that the audio feature can have, in order of preference."""


class Examples:
    """Samples and their rate in Hz, by index; `source` holds the complete examples, `features` describes them."""

    def __init__(self, source: Any, features: Any, audio: str, rate: int):
        self.source = source
        self.features = features
        self._audio = audio
        self._rate = rate

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.samples(self.source[index]), self._rate

    def samples(self, example: dict[str, Any]) -> np.ndarray:
        """The samples of an example of `source`. Raises AudioError if their range is unknown."""
        samples = np.asarray(example[self._audio])
        if samples.dtype == np.int64:  # TFDS's default for audio files, which almost always have 16 bits
            if samples.size and np.abs(samples).max() > 1 << 15:
                raise AudioError("is of more than 16 bits, in a feature of int64")
            samples = np.clip(samples, -(1 << 15), (1 << 15) - 1).astype(np.int16)
        return samples

    def seconds(self, example: dict[str, Any]) -> float:
        """Length of an example of `source`."""
        return len(example[self._audio]) / self._rate


@functools.cache
def open_dataset(directory: str, split: str) -> Examples:
    """Opens a prepared data set for random access; its files must be array records.

    The rate is that of the feature, or else the metadata's `sampling_rate` or `sample_rate`, or else 16 kHz.

    Raises:
      GraniteError: naming what is missing, or what needs TensorFlow.
    """
    try:
        import tensorflow_datasets as tfds

        with contextlib.redirect_stdout(io.StringIO()):  # it prints that TensorFlow is missing
            builder: Any = tfds.builder_from_directory(directory)
        features = builder.info.features
        audio = next((name for name in AUDIO if name in features), None)
        if audio is None:
            raise GraniteError(f"{directory}: has no feature named {', '.join(AUDIO)}")
        source = builder.as_data_source(split=split)
    except GraniteError:
        raise
    except ImportError as error:
        remedy = "needs TensorFlow to be read: pip install 'granite-jax[tfds-audio]'"
        raise GraniteError(f"{directory}: {remedy} ({one_line(error)})") from None
    except Exception as error:  # TFDS raises many kinds of errors for a bad directory
        raise GraniteError(f"{directory}#{split}: is no prepared data set ({one_line(error)})") from error
    metadata = builder.info.metadata or {}
    metadata_rates = (metadata.get(key) for key in ("sampling_rate", "sample_rate"))
    rate = getattr(features[audio], "sample_rate", None) or next(filter(None, metadata_rates), SAMPLING_RATE)
    return Examples(source, features, audio, int(rate))
