"""Greedy decoding, with or without drafts: what the prefill found in, tokens out, in `lax.while_loop`s.

The decoder is known only through `step`: (tokens `[b, p]`, cache) -> (logits `[b, p, v]`, cache `p` longer),
with a cache that has `lengths` and `rolled_back(lengths)`.

Self-speculative decoding after Saon et al. 2026 (arXiv 2603.11243), with windows of proposals, re-alignment and keyword
biasing added: at every position the boosts are those of the automaton's state that the tokens before it lead to.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from granite_jax.array_types import Lengths, Logits, Tokens
from granite_jax.decoding.automaton import Automata, Bias, no_keywords
from granite_jax.decoding.draft import Draft, Realign, give_up, nearest_token
from granite_jax.decoding.state import DecodeState

# By a TPU v5e's data sheet (197 TFLOP/s, 819 GB/s) 64 rows of 5 positions take about as long to compute as weights and
# cache take to read. Not measured on one.
WINDOW = 4

Step = Callable[[Int[Array, "b p"], Any], tuple[Logits, Any]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Verified:
    """What a prefill over prompt and draft says about the draft.

    Fields:
      choices: int32 `[b, n + 1]`, what decoding would write after the prompt and after each draft token.
      likelihoods: float32 `[b, n + 1]`, probability of each draft token, and of end-of-text after the last; times the
        exponential of a keyword's boost, and then no more than 1.
      states: int32 `[b, n + 1]`, the keyword automaton's state before each of these.

    Columns past a row's draft length mean nothing.
    """

    choices: Tokens
    likelihoods: Float[Array, "b p"]
    states: Int[Array, "b p"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Proposed:
    """A draft as the prefill verifies it: its tokens and end-of-text after the last, and what biasing makes of them.

    Fields:
      tokens: int32 `[b, n + 1]`.
      boosts: float32 `[b, n + 1]`, nats, of each token.
      states: int32 `[b, n + 1]`, the keyword automaton's state before each token.
    """

    tokens: Tokens
    boosts: Float[Array, "b p"]
    states: Int[Array, "b p"]

    @classmethod
    def of(cls, draft: Draft, automata: Automata, end_of_text: int) -> "Proposed":
        """A draft with the states it leads to."""
        states, boosts = automata.walk(automata.starts, draft.tokens, draft.lengths.max())
        return cls(with_end(draft, end_of_text), jnp.pad(boosts, ((0, 0), (0, 1))), states)


def with_end(draft: Draft, end_of_text: int) -> Tokens:
    """The draft's tokens and end-of-text after the last: int32 `[b, n + 1]`."""
    tokens = jnp.pad(draft.tokens, ((0, 0), (0, 1)))
    return jnp.where(jnp.arange(tokens.shape[1])[None, :] == draft.lengths[:, None], end_of_text, tokens)


def choose(
    logits: Logits, bias: Bias, states: Int[Array, "b p"], *, end_of_text: int, never: Sequence[int] = ()
) -> Tokens:
    """What decoding writes at every position, int32 `[b, p]`: the most likely token after the boosts of keywords.

    Args:
      states: the automaton's state before each position.
      end_of_text: is chosen where it is the most likely token before the boosts, and only there: a boost neither
        suppresses an end nor causes one.
      never: ids that are not chosen.
    """
    logits = _allowed(logits, never)
    unbiased = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    lifted = bias.best(_allowed(logits, (end_of_text,)), states)
    return jnp.where(unbiased == end_of_text, unbiased, lifted)


def verify(logits: Logits, proposed: Proposed, bias: Bias, *, end_of_text: int, never: Sequence[int] = ()) -> Verified:
    """Choices, and likelihoods of what is proposed, at these positions."""
    logits = _allowed(logits, never)
    scores = jnp.take_along_axis(logits, proposed.tokens[..., None], axis=-1)[..., 0]
    likelihoods = jnp.exp(jnp.minimum(scores - jax.nn.logsumexp(logits, axis=-1) + proposed.boosts, 0))
    choices = choose(logits, bias, proposed.states, end_of_text=end_of_text)
    return Verified(choices, likelihoods, proposed.states)


def _allowed(logits: Logits, never: Sequence[int]) -> Logits:
    forbidden = jnp.isin(jnp.arange(logits.shape[-1]), jnp.array(never, jnp.int32))
    return jnp.where(forbidden, -jnp.inf, logits)


def decode(
    step: Step,
    verified: Verified,
    cache: Any,
    draft: Draft,
    limits: Lengths,
    thresholds: Float[Array, "b"],
    bias: Bias,
    *,
    room: int,
    end_of_text: int,
    never: Sequence[int] = (),
    window: int = WINDOW,
    realign: Realign = nearest_token,
) -> DecodeState:
    """Decodes every row until end-of-text or its limit; the loop ends when all rows have.

    While any row has something to propose, an iteration runs the pending token and `window` proposals of each row;
    otherwise the pending token alone, so that greedy decoding (drafts of length 0) pays nothing for the windows.

    Args:
      step: runs the decoder over the next tokens.
      verified: the prefill's findings about the draft.
      cache: the cache after the prompt, with room for `max(limits) + window` more positions. The draft's keys and
        values are in the slots after the prompt.
      limits: int32, tokens each row may generate; 0 for rows that only fill up the batch.
      thresholds: float32, the likelihood that each token of a row's draft must exceed in the prefill to be accepted
        (relaxed verification); infinite for rows that accept only what greedy decoding would write. Windows always do
        the latter.
      bias: the keywords of every row.
      room: width of the result, at least every limit.
      end_of_text: id that ends a row.
      never: ids that are never produced.
      window: proposals of one iteration, K.
      realign: where to go on in the draft.

    Returns:
      The final state. Its cache is the given one, updated in place if the caller donates it.
    """

    def accept(state: DecodeState, chosen: Tokens, agreed: Lengths, states: Int[Array, "b p"]) -> DecodeState:
        """`states` are the automaton's before each of `chosen`, of which the last one taken was not proposed."""
        before, last = (jnp.take_along_axis(x, agreed[:, None], axis=1)[:, 0] for x in (states, chosen))
        passes = state.passes + (~state.finished).astype(jnp.int32)
        state = dataclasses.replace(state, passes=passes).accept(chosen, agreed, end_of_text)
        return dataclasses.replace(
            state,
            cursor=realign(draft, state.cursor, state.pending),
            # Right as long as the row goes on, which is when all of the tokens agreed on and the last one were taken.
            matched=bias.automata.advance(before, last)[0],
        )

    def iterate(width: int, state: DecodeState) -> DecodeState:
        proposals = draft.window(state.cursor, width)
        states, _ = bias.automata.walk(state.matched, proposals, jnp.int32(width))
        logits, cache = step(jnp.concatenate([state.pending[:, None], proposals], axis=1), state.cache)
        choices = choose(logits, bias, states, end_of_text=end_of_text, never=never)
        agrees = (proposals == choices[:, :-1]) & (jnp.arange(width)[None, :] < state.proposable[:, None])
        # Rolled back at once: rows that are done stay where they are and never run past the capacity.
        cache = cache.rolled_back(state.cache.lengths)
        return accept(dataclasses.replace(state, cache=cache), choices, _leading(agrees), states)

    def decode_until_alignment_changes(state: DecodeState) -> DecodeState:
        if window > 0:
            state = jax.lax.while_loop(lambda s: s.any_proposal, functools.partial(iterate, window), state)
        return jax.lax.while_loop(lambda s: ~s.all_finished & ~s.any_proposal, functools.partial(iterate, 0), state)

    chosen, agreed = _judge(verified, draft, thresholds, end_of_text)
    # Derived from an input, so that under shard_map every part of the carry varies with it.
    zeros = jnp.zeros_like(limits)
    start = DecodeState(
        tokens=jnp.zeros((len(limits), room), jnp.int32) + zeros[:, None],
        sources=jnp.full((len(limits), room), -1, jnp.int32) + zeros[:, None],
        counts=zeros,
        limits=limits,
        pending=zeros,
        ended=zeros > 0,
        passes=zeros,
        draft=draft,
        cursor=zeros,
        accepted=zeros,
        matched=zeros,
        cache=cache.rolled_back(cache.lengths - 1),  # as if the last prompt token were pending
    )
    start = dataclasses.replace(accept(start, chosen, agreed, verified.states), passes=zeros + 1)
    return jax.lax.while_loop(lambda s: ~s.all_finished, decode_until_alignment_changes, start)


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
    """`decode` without drafts and keywords, from the logits of the last prompt position."""
    none = jnp.zeros_like(limits)
    draft, thresholds = Draft(none[:, None], none), jnp.where(none == 0, jnp.inf, 0.0)
    automata = jax.tree.map(jnp.asarray, no_keywords(len(limits), states=1))
    bias = Bias.of(dataclasses.replace(automata, starts=none), logits.shape[-1])
    proposed = jax.tree.map(lambda x: x[:, :1], Proposed.of(draft, bias.automata, end_of_text))
    verified = verify(logits, proposed, bias, end_of_text=end_of_text, never=never)
    verified = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 1))), verified)
    return decode(
        step, verified, cache, draft, limits, thresholds, bias,
        room=room, end_of_text=end_of_text, never=never, window=0, realign=give_up,
    )  # fmt: skip


def _judge(verified: Verified, draft: Draft, thresholds: Float[Array, "b"], end_of_text: int) -> tuple[Tokens, Lengths]:
    """Tokens after every position of the prefill, and how many of them, from the first, are accepted draft tokens.

    In relaxed rows end-of-text is judged like the draft's tokens, as its last.
    """
    proposed = with_end(draft, end_of_text)
    relaxed = jnp.isfinite(thresholds)[:, None]
    passes = jnp.where(relaxed, verified.likelihoods > thresholds[:, None], proposed == verified.choices)
    passes &= jnp.arange(proposed.shape[1])[None, :] <= draft.lengths[:, None]
    agreed = _leading(passes)
    chosen = jnp.where(jnp.arange(proposed.shape[1])[None, :] < agreed[:, None], proposed, verified.choices)
    return chosen, jnp.minimum(agreed, draft.lengths)


def _leading(flags: Bool[Array, "b p"]) -> Lengths:
    """How many flags of each row are true before the first that is not, int32."""
    return jnp.cumprod(flags.astype(jnp.int32), axis=1).sum(axis=1).astype(jnp.int32)
