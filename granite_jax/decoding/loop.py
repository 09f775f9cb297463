"""Greedy decoding: prefill's logits in, tokens out, one `lax.while_loop`.

The decoder is known only through `step`: (tokens `[b, p]`, cache) -> (logits `[b, p, v]`, cache `p` longer),
with a cache that has `lengths` and `rolled_back(lengths)`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from granite_jax.array_types import Lengths, Logits
from granite_jax.decoding.state import DecodeState

Step = Callable[[Int[Array, "b p"], Any], tuple[Logits, Any]]


def greedy_decode(
    step: Step,
    logits: Float[Array, "b 1 v"],
    cache: Any,
    limits: Lengths,
    *,
    room: int,
    end_of_text: int,
    never: Sequence[int] = (),
) -> DecodeState:
    """Decodes every row until end-of-text or its limit; the loop ends when all rows have.

    Args:
      step: runs the decoder over the next tokens.
      logits: those of the last prompt position.
      cache: the cache after the prompt, with room for `max(limits)` more positions.
      limits: int32, tokens each row may generate; 0 for rows that only fill up the batch.
      room: width of the result, at least every limit.
      end_of_text: id that ends a row.
      never: ids that are never produced.

    Returns:
      The final state. Its cache is the given one, updated in place if the caller donates it.
    """

    def choose(logits: Float[Array, "b 1 v"]) -> Int[Array, "b"]:
        forbidden = jnp.isin(jnp.arange(logits.shape[-1]), jnp.array(never, jnp.int32))
        return jnp.argmax(jnp.where(forbidden, -jnp.inf, logits[:, -1]), axis=-1).astype(jnp.int32)

    def iterate(state: DecodeState) -> DecodeState:
        logits, cache = step(state.pending, state.cache)
        # Rows that are done stay where they were, so that their slots never run past the capacity.
        cache = cache.rolled_back(jnp.where(state.finished, state.cache.lengths, cache.lengths))
        state = dataclasses.replace(state, cache=cache, passes=state.passes + ~state.finished)
        return state.accept(choose(logits), end_of_text)

    # Derived from an input, so that under shard_map every part of the carry varies with it.
    zeros = jnp.zeros_like(limits)
    start = DecodeState(
        tokens=jnp.zeros((len(limits), room), jnp.int32) + zeros[:, None],
        counts=zeros,
        limits=limits,
        pending=zeros[:, None],
        ended=zeros > 0,
        passes=zeros + 1,
        cache=cache,
    ).accept(choose(logits), end_of_text)
    return jax.lax.while_loop(lambda state: ~state.all_finished, iterate, start)
