"""Audio of a job's entries, read ahead of the device by Grain's threads, in order."""

import bisect
import contextlib
import dataclasses
import functools
import io
import itertools
import math
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import grain
import numpy as np

from granite_jax.audio.decode import decode
from granite_jax.audio.load import AccessError, Audio, Recording, check_samples, decode_array, printable
from granite_jax.audio.resample import SAMPLE_RATE, Blocks, check_rate, one_line
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
      audio: a Recording, which reads the file again, if it is longer than `Reader.hold_seconds`.
      file: the `file_versions.version_of` its file; empty if that was not reached.
      is_transient: whether the error is one of access, which a later run may not meet: the file is missing, forbidden
        or out of reach, or its reader was killed.
    """

    entry: Entry
    audio: Audio | Recording | None = None
    error: str | None = None
    file: Mapping[str, Any] = field(default_factory=dict)
    is_transient: bool = False


@dataclass(frozen=True)
class Reader:
    """Reads entries.

    Fields:
      access: which audio may be read.
      max_seconds: longest audio to accept; None for no limit.
      dataset: directory and split of the prepared TFDS data set that `tfds:` entries are examples of.
      detection: how changes of files will be noticed.
      hold_seconds: of longer audio, the samples are not held.
      decode_long: decode longer audio to its end nevertheless, so that it is known to be readable.
    """

    access: AudioStorage
    max_seconds: float | None
    dataset: tuple[str, str] | None = None
    detection: Detection = "time"
    hold_seconds: float = 120.0
    decode_long: bool = False

    def __call__(self, entry: Entry, data: bytes | None = None) -> LoadedEntry:
        """Loads an entry, from `data` if its file's bytes are there. Retries transient errors; returns all others."""
        if entry.error is not None:
            return LoadedEntry(entry, error=entry.error)
        version: dict[str, Any] = {}
        try:
            return LoadedEntry(entry, self._load(entry, data, version), file=version)
        except Exception as error:  # remote file systems can raise anything, and one entry must not end the job
            known = _known(error)
            error_text = f"{printable(entry.audio)}: {known}"
            return LoadedEntry(entry, error=error_text, file=version, is_transient=isinstance(known, AccessError))

    def _load(self, entry: Entry, data: bytes | None, version: dict[str, Any]) -> Audio | Recording:
        """The audio; `version` is filled when its file is open."""
        parts: list[np.ndarray] = []
        num_samples = 0
        with contextlib.closing(_retried_blocks(functools.partial(self._decode, entry, data, version))) as blocks:
            while num_samples <= self.hold_seconds * SAMPLE_RATE:
                try:
                    parts.append(next(blocks))
                except StopIteration as end:
                    check_samples(num_samples)
                    return Audio(entry.audio, np.concatenate(parts), end.value)
                num_samples += len(parts[-1])
            parts.clear()
            if self.decode_long:
                for _ in blocks:
                    pass
        return Recording(entry.audio, functools.partial(self._decode_again, entry, data))

    def _decode(self, entry: Entry, data: bytes | None, version: dict[str, Any]) -> Blocks:
        """The entry's audio in blocks."""
        limit = math.inf if self.max_seconds is None else self.max_seconds
        if data is None and entry.audio.startswith("tfds:"):
            samples, rate = self._example(entry)
            return (yield from decode_array(samples, check_rate(rate), limit))
        with self.access.open(entry.audio) if data is None else io.BytesIO(data) as file:
            version.update(version_of(file, self.detection))
            return (yield from decode(file, None, limit, entry.offset, entry.duration))

    def _decode_again(self, entry: Entry, data: bytes | None) -> Blocks:
        """The entry's audio in blocks; all errors are AudioErrors."""
        try:
            return (yield from _retried_blocks(functools.partial(self._decode, entry, data, {})))
        except Exception as error:  # as in __call__
            known = _known(error)
            if known is error:
                raise
            raise known from error

    def _example(self, entry: Entry) -> tuple[np.ndarray, int]:
        """Samples and rate in Hz of an example of the data set."""
        from granite_jax.batch.tfds import open_dataset

        position = entry.audio.removeprefix("tfds:")
        if self.dataset is None or not position.isdecimal():
            raise AudioError("is no example of the job's data set")
        return open_dataset(*self.dataset)[int(position)]


def _known(error: Exception) -> GraniteError:
    """What a reader raised as an error of this program, without the name: an AccessError if it is transient."""
    if isinstance(error, GraniteError):
        return error
    if isinstance(error, FileNotFoundError):
        return AccessError("no such file")
    return AccessError(f"cannot be read ({_reason(error)})")


def _reason(error: Exception) -> str:
    return one_line(getattr(error, "strerror", None) or error) or type(error).__name__


def _retried_blocks(open_blocks: Callable[[], Blocks]) -> Blocks:
    """The blocks of audio that is opened again at a transient error, without the samples that were there before.

    Each block has the attempts that `retried` makes: a long recording may meet more errors than a short one.
    """
    num_samples = 0
    blocks: Generator[np.ndarray, None, tuple[str, ...]] | None = None

    def read() -> tuple[np.ndarray | None, tuple[str, ...]]:
        nonlocal blocks
        if blocks is None:
            blocks = _without_first(open_blocks(), num_samples)
        try:
            return next(blocks), ()
        except StopIteration as end:
            return None, end.value
        except Exception:
            blocks = None
            raise

    try:
        while True:
            block, flags = retried(read)
            if block is None:
                return flags
            num_samples += len(block)
            yield block
    finally:
        if blocks is not None:
            blocks.close()


def _without_first(blocks: Blocks, num_samples: int) -> Blocks:
    """The blocks without the first samples."""
    with contextlib.closing(blocks):
        while True:
            try:
                block = next(blocks)
            except StopIteration as end:
                return end.value
            if num_samples < len(block):
                yield block[num_samples:]
            num_samples = max(0, num_samples - len(block))


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
        again in a new process, and given up if it kills that, too. Processes also decode long audio to its end, so
        that a file that kills a decoder does not get to kill this process.
      workers: number of threads or processes.

    Raises:
      GraniteError: while iterating: the manifest has changed.
    """
    with contextlib.ExitStack() as stack:
        read: Callable[[Entry], LoadedEntry] = reader
        processes = None
        if kind == "processes":
            processes = ReaderProcesses(dataclasses.replace(reader, decode_long=True), workers)
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
