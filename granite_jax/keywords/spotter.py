"""The keyword spotter: scores which keywords may have been spoken, by the encoder's CTC posteriors.

A keyword's score is that of the best CTC alignment of its characters to any span of frames: the sum of each frame's
log-probability of its label minus that of its best label, divided by the number of characters. The greedy CTC text of
any utterance scores 0; a text that sounds like no part of it scores some nats per character less.

The alignment of "abba" to seven frames, `_` the blank: a doubled character needs a blank between.

    frame    0 1 2 3 4 5 6        Columns of the recursion are the keyword's characters, each with the blank after it;
    label        a b _ b a        the first character can begin at any frame, the last can end at any.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from granite_jax.array_types import CTCLogits, Lengths
from granite_jax.models.layers.ctc import BLANK

MAX_KEYWORDS = 2048  # for one utterance
WIDTH = 32  # characters of a keyword that are scored
KEPT = 64  # best keywords of an utterance that are returned
_SHORT = 12  # characters up to which keywords cost less
_CHUNK = 256  # keywords scored together


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeywordBatch:
    """The keywords of each row to score.

    Fields:
      labels: int16 `[b, m, w]`, CTC labels, zeros before them. Scoring is fastest if short keywords come first.
      counts: int32 `[b]`, keywords of each row.
    """

    labels: Int[Array, "b m w"]
    counts: Lengths


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpottingScores:
    """The keywords of each row with the best scores, best first.

    Fields:
      columns: int32 `[b, k]`, index of each in `KeywordBatch.labels`.
      scores: float32 `[b, k]`, nats per character, at most 0; `-inf` where there are no more keywords.
      starts, ends: int32 `[b, k]`, first frame of each, and the frame after its last.
    """

    columns: Int[Array, "b k"]
    scores: Float[Array, "b k"]
    starts: Int[Array, "b k"]
    ends: Int[Array, "b k"]


def make_keyword_batch(rows: Sequence[np.ndarray | None]) -> KeywordBatch:
    """The rows' label matrices `[keywords, WIDTH]` as one numpy array of a size that depends on `len(rows)` alone."""
    labels = np.zeros((len(rows), MAX_KEYWORDS, WIDTH), np.int16)
    counts = np.zeros(len(rows), np.int32)
    for row, matrix in enumerate(rows):
        if matrix is not None:
            counts[row] = len(matrix)
            labels[row, : len(matrix)] = matrix
    return KeywordBatch(labels, counts)  # pyright: ignore


def score_keywords(logits: CTCLogits, lengths: Lengths, keywords: KeywordBatch) -> SpottingScores:
    """Scores every keyword against its row's `lengths` valid frames."""
    frames = jnp.arange(logits.shape[1], dtype=jnp.int32)[None, :, None] < lengths[:, None, None]
    relative = jnp.where(frames, logits - logits.max(axis=-1, keepdims=True), -jnp.inf)
    labels = keywords.labels.astype(jnp.int32)
    num_frames = lengths.max()
    num_keywords = keywords.counts.max()

    def add(carry):
        start, scores = carry
        chunk = jax.lax.dynamic_slice_in_dim(labels, start, _CHUNK, axis=1)
        chunk_scores = jax.lax.cond(
            (chunk[..., : WIDTH - _SHORT] > 0).any(),
            lambda: _align(relative, num_frames, chunk)[0],
            lambda: _align(relative, num_frames, chunk[..., -_SHORT:])[0],
        )
        return start + _CHUNK, jax.lax.dynamic_update_slice_in_dim(scores, chunk_scores, start, axis=1)

    scores = jnp.where(labels[..., -1] < 0, jnp.float32(0.0), -jnp.inf)
    scores = jax.lax.while_loop(lambda carry: carry[0] < num_keywords, add, (jnp.int32(0), scores))[1]
    scores, columns = jax.lax.top_k(scores, KEPT)
    best = jnp.take_along_axis(labels, columns[..., None], axis=1)
    _, starts, ends = _align(relative, jnp.where(num_keywords > 0, num_frames, 0), best)
    return SpottingScores(columns.astype(jnp.int32), scores, starts, ends)


def no_scores(lengths: Lengths) -> SpottingScores:
    """What `score_keywords` returns without keywords."""
    zeros = jnp.zeros((1, KEPT), jnp.int32) + lengths[:, None] * 0
    return SpottingScores(zeros, zeros.astype(jnp.float32) - jnp.inf, zeros, zeros)


def _align(
    relative: Float[Array, "b t c"], frames: Int[Array, ""], labels: Int[Array, "b k w"]
) -> tuple[Float[Array, "b k"], Int[Array, "b k"], Int[Array, "b k"]]:
    """Scores and spans of the labels' best alignments; `-inf` for no labels. Unused results are not computed."""
    real = labels > 0

    def previous(values, edge):
        return jnp.pad(values[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=edge)

    repeated = labels == previous(labels, 0)

    def step(frame, carry):
        # For every character, and for the blank after it: the best score of an alignment that ends in it at this frame,
        # and the frame at which that alignment began. The zeros before a keyword are a state without cost.
        (char, blank, best), (char_start, blank_start, start, end) = carry
        frame_scores = jax.lax.dynamic_index_in_dim(relative, frame, axis=1, keepdims=False)
        emitted = jnp.take_along_axis(frame_scores, labels.reshape(len(labels), -1), axis=1).reshape(labels.shape)
        after_char = jnp.where(repeated, -jnp.inf, previous(char, 0.0))
        after_blank = previous(blank, -jnp.inf)
        entered = jnp.maximum(after_char, after_blank)
        new = jnp.where(real, emitted + jnp.maximum(char, entered), 0.0)
        silent = frame_scores[:, None, None, BLANK] + jnp.maximum(char, blank)
        entry = jnp.where(after_char >= after_blank, previous(char_start, frame), previous(blank_start, 0))
        starts = jnp.where(real, jnp.where(char >= entered, char_start, entry), frame + 1)
        silent_start = jnp.where(char >= blank, char_start, blank_start)
        final, better = new[..., -1], (new[..., -1] > best) & real[..., -1]
        return (new, silent, jnp.where(better, final, best)), (
            starts,
            silent_start,
            jnp.where(better, starts[..., -1], start),
            jnp.where(better, frame + 1, end),
        )

    # Derived from an input, so that under shard_map the carry varies with it.
    initial = jnp.where(real, jnp.float32(-jnp.inf), 0.0)
    worst, zeros = initial - jnp.inf, labels * 0
    scores = (initial, worst, worst[..., 0])
    spans = (zeros, zeros, zeros[..., 0], zeros[..., 0])
    (_, _, best), (_, _, start, end) = jax.lax.fori_loop(0, frames, step, (scores, spans))
    return best / jnp.maximum(real.sum(axis=2), 1).astype(jnp.float32), start, end
