"""Decodes audio in any format that libsndfile reads, block by block; headers are not trusted."""

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
    """Decodes a seekable file to mono float32 [n] at 16 kHz; `sampling_rate`, if given, must agree with the file's.

    `offset` and `duration`, in seconds, select a segment; `limit` is the longest duration to accept.

    Raises AudioError if the data is at fault, OSError if reading failed.
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
            raise encoded.error  # Reading failed: the data is not at fault, whatever libsndfile reported.


def _open(encoded: _EncodedFile) -> _SequentialDecoder:
    try:
        return _SequentialDecoder(cast(Any, encoded))
    except (sf.SoundFileError, TypeError, ValueError) as error:
        raise AudioError(f"is not audio that can be read ({_libsndfile_reason(error)})") from error


def _skip(decoder: _SequentialDecoder, frames: int) -> None:
    """Seeks to a frame. Raises AudioError if the audio ends before it."""
    try:
        position = decoder.seek(frames)
    except (sf.SoundFileError, ValueError, OSError):
        position = -1
    if position != frames or position >= decoder.frames:
        raise AudioError(f"has no audio at {frames / decoder.samplerate:g} seconds")


def _blocks(decoder: _SequentialDecoder, limit: int | None = None) -> Iterator[np.ndarray]:
    """Decodes `limit` frames, or to the end of the data, which is at or before the end that the header states.

    Yields mono float32 blocks [<= 65536].
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
    """The file that libsndfile reads. Its callbacks cannot raise: an error is stored in `error`, to be raised later.

    It has no `name`: soundfile would take `x.raw` for headerless data and ask for its format.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except Exception as error:  # remote files can raise anything
            self.error = error if isinstance(error, OSError) else OSError(one_line(error))
            return b""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with contextlib.suppress(OSError, ValueError):  # Damaged headers point to before the start.
            self._file.seek(offset, whence)
        return self.tell()

    def tell(self) -> int:
        return self._file.tell()
