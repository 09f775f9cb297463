"""Pictures: what is drawn is what the data say, in the units that the axes name."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

import granite_jax as gj
from granite_jax.batch import Progress
from granite_jax.plotting import figures
from granite_jax.plotting.figures import Passage
from granite_jax.results import Word
from granite_jax.transcriber import Emissions

# A token a letter.
LETTERS = cast(Any, SimpleNamespace(pieces=lambda ids: [chr(i) for i in ids]))


def ids(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


def result(draft: str, text: str, *accepted: tuple[int, int, int], **fields: Any) -> gj.Transcript:
    stats = {"llm_passes": 2, "draft_tokens": len(draft), "accepted_tokens": sum(n for *_, n in accepted)}
    return gj.Transcript(
        "a.wav", text, ids(text), 1.0, 0.5, draft, stats | {"finish": "end"}, ids(draft), accepted, **fields
    )


def frames(labels: str) -> np.ndarray:
    """CTC logits that are sure of these characters, `_` for the blank."""
    return 20.0 * np.eye(348, dtype=np.float32)[[0 if c == "_" else ord(c) for c in labels]]


def texts(figure: Figure, tmp_path: Path) -> set[str]:
    """What is written in a picture, read from its file."""
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(tmp_path / "picture.svg")
    return set(re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "picture.svg").read_text()))


# Sound.


@pytest.mark.parametrize("hertz", figures._HERTZ)
def test_a_tone_is_at_its_frequency(hertz: int) -> None:
    # Given a second with a tone from 0.5 to 0.9 s
    time = jnp.arange(16_000) / 16_000
    tone = jnp.where((time >= 0.5) & (time < 0.9), jnp.sin(2 * jnp.pi * hertz * time), 0.0)
    features = np.asarray(gj.log_mel(tone[None], jnp.array([16_000])))[0]
    # When drawn
    figure = figures.log_mel(features)
    ax, bar = figure.axes
    (image,) = ax.images
    picture = np.asarray(image.get_array())
    # Then the loudest band is the one that the axis names so, at 0 dB, and silence is at -80 dB
    place = picture[:, 75].argmax() + 0.5
    tick = ax.get_yticks()[figures._HERTZ.index(hertz)]
    assert abs(place - tick) <= 1.0
    assert picture.max() == 0.0
    assert picture[:, 20] == pytest.approx(-80.0)
    # And the axes are in s, Hz and dB
    assert ax.get_xlim() == (0.0, 1.0)
    assert ("(s)" in ax.get_xlabel(), "(Hz)" in ax.get_ylabel(), "(dB" in bar.get_ylabel()) == (True, True, True)


def test_posteriors_have_a_row_for_what_is_heard() -> None:
    # Given five frames that say "b a"
    figure = figures.ctc_posteriors(frames("_bb a"))
    ax, bar = figure.axes
    # Then the rows are the blank and the three characters, with probabilities
    assert [label.get_text() for label in ax.get_yticklabels()] == ["blank", "space", "a", "b"]
    picture = np.asarray(ax.images[0].get_array())
    assert picture.argmax(axis=0).tolist() == [0, 3, 3, 1, 2]
    assert picture.max(axis=0) == pytest.approx(1.0, abs=1e-3)
    assert (ax.get_xlim(), bar.get_ylabel()) == ((0.0, pytest.approx(0.1)), "probability")


def test_words_are_at_their_times(tmp_path: Path) -> None:
    # Given two words, one of which would be a formula to matplotlib
    words = [Word("a", 0.1, 0.3), Word(r"$\frac$", 0.5, 0.8)]
    figure = figures.alignment(words)
    (ax,) = figure.axes
    assert [(p.get_x(), p.get_x() + p.get_width()) for p in ax.patches] == [(0.1, 0.3), (0.5, 0.8)]
    assert {"a", r"$\frac$"} <= texts(figure, tmp_path)


# Draft and text.


@pytest.mark.parametrize(
    ("transcript", "expected"),
    [
        (result("abc", "abc", (0, 0, 3)), [("accepted", "abc", "abc")]),
        # The token that a pass writes by itself, as in the draft or not.
        (result("abcde", "abxde", (0, 0, 2), (4, 4, 1)),
         [("accepted", "ab", "ab"), ("corrected", "c", "x"), ("same", "d", "d"), ("accepted", "e", "e")]),
        (result("abc", "ab", (0, 0, 2)), [("accepted", "ab", "ab"), ("corrected", "c", "")]),
        (result("ac", "abc", (0, 0, 1), (2, 1, 1)),
         [("accepted", "a", "a"), ("corrected", "", "b"), ("accepted", "c", "c")]),
        # The loop went back in the draft.
        (result("abc", "abcxbc", (0, 0, 3), (4, 1, 2)),
         [("accepted", "abc", "abc"), ("corrected", "", "x"), ("accepted", "bc", "bc")]),
        (result("", "abc"), [("written", "", "abc")]),
    ],
)  # fmt: skip
def test_draft_and_text_are_compared_by_what_was_accepted(transcript: gj.Transcript, expected: list) -> None:
    passages = figures.compare(transcript, LETTERS)
    assert passages == [Passage(*passage) for passage in expected]
    assert "".join(passage.text for passage in passages) == transcript.text


def test_what_a_limit_cut_off_is_not_called_rejected() -> None:
    transcript = result("abcd", "ab", (0, 0, 2))
    transcript.stats["finish"] = "length"
    assert figures.compare(transcript, LETTERS) == [Passage("accepted", "ab", "ab")]


def test_a_comparison_shows_all_words_and_its_own_kinds(tmp_path: Path) -> None:
    # Given a text of several lines, with one correction
    said = "please call sam at noon " * 12
    transcript = result(said, said.replace("sam", "pam", 1), (0, 0, 12), (13, 13, len(said) - 13))
    # When drawn, then all words are there, in draft and text, and of the kinds those that occur
    found = texts(figures.draft(transcript, LETTERS), tmp_path)
    assert {"please", "s", "p", "am", "noon", "draft", "text"} <= found
    assert {"accepted from the draft", "rejected", "correction"} <= found
    assert "the language model's own, as in the draft" not in found
    assert any(text.startswith("2 passes of the language model for 288 tokens; 287 of 288") for text in found)


def test_lines_of_a_comparison_are_no_wider_than_asked() -> None:
    # Given a long agreement and a correction, when broken into lines, then none is too wide and nothing is lost
    passages = [
        Passage("accepted", " ab" * 30, " ab" * 30),
        Passage("corrected", " x", " yz"),
        *[Passage("same", "q", "q")] * 9,
        Passage("written", "", " w" * 30 + " "),
    ]
    lines = figures._lines(passages, 20)
    assert all(column + len(part.text) <= 20 for line in lines for column, part in line)
    assert (
        "".join(part.text for line in lines for _, part in line).replace(" ", "")
        == "ab" * 30 + "yz" + "q" * 9 + "w" * 30
    )


def test_lines_end_between_words() -> None:
    # Given a word of two tokens, one accepted and one not, where the line is full
    passages = [Passage("accepted", " more about t", " more about t"), Passage("corrected", "icks", "ax")]
    lines = [[part.text for _, part in line] for line in figures._lines(passages, 12)]
    assert lines == [[" more", " about"], ["t", "ax"]]


# Whole pictures.


@pytest.mark.parametrize("seconds", [2, 20])
def test_an_overview(tmp_path: Path, seconds: int) -> None:
    # Given an utterance that says "hi" at its end, and a file name that is no formula
    labels = "_" * (50 * seconds - 3) + "hi_"
    emissions = Emissions(np.zeros((50 * seconds, 160), np.float32), frames(labels))
    transcript = gj.Transcript(
        "$a_$.wav", "hi", ids("hi"), float(seconds), 0.5, "hi", {"finish": "end"}, ids("hi"), ((0, 0, 2),)
    )
    # When drawn
    figure = figures.overview(emissions, transcript, LETTERS)
    # Then all of its time is there, in rows, and the word where it was spoken
    panels = [ax for ax in figure.axes if ax.get_ylabel() == "words"]
    assert panels[0].get_xlim()[0] == 0.0
    assert panels[-1].get_xlim()[1] == pytest.approx(max(seconds, 8 * len(panels) if len(panels) > 1 else 0))
    word = panels[-1].patches[0]
    assert word.get_x() == pytest.approx(seconds - 0.06)
    assert {"hi", f"$a_$.wav: {seconds}.0 s"} <= texts(figure, tmp_path)


def test_an_error_has_no_picture() -> None:
    with pytest.raises(gj.GraniteError, match="a.wav: no such file"):
        figures.overview(Emissions(*np.zeros((2, 1, 1))), gj.Transcript("a.wav", error="a.wav: no such file"), LETTERS)


def test_a_text_that_was_not_spoken_is_not_aligned() -> None:
    # Given characters that the CTC head does not know, or more than there are frames, then the next text is taken
    assert [word.text for word in figures._words(frames("_a_"), "你好", "aaaaaa", "a")] == ["a"]
    assert figures._words(frames("_a_"), "你好") == ()


def test_throughput_is_drawn_from_a_jobs_reports(tmp_path: Path) -> None:
    # Given two jobs
    reports = [Progress(done=4, seconds=1.0), Progress(done=8, seconds=2.0)]
    summaries = [cast(Any, SimpleNamespace(rtfx=rtfx)) for rtfx in (10.0, 0.0)]
    figure = figures.throughput({"one": (summaries[0], reports), "none": (summaries[1], [])})
    # Then the lines are the utterances over time, and the bars RTFx
    left, right = figure.axes
    assert np.asarray(left.lines[0].get_xydata()).tolist() == [[0, 0], [1, 4], [2, 8]]
    assert [bar.get_width() for bar in right.patches] == [10.0, 0.0]
    assert {"one", "none", "utterances transcribed", "time (s)", "RTFx (seconds of audio a second)"} <= texts(
        figure, tmp_path
    )


def test_drawing_goes_into_axes_of_the_callers() -> None:
    # Given axes, when drawn into, then nothing else is made
    figure = Figure()
    ax = figure.add_subplot()
    assert figures.alignment([], ax=ax) is figure
    assert figures.draft(result("a", "a", (0, 0, 1)), LETTERS, ax=ax) is figure
    assert figure.axes == [ax]
