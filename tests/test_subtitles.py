"""Transcripts with times as subtitles: cues follow the rules, and other programs read what is written."""

# ruff: noqa: RUF001 (punctuation of many scripts)

import html
import io
import json
import math
import unicodedata
from typing import Any

import pysubs2
import pytest
import srt
import webvtt
from hypothesis import given
from hypothesis import strategies as st
from subtitle_rules import violations

import granite_jax as gj
from granite_jax import GraniteError
from granite_jax.formats.characters import text_width
from granite_jax.formats.cues import Cue, cues
from granite_jax.formats.schema import to_json, transcript_fields
from granite_jax.results import Segment, Transcript, Word


def spoken(text: str, start: float = 0.0, pause: float = 0.02, speaker: str | None = None) -> Segment:
    """A segment whose words take 60 ms a character, and a pause after each."""
    words, now = [], start
    for word in text.split():
        words.append(Word(word, now, now + 0.06 * len(word)))
        now = words[-1].end + pause
    return Segment(start, words[-1].end, text, words=tuple(words), speaker=speaker)


def lines(*segments: Segment) -> list[tuple[str, ...]]:
    return [cue.lines for cue in cues(segments)]


# Cues.


def test_cues_break_at_sentences_then_punctuation_then_conjunctions() -> None:
    text = (
        "So last week I went to see Doctor Anna Kowalczyk, who had been working on the new engine for three years. "
        "It was, as she told us, a very difficult time. And because nobody believed in the project, the money was gone "
        "before the winter began."
    )
    found = cues([spoken(text)])
    assert [cue.lines for cue in found] == [
        ("So last week I went", "to see Doctor Anna Kowalczyk,"),
        ("who had been working", "on the new engine for three years."),
        ("It was, as she told us,", "a very difficult time."),
        ("And because nobody believed", "in the project,"),
        ("the money was gone", "before the winter began."),
    ]
    assert violations(found) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # An abbreviation and an initial end no sentence.
        ("We met Dr. J. Smith in town.", [("We met Dr. J. Smith in town.",)]),
        # No line ends with an article, a pronoun or a preposition.
        (
            "he said that he would bring the enormous piano upstairs",
            [("he said that he would bring", "the enormous piano upstairs")],
        ),
        (
            "Der Zug nach Hamburg fährt heute leider nicht, weil die Strecke wegen der Bauarbeiten gesperrt ist.",
            [
                ("Der Zug nach Hamburg", "fährt heute leider nicht,"),
                ("weil die Strecke", "wegen der Bauarbeiten gesperrt ist."),
            ],
        ),
    ],
)
def test_phrases_stay_together(text: str, expected: list[tuple[str, ...]]) -> None:
    assert lines(spoken(text)) == expected


def test_a_pause_and_a_speaker_end_a_cue() -> None:
    words = (Word("one", 0.0, 0.3), Word("two", 0.8, 1.1), Word("three", 1.2, 1.5))
    found = cues([Segment(0, 1.5, "one two three", words=words, speaker="A"), spoken("four", 1.6, speaker="B")])
    # 0.5 s between the first two; the cue before is prolonged into it, to two frames before the next
    assert found == [
        Cue(0.0, 0.716, ("one",), "A"),
        Cue(0.8, 1.516, ("two three",), "A"),
        Cue(1.6, 2.433, ("four",), "B"),
    ]


def test_reading_takes_time_where_there_is_some() -> None:
    text = "extraordinarily incomprehensible"  # 32 characters, 1.6 s
    words = (Word("extraordinarily", 1.0, 1.2), Word("incomprehensible", 1.2, 1.4))
    segment = Segment(1.0, 1.4, text, words=words)
    assert [(cue.start, cue.end) for cue in cues([segment])] == [(1.0, 2.6)]
    # The next cue limits it
    assert [(cue.start, cue.end) for cue in cues([segment, spoken("so", 2.0)])] == [(1.0, 1.916), (2.0, 2.833)]
    # A word that lasts too long does not
    assert [(cue.start, cue.end) for cue in cues([Segment(0, 60, "so", words=(Word("so", 0, 60),))])] == [(0.0, 7.0)]


def test_segments_without_words_share_their_time_by_characters() -> None:
    text = "The first sentence is this one, here. The second sentence is the other one."
    first, second = cues([Segment(10.0, 17.5, text)])
    assert (first.lines, second.lines) == (
        ("The first sentence is this one, here.",),
        ("The second sentence is the other one.",),
    )
    assert first.start == 10.0 and second.end == 17.5 and second.start == pytest.approx(13.75, abs=0.2)


def test_punctuation_of_the_text_goes_with_the_words() -> None:
    # Given words without the punctuation between them, when there is a pause, then marks stay with the word they follow
    words = tuple(Word(text, start, start + 0.5) for text, start in (("Vraiment", 0), ("Oui", 2), ("dit-il", 4)))
    assert lines(Segment(0, 5, "Vraiment ? « Oui », dit-il.", words=words)) == [
        ("Vraiment ?",),
        ("« Oui »,",),
        ("dit-il.",),
    ]
    # Nor does a cue end with a no-break space
    numbers = (Word("10", 0, 0.5), Word("000", 2, 3))
    assert lines(Segment(0, 3, "10\u00a0000", words=numbers)) == [("10",), ("000",)]
    # And words that are not those of the text are not used
    assert lines(Segment(0, 5, "Other text", words=words)) == [("Other text",)]


def test_east_asian_text_breaks_between_characters_and_is_wide() -> None:
    text = (
        "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。"
        "何でも薄暗いじめじめした所でニャーニャー泣いていた事だけは記憶している。"
    )
    found = cues([Segment(0, 16, text)])
    assert "".join(line for cue in found for line in cue.lines) == text
    assert all(text_width(line) == 2 * len(line) <= 42 for cue in found for line in cue.lines)
    assert not any(line[0] in "。ーャっ" for cue in found for line in cue.lines)
    assert violations(found) == []
    # Characters as words, and segments that follow each other, have no spaces between them
    words = tuple(Word(char, i * 0.2, i * 0.2 + 0.2) for i, char in enumerate("今日は"))
    assert lines(Segment(0, 0.6, "今日は", words=words), Segment(0.6, 1, "雨です")) == [("今日は雨です",)]
    # Korean has spaces
    assert lines(Segment(0, 6, "오늘은 날씨가 아주 좋아서 친구와 함께 공원에 갔습니다 그리고")) == [
        ("오늘은 날씨가 아주 좋아서", "친구와 함께 공원에 갔습니다 그리고")
    ]


@pytest.mark.parametrize("unit", ["w", "e\u0301", "👩‍👩‍👧", "🇫🇷", "👍🏽", "नि", "ก็", "\U0001d11e"])
def test_characters_are_never_divided(unit: str) -> None:
    # Given a word of many characters, each of several code points
    found = [line for cue in cues([Segment(0, 100, unit * 200)]) for line in cue.lines]
    # When it is broken, then every line is of whole ones
    assert len(found) > 1 and all(line.replace(unit, "") == "" for line in found)


def test_right_to_left_text_keeps_its_order() -> None:
    text = "مرحبا بكم في قناتنا على يوتيوب ونبدأ اليوم YouTube هو موقع معروف عند كل الناس في العالم"
    found = [line for cue in cues([Segment(0, 12, text)]) for line in cue.lines]
    assert " ".join(line.lstrip("\u200f") for line in found) == text
    # A line that begins with another direction than the cue's says so
    assert lines(Segment(0, 3, "YouTube هو موقع معروف")) == [("\u200fYouTube هو موقع معروف",)]
    assert lines(Segment(0, 3, "مرحبا means hello")) == [("\u200eمرحبا means hello",)]


CHARACTERS = (
    "ab.,?!-'\"<>{}\\&;:0123 \n\r\t\x00\x0b\x1f\x85\u00a0\u200b\u200d\u200f\u202b\u2028\u2060\ufe0f\ufeff\u0301"
    + ("日本。っー（）é한🇫🇷👍🏽😀مرحש\ud800\udc00")
)
TEXTS = st.one_of(
    st.text(CHARACTERS, max_size=60),
    st.sampled_from(
        [
            "<b>x</b>",
            "{\\i1}",
            "a\\Nb",
            "-->",
            "00:00:01,000 --> 00:00:02,000",
            "&amp;",
            "w" * 1000,
            "w" * 41 + "\u00a0ww",
            "1984",
        ]
    ),
    st.lists(
        st.sampled_from(["the", "and", "Yes.", "engine,", "comfortable", "12", "is", "日本語です。"]), max_size=40
    ).map(" ".join),
)
TIMES = st.one_of(
    st.floats(0, 100), st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 0.0005, 0.9999, 59.9996, 3599.9999])
)


@st.composite
def transcripts(draw: Any) -> list[Segment]:
    """Segments with and without words, and with times that may make no sense."""
    segments: list[Segment] = []
    now = 0.0
    for _ in range(draw(st.integers(0, 4))):
        text, speaker = draw(TEXTS), draw(st.sampled_from([None, None, "A", "B <b>", "\n", "n" * 60]))
        if draw(st.booleans()):
            segments.append(Segment(draw(TIMES), draw(TIMES), text, speaker=speaker))
            continue
        words, start = [], now
        for word in text.split():
            begin = now + draw(st.sampled_from([0.0, 0.01, 0.3, 0.6, 3.0]))
            now = begin + draw(st.sampled_from([0.0, 0.05, 0.2, 0.5, 9.0]))
            words.append(Word(word, begin, now))
        segments.append(Segment(start, now, text, words=tuple(words), speaker=speaker))
    return segments


def visible(text: str) -> str:
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return "".join(c for c in text if not c.isspace() and unicodedata.category(c) not in ("Cf", "Cc", "Mn", "Zl", "Zp"))


@given(transcripts())
def test_cues_follow_the_rules_and_lose_nothing(segments: list[Segment]) -> None:
    found = cues(segments)
    assert violations(found) == []
    assert visible("".join(line for cue in found for line in cue.lines)) == visible("".join(s.text for s in segments))
    assert violations(cues(segments, label_speakers=True)) == []


def test_the_checker_finds_violations() -> None:
    wrong = [Cue(0, 8, ("x" * 43, "a", "")), Cue(7.5, 7.6, ("a" * 30,)), Cue(7.65, 7.65, ("b",)), Cue(9, 9.8, ("c",))]
    assert violations(wrong) == [
        "cue 1: 3 lines",
        "cue 1: a line of more than 42 columns",
        "cue 1: a blank line, or spaces around one",
        "cue 1: 8000 ms: too long",
        "cue 1: overlaps the next one",
        "cue 2: gap of 50 ms",
        "cue 3: 0 ms: does not end after its start",
        "cue 3: 0 ms: too short, and could last",
        "cue 3: 1 columns in 0 ms, and could last",
        "cue 4: 800 ms: too short, and could last",
    ]


# Formats.


@given(transcripts())
def test_srt_is_read_back(segments: list[Segment]) -> None:
    written = gj.to_srt(segments)
    expected = cues(segments, label_speakers=True)
    times = [(round(cue.start * 1000), round(cue.end * 1000)) for cue in expected]
    # Given what is written, when two libraries read it, then the times come back, and both see the same plain text
    subtitles = list(srt.parse(written))
    assert [(round(s.start.total_seconds() * 1000), round(s.end.total_seconds() * 1000)) for s in subtitles] == times
    assert [s.index for s in subtitles] == list(range(1, len(expected) + 1))
    events = list(pysubs2.SSAFile.from_string(written, format_="srt"))
    assert [(event.start, event.end) for event in events] == times
    assert [event.plaintext for event in events] == [s.content for s in subtitles]
    # Which is the text, but for characters that would be markup
    alike = str.maketrans({"{": "(", "}": ")", "<": "\u2039", ">": "\u203a", "\u2060": None})
    texts = ["\n".join(cue.lines).translate(alike) for cue in expected]
    assert [s.content.translate(alike) for s in subtitles] == texts
    assert "\r" not in written and "\ufeff" not in written


@given(transcripts())
def test_webvtt_is_read_back(segments: list[Segment]) -> None:
    written = gj.to_vtt(segments)
    expected = cues(segments)
    captions = webvtt.from_buffer(io.StringIO(written)).captions if expected else []
    assert [html.unescape(caption.text) for caption in captions] == ["\n".join(cue.lines) for cue in expected]
    assert [html.unescape(caption.voice or "") for caption in captions] == [cue.speaker or "" for cue in expected]
    times = [(caption.start, caption.end) for caption in captions]
    events = list(pysubs2.SSAFile.from_string(written, format_="vtt"))
    assert len(events) == len(expected)
    seconds = [tuple(sum(float(x) * 60**i for i, x in enumerate(t.split(":")[::-1])) for t in pair) for pair in times]
    assert [tuple(pytest.approx(t) for t in pair) for pair in seconds] == [(cue.start, cue.end) for cue in expected]


@given(transcripts())
def test_tsv_has_a_line_a_segment(segments: list[Segment]) -> None:
    header, *rows = gj.to_tsv(segments).split("\n")[:-1]
    assert header == "start\tend\ttext"
    fields = [row.split("\t") for row in rows]
    assert all(len(row) == 3 and 0 <= int(row[0]) <= int(row[1]) for row in fields)
    assert visible("".join(row[2] for row in fields)) == visible("".join(s.text for s in segments))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<b>bold</b>", "‹b>bold‹/b>"),
        ("1 < 2", "1 < 2"),
        ("a <i", "a ‹i"),
        ("{\\i1}x", "(\\\u2060i1)x"),
        ("a\\Nb", "a\\\u2060Nb"),
        ("a --> b", "a --› b"),
        ("at 00:00:05,000 and 00:00:06,000", "at 00:00:05\u2060,000 and 00:00:06\u2060,000"),
        ("R&amp;D", "R&amp;D"),
        ("a\r\n\r\nb\x00\x07c", "a bc"),
    ],
)
def test_markup_in_srt_becomes_text(text: str, expected: str) -> None:
    written = gj.to_srt([Segment(0, 3, text)])
    assert written == f"1\n00:00:00,000 --> 00:00:03,000\n{expected}\n"
    assert next(iter(pysubs2.SSAFile.from_string(written, format_="srt"))).plaintext == expected


def test_times_are_rounded_once() -> None:
    # Given times that round to a whole second, and more than 99 hours
    segments = [Segment(59.9996, 62.0, "a"), Segment(3600 * 123.5, 3600 * 123.5 + 1.0004, "b")]
    assert gj.to_srt(segments).splitlines()[1::4] == [
        "00:01:00,000 --> 00:01:02,000",
        "123:30:00,000 --> 123:30:01,000",
    ]
    assert gj.to_tsv(segments).splitlines()[1] == "60000\t62000\ta"


def test_speakers_are_named() -> None:
    segments = [
        spoken("Hello there.", 0, speaker="Anna"),
        spoken("How are you?", 2, speaker="Anna"),
        spoken("Fine.", 4, speaker="Bo & <Co>"),
        spoken("Thanks.", 6),
    ]
    # SRT: once a turn
    assert [subtitle.content for subtitle in srt.parse(gj.to_srt(segments))] == [
        *("Anna: Hello there.", "How are you?", "Bo & ‹Co>: Fine.", "Thanks."),
    ]
    # WebVTT: each cue has its voice
    assert gj.to_vtt(segments).splitlines()[3::3] == [
        *("<v Anna>Hello there.", "<v Anna>How are you?", "<v Bo &amp; &lt;Co&gt;>Fine.", "Thanks."),
    ]


@pytest.mark.parametrize("segments", [[], [Segment(0, 3)], [Segment(0, 3, " \n\u200b\x00")]])
def test_no_text_is_an_empty_file(segments: list[Segment]) -> None:
    assert (gj.to_srt(segments), gj.to_vtt(segments), gj.to_tsv(segments)) == ("", "WEBVTT\n", "start\tend\ttext\n")


def test_a_transcript_is_its_segments() -> None:
    segments = [spoken("Hello there."), spoken("And again.", 5.0)]
    for write in (cues, gj.to_srt, gj.to_vtt, gj.to_tsv):
        assert write(Transcript("a", segments=tuple(segments))) == write(segments) != write([])


def test_a_text_without_segments_is_one() -> None:
    transcript = Transcript("a", "Hello there.", duration=2.0)
    assert gj.to_tsv(transcript) == gj.to_tsv(vars(transcript)) == "start\tend\ttext\n0\t2000\tHello there.\n"


@pytest.mark.parametrize("write", [gj.to_srt, gj.to_vtt, gj.to_tsv])
def test_a_transcript_that_failed_has_no_subtitles(write: Any) -> None:
    # Given a failed transcript, as an object and as a batch job's line has it, when it is written, then it is refused
    failed = Transcript("a.wav", error="a.wav: no such file")
    for timed in (failed, {"index": 0, **transcript_fields(failed)}):
        with pytest.raises(GraniteError, match="^a transcript that failed has no times: a.wav: no such file$"):
            write(timed)


@pytest.mark.parametrize("write", [gj.to_srt, gj.to_vtt, gj.to_tsv])
def test_what_json_has_is_written_as_the_transcript_is(write: Any) -> None:
    # Given a transcript with words and a speaker, and what its JSON is read as
    transcript = Transcript("a.wav", "one two", segments=(spoken("one two", 1.0, speaker="A"),))
    read = json.loads(to_json(transcript))
    # When it, or its segments, are written, then the file is the transcript's
    assert write(read) == write(read["segments"]) == write(transcript) != write([])


@pytest.mark.parametrize("write", [gj.to_srt, gj.to_vtt, gj.to_tsv])
@pytest.mark.parametrize(
    ("timed", "what"),
    [
        ("one two", "a str"),
        (None, "a NoneType"),
        ({"text": "one two"}, "a dict"),
        ([Transcript("a.wav", "one")], "item 0, a Transcript,"),
        (["one", "two"], "item 0, a str,"),
        ([Segment(0, 1, "one"), {"text": "two", "start": 1}], "item 1, a dict,"),
        ([{"text": "two", "start": 1, "end": None}], "item 0, a dict,"),
        ([{"text": None, "start": 1, "end": 2}], "item 0, a dict,"),
        ([{"text": "two", "start": 1, "end": 2, "words": ["two"]}], "item 0, a dict,"),
        ([Word("one", 0, 1)], "item 0, a Word,"),
    ],
)
def test_what_has_no_segments_is_named(write: Any, timed: Any, what: str) -> None:
    # When something else is written, then the error says what it is, and what to give
    with pytest.raises(GraniteError, match=f"^{what} .*: give one Transcript, or .*segments"):
        write(timed)
