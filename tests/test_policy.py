"""Whether a text is believed: one decision for each attempt."""

from typing import Any

import numpy as np
import pytest

from granite_jax.models.layers import ctc
from granite_jax.options import TranscribeOptions
from granite_jax.recognition.policy import ACCEPT, Accept, Again, Attempt, Decision, Split, decide

SPOKEN = "the quick brown fox jumps over the lazy dog and runs into the dark wood"
LOOP = "kai " * 9
FIRST, LAST = Attempt(can_split=True), Attempt(splits=2)


def decided(
    text: str, attempt: Attempt, *, boosted: tuple[str, ...] = (), stopped: bool = False, **fields: Any
) -> Decision:
    labels = np.repeat(np.array(ctc.to_labels(SPOKEN), np.int32), 4)
    labels[1::4] = ctc.BLANK
    options = TranscribeOptions(**fields)
    return decide(options, attempt, text, SPOKEN, labels, boosted=boosted, stopped=stopped)


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        (SPOKEN, ACCEPT, None),
        (LOOP, Split(), "loop"),
        ("the dark wood", Split, "hole"),
        (SPOKEN + " and on" + " again and again it goes" * 9, Split(), "loop"),
        (
            "so much text that is not there at all " + "abcdefgh ijklmn opqrst uvwxyz " * 3 + SPOKEN[::-1] * 3,
            None,
            "invention",
        ),
    ],
)
def test_a_text_is_accepted_split_or_replaced(text: str, first: Any, last: str | None) -> None:
    # Given a text, when it may be split, then what is wrong with it is decoded again; at the end it is replaced
    decision = decided(text, FIRST)
    if first is None:
        assert isinstance(decision, Accept) and decision.finding and decision.finding.problem == last
    elif isinstance(first, type):
        assert isinstance(decision, first)
    else:
        assert decision == first
    final = decided(text, LAST)
    assert isinstance(final, Accept) and (final.finding and final.finding.problem) == last


def test_boosts_that_make_a_text_repeat_go_first() -> None:
    # Given a keyword that repeats, when boosts may be at fault, then they are left out; without them, it is a loop
    assert decided(LOOP, FIRST, boosted=("kai",)) == Again(boosts=False)
    assert decided(LOOP, FIRST, boosted=("kai",), guards=False) == Again(boosts=False)
    assert decided(LOOP, Attempt(boosts=False, can_split=True)) == Split()


def test_what_was_asked_for_is_not_doubted() -> None:
    # Given no guards, a prompt of one's own, or a limit that was asked for, then a text is as it is
    assert decided(LOOP, FIRST, guards=False) == ACCEPT
    assert decided(LOOP, FIRST, prompt="sing", allow_custom_prompt=True) == ACCEPT
    assert decided("the", FIRST, stopped=True, max_new_tokens=1) == ACCEPT
    assert decided(SPOKEN, FIRST, stopped=True) == Split()


def test_attempts_are_counted() -> None:
    assert [attempt.number for attempt in (FIRST, Attempt(boosts=False), LAST)] == [0, 1, 2]
