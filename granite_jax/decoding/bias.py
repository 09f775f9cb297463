"""Biases, which add to logits before a token is picked: the protocol that the decode loop uses, and no bias at all.

A bias is a pytree. It remembers what has been written in states, a pytree of its own: the loop carries one state for
each row along, and restores an earlier one where a proposal is rejected. `keywords.bias` biases decoding with keywords.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree, Shaped

from granite_jax.array_types import Lengths, Logits, Tokens

States = PyTree[Shaped[Array, "b ..."]]
"""A state for each row: arrays `[b, ...]`; for each position of a row, too: `[b, p, ...]`."""


@runtime_checkable
class LogitBias(Protocol):
    """Adds to logits what depends on the tokens before them.

    Fields:
      starts: the state of each row before its first token, leaves `[b, ...]`.
    """

    @property
    def starts(self) -> States: ...

    def add(self, logits: Logits, states: States) -> Logits:
        """The biased logits at every position, for choices that need all of them.

        Args:
          logits: float32 `[b, p, v]`; those of minus infinity stay.
          states: those before each position, leaves `[b, p, ...]`.
        """
        ...

    def best(self, logits: Logits, states: States, unbiased: Tokens) -> Tokens:
        """The best token at every position after `add`, the smallest id among equals: int32 `[b, p]`.

        A bias that adds to few logits finds it without another array over the vocabulary, which `add` returns. With
        keywords, 64 rows and windows of 4 proposals, such an array takes 0.24 GiB more at the peak of the decode loop,
        as the compiler for TPU v5e reports, and is copied once for every chunk of edges.

        Args:
          unbiased: the best tokens of `logits`, to be returned where nothing is added.
        """
        ...

    def advance(self, states: States, tokens: Lengths) -> States:
        """The states after one more token of each row, which may be end-of-text."""
        ...

    def walk(self, states: States, tokens: Tokens, count: Int[Array, ""]) -> tuple[States, Float[Array, "b p"]]:
        """Advances over the first `count` of `tokens` `[b, p]`.

        Returns:
          The states before and after each token, leaves `[b, p + 1, ...]`, and what is added to the logits of these
          tokens, float32 `[b, p]`, in nats. Both are arbitrary after `count`.
        """
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoBias:
    """Adds nothing, and has no state; see `LogitBias`."""

    @property
    def starts(self) -> tuple[()]:
        """See `LogitBias`."""
        return ()

    def add(self, logits: Logits, states: States) -> Logits:
        """See `LogitBias`."""
        return logits

    def best(self, logits: Logits, states: States, unbiased: Tokens) -> Tokens:
        """See `LogitBias`."""
        return unbiased

    def advance(self, states: States, tokens: Lengths) -> States:
        """See `LogitBias`."""
        return states

    def walk(self, states: States, tokens: Tokens, count: Int[Array, ""]) -> tuple[States, Float[Array, "b p"]]:
        """See `LogitBias`."""
        return states, jnp.zeros_like(tokens, jnp.float32)
