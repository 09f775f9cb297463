"""The three compiled programs of inference, each a jitted function of (params, inputs).

    encode    waveforms -> audio embeddings, CTC labels       on shapes (batch, samples)
    prefill   prompts and audio embeddings -> logits, cache   on shapes (batch, prompt, capacity)
    decode    logits and cache -> tokens                      on shapes (batch, capacity, room)

A `Bucket` fixes all of these shapes, so the number of compilations is at most three a bucket.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from granite_jax import ctc, model
from granite_jax.array_types import AudioEmbeddings, Lengths, Params, Samples, Tokens
from granite_jax.config import Config
from granite_jax.decoder import KVCache
from granite_jax.decoding import DecodeState, greedy_decode
from granite_jax.features import HOP, SAMPLING_RATE, log_mel, num_frames

TEXT_ROOM = 64  # prompt tokens besides the audio's that every bucket has room for
MIN_NEW_TOKENS = 200  # the released model's own limit
NEW_TOKENS_PER_SECOND = 6  # no supported language speaks faster


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Shapes of one batch: rows, samples at 16 kHz, prompt tokens, cache positions."""

    batch: int
    samples: int
    prompt: int
    capacity: int

    @property
    def room(self) -> int:
        """The most tokens that a row can be asked to generate: what an empty prompt would leave."""
        return self.capacity - self.prompt if self.capacity > self.prompt else self.capacity


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoded:
    """Fields: audio embeddings `[b, a, e]`; best CTC label of every frame, int32 `[b, t]`, blank past the row's end."""

    audio: AudioEmbeddings
    labels: Int[Array, "b t"]


class Programs:
    """The programs of one configuration, and a count of how often each was traced."""

    def __init__(self, config: Config, dtype: DTypeLike):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.traces: collections.Counter[str] = collections.Counter()
        self.encode = jax.jit(self._counted(self._encode))
        self.prefill = jax.jit(self._counted(self._prefill), static_argnames="capacity")
        self.decode = jax.jit(self._counted(self._decode), static_argnames="room", donate_argnames="cache")

    def _counted(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def counted(*args, **kwargs):
            self.traces[function.__name__.strip("_")] += 1
            return function(*args, **kwargs)

        return counted

    def _encode(self, params: Params, samples: Samples, lengths: Lengths) -> Encoded:
        frames = num_frames(lengths)
        hidden = model.encode(self.config, params, log_mel(samples, lengths), frames, dtype=self.dtype).hidden
        logits = model.ctc_logits(self.config, params, hidden, dtype=self.dtype)
        audio = model.project(self.config, params, hidden, frames, dtype=self.dtype)
        return Encoded(audio, ctc.best_labels(logits, frames))

    def _prefill(
        self, params: Params, tokens: Tokens, lengths: Lengths, audio: AudioEmbeddings, capacity: int
    ) -> tuple[Float[Array, "b 1 v"], KVCache]:
        return model.prefill(self.config, params, tokens, lengths, audio, capacity=capacity, dtype=self.dtype)

    def _decode(
        self, params: Params, logits: Float[Array, "b 1 v"], cache: KVCache, limits: Lengths, room: int
    ) -> DecodeState:
        decoder = self.config.decoder
        never = [self.config.audio_token_id]
        if decoder.pad_token_id is not None and decoder.pad_token_id != decoder.eos_token_id:
            never.append(decoder.pad_token_id)
        step = functools.partial(model.decode_step, self.config, params, dtype=self.dtype)
        return greedy_decode(step, logits, cache, limits, room=room, end_of_text=decoder.eos_token_id, never=never)


def new_token_budget(seconds: float) -> int:
    """Tokens that speech of this length may need, by default."""
    return max(MIN_NEW_TOKENS, math.ceil(NEW_TOKENS_PER_SECOND * seconds))


def make_bucket(config: Config, batch: int, seconds: float) -> Bucket:
    """The bucket of audio up to `seconds`, rounded up to whole projector windows, within the model's positions."""
    window = 2 * HOP * config.projector.window_size
    samples = math.ceil(seconds * SAMPLING_RATE / window) * window
    prompt = config.num_audio_tokens(num_frames(samples)) + TEXT_ROOM
    limit = config.decoder.max_position_embeddings
    capacity = min(limit, prompt + new_token_budget(seconds))
    return Bucket(batch, samples, min(prompt, capacity), capacity)


def default_buckets(config: Config, batch: int) -> tuple[Bucket, ...]:
    """At most eight buckets, 24 programs: full batches of short audio, and single rows up to the model's limit."""
    limit = max_seconds(config)
    short = [seconds for seconds in (5.0, 10.0, 20.0, 40.0) if seconds < limit]
    full = [make_bucket(config, batch, seconds) for seconds in short] if batch > 1 else []
    longest = make_bucket(config, 1, limit)
    # The last one takes whatever fits the positions at all: long prompts with short audio too.
    longest = dataclasses.replace(longest, prompt=longest.capacity)
    middle = [(40.0 * limit) ** 0.5] if limit > 80 else []
    singles = [make_bucket(config, 1, seconds) for seconds in (10.0, 40.0, *middle) if seconds < limit]
    return (*full, *singles, longest)


def max_seconds(config: Config) -> float:
    """The longest audio whose embeddings leave a position for anything else."""
    windows = config.decoder.max_position_embeddings // config.projector.num_queries
    return windows * config.projector.window_size * 2 * HOP / SAMPLING_RATE


def choose_bucket(buckets: Sequence[Bucket], batch: int, samples: int, prompt: int, limit: int) -> Bucket | None:
    """The cheapest bucket of `batch` rows that holds this much audio, prompt and new text; None if none does."""
    fitting = [
        bucket
        for bucket in buckets
        if bucket.batch == batch
        and samples <= bucket.samples
        and prompt <= bucket.prompt
        and prompt + limit <= bucket.capacity
        and limit <= bucket.room
    ]
    return min(fitting, key=lambda bucket: (bucket.capacity, bucket.prompt), default=None)
