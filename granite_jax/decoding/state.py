"""The state of the decode loop."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from granite_jax.array_types import Lengths


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What one iteration of the loop hands to the next.

        tokens     a b c . . .     generated so far, `counts` of them valid
        pending        c           the last of them: chosen, not yet run through the decoder
        cache      P P P a b .     prompt and all generated tokens but the pending one

    Fields:
      tokens: int32 `[b, room]`, without end-of-text; zeros after `counts`.
      counts: int32 `[b]`.
      limits: int32 `[b]`, the most tokens each row may generate, at most `room`.
      pending: int32 `[b, 1]`, what the next step runs.
      ended: `[b]`, rows that produced end-of-text.
      passes: int32 `[b]`, decoder passes over each row, the prefill included.
      cache: the decoder's KV cache.
    """

    tokens: Int[Array, "b r"]
    counts: Lengths
    limits: Lengths
    pending: Int[Array, "b 1"]
    ended: Bool[Array, "b"]
    passes: Lengths
    cache: Any

    @property
    def finished(self) -> Bool[Array, "b"]:
        """Rows that take no further token."""
        return self.ended | (self.counts >= self.limits)

    @property
    def all_finished(self) -> Bool[Array, ""]:
        """Whether the loop is done."""
        return jnp.all(self.finished)

    def accept(self, chosen: Int[Array, "b"], end_of_text: int) -> "DecodeState":
        """Appends one chosen token to every unfinished row; end-of-text ends a row and is not kept."""
        ended = self.ended | (~self.finished & (chosen == end_of_text))
        kept = ~self.finished & ~ended
        column = jnp.arange(self.tokens.shape[1]) == self.counts[:, None]
        return dataclasses.replace(
            self,
            tokens=jnp.where(column & kept[:, None], chosen[:, None], self.tokens),
            counts=self.counts + kept,
            pending=jnp.where(kept, chosen, self.pending[:, 0])[:, None],
            ended=ended,
        )
