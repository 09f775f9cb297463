"""Text as CTC labels, and the words of frame labels."""

import numpy as np
import pytest

from granite_jax.models.layers import ctc
from granite_jax.models.spelling import frame_words, spell


def written(labels: list[int]) -> str:
    """The labels as characters, `*` for wildcards."""
    return "".join("*" if label < 0 else ctc.label_character(label) for label in labels)


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("", ""),
        ("It's 25 euros.", "it's ** euros"),
        (" Müller-Ős_x \n", "müller os x"),
        ("e\u0301te\u0301 Straße \uff21\uff22", "été straße ab"),
        ("O\u2019Neil 'hello' dogs' rock 'n' roll", "o'neil 'hello' dogs' rock 'n' roll"),
        ("とよた ｶﾞ コーヒー 東京", "トヨタ ガ コーヒー **"),
        ("R&D 9% §1 a#b@c 5‰", "r*d ** ** a*b*c **"),
        ("and/or a*b (x) «y» …", "andor ab x y"),
        ("Łódź cœur", "*ódz c*ur"),
        # Modifiers are silent, though as compatibility characters they have a space in them.
        ("don\u00b4t a^b 👍🏽", "dont ab *"),
    ],
)
def test_a_text_is_spelled_as_the_head_writes(text: str, spelled: str) -> None:
    assert written(spell(text)) == spelled


def test_labels_beyond_the_head_are_wildcards() -> None:
    assert written(spell("aトé", 256)) == "a*é"
    assert written(spell("aé", 200)) == "ae"


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([], []),
        ([0] * 7, []),
        ([97, 97, 0, 97, 32, 32, 98], [("aa", 0, 4), ("b", 6, 7)]),
        ([32, 0, 97, 98, 98, 0, 0, 32, 0], [("ab", 2, 5)]),
        # A no-break space separates, too; a label without a character is none of a word's.
        ([97, 160, 98, 3], [("a", 0, 1), ("b", 2, 3)]),
        ([97, 3, 97], [("aa", 0, 3)]),
    ],
)
def test_words_of_frame_labels_have_their_frames(labels: list[int], words: list[tuple[str, int, int]]) -> None:
    assert frame_words(np.array(labels, np.int32)) == words
