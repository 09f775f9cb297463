"""Drafts, and where to go on in one after the decoder has departed from it.

Re-alignment is what keeps a draft useful after its first mistake. Nothing here can change the tokens: what is proposed
in the wrong place is rejected.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from granite_jax.array_types import Lengths, Tokens

_REACH = 6  # draft positions in which a token is still taken for the same place in the text


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spelling:
    """How the vocabulary's tokens are written.

    Fields:
      starts_word: `[v]`, whether a token begins with a space.
      lengths: int32 `[v]`, bytes of each token.
    """

    starts_word: Bool[Array, "v"]
    lengths: Int[Array, "v"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draft:
    """A text for every row that the decoder may agree with.

    Fields:
      tokens: int32 `[b, n]`; past a row's length they mean nothing.
      lengths: int32 `[b]`.
    """

    tokens: Tokens
    lengths: Lengths

    @property
    def inside(self) -> Bool[Array, "b n"]:
        """Positions that hold a token."""
        return jnp.arange(self.tokens.shape[1]) < self.lengths[:, None]

    def window(self, cursor: Lengths, width: int) -> Tokens:
        """The `width` tokens from `cursor` on; those past the end mean nothing."""
        place = jnp.minimum(cursor[:, None] + jnp.arange(width), self.tokens.shape[1] - 1)
        return jnp.take_along_axis(self.tokens, place, axis=1)

    def at(self, values: Int[Array, "b n"] | Bool[Array, "b n"], place: Lengths) -> Array:
        """`values` of every row at `place`, which is moved inside."""
        return jnp.take_along_axis(values, jnp.minimum(place, values.shape[1] - 1)[:, None], axis=1)[:, 0]


Realign = Callable[[Draft, Spelling, Lengths, Lengths], Lengths]
"""(draft, spelling, expected position, token written) -> position to propose next; the draft's length for none.

The decoder has written `token` where the draft holds position `expected`, which may or may not be the same token."""


def give_up(draft: Draft, spelling: Spelling, expected: Lengths, token: Lengths) -> Lengths:
    """Proposes nothing after the prefill: step 3 of arXiv 2603.11243, for comparison."""
    return draft.lengths


def nearest_token(draft: Draft, spelling: Spelling, expected: Lengths, token: Lengths) -> Lengths:
    """After the nearest occurrence of the token; one position on, as if it had replaced a token, if there is none."""
    found, place = _nearest(draft, expected, token, reach=draft.tokens.shape[1])
    return jnp.where(found, place + 1, jnp.minimum(expected + 1, draft.lengths))


def words(draft: Draft, spelling: Spelling, expected: Lengths, token: Lengths) -> Lengths:
    """After the nearest occurrence of the token, or else where the same word, spelt differently, would go on.

        draft  "call | dak|f|iki | now"     the decoder wrote " dag" for " dak", of the same length: goes on at "f";
                                            had it written " da", of another length: at " now", the next word, until
                                            the decoder begins it

    The proposals of a place where the decoder has not arrived yet are rejected, which costs nothing: a pass is due
    anyway.
    """
    positions, inside = jnp.arange(draft.tokens.shape[1]), draft.inside
    found, place = _nearest(draft, expected, token, reach=_REACH)
    starts = spelling.starts_word[draft.tokens] & inside
    next_word = jnp.where(starts & (positions > expected[:, None]), positions, draft.lengths[:, None]).min(axis=1)
    # The decoder's word is longer than the draft's: still to come is the word that was expected.
    longer = (expected < draft.lengths) & draft.at(starts, expected) & ~spelling.starts_word[token]
    # Otherwise by the number of bytes written: `offsets` are where each draft token begins.
    widths = jnp.where(inside, spelling.lengths[draft.tokens], 0)
    offsets = jnp.cumsum(widths, axis=1) - widths
    written = draft.at(offsets, expected) + spelling.lengths[token]
    same = inside & (positions > expected[:, None]) & (offsets == written[:, None])
    same_place = jnp.where(same, positions, draft.lengths[:, None]).min(axis=1)
    lost = jnp.where(longer, expected, jnp.minimum(same_place, next_word))
    return jnp.where(found, place + 1, lost)


REALIGN: Mapping[str, Realign] = {"none": give_up, "nearest": nearest_token, "words": words}
"""The rules by name; benchmarks/speculation.py compares them."""


def _nearest(draft: Draft, expected: Lengths, token: Lengths, reach: int) -> tuple[Bool[Array, "b"], Lengths]:
    """Whether the token occurs within `reach` of the expected position, and the nearest place; of two, the later."""
    positions = jnp.arange(draft.tokens.shape[1])
    offset = positions - expected[:, None]
    matches = draft.inside & (draft.tokens == token[:, None]) & (jnp.abs(offset) <= reach)
    rank = jnp.where(matches, 2 * jnp.abs(offset) + (offset < 0), jnp.iinfo(jnp.int32).max)
    return matches.any(axis=1), jnp.argmin(rank, axis=1).astype(jnp.int32)
