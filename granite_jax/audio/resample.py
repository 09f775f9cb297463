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
        value = float("nan") if isinstance(rate, (bool, str)) else float(rate)
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


def mono(frames: np.ndarray) -> np.ndarray:
    """[n, channels] of any float type to float32 [n], the mean over the channels."""
    if frames.dtype.name == "bfloat16":
        frames = frames.astype(np.float32)
    if not np.isfinite(frames).all():
        raise AudioError("holds NaN or infinite samples")
    peak = float(np.abs(frames).max())
    if peak > MAX_AMPLITUDE:
        raise AudioError(f"float samples should be within [-1, 1], but one is {peak:.6g}: scale them first")
    frames = frames.astype(np.float32)
    return frames[:, 0] if frames.shape[1] == 1 else frames.mean(axis=1, dtype=np.float32)


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
