"""Brings a job's manifest to this machine, and lists the sources that are none, once for all workers and runs."""

import collections
import os
from pathlib import Path
from typing import Any

from granite_jax.batch.access import AudioStorage, retried, scheme
from granite_jax.batch.listing import describe_skipped, is_listing, list_audio, to_line
from granite_jax.batch.store import LocalStore, Store
from granite_jax.errors import AudioError, GraniteError, printable

_LISTING = "manifest.jsonl"


def local_manifest(source: str, access: AudioStorage, store: Store, work: Path) -> tuple[Path, list[str]]:
    """A local file: the manifest, a copy of a remote one, or the listing that the first worker made.

    Args:
      work: directory for what is written.

    Returns:
      Its path; and notes, sentences about what a listing left out.

    Raises:
      GraniteError: the source cannot be read or listed, or has no audio.
    """
    if not is_listing(source):
        if scheme(source) is None:
            return Path(source), []
        try:
            with retried(lambda: access.open(source)) as remote:
                return _copy(remote, work / _LISTING), []
        except (AudioError, FileNotFoundError, PermissionError) as error:
            reason = error if isinstance(error, AudioError) else "no such file, or no permission to read it"
            raise GraniteError(f"{printable(source)}: {reason}") from None
    skipped: collections.Counter[str] = collections.Counter()
    is_new = _LISTING not in store.names()
    if is_new:
        with open(work / _LISTING, "w", encoding="utf-8") as file:
            file.writelines(map(to_line, list_audio(source, access, skipped)))
        if os.path.getsize(work / _LISTING) == 0:
            raise GraniteError(". ".join(filter(None, [f"{source}: no audio files", describe_skipped(skipped)])))
        store.create(_LISTING, work / _LISTING)
    if isinstance(store, LocalStore):
        path = store.directory / _LISTING
    else:
        with store.open(_LISTING) as remote:
            path = _copy(remote, work / _LISTING)
    notes = [] if is_new else _later_files(path, source, access, skipped)
    return path, [*filter(None, [describe_skipped(skipped)]), *notes]


def _later_files(path: Path, source: str, access: AudioStorage, skipped: collections.Counter[str]) -> list[str]:
    """A note about the audio that is not in the listing at `path`; nothing about a source that is not local."""
    if scheme(source) is not None:
        return []
    with open(path, encoding="utf-8") as file:
        listed = set(file)
    later = sum(to_line(name) not in listed for name in list_audio(source, access, skipped))
    note = f"audio files that came after the job's listing, and are left out: {later} (use another --out)"
    return [note] if later else []


def _copy(file: Any, path: Path) -> Path:
    with open(path, "wb") as copy:
        while block := file.read(1 << 20):
            copy.write(block)
    return path
