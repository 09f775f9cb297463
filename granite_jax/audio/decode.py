"""Decodes encoded audio in blocks, part by part, believing no header: by FFmpeg, or else by libsndfile."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
from collections.abc import Generator, Iterable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from granite_jax.audio.clock import Chunk, Clock, Sound, Span, joined_spans
from granite_jax.audio.ffmpeg import FFmpegDecoder, NoSeekError
from granite_jax.audio.markers import TRAILER, is_only_tags, read
from granite_jax.audio.parts import HEAD, Part, find_parts
from granite_jax.audio.resample import (
    MAX_AMPLITUDE,
    MAX_CHANNELS,
    RATE_LIMITS,
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
from granite_jax.audio.sndfile import SndfileDecoder
from granite_jax.audio.views import FileView, UnreadableError, View, has_marker, view_of
from granite_jax.errors import AudioError
from granite_jax.files import git_lfs
from granite_jax.waveform import SAMPLING_RATE

_MAX_PARTS = 10_000
_MAX_UNREADABLE = 100
_SLACK = 0.5  # seconds that the length in a container's header and the decoded audio can differ by
_MIN_GAP = 0.002  # seconds that are missing, if they are not the rounding of a header
_MIN_SEEK = 2.0  # seconds


def decode(
    file: BinaryIO,
    sampling_rate: float | None,
    limit: float,
    offset: float = 0.0,
    duration: float | None = None,
    channel: int | None = None,
) -> Blocks:
    """Decodes all parts of a seekable file, one after another, in blocks.

    What cannot be decoded is silence of its length.

    Args:
      sampling_rate: in Hz. If given, the file's own must agree with it.
      limit: seconds to accept, possibly infinite.
      offset, duration: the excerpt to decode, in seconds of the file; to its end without a duration.
      channel: take this channel alone, counted from 0.

    Raises:
      AudioError: the data is at fault, and nothing of it can be decoded.
      OSError: reading failed.
    """
    _check_head(file)
    if duration is not None and duration <= 0:
        raise AudioError(f"duration is {duration:g}, not a positive number of seconds")
    parts = _Parts(file, sampling_rate, limit, offset, duration)
    mixer, num_samples = Mixer(channel), 0
    with contextlib.closing(parts.pieces()) as pieces:
        for (_, rate, _), run in itertools.groupby(pieces, key=_Piece.kind):
            for block in resample(mixer(piece.frames for piece in run), rate, limit):
                num_samples += len(block)
                if num_samples > limit * SAMPLING_RATE + 1:  # resampling rounds lengths up
                    raise_too_long(limit)
                yield block
    if offset and num_samples == 0:
        raise AudioError(f"has no audio at {offset:g} seconds")
    return parts.condition(mixer.flags)


def num_channels(file: BinaryIO) -> int:
    """The channels of the first part of a seekable file. Raises what `decode` raises."""
    _check_head(file)
    unreadable = None
    for part in find_parts(file, 0, file.seek(0, io.SEEK_END)):
        try:
            with contextlib.closing(_open(file, part)[0]) as decoder:
                count = decoder.num_channels
                check_channels(count)
                return count
        except UnreadableError as error:
            unreadable = unreadable or error
    raise unreadable or AudioError("is not audio that can be read")


def _check_head(file: BinaryIO) -> None:
    """Raises AudioError if a file is empty, or the pointer to another file."""
    if file.seek(0, io.SEEK_END) == 0:
        raise AudioError("is empty")
    if git_lfs.is_pointer(read(file, 0, HEAD)):
        raise AudioError(git_lfs.PROBLEM)


def _open(file: BinaryIO, part: Part, *, seek: bool = False) -> tuple[FFmpegDecoder | SndfileDecoder, View]:
    """The decoder of a part, which can `seek`. Raises UnreadableError if its library does not know it."""
    view = FileView(file, part) if seek else view_of(file, part)
    return (SndfileDecoder(view) if part.format is None else FFmpegDecoder(view, part)), view


class _Piece(NamedTuple):
    """Frames float32 `[n, channels]` that are wanted, of a part."""

    number: int
    rate: float
    frames: np.ndarray

    def kind(self) -> tuple[int, float, int]:
        """What pieces have in common that are resampled as one."""
        return self.number, self.rate, self.frames.shape[1]


class _Parts:
    """Decodes the excerpt of a file; the arguments are those of `decode`."""

    def __init__(
        self, file: BinaryIO, sampling_rate: float | None, limit: float, offset: float, duration: float | None
    ):
        self._file, self._sampling_rate, self._limit = file, sampling_rate, limit
        self._offset, self._duration = offset, duration
        self._size = file.seek(0, io.SEEK_END)
        self._flags: set[str] = set()
        self._damage: list[Span] = []
        self._seconds = 0.0  # of the parts before
        self._num_unreadable = 0
        self._is_enough = self._has_sound = self._is_scaled = self._is_lossy = False

    def pieces(self) -> Generator[_Piece, None, None]:
        """What is wanted, part by part. Raises AudioError if nothing can be decoded."""
        position = 0
        for number in range(_MAX_PARTS):
            end = yield from self._next_part(position, number)
            if end is None or self._is_enough:
                break
            position = max(end, position + 1)
        else:
            self._note(0.0)  # what is left of a file of very many recordings
        if not self._has_sound and self._damage:
            raise AudioError("is damaged: nothing of it can be decoded")

    def condition(self, flags: Iterable[str]) -> Condition:
        """Damage of the excerpt; its flags, together with those of channels."""
        last = self._seconds - self._offset if self._duration is None else self._duration
        spans = [(low - self._offset, high - self._offset) for low, high in self._damage]
        inside = [(max(low, 0.0), min(high, last)) for low, high in spans if high >= 0.0 and low <= last]
        damage = joined_spans([(round(low, 3), round(high, 3)) for low, high in inside])
        flags = {*self._flags, *flags, *(["damaged-input"] if damage else [])}
        order = ("truncated-input", "damaged-input", "one-channel", "duplicate-channel", "one-track")
        return Condition(tuple(flag for flag in order if flag in flags), tuple(damage))

    def _next_part(self, position: int, number: int) -> Generator[_Piece, None, int | None]:
        """Decodes the first part at or after a position, and returns its end; None if there is none."""
        if position and is_only_tags(self._file, position, self._size):
            return None
        unreadable = None
        for part in find_parts(self._file, position, self._size):
            if part.start - position > TRAILER and not is_only_tags(self._file, position, part.start):
                self._note(0.0)
            try:
                return (yield from self._decode(part, number))
            except UnreadableError as error:
                if position:
                    self._note(0.0)
                    self._num_unreadable += 1
                    return part.start + 1 if self._num_unreadable < _MAX_UNREADABLE else self._size
                if unreadable is None or part.format is not None:
                    unreadable = error
        if position == 0:
            raise AudioError(str(unreadable)) from unreadable and unreadable.__cause__
        if self._size - position > TRAILER:
            self._note(0.0)
        return None

    def _decode(self, part: Part, number: int) -> Generator[_Piece, None, int]:
        """Decodes a part; returns its end. Raises UnreadableError before any piece."""
        if self._offset - self._seconds > _MIN_SEEK and part.format is not None and not part.is_framed:
            with contextlib.suppress(NoSeekError):
                return (yield from self._decode_from(part, number, seek=True))
        return (yield from self._decode_from(part, number, seek=False))

    def _decode_from(self, part: Part, number: int, *, seek: bool) -> Generator[_Piece, None, int]:
        decoder, view = _open(self._file, part, seek=seek)
        with contextlib.closing(decoder):
            self._check_length(decoder.seconds)
            self._is_lossy, clock = decoder.is_lossy, None
            for sound in decoder.sounds(self._offset - self._seconds, seek=seek):
                if clock is None and not self._is_wanted(sound):
                    self._note(0.0)
                    return view.end
                if not (RATE_LIMITS[0] <= sound.rate <= RATE_LIMITS[1] and sound.frames.shape[1] <= MAX_CHANNELS):
                    continue  # damage that resembles a frame
                if clock is None and seek and isinstance(view, FileView) and not self._is_first(part, view.tell()):
                    raise NoSeekError
                clock = clock or Clock(sound.time or 0.0, decoder.seconds)
                yield from self._wanted(clock.place(sound), number)
                if self._is_enough:
                    break
            if clock is None:
                if decoder.has_failed or (decoder.seconds and not decoder.skipped):
                    self._note(0.0)
                self._seconds += decoder.skipped
                return view.end
            yield from self._wanted(clock.finish(), number)
            for low, high in [*clock.damage, *view.lost]:
                self._note(low, high)
            if not self._is_enough:
                self._note_end(part, decoder, view, clock.seconds)
            self._flags |= {"one-track"} if decoder.num_tracks > 1 else set()
            self._seconds += clock.seconds
            self._has_sound = True
            return view.end

    def _wanted(self, chunks: Iterable[Chunk], number: int) -> Iterator[_Piece]:
        """What belongs to the excerpt."""
        for chunk in chunks:
            low = round((self._offset - self._seconds) * chunk.rate) - chunk.start
            high = len(chunk.frames)
            if self._duration is not None:
                high = low + max(1, round(self._duration * chunk.rate))
                self._is_enough |= high <= len(chunk.frames)
            frames = chunk.frames[max(low, 0) : max(high, 0)]
            if len(frames):
                yield _Piece(number, chunk.rate, self._cleaned(frames, chunk.start + max(low, 0), chunk.rate))

    def _cleaned(self, frames: np.ndarray, start: int, rate: float) -> np.ndarray:
        """Frames as float32, without values that no sound has, which damage makes."""
        if frames.dtype.kind in "iu":
            return scale(frames).astype(np.float32, copy=False)
        peak = max(frames.max(), -frames.min())
        if peak <= (1.0 if self._is_lossy else MAX_AMPLITUDE):  # which is false for NaN
            self._is_scaled |= peak > 0.0
            return frames.astype(np.float32, copy=False)
        if self._is_lossy:
            return np.clip(np.nan_to_num(frames, nan=0.0), -1.0, 1.0).astype(np.float32)
        if not self._is_scaled and np.median(np.abs(np.nan_to_num(frames[frames != 0], nan=0.0))) > 1.0:
            return checked(frames)  # which raises: all is out of scale
        is_good = np.abs(frames) <= MAX_AMPLITUDE
        if not (is_good.any() or self._is_scaled):
            return checked(frames)  # which raises: there is nothing else so far
        bad = start + np.flatnonzero(~is_good.all(axis=1))
        self._note(float(bad[0]) / rate, float(bad[-1] + 1) / rate)
        return np.where(is_good, frames, 0.0).astype(np.float32)

    def _is_first(self, part: Part, end: int) -> bool:
        """Whether a byte is of this part, and not of another one behind it, which has a clock of its own."""
        return not (part.is_marked and has_marker(self._file, part, end))

    def _check_length(self, seconds: float | None) -> None:
        limit = self._limit
        if self._duration is not None or seconds is None:
            return
        if self._seconds + seconds - self._offset > limit:
            raise_too_long(limit)

    def _is_wanted(self, first: Sound) -> bool:
        """Whether a part can be read. Raises AudioError if the first one cannot, or none is as the caller says."""
        try:
            rate = check_rate(first.rate)
            check_channels(first.frames.shape[1])
        except AudioError:
            if self._has_sound:
                return False
            raise
        given = self._sampling_rate
        if given is not None and check_rate(given) != rate:
            raise AudioError(f"has a sampling rate of {rate:g} Hz, but sampling_rate={given!r} was given")
        return True

    def _note_end(self, part: Part, decoder: FFmpegDecoder | SndfileDecoder, view: View, seconds: float) -> None:
        """Notes what is wrong with the end of a part."""
        declared = math.inf if decoder.seconds is None else decoder.seconds
        slack = _MIN_GAP if part.is_exact else _SLACK
        is_short = declared < math.inf and seconds < declared - slack
        if decoder.has_failed and part.is_framed and not view.is_truncated:
            self._note(seconds)
        elif view.is_truncated or is_short or (decoder.has_failed and seconds < declared - _MIN_GAP):
            self._flags.add("truncated-input")

    def _note(self, start: float, end: float | None = None) -> None:
        """Notes damage, in seconds of the part."""
        self._damage.append((self._seconds + start, self._seconds + (start if end is None else end)))
