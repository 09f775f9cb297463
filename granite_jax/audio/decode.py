"""Decodes encoded audio in blocks, stream by stream, believing no header: by libsndfile, or else by FFmpeg."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
from collections.abc import Generator, Iterator
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import soundfile as sf

from granite_jax import git_lfs
from granite_jax.audio.media import decode_media, media_format, num_media_channels, read_head
from granite_jax.audio.resample import (
    BLOCK_FRAMES,
    SAMPLE_RATE,
    Blocks,
    Mixer,
    check_channels,
    check_rate,
    one_line,
    raise_too_long,
    resample,
)
from granite_jax.audio.streams import Stream, find_stream, is_only_tags, next_marker
from granite_jax.errors import AudioError

_UNKNOWN_FRAMES = 1 << 62  # libsndfile reports 2**63 - 1 frames for streams of unknown length.
_TRAILER = 4096  # bytes behind the audio that may be anything
_MAX_STREAMS = 10_000


class _UnreadableError(AudioError):
    """libsndfile does not recognize the format."""


class _StreamEnd(NamedTuple):
    """What is known of a stream once it is decoded."""

    flags: tuple[str, ...]
    num_samples: int  # at 16 kHz
    position: int  # byte of the file
    seconds: float  # that were decoded or skipped
    is_enough: bool = False  # the part that was wanted ends in this stream


def decode(
    file: BinaryIO,
    sampling_rate: float | None,
    limit: float,
    offset: float = 0.0,
    duration: float | None = None,
    channel: int | None = None,
) -> Blocks:
    """Decodes all streams of a seekable file, one after another, in blocks.

    Args:
      sampling_rate: in Hz. If given, the file's own must agree with it.
      limit: seconds to accept, possibly infinite.
      offset, duration: the part to decode, in seconds of the file; to its end without a duration.
      channel: take this channel alone, counted from 0.

    Raises:
      AudioError: the data is at fault. Bytes that are left over, and could be audio, are counted.
      OSError: reading failed.
    """
    head = _checked_head(file)
    size = file.seek(0, io.SEEK_END)
    if duration is not None and duration <= 0:
        raise AudioError(f"duration is {duration:g}, not a positive number of seconds")
    if (kind := media_format(head)) is not None:
        return (yield from decode_media(file, kind, sampling_rate, limit, offset, duration, channel))
    position, skip, take, num_samples, num_streams = 0, offset, duration, 0, 0
    flags: dict[str, None] = {}
    end = None
    while end is None or not end.is_enough:
        if num_streams == _MAX_STREAMS:
            raise AudioError(f"holds more than {_MAX_STREAMS:,} recordings")
        options = _Options(sampling_rate, limit, max(skip, 0.0), take, channel)
        try:
            end = yield from _decode_next(file, position, size, options)
        except _UnreadableError as error:
            kind = media_format(head, shared=True)
            if kind is None:
                raise AudioError(str(error)) from error.__cause__
            return (yield from decode_media(file, kind, sampling_rate, limit, offset, duration, channel))
        if end is None:
            break
        flags |= dict.fromkeys(end.flags)
        position, skip = max(end.position, position + 1), skip - end.seconds
        num_samples += end.num_samples
        num_streams += 1
        seconds = num_samples / SAMPLE_RATE
        if seconds > limit:
            raise_too_long(limit)
        take = None if duration is None else max(duration - seconds, 0.0)
    if offset and num_samples == 0:
        raise AudioError(f"has no audio at {offset:g} seconds")
    return tuple(flags)


def num_channels(file: BinaryIO) -> int:
    """The channels of the first stream of a seekable file. Raises what `decode` raises."""
    head = _checked_head(file)
    size = file.seek(0, io.SEEK_END)
    if (kind := media_format(head)) is not None:
        return num_media_channels(file, kind)
    options = _Options(None, math.inf, 0.0, None, None)
    unreadable = None
    for stream in _candidates(file, 0, size):
        try:
            return _StreamDecoder(file, stream, options).num_channels()
        except _UnreadableError as error:
            unreadable = unreadable or error
    if unreadable is None:
        raise AudioError("is not audio that can be read")
    if (kind := media_format(head, shared=True)) is not None:
        return num_media_channels(file, kind)
    raise AudioError(str(unreadable)) from unreadable.__cause__


def _checked_head(file: BinaryIO) -> bytes:
    """A file's first bytes. AudioError if it is empty, or the pointer to another file."""
    if file.seek(0, io.SEEK_END) == 0:
        raise AudioError("is empty")
    head = read_head(file)
    if git_lfs.is_pointer(head):
        raise AudioError(git_lfs.PROBLEM)
    return head


class _Options(NamedTuple):
    """How to decode a stream: without its first `skip` seconds, and at most `take` seconds of it."""

    sampling_rate: float | None
    limit: float
    skip: float
    take: float | None
    channel: int | None


def _decode_next(
    file: BinaryIO, position: int, size: int, options: _Options
) -> Generator[np.ndarray, None, _StreamEnd | None]:
    """Decodes the first stream at or after a position; None if only tags, or a few other bytes, are left.

    _UnreadableError is raised before any block is yielded.
    """
    if position and is_only_tags(file, position, size):
        return None
    unreadable = None
    for stream in _candidates(file, position, size):
        try:
            return (yield from _StreamDecoder(file, stream, options).decode())
        except _UnreadableError as error:
            unreadable = unreadable or error
    if position == 0 and unreadable is not None:
        raise unreadable
    if size - position <= _TRAILER:
        return None
    raise AudioError(f"is damaged ({size - position:,} of its {size:,} bytes cannot be decoded)")


def _candidates(file: BinaryIO, position: int, size: int) -> Iterator[Stream]:
    """What the first stream at or after a position can be."""
    if position == 0:
        # A format whose headers are understood; one that only libsndfile knows; a stream behind junk.
        if (stream := find_stream(file, 0, size, behind_junk=False)) is not None:
            yield stream
        yield Stream(0, size, is_parsed=False)
    if (stream := find_stream(file, position, size)) is not None:
        yield stream


class _StreamDecoder:
    """Decodes a stream, once."""

    def __init__(self, file: BinaryIO, stream: Stream, options: _Options):
        self._file, self._stream, self._options = file, stream, options
        self._format: tuple[float, int] | None = None  # rate in Hz, channels
        self._num_taken = 0  # frames that were yielded
        self._end: _StreamEnd | None = None

    def num_channels(self) -> int:
        """The channels according to the stream's header."""
        with self._open() as (decoder, _):
            return decoder.channels

    def decode(self) -> Generator[np.ndarray, None, _StreamEnd]:
        """Yields blocks at 16 kHz, mono. _UnreadableError is raised before any of them."""
        mixer = Mixer(self._options.channel)
        num_samples = 0
        with contextlib.closing(self._frames()) as frames:
            first = next(frames, None)  # opens the stream
            if first is not None:
                assert self._format is not None
                mono = mixer(itertools.chain([first], frames))
                for block in resample(mono, self._format[0], self._options.limit):
                    num_samples += len(block)
                    yield block
        assert self._end is not None
        return self._end._replace(flags=(*self._end.flags, *mixer.flags), num_samples=num_samples)

    def _frames(self, *, seek: bool = True) -> Generator[np.ndarray, None, None]:
        """The wanted frames behind those that were yielded before, `[n, channels]`; sets `_format` and `_end`."""
        with self._open() as (decoder, view):
            rate = check_rate(decoder.samplerate)
            if self._num_taken and self._format != (rate, decoder.channels):
                raise AudioError("changes its sampling rate or channels within the recording")
            self._format = rate, decoder.channels
            start = round(self._options.skip * rate)
            frames = None if self._options.take is None else max(1, round(self._options.take * rate))
            if frames is None and self._options.limit * rate + start < decoder.frames < _UNKNOWN_FRAMES:
                raise_too_long(self._options.limit)
            start += self._num_taken
            # A second early, because lossy decoders depend on what was before.
            target = max(0, start - int(rate)) if seek and start < decoder.frames else 0
            if target and not _seek(decoder, target):
                yield from self._frames(seek=False)
                return
            blocks = _Blocks(decoder, start - target, None if frames is None else frames - self._num_taken)
            for block in blocks:
                view.check()
                self._num_taken += len(block)
                yield block
            num_frames = target + blocks.num_frames
            if frames is not None and self._num_taken >= frames:
                self._end = _StreamEnd((), 0, self._stream.end, num_frames / rate, is_enough=True)
                return
            position, is_truncated = self._find_end(decoder, view, blocks.error, num_frames)
        if position is not None:
            self._end = _StreamEnd(("truncated-input",) if is_truncated else (), 0, position, num_frames / rate)
            return
        assert self._stream.fallback is not None
        self._stream = self._stream.fallback()
        try:
            yield from self._frames()
        except _UnreadableError as error:
            if self._num_taken:
                raise AudioError(f"is damaged ({error})") from error.__cause__
            raise

    def _find_end(
        self, decoder: _SequentialDecoder, view: _View, error: str | None, num_frames: int
    ) -> tuple[int | None, bool]:
        """Where in the file a stream really ended, and whether its own end is missing.

        The end is None where decoding stopped too early and the stream has a fallback.

        Args:
          error: of the decoder, if one stopped it.
          num_frames: how many there were.

        Raises:
          AudioError: the stream is damaged.
        """
        stream, left = self._stream, self._stream.end - view.position
        is_complete = num_frames >= decoder.frames
        if decoder.format == "FLAC" and (error is not None or not view.is_at_end):
            following = next_marker(self._file, stream.header_end, stream.end)
            is_last = left <= _TRAILER or is_only_tags(self._file, view.position, stream.end)
            if following < stream.end or (is_complete and is_last):
                return following, not is_complete and decoder.frames < _UNKNOWN_FRAMES
        if decoder.format == "MP3" and (left > _TRAILER or error is not None) and stream.fallback:
            return None, False
        if error is not None and not (view.is_at_end and num_frames):
            raise AudioError(f"is damaged ({error})")
        if decoder.format == "MP3":
            return (view.position if left > _TRAILER else stream.end), stream.is_truncated
        if is_complete and left > _TRAILER and (not stream.is_parsed or decoder.format == "FLAC"):
            raise AudioError(f"is damaged ({left:,} of its {stream.end:,} bytes cannot be decoded)")
        return stream.end, stream.is_truncated or error is not None or num_frames < decoder.frames < _UNKNOWN_FRAMES

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[_SequentialDecoder, _View]]:
        view = _View(self._file, self._stream)
        try:
            with _open(view) as decoder:
                rate, given = check_rate(decoder.samplerate), self._options.sampling_rate
                if given is not None and check_rate(given) != rate:
                    raise AudioError(f"has a sampling rate of {rate:g} Hz, but sampling_rate={given!r} was given")
                check_channels(decoder.channels)
                yield decoder, view
        except Exception:
            view.check()  # Whatever libsndfile made of it: the data is not at fault.
            raise
        view.check()


def _open(view: _View) -> _SequentialDecoder:
    try:
        return _SequentialDecoder(cast(Any, view))
    except (sf.SoundFileError, TypeError, ValueError) as error:
        raise _UnreadableError(f"is not audio that can be read ({_libsndfile_reason(error)})") from error


def _seek(decoder: _SequentialDecoder, frames: int) -> bool:
    """Goes to a frame. False if the format does not allow it."""
    try:
        return decoder.seek(frames) == frames
    except (sf.SoundFileError, ValueError, OSError):
        return False


class _Blocks:
    """Decodes to the end of the data, which is where the header says or earlier: float32 `[<= 65536, channels]` each.

    Fields:
      num_frames: frames that were decoded.
      num_taken: those of them that were not dropped.
      error: why decoding ended, if an error ended it.
    """

    def __init__(self, decoder: _SequentialDecoder, drop: int, take: int | None):
        """Drops the first `drop` frames and ends after `take` more."""
        self._decoder, self._drop, self._take = decoder, drop, take
        self.num_frames, self.num_taken = 0, 0
        self.error: str | None = None

    def __iter__(self) -> Iterator[np.ndarray]:
        buffer = np.empty((BLOCK_FRAMES, self._decoder.channels), np.float32)
        last = None if self._take is None else self._drop + self._take
        while self.error is None and (last is None or self.num_frames < last):
            block = buffer if last is None else buffer[: last - self.num_frames]
            block.fill(np.nan)
            try:
                frames = self._decoder.read(out=block)
            except (sf.SoundFileError, ValueError) as error:
                self.error = _libsndfile_reason(error)
                # What was decoded before the error: libsndfile leaves the rest, or zeros it behind the declared end.
                declared = block[: max(0, self._decoder.frames - self.num_frames)]
                unwritten = np.flatnonzero(np.isnan(declared[:, 0]))
                frames = declared[: unwritten[0]] if len(unwritten) else declared
            if len(frames) == 0:
                return
            kept = frames[max(0, self._drop - self.num_frames) :]
            self.num_frames += len(frames)
            self.num_taken += len(kept)
            if len(kept):
                yield kept


def _libsndfile_reason(error: Exception) -> str:
    return one_line(getattr(error, "error_string", None) or error).rstrip(".")


class _SequentialDecoder(sf.SoundFile):
    """Decodes front to back. soundfile would otherwise cut reads at the length in the header and seek after each."""

    def seekable(self) -> bool:
        return False


class _View:
    """A stream of a file, with its patches, as libsndfile reads it.

    libsndfile's callbacks cannot raise: a failed read is kept, to be raised afterwards. The view has no name: soundfile
    would take `x.raw` for headerless data and ask for its format.
    """

    def __init__(self, file: BinaryIO, stream: Stream) -> None:
        self._file, self._stream, self._offset = file, stream, 0
        self.error: OSError | None = None

    @property
    def position(self) -> int:
        """The next byte, counted in the file."""
        return self._stream.start + max(0, self._offset - len(self._stream.prefix))

    def check(self) -> None:
        """Raises the error of a read that failed."""
        if self.error is not None:
            raise self.error

    @property
    def is_at_end(self) -> bool:
        """Whether all bytes were read."""
        return self.position >= self._stream.end

    def read(self, size: int) -> bytes:
        prefix = self._stream.prefix[self._offset :][:size]
        if prefix:
            self._offset += len(prefix)
            return prefix
        position = self.position
        size = min(size, self._stream.end - position)
        if size <= 0:
            return b""
        try:
            self._file.seek(position)
            data = self._file.read(size)
        except Exception as error:  # a remote file raises what it likes
            self.error = error if isinstance(error, OSError) else OSError(one_line(error))
            return b""
        for at, patch in self._stream.patches.items():
            at += self._stream.start - position
            low, high = max(at, 0), min(at + len(patch), len(data))
            if low < high:
                data = data[:low] + patch[low - at : high - at] + data[high:]
        self._offset += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        size = len(self._stream.prefix) + self._stream.end - self._stream.start
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._offset, os.SEEK_END: size}
        target = origin[whence] + offset
        if target >= 0:  # Damaged headers point to before the start.
            self._offset = target
        return self._offset

    def tell(self) -> int:
        return self._offset
