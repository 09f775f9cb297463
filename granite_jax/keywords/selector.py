"""The keyword-biased selector: greedy decoding with boosts for the tokens that continue a keyword."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from granite_jax.array_types import Lengths, Logits, Tokens
from granite_jax.decoding.select import Selection, log_probs, suppress
from granite_jax.keywords.automaton import BatchedAutomata

_CHUNK = 64  # edges of a state that are read together


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeywordSelector:
    """Selects the most likely token after the boosts of keywords; see `decoding.select.Selector`.

    End-of-text is written where it is the most likely token before the boosts, and only there: a boost neither
    suppresses an end nor causes one.

    Fields:
      automata: the automata of the batch.
      root_boosts: float32 `[b, v]`, the boosts of the edges of each row's root, in nats.
    """

    automata: BatchedAutomata
    root_boosts: Float[Array, "b v"]
    end_of_text: int = dataclasses.field(metadata={"static": True})
    suppress_tokens: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

    @classmethod
    def from_automata(
        cls, automata: BatchedAutomata, vocabulary: int, end_of_text: int, suppress_tokens: tuple[int, ...] = ()
    ) -> "KeywordSelector":
        """Spreads the roots' boosts over the vocabulary."""
        roots = automata.failures[automata.starts]  # a start fails to its root, a root to itself

        def add(carry):
            start, boosts = carry
            tokens, edge_boosts = _edges(automata, start, automata.first[roots + 1])
            return start + _CHUNK, boosts.at[jnp.arange(len(roots), dtype=jnp.int32)[:, None], tokens].max(edge_boosts)

        begin, end = automata.first[roots], automata.first[roots + 1]
        boosts = jnp.zeros((1, vocabulary), jnp.float32) + begin[:, None].astype(jnp.float32) * 0.0
        boosts = jax.lax.while_loop(lambda carry: (carry[0] < end).any(), add, (begin, boosts))[1]
        return cls(automata, boosts, end_of_text, suppress_tokens)

    @property
    def starts(self) -> Lengths:
        """See `Selector`."""
        return self.automata.starts

    def select(self, logits: Logits, states: Int[Array, "b p"]) -> Selection:
        """See `Selector`."""
        logits = suppress(logits, self.suppress_tokens)
        unbiased = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        boosted = self.best(suppress(logits, (self.end_of_text,)), states)
        tokens = jnp.where(unbiased == self.end_of_text, unbiased, boosted)
        return Selection(tokens, log_probs(logits, tokens))

    def advance(self, states: Lengths, tokens: Lengths) -> Lengths:
        """See `Selector`."""
        return self.automata.advance(states, tokens)[0]

    def walk(
        self, states: Lengths, tokens: Tokens, count: Int[Array, ""]
    ) -> tuple[Int[Array, "b n"], Float[Array, "b p"]]:
        """See `Selector`."""
        return self.automata.walk(states, tokens, count)

    def best(self, logits: Logits, states: Int[Array, "b p"]) -> Tokens:
        """The best token at every position, after the boosts of the state before it; the smallest id among equals."""
        automata = self.automata
        boosted = logits + self.root_boosts[:, None]

        def read_edges(carry):
            """Reads the next edges of every position's state, and after its last those of its failure state."""
            states, start, score, token = carry
            end = automata.first[states + 1]
            tokens, boosts = _edges(automata, start, end)
            scores = jnp.take_along_axis(logits, tokens, axis=2) + boosts
            scores = jnp.where(boosts > 0, scores, -jnp.inf)
            best = scores.max(axis=2)
            candidate = jnp.where(scores == best[..., None], tokens, logits.shape[2]).min(axis=2)
            wins = (best > score) | ((best == score) & (candidate < token))
            wins &= automata.failures[states] != states
            more = start + _CHUNK < end
            states = jnp.where(more, states, automata.failures[states])
            start = jnp.where(more, start + _CHUNK, automata.first[states])
            return states, start, jnp.where(wins, best, score), jnp.where(wins, candidate, token)

        carry = (states, automata.first[states], boosted.max(axis=2), jnp.argmax(boosted, axis=2).astype(jnp.int32))
        return jax.lax.while_loop(lambda c: (automata.failures[c[0]] != c[0]).any(), read_edges, carry)[3]


def _edges(automata: BatchedAutomata, start: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens and boosts of the next edges from `start` on; boosts from `end` on are 0."""
    edges = start[..., None] + jax.lax.broadcasted_iota(jnp.int32, (*start.shape, _CHUNK), start.ndim)
    inside = edges < end[..., None]
    edges = jnp.where(inside, edges, 0)
    return automata.tokens[edges], jnp.where(inside, automata.boosts[edges], 0.0)
