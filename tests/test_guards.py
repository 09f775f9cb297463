"""What is noticed about a text by comparing it with what the CTC head heard."""

import numpy as np
import pytest

from granite_jax.models.layers import ctc
from granite_jax.recognition.guards import check_text, is_silent
from granite_jax.recognition.repetition import find_loop


def labels_of(text: str, frames_per_label: int = 4) -> np.ndarray:
    """Frame labels that spell a text."""
    labels: list[int] = []
    for label in ctc.to_labels(text):
        labels += [label, *[ctc.BLANK] * (frames_per_label - 1)]
    return np.array(labels, np.int32)


def problem(
    text: str, ctc_text: str, *, stopped: bool = False, transcript: bool = True, raw: bool = True
) -> str | None:
    finding = check_text(text, labels_of(ctc_text), ctc_text, stopped=stopped, is_transcript=transcript, is_raw=raw)
    return None if finding is None else finding.problem


SPOKEN = "the quick brown fox jumps over the lazy dog and runs into the dark wood"


@pytest.mark.parametrize(
    ("text", "ctc_text", "expected"),
    [
        (SPOKEN, SPOKEN, None),
        ("The quick, brown fox jumps over the lazy dog -- and runs into the dark wood.", SPOKEN, None),
        ("the quick brown fox jumped over a lazy dock and runs in the dark wood", SPOKEN, None),
        ("the quick brown fox " * 6, SPOKEN, "loop"),
        ("the quick brown fox " * 6, "the quick brown fox " * 6, None),
        ("no no no no no", "no no no no no", None),
        ("so" + "o" * 119, "so", "loop"),
        ("call 1000000000", "call one billion", None),
        ("はい、はい、はい、はい", "ハイハイハイハイ", None),
        ("毎日毎日毎日毎日", "マイニチマイニチマイニチマイニチ", None),
        ("call " + "0" * 40, "call zero", "loop"),
        ("the quick brown fox", SPOKEN, "hole"),
        ("the dark wood", SPOKEN, "hole"),
        ("", SPOKEN, "hole"),
        ("in 1984", "in the year of nineteen hundred and eighty four", None),  # digits have no labels
        ("a long sentence that nobody has ever spoken here", "a", "invention"),
        ("yes", "", None),
        ("", "", None),
    ],
)
def test_problems_of_a_transcript(text: str, ctc_text: str, expected: str | None) -> None:
    assert problem(text, ctc_text) == expected


def test_a_text_that_stopped_at_its_budget_is_noticed() -> None:
    assert problem(SPOKEN, SPOKEN, stopped=True) == "length"
    assert problem(SPOKEN, SPOKEN, stopped=True, transcript=False) == "length"


def test_translations_are_check_textd_by_repetition_alone() -> None:
    assert problem("der Hund", SPOKEN, transcript=False) is None
    assert problem("der Hund " * 9, SPOKEN, transcript=False) == "loop"
    assert problem("nein " * 9, "no no no no no no no no no", transcript=False) is None


def test_a_hole_begins_where_words_are_left_out() -> None:
    # Given a text without the middle of what was said
    text = "the quick brown fox runs into the dark wood"
    finding = check_text(text, labels_of(SPOKEN), SPOKEN, stopped=False, is_transcript=True, is_raw=False)
    # Then the hole begins at the first word that is missing, and a text with letter case is not replaced
    assert finding is not None and finding.problem == "hole" and finding.text == text
    assert finding.seconds == pytest.approx(SPOKEN.index("jumps") * 4 * ctc.FRAME_SECONDS)


@pytest.mark.parametrize("letter", ["x", "\u0142", "\u6771", "2"])
def test_holes_are_looked_for_if_the_head_has_all_letters(letter: str) -> None:
    # Given a text without the middle of what was said, then that is a hole unless a letter of it is none of the head's
    assert problem(f"the quick brown fo{letter} runs into the dark wood", SPOKEN) == ("hole" if letter == "x" else None)


def test_a_loop_of_a_transcript_becomes_the_ctc_text_and_that_of_a_translation_is_cut() -> None:
    text = "Guten Tag. Der Hund, der Hund, der Hund, der Hund, der Hund"
    finding = check_text(text, labels_of(SPOKEN), SPOKEN, stopped=False, is_transcript=False, is_raw=False)
    assert finding is not None and finding.text == "Guten Tag. Der Hund"
    finding = check_text(text, labels_of(SPOKEN), SPOKEN, stopped=False, is_transcript=True, is_raw=True)
    assert finding is not None and finding.text == SPOKEN


@pytest.mark.parametrize("text", ["", "a", "ab ab ab", "日本語 日本語", "x" * 3, "..." * 20])
def test_short_repetitions_are_no_loops(text: str) -> None:
    assert find_loop(text, "", is_transcript=True) is None


def test_japanese_without_spaces_can_loop() -> None:
    assert find_loop("はい" + "そうです" * 9, "ハイソウデス", is_transcript=True) is not None


def test_silence_needs_the_ctc_head_to_expect_nothing() -> None:
    assert is_silent("", 0) and is_silent("", 2)
    assert not is_silent("", 30)  # unsure: soft speech
    assert not is_silent("a", 0)
