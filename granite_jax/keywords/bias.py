"""The bias of keywords: boosts for the tokens that continue one."""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from granite_jax.array_types import Lengths, Logits, Tokens
from granite_jax.keywords.automaton import BatchedAutomata

_CHUNK = 64  # edges of a state that are read together

T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeywordBias:
    """Adds the boosts of keywords; see `decoding.LogitBias`. A state is one int32, a state of the automata.

    A batch in which no row has keywords skips all of this at run time, in the same compiled program: its states are all
    0, and the automata are not read.

    Fields:
      automata: the automata of the batch.
      root_boosts: float32 `[b, v]`, the boosts of the edges of each row's root, in nats.
    """

    automata: BatchedAutomata
    root_boosts: Float[Array, "b v"]

    @classmethod
    def from_automata(cls, automata: BatchedAutomata, vocabulary: int) -> "KeywordBias":
        """Spreads the roots' boosts over the vocabulary."""
        roots = automata.failures[automata.starts]  # a start fails to its root, a root to itself
        begin, end = automata.first[roots], automata.first[roots + 1]
        # Derived from an input, so that under shard_map the carry varies with it.
        zeros = jnp.zeros((1, vocabulary), jnp.float32) + automata.starts[:, None].astype(jnp.float32) * 0.0
        row = jnp.arange(len(roots), dtype=jnp.int32)[:, None]

        def add(carry):
            start, boosts = carry
            tokens, edge_boosts = _edges(automata, start, end)
            return start + _CHUNK, boosts.at[row, tokens].max(edge_boosts)

        def spread() -> Float[Array, "b v"]:
            return jax.lax.while_loop(lambda carry: (carry[0] < end).any(), add, (begin, zeros))[1]

        boosts = jax.lax.cond(automata.has_keywords, spread, lambda: zeros)
        return cls(automata, boosts)

    @property
    def starts(self) -> Lengths:
        """See `LogitBias`."""
        return self.automata.starts

    def add(self, logits: Logits, states: Int[Array, "b p"]) -> Logits:
        """See `LogitBias`."""
        row, column = (jax.lax.broadcasted_iota(jnp.int32, (*states.shape, 1), axis) for axis in (0, 1))

        def visit(biased: Logits, tokens: jax.Array, scores: jax.Array) -> Logits:
            return biased.at[row, column, tokens].max(scores)

        def biased() -> Logits:
            return self._visit_edges(visit, logits + self.root_boosts[:, None], logits, states)

        return jax.lax.cond(self.automata.has_keywords, biased, lambda: logits)

    def best(self, logits: Logits, states: Int[Array, "b p"], unbiased: Tokens) -> Tokens:
        """See `LogitBias`."""

        def visit(best: tuple[jax.Array, Tokens], tokens: jax.Array, scores: jax.Array) -> tuple[jax.Array, Tokens]:
            score, token = best
            highest = scores.max(axis=2)
            candidate = jnp.where(scores == highest[..., None], tokens, logits.shape[2]).min(axis=2)
            wins = (highest > score) | ((highest == score) & (candidate < token))
            return jnp.where(wins, highest, score), jnp.where(wins, candidate, token)

        def biased() -> Tokens:
            boosted = logits + self.root_boosts[:, None]
            best = boosted.max(axis=2), jnp.argmax(boosted, axis=2).astype(jnp.int32)
            return self._visit_edges(visit, best, logits, states)[1]

        return jax.lax.cond(self.automata.has_keywords, biased, lambda: unbiased)

    def advance(self, states: Lengths, tokens: Lengths) -> Lengths:
        """See `LogitBias`."""
        return self.automata.advance(states, tokens)[0]

    def walk(
        self, states: Lengths, tokens: Tokens, count: Int[Array, ""]
    ) -> tuple[Int[Array, "b n"], Float[Array, "b p"]]:
        """See `LogitBias`."""
        return self.automata.walk(states, tokens, count)

    def _visit_edges(
        self, visit: Callable[[T, jax.Array, jax.Array], T], carry: T, logits: Logits, states: Int[Array, "b p"]
    ) -> T:
        """Visits the edges of every position's state and of its failure states, the root aside, a chunk at a time.

        Args:
          visit: (carry, tokens, boosted logits of these tokens) -> carry. Arrays are `[b, p, _CHUNK]`; boosted logits
            are minus infinity where there is no edge.
        """
        automata = self.automata

        def read(loop):
            states, start, carry = loop
            end = automata.first[states + 1]
            tokens, boosts = _edges(automata, start, end)
            is_edge = (boosts > 0) & (automata.failures[states] != states)[..., None]
            scores = jnp.where(is_edge, jnp.take_along_axis(logits, tokens, axis=2) + boosts, -jnp.inf)
            more = start + _CHUNK < end
            states = jnp.where(more, states, automata.failures[states])
            return states, jnp.where(more, start + _CHUNK, automata.first[states]), visit(carry, tokens, scores)

        start = states, automata.first[states], carry
        return jax.lax.while_loop(lambda loop: (automata.failures[loop[0]] != loop[0]).any(), read, start)[2]


def _edges(automata: BatchedAutomata, start: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens and boosts of the next edges from `start` on; boosts from `end` on are 0."""
    edges = start[..., None] + jax.lax.broadcasted_iota(jnp.int32, (*start.shape, _CHUNK), start.ndim)
    inside = edges < end[..., None]
    edges = jnp.where(inside, edges, 0)
    return automata.tokens[edges], jnp.where(inside, automata.boosts[edges], 0.0)
