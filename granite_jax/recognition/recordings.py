"""A recording's transcript, from those of its segments.

    reader   cut ──► segment 1 ──► segment 2 ──► ... (not while too many are unfinished)
    engine            decode         decode
    here              Again, Split ──► decoded again         Accept ──► words to the left and right of each cut

Where a cut went through speech, both segments have heard what is around it. Each word is written by one of them: the
cut is moved to the time, within what both have heard, that is farthest from the middle of any word of either, and a
word belongs to the side on which its middle lies.
"""

import contextlib
import dataclasses
import functools
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from granite_jax.audio.resample import WHOLE, Condition
from granite_jax.audio.segment import AudioSegment, halve
from granite_jax.engine.stages import Reply, Ticket
from granite_jax.errors import CheckpointError
from granite_jax.models.layers import ctc
from granite_jax.options import MIN_SEGMENT_SECONDS, TranscribeOptions
from granite_jax.recognition.policy import FIRST, MAX_SPLITS, Accept, Again, Attempt, Split
from granite_jax.recognition.utterances import Decoded, Utterance
from granite_jax.recognition.words import split_words
from granite_jax.results import FLAGS, Segment, Transcript, Word
from granite_jax.text.tokenizer import Tokenizer
from granite_jax.waveform import SAMPLING_RATE

OnSegment = Callable[[str, Segment], None]
Submit = Callable[[Utterance, Callable[[Reply], None]], Ticket]

_MARGIN = 0.25  # seconds at the ends of what a segment has heard, where words can be cut off


@dataclasses.dataclass(eq=False)
class _Part:
    """A segment on its way: its audio until it is decoded, and then its result. Times are seconds of the recording."""

    audio: AudioSegment
    attempt: Attempt = FIRST
    ticket: Ticket | None = None
    decoded: Decoded | None = None

    def __post_init__(self) -> None:
        self.overlaps = self.audio.overlaps
        self.offset = self.audio.offset / SAMPLING_RATE
        self.begin, self.end = self.audio.begin / SAMPLING_RATE, self.audio.end / SAMPLING_RATE
        self.heard_until = (self.audio.offset + len(self.audio.samples)) / SAMPLING_RATE
        is_smallest = self.attempt.splits == MAX_SPLITS or self.end - self.begin < MIN_SEGMENT_SECONDS
        self.attempt = dataclasses.replace(self.attempt, can_split=not is_smallest)

    @property
    def words(self) -> list[Word]:
        """Its words with the recording's times. Batch mates may change last bits, so numbers are rounded."""
        words = () if self.decoded is None else self.decoded.words
        return [
            Word(
                word.text,
                round(word.start + self.offset, 3),
                round(word.end + self.offset, 3),
                None if word.confidence is None else round(word.confidence, 3),
            )
            for word in words
        ]


class RecordingDecoder:
    """Submits a recording's segments, has those decoded again that need it, and joins their results.

    One thread at a time calls its methods.

    Fields:
      result: the transcript, or the error of a segment.
      num_unfinished: segments that are submitted and not decoded.
    """

    def __init__(
        self,
        submit: Submit,
        cancel: Callable[[Ticket], Any],
        make_utterance: Callable[[np.ndarray], Utterance],
        tokenizer: Tokenizer,
        options: TranscribeOptions,
        name: str,
        *,
        channel: int | None = None,
        word_offsets: tuple[float, float] = (0.0, 0.0),
        on_segment: OnSegment | None = None,
        settling: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ):
        """
        Args:
          submit: has an utterance decoded; the reply goes to the given function, in the thread that calls methods.
          cancel: withdraws what was submitted, if possible.
          make_utterance: the utterance of a segment's samples.
          name: of the recording.
          channel: of the input, if it is not a mix, from 1 on.
          word_offsets: seconds to add to the starts and the ends of what the CTC head writes.
          on_segment: called with each segment's result, in order.
          settling: a context in which `on_segment` and the callbacks of `result` are called.
        """
        self.result: Future[Transcript] = Future()
        self.num_unfinished = 0
        self._submit_utterance, self._cancel_ticket = submit, cancel
        self._make_utterance, self._tokenizer = make_utterance, tokenizer
        self._options, self._name, self._channel = options, name, channel
        self._word_offsets, self._on_segment, self._settling = word_offsets, on_segment, settling
        self._parts: list[_Part] = []
        self._segments: list[Segment] = []  # of the first parts
        self._ctc_texts: list[str] = []  # likewise
        self._seam = 0.0  # seconds at which the next part begins to write
        self._is_closed = False
        self._condition = WHOLE

    def submit(self, segment: AudioSegment) -> None:
        """Submits the next segment, if its result is still wanted."""
        if not self.result.done():
            part = _Part(segment)
            self._parts.append(part)
            self._submit(part)

    def close(self, condition: Condition) -> None:
        """Says that all segments are submitted, and whether the file was whole."""
        self._condition, self._is_closed = condition, True
        self._advance()

    def fail(self, error: BaseException) -> None:
        """Ends with an error, unless there is a result or an error already."""
        with contextlib.suppress(InvalidStateError), self._settling():
            self.result.set_exception(error)

    def cancel(self) -> None:
        """Withdraws what is not decoded."""
        for part in self._parts:
            if part.decoded is None:
                part.audio = dataclasses.replace(part.audio, samples=np.empty(0, np.float32))
                if part.ticket is not None:
                    self._cancel_ticket(part.ticket)

    def _submit(self, part: _Part) -> None:
        wants = set() if part.audio.is_whole else {"logits"}
        wants |= {"words"} if self._options.word_timestamps or part.overlaps else set()
        utterance = dataclasses.replace(
            self._make_utterance(part.audio.samples), wants=frozenset(wants), attempt=part.attempt
        )
        self.num_unfinished += 1
        part.ticket = self._submit_utterance(utterance, functools.partial(self._finish, part))

    def _finish(self, part: _Part, reply: Reply) -> None:
        """Takes a part's result, or has it decoded again."""
        if not reply.is_final:
            return
        self.num_unfinished -= 1
        part.ticket = None  # which holds its samples
        if self.result.done():
            return
        if reply.error is not None:
            self.fail(reply.error)
            return
        decoded: Decoded = reply.value
        match decoded.decision:
            case Accept():
                part.decoded = decoded
                part.audio = dataclasses.replace(part.audio, samples=np.empty(0, np.float32))  # no view: that keeps all
                self._advance()
            case Again(boosts):
                part.attempt = dataclasses.replace(part.attempt, boosts=boosts)
                self._submit(part)
            case Split(seconds):
                self._split(part, seconds)

    def _split(self, part: _Part, seconds: float | None) -> None:
        """Has the halves of a part decoded in its place; `seconds` as in `Split`."""
        at = None if seconds is None else round((seconds - _MARGIN) * SAMPLING_RATE)
        halves = halve(part.audio, overlap=self._options.is_transcript, at=at)
        attempt = Attempt(splits=part.attempt.splits + 1)
        index = self._parts.index(part)
        self._parts[index : index + 1] = parts = [_Part(half, attempt) for half in halves]
        for half in parts:
            self._submit(half)

    def _advance(self) -> None:
        """Makes the segments of all parts whose neighbors are decoded, and after the last one the transcript."""
        while len(self._segments) < len(self._parts) and not self.result.done():
            number = len(self._segments)
            part, following = self._parts[number], self._parts[number + 1 : number + 2]
            waits = not self._is_closed if not following else following[0].decoded is None
            if part.decoded is None or waits:
                return
            if (message := part.decoded.transcript.error) is not None:
                error = CheckpointError(message)
                error.flags = _ordered([*self._condition.flags, *part.decoded.transcript.flags])
                self.fail(error)
                return
            seam = _seam(part, following[0], self._seam) if following else max(part.end, self._seam)
            segment, ctc_text = self._segment(part, self._seam, seam)
            self._segments.append(segment)
            self._ctc_texts.append(ctc_text)
            self._seam = seam
            if self._on_segment is not None:
                with self._settling():
                    self._on_segment(self._name, segment)
        if self._is_closed and not self.result.done():
            self._set_result(self._transcript())

    def _set_result(self, transcript: Transcript) -> None:
        with contextlib.suppress(InvalidStateError), self._settling():  # or canceled by another thread
            self.result.set_result(transcript)

    def _segment(self, part: _Part, start: float, end: float) -> tuple[Segment, str]:
        """What a part writes of the recording from second `start` to second `end`; and its CTC text."""
        assert part.decoded is not None
        transcript, labels, words = part.decoded.transcript, part.decoded.labels, part.words
        text, tokens, ctc_text = transcript.text, transcript.tokens, transcript.ctc_text
        if part.overlaps:
            first, last = (round((second - part.offset) / ctc.FRAME_SECONDS) for second in (start, end))
            labels = np.where((np.arange(len(labels)) >= first) & (np.arange(len(labels)) < last), labels, ctc.BLANK)
            ctc_text = " ".join(ctc.to_text(labels).split())
            is_own = [start <= (word.start + word.end) / 2 < end for word in words]
            own = [span for span, is_kept in zip(split_words(text), is_own, strict=True) if is_kept] if words else []
            if not all(is_own):
                text = text[own[0].start : own[-1].end] if own else ""
                tokens = tuple(self._tokenizer.encode(text)) if text else ()
            words = [
                dataclasses.replace(word, start=max(word.start, start), end=min(word.end, end))
                for word, is_kept in zip(words, is_own, strict=True)
                if is_kept
            ]
        spoken = np.flatnonzero((labels != ctc.BLANK) & (labels != ctc.SPACE))
        extent = start, end
        if words:
            extent = words[0].start, words[-1].end
        elif text and len(spoken):
            heard = np.array([spoken[0], spoken[-1] + 1]) * ctc.FRAME_SECONDS + self._word_offsets
            first = min(max(start, part.offset + heard[0]), end - ctc.FRAME_SECONDS)
            extent = max(start, first), min(max(part.offset + heard[1], first + ctc.FRAME_SECONDS), end)
        segment = Segment(
            round(float(extent[0]), 3),
            round(float(extent[1]), 3),
            text,
            tokens,
            transcript.confidence if text else None,
            tuple(words) if self._options.word_timestamps else (),
            route=transcript.stats["route"],
            flags=transcript.flags,
            channel=self._channel,
        )
        return segment, ctc_text

    def _transcript(self) -> Transcript:
        parts = [part.decoded.transcript for part in self._parts if part.decoded is not None]
        damage, duration = self._condition.damage, self._parts[-1].heard_until
        segments = tuple(_with_damage(segment, damage) for segment in self._segments)
        if len(parts) == 1:
            flags = _ordered([*self._condition.flags, *parts[0].flags])
            whole = {"duration": duration, "segments": segments, "channel": self._channel, "damage": damage}
            return dataclasses.replace(parts[0], flags=flags, **whole)
        text, ctc_text = join_texts(segment.text for segment in segments), join_texts(self._ctc_texts)
        weights = [len(segment.tokens) for segment in segments if segment.confidence is not None]
        confidences = [segment.confidence for segment in segments if segment.confidence is not None]
        flags = {flag for segment in segments for flag in segment.flags if flag != "silence" or not (text or ctc_text)}
        return Transcript(
            self._name,
            text,
            tuple(token for segment in segments for token in segment.tokens),
            duration,
            round(float(np.average(confidences, weights=weights)), 3) if sum(weights) else None,
            ctc_text,
            _joined_stats([part.stats for part in parts]),
            flags=_ordered([*self._condition.flags, *flags]),
            segments=segments,
            channel=self._channel,
            damage=damage,
        )


def _seam(left: _Part, right: _Part, after: float) -> float:
    """Where the text of the left part ends and that of the right part begins, in seconds of the recording.

    Args:
      after: where the text of the left part begins.
    """
    low, high = max(right.offset + _MARGIN, after), left.heard_until - _MARGIN
    if low >= high:
        return max(left.end, after)
    middles = [np.array([(word.start + word.end) / 2 for word in part.words]) for part in (left, right)]
    on_left, on_right = (bool(np.any((low <= side) & (side <= high))) for side in middles)
    if on_left != on_right:  # what one side alone has heard is written by that side
        return round(low if on_right else high, 3)
    if not on_left:
        return max(left.end, after)
    times = np.arange(low, high, 0.01)
    distances = np.abs(times[:, None] - np.concatenate(middles)).min(axis=1).clip(max=0.25)
    return round(float(times[np.argmax(distances - 0.01 * np.abs(times - left.end))]), 3)


def _with_damage(segment: Segment, damage: Sequence[tuple[float, float]]) -> Segment:
    """The segment, flagged if some of the damage is in it."""
    if not any(start <= segment.end and segment.start <= end for start, end in damage):
        return segment
    return dataclasses.replace(segment, flags=_ordered([*segment.flags, "damaged-input"]))


def _joined_stats(stats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for name in ("route", "draft_from"):
        values = {part[name] for part in stats if part["route"] != "silence"} or {part[name] for part in stats}
        joined[name] = next(iter(values)) if len(values) == 1 else "mixed"
    for name in ("llm_passes", "draft_tokens", "accepted_tokens"):
        joined[name] = sum(part[name] for part in stats)
    joined["finish"] = "length" if any(part["finish"] == "length" for part in stats) else "end"
    if any("keywords" in part for part in stats):
        joined["keywords"] = tuple(dict.fromkeys(keyword for part in stats for keyword in part.get("keywords", ())))
    return joined


def _ordered(flags: Iterable[str]) -> tuple[str, ...]:
    found = set(flags)
    return tuple(flag for flag in FLAGS if flag in found)


def join_texts(texts: Iterable[str]) -> str:
    """Joins texts by spaces, or by nothing between Han and Kana, which are written without."""
    joined = ""
    for text in filter(None, texts):
        joined += text if not joined or (_is_unspaced(joined[-1]) and _is_unspaced(text[0])) else f" {text}"
    return joined


def _is_unspaced(character: str) -> bool:
    return unicodedata.name(character, "").startswith(("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "FULLWIDTH"))
