"""Manifests as people have them: tables, arrays, lists, compressed; and what is no manifest."""

import gzip
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import soundfile
from batch_jobs import RATE, results, run, text_of, tone, write_lines

from granite_jax import GraniteError
from granite_jax.batch.manifest import FIELDS, Manifest, parse_entry
from granite_jax.batch.manifest_files import to_json_lines
from granite_jax.options import TranscribeOptions

NAMES = ("a/1.wav", "a/3.wav", "b/2.wav")
OBJECTS = [{"audio": name} for name in NAMES]


def _table(delimiter: str, column: str = "audio") -> str:
    return "".join(
        f"{delimiter.join((column, 'speaker'))}\n" if i < 0 else f"{NAMES[i]}{delimiter}x\n" for i in range(-1, 3)
    )


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(OBJECTS),
        json.dumps(OBJECTS, indent=1),
        json.dumps(NAMES),
        "\n".join(NAMES),
        "\ufeff" + "\r\n".join(NAMES) + "\r\n",
        _table(","),
        _table("\t"),
        _table(";", "audio_filepath"),
        '"audio"\n' + "".join(f'"{name}"\n' for name in NAMES),
        "audio, id\n" + "".join(f"{name}, {i}\n\n" for i, name in enumerate(NAMES)),
        "".join(json.dumps(entry) + "\n" for entry in OBJECTS),
        'audio\ttext\na/1.wav\t"hello there\na/3.wav\thi\nb/2.wav\tsay "no" now\n',
        'audio|text\na/1.wav|"hello\na/3.wav|hi\nb/2.wav|ho\n',
        "Audio,Text\n" + "".join(f"{name},x\n" for name in NAMES),
        'audio,text\na/1.wav,"hello, \nthere"\na/3.wav,"a ""b"""\nb/2.wav,x\n',
        "client_id\tpath\tsentence\n" + "".join(f"x\t{name}\thello\n" for name in NAMES),
        "file_name,transcription\n" + "".join(f"{name},hello\n" for name in NAMES),
        "ID,Wav,spk_id\n" + "".join(f"{i},{name},x\n" for i, name in enumerate(NAMES)),
        "# made by hand\n\naudio,text\n" + "".join(f"{name},x\n" for name in NAMES),
        "#EXTM3U\n" + "".join(f"#EXTINF:1,x\n{name}\n" for name in NAMES) + "# the end\n#\n",
        "".join(json.dumps({"file": name, "text": "x"}) + "\n" for name in NAMES),
        "".join(json.dumps({"audio": {"path": name, "bytes": None}}) + "\n" for name in NAMES),
    ],
)
@pytest.mark.parametrize("form", ["plain", "gzip", "utf-16", "utf-16 and gzip"])
def test_every_form_of_a_manifest_has_the_same_entries(corpus: Path, tmp_path: Path, content: str, form: str) -> None:
    # Given a manifest in some form, whatever its name
    data = content.removeprefix("\ufeff").encode("utf-16") if "utf-16" in form else content.encode()
    manifest = corpus / "manifest.dat"
    manifest.write_bytes(gzip.compress(data) if "gzip" in form else data)
    # When it is run, then its files are transcribed, in order
    run(manifest, tmp_path / "out")
    assert [(line["audio"], line["text"]) for line in results(tmp_path / "out")] == [
        (name, text_of(corpus / name)) for name in NAMES
    ]


def test_a_table_has_all_fields_of_a_manifest(tmp_path: Path) -> None:
    # Given a table with every kind of column, and cells that are empty
    table = (
        "audio,offset,duration,id,keywords,to\n"
        "a.wav,1.5,2,x,Zelgad; New York,\n"
        'b.wav,,,7,"[[""Kai"", 3.5], ""Zoe""]",fr\n'
        'c.wav,,,,"{""Kai"": 2}",\n'
    )
    (tmp_path / "t.csv").write_text(table)
    # When it is read
    lines = to_json_lines(tmp_path / "t.csv", "t.csv", tmp_path).read_text().splitlines()
    first, second, third = (parse_entry(json.loads(line), i, TranscribeOptions()) for i, line in enumerate(lines))
    # Then every entry has what its row says
    assert (first.offset, first.duration, first.id, first.keywords) == (1.5, 2.0, "x", ("Zelgad", "New York"))
    assert (second.id, second.keywords, second.options.target_language) == ("7", (("Kai", 3.5), "Zoe"), "fr")
    assert (third.id, third.keywords, third.duration) == ("2", (("Kai", 2),), None)


@pytest.mark.parametrize(
    "name", ["caffeine-1.wav", "ID3-talk.wav", "FORMAL.wav", "[01] intro.wav", "talk.oga", "x.sph", "file,1.wav"]
)
def test_lists_of_any_names_are_lists(tmp_path: Path, name: str) -> None:
    (tmp_path / "list").write_text(f"{name}\n{name}\n")
    lines = to_json_lines(tmp_path / "list", "list", tmp_path).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"audio": name}] * 2


def test_a_table_of_kaldi_is_known_by_its_name(corpus: Path, tmp_path: Path) -> None:
    # Given Kaldi's table of ids and files, when it is run, then results have its ids
    (corpus / "wav.scp").write_text("# ids\nutt1\ta/1 b.wav\nutt2  a/3.wav \n\n")
    (corpus / "a/1.wav").rename(corpus / "a/1 b.wav")
    run(corpus / "wav.scp", tmp_path / "out")
    assert [(line["id"], line["audio"]) for line in results(tmp_path / "out")] == [
        ("utt1", "a/1 b.wav"),
        ("utt2", "a/3.wav"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("utt1 sox a.wav -t wav - |", "wav.scp: line 2 is a command, which is not run: write what it prints to a file"),
        ("utt1", "wav.scp: line 2 is not an id and the name of a file, but 'utt1'"),
    ],
)
def test_what_a_table_of_kaldi_has_besides_files_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "wav.scp").write_text(f"utt0 a.wav\n{line}\n")
    with pytest.raises(GraniteError, match=re.escape(message)):
        to_json_lines(tmp_path / "wav.scp", "wav.scp", tmp_path)


def test_what_looks_like_a_comment_can_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("# a comment\n#1.wav\n")
    lines = to_json_lines(tmp_path / "list", "list", tmp_path).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"audio": "#1.wav"}]


RECORDING: dict[str, Any] = {
    "id": "rec",
    "sources": [{"type": "file", "channels": [0], "source": "a.wav"}],
    "sampling_rate": 16000,
    "num_samples": 80000,
    "duration": 5.0,
}
CUT: dict[str, Any] = {"id": "cut", "start": 1.5, "duration": 2.0, "channel": 0, "type": "MonoCut", "supervisions": []}
STEREO: dict[str, Any] = RECORDING | {"sources": [{"type": "file", "channels": [0, 1], "source": "a.wav"}]}


@pytest.mark.parametrize(
    ("fields", "identity", "excerpt"),
    [
        (RECORDING, "rec", (0.0, None)),
        (CUT | {"recording": RECORDING}, "cut", (1.5, 2.0)),
        (CUT | {"start": 0, "duration": 5.0, "recording": RECORDING}, "cut", (0.0, None)),
        (CUT | {"channel": [0, 1], "type": "MultiCut", "recording": STEREO}, "cut", (1.5, 2.0)),
    ],
)
def test_cuts_and_recordings_of_lhotse_are_understood(
    tmp_path: Path, fields: dict[str, Any], identity: str, excerpt: tuple[float, float | None]
) -> None:
    # Given an entry of Lhotse, when it is parsed, then it is the file, or the excerpt of it
    entry = parse_entry(fields, 0, TranscribeOptions())
    assert (entry.error, entry.id, entry.audio) == (None, identity, "a.wav")
    assert (entry.offset, entry.duration) == excerpt
    # And none of its fields is named as one that should change results
    manifest = Manifest.scan(write_lines(tmp_path / "m.jsonl", fields), TranscribeOptions())
    assert manifest.ignored_fields == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (CUT | {"recording": STEREO}, "is a cut of channel 0 of [0, 1]: write it to a file of its own"),
        (RECORDING | {"sources": [{"type": "command", "source": "sox"}]}, "that is not one file or URL"),
        (CUT | {"channel": [{}, None], "recording": RECORDING}, "is a cut of channel [{}, None] of [0]"),
        (RECORDING | {"sources": []}, "that is not one file or URL"),
        (CUT | {"recording": RECORDING | {"transforms": [{"name": "Speed"}]}}, "with transforms"),
        (CUT | {"type": "MixedCut", "tracks": []}, "its fields are id, start, duration, channel, type, supervisions"),
        ({"path": "a.wav", "file": "b.wav"}, "has both path and file"),
        ({"audio": {"path": "a.wav", "bytes": "UklGRg"}}, "audio holds the samples or bytes themselves"),
        ({"audio": {"path": None}}, "audio must be a short string that is not empty, not None"),
        ({"sentence": "hello", "clip": "a.wav"}, "names no audio by audio or path; its fields are sentence, clip"),
        ({}, "its fields are none"),
        (CUT | {"recording": RECORDING, "path": "b.wav"}, "has both path and a recording of Lhotse"),
        (RECORDING | {"audio": "b.wav"}, "has both audio and a recording of Lhotse"),
        ({"wav": "a.wav", "duration": 0.3, "start": 0, "stop": 4800}, "by start: give offset and duration, in seconds"),
        ({"file": "a.wav", "begin_time": 1}, "names an excerpt by begin_time"),
        ({"path": "a.wav", "Start": 1}, "names an excerpt by Start"),
        ({"path": "a.wav", "offset_ms": 100}, "names an excerpt by offset_ms"),
        ({"path": "a.wav", "end_sec": 1}, "names an excerpt by end_sec"),
        ({"path": "a.wav", "num_frames": 10}, "names an excerpt by num_frames"),
        ({"path": "a.wav", "segment": [1, 2]}, "names an excerpt by segment"),
        ({"audio": "a.wav", "start": 10.0, "duration": 2.5}, "names an excerpt by start"),
        ({"audio": "a.wav", "onset": 1.0, "offset": 2.5}, "names an excerpt by onset"),
    ],
)
def test_what_names_no_file_is_refused_by_what_is_there(fields: dict[str, Any], message: str) -> None:
    error = parse_entry(fields, 3, TranscribeOptions()).error
    assert error is not None and error.startswith("entry 3: ") and message in error


@pytest.mark.parametrize(
    "fields",
    [
        {"path": "a.wav", "offset": 1.5, "duration": 2.0, "segment": "Singleword Benchmark", "start": None},
        {"audio": "a.wav", "offset": 1.5, "duration": 2.0, "start": 1.5, "end": 3.5, "sources": ["radio"]},
    ],
)
def test_an_excerpt_has_an_offset_and_a_duration(fields: dict[str, Any]) -> None:
    entry = parse_entry(fields, 0, TranscribeOptions())
    assert (entry.error, entry.audio, entry.offset, entry.duration) == (None, "a.wav", 1.5, 2.0)


def test_a_bad_line_fails_alone_in_utf_16_too(corpus: Path, tmp_path: Path) -> None:
    (corpus / "m.jsonl").write_text('{"audio": "a/1.wav"}\n{"audio": \n', encoding="utf-16")
    summary, _ = run(corpus / "m.jsonl", tmp_path / "out")
    assert (summary.transcribed, summary.failed) == (1, 1)


def test_null_is_no_value() -> None:
    entry = parse_entry({"audio_filepath": "a.wav", "audio": None, "to": None, "task": None}, 0, TranscribeOptions())
    assert (entry.audio, entry.error) == ("a.wav", None)


def _wav(path: Path) -> bytes:
    soundfile.write(path / "x.wav", tone(0.1), RATE)
    return (path / "x.wav").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_wav, "is audio (granite-jax transcribe takes audio files), not a manifest"),
        (b"PK\x03\x04" + bytes(60), "is a spreadsheet or ZIP archive, not a manifest"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "is a Git LFS pointer"),
        (bytes(range(256)), "is binary data, not a manifest"),
        (b'{\n "audio": "a/1.wav"\n}\n', "is one JSON object over several lines"),
        (
            b"name,clip\nx,a/1.wav\n",
            "not a JSON object, a header with a column such as audio or path",
        ),
        (b"transcripts of Monday\n", "its first line is not a JSON object"),
        (b"[1, 2", "is not a readable JSON array"),
        (b'audio,text\na.wav,"no end\nb.wav,x\n', "unexpected end of data"),
        (b"Path,path,text\na.wav,b.wav,x\n", "has two columns called path"),
        (b"audio,id\na.wav,1,2\n", "row 1 has more columns than the header"),
        (gzip.compress(b'{"audio": "a"}\n' * 99, mtime=0)[:-20], "is damaged"),
        (b"\xff\xfe\x00\xd8", "utf-16"),
        (b"audio\n\xff\xfe.wav\n", "can't decode"),
        (b"", "has no entries"),
        (b"[]", "has no entries"),
        (b"audio,id\n", "has no entries"),
    ],
)
def test_what_is_no_manifest_is_named(corpus: Path, tmp_path: Path, content: Any, message: str) -> None:
    # Given a file that is no manifest, when it is run, then the error says what it seems to be, and nothing is written
    path = corpus / "given"
    path.write_bytes(content(tmp_path) if callable(content) else content)
    with pytest.raises(GraniteError) as caught:
        run(path, tmp_path / "out")
    assert message in str(caught.value) and "given" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("part-*"))


def test_parquet_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "m.parquet").write_bytes(b"PAR1" + bytes(40) + b"PAR1")
    with pytest.raises(GraniteError, match=r"m\.parquet: is Parquet, which needs pip install 'granite-jax\[parquet\]'"):
        run(tmp_path / "m.parquet", tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "task", "language"),
    [
        ({"taskname": "asr", "source_lang": "de", "target_lang": "de"}, "transcribe", None),
        ({"taskname": "asr", "source_lang": "en", "target_lang": "en", "pnc": "yes"}, "punctuate", None),
        ({"taskname": "asr", "pnc": "no"}, "transcribe", None),
        ({"taskname": "ast", "source_lang": "en", "target_lang": "fr", "pnc": "yes"}, "translate", "fr"),
        ({"taskname": "s2t_translation", "source_lang": "de", "target_lang": "en"}, "translate", "en"),
        ({"source_lang": "en", "target_lang": "ja"}, "translate", "ja"),
        ({"source_lang": "en", "target_lang": "en"}, "transcribe", None),
        ({"target_lang": "en"}, "transcribe", None),
    ],
)
def test_the_fields_of_nemo_are_understood(fields: dict[str, Any], task: str, language: str | None) -> None:
    entry = parse_entry({"audio_filepath": "a.wav", **fields}, 0, TranscribeOptions())
    assert entry.error is None
    assert (entry.options.task, entry.options.target_language) == (task, language)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"taskname": "asr", "task": "transcribe"}, "has both task and taskname"),
        ({"target_lang": "fr", "to": "fr"}, "has both to and target_lang"),
        ({"taskname": "asr", "source_lang": "en", "target_lang": "fr"}, "taskname 'asr' has source_lang 'en'"),
        ({"taskname": "diarize"}, "unknown task 'diarize'"),
        ({"keywords": {"Kai": "loud"}}, "the boost of keyword 'Kai' is 'loud'"),
        ({"keywords": [["Kai", 99]]}, "the boost of keyword 'Kai' is 99"),
        ({"id": 1.5}, "id must be a short string or a number"),
    ],
)
def test_what_is_wrong_in_a_line_is_named(fields: dict[str, Any], message: str) -> None:
    entry = parse_entry({"audio": "a.wav", **fields}, 0, TranscribeOptions())
    assert entry.error is not None and message in entry.error


@pytest.mark.parametrize(("identity", "expected"), [(1.0, "1"), (float("nan"), "5"), (None, "5"), (7, "7"), ("x", "x")])
def test_ids_of_tables_are_ids(identity: Any, expected: str) -> None:
    assert parse_entry({"audio": "a.wav", "id": identity}, 5, TranscribeOptions()).id == expected


def test_boosts_of_a_manifest_reach_the_model(corpus: Path, tmp_path: Path) -> None:
    # Given lines with keywords, when they are run, then each is transcribed with its own boosts
    lines = [{"audio": "a/1.wav", "keywords": {"Kai": 2}}, {"audio": "a/3.wav", "keywords": [["Zoe", 3.5], "Ada"]}]
    _, asr = run(write_lines(corpus / "m.jsonl", *lines), tmp_path / "out")
    assert asr.keywords == [[("Kai", 2)], [("Zoe", 3.5), "Ada"]]


@pytest.mark.parametrize("name", ["start", "end_time", "channel", "lang", "Language", "keyword", "promt", "durations"])
def test_fields_that_should_change_results_are_named(tmp_path: Path, name: str) -> None:
    # Given a line with a field that is not understood, when it is scanned, then the field is named
    manifest = Manifest.scan(write_lines(tmp_path / "m.jsonl", {"audio": "a.wav", name: 1}), TranscribeOptions())
    assert manifest.ignored_fields == (name,)


def test_fields_that_are_refused_are_not_said_to_change_nothing(tmp_path: Path) -> None:
    manifest = Manifest.scan(write_lines(tmp_path / "m.jsonl", {"path": "a.wav", "start": 1}), TranscribeOptions())
    assert manifest.ignored_fields == ()


def test_fields_of_others_are_no_matter(tmp_path: Path) -> None:
    # Given the fields of NeMo's and others' manifests that change no result, then none is named
    others = ["text", "pred_text", "wer", "uid", "audio_id", "sampling_rate", "num_samples", "speaker"]
    lines = [dict.fromkeys(FIELDS, 1) | dict.fromkeys(others, 1), "no object", "[1]", '"text"']
    assert Manifest.scan(write_lines(tmp_path / "m.jsonl", *lines), TranscribeOptions()).ignored_fields == ()
