"""Names of output files, and what fits on standard output."""

import contextlib
import enum
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from granite_jax.errors import AudioError, GraniteError
from granite_jax.files import atomic
from granite_jax.formats import FORMATS

TranscriptFormat = enum.StrEnum("TranscriptFormat", list(FORMATS))
"""Names of formats; an enumeration, because options that repeat cannot be of a Literal."""
_MAX_NAME_BYTES = 200  # of 255, for the extension and what tells names apart


def output_stems(inputs: Sequence[str]) -> list[str]:
    """Names for the outputs of inputs, without extension: distinct, also where letter case makes no difference.

    The name is the input's without its extension: `a/talk.wav` gives `talk`. Of a URL, the last part counts; standard
    input is `stdin`. Inputs that would share a name get more of theirs, all of them by the first of these ways that
    tells them apart: with extensions (`talk.wav`, `talk.mp3`), with more and more directories in front (`a-talk`,
    `b-talk`), and both. Inputs that are the same, and names that are still taken, get numbers: `talk`, `talk-2`.
    """
    parts = [_parts(argument) for argument in inputs]
    stems = [_name(path, 0, extension=False) for path in parts]
    groups: dict[str, list[int]] = {}
    for index, stem in enumerate(stems):
        groups.setdefault(_key(stem), []).append(index)
    taken: set[str] = set()
    for group in sorted(groups.values(), key=lambda group: len(group) > 1):  # names that nothing else asks for first
        for index, name in zip(group, _distinct([parts[index] for index in group]), strict=True):
            stems[index], number = name, 2
            while _key(stems[index]) in taken:
                stems[index] = f"{name}-{number}"
                number += 1
            taken.add(_key(stems[index]))
    return stems


def _distinct(group: Sequence[Sequence[str]]) -> list[str]:
    """Names of inputs that share a stem: different for different inputs, or their stems if no way tells them apart."""
    names = [_name(parts, 0, extension=False) for parts in group]
    for directories in range(max(map(len, group))):
        for extension in (False, True):
            longer = [_name(parts, directories, extension) for parts in group]
            if len(set(map(_key, longer))) == len(set(map(tuple, group))):
                return longer
    return names


def _parts(argument: str) -> list[str]:
    """The directories and the name of an input."""
    if argument == "-":
        return ["stdin"]
    if "://" in argument:
        url = urlsplit(argument)
        argument = f"{url.netloc}/{unquote(url.path)}"
    return [part for part in argument.split("/") if part.strip(". ")] or ["audio"]


def _name(parts: Sequence[str], directories: int, extension: bool) -> str:
    *parents, name = parts[-directories - 1 :]
    stem, dot, _ = name.rpartition(".")
    return _safe("-".join([*parents, name if extension or not (dot and stem.strip(". ")) else stem]))


def _safe(name: str) -> str:
    """The name without separators, control characters and leading dots, and short enough for file systems."""
    name = "".join("_" if char in "/\\" or unicodedata.category(char) in ("Cc", "Zl", "Zp") else char for char in name)
    name = name.strip().lstrip(".").lstrip()
    encoded = os.fsencode(name)
    if len(encoded) > _MAX_NAME_BYTES:
        name = encoded[:_MAX_NAME_BYTES].decode("utf-8", "ignore").rstrip()
    return name or "audio"


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def is_document(formats: Sequence[str], directory: Path | None) -> bool:
    """Whether standard output is one document, which has room for one transcript."""
    return directory is None and all(FORMATS[format].is_document for format in formats)


def check_formats(formats: Sequence[str], num_inputs: int, directory: Path | None) -> None:
    """Raises GraniteError if such results cannot be on standard output."""
    if directory is None and len(formats) > 1:
        raise GraniteError(f"--format {', '.join(formats)}: several formats need --output-dir")
    if is_document(formats, directory) and num_inputs > 1:
        raise GraniteError(f"--format {formats[0]}: several files need --output-dir")


def check_one_channel(source: Any, format: str) -> None:
    """Raises GraniteError if a file, or a stream that can be read twice, has several channels."""
    from granite_jax.audio.load import num_channels, read_stream

    with contextlib.suppress(AudioError):  # which is reported where the file is transcribed
        if num_channels(read_stream(source) if hasattr(source, "read") else source) > 1:
            raise GraniteError(f"--format {format}: several channels need --output-dir")


def make_directory(directory: Path) -> None:
    """Creates a directory where there is none. Raises GraniteError naming it if that fails."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GraniteError(f"{directory}: cannot be created: {error.strerror}") from None


def write_file(path: Path, text: str) -> None:
    """Writes a file completely or not at all, in UTF-8; a file that is there is replaced.

    Raises:
      GraniteError: naming the file, if it cannot be written.
    """
    try:
        atomic.replace(path, text)
    except (OSError, ValueError) as error:
        raise GraniteError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
