"""The text of segments as atoms with times, which lines and cues never divide."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from granite_jax.formats.characters import NO_BREAK_SPACES, NOT_FIRST, breaks_anywhere, clean, text_width, unbroken
from granite_jax.results import Segment

PAUSE_MS = 500
"""Pause between words that always ends a cue."""


class Atom(NamedTuple):
    """A text that is never divided."""

    text: str
    start: int  # milliseconds
    end: int
    spaced: bool  # whether a space separates it from the one before
    width: int
    continues: bool = False  # whether it is the rest of a word that is longer than a line
    opens: bool = False  # whether it begins a segment
    label: bool = False  # whether it is of a speaker's name


class Run(NamedTuple):
    """Atoms of one speaker without a pause."""

    atoms: list[Atom]
    speaker: str | None


def to_milliseconds(seconds: float, latest: int) -> int:
    """The time in milliseconds, not before `latest`, which also replaces what is not finite."""
    return max(latest, round(seconds * 1000)) if math.isfinite(seconds) else latest


def runs_of(segments: Iterable[Segment], label_speakers: bool) -> Iterator[Run]:
    """The runs of segments, in order; with `label_speakers`, each turn of a speaker begins with the name."""
    atoms: list[Atom] = []
    speaker = labeled = None
    latest = 0
    for segment in segments:
        name = clean(segment.speaker or "") or None
        opens = True
        for text, start, end, spaced in _pieces(segment, latest):
            for atom in _atoms(text, start, end, spaced):
                if atoms and (name != speaker or atom.start - atoms[-1].end >= PAUSE_MS):
                    yield Run(atoms, speaker)
                    atoms = []
                if not atoms and label_speakers and name is not None and name != labeled:
                    pieces = _atoms(f"{name}:", atom.start, atom.start, False)
                    atoms = [piece._replace(label=True) for piece in pieces]
                    atom = atom._replace(spaced=True)
                elif opens and atoms:
                    joined = breaks_anywhere(atoms[-1].text[-1]) and breaks_anywhere(atom.text)
                    atom = atom._replace(spaced=not joined, opens=True)
                speaker = labeled = name
                atoms.append(atom)
                latest, opens = atom.start, False
    if atoms:
        yield Run(atoms, speaker)


def _pieces(segment: Segment, latest: int) -> Iterator[tuple[str, int, int, bool]]:
    """Texts of a segment with their times, and whether a space is before each: its words, or all of its text."""
    text = clean(segment.text)
    if not text:
        return
    start = to_milliseconds(segment.start, latest)
    words = _aligned(text, [clean(word.text) for word in segment.words])
    if words is None:
        yield text, start, to_milliseconds(segment.end, start), True
        return
    latest = start if not math.isfinite(segment.words[0].start) else latest
    for (word, spaced), timed in zip(words, segment.words, strict=True):
        latest = to_milliseconds(timed.start, latest)
        if word:
            yield word, latest, to_milliseconds(timed.end, latest), spaced


def _aligned(text: str, words: Sequence[str]) -> list[tuple[str, bool]] | None:
    """Words with what the text has between them, and whether a space is before each. None: they are not the text's."""
    if not any(words):
        return None
    found_at, cursor = [], 0
    for word in words:
        found = text.find(word, cursor)
        if found < 0 or any(char.isalnum() for char in text[cursor:found]):
            return None
        found_at.append(found)
        cursor = found + len(word)
    if any(char.isalnum() for char in text[cursor:]):
        return None
    result = []
    begin, spaced = 0, True
    for found, word, limit in zip(found_at, words, [*found_at[1:], len(text)], strict=True):
        stop = found + len(word)
        # Punctuation that follows belongs to the word; anything else, such as an opening quote, to the next.
        between = itertools.takewhile(lambda char: char == " " or char in NOT_FIRST, text[stop:limit])
        stop = limit if limit == len(text) else stop + len("".join(between).rstrip(f" {NO_BREAK_SPACES}"))
        result.append((text[begin:stop], spaced))
        spaced = text[stop : stop + 1].isspace()
        begin = stop + spaced
    return result


def _atoms(text: str, start: int, end: int, spaced: bool) -> list[Atom]:
    """The parts of a text between which lines can break, which share its time by their widths."""
    parts: list[tuple[str, bool, bool]] = []
    for index, token in enumerate(text.split(" ")):
        for number, (part, continues) in enumerate(unbroken(token)):
            parts.append((part, number == 0 and (index > 0 or spaced), continues))
    widths = [text_width(part) for part, *_ in parts]
    total = max(1, sum(widths))
    atoms, done = [], 0
    for (part, is_spaced, continues), width in zip(parts, widths, strict=True):
        begin = start + (end - start) * done // total
        done += width
        atoms.append(Atom(part, begin, start + (end - start) * done // total, is_spaced, width, continues))
    return atoms
