"""Forced alignment of a text's labels to the frames of the CTC head (Viterbi), batched.

The lattice of "ab" has five states. A frame stays in its state or moves on by one; between two labels that differ it
can also skip the blank, as frame 3 does here:

    state  4  blank                _      The states of frames 0 to 4 are 0 1 1 3 4. Odd states 2 i + 1 are label i,
           3  b                 b         even ones the blanks around the labels.
           2  blank
           1  a           a  a
           0  blank    _
              frame    0  1  2  3  4
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from granite_jax.array_types import CTCLogits, Lengths
from granite_jax.models.layers.ctc import BLANK

WILDCARD = -1
"""The label of something spoken that has no labels, or unknown ones, such as "25" (twenty five)."""
WILDCARD_PENALTY = 0.1
"""Nats per frame by which a wildcard scores less than the frame's best label.

It keeps frames that another label explains as well, such as the blanks of a pause, out of the wildcard. It is small
because a wildcard has to take all frames of what it stands for: two seconds cost ten nats.
"""


class Alignment(NamedTuple):
    """The most likely path of each row.

    Fields:
      states: int32 `[b, t]`, state of the lattice at each frame: 2 i + 1 at the frames of label i, even at blanks; -1
        past the row's frames, and everywhere in a row that has too few frames for its labels or logits that are NaN.
      log_probs: float32 `[b, t]`, log-probability of the state's label at each frame, in nats; of the best label at
        frames of a wildcard, 0 where the state is -1.
    """

    states: Int[Array, "b t"]
    log_probs: Float[Array, "b t"]


def align(logits: CTCLogits, frames: Lengths, labels: Int[Array, "b y"], num_labels: Lengths) -> Alignment:
    """Finds the most likely CTC path of every row that spells its labels.

    A label takes at least one frame, and two equal labels in succession have a blank between. A wildcard stands for
    anything, at a score of `WILDCARD_PENALTY` below each frame's best label; two in succession need no blank between.
    Of paths that score alike, the one that leaves a state later is taken.

    Args:
      logits: `[b, t, c]`, in any floating dtype; scores are float32.
      frames: int32 `[b]`, valid frames of each row.
      labels: int32 `[b, y]`, in 1 to c - 1 or `WILDCARD`. What lies past a row's `num_labels` does not matter.
      num_labels: int32 `[b]`; a row without labels is all blank.
    """
    normalizers = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    best_label = jnp.max(logits, axis=-1).astype(jnp.float32) - normalizers
    width = 2 * labels.shape[1] + 1
    positions = jnp.arange(width, dtype=jnp.int32)[None, :]
    lattice = jnp.full((labels.shape[0], width), BLANK, jnp.int32).at[:, 1::2].set(labels.astype(jnp.int32))
    is_wildcard = lattice == WILDCARD
    before = jnp.pad(lattice, ((0, 0), (2, 0)))[:, :-2]
    can_skip = (positions % 2 == 1) & (positions > 1) & ((lattice != before) | is_wildcard)

    def forward(best: Array, frame: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        index, normalizer, wildcard = frame
        now = jax.lax.dynamic_index_in_dim(logits, index, axis=1, keepdims=False)
        score = jnp.take_along_axis(now, jnp.maximum(lattice, 0), axis=1).astype(jnp.float32) - normalizer[:, None]
        score = jnp.where(is_wildcard, wildcard[:, None] - WILDCARD_PENALTY, score)
        step, skip = (jnp.pad(best, ((0, 0), (n, 0)), constant_values=-jnp.inf)[:, :width] for n in (1, 2))
        moves = jnp.stack([best, step, jnp.where(can_skip, skip, -jnp.inf)])
        is_valid = (index < frames)[:, None]
        return jnp.where(is_valid, moves.max(axis=0) + score, best), jnp.argmax(moves, axis=0).astype(jnp.int8)

    # A path enters state 0 before the first frame. The carry depends on all inputs, as shard_map wants it; NaN does not
    # pass through.
    zeros = jnp.where(jnp.isnan(normalizers[:, :1]), 0.0, 0.0) + 0.0 * (frames + num_labels)[:, None].astype(
        jnp.float32
    )
    start = jnp.where(positions == 0, 0.0, -jnp.inf) + zeros + 0.0 * lattice.astype(jnp.float32)
    indices = jnp.arange(logits.shape[1], dtype=jnp.int32)
    best, moves = jax.lax.scan(forward, start, (indices, normalizers.T, best_label.T))

    def score_of(state: Lengths) -> Array:
        return jnp.take_along_axis(best, jnp.maximum(state, 0)[:, None], axis=1)[:, 0]

    blank = 2 * num_labels.astype(jnp.int32)
    last = jnp.where((num_labels > 0) & (score_of(blank - 1) >= score_of(blank)), blank - 1, blank)
    is_possible = jnp.isfinite(score_of(last))

    def backward(state: Lengths, frame: tuple[Array, Array]) -> tuple[Lengths, Lengths]:
        index, move = frame
        is_valid = index < frames
        moved = jnp.take_along_axis(move, state[:, None], axis=1)[:, 0].astype(jnp.int32)
        return jnp.where(is_valid, state - moved, state), jnp.where(is_valid & is_possible, state, -1)

    _, states = jax.lax.scan(backward, last, (indices, moves), reverse=True)
    states = states.T
    path = jnp.take_along_axis(lattice, jnp.maximum(states, 0), axis=1)
    scores = jnp.take_along_axis(logits, jnp.maximum(path, 0)[:, :, None], axis=2)[:, :, 0].astype(jnp.float32)
    log_probs = jnp.where(path == WILDCARD, best_label, scores - normalizers)
    return Alignment(states, jnp.where(states >= 0, log_probs, 0.0))
