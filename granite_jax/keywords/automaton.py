"""Keyword biasing: Aho-Corasick automata over token ids, built on the host, read by gathers inside the decode loop.

A keyword of boost w, in nats, boosts the logits of the tokens that continue it: the first by a share of w, the last by
w, and those between by linear interpolation. A keyword can require a context: tokens before it that get no boost. A
token that continues several keywords, or a keyword and the beginning of another one inside it, gets the largest of
their boosts. A finished keyword boosts nothing, and boosts of an unfinished one are not taken back.

    keywords  " dak f iki", " da v"      states: the root, the beginnings of keywords, and `start`, before the first
                                         token, where keywords can begin without a space
       root --" dak"--> 1 --"f"--> 2 --"iki"--> root
       root --" da"---> 3 --"v"--> root

Leaf states are removed when the automaton is built: an edge into a leaf points to the leaf's failure state. That is why
finishing a keyword leads to the root, or into a keyword whose beginning is the end of the finished one.

The lists of all rows share flat arrays of a fixed size, so that no list causes a compilation; rows with the same list
share its states. The boosts of a root's edges are added from one dense row of the vocabulary's width. The boosts of
other states are added a chunk of edges at a time, in a loop that runs while any row is inside a keyword.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from granite_jax.array_types import Lengths, Tokens

STATES = 1 << 16  # and as many edges: 2,000 keywords of 8 tokens, each written in up to four ways
FIRST = 0.25  # share of the boost on a keyword's first token: measured by benchmarks/keywords.py


class Phrase(NamedTuple):
    """One way to write a keyword.

    Fields:
      tokens: those of the context, then those of the keyword.
      boost: nats (> 0) on its last token.
      anywhere: whether the tokens can begin in mid-text.
      context: number of context tokens, which have no boost.
      first: share of the boost on its first token.
    """

    tokens: tuple[int, ...]
    boost: float
    anywhere: bool = True
    context: int = 0
    first: float = FIRST


class KeywordAutomaton(NamedTuple):
    """The automaton of one list, on the host.

    Fields:
      sources, tokens, targets: int32 `[edges]`, sorted by source, then by token. Sources and targets are states of this
        list, 0 its root.
      boosts: float32 `[edges]`, nats.
      failures: int32 `[states]`, the longest suffix of each state that is a state; the root's is the root.
      start: the state before the first token.
    """

    sources: np.ndarray
    tokens: np.ndarray
    targets: np.ndarray
    boosts: np.ndarray
    failures: np.ndarray
    start: int


class FullError(ValueError):
    """The lists of a batch need more states than there are."""


def build_automaton(phrases: Iterable[Phrase]) -> KeywordAutomaton:
    """The automaton of a list. Phrases without tokens are left out."""
    children: list[dict[int, int]] = [{}, {}]  # the root, and the start
    boosts, depths = [0.0, 0.0], [0, 0]
    for tokens, boost, anywhere, context, first in phrases:
        node = 0 if anywhere else 1
        for position, token in enumerate(tokens, start=-context):
            child = children[node].get(token)
            if child is None:
                child = children[node][token] = len(children)
                children.append({})
                boosts.append(0.0)
                depths.append(depths[node] + 1)
            node = child
            if position >= 0:
                share = first + (1 - first) * position / max(len(tokens) - context - 1, 1)
                boosts[node] = max(boosts[node], boost * share)
    failures = [0] * len(children)
    alive = [bool(edges) for edges in children]
    # Breadth first, the root's subtree before the start's at every depth: a failure is complete when it is needed.
    queue = [0, 1]
    for node in queue:
        for token, child in children[node].items():
            suffix = failures[node]
            while suffix and token not in children[suffix]:
                suffix = failures[suffix]
            # The root's children fail to the root.
            suffix = children[suffix].get(token, 0) if node else 0
            boosts[child] = max(boosts[child], boosts[suffix])
            failures[child] = suffix if not suffix or alive[suffix] else failures[suffix]
            queue.append(child)
    inner = [node for node in queue if alive[node] or not node]
    numbers = dict(zip(inner, range(len(inner)), strict=True))
    resolved = [numbers[node if alive[node] else failures[node]] for node in range(len(children))]
    edges = [
        (numbers[node], token, resolved[child], boosts[child])
        for node in inner
        for token, child in sorted(children[node].items())
    ]
    sources, tokens, targets, edge_boosts = zip(*edges, strict=True) if edges else ((), (), (), ())
    return KeywordAutomaton(
        np.array(sources, np.int32),
        np.array(tokens, np.int32),
        np.array(targets, np.int32),
        np.array(edge_boosts, np.float32),
        np.array([resolved[failures[node]] for node in inner], np.int32),
        resolved[1],
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchedAutomata:
    """The automata of a batch. State 0 is the root of an empty list.

    Fields:
      starts: int32 `[b]`, the state of each row before its first token.
      failures: int32 `[states]`; a root's is itself.
      first: int32 `[states + 1]`, where the edges of each state begin.
      tokens, targets: int32 `[edges]`; a state's edges are sorted by token.
      boosts: float32 `[edges]`, nats.
    """

    starts: Lengths
    failures: Int[Array, "states"]
    first: Int[Array, "firsts"]
    tokens: Int[Array, "edges"]
    targets: Int[Array, "edges"]
    boosts: Float[Array, "edges"]

    @property
    def has_keywords(self) -> Bool[Array, ""]:
        """Whether any row has keywords. Without any, all states are 0."""
        return (self.starts > 0).any()

    def advance(self, states: Lengths, tokens: Lengths) -> tuple[Lengths, Float[Array, "b"]]:
        """The states after one more token, and the boosts of these tokens, in nats."""

        def search(carry):
            states, boosts, searching = carry
            edge, failed = self._edge(states, tokens), self.failures[states]
            has_edge = searching & (edge >= 0)
            states = jnp.where(has_edge, self.targets[edge], jnp.where(searching, failed, states))
            boosts = jnp.where(has_edge, self.boosts[edge], boosts)
            # A root, which fails to itself, ends the search.
            return states, boosts, searching & ~has_edge & (failed != carry[0])

        boosts = states.astype(jnp.float32) * 0.0
        return jax.lax.while_loop(lambda carry: carry[2].any(), search, (states, boosts, states > 0))[:2]

    def walk(
        self, states: Lengths, tokens: Tokens, count: Int[Array, ""]
    ) -> tuple[Int[Array, "b n"], Float[Array, "b p"]]:
        """The states before and after the first `count` of `tokens` `[b, p]`: int32 `[b, p + 1]`; and their boosts."""

        def step(i, carry):
            states, path, boosts = carry
            token = jax.lax.dynamic_index_in_dim(tokens, i, axis=1, keepdims=False)
            states, boost = self.advance(states, token)
            path = jax.lax.dynamic_update_slice_in_dim(path, states[:, None], i + 1, axis=1)
            return states, path, jax.lax.dynamic_update_slice_in_dim(boosts, boost[:, None], i, axis=1)

        path = jnp.zeros((1, tokens.shape[1] + 1), jnp.int32) + states[:, None]
        boosts = path[:, 1:].astype(jnp.float32) * 0.0
        if tokens.shape[1] == 0:
            return path, boosts
        # Without keywords there is nothing to walk.
        count = jnp.where((states > 0).any(), count, 0)
        return jax.lax.fori_loop(0, count, step, (states, path, boosts))[1:]

    def _edge(self, states: Lengths, tokens: Lengths) -> Lengths:
        """The edge that a token takes from a state, -1 for none: a binary search, all rows at once."""

        def halve(bounds):
            low, high = bounds
            middle = (low + high) // 2
            below = (low < high) & (self.tokens[middle] < tokens)
            return jnp.where(below, middle + 1, low), jnp.where(below, high, middle)

        end = self.first[states + 1]
        edges, _ = jax.lax.while_loop(lambda bounds: (bounds[0] < bounds[1]).any(), halve, (self.first[states], end))
        return jnp.where((edges < end) & (self.tokens[edges] == tokens), edges, -1)


def batch_automata(automata: Sequence[KeywordAutomaton], rows: Sequence[int], states: int = STATES) -> BatchedAutomata:
    """The automata of a batch as numpy arrays, whose sizes depend on `len(rows)` and `states` alone.

    Args:
      automata: the automata of the lists.
      rows: index of each row's automaton; -1 for none.
      states: capacity for states, and for edges.

    Raises:
      FullError: the lists exceed the capacity.
    """
    num_states = 1 + sum(len(automaton.failures) for automaton in automata)
    num_edges = sum(len(automaton.tokens) for automaton in automata)
    if num_states > states or num_edges > states:
        raise FullError(f"keywords take {max(num_states, num_edges)} states, more than {states}")
    offsets = np.cumsum([1, *(len(automaton.failures) for automaton in automata)])

    def joined(name: str, size: int, dtype: type = np.int32, *, is_state: bool = True, zeros: int = 0) -> np.ndarray:
        arrays = [getattr(a, name) + is_state * offset for a, offset in zip(automata, offsets, strict=False)]
        flat = np.concatenate([np.zeros(zeros), *arrays])
        return np.pad(flat, (0, size - len(flat))).astype(dtype)

    sources = joined("sources", num_edges)
    starts = [0 if row < 0 else int(offsets[row]) + automata[row].start for row in rows]
    fields: dict[str, Any] = {  # numpy arrays, which JAX accepts as its own
        "starts": np.array(starts, np.int32),
        "failures": joined("failures", states, zeros=1),
        "first": np.searchsorted(sources, np.arange(states + 1)).astype(np.int32),
        "tokens": joined("tokens", states, is_state=False),
        "targets": joined("targets", states),
        "boosts": joined("boosts", states, np.float32, is_state=False),
    }
    return BatchedAutomata(**fields)


def no_keywords(batch: int, states: int = STATES) -> BatchedAutomata:
    """The automata of a batch without keywords."""
    return batch_automata([], [-1] * batch, states)
