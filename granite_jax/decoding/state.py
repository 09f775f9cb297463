"""The state of the decode loop."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from granite_jax.array_types import Lengths
from granite_jax.decoding.bias import States
from granite_jax.decoding.choice import Selection
from granite_jax.decoding.draft import Draft


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What one iteration of the loop hands to the next.

    For example, a row whose draft has one wrong token, x for d, and a window of up to three proposals (K = 3):

        draft      a b c x e f g     cursor 4: the next to be proposed
        tokens     a b c d . . .     generated so far, `num_tokens` of them valid
        last_token       d           the last of them: chosen, not yet run through the decoder
        cache      P P P a b c .     prompt and all generated tokens but the last one

        window           d e f g     what the next step runs: the last token and the proposals
        selection        e f g h     what the decoder would write after each: all agree, and h is new
        tokens     a b c d e f g h   a token each for the accepted proposals, and one more
        cache      P P P a b c d e f g   rolled back to here if fewer had agreed

    Fields:
      tokens: int32 `[b, r]`, without end-of-text; zeros after `num_tokens`.
      log_probs: float32 `[b, r]`, of each token in the decoder's own distribution, in nats, and behind the last one
        that of end-of-text, where there is room; zeros after it.
      draft_positions: int32 `[b, r]`, the draft position that proposed each token; -1 for the decoder's own.
      num_tokens: int32 `[b]`.
      max_new_tokens: int32 `[b]`, the most tokens that each row generates, at most `r`.
      last_token: int32 `[b]`, what the next step runs first.
      ended: `[b]`, rows that produced end-of-text.
      num_forward_passes: int32 `[b]`, decoder passes over each row, the prefill included.
      draft: a text that the decoder may agree with; of length 0 in rows that have none.
      cursor: int32 `[b]`, the draft position thought to come next; the draft's length when there is none.
      num_accepted: int32 `[b]`, generated tokens that were proposed.
      bias_states: the bias's states after the generated tokens, the last one included, leaves `[b, ...]`.
      cache: the decoder's KV cache.
    """

    tokens: Int[Array, "b r"]
    log_probs: Float[Array, "b r"]
    draft_positions: Int[Array, "b r"]
    num_tokens: Lengths
    max_new_tokens: Lengths
    last_token: Lengths
    ended: Bool[Array, "b"]
    num_forward_passes: Lengths
    draft: Draft
    cursor: Lengths
    num_accepted: Lengths
    bias_states: States
    cache: Any

    @property
    def finished(self) -> Bool[Array, "b"]:
        """Rows that take no further token."""
        return self.ended | (self.num_tokens >= self.max_new_tokens)

    @property
    def all_finished(self) -> Bool[Array, ""]:
        """Whether the loop is done."""
        return jnp.all(self.finished)

    @property
    def proposable(self) -> Lengths:
        """Draft tokens that can still be proposed: `max_new_tokens` must also admit the token that follows them."""
        remaining = jnp.minimum(self.draft.lengths - self.cursor, self.max_new_tokens - self.num_tokens - 1)
        return jnp.where(self.finished, 0, jnp.maximum(remaining, 0))

    @property
    def any_proposal(self) -> Bool[Array, ""]:
        """Whether any row can propose a token."""
        return jnp.any(self.proposable > 0)

    def append(self, selection: Selection, num_accepted: Lengths, end_of_text: int) -> "DecodeState":
        """Appends to every unfinished row the accepted proposals and the one token that follows them.

        Args:
          selection: the token selected after each position of the step, `[b, p]`.
          num_accepted: int32 `[b]`, how many leading tokens are accepted proposals.

        Returns:
          The state whose cache holds the appended tokens except the last. End-of-text ends a row, wherever it is among
          the tokens, and is not appended. `cursor` has moved past the accepted proposals.
        """
        width = selection.tokens.shape[1]
        step = jnp.arange(width, dtype=jnp.int32)[None, :]
        limit = jnp.where(self.finished, 0, jnp.minimum(num_accepted + 1, self.max_new_tokens - self.num_tokens))
        ends = (selection.tokens == end_of_text) & (step < limit[:, None])
        ended = ends.any(axis=1, keepdims=True)
        count = jnp.minimum(limit, jnp.where(ends, step, width).min(axis=1))
        offset = jnp.arange(self.tokens.shape[1], dtype=jnp.int32)[None, :] - self.num_tokens[:, None]
        inside, source = (offset >= 0) & (offset < count[:, None]), jnp.clip(offset, 0, width - 1)

        def appended(old: jax.Array, new: jax.Array, inside: jax.Array = inside) -> jax.Array:
            return jnp.where(inside, jnp.take_along_axis(new, source, axis=1), old)

        last = jnp.take_along_axis(selection.tokens, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
        num_proposed = jnp.minimum(num_accepted, count)
        proposed = inside & (offset < num_proposed[:, None])
        return dataclasses.replace(
            self,
            tokens=appended(self.tokens, selection.tokens),
            log_probs=appended(self.log_probs, selection.log_probs, inside | ((offset == count[:, None]) & ended)),
            draft_positions=jnp.where(proposed, self.cursor[:, None] + offset, self.draft_positions),
            num_tokens=self.num_tokens + count,
            last_token=jnp.where(count > 0, last, self.last_token),
            ended=self.ended | ended[:, 0],
            cursor=self.cursor + num_proposed,
            num_accepted=self.num_accepted + num_proposed,
            cache=self.cache.rolled_back(self.cache.lengths + count),
        )
