"""Splits the text of segments into cues that can be read."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from granite_jax.formats.atoms import PAUSE_MS, Atom, runs_of
from granite_jax.formats.characters import MAX_WIDTH, text_width
from granite_jax.formats.line_breaks import SENTENCE, break_cost, lines_of
from granite_jax.formats.schema import Timed, segments_of

MAX_LINES = 2
MAX_MS = 7_000
MIN_MS = 833
"""Shortest cue (5/6 s), where the next one leaves that time."""
GAP_MS = 84
"""Shortest gap between two cues: two frames of 24 a second. Gaps below `PAUSE_MS` are closed to this one."""
MAX_SPEED = 20
"""Columns a second that can be read."""
_SLOT_MS = 250  # of cues whose words have no usable times


@dataclasses.dataclass(frozen=True)
class Cue:
    """A text that is shown for a time.

    Fields:
      start, end: seconds, in whole milliseconds; `end` is after `start`.
      lines: one or two lines of text, without markup.
      speaker: who speaks, if the segment says so.
    """

    start: float
    end: float
    lines: tuple[str, ...]
    speaker: str | None = None


def cues(segments: Timed, *, label_speakers: bool = False) -> list[Cue]:
    """Splits segments into cues by the usual conventions for subtitles.

    A cue has at most two lines of 42 columns and lasts at most 7 s. It begins with its first word. It ends with its
    last word or later: it is prolonged into the pause that follows to 5/6 s, and to the time that 20 columns a second
    take. Gaps between cues are at least 84 ms, and those below 0.5 s are closed to that. A pause of 0.5 s or a change
    of speaker always ends a cue. Otherwise cues and lines break at the end of sentences if they can; then after
    punctuation, at shorter pauses, before conjunctions and prepositions (English, French, German, Spanish, Portuguese,
    Italian); and after articles, pronouns, auxiliaries and the like only if nothing else fits.

    Words have their own times; without words, a segment's time is shared among its characters. Text in Chinese
    characters and kana breaks between any two of them but before closing punctuation and small kana. Words longer than
    a line are broken, never within a character and its combining marks. There is no dictionary for languages without
    spaces such as Thai, whose long texts are broken like long words.

    Right-to-left text keeps its logical order. A line that begins with a letter of the other direction than most of its
    cue gets a mark (U+200F or U+200E) in front, because players take the direction from the first letter; explicit
    embeddings and overrides are removed, because a line could end within one.

    Times that go back or are not finite are replaced by the latest time before them. Cues whose words all have the same
    time last 250 ms each, and later ones are delayed as far as necessary.

    Args:
      segments: in order of time, or a `Transcript`, which has them; or either of these as JSON has it. Those without
        text are left out.
      label_speakers: whether the first cue of each speaker's turn begins with "Name: ".

    Raises:
      GraniteError: it is neither a transcript nor segments with a text and times.
    """
    runs = list(runs_of(segments_of(segments), label_speakers))
    spans: list[tuple[int, int, tuple[str, ...], str | None]] = []
    for index, run in enumerate(runs):
        following = runs[index + 1].atoms[0].start if index + 1 < len(runs) else None
        for first, last in _partition(run.atoms, following):
            atoms = run.atoms[first:last]
            spans.append((atoms[0].start, atoms[-1].end, lines_of(atoms), run.speaker))
    least = _SLOT_MS + GAP_MS
    starts = list(itertools.accumulate((start for start, *_ in spans), lambda last, start: max(start, last + least)))
    result = []
    for index, (_, spoken, lines, speaker) in enumerate(spans):
        start = starts[index]
        reading = math.ceil(1000 * sum(map(text_width, lines)) / MAX_SPEED)
        end = min(max(spoken, start + max(MIN_MS, reading)), start + MAX_MS)
        if index + 1 < len(starts) and starts[index + 1] - end < PAUSE_MS:
            end = min(starts[index + 1] - GAP_MS, start + MAX_MS)
        result.append(Cue(start / 1000, end / 1000, lines, speaker))
    return result


def _partition(atoms: Sequence[Atom], following: int | None) -> list[tuple[int, int]]:
    """Splits the atoms of a run into cues, as ranges: the partition of least cost, by dynamic programming.

    Args:
      following: start of the next run in milliseconds, or None.
    """
    count = len(atoms)
    costs = [0.0, *(break_cost(*pair) for pair in itertools.pairwise(atoms)), 0.0]  # of a break before each atom
    # Sums over the atoms before, and over the breaks up to it.
    columns = [0, *itertools.accumulate(atom.width + atom.spaced for atom in atoms)]
    sentences = [0, *itertools.accumulate(int(cost == SENTENCE) for cost in costs[1:])]
    reach = _reach(atoms, columns)
    best, previous = [0.0] + [math.inf] * count, [0] * (count + 1)
    for first in range(count):
        last = first
        for _ in range(MAX_LINES):
            last = reach[last] if last < count else last
        start = atoms[first].start
        for stop in range(first + 1, last + 1):
            if stop > first + 1 and atoms[stop - 1].end - start > MAX_MS:
                break
            width = columns[stop] - columns[first] - atoms[first].spaced
            next_start = atoms[stop].start if stop < count else following
            available = MAX_MS if next_start is None else min(MAX_MS, max(0, next_start - GAP_MS - start))
            reading = 1000 * width / MAX_SPEED
            cost = best[first] + 3 + costs[stop] + 4 * (sentences[stop - 1] - sentences[first])
            cost += 2 * max(0.0, 1 - width / 30)  # a few words by themselves
            if available < MIN_MS:
                cost += 2 + 6 * (1 - available / MIN_MS)
            if available < reading:
                cost += 6 * (1 - available / reading)
            if cost < best[stop]:
                best[stop], previous[stop] = cost, first
    ranges = []
    stop = count
    while stop:
        ranges.append((previous[stop], stop))
        stop = previous[stop]
    return ranges[::-1]


def _reach(atoms: Sequence[Atom], columns: Sequence[int]) -> list[int]:
    """For each atom, where a line that begins with it ends at the latest."""
    reach, stop = [], 0
    for first, atom in enumerate(atoms):
        stop = max(stop, first + 1)
        while stop < len(atoms) and columns[stop + 1] - columns[first] - atom.spaced <= MAX_WIDTH:
            stop += 1
        reach.append(stop)
    return reach
