"""Joins the parts of a finished job, and checks that they hold every entry exactly once."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from granite_jax.batch.access import scheme
from granite_jax.batch.committed import committed_parts, read_part
from granite_jax.batch.partition import read_partition
from granite_jax.batch.parts import fingerprint_of, read_job
from granite_jax.batch.store import Store, open_store
from granite_jax.batch.unfinished import remove_committed, unfinished_files
from granite_jax.errors import GraniteError

_MAX_SHOWN = 10


def merge(
    out: str | os.PathLike[str], *, storage_options: dict[str, dict[str, Any]] | None = None
) -> dict[str, int | float | str]:
    """Writes `transcripts.jsonl` and `errors.jsonl`, in the manifest's order, and `merged.json`, a summary of the job.

    Of entries that were retried, the last result counts.

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
    fingerprint, partition = fingerprint_of(job), read_partition(store, job)
    entries, parts = partition.entries, range(len(partition))
    names = store.names()
    retries = committed_parts(names, fingerprint)
    missing = [part for part in parts if part not in retries]
    if missing:
        shown = ", ".join(map(str, missing[:_MAX_SHOWN])) + (", ..." if len(missing) > _MAX_SHOWN else "")
        raise GraniteError(f"{len(missing)} of {len(parts)} parts are missing: {shown}; run the job again")
    if len(retries) > len(parts):
        raise GraniteError(f"has parts beyond the last one, {parts[-1]}: {max(retries)}")
    failed, seconds = 0, 0.0
    with tempfile.TemporaryDirectory(prefix=f"granite-jax-{os.getpid()}-") as work:
        transcripts_path, errors_path = (Path(work, name) for name in ("transcripts.jsonl", "errors.jsonl"))
        with open(transcripts_path, "wb") as transcripts, open(errors_path, "wb") as errors:
            for part in parts:
                for line in read_part(store, fingerprint, part, retries[part], partition.indices(part)):
                    (errors if line.failed else transcripts).write(line.data)
                    failed += line.failed
                    seconds += line.fields.get("duration", 0.0)
        result = {
            "fingerprint": fingerprint,
            "parts": len(parts),
            "entries": entries,
            "transcribed": entries - failed,
            "failed": failed,
            "audio_seconds": round(seconds, 3),
        }
        for path in (transcripts_path, errors_path):
            store.replace(path.name, path)
        store.replace("merged.json", (json.dumps(result, indent=1) + "\n").encode())
    remove_committed(store, unfinished_files(names, fingerprint), retries, parts)
    return result
