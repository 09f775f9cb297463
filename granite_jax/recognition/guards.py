"""Notices text that the audio does not support, by comparing it with what the encoder's CTC head heard.

    problem       noticed by                                             what is done about it
    silence       no frame in which the CTC head expects a character     no text; the language model does not run
    loop          something repeats, and the CTC text does not repeat    decode again in smaller pieces, or else the CTC
                  it                                                      text; translations are cut
    length        the text ended at its budget of tokens                 decode again in smaller pieces
    hole          CTC words of more than 1.5 s that the text leaves out  decode again, from there on
    invention     a text far longer than the CTC text                    the CTC text

All of it is found on the host in one segment's results, independently of drafts. `policy.decide` says what
follows from it.
"""

import dataclasses
import difflib
import re
import unicodedata
from typing import Literal

import numpy as np

from granite_jax.models.layers import ctc
from granite_jax.models.spelling import frame_words
from granite_jax.recognition.repetition import find_loop

Problem = Literal["loop", "length", "hole", "invention"]

MAX_SPEECH_FRAMES = 2
"""Frames of silence, hum or noise in which the CTC head may expect a character."""
_HOLE_SECONDS, _HOLE_WORDS = 1.5, 4
_DIGIT = re.compile(r"\d")


@dataclasses.dataclass(frozen=True)
class Finding:
    """What is wrong with a text.

    Fields:
      problem: the first that was found.
      seconds: where a hole begins.
      text: what to write if the segment is not decoded again.
    """

    problem: Problem
    text: str
    seconds: float | None = None


def is_silent(ctc_text: str, speech_frames: int) -> bool:
    """Whether nothing was said.

    Args:
      speech_frames: frames in which the CTC head gives more than a fifth of the probability to characters.
    """
    return not ctc_text and speech_frames <= MAX_SPEECH_FRAMES


def check_text(
    text: str, labels: np.ndarray, ctc_text: str, *, stopped: bool, is_transcript: bool, is_raw: bool
) -> Finding | None:
    """Looks for problems in the text of a segment.

    Args:
      labels: the best CTC label of every frame, int `[t]`.
      ctc_text: their text.
      stopped: whether the text ended at its default budget.
      is_transcript: whether the text should have the words of the CTC text.
      is_raw: whether it should be written like the CTC text, too.
    """
    if (loop := find_loop(text, ctc_text, is_transcript=is_transcript)) is not None:
        return Finding("loop", ctc_text if is_transcript and ctc_text else text[:loop].rstrip())
    if stopped:
        return Finding("length", text)
    if not is_transcript:
        return None
    if _letters(text) > 3 * _letters(ctc_text) + 12:
        return Finding("invention", ctc_text)
    hole = _hole(text, labels) if _spells(text) else None
    return None if hole is None else Finding("hole", ctc_text if is_raw else text, hole)


def _letters(text: str) -> int:
    return sum(map(str.isalnum, text))


def _spells(text: str) -> bool:
    """Whether the CTC head could have written the text's words: there are no digits or kanji among them."""
    letters = filter(str.isalnum, unicodedata.normalize("NFC", text).lower())
    return all(ctc.label_of(letter) is not None for letter in letters) and not _DIGIT.search(text)


def _hole(text: str, labels: np.ndarray) -> float | None:
    """The second at which the longest passage of CTC words begins that the text leaves out, if there is one."""
    spoken = frame_words(labels)
    if len(spoken) < _HOLE_WORDS:
        return None
    words, heard = re.findall(r"\w+", text.lower()), [re.sub(r"\W", "", word) for word, _, _ in spoken]
    begin, longest = None, _HOLE_SECONDS
    for _, first, last, start, end in difflib.SequenceMatcher(None, heard, words, autojunk=False).get_opcodes():
        left_out = (last - first) - (end - start)
        if left_out >= _HOLE_WORDS:
            frames = (spoken[last - 1][2] - spoken[first][1]) * left_out / (last - first)
            if frames * ctc.FRAME_SECONDS > longest:
                begin, longest = spoken[first][1] * ctc.FRAME_SECONDS, frames * ctc.FRAME_SECONDS
    return begin
