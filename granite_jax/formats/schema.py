"""A transcript as JSON has it, the same in every output, and its segments as they are read from there."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from granite_jax.errors import GraniteError
from granite_jax.results import Segment, Transcript, Word

Timed = Transcript | Mapping[str, Any] | Iterable[Segment | Mapping[str, Any]]
"""A transcript or its segments; as objects, or as `granite-jax` writes them in JSON."""


def transcript_fields(transcript: Transcript) -> dict[str, Any]:
    """All fields of a `Transcript`, with its segments and their words, as the values that JSON has."""
    return _plain(transcript)


def to_json(transcript: Transcript) -> str:
    """A transcript's fields as one line of JSON."""
    return json.dumps(transcript_fields(transcript), ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value


def segments_of(timed: Timed) -> Sequence[Segment]:
    """The segments of what is given; all of a transcript's text is one if it has none.

    Raises:
      GraniteError: it is neither a transcript nor segments, or a transcript that failed.
    """
    given: Any = vars(timed) if isinstance(timed, Transcript) else timed
    if isinstance(given, Mapping):
        if given.get("error") is not None:
            raise GraniteError(f"a transcript that failed has no times: {given['error']}")
        whole = {**given, "start": 0.0, "end": given.get("duration", 0.0), "words": ()}
        given = [whole] if given.get("segments") in ([], ()) and given.get("text") else given.get("segments")
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        kind = type(timed).__name__
        raise GraniteError(f"a {kind} has no times: give one Transcript, or segments with text, start and end")
    return [_segment(segment, number) for number, segment in enumerate(given)]


def _segment(segment: Any, number: int) -> Segment:
    if isinstance(segment, Segment):
        return segment
    try:
        words = tuple(Word(*_text_and_times(word)) for word in segment.get("words") or ())
        text, start, end = _text_and_times(segment)
        return Segment(start, end, text, words=words, speaker=segment.get("speaker"))
    except (AttributeError, KeyError, TypeError, ValueError):
        kind = type(segment).__name__
        raise GraniteError(
            f"item {number}, a {kind}, is not a segment with text, start and end: give one Transcript, or its segments"
        ) from None


def _text_and_times(fields: Mapping[str, Any]) -> tuple[str, float, float]:
    if not isinstance(fields["text"], str):
        raise TypeError
    return fields["text"], float(fields["start"]), float(fields["end"])
