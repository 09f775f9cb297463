"""The input of a job: JSON lines, read in constant memory.

Every kind of input becomes such a file (`manifest_files`, `listing`), of which a job keeps every 1,024th offset.
"""

import dataclasses
import difflib
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from granite_jax.batch.audio_fields import MAX_TEXT, audio_fields, is_lhotse, text_field, uncertain_excerpt
from granite_jax.errors import GraniteError, printable
from granite_jax.keywords.options import Entry as Keyword
from granite_jax.keywords.options import check_boost, keyword_entries
from granite_jax.options import TranscribeOptions

MAX_LINE = 1 << 20
"""Bytes; a longer line is no entry."""
FIELDS = (
    *(
        "id",
        "audio",
        "audio_filepath",
        "offset",
        "duration",
        "task",
        "taskname",
        "target_language",
        "to",
        "target_lang",
    ),
    *("source_lang", "pnc", "prompt", "keywords"),
)
"""Fields of a line that decide about its result."""
# Others' fields that would decide, too. NeMo's manifests have many that would not.
_FOREIGN_FIELDS = (
    *("start", "end", "begin", "stop", "start_time", "end_time", "segments", "channel", "channels", "channel_selector"),
    *("language", "lang", "context", "hotwords", "max_new_tokens", "speculative", "keyword_boost", "keyword_gate"),
)
_SAMPLED_LINES, _SAMPLED_FIELDS, _MAX_NAME = 1000, 100, 40
_MAX_SECONDS = 1e9
_INDEXED = 1024  # of so many entries one can be sought


@dataclass(frozen=True)
class Entry:
    """One line of a manifest.

    Fields:
      index: its unique position among the lines that are not blank, from 0.
      id: the manifest's name for it, or else its index; copied to the results, and need not be unique.
      audio: path or URL, as written in the manifest.
      offset, duration: the segment of the file to transcribe, in seconds; without a duration, to the file's end.
      options: the job's options with the line's task, target language and prompt; None if the line is invalid.
      keywords: the line's keywords; None to use the job's.
      error: why the line is invalid, or None.
    """

    index: int
    id: str
    audio: str = ""
    offset: float = 0.0
    duration: float | None = None
    options: TranscribeOptions | None = None
    keywords: tuple[Keyword, ...] | None = None
    error: str | None = None


@dataclass(frozen=True)
class Manifest:
    """A local file of JSON lines."""

    path: Path
    options: TranscribeOptions  # of entries without their own
    entries: int
    sha256: str
    ignored_fields: tuple[str, ...]  # of the first lines, which look as if they should change results
    offsets: tuple[int, ...] = field(repr=False)  # in bytes, of every `_INDEXED`-th entry
    signatures: set[tuple[int, ...]] = field(repr=False)  # of the file, with these contents

    @classmethod
    def scan(cls, path: Path, options: TranscribeOptions, name: str | None = None) -> "Manifest":
        """Reads the file once. Raises GraniteError, with the `name`, if it cannot be read or has no entries."""
        name = printable(name or str(path))
        offsets, entries, ignored = [], 0, dict[str, None]()
        try:
            with open(path, "rb") as file:
                signature = _signature(file)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                file.seek(0)
                for offset, line in _lines(file):
                    if entries % _INDEXED == 0:
                        offsets.append(offset)
                    if entries < _SAMPLED_LINES:
                        ignored |= dict.fromkeys(ignored_fields(line))
                    entries += 1
        except OSError as error:
            raise GraniteError(f"{name}: cannot be read ({error.strerror or error})") from error
        if not entries:
            raise GraniteError(f"{name}: has no entries")
        return cls(path, options, entries, digest, tuple(ignored), tuple(offsets), {signature})

    def read(self, indices: range) -> list[Entry]:
        """Consecutive entries, grouped by options. Raises GraniteError if the file has changed."""
        entries = list(self.entries_at(indices))
        order = {options: rank for rank, options in enumerate(dict.fromkeys(entry.options for entry in entries))}
        return sorted(entries, key=lambda entry: order[entry.options])

    def entries_at(self, indices: range) -> Iterator[Entry]:
        """Some entries. Raises GraniteError if the file has changed."""
        return (parse_line(line, index, self.options) for index, line in self._lines_at(indices))

    def durations(self) -> Iterator[float | None]:
        """The `duration` of every line that has one, read as fast as possible; GraniteError as `entries_at`."""
        return (_duration(line) for _, line in self._lines_at(range(self.entries)))

    def _lines_at(self, indices: range) -> Iterator[tuple[int, bytes | None]]:
        with open(self.path, "rb") as file:
            if _signature(file) not in self.signatures:
                if hashlib.file_digest(file, "sha256").hexdigest() != self.sha256:
                    raise GraniteError(f"{self.path}: has changed while the job runs")
                self.signatures.add(_signature(file))  # it was only touched
            indexed = indices.start // _INDEXED
            file.seek(self.offsets[indexed])
            for index, (_, line) in enumerate(_lines(file), start=indexed * _INDEXED):
                if index >= indices.stop:
                    return
                if index in indices:
                    yield index, line


def _duration(line: bytes | None) -> float | None:
    try:
        duration = json.loads(line or b"").get("duration")
        return float(duration) if isinstance(duration, int | float) and 0 < duration < _MAX_SECONDS else None
    except (ValueError, AttributeError, RecursionError):
        return None


def parse_line(line: bytes | None, index: int, options: TranscribeOptions) -> Entry:
    """Parses a line; the entry of an invalid one has an `error`."""
    if line is None:
        return Entry(index, str(index), error=f"line of entry {index}: longer than {MAX_LINE} bytes")
    try:
        fields = json.loads(line.decode("utf-8-sig"))
        if not isinstance(fields, dict):
            raise ValueError(f"not a JSON object but {fields!r:.40}")
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]
        return Entry(index, str(index), error=f"line of entry {index}: {reason}")
    return parse_entry(fields, index, options)


def ignored_fields(line: bytes | None) -> list[str]:
    """The fields of a line that are not understood, but look as if they should change its result."""
    try:
        fields = json.loads((line or b"").decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return []
    if not isinstance(fields, dict) or is_lhotse(fields) or uncertain_excerpt(fields) is not None:
        return []  # the last of these is an error of its entry
    keys = itertools.islice(fields, _SAMPLED_FIELDS)
    return [key for key in keys if key not in FIELDS and _looks_decisive(key[:_MAX_NAME].lower())]


@functools.lru_cache(maxsize=1000)
def _looks_decisive(name: str) -> bool:
    return bool(difflib.get_close_matches(name, (*FIELDS, *_FOREIGN_FIELDS), 1, 0.85))


def parse_entry(fields: dict[str, Any], index: int, options: TranscribeOptions) -> Entry:
    """Parses the fields of a line; unknown ones are ignored because NeMo's manifests have many."""
    # Tables and pandas write null or NaN where there is no value.
    fields = {key: value for key, value in fields.items() if value is not None and value == value}
    identity = fields.get("id")
    if isinstance(identity, float) and identity.is_integer():
        identity = int(identity)  # a table's column of numbers
    name = str(identity) if isinstance(identity, str | int) and len(str(identity)) <= MAX_TEXT else str(index)
    try:
        if identity is not None and name != str(identity):
            raise GraniteError(f"id must be a short string or a number, not {identity!r:.40}")
        fields |= audio_fields(fields)
        audio = fields["audio"]
        offset, duration = _seconds(fields, "offset"), _seconds(fields, "duration")
        if duration == 0:
            raise GraniteError("duration is 0")
        changes, keywords = _changed_options(fields), _keywords(fields)
    except GraniteError as error:
        return Entry(index, name, error=f"entry {index}: {error}")
    try:
        entry_options = dataclasses.replace(options, **changes) if changes else options
    except GraniteError as error:
        return Entry(index, name, audio, error=f"{printable(audio)}: {error}")
    return Entry(index, name, audio, offset or 0.0, duration, entry_options, keywords)


def _changed_options(fields: dict[str, Any]) -> dict[str, Any]:
    """The line's task, target language and prompt: if it has any of them, they replace all three of the job's.

    The job's `language` stays with transcripts. Any text is a prompt: the safeguard decides what becomes of it.
    """
    languages = [name for name in ("target_language", "to", "target_lang") if name in fields]
    tasks = [name for name in ("task", "taskname") if name in fields]
    for names in (languages, tasks):
        if len(names) > 1:
            raise GraniteError(f"has both {names[0]} and {names[1]}")
    task, language = (_text(fields, name) for name in (*(tasks or ["task"]), *(languages or ["to"])))
    prompt = fields.get("prompt")
    if prompt is not None and not isinstance(prompt, str):
        raise GraniteError(f"prompt must be a string, not {prompt!r:.40}")
    if task is language is prompt is None:
        return {}
    if tasks == ["taskname"] or languages == ["target_lang"]:
        task, language = _nemo_task(fields, task, language)
    task = task or ("translate" if language else "transcribe")
    changes = {"task": task, "target_language": language, "prompt": prompt}
    return changes | ({} if prompt is None and language is None else {"language": None})


def _nemo_task(fields: dict[str, Any], task: str | None, language: str | None) -> tuple[str, str | None]:
    """Task and target language of NeMo's `taskname`, `source_lang`, `target_lang` and `pnc` (Canary's manifests)."""
    source = _text(fields, "source_lang")
    if task in ("ast", "s2t_translation") or (task is None and source is not None and language not in (source, None)):
        return "translate", language
    if task in ("asr", None):
        if language is not None and source is not None and language != source:
            raise GraniteError(f"taskname {task!r} has source_lang {source!r:.20} and target_lang {language!r:.20}")
        punctuated = fields.get("pnc") in (True, "yes", "pnc", "True", "true", 1)
        return ("punctuate" if punctuated else "transcribe"), None
    return task, language


def _keywords(fields: dict[str, Any]) -> tuple[Keyword, ...] | None:
    """A list of texts or pairs [text, boost], or an object from texts to boosts."""
    keywords = fields.get("keywords")
    if keywords is None:
        return None
    if isinstance(keywords, list):
        keywords = [tuple(entry) if isinstance(entry, list) and len(entry) == 2 else entry for entry in keywords]
    entries = keyword_entries(keywords)
    for entry in entries:
        text, boost = entry if isinstance(entry, tuple) else (entry, None)
        if not isinstance(text, str) or len(text) > MAX_TEXT:
            raise GraniteError(f"keywords must be a list of strings, not {keywords!r:.60}")
        if boost is not None:
            check_boost(f"the boost of keyword {text!r:.40}", boost)
    return entries


def _text(fields: dict[str, Any], key: str) -> str | None:
    return None if fields.get(key) is None else text_field(key, fields[key])


def _seconds(fields: dict[str, Any], key: str) -> float | None:
    value = fields.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _MAX_SECONDS:
        raise GraniteError(f"{key} must be a number of seconds, not {value!r:.40}")
    return float(value)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Offset and bytes of every line that is not blank; None instead of bytes if it is too long."""
    offset = file.tell()
    while line := file.readline(MAX_LINE + 1):
        start, offset = offset, offset + len(line)
        if len(line) > MAX_LINE and not line.endswith(b"\n"):
            while continuation := file.readline(MAX_LINE):
                offset += len(continuation)
                if continuation.endswith(b"\n"):
                    break
            yield start, None
        elif not line.isspace():
            yield start, line


def _signature(file: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns
