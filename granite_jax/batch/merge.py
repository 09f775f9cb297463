"""Joins the parts of a finished job, and checks that they hold every entry exactly once."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from granite_jax.batch.access import scheme
from granite_jax.batch.parts import committed, fingerprint_of, part_name, read_job
from granite_jax.batch.store import Store, open_store
from granite_jax.errors import GraniteError

_MAX_SHOWN = 10


def merge(
    out: str | os.PathLike[str], *, storage_options: dict[str, dict[str, Any]] | None = None
) -> dict[str, int | float | str]:
    """Writes `transcripts.jsonl` and `errors.jsonl`, in the manifest's order, and `merged.json`, a summary of the job.

    Returns:
      The summary: `fingerprint`, `parts`, `entries`, `transcribed`, `failed`, `audio_seconds`.

    Raises:
      GraniteError: the directory is not a job's; parts are missing, damaged, or hold an entry twice or not at all.
    """
    out = os.fspath(out)
    if scheme(out) is None and not os.path.isdir(out):
        raise GraniteError(f"{out}: no such directory")
    store = open_store(out, (storage_options or {}).get(scheme(out) or "file"))
    try:
        return _merge(store)
    except GraniteError as error:
        raise GraniteError(f"{out}: {error}") from None


def _merge(store: Store) -> dict[str, int | float | str]:
    job = read_job(store)
    fingerprint, entries, size = fingerprint_of(job), job.get("entries"), job.get("part_size")
    if not isinstance(entries, int) or not isinstance(size, int) or entries < 1 or size < 1:
        raise GraniteError("job.json does not say how many entries there are")
    parts = range(-(-entries // size))
    committed_parts = committed(store, fingerprint)
    missing = [part for part in parts if part not in committed_parts]
    if missing:
        shown = ", ".join(map(str, missing[:_MAX_SHOWN])) + (", ..." if len(missing) > _MAX_SHOWN else "")
        raise GraniteError(f"{len(missing)} of {len(parts)} parts are missing: {shown}; run the job again")
    if len(committed_parts) > len(parts):
        raise GraniteError(f"has parts beyond the last one, {parts[-1]}: {max(committed_parts)}")
    failed, seconds = 0, 0.0
    with tempfile.TemporaryDirectory(prefix="granite-jax-") as work:
        transcripts_path, errors_path, summary_path = (
            Path(work, name) for name in ("transcripts.jsonl", "errors.jsonl", "merged.json")
        )
        with open(transcripts_path, "wb") as transcripts, open(errors_path, "wb") as errors:
            for part in parts:
                name = part_name(part, fingerprint)
                expected = iter(range(part * size, min(entries, (part + 1) * size)))
                with store.open(name) as lines:
                    for line in lines:
                        fields = _fields(line, name, next(expected, None))
                        is_error = "error" in fields
                        (errors if is_error else transcripts).write(line)
                        failed += is_error
                        seconds += fields.get("duration", 0.0)
                missing_entry = next(expected, None)
                if missing_entry is not None:
                    raise GraniteError(f"{name} ends before entry {missing_entry}: delete it and run the job again")
        result = {
            "fingerprint": fingerprint,
            "parts": len(parts),
            "entries": entries,
            "transcribed": entries - failed,
            "failed": failed,
            "audio_seconds": round(seconds, 3),
        }
        summary_path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        for path in (transcripts_path, errors_path, summary_path):
            store.replace(path.name, path)
    return result


def _fields(line: bytes, name: str, expected: int | None) -> dict[str, Any]:
    try:
        fields = json.loads(line)
        index = fields["index"]
        is_valid = line.endswith(b"\n") and isinstance(fields.get("duration", 0.0), int | float)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        fields, index, is_valid = {}, None, False
    if not is_valid:
        raise GraniteError(f"{name} is damaged where entry {expected} should be: delete it and run the job again")
    if index != expected:
        position = "its end" if expected is None else f"entry {expected}"
        raise GraniteError(f"{name} has entry {index} where {position} should be: delete it and run the job again")
    return fields
