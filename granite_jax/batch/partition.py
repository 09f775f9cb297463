"""How a job's entries are divided into parts: by their number, and by seconds of audio.

Seconds are those of the manifest, or else estimated from the sizes of files: of all, or of a thousand for the others.
Sizes can change, so that the first worker writes the division to `parts.json`, from which all others take it.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from granite_jax.batch.access import STORES, AudioStorage, scheme
from granite_jax.batch.manifest import Entry, Manifest
from granite_jax.batch.store import Store
from granite_jax.errors import GraniteError

PART_SIZE = 1024
PART_SECONDS = 3600.0
_PARTS = "parts.json"
_MAX_LOOKUPS = 1024  # of sizes
_LOOKUP_THREADS = 16
_LOSSLESS = (".wav", ".wave", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".w64", ".rf64", ".flac")
# Bytes a second of telephone audio, and of speech at 16 kbit/s. Most audio has more: its parts are shorter.
_LOSSLESS_RATE, _LOSSY_RATE = 8_000, 2_000


@dataclass(frozen=True)
class Partition:
    """The parts of a job.

    Fields:
      entries: number of entries.
      starts: index of every part's first entry.
    """

    entries: int
    starts: Sequence[int]

    def __len__(self) -> int:
        return len(self.starts)

    def indices(self, part: int) -> range:
        """Indices of a part's entries."""
        return range(self.starts[part], self.starts[part + 1] if part + 1 < len(self) else self.entries)


def agree_on_partition(store: Store, job: Mapping[str, Any], manifest: Manifest, access: AudioStorage) -> Partition:
    """The partition of a job that has claimed the directory: that of its first worker, which this one may be."""
    if "part_seconds" in job and not store.exists(_PARTS):
        starts = divide(_seconds(manifest, access), job["part_size"], job["part_seconds"])
        store.create(_PARTS, (json.dumps({"starts": starts}) + "\n").encode())
    return read_partition(store, job)


def read_partition(store: Store, job: Mapping[str, Any]) -> Partition:
    """The partition of a job. Raises GraniteError if it is missing or damaged."""
    entries, size = job.get("entries"), job.get("part_size")
    if not isinstance(entries, int) or not isinstance(size, int) or entries < 1 or size < 1:
        raise GraniteError("job.json does not say how many entries there are")
    if "part_seconds" not in job:  # of a version whose parts had a number of entries, of any length
        return Partition(entries, range(0, entries, size))
    try:
        with store.open(_PARTS) as file:
            starts = json.loads(file.read())["starts"]
        is_valid = (
            all(type(start) is int for start in starts)
            and starts[0] == 0
            and all(0 < b - a <= size for a, b in itertools.pairwise([*starts, entries]))
        )
    except FileNotFoundError:
        raise GraniteError(f"{_PARTS} is missing; run the job again") from None
    except (ValueError, LookupError, TypeError, RecursionError):
        starts, is_valid = [], False
    if not is_valid:
        raise GraniteError(f"{_PARTS} is damaged")
    return Partition(entries, starts)


def divide(seconds: Iterable[float], part_size: int, part_seconds: float) -> list[int]:
    """The starts of parts of at most so many entries, and so many seconds if they have several entries.

    Args:
      seconds: of each entry.
    """
    starts, total = list[int](), 0.0
    for index, each in enumerate(seconds):
        if not starts or index - starts[-1] == part_size or total + each > part_seconds:
            starts.append(index)
            total = 0.0
        total += each
    return starts


def _seconds(manifest: Manifest, access: AudioStorage) -> Iterator[float]:
    """Seconds of each entry, as far as they are known without opening files."""
    estimates = _estimates(manifest, access)
    mean = sum(estimates.values()) / len(estimates) if estimates else 0.0
    for index, duration in enumerate(manifest.durations()):
        yield estimates.get(index, mean) if duration is None else duration


def _estimates(manifest: Manifest, access: AudioStorage) -> dict[int, float]:
    """Seconds of entries without a duration, by index: of all, or of a thousand of many; not of those out of reach."""
    step = math.ceil(manifest.entries / _MAX_LOOKUPS)
    sample = manifest.entries_at(range(0, manifest.entries, step))
    sample = [entry for entry in sample if entry.error is None and entry.duration is None]
    protocols = {protocol for entry in sample if (protocol := scheme(entry.audio) or scheme(access.root))}
    # Remote file systems can raise anything, after minutes: one that fails is not asked again.
    failing = {protocol for protocol in protocols if not _is_reachable(access, protocol)}

    def estimate(entry: Entry) -> float | None:
        protocol = scheme(entry.audio) or scheme(access.root)
        if protocol in failing:
            return None
        try:
            size = access.size(entry.audio)
        except Exception as error:
            if protocol is not None and not isinstance(error, GraniteError | FileNotFoundError | PermissionError):
                failing.add(protocol)
            return None
        rate = _LOSSLESS_RATE if entry.audio.lower().endswith(_LOSSLESS) else _LOSSY_RATE
        return max(0.0, size / rate - entry.offset)

    with ThreadPoolExecutor(_LOOKUP_THREADS) as pool:
        seconds = zip(sample, pool.map(estimate, sample), strict=True)
        return {entry.index: each for entry, each in seconds if each is not None}


def _is_reachable(access: AudioStorage, protocol: str) -> bool:
    """Whether sizes can be asked for."""
    if protocol not in STORES or protocol not in access.protocols:
        return False
    try:
        access.filesystem(protocol)
    except Exception:  # packages of stores can raise anything
        return False
    return True
