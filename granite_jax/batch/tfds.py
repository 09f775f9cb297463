"""Prepared TensorFlow Datasets, read without TensorFlow where their audio is a tensor of samples."""

import contextlib
import functools
import io
from typing import Any

import numpy as np

from granite_jax.audio.resample import SAMPLE_RATE, one_line
from granite_jax.errors import AudioError, GraniteError

AUDIO = ("audio", "speech", "voice")
"""Names of the feature that is transcribed: the first that a data set has."""


class Examples:
    """Samples and their rate in Hz, by place; `source` has whole examples, of `features`."""

    def __init__(self, source: Any, features: Any, audio: str, rate: int):
        self.source = source
        self.features = features
        self._audio = audio
        self._rate = rate

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, place: int) -> tuple[np.ndarray, int]:
        return self.samples(self.source[place]), self._rate

    def samples(self, example: dict[str, Any]) -> np.ndarray:
        """The samples of one of `source`. Raises AudioError for those whose range is not known."""
        samples = np.asarray(example[self._audio])
        if samples.dtype == np.int64:  # TFDS's own default for files, which are of 16 bits almost always
            if samples.size and np.abs(samples).max() > 1 << 15:
                raise AudioError("is of more than 16 bits, in a feature of int64")
            samples = np.clip(samples, -(1 << 15), (1 << 15) - 1).astype(np.int16)
        return samples

    def seconds(self, example: dict[str, Any]) -> float:
        """Length of one of `source`."""
        return len(example[self._audio]) / self._rate


@functools.cache
def open_dataset(directory: str, split: str) -> Examples:
    """Opens a prepared data set for random access: its files have to be array records.

    The rate is that of the feature, or of the metadata's `sampling_rate` or `sample_rate`, or 16 kHz.

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
        needed = "needs TensorFlow to be read: pip install 'granite-jax[tfds-audio]'"
        raise GraniteError(f"{directory}: {needed} ({one_line(error)})") from None
    except Exception as error:  # whatever is wrong with the directory, and TFDS has many ways to say it
        raise GraniteError(f"{directory}#{split}: is no prepared data set ({one_line(error)})") from error
    metadata = builder.info.metadata or {}
    stated = (metadata.get(key) for key in ("sampling_rate", "sample_rate"))
    rate = getattr(features[audio], "sample_rate", None) or next(filter(None, stated), SAMPLE_RATE)
    return Examples(source, features, audio, int(rate))
