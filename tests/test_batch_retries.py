"""Failures are not final: audio out of reach is tried again, other failures on request, and nothing is rewritten."""

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import batch_jobs
import pytest
import soundfile
from batch_jobs import RATE, read_lines, run, text_of, tone, write_lines

from granite_jax import GraniteError, batch
from granite_jax.batch import committed
from granite_jax.batch.store import LocalStore


def _files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("part-*")}


def _merged(out: Path) -> dict[str, str]:
    batch.merge(out)
    lines = read_lines(out / "transcripts.jsonl") + read_lines(out / "errors.jsonl")
    return {line["audio"]: line["error"] or line["text"] for line in lines}


@pytest.fixture
def manifest(corpus: Path) -> Path:
    """A manifest of five entries in parts of two: the second and the last are missing, the third is damaged."""
    names = ["a/1.wav", "late.wav", "bad.wav", "b/2.wav", "never.wav"]
    (corpus / "bad.wav").write_bytes(b"RIFF")
    return write_lines(corpus / "m.jsonl", *({"audio": name} for name in names))


def test_audio_that_arrives_later_is_transcribed_by_the_next_run(corpus: Path, tmp_path: Path, manifest: Path) -> None:
    # Given a finished job, some of whose audio was missing
    out = tmp_path / "out"
    summary, _ = run(manifest, out, part_size=2)
    assert (summary.failed, summary.retried) == (3, 0)
    parts = _files(out)
    # When nothing has changed, then the next run tries what is missing again, writes nothing, and says the same
    summary, asr = run(manifest, out, part_size=2)
    assert (summary.failed, summary.retried, summary.resumed_parts, asr.keywords) == (3, 2, 3, [])
    assert _files(out) == parts
    # When one has arrived, then it alone is transcribed, into a file beside its part
    soundfile.write(corpus / "late.wav", tone(0.2), RATE)
    summary, asr = run(manifest, out, part_size=2)
    assert (summary.failed, summary.retried, summary.transcribed, len(asr.keywords)) == (2, 2, 3, 1)
    retries = _files(out).keys() - parts.keys()
    assert retries == {f"{min(parts).removesuffix('.jsonl')}.r1.jsonl"}
    assert _files(out) | parts == _files(out)
    # And the results have it
    assert [line["audio"] for line in read_lines(out / "errors.jsonl")] == ["bad.wav", "never.wav"]
    results = _merged(out)
    assert results["late.wav"] == text_of(corpus / "late.wav") and list(results) == [
        *("a/1.wav", "late.wav", "b/2.wav"),
        *("bad.wav", "never.wav"),
    ]


def test_other_failures_are_tried_again_on_request(corpus: Path, tmp_path: Path, manifest: Path) -> None:
    # Given a finished job with a damaged file, which is mended, and changes are not looked for
    out, run = tmp_path / "out", functools.partial(batch_jobs.run, detect_changes="off")
    run(manifest, out, part_size=2)
    soundfile.write(corpus / "bad.wav", tone(0.2), RATE)
    # When it is run again, then the failure stays, until it is asked for
    assert run(manifest, out, part_size=2)[0].failed == 3
    summary, _ = run(manifest, out, part_size=2, retry_failed=True)
    assert (summary.failed, summary.retried) == (2, 3)
    assert _merged(out)["bad.wav"] == text_of(corpus / "bad.wav")


def test_the_last_retry_counts(corpus: Path, tmp_path: Path, manifest: Path) -> None:
    # Given two retries of a part of all entries
    out = tmp_path / "out"
    run(manifest, out)
    for name in ("late.wav", "never.wav"):
        soundfile.write(corpus / name, tone(0.2), RATE)
        run(manifest, out)
    first, second = (next(out.glob(f"*.r{number}.jsonl")) for number in (1, 2))
    assert [line["audio"] for line in read_lines(first)] == ["late.wav", "never.wav"]
    assert [line["audio"] for line in read_lines(second)] == ["never.wav"]
    assert list(_merged(out)) == ["a/1.wav", "late.wav", "b/2.wav", "never.wav", "bad.wav"]
    # When a retry is deleted, then its entries are as before, and the next run tries them again
    first.unlink()
    assert list(_merged(out)) == ["a/1.wav", "b/2.wav", "never.wav", "late.wav", "bad.wav"]
    run(manifest, out)
    assert (out / second.name.replace("r2", "r3")).exists() and list(_merged(out))[1] == "late.wav"


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "no line"])
@pytest.mark.parametrize("retry", [False, True])
def test_damage_is_named_by_run_and_merge(
    corpus: Path, tmp_path: Path, manifest: Path, damage: str, retry: bool
) -> None:
    # Given a damaged part, or a damaged retry
    out = tmp_path / "out"
    run(manifest, out, part_size=2)
    soundfile.write(corpus / "late.wav", tone(0.2), RATE)
    run(manifest, out, part_size=2)
    path = min(out.glob("part-*.r1.jsonl")) if retry else min(set(out.glob("part-*")) - set(out.glob("*.r1.*")))
    data = path.read_bytes()
    path.write_bytes(
        {"cut": data[:-9], "empty": b"", "foreign": data.replace(b'"index": 1', b'"index": 4'), "no line": b"[]\n"}[
            damage
        ]
    )
    if damage == "empty" and retry:
        assert batch.merge(out)["failed"] == 3  # a retry of nothing
        return
    # When it is run or merged, then the error names it
    for use in (lambda: batch.merge(out), lambda: run(manifest, out, part_size=2)):
        with pytest.raises(GraniteError, match=rf"{path.name}.*: delete it and run the job again"):
            use()
    # And that helps
    path.unlink()
    run(manifest, out, part_size=2)
    assert batch.merge(out)["failed"] == 2


def test_of_two_workers_one_commits_a_retry(
    corpus: Path, tmp_path: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a worker that commits the same retry first
    out = tmp_path / "out"
    run(manifest, out)
    soundfile.write(corpus / "late.wav", tone(0.2), RATE)
    create = LocalStore.create

    def slower(store: LocalStore, name: str, data: Any) -> bool:
        if ".r1." in name:
            assert create(store, name, data)
        return create(store, name, data)

    monkeypatch.setattr(LocalStore, "create", slower)
    # When another one has done the same, then it says so, and the results have it once
    summary, _ = run(manifest, out)
    assert (summary.parts_of_others, summary.failed) == (1, 2)
    assert len(_merged(out)) == 5


def _link_out(corpus: Path) -> None:
    soundfile.write(corpus.parent / "outside.wav", tone(0.1), RATE)
    (corpus / "x.wav").symlink_to(corpus.parent / "outside.wav")


@pytest.mark.parametrize(
    ("prepare", "name", "transient"),
    [
        (lambda corpus: None, "x.wav", True),
        (lambda corpus: (corpus / "x.wav").mkdir(), "x.wav", True),
        (lambda corpus: os.mkfifo(corpus / "x.wav"), "x.wav", True),
        (_link_out, "x.wav", True),
        (lambda corpus: (corpus / "x.wav").symlink_to("x.wav"), "x.wav", True),
        (lambda corpus: None, "https://example.com/a.wav", True),
        (lambda corpus: (corpus / "x.wav").write_bytes(b""), "x.wav", False),
        (lambda corpus: (corpus / "x.wav").write_text("no audio"), "x.wav", False),
        (lambda corpus: soundfile.write(corpus / "x.wav", tone(0.01), RATE), "x.wav", False),
    ],
)
def test_failures_of_access_are_told_apart(
    corpus: Path, tmp_path: Path, prepare: Any, name: str, transient: bool
) -> None:
    # Given audio that cannot be reached, or that is none
    prepare(corpus)
    run(write_lines(corpus / "m.jsonl", {"audio": name}), tmp_path / "out")
    # When it fails, then its line says which
    (line,) = read_lines(tmp_path / "out" / "errors.jsonl")
    assert line.get("transient", False) == transient


def test_a_disk_that_fails_is_a_failure_of_access(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("granite_jax.batch.reading.decode", fail)
    run(write_lines(corpus / "m.jsonl", {"audio": "a/1.wav"}), tmp_path / "out")
    (line,) = read_lines(tmp_path / "out" / "errors.jsonl")
    assert line["transient"] and "Permission denied" in line["error"]


def test_names_of_parts_and_retries() -> None:
    assert committed.part_name(7, "0123456789ab") == "part-000007-0123456789ab.jsonl"
    assert committed.part_name(7, "0123456789ab", 2) == "part-000007-0123456789ab.r2.jsonl"


def _rewrite(path: Path, samples: Any, *, keep_time: bool = False) -> None:
    before = path.stat().st_mtime_ns
    soundfile.write(path, samples, RATE)
    # Two writes can fall into one tick of the file system's clock.
    os.utime(path, ns=(before, before) if keep_time else (before + 10**9, before + 10**9))


# What happens to a recording after its job, and by which ways of noticing it is then transcribed anew
CHANGES: dict[str, tuple[Callable[[Path], Any], set[str]]] = {
    "nothing": (lambda path: None, set()),
    "other length": (lambda path: _rewrite(path, tone(0.3)), {"time", "hash"}),
    "other length, old time": (lambda path: _rewrite(path, tone(0.3), keep_time=True), {"time", "hash"}),
    "other sound": (lambda path: _rewrite(path, tone(0.11) / 2), {"time", "hash"}),
    "other sound, old time": (lambda path: _rewrite(path, tone(0.11) / 2, keep_time=True), {"hash"}),
    "touched": (lambda path: _rewrite(path, tone(0.11)), {"time"}),
    "damaged": (lambda path: path.write_bytes(b"RIFF"), {"time", "hash"}),
    "gone": (lambda path: path.unlink(), set()),
}


@pytest.mark.parametrize("detection", ["time", "hash", "off"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_recording_is_transcribed_anew(corpus: Path, tmp_path: Path, change: str, detection: Any) -> None:
    # Given a finished job, one of whose recordings, of two segments, then changes
    out, path = tmp_path / "out", corpus / "a/1.wav"
    segments = [{"audio": "a/1.wav", "duration": 0.05}, {"audio": "a/1.wav", "offset": 0.05}]
    manifest = write_lines(corpus / "m.jsonl", *segments, {"audio": "b/2.wav"})
    run(manifest, out, detect_changes=detection)
    apply, noticed_by = CHANGES[change]
    apply(path)
    # When the job is run again, then its segments are transcribed anew if the change can be noticed, and nothing else
    summary, asr = run(manifest, out, detect_changes=detection)
    assert summary.changed == summary.retried == 2 * (detection in noticed_by)
    assert len(asr.keywords) == (0 if change == "damaged" else summary.changed)
    assert summary.failed == (summary.changed if change == "damaged" else 0)
    # And a third run has nothing to do
    assert run(manifest, out, detect_changes=detection)[0].retried == 0
    assert batch.merge(out)["entries"] == 3


def test_a_recording_of_many_segments_is_hashed_once(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given twenty segments of a file, when hashes are recorded and compared, then its bytes are hashed once
    hashed: list[Any] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: hashed.append(file.name) or digest(file, name))
    manifest = write_lines(corpus / "m.jsonl", *({"audio": "b/8.wav", "duration": 0.1} for _ in range(20)))
    for _ in range(2):
        run(manifest, tmp_path / "out", detect_changes="hash", part_size=5)
    assert [Path(name).name for name in hashed].count("8.wav") <= 2  # the two readers can begin together


def test_touched_files_keep_their_results_where_a_hash_was_recorded(corpus: Path, tmp_path: Path) -> None:
    # Given a job that recorded hashes, when a file is copied over itself, then a run by time compares the hash
    manifest = write_lines(corpus / "m.jsonl", {"audio": "a/1.wav"})
    run(manifest, tmp_path / "out", detect_changes="hash")
    _rewrite(corpus / "a/1.wav", tone(0.11))
    assert run(manifest, tmp_path / "out")[0].changed == 0
    _rewrite(corpus / "a/1.wav", tone(0.11) / 2)
    assert run(manifest, tmp_path / "out")[0].changed == 1
