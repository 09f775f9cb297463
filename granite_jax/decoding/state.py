"""The state of the decode loop."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from granite_jax.array_types import Lengths, Tokens
from granite_jax.decoding.draft import Draft


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What one iteration of the loop hands to the next.

    A row whose draft has one wrong token, x for d. The window holds up to three proposals (K = 3):

        draft      a b c x e f g     cursor 4: the next to be proposed
        tokens     a b c d . . .     generated so far, `counts` of them valid
        pending          d           the last of them: chosen, not yet run through the decoder
        cache      P P P a b c .     prompt and all generated tokens but the pending one

        window           d e f g     what the next step runs: the pending token and the proposals
        choices          e f g h     what the decoder would write after each: all agree, and h is new
        tokens     a b c d e f g h   a token each for the accepted proposals, and one more
        cache      P P P a b c d e f g   rolled back to here if fewer had agreed

    Fields:
      tokens: int32 `[b, room]`, without end-of-text; zeros after `counts`.
      sources: int32 `[b, room]`, the draft position that proposed each token; -1 for the decoder's own.
      counts: int32 `[b]`.
      limits: int32 `[b]`, the most tokens each row may generate, at most `room`.
      pending: int32 `[b]`, what the next step runs first.
      ended: `[b]`, rows that produced end-of-text.
      passes: int32 `[b]`, decoder passes over each row, the prefill included.
      draft: a text that the decoder may agree with; of length 0 in rows that have none.
      cursor: int32 `[b]`, the draft position thought to come next; the draft's length when there is none.
      accepted: int32 `[b]`, generated tokens that were proposed.
      matched: int32 `[b]`, the keyword automaton's state after the generated tokens, the pending one included.
      cache: the decoder's KV cache.
    """

    tokens: Int[Array, "b r"]
    sources: Int[Array, "b r"]
    counts: Lengths
    limits: Lengths
    pending: Lengths
    ended: Bool[Array, "b"]
    passes: Lengths
    draft: Draft
    cursor: Lengths
    accepted: Lengths
    matched: Lengths
    cache: Any

    @property
    def finished(self) -> Bool[Array, "b"]:
        """Rows that take no further token."""
        return self.ended | (self.counts >= self.limits)

    @property
    def all_finished(self) -> Bool[Array, ""]:
        """Whether the loop is done."""
        return jnp.all(self.finished)

    @property
    def proposable(self) -> Lengths:
        """Draft tokens that may still be proposed: no more than the limit admits beside the token that follows them."""
        left = jnp.minimum(self.draft.lengths - self.cursor, self.limits - self.counts - 1)
        return jnp.where(self.finished, 0, jnp.maximum(left, 0))

    @property
    def any_proposal(self) -> Bool[Array, ""]:
        """Whether a window has anything to check."""
        return jnp.any(self.proposable > 0)

    def accept(self, chosen: Tokens, agreed: Lengths, end_of_text: int) -> "DecodeState":
        """Appends to every unfinished row the proposals that passed and the one token that follows them.

        Args:
          chosen: int32 `[b, p]`, the tokens after each position of the step.
          agreed: int32 `[b]`, how many of them, from the first, were proposed.

        Returns:
          The state with the cache holding what was accepted, except the token now pending. End-of-text ends a row,
          wherever it is among the tokens, and is not kept. `cursor` has moved past the accepted proposals.
        """
        step = jnp.arange(chosen.shape[1])[None, :]
        run = jnp.where(self.finished, 0, jnp.minimum(agreed + 1, self.limits - self.counts))
        ends = (chosen == end_of_text) & (step < run[:, None])
        kept = jnp.minimum(run, jnp.where(ends, step, chosen.shape[1]).min(axis=1))
        place = jnp.arange(self.tokens.shape[1])[None, :] - self.counts[:, None]
        placed = jnp.take_along_axis(chosen, jnp.clip(place, 0, chosen.shape[1] - 1), axis=1)
        last = jnp.take_along_axis(chosen, jnp.maximum(kept - 1, 0)[:, None], axis=1)[:, 0]
        used = jnp.minimum(agreed, kept)
        return dataclasses.replace(
            self,
            tokens=jnp.where((place >= 0) & (place < kept[:, None]), placed, self.tokens),
            sources=jnp.where((place >= 0) & (place < used[:, None]), self.cursor[:, None] + place, self.sources),
            counts=self.counts + kept,
            pending=jnp.where(kept > 0, last, self.pending),
            ended=self.ended | ends.any(axis=1),
            cursor=self.cursor + used,
            accepted=self.accepted + used,
            cache=self.cache.rolled_back(self.cache.lengths + kept),
        )
