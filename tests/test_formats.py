"""Formats of transcripts, and the JSON of a transcript, the same wherever it is written."""

import dataclasses
import json

from granite_jax.cli.outputs import TranscriptFormat
from granite_jax.formats import FORMATS
from granite_jax.formats.schema import to_json, transcript_fields
from granite_jax.results import Segment, Transcript, Word

WORD = Word("one", 0.5, 1.0, 0.75)
TRANSCRIPT = Transcript(
    "a.wav",
    "one",
    tokens=(3, 4),
    duration=2.0,
    stats={"route": "greedy", "keywords": ("x",)},
    accepted_spans=((0, 0, 2),),
    segments=(Segment(0.5, 1.0, "one", words=(WORD,)),),
)


def test_the_schema_has_every_field_as_json_has_it() -> None:
    # Given a transcript, when it becomes JSON, then every field is there, also of segments and words, with its value
    fields = transcript_fields(TRANSCRIPT)
    assert fields == json.loads(to_json(TRANSCRIPT)) == json.loads(json.dumps(dataclasses.asdict(TRANSCRIPT)))
    assert list(fields["segments"][0]["words"][0]) == ["text", "start", "end", "confidence"]
    # And of one that has next to nothing, and of one that failed
    for transcript in (Transcript("a"), Transcript("a", error="a: is empty")):
        assert transcript_fields(transcript).keys() == fields.keys()
        assert transcript_fields(transcript)["error"] == transcript.error


def test_every_format_is_a_choice_and_writes_the_text() -> None:
    assert list(TranscriptFormat) == list(FORMATS)
    for name, format in FORMATS.items():
        assert format.suffix == f".{name}"
        written = format.write(TRANSCRIPT)
        assert "one" in written and written.endswith("\n")


def test_the_formats_of_words_are_those_that_change_with_them() -> None:
    # Given a transcript with and without words, then those formats differ that are said to have their times
    words = (Word("One", 0.5, 1.0), Word("two.", 4.0, 5.0))
    spoken = Transcript("a", "One two.", segments=(Segment(0.5, 5.0, "One two.", words=words),))
    plain = Transcript("a", "One two.", segments=(Segment(0.5, 5.0, "One two."),))
    for format in FORMATS.values():
        assert (format.write(spoken) != format.write(plain)) == format.has_words
