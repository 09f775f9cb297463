"""The rows of a batch on the host: inputs, from CTC labels to a draft, and from tokens to a transcript."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from granite_jax.errors import printable
from granite_jax.keywords.automaton import KeywordAutomaton
from granite_jax.keywords.matches import filter_matches, repair
from granite_jax.keywords.spotter import KeywordBatch, make_keyword_batch
from granite_jax.keywords.utterance import utterance_automaton
from granite_jax.models.layers import ctc
from granite_jax.models.layers.bpe_head import bpe_tokens
from granite_jax.models.layers.features import num_frames
from granite_jax.options import DraftFrom
from granite_jax.recognition.buckets import draft_budget
from granite_jax.recognition.encoding import Encoded
from granite_jax.recognition.guards import is_silent
from granite_jax.recognition.policy import ACCEPT, Accept, Decision, decide
from granite_jax.recognition.utterances import Decoded, Utterance
from granite_jax.results import LOW_AGREEMENT, NOT_FINITE, Transcript, disagreement
from granite_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class EncodedRow:
    """An utterance after encoding.

    Fields:
      labels: the best CTC label of every frame, int32 `[t]`.
      ctc_text: their text.
      repaired_text: that text with the keywords that were heard.
      draft: token ids for the language model.
      draft_from: the head that made them, or "caller".
      entropy: the largest one of a frame's labels, in nats; NaN if the weights give none.
      spotted: keywords that were heard, best first.
      automaton: of the keywords that decoding is biased by.
    """

    utterance: Utterance
    labels: np.ndarray
    ctc_text: str = ""
    repaired_text: str = ""
    draft: tuple[int, ...] = ()
    draft_from: str | None = None
    entropy: float = 0.0
    is_silent: bool = False
    spotted: tuple[str, ...] = ()
    automaton: KeywordAutomaton | None = None


_ON_HOST = ("labels", "entropy", "spotting", "bpe_labels", "speech_frames", "confidence")


def encoder_inputs(
    utterances: Sequence[Utterance], size: int, num_samples: int
) -> tuple[np.ndarray, np.ndarray, KeywordBatch]:
    """Samples `[size, num_samples]`, their lengths and the keywords of a batch. Padding rows have no samples."""
    samples = np.zeros((size, num_samples), np.float32)
    lengths = np.zeros(size, np.int32)
    for row, utterance in enumerate(utterances):
        lengths[row] = len(utterance.audio.samples)
        samples[row, : lengths[row]] = utterance.audio.samples
    padding = [None] * (size - len(utterances))
    return samples, lengths, make_keyword_batch([*(u.keywords and u.keywords.labels for u in utterances), *padding])


def to_host(encoded: Encoded) -> dict[str, Any]:
    """Waits for what the host needs of a batch: fields of `Encoded`."""
    return jax.device_get({name: getattr(encoded, name) for name in _ON_HOST})


def draft_head(utterance: Utterance, has_bpe_head: bool) -> DraftFrom | None:
    """The encoder's head that makes an utterance's draft, if one does."""
    drafting = utterance.options.drafting
    if utterance.draft is not None or not drafting.drafts:
        return None
    return drafting.draft_from or ("bpe" if has_bpe_head else "ctc")


def make_row(
    tokenizer: Tokenizer, utterance: Utterance, encoded: Mapping[str, Any], i: int, *, for_decoder: bool = True
) -> EncodedRow:
    """Finds the keywords in the labels of a row, and makes a draft from them.

    Args:
      encoded: fields of `encoding.Encoded`, on the host.
      i: the row.
      for_decoder: whether a draft and an automaton are made.
    """
    labels = encoded["labels"][i]
    text = repaired = " ".join(ctc.to_text(labels).split())
    spotted, automaton = (), None
    if (keywords := utterance.keywords) is not None:
        threshold = utterance.options.biasing.threshold
        matches = [] if threshold is None else filter_matches(keywords, encoded["spotting"], i, labels, threshold)
        repaired = repair(labels, matches, keywords)
        spotted = tuple(keywords.texts[m.keyword] for m in matches if m.keyword in keywords.whole)
        if for_decoder and utterance.boosted:
            automaton = utterance_automaton(keywords, matches, labels, threshold or -math.inf)
    draft, draft_from = (), None
    if for_decoder:
        draft, draft_from = _draft(tokenizer, utterance, encoded, i, repaired, is_repaired=repaired != text)
    entropy, own = float(encoded["entropy"][i]), labels[: num_frames(len(utterance.audio.samples))]
    is_plain = utterance.options.prompt is None and utterance.draft is None
    silent = utterance.options.guards and is_plain and is_silent(text, int(encoded["speech_frames"][i]))
    silent = silent and not np.isnan(entropy)  # which is no silence, but an error
    return EncodedRow(utterance, own, text, repaired, draft, draft_from, entropy, silent, spotted, automaton)


def _draft(
    tokenizer: Tokenizer, utterance: Utterance, encoded: Mapping[str, Any], i: int, text: str, *, is_repaired: bool
) -> tuple[tuple[int, ...], str | None]:
    """The draft of a row, and where it is from.

    Args:
      text: of the CTC head, with the keywords that were heard.
      is_repaired: whether keywords have changed it.
    """
    if utterance.draft is not None:
        draft, head = utterance.draft, "caller"
    else:
        head = draft_head(utterance, encoded["bpe_labels"] is not None)
        if head == "bpe" and is_repaired:
            head = "ctc"  # whose text is the one that keywords repair
        if head == "bpe":
            text = " ".join(tokenizer.decode(bpe_tokens(encoded["bpe_labels"][i])).split())
        # Tokenized again, because the head often spells the same text with other tokens.
        draft = () if head is None else tuple(tokenizer.encode(text))
    limit = draft_budget(len(utterance.audio.samples))
    draft = draft[: limit if utterance.max_new_tokens is None else min(limit, utterance.max_new_tokens)]
    return draft, head if draft else None


def failed_row(row: EncodedRow) -> Decoded:
    """The result of a row for which the weights give NaN."""
    audio = row.utterance.audio
    flags = row.utterance.flags
    error = f"{printable(audio.name)}: {NOT_FINITE}"
    return Decoded(Transcript(audio.name, duration=audio.duration, flags=flags, error=error), row.labels)


def decoded_row(tokenizer: Tokenizer, row: EncodedRow, state: Mapping[str, np.ndarray], i: int) -> Decoded:
    """The result of a row that the language model has decoded, or that is silent.

    Args:
      state: fields of `decoding.DecodeState` and the `drafted` tokens of every row, on the host.
      i: the row.
    """
    if row.is_silent:
        return ctc_decoded_row(tokenizer, row)
    count = int(state["num_tokens"][i])
    if np.isnan(row.entropy) or np.isnan(state["log_probs"][i, : count + 1]).any():
        return failed_row(row)
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
    text, utterance = tokenizer.decode(tokens).strip(), row.utterance
    decision = decide(
        utterance.options,
        utterance.attempt,
        text,
        row.ctc_text,
        row.labels,
        boosted=utterance.boosted,
        stopped=stats["finish"] == "length",
    )
    # Rounded, because batch mates may change the last bits.
    confidence = round(float(np.exp(state["log_probs"][i, :count]).mean()), 3) if count else None
    spans = _accepted_spans(state["draft_positions"][i, :count].tolist())
    doubtful = _disagrees(row, text)
    finding = decision.finding if isinstance(decision, Accept) else None
    if finding is not None and finding.text != text:
        doubtful |= finding.problem in ("hole", "invention")
        tokens = tuple(tokenizer.encode(finding.text))[: utterance.max_new_tokens]
        text, spans, confidence = tokenizer.decode(tokens).strip(), (), None
        stats["route"] = "ctc" if text == row.ctc_text else stats["route"]
    return _finished(row, text, tokens, stats, row.draft, spans, confidence, decision, doubtful=doubtful)


def ctc_decoded_row(tokenizer: Tokenizer, row: EncodedRow) -> Decoded:
    """The result of a row that never reaches the language model."""
    whole = tokenizer.encode(row.repaired_text)
    tokens = tuple(whole[: row.utterance.max_new_tokens])
    stats = {
        "route": "silence" if row.is_silent else "ctc",
        "llm_passes": 0,
        "draft_tokens": len(tokens),
        "accepted_tokens": len(tokens),
        "draft_from": None if row.is_silent else "ctc",
        "finish": "end" if len(tokens) == len(whole) else "length",
    }
    text, spans = tokenizer.decode(tokens).strip(), _accepted_spans(range(len(tokens)))
    return _finished(row, text, tokens, stats, tokens, spans, doubtful=_disagrees(row, text))


def _disagrees(row: EncodedRow, text: str) -> bool:
    return row.utterance.options.raw and disagreement(text, row.ctc_text) > LOW_AGREEMENT


def _finished(
    row: EncodedRow,
    text: str,
    tokens: tuple[int, ...],
    stats: dict[str, Any],
    draft: tuple[int, ...],
    spans: tuple[tuple[int, int, int], ...],
    confidence: float | None = None,
    decision: Decision = ACCEPT,
    *,
    doubtful: bool,
) -> Decoded:
    utterance = row.utterance
    if utterance.keywords is not None:
        stats["keywords"] = row.spotted
    finding = decision.finding if isinstance(decision, Accept) else None
    problem = None if finding is None else finding.problem
    noticed = {
        "retried": utterance.attempt.number > 0,
        "silence": row.is_silent,
        "loop": problem == "loop",
        "length": problem == "length",
        "low-agreement": doubtful,
    }
    audio = utterance.audio
    flags = (*utterance.flags, *(flag for flag, is_set in noticed.items() if is_set))
    transcript = Transcript(
        audio.name, text, tokens, audio.duration, confidence, row.ctc_text, stats, draft, spans, flags
    )
    return Decoded(transcript, row.labels, decision=decision)


def _accepted_spans(draft_positions: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """Joins each token's draft position (-1 for none) into spans (position in tokens, position in draft, size)."""
    spans: list[tuple[int, int, int]] = []
    for position, draft_position in enumerate(draft_positions):
        if spans and draft_position == spans[-1][1] + spans[-1][2] and position == spans[-1][0] + spans[-1][2]:
            spans[-1] = (*spans[-1][:2], spans[-1][2] + 1)
        elif draft_position >= 0:
            spans.append((position, draft_position, 1))
    return tuple(spans)
