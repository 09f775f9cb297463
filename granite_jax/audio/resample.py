"""Sample-level steps of reading audio: check, scale, mix down and resample blocks of frames, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import numpy as np
import soxr

from granite_jax.errors import AudioError

SAMPLE_RATE = 16_000
"""Hz; the only rate the model's features are defined for."""
RATE_LIMITS = (1_000, 768_000)
"""Hz; accepted sampling rates of recordings."""
MAX_CHANNELS = 64
MAX_AMPLITUDE = 100.0
"""Float audio is nominally in [-1, 1]; far beyond that it is integer PCM that was cast without being scaled."""


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
    return (frames.astype(np.float64) - (half if frames.dtype.kind == "u" else 0.0)) / half


class Mixer:
    """Mixes blocks of frames down to mono, and notices channels that cancel each other out.

    Channels of opposite phase, which wrong wiring and some "vocal" effects make, have a mean near zero.
    """

    def __init__(self, channel: int | None = None):
        """Takes the mean over the channels, or `channel` alone."""
        self._channel = channel
        self._energies, self._energy = np.zeros(1), 0.0  # of each channel; of the mix

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """`[n, channels]` of any float type -> float32 `[n]`."""
        if frames.dtype.name == "bfloat16":
            frames = frames.astype(np.float32)
        if not np.isfinite(frames).all():
            raise AudioError("holds NaN or infinite samples")
        peak = float(np.abs(frames).max())
        if peak > MAX_AMPLITUDE:
            raise AudioError(f"float samples should be within [-1, 1], but one is {peak:.6g}: scale them first")
        frames = frames.astype(np.float32)
        if frames.shape[1] == 1 or self._channel is not None:
            return frames[:, self._channel or 0].copy()
        mixed = frames.mean(axis=1, dtype=np.float32)
        self._energies = self._energies + np.einsum("nc,nc->c", frames, frames, dtype=np.float64)
        self._energy += float(np.dot(mixed, mixed))
        return mixed

    @property
    def cancels(self) -> bool:
        """Whether the mix is 10 dB weaker than if the channels had nothing to do with each other."""
        return self._energy < 0.1 * self._energies.sum() / len(self._energies) ** 2

    @property
    def loudest(self) -> int:
        """The channel with the most energy."""
        return int(self._energies.argmax())


def resample(blocks: Iterable[np.ndarray], rate: float, limit: float) -> np.ndarray:
    """Joins mono float32 blocks at `rate` into float32 [n] at 16 kHz, n at most `limit` seconds."""
    stream = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
    parts, frames = [], 0
    for block in blocks:
        frames += len(block)
        if frames > limit * rate:
            raise_too_long(limit)
        parts.append(block if stream is None else stream.resample_chunk(block))
    if stream is not None and frames:
        parts.append(stream.resample_chunk(np.empty(0, np.float32), last=True))
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def raise_too_long(limit: float) -> NoReturn:
    """Raises TooLongError for audio of more than `limit` seconds."""
    raise TooLongError(f"is longer than {limit:g} seconds")


def one_line(value: object) -> str:
    """The start of another library's message, on one line, for use in this program's messages."""
    return " ".join(str(value).split())[:200]
