"""Choices, which pick tokens from logits: the protocol that the decode loop uses, and the greedy choice."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from granite_jax.array_types import Logits, Tokens
from granite_jax.decoding.bias import LogitBias, States


class Selection(NamedTuple):
    """The picked token at every position, and its likelihood.

    Fields:
      tokens: int32 `[b, p]`.
      log_probs: float32 `[b, p]`, see `Choice.log_probs`.
    """

    tokens: Tokens
    log_probs: Float[Array, "b p"]


@runtime_checkable
class Choice(Protocol):
    """Picks a token from logits and a bias. A pytree.

    Fields:
      end_of_text: id that ends a row.
    """

    @property
    def end_of_text(self) -> int: ...

    def pick(self, logits: Logits, bias: LogitBias, states: States, positions: Tokens) -> Selection:
        """Picks a token at every position.

        A token depends on nothing but its row's logits, states and position, and what the choice has for this row: for
        sampling, a key that is folded with the position. So other rows of a batch, and positions that are verified
        again, change no token.

        Args:
          states: those of the bias before each position, leaves `[b, p, ...]`.
          positions: int32 `[b, p]`, the number of tokens that the row has before each.
        """
        ...

    def log_probs(self, logits: Logits, tokens: Tokens) -> Float[Array, "b p"]:
        """Log-probabilities of a token at every position, in nats, in the decoder's own distribution.

        That is the one without any bias, and without tokens that are never picked.
        """
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Greedy:
    """Picks the most likely token after the bias; see `Choice`.

    End-of-text is picked where it is the most likely token before the bias, and only there: a bias neither suppresses
    an end nor causes one.

    Fields:
      suppress_tokens: ids that are never picked.
    """

    end_of_text: int = dataclasses.field(metadata={"static": True})
    suppress_tokens: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

    def pick(self, logits: Logits, bias: LogitBias, states: States, positions: Tokens) -> Selection:
        """See `Choice`."""
        allowed = _suppress(logits, self.suppress_tokens)
        unbiased = jnp.argmax(allowed, axis=-1).astype(jnp.int32)
        biased = bias.best(_suppress(allowed, (self.end_of_text,)), states, unbiased)
        tokens = jnp.where(unbiased == self.end_of_text, unbiased, biased)
        return Selection(tokens, self.log_probs(logits, tokens))

    def log_probs(self, logits: Logits, tokens: Tokens) -> Float[Array, "b p"]:
        """See `Choice`."""
        logits = _suppress(logits, self.suppress_tokens)
        scores = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        return scores - jax.nn.logsumexp(logits, axis=-1)


def _suppress(logits: Logits, tokens: Sequence[int]) -> Logits:
    """Sets the logits of `tokens` to minus infinity."""
    suppressed = jnp.isin(jnp.arange(logits.shape[-1], dtype=jnp.int32), jnp.array(tokens, jnp.int32))
    return jnp.where(suppressed, -jnp.inf, logits)
