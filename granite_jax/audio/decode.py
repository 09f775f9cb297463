"""Decodes encoded audio (whatever libsndfile reads) in blocks, believing no header."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import numpy as np
import soundfile as sf

from granite_jax.audio.resample import check_channels, check_rate, mono, one_line, raise_too_long, resample
from granite_jax.errors import AudioError

_BLOCK_FRAMES = 1 << 16
_UNKNOWN_FRAMES = 1 << 62  # libsndfile reports 2**63 - 1 frames for streams of unknown length.


def decode(
    file: BinaryIO, sampling_rate: float | None, limit: float, offset: float = 0.0, duration: float | None = None
) -> np.ndarray:
    """Float32 [n] at 16 kHz, mono, of a seekable file; `sampling_rate` must agree with the file's if given.

    With `offset` or `duration`, in seconds, that part of it; `limit`, in seconds, is of the part.

    Raises AudioError where the data is at fault, OSError where reading it failed.
    """
    if not file.read(1):
        raise AudioError("is empty")
    file.seek(0)
    encoded = _EncodedFile(file)
    try:
        with _open(encoded) as decoder:
            rate = check_rate(decoder.samplerate)
            if sampling_rate is not None and check_rate(sampling_rate) != rate:
                raise AudioError(f"has a sampling rate of {rate:g} Hz, but sampling_rate={sampling_rate!r} was given")
            check_channels(decoder.channels)
            start, frames = round(offset * rate), None if duration is None else max(1, round(duration * rate))
            if duration is not None and duration > limit:
                raise_too_long(limit)
            if duration is None and limit * rate + start < decoder.frames < _UNKNOWN_FRAMES:
                raise_too_long(limit)
            if start:
                _skip(decoder, start)
            return resample(_blocks(decoder, frames), rate, limit)
    finally:
        if encoded.error is not None:
            raise encoded.error  # Whatever libsndfile made of it: the data is not at fault.


def _open(encoded: _EncodedFile) -> _SequentialDecoder:
    try:
        return _SequentialDecoder(cast(Any, encoded))
    except (sf.SoundFileError, TypeError, ValueError) as error:
        raise AudioError(f"is not audio that can be read ({_libsndfile_reason(error)})") from error


def _skip(decoder: _SequentialDecoder, frames: int) -> None:
    """Goes to a frame. Raises AudioError if the audio ends before it."""
    try:
        found = decoder.seek(frames)
    except (sf.SoundFileError, ValueError, OSError):
        found = -1
    if found != frames or found >= decoder.frames:
        raise AudioError(f"has no audio at {frames / decoder.samplerate:g} seconds")


def _blocks(decoder: _SequentialDecoder, limit: int | None = None) -> Iterator[np.ndarray]:
    """Decodes to the end of the data, which is where the header says or earlier, or `limit` frames.

    Yields mono float32 [<= 65536] each.
    """
    buffer = np.empty((_BLOCK_FRAMES, decoder.channels), np.float32)
    while limit is None or limit > 0:
        try:
            frames = decoder.read(out=buffer if limit is None else buffer[:limit])
        except (sf.SoundFileError, ValueError) as error:
            raise AudioError(f"is damaged ({_libsndfile_reason(error)})") from error
        if len(frames) == 0:
            return
        limit = None if limit is None else limit - len(frames)
        yield mono(frames)


def _libsndfile_reason(error: Exception) -> str:
    return one_line(getattr(error, "error_string", None) or error).rstrip(".")


class _SequentialDecoder(sf.SoundFile):
    """Decodes front to back. soundfile would otherwise cut reads at the length in the header and seek after each."""

    def seekable(self) -> bool:
        return False


class _EncodedFile:
    """What libsndfile reads from. Its callbacks cannot raise: a failed read is kept, to be raised afterwards.

    It has no name: soundfile would take `x.raw` for headerless data and ask for its format.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except Exception as error:  # a remote file raises what it likes
            self.error = error if isinstance(error, OSError) else OSError(one_line(error))
            return b""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with contextlib.suppress(OSError, ValueError):  # Damaged headers point to before the start.
            self._file.seek(offset, whence)
        return self.tell()

    def tell(self) -> int:
        return self._file.tell()
