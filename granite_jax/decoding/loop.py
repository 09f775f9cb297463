"""Decoding with or without drafts, in `lax.while_loop`s: from the prefill's output to tokens.

The loop knows the decoder only through `step`: (tokens `[b, p]`, cache) -> (logits `[b, p, v]`, cache `p` longer),
with a cache that has `lengths` and `rolled_back(lengths)`. A `Choice` picks tokens from logits, to which a `LogitBias`
adds what depends on the tokens before.

Self-speculative decoding after Saon et al. 2026 (arXiv 2603.11243), extended by windows of proposals, re-alignment and
bias states: the selection at every position uses the state that the tokens before it lead to.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from granite_jax.array_types import Lengths, Logits, Tokens
from granite_jax.decoding.bias import LogitBias, NoBias, States
from granite_jax.decoding.choice import Choice, Greedy, Selection
from granite_jax.decoding.draft import Draft, Realign, give_up, nearest_token
from granite_jax.decoding.state import DecodeState

# By a TPU v5e's data sheet (197 TFLOP/s, 819 GB/s) 64 rows of 5 positions take about as long to compute as weights and
# cache take to read. Not measured on one.
WINDOW = 4

Step = Callable[[Int[Array, "b p"], Any], tuple[Logits, Any]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VerifierOutput:
    """What a prefill over prompt and draft says about the draft.

    Fields:
      tokens: int32 `[b, n + 1]`, what decoding would write after the prompt and after each draft token.
      log_probs: float32 `[b, n + 1]`, of these tokens, in nats.
      draft_log_probs: float32 `[b, n + 1]`, of each draft token, and of end-of-text after the last.
      draft_boosts: float32 `[b, n + 1]`, the bias's boosts of these, in nats.
      bias_states: the bias's states before each of these, leaves `[b, n + 1, ...]`.

    Columns past a row's draft length mean nothing.
    """

    tokens: Tokens
    log_probs: Float[Array, "b p"]
    draft_log_probs: Float[Array, "b p"]
    draft_boosts: Float[Array, "b p"]
    bias_states: States


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DraftProposal:
    """A draft as the prefill verifies it: its tokens, end-of-text after the last, and a bias's boosts and states.

    Fields:
      tokens: int32 `[b, n + 1]`.
      positions: int32 `[b, n + 1]`, 0, 1, and so on.
      boosts: float32 `[b, n + 1]`, nats, of each token.
      bias_states: the bias's states before each token, leaves `[b, n + 1, ...]`.
    """

    tokens: Tokens
    positions: Tokens
    boosts: Float[Array, "b p"]
    bias_states: States

    @classmethod
    def from_draft(cls, draft: Draft, bias: LogitBias, end_of_text: int) -> "DraftProposal":
        """The proposal of a draft, with the bias's boosts and states along it."""
        states, boosts = bias.walk(bias.starts, draft.tokens, draft.lengths.max())
        tokens = with_end(draft, end_of_text)
        positions = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1)
        return cls(tokens, positions, jnp.pad(boosts, ((0, 0), (0, 1))), states)


def with_end(draft: Draft, end_of_text: int) -> Tokens:
    """The draft's tokens and end-of-text after the last: int32 `[b, n + 1]`."""
    tokens = jnp.pad(draft.tokens, ((0, 0), (0, 1)))
    return jnp.where(
        jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :] == draft.lengths[:, None], end_of_text, tokens
    )


def verify(logits: Logits, proposal: DraftProposal, bias: LogitBias, choice: Choice) -> VerifierOutput:
    """Picks a token at each of these positions, and scores the proposed ones."""
    states = proposal.bias_states
    selection = choice.pick(logits, bias, states, proposal.positions)
    proposed = choice.log_probs(logits, proposal.tokens)
    return VerifierOutput(selection.tokens, selection.log_probs, proposed, proposal.boosts, states)


def decode(
    step: Step,
    verified: VerifierOutput,
    cache: Any,
    draft: Draft,
    max_new_tokens: Lengths,
    thresholds: Float[Array, "b"],
    bias: LogitBias,
    choice: Choice,
    *,
    max_out_length: int,
    window: int = WINDOW,
    realign: Realign = nearest_token,
) -> DecodeState:
    """Decodes every row until end-of-text or its limit; the loop ends when all rows have.

    While any row has something to propose, an iteration runs the last token and `window` proposals of each row;
    otherwise the last token alone, so that greedy decoding (drafts of length 0) pays nothing for the windows.

    Args:
      step: runs the decoder over the next tokens.
      verified: the prefill's output for the draft.
      cache: the cache after the prompt, with room for `max(max_new_tokens) + window` more positions. The draft's keys
        and values are in the slots after the prompt.
      max_new_tokens: int32, the most tokens that each row generates; 0 for padding rows.
      thresholds: float32, the likelihood that each token of a row's draft must exceed in the prefill to be accepted
        (relaxed verification); infinite for rows that accept only what greedy decoding would write. Windows always
        accept only that.
      bias: what is added to logits.
      choice: picks a token from these.
      max_out_length: width of the result, at least every row's `max_new_tokens`.
      window: proposals of one iteration, K.
      realign: finds where the draft goes on.

    Returns:
      The final state. Its cache is the given one, updated in place if the caller donates it; it is of no further use:
      the slots of rows that finished before others are overwritten.
    """

    def accept(state: DecodeState, selection: Selection, num_accepted: Lengths, states: States) -> DecodeState:
        """Appends `num_accepted` proposals and the token after them; `states` are those before each selected token."""
        before, last = columns((states, selection.tokens), num_accepted)
        passes = state.num_forward_passes + (~state.finished).astype(jnp.int32)
        state = dataclasses.replace(state, num_forward_passes=passes)
        state = state.append(selection, num_accepted, choice.end_of_text)
        return dataclasses.replace(
            state,
            cursor=realign(draft, state.cursor, state.last_token),
            # Correct while the row goes on: then all accepted tokens and the one after them were appended.
            bias_states=bias.advance(before, last),
        )

    def iterate(width: int, state: DecodeState) -> DecodeState:
        proposals = draft.window(state.cursor, width)
        states, _ = bias.walk(state.bias_states, proposals, jnp.int32(width))
        # Finished rows, whose results nobody uses, become empty: the decoder reads the cache up to its longest row.
        cache = state.cache.rolled_back(jnp.where(state.finished, 0, state.cache.lengths))
        logits, cache = step(jnp.concatenate([state.last_token[:, None], proposals], axis=1), cache)
        positions = state.num_tokens[:, None] + jnp.arange(width + 1, dtype=jnp.int32)[None, :]
        selection = choice.pick(logits, bias, states, positions)
        agrees = (proposals == selection.tokens[:, :-1]) & (
            jnp.arange(width, dtype=jnp.int32)[None, :] < state.proposable[:, None]
        )
        # Rolled back at once: finished rows never run past the capacity, and others keep what `append` accepts.
        cache = cache.rolled_back(state.cache.lengths)
        return accept(dataclasses.replace(state, cache=cache), selection, count_leading(agrees), states)

    def decode_until_alignment_changes(state: DecodeState) -> DecodeState:
        if window > 0:
            state = jax.lax.while_loop(lambda s: s.any_proposal, functools.partial(iterate, window), state)
        return jax.lax.while_loop(lambda s: ~s.all_finished & ~s.any_proposal, functools.partial(iterate, 0), state)

    selection, num_accepted = accept_draft(verified, draft, thresholds, choice.end_of_text)
    # Derived from an input, so that under shard_map every part of the carry varies with it.
    zeros = jnp.zeros_like(max_new_tokens)
    start = DecodeState(
        tokens=jnp.zeros((len(zeros), max_out_length), jnp.int32) + zeros[:, None],
        log_probs=jnp.zeros((len(zeros), max_out_length), jnp.float32) + zeros[:, None].astype(jnp.float32),
        draft_positions=jnp.full((len(zeros), max_out_length), -1, jnp.int32) + zeros[:, None],
        num_tokens=zeros,
        max_new_tokens=max_new_tokens,
        last_token=zeros,
        ended=zeros > 0,
        num_forward_passes=zeros,
        draft=draft,
        cursor=zeros,
        num_accepted=zeros,
        bias_states=bias.starts,
        cache=cache.rolled_back(cache.lengths - 1),  # as if the last prompt token were the last one written
    )
    start = accept(start, selection, num_accepted, verified.bias_states)
    start = dataclasses.replace(start, num_forward_passes=zeros + 1)
    return jax.lax.while_loop(lambda s: ~s.all_finished, decode_until_alignment_changes, start)


def greedy_decode(
    step: Step,
    logits: Float[Array, "b 1 v"],
    cache: Any,
    max_new_tokens: Lengths,
    *,
    max_out_length: int,
    end_of_text: int,
    suppress_tokens: Sequence[int] = (),
) -> DecodeState:
    """`decode` without drafts and without a bias, from the logits of the last prompt position."""
    zeros = jnp.zeros_like(max_new_tokens)
    draft, thresholds = Draft(zeros[:, None], zeros), jnp.where(zeros == 0, jnp.float32(jnp.inf), 0.0)
    bias, choice = NoBias(), Greedy(end_of_text, tuple(suppress_tokens))
    proposal = jax.tree.map(lambda x: x[:, :1], DraftProposal.from_draft(draft, bias, end_of_text))
    verified = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 1))), verify(logits, proposal, bias, choice))
    return decode(
        step, verified, cache, draft, max_new_tokens, thresholds, bias, choice,
        max_out_length=max_out_length, window=0, realign=give_up,
    )  # fmt: skip


def accept_draft(
    verified: VerifierOutput, draft: Draft, thresholds: Float[Array, "b"], end_of_text: int
) -> tuple[Selection, Lengths]:
    """The acceptance rule of the prefill: the tokens after each position, and how many leading ones are accepted.

    A row whose threshold is infinite accepts what greedy decoding would write. Other rows (relaxed verification) accept
    draft tokens whose likelihood exceeds the threshold; a boost multiplies it by its exponential, up to 1. End-of-text
    is judged as the draft's last token.
    """
    proposed = with_end(draft, end_of_text)
    likelihoods = jnp.exp(jnp.minimum(verified.draft_log_probs + verified.draft_boosts, 0))
    relaxed = jnp.isfinite(thresholds)[:, None]
    acceptable = jnp.where(relaxed, likelihoods > thresholds[:, None], proposed == verified.tokens)
    acceptable &= jnp.arange(proposed.shape[1], dtype=jnp.int32)[None, :] <= draft.lengths[:, None]
    num_accepted = count_leading(acceptable)
    accepted = jnp.arange(proposed.shape[1], dtype=jnp.int32)[None, :] < num_accepted[:, None]
    tokens = jnp.where(accepted, proposed, verified.tokens)
    selection = Selection(tokens, jnp.where(accepted, verified.draft_log_probs, verified.log_probs))
    return selection, jnp.minimum(num_accepted, draft.lengths)


def columns(arrays: PyTree[Array], index: Lengths) -> PyTree[Array]:
    """Of arrays `[b, p, ...]` the column of each row: `[b, ...]`."""
    rows = jnp.arange(len(index), dtype=jnp.int32)
    return jax.tree.map(lambda x: x[rows, index], arrays)


def count_leading(flags: Bool[Array, "b p"]) -> Lengths:
    """How many flags of each row are true before the first that is not, int32."""
    return jnp.cumprod(flags.astype(jnp.int32), axis=1).sum(axis=1).astype(jnp.int32)
