"""Sets to evaluate and their keyword lists, many of which cannot be trusted."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from batch_jobs import write_lines
from evaluation_runs import write_recordings

from granite_jax import AudioError, GraniteError
from granite_jax.batch.manifest import MAX_LINE
from granite_jax.batch.tfds import Examples
from granite_jax.evaluation.datasets import Utterance, open_sets
from granite_jax.evaluation.keyword_lists import read_keyword_lists


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"audio": "b.wav"}, "entry 1: text must be a string, not None"),
        ({"audio": "b.wav", "text": ["no"]}, "entry 1: text must be a string, not \\['no'\\]"),
        ({"text": "no audio"}, "entry 1: names no audio by audio or path; its fields are text"),
        ({"audio": "a.wav", "text": "again"}, "entry 1: has the audio of entry 0, and would count twice"),
        ({"audio": "b.wav", "id": "x", "text": "again"}, "entry 1: has the id 'x' of entry 0, and would count twice"),
        ("no json", "line of entry 1: Expecting"),
        ("[1]", "line of entry 1: not a JSON object"),
        ("[" * 100_000, "line of entry 1: nested too deeply"),
        ('{"audio": "' + MAX_LINE * "x" + '"}', "line of entry 1: longer than"),
        ('{"audio": "b.wav", "text": "t", "duration": true}', "entry 1: duration must be"),
    ],
)
def test_a_manifest_with_one_bad_line_is_refused(tmp_path: Path, line: Any, message: str) -> None:
    # Given a manifest with a good line, a blank one and a bad one, when it is opened, then the bad one is named
    path = write_lines(tmp_path / "m.jsonl", {"audio": "a.wav", "id": "x", "text": "good"}, "", line)
    with pytest.raises(GraniteError, match=f"m.jsonl: {message}"):
        open_sets([str(path)])


def test_segments_of_one_file_are_utterances_of_their_own(tmp_path: Path) -> None:
    # Given two segments of a file, with keywords and without
    path = write_lines(
        tmp_path / "m.jsonl",
        {"audio": "a.wav", "text": "one", "duration": 1, "keywords": ["one"]},
        {"audio_filepath": "a.wav", "text": "two", "offset": 1, "duration": 2.5},
    )
    # When opened, then each is there, with what is known of it
    (found,) = open_sets([f"Our calls={path}"])
    assert (found.name, found.directory, found.source) == ("Our calls", "our-calls", str(path))
    assert found.utterances == (Utterance("0", "one", ("one",), 1.0), Utterance("1", "two", None, 2.5))
    # And lengths that the manifest does not tell are the files' own
    soundfile.write(tmp_path / "a.wav", np.zeros(24000), 16000)
    lines = [{"audio": name, "text": ""} for name in ("a.wav", "none.wav", "gs://bucket/a.wav", "../a.wav")]
    (found,) = open_sets([str(write_lines(path, *lines, {"audio": "a.wav", "offset": 1, "text": ""}))])
    assert [utterance.seconds for utterance in found.utterances] == [1.5, 0.0, None, 0.0, 0.5]


def test_sets_that_are_none_are_named(tmp_path: Path) -> None:
    manifest = write_recordings(tmp_path)
    for specs, message in {
        (): "there is no set",
        (str(manifest), str(manifest)): "two sets are called 'calls': name one of them",
        (str(tmp_path / "none.jsonl"),): "none.jsonl: cannot be read",
        (str(write_lines(tmp_path / "empty.jsonl")),): "empty.jsonl: has no entries",
        ("tfds:librispeech",): "is given as tfds:DIRECTORY#SPLIT",
        ("tfds:no_such_set#test",): "tfds:no_such_set: cannot be opened",
        (f"tfds:{tmp_path}#test",): "is no prepared data set",
    }.items():
        with pytest.raises(GraniteError, match=message):
            open_sets(specs)


def test_names_of_any_script_are_names_of_directories(tmp_path: Path) -> None:
    # Given sets whose names have no Latin letter, or no letter at all
    manifest = write_recordings(tmp_path)
    names = ("会議", "講演", "Звонки", "Été 1", "!!!", "???", "a/../b")
    # When they are opened together, then each has a directory of its own, below the run's
    directories = [opened.directory for opened in open_sets([f"{name}={manifest}" for name in names])]
    assert directories[:4] == ["会議", "講演", "звонки", "été-1"]
    assert len(set(directories)) == len(names) and not any("/" in name or ".." in name for name in directories)


def test_sets_of_tfds_need_an_extra_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given no TensorFlow, when TFDS's own LibriSpeech is asked for, then the extra is named
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(GraniteError, match=r"tfds:librispeech: needs pip install 'granite-jax\[tfds-audio\]'"):
        open_sets(["librispeech-clean"])


def test_samples_that_tfds_keeps_as_int64_are_of_16_bits() -> None:
    # Given an example as TFDS's Audio feature makes it of a file by default, then its samples have their own range
    samples = np.array([-32768, 0, 32767])
    examples = Examples([{"speech": samples}, {"speech": samples * 2}], {}, "speech", 8000)
    found, rate = examples[0]
    assert (found.dtype, found.tolist(), rate) == (np.int16, samples.tolist(), 8000)
    # And those that are more are refused
    with pytest.raises(AudioError, match="is of more than 16 bits"):
        examples[1]


def test_keyword_lists_have_the_format_of_librispeechs(tmp_path: Path) -> None:
    path = tmp_path / "test-clean.biasing_100.tsv"
    path.write_text('1089-0\tHE HOPED FOR STEW\t["STEW"]\t["STEW", "ABBEY"]\n1089-1\tAND ALL\t[]\t["ABBEY"]\n')
    lists = read_keyword_lists([path])
    assert {key: (each.reference, each.words) for key, each in lists.items()} == {
        "1089-0": ("HE HOPED FOR STEW", ("STEW",)),
        "1089-1": ("AND ALL", ()),
    }
    for text, message in {
        "1\tA\n": "line 1: has 2 columns",
        "1\tA\tSTEW\n": "line 1: rare words must be a JSON list of strings, not 'STEW'",
        "1\tA\t[1]\n": "line 1: rare words must be",
        "1\tA\t" + "[" * 100_000 + "\n": "line 1: rare words must be",
        "1\tA\t[]\n1\tA\t[]\n": "line 2: id '1' comes twice",
    }.items():
        path.write_text(text)
        with pytest.raises(GraniteError, match=f"biasing_100.tsv: {message}"):
            read_keyword_lists([path])
    path.write_bytes(b"\xff")
    with pytest.raises(GraniteError, match="cannot be read"):
        read_keyword_lists([path])
