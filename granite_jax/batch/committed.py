"""What workers have committed: parts, and retries of their failed entries.

    part-000007-FINGERPRINT.jsonl       a line for each entry of part 7
    part-000007-FINGERPRINT.r1.jsonl    lines for some of its failed entries, from a first retry
    part-000007-FINGERPRINT.r2.jsonl    ... and from a second one

Nothing that is committed changes. An entry's result is its line in the latest of these files that has one.
"""

import contextlib
import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from granite_jax.batch.store import Store
from granite_jax.errors import GraniteError

_ADVICE = ": delete it and run the job again"
TASK = r"(\d{6,9})-([0-9a-f]{12})(?:\.r([1-9]\d{0,5}))?"
"""Matches what `task_name` returns: part, fingerprint and retry."""
_PART = re.compile(rf"part-{TASK}\.jsonl")


class Line(NamedTuple):
    """The line of an entry: its parsed fields and its bytes."""

    fields: dict[str, Any]
    data: bytes

    @property
    def failed(self) -> bool:
        """Whether there is an error in place of a transcript."""
        return self.fields.get("error") is not None


def task_name(part: int, fingerprint: str, retry: int = 0) -> str:
    """Part, fingerprint and retry, as in names of files."""
    return f"{part:06}-{fingerprint}" + (f".r{retry}" if retry else "")


def part_name(part: int, fingerprint: str, retry: int = 0) -> str:
    """The file name of a part, or of one of its retries, which contains the job's fingerprint."""
    return f"part-{task_name(part, fingerprint, retry)}.jsonl"


def committed_parts(names: Iterable[str], fingerprint: str) -> dict[int, int]:
    """The number of the last retry of every committed part, 0 for none.

    Args:
      names: of the files in the directory.

    Raises:
      GraniteError: a file belongs to another job.
    """
    retries: dict[int, int] = {}
    parts = set()
    for name in names:
        match = _PART.fullmatch(name)
        if match is None:
            continue
        if match[2] != fingerprint:
            raise GraniteError(f"{name} is of another job than job.json beside it")
        part, retry = int(match[1]), int(match[3] or 0)
        retries[part] = max(retry, retries.get(part, 0))
        if not retry:
            parts.add(part)
    return {part: retries[part] for part in parts}


def read_part(store: Store, fingerprint: str, part: int, retries: int, indices: range) -> list[Line]:
    """The latest line of every entry of a part, in order.

    Raises:
      GraniteError: a file is damaged, or holds an entry twice or not at all.
    """
    name = part_name(part, fingerprint)
    expected = iter(indices)
    lines = [_checked(data, name, next(expected, None)) for data in _read(store, name)]
    missing = next(expected, None)
    if missing is not None:
        raise GraniteError(f"{name} ends before entry {missing}{_ADVICE}")
    for retry in range(1, retries + 1):
        name = part_name(part, fingerprint, retry)
        with contextlib.suppress(FileNotFoundError):  # deleted by hand: the entries are as they were before
            for data in _read(store, name):
                line = _checked(data, name)
                if line.fields["index"] not in indices:
                    raise GraniteError(f"{name} has entry {line.fields['index']} of another part{_ADVICE}")
                lines[line.fields["index"] - indices.start] = line
    return lines


def _read(store: Store, name: str) -> list[bytes]:
    with store.open(name) as file:
        return list(file)


def intact_lines(store: Store, name: str) -> list[Line]:
    """The lines of a file except those that are damaged; none if there is no such file."""
    try:
        return [line for data in _read(store, name) if (line := _parse(data)) is not None]
    except FileNotFoundError:
        return []


def _checked(data: bytes, name: str, *expected: int | None) -> Line:
    """Parses a line. Raises GraniteError if it is damaged, or not of the `expected` entry, None for no entry."""
    line = _parse(data)
    position = "its end" if expected == (None,) else f"entry {expected[0]}" if expected else "an entry"
    if line is None:
        raise GraniteError(f"{name} is damaged where {position} should be{_ADVICE}")
    if expected and line.fields["index"] != expected[0]:
        raise GraniteError(f"{name} has entry {line.fields['index']} where {position} should be{_ADVICE}")
    return line


def _parse(data: bytes) -> Line | None:
    """Parses a line; None if it is damaged."""
    try:
        fields = json.loads(data)
        is_valid = data.endswith(b"\n") and isinstance(fields.get("duration", 0.0), int | float)
        is_valid = is_valid and isinstance(fields["index"], int) and isinstance(fields["audio"], str)
        return Line(fields, data) if is_valid else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
