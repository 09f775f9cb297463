"""Audio of a job's entries, read ahead of the device by Grain's threads or processes, in order."""

import contextlib
import multiprocessing
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, Literal

import grain

from granite_jax.audio.load import Audio, load_audio, load_segment, printable
from granite_jax.audio.resample import one_line
from granite_jax.batch.access import AudioStorage, retried
from granite_jax.batch.manifest import Entry, Manifest
from granite_jax.errors import AudioError, GraniteError

Kind = Literal["threads", "processes"]
_THREADS_PER_PROCESS = 2
_PER_PROCESS = 4  # entries that a process reads ahead


@dataclass(frozen=True)
class LoadedEntry:
    """An entry and its audio, or why there is none."""

    entry: Entry
    audio: Audio | None = None
    error: str | None = None


@dataclass(frozen=True)
class Reader:
    """Reads entries.

    Fields:
      access: what may be read.
      max_seconds: longest audio to accept.
      dataset: directory and split of the prepared TFDS data set that `tfds:` entries are examples of.
    """

    access: AudioStorage
    max_seconds: float
    dataset: tuple[str, str] | None = None

    def __call__(self, entry: Entry) -> LoadedEntry:
        """Never raises for what is wrong with the entry; tries again what may pass."""
        if entry.error is not None:
            return LoadedEntry(entry, error=entry.error)
        try:
            return LoadedEntry(entry, retried(lambda: self._load(entry)))
        except FileNotFoundError:
            return LoadedEntry(entry, error=f"{printable(entry.audio)}: no such file")
        except Exception as error:  # a remote file system raises what it likes, and one entry must not end the job
            reason = str(error) if isinstance(error, GraniteError) else f"cannot be read ({_reason(error)})"
            return LoadedEntry(entry, error=f"{printable(entry.audio)}: {reason}")

    def _load(self, entry: Entry) -> Audio:
        if entry.audio.startswith("tfds:"):
            return self._example(entry)
        with self.access.open(entry.audio) as file:
            return load_segment(
                file, entry.audio, offset=entry.offset, duration=entry.duration, max_seconds=self.max_seconds
            )

    def _example(self, entry: Entry) -> Audio:
        from granite_jax.batch.tfds import open_dataset

        place = entry.audio.removeprefix("tfds:")
        if self.dataset is None or not place.isdecimal():
            raise AudioError("is no example of the job's data set")
        try:
            samples, rate = open_dataset(*self.dataset)[int(place)]
            return load_audio(samples, sampling_rate=rate, name="", max_seconds=self.max_seconds)
        except AudioError as error:
            raise AudioError(str(error).removeprefix("'': ")) from None


def _reason(error: Exception) -> str:
    return one_line(getattr(error, "strerror", None) or error) or type(error).__name__


@dataclass(frozen=True)
class Source:
    """The entries of some parts of a manifest, in ascending order: only the last part is smaller than the others."""

    manifest: Manifest
    parts: Sequence[int]
    _cache: "_PartCache" = field(default_factory=lambda: _PartCache(), repr=False, compare=False)

    def __len__(self) -> int:
        return (len(self.parts) - 1) * self.manifest.part_size + len(self.manifest.indices(self.parts[-1]))

    def __getitem__(self, index: int) -> Entry:
        number, position = divmod(int(index), self.manifest.part_size)
        return self._cache.get(self.manifest, self.parts[number])[position]


class _PartCache:
    """The entries of the parts read last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parts: dict[int, list[Entry]] = {}

    def __reduce__(self) -> Any:
        return _PartCache, ()

    def get(self, manifest: Manifest, part: int) -> list[Entry]:
        with self._lock:
            if part not in self._parts:
                self._parts = dict([*self._parts.items()][-2:])
                self._parts[part] = manifest.read(part)
            return self._parts[part]


@contextlib.contextmanager
def reading(source: Source, reader: Reader, kind: Kind, workers: int) -> Iterator[Iterator[LoadedEntry]]:
    """The entries of a source, read in order, some ahead for each worker.

    Args:
      kind: threads of this process; or processes, slower to start, which may die of a file: one that kills a second
        process, which reads it alone, is given up.
      workers: how many.

    Raises:
      GraniteError: when reading: the manifest has changed.
    """
    if kind == "threads":
        options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
        iterator = iter(grain.MapDataset.source(source).map(reader).to_iter_dataset(options))
        try:
            yield iterator
        finally:
            iterator.close()
    else:
        with contextlib.closing(_from_processes(source, reader, workers)) as reads:
            yield reads


def _from_processes(source: Source, reader: Reader, workers: int) -> Generator[LoadedEntry]:
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # Grain's processes are told of the flags
    threads = grain.ReadOptions(num_threads=_THREADS_PER_PROCESS, prefetch_buffer_size=_PER_PROCESS)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_PER_PROCESS)
    done, total = 0, len(source)
    while done < total:
        dataset = grain.MapDataset.source(source)[done:].map(reader).to_iter_dataset(threads).mp_prefetch(options)
        iterator = iter(dataset)
        try:
            for read in iterator:
                done += 1
                yield read
        except RuntimeError as error:
            if "exit" not in str(error):
                raise
        finally:
            iterator.close()
        # A process is gone, and with it what it was reading: one of the next entries killed it.
        suspects = range(done, min(total, done + workers * 2 * (_PER_PROCESS + _THREADS_PER_PROCESS)))
        for read in _one_by_one(reader, (source[place] for place in suspects)):
            done += 1
            yield read


def _one_by_one(reader: Reader, entries: Iterator[Entry]) -> Iterator[LoadedEntry]:
    """Reads each entry in a process that may die of it."""
    context = multiprocessing.get_context("spawn")
    left = True
    while left:
        left = False
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            for entry in entries:
                try:
                    yield pool.submit(reader, entry).result()
                except BrokenProcessPool:
                    yield LoadedEntry(entry, error=f"{printable(entry.audio)}: killed the process that read it, twice")
                    left = True
                    break
