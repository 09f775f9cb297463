"""Selection of tokens: the protocol that the decode loop uses, and greedy selection.

A selector is a pytree that selects the next token of every row. It can remember what has been written, in one int32 per
row: the loop carries these states along, and restores earlier ones where a proposal is rejected. The loop does not know
what they mean; `keywords.selector` biases decoding with them.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from granite_jax.array_types import Lengths, Logits, Tokens


class Selection(NamedTuple):
    """The selected token at every position, and its likelihood.

    Fields:
      tokens: int32 `[b, p]`.
      log_probs: float32 `[b, p]`, of these tokens in the decoder's own distribution, in nats: without any boost, and
        without suppressed tokens.
    """

    tokens: Tokens
    log_probs: Float[Array, "b p"]


@runtime_checkable
class Selector(Protocol):
    """How tokens follow from logits.

    Fields:
      starts: int32 `[b]`, the state of each row before its first token.
      end_of_text: id that ends a row.
      suppress_tokens: ids that are never written.
    """

    @property
    def starts(self) -> Lengths: ...

    @property
    def end_of_text(self) -> int: ...

    @property
    def suppress_tokens(self) -> tuple[int, ...]: ...

    def select(self, logits: Logits, states: Int[Array, "b p"]) -> Selection:
        """Selects a token at every position; `states` are those before it."""
        ...

    def advance(self, states: Lengths, tokens: Lengths) -> Lengths:
        """The states after one more token, which may be end-of-text."""
        ...

    def walk(
        self, states: Lengths, tokens: Tokens, count: Int[Array, ""]
    ) -> tuple[Int[Array, "b n"], Float[Array, "b p"]]:
        """The states before and after the first `count` of `tokens` `[b, p]`, and the boosts of these, in nats."""
        ...


def suppress(logits: Logits, tokens: Sequence[int]) -> Logits:
    """Sets the logits of `tokens` to minus infinity."""
    suppressed = jnp.isin(jnp.arange(logits.shape[-1], dtype=jnp.int32), jnp.array(tokens, jnp.int32))
    return jnp.where(suppressed, -jnp.inf, logits)


def log_probs(logits: Logits, tokens: Tokens) -> Float[Array, "b p"]:
    """Log-probability of one token at every position, float32 `[b, p]`, in nats."""
    scores = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return scores - jax.nn.logsumexp(logits, axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GreedySelector:
    """The most likely token at every position. Its states are all 0."""

    starts: Lengths
    end_of_text: int = dataclasses.field(metadata={"static": True})
    suppress_tokens: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

    def select(self, logits: Logits, states: Int[Array, "b p"]) -> Selection:
        """See `Selector`."""
        logits = suppress(logits, self.suppress_tokens)
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return Selection(tokens, log_probs(logits, tokens))

    def advance(self, states: Lengths, tokens: Lengths) -> Lengths:
        """See `Selector`."""
        return states

    def walk(
        self, states: Lengths, tokens: Tokens, count: Int[Array, ""]
    ) -> tuple[Int[Array, "b n"], Float[Array, "b p"]]:
        """See `Selector`."""
        path = jnp.zeros((1, tokens.shape[1] + 1), jnp.int32) + states[:, None]
        return path, path[:, 1:].astype(jnp.float32) * 0.0
