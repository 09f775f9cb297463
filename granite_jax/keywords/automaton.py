"""Keyword biasing: Aho-Corasick automata over token ids, built on the host, read by gathers inside the decode loop.

A keyword of boost w, in nats, boosts the logits of the tokens that continue it: the first by a share of w, the last by
w, and those between by values on the line between these. A keyword may be bound to a context: tokens before it that get
no boost. A token that continues several keywords, or a keyword and the beginning of another one inside it, gets the
largest of their boosts. A finished keyword boosts nothing, and boosts of an unfinished one are not taken back.

    keywords  " dak f iki", " da v"      states: the root, what has been written of a keyword, and `start`, the place
                                         before the first token, where keywords may begin without a space
       root --" dak"--> 1 --"f"--> 2 --"iki"--> root
       root --" da"---> 3 --"v"--> root

Leaf states are removed when the automaton is built: an edge into a leaf points to the leaf's failure state. That is why
finishing a keyword leads to the root, or into a keyword whose beginning is the end of the finished one.

The lists of all rows share flat arrays of one size, so that no list compiles anything; rows with the same list share
its states. The boosts of a root's edges are added from one dense row of the vocabulary's width; those of other states,
of which there may be many or none, a chunk of edges at a time, in a loop that runs while some row is inside a keyword.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from granite_jax.array_types import Lengths, Tokens

STATES = 1 << 16  # and as many edges: 2,000 keywords of 8 tokens, each written in up to four ways
FIRST = 0.25  # of the boost, on a keyword's first token: measured by benchmarks/keywords.py


class Phrase(NamedTuple):
    """One way to write a keyword.

    Fields:
      tokens: what precedes it, then its own.
      boost: nats (> 0), of its last token.
      anywhere: whether the tokens may begin in mid-text.
      context: how many of the tokens precede it: they have no boost.
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
      failures: int32 `[states]`, of each state the longest suffix that is a state; the root's is the root.
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
        for place, token in enumerate(tokens, start=-context):
            child = children[node].get(token)
            if child is None:
                child = children[node][token] = len(children)
                children.append({})
                boosts.append(0.0)
                depths.append(depths[node] + 1)
            node = child
            if place >= 0:
                share = first + (1 - first) * place / max(len(tokens) - context - 1, 1)
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
            # Of the root's own children the failure is the root itself.
            suffix = children[suffix].get(token, 0) if node else 0
            boosts[child] = max(boosts[child], boosts[suffix])
            failures[child] = suffix if not suffix or alive[suffix] else failures[suffix]
            queue.append(child)
    kept = [node for node in queue if alive[node] or not node]
    number = dict(zip(kept, range(len(kept)), strict=True))
    resolved = [number[node if alive[node] else failures[node]] for node in range(len(children))]
    edges = [
        (number[node], token, resolved[child], boosts[child])
        for node in kept
        for token, child in sorted(children[node].items())
    ]
    sources, tokens, targets, edge_boosts = zip(*edges, strict=True) if edges else ((), (), (), ())
    return KeywordAutomaton(
        np.array(sources, np.int32),
        np.array(tokens, np.int32),
        np.array(targets, np.int32),
        np.array(edge_boosts, np.float32),
        np.array([resolved[failures[node]] for node in kept], np.int32),
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

    def advance(self, states: Lengths, tokens: Lengths) -> tuple[Lengths, Float[Array, "b"]]:
        """The states after one more token, and the boosts that these tokens had, in nats."""

        def search(carry):
            states, boosts, searching = carry
            edge, failed = self._edge(states, tokens), self.failures[states]
            found = searching & (edge >= 0)
            states = jnp.where(found, self.targets[edge], jnp.where(searching, failed, states))
            boosts = jnp.where(found, self.boosts[edge], boosts)
            # A root that fails to itself has been searched.
            return states, boosts, searching & ~found & (failed != carry[0])

        boosts = states.astype(jnp.float32) * 0.0
        return jax.lax.while_loop(lambda carry: carry[2].any(), search, (states, boosts, states > 0))[:2]

    def walk(
        self, states: Lengths, tokens: Tokens, count: Int[Array, ""]
    ) -> tuple[Int[Array, "b n"], Float[Array, "b p"]]:
        """The states before and after the first `count` of `tokens` `[b, p]`: int32 `[b, p + 1]`; and their boosts."""

        def step(i, carry):
            states, found, boosts = carry
            token = jax.lax.dynamic_index_in_dim(tokens, i, axis=1, keepdims=False)
            states, boost = self.advance(states, token)
            found = jax.lax.dynamic_update_slice_in_dim(found, states[:, None], i + 1, axis=1)
            return states, found, jax.lax.dynamic_update_slice_in_dim(boosts, boost[:, None], i, axis=1)

        found = jnp.zeros((1, tokens.shape[1] + 1), jnp.int32) + states[:, None]
        boosts = found[:, 1:].astype(jnp.float32) * 0.0
        if tokens.shape[1] == 0:
            return found, boosts
        # Without keywords there is nothing to walk.
        count = jnp.where((states > 0).any(), count, 0)
        return jax.lax.fori_loop(0, count, step, (states, found, boosts))[1:]

    def _edge(self, states: Lengths, tokens: Lengths) -> Lengths:
        """The edge of a state that a token takes, -1 for none: a binary search, all rows at once."""

        def halve(bounds):
            low, high = bounds
            middle = (low + high) // 2
            below = (low < high) & (self.tokens[middle] < tokens)
            return jnp.where(below, middle + 1, low), jnp.where(below, high, middle)

        end = self.first[states + 1]
        edges, _ = jax.lax.while_loop(lambda bounds: (bounds[0] < bounds[1]).any(), halve, (self.first[states], end))
        return jnp.where((edges < end) & (self.tokens[edges] == tokens), edges, -1)


def batch_automata(tries: Sequence[KeywordAutomaton], rows: Sequence[int], states: int = STATES) -> BatchedAutomata:
    """The automata of a batch as numpy arrays, of sizes that depend on `len(rows)` and `states` alone.

    Args:
      tries: the lists' automata.
      rows: which of them each row has; -1 for none.
      states: room for states, and for edges.

    Raises:
      FullError: the lists need more room.
    """
    used = 1 + sum(len(trie.failures) for trie in tries)
    edges = sum(len(trie.tokens) for trie in tries)
    if used > states or edges > states:
        raise FullError(f"keywords take {max(used, edges)} states, more than {states}")
    offsets = np.cumsum([1, *(len(trie.failures) for trie in tries)])

    def joined(name: str, room: int, dtype: type = np.int32, *, states_of: bool = True, first: int = 0) -> np.ndarray:
        arrays = [getattr(trie, name) + states_of * at for trie, at in zip(tries, offsets, strict=False)]
        flat = np.concatenate([np.zeros(first), *arrays])
        return np.pad(flat, (0, room - len(flat))).astype(dtype)

    sources = joined("sources", edges)
    starts = [0 if row < 0 else int(offsets[row]) + tries[row].start for row in rows]
    fields: dict[str, Any] = {  # numpy arrays, which jax takes for its own
        "starts": np.array(starts, np.int32),
        "failures": joined("failures", states, first=1),
        "first": np.searchsorted(sources, np.arange(states + 1)).astype(np.int32),
        "tokens": joined("tokens", states, states_of=False),
        "targets": joined("targets", states),
        "boosts": joined("boosts", states, np.float32, states_of=False),
    }
    return BatchedAutomata(**fields)


def no_keywords(batch: int, states: int = STATES) -> BatchedAutomata:
    """The automata of a batch without keywords."""
    return batch_automata([], [-1] * batch, states)
