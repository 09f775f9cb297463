"""One worker of a batch job: manifest -> parts -> Transcriber -> committed parts.

    submitted   part 1, part 2 ...       twice the Transcriber's `read_ahead`, from any part
    device              part 1, 2 ...    batches of utterances of similar length, of several parts where these meet
    commit                      part 1   each when its last utterance is done, while the device continues

A part is committed as a whole or not at all (`unfinished`); the next worker continues with the lines that a stopped or
killed one left. The lines of a part depend only on its entries.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import queue
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import granite_jax
from granite_jax.batch.access import PROTOCOLS, AudioStorage, check_protocols, scheme, without_file_scheme
from granite_jax.batch.committed import committed_parts, read_part
from granite_jax.batch.file_versions import ChangeDetector, Detection
from granite_jax.batch.listing import identity_of, is_listing, root_of, split_tfds
from granite_jax.batch.local_manifest import local_manifest
from granite_jax.batch.manifest import Entry, Manifest
from granite_jax.batch.manifest_files import to_json_lines
from granite_jax.batch.partition import PART_SECONDS, PART_SIZE, Partition, agree_on_partition
from granite_jax.batch.parts import Shard, choose_shard, claim_output_dir, has_unbounded_parts, weights_identity
from granite_jax.batch.reader_processes import check_processes
from granite_jax.batch.reading import EntryAudio, Kind, Reader, Task, opening
from granite_jax.batch.store import Store, open_store
from granite_jax.batch.transcription import submit_entry, transcript_of
from granite_jax.batch.unfinished import (
    SAVE_SECONDS,
    Committer,
    StartedTask,
    remove_committed,
    unfinished_files,
    usable_lines,
)
from granite_jax.checkpoint.directory import parse_dtype
from granite_jax.errors import GraniteError
from granite_jax.formats.schema import transcript_fields
from granite_jax.keywords.options import Entry as Keyword
from granite_jax.options import ModelOptions, TranscribeOptions, accepts, check_mixed, resolve
from granite_jax.pretrained import open_checkpoint
from granite_jax.transcriber import Transcriber, Transcript

OpenEntry = Callable[[Entry], EntryAudio]
_Submitted = tuple[StartedTask, EntryAudio]

_STOP_POLL_SECONDS = 0.1
_MAX_ERRORS = 3  # in a summary
_LONG_PART = PART_SECONDS  # seconds of audio that are worth a note
_LONG_PART_NOTE = (
    "a part has more than an hour of audio, which one worker does; "
    "one that is stopped keeps whole recordings of it, and the next one begins the others again"
)
_NOTHING_DONE = (
    "nothing was done when this worker was stopped; a recording that takes longer than a worker has is never done"
)


@dataclasses.dataclass
class Progress:
    """How far a worker is.

    Fields:
      notes: what is odd about the manifest: sentences.
      entries: number of entries in its shard.
      resumed: entries that were finished before this run, as far as it has come to them.
      done: entries finished in this run, including failed ones.
      failed: entries that failed in this run.
      audio_seconds: seconds of audio transcribed in this run.
      read_seconds: seconds that the device had nothing to do, because audio was read.
      seconds: wall time since the first part was started.
    """

    notes: tuple[str, ...] = ()
    entries: int = 0
    resumed: int = 0
    done: int = 0
    failed: int = 0
    audio_seconds: float = 0.0
    read_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def rtfx(self) -> float:
        """Seconds of audio transcribed a second."""
        return self.audio_seconds / self.seconds if self.seconds else 0.0


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a worker did.

    Fields:
      fingerprint: identifies the job.
      shard, num_shards: the worker's share.
      parts: number of parts in the share; `resumed_parts` of these were committed before this run, `parts_of_others` by
        another worker during it.
      kept: number of entries that a former run had finished, in parts that were not committed.
      retried: number of entries of former runs that were tried again.
      changed: how many of these because their files have changed.
      entries, transcribed, failed: numbers of entries in the share, or in this run if it was stopped.
      audio_seconds, wall_seconds, read_wait_seconds, rtfx: measured in this run.
      stopped: whether it was asked to stop before its share was done; the next run does the rest.
      notes: what is odd about the manifest: sentences.
      errors: ids and errors of the first utterances of the share that failed.
    """

    fingerprint: str
    shard: int
    num_shards: int
    parts: int
    resumed_parts: int
    parts_of_others: int
    kept: int
    retried: int
    changed: int
    entries: int
    transcribed: int
    failed: int
    audio_seconds: float
    wall_seconds: float
    read_wait_seconds: float
    rtfx: float
    stopped: bool = False
    notes: tuple[str, ...] = ()
    errors: tuple[tuple[str, str], ...] = ()


class _Stopped(Exception):
    """The worker was asked to stop."""


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
    part_seconds: float = PART_SECONDS,
    root: str | os.PathLike[str] | None = None,
    allow: tuple[str, ...] = PROTOCOLS,
    readers: Kind = "threads",
    num_readers: int = 16,
    storage_options: dict[str, dict[str, Any]] | None = None,
    keyword_lists: Sequence[Sequence[Keyword] | None] = (),
    retry_failed: bool = False,
    detect_changes: Detection = "time",
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
    **fields: Any,
) -> Summary:
    """Transcribes a manifest, or one shard of it, into a directory; resumes an interrupted run.

    A run also tries again what failed in an earlier one because the audio was out of reach, and transcribes anew what
    has changed since.

    The directory gets `part-*.jsonl` with a line for each utterance, in the manifest's order: `index`, `id`, `audio`,
    `file` (size in `bytes` and time when it was `modified`, of a local one), and `text`, `tokens`, `duration` (in
    seconds), `confidence`, `ctc_text`, `stats`, `flags`, `damage`, or else `error` (and `transient`, if it was one of
    access);
    `segments` (as in a `Segment`, without tokens); lines of retries in files beside them (`committed`);
    `errors.jsonl`, only the failed ones; `summary.json`; `job.json`, which identifies the job; `parts.json`, which says
    where parts begin; and `unfinished-*.jsonl` for what a worker has left (`unfinished`). `merge` joins and checks the
    parts.

    Args:
      manifest: JSON lines (`audio`, or as in `audio_fields`; optional `id`, `offset` and `duration` in seconds, `task`,
        `target_language` or `to`, `keywords`, `prompt`) or the same in another form (`manifest_files`), a directory, a
        glob, or `tfds:DIRECTORY#SPLIT`; all but the last may be URLs.
      out: directory, or URL of gs or s3.
      model: which model runs and where, or the name of its checkpoint. Results do not depend on devices or batch size,
        so a job may be resumed with others.
      options: apply to utterances whose line does not set its own.
      transcriber: replaces the checkpoint: a Transcriber, or a function that loads it and is called only if there is
        work, and a name for its weights and dtype.
      shard, num_shards: this worker's share; default from the environment (`parts.choose_shard`), or everything.
      part_size: most utterances in a part. Each part is one file, and is done by one worker.
      part_seconds: most seconds of audio in a part of several utterances, estimated where the manifest does not say.
      root: directory that local files must be below; default the manifest's directory.
      allow: protocols that audio may use, out of "file", "gs", "s3", "https".
      readers, num_readers: threads, or processes, which survive files that crash a decoder.
      storage_options: arguments of fsspec's file systems, by protocol.
      keyword_lists: a list of keywords for each entry of the manifest (None: use those of its line or the options).
      retry_failed: try everything again that failed.
      detect_changes: how a local file is recognized that has changed since a former run read it, and is read again: by
        size and time of modification, by a "hash" of its bytes, which that run must have recorded, or "off".
      progress: called when some utterances are done.
      stop: polled often; True ends the run, which keeps the utterances that are done.
      fields: of `ModelOptions` and `TranscribeOptions`; they override those of `model` and `options`.

    Raises:
      GraniteError: the manifest, an option or the checkpoint is not usable, or the directory belongs to another job.
      OSError: results cannot be written.
    """
    model_options, job_options = resolve(model, options, fields)
    check_mixed(job_options)
    source, share = without_file_scheme(os.fspath(manifest)), choose_shard(shard, num_shards)
    check_protocols(allow)
    for name, value in (("num_readers", num_readers), ("part_size", part_size), ("part_seconds", part_seconds)):
        if not 0 < value < math.inf:
            raise GraniteError(f"{name} is {value}, not a positive number")
    if readers == "processes":
        check_processes()
    storage = storage_options or {}
    audio_root = root_of(source) if root is None else without_file_scheme(os.fspath(root))
    access = AudioStorage(audio_root, tuple(allow), tuple(storage.items()))
    store = open_store(out, storage.get(scheme(os.fspath(out)) or "file"))
    checkpoint = open_checkpoint(model_options.checkpoint, model_options.revision) if transcriber is None else None
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"granite-jax-{os.getpid()}-")))
        local, notes = local_manifest(source, access, store, work)
        scanned = Manifest.scan(to_json_lines(local, source, work), job_options, source)
        if scanned.ignored_fields:
            names = ", ".join(scanned.ignored_fields)[:200]
            notes.append(f"the manifest has fields that are not understood, and change nothing: {names}")
        description = {
            "version": granite_jax.__version__,
            "weights": weights_identity(checkpoint) if checkpoint else transcriber[1] if transcriber else "",
            "dtype": parse_dtype(model_options.dtype).name if checkpoint else "",
            "options": dataclasses.asdict(job_options),
            "manifest": {"sha256": scanned.sha256, "source": identity_of(source) if is_listing(source) else ""},
            "entries": scanned.entries,
            "part_size": part_size,
            "root": access.resolved_root,
            "allow": sorted(access.protocols),
        }
        if part_seconds != PART_SECONDS or not has_unbounded_parts(store):
            description["part_seconds"] = float(part_seconds)
        if keyword_lists:
            if len(keyword_lists) != scanned.entries:
                raise GraniteError(f"{len(keyword_lists)} keyword_lists for {scanned.entries} entries")
            text = json.dumps([None if keywords is None else list(keywords) for keywords in keyword_lists])
            description["keyword_lists"] = hashlib.sha256(text.encode()).hexdigest()
        fingerprint = claim_output_dir(store, description)
        partition = agree_on_partition(store, description, scanned, access)
        worker = _Worker(
            scanned,
            partition,
            store,
            fingerprint,
            share,
            job_options,
            work,
            progress,
            stop,
            keyword_lists,
            retry_failed,
            ChangeDetector(access, detect_changes),
            Progress(tuple(notes)),
        )

        def load() -> Transcriber:
            if transcriber is not None:
                return transcriber[0]() if callable(transcriber[0]) else transcriber[0]
            return Transcriber.from_options(model_options, job_options.recognizer)

        def read_with(asr: Transcriber) -> Reader:
            dataset = split_tfds(source) if source.startswith("tfds:") else None
            max_seconds = asr.config.max_seconds if job_options.segment_seconds is None else None
            return Reader(access, max_seconds, dataset, detect_changes)

        return worker.run(load, read_with, readers, num_readers)


@contextlib.contextmanager
def _reading_with(asr: Transcriber, num_readers: int) -> Iterator[None]:
    """Has a Transcriber read so many inputs at a time."""
    former, asr.readers.limit = asr.readers.limit, num_readers
    try:
        yield
    finally:
        asr.readers.limit = former


@dataclasses.dataclass
class _Worker:
    manifest: Manifest
    partition: Partition
    store: Store
    fingerprint: str
    shard: Shard
    options: TranscribeOptions
    work: Path
    report: Callable[[Progress], None] | None
    stop: Callable[[], bool] | None
    keyword_lists: Sequence[Sequence[Keyword] | None]
    retry_failed: bool
    has_changed: ChangeDetector
    progress: Progress
    _changed: int = dataclasses.field(default=0, init=False)  # entries whose files have changed since they were read
    _started: float = dataclasses.field(default=0.0, init=False)
    _previous: dict[int, bytes] = dataclasses.field(default_factory=dict, init=False)  # lines of retried entries

    def run(
        self, load: Callable[[], Transcriber], reader: Callable[[Transcriber], Reader], kind: Kind, num_readers: int
    ) -> Summary:
        share = self.shard.parts(len(self.partition))
        names = self.store.names()
        retries, files = committed_parts(names, self.fingerprint), unfinished_files(names, self.fingerprint)
        remove_committed(self.store, files, retries, share)
        pending = [Task(part, self.partition.indices(part)) for part in share if part not in retries]
        tasks = pending + [
            task
            for part in share
            if part in retries
            for task in self._retries(part, retries[part], files.get((part, retries[part] + 1), ()))
        ]
        self.progress.entries = sum(len(self.partition.indices(part)) for part in share)
        self.progress.resumed = self.progress.entries - sum(len(task.indices) for task in tasks)
        committer = Committer(self.store, self.fingerprint, files, self.has_changed, self._previous)
        stopped = False
        if tasks:
            asr = load()
            try:
                with opening(reader(asr), kind, num_readers) as open_entry, _reading_with(asr, num_readers):
                    self._transcribe_tasks(asr, tasks, open_entry, committer)
            except _Stopped:
                stopped = True
        failed, errors = self._write_errors(share) if not stopped else (self.progress.failed, [])
        summary = Summary(
            fingerprint=self.fingerprint,
            shard=self.shard.index,
            num_shards=self.shard.count,
            parts=len(share),
            resumed_parts=len(share) - len(pending),
            parts_of_others=committer.tasks_of_others,
            kept=committer.kept,
            retried=sum(len(task.indices) for task in tasks if task.retry),
            changed=self._changed,
            entries=self.progress.entries,
            transcribed=(self.progress.done if stopped else self.progress.entries) - failed,
            failed=failed,
            audio_seconds=round(self.progress.audio_seconds, 3),
            wall_seconds=round(self.progress.seconds, 3),
            read_wait_seconds=round(self.progress.read_seconds, 3),
            rtfx=round(self.progress.rtfx, 1),
            stopped=stopped,
            notes=self.progress.notes,
            errors=tuple(errors),
        )
        name = self.shard.name("summary", ".json")
        if not stopped and (tasks or not self.store.exists(name)):  # keep that of the run that did the work
            self.store.replace(name, (json.dumps(dataclasses.asdict(summary), indent=1) + "\n").encode())
        return summary

    def _retries(self, part: int, retries: int, files: Iterable[str]) -> list[Task]:
        """The next retry of a committed part, if entries of it failed, or have changed, that are to be tried again.

        Args:
          files: with lines of that retry; entries that failed and are there belong to it, however this run is called.
        """
        kept = {line.fields["index"] for line in usable_lines(self.store, files, self.has_changed)}
        lines = read_part(self.store, self.fingerprint, part, retries, self.partition.indices(part))
        indices = []
        for line in lines:
            changed = self.has_changed(line.fields)
            is_retried = self.retry_failed or line.fields.get("transient") or line.fields["index"] in kept
            if changed or (line.failed and is_retried):
                indices.append(line.fields["index"])
                self._previous[indices[-1]] = line.data
                self._changed += changed
        return [Task(part, indices, retries + 1)] if indices else []

    def _transcribe_tasks(
        self, asr: Transcriber, tasks: list[Task], open_entry: OpenEntry, committer: Committer
    ) -> None:
        """Transcribes and commits tasks; if it is stopped, keeps what is done of them."""
        # Invalid options of the job end it here; they would fail every utterance.
        asr.transcribe([], self.options)
        self._started, idle_before = time.monotonic(), asr.idle_seconds
        finished: queue.SimpleQueue[Future[Transcript]] = queue.SimpleQueue()
        futures: dict[Future[Transcript], _Submitted] = {}  # until their results are taken
        entries = self._entries(tasks, committer)
        with contextlib.ExitStack() as expecting:
            expecting.enter_context(asr.expecting())
            try:
                following = next(entries, None)
                while following or futures:
                    self._check_stop()
                    committer.save(SAVE_SECONDS)
                    if following is None:
                        expecting.close()
                    if following and finished.empty() and len(futures) < 2 * asr.read_ahead:
                        started, entry = following
                        audio = open_entry(entry)
                        listed = self.keyword_lists[entry.index] if self.keyword_lists else None
                        future = submit_entry(asr, audio, self.options, listed)
                        futures[future] = started, audio
                        future.add_done_callback(finished.put)
                        following = next(entries, None)
                        continue
                    try:
                        future = finished.get(timeout=_STOP_POLL_SECONDS)
                    except queue.Empty:
                        continue
                    self._finish(committer, *futures[future], future)
                    del futures[future]
                    self.progress.read_seconds = asr.idle_seconds - idle_before
                    self._report()
            except BaseException:  # also a lost device, a full disk, a second signal: what is finished is kept
                try:
                    self._keep(futures, committer)
                finally:
                    self._keep(futures, committer)  # the rest, if a second signal has interrupted that
                if futures and not self.progress.done and time.monotonic() - self._started >= SAVE_SECONDS:
                    self._note(_NOTHING_DONE)
                raise
            finally:
                for future in futures:
                    future.cancel()
                committer.close()

    def _keep(self, futures: dict[Future[Transcript], _Submitted], committer: Committer) -> None:
        """Saves what is finished, except entries whose future, or what was written meanwhile, has raised an error."""
        for future in [future for future in futures if future.done()]:
            with contextlib.suppress(Exception):
                self._finish(committer, *futures[future], future)
                del futures[future]
        committer.save(0.0)

    def _entries(self, tasks: list[Task], committer: Committer) -> Iterator[tuple[StartedTask, Entry]]:
        """The entries of tasks, except those that another worker has done."""
        for task in tasks:
            started = committer.start(task)
            if started is None:
                continue
            self.progress.resumed += started.kept
            indices = set(task.indices)
            entries = [e for e in self.manifest.read(self.partition.indices(task.part)) if e.index in indices]
            if len(entries) < len(indices):
                raise RuntimeError(f"part {task.part}: only {len(entries)} entries were read")
            self._note_length(sum(entry.duration or 0.0 for entry in entries))
            kept = set(started.lines)
            yield from ((started, entry) for entry in entries if entry.index not in kept)

    def _finish(
        self, committer: Committer, started: StartedTask, audio: EntryAudio, future: Future[Transcript]
    ) -> None:
        """Takes an entry's result."""
        transcript = transcript_of(audio.entry, future)
        line, failed = self._line(audio, transcript), transcript.error is not None
        committer.add(started, audio.entry.index, line, failed=failed)
        self.progress.done += 1
        started.audio_seconds += transcript.duration
        self._note_length(started.audio_seconds)

    def _note_length(self, seconds: float) -> None:
        """Notes that a part is long."""
        if seconds > _LONG_PART:
            self._note(_LONG_PART_NOTE)

    def _note(self, note: str) -> None:
        if note not in self.progress.notes:
            self.progress.notes += (note,)

    def _line(self, audio: EntryAudio, transcript: Transcript) -> bytes:
        """An utterance's line; nothing in it depends on the run."""
        entry = audio.entry
        fields: dict[str, Any] = {"index": entry.index, "id": entry.id, "audio": entry.audio}
        fields |= {"offset": entry.offset} if entry.offset else {}
        fields |= {"file": audio.file} if audio.file else {}
        fields |= transcript_fields(transcript) | {"audio": entry.audio}
        if transcript.error is None:
            self.progress.audio_seconds += transcript.duration
        else:
            self.progress.failed += 1
            fields |= {"stats": {}, **transcript.stats}
        # File names need not be valid Unicode: their surrogates become escapes.
        return (json.dumps(fields, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")

    def _report(self) -> None:
        self.progress.seconds = time.monotonic() - self._started
        if self.report is not None:
            self.report(self.progress)
        self._check_stop()

    def _check_stop(self) -> None:
        if self.stop is not None and self.stop():
            raise _Stopped

    def _write_errors(self, share: range) -> tuple[int, list[tuple[str, str]]]:
        """Writes the failed entries of a share's parts; returns their number, and ids and errors of the first."""
        failed, first, path = 0, [], self.work / "errors.jsonl"
        names = self.store.names()
        retries = committed_parts(names, self.fingerprint)
        remove_committed(self.store, unfinished_files(names, self.fingerprint), retries, share)
        with open(path, "wb") as errors:
            for part in share:
                indices = self.partition.indices(part)
                for line in read_part(self.store, self.fingerprint, part, retries.get(part, 0), indices):
                    if line.failed:
                        errors.write(line.data)
                        failed += 1
                        if failed <= _MAX_ERRORS:
                            first.append((str(line.fields.get("id")), str(line.fields["error"])))
        self.store.replace(self.shard.name("errors", ".jsonl"), path)
        return failed, first
