"""Prepared TensorFlow Datasets, read without TensorFlow: a feature `audio` that is a tensor of samples."""

import functools
from typing import Any

import numpy as np

from granite_jax._pcm import SAMPLE_RATE, one_line
from granite_jax.errors import GraniteError

AUDIO = "audio"


class Examples:
    """Samples and their rate in Hz, by place."""

    def __init__(self, source: Any, rate: int):
        self._source = source
        self._rate = rate

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, place: int) -> tuple[np.ndarray, int]:
        return np.asarray(self._source[place][AUDIO]), self._rate


@functools.cache
def open_dataset(directory: str, split: str) -> Examples:
    """Opens a prepared data set for random access: its files have to be array records.

    The rate is that of the feature, or of the metadata's `sampling_rate`, or 16 kHz.

    Raises:
      GraniteError: naming what is missing, or what needs TensorFlow.
    """
    try:
        import tensorflow_datasets as tfds

        builder: Any = tfds.builder_from_directory(directory)
        features = builder.info.features
        if AUDIO not in features:
            raise GraniteError(f"{directory}: has no feature named {AUDIO}")
        source = builder.as_data_source(split=split)
    except GraniteError:
        raise
    except ImportError as error:
        raise GraniteError(f"{directory}: needs TensorFlow to be read: pip install tensorflow ({error})") from None
    except Exception as error:  # whatever is wrong with the directory, and TFDS has many ways to say it
        raise GraniteError(f"{directory}#{split}: is no prepared data set ({one_line(error)})") from error
    rate = getattr(features[AUDIO], "sample_rate", None) or (builder.info.metadata or {}).get(
        "sampling_rate", SAMPLE_RATE
    )
    return Examples(source, int(rate))
