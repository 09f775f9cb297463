"""Buckets: the shapes that programs are compiled for, and which of them a batch takes."""

import bisect
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from granite_jax.models.family import SpeechLMConfig
from granite_jax.models.layers.features import HOP, num_frames
from granite_jax.models.registry import family_of
from granite_jax.waveform import SAMPLING_RATE

TEXT_ROOM = 64  # prompt tokens, besides those of the audio, that every bucket holds
MIN_NEW_TOKENS = 200  # the released model's own limit
NEW_TOKENS_PER_SECOND = 6  # no supported language speaks faster
MIN_DRAFT = 32
_MANY_POSITIONS = 8192
MAX_LABELS_PER_SECOND = 25  # half of the frames
DRAFT_TOKENS_PER_SECOND = 7  # fast speech with a small vocabulary; longer drafts are truncated


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Shapes of one batch: rows, samples at 16 kHz, prompt tokens, cache positions."""

    batch: int
    samples: int
    prompt: int
    capacity: int

    def contains(self, other: "Bucket") -> bool:
        """Whether whatever fits the other bucket fits this one, in a batch of as many rows."""
        sizes = ("samples", "prompt", "capacity", "max_out_length")
        return self.batch == other.batch and all(getattr(self, size) >= getattr(other, size) for size in sizes)

    @property
    def cost(self) -> tuple[int, int]:
        """Orders buckets: one that contains another costs no less."""
        return self.capacity, self.samples

    @property
    def max_out_length(self) -> int:
        """The largest `max_new_tokens` of a row: the positions after the prompt, or all if a prompt can fill them."""
        return self.capacity - self.prompt if self.capacity > self.prompt else self.capacity

    @property
    def max_labels(self) -> int:
        """The most CTC labels of a text that can be aligned."""
        return label_budget(self.samples)

    @property
    def draft(self) -> int:
        """The most draft tokens of a row."""
        return draft_budget(self.samples)


def new_token_budget(seconds: float) -> int:
    """The default `max_new_tokens` for speech of this length."""
    return max(MIN_NEW_TOKENS, math.ceil(NEW_TOKENS_PER_SECOND * seconds))


def longest_audio(config: SpeechLMConfig, prompt_tokens: int, max_new_tokens: int | None = None) -> float:
    """Seconds of the longest audio that fits the model's positions with a prompt and new tokens; 0 if none does.

    Args:
      prompt_tokens: besides those of the audio.
      max_new_tokens: default those of `new_token_budget`, which grow with the audio.
    """
    window = config.projector.window_size * 2 * HOP / SAMPLING_RATE  # seconds

    def fits(windows: int) -> bool:
        new_tokens = max_new_tokens or new_token_budget(windows * window)
        used = prompt_tokens + windows * config.projector.num_queries + new_tokens
        return used <= config.decoder.max_position_embeddings

    most = config.decoder.max_position_embeddings // config.projector.num_queries
    return window * bisect.bisect_left(range(1, most + 1), True, key=lambda windows: not fits(windows))


def draft_budget(samples: int) -> int:
    """The most draft tokens used for this many samples; longer drafts are truncated."""
    return max(MIN_DRAFT, math.ceil(DRAFT_TOKENS_PER_SECOND * samples / SAMPLING_RATE))


def label_budget(samples: int) -> int:
    """The most CTC labels of a text that can be aligned to this many samples."""
    return math.ceil(MAX_LABELS_PER_SECOND * samples / SAMPLING_RATE)


def make_bucket(config: Any, batch: int, seconds: float) -> Bucket:
    """The bucket for audio of up to `seconds`: without a language model, for samples alone.

    With one, they are rounded up to full projector windows, within the model's positions.
    """
    if not _has_language_model(config):
        return Bucket(batch, math.ceil(seconds * SAMPLING_RATE), 0, 0)
    window = 2 * HOP * config.projector.window_size
    samples = math.ceil(seconds * SAMPLING_RATE / window) * window
    prompt = config.num_audio_tokens(num_frames(samples)) + TEXT_ROOM
    limit = config.decoder.max_position_embeddings
    capacity = min(limit, prompt + new_token_budget(seconds))
    return Bucket(batch, samples, min(prompt, capacity), capacity)


def default_buckets(config: Any, batch: int, segment_seconds: float = 30.0) -> tuple[Bucket, ...]:
    """At most five buckets, 15 programs: full batches of short audio, and single rows up to the model's limit.

    Programs compute what is filled (see `models.layers.packed`), so that shapes cost memory, not time. Segments of
    recordings fit a full batch. Models of many positions have one bucket more, for short audio with thousands of
    keywords in its prompt.
    """
    limit = config.max_seconds
    lengths = sorted({min(seconds, limit) for seconds in (10.0, max(30.0, segment_seconds))})
    full = [make_bucket(config, batch, seconds) for seconds in lengths] if batch > 1 else []
    longest = make_bucket(config, 1, limit)
    middle = [(40.0 * limit) ** 0.5] if limit > 80 else []
    singles = [make_bucket(config, 1, seconds) for seconds in (40.0, *middle) if seconds < limit]
    if _has_language_model(config):
        # The last bucket takes everything that fits the model's positions, long prompts with short audio included.
        longest = dataclasses.replace(longest, prompt=longest.capacity)
        if config.decoder.max_position_embeddings > _MANY_POSITIONS:
            short_audio = make_bucket(config, 1, 40.0)
            singles.append(dataclasses.replace(short_audio, prompt=longest.capacity, capacity=longest.capacity))
    return (*full, *singles, longest)


def _has_language_model(config: Any) -> bool:
    return "speech-lm" in family_of(config.model_type).recognizers


def encoder_buckets(buckets: Sequence[Bucket]) -> tuple[Bucket, ...]:
    """The buckets of the encoder alone, for the same audio."""
    return tuple(dict.fromkeys(Bucket(bucket.batch, bucket.samples, 0, 0) for bucket in buckets))


def choose_bucket(buckets: Sequence[Bucket], batch: int, samples: int, prompt: int, limit: int) -> Bucket | None:
    """The cheapest bucket of `batch` rows that holds this much audio, prompt and new text, or None."""
    fitting = [
        bucket
        for bucket in buckets
        if bucket.batch == batch
        and samples <= bucket.samples
        and prompt <= bucket.prompt
        and prompt + limit <= bucket.capacity
        and limit <= bucket.max_out_length
    ]
    return min(fitting, key=lambda bucket: (bucket.capacity, bucket.prompt, bucket.samples), default=None)
