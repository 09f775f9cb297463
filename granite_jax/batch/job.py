"""One worker of a batch job: manifest -> parts -> readers -> Transcriber -> committed parts.

    readers   part 1, part 2 ...      a chunk ahead of the device, in order
    device             part 1         in chunks of what the pipeline sorts by length, never across parts
    commit                     part 1 while the device goes on

A part is there as a whole or not at all, and is what is lost when a worker dies. Its lines depend on its entries alone.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import granite_jax
from granite_jax.audio.load import printable
from granite_jax.batch.access import KNOWN, PROTOCOLS, AudioStorage, retried, scheme, without_file_scheme
from granite_jax.batch.manifest import Entry, Manifest, is_listing, listing, root_of, split_tfds
from granite_jax.batch.parts import Shard, choose_shard, claim_output_dir, committed, part_name, weights_identity
from granite_jax.batch.reading import Kind, LoadedEntry, Reader, Source, reading
from granite_jax.batch.store import LocalStore, Store, open_store
from granite_jax.checkpoint.directory import parse_dtype
from granite_jax.errors import AudioError, GraniteError
from granite_jax.inference.options import ModelOptions, TranscribeOptions, accepts, resolve
from granite_jax.inference.transcriber import Transcriber, Transcript
from granite_jax.keywords.options import Entry as Keyword
from granite_jax.pretrained import open_checkpoint

PART_SIZE = 1024
_CHUNK_SECONDS = 4 * 3600.0  # of audio, 0.9 GB: the device has a chunk while the next one is read
_LATER_CHUNKS = 4  # times as many entries as the first
_LISTING = "manifest.jsonl"
_FIELDS = ("text", "tokens", "duration", "confidence", "ctc_text", "stats", "flags")  # of a transcript, in its line


@dataclasses.dataclass
class Progress:
    """How far a worker is.

    Fields:
      entries: of its shard.
      resumed: of these, in parts that were there when it began.
      done: in this run, whatever became of them; `failed` of these.
      audio_seconds: transcribed in this run.
      read_seconds: for which the device waited for audio.
      seconds: since the first part was begun.
    """

    entries: int = 0
    resumed: int = 0
    done: int = 0
    failed: int = 0
    audio_seconds: float = 0.0
    read_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def rtfx(self) -> float:
        """Seconds of audio a second."""
        return self.audio_seconds / self.seconds if self.seconds else 0.0


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a worker did.

    Fields:
      fingerprint: of the job.
      shard, num_shards: the worker's share.
      parts: of the share; `resumed_parts` of these were there, `parts_of_others` were committed by another worker.
      entries, transcribed, failed: of the share, when it was finished.
      audio_seconds, wall_seconds, read_wait_seconds, rtfx: of this run.
      stopped: it was asked to end before its share was done; the rest is for the next run.
    """

    fingerprint: str
    shard: int
    num_shards: int
    parts: int
    resumed_parts: int
    parts_of_others: int
    entries: int
    transcribed: int
    failed: int
    audio_seconds: float
    wall_seconds: float
    read_wait_seconds: float
    rtfx: float
    stopped: bool = False


class _Stopped(Exception):
    """The worker is to end."""


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Entries of one part with the same options, with their audio."""

    part: int
    options: TranscribeOptions | None = None
    reads: Sequence[LoadedEntry] = ()


@accepts(ModelOptions, TranscribeOptions)
def run(
    manifest: str | os.PathLike[str],
    out: str | os.PathLike[str],
    model: ModelOptions | str | os.PathLike[str] = "demo",
    options: TranscribeOptions | None = None,
    *,
    transcriber: tuple[Transcriber | Callable[[], Transcriber], str] | None = None,
    shard: int | None = None,
    num_shards: int | None = None,
    part_size: int = PART_SIZE,
    root: str | os.PathLike[str] | None = None,
    allow: tuple[str, ...] = PROTOCOLS,
    readers: Kind = "threads",
    num_readers: int = 16,
    storage_options: dict[str, dict[str, Any]] | None = None,
    keyword_lists: Sequence[Sequence[Keyword] | None] = (),
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
    **fields: Any,
) -> Summary:
    """Transcribes a manifest, or one shard of it, into a directory; goes on where an earlier run was interrupted.

    The directory gets `part-*.jsonl`, one line an utterance in the manifest's order: `index`, `id`, `audio`, and
    `text`, `tokens`, `duration` (in seconds), `confidence`, `ctc_text`, `stats`, `flags`, or `error` in their place;
    `errors.jsonl`, the failed ones alone; `summary.json`; `job.json`, which tells jobs apart. `merge` joins and checks
    them.

    Args:
      manifest: JSON lines (`audio` or `audio_filepath`; optional `id`, `offset` and `duration` in seconds, `task`,
        `target_language` or `to`, `keywords`, `prompt`), a directory, a glob, or `tfds:DIRECTORY#SPLIT`; the first
        three may be URLs.
      out: directory, or URL of gs or s3.
      model: which one runs and where, or the name of its checkpoint. Results do not depend on devices and batch size: a
        job may go on with others.
      options: what is to be written where an utterance's line does not say.
      transcriber: one that is loaded already, or what loads it when there is work, in place of a checkpoint; and a name
        for its weights and dtype.
      shard, num_shards: this worker's share; default that of the environment (`parts.choose_shard`), or everything.
      part_size: utterances of a part, which are lost together when a worker dies, and share batches.
      root: what local files have to be below; default the manifest's directory.
      allow: protocols that audio may come by: of "file", "gs", "s3", "https".
      readers, num_readers: threads, or processes, which survive files that kill a decoder.
      storage_options: arguments of fsspec's file systems, by protocol.
      keyword_lists: a list of keywords for each entry of the manifest (None: as its line or the options have it).
      progress: called when some utterances are done.
      stop: asked often; True ends the run without its current part.
      fields: of `ModelOptions` and `TranscribeOptions`, in place of theirs.

    Raises:
      GraniteError: the manifest, an option or the checkpoint is not usable, or the directory is another job's.
      OSError: results cannot be written.
    """
    where, asked = resolve(model, options, fields)
    source, share = without_file_scheme(os.fspath(manifest)), choose_shard(shard, num_shards)
    unknown = [protocol for protocol in allow if protocol not in KNOWN]
    if unknown:
        raise GraniteError(f"protocol {unknown[0]!r:.40} is not supported, only {', '.join(KNOWN)}")
    if num_readers < 1:
        raise GraniteError(f"num_readers is {num_readers}, not a positive number")
    storage = storage_options or {}
    below = root_of(source) if root is None else without_file_scheme(os.fspath(root))
    access = AudioStorage(below, tuple(allow), tuple(storage.items()))
    store = open_store(out, storage.get(scheme(os.fspath(out)) or "file"))
    opened = open_checkpoint(where.checkpoint, where.revision) if transcriber is None else None
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="granite-jax-")))
        scanned = Manifest.scan(_local_manifest(source, access, store, work), part_size, asked)
        description = {
            "version": granite_jax.__version__,
            "weights": weights_identity(opened) if opened else transcriber[1] if transcriber else "",
            "dtype": parse_dtype(where.dtype).name if opened else "",
            "options": dataclasses.asdict(asked),
            "manifest": {"sha256": scanned.sha256, "source": source if is_listing(source) else ""},
            "entries": scanned.entries,
            "part_size": part_size,
        }
        if keyword_lists:
            if len(keyword_lists) != scanned.entries:
                raise GraniteError(f"{len(keyword_lists)} keyword_lists for {scanned.entries} entries")
            text = json.dumps([None if listed is None else list(listed) for listed in keyword_lists])
            description["keyword_lists"] = hashlib.sha256(text.encode()).hexdigest()
        worker = _Worker(
            scanned, store, claim_output_dir(store, description), share, asked, work, progress, stop, keyword_lists
        )

        def load() -> Transcriber:
            if transcriber is not None:
                return transcriber[0]() if callable(transcriber[0]) else transcriber[0]
            return Transcriber.from_options(where)

        def read_with(asr: Transcriber) -> Reader:
            dataset = split_tfds(source) if source.startswith("tfds:") else None
            return Reader(access, asr.config.max_seconds, dataset)

        return worker.run(load, read_with, readers, num_readers)


def _local_manifest(source: str, access: AudioStorage, store: Store, work: Path) -> Path:
    """A local file of JSON lines: the manifest, a copy of a remote one, or the listing that the first worker made."""
    if not is_listing(source):
        if scheme(source) is None:
            return Path(source)
        try:
            with retried(lambda: access.open(source)) as remote:
                return _copy(remote, work / _LISTING)
        except (AudioError, FileNotFoundError, PermissionError) as error:
            reason = error if isinstance(error, AudioError) else "no such file, or not to be read"
            raise GraniteError(f"{printable(source)}: {reason}") from None
    if _LISTING not in store.names():
        with open(work / _LISTING, "w", encoding="utf-8") as file:
            file.writelines(listing(source, access))
        if os.path.getsize(work / _LISTING) == 0:
            raise GraniteError(f"{source}: no audio files")
        store.create(_LISTING, work / _LISTING)
    if isinstance(store, LocalStore):
        return store.directory / _LISTING
    with store.open(_LISTING) as listed:
        return _copy(listed, work / _LISTING)


def _copy(file: Any, path: Path) -> Path:
    with open(path, "wb") as copy:
        while block := file.read(1 << 20):
            copy.write(block)
    return path


def transcribe_group(
    asr: Transcriber,
    options: TranscribeOptions,
    reads: Sequence[LoadedEntry],
    progress: Callable[[int], None] | None = None,
    keyword_lists: Sequence[Sequence[Keyword] | None] = (),
) -> dict[int, Transcript]:
    """Transcripts, by index, of entries with the same options; what fails has an error.

    Args:
      keyword_lists: for each index, before the lists of entries and options; none at all, or one (or None) an index.
    """
    report = progress or (lambda count: None)
    found = {read.entry.index: Transcript(read.entry.audio, error=read.error) for read in reads if read.audio is None}
    report(len(found))
    usable = {read.entry.index: read for read in reads if read.audio is not None}
    own = [(keyword_lists[i] if keyword_lists else None, read.entry.keywords) for i, read in usable.items()]
    try:
        transcripts = asr.transcribe(
            [read.audio for read in usable.values()],
            options,
            keywords=[next((list(listed) for listed in lists if listed is not None), None) for lists in own],
            on_error="return",
            progress=progress,
        )
    except GraniteError as error:  # of what is asked for: the audio's and the keywords' own are returned
        report(len(usable))
        transcripts = [
            Transcript(read.entry.audio, error=f"{printable(read.entry.audio)}: {error}") for read in usable.values()
        ]
    return found | dict(zip(usable, transcripts, strict=True))


@dataclasses.dataclass
class _Worker:
    manifest: Manifest
    store: Store
    fingerprint: str
    shard: Shard
    options: TranscribeOptions
    work: Path
    report: Callable[[Progress], None] | None
    stop: Callable[[], bool] | None
    keyword_lists: Sequence[Sequence[Keyword] | None] = ()
    progress: Progress = dataclasses.field(default_factory=Progress)
    _started: float = dataclasses.field(default=0.0, init=False)

    def run(
        self, load: Callable[[], Transcriber], reader: Callable[[Transcriber], Reader], kind: Kind, num_readers: int
    ) -> Summary:
        share = self.shard.parts(self.manifest.parts)
        there = committed(self.store, self.fingerprint)
        pending = [part for part in share if part not in there]
        sizes = {part: len(self.manifest.indices(part)) for part in share}
        self.progress.entries = sum(sizes.values())
        self.progress.resumed = self.progress.entries - sum(sizes[part] for part in pending)
        others, stopped = 0, False
        if pending:
            asr = load()
            try:
                with reading(Source(self.manifest, pending), reader(asr), kind, num_readers) as reads:
                    others = self._parts(asr, pending, reads)
            except _Stopped:
                stopped = True
        failed = self._write_errors(share) if not stopped else self.progress.failed
        summary = Summary(
            fingerprint=self.fingerprint,
            shard=self.shard.index,
            num_shards=self.shard.count,
            parts=len(share),
            resumed_parts=len(share) - len(pending),
            parts_of_others=others,
            entries=self.progress.entries,
            transcribed=self.progress.entries - failed,
            failed=failed,
            audio_seconds=round(self.progress.audio_seconds, 3),
            wall_seconds=round(self.progress.seconds, 3),
            read_wait_seconds=round(self.progress.read_seconds, 3),
            rtfx=round(self.progress.rtfx, 1),
            stopped=stopped,
        )
        name = self.shard.name("summary", ".json")
        if not stopped and (pending or not self.store.exists(name)):  # not that of the run that did the work
            path = self.work / name
            path.write_text(json.dumps(dataclasses.asdict(summary), indent=1) + "\n", encoding="utf-8")
            self.store.replace(name, path)
        return summary

    def _parts(self, asr: Transcriber, pending: list[int], reads: Iterator[LoadedEntry]) -> int:
        """Computes and commits parts; returns how many another worker was first to commit."""
        # What is wrong with the job's own options ends the job, not every utterance of it.
        asr.transcribe([], self.options)
        self._started = time.monotonic()
        others, lines = 0, {}
        chunks = self._chunks(pending, reads, asr.read_ahead)
        with ThreadPoolExecutor(1) as committer, ThreadPoolExecutor(1) as taker:
            commit, coming = committer.submit(bool, True), taker.submit(next, chunks, None)
            while True:
                began = time.monotonic()
                chunk = coming.result()
                self.progress.read_seconds += time.monotonic() - began
                if chunk is None:
                    break
                coming = taker.submit(next, chunks, None)
                others += not chunk.reads
                lines |= self._transcribe(asr, chunk)
                indices = self.manifest.indices(chunk.part)
                if len(lines) == len(indices):
                    data = b"".join(lines[index] for index in indices)
                    others, lines = others + (not commit.result()), {}
                    commit = committer.submit(self.store.create, part_name(chunk.part, self.fingerprint), data)
            if lines:
                raise RuntimeError(f"part {pending[-1]}: {len(lines)} entries were read, not all")
            return others + (not commit.result())

    def _chunks(self, pending: list[int], reads: Iterator[LoadedEntry], size: int) -> Iterator[_Chunk]:
        """What the device gets at a time; nothing of a part that another worker has committed in the meantime.

        The first chunk has `size` entries, so that the device has work soon; later ones more, since it has none for a
        moment between them.
        """
        room = size
        for part in pending:
            entries = itertools.islice(reads, len(self.manifest.indices(part)))
            if self.store.exists(part_name(part, self.fingerprint)):
                for _ in entries:
                    self._check_stop()
                yield _Chunk(part)
            for options, group in itertools.groupby(entries, key=lambda read: read.entry.options):
                while chunk := self._take(group, room):
                    yield _Chunk(part, options, chunk)
                    room = _LATER_CHUNKS * size

    def _take(self, reads: Iterator[LoadedEntry], size: int) -> list[LoadedEntry]:
        """The next `size` of them, or fewer if they are long."""
        taken, seconds = [], 0.0
        for read in reads:
            self._check_stop()
            taken.append(read)
            seconds += read.audio.duration if read.audio is not None else 0.0
            if len(taken) == size or seconds > _CHUNK_SECONDS:
                break
        return taken

    def _transcribe(self, asr: Transcriber, chunk: _Chunk) -> dict[int, bytes]:
        """A chunk's lines, by index."""

        def advance(count: int) -> None:
            self.progress.done += count
            self._report()

        found = transcribe_group(asr, chunk.options or self.options, chunk.reads, advance, self.keyword_lists)
        lines = {read.entry.index: self._line(read.entry, found[read.entry.index]) for read in chunk.reads}
        self._report()  # the audio, too
        return lines

    def _line(self, entry: Entry, transcript: Transcript) -> bytes:
        """An utterance's line, which holds nothing that another run would not write."""
        fields: dict[str, Any] = {"index": entry.index, "id": entry.id, "audio": entry.audio}
        if entry.offset:
            fields["offset"] = entry.offset
        if transcript.error is not None:
            self.progress.failed += 1
            fields["error"] = transcript.error
        else:
            self.progress.audio_seconds += transcript.duration
            fields |= {key: getattr(transcript, key) for key in _FIELDS}
        # File names need not be text: what is none stays an escape.
        return (json.dumps(fields, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")

    def _report(self) -> None:
        self.progress.seconds = time.monotonic() - self._started
        if self.report is not None:
            self.report(self.progress)
        self._check_stop()

    def _check_stop(self) -> None:
        if self.stop is not None and self.stop():
            raise _Stopped

    def _write_errors(self, share: range) -> int:
        """Writes the failed entries of a share's parts; returns how many."""
        failed, path = 0, self.work / "errors.jsonl"
        with open(path, "wb") as errors:
            for part in share:
                with self.store.open(part_name(part, self.fingerprint)) as lines:
                    for line in lines:
                        if "error" in json.loads(line):
                            errors.write(line)
                            failed += 1
        self.store.replace(self.shard.name("errors", ".jsonl"), path)
        return failed
