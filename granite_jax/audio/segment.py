"""Cuts audio of any length into segments, at pauses where there are some.

    recording   ──speech────▁▁▁──speech──────────speech────▁▁──speech──
    segments    [────────────][───────────────────>
                           pause          <────────────────][──────────
                                       no pause: both sides hear the overlap

Segments tile the recording: nothing is dropped, not even silence. A cut in a pause is sharp. Where there is none, the
cut is at the quietest place, and the samples of both segments reach beyond it, so that every word is whole in one of
them; which of the two writes a word is decided when its time is known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from granite_jax.waveform import SAMPLING_RATE

__all__ = ["AudioSegment", "cut", "halve"]

_HOP = SAMPLING_RATE // 100
_PAUSE = 30  # hops, 0.3 s: shorter gaps can be part of a word
_OVERLAP = SAMPLING_RATE  # samples on both sides of a cut through speech
_LAST = SAMPLING_RATE  # the fewest samples of a recording's last segment
_LOCAL, _STEP = 400, 40  # hops among which the background is looked for, and after which it is looked for again
_CONTRAST = 19  # dB between speech and background below which nothing is a pause
_CLEAR = 30  # dB above which the background hides nothing of a word
_FLOOR, _SILENCE = 1e-10, -90  # mean square, and dB that are less than a step of 16 bits
_RUMBLE, _HUM = 4, 17  # coefficients of a hop's polynomial that hold what is no speech, and the hum's harmonics, too
_POLYNOMIALS = np.linalg.qr(np.polynomial.legendre.legvander(np.linspace(-1, 1, _HOP), _HUM - 1))[0].astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class AudioSegment:
    """A segment of a recording.

    Fields:
      offset: the sample of the recording at which `samples` begin.
      samples: float32 `[n]` at 16 kHz.
      begin, end: the samples of the recording that are the segment's own; the others are another segment's, too.
      is_last: whether the recording ends with it.
    """

    offset: int
    samples: np.ndarray
    begin: int
    end: int
    is_last: bool

    @property
    def overlaps(self) -> bool:
        """Whether other segments share some of the samples."""
        return self.end - self.begin < len(self.samples)

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the recording."""
        return self.is_last and self.begin == 0


def cut(blocks: Iterable[np.ndarray], seconds: float, *, overlap: bool = True) -> Iterator[AudioSegment]:
    """Cuts a recording into segments of at most `seconds`, which are at least five.

    Holds no more than two segments and a block at a time.

    Args:
      blocks: the recording in parts of any size, float32 `[n]` at 16 kHz.
      overlap: whether segments overlap where there is no pause.
    """
    limit = round(seconds * SAMPLING_RATE)
    parts: list[np.ndarray] = []
    size, offset, begin = 0, 0, 0  # of the parts
    for block in blocks:
        parts.append(block)
        size += len(block)
        while size >= limit + _LAST:
            samples = np.concatenate(parts)
            segment, kept = _first(samples, offset, begin, limit, limit // 2, limit, overlap)
            yield segment
            parts, begin, offset = [samples[kept:].copy()], segment.end, offset + kept
            size = len(parts[0])
    samples = np.concatenate(parts) if parts else np.empty(0, np.float32)
    if len(samples) > limit:
        segment, kept = _first(samples, offset, begin, limit, limit // 2, len(samples) - _LAST, overlap)
        yield segment
        samples, begin, offset = samples[kept:], segment.end, offset + kept
    yield AudioSegment(offset, samples, begin, offset + len(samples), is_last=True)


def halve(segment: AudioSegment, *, overlap: bool = True, at: int | None = None) -> tuple[AudioSegment, AudioSegment]:
    """Cuts a segment of at least five seconds in two, in its middle third.

    Args:
      at: a sample of `segment.samples` to cut at instead, as far as both parts keep a second of their own.
    """
    own, size = segment.begin - segment.offset, segment.end - segment.offset
    third = (size - own) // 3
    low, high = own + third, size - third
    if at is not None:
        low = high = min(max(at, own + _LAST), size - _LAST)
    limit = len(segment.samples)
    first, kept = _first(segment.samples, segment.offset, segment.begin, limit, low, high, overlap)
    rest = segment.samples[kept:]
    return first, AudioSegment(segment.offset + kept, rest, first.end, segment.end, segment.is_last)


def _first(
    samples: np.ndarray, offset: int, begin: int, limit: int, low: int, high: int, overlap: bool
) -> tuple[AudioSegment, int]:
    """The first segment of `samples`, cut between `low` and `high`; and how many samples the rest does without."""
    power = _power(samples[:limit])
    pauses = _pauses(power)
    position, is_pause = _choose(power, pauses, low, high)
    reach = 0 if is_pause or not overlap else _OVERLAP
    if reach and position + reach > limit:  # the cut moves, so that the segment is not longer than it may be
        position, _ = _choose(power, pauses, min(low, limit - reach), limit - reach)
    last, next_start = position + reach, max(position - reach, 0)
    return AudioSegment(offset, samples[:last].copy(), begin, offset + position, is_last=False), next_start


def _choose(power: np.ndarray, pauses: list[tuple[int, int, float]], low: int, high: int) -> tuple[int, bool]:
    """Where to cut, and whether that is a pause: the middle of a long pause, or else the quietest place."""
    low, high = low // _HOP, max(high // _HOP, low // _HOP + 1)
    best, position = 0.0, None
    for start, end, shortest in pauses:
        start, end = max(start, low), min(end, high)
        if end - start >= shortest:
            score = min(end - start, 100) / 100 + end / (2 * high)  # long pauses, and late ones
            if score > best:
                best, position = score, max((start + end) // 2, end - _PAUSE)
    if position is not None:
        return position * _HOP, True
    window = _smooth(power, 10)[low : high + 1]
    return (low + int(len(window) - 1 - np.argmin(window[::-1]))) * _HOP, False


def _pauses(power: np.ndarray) -> list[tuple[int, int, float]]:
    """The first hop of each quiet stretch, that after its last one, and the hops it must have to be a pause.

    A hop is quiet below a level between the background around it and the speech of the whole. The closer these are, the
    more of a word the background hides. So a pause must then be longer, and below `_CONTRAST` there is none.
    """
    level = 10 * np.log10(power + _FLOOR)
    top, background = np.percentile(level, 95), _background(level)
    contrast = top - background
    threshold = np.maximum(background + np.clip(0.3 * contrast, 3, 12), top - 35)
    silent = level < _SILENCE
    quiet = silent | (contrast >= _CONTRAST) & (level < threshold)
    shortest = _PAUSE + np.where(silent, 0, 1.5 * np.maximum(_CLEAR - contrast, 0))
    edges = np.flatnonzero(np.diff(np.concatenate([[False], quiet, [False]]).astype(np.int8))).tolist()
    return [(i, j, float(shortest[(i + j) // 2])) for i, j in zip(edges[::2], edges[1::2], strict=True)]


def _power(samples: np.ndarray) -> np.ndarray:
    """The mean square of each hop without offset, rumble and hum, float32 `[hops]`, smoothed over three.

    Within 10 ms a polynomial of degree n follows what is below some 25 (n + 1) Hz, and little above. What the cubic
    follows is an offset, rumble or the hum of 50 or 60 Hz, and goes. What higher degrees add, up to some 400 Hz, can be
    speech or harmonics of the hum: of its power, what is nearly always there goes.
    """
    hops = samples[: len(samples) // _HOP * _HOP].reshape(-1, _HOP)
    low, high = np.empty((2, len(hops)), np.float32)
    for start in range(0, len(hops), 80):  # products so small that BLAS starts no threads for them
        part = slice(start, start + 80)
        shares = hops[part] @ _POLYNOMIALS
        high[part] = np.square(hops[part] - shares @ _POLYNOMIALS.T).mean(axis=1)
        low[part] = np.square(shares[:, _RUMBLE:]).sum(axis=1) / _HOP
    low = _smooth(low, 3)
    return _smooth(high, 3) + np.maximum(low - 2 * _background(low), 0)


def _background(values: np.ndarray) -> np.ndarray:
    """The tenth percentile of the four seconds around each hop."""
    padded = np.pad(values, _LOCAL // 2, mode="edge")
    around = np.lib.stride_tricks.sliding_window_view(padded, _LOCAL)[: len(values) : _STEP]
    return np.repeat(np.percentile(around, 10, axis=1), _STEP)[: len(values)]


def _smooth(power: np.ndarray, width: int) -> np.ndarray:
    """The mean over `width` hops around each."""
    padded = np.pad(power, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.full(width, 1 / width), "valid")
