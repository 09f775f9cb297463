"""The encoder's second CTC head, whose labels are the language model's tokens.

Frames are pooled four by four, each weighted by the probability that it is no blank, by which the encoder's middle CTC
output judges how much it has to say. Label 0 is the blank, label `i` the token `i - 1`.
Reference: the model card of granite-speech-4.1-2b, and IBM's notebook on speculative decoding with it.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from granite_jax.array_types import Activations, Lengths
from granite_jax.models.layers.ctc import BLANK, collapse

WINDOW = 4
_ROWS = 256  # windows whose logits are held at once

Importance = Literal["before", "after"]
"""Which activations the importance of frames is computed from: those of the middle block before self-conditioning is
added to them, as IBM describes it, or after, as its notebook does by a side effect of transformers."""


def bpe_tokens(labels: Sequence[int] | np.ndarray) -> list[int]:
    """The token ids of one utterance's labels: repetitions collapsed, blanks dropped."""
    return [label - 1 for label in collapse(labels)]


def pool(hidden: Activations, importance: Float[Array, "b t"], lengths: Lengths) -> Float[Array, "b w d"]:
    """The weighted mean of every window's valid frames, in the dtype of `hidden`.

    Args:
      hidden: the encoder's final activations.
      importance: weight of every frame, float32; those past a row's `lengths` count as 0.

    Returns:
      Activations of `ceil(t / 4)` windows. The last one has fewer frames if `t` is no multiple of 4.
    """
    batch, frames, width = hidden.shape
    valid = jnp.arange(frames, dtype=jnp.int32)[None, :] < lengths[:, None]
    windows = -(-frames // WINDOW)
    padding = windows * WINDOW - frames
    weights = jnp.pad(jnp.where(valid, importance, 0.0), ((0, 0), (0, padding))).reshape(batch, windows, WINDOW)
    weights /= weights.sum(axis=-1, keepdims=True) + 1e-8
    # What is past a row's end weighs nothing, but can be NaN.
    grouped = jnp.where(valid[..., None], hidden, 0)
    grouped = jnp.pad(grouped, ((0, 0), (0, padding), (0, 0))).reshape(batch, windows, WINDOW, width)
    pooled = jnp.einsum("bwk,bwkd->bwd", weights, grouped.astype(jnp.float32), precision="highest")
    return pooled.astype(hidden.dtype)


def best_labels(
    head: Callable[[Any], Any], pooled: Float[Array, "b w d"], lengths: Lengths, wanted: Lengths
) -> Int[Array, "b w"]:
    """The best label of every window.

    The logits of a few windows at a time are held: those of all would take gigabytes.

    Args:
      head: activations `[n, d]` -> logits `[n, c]`.
      lengths: valid frames of each row.
      wanted: int32, 0 for rows whose labels nobody needs; without any wanted row, nothing is computed.

    Returns:
      int32, blank past each row's end and in rows that are not wanted.
    """
    batch, windows, width = pooled.shape
    counts = jnp.where(wanted > 0, -(-lengths // WINDOW), 0)
    # Windows of all rows side by side, so that those past the longest row's end come last.
    rows = pooled.swapaxes(0, 1).reshape(windows * batch, width)
    rows = jnp.pad(rows, ((0, -len(rows) % _ROWS), (0, 0)))

    def add(carry):
        start, labels = carry
        logits = head(jax.lax.dynamic_slice_in_dim(rows, start, _ROWS))
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return start + _ROWS, jax.lax.dynamic_update_slice_in_dim(labels, best, start, axis=0)

    # Derived from inputs, so that under shard_map both parts of the carry vary with them.
    start, zeros = counts.max() * 0, (rows[:, 0] * 0).astype(jnp.int32)
    _, labels = jax.lax.while_loop(lambda carry: carry[0] < counts.max() * batch, add, (start, zeros))
    labels = labels[: windows * batch].reshape(windows, batch).T
    valid = jnp.arange(windows, dtype=jnp.int32)[None, :] < counts[:, None]
    return jnp.where(valid, labels, BLANK)
