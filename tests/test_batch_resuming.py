"""What a worker has finished is kept when it is stopped or dies, and parts are of a length that it can do."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
    """Comes to a halt amid its third utterance, until the test ends, and calls a function then."""

    def __init__(self, halted: Callable[[], Any]):
        super().__init__()
        self._halted, self._released = halted, threading.Event()

    def _transcribe(self, audio: Any, *arguments: Any) -> Transcript:
        transcript = super()._transcribe(audio, *arguments)
        if len(self.keywords) == 3:
            self._halted()
            self._released.wait()
        return transcript

    def release(self) -> None:
        self._released.set()


@pytest.fixture
def halting() -> Iterator[Callable[[Callable[[], Any]], Halting]]:
    """Makes such stand-ins."""
    made: list[Halting] = []
    yield lambda halted: made.append(Halting(halted)) or made[-1]
    for asr in made:
        asr.release()


def test_a_job_that_is_preempted_again_and_again_ends(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, halting: Any
) -> None:
    # Given a part of five recordings, and a worker that gets SIGTERM amid its third one
    manifest, out = write_lines(corpus / "m.jsonl", *LINES), tmp_path / "out"
    run(manifest, tmp_path / "undisturbed")
    workers: list[StandIn] = []
    preempted = lambda *_, **__: halting(lambda: os.kill(os.getpid(), signal.SIGTERM))  # noqa: E731
    monkeypatch.setattr(job.Transcriber, "from_options", lambda *_, **__: workers.append(preempted()) or workers[-1])
    # When the command is run until it ends by itself
    codes = [CliRunner().invoke(cli.app, ["batch", str(manifest), "--out", str(out)]).exit_code for _ in range(3)]
    # Then no recording that was finished is transcribed again, each is there once, and nothing else is left
    assert codes == [143, 143, 0]
    assert [len(worker.keywords) for worker in workers] == [3, 3, 1]
    fields = [{key: line[key] for key in ("index", "audio", "text")} for line in results(out)]
    assert fields == [{key: line[key] for key in fields[0]} for line in results(tmp_path / "undisturbed")]
    assert not list(out.glob("unfinished-*")) and batch.merge(out)["transcribed"] == 5


@pytest.mark.parametrize("out", ["local", "memory://resumed"])
def test_what_was_finished_is_not_done_again(corpus: Path, tmp_path: Path, out: str, halting: Any) -> None:
    # Given a worker that is stopped amid a part, one of whose recordings is missing
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
    # And files that a slower worker of the part leaves later are deleted by the next run
    shutil.copy(out / "job.json", out / files[0].name)
    run(manifest, out)
    assert not list(out.glob("unfinished-*"))


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
    assert part_indices(tmp_path / "out") == [[0, 1, 2], [3, 4], [5]]  # a/1.wav has 0.11 seconds
    assert batch.merge(tmp_path / "out")["entries"] == 6


def test_files_that_change_do_not_move_parts(tmp_path: Path) -> None:
    # Given a directory of files of 0.1 to 0.19 seconds, in parts that their sizes limit, none of which is done
    corpus, out = write_corpus(tmp_path / "corpus"), tmp_path / "out"
    summary, _ = run(corpus, out, part_seconds=0.5, stop=lambda: True)
    assert part_indices(out) == [] and "nothing was done when this worker was stopped" in summary.notes[0]
    # When files grow, or are gone, and others do the job, then they do it in these parts
    soundfile.write(corpus / "b/2.wav", tone(3), RATE)
    (corpus / "b/4.wav").unlink()
    for shard in range(2):
        run(corpus, out, part_seconds=0.5, shard=shard, num_shards=2)
    assert part_indices(out) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert batch.merge(out)["entries"] == 10
    # And without the file that says where parts begin, they are not merged
    (out / "parts.json").write_text('{"starts": [0, 3, 2]}')
    with pytest.raises(GraniteError, match="parts.json is damaged"):
        batch.merge(out)
    (out / "parts.json").unlink()
    with pytest.raises(GraniteError, match="parts.json is missing; run the job again"):
        batch.merge(out)


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
