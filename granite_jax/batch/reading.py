"""Audio of a job's entries, read ahead of the device by Grain's threads, in order."""

import bisect
import contextlib
import functools
import io
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import grain

from granite_jax.audio.load import AccessError, Audio, load_audio, load_segment, printable
from granite_jax.audio.resample import one_line
from granite_jax.batch.access import AudioStorage, retried
from granite_jax.batch.file_versions import Detection, version_of
from granite_jax.batch.manifest import Entry, Manifest
from granite_jax.batch.reader_processes import Killed, ReaderProcesses
from granite_jax.errors import AudioError, GraniteError

Kind = Literal["threads", "processes"]


@dataclass(frozen=True)
class LoadedEntry:
    """An entry and its audio, or why there is none.

    Fields:
      file: the `file_versions.version_of` its file; empty if that was not reached.
      is_transient: whether the error is one of access, which a later run may not meet: the file is missing, forbidden
        or out of reach, or its reader was killed.
    """

    entry: Entry
    audio: Audio | None = None
    error: str | None = None
    file: Mapping[str, Any] = field(default_factory=dict)
    is_transient: bool = False


@dataclass(frozen=True)
class Reader:
    """Reads entries.

    Fields:
      access: which audio may be read.
      max_seconds: longest audio to accept.
      dataset: directory and split of the prepared TFDS data set that `tfds:` entries are examples of.
      detection: how changes of files will be noticed.
    """

    access: AudioStorage
    max_seconds: float
    dataset: tuple[str, str] | None = None
    detection: Detection = "time"

    def __call__(self, entry: Entry, data: bytes | None = None) -> LoadedEntry:
        """Loads an entry, from `data` if its file's bytes are there. Retries transient errors; returns all others."""
        if entry.error is not None:
            return LoadedEntry(entry, error=entry.error)
        version: dict[str, Any] = {}
        try:
            return LoadedEntry(entry, retried(lambda: self._load(entry, data, version)), file=version)
        except FileNotFoundError:
            return LoadedEntry(entry, error=f"{printable(entry.audio)}: no such file", is_transient=True)
        except Exception as error:  # remote file systems can raise anything, and one entry must not end the job
            is_known = isinstance(error, GraniteError)
            reason = str(error) if is_known else f"cannot be read ({_reason(error)})"
            is_transient = not is_known or isinstance(error, AccessError)
            error_text = f"{printable(entry.audio)}: {reason}"
            return LoadedEntry(entry, error=error_text, file=version, is_transient=is_transient)

    def _load(self, entry: Entry, data: bytes | None, version: dict[str, Any]) -> Audio:
        """The audio; `version` is filled when its file is open."""
        if data is None and entry.audio.startswith("tfds:"):
            return self._example(entry)
        with self.access.open(entry.audio) if data is None else io.BytesIO(data) as file:
            version.update(version_of(file, self.detection))
            return load_segment(
                file, entry.audio, offset=entry.offset, duration=entry.duration, max_seconds=self.max_seconds
            )

    def _example(self, entry: Entry) -> Audio:
        from granite_jax.batch.tfds import open_dataset

        position = entry.audio.removeprefix("tfds:")
        if self.dataset is None or not position.isdecimal():
            raise AudioError("is no example of the job's data set")
        try:
            samples, rate = open_dataset(*self.dataset)[int(position)]
            return load_audio(samples, sampling_rate=rate, name="", max_seconds=self.max_seconds)
        except AudioError as error:
            raise AudioError(str(error).removeprefix("'': ")) from None


def _reason(error: Exception) -> str:
    return one_line(getattr(error, "strerror", None) or error) or type(error).__name__


@dataclass(frozen=True)
class Task:
    """What is committed in one step: a part, or a retry of its failed entries.

    Fields:
      part: its number.
      indices: of its entries, in ascending order.
      retry: the number of the retry, from 1 on; 0 for the part itself.
    """

    part: int
    indices: Sequence[int]
    retry: int = 0


@dataclass(frozen=True)
class Source:
    """The entries of some tasks, one task after another; those of a task are grouped by options."""

    manifest: Manifest
    tasks: Sequence[Task]
    _cache: "_TaskCache" = field(default_factory=lambda: _TaskCache(), repr=False, compare=False)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Entry:
        number = bisect.bisect_right(self._ends, int(index))
        start = self._ends[number - 1] if number else 0
        return self._cache.get(self.manifest, self.tasks[number])[int(index) - start]

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(len(task.indices) for task in self.tasks))


class _TaskCache:
    """The entries of the three tasks read last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tasks: dict[tuple[int, int], list[Entry]] = {}

    def get(self, manifest: Manifest, task: Task) -> list[Entry]:
        key = task.part, task.retry
        with self._lock:
            if key not in self._tasks:
                self._tasks = dict([*self._tasks.items()][-2:])
                indices = set(task.indices) if task.retry else task.indices
                self._tasks[key] = [entry for entry in manifest.read(task.part) if entry.index in indices]
            return self._tasks[key]


@contextlib.contextmanager
def reading(source: Source, reader: Reader, kind: Kind, workers: int) -> Iterator[Iterator[LoadedEntry]]:
    """Reads the entries of a source in order; each worker reads some entries ahead.

    Args:
      kind: threads of this process; or processes, which start more slowly, but which a file may kill: it is then read
        again in a new process, and given up if it kills that, too.
      workers: number of threads or processes.

    Raises:
      GraniteError: while iterating: the manifest has changed.
    """
    with contextlib.ExitStack() as stack:
        read: Callable[[Entry], LoadedEntry] = reader
        processes = None
        if kind == "processes":
            processes = ReaderProcesses(reader, workers)
            read = functools.partial(_read_in, processes)
        options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
        iterator = iter(grain.MapDataset.source(source).map(read).to_iter_dataset(options))
        stack.callback(iterator.close)
        if processes is not None:
            stack.callback(processes.close)  # first, so that no thread waits for them
        yield iterator


def _read_in(processes: "ReaderProcesses[Entry, LoadedEntry]", entry: Entry) -> LoadedEntry:
    try:
        return processes(entry)
    except Killed:
        error = f"{printable(entry.audio)}: killed the process that read it, twice"
        return LoadedEntry(entry, error=error, is_transient=True)
