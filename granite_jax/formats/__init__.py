"""Formats of transcripts: each is an entry of `FORMATS`, and a function that writes it."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from granite_jax.formats.schema import to_json
from granite_jax.formats.subtitles import to_srt, to_vtt
from granite_jax.formats.tsv import to_tsv
from granite_jax.results import Transcript


class Format(NamedTuple):
    """A format of transcripts.

    Fields:
      suffix: of file names.
      write: returns the content of a file with a transcript, which must not have failed.
      description: for help texts.
      has_words: whether times of words make a difference.
      is_document: whether a file, or standard output, has room for one transcript only.
    """

    suffix: str
    write: Callable[[Transcript], str]
    description: str
    has_words: bool = True
    is_document: bool = True


def to_txt(transcript: Transcript) -> str:
    """The text alone."""
    return transcript.text.rstrip("\n") + "\n"


FORMATS: Mapping[str, Format] = {
    "txt": Format(".txt", to_txt, "plain text", has_words=False, is_document=False),
    "json": Format(".json", to_json, "JSON objects", is_document=False),
    "srt": Format(".srt", to_srt, "SubRip subtitles"),
    "vtt": Format(".vtt", to_vtt, "WebVTT subtitles"),
    "tsv": Format(".tsv", to_tsv, "a table of segments", has_words=False),
}
