"""Manifests in other forms than JSON lines: recognized by their content, and rewritten as JSON lines.

| content | each entry |
| --- | --- |
| a JSON array | an object, or the name of an audio file |
| CSV or TSV with a header | a row; `keywords` are separated by semicolons, or a JSON list |
| Parquet (extra `parquet`) | a row |
| lines of text | the name of an audio file; lines that begin with `# ` or `#EXT` are comments |
| Kaldi's table, called `NAME.scp` | an id and the name of an audio file |

Columns that name the audio are those of `audio_fields`. Any of them can be compressed by gzip, or be in UTF-16.
"""

import codecs
import csv
import gzip
import io
import itertools
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from granite_jax.audio.parts import looks_like_audio, media_format
from granite_jax.batch.access import scheme
from granite_jax.batch.audio_fields import NAMES, OTHER_NAMES, name_of_audio
from granite_jax.batch.listing import AUDIO_SUFFIXES
from granite_jax.errors import GraniteError, printable
from granite_jax.files import git_lfs

_NUMBERS = ("offset", "duration")
_COLUMNS = (*NAMES, *OTHER_NAMES, *_NUMBERS, "id", "task", "target_language", "to", "prompt", "keywords", "text")
_HEAD = 1 << 16  # bytes by which content is recognized
_MAX_BYTES = 1 << 34  # of a compressed manifest's content
_MAX_JSON = 1 << 31  # bytes of a JSON array, which is read as a whole
_FOREIGN = {
    b"PK\x03\x04": "a spreadsheet or ZIP archive",
    b"%PDF": "a PDF",
    b"\x89HDF": "an HDF5 file",
    b"SQLite format 3": "an SQLite database",
    b"ARROW1\0\0": "an Arrow file",
    b"\x28\xb5\x2f\xfd": "compressed by Zstandard",
    b"BZh91AY&SY": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
}


def to_json_lines(path: Path, name: str, work: Path) -> Path:
    """Returns a file of JSON lines with the entries of a manifest: `path` itself, if it is one.

    Args:
      name: of the manifest, for messages.
      work: directory for what is written.

    Raises:
      GraniteError: the file is not a manifest, named by what it seems to be, or it is damaged.
      OSError: reading or writing failed.
    """
    try:
        _read_head(path)
    except OSError as error:
        raise GraniteError(f"{printable(name)}: cannot be read ({error.strerror or error})") from None
    try:
        path = _decompressed(path, work)
        head = _read_head(path)
        if git_lfs.is_pointer(head):
            raise GraniteError(git_lfs.PROBLEM)
        if (kind := _foreign(head)) is not None:
            raise GraniteError(f"is {kind}, not a manifest")
        if head.startswith(b"PAR1"):
            return _write(_parquet_rows(path), work)
        encoding = "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
        if encoding == "utf-8-sig" and head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"{":
            if _is_one_object(head, path):
                raise GraniteError("is one JSON object over several lines, not an object a line")
            return path
        with open(path, encoding=encoding, newline="") as text:
            if text.read(_HEAD).lstrip()[:1] == "{":
                text.seek(0)
                return _write_lines(text, work)
            text.seek(0)
            if name.removesuffix(".gz").endswith(".scp"):
                return _write(_kaldi(text), work)
            return _write(_entries(text, path.stat().st_size), work)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise GraniteError(f"{printable(name)}: is damaged ({error})") from None
    except (UnicodeError, csv.Error, GraniteError) as error:
        raise GraniteError(f"{printable(name)}: {error}") from None


def _decompressed(path: Path, work: Path) -> Path:
    if not _read_head(path).startswith(b"\x1f\x8b"):
        return path
    target, size = work / "decompressed", 0
    with gzip.open(path, "rb") as source, open(target, "wb") as file:
        while block := source.read(1 << 20):
            size += file.write(block)
            if size > _MAX_BYTES:
                raise GraniteError(f"holds more than {_MAX_BYTES >> 30} GiB")
    return target


def _read_head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(_HEAD)


def _foreign(head: bytes) -> str | None:
    """What a file that is not a manifest seems to be, if that is known."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, b"PAR1")):
        return None
    if looks_like_audio(head) or media_format(head) is not None:
        return "audio (granite-jax transcribe takes audio files)"
    known = next((kind for magic, kind in _FOREIGN.items() if head.startswith(magic)), None)
    return known or ("binary data" if b"\0" in head else None)


def _is_one_object(head: bytes, path: Path) -> bool:
    """Whether the first line is the beginning of an object that later lines complete."""
    first = head.removeprefix(codecs.BOM_UTF8).lstrip().splitlines()[0]
    if first.rstrip() != b"{":
        return False
    with open(path, "rb") as file:
        try:
            return isinstance(json.loads(file.read(_MAX_JSON).decode("utf-8-sig")), dict)
        except (ValueError, RecursionError):
            return False


def _entries(text: TextIO, size: int) -> Iterator[Any]:
    """The entries of a JSON array, a table, or a list of names."""
    head = io.StringIO(text.read(_HEAD)).readlines()
    text.seek(0)
    first = next((line.strip() for line in head if not _is_comment(line)), "")
    is_name = re.fullmatch(r".*\.[A-Za-z0-9]{2,5}", first) is not None or scheme(first) is not None
    if first.startswith("[") and not is_name:
        yield from _array(text, size)
    elif (delimiter := _delimiter(first)) is not None and not first.lower().endswith(AUDIO_SUFFIXES):
        yield from _table_rows(itertools.dropwhile(_is_comment, text), delimiter)
    elif is_name:
        yield from ({"audio": line.strip()} for line in text if not _is_comment(line))
    elif first:
        raise GraniteError(
            "is not a manifest: its first line is not a JSON object, a header with a column such as audio or path, "
            f"or the name of an audio file, but {first!a:.60}"
        )


def _is_comment(line: str) -> bool:
    """Whether a line of text is blank or a comment; `#1.wav` is the name of a file."""
    return re.match(r"\s*($|#(\s|EXT|$))", line) is not None


def _kaldi(text: TextIO) -> Iterator[dict[str, Any]]:
    """The entries of Kaldi's `wav.scp`."""
    for number, line in enumerate(text, start=1):
        if _is_comment(line):
            continue
        identity, *rest = line.strip().split(None, 1)
        if not rest:
            raise GraniteError(f"line {number} is not an id and the name of a file, but {identity!a:.60}")
        if rest[0].endswith("|"):
            raise GraniteError(f"line {number} is a command, which is not run: write what it prints to a file")
        yield {"id": identity, "audio": rest[0]}


def _array(text: TextIO, size: int) -> Iterator[dict[str, Any]]:
    if size > _MAX_JSON:
        raise GraniteError(f"is a JSON array of more than {_MAX_JSON >> 30} GiB: write an object a line instead")
    try:
        entries = json.load(text)
    except (ValueError, RecursionError) as error:
        raise GraniteError(f"is not a readable JSON array ({error})") from None
    for entry in entries:
        yield {"audio": entry} if isinstance(entry, str) else entry


def _delimiter(header: str) -> str | None:
    """What separates the columns of a table with this header; None if it is not the header of a manifest."""
    for delimiter in [mark for mark in "\t,;|" if mark in header] or [","]:
        if name_of_audio(_column(name.strip().strip('"')) for name in header.split(delimiter)) is not None:
            return delimiter
    return None


def _column(name: str) -> str:
    """The name of a column; those that a manifest has are in lower case."""
    return name.strip().lower() if name.strip().lower() in _COLUMNS else name.strip()


def _table_rows(text: Iterable[str], delimiter: str) -> Iterator[dict[str, Any]]:
    # Quotation marks are text where tabs or bars separate, as in the tables of speech corpora.
    quoting = csv.QUOTE_NONE if delimiter in "\t|" else csv.QUOTE_MINIMAL
    rows = csv.DictReader(text, delimiter=delimiter, skipinitialspace=True, quoting=quoting, strict=True)
    names = [_column(name) for name in rows.fieldnames or ()]
    if (double := next((name for name in names if name in _COLUMNS and names.count(name) > 1), None)) is not None:
        raise GraniteError(f"has two columns called {double}")
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise GraniteError(f"row {number} has more columns than the header")
        cells = {_column(name): value.strip() for name, value in row.items() if value and value.strip()}
        yield {name: _cell(name, value) for name, value in cells.items()}


def _cell(key: str, value: str) -> Any:
    """A cell's value; one that is not understood stays a string, which its entry's check then names."""
    if key in _NUMBERS:
        try:
            return float(value)
        except ValueError:
            return value
    if key == "keywords":
        if value[0] in "[{":
            try:
                return json.loads(value)
            except ValueError:
                return value
        return [keyword.strip() for keyword in value.split(";") if keyword.strip()]
    return value


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise GraniteError("is Parquet, which needs pip install 'granite-jax[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            columns = list(file.schema_arrow.names)
            if name_of_audio(columns) is None:
                raise GraniteError(f"has no column such as audio or path, only {', '.join(columns)[:200]}")
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise GraniteError(f"is damaged Parquet ({error})") from None


def _write(entries: Iterable[Any], work: Path) -> Path:
    target = work / "entries.jsonl"
    with open(target, "w", encoding="utf-8") as file:
        for entry in entries:
            if isinstance(entry, Mapping):
                entry = {key: value for key, value in entry.items() if not _is_missing(value)}
            file.write(json.dumps(entry, default=_as_text) + "\n")
    return target


def _write_lines(text: TextIO, work: Path) -> Path:
    """Writes JSON lines in UTF-8, damaged ones, too."""
    target = work / "entries.jsonl"
    with open(target, "w", encoding="utf-8", errors="surrogatepass") as file:
        file.writelines(text)
    return target


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _as_text(value: Any) -> str:
    """A value that JSON does not have. Bytes become no text, which is no name of a file, as the entry's check says."""
    return "" if isinstance(value, bytes) else str(value)
