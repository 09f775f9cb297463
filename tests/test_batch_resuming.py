"""What a worker has finished is kept when it is stopped or dies, and parts are of a length that it can do."""

import contextlib
import errno
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import soundfile
from batch_jobs import RATE, read_lines, results, run, tone, write_corpus, write_lines
from batch_worker import StandIn
from typer.testing import CliRunner

from granite_jax import GraniteError, Transcript, batch, cli
from granite_jax.batch import job, unfinished
from granite_jax.batch.partition import divide
from granite_jax.batch.store import LocalStore, open_store

LINES = [{"audio": f"a/{i}.wav"} for i in (1, 3, 5, 7, 9)]


def part_indices(out: Path) -> list[list[int]]:
    """The entries of each part."""
    return [[line["index"] for line in read_lines(path)] for path in sorted(out.glob("part-*"))]


class Halting(StandIn):
    """Halts within an utterance, the third by default, until the test ends, and calls a function then."""

    def __init__(self, halted: Callable[[], Any], utterance: int = 3):
        super().__init__()
        self._halted, self._utterance, self._released = halted, utterance, threading.Event()

    def _transcribe(self, audio: Any, *arguments: Any) -> Transcript:
        transcript = super()._transcribe(audio, *arguments)
        if len(self.keywords) == self._utterance:
            self._halted()
            self._released.wait()
        return transcript

    def release(self) -> None:
        self._released.set()


@pytest.fixture
def halting() -> Iterator[Callable[..., Halting]]:
    """Makes such stand-ins."""
    made: list[Halting] = []
    yield lambda *arguments: made.append(Halting(*arguments)) or made[-1]
    for asr in made:
        asr.release()


@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGTERM, signal.SIGHUP)])
def test_a_job_that_is_preempted_again_and_again_ends(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, halting: Any, signals: tuple[signal.Signals, ...]
) -> None:
    # Given a part of five recordings, and a worker that gets a signal within its third one, or two at once
    manifest, out = write_lines(corpus / "m.jsonl", *LINES), tmp_path / "out"
    run(manifest, tmp_path / "undisturbed")
    workers: list[StandIn] = []
    preempted = lambda *_, **__: halting(lambda: [os.kill(os.getpid(), each) for each in signals])  # noqa: E731
    monkeypatch.setattr(job.Transcriber, "from_options", lambda *_, **__: workers.append(preempted()) or workers[-1])
    # When the command is run until it ends by itself
    codes = [CliRunner().invoke(cli.app, ["batch", str(manifest), "--out", str(out)]).exit_code for _ in range(3)]
    # Then no recording that was finished is transcribed again, each is there once, and nothing else is left
    assert set(codes[:2]) <= {128 + each for each in signals} and codes[2] == 0
    assert [len(worker.keywords) for worker in workers] == [3, 3, 1]
    fields = [{key: line[key] for key in ("index", "audio", "text")} for line in results(out)]
    assert fields == [{key: line[key] for key in fields[0]} for line in results(tmp_path / "undisturbed")]
    assert not list(out.glob("unfinished-*")) and batch.merge(out)["transcribed"] == 5


@pytest.mark.parametrize("out", ["local", "memory://resumed"])
def test_what_was_finished_is_not_done_again(corpus: Path, tmp_path: Path, out: str, halting: Any) -> None:
    # Given a worker that is stopped within a part, one of whose recordings is missing
    out = out if ":" in out else f"{tmp_path}/{out}"
    (corpus / "a/3.wav").rename(corpus / "later.wav")
    manifest, halted = write_lines(corpus / "m.jsonl", *LINES), threading.Event()
    asr = halting(halted.set)
    summary = batch.run(manifest, out, transcriber=(asr, "stand-in"), num_readers=2, stop=halted.is_set)
    assert (summary.stopped, summary.transcribed, summary.failed, summary.notes) == (True, 2, 1, ())
    # When it is there and a later worker does the part, then that transcribes what failed and what was not done
    (corpus / "later.wav").rename(corpus / "a/3.wav")
    summary, asr = run(manifest, out)
    assert (summary.kept, summary.transcribed, summary.failed, len(asr.keywords)) == (2, 5, 0, 3)
    # And everything is there once, and nothing else is left
    assert batch.merge(out)["transcribed"] == 5
    assert not any(name.startswith("unfinished") for name in open_store(out).names())


def test_an_error_of_the_device_keeps_what_was_finished(corpus: Path, tmp_path: Path, halting: Any) -> None:
    # Given a worker whose device is lost at the third utterance, when a later one runs, then it does only the rest
    def lose() -> None:
        raise RuntimeError("device is lost")

    manifest, out = write_lines(corpus / "m.jsonl", *LINES), tmp_path / "out"
    with pytest.raises(RuntimeError, match="device is lost"):
        batch.run(manifest, out, transcriber=(halting(lose), "stand-in"), num_readers=1)
    summary, asr = run(manifest, out)
    assert summary.kept >= 2 and summary.kept + len(asr.keywords) == summary.transcribed == 5


def test_what_a_stopped_retry_has_finished_is_not_lost(corpus: Path, tmp_path: Path, halting: Any) -> None:
    # Given recordings that were damaged, and a retry of them that is stopped when two are done
    manifest, out, halted = write_lines(corpus / "m.jsonl", *LINES), tmp_path / "out", threading.Event()
    for line in LINES:
        (corpus / line["audio"]).rename(corpus / line["audio"].replace("/", "-"))
        (corpus / line["audio"]).write_bytes(b"damaged" * 100)
    assert run(manifest, out, detect_changes="off")[0].failed == 5
    for line in LINES:
        (corpus / line["audio"].replace("/", "-")).rename(corpus / line["audio"])
    asr, stopped = halting(halted.set), {"stop": halted.is_set, "retry_failed": True}
    batch.run(manifest, out, transcriber=(asr, "stand-in"), num_readers=1, detect_changes="off", **stopped)
    # When a run follows that does not retry what failed, then these two are results
    summary, asr = run(manifest, out, detect_changes="off")
    assert (summary.kept, summary.transcribed, summary.failed, len(asr.keywords)) == (2, 2, 3, 0)
    assert batch.merge(out)["transcribed"] == 2 and not list(out.glob("unfinished-*"))


@pytest.fixture
def dead(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The manifest and the output of a worker that saved what it had finished, and died before it committed it."""
    create = LocalStore.create

    def die(store: LocalStore, name: str, data: Any) -> bool:
        if name.startswith("part-"):
            raise OSError("no space left")
        return create(store, name, data)

    manifest, out = write_lines(corpus / "m.jsonl", *LINES), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(LocalStore, "create", die)
        patched.setattr(job, "SAVE_SECONDS", 0.0)
        with pytest.raises(OSError, match="no space left"):
            run(manifest, out)
    return manifest, out


def test_a_worker_that_dies_leaves_what_it_has_saved(dead: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    # Given the lines of a dead worker, one of which is damaged, when its part is done again, then the others are kept
    manifest, out = dead
    files = sorted(out.glob("unfinished-*"))
    saved = [line for path in files for line in path.read_bytes().splitlines(keepends=True)]
    assert len(saved) >= 4  # all but the last one, which completes the part
    files[0].write_bytes(files[0].read_bytes()[:-9])
    summary, asr = run(manifest, out)
    assert (summary.kept, len(asr.keywords)) == (len(saved) - 1, 5 - len(saved) + 1)
    assert set(saved) <= set(next(out.glob("part-*")).read_bytes().splitlines(keepends=True))
    assert not list(out.glob("unfinished-*"))
    # And files that a slower worker of the part leaves later are deleted by the next run, and when parts are merged
    for end in (lambda: run(manifest, out), lambda: batch.merge(out)):
        shutil.copy(out / "job.json", out / files[0].name)
        end()
        assert not list(out.glob("unfinished-*"))


def test_what_a_slower_worker_leaves_during_a_run_is_deleted(dead: tuple[Path, Path]) -> None:
    # Given the files of a dead worker, when there is one more after the next worker has begun, then none is left
    manifest, out = dead
    late = next(out.glob("unfinished-*"))
    run(manifest, out, progress=lambda _: shutil.copy(out / "job.json", out / f"{late.stem[:-8]}abcdef01.jsonl"))
    assert not list(out.glob("unfinished-*"))


def test_lines_that_lack_a_field_are_not_kept(dead: tuple[Path, Path]) -> None:
    # Given saved lines without the name of their audio, when the part is done again, then they are done again
    manifest, out = dead
    for path in out.glob("unfinished-*"):
        write_lines(path, *({k: v for k, v in line.items() if k != "audio"} for line in read_lines(path)))
    assert run(manifest, out)[0].kept == 0
    assert batch.merge(out)["transcribed"] == 5


def test_names_that_cannot_be_deleted_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a store that forbids to delete, when several files are deleted, then the first one is tried once
    tried: list[str] = []

    def forbid(files: Any, path: str) -> None:
        tried.append(path)
        raise OSError("forbidden")

    store = open_store("memory://forbidden")
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "rm_file", forbid)
    store.remove("a", "b")
    assert [path.rpartition("/")[2] for path in tried] == ["a"]


def test_without_hard_links_one_of_two_workers_creates_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a file system without hard links, and two workers that rename at the same time if they can
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "not permitted")

    def meet(*arguments: Any) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.3)
        rename(*arguments)

    rename, both, store = os.rename, threading.Barrier(2), LocalStore(tmp_path)
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "rename", meet)
    # When both create a file, then one of them does, and its content is there
    with ThreadPoolExecutor(2) as threads:
        contents = [b"first", b"second"]
        created = list(threads.map(lambda content: store.create("parts.json", content), contents))
    assert sorted(created) == [False, True]
    assert (tmp_path / "parts.json").read_bytes() == contents[created.index(True)]
    assert [path.name for path in tmp_path.iterdir()] == ["parts.json"]


def test_a_limit_that_is_a_whole_number_is_the_same_job(corpus: Path, tmp_path: Path) -> None:
    # Given a part that was done with a limit as a float, when it is run with an integer, then it is there
    manifest = write_lines(corpus / "m.jsonl", *LINES)
    first, _ = run(manifest, tmp_path / "out", part_seconds=60.0)
    second, asr = run(manifest, tmp_path / "out", part_seconds=60)
    assert (second.fingerprint, second.resumed_parts, asr.keywords) == (first.fingerprint, 1, [])
    # And also if the job is stored with the integer
    shutil.rmtree(tmp_path / "out")
    run(manifest, tmp_path / "out", part_seconds=60.0, stop=lambda: True)
    job_file = tmp_path / "out/job.json"
    job_file.write_text(job_file.read_text().replace("60.0", "60"))
    assert run(manifest, tmp_path / "out", part_seconds=60)[0].transcribed == 5
    assert batch.merge(tmp_path / "out")["transcribed"] == 5


def test_a_recording_that_has_changed_is_not_kept(corpus: Path, dead: tuple[Path, Path]) -> None:
    # Given the lines of a dead worker, when a recording has changed since, then it is transcribed anew
    manifest, out = dead
    soundfile.write(corpus / "a/1.wav", tone(0.5), RATE)
    run(manifest, out)
    assert results(out)[0]["duration"] == 0.5


def test_parts_that_are_quick_write_nothing_else(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given short utterances, when they are run, then no file is written but the parts and those of the job
    names: list[str] = []
    create = LocalStore.create
    monkeypatch.setattr(LocalStore, "create", lambda store, name, data: names.append(name) or create(store, name, data))
    run(write_lines(corpus / "m.jsonl", *LINES * 100), tmp_path / "out", part_size=100)
    assert sorted(name.split("-")[0] for name in names) == ["job.json", *["part"] * 5, "parts.json"]


@pytest.mark.parametrize(
    ("seconds", "starts"),
    [
        ([1, 1, 1, 1, 1], [0, 3]),  # no more than three entries
        ([4, 4, 4, 4], [0, 2]),  # no more than ten seconds
        ([10, 1, 10], [0, 1, 2]),
        ([1, 25, 1, 1], [0, 1, 2]),  # what is longer is a part of its own
        ([0, 0, 0, 0], [0, 3]),
    ],
)
def test_parts_are_limited_by_number_and_seconds(seconds: list[float], starts: list[int]) -> None:
    assert divide(seconds, 3, 10) == starts


def test_parts_have_the_seconds_of_the_manifest(corpus: Path, tmp_path: Path) -> None:
    # Given lines with durations, and some without, when they are run, then parts are as long as is asked for
    durations = [0.05, 0.05, 0.04, None, 0.02, None]
    lines = [{"audio": "a/1.wav", "duration": duration} for duration in durations]
    run(write_lines(corpus / "m.jsonl", *lines), tmp_path / "out", part_seconds=0.14)
    assert part_indices(tmp_path / "out") == [[0, 1, 2], [3], [4], [5]]  # a/1.wav has 0.11 seconds, estimated as 0.44
    assert batch.merge(tmp_path / "out")["entries"] == 6


def test_files_that_change_do_not_move_parts(tmp_path: Path) -> None:
    # Given a directory of files of estimated 0.4 to 0.76 seconds, in parts that these limit, none of which is done
    corpus, out = write_corpus(tmp_path / "corpus"), tmp_path / "out"
    summary, _ = run(corpus, out, part_seconds=2, stop=lambda: True)
    assert part_indices(out) == [] and summary.notes == ()
    # When files grow, or are gone, and others do the job, then they do it in these parts
    soundfile.write(corpus / "b/2.wav", tone(3), RATE)
    (corpus / "b/4.wav").unlink()
    for shard in range(2):
        run(corpus, out, part_seconds=2, shard=shard, num_shards=2)
    assert part_indices(out) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert batch.merge(out)["entries"] == 10
    # And without the file that says where parts begin, they are not merged
    for starts in ("[0, 3, 2]", "[0, 3.0]", "[0.0]"):
        (out / "parts.json").write_text(f'{{"starts": {starts}}}')
        with pytest.raises(GraniteError, match="parts.json is damaged"):
            batch.merge(out)
    (out / "parts.json").unlink()
    with pytest.raises(GraniteError, match="parts.json is missing; run the job again"):
        batch.merge(out)


def test_a_recording_that_takes_too_long_is_noted(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, halting: Any
) -> None:
    # Given workers that are stopped within their first recording, after more or less than the time to save
    manifest, notes = write_lines(corpus / "m.jsonl", *LINES), []
    for seconds in (1000.0, 0.0):
        monkeypatch.setattr(job, "SAVE_SECONDS", seconds)
        halted = threading.Event()
        asr = halting(halted.set, 1)
        summary = batch.run(manifest, tmp_path / "out", transcriber=(asr, "stand-in"), stop=halted.is_set)
        notes.append([note.partition(";")[0] for note in summary.notes])
    # Then the one that had the time says that nothing was done
    assert notes == [[], ["nothing was done when this worker was stopped"]]


def test_jobs_without_a_limit_of_seconds_go_on(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a directory that a version without limits of seconds has begun
    run(corpus, tmp_path / "new", part_seconds=0.5)
    description = json.loads((tmp_path / "new/job.json").read_text())
    assert description.pop("part_seconds") == 0.5
    out = tmp_path / "out"
    out.mkdir()
    write_lines(out / "job.json", description)
    shutil.copy(tmp_path / "new/manifest.jsonl", out)
    # When it is run by this one, then its parts have their former size, whose length it notes when it knows it
    monkeypatch.setattr(job, "_LONG_PART", 0.5)
    summary, _ = run(corpus, out)
    assert part_indices(out) == [list(range(10))] and not (out / "parts.json").exists()
    assert [note.split(",")[0] for note in summary.notes] == ["a part has more than an hour of audio"]
    assert run(corpus, out)[0].resumed_parts == 1 and batch.merge(out)["transcribed"] == 10
    # And another limit is another job
    with pytest.raises(GraniteError, match="another job: part_seconds was None, is 0.5"):
        run(corpus, out, part_seconds=0.5)


def test_a_part_of_more_than_an_hour_is_noted(corpus: Path, tmp_path: Path) -> None:
    # Given a recording of two hours, by its manifest, when it is run, then a note says so before it is done
    manifest = write_lines(corpus / "m.jsonl", {"audio": "a/1.wav", "duration": 7200}, {"audio": "a/3.wav"})
    notes: list[tuple[str, ...]] = []
    summary, _ = run(manifest, tmp_path / "out", progress=lambda p: notes.append(p.notes))
    assert [note.split(",")[0] for note in notes[0]] == ["a part has more than an hour of audio"]
    assert summary.notes == notes[0] and summary.parts == 2


def test_names_of_unfinished_files() -> None:
    names = [
        "unfinished-000007-0123456789ab-00000001.jsonl",
        "unfinished-000007-0123456789ab.r2-00000002.jsonl",
        "unfinished-000007-ffffffffffff-00000003.jsonl",
        "part-000007-0123456789ab.jsonl",
    ]
    assert unfinished.unfinished_files(names, "0123456789ab") == {(7, 0): names[:1], (7, 2): names[1:2]}
