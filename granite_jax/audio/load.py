"""Reads, checks, mixes down and resamples audio on the host, to the model's input: 16 kHz mono float32.

Files are untrusted. Headers never determine how much memory is allocated: audio is decoded, mixed down and resampled
block by block, and decoding stops at the length limit.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, BinaryIO

import numpy as np

from granite_jax.audio.decode import Decoded, decode
from granite_jax.audio.resample import SAMPLE_RATE, Mixer, check_channels, check_rate, one_line, resample, scale
from granite_jax.errors import AudioError

__all__ = ["MAX_SECONDS", "MIN_SAMPLES", "SAMPLE_RATE", "Audio", "load_audio", "load_segment"]

MIN_SAMPLES = 257
"""Reflect padding of the 512-point STFT needs more than 256 samples."""
MAX_SECONDS = 4 * 3600.0
"""Default length limit."""

_BLOCK_FRAMES = 1 << 16
_MAX_STREAM_BYTES = 1 << 31


class AccessError(AudioError):
    """The audio is missing, forbidden or out of reach: nothing is known of its content."""


@dataclass(frozen=True, eq=False)
class Audio:
    """One utterance.

    Fields:
      name: for messages and output.
      samples: float32 `[n]` at 16 kHz, mono, roughly in [-1, 1].
      flags: of a `Transcript`, "truncated-input" and "one-channel" where they apply.
    """

    name: str
    samples: np.ndarray
    flags: tuple[str, ...] = ()

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return len(self.samples) / SAMPLE_RATE


def load_audio(
    source: Any, *, sampling_rate: float | None = None, name: str | None = None, max_seconds: float | None = None
) -> Audio:
    """Reads one utterance from a file, a buffer or an array.

    Args:
      source: a path; the bytes of a file or an open binary file (anything libsndfile reads: wav, flac, ogg, mp3, ...;
        with the extra `media`, anything FFmpeg reads: m4a, mp4, webm, wma, ...);
        an array of shape [n], [n, channels] or [channels, n] (the shorter axis is the channels), floats in [-1, 1] or
        integers, which are scaled by the range of their type; a pair (array, sampling rate); the audio of a Hugging
        Face data set: a dict of "array" and "sampling_rate", or of "bytes" or "path", or a decoder of torchcodec; or an
        Audio, which is returned unchanged.
      sampling_rate: in Hz, of an array; default 16 kHz. For a file, it must agree with the file's own.
      name: of the audio in messages and outputs; by default the path, or "audio".
      max_seconds: the longest audio to accept, 4 hours by default.

    Returns:
      The audio, mixed down to mono and resampled to 16 kHz.

    Raises:
      AudioError: the input is missing, not audio, empty, too short (under 257 samples at 16 kHz), too long, damaged,
        not finite, or of an unsupported type, shape or rate.
    """
    if isinstance(source, Audio):
        return source
    name = name if name is not None else path_of(source) or "audio"
    try:
        source = _unpacked(source)
        limit = _check_limit(max_seconds)
        if isinstance(source, (str, os.PathLike)):
            decoded = _read_path(source, sampling_rate, limit)
        elif isinstance(source, (bytes, bytearray, memoryview)):
            decoded = decode(io.BytesIO(source), sampling_rate, limit)
        elif hasattr(source, "read"):
            decoded = decode(io.BytesIO(_read_stream(source)), sampling_rate, limit)
        else:
            decoded = _from_array(*_split_pair(source, sampling_rate), limit)
        _check_samples(decoded.samples)
    except AudioError as error:
        raise type(error)(f"{printable(name)}: {error}") from error.__cause__
    return Audio(name, *decoded)


def path_of(source: Any) -> str | None:
    """The path of a file, a file object or a data set's audio, if it has one."""
    if isinstance(source, Mapping):
        source = source.get("path")
    path = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", None)
    return os.fsdecode(path) if isinstance(path, (str, os.PathLike)) else None


def is_encoded(source: Any) -> bool:
    """Whether a source is a file, in whatever form, which knows its own sampling rate."""
    if isinstance(source, Mapping):
        return "array" not in source
    return isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(source, "read")


def _unpacked(source: Any) -> Any:
    """The path, bytes or (array, rate) in a data set's audio; anything else unchanged."""
    if isinstance(source, Mapping):
        if "array" in source:
            return (source["array"], source["sampling_rate"]) if "sampling_rate" in source else source["array"]
        encoded = source.get("bytes")
        encoded = source.get("path") if encoded is None else encoded
        if encoded is None:
            raise AudioError('a dict needs "array" and "sampling_rate", or "bytes", or "path"')
        return encoded
    if hasattr(source, "get_all_samples"):
        decoded = source.get_all_samples()
        return decoded.data, decoded.sample_rate
    return source


def printable(name: str) -> str:
    """The name for messages: on one line, whatever characters it contains."""
    return name if name and name.isprintable() else ascii(name)


def _check_limit(max_seconds: float | None) -> float:
    if max_seconds is None:
        return MAX_SECONDS
    if not 0 < max_seconds < float("inf"):
        raise AudioError(f"max_seconds must be a positive number, not {max_seconds!r}")
    return float(max_seconds)


def _check_samples(samples: np.ndarray) -> None:
    if len(samples) == 0:
        raise AudioError("holds no samples")
    if len(samples) < MIN_SAMPLES:
        raise AudioError(f"too short: {len(samples)} samples at 16 kHz, at least {MIN_SAMPLES} are needed")


# Encoded audio.


def _read_path(path: str | os.PathLike[str], sampling_rate: float | None, limit: float) -> Decoded:
    with open_regular(path) as file:
        return decode(file, sampling_rate, limit)


@contextlib.contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a regular file; raises AccessError, without the name, if opening or reading it fails."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise AccessError("is a directory")
        if not stat.S_ISREG(mode):  # Opening a pipe would wait for a writer.
            raise AccessError("is not a regular file")
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise AccessError("no such file") from None
    except (OSError, ValueError) as error:
        if isinstance(error, AudioError):
            raise
        raise AccessError(f"cannot be read ({getattr(error, 'strerror', None) or error})") from error


def load_segment(
    file: BinaryIO, name: str, *, offset: float = 0.0, duration: float | None = None, max_seconds: float | None = None
) -> Audio:
    """Reads a segment of a seekable encoded file; where the format allows, audio before it is not decoded.

    Args:
      offset, duration: in seconds of the file; without a duration, to its end.
      max_seconds: the longest audio to accept, 4 hours by default.

    Raises:
      AudioError: as in `load_audio`, without the name.
      OSError: reading the file failed.
    """
    decoded = decode(file, None, _check_limit(max_seconds), offset, duration)
    _check_samples(decoded.samples)
    return Audio(name, *decoded)


def _read_stream(stream: Any) -> bytes:
    """Reads the remaining bytes of a binary file object, which need not be seekable; all of it if it is at its end."""
    try:
        data = stream.read(_MAX_STREAM_BYTES + 1)
        if not data and hasattr(stream, "seekable") and stream.seekable():  # written, and not rewound
            stream.seek(0)
            data = stream.read(_MAX_STREAM_BYTES + 1)
    except AudioError:
        raise
    except Exception as error:  # The caller's own object: whatever it raises, this input cannot be read.
        raise AudioError(f"cannot be read ({one_line(error)})") from error
    if not isinstance(data, (bytes, bytearray)):
        raise AudioError("the file must be opened in binary mode")
    if len(data) > _MAX_STREAM_BYTES:
        raise AudioError(f"more than {_MAX_STREAM_BYTES >> 30} GiB")
    return bytes(data)


# Arrays.


def _split_pair(source: Any, sampling_rate: float | None) -> tuple[Any, float]:
    """Splits (array, rate), as `soundfile.read` returns it; a bare array is at `sampling_rate`."""
    is_pair = isinstance(source, tuple) and len(source) == 2 and not isinstance(source[0], Real)
    if not (is_pair and np.ndim(source[1]) == 0):
        return source, SAMPLE_RATE if sampling_rate is None else check_rate(sampling_rate)
    rate = check_rate(source[1])
    if sampling_rate is not None and check_rate(sampling_rate) != rate:
        raise AudioError(f"comes with a rate of {rate:g} Hz, but sampling_rate={sampling_rate!r} was given")
    return source[0], rate


def _from_array(source: Any, rate: float, limit: float) -> Decoded:
    try:
        array = np.asarray(source)
    except Exception as error:  # Ragged lists, tensors on a device, objects whose __array__ fails.
        raise AudioError(f"{type(source).__name__} cannot be made an array ({one_line(error)})") from error
    _check_dtype(array, source)
    if array.ndim not in (1, 2):
        raise AudioError(f"expected an array of shape [n] or [n, channels], not {list(array.shape)}")
    frames = array[:, None] if array.ndim == 1 else array if array.shape[0] > array.shape[1] else array.T
    check_channels(frames.shape[1])
    blocks = [frames[i : i + _BLOCK_FRAMES] for i in range(0, len(frames), _BLOCK_FRAMES)]
    mixer = Mixer()
    samples = resample((mixer(scale(block)) for block in blocks), rate, limit)
    if not mixer.cancels:
        return Decoded(samples)
    mixer = Mixer(mixer.loudest)
    return Decoded(resample((mixer(scale(block)) for block in blocks), rate, limit), ("one-channel",))


def _check_dtype(array: np.ndarray, source: Any) -> None:
    dtype = array.dtype
    if dtype == np.int32 and array.size and 0 < (peak := int(np.abs(array.astype(np.int64)).max())) < 1 << 15:
        raise AudioError(f"int32 samples that reach only {peak} of 2,147,483,647: convert 16-bit samples to int16")
    # NumPy turns a list of 16-bit samples into int64; scaled by the range of int64, they would be silence.
    if dtype.kind == "f" or dtype.name == "bfloat16" or (dtype.kind in "iu" and dtype.itemsize <= 4):
        return
    kind = f"dtype {dtype}" if hasattr(source, "dtype") or isinstance(source, (list, tuple)) else type(source).__name__
    raise AudioError(
        f"unsupported {kind}: give a path, bytes, a binary file, or an array of floats or 8-32 bit integers"
    )
