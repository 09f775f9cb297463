"""Batch jobs under everything that goes wrong: killed workers, races, a full disk, a failing store, bad files."""

import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import batch_worker
import fsspec
import numpy as np
import pytest
import soundfile
from fsspec.implementations.memory import MemoryFileSystem

from granite_jax import batch
from granite_jax.evaluation.heldout import CLIPS

PART = 8
ALLOW = ("file", "https")
RATE = 16000
DEADLINE = 120.0
# Forked from a process that has imported everything: a worker starts within milliseconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["batch_worker", "granite_jax.cli.commands"])

Files = dict[str, bytes]
Start = Callable[..., Any]
LONG = ["bomb.flac", "hours.flac"]  # long, or said to be so: decoded as far as they go, in little memory


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A manifest of 302 recordings, two of them long or said to be so, with bad files and URLs among them."""

    manifest: Path
    good: list[str]
    bad: list[str]

    @property
    def entries(self) -> int:
        return len(self.good) + len(self.bad)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    directory = tmp_path_factory.mktemp("corpus")
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, RATE)
    soundfile.write(directory / "whole.flac", noise, RATE)
    whole = (directory / "whole.flac").read_bytes()
    (directory / "whole.flac").unlink()
    soundfile.write(directory / "hours.flac", np.zeros(3600 * RATE, np.int16), RATE)
    soundfile.write(directory / "nan.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    soundfile.write(directory / "short.wav", noise[:100], RATE)
    contents = {
        "empty.wav": b"",
        "corrupt.flac": whole[:42] + np.random.default_rng(1).bytes(3000),
        "truncated.flac": whole[:3000],
        "text.wav": b"this is no audio\n" * 100,
        "zip.flac": b"PK\x03\x04" + bytes(100),
        # A header that promises 2^36 - 1 samples
        "bomb.flac": whole[:21] + bytes([whole[21] | 0x0F]) + b"\xff" * 4 + whole[26:],
    }
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    (directory / "directory.wav").mkdir()
    os.mkfifo(directory / "pipe.wav")
    (directory / "loop.wav").symlink_to("loop.wav")
    urls = [
        "https://169.254.169.254/a.wav",
        "https://localhost:9/a.wav",
        "http://example.com/a.wav",
        "zip://a::s3://b/c",
    ]
    bad = [*sorted(path.name for path in directory.iterdir()), *urls, "missing.wav", "/etc/passwd"]
    bad = [name for name in bad if name not in LONG]
    shutil.copytree(CLIPS, directory, dirs_exist_ok=True)
    good = [*sorted(path.name for path in CLIPS.glob("*.ogg")), *LONG]
    names = [*good, *bad]
    random.Random(0).shuffle(names)
    manifest = directory / "manifest.jsonl"
    manifest.write_text("".join(f"{json.dumps({'audio': name})}\n" for name in names))
    return Corpus(manifest, good, bad)


@pytest.fixture(scope="module")
def undisturbed(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The parts of a run that nothing happens to."""
    out = tmp_path_factory.mktemp("undisturbed")
    batch_worker.run(corpus.manifest, out, part_size=PART, allow=ALLOW)
    return parts(out)


def parts(out: Path) -> Files:
    return {path.name: path.read_bytes() for path in out.glob("part-*")}


def count(out: Path) -> int:
    return len(list(out.glob("part-*")))


def lines(files: Files) -> list[dict[str, Any]]:
    return [json.loads(line) for name in sorted(files) for line in files[name].splitlines()]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a process. Those that a failed test leaves are killed, or Python would wait for them at its end."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    processes = []

    def start(*arguments: Any, **options: Any) -> Any:
        process = CONTEXT.Process(target=batch_worker.in_process, args=(temporary, *arguments), kwargs=options)
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join(DEADLINE)


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_bad_files_lose_nothing_else(corpus: Corpus, undisturbed: Files) -> None:
    # Given 302 recordings with every kind of bad file and URL among them, when they are run
    found = {line["audio"]: line for line in lines(undisturbed)}

    # Then each bad one has an error that names it, and each good one its text
    assert len(corpus.good) == 302
    assert sorted(found) == sorted([*corpus.good, *corpus.bad])
    for name in corpus.bad:
        assert found[name]["error"].startswith(f"{name}: ")
        assert "\n" not in found[name]["error"]
    assert len({found[name]["text"] for name in corpus.good}) == 302


@pytest.mark.parametrize("readers", ["threads", pytest.param("processes", marks=pytest.mark.soak)])
def test_a_job_killed_again_and_again_ends_as_if_undisturbed(
    corpus: Corpus, undisturbed: Files, start: Start, tmp_path: Path, readers: str
) -> None:
    # Given a job whose worker is killed at random instants and started again
    out, kills, moments = tmp_path / "out", 0, random.Random(0)
    options = {"part_size": PART, "allow": ALLOW, "readers": readers}
    while True:
        before = count(out)
        save = batch_worker.run_saving_at_once if kills % 3 else batch_worker.run
        worker = start(save, corpus.manifest, out, seconds=0.003, **options)
        if kills % 2:  # from its start on, or when it has done something, so that there is an end
            wait_for(lambda: count(out) > before or not worker.is_alive())  # noqa: B023
        worker.join(moments.uniform(0, 0.05 if kills % 2 else 0.3))
        # Nothing but whole parts is there, at any time
        assert parts(out).items() <= undisturbed.items()
        if not worker.is_alive():
            break
        worker.kill()
        worker.join(DEADLINE)
        kills += 1
    # When it ends by itself, then every utterance is there once, byte by byte as undisturbed
    assert worker.exitcode == 0
    assert kills >= 10
    assert parts(out) == undisturbed
    assert not list(out.glob("unfinished-*"))
    assert [line["index"] for line in lines(undisturbed)] == list(range(corpus.entries))
    assert batch.merge(out)["transcribed"] == 302


@pytest.mark.parametrize("readers", ["threads", "processes"])
def test_retries_killed_again_and_again_end_as_if_undisturbed(
    corpus: Corpus, start: Start, tmp_path: Path, readers: str
) -> None:
    # Given a finished job, half of whose recordings were missing, and all of them now
    files, names = tmp_path / "files", corpus.good[:32]
    files.mkdir()
    manifest = files / "manifest.jsonl"
    manifest.write_text("".join(f"{json.dumps({'audio': name})}\n" for name in names))
    out, kills, moments = tmp_path / "out", 0, random.Random(0)
    for name in names[::2]:
        shutil.copy(CLIPS / name, files)
    assert batch_worker.run(manifest, out, part_size=PART).failed == 16
    committed = parts(out)
    for name in names[1::2]:
        shutil.copy(CLIPS / name, files)
    # When workers that try them again are killed at random instants, until one ends by itself
    while True:
        before = count(out)
        worker = start(batch_worker.run, manifest, out, seconds=0.01, part_size=PART, readers=readers)
        if kills % 2:
            wait_for(lambda: count(out) > before or not worker.is_alive())  # noqa: B023
        worker.join(moments.uniform(0, 0.05 if kills % 2 else 0.3))
        # Nothing that was committed changes
        assert committed.items() <= parts(out).items()
        committed = parts(out)
        if not worker.is_alive():
            break
        worker.kill()
        worker.join(DEADLINE)
        kills += 1
    # Then every recording has been transcribed once
    assert worker.exitcode == 0 and kills >= 2
    transcribed = [line["audio"] for line in lines(committed) if line["error"] is None]
    assert sorted(transcribed) == sorted(names)
    assert batch.merge(out)["transcribed"] == 32


def test_workers_racing_for_a_shard_write_what_one_does(
    corpus: Corpus, undisturbed: Files, start: Start, tmp_path: Path
) -> None:
    # Given three workers of one shard, when they race and one of them is killed on the way
    out = tmp_path / "out"
    workers = [
        start(batch_worker.run, corpus.manifest, out, seconds=0.001, part_size=PART, allow=ALLOW) for _ in range(3)
    ]
    wait_for(lambda: count(out) > 10)
    workers[0].kill()
    for worker in workers:
        worker.join(DEADLINE)
    # Then the others end well, with the same parts
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL, 0, 0]
    assert parts(out) == undisturbed
    assert batch.merge(out)["transcribed"] == 302


def test_a_listing_is_agreed_on_by_racing_workers(tmp_path: Path) -> None:
    # Given a directory whose files come and go while eight workers start
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    soundfile.write(corpus / "0.wav", np.zeros(RATE // 4), RATE)
    done = threading.Event()

    def disturb() -> None:
        while not done.is_set():
            for i in range(1, 50):
                os.link(corpus / "0.wav", corpus / f"{i}.wav")
            for i in range(1, 50):
                os.unlink(corpus / f"{i}.wav")

    with ThreadPoolExecutor(9) as pool:
        disturbance = pool.submit(disturb)
        out = tmp_path / "out"
        options = {"part_size": PART, "num_shards": 8}
        workers = [pool.submit(batch_worker.run, corpus, out, shard=shard, **options) for shard in range(8)]
        try:
            summaries = [worker.result(DEADLINE) for worker in workers]
        finally:
            done.set()
        disturbance.result(DEADLINE)
    # Then they agree on one listing, and do all of it
    assert len({summary.fingerprint for summary in summaries}) == 1
    assert batch.merge(out)["entries"] == sum(summary.entries for summary in summaries)


def test_a_full_disk_loses_nothing_that_was_committed(
    corpus: Corpus, undisturbed: Files, start: Start, tmp_path: Path
) -> None:
    # Given a job that was interrupted
    out = tmp_path / "out"
    worker = start(batch_worker.run, corpus.manifest, out, seconds=0.002, part_size=PART, allow=ALLOW)
    wait_for(lambda: count(out) > 5)
    worker.kill()
    worker.join(DEADLINE)
    before = parts(out)
    # When the job is run with room for less than a part, then it ends with an error, and leaves nothing half written
    quota = min(map(len, undisturbed.values())) - 1
    worker = start(batch_worker.run_with_quota, quota, corpus.manifest, out, part_size=PART, allow=ALLOW)
    worker.join(DEADLINE)
    assert worker.exitcode == 3
    assert parts(out) == before
    # And with room again, it goes on to the same end
    assert batch_worker.run(corpus.manifest, out, part_size=PART, allow=ALLOW).resumed_parts == len(before)
    assert parts(out) == undisturbed


class FailingStore(MemoryFileSystem):
    """Fails at random, before or after it did what was asked."""

    protocol = "s3"
    store: dict[str, Any] = {}  # noqa: RUF012
    chance = random.Random(0)
    rate = 0.0
    failures = 0

    def _fail(self) -> None:
        if self.chance.random() < self.rate:
            type(self).failures += 1
            raise OSError("the store is having a bad day")

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        self._fail()
        return super().open(path, mode, **options)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        super().pipe_file(path, value, mode, **options)
        self._fail()

    def ls(self, *arguments: Any, **options: Any) -> Any:
        self._fail()
        return super().ls(*arguments, **options)


@pytest.fixture
def failing_store() -> Iterator[FailingStore]:
    fsspec.register_implementation("s3", FailingStore, clobber=True)
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    FailingStore.store.clear()
    yield store
    FailingStore.rate = 0.0


def test_a_store_that_fails_at_random_costs_nothing(
    corpus: Corpus, undisturbed: Files, failing_store: FailingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given audio and results on a store that fails a fifth of all calls
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    failing_store.put(str(CLIPS), "/bucket/heldout", recursive=True)
    FailingStore.rate = 0.2
    # When the job is run until it ends
    for _ in range(20):
        try:
            summary = batch_worker.run("s3://bucket/heldout/", "s3://bucket/out", part_size=PART)
            break
        except OSError as error:
            assert "bad day" in str(error)
    FailingStore.rate = 0.0
    # Then it has the results of the undisturbed run, but for audio that failed five times in a row, which says so
    assert FailingStore.failures > 100
    assert summary.failed <= 3
    assert batch.merge("s3://bucket/out")["entries"] == 300
    found = failing_store.cat_file("/bucket/out/transcripts.jsonl") + failing_store.cat_file("/bucket/out/errors.jsonl")
    expected = {line["audio"]: line for line in lines(undisturbed)}
    for line in map(json.loads, found.splitlines()):
        wanted = expected.pop(line["audio"].removeprefix("s3://bucket/heldout/"))
        assert "bad day" in line["error"] if line["error"] else line["text"] == wanted["text"]
    assert sorted(expected) == sorted([*corpus.bad, *LONG])


@pytest.mark.parametrize(
    ("number", "readers"),
    [
        (signal.SIGTERM, "threads"),
        (signal.SIGINT, "threads"),
        (signal.SIGHUP, "threads"),
        (signal.SIGTERM, "processes"),
        (signal.SIGINT, "processes"),
    ],
)
def test_signals_end_the_command_between_parts(
    corpus: Corpus, undisturbed: Files, start: Start, tmp_path: Path, number: signal.Signals, readers: str
) -> None:
    # Given the command amid a job, when it is told to end
    out = tmp_path / "out"
    arguments = ["batch", str(corpus.manifest), "--out", str(out), "--part-size", str(PART), "--num-readers", "2"]
    arguments += [f"--allow={protocol}" for protocol in ALLOW]
    arguments += ["--readers", readers]
    worker = start(batch_worker.run_command, arguments, seconds=0.02)
    wait_for(lambda: count(out) > 3)
    os.kill(worker.pid, number)
    worker.join(5)
    # Then it ends soon, as engines expect it, with whole parts, and nothing is left of what it was writing
    assert worker.exitcode == 128 + number
    texts = {line.get("text") for line in lines(parts(out))}
    assert texts <= {line.get("text") for line in lines(undisturbed)}
    assert 1 < len(texts) < 300
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
    # And the same command does the rest
    worker = start(batch_worker.run_command, arguments, seconds=0.0)
    worker.join(DEADLINE)
    assert worker.exitcode == 0
    assert batch.merge(out)["transcribed"] == 302
