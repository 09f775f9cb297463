"""Reads, checks, mixes down and resamples audio on the host, to the model's input: 16 kHz mono float32.

Files are untrusted. Headers never determine how much memory is allocated: audio is decoded, mixed down and resampled
block by block, and decoding stops at the length limit.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, BinaryIO, cast

import numpy as np

from granite_jax.audio import decode
from granite_jax.audio.resample import (
    BLOCK_FRAMES,
    WHOLE,
    Blocks,
    Condition,
    Mixer,
    check_channels,
    check_rate,
    checked,
    raise_too_long,
    resample,
    scale,
)
from granite_jax.errors import AudioError, one_line, printable
from granite_jax.waveform import MIN_SAMPLES, SAMPLING_RATE

__all__ = [
    "MAX_SECONDS",
    "Audio",
    "Recording",
    "RecordingBlocks",
    "check_samples",
    "load_audio",
    "load_segment",
    "num_channels",
    "open_recording",
]

MAX_SECONDS = 4 * 3600.0
"""Default length limit."""

_MAX_STREAM_BYTES = 1 << 31


class AccessError(AudioError):
    """The audio is missing, forbidden or out of reach: nothing is known of its content."""


@dataclass(frozen=True, eq=False)
class Audio:
    """One utterance.

    Fields:
      name: for messages and output.
      samples: float32 `[n]` at 16 kHz, mono, roughly in [-1, 1].
      condition: whether its file was whole.
    """

    name: str
    samples: np.ndarray
    condition: Condition = WHOLE

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return len(self.samples) / SAMPLING_RATE


class RecordingBlocks(Iterator[np.ndarray]):
    """The blocks of a recording, float32 `[n]` at 16 kHz, mono. Its AudioErrors name the recording.

    Fields:
      condition: whether the file was whole; known when all blocks were read.
    """

    def __init__(self, name: str, blocks: Blocks):
        self._name, self._blocks = name, blocks
        self.condition = WHOLE

    def __next__(self) -> np.ndarray:
        try:
            return next(self._blocks)
        except StopIteration as end:
            self.condition = end.value or self.condition
            raise
        except AudioError as error:
            raise _with_name(self._name, error) from error.__cause__

    def close(self) -> None:
        """Closes what the blocks are read from."""
        self._blocks.close()


@dataclass(frozen=True, eq=False)
class Recording:
    """Audio of any length that is decoded in blocks, as often as needed. Picklable if `decode` is.

    Fields:
      name: for messages and output.
      decode: begins to decode it; errors that it raises need not name the recording.
    """

    name: str
    decode: Callable[[], Blocks]

    def blocks(self) -> RecordingBlocks:
        """Begins to decode the recording at its beginning. Those of an open file are to be read one after another."""
        return RecordingBlocks(self.name, self.decode())


def load_audio(
    source: Any, *, sampling_rate: float | None = None, name: str | None = None, max_seconds: float | None = None
) -> Audio:
    """Reads one utterance from a file, a buffer or an array.

    Args:
      source: a path; the bytes of a file or an open binary file (anything FFmpeg or libsndfile reads: wav, flac, mp3,
        ogg, m4a, mp4, webm, wma, ...); an array of shape [n], [n, channels] or [channels, n] (the shorter axis is the
        channels), floats in [-1, 1] or integers, which are scaled by the range of their type; a pair (array, sampling
        rate); the audio of a Hugging Face data set: a dict of "array" and "sampling_rate", or of "bytes" or "path", or
        a decoder of torchcodec; a Recording, which is read; or an Audio, which is returned unchanged.
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
    max_seconds = MAX_SECONDS if max_seconds is None else max_seconds
    recording = open_recording(source, sampling_rate=sampling_rate, name=name, max_seconds=max_seconds)
    with _named(recording.name):
        return _read(recording.name, recording.decode(), max_seconds)


def open_recording(
    source: Any,
    *,
    sampling_rate: float | None = None,
    name: str | None = None,
    max_seconds: float | None = None,
    channel: int | None = None,
) -> Recording:
    """Prepares to read audio of any length; nothing is decoded yet, so that most errors come from the blocks.

    Args:
      source: what `load_audio` takes. The bytes of a file that is not seekable are read and kept; any other file must
        stay open, and an array unchanged, while blocks are read. A Recording is returned unchanged.
      sampling_rate, name: as in `load_audio`.
      max_seconds: the longest audio to accept; without it, there is no limit.
      channel: take this channel alone, counted from 0, instead of mixing the channels down.

    Raises:
      AudioError: the source or an option is of an unsupported type or value, or an open file cannot be read.
    """
    name = name if name is not None else path_of(source) or "audio"
    with _named(name):
        source = _unpacked(source)
        limit = math.inf if max_seconds is None else _check_limit(max_seconds)
        if channel is not None and (isinstance(channel, bool) or not isinstance(channel, Integral) or channel < 0):
            raise AudioError(f"channel must be a number from 0 on, not {channel!r:.40}")
        if isinstance(source, (Audio, Recording)):
            if channel:
                raise AudioError(f"has 1 channel, and no channel {channel} (the first is 0)")
            if isinstance(source, Recording):
                return source
            return Recording(source.name, functools.partial(_audio_blocks, source, limit))
        opener = _opener(source)
        if opener is not None:
            return Recording(name, functools.partial(_decode_encoded, opener, sampling_rate, limit, channel))
        array, rate = _split_pair(source, sampling_rate)
        return Recording(name, functools.partial(decode_array, array, rate, limit, channel))


def num_channels(source: Any) -> int:
    """The channels of what `load_audio` takes. Of a file, only the header and at most one frame are decoded.

    Raises:
      AudioError: the source is not audio, cannot be read, or is a file object that can be read only once.
    """
    if isinstance(source, (Audio, Recording)):
        return 1
    with _named(path_of(source) or "audio"):
        source = _unpacked(source)
        if hasattr(source, "read") and not _is_seekable(source):
            raise AudioError("is a file that is not seekable: read its bytes first")
        opener = _opener(source)
        if opener is None:
            array, _ = _split_pair(source, None)
            return _frames_of(array).shape[1]
        with opener() as file:
            return decode.num_channels(file)


def check_samples(num_samples: int) -> None:
    """Raises AudioError if a recording of so many samples at 16 kHz is empty or too short."""
    if num_samples == 0:
        raise AudioError("holds no samples")
    if num_samples < MIN_SAMPLES:
        raise AudioError(f"too short: {num_samples} samples at 16 kHz, at least {MIN_SAMPLES} are needed")


def _read(name: str, blocks: Blocks, limit: float) -> Audio:
    """All blocks as one, of at most `limit` seconds. Raises AudioError, without the name."""
    parts, num_samples = [], 0
    condition = WHOLE
    with contextlib.closing(blocks):
        while True:
            try:
                parts.append(next(blocks))
            except StopIteration as end:
                condition = end.value
                break
            num_samples += len(parts[-1])
            # A recording can have been opened without this limit. Resampling rounds lengths up.
            if num_samples > limit * SAMPLING_RATE + 1:
                raise_too_long(limit)
    check_samples(num_samples)
    return Audio(name, np.concatenate(parts), condition)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Puts the name in front of AudioErrors."""
    try:
        yield
    except AudioError as error:
        raise _with_name(name, error) from error.__cause__


def _with_name(name: str, error: AudioError) -> AudioError:
    return type(error)(f"{printable(name)}: {error}")


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


def _check_limit(max_seconds: float) -> float:
    if not 0 < max_seconds < float("inf"):
        raise AudioError(f"max_seconds must be a positive number, not {max_seconds!r}")
    return float(max_seconds)


# Encoded audio.


def _decode_encoded(
    opener: Callable[[], contextlib.AbstractContextManager[BinaryIO]],
    sampling_rate: float | None,
    limit: float,
    channel: int | None,
) -> Blocks:
    with opener() as file:
        return (yield from decode.decode(file, sampling_rate, limit, channel=channel))


def _opener(source: Any) -> Callable[[], contextlib.AbstractContextManager[BinaryIO]] | None:
    """Opens an encoded source; None if it is an array. Picklable if the source is."""
    if isinstance(source, (str, os.PathLike)):
        return functools.partial(open_regular, source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return functools.partial(io.BytesIO, bytes(source))
    if not hasattr(source, "read"):
        return None
    if not _is_seekable(source):
        return functools.partial(io.BytesIO, read_stream(source))
    return functools.partial(_open_part, source, _part_start(source))


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
    limit = MAX_SECONDS if max_seconds is None else _check_limit(max_seconds)
    return _read(name, decode.decode(file, None, limit, offset, duration), limit)


def _is_seekable(file: Any) -> bool:
    try:
        return bool(file.seekable()) if hasattr(file, "seekable") else False
    except Exception:  # The caller's own object: what it cannot tell, it is not.
        return False


def read_stream(stream: Any) -> bytes:
    """Reads the remaining bytes of a binary file object that is not seekable."""
    with _callers_errors():
        data = stream.read(_MAX_STREAM_BYTES + 1)
    _check_binary(data)
    if len(data) > _MAX_STREAM_BYTES:
        raise AudioError(f"more than {_MAX_STREAM_BYTES >> 30} GiB")
    return bytes(data)


def _part_start(file: Any) -> int:
    """The position from which on a file is audio: the current one; its beginning if that is its end."""
    with _callers_errors():
        _check_binary(file.read(0))
        position = file.tell()
        is_at_end = file.seek(0, io.SEEK_END) == position  # written, and not rewound
        return 0 if is_at_end else position


def _check_binary(data: Any) -> None:
    if not isinstance(data, (bytes, bytearray)):
        raise AudioError("the file must be opened in binary mode")


@contextlib.contextmanager
def _callers_errors() -> Iterator[None]:
    """Turns what a caller's file object raises into AudioErrors."""
    try:
        yield
    except AudioError:
        raise
    except Exception as error:  # Whatever it raises, this input cannot be read.
        raise AudioError(f"cannot be read ({one_line(error)})") from error


@contextlib.contextmanager
def _open_part(file: Any, start: int) -> Iterator[BinaryIO]:
    """A caller's file from a position on. It is left at its end, where reading all of it leaves it."""
    part = _FilePart(file, start)
    try:
        yield cast(BinaryIO, part)
    except OSError as error:
        raise AudioError(f"cannot be read ({one_line(error)})") from error
    finally:
        with contextlib.suppress(OSError):
            part.seek(0, io.SEEK_END)


class _FilePart:
    """A seekable file without the bytes before `start`. Reads are never short, and all errors are OSErrors."""

    def __init__(self, file: Any, start: int):
        self._file, self._start = file, start

    def read(self, size: int) -> bytes:
        parts = []
        with _os_errors():
            while size > 0 and (part := self._file.read(size)):
                parts.append(bytes(part))
                size -= len(part)
        return b"".join(parts)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _os_errors():
            return self._file.seek(offset + (self._start if whence == io.SEEK_SET else 0), whence) - self._start

    def tell(self) -> int:
        with _os_errors():
            return self._file.tell() - self._start


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # The caller's own object can raise anything.
        raise error if isinstance(error, OSError) else OSError(one_line(error)) from error


# Arrays.


def _split_pair(source: Any, sampling_rate: float | None) -> tuple[Any, float]:
    """Splits (array, rate), as `soundfile.read` returns it; a bare array is at `sampling_rate`."""
    is_pair = isinstance(source, tuple) and len(source) == 2 and not isinstance(source[0], Real)
    if not (is_pair and np.ndim(source[1]) == 0):
        return source, SAMPLING_RATE if sampling_rate is None else check_rate(sampling_rate)
    rate = check_rate(source[1])
    if sampling_rate is not None and check_rate(sampling_rate) != rate:
        raise AudioError(f"comes with a rate of {rate:g} Hz, but sampling_rate={sampling_rate!r} was given")
    return source[0], rate


def decode_array(source: Any, rate: float, limit: float, channel: int | None = None) -> Blocks:
    """Blocks of an array in any form that `load_audio` takes, at `rate` in Hz. Raises AudioError, without a name."""
    frames = _frames_of(source)
    starts = range(0, len(frames), BLOCK_FRAMES)
    mixer = Mixer(channel)
    mono = mixer(checked(scale(frames[start : start + BLOCK_FRAMES])) for start in starts)
    yield from resample(mono, rate, limit)
    return Condition(mixer.flags)


def _frames_of(source: Any) -> np.ndarray:
    """An array as `[n, channels]`."""
    try:
        array = np.asarray(source)
    except Exception as error:  # Ragged lists, tensors on a device, objects whose __array__ fails.
        raise AudioError(f"{type(source).__name__} cannot be made an array ({one_line(error)})") from error
    _check_dtype(array, source)
    if array.ndim not in (1, 2):
        raise AudioError(f"expected an array of shape [n] or [n, channels], not {list(array.shape)}")
    frames = array[:, None] if array.ndim == 1 else array if array.shape[0] > array.shape[1] else array.T
    check_channels(frames.shape[1])
    return frames


def _audio_blocks(audio: Audio, limit: float) -> Blocks:
    samples = audio.samples
    blocks = (samples[start : start + BLOCK_FRAMES] for start in range(0, len(samples), BLOCK_FRAMES))
    yield from resample(blocks, SAMPLING_RATE, limit)
    return audio.condition


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
