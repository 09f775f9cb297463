"""A recording's transcript from those of its segments: seams, order, second tries, errors."""

import dataclasses
import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from granite_jax.audio.load import Audio
from granite_jax.audio.resample import WHOLE, Condition
from granite_jax.audio.segment import AudioSegment
from granite_jax.engine.stages import Reply
from granite_jax.errors import CheckpointError
from granite_jax.models.layers import ctc
from granite_jax.options import TranscribeOptions
from granite_jax.recognition.policy import ACCEPT, Again, Decision, Split
from granite_jax.recognition.recordings import RecordingDecoder, join_texts
from granite_jax.recognition.utterances import Decoded, Utterance
from granite_jax.results import Segment, Transcript, Word

SECOND = 16_000
Timed = tuple[str, float, float]  # a word, and seconds of the recording


class Tokenizer:
    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


class Engine:
    """Decodes a script: the words that it hears in each utterance. They are done when the test says so."""

    def __init__(self, script: list[Timed], *, slip: float = 0.0):
        """`slip`: seconds by which times of every other utterance are off."""
        self.script, self.slip = script, slip
        self.utterances: list[Utterance] = []
        self.replies: list[Callable[[Reply], None]] = []
        self.done: set[int] = set()
        self.canceled: list[Any] = []
        self.decisions: dict[int, Decision] = {}

    def submit(self, utterance: Utterance, reply: Callable[[Reply], None]) -> Any:
        self.utterances.append(utterance)
        self.replies.append(reply)
        return SimpleNamespace(utterance=utterance)  # its ticket

    def reply(self, number: int, decoded: Decoded) -> None:
        self.done.add(number)
        self.replies[number](Reply(decoded))

    def finish(self, number: int) -> None:
        if number not in self.done:
            self.reply(number, self.decode(number, self.utterances[number]))

    def finish_all(self) -> None:
        number = 0
        while number < len(self.utterances):
            self.finish(number)
            number += 1

    def decode(self, number: int, utterance: Utterance) -> Decoded:
        offset = float(utterance.audio.samples[0])  # of the recording: its samples tell their own time
        duration = utterance.audio.duration
        slip = self.slip * (number % 2)
        heard = [(w, a - offset + slip, b - offset + slip) for w, a, b in self.script]
        heard = [(w, a, b) for w, a, b in heard if a >= 0 and b <= duration]
        text = " ".join(word for word, _, _ in heard)
        labels = np.zeros(round(duration / ctc.FRAME_SECONDS), np.int32)
        for word, start, end in heard:
            frames = np.linspace(start, end, len(word), endpoint=False) / ctc.FRAME_SECONDS
            labels[np.round(frames).astype(int)] = ctc.to_labels(word)
            labels[min(round(end / ctc.FRAME_SECONDS), len(labels) - 1)] = ord(" ")
        stats = {"route": "verified", "llm_passes": 1, "draft_tokens": 2, "accepted_tokens": 2, "draft_from": "ctc"}
        flags = ("retried",) if utterance.attempt.number else ()
        transcript = Transcript(
            "a", text, tuple(map(ord, text)), duration, 0.5, text, {**stats, "finish": "end"}, flags=flags
        )
        words = tuple(Word(*word) for word in heard) if "words" in utterance.wants else ()
        decision = self.decisions.get(number, ACCEPT)
        if isinstance(decision, Split) and not utterance.attempt.can_split:
            decision = ACCEPT
        return Decoded(transcript, labels, words, decision)


def segment(start: float, begin: float, end: float, until: float, *, last: bool = False) -> AudioSegment:
    samples = np.arange(round(start * SECOND), round(until * SECOND), dtype=np.float64) / SECOND
    return AudioSegment(round(start * SECOND), samples, round(begin * SECOND), round(end * SECOND), last)


def decoder(
    engine: Engine,
    on_segment: Callable[[str, Segment], None] | None = None,
    *,
    channel: int | None = None,
    word_offsets: tuple[float, float] = (0.0, 0.0),
    **fields: Any,
) -> RecordingDecoder:
    options = TranscribeOptions(**fields)
    tokenizer: Any = Tokenizer()
    return RecordingDecoder(
        engine.submit,
        engine.canceled.append,
        lambda samples: Utterance(Audio("a", samples), options),
        tokenizer,
        options,
        "a",
        channel=channel,
        word_offsets=word_offsets,
        on_segment=on_segment,
    )


def words(count: int, each: float = 0.4) -> list[Timed]:
    """Words of 0.3 s, one after another; every third is said twice."""
    return [(_name(i - (i % 3 == 1)), i * each + 0.05, i * each + 0.35) for i in range(count)]


def _name(number: int) -> str:
    return "".join(chr(97 + number // 26**power % 26) for power in range(3))


@pytest.mark.parametrize("cut", np.arange(9.5, 10.5, 0.07).tolist())
@pytest.mark.parametrize("slip", [0.0, 0.08, -0.08])
def test_no_word_at_a_seam_is_lost_or_doubled(cut: float, slip: float) -> None:
    # Given words without a pause, some of which are repeated, a cut anywhere, and times that disagree by 80 ms
    engine = Engine(words(40), slip=slip)
    recording = decoder(engine)
    recording.submit(segment(0, 0, cut, cut + 1))
    recording.submit(segment(cut - 1, cut, 16.5, 16.5, last=True))
    recording.close(WHOLE)
    # When both sides are decoded, then the text is that of the whole
    engine.finish_all()
    transcript = recording.result.result()
    assert transcript.text.split() == [word for word, _, _ in engine.script]
    assert transcript.ctc_text.split() == transcript.text.split()
    assert transcript.text == " ".join(part.text for part in transcript.segments)
    assert transcript.tokens == tuple(token for part in transcript.segments for token in part.tokens)


def test_what_a_segment_writes_of_words_that_are_cut_off_is_left_out() -> None:
    # Given a cut at 10 s, a left side that invents words at its end and a right side that does at its beginning
    left = [("we", 8.0, 8.3), ("met", 9.2, 9.5), ("her", 10.2, 10.5), ("If,", 10.85, 11.0)]
    right = [("Et", 9.0, 9.15), ("met", 9.2, 9.5), ("her", 10.2, 10.5), ("there", 12.0, 12.5)]
    assert joined_at_ten(left, right) == "we met her there"


def test_the_right_side_reads_the_overlap_in_other_words() -> None:
    # Given sides that spell what both hear differently, then each time has one word, and the right one no capital
    left = [("la", 8.8, 9.0), ("réunion", 9.2, 9.6), ("rendue", 9.9, 10.3), ("publique", 10.4, 10.7)]
    right = [("Réunions", 9.1, 9.6), ("rendu", 9.9, 10.3), ("public", 10.4, 10.8), ("hier", 11.2, 11.4)]
    text = joined_at_ten(left, right)
    assert text in ("la réunion rendu public hier", "la réunion rendue public hier", "la réunion rendue publique hier")


def test_japanese_is_cut_between_characters() -> None:
    left = [(char, 8 + 0.3 * i, 8.3 + 0.3 * i) for i, char in enumerate("きょうはいいてん")]
    right = [(char, 9.2 + 0.3 * i, 9.5 + 0.3 * i) for i, char in enumerate("いいてんきです")]
    assert joined_at_ten(left, right, space="") == "きょうはいいてんきです"


def joined_at_ten(left: list[Timed], right: list[Timed], space: str = " ") -> str:
    """The text of a recording that was cut at 10 s, from what both sides hear."""
    recording = decoder(engine := Engine([]))
    recording.submit(segment(0, 0, 10, 11))
    recording.submit(segment(9, 10, 20, 20, last=True))
    recording.close(WHOLE)
    for number, (heard, offset) in enumerate(zip((left, right), (0, 9), strict=True)):
        text = space.join(word for word, _, _ in heard)
        transcript = dataclasses.replace(engine.decode(0, engine.utterances[number]).transcript, text=text)
        words = tuple(Word(word, start - offset, end - offset) for word, start, end in heard)
        engine.reply(number, Decoded(transcript, np.zeros(10, np.int32), words))
    return recording.result.result().text


def test_times_are_those_of_the_recording() -> None:
    # Given segments that begin at 20 and 40 s, when joined with word times
    engine = Engine([("one", 1.0, 1.5), ("two", 22.0, 22.5), ("three", 41.25, 42.0)])
    recording = decoder(engine, word_timestamps=True)
    for start in (0, 20, 40):
        recording.submit(segment(start, start, start + 20, start + 20, last=start == 40))
    recording.close(Condition(("truncated-input",)))
    engine.finish_all()
    transcript = recording.result.result()
    # Then words and segments have the recording's times, from the first word to the last one
    times = [(w.text, w.start, w.end) for part in transcript.segments for w in part.words]
    assert times == [("one", 1.0, 1.5), ("two", 22.0, 22.5), ("three", 41.25, 42.0)]
    assert [(part.start, part.end) for part in transcript.segments] == [(1.0, 1.5), (22.0, 22.5), (41.25, 42.0)]
    assert (transcript.duration, transcript.flags) == (60.0, ("truncated-input",))
    assert transcript.stats["llm_passes"] == 3 and transcript.stats["route"] == "verified"


@pytest.mark.parametrize(
    ("word", "offsets", "expected"),
    [
        (("hello", 3.0, 3.5), (0.0, 0.0), (3.0, 3.42)),
        (("hello", 3.0, 3.5), (-0.125, -0.08), (2.875, 3.34)),
        (("hello", 0.02, 0.5), (-0.125, 0.0), (0.0, 0.42)),
        (("a", 0.02, 0.5), (-0.125, -0.08), (0.0, 0.02)),
        (("hello", 19.5, 20.0), (0.6, 0.6), (19.98, 20.0)),
    ],
)
def test_segments_without_word_times_have_the_same_offsets(
    word: Timed, offsets: tuple[float, float], expected: tuple[float, float]
) -> None:
    # Given a head that writes late, and no word times, when a segment is decoded
    engine = Engine([word])
    recording = decoder(engine, word_offsets=offsets)
    recording.submit(segment(0, 0, 20, 20, last=True))
    recording.close(WHOLE)
    engine.finish_all()
    # Then it begins and ends where the head hears characters, but for the offsets, and within its own part
    (part,) = recording.result.result().segments
    assert (part.start, part.end) == pytest.approx(expected, abs=0.011) and part.start < part.end
    assert part.words == ()


def test_segments_are_told_in_order_and_early() -> None:
    # Given three segments, when they are done in another order
    engine, told = Engine(words(140)), []
    recording = decoder(engine, lambda name, part: told.append((name, part.start)))
    for start in (0, 20, 40):
        recording.submit(segment(start, start, start + 20, start + 20, last=start == 40))
    engine.finish(1)
    assert told == []
    engine.finish(0)
    # Then the first is told when its neighbor is done, and the last when there can be no more
    assert len(told) == 1
    engine.finish(2)
    assert len(told) == 2 and not recording.result.done()
    recording.close(WHOLE)
    assert recording.result.done() and [name for name, _ in told] == ["a"] * 3
    np.testing.assert_allclose([start for _, start in told], [0.05, 20.05, 40.05], atol=0.02)


def test_segments_tell_their_channel() -> None:
    # Given the second channel of an input, when it is decoded, then its segments and its transcript say so
    told: list[Segment] = []
    recording = decoder(engine := Engine(words(10)), lambda _, part: told.append(part), channel=2)
    recording.submit(segment(0, 0, 20, 20, last=True))
    recording.close(WHOLE)
    engine.finish_all()
    assert [part.channel for part in told] == [recording.result.result().channel] == [2]


@pytest.mark.parametrize(("heard", "flags"), [("hello", ("low-agreement",)), ("", ("silence",))])
def test_a_recording_is_silent_if_nothing_is_heard_in_any_segment(heard: str, flags: tuple[str, ...]) -> None:
    # Given two segments without text, in the second of which the CTC head may have heard characters
    recording = decoder(engine := Engine([]))
    for start, ctc_text in ((0, ""), (20, heard)):
        recording.submit(segment(start, start, start + 20, start + 20, last=start == 20))
        number = len(engine.utterances) - 1
        decoded = engine.decode(0, engine.utterances[number])
        own = ("low-agreement",) if ctc_text else ("silence",)
        transcript = dataclasses.replace(decoded.transcript, ctc_text=ctc_text, flags=own)
        engine.reply(number, dataclasses.replace(decoded, transcript=transcript))
    recording.close(WHOLE)
    # When they are joined, then the recording is silent if both are, and doubts are told
    assert recording.result.result().flags == flags


def test_a_problem_is_decoded_again_in_halves() -> None:
    # Given a segment whose text leaves something out at 8 s
    engine = Engine(words(50))
    engine.decisions[0] = Split(8.0)
    recording = decoder(engine)
    recording.submit(segment(0, 0, 20, 20, last=True))
    recording.close(WHOLE)
    # When decoded, then two smaller ones are, of which one begins there, and nothing is lost or doubled
    engine.finish_all()
    transcript = recording.result.result()
    assert len(engine.utterances) == 3 and engine.utterances[2].audio.samples[0] == pytest.approx(6.75)
    assert transcript.text.split() == [word for word, _, _ in engine.script]
    assert transcript.flags == ("retried",) and len(transcript.segments) == 2


def test_second_tries_end() -> None:
    # Given problems in whatever is decoded, when tried again, then the smallest parts are final
    engine = Engine(words(50))
    engine.decisions = {number: Split() for number in range(100)}
    recording = decoder(engine)
    recording.submit(segment(0, 0, 20, 20, last=True))
    recording.close(WHOLE)
    engine.finish_all()
    assert recording.result.result().text and len(engine.utterances) == 7
    assert [utterance.attempt.can_split for utterance in engine.utterances] == [True] * 3 + [False] * 4


def test_boosts_that_make_a_text_repeat_are_left_out() -> None:
    # Given a text that repeats a keyword, when decoded, then the same audio is decoded again without boosts
    engine = Engine(words(20))
    engine.decisions[0] = Again(boosts=False)
    recording = decoder(engine)
    recording.submit(segment(0, 0, 20, 20, last=True))
    recording.close(WHOLE)
    engine.finish_all()
    first, second = engine.utterances
    assert (first.attempt.boosts, second.attempt.boosts) == (True, False) and second.attempt.can_split
    assert first.audio.samples is second.audio.samples and recording.result.result().flags == ("retried",)


def test_short_audio_is_not_cut_further() -> None:
    engine = Engine(words(5))
    recording = decoder(engine)
    recording.submit(segment(0, 0, 3, 3, last=True))
    recording.close(WHOLE)
    assert not engine.utterances[0].attempt.can_split


def test_audio_that_is_decoded_is_let_go() -> None:
    # Given two segments, when the first is decoded, then nothing holds its samples any more
    engine = Engine(words(100))
    recording = decoder(engine)
    first = segment(0, 0, 20, 20)
    held = weakref.ref(first.samples)
    recording.submit(first)
    recording.submit(segment(20, 20, 40, 40, last=True))
    engine.finish(0)
    engine.utterances[0] = engine.utterances[1]
    engine.replies[0] = engine.replies[1]
    del first
    gc.collect()
    assert held() is None


def test_seams_do_not_go_back() -> None:
    # Given a short part between two cuts through speech, whose words are there in all three
    engine = Engine(words(60))
    recording = decoder(engine)
    for start, begin, end, until in ((0, 0, 10, 11), (9, 10, 11, 12), (10, 11, 20, 20)):
        recording.submit(segment(start, begin, end, until, last=end == 20))
    recording.close(WHOLE)
    engine.finish_all()
    transcript = recording.result.result()
    assert transcript.text.split() == [word for word, _, end in engine.script if end < 20]
    assert all(part.start <= part.end for part in transcript.segments)


def test_what_one_side_alone_has_heard_is_written() -> None:
    # Given words around a cut that only the right side writes, or only the left one
    right = [("we", 9.4, 9.6), ("met", 9.8, 10.1), ("her", 10.3, 10.5)]
    assert joined_at_ten([("yes", 5.0, 5.5)], right) == "yes we met her"
    assert joined_at_ten(right, [("there", 12.0, 12.5)]) == "we met her there"


def test_the_error_of_a_segment_is_that_of_the_recording() -> None:
    engine = Engine(words(100))
    recording = decoder(engine)
    for start in (0, 20):
        recording.submit(segment(start, start, start + 20, start + 20, last=start == 20))
    recording.close(WHOLE)
    engine.replies[0](Reply(error=RuntimeError("device lost")))
    assert isinstance(recording.result.exception(), RuntimeError)
    # And what is left can be withdrawn, and comes too late
    recording.cancel()
    assert [ticket.utterance for ticket in engine.canceled] == [engine.utterances[1]]
    engine.finish(1)


def test_a_segment_that_is_not_finite_fails_the_recording() -> None:
    engine = Engine(words(100))
    recording = decoder(engine)
    recording.submit(segment(0, 0, 20, 20, last=True))
    recording.close(Condition(("truncated-input",)))
    decoded = engine.decode(0, engine.utterances[0])
    broken = dataclasses.replace(decoded.transcript, error="a: NaN", flags=("prompt-fallback",))
    engine.reply(0, dataclasses.replace(decoded, transcript=broken))
    error = recording.result.exception()
    assert isinstance(error, CheckpointError) and str(error) == "a: NaN"
    assert error.flags == ("truncated-input", "prompt-fallback")


@pytest.mark.parametrize(
    ("texts", "joined"),
    [
        (["a b", "", "c"], "a b c"),
        (["こんにちは", "世界"], "こんにちは世界"),
        (["世界", "hello"], "世界 hello"),
        (["안녕", "세계"], "안녕 세계"),
        ([], ""),
    ],
)
def test_texts_are_joined_as_their_script_does(texts: list[str], joined: str) -> None:
    assert join_texts(texts) == joined
