"""Granite language model and its KV cache.

Reference: `GraniteForCausalLM` of transformers. One module computes both prefill and decode steps: positions are per
row, a step can have several tokens, and the cache is only read inside the layers.

The cache at a step of two tokens (row 0 holds 4 positions, row 1 holds 2; `.` unwritten or rolled back):

    slot      0 1 2 3 4 5 6          a new token attends to the row's first `lengths` slots
    row 0     x x x x n n .          and, causally, to the step's own keys `n`, which are
    row 1     x x n n . . .          written after all layers ran, at the row's own offset

A step reads the slots up to the longest row, rounded up to one of a few sizes (`KVCache.prefixes`): here 0 to 3.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from granite_jax.array_types import Cache, Hidden, Lengths, Logits, Tokens
from granite_jax.models.layers import linear
from granite_jax.models.layers.linear import Linear
from granite_jax.models.layers.rotary import Rotary
from granite_jax.models.layers.stack import for_layers, make_layers

_QUERY_CHUNK = 512  # prompt positions whose scores are held at once
_FIRST_PREFIX, _PREFIX_STEP = 64, 64  # slots of the cache


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Granite language model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rotary: Rotary
    rms_norm_eps: float
    hidden_act: str
    embedding_multiplier: float
    attention_multiplier: float
    residual_multiplier: float
    logits_scaling: float
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_id: int
    pad_token_id: int | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (rotated) and values of all layers.

    Fields:
      k, v: `[l, b, k, s, h]`, the order in which attention reads them; slots from `lengths` on are ignored.
      lengths: int32 `[b]`, positions of each row. Rolling back lowers them.
    """

    k: Cache
    v: Cache
    lengths: Lengths

    @property
    def capacity(self) -> int:
        """The most positions of a row, `s`."""
        return self.k.shape[3]

    @property
    def prefixes(self) -> list[int]:
        """The numbers of slots that a step can read, ascending; the last one is the capacity.

        They are 64 apart, and from 512 on a quarter of their size: a step reads an eighth too much on average, and long
        caches have few of them. Each costs one branch in the compiled program.
        """
        sizes, size = [], _FIRST_PREFIX
        while size < self.capacity:
            sizes.append(size)
            size += max(_PREFIX_STEP, size // 4 // _PREFIX_STEP * _PREFIX_STEP)
        return [*sizes, self.capacity]

    def layer(self, index: Int[Array, ""], slots: int) -> tuple[Float[Array, "b k _ h"], Float[Array, "b k _ h"]]:
        """The first `slots` keys and values of one layer."""

        def read(cache: Cache) -> Float[Array, "b k _ h"]:
            size = (1, *cache.shape[1:3], slots, cache.shape[4])
            return jax.lax.dynamic_slice(cache, [index, *[jnp.int32(0)] * 4], size)[0]

        return read(self.k), read(self.v)

    def append(self, k: Cache, v: Cache) -> "KVCache":
        """Writes the keys and values `[l, b, k, p, h]` of a step at each row's own length, in place under jit."""

        def write(cache, new):
            # One dynamic-update-slice a row: a scatter would copy the cache (see benchmarks/compiled.py).
            for row in range(new.shape[1]):
                start = [jnp.asarray(index, jnp.int32) for index in (0, row, 0, self.lengths[row], 0)]
                cache = jax.lax.dynamic_update_slice(cache, new[:, row : row + 1].astype(cache.dtype), start)
            return cache

        return KVCache(write(self.k, k), write(self.v, v), self.lengths + k.shape[3])

    def rolled_back(self, lengths: Lengths) -> "KVCache":
        """The same cache holding only each row's first `lengths` positions."""
        return dataclasses.replace(self, lengths=lengths)


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32; scaled in the input's dtype, as the reference does."""

    def __init__(self, width: int, epsilon: float):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))

    def __call__(self, h: Hidden) -> Hidden:
        wide = h.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
        return wide.astype(h.dtype) * self.scale[None, None, :].astype(h.dtype)


def _rotate(x: Float[Array, "b k p h"], cos: Float[Array, "b p h"], sin: Float[Array, "b p h"]) -> jax.Array:
    """Rotary embedding of the half-rotated kind: channel i pairs with channel i + h/2."""
    wide = x.astype(jnp.float32)
    low, high = jnp.split(wide, 2, axis=-1)
    rotated = wide * cos[:, None] + jnp.concatenate([-high, low], axis=-1) * sin[:, None]
    return rotated.astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention over the cache's valid slots and, causally, the step's own positions."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        width, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q = Linear(width, heads * config.head_dim, rngs, use_bias=False)
        self.k = Linear(width, groups * config.head_dim, rngs, use_bias=False)
        self.v = Linear(width, groups * config.head_dim, rngs, use_bias=False)
        self.out = Linear(heads * config.head_dim, width, rngs, use_bias=False)

    def __call__(
        self,
        h: Hidden,
        cos: Float[Array, "b p h"],
        sin: Float[Array, "b p h"],
        cached: tuple[KVCache, Int[Array, ""]] | None,
    ) -> tuple[Hidden, Float[Array, "b k p h"], Float[Array, "b k p h"]]:
        """`cached` is the cache of all layers and this layer's index in it, or None for an empty cache."""
        q, k, v = self.heads(h, cos, sin)
        steps = h.shape[1]
        # A chunk of queries at a time, so that the scores of long prompts never take [p, p].
        chunks = [
            self._attend(
                q[:, :, :, i : i + _QUERY_CHUNK], i, k[:, :, : i + _QUERY_CHUNK], v[:, :, : i + _QUERY_CHUNK], cached
            )
            for i in range(0, steps, _QUERY_CHUNK)
        ]
        return self.output(chunks[0] if len(chunks) == 1 else jnp.concatenate(chunks, axis=3)), k, v

    def heads(
        self, h: Hidden, cos: Float[Array, "b p h"], sin: Float[Array, "b p h"]
    ) -> tuple[Float[Array, "b k g p h"], Float[Array, "b k p h"], Float[Array, "b k p h"]]:
        """Rotated queries, in groups that share keys; rotated keys; and values."""
        batch, steps, _ = h.shape
        groups, head_dim = self.config.num_key_value_heads, self.config.head_dim

        def split(x):  # [b, heads, p, h]
            return x.reshape(batch, steps, -1, head_dim).swapaxes(1, 2)

        q = _rotate(split(self.q(h)), cos, sin).reshape(batch, groups, -1, steps, head_dim)
        return q, _rotate(split(self.k(h)), cos, sin), split(self.v(h))

    def output(self, mixed: Float[Array, "b k g p h"]) -> Hidden:
        """Projects what attention mixed."""
        batch, _, _, steps, _ = mixed.shape
        return self.out(mixed.reshape(batch, -1, steps, mixed.shape[-1]).swapaxes(1, 2).reshape(batch, steps, -1))

    def _attend(self, q: jax.Array, offset: int, k: jax.Array, v: jax.Array, cached: tuple | None) -> jax.Array:
        """Queries `[b, k, g, q, h]` that begin `offset` positions into the step, over the cache and `k`, `v`."""

        def scored(keys, mask):
            scores = jnp.einsum("bkgqh,bksh->bkgqs", q, keys, preferred_element_type=jnp.float32)
            return jnp.where(mask, scores * self.config.attention_multiplier, -jnp.inf)

        def mixed(weights, values):
            return jnp.einsum("bkgqs,bksh->bkgqh", weights.astype(values.dtype), values)

        causal = (
            jnp.arange(k.shape[2], dtype=jnp.int32)[None, :]
            <= offset + jnp.arange(q.shape[3], dtype=jnp.int32)[:, None]
        )
        current = scored(k, causal)
        if cached is None:
            return mixed(jax.nn.softmax(current), v)
        cache, layer = cached
        own_peak = current.max(-1, keepdims=True)

        def summed(weights: jax.Array, values: jax.Array) -> jax.Array:
            equation, weights = "bkgqs,bksh->bkgqh", weights.astype(values.dtype)
            return jnp.einsum(equation, weights, values, preferred_element_type=jnp.float32)

        def attend(slots: int) -> tuple[jax.Array, jax.Array, jax.Array]:
            """The largest score so far, and sums of weights and values over the first `slots` slots of the cache."""
            cached_k, cached_v = cache.layer(layer, slots)
            filled = (jnp.arange(slots, dtype=jnp.int32)[None, :] < cache.lengths[:, None])[:, None, None, None, :]
            past = scored(cached_k, filled)
            peak = jnp.maximum(past.max(-1, keepdims=True), own_peak)
            weights = jnp.exp(past - peak)
            return peak, weights.sum(-1, keepdims=True), summed(weights, cached_v)

        # Branches of static size fuse each slice with its product. A loop over chunks of slots with a running softmax
        # takes twice the cycles at a full cache, by the TPU compiler's estimate, and has no reverse-mode derivative.
        *shorter, _ = cache.prefixes
        branch = (cache.lengths.max() > jnp.array(shorter, jnp.int32)).sum(dtype=jnp.int32)
        peak, total, past = jax.lax.switch(branch, [functools.partial(attend, slots) for slots in cache.prefixes])
        # One softmax over two arrays: joining the cache with the new keys would copy it. The step's own keys stay out
        # of the branches, into which the TPU compiler would pass their scores in a slow layout.
        own = jnp.exp(current - peak)
        return ((past + summed(own, v)) / (total + own.sum(-1, keepdims=True))).astype(v.dtype)


class DecoderLayer(nnx.Module):
    """Pre-norm attention and SwiGLU, both scaled by `residual_multiplier`."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        width, inner = config.hidden_size, config.intermediate_size
        self.input_norm = RMSNorm(width, config.rms_norm_eps)
        self.attention = Attention(config, rngs)
        self.post_norm = RMSNorm(width, config.rms_norm_eps)
        self.gate = Linear(width, inner, rngs, use_bias=False)
        self.up = Linear(width, inner, rngs, use_bias=False)
        self.down = Linear(inner, width, rngs, use_bias=False)

    def __call__(self, h: Hidden, cos: jax.Array, sin: jax.Array, cached: tuple | None):
        mixed, k, v = self.attention(self.input_norm(h), cos, sin, cached)
        return self.finish(h, mixed), k, v

    def finish(self, h: Hidden, mixed: Hidden) -> Hidden:
        """What follows the attention."""
        h += mixed * self.config.residual_multiplier
        x = self.post_norm(h)
        x = self.down(jax.nn.silu(self.gate(x)) * self.up(x))
        return h + x * self.config.residual_multiplier


class Decoder(nnx.Module):
    """Embedding, equal layers one after another, final norm, language-model head."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        self.embedding = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = make_layers(lambda rngs: DecoderLayer(config, rngs), config.num_hidden_layers, rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.head = Linear(config.hidden_size, config.vocab_size, rngs, use_bias=False)

    def embed(self, tokens: Tokens) -> Hidden:
        """Token embeddings, not yet multiplied by `embedding_multiplier`."""
        return self.embedding(tokens)

    def __call__(
        self, embeddings: Hidden, cache: KVCache | None = None, *, remat: bool = False
    ) -> tuple[Hidden, Cache, Cache]:
        """Runs all layers over a step of `p` embeddings a row.

        Args:
          embeddings: unscaled embeddings of tokens or audio.
          cache: the positions before the step, or None if there are none.
          remat: as in `for_layers`.

        Returns:
          Normed activations `[b, p, e]`, and the step's keys and values `[l, b, k, p, h]` for `KVCache.append`.
        """
        config = self.config
        h = embeddings * config.embedding_multiplier
        positions = jnp.arange(h.shape[1], dtype=jnp.int32)[None] + (0 if cache is None else cache.lengths[:, None])
        cos, sin = config.rotary.tables(jnp.broadcast_to(positions, h.shape[:2]), config.head_dim)

        def run(h, layer, index):
            # The cache is not scanned: every layer would then read all of its slots.
            h, k, v = layer(h, cos, sin, None if cache is None else (cache, index))
            return h, (k, v)

        h, (k, v) = for_layers(self.layers, run, h, remat=remat)
        return self.norm(h), k, v

    def logits(self, h: Hidden) -> Logits:
        """Logits of normed activations, float32, divided by `logits_scaling`."""
        tied = self.config.tie_word_embeddings
        head = {"weight": self.embedding.embedding[...]} if tied else self.head.parts
        return linear.apply(head, h, jnp.float32) / self.config.logits_scaling
