"""The rules of subtitles, checked: what `granite_jax.formats.cues.cues` promises, for tests and benchmarks."""

import unicodedata
from collections.abc import Sequence

from granite_jax.formats.characters import text_width
from granite_jax.formats.cues import Cue

COLUMNS, LINES, SPEED = 42, 2, 20
MAX_MS, MIN_MS, GAP_MS, PAUSE_MS = 7000, 833, 84, 500


def violations(cues: Sequence[Cue]) -> list[str]:
    """Every violation, as "cue N: what"; N counts from 1.

    Short cues and fast reading are violations only where the cue could have been longer: the next one is more than the
    shortest gap away, and the cue is not of the longest duration.
    """
    found = []
    times = [(round(cue.start * 1000), round(cue.end * 1000)) for cue in cues]
    for index, (cue, (start, end)) in enumerate(zip(cues, times, strict=True)):
        following = times[index + 1][0] if index + 1 < len(cues) else None
        gap = None if following is None else following - end
        duration = end - start
        could_last = duration < MAX_MS and (gap is None or gap > GAP_MS)
        columns = sum(map(text_width, cue.lines))
        problems = {
            "times are no whole milliseconds": abs(cue.start * 1000 - start) + abs(cue.end * 1000 - end) > 1e-3,
            "begins before 0": start < 0,
            f"{len(cue.lines)} lines": not 1 <= len(cue.lines) <= LINES,
            "a line of more than 42 columns": any(text_width(line) > COLUMNS for line in cue.lines),
            "a blank line, or spaces around one": any(not line or line != line.strip() for line in cue.lines),
            "a control character": any(
                unicodedata.category(char) in ("Cc", "Zl", "Zp") for line in cue.lines for char in line
            ),
            f"{duration} ms: does not end after its start": duration <= 0,
            f"{duration} ms: too long": duration > MAX_MS,
            f"{duration} ms: too short, and could last": duration < MIN_MS and could_last,
            f"{columns} columns in {duration} ms, and could last": columns * 1000 > SPEED * duration and could_last,
            "the next one begins before it": following is not None and following < start,
            "overlaps the next one": gap is not None and gap < 0,
            f"gap of {gap} ms": gap is not None and (0 <= gap < GAP_MS or (GAP_MS < gap < PAUSE_MS and could_last)),
        }
        found += [f"cue {index + 1}: {problem}" for problem, is_there in problems.items() if is_there]
    return found
