"""Encoder and projector over packed rows: the same blocks as `Encoder` and `Projector`, for inference.

Every layer is a few loops over chunks of frames (see `packing`): between them lie the places at which a frame needs
others, the attention within blocks and the convolution.

    loop 1   feed-forward; queries, keys and values        of every frame
    loop 2   attention                                     of a few blocks of each row at a time
    loop 3   output of the attention; gated activations    of every frame
    loop 4   convolution, feed-forward, norm               of every frame and its neighbors

Rows are so far apart that the convolution sees the zeros of its own padding between them.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from granite_jax.array_types import AudioEmbeddings, Lengths
from granite_jax.models.layers import ctc
from granite_jax.models.layers.bpe_head import Importance
from granite_jax.models.layers.encoder import Encoder, shifted_products
from granite_jax.models.layers.packed.packing import Packing, put
from granite_jax.models.layers.projector import Projector
from granite_jax.models.layers.stack import for_layers

_MIN_GAP = 2  # frames whose place `packed_log_mel` needs


class PackedEncoderOutput(NamedTuple):
    """What `encode` returns; frames of the gaps mean nothing.

    Fields:
      hidden: activations of the last block, `[p, d]`, and a chunk of zeros.
      importance: as in `EncoderOutput`, float32 `[p]`.
    """

    hidden: Float[Array, "p d"]
    importance: Float[Array, "p"]


def pack_frames(frames: Lengths, longest: int, *, gap: int, multiple: int) -> Packing:
    """Packs rows of encoder frames, of `longest` at most, for `encode` and `project`.

    Args:
      gap: frames by which the convolution reaches past a row's end.
      multiple: frames of the projector's windows.
    """
    return Packing.of(frames, longest, gap=max(_MIN_GAP, gap), multiple=multiple)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The attention blocks of all rows, a group of them at a time.

    Fields:
      starts: int32 `[m]`, first frame of each block; where the buffers' margin begins for those that do not exist.
      lengths: int32 `[m]`, valid frames of each.
      num_groups: groups that hold a block.
      group: blocks that are computed together.
    """

    starts: Lengths
    lengths: Lengths
    num_groups: Int[Array, ""]
    group: int

    @classmethod
    def of(cls, packing: Packing, context: int) -> "Blocks":
        group = max(1, packing.chunk // context)
        counts = -(-packing.lengths // context)
        ends = jnp.cumsum(counts, dtype=jnp.int32)
        most = -(-len(counts) * -(-packing.longest // context) // group) * group
        block = jnp.arange(most, dtype=jnp.int32)
        rows = jnp.minimum(jnp.sum(block[:, None] >= ends[None, :], axis=1, dtype=jnp.int32), len(counts) - 1)
        offsets = (block - (ends - counts)[rows]) * context
        exists = block < ends[-1]
        starts = jnp.where(exists, packing.starts[rows] + offsets, packing.capacity)
        lengths = jnp.where(exists, jnp.minimum(packing.lengths[rows] - offsets, context), 0)
        return cls(starts, lengths, -(-ends[-1] // group), group)


def encode(
    encoder: Encoder, features: Float[Array, "p f"], packing: Packing, importance: Importance
) -> PackedEncoderOutput:
    """Runs the Conformer encoder over packed features, in their dtype."""
    config, dtype = encoder.config, features.dtype
    heads, width = config.num_heads, config.num_heads * config.dim_head
    before = config.conv_kernel_size // 2
    after = config.conv_kernel_size - 1 - before
    context = config.context_size
    blocks = Blocks.of(packing, context)

    def embed(start, h):
        return put(h, encoder.input(packing.take(features, start)), start)

    def run(carry, block, index):
        attention, convolution = block.attention, block.convolution
        relative = attention.relative_table()
        kernel = convolution.depthwise[...].astype(jnp.float32)

        def before_attention(start, carry):
            h, qkv = carry
            x = packing.take(h, start)[None]
            x += 0.5 * block.ff1(x)
            return put(h, x[0], start), put(qkv, jnp.stack(attention.heads(x), axis=2)[0], start)

        def attend(i, mixed):
            starts = jax.lax.dynamic_slice_in_dim(blocks.starts, i * blocks.group, blocks.group)
            lengths = jax.lax.dynamic_slice_in_dim(blocks.lengths, i * blocks.group, blocks.group)
            blocks_read = jnp.stack([jax.lax.dynamic_slice_in_dim(qkv, start, context) for start in starts])
            valid = jnp.arange(context, dtype=jnp.int32)[None, :] < lengths[:, None]
            # Behind a row's end are other rows, whose values must not come through even if they are NaN.
            q, k, v = (blocks_read[None, :, :, part] for part in range(3))
            v = jnp.where(valid[None, :, :, None, None], v, 0)
            attended = attention.attend(q, k, v, valid[None], relative)[0].reshape(blocks.group, context, width)
            # In order: what a block writes behind its row's end, the next row's first block replaces.
            for block_index in range(blocks.group):
                mixed = put(mixed, attended[block_index], starts[block_index])
            return mixed

        def before_convolution(start, carry):
            h, gated = carry
            _, _, valid = packing.rows_of(packing.positions(start))
            x = (packing.take(h, start) + attention.out(packing.take(mixed, start)))[None]
            return put(h, x[0], start), put(gated, convolution.gated(x, valid[None])[0], start + before)

        def finish(start, carry):
            h, importances = carry
            window = jax.lax.dynamic_slice_in_dim(gated, start, packing.chunk + before + after)
            x = shifted_products(window[None].astype(jnp.float32), kernel).astype(dtype)
            convolved, _ = convolution.output(x, jnp.ones((1, packing.chunk), bool), train=False)
            x = packing.take(h, start)[None] + convolved
            x = block.norm(x + 0.5 * block.ff2(x))
            x, weight = jax.lax.cond(
                index == config.self_condition_layer,
                lambda x: encoder.condition(x, importance),
                lambda x: (x, packing.take(importances, start)[None]),
                x,
            )
            return put(h, x[0], start), put(importances, weight[0], start)

        h, importances, qkv, mixed, gated = carry
        h, qkv = packing.for_chunks(before_attention, (h, qkv))
        mixed = jax.lax.fori_loop(jnp.int32(0), blocks.num_groups, attend, mixed)
        h, gated = packing.for_chunks(before_convolution, (h, gated))
        h, importances = packing.for_chunks(finish, (h, importances))
        return (h, importances, qkv, mixed, gated), None

    h = packing.for_chunks(embed, packing.zeros(packing.chunk, config.hidden_dim, dtype=dtype))
    carry = (
        h,
        packing.zeros(0),
        packing.zeros(context, 3, heads, config.dim_head, dtype=dtype),
        packing.zeros(context, width, dtype=dtype),
        packing.zeros(before + after, config.inner_dim, dtype=dtype),
    )
    (h, importances, *_), _ = for_layers(encoder.layers, run, carry)
    return PackedEncoderOutput(h, importances)


class PackedLabels(NamedTuple):
    """What the CTC head says about packed frames.

    Fields:
      logits: float32 `[p, c]`, without meaning in the gaps.
      labels: int32 `[p]`, the best of every frame.
      entropy, speech_frames: `[b]`, as in `programs.Encoded`.
    """

    logits: Float[Array, "p c"]
    labels: Int[Array, "p"]
    entropy: Float[Array, "b"]
    speech_frames: Int[Array, "b"]


class PackedEncoding(NamedTuple):
    """What an encoder makes of packed rows of audio.

    Fields:
      packing: where each row's frames are.
      features: float32 `[p, f]`.
      output: the encoder's activations.
      labels: what the CTC head says.
      audio: audio embeddings by row, `[b, a, e]`, if they were asked for.
    """

    packing: Packing
    features: Float[Array, "p f"]
    output: PackedEncoderOutput
    labels: PackedLabels
    audio: AudioEmbeddings | None


def label(encoder: Encoder, hidden: Float[Array, "p d"], packing: Packing) -> PackedLabels:
    """Computes the CTC head and what is read from it."""

    def label_chunk(start, labels):
        rows, _, valid = packing.rows_of(packing.positions(start))
        logits = encoder.ctc_logits(packing.take(hidden, start)[None])
        whole = jnp.full((1,), packing.chunk, jnp.int32)
        own = valid[:, None] & (rows[:, None] == jnp.arange(len(packing.lengths), dtype=jnp.int32)[None, :])
        entropy = jnp.max(jnp.where(own, ctc.frame_entropy(logits, whole)[0][:, None], 0.0), axis=0)
        speech = jnp.sum(own & ctc.has_speech(logits)[0][:, None], axis=0, dtype=jnp.int32)
        return PackedLabels(
            put(labels.logits, logits[0], start),
            put(labels.labels, ctc.best_labels(logits, whole)[0], start),
            jnp.maximum(labels.entropy, entropy),
            labels.speech_frames + speech,
        )

    zeros = packing.lengths * 0
    start = PackedLabels(
        packing.zeros(0, encoder.config.output_dim),
        packing.zeros(0, dtype=jnp.int32),
        zeros.astype(jnp.float32),
        zeros,
    )
    return packing.for_chunks(label_chunk, start)


def window_groups(packing: Packing, window: int) -> tuple[int, Int[Array, ""]]:
    """The projector's windows that are computed together, and how many such groups hold a frame."""
    group = max(1, packing.chunk // window)
    return group, -(-packing.ends[-1] // (group * window))


def project(projector: Projector, hidden: Float[Array, "p d"], packing: Packing) -> AudioEmbeddings:
    """Audio embeddings of every row, `[b, num_audio_tokens(longest), e]`; after a row's own are those of other rows."""
    config = projector.config
    size = config.window_size
    group, num_groups = window_groups(packing, size)
    most = -(-packing.capacity // size)

    def project_group(i, audio):
        start = i * group * size
        _, _, valid = packing.rows_of(start + jnp.arange(group * size, dtype=jnp.int32))
        frames = jax.lax.dynamic_slice_in_dim(hidden, start, group * size)
        windows = jnp.where(valid[:, None], frames, 0).reshape(1, group, size, -1)
        return put(audio, projector.windows(windows)[0], i * group)

    width = projector.output_dim
    audio = jnp.zeros((most + group, config.num_queries, width), hidden.dtype) + hidden[:1, :1, None] * 0
    audio = jax.lax.fori_loop(jnp.int32(0), num_groups, project_group, audio)
    index = packing.starts[:, None] // size + jnp.arange(-(-packing.longest // size), dtype=jnp.int32)[None, :]
    rows = audio[jnp.minimum(index, len(audio) - 1)]
    return rows.reshape(len(rows), -1, width)
