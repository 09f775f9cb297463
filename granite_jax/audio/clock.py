"""Keeps a recording's clock: what is missing becomes silence of its length, and what comes twice is left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from granite_jax.audio.resample import BLOCK_FRAMES

Span = tuple[float, float]
"""Seconds of the recording: from, to."""

_TOLERANCE = 0.1  # seconds by which the clock and the samples of a sound file can differ
_EXACT = 0.002  # seconds, where something could not be decoded, so that a gap is expected
_BELIEVED = 0.2  # seconds of sound after which a jump forward is believed
_RESTARTED = 10.0  # seconds of sound after which a jump backward is a clock that starts anew
_NEAR_START = 1.0  # seconds from the beginning, where clocks start anew
_MAX_GAP = 3600.0  # seconds of silence in all, where the length of the file is not known
_MAX_SPANS = 100


class Sound(NamedTuple):
    """What a decoder gives.

    Fields:
      time: seconds on the file's clock; None to follow what was before.
      frames: any type, `[n, channels]`.
      rate: Hz.
      follows_loss: whether something in between could not be decoded.
    """

    time: float | None
    frames: np.ndarray
    rate: float
    follows_loss: bool = False

    @property
    def seconds(self) -> float:
        """Its length."""
        return len(self.frames) / self.rate


class Chunk(NamedTuple):
    """Sound at its place: `start` is the frame at which it begins, counted from the part's beginning at this rate."""

    start: int
    frames: np.ndarray
    rate: float


@dataclasses.dataclass
class _Jump:
    """Sound behind a jump of the clock, which is kept until it is clear what the jump is."""

    sounds: list[Sound]
    time: float
    seconds: float = 0.0

    @property
    def end(self) -> float:
        return self.time + self.seconds


class Clock:
    """Places the sound of one part of a file.

    Jumps of the clock are believed once sound has followed them. One that is taken back was a wrong time stamp if it
    went forward, and sound out of order, which is left out, if it went backward. A clock that goes on from its earlier
    time has started anew, as in transport streams one after another.

    Fields:
      seconds: the place of the next sound.
      damage: what is missing, or was left out.
    """

    def __init__(self, start: float = 0.0, longest: float | None = None):
        """
        Args:
          start: seconds at which the sound begins.
          longest: seconds of the part, if they are known: no gap reaches beyond.
        """
        self.seconds = start
        self.damage: list[Span] = []
        self._longest, self._zero, self._silent = longest, 0.0, 0.0
        self._jump: _Jump | None = None
        self._ready: list[Sound] = []
        self._num_ready = 0

    def place(self, sound: Sound) -> Iterator[Chunk]:
        """Takes the next sound; yields what is at its place."""
        if self._jump is not None and not self._is_taken_back(sound):
            if sound.time is None or _is_near(sound, self._zero + self._jump.end):
                self._jump.sounds.append(sound)
                self._jump.seconds += sound.seconds
                yield from self._judge(self._jump)
                return
            yield from self._settle(self._jump)
        elif self._jump is not None:
            jump, self._jump = self._jump, None
            if jump.time > self.seconds:  # a wrong time stamp
                yield from self._append(*jump.sounds)
            else:  # out of order, or for the second time
                self._note(self.seconds, self.seconds)
        if sound.time is None or _is_near(sound, self._zero + self.seconds):
            yield from self._append(sound)
        else:
            self._jump = _Jump([sound], sound.time - self._zero, sound.seconds)

    def _is_taken_back(self, sound: Sound) -> bool:
        """Whether sound is where it would be without the jump."""
        assert self._jump is not None
        if sound.time is None:
            return False
        sound = sound._replace(follows_loss=False)
        follows = _is_near(sound, self._zero + self._jump.end)
        if self._jump.time > self.seconds:
            return not follows and _is_near(sound, self._zero + self.seconds + self._jump.seconds)
        return (not follows or not self._is_new(self._jump)) and _is_near(sound, self._zero + self.seconds)

    def _judge(self, jump: _Jump) -> Iterator[Chunk]:
        """Believes a jump when enough sound has followed it."""
        is_forward = jump.time > self.seconds
        is_passed = not is_forward and self._is_new(jump) and jump.end > self.seconds
        if is_passed or jump.seconds >= (_BELIEVED if is_forward else _RESTARTED):
            yield from self._settle(jump)

    def _is_new(self, jump: _Jump) -> bool:
        """Whether a clock went back to its beginning."""
        return jump.time + self._zero < _NEAR_START

    def finish(self) -> Iterator[Chunk]:
        """Yields what is left."""
        if self._jump is not None:
            yield from self._settle(self._jump)
        yield from self._flush()

    def _settle(self, jump: _Jump) -> Iterator[Chunk]:
        """Appends what is behind a jump, with silence in front of it where it went forward."""
        self._jump = None
        gap = jump.time - self.seconds
        if 0 < gap <= (_MAX_GAP - self._silent if self._longest is None else self._longest + 1.0 - self.seconds):
            yield from self._silence(gap, jump.sounds[0])
        else:
            self._zero += gap
        yield from self._append(*jump.sounds)

    def _silence(self, seconds: float, like: Sound) -> Iterator[Chunk]:
        self._note(self.seconds, self.seconds + seconds)
        self._silent += seconds
        left = round((self.seconds + seconds) * like.rate) - round(self.seconds * like.rate)
        while left > 0:
            size = min(left, BLOCK_FRAMES)
            yield from self._append(Sound(None, np.zeros((size, like.frames.shape[1]), np.float32), like.rate))
            left -= size

    def _append(self, *sounds: Sound) -> Iterator[Chunk]:
        for sound in sounds:
            if self._ready and (self._num_ready >= BLOCK_FRAMES // 2 or _kind(self._ready[-1]) != _kind(sound)):
                yield from self._flush()
            self._ready.append(sound)
            self._num_ready += len(sound.frames)
            self.seconds += sound.seconds

    def _flush(self) -> Iterator[Chunk]:
        if not self._ready:
            return
        rate, frames = self._ready[0].rate, self._ready[0].frames
        if len(self._ready) > 1:
            frames = np.concatenate([each.frames for each in self._ready])
        self._ready, self._num_ready = [], 0
        yield Chunk(round(self.seconds * rate) - len(frames), frames, rate)

    def _note(self, start: float, end: float) -> None:
        self.damage = joined_spans([*self.damage, (start, end)])


def _is_near(sound: Sound, expected: float) -> bool:
    assert sound.time is not None
    return -_TOLERANCE <= sound.time - expected <= (_EXACT if sound.follows_loss else _TOLERANCE)


def _kind(sound: Sound) -> tuple[object, ...]:
    return sound.rate, sound.frames.shape[1], sound.frames.dtype


def joined_spans(spans: list[Span]) -> list[Span]:
    """The spans in order, as one where less than a second is between them, or where there are very many."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and (start - joined[-1][1] < 1.0 or len(joined) == _MAX_SPANS):
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined
