"""Drafts, and the rules that find where a draft goes on after the decoder has departed from it.

Re-alignment keeps a draft useful after its first mistake. It cannot change the tokens: wrong proposals are rejected.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from granite_jax.array_types import Lengths, Tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draft:
    """For every row, a text that the decoder may agree with.

    Fields:
      tokens: int32 `[b, n]`; ignored past a row's length.
      lengths: int32 `[b]`.
    """

    tokens: Tokens
    lengths: Lengths

    @property
    def inside(self) -> Bool[Array, "b n"]:
        """Positions that hold a token."""
        return jnp.arange(self.tokens.shape[1], dtype=jnp.int32)[None, :] < self.lengths[:, None]

    def window(self, cursor: Lengths, width: int) -> Tokens:
        """The `width` tokens from `cursor` on; those past the end are arbitrary."""
        positions = jnp.minimum(cursor[:, None] + jnp.arange(width, dtype=jnp.int32)[None, :], self.tokens.shape[1] - 1)
        return jnp.take_along_axis(self.tokens, positions, axis=1)


Realign = Callable[[Draft, Lengths, Lengths], Lengths]
"""(draft, expected position, token written) -> position to propose next; the draft's length for none.

The decoder has written `token` at draft position `expected`, whose token may differ. Proposals from a position that the
decoder has not reached yet are rejected, which costs little: a pass is due anyway."""


def give_up(draft: Draft, expected: Lengths, token: Lengths) -> Lengths:
    """Proposes nothing after the prefill: step 3 of arXiv 2603.11243, for comparison."""
    return draft.lengths


def nearest_token(draft: Draft, expected: Lengths, token: Lengths) -> Lengths:
    """Goes on after the token's nearest occurrence, the later one of two; without any, after position `expected`.

    draft  "call | dak|f|iki | now"     the decoder wrote "iki" for " dak": goes on at " now";
                                        if it had written " dag", which does not occur: at "f"
    """
    positions = jnp.arange(draft.tokens.shape[1], dtype=jnp.int32)[None, :]
    offset = positions - expected[:, None]
    matches = draft.inside & (draft.tokens == token[:, None])
    rank = jnp.where(matches, 2 * jnp.abs(offset) + (offset < 0).astype(jnp.int32), jnp.iinfo(jnp.int32).max)
    nearest = jnp.argmin(rank, axis=1).astype(jnp.int32)
    return jnp.where(matches.any(axis=1), nearest + 1, jnp.minimum(expected + 1, draft.lengths))


REALIGN: Mapping[str, Realign] = {"none": give_up, "nearest": nearest_token}
"""The rules by name; benchmarks/speculation.py compares them."""
