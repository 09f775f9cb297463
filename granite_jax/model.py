"""The three parts joined, as pure functions of `(config, params, inputs)`.

`config` is static (hashable), `params` a nested dictionary of arrays, stacked over layers. Every function can be jitted
(`static_argnums=0`), differentiated and sharded. Computation runs in `dtype`, by default that of the weights;
float32 computes every matrix product at the highest precision, which TPUs and GPUs do not by default.
"""

import functools
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
    Tokens,
)
from granite_jax.config import Config
from granite_jax.decoder import Decoder, KVCache
from granite_jax.encoder import Encoder, EncoderOutput
from granite_jax.projector import Projector


class Model(nnx.Module):
    """The parts under the names that the parameter tree carries."""

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
    return jax.eval_shape(lambda: init(config, jax.random.key(0), dtype))


@functools.lru_cache(maxsize=8)
def _definitions(config: Config) -> dict[str, Any]:
    """The parts' structure without arrays."""
    model = nnx.eval_shape(lambda: Model(config, nnx.Rngs(0)), graph=False)
    return {part: nnx.split(getattr(model, part), graph=False)[0] for part in ("encoder", "projector", "decoder")}


def _part(config: Config, params: Params, name: str) -> Any:
    return nnx.merge(_definitions(config)[name], params[name])


def compute_dtype(params: Params, dtype: DTypeLike | None) -> jnp.dtype:
    """The dtype activations are computed in: `dtype`, or else that of the weights."""
    return jnp.dtype(dtype or jax.tree.leaves(params)[0].dtype)


def _float32_means_float32(function):
    """Sets the highest matmul precision while `function` is traced for float32 activations."""

    @functools.wraps(function)
    def wrapped(config, params, *args, dtype: DTypeLike | None = None, **kwargs):
        chosen = compute_dtype(params, dtype)
        with jax.default_matmul_precision("highest" if chosen == jnp.float32 else "default"):
            return function(config, params, *args, dtype=chosen, **kwargs)

    return wrapped


@_float32_means_float32
def encode(
    config: Config,
    params: Params,
    features: Features,
    lengths: Lengths,
    *,
    capture_layers: bool = False,
    train: bool = False,
    dtype: DTypeLike | None = None,
) -> EncoderOutput:
    """Runs the Conformer encoder.

    Args:
      features: float32 log-mel features of `log_mel`, `[b, t, 160]`.
      lengths: valid frames of each row, `features.num_frames(samples)`.
      capture_layers: also return every block's output.
      train: normalise by the batch's own statistics.
    """
    encoder: Encoder = _part(config, params, "encoder")
    return encoder(features.astype(dtype), lengths, capture_layers=capture_layers, train=train)


@_float32_means_float32
def ctc_logits(config: Config, params: Params, hidden: Activations, *, dtype: DTypeLike | None = None) -> CTCLogits:
    """CTC logits, float32 `[b, t, c]`, of a block's activations (the middle and the final head are the same)."""
    encoder: Encoder = _part(config, params, "encoder")
    return encoder.ctc_logits(hidden.astype(dtype))


@_float32_means_float32
def project(
    config: Config, params: Params, hidden: Activations, lengths: Lengths, *, dtype: DTypeLike | None = None
) -> AudioEmbeddings:
    """Audio embeddings `[b, a, e]` of encoder activations with `lengths` valid frames.

    Row `i` holds `config.num_audio_tokens(lengths[i])` of them.
    """
    projector: Projector = _part(config, params, "projector")
    return projector(hidden.astype(dtype), lengths)


@_float32_means_float32
def prefill(
    config: Config,
    params: Params,
    tokens: Tokens,
    lengths: Lengths,
    audio: AudioEmbeddings | None = None,
    *,
    capacity: int | None = None,
    logit_positions: Int[Array, "b m"] | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Float[Array, "b m v"], KVCache]:
    """Runs the language model over prompts.

    Args:
      tokens: int32 prompts `[b, p]`, padded on the right; the i-th audio token of a row takes its i-th audio embedding.
      lengths: tokens of each prompt.
      audio: audio embeddings `[b, a, e]`, or None for text alone.
      capacity: positions of the cache, at least `p`; default `p`.
      logit_positions: positions `[b, m]` whose logits are wanted; default each row's last. Only these are computed.

    Returns:
      float32 logits `[b, m, v]` and the cache, `lengths` positions a row.
    """
    decoder: Decoder = _part(config, params, "decoder")
    is_audio = tokens == config.audio_token_id
    embeddings = decoder.embed(jnp.where(is_audio, 0, tokens)).astype(dtype)
    if audio is not None:
        index = jnp.clip(jnp.cumsum(is_audio, axis=1) - 1, 0, audio.shape[1] - 1)
        gathered = jnp.take_along_axis(audio.astype(dtype), index[..., None], axis=1)
        embeddings = jnp.where(is_audio[..., None], gathered, embeddings)
    hidden, k, v = decoder(embeddings)
    room = (capacity or tokens.shape[1]) - tokens.shape[1]
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, room), (0, 0))) for x in (k, v))
    if logit_positions is None:
        logit_positions = lengths[:, None] - 1
    hidden = jnp.take_along_axis(hidden, logit_positions[..., None], axis=1)
    return decoder.logits(hidden), KVCache(k, v, lengths)


@_float32_means_float32
def decode_step(
    config: Config, params: Params, tokens: Tokens, cache: KVCache, *, dtype: DTypeLike | None = None
) -> tuple[Logits, KVCache]:
    """Runs the language model over the next tokens `[b, p]` of every row.

    Returns float32 logits `[b, p, v]` and the cache, `p` positions longer; `KVCache.rolled_back` drops tokens that were
    not accepted. The cache must have room for `p` more positions in every row.
    """
    decoder: Decoder = _part(config, params, "decoder")
    hidden, k, v = decoder(decoder.embed(tokens).astype(dtype), cache)
    return decoder.logits(hidden), cache.append(k, v)
