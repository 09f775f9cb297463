"""What a batch job reads: directories, segments, URLs, data sets and object stores; and what it refuses to read."""

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import soundfile
from batch_jobs import RATE, results, run, text_of, tone, write_lines
from batch_worker import DeadlyReader

from granite_jax import GraniteError, batch
from granite_jax.audio.load import AccessError, load_audio
from granite_jax.batch import access
from granite_jax.batch.access import AudioStorage, check_host
from granite_jax.batch.manifest import Manifest
from granite_jax.batch.reading import Reader, opening
from granite_jax.errors import AudioError
from granite_jax.options import TranscribeOptions

ASK = TranscribeOptions()


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
    assert (summary.resumed_parts, summary.entries, asr.options) == (3, 10, [])

    # And a glob gives what it matches
    run(f"{corpus}/*/[1-4].wav", tmp_path / "glob")
    assert [f["audio"] for f in results(tmp_path / "glob")] == ["a/1.wav", "a/3.wav", "b/2.wav", "b/4.wav"]
    with pytest.raises(GraniteError, match="no audio files"):
        run(f"{corpus}/*.mp3", tmp_path / "none")


@pytest.mark.parametrize("spelling", ["{corpus}/", "{corpus}/./", "{corpus}/../corpus", "{relative}"])
def test_a_directory_is_the_same_however_it_is_spelled(corpus: Path, tmp_path: Path, spelling: str) -> None:
    # Given a finished job of a directory, when it is spelled otherwise, then it is the same job
    run(str(corpus), tmp_path / "out")
    summary, _ = run(spelling.format(corpus=corpus, relative=os.path.relpath(corpus)), tmp_path / "out")
    assert summary.resumed_parts == summary.parts


@pytest.mark.parametrize(
    ("name", "is_listed"),
    [
        *((f"x{suffix}", True) for suffix in (".wave", ".oga", ".m4a", ".webm", ".WMA", ".mp4", ".dts", ".aifc")),
        *((name, False) for name in ("x.txt", "x", "x.wav.bak", "x.ts")),
    ],
)
def test_what_a_listing_leaves_out_is_told(corpus: Path, tmp_path: Path, name: str, is_listed: bool) -> None:
    # Given a directory with another file, when it is listed, then the file is there, or counted by its suffix
    shutil.copy(corpus / "a/1.wav", corpus / name)
    summary, _ = run(str(corpus), tmp_path / "out")
    assert (summary.entries, summary.failed) == (11 if is_listed else 10, 0)
    kind = Path(name).suffix or "without a suffix"
    assert summary.notes == (() if is_listed else (f"files left out, not audio by their names: 1 {kind}",))


@pytest.mark.parametrize(
    ("pattern", "count"), [("**.wav", 0), ("a/**.wav", 5), ("*/***.wav", 10), ("a/[13].wav", 2), ("*/", 0), ("[", 0)]
)
def test_globs_match_what_a_shell_would(corpus: Path, tmp_path: Path, pattern: str, count: int) -> None:
    if count:
        assert run(f"{corpus}/{pattern}", tmp_path / "out")[0].entries == count
    else:
        with pytest.raises(GraniteError, match="no audio files|cannot be read"):
            run(f"{corpus}/{pattern}", tmp_path / "out")


@pytest.mark.parametrize("source", ["{corpus}", "{corpus}/**/*.wav", "{corpus}/**"])
def test_links_that_lead_in_circles_end(corpus: Path, tmp_path: Path, source: str) -> None:
    # Given a directory with links to itself, when it is listed, then each file is there once
    for name in ("here", "there", "a/up"):
        (corpus / name).symlink_to(corpus)
    summary, _ = run(source.format(corpus=corpus), tmp_path / "out")
    assert (summary.entries, summary.failed) == (10, 0)
    told = ("files left out, not audio by their names: 3 links to directories",)
    assert summary.notes == (told if source == "{corpus}" else ())


def test_files_that_come_later_are_told(corpus: Path, tmp_path: Path) -> None:
    # Given a finished job of a directory, when files come, then a run says that they are no part of it
    run(str(corpus), tmp_path / "out")
    for name in ("later.wav", "a/too.wav"):
        shutil.copy(corpus / "a/1.wav", corpus / name)
    summary, _ = run(str(corpus), tmp_path / "out")
    assert summary.entries == 10
    assert summary.notes == ("audio files that came after the job's listing, and are left out: 2 (use another --out)",)


def test_a_segment_is_what_the_file_holds_there(tmp_path: Path) -> None:
    # Given files that are counts of their own samples
    samples = np.arange(3 * RATE, dtype=np.int16)
    for suffix in ("wav", "flac"):
        soundfile.write(tmp_path / f"c.{suffix}", samples, RATE, subtype="PCM_16")
    reader = Reader(AudioStorage(str(tmp_path)), max_seconds=2.0)

    def read(**fields: Any) -> Any:
        manifest = Manifest.scan(write_lines(tmp_path / "m.jsonl", fields), ASK)
        return load_audio(reader.open(manifest.read(range(1))[0]).recording)

    # When segments are read, then they have those samples
    for suffix in ("wav", "flac"):
        found = read(audio=f"c.{suffix}", offset=1.25, duration=0.5)
        assert np.array_equal(found.samples * 32768, samples[20000:28000])
        # And one that the file ends in is what is left of it
        found = read(audio=f"c.{suffix}", offset=2.5, duration=1.5)
        assert np.array_equal(found.samples * 32768, samples[40000:])
        # And one beyond it, or longer than what the model takes, is an error
        with pytest.raises(AudioError, match=rf"^c\.{suffix}: has no audio at 3 seconds$"):
            read(audio=f"c.{suffix}", offset=3)
        with pytest.raises(AudioError, match=rf"^c\.{suffix}: is longer than 2 seconds$"):
            read(audio=f"c.{suffix}")
        with pytest.raises(AudioError, match=rf"^c\.{suffix}: is longer than 2 seconds$"):
            read(audio=f"c.{suffix}", duration=2.5)


def test_files_have_to_be_below_the_root(corpus: Path, tmp_path: Path) -> None:
    # Given a root, and a link out of it
    outside = tmp_path / "outside.wav"
    soundfile.write(outside, tone(0.1), RATE)
    (corpus / "link.wav").symlink_to(outside)
    (corpus / "inner.wav").symlink_to(corpus / "a" / "1.wav")
    access = AudioStorage(str(corpus))
    # When names are resolved, then those below it are found, and those that lead elsewhere are refused
    for name in ("a/1.wav", str(corpus / "a" / "1.wav"), f"file://{corpus}/a/1.wav", "inner.wav", "b/../a/1.wav"):
        assert access.resolve(name) == str(corpus / "a" / "1.wav")
    for name in ("../outside.wav", str(outside), f"file://{outside}", "link.wav", "/etc/passwd", "a/../../outside.wav"):
        with pytest.raises(AudioError, match="is not below"):
            access.resolve(name)
    # And with a URL as root no local file is
    remote = AudioStorage("gs://bucket/corpus")
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
        AudioStorage(str(tmp_path)).resolve(url)


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
    reader = Reader(AudioStorage(str(tmp_path), ("https",)), 10.0)
    manifest = Manifest.scan(write_lines(tmp_path / "m.jsonl", {"audio": "https://localhost:9/a.wav"}), ASK)
    with pytest.raises(AudioError, match="localhost is not on the public Internet"):
        load_audio(reader.open(manifest.read(range(1))[0]).recording)


def test_a_manifest_that_changes_under_a_job_ends_it(corpus: Path) -> None:
    # Given a manifest that was scanned, when it is written to, then its parts are not read any more
    path = write_lines(corpus / "m.jsonl", {"audio": "a/1.wav"}, {"audio": "a/3.wav"})
    manifest = Manifest.scan(path, ASK)
    assert manifest.read(range(1, 2))[0].audio == "a/3.wav"
    write_lines(path, {"audio": "a/3.wav"}, {"audio": "a/1.wav"}, {})
    with pytest.raises(GraniteError, match="has changed while the job runs"):
        manifest.read(range(1, 2))


def test_a_touched_manifest_ends_no_job(corpus: Path) -> None:
    # Given a manifest that is being read, when it is touched, or replaced by a copy, then reading goes on
    path = write_lines(corpus / "m.jsonl", {"audio": "a/1.wav"}, {"audio": "a/3.wav"})
    manifest = Manifest.scan(path, ASK)
    os.utime(path, ns=(1, 1))
    assert [entry.audio for entry in manifest.read(range(1, 2))] == ["a/3.wav"]
    shutil.copy(path, corpus / "copy")
    os.replace(corpus / "copy", path)
    assert [entry.audio for entry in manifest.read(range(1))] == ["a/1.wav"]


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Kills the processes of what takes longer, and raises TimeoutError."""

    def expire(*_: Any) -> None:
        for process in multiprocessing.active_children():
            process.kill()
        raise TimeoutError(f"it takes longer than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_processes_survive_files_that_kill_them(corpus: Path) -> None:
    # Given files, two of which kill whoever reads them
    names = ["a/1.wav", "b/2.wav", "deadly.wav", "a/3.wav", "b/4.wav", "b/6.wav", "deadly/too.wav", "a/7.wav"]
    manifest = Manifest.scan(write_lines(corpus / "m.jsonl", *({"audio": n} for n in names)), ASK)
    reader = DeadlyReader(AudioStorage(str(corpus)), 10.0)
    # When they are read by processes, then each other file is read, and these two have an error
    entries = manifest.read(range(manifest.entries))
    errors = {}
    with time_limit(120), opening(reader, "processes", 1) as open_entry:
        for entry in entries:
            try:
                assert len(load_audio(open_entry(entry).recording).samples)
            except AccessError as error:
                errors[entry.audio] = str(error)
    assert errors == {name: f"{name}: killed the process that read it, twice" for name in names if "deadly" in name}


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
    command = [sys.executable, "-c", code, tmp_path]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, timeout=120)
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
    summary, _ = run("s3://bucket/corpus/m.jsonl", "s3://bucket/out")
    assert (summary.transcribed, summary.failed) == (2, 1)
    (part,) = (path for path in files.ls("/bucket/out", detail=False) if "/part-" in path)
    found = [json.loads(line) for line in files.cat(part).splitlines()]
    assert [f["text"] for f in found] == [text_of(corpus / "a/1.wav"), text_of(corpus / "b/2.wav"), ""]
    assert batch.merge("s3://bucket/out")["transcribed"] == 2
    # And so is a listing, whatever the root of local files is
    summary, _ = run("s3://bucket/corpus/", "s3://bucket/listed", root=tmp_path)
    assert summary.transcribed == 10
    # And a manifest that is not there, or may not be read, is named
    with pytest.raises(GraniteError, match="s3://bucket/none.jsonl: no such file"):
        run("s3://bucket/none.jsonl", tmp_path / "none")
    with pytest.raises(GraniteError, match="https://example.com/m.jsonl: protocol 'https' is not allowed"):
        run("https://example.com/m.jsonl", tmp_path / "none")


@pytest.mark.parametrize("protocol", ["gs", "s3"])
def test_stores_out_of_reach_are_told_at_once(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    # Given no network, and the packages that would try for minutes to reach an object store
    lookups: list[str] = []

    def lookup(host: str, *_: Any, **__: Any) -> Any:
        lookups.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    package, host = {"gs": ("gcsfs", "storage.googleapis.com"), "s3": ("s3fs", "s3.amazonaws.com")}[protocol]
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    monkeypatch.setattr(access, "_found", set())
    monkeypatch.setattr("fsspec.config.conf", {})
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setattr("fsspec.get_filesystem_class", lambda _: type("Store", (), {"__module__": f"{package}.core"}))
    for variable in access._OTHER_HOSTS:
        monkeypatch.delenv(variable, raising=False)
    # When a job has audio there, then each entry has an error, which a later run tries again, after few lookups
    manifest = write_lines(corpus / "m.jsonl", *({"audio": f"{protocol}://bucket/{i}.wav"} for i in range(5)))
    run(manifest, tmp_path / "out")
    message = f"host {host} is not found: is there a network?"
    assert [(line["error"], line["transient"]) for line in results(tmp_path / "out")] == [
        (f"{protocol}://bucket/{i}.wav: {message}", True) for i in range(5)
    ]
    assert len(lookups) <= 30 and set(lookups) == {host}
    # And where the host is found again, it is looked for once
    lookups.clear()
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_: lookups.append(host))
    for _ in range(3):
        access.check_store(protocol, {})
    assert lookups == [host]
    # And where another host can be meant, none is looked for
    monkeypatch.setattr(access, "_found", set())
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    (tmp_path / "config").write_text("[default]\nendpoint_url = http://store:9000\n")
    access.check_store(protocol, {"endpoint_url": "http://store:9000"})
    with monkeypatch.context() as patch:
        patch.setattr("fsspec.config.conf", {protocol: {"endpoint_url": "http://store:9000"}})
        access.check_store(protocol, {})
    if protocol == "s3":
        with monkeypatch.context() as patch:
            patch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
            access.check_store(protocol, {})
    # And manifests, listings and results that are there are named
    for source, out in (("m.jsonl", tmp_path / "x"), ("dir/", tmp_path / "x")):
        with pytest.raises(GraniteError, match=re.escape(f"{protocol}://bucket/{source}: {message}")):
            run(f"{protocol}://bucket/{source}", out)
    with pytest.raises(GraniteError, match=re.escape(f"{protocol}://bucket/out: {message}")):
        run(manifest, f"{protocol}://bucket/out")
