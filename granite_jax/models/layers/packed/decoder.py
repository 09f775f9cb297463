"""Language model over packed prompts: the layers of `Decoder`, for inference.

Every layer is one loop over chunks of positions (see `packing`): a position needs only those before it in its row, in
the same chunk or in earlier ones. Attention takes the chunks of keys one by one, from the first that holds a position
of the queries' rows, and keeps a running maximum and sum of its softmax (Milakov & Gimelshein, arXiv 1805.02867).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from granite_jax.array_types import AudioEmbeddings, Cache, Lengths, Tokens
from granite_jax.models.layers.decoder import Attention, Decoder, DecoderLayer
from granite_jax.models.layers.packed.packing import Packing, put
from granite_jax.models.layers.stack import for_layers


class PackedPrompts(NamedTuple):
    """Prompts and what follows them, by row.

    Fields:
      tokens: int32 prompts `[b, p]`.
      lengths: tokens of each prompt; 0 for rows that nobody needs.
      draft: int32 `[b, n]`, tokens after the prompt.
      audio: audio embeddings of each row's audio tokens.
      audio_token: id of these.
    """

    tokens: Tokens
    lengths: Lengths
    draft: Int[Array, "b n"]
    audio: AudioEmbeddings
    audio_token: int


def prefill(
    decoder: Decoder, prompts: PackedPrompts, packing: Packing, capacity: int
) -> tuple[Float[Array, "p e"], Cache, Cache]:
    """Runs all layers over packed prompts and drafts.

    Args:
      packing: of each row's prompt and draft together, without gaps.
      capacity: slots of the cache, at least `packing.longest`.

    Returns:
      Normed activations of every position, and keys and values `[l, b, k, s, h]`. In slots after a row's own are those
      of other rows; values are finite.
    """
    config, dtype = decoder.config, prompts.audio.dtype
    kv_heads, head_dim = config.num_key_value_heads, config.head_dim
    is_audio = prompts.tokens == prompts.audio_token
    audio_index = jnp.cumsum(is_audio, axis=1, dtype=jnp.int32) - 1

    def embed(start, carry):
        h, cos, sin = carry
        rows, local, _ = packing.rows_of(packing.positions(start))
        in_prompt = local < prompts.lengths[rows]
        column = jnp.minimum(local, prompts.tokens.shape[1] - 1)
        drafted = jnp.clip(local - prompts.lengths[rows], 0, prompts.draft.shape[1] - 1)
        tokens = jnp.where(in_prompt, prompts.tokens[rows, column], prompts.draft[rows, drafted])
        is_audio_token = in_prompt & is_audio[rows, column]
        index = jnp.clip(audio_index[rows, column], 0, prompts.audio.shape[1] - 1)
        token_embeddings = decoder.embed(jnp.where(is_audio_token, 0, tokens)[None])[0].astype(dtype)
        embeddings = (
            jnp.where(is_audio_token[:, None], prompts.audio[rows, index], token_embeddings)
            * config.embedding_multiplier
        )
        tables = config.rotary.tables(local[None], head_dim)
        return put(h, embeddings, start), *(
            put(x, table[0], start) for x, table in zip((cos, sin), tables, strict=True)
        )

    h, cos, sin = packing.for_chunks(
        embed,
        (
            packing.zeros(0, config.hidden_size, dtype=dtype),
            packing.zeros(0, head_dim),
            packing.zeros(0, head_dim),
        ),
    )

    def run(carry, block: DecoderLayer, _):
        def run_chunk(start, carry):
            h, k, v = carry
            x = packing.take(h, start)[None]
            tables = (packing.take(table, start)[None] for table in (cos, sin))
            query, key, value = block.attention.heads(block.input_norm(x), *tables)
            # Masked values of other rows must not come through even if they are NaN. A row's own are so in `h`, too.
            value = jnp.where(jnp.isfinite(value), value, 0)
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new[0], start, axis=1) for old, new in ((k, key), (v, value))
            )
            mixed = _attend(block.attention, query[0], k, v, packing, start)
            return put(h, block.finish(x, block.attention.output(mixed[None]))[0], start), k, v

        h, k, v = packing.for_chunks(run_chunk, carry)
        return (h, k, v), tuple(_rows(x, packing, capacity) for x in (k, v))

    empty = packing.zeros(packing.longest, kv_heads, head_dim, dtype=dtype).swapaxes(0, 1)
    (h, _, _), (k, v) = for_layers(decoder.layers, run, (h, empty, empty))
    return decoder.norm(h[None])[0], k, v


def _attend(
    attention: Attention,
    query: Float[Array, "k g p h"],
    k: Float[Array, "k s h"],
    v: Float[Array, "k s h"],
    packing: Packing,
    start: Int[Array, ""],
) -> Float[Array, "k g p h"]:
    """Causal attention of the chunk that begins at `start` over the packed keys of its own rows."""
    positions = packing.positions(start)
    rows, _, _ = packing.rows_of(positions)
    firsts = packing.starts[rows]

    def add(index, carry):
        peak, total, mixed = carry
        begin = index * packing.chunk
        keys, values = (jax.lax.dynamic_slice_in_dim(x, begin, packing.chunk, axis=1) for x in (k, v))
        key_positions = packing.positions(begin)[None, :]
        mask = (key_positions >= firsts[:, None]) & (key_positions <= positions[:, None])
        scores = jnp.einsum("kgqh,ksh->kgqs", query, keys, preferred_element_type=jnp.float32)
        # A finite floor: a chunk without any key of a query's row must not become NaN.
        scores = jnp.where(mask[None, None], scores * attention.config.attention_multiplier, jnp.finfo(jnp.float32).min)
        new_peak = jnp.maximum(peak, scores.max(axis=-1, keepdims=True))
        weights, decay = jnp.exp(scores - new_peak), jnp.exp(peak - new_peak)
        added = jnp.einsum("kgqs,ksh->kgqh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return new_peak, total * decay + weights.sum(axis=-1, keepdims=True), mixed * decay + added

    zeros = (query * 0).astype(jnp.float32)
    carry = zeros[..., :1] + jnp.finfo(jnp.float32).min, zeros[..., :1], zeros
    _, total, mixed = jax.lax.fori_loop(first_chunk_of_keys(packing, start), start // packing.chunk + 1, add, carry)
    return (mixed / total).astype(query.dtype)


def first_chunk_of_keys(packing: Packing, start: Int[Array, ""]) -> Int[Array, ""]:
    """The first chunk that holds a key of a row in the chunk that begins at `start`."""
    rows, _, _ = packing.rows_of(jnp.atleast_1d(start))
    return packing.starts[rows[0]] // packing.chunk


def _rows(packed: Float[Array, "k p h"], packing: Packing, capacity: int) -> Float[Array, "b k s h"]:
    """One layer's packed keys or values as rows of the cache."""
    rows = jax.vmap(lambda start: jax.lax.dynamic_slice_in_dim(packed, start, packing.longest, axis=1))(packing.starts)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, capacity - packing.longest), (0, 0)))
