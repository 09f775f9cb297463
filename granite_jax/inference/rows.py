"""A row of a batch on the host: from CTC labels to a draft, and from tokens to a transcript."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from granite_jax.audio.load import printable
from granite_jax.inference.buckets import draft_budget
from granite_jax.inference.guards import Verdict, is_silent, judge
from granite_jax.inference.options import DraftFrom
from granite_jax.inference.requests import Decoded, Request, Ticket
from granite_jax.inference.results import LOW_AGREEMENT, NOT_FINITE, Transcript, disagreement
from granite_jax.keywords.automaton import KeywordAutomaton
from granite_jax.keywords.matches import filter_matches, repair
from granite_jax.keywords.repetition import has_repetition_loop
from granite_jax.keywords.utterance import utterance_automaton
from granite_jax.model import ctc
from granite_jax.model.bpe_head import bpe_tokens
from granite_jax.model.features import num_frames
from granite_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Row:
    """A request after encoding."""

    ticket: Ticket
    labels: np.ndarray
    ctc_text: str
    drafted_text: str
    draft: tuple[int, ...]
    draft_from: str | None
    entropy: float
    is_silent: bool = False
    spotted: tuple[str, ...] = ()
    automaton: KeywordAutomaton | None = None

    @property
    def request(self) -> Request:
        return self.ticket.request


def draft_head(request: Request, has_bpe_head: bool) -> DraftFrom | None:
    """The encoder's head that makes a request's draft, if one does."""
    drafting = request.options.drafting
    if request.draft is not None or not drafting.drafts:
        return None
    return drafting.draft_from or ("bpe" if has_bpe_head else "ctc")


def make_row(tokenizer: Tokenizer, ticket: Ticket, encoded: Mapping[str, Any], i: int) -> Row:
    """Finds the keywords in the labels of a row, and makes a draft from them.

    Args:
      encoded: fields of `programs.Encoded`, on the host.
      i: the row.
    """
    request, labels = ticket.request, encoded["labels"][i]
    text = drafted = " ".join(ctc.to_text(labels).split())
    spotted, automaton = (), None
    if (keywords := request.keywords) is not None:
        threshold = request.options.biasing.threshold
        matches = [] if threshold is None else filter_matches(keywords, encoded["spotting"], i, labels, threshold)
        drafted = repair(labels, matches, keywords)
        spotted = tuple(keywords.texts[m.keyword] for m in matches if m.keyword in keywords.whole)
        if not request.is_retry:
            automaton = utterance_automaton(keywords, matches, labels, threshold or -math.inf)
    head, draft, source = draft_head(request, encoded["bpe_labels"] is not None), request.draft, drafted
    if head == "bpe" and drafted == text:
        source = " ".join(tokenizer.decode(bpe_tokens(encoded["bpe_labels"][i])).split())
    elif head == "bpe":
        head = "ctc"  # whose text is the one that keywords repair
    if draft is None:  # re-tokenized, because the head often spells the same text with other tokens
        draft = () if head is None else tuple(tokenizer.encode(source))
    draft = draft[: min(draft_budget(len(request.audio.samples)), request.max_new_tokens)]
    draft_from = None if not draft else head if request.draft is None else "caller"
    entropy = float(encoded["entropy"][i])
    own = labels[: num_frames(len(request.audio.samples))]
    is_plain = request.options.prompt is None and request.draft is None
    silent = request.options.guards and is_plain and is_silent(text, int(encoded["speech_frames"][i]))
    silent = silent and not np.isnan(entropy)  # which is no silence, but an error
    return Row(ticket, own, text, drafted, draft, draft_from, entropy, silent, spotted, automaton)


def decoded_row(tokenizer: Tokenizer, row: Row, state: Mapping[str, np.ndarray], i: int) -> Decoded:
    """The result of a row that the language model has decoded, or that is silent.

    Args:
      state: fields of `decoding.DecodeState` and the `drafted` tokens of every row, on the host.
      i: the row.
    """
    if row.is_silent:
        return ctc_decoded_row(tokenizer, row)
    count = int(state["num_tokens"][i])
    if np.isnan(row.entropy) or np.isnan(state["log_probs"][i, : count + 1]).any():
        audio = row.request.audio
        error = f"{printable(audio.name)}: {NOT_FINITE}"
        flags = (*audio.flags, *row.request.flags)
        return Decoded(Transcript(audio.name, duration=audio.duration, flags=flags, error=error), row.labels)
    tokens = tuple(state["tokens"][i, :count].tolist())
    passes, drafted, accepted = (int(state[name][i]) for name in ("num_forward_passes", "drafted", "num_accepted"))
    verified = passes == 1 and accepted == drafted
    stats = {
        "route": "greedy" if not drafted else "verified" if verified else "resumed",
        "llm_passes": passes,
        "draft_tokens": drafted,
        "accepted_tokens": accepted,
        "draft_from": row.draft_from,
        "finish": "end" if state["ended"][i] else "length",
    }
    # Rounded, because batch mates may change the last bits.
    confidence = round(float(np.exp(state["log_probs"][i, :count]).mean()), 3) if count else None
    return _finished(tokenizer, row, tokens, stats, row.draft, state["draft_positions"][i, :count].tolist(), confidence)


def ctc_decoded_row(tokenizer: Tokenizer, row: Row) -> Decoded:
    """The result of a row that never reaches the language model."""
    drafted = tokenizer.encode(row.drafted_text)
    tokens = tuple(drafted[: row.request.max_new_tokens])
    stats = {
        "route": "silence" if row.is_silent else "ctc",
        "llm_passes": 0,
        "draft_tokens": len(tokens),
        "accepted_tokens": len(tokens),
        "draft_from": None if row.is_silent else "ctc",
        "finish": "end" if len(tokens) == len(drafted) else "length",
    }
    return _finished(tokenizer, row, tokens, stats, tokens, range(len(tokens)))


def _finished(
    tokenizer: Tokenizer,
    row: Row,
    tokens: tuple[int, ...],
    stats: dict[str, Any],
    draft: tuple[int, ...],
    draft_positions: Sequence[int],
    confidence: float | None = None,
) -> Decoded:
    request, text = row.request, tokenizer.decode(tokens).strip()
    audio, options = request.audio, request.options
    if request.keywords is not None:
        stats["keywords"] = row.spotted
    doubtful = options.raw and disagreement(text, row.ctc_text) > LOW_AGREEMENT
    verdict = _verdict(row, text, stats) if options.guards else None
    spans = _accepted_spans(draft_positions)
    if verdict is not None and verdict.text != text and (request.is_final or verdict.problem == "invention"):
        tokens, spans = tuple(tokenizer.encode(verdict.text))[: request.max_new_tokens], ()
        text = tokenizer.decode(tokens).strip()
        doubtful |= verdict.problem in ("hole", "invention")
        stats["route"] = "ctc" if text == row.ctc_text else stats["route"]
        confidence = None
    noticed = {
        "retried": request.is_retry,
        "silence": row.is_silent,
        "loop": verdict is not None and verdict.problem == "loop",
        "length": verdict is not None and verdict.problem == "length",
        "low-agreement": doubtful,
    }
    flags = (*audio.flags, *request.flags, *(flag for flag, is_set in noticed.items() if is_set))
    transcript = Transcript(
        audio.name, text, tokens, audio.duration, confidence, row.ctc_text, stats, draft, spans, flags
    )
    is_settled = verdict is None or request.is_final or verdict.problem == "invention"
    return Decoded(transcript, row.labels, verdict=None if is_settled else verdict)


def _verdict(row: Row, text: str, stats: dict[str, Any]) -> Verdict | None:
    options = row.request.options
    keywords = () if row.request.keywords is None or row.request.is_retry else row.request.keywords.texts
    if stats["llm_passes"] == 0 or options.prompt is not None or has_repetition_loop(text, row.ctc_text, keywords):
        return None  # of what a prompt asks for, nothing is known; boosts that repeat are tried without first
    if stats["finish"] == "length" and options.max_new_tokens is not None:
        return None  # as it was asked for
    return judge(
        text,
        row.labels,
        row.ctc_text,
        stopped=stats["finish"] == "length",
        is_transcript=options.is_transcript,
        is_raw=options.raw,
    )


def _accepted_spans(draft_positions: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Joins each token's draft position (-1 for none) into spans (position in tokens, position in draft, size)."""
    spans: list[tuple[int, int, int]] = []
    for position, draft_position in enumerate(draft_positions):
        if spans and draft_position == spans[-1][1] + spans[-1][2] and position == spans[-1][0] + spans[-1][2]:
            spans[-1] = (*spans[-1][:2], spans[-1][2] + 1)
        elif draft_position >= 0:
            spans.append((position, draft_position, 1))
    return tuple(spans)
