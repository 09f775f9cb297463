"""Sample-level steps of reading audio: check, scale, mix down and resample blocks of frames, in bounded memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable, Iterator
from typing import Any, NoReturn

import numpy as np
import soxr

from granite_jax.errors import AudioError
from granite_jax.waveform import SAMPLING_RATE

RATE_LIMITS = (1_000, 768_000)
"""Hz; accepted sampling rates of recordings."""
MAX_CHANNELS = 64
MAX_AMPLITUDE = 100.0
"""Float audio is nominally in [-1, 1]; far beyond that it is integer PCM that was cast without being scaled."""

BLOCK_FRAMES = 1 << 16
"""Audio is decoded, mixed down and resampled in blocks of at most this many frames."""
CHUNK_VALUES = 1 << 22
"""Frames times channels that are mixed down in the same way."""


@dataclasses.dataclass(frozen=True)
class Condition:
    """What is known of audio when all of it was read.

    Fields:
      flags: "truncated-input" if the file lacks its end, "damaged-input" if some of it could not be decoded,
        "one-channel" if the channels cancel each other out somewhere, and the samples there are those of the loudest,
        "duplicate-channel" if the channel that was asked for is the same as an earlier one, and "one-track" if there
        are other audio tracks.
      damage: the seconds, from and to, that could not be decoded and are silent.
    """

    flags: tuple[str, ...] = ()
    damage: tuple[tuple[float, float], ...] = ()


WHOLE = Condition()
Blocks = Generator[np.ndarray, None, Condition]
"""Float32 blocks `[n]` at 16 kHz, mono; returns their condition. Closing it closes what it reads from."""


class TooLongError(AudioError):
    """The audio is longer than the caller's limit."""


def check_rate(rate: Any) -> float:
    """The rate in Hz as a float; AudioError unless it is a number within `RATE_LIMITS`."""
    low, high = RATE_LIMITS
    try:
        value = float("nan") if isinstance(rate, (bool, str, bytes)) else float(rate)
    except (TypeError, ValueError, OverflowError):
        value = float("nan")
    if not low <= value <= high:
        raise AudioError(f"sampling rate must be between {low} and {high} Hz, not {rate!r:.40}")
    return value


def check_channels(channels: int) -> None:
    """AudioError unless the number of channels is plausible: blocks are as wide as this."""
    if not 1 <= channels <= MAX_CHANNELS:
        raise AudioError(f"has {channels} channels, 1 to {MAX_CHANNELS} are supported")


def scale(frames: np.ndarray) -> np.ndarray:
    """Integers to [-1, 1) by the range of their type, unsigned ones around its middle; floats are unchanged."""
    if frames.dtype.kind not in "iu":
        return frames
    half = 2.0 ** (8 * frames.dtype.itemsize - 1)
    if frames.dtype.kind == "i":  # as exact in float32
        scaled = frames.astype(np.float32)
        scaled *= np.float32(1 / half)
        return scaled
    return (frames.astype(np.float64) - (half if frames.dtype.kind == "u" else 0.0)) / half


class Mixer:
    """Mixes blocks of frames down to mono, and takes one channel where the channels cancel each other out.

    Channels of opposite phase, which wrong wiring and some "vocal" effects make, have a mean near zero. That is decided
    chunk by chunk: a chunk has up to `CHUNK_VALUES` values.

    Fields:
      flags: of what was mixed so far: "one-channel" if the loudest channel was taken instead of the mean in any chunk,
        "duplicate-channel" if the one that was asked for is the same as an earlier one.
    """

    def __init__(self, channel: int | None = None):
        """Takes the mean over the channels, or `channel` alone, counted from 0."""
        self._channel = channel
        self._took_one_channel = self._has_begun = False
        self._equal_channels = list(range(channel or 0))  # those before it that do not differ so far

    @property
    def flags(self) -> tuple[str, ...]:
        flags = {"one-channel": self._took_one_channel, "duplicate-channel": bool(self._equal_channels)}
        return tuple(flag for flag, is_set in flags.items() if is_set)

    def __call__(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Blocks float32 `[n, channels]` -> blocks float32 `[n]`, of at most `BLOCK_FRAMES` frames.

        Raises:
          AudioError: there is no such channel at the beginning.
        """
        chunk: list[np.ndarray] = []
        num_values = 0
        for block in blocks:
            for frames in _split(block, BLOCK_FRAMES):
                num_channels = frames.shape[1]
                if self._channel is not None and self._channel >= num_channels and not self._has_begun:
                    raise AudioError(f"has {num_channels} channels, and no channel {self._channel} (the first is 0)")
                self._has_begun = True
                if num_channels == 1 or self._channel is not None:
                    own = frames[
                        :, min(self._channel or 0, num_channels - 1)
                    ]  # where there are fewer than before, the last
                    earlier = [i for i in self._equal_channels if i < num_channels]
                    self._equal_channels = [i for i in earlier if np.array_equal(frames[:, i], own)]
                    yield own.copy() if num_channels > 1 else own
                    continue
                if num_values + frames.size > CHUNK_VALUES:
                    yield from self._mixed(chunk)
                    chunk, num_values = [], 0
                chunk.append(frames)
                num_values += frames.size
        yield from self._mixed(chunk)

    def _mixed(self, chunk: list[np.ndarray]) -> Iterator[np.ndarray]:
        """Mono blocks of a chunk, whose channels cancel if their mean is 10 dB weaker than that of unrelated ones."""
        mixed = [frames.mean(axis=1, dtype=np.float32) for frames in chunk]
        energies = sum((np.einsum("nc,nc->c", frames, frames, dtype=np.float64) for frames in chunk), np.zeros(1))
        energy = sum(float(np.dot(block, block)) for block in mixed)
        if energy < 0.1 * energies.sum() / len(energies) ** 2:
            self._took_one_channel = True
            loudest = int(energies.argmax())
            mixed = [frames[:, loudest].copy() for frames in chunk]
        chunk.clear()
        yield from mixed


def checked(frames: np.ndarray) -> np.ndarray:
    """A float32 copy of frames of any float type. AudioError if a sample is not finite or far beyond [-1, 1]."""
    if frames.dtype.name == "bfloat16":
        frames = frames.astype(np.float32)
    peak = float(max(frames.max(initial=0.0), -frames.min(initial=0.0)))
    if not np.isfinite(peak):
        raise AudioError("holds NaN or infinite samples")
    if peak > MAX_AMPLITUDE:
        raise AudioError(f"float samples should be within [-1, 1], but one is {peak:.6g}: scale them first")
    return frames.astype(np.float32)


def _split(frames: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (frames[start : start + size] for start in range(0, len(frames), size))


def resample(blocks: Iterable[np.ndarray], rate: float, limit: float) -> Iterator[np.ndarray]:
    """Resamples mono float32 blocks at `rate` to float32 blocks `[n]` at 16 kHz.

    Raises:
      TooLongError: there are more than `limit` seconds, which may be infinite.
    """
    stream = None if rate == SAMPLING_RATE else soxr.ResampleStream(rate, SAMPLING_RATE, 1, dtype="float32")
    num_frames = 0
    for block in blocks:
        num_frames += len(block)
        if num_frames > limit * rate:
            raise_too_long(limit)
        resampled = block if stream is None else stream.resample_chunk(block)
        if len(resampled):
            yield resampled
    if stream is not None and num_frames:
        rest = stream.resample_chunk(np.empty(0, np.float32), last=True)
        if len(rest):
            yield rest


def raise_too_long(limit: float) -> NoReturn:
    """Raises TooLongError for audio of more than `limit` seconds."""
    raise TooLongError(f"is longer than {limit:g} seconds")
