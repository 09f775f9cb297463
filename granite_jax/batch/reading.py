"""Audio of a job's entries, which the Transcriber's threads read, or processes for them."""

import contextlib
import functools
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from granite_jax.audio.decode import decode
from granite_jax.audio.load import AccessError, Audio, Recording, check_samples, decode_array, open_recording
from granite_jax.audio.resample import WHOLE, Blocks, Condition, check_rate
from granite_jax.batch.access import AudioStorage, retried
from granite_jax.batch.file_versions import Detection, version_of
from granite_jax.batch.manifest import Entry
from granite_jax.batch.reader_processes import Killed, ReaderProcesses
from granite_jax.errors import AudioError, GraniteError, one_line
from granite_jax.waveform import SAMPLING_RATE

Kind = Literal["threads", "processes"]


@dataclass(frozen=True)
class EntryAudio:
    """An entry's audio, for a Transcriber to read, and what is found out when that is done.

    Fields:
      recording: reads the file each time it is decoded; all of its errors are AudioErrors, and AccessErrors if a later
        run may not meet them: the file is missing, forbidden or out of reach, or killed the process that read it.
      file: the `file_versions.version_of` its file; empty as long as that was not reached.
    """

    entry: Entry
    recording: Recording
    file: Mapping[str, Any]


@dataclass(frozen=True)
class LoadedEntry:
    """What a reader process returns: an entry's audio, or why there is none.

    Fields:
      audio: a Recording, which reads the file again, if it is longer than `Reader.hold_seconds`.
      file: as in `EntryAudio`.
      is_transient: whether the error is one of access.
    """

    audio: Audio | Recording | None = None
    error: str = ""
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
      hold_seconds: of longer audio, `load` does not hold the samples.
    """

    access: AudioStorage
    max_seconds: float | None
    dataset: tuple[str, str] | None = None
    detection: Detection = "time"
    hold_seconds: float = 120.0

    def open(self, entry: Entry, data: bytes | None = None) -> EntryAudio:
        """The audio of an entry, which is read later, and again after transient errors; from `data` if these are its
        file's bytes.
        """
        version: dict[str, Any] = {}
        recording = Recording(entry.audio, functools.partial(self._blocks, entry, data, version))
        return EntryAudio(entry, recording, version)

    def load(self, entry: Entry) -> LoadedEntry:
        """Reads an entry to its end, in a process that a file may kill, and returns errors."""
        opened = self.open(entry)
        try:
            audio = self._load(opened.recording)
            return LoadedEntry(audio, file=opened.file)
        except AudioError as error:
            return LoadedEntry(None, str(error), opened.file, isinstance(error, AccessError))

    def _load(self, recording: Recording) -> Audio | Recording:
        parts: list[np.ndarray] = []
        num_samples = 0
        with contextlib.closing(recording.decode()) as blocks:
            while num_samples <= self.hold_seconds * SAMPLING_RATE:
                try:
                    parts.append(next(blocks))
                except StopIteration as end:
                    check_samples(num_samples)
                    return Audio(recording.name, np.concatenate(parts), end.value)
                num_samples += len(parts[-1])
            parts.clear()
            for _ in blocks:
                pass
        return recording

    def _blocks(self, entry: Entry, data: bytes | None, version: dict[str, Any]) -> Blocks:
        """The entry's audio in blocks; all errors are AudioErrors. `version` is filled when its file is open."""
        try:
            return (yield from _retried_blocks(functools.partial(self._decode, entry, data, version)))
        except AudioError:
            raise
        except Exception as error:  # remote file systems can raise anything, and one entry must not end the job
            raise _known(error) from error

    def _decode(self, entry: Entry, data: bytes | None, version: dict[str, Any]) -> Blocks:
        """The entry's audio in blocks."""
        limit = math.inf if self.max_seconds is None else self.max_seconds
        if data is None and entry.audio.startswith("tfds:"):
            samples, rate = self._example(entry)
            return (yield from decode_array(samples, check_rate(rate), limit))
        with self.access.open(entry.audio) if data is None else io.BytesIO(data) as file:
            version.update(version_of(file, self.detection))
            return (yield from decode(file, None, limit, entry.offset, entry.duration))

    def _example(self, entry: Entry) -> tuple[np.ndarray, int]:
        """Samples and rate in Hz of an example of the data set."""
        from granite_jax.batch.tfds import open_dataset

        position = entry.audio.removeprefix("tfds:")
        if self.dataset is None or not position.isdecimal():
            raise AudioError("is no example of the job's data set")
        return open_dataset(*self.dataset)[int(position)]


def _known(error: Exception) -> AudioError:
    """What a reader raised, as an error without the name: an AccessError if it is transient."""
    if isinstance(error, GraniteError):
        return AudioError(str(error))
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
    blocks: Blocks | None = None

    def read() -> tuple[np.ndarray | None, Condition]:
        nonlocal blocks
        if blocks is None:
            blocks = _without_first(open_blocks(), num_samples)
        try:
            return next(blocks), WHOLE
        except StopIteration as end:
            return None, end.value
        except Exception:
            blocks = None
            raise

    try:
        while True:
            block, condition = retried(read)
            if block is None:
                return condition
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


@contextlib.contextmanager
def opening(reader: Reader, kind: Kind, workers: int) -> Iterator[Callable[[Entry], EntryAudio]]:
    """A function that opens entries, for the Transcriber's threads to read.

    Args:
      kind: "threads": these threads read. "processes": each has a process read, which starts more slowly, but which a
        file may kill: it is then read again in a new process, and given up if it kills that, too.
      workers: number of processes.
    """
    if kind == "threads":
        yield reader.open
        return
    processes = ReaderProcesses(reader.load, workers)
    try:
        yield functools.partial(_open_in, processes)
    finally:
        processes.close()


def _open_in(processes: "ReaderProcesses[Entry, LoadedEntry]", entry: Entry) -> EntryAudio:
    version: dict[str, Any] = {}

    def blocks() -> Blocks:
        try:
            loaded = processes(entry)
        except Killed:
            raise AccessError("killed the process that read it, twice") from None
        version.update(loaded.file)
        if loaded.audio is None:
            raise (AccessError if loaded.is_transient else AudioError)(loaded.error)
        return (yield from open_recording(loaded.audio).decode())

    return EntryAudio(entry, Recording(entry.audio, blocks), version)
