"""Transcripts as a table of segments."""

from granite_jax.formats.atoms import to_milliseconds
from granite_jax.formats.characters import clean
from granite_jax.formats.schema import Timed, segments_of


def to_tsv(segments: Timed) -> str:
    """One `Transcript`, or segments, as Whisper's tab-separated values: start, end, text, a line a segment with text.

    The first line is a header. Times are whole milliseconds. Tabs, line breaks and control characters of the text
    become spaces or are removed; quotes are not special (`csv.QUOTE_NONE`). Speakers are left out.
    """
    lines = ["start\tend\ttext\n"]
    latest = 0
    for segment in segments_of(segments):
        if text := clean(segment.text):
            latest = start = to_milliseconds(segment.start, latest)
            lines.append(f"{start}\t{max(start, to_milliseconds(segment.end, start))}\t{text}\n")
    return "".join(lines)
