"""A batch job without disturbances: what it refuses, what it writes, and its command."""

import collections
import json
import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import batch_worker
import jax
import pytest
from batch_jobs import read_lines, results, run, text_of, write_lines
from batch_worker import StandIn
from instant import Instant, with_recognizer
from typer.testing import CliRunner

from granite_jax import GraniteError, batch, cli
from granite_jax.batch.manifest import MAX_LINE
from granite_jax.batch.parts import Shard, choose_shard
from granite_jax.evaluation.heldout import CLIPS
from granite_jax.formats.schema import transcript_fields
from granite_jax.results import Transcript


def test_a_manifest_becomes_one_line_an_utterance_in_its_order(corpus: Path, tmp_path: Path) -> None:
    # Given a manifest of both spellings, with ids, blank lines and fields of others
    manifest = write_lines(
        corpus / "m.jsonl",
        {"audio": "a/1.wav", "id": "first", "text": "reference"},
        "",
        {"audio_filepath": "b/2.wav", "id": 7},
        {"audio": str(corpus / "a" / "3.wav")},
    )
    # When it is run in parts of two
    summary, _ = run(manifest, tmp_path / "out", part_size=2)

    # Then there is a line for each, in order, and the counts are right
    found = results(tmp_path / "out")
    assert [(f["index"], f["id"], f["audio"]) for f in found] == [
        (0, "first", "a/1.wav"),
        (1, "7", "b/2.wav"),
        (2, "2", str(corpus / "a" / "3.wav")),
    ]
    assert [f["text"] for f in found] == [text_of(corpus / f["audio"]) for f in found]
    assert found[0]["tokens"] == [1, 2]
    assert found[0]["duration"] == 0.11
    assert set(found[0]) == {"index", "id", "file", *transcript_fields(Transcript(""))}
    assert (summary.parts, summary.entries, summary.transcribed, summary.failed) == (2, 3, 3, 0)
    # And the summary is of the run that did the work
    for _ in range(2):
        written = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert (written["entries"], written["audio_seconds"]) == (3, 0.36)
        run(manifest, tmp_path / "out", part_size=2)


def test_lines_that_are_no_entries_fail_alone(corpus: Path, tmp_path: Path) -> None:
    # Given lines with one thing wrong each, and a good one in between
    wrong = {
        "{": "line of entry 0: Expecting",
        "[1]": "line of entry 1: not a JSON object",
        "[" * 100_000: "line of entry 2: nested too deeply",
        '{"audio": "' + MAX_LINE * "x" + '"}': "line of entry 3: longer than",
        '{"id": "x"}': "entry 4: names no audio by audio or path",
        '{"audio": 3}': "entry 5: audio must be a short string",
        '{"audio": "a", "audio_filepath": "b"}': "entry 6: has both",
        '{"audio": "a/1.wav", "offset": "1"}': "entry 7: offset must be",
        '{"audio": "a/1.wav", "duration": -1}': "entry 8: duration must be",
        '{"audio": "a/1.wav", "offset": 1e999}': "entry 9: offset must be",
        '{"audio": "a/1.wav", "keywords": "x"}': "entry 10: keywords must be",
        '{"audio": "a/1.wav", "task": "sing"}': "a/1.wav: unknown task 'sing'",
        '{"audio": "a/1.wav", "to": "xx"}': "a/1.wav: unknown language 'xx'",
        '{"audio": "\\u0000"}': "entry 13: audio must be",
        '{"audio": "' + "x" * 3000 + '"}': "cannot be read",
        '{"audio": "\\ud800.wav"}': "cannot be read",
    }
    manifest = write_lines(corpus / "m.jsonl", *wrong, {"audio": "a/1.wav"})
    # When it is run, then each has its error, and the good one its text
    summary, _ = run(manifest, tmp_path / "out")
    found = results(tmp_path / "out")
    assert [f["index"] for f in found] == list(range(len(wrong) + 1))
    for line, message in zip(found, wrong.values(), strict=False):
        assert message in line["error"], line
        assert set(line) >= {"index", "id", *transcript_fields(Transcript(""))}
    assert found[-1]["text"] == text_of(corpus / "a" / "1.wav")
    assert found[-1]["error"] is None
    assert (summary.failed, summary.transcribed) == (len(wrong), 1)
    assert read_lines(tmp_path / "out" / "errors.jsonl") == found[:-1]


def test_each_line_is_asked_what_it_asks_for(corpus: Path, tmp_path: Path) -> None:
    # Given lines of three kinds, mixed
    asks: list[dict[str, Any]] = [{}, {"target_language": "fr"}, {"prompt": "what is this?"}, {"keywords": ["Zelgad"]}]
    manifest = write_lines(corpus / "m.jsonl", *({"audio": "a/1.wav", **asks[i % 4]} for i in range(12)))
    # When they are run, then each text is of its own request
    run(manifest, tmp_path / "out", task="punctuate")
    prompts = [
        "transcribe the speech with proper punctuation and capitalization.",
        "translate the speech to French.",
        "what is this?",
    ]
    words = [(), (), (), ("Zelgad",)]
    expected = [text_of(corpus / "a" / "1.wav", prompts[i % 4 % 3], words[i % 4]) for i in range(12)]
    assert [f["text"] for f in results(tmp_path / "out")] == expected


def test_what_is_submitted_is_bounded_and_crosses_parts(corpus: Path, tmp_path: Path) -> None:
    # Given 400 lines in parts of 150, and a Transcriber that finishes nothing before it has 64 utterances, or all
    manifest = write_lines(corpus / "m.jsonl", *[{"audio": "a/1.wav"}] * 400)
    asr, waiting, most = StandIn(), collections.deque(), []
    submit = asr.submit

    def held(*arguments: Any, **options: Any) -> Any:
        waiting.append((future := Future(), submit(*arguments, **options)))
        most.append(len(waiting))
        if len(waiting) == 64 or len(most) > 400 - 64:
            done, result = waiting.popleft()
            done.set_result(result.result())
            if len(most) == 400:
                for done, result in waiting:
                    done.set_result(result.result())
        return future

    asr.submit = held
    batch.run(manifest, tmp_path / "out", transcriber=(asr, "held"), part_size=150)
    # Then twice what it sorts together is submitted at a time, from several parts, and nothing is lost
    assert max(most) == 64 and len(results(tmp_path / "out")) == 400


def test_batches_cross_parts(corpus: Path, tmp_path: Path, random_asr: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given parts of three utterances, and batches of eight, when they are run
    asr = with_recognizer(random_asr, recognizer := Instant(), monkeypatch)
    manifest = write_lines(corpus / "m.jsonl", *[{"audio": "a/1.wav"}] * 24)
    batch.run(manifest, tmp_path / "out", transcriber=(asr, "instant"), part_size=3)
    # Then batches are full: the device does not wait for the end of a part
    assert len(results(tmp_path / "out")) == 24
    assert sorted(map(len, recognizer.batches))[-2:] == [8, 8] and len(recognizer.batches) <= 8


def test_shards_share_the_parts(corpus: Path, tmp_path: Path) -> None:
    # Given a job of 5 parts, when three workers do a shard each
    for shard in range(3):
        summary, _ = run(str(corpus), tmp_path / "out", part_size=2, shard=shard, num_shards=3)
        assert summary.parts == (2, 2, 1)[shard]
        assert (tmp_path / "out" / f"errors-{shard:05}-of-00003.jsonl").read_text() == ""
    # Then together they are what one worker does alone
    run(str(corpus), tmp_path / "alone", part_size=2)
    assert results(tmp_path / "out") == results(tmp_path / "alone")
    assert batch.merge(tmp_path / "out")["transcribed"] == 10


def test_the_environment_says_which_shard() -> None:
    # Given the variables of the engines, then they are understood, and what is given goes first
    indexed = {"JOB_COMPLETION_INDEX": "3", "GRANITE_JAX_NUM_SHARDS": "8"}
    slurm = {f"SLURM_ARRAY_TASK_{k}": v for k, v in {"ID": "7", "MIN": "1", "STEP": "2", "COUNT": "4"}.items()}
    assert choose_shard(None, None, {}) == Shard(0, 1)
    assert choose_shard(None, None, indexed) == Shard(3, 8)
    assert choose_shard(None, None, slurm) == Shard(3, 4)
    assert choose_shard(1, 2, indexed) == Shard(1, 2)
    assert choose_shard(1, 2, slurm) == Shard(1, 2)
    # And the number of shards says which of them the elements of an array are that is submitted again
    gaps = {f"SLURM_ARRAY_TASK_{k}": v for k, v in {"ID": "5", "MIN": "2", "MAX": "5", "COUNT": "2"}.items()}
    assert choose_shard(None, None, gaps | {"GRANITE_JAX_NUM_SHARDS": "8"}) == Shard(5, 8)
    # And what is missing or wrong is named
    with pytest.raises(GraniteError, match="GRANITE_JAX_NUM_SHARDS is not set"):
        choose_shard(None, None, {"JOB_COMPLETION_INDEX": "3"})
    with pytest.raises(GraniteError, match="JOB_COMPLETION_INDEX is 'x', not a number"):
        choose_shard(None, None, {"JOB_COMPLETION_INDEX": "x"})
    with pytest.raises(GraniteError, match="shard 8 of 8: the first is 0, the last 7"):
        choose_shard(8, 8, {})
    with pytest.raises(GraniteError, match="belong together"):
        choose_shard(1, None, {})
    with pytest.raises(
        GraniteError, match="SLURM_ARRAY_TASK_ID is 5, but shards are 0 to 4: GRANITE_JAX_NUM_SHARDS is 5"
    ):
        choose_shard(None, None, gaps | {"GRANITE_JAX_NUM_SHARDS": "5"})


@pytest.mark.parametrize(
    "array", [[2, 5], [1, 5, 7], [0, 1, 3], [0, 1, 2], [4, 5], [6], [1, 3, 5], [0, 3, 6]], ids=lambda array: str(array)
)
@pytest.mark.parametrize("step", [1, None, 2])
def test_slurm_leaves_no_shard_out(array: list[int], step: int | None) -> None:
    # Given the elements of an array, when they choose their shards, then they share everything, or all are refused
    chosen: list[Shard | str] = []
    for index in array:
        values = {"ID": index, "MIN": array[0], "MAX": array[-1], "COUNT": len(array)} | (
            {"STEP": step} if step else {}
        )
        try:
            chosen.append(choose_shard(None, None, {f"SLURM_ARRAY_TASK_{k}": str(v) for k, v in values.items()}))
        except GraniteError as error:
            chosen.append("set GRANITE_JAX_NUM_SHARDS" if "or give --shard" in str(error) else str(error))
    is_regular = array == list(range(array[0], array[-1] + 1, step or 1))
    assert chosen == [Shard(i, len(array)) if is_regular else "set GRANITE_JAX_NUM_SHARDS" for i in range(len(array))]


def test_results_of_different_jobs_are_never_mixed(corpus: Path, tmp_path: Path) -> None:
    # Given a directory of a job
    manifest = write_lines(corpus / "m.jsonl", {"audio": "a/1.wav"}, {"audio": "a/3.wav"})
    run(manifest, tmp_path / "out")
    before = sorted((tmp_path / "out").iterdir())
    # When it is run with another option, manifest, part size or model, then it is refused, saying what differs
    asr: Any = StandIn()
    with pytest.raises(GraniteError, match="another job: options.task was 'transcribe', is 'punctuate'"):
        run(manifest, tmp_path / "out", task="punctuate")
    with pytest.raises(GraniteError, match="part_size was 1024, is 1"):
        run(manifest, tmp_path / "out", part_size=1)
    with pytest.raises(GraniteError, match="weights was 'stand-in', is 'other'"):
        batch.run(manifest, tmp_path / "out", transcriber=(asr, "other"))
    write_lines(manifest, {"audio": "a/1.wav"}, {"audio": "a/5.wav"})
    with pytest.raises(GraniteError, match="another job: manifest has other contents$"):
        run(manifest, tmp_path / "out")
    write_lines(manifest, *[{"audio": "a/1.wav"}] * 3)
    with pytest.raises(GraniteError, match="another job: manifest had 2 entries, has 3$"):
        run(manifest, tmp_path / "out")
    assert sorted((tmp_path / "out").iterdir()) == before
    # And a part of another job that was copied there is found
    (tmp_path / "out" / "part-000000-0123456789ab.jsonl").write_text("")
    with pytest.raises(GraniteError, match="part-000000-0123456789ab.jsonl is of another job"):
        batch.merge(tmp_path / "out")


def test_bad_options_end_the_job_before_it_starts(corpus: Path, tmp_path: Path) -> None:
    # Given options that no utterance could be transcribed with, then nothing is written but the description
    with pytest.raises(GraniteError, match="unknown language 'klingon'"):
        run(str(corpus), tmp_path / "out", task="translate", target_language="klingon")
    assert not list((tmp_path / "out").glob("part-*"))
    with pytest.raises(GraniteError, match="no entries"):
        run(write_lines(tmp_path / "m.jsonl"), tmp_path / "out")
    with pytest.raises(GraniteError, match="nothing.jsonl: cannot be read"):
        run(tmp_path / "nothing.jsonl", tmp_path / "out")


def test_merge_finds_what_is_missing_damaged_or_double(corpus: Path, tmp_path: Path) -> None:
    # Given a finished job of 5 parts, one utterance of which failed
    (corpus / "a" / "5.wav").write_bytes(b"")
    out = tmp_path / "out"
    run(str(corpus), out, part_size=2)
    # When it is merged, then there is one file of all, in order, and one of the failed
    summary = batch.merge(out)
    assert (summary["entries"], summary["transcribed"], summary["failed"]) == (10, 9, 1)
    assert [f["index"] for f in read_lines(out / "transcripts.jsonl")] == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert [(f["index"], f["error"]) for f in read_lines(out / "errors.jsonl")] == [(2, "a/5.wav: is empty")]

    # And each damage is named
    part = sorted(out.glob("part-*"))[1]
    good = part.read_bytes()
    first, second = good.splitlines(keepends=True)
    for damaged, message in {
        first: "ends before entry 3",
        first + second[:-9]: "is damaged where entry 3 should be",
        first + first: "has entry 2 where entry 3 should be",
        good + second: "has entry 3 where its end should be",
        b"": "ends before entry 2",
    }.items():
        part.write_bytes(damaged)
        with pytest.raises(GraniteError, match=f"{part.name} {message}"):
            batch.merge(out)
    part.unlink()
    with pytest.raises(GraniteError, match="1 of 5 parts are missing: 1; run the job again"):
        batch.merge(out)
    # And running the job again mends it
    run(str(corpus), out, part_size=2)
    assert part.read_bytes() == good
    with pytest.raises(GraniteError, match="job.json is missing"):
        batch.merge(corpus)


def test_the_command_runs_and_merges(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given the command with the stand-in for every checkpoint
    asr = StandIn()
    monkeypatch.setattr("granite_jax.batch.job.Transcriber.from_pretrained", lambda *_, **__: asr)
    out = tmp_path / "out"

    def invoke(*arguments: Any) -> tuple[int, str, str]:
        done = CliRunner().invoke(cli.app, ["batch", *map(str, arguments)])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, done.stdout, done.stderr

    # When it is run, then there is a line of what it did
    code, stdout, _ = invoke(corpus, "--out", out)
    assert code == 0
    assert stdout == f"{out}: 10 of 10 utterances, 0 failed\n"
    assert invoke("merge", out) == (0, f"{out}: 10 of 10 utterances, 0 failed\n", "")
    (corpus / "a" / "1.wav").write_bytes(b"")
    # And a job that is done is one, whatever failed: engines would start it again
    assert invoke("--out", tmp_path / "other", corpus)[:2] == (
        0,
        f"{tmp_path / 'other'}: 9 of 10 utterances, 1 failed\n",
    )
    # And refusals are one line
    code, _, stderr = invoke(corpus, "--out", out, "--task", "punctuate")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "another job: options.task was" in stderr
    assert invoke("merge", corpus)[0] == 1
    # And without the number of shards, an Indexed Job's worker does not start
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    assert "GRANITE_JAX_NUM_SHARDS is not set" in invoke(corpus, "--out", out)[2]


@pytest.mark.slow
def test_the_real_transcriber_gives_its_own_results(tmp_path: Path) -> None:
    # Given a few recordings, when they are a job of the embedded checkpoint, then each line is what transcribe() gives
    from granite_jax import Transcriber

    clips = sorted(CLIPS.glob("*.ogg"))[:6]
    manifest = write_lines(tmp_path / "m.jsonl", *({"audio": os.fspath(clip)} for clip in clips))
    summary = batch.run(manifest, tmp_path / "out", "demo", dtype="float32", root=CLIPS, part_size=4)
    asr = Transcriber.from_pretrained("demo", dtype="float32")
    expected = asr.transcribe(list(clips))
    found = results(tmp_path / "out")
    assert summary.transcribed == 6
    assert [(f["text"], tuple(f["tokens"])) for f in found] == [(t.text, t.tokens) for t in expected]
    # And the job goes on with other devices and batches, to the same end
    part = max((tmp_path / "out").glob("part-*"))
    before = part.read_bytes()
    part.unlink()
    options: dict[str, Any] = {"devices": jax.devices()[:2], "parallel": "pmap", "batch_size": 1}
    batch.run(manifest, tmp_path / "out", "demo", dtype="float32", root=CLIPS, part_size=4, **options)
    assert part.read_bytes() == before
    # And the same job of other weights or another dtype is refused
    with pytest.raises(GraniteError, match="dtype was 'float32', is 'bfloat16'"):
        batch.run(manifest, tmp_path / "out", "demo", dtype="bfloat16", root=CLIPS, part_size=4)


def test_the_last_report_is_of_all_the_audio(corpus: Path, tmp_path: Path) -> None:
    # Given a job that reports its progress, when it is done, then the last report counts what the summary counts
    seen: list[tuple[int, float]] = []
    summary, _ = run(str(corpus), tmp_path / "out", progress=lambda p: seen.append((p.done, p.audio_seconds)))
    assert seen[-1] == (summary.entries, pytest.approx(summary.audio_seconds, abs=1e-3))


def test_a_worker_that_is_stopped_leaves_whole_parts(corpus: Path, tmp_path: Path) -> None:
    # Given a worker that is to stop within its second part, when it ends, then whole parts are there: later ones only
    # if all of them was just finished
    seen: list[int] = []
    summary, _ = run(
        str(corpus), tmp_path / "out", part_size=4, progress=lambda p: seen.append(p.done), stop=lambda: len(seen) > 6
    )
    assert summary.stopped and len(results(tmp_path / "out")) in (4, 8, 10)
    assert not (tmp_path / "out" / "summary.json").exists()
    # And the next run does the rest
    assert batch_worker.run(str(corpus), tmp_path / "out", part_size=4).resumed_parts in (1, 2, 3)
    assert batch.merge(tmp_path / "out")["transcribed"] == 10
