"""The words of a text, and when each was spoken: text -> words -> CTC labels -> alignment -> times.

text     "It's 25 euros."                   The CTC head writes lower case without punctuation.
words    It's    25     euros.
labels   i t ' s _ * _ e u r o s            `_` the space, `*` a wildcard, which takes the frames of "twenty five"
"""

import itertools
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from granite_jax.models.layers import ctc
from granite_jax.models.layers.ctc import SPACE
from granite_jax.models.layers.ctc_alignment import WILDCARD, align
from granite_jax.models.spelling import is_silent, spell
from granite_jax.results import Word

_KANA_AND_HAN = re.compile(
    "[\u3005-\u3007\u3021-\u3029\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff]"
)
# Over the kinds of characters: a character of an Asian script with its punctuation, a word, punctuation alone.
_UNIT = re.compile(r"[.(]*k\.*|[.(]*a[a.(]*(?<!\()|[.(]+")
_QUOTE = re.compile(r"(?<![^\W\d_])['\u2019]|['\u2019](?![^\W\d_])")  # an apostrophe that is not between letters
_ALIGN = jax.jit(align)
_FRAMES, _LABELS = 256, 64  # shapes that are compiled for are multiples of these


class TextWord(NamedTuple):
    """A word of a text.

    Fields:
      text: as written, with letter case and punctuation: the text's characters from `start` to `end`.
      start, end: half-open interval of the text's characters.
      labels: CTC labels of what is spoken of it, or `WILDCARD`; never empty.
    """

    text: str
    start: int
    end: int
    labels: tuple[int, ...]


def split_words(text: str) -> list[TextWord]:
    """Splits a text into its words.

    Words are separated by whitespace; each character of Han, Hiragana and Katakana is a word by itself. Punctuation
    belongs to the word before it, that which opens something and that at the beginning to the word after it. Every
    character other than whitespace belongs to a word.
    """
    kinds = "".join(map(_kind, text))
    spans: list[tuple[int, int]] = []
    begin = None  # of punctuation that waits for the word after it
    for match in _UNIT.finditer(kinds):
        start, end = match.span()
        if {"a", "k"} & set(match.group()):
            spans.append((start if begin is None else begin, end))
            begin = None
        elif spans and "." in match.group() and begin is None:
            spans[-1] = (spans[-1][0], end)
        elif begin is None:
            begin = start
    if begin is not None:
        start = spans.pop()[0] if spans else begin
        spans.append((start, len(text.rstrip())))
    return [TextWord(text[start:end], start, end, _labels(text[start:end])) for start, end in spans]


def _kind(character: str) -> str:
    """One of " " (whitespace), "k" (Kana and Han), "(" and "." (silent: opening punctuation, other), "a" (the rest)."""
    if character in "\uff9e\uff9f":  # marks of halfwidth Katakana
        return "."
    if character.isspace():
        return " "
    if _KANA_AND_HAN.match(character):
        return "k"
    if unicodedata.category(character) in ("Ps", "Pi"):
        return "("
    return "." if is_silent(character) else "a"


def _labels(word: str) -> tuple[int, ...]:
    """The labels of a word, with one wildcard for several characters in succession."""
    labels = spell(_QUOTE.sub("", word))
    merged = [label for i, label in enumerate(labels) if label != WILDCARD or labels[i - 1 : i] != [WILDCARD]]
    return tuple(merged) or (WILDCARD,)


def label_sequence(words: Sequence[TextWord]) -> tuple[list[int], list[tuple[int, int]]]:
    """The labels of a text, with a space between words that whitespace separates, and each word's interval of them."""
    labels: list[int] = []
    spans = []
    for position, word in enumerate(words):
        if position and word.start > words[position - 1].end:
            labels.append(SPACE)
        spans.append((len(labels), len(labels) + len(word.labels)))
        labels.extend(word.labels)
    return labels, spans


def word_times(
    words: Sequence[TextWord],
    states: Int[np.ndarray, "t"],
    log_probs: Float[np.ndarray, "t"],
    *,
    duration: float,
    start: float = 0.0,
    offsets: tuple[float, float] = (0.0, 0.0),
) -> tuple[Word, ...]:
    """Times of the words of a text, from the alignment of their `label_sequence`.

    A word begins with its first label's first frame. It ends halfway between its last label and the label after it, but
    at most half a letter after its last label, so that it does not take a pause; a letter is the mean distance of the
    word's labels. Of a dozen rules this had the smallest errors once offsets are added: a mean of 13 ms for starts and
    for ends on tuning sentences, against 41 and 24 ms with the middle of the blanks.

    Starts ascend, words do not overlap, and each takes at least a frame, or less if there are more words than frames.
    If the text cannot be aligned, its words share the duration evenly, with a confidence of 0.

    Args:
      states, log_probs: a row of `ctc_alignment.align`; states of -1 at the end are padding.
      duration: seconds of the audio that was aligned; times are within it. Taken as a frame if it is 0.
      start: seconds to add to all times: where that audio begins in the recording.
      offsets: seconds to add to starts and to ends, which correct a checkpoint's constant delays;
        `benchmarks/word_times.py --fit` measures them.

    The confidence is the mean probability of a word's labels at their frames, None if it has wildcards alone.
    """
    if not words:
        return ()
    labels, spans = label_sequence(words)
    states = np.asarray(states)[: int(np.sum(np.asarray(states) >= 0))]
    duration = max(duration, ctc.FRAME_SECONDS)
    if not len(states):
        edges = start + np.linspace(0.0, duration, len(words) + 1)
        return tuple(
            Word(word.text, float(a), float(b), 0.0) for word, a, b in zip(words, edges, edges[1:], strict=False)
        )
    begins, ends = _label_frames(labels, states)
    after = np.append(begins[1:], len(states))  # where the next label begins
    is_label = np.array(labels) != WILDCARD
    steps = np.where(is_label[1:] & is_label[:-1], np.diff(begins), np.nan)
    letters = [steps[first : last - 1] for first, last in spans]
    letters = np.array([np.nan if np.isnan(each).all() else np.nanmean(each) for each in letters])
    letters = np.where(np.isnan(letters), 0.0 if np.isnan(letters).all() else np.nanmedian(letters), letters)
    firsts, lasts = (np.array([span[side] for span in spans]) for side in (0, 1))
    extensions = np.minimum(after[lasts - 1] - ends[lasts - 1], letters) / 2
    intervals = _disjoint(
        begins[firsts] * ctc.FRAME_SECONDS + offsets[0],
        (ends[lasts - 1] + extensions) * ctc.FRAME_SECONDS + offsets[1],
        duration,
    )
    probabilities = np.exp(np.asarray(log_probs, np.float64)[: len(states)])
    label_at = np.where(states % 2 == 1, states // 2, -1)
    timed = []
    for word, (first, last), (begin, end) in zip(words, spans, intervals, strict=True):
        inside = (label_at >= first) & (label_at < last) & is_label[np.maximum(label_at, 0)]
        confidence = float(probabilities[inside].mean()) if inside.any() else None
        timed.append(Word(word.text, start + float(begin), start + float(end), confidence))
    return tuple(timed)


def locate_words(
    logits: Float[np.ndarray, "t c"],
    text: str,
    *,
    duration: float | None = None,
    start: float = 0.0,
    offsets: tuple[float, float] = (0.0, 0.0),
) -> tuple[Word, ...]:
    """Times of the words of one utterance's text, from its CTC logits; the arguments are those of `word_times`."""
    words = split_words(text)
    labels, _ = label_sequence(words)
    frames = len(logits)
    padded = np.zeros((1, -(-max(frames, 1) // _FRAMES) * _FRAMES, logits.shape[1]), np.float32)
    padded[0, :frames] = logits
    row = np.zeros((1, -(-max(len(labels), 1) // _LABELS) * _LABELS), np.int32)
    row[0, : len(labels)] = labels
    states, log_probs = _ALIGN(padded, np.array([frames], np.int32), row, np.array([len(labels)], np.int32))
    duration = frames * ctc.FRAME_SECONDS if duration is None else duration
    return word_times(
        words, np.asarray(states)[0], np.asarray(log_probs)[0], duration=duration, start=start, offsets=offsets
    )


def _label_frames(labels: Sequence[int], states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first frame of each label, and the frame after its last, float64; wildcards in succession share theirs."""
    odd = 2 * np.arange(len(labels)) + 1
    begins, ends = (np.searchsorted(states, odd, side).astype(np.float64) for side in ("left", "right"))
    position = 0
    for label, run in itertools.groupby(labels):
        count = len(list(run))
        if label == WILDCARD and count > 1:
            edges = np.linspace(begins[position], ends[position + count - 1], count + 1)
            begins[position : position + count], ends[position : position + count] = edges[:-1], edges[1:]
        position += count
    return begins, ends


def _disjoint(starts: np.ndarray, ends: np.ndarray, duration: float) -> np.ndarray:
    """Intervals `[w, 2]` within 0 to `duration`, each after the one before it, from times that may violate that."""
    count = len(starts)
    least = min(ctc.FRAME_SECONDS, duration / count)
    steps = least * np.arange(count)
    starts = np.maximum.accumulate(np.maximum(starts, 0.0) - steps)  # at least `least` apart
    starts = np.minimum(starts, duration - count * least) + steps
    limits = np.append(starts[1:], duration)
    return np.stack([starts, np.minimum(np.maximum(ends, starts + least), limits)], axis=1)
