"""Sources that are no manifests: a directory, a glob, or a prepared TFDS data set, whose audio is listed."""

import collections
import functools
import glob
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from granite_jax.batch.access import AudioStorage, scheme
from granite_jax.errors import GraniteError, printable

AUDIO_SUFFIXES = (
    *(".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".mp2", ".aif", ".aiff", ".aifc"),
    *(".au", ".snd", ".caf", ".w64", ".rf64"),
    *(".m4a", ".m4b", ".mp4", ".m4v", ".mov", ".3gp", ".aac", ".ac3", ".eac3", ".dts", ".thd", ".webm", ".mka", ".mkv"),
    *(".wma", ".wmv", ".asf", ".amr", ".gsm", ".ra", ".rm", ".avi", ".flv", ".mpg", ".mpeg", ".mts"),
    *(".wv", ".ape", ".tta"),
)
"""File name suffixes of the audio in a directory."""
_MAX_SHOWN = 5


def is_listing(source: str) -> bool:
    """Whether a source must be listed: it is a directory, a glob or a data set, not a file of JSON lines."""
    if scheme(source) is None:
        return os.path.isdir(source) or (glob.has_magic(source) and not os.path.exists(source))
    return scheme(source) == "tfds" or (scheme(source) != "https" and (source.endswith("/") or glob.has_magic(source)))


def identity_of(source: str) -> str:
    """The same for all spellings of a source that is listed, from any working directory."""
    if source.startswith("tfds:"):
        directory, split = split_tfds(source)
        return f"tfds:{os.path.realpath(directory)}#{split}"
    return source if scheme(source) is not None else os.path.abspath(source)


def root_of(source: str) -> str:
    """The directory or URL that names in a source are relative to, and that local files must be below."""
    if source.startswith("tfds:"):
        return split_tfds(source)[0]
    if scheme(source) is None and os.path.isdir(source):
        return source
    root = os.path.dirname(source)
    while is_listing(source) and glob.has_magic(root):
        root = os.path.dirname(root)
    return root or "."


def list_audio(source: str, access: AudioStorage, skipped: collections.Counter[str]) -> Iterator[str]:
    """Names of a directory's audio files, of those that a glob matches, or of a data set's examples.

    Links to directories are not followed: they can lead in circles.

    Args:
      skipped: counts, by suffix, what else there is in a local directory.

    Raises:
      GraniteError: the source cannot be listed.
    """
    if source.startswith("tfds:"):
        from granite_jax.batch.tfds import open_dataset

        return (f"tfds:{i}" for i in range(len(open_dataset(*split_tfds(source)))))
    if scheme(source) is not None:
        return access.list_remote(source, AUDIO_SUFFIXES)
    return _walk(source, skipped) if os.path.isdir(source) else _matches(source)


def to_line(name: str) -> str:
    """The line of a manifest for a listed name."""
    return json.dumps({"audio": name}) + "\n"


def describe_skipped(skipped: collections.Counter[str]) -> str:
    """A sentence about what a listing left out; empty if that is nothing."""
    if not skipped:
        return ""
    shown = ", ".join(f"{count} {suffix}" for suffix, count in skipped.most_common(_MAX_SHOWN))
    rest = skipped.total() - sum(count for _, count in skipped.most_common(_MAX_SHOWN))
    return f"files left out, not audio by their names: {shown}" + (f", {rest} others" if rest else "")


def _walk(directory: str, skipped: collections.Counter[str]) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise GraniteError(f"{printable(str(error.filename))}: cannot be listed ({error.strerror})") from error

    for parent, directories, files in os.walk(directory, onerror=fail):
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        skipped.update(
            ["links to directories"] * sum(os.path.islink(os.path.join(parent, name)) for name in directories)
        )
        for name in sorted(files):
            if name.startswith("."):
                continue
            if name.lower().endswith(AUDIO_SUFFIXES):
                yield os.path.relpath(os.path.join(parent, name), directory)
            else:
                skipped[os.path.splitext(name)[1].lower() or "without a suffix"] += 1


def _matches(pattern: str) -> Iterator[str]:
    """Files that a glob matches. Its `**` does not follow links, as that of the glob module would, without end."""
    if pattern.endswith("/"):
        return  # it matches directories alone
    root = root_of(pattern)
    parts = Path(os.path.relpath(pattern, root)).parts
    relative = os.path.join(*(part if part == "**" else re.sub(r"\*\*+", "*", part) for part in parts))
    if os.path.basename(relative) == "**":
        relative = os.path.join(relative, "*")
    shows_hidden = [part.startswith(".") for part in Path(relative).parts]
    for path in sorted(Path(root).glob(relative)):
        name = os.path.relpath(path, root)
        is_hidden = any(part.startswith(".") for part in Path(name).parts) and not any(shows_hidden)
        if not is_hidden and path.is_file():
            yield name


@functools.cache
def split_tfds(source: str) -> tuple[str, str]:
    """Directory and split of `tfds:DIRECTORY#SPLIT`."""
    directory, _, split = source.removeprefix("tfds:").partition("#")
    if not directory or not split:
        raise GraniteError(f"{printable(source)}: a prepared data set is given as tfds:DIRECTORY#SPLIT")
    return directory, split
