"""Windowed Q-Former: every window of encoder frames becomes a few audio embeddings of the language model.

Reference: `GraniteSpeechEncoderProjector` and `Blip2QFormerModel` of transformers; Li et al. 2023 (BLIP-2).
Frames past a row's end are zeros and, as in the reference, attended to within the last window.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from granite_jax.array_types import Activations, AudioEmbeddings, Lengths
from granite_jax.models.layers.layer_norm import LayerNorm
from granite_jax.models.layers.linear import Linear
from granite_jax.models.layers.stack import for_layers, make_layers


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    """Windowed Q-Former: `window_size` encoder frames become `num_queries` audio embeddings."""

    hidden_size: int
    encoder_hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    layer_norm_eps: float
    window_size: int
    num_queries: int


class MultiHeadAttention(nnx.Module):
    """Attention of the queries over `context` with its residual connection and (post-)LayerNorm."""

    def __init__(self, config: ProjectorConfig, context_dim: int, rngs: nnx.Rngs):
        self.num_heads = config.num_attention_heads
        width = config.hidden_size
        self.q = Linear(width, width, rngs)
        self.k = Linear(context_dim, width, rngs)
        self.v = Linear(context_dim, width, rngs)
        self.out = Linear(width, width, rngs)
        self.norm = LayerNorm(width, config.layer_norm_eps, rngs)

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """x `[..., queries, width]`, context `[..., keys, context_dim]` -> `[..., queries, width]`."""

        def split(y):
            return y.reshape(*y.shape[:-1], self.num_heads, -1)

        q, k, v = split(self.q(x)), split(self.k(context)), split(self.v(context))
        scores = jnp.einsum("...qhd,...khd->...hqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5).astype(v.dtype)
        mixed = jnp.einsum("...hqk,...khd->...qhd", weights, v).reshape(x.shape)
        return self.norm(self.out(mixed) + x)


class QFormerLayer(nnx.Module):
    """Self-attention over the queries, cross-attention to the window, feed-forward; each with add & norm."""

    def __init__(self, config: ProjectorConfig, rngs: nnx.Rngs):
        width = config.hidden_size
        self.self_attention = MultiHeadAttention(config, width, rngs)
        self.cross_attention = MultiHeadAttention(config, config.encoder_hidden_size, rngs)
        self.up = Linear(width, config.intermediate_size, rngs)
        self.down = Linear(config.intermediate_size, width, rngs)
        self.norm = LayerNorm(width, config.layer_norm_eps, rngs)

    def __call__(self, x: jax.Array, window: jax.Array) -> jax.Array:
        x = self.self_attention(x, x)
        x = self.cross_attention(x, window)
        return self.norm(self.down(jax.nn.gelu(self.up(x), approximate=False)) + x)


class Projector(nnx.Module):
    """Q-Former layers, one after another, and the projection to the language model."""

    def __init__(self, config: ProjectorConfig, output_dim: int, rngs: nnx.Rngs):
        self.config, self.output_dim = config, output_dim
        width = config.hidden_size
        self.query = nnx.Param(jax.random.normal(rngs.params(), (1, config.num_queries, width)))
        self.norm = LayerNorm(width, config.layer_norm_eps, rngs)
        self.layers = make_layers(lambda rngs: QFormerLayer(config, rngs), config.num_hidden_layers, rngs)
        self.out = Linear(width, output_dim, rngs)

    def __call__(self, h: Activations, lengths: Lengths) -> AudioEmbeddings:
        """Encoder activations with `lengths` valid frames -> `Config.num_audio_tokens(lengths)` embeddings a row."""
        config = self.config
        batch, frames, width = h.shape
        windows = -(-frames // config.window_size)
        h = jnp.where((jnp.arange(frames, dtype=jnp.int32)[None, :] < lengths[:, None])[..., None], h, 0)
        h = jnp.pad(h, ((0, 0), (0, windows * config.window_size - frames), (0, 0)))
        audio = self.windows(h.reshape(batch, windows, config.window_size, width))
        return audio.reshape(batch, windows * config.num_queries, -1)

    def windows(self, h: Float[Array, "b w t d"]) -> Float[Array, "b w a e"]:
        """The embeddings of every window, whose frames past the row's end are zeros."""
        config = self.config
        batch, windows, _, _ = h.shape
        x = self.norm(self.query[...].astype(h.dtype))
        x = jnp.broadcast_to(x, (batch, windows, config.num_queries, config.hidden_size))
        # Adds zeros that depend on the rows: under shard_map a scan's carry must vary with the mesh from the start.
        x += h[:, :, :1, :1] * 0
        x, _ = for_layers(self.layers, lambda x, layer, _: (layer(x, h), None), x)
        return self.out(x)
