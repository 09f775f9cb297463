"""Conformer CTC encoder with block attention and self-conditioned CTC.

Reference: `GraniteSpeechCTCEncoder` of transformers; Gulati et al. 2020 (Conformer), Shaw et al. 2018 (relative
positions), Nozaki & Komatsu 2021 (self-conditioned CTC). Padding never leaks: attention and
convolution stop at each row's true length, so a row's result is that of the row alone.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from granite_jax.array_types import Activations, CTCLogits, Features, Lengths, Mask
from granite_jax.models.layers.bpe_head import Importance
from granite_jax.models.layers.ctc import BLANK
from granite_jax.models.layers.layer_norm import LayerNorm
from granite_jax.models.layers.linear import Linear
from granite_jax.models.layers.stack import for_layers, make_layers


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Conformer CTC encoder. Frames are 20 ms (two 10 ms log-mel frames stacked)."""

    input_dim: int
    num_layers: int
    hidden_dim: int
    feedforward_mult: int
    num_heads: int
    dim_head: int
    output_dim: int  # CTC labels, blank included
    context_size: int  # frames of one attention block
    max_pos_emb: int
    conv_kernel_size: int
    conv_expansion_factor: int
    bpe_output_dim: int = 0  # labels of the BPE head, blank included; 0 if there is none

    @property
    def inner_dim(self) -> int:
        """Channels inside the convolution module."""
        return self.hidden_dim * self.conv_expansion_factor

    @property
    def self_condition_layer(self) -> int:
        """Index of the block whose output is conditioned on its own CTC posteriors; -1 for none."""
        return self.num_layers // 2 - 1


Heads = Float[Array, "b t heads h"]
Blocks = Float[Array, "b m q heads h"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchStatistics:
    """Mean and biased variance of each layer's convolution channels over valid frames, float32 `[l, channels]`."""

    mean: jax.Array
    var: jax.Array


class FeedForward(nnx.Module):
    """LayerNorm, Linear, SiLU, Linear."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        width = config.hidden_dim * config.feedforward_mult
        self.norm = LayerNorm(config.hidden_dim, 1e-5, rngs)
        self.up = Linear(config.hidden_dim, width, rngs)
        self.down = Linear(width, config.hidden_dim, rngs)

    def __call__(self, h: Activations) -> Activations:
        return self.down(jax.nn.silu(self.up(self.norm(h))))


class BlockAttention(nnx.Module):
    """Multi-head attention within blocks of `context_size` frames, with Shaw's relative positions on the keys."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.config = config
        inner = config.num_heads * config.dim_head
        self.norm = LayerNorm(config.hidden_dim, 1e-5, rngs)
        self.q = Linear(config.hidden_dim, inner, rngs, use_bias=False)
        self.kv = Linear(config.hidden_dim, (2, inner), rngs, use_bias=False)
        self.out = Linear(inner, config.hidden_dim, rngs)
        self.relative = nnx.Embed(2 * config.max_pos_emb + 1, config.dim_head, rngs=rngs)

    def __call__(self, h: Activations, valid: Mask) -> Activations:
        batch, frames, _ = h.shape
        context = self.config.context_size
        blocks = math.ceil(frames / context)
        padding = blocks * context - frames

        def split(x):
            return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).reshape(batch, blocks, context, *x.shape[2:])

        mask = jnp.pad(valid, ((0, 0), (0, padding))).reshape(batch, blocks, context)
        q, k, v = map(split, self.heads(h))
        mixed = self.attend(q, k, v, mask, self.relative_table())
        return self.out(mixed.reshape(batch, blocks * context, -1)[:, :frames])

    def heads(self, h: Activations) -> tuple[Heads, Heads, Heads]:
        """Queries, keys and values of every frame."""
        h = self.norm(h)
        keys, values = jnp.moveaxis(self.kv(h), -2, 0)
        q, k, v = (x.reshape(*x.shape[:2], self.config.num_heads, -1) for x in (self.q(h), keys, values))
        return q, k, v

    def relative_table(self) -> Float[Array, "q k h"]:
        """Embeddings of the distances between the frames of a block."""
        frames = jnp.arange(self.config.context_size, dtype=jnp.int32)
        return self.relative(frames[:, None] - frames[None, :] + self.config.max_pos_emb)

    def attend(
        self, q: Blocks, k: Blocks, v: Blocks, valid: Bool[Array, "b m q"], relative: Float[Array, "q k h"]
    ) -> Blocks:
        """Attention within every block over its valid frames."""
        scores = jnp.einsum("bmqhd,bmkhd->bmhqk", q, k, preferred_element_type=jnp.float32)
        scores += jnp.einsum("bmqhd,qkd->bmhqk", q, relative, preferred_element_type=jnp.float32)
        # A finite floor: blocks past the row's end see no key at all and must not become NaN.
        scores = jnp.where(valid[:, :, None, None], scores * self.config.dim_head**-0.5, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores).astype(v.dtype)
        return jnp.einsum("bmhqk,bmkhd->bmqhd", weights, v)


class BatchNorm(nnx.Module):
    """Batch normalization by running statistics, or by those of the batch's valid frames."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros(channels, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(channels, jnp.float32))

    def __call__(self, x: Activations, valid: Mask, train: bool) -> tuple[Activations, BatchStatistics]:
        statistics = BatchStatistics(self.mean[...].astype(jnp.float32), self.var[...].astype(jnp.float32))
        wide = x.astype(jnp.float32)
        if train:
            mean = jnp.mean(wide, axis=(0, 1), where=valid[..., None])
            centered = wide - mean[None, None, :]
            statistics = BatchStatistics(mean, jnp.mean(centered**2, axis=(0, 1), where=valid[..., None]))
        scale = self.scale[...].astype(jnp.float32) * jax.lax.rsqrt(statistics.var + 1e-5)
        centered, bias = wide - statistics.mean[None, None, :], self.bias[...].astype(jnp.float32)
        return (centered * scale[None, None, :] + bias[None, None, :]).astype(x.dtype), statistics


class ConvolutionModule(nnx.Module):
    """LayerNorm, pointwise, GLU, depthwise convolution, BatchNorm, SiLU, pointwise."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.config = config
        inner, kernel = config.inner_dim, config.conv_kernel_size
        self.norm = LayerNorm(config.hidden_dim, 1e-5, rngs)
        self.up = Linear(config.hidden_dim, (2, inner), rngs)
        self.depthwise = nnx.Param(jax.random.normal(rngs.params(), (kernel, inner)) * kernel**-0.5)
        self.batch_norm = BatchNorm(inner)
        self.down = Linear(inner, config.hidden_dim, rngs)

    def __call__(self, h: Activations, valid: Mask, train: bool) -> tuple[Activations, BatchStatistics]:
        x = self.gated(h, valid)
        convolve = trained_depthwise if train else depthwise
        x = convolve(x.astype(jnp.float32), self.depthwise[...].astype(jnp.float32)).astype(x.dtype)
        return self.output(x, valid, train)

    def gated(self, h: Activations, valid: Mask) -> Float[Array, "b t c"]:
        """The depthwise convolution's input: zeros past the true end, where the reference has its own zero padding."""
        value, gate = jnp.moveaxis(self.up(self.norm(h)), -2, 0)
        return jnp.where(valid[..., None], value * jax.nn.sigmoid(gate), 0)

    def output(self, x: Float[Array, "b t c"], valid: Mask, train: bool) -> tuple[Activations, BatchStatistics]:
        """What follows the depthwise convolution."""
        x, statistics = self.batch_norm(x, valid, train)
        return self.down(jax.nn.silu(x)), statistics


def depthwise(x: Float[Array, "b t c"], kernel: Float[Array, "k c"]) -> Float[Array, "b t c"]:
    """Depthwise convolution over time, zeros past the ends: shifted products, which compilers fuse into one pass."""
    before, after = _same_padding(kernel)
    return shifted_products(jnp.pad(x, ((0, 0), (before, after), (0, 0))), kernel)


def _same_padding(kernel: jax.Array) -> tuple[int, int]:
    return len(kernel) // 2, len(kernel) // 2 - (len(kernel) + 1) % 2


def shifted_products(padded: Float[Array, "b p c"], kernel: Float[Array, "k c"]) -> Float[Array, "b t c"]:
    """Depthwise convolution of frames with the padding before and after them."""
    frames = padded.shape[1] - len(kernel) + 1
    products = (padded[:, i : i + frames] * kernel[None, None, i] for i in range(len(kernel)))
    return functools.reduce(jnp.add, products)


@jax.custom_vjp
def trained_depthwise(x: Float[Array, "b t c"], kernel: Float[Array, "k c"]) -> Float[Array, "b t c"]:
    """`depthwise` with a reverse-mode derivative that takes one pass; the one JAX derives takes a pass per tap."""
    return depthwise(x, kernel)


def _depthwise_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return depthwise(x, kernel), (x, kernel)


def _depthwise_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    (x, kernel), frames = saved, gradient.shape[1]
    before, after = _same_padding(kernel)
    padded = jnp.pad(gradient, ((0, 0), (after, before), (0, 0)))
    shifted = jnp.pad(x, ((0, 0), (before, after), (0, 0)))
    taps = [jnp.sum(shifted[:, i : i + frames] * gradient, axis=(0, 1)) for i in range(len(kernel))]
    return shifted_products(padded, kernel[::-1]), jnp.stack(taps)


trained_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


class ConformerBlock(nnx.Module):
    """Half-step feed-forward, attention, convolution, half-step feed-forward, LayerNorm."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.ff1 = FeedForward(config, rngs)
        self.attention = BlockAttention(config, rngs)
        self.convolution = ConvolutionModule(config, rngs)
        self.ff2 = FeedForward(config, rngs)
        self.norm = LayerNorm(config.hidden_dim, 1e-5, rngs)

    def __call__(self, h: Activations, valid: Mask, train: bool) -> tuple[Activations, BatchStatistics]:
        h += 0.5 * self.ff1(h)
        h += self.attention(h, valid)
        convolved, statistics = self.convolution(h, valid, train)
        h += convolved
        h += 0.5 * self.ff2(h)
        return self.norm(h), statistics


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncoderOutput:
    """What `Encoder` returns.

    Fields:
      hidden: activations of the last block, `[b, t, d]`; finite but meaningless past a row's length.
      layers: output of every block before self-conditioning, `[l, b, t, d]`, or None if not captured.
      batch_statistics: those used by every block's BatchNorm.
      importance: float32 `[b, t]`, probability of the middle block's CTC output that a frame is no blank; 0 if no block
        is in the middle.
    """

    hidden: jax.Array
    layers: jax.Array | None
    batch_statistics: BatchStatistics
    importance: jax.Array


class Encoder(nnx.Module):
    """The Conformer stack: equal blocks, one after another."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.config = config
        self.input = Linear(config.input_dim, config.hidden_dim, rngs)
        self.layers = make_layers(lambda rngs: ConformerBlock(config, rngs), config.num_layers, rngs)
        self.out = Linear(config.hidden_dim, config.output_dim, rngs)
        self.out_mid = Linear(config.output_dim, config.hidden_dim, rngs)
        if config.bpe_output_dim:
            self.out_bpe = Linear(config.hidden_dim, config.bpe_output_dim, rngs)

    def __call__(
        self,
        features: Features,
        lengths: Lengths,
        *,
        capture_layers: bool,
        train: bool,
        importance: Importance,
        remat: bool = False,
    ) -> EncoderOutput:
        """Encodes features whose rows hold `lengths` valid frames.

        `train` normalizes by the batch's own statistics; `capture_layers` keeps every block's output; `importance`
        says which activations of the middle block that of frames is computed from; `remat` as in `for_layers`.
        """
        valid = jnp.arange(features.shape[1], dtype=jnp.int32)[None, :] < lengths[:, None]
        condition = functools.partial(self.condition, importance=importance)

        def run(carry, block, index):
            h, weights = carry
            h, statistics = block(h, valid, train)
            captured = h if capture_layers else None
            is_middle = index == self.config.self_condition_layer
            carry = jax.lax.cond(is_middle, condition, lambda h: (h, weights), h)
            return carry, (captured, statistics)

        h = self.input(features)
        weights = h[..., 0].astype(jnp.float32) * 0  # varies like `h` under shard_map
        (h, weights), (captured, statistics) = for_layers(self.layers, run, (h, weights), remat=remat)
        return EncoderOutput(h, captured, statistics, weights)

    def condition(self, h: Activations, importance: Importance) -> tuple[Activations, Float[Array, "b t"]]:
        """The middle block's activations conditioned on their own CTC output, and the importance of every frame."""
        posteriors = jax.nn.softmax(self.ctc_logits(h))
        conditioned = h + self.out_mid(posteriors.astype(h.dtype))
        if importance == "after":
            posteriors = jax.nn.softmax(self.ctc_logits(conditioned))
        return conditioned, 1 - posteriors[..., BLANK]

    def ctc_logits(self, h: Activations) -> CTCLogits:
        """CTC logits of any block's activations, float32: the middle and the final head are the same."""
        return self.out(h).astype(jnp.float32)

    def bpe_logits(self, pooled: Float[Array, "n d"]) -> Float[Array, "n v"]:
        """Logits of the BPE head, float32, of pooled activations."""
        return self.out_bpe(pooled).astype(jnp.float32)
