"""A batch job without disturbances: what it reads, what it refuses, what it writes."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import batch_worker
import fsspec
import jax
import numpy as np
import pytest
import soundfile
from batch_worker import DeadlyReader, StandIn
from typer.testing import CliRunner

from granite_jax import GraniteError, batch, cli
from granite_jax.audio.load import load_audio
from granite_jax.batch.access import Access, check_host
from granite_jax.batch.manifest import MAX_LINE, Ask, Manifest
from granite_jax.batch.parts import Shard, choose_shard
from granite_jax.batch.reading import Reader, Source, reading
from granite_jax.errors import AudioError
from granite_jax.evaluation.heldout import CLIPS

RATE = 16000
ASK = Ask()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Ten short files, in two directories."""
    for i in range(10):
        path = tmp_path / "corpus" / ("a" if i % 2 else "b") / f"{i}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tone(0.1 + 0.01 * i), RATE)
    return tmp_path / "corpus"


def tone(seconds: float) -> np.ndarray:
    return 0.1 * np.sin(np.arange(round(seconds * RATE)))


def write_manifest(path: Path, *entries: Any) -> Path:
    """Strings are written as they are."""
    lines = (entry if isinstance(entry, str) else json.dumps(entry) for entry in entries)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def results(out: Path) -> list[dict[str, Any]]:
    return [line for part in sorted(out.glob("part-*.jsonl")) for line in lines(part)]


def run(manifest: Any, out: Path, **options: Any) -> tuple[batch.Summary, StandIn]:
    asr: Any = StandIn()
    return batch.run(manifest, out, transcriber=(asr, "stand-in"), num_readers=2, **options), asr


def text_of(
    path: Path, asked: str = "can you transcribe the speech into a written format?", keywords: Sequence[str] = ()
) -> str:
    (transcript,) = StandIn().transcribe([load_audio(path)], task="transcribe", prompt=asked, keywords=[list(keywords)])
    return transcript.text


def test_a_manifest_becomes_one_line_an_utterance_in_its_order(corpus: Path, tmp_path: Path) -> None:
    # Given a manifest of both spellings, with ids, blank lines and fields of others
    manifest = write_manifest(
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
    assert set(found[0]) == {"index", "id", "audio", "text", "tokens", "duration", "ctc_text", "stats"}
    assert (summary.parts, summary.entries, summary.transcribed, summary.failed) == (2, 3, 3, 0)
    # And the summary is of the run that did the work
    for _ in range(2):
        written = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert (written["entries"], written["audio_seconds"]) == (3, 0.36)
        run(manifest, tmp_path / "out", part_size=2)


def test_directories_and_globs_are_listed_once(corpus: Path, tmp_path: Path) -> None:
    # Given a directory with audio, other files and hidden ones
    (corpus / "notes.txt").write_text("none")
    (corpus / ".hidden.wav").write_bytes(b"none")
    # When it is run, and again after a file was added, then the second run is the first one's listing
    run(str(corpus), tmp_path / "out", part_size=4)
    expected = [f"a/{i}.wav" for i in (1, 3, 5, 7, 9)] + [f"b/{i}.wav" for i in (0, 2, 4, 6, 8)]
    assert [f["audio"] for f in results(tmp_path / "out")] == expected
    soundfile.write(corpus / "new.wav", tone(0.1), RATE)
    summary, asr = run(str(corpus), tmp_path / "out", part_size=4)
    assert (summary.resumed_parts, summary.entries, asr.calls) == (3, 10, [])

    # And a glob gives what it matches
    run(f"{corpus}/*/[1-4].wav", tmp_path / "glob")
    assert [f["audio"] for f in results(tmp_path / "glob")] == ["a/1.wav", "a/3.wav", "b/2.wav", "b/4.wav"]
    with pytest.raises(GraniteError, match="no audio files"):
        run(f"{corpus}/*.mp3", tmp_path / "none")


def test_a_segment_is_what_the_file_holds_there(tmp_path: Path) -> None:
    # Given files that are counts of their own samples
    samples = np.arange(3 * RATE, dtype=np.int16)
    for suffix in ("wav", "flac"):
        soundfile.write(tmp_path / f"c.{suffix}", samples, RATE, subtype="PCM_16")
    reader = Reader(Access(str(tmp_path)), max_seconds=2.0)

    def read(**fields: Any) -> Any:
        manifest = Manifest.scan(write_manifest(tmp_path / "m.jsonl", fields), 1, ASK)
        return reader(manifest.read(0)[0])

    # When segments are read, then they have those samples
    for suffix in ("wav", "flac"):
        found = read(audio=f"c.{suffix}", offset=1.25, duration=0.5)
        assert np.array_equal(found.audio.samples * 32768, samples[20000:28000])
        # And one that the file ends in is what is left of it
        found = read(audio=f"c.{suffix}", offset=2.5, duration=1.5)
        assert np.array_equal(found.audio.samples * 32768, samples[40000:])
        # And one beyond it, or longer than what the model takes, is an error
        assert read(audio=f"c.{suffix}", offset=3).error == f"c.{suffix}: has no audio at 3 seconds"
        assert read(audio=f"c.{suffix}").error == f"c.{suffix}: is longer than 2 seconds"
        assert read(audio=f"c.{suffix}", duration=2.5).error == f"c.{suffix}: is longer than 2 seconds"


def test_lines_that_are_no_entries_fail_alone(corpus: Path, tmp_path: Path) -> None:
    # Given lines with one thing wrong each, and a good one in between
    wrong = {
        "{": "line of entry 0: Expecting",
        "[1]": "line of entry 1: not a JSON object",
        "[" * 100_000: "line of entry 2: nested too deeply",
        '{"audio": "' + MAX_LINE * "x" + '"}': "line of entry 3: longer than",
        '{"id": "x"}': "entry 4: has neither",
        '{"audio": 3}': "entry 5: audio must be a short string",
        '{"audio": "a", "audio_filepath": "b"}': "entry 6: has both",
        '{"audio": "a/1.wav", "offset": NaN}': "entry 7: offset must be",
        '{"audio": "a/1.wav", "duration": -1}': "entry 8: duration must be",
        '{"audio": "a/1.wav", "offset": 1e999}': "entry 9: offset must be",
        '{"audio": "a/1.wav", "keywords": "x"}': "entry 10: keywords must be",
        '{"audio": "a/1.wav", "task": "sing"}': "a/1.wav: unknown task 'sing'",
        '{"audio": "a/1.wav", "to": "xx"}': "a/1.wav: unknown language 'xx'",
        '{"audio": "\\u0000"}': "entry 13: audio must be",
        '{"audio": "' + "x" * 3000 + '"}': "cannot be read",
        '{"audio": "\\ud800.wav"}': "cannot be read",
    }
    manifest = write_manifest(corpus / "m.jsonl", *wrong, {"audio": "a/1.wav"})
    # When it is run, then each has its error, and the good one its text
    summary, _ = run(manifest, tmp_path / "out")
    found = results(tmp_path / "out")
    assert [f["index"] for f in found] == list(range(len(wrong) + 1))
    for line, message in zip(found, wrong.values(), strict=False):
        assert message in line["error"], line
    assert found[-1]["text"] == text_of(corpus / "a" / "1.wav")
    assert (summary.failed, summary.transcribed) == (len(wrong), 1)
    assert lines(tmp_path / "out" / "errors.jsonl") == found[:-1]


def test_each_line_is_asked_what_it_asks_for(corpus: Path, tmp_path: Path) -> None:
    # Given lines of three kinds, mixed
    asks: list[dict[str, Any]] = [{}, {"to": "fr"}, {"prompt": "what is this?"}, {"keywords": ["Zelgad"]}]
    manifest = write_manifest(corpus / "m.jsonl", *({"audio": "a/1.wav", **asks[i % 4]} for i in range(12)))
    # When they are run, then those with the same prompt share a batch, and each text is of its own request
    _, asr = run(manifest, tmp_path / "out", task="punctuate")
    assert [count for count, _ in asr.calls if count] == [6, 3, 3]
    prompts = [
        "transcribe the speech with proper punctuation and capitalization.",
        "translate the speech to French.",
        "what is this?",
    ]
    words = [(), (), (), ("Zelgad",)]
    expected = [text_of(corpus / "a" / "1.wav", prompts[i % 4 % 3], words[i % 4]) for i in range(12)]
    assert [f["text"] for f in results(tmp_path / "out")] == expected


def test_batches_are_bounded_and_never_cross_parts(corpus: Path, tmp_path: Path) -> None:
    # Given 400 lines in parts of 150, when they are run by a Transcriber with batches of 2
    manifest = write_manifest(corpus / "m.jsonl", *[{"audio": "a/1.wav"}] * 400)
    _, asr = run(manifest, tmp_path / "out", part_size=150)
    # Then the first call has 16 batches, no later one more than 64, and none utterances of two parts
    assert [count for count, _ in asr.calls if count] == [32, 118, 128, 22, 100]


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
    # And what is missing or wrong is named
    with pytest.raises(GraniteError, match="GRANITE_JAX_NUM_SHARDS is not set"):
        choose_shard(None, None, {"JOB_COMPLETION_INDEX": "3"})
    with pytest.raises(GraniteError, match="JOB_COMPLETION_INDEX is 'x', not a number"):
        choose_shard(None, None, {"JOB_COMPLETION_INDEX": "x"})
    with pytest.raises(GraniteError, match="shard 8 of 8: the first is 0, the last 7"):
        choose_shard(8, 8, {})
    with pytest.raises(GraniteError, match="belong together"):
        choose_shard(1, None, {})


def test_results_of_different_jobs_are_never_mixed(corpus: Path, tmp_path: Path) -> None:
    # Given a directory of a job
    manifest = write_manifest(corpus / "m.jsonl", {"audio": "a/1.wav"}, {"audio": "a/3.wav"})
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
    write_manifest(manifest, {"audio": "a/1.wav"}, {"audio": "a/5.wav"})
    with pytest.raises(GraniteError, match="manifest.sha256 was "):
        run(manifest, tmp_path / "out")
    assert sorted((tmp_path / "out").iterdir()) == before
    # And a part of another job that was copied there is found
    (tmp_path / "out" / "part-000000-0123456789ab.jsonl").write_text("")
    with pytest.raises(GraniteError, match="part-000000-0123456789ab.jsonl is of another job"):
        batch.merge(tmp_path / "out")


def test_bad_options_end_the_job_before_it_starts(corpus: Path, tmp_path: Path) -> None:
    # Given options that no utterance could be transcribed with, then nothing is written but the description
    with pytest.raises(GraniteError, match="unknown language 'klingon'"):
        run(str(corpus), tmp_path / "out", task="translate", to="klingon")
    assert not list((tmp_path / "out").glob("part-*"))
    with pytest.raises(GraniteError, match="no entries"):
        run(write_manifest(tmp_path / "m.jsonl"), tmp_path / "out")
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
    assert [f["index"] for f in lines(out / "transcripts.jsonl")] == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert [(f["index"], f["error"]) for f in lines(out / "errors.jsonl")] == [(2, "a/5.wav: is empty")]

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


def test_files_have_to_be_below_the_root(corpus: Path, tmp_path: Path) -> None:
    # Given a root, and a link out of it
    outside = tmp_path / "outside.wav"
    soundfile.write(outside, tone(0.1), RATE)
    (corpus / "link.wav").symlink_to(outside)
    (corpus / "inner.wav").symlink_to(corpus / "a" / "1.wav")
    access = Access(str(corpus))
    # When names are resolved, then those below it are found, and those that lead elsewhere are refused
    for name in ("a/1.wav", str(corpus / "a" / "1.wav"), f"file://{corpus}/a/1.wav", "inner.wav", "b/../a/1.wav"):
        assert access.resolve(name) == str(corpus / "a" / "1.wav")
    for name in ("../outside.wav", str(outside), f"file://{outside}", "link.wav", "/etc/passwd", "a/../../outside.wav"):
        with pytest.raises(AudioError, match="is not below"):
            access.resolve(name)
    # And with a URL as root no local file is
    remote = Access("gs://bucket/corpus")
    assert remote.resolve("a/1.wav") == "gs://bucket/corpus/a/1.wav"
    for name in ("/etc/passwd", "../other/1.wav", "a/../../1.wav"):
        with pytest.raises(AudioError, match="leads out of"):
            remote.resolve(name)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://example.com/a.wav", "protocol 'https' is not allowed, only file, gs, s3"),
        ("http://example.com/a.wav", "protocol 'http' is not allowed"),
        ("memory://a.wav", "protocol 'memory' is not allowed"),
        ("github://org:repo@/a.wav", "protocol 'github' is not allowed"),
        ("zip://a.wav::s3://bucket/a.zip", "chained URL"),
        ("simplecache::s3://bucket/a.wav", "chained URL"),
        ("s3://bucket/a.wav::file:///etc/passwd", "chained URL"),
        ("file://host/a.wav", "of another machine"),
        ("S3A://bucket/a.wav", "protocol 's3a' is not allowed"),
    ],
)
def test_urls_of_other_protocols_are_refused(url: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=message):
        Access(str(tmp_path)).resolve(url)


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254", "127.0.0.1", "10.0.0.1", "[::1]", "[fd00:ec2::254]", "[::ffff:169.254.169.254]",
        "2852039166", "0xA9FEA9FE", "0177.0.0.1", "127.1", "0x7f.0.0.1", "user@example.com", "user:pw@93.184.216.34",
    ],
)  # fmt: skip
def test_servers_of_the_own_network_are_refused(host: str) -> None:
    with pytest.raises(AudioError, match="not on the public Internet|not a plain https URL"):
        check_host(f"https://{host}/latest/meta-data")


def test_names_that_lead_into_the_own_network_are_refused(tmp_path: Path) -> None:
    # Given a name that resolves to this machine, when https is allowed, then it is not read, and the error is its own
    check_host("https://example.com/a.wav")
    reader = Reader(Access(str(tmp_path), ("https",)), 10.0)
    manifest = Manifest.scan(write_manifest(tmp_path / "m.jsonl", {"audio": "https://localhost:9/a.wav"}), 1, ASK)
    error = reader(manifest.read(0)[0]).error
    assert error is not None
    assert "localhost is not on the public Internet" in error


def test_a_manifest_that_changes_under_a_job_ends_it(corpus: Path) -> None:
    # Given a manifest that was scanned, when it is written to, then its parts are not read any more
    path = write_manifest(corpus / "m.jsonl", {"audio": "a/1.wav"}, {"audio": "a/3.wav"})
    manifest = Manifest.scan(path, 1, ASK)
    assert manifest.read(1)[0].audio == "a/3.wav"
    write_manifest(path, {"audio": "a/3.wav"}, {"audio": "a/1.wav"}, {})
    with pytest.raises(GraniteError, match="has changed while the job runs"):
        manifest.read(1)


def test_processes_survive_files_that_kill_them(corpus: Path) -> None:
    # Given files, two of which kill whoever reads them
    names = ["a/1.wav", "b/2.wav", "deadly.wav", "a/3.wav", "b/4.wav", "b/6.wav", "deadly/too.wav", "a/7.wav"]
    manifest = Manifest.scan(write_manifest(corpus / "m.jsonl", *({"audio": n} for n in names)), 4, ASK)
    reader = DeadlyReader(Access(str(corpus)), 10.0)
    # When they are read by processes, then each other file is read, in order, and these two have an error
    with reading(Source(manifest, range(manifest.parts)), reader, "processes", 1) as reads:
        found = list(reads)
    assert [read.entry.audio for read in found] == names
    assert {read.entry.audio: read.error for read in found if read.audio is None} == {
        name: f"{name}: killed the process that read it, twice" for name in names if "deadly" in name
    }


def test_a_prepared_tfds_data_set_is_read_without_tensorflow(tmp_path: Path) -> None:
    # Given a prepared data set of tensors, when it is run, then there is a text for each example
    code = """
import sys, numpy as np, tensorflow_datasets as tfds
features = tfds.features.FeaturesDict({"audio": tfds.features.Tensor(shape=(None,), dtype=np.int16)})
class Tones(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self): return tfds.core.DatasetInfo(builder=self, features=features)
    def _split_generators(self, manager): return {"test": self._generate_examples()}
    def _generate_examples(self):
        for i in range(3): yield i, {"audio": np.full(1600 + i, 100 + i, np.int16)}
Tones(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, capture_output=True, cwd=tmp_path)
    (prepared,) = tmp_path.glob("*/1.0.0")
    summary, _ = run(f"tfds:{prepared}#test", tmp_path / "out")
    found = results(tmp_path / "out")
    assert (summary.transcribed, [f["audio"] for f in found]) == (3, ["tfds:0", "tfds:1", "tfds:2"])
    assert sorted(round(f["duration"] * RATE) for f in found) == [1600, 1601, 1602]
    # And what is none is named
    with pytest.raises(GraniteError, match="is no prepared data set"):
        run(f"tfds:{tmp_path / 'out'}#test", tmp_path / "other")


def test_a_manifest_and_its_audio_may_be_on_an_object_store(corpus: Path, tmp_path: Path) -> None:
    # Given a store in memory in place of s3, with a manifest of names relative to it
    fsspec.register_implementation("s3", fsspec.get_filesystem_class("memory"), clobber=True)
    files = fsspec.filesystem("s3")
    files.store.clear()
    files.put(str(corpus), "/bucket/corpus", recursive=True)
    names = ("a/1.wav", "s3://bucket/corpus/b/2.wav", "x")
    files.pipe("/bucket/corpus/m.jsonl", "".join(f"{json.dumps({'audio': name})}\n" for name in names).encode())
    # When it is run from and to that store, then the results are those of the local files
    summary, _ = run("s3://bucket/corpus/m.jsonl", "s3://bucket/out")  # pyright: ignore[reportArgumentType]
    assert (summary.transcribed, summary.failed) == (2, 1)
    (part,) = (path for path in files.ls("/bucket/out", detail=False) if "/part-" in path)
    found = [json.loads(line) for line in files.cat(part).splitlines()]
    assert [f.get("text") for f in found] == [text_of(corpus / "a/1.wav"), text_of(corpus / "b/2.wav"), None]
    assert batch.merge("s3://bucket/out")["transcribed"] == 2
    # And so is a listing, whatever the root of local files is
    summary, _ = run("s3://bucket/corpus/", "s3://bucket/listed", root=tmp_path)  # pyright: ignore[reportArgumentType]
    assert summary.transcribed == 10
    # And a manifest that is not there, or may not be read, is named
    with pytest.raises(GraniteError, match="s3://bucket/none.jsonl: no such file"):
        run("s3://bucket/none.jsonl", tmp_path / "none")
    with pytest.raises(GraniteError, match="https://example.com/m.jsonl: protocol 'https' is not allowed"):
        run("https://example.com/m.jsonl", tmp_path / "none")


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


def test_the_real_transcriber_gives_its_own_results(tmp_path: Path) -> None:
    # Given a few recordings, when they are a job of the embedded checkpoint, then each line is what transcribe() gives
    from granite_jax import Transcriber

    clips = sorted(CLIPS.glob("*.ogg"))[:6]
    manifest = write_manifest(tmp_path / "m.jsonl", *({"audio": os.fspath(clip)} for clip in clips))
    summary = batch.run(manifest, tmp_path / "out", "demo", dtype="float32", root=CLIPS, part_size=4, batch_size=4)
    asr = Transcriber.from_pretrained("demo", dtype="float32", batch_size=4)
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
    # Given a worker that is told to stop amid its second part, when it ends, then the first is there alone
    seen: list[int] = []
    summary, _ = run(
        str(corpus), tmp_path / "out", part_size=4, progress=lambda p: seen.append(p.done), stop=lambda: len(seen) > 6
    )
    assert (summary.stopped, len(results(tmp_path / "out"))) == (True, 4)
    assert not (tmp_path / "out" / "summary.json").exists()
    # And the next run does the rest
    assert batch_worker.run(str(corpus), tmp_path / "out", part_size=4).resumed_parts == 1
    assert batch.merge(tmp_path / "out")["transcribed"] == 10
