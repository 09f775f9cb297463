"""The three parts joined, as pure functions of `(config, params, inputs)`.

`config` is static (hashable), `params` a nested dictionary of arrays, stacked over layers. Every function can be jitted
(`static_argnums=0`), differentiated and sharded. Computation runs in `dtype`, by default that of the weights;
float32 computes every matrix product at the highest precision, which TPUs and GPUs do not by default.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from granite_jax.array_types import (
    Activations,
    AudioEmbeddings,
    CTCLogits,
    Features,
    Lengths,
    Logits,
    Params,
    Samples,
    Tokens,
)
from granite_jax.models.granite_speech.config import Config
from granite_jax.models.layers import bpe_head
from granite_jax.models.layers.binding import bind
from granite_jax.models.layers.bpe_head import Importance
from granite_jax.models.layers.decoder import Decoder, KVCache
from granite_jax.models.layers.encoder import Encoder, EncoderOutput
from granite_jax.models.layers.features import num_frames
from granite_jax.models.layers.packed import decoder as packed_decoder
from granite_jax.models.layers.packed import encoder as packed_encoder
from granite_jax.models.layers.packed.decoder import PackedPrompts
from granite_jax.models.layers.packed.encoder import PackedEncoding
from granite_jax.models.layers.packed.features import packed_log_mel
from granite_jax.models.layers.packed.packing import Packing
from granite_jax.models.layers.precision import with_matmul_precision
from granite_jax.models.layers.projector import Projector

LOGIT_ROWS = 256  # positions whose logits are held at once


class Model(nnx.Module):
    """The three parts, named as in the parameter tree."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.encoder = Encoder(config.encoder, rngs)
        self.projector = Projector(config.projector, config.decoder.hidden_size, rngs)
        self.decoder = Decoder(config.decoder, rngs)


def init(config: Config, key: jax.Array, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """Random parameters for `config`: a nested dictionary of arrays of `dtype`."""
    params = nnx.to_pure_dict(nnx.state(Model(config, nnx.Rngs(key)), graph=False))
    return jax.tree.map(lambda x: x.astype(dtype), params)


def abstract_params(config: Config, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """The tree that `init` would return, as ShapeDtypeStructs: nothing is allocated."""
    params = nnx.to_pure_dict(nnx.state(_abstract_model(config), graph=False))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)


@functools.lru_cache(maxsize=8)
def _abstract_model(config: Config) -> Model:
    """The model with ShapeDtypeStructs for arrays. Making one takes a good part of the time to load a small model."""
    return nnx.eval_shape(lambda: Model(config, nnx.Rngs(0)), graph=False)


def _part(config: Config, params: Params, name: str) -> Any:
    return bind(getattr(_abstract_model(config), name), params[name])


@with_matmul_precision
def encode(
    config: Config,
    params: Params,
    features: Features,
    lengths: Lengths,
    *,
    capture_layers: bool = False,
    train: bool = False,
    importance: Importance = "before",
    remat: bool = False,
    dtype: DTypeLike | None = None,
) -> EncoderOutput:
    """Runs the Conformer encoder.

    Args:
      features: float32 log-mel features of `log_mel`, `[b, t, 160]`.
      lengths: valid frames of each row, `features.num_frames(samples)`.
      capture_layers: also return every block's output.
      train: normalize by the batch's own statistics.
      importance: which activations of the middle block the output's `importance` is computed from.
      remat: compute every block again in the backward pass, and keep only what goes from one to the next.
    """
    encoder: Encoder = _part(config, params, "encoder")
    options = {"capture_layers": capture_layers, "train": train, "importance": importance, "remat": remat}
    return encoder(features.astype(dtype), lengths, **options)


def pack_frames(config: Config, frames: Lengths, longest: int) -> Packing:
    """Where packed rows of encoder frames, of `longest` at most, are for `encode_packed`."""
    gap, multiple = config.encoder.conv_kernel_size // 2, config.projector.window_size
    return packed_encoder.pack_frames(frames, longest, gap=gap, multiple=multiple)


def encode_samples(
    config: Config, params: Params, samples: Samples, lengths: Lengths, **options: Any
) -> PackedEncoding:
    """`encode_packed` of waveforms.

    Args:
      samples: float32 at 16 kHz, padded on the right.
      lengths: valid samples of each row; 0 for padding rows.
      options: those of `encode_packed`.
    """
    packing = pack_frames(config, num_frames(lengths), num_frames(samples.shape[1]))
    return encode_packed(config, params, packed_log_mel(samples, lengths, packing), packing, **options)


@with_matmul_precision
def encode_packed(
    config: Config,
    params: Params,
    features: Float[Array, "p f"],
    packing: Packing,
    *,
    importance: Importance = "before",
    with_audio: bool = True,
    dtype: DTypeLike | None = None,
) -> PackedEncoding:
    """`encode`, `ctc_logits` and `project` of packed rows, for inference: computes no more than what is filled.

    Args:
      params: those of the encoder suffice without audio embeddings.
      features: those of `packed_log_mel`.
      packing: that of `pack_frames`.
      importance: as in `encode`.
      with_audio: whether the projector runs.
    """
    encoder = _part(config, params, "encoder")
    output = packed_encoder.encode(encoder, features.astype(dtype), packing, importance)
    labels = packed_encoder.label(encoder, output.hidden, packing)
    projector = _part(config, params, "projector") if with_audio else None
    audio = None if projector is None else packed_encoder.project(projector, output.hidden, packing)
    return PackedEncoding(packing, features, output, labels, audio)


@with_matmul_precision
def ctc_logits(config: Config, params: Params, hidden: Activations, *, dtype: DTypeLike | None = None) -> CTCLogits:
    """CTC logits, float32 `[b, t, c]`, of a block's activations (the middle and the final head are the same)."""
    encoder: Encoder = _part(config, params, "encoder")
    return encoder.ctc_logits(hidden.astype(dtype))


@with_matmul_precision
def bpe_logits(
    config: Config, params: Params, encoded: EncoderOutput, lengths: Lengths, *, dtype: DTypeLike | None = None
) -> Float[Array, "b w v"]:
    """Logits of the BPE head for every window of four frames, float32, of what `encode` returned.

    All at once, for training; `bpe_labels` never holds those of more than a few windows.
    """
    encoder: Encoder = _part(config, params, "encoder")
    pooled = bpe_head.pool(encoded.hidden.astype(dtype), encoded.importance, lengths)
    return encoder.bpe_logits(pooled.reshape(-1, pooled.shape[-1])).reshape(*pooled.shape[:2], -1)


@with_matmul_precision
def bpe_labels(
    config: Config,
    params: Params,
    hidden: Activations,
    importance: Float[Array, "b t"],
    lengths: Lengths,
    wanted: Lengths,
    *,
    dtype: DTypeLike | None = None,
) -> Int[Array, "b w"]:
    """The best label of the BPE head for every window of four frames: int32, label `i` is the token `i - 1`.

    Args:
      hidden, importance: what `encode` returned for rows of `lengths` valid frames.
      wanted: int32, 0 for rows whose labels nobody needs.

    Returns:
      Labels `[b, ceil(t / 4)]`, blank past each row's end.
    """
    encoder: Encoder = _part(config, params, "encoder")
    pooled = bpe_head.pool(hidden.astype(dtype), importance, lengths)
    return bpe_head.best_labels(encoder.bpe_logits, pooled, lengths, wanted)


@with_matmul_precision
def project(
    config: Config, params: Params, hidden: Activations, lengths: Lengths, *, dtype: DTypeLike | None = None
) -> AudioEmbeddings:
    """Audio embeddings `[b, a, e]` of encoder activations with `lengths` valid frames.

    Row `i` holds `config.num_audio_tokens(lengths[i])` of them.
    """
    projector: Projector = _part(config, params, "projector")
    return projector(hidden.astype(dtype), lengths)


@with_matmul_precision
def prefill(
    config: Config,
    params: Params,
    tokens: Tokens,
    lengths: Lengths,
    audio: AudioEmbeddings | None = None,
    *,
    capacity: int | None = None,
    logit_positions: Int[Array, "b m"] | None = None,
    remat: bool = False,
    dtype: DTypeLike | None = None,
) -> tuple[Float[Array, "b m v"], KVCache]:
    """Runs the language model over prompts.

    Args:
      tokens: int32 prompts `[b, p]`, padded on the right; the i-th audio token of a row takes its i-th audio embedding.
      lengths: tokens of each prompt.
      audio: audio embeddings `[b, a, e]`, or None for text alone.
      capacity: positions of the cache, at least `p`; default `p`.
      logit_positions: positions `[b, m]` whose logits are computed; default each row's last.
      remat: as in `encode`.

    Returns:
      float32 logits `[b, m, v]` and the cache, `lengths` positions a row.
    """
    decoder: Decoder = _part(config, params, "decoder")
    is_audio = tokens == config.audio_token_id
    embeddings = decoder.embed(jnp.where(is_audio, 0, tokens)).astype(dtype)
    if audio is not None:
        index = jnp.clip(jnp.cumsum(is_audio, axis=1, dtype=jnp.int32) - 1, 0, audio.shape[1] - 1)
        gathered = jnp.take_along_axis(audio.astype(dtype), index[..., None], axis=1)
        embeddings = jnp.where(is_audio[..., None], gathered, embeddings)
    hidden, k, v = decoder(embeddings, remat=remat)
    padding = (capacity or tokens.shape[1]) - tokens.shape[1]
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, padding), (0, 0))) for x in (k, v))
    if logit_positions is None:
        logit_positions = lengths[:, None] - 1
    hidden = jnp.take_along_axis(hidden, logit_positions[..., None], axis=1)
    return decoder.logits(hidden), KVCache(k, v, lengths)


@with_matmul_precision
def prefill_packed(
    config: Config,
    params: Params,
    tokens: Tokens,
    lengths: Lengths,
    audio: AudioEmbeddings,
    draft: Int[Array, "b n"],
    draft_lengths: Lengths,
    reduce: Callable[[Logits, Any], Any],
    operand: Any,
    *,
    capacity: int,
    dtype: DTypeLike | None = None,
) -> tuple[Any, KVCache]:
    """`prefill` of prompts and drafts, packed, for inference: computes no more than what is filled.

    The logits of each prompt's last position and of its draft's are reduced to something smaller, a few at a time.

    Args:
      tokens: int32 prompts `[b, p]`; the i-th audio token of a row takes its i-th audio embedding.
      lengths: tokens of each prompt; 0 for rows that nobody needs, which must have no draft.
      draft: int32 `[b, n]`, tokens after each prompt, `draft_lengths` a row, which fit the capacity together with it.
      reduce: maps logits `[b, n, v]` and the matching columns of `operand` to arrays `[b, n, ...]`.
      operand: arrays `[b, n + 1, ...]`; column i belongs to the position `lengths - 1 + i`.
      capacity: slots of the cache.

    Returns:
      The reduced arrays `[b, n + 1, ...]`, arbitrary after a row's draft, and the cache, `lengths` positions a row; the
      drafts are in the slots after these.
    """
    decoder: Decoder = _part(config, params, "decoder")
    packing = Packing.of(lengths + draft_lengths, min(tokens.shape[1] + draft.shape[1], capacity))
    prompts = PackedPrompts(tokens, lengths, draft, audio.astype(dtype), config.audio_token_id)
    hidden, k, v = packed_decoder.prefill(decoder, prompts, packing, capacity)
    batch, width = jax.tree.leaves(operand)[0].shape[:2]
    chunk = max(1, min(width, LOGIT_ROWS // batch))
    padded = -(-width // chunk) * chunk
    operand = jax.tree.map(lambda x: _pad_columns(x, padded), operand)
    last = packing.starts + jnp.maximum(lengths - 1, 0)

    def reduced(start: jax.Array) -> Any:
        columns = start + jnp.arange(chunk, dtype=jnp.int32)
        positions = jnp.minimum(last[:, None] + columns[None, :], len(hidden) - 1)
        part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=chunk, axis=1)
        return reduce(decoder.logits(hidden[positions]), jax.tree.map(part, operand))

    def add(carry):
        start, results = carry
        results = jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, axis=1), results, reduced(start)
        )
        return start + chunk, results

    # The first chunk is outside the loop: its arrays begin the carry, and without drafts it is the only one.
    first = jax.tree.map(lambda x: _pad_columns(x, padded), reduced(jnp.int32(0)))
    end = jnp.max(draft_lengths) + 1
    _, results = jax.lax.while_loop(lambda carry: carry[0] < end, add, (end * 0 + chunk, first))
    return jax.tree.map(lambda x: x[:, :width], results), KVCache(k, v, lengths)


def _pad_columns(array: jax.Array, columns: int) -> jax.Array:
    """`[b, n, ...]` with zeros after the last column: `[b, columns, ...]`."""
    return jnp.pad(array, ((0, 0), (0, columns - array.shape[1]), *((0, 0),) * (array.ndim - 2)))


@with_matmul_precision
def decode_step(
    config: Config, params: Params, tokens: Tokens, cache: KVCache, *, dtype: DTypeLike | None = None
) -> tuple[Logits, KVCache]:
    """Runs the language model over the next tokens `[b, p]` of every row.

    Returns float32 logits `[b, p, v]` and the cache, `p` positions longer; `KVCache.rolled_back` drops tokens that were
    not accepted. The cache must have room for `p` more positions in every row.

    Attention reads the cache up to its longest row, in one of several compiled branches; rows that are no longer needed
    can be rolled back to 0. The branches can be differentiated in both modes; under `vmap` all of them are computed.
    """
    decoder: Decoder = _part(config, params, "decoder")
    hidden, k, v = decoder(decoder.embed(tokens).astype(dtype), cache)
    return decoder.logits(hidden), cache.append(k, v)
