"""Text as the CTC head writes it, and the words that it writes.

text      "It's 25 Müller-Ős."
spell      i t ' s _ * * _ m ü l l e r _ o s        `_` the space, `*` a wildcard; what is silent is left out
"""

import itertools
import unicodedata
from typing import NamedTuple

import numpy as np

from granite_jax.models.layers import ctc
from granite_jax.models.layers.ctc import SPACE
from granite_jax.models.layers.ctc_alignment import WILDCARD

KATAKANA = {hiragana: hiragana + 0x60 for hiragana in range(0x3041, 0x3097)}
"""For `str.translate`: the head writes hiragana as katakana."""
_SPOKEN_PUNCTUATION = "&%@#§‰"


def is_silent(character: str) -> bool:
    """Whether a character that is no space is not spoken: punctuation, except some, marks and modifiers."""
    category = unicodedata.category(character)
    return (
        category[0] in "MC"
        or category == "Sk"
        or (category[0] == "P" and unicodedata.normalize("NFKC", character) not in _SPOKEN_PUNCTUATION)
    )


def spell(text: str, num_labels: int = ctc.NUM_LABELS) -> list[int]:
    """The CTC labels of a text: one for each character that is spoken, and `SPACE` for whitespace and dashes.

    Letters are in lower case and of normal width, hiragana are katakana, and letters without a label have that of their
    base letter. Characters that are spoken and have no label, such as digits, symbols and other scripts, are
    `WILDCARD`. Apostrophes have a label, other punctuation has none.

    Args:
      num_labels: size of the head; labels beyond it are wildcards.
    """
    # Silent modifiers first: NFKC makes spaces of many.
    text = "".join("." if unicodedata.category(character) == "Sk" else character for character in text)
    text = unicodedata.normalize("NFKC", text.replace("\u2019", "'")).lower().translate(KATAKANA)
    labels: list[int] = []
    for character in text:
        if character.isspace() or unicodedata.category(character) in ("Pd", "Pc"):
            labels += [SPACE] if labels and labels[-1] != SPACE else []
        elif character == "'" or not is_silent(character):
            labels.append(_label(character, num_labels))
    return labels[: len(labels) - (labels[-1:] == [SPACE])]


def _label(character: str, num_labels: int) -> int:
    for letter in (character, unicodedata.normalize("NFD", character)[0]):
        label = ctc.label_of(letter)
        if label is not None and label < num_labels and (letter.isalpha() or letter == "'"):
            return label
    return WILDCARD


class FrameWord(NamedTuple):
    """A word of frame labels: its text, the first frame of its first character, the frame after its last one."""

    text: str
    start: int
    end: int


def frame_words(labels: np.ndarray) -> list[FrameWord]:
    """The words that the best labels of an utterance's frames, int `[t]`, write between spaces."""
    words: list[FrameWord] = []
    letters: list[FrameWord] = []
    end = 0
    for label, run in itertools.groupby([*labels.tolist(), SPACE]):
        start, end = end, end + len(list(run))
        character = ctc.label_character(label)
        if character.strip():
            letters.append(FrameWord(character, start, end))
        elif character and letters:
            words.append(FrameWord("".join(letter.text for letter in letters), letters[0].start, letters[-1].end))
            letters = []
    return words
