"""Evaluation: metrics by hand, sets that cannot be trusted, runs that are interrupted and compared."""

import json
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from batch_worker import HELDOUT, StandIn
from typer.testing import CliRunner

from granite_jax import AudioError, GraniteError, Transcriber, cli, evaluation
from granite_jax.batch.manifest import MAX_LINE
from granite_jax.batch.tfds import Examples
from granite_jax.evaluation import heldout
from granite_jax.evaluation.datasets import Utterance, open_sets
from granite_jax.evaluation.keyword_lists import read_keyword_lists
from granite_jax.evaluation.metrics import (
    GAP,
    Counts,
    align_words,
    difference,
    keyword_counts,
    rate,
    relative_difference,
    score,
    score_translations,
)
from granite_jax.evaluation.normalize import normalizer
from granite_jax.evaluation.run import needed_buckets
from granite_jax.programs import Bucket
from granite_jax.transcriber import Transcript

BUCKETS = [Bucket(1, 16000, 8, 16), Bucket(2, 16000, 8, 16), Bucket(2, 48000, 8, 16), Bucket(2, 96000, 8, 16)]


class Listener(StandIn):
    """Hears what it is told, by the file's name; records what it transcribed."""

    def __init__(self, texts: dict[str, str]):
        super().__init__()
        self.texts = texts
        self.buckets = BUCKETS
        self.compilations = 0
        self.heard: list[str] = []

    def warmup(self, buckets: Sequence[Bucket]) -> None:
        self.compilations += len(buckets)

    def transcribe(self, audio: list, *, progress: Any = None, **options: Any) -> list[Transcript]:
        results = []
        for each in audio:
            self.heard.append(each.name)
            results.append(Transcript(each.name, self.texts[each.name], (1,), each.duration, "", {}))
            if progress is not None:
                progress(1)
        return results


SAID = {
    "a.wav": "Turn on the lamp!",
    "b.wav": "call Dakfiki now",
    "c.wav": "it is twenty five degrees",
    "d.wav": "(laughs)",
    "e.wav": "open the door",
    "f.wav": "close the window please",
}
HEARD = {
    "a.wav": "turn off the big lamp",  # 2 errors in 4 words
    "b.wav": "call dagfigi now",  # 1 in 3
    "c.wav": "it is 25 degrees",  # none in 4
    "d.wav": "ha ha",  # not scored
    "e.wav": "open the door",  # none in 3
    "f.wav": "close the window please",  # none in 4
}


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Six recordings of half a second, with what is said."""
    for name in SAID:
        soundfile.write(tmp_path / name, np.full(8000, 0.1), 16000)
    return write(tmp_path / "calls.jsonl", *({"audio": name, "text": text} for name, text in SAID.items()))


def write(path: Path, *lines: Any) -> Path:
    """Strings are written as they are."""
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def evaluate(sets: Any, out: Path, texts: dict[str, str] = HEARD, **options: Any) -> tuple[dict[str, Any], Listener]:
    asr: Any = Listener(texts)
    found = evaluation.evaluate(
        [str(each) for each in sets], out, transcriber=(asr, "listener"), **{"part_size": 2, **options}
    )
    assert found is not None
    return found, asr


def numbers(results: dict[str, Any]) -> dict[str, Any]:
    """Without times."""
    timed = ("seconds", "rtfx")
    sets = [{key: value for key, value in each.items() if key not in timed} for each in results["sets"]]
    return {key: value for key, value in results.items() if key not in timed} | {"sets": sets}


# Metrics.


def test_error_rates_are_those_counted_by_hand() -> None:
    # Given one misspelt name, one wrong word and one insertion
    references, hypotheses = ["call dakfiki now", "turn on the lamp"], ["call dagfigi now", "turn off the big lamp"]
    # When they are scored with the name as keyword, then words, characters, keywords and others have their rates
    found = score(references, hypotheses, [["Dakfiki"], []])
    assert found.wer.rate == pytest.approx(100 * 3 / 7)
    assert found.cer.rate == pytest.approx(100 * (2 + 2 + 4) / (16 + 16))  # k>g twice; n>ff; "big "
    assert found.b_wer is not None and found.b_wer.rate == 100.0
    assert found.u_wer is not None and found.u_wer.rate == pytest.approx(100 * 2 / 6)
    assert found.wer.low <= found.wer.rate <= found.wer.high
    # And without keywords there are no such rates, nor where no keyword is said
    assert score(references, hypotheses).b_wer is None
    assert score(references, hypotheses, [[], []]).b_wer is None


@pytest.mark.parametrize(
    ("reference", "hypothesis", "keywords", "biased", "unbiased"),
    [
        ("a key b", "a key b", {"key"}, (0, 1), (0, 2)),
        ("a key b", "a kay b", {"key"}, (1, 1), (0, 2)),  # a wrong keyword
        ("a key b", "a b", {"key"}, (1, 1), (0, 2)),  # a missing one
        ("a b", "a key b", {"key"}, (1, 0), (0, 2)),  # an inserted one counts as a keyword
        ("a key b", "a key x b", {"key"}, (0, 1), (1, 2)),  # another inserted word does not
        ("a x b", "a key b", {"key"}, (0, 0), (1, 3)),  # a word taken for a keyword is a wrong word
        # Deleting and inserting costs less than two substitutions, as in the lists' own script.
        ("turn key on", "turn on off", {"key"}, (1, 1), (1, 2)),
        ("key", "", {"key"}, (1, 1), (0, 0)),
    ],
)
def test_keyword_errors_are_those_of_the_lists_own_script(
    reference: str, hypothesis: str, keywords: set[str], biased: tuple[int, int], unbiased: tuple[int, int]
) -> None:
    found = keyword_counts([reference], [hypothesis], [keywords])
    assert [(int(c.errors[0]), int(c.total[0])) for c in found] == [biased, unbiased]


def test_words_are_aligned_in_order() -> None:
    # Given a wrong, an inserted and a missing word, when aligned, then each has its counterpart or a gap
    pairs = align_words("turn off the lamp please", "turn on the big lamp")
    assert pairs == [("turn", "turn"), ("off", "on"), ("the", "the"), (GAP, "big"), ("lamp", "lamp"), ("please", GAP)]


def test_the_average_weighs_sets_alike_and_the_difference_pairs_utterances() -> None:
    # Given a set of a hundred utterances with 10 % errors and a small one with 50 %
    rng = np.random.default_rng(1)
    large = Counts(rng.permutation([0] * 50 + [2] * 50), np.full(100, 10))
    small = Counts(np.array([5, 5]), np.array([10, 10]))
    # When averaged, then each counts a half
    assert rate([large, small]).rate == pytest.approx(30.0)
    assert rate([large]).low < 10.0 < rate([large]).high
    # And a run that makes one error more in every utterance is 10 points worse, whatever utterances there are
    worse = Counts(large.errors + 1, large.total)
    found = difference([large], [worse])
    assert (found.rate, found.low, found.high) == pytest.approx((10.0, 10.0, 10.0))
    assert difference([large], [large]).rate == difference([large], [large]).high == 0.0


def test_the_relative_difference_is_a_share_of_the_first_rate() -> None:
    # Given a run with 10 % errors, and one that makes half of its errors in every utterance
    before = Counts(np.array([2, 0, 4, 2] * 25), np.full(100, 20))
    after = Counts(before.errors // 2, before.total)
    # When they are compared, then the second has half as many errors, whatever utterances there are
    found = relative_difference([before], [after])
    assert (found.rate, found.low, found.high) == pytest.approx((-50.0, -50.0, -50.0))
    # And where errors are spread otherwise, the interval is that of the ratio of both rates
    spread = relative_difference([before], [Counts(before.errors[::-1], before.total)])
    assert spread.rate == 0.0 and spread.low < 0.0 < spread.high


def test_normalisers_do_what_the_leaderboard_does() -> None:
    # Given texts with contractions, numbers, hesitations and marks, then the normalisers unify them
    assert normalizer("english")("Um, it's $20 -- colour!").split() == ["it", "is", "$20", "color"]
    assert normalizer("english")("twenty dollars").split() == ["$20"]
    assert normalizer("basic", "fr")("C'était [rires] l'été.").split() == ["c", "était", "l", "été"]
    assert normalizer("basic", "ja")("東京。").split() == ["東", "京"]
    assert normalizer("lowercase")("It's A-B!") == "it's a-b!"


def test_translations_are_scored_by_sacrebleu() -> None:
    # Given translations that are perfect, good and wrong
    references = ["Das ist ein kleines Haus am See .", "Guten Morgen , wie geht es dir heute ?"] * 10
    good = [text.replace("kleines", "kleineres") for text in references]
    wrong = ["nichts von alledem stimmt hier"] * 20
    # When they are compared, then the first is perfect, and the others are worse, beyond chance
    found = score_translations(references, references, good, wrong, language="de")
    perfect, near, far = found["bleu"]
    assert (perfect.score.rate, perfect.p_value) == (pytest.approx(100.0), None)
    assert near.score.low < near.score.rate < near.score.high < 100.0
    assert far.score.rate < 1.0 and far.p_value is not None and far.p_value < 0.01
    assert "tok:13a" in perfect.signature and "nc:6" in found["chrf"][0].signature
    assert "tok:zh" in score_translations(["你好"], ["你好"], language="zh")["bleu"][0].signature


# Sets.


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"audio": "b.wav"}, "entry 1: text must be a string, not None"),
        ({"audio": "b.wav", "text": ["no"]}, "entry 1: text must be a string, not \\['no'\\]"),
        ({"text": "no audio"}, "entry 1: has neither audio nor audio_filepath"),
        ({"audio": "a.wav", "text": "again"}, "entry 1: has the audio of entry 0, and would count twice"),
        ({"audio": "b.wav", "id": "x", "text": "again"}, "entry 1: has the id 'x' of entry 0, and would count twice"),
        ("no json", "line of entry 1: Expecting"),
        ("[1]", "line of entry 1: not a JSON object"),
        ("[" * 100_000, "line of entry 1: nested too deeply"),
        ('{"audio": "' + MAX_LINE * "x" + '"}', "line of entry 1: longer than"),
        ('{"audio": "b.wav", "text": "t", "duration": NaN}', "entry 1: duration must be"),
    ],
)
def test_a_manifest_with_one_bad_line_is_refused(tmp_path: Path, line: Any, message: str) -> None:
    # Given a manifest with a good line, a blank one and a bad one, when it is opened, then the bad one is named
    path = write(tmp_path / "m.jsonl", {"audio": "a.wav", "id": "x", "text": "good"}, "", line)
    with pytest.raises(GraniteError, match=f"m.jsonl: {message}"):
        open_sets([str(path)])


def test_segments_of_one_file_are_utterances_of_their_own(tmp_path: Path) -> None:
    # Given two segments of a file, with keywords and without
    path = write(
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
    (found,) = open_sets([str(write(path, *lines, {"audio": "a.wav", "offset": 1, "text": ""}))])
    assert [utterance.seconds for utterance in found.utterances] == [1.5, 0.0, None, 0.0, 0.5]


def test_sets_that_are_none_are_named(tmp_path: Path, manifest: Path) -> None:
    for specs, message in {
        (): "there is no set",
        (str(manifest), str(manifest)): "two sets are called 'calls': name one of them",
        (str(tmp_path / "none.jsonl"),): "none.jsonl: cannot be read",
        (str(write(tmp_path / "empty.jsonl")),): "empty.jsonl: has no entries",
        ("tfds:librispeech",): "is given as tfds:DIRECTORY#SPLIT",
        ("tfds:no_such_set#test",): "tfds:no_such_set: cannot be opened",
        (f"tfds:{tmp_path}#test",): "is no prepared data set",
    }.items():
        with pytest.raises(GraniteError, match=message):
            open_sets(specs)


def test_sets_of_tfds_need_an_extra_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given no TensorFlow, when TFDS's own LibriSpeech is asked for, then the extra is named
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(GraniteError, match=r"tfds:librispeech: needs pip install 'granite-jax\[tfds-audio\]'"):
        open_sets(["librispeech-clean"])


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 20 of the held-out clips."""
    directory = tmp_path_factory.mktemp("clips")
    lines = (HELDOUT / "heldout.jsonl").read_text().splitlines()[:20]
    write(directory / "heldout.jsonl", *lines)
    for line in lines:
        shutil.copy(HELDOUT / json.loads(line)["audio"], directory)
    return directory


def test_the_demos_set_is_read_without_tensorflow(clips: Path, tmp_path: Path) -> None:
    # Given the clips, when they are prepared as a TFDS data set, then it has them in their order
    prepared = heldout.prepare(tmp_path, clips)
    (found,) = open_sets([f"tfds:{prepared}#test"])
    expected = [json.loads(line) for line in (clips / "heldout.jsonl").read_text().splitlines()]
    assert [(u.id, u.text, list(u.keywords or ())) for u in found.utterances] == [
        (clip["id"], clip["text"], clip["names"]) for clip in expected
    ]
    assert [u.seconds for u in found.utterances] == pytest.approx([clip["duration"] for clip in expected], abs=1e-3)
    assert "tensorflow" not in sys.modules
    # And nothing is prepared twice
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    assert heldout.prepare(tmp_path, clips) == prepared
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before
    # And where there are no clips, that is said
    with pytest.raises(GraniteError, match="only the source tree has the clips"):
        heldout.prepare(tmp_path, tmp_path / "none")


def test_samples_that_tfds_keeps_as_int64_are_of_16_bits() -> None:
    # Given an example as TFDS's Audio feature makes it of a file by default, then its samples have their own range
    samples = np.array([-32768, 0, 32767])
    examples = Examples([{"speech": samples}, {"speech": samples * 2}], {}, "speech", 8000)
    found, rate = examples[0]
    assert (found.dtype, found.tolist(), rate) == (np.int16, samples.tolist(), 8000)
    # And those that are more are refused
    with pytest.raises(AudioError, match="is of more than 16 bits"):
        examples[1]


# Keyword lists.


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


def test_lists_are_for_the_utterances_they_name(manifest: Path, tmp_path: Path) -> None:
    # Given a manifest with ids, and its lists
    write(manifest, *({"audio": name, "id": name[0], "text": text} for name, text in SAID.items()))
    rows = [f"{name[0]}\t{text.upper()}\t{json.dumps(['DAKFIKI', 'LAMP'])}" for name, text in SAID.items()]
    lists = write(tmp_path / "lists.tsv", *rows)
    # When evaluated with them, then lamp is right and Dakfiki wrong: 1 of 2
    results, _ = evaluate([manifest], tmp_path / "out", keyword_lists=[lists])
    (found,) = results["sets"]
    assert found["b_wer"]["rate"] == 50.0
    assert found["u_wer"]["rate"] == pytest.approx(100 * 2 / 16)
    # And lists that are incomplete, or of other texts, are refused
    write(lists, *rows[1:])
    with pytest.raises(GraniteError, match="set calls: utterance 'a' and 0 others have no keyword list"):
        evaluate([manifest], tmp_path / "out", keyword_lists=[lists])
    write(lists, rows[0].replace("LAMP!", "LIGHT!"), *rows[1:])
    with pytest.raises(GraniteError, match="set calls: the keyword list of utterance 'a' is that of another text"):
        evaluate([manifest], tmp_path / "out", keyword_lists=[lists])


# Runs.


def test_a_run_counts_what_fails_and_leaves_out_what_has_no_words(manifest: Path, tmp_path: Path) -> None:
    # Given a file that is no audio, and a reference without words
    (tmp_path / "e.wav").write_bytes(b"")
    # When evaluated, then the first counts as three missing words, and the second does not count
    results, _ = evaluate([manifest], tmp_path / "out")
    (found,) = results["sets"]
    assert (found["utterances"], found["scored"], found["failed"], found["words"]) == (6, 5, 1, 18)
    assert found["wer"]["rate"] == pytest.approx(100 * 6 / 18)
    assert results["average"]["wer"] == found["wer"]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    # And the table has it
    table = (tmp_path / "out" / "results.md").read_text()
    assert table.splitlines()[0] == "| model | Average WER | RTFx | calls |"
    assert table.splitlines()[2].startswith("| listener | 33.33 % (")


def test_only_programs_that_are_needed_are_compiled_and_times_are_apart(manifest: Path, tmp_path: Path) -> None:
    # Given lengths that fit the smallest buckets, when evaluated, then these alone are compiled, before anything else
    results, asr = evaluate([manifest], tmp_path / "out")
    assert asr.compilations == 2
    assert set(results["seconds"]) == {"load", "compile", "steady", "wait", "audio", "late_compilations"}
    assert results["seconds"]["audio"] == 3.0 and results["seconds"]["late_compilations"] == 0
    assert results["rtfx"] == pytest.approx(3.0 / results["seconds"]["steady"])
    # And for what is longer than a bucket the next one, and for lengths that are not known all
    assert needed_buckets(BUCKETS, [Utterance("", "", None, 2.0)]) == [BUCKETS[2]]
    assert needed_buckets(BUCKETS, [Utterance("", "", None, 0.5), Utterance("", "", None, None)]) == BUCKETS


def test_an_interrupted_run_goes_on_to_the_same_numbers(manifest: Path, tmp_path: Path) -> None:
    # Given a run that is stopped amid its second set
    other = write(tmp_path / "again.jsonl", *({"audio": name, "text": text} for name, text in SAID.items()))
    sets = [str(manifest), str(other)]
    whole, _ = evaluate(sets, tmp_path / "whole")
    asr: Any = Listener(HEARD)
    stopped = evaluation.evaluate(
        sets, tmp_path / "out", transcriber=(asr, "listener"), part_size=2, stop=lambda: len(asr.heard) >= 9
    )
    assert stopped is None and not (tmp_path / "out" / "results.json").exists()
    assert 6 < len(asr.heard) < 12
    # When it is run again, then only what is missing is transcribed, and the numbers are those of a whole run
    resumed, rest = evaluate(sets, tmp_path / "out")
    assert 0 < len(rest.heard) < 6
    assert numbers(resumed) == numbers(whole)
    # And a finished one is scored again, by another normaliser, without loading anything
    again, idle = evaluate(sets, tmp_path / "out", normalizer="lowercase")
    assert (idle.heard, idle.compilations) == ([], 0)
    assert again["sets"][0]["wer"]["rate"] > resumed["sets"][0]["wer"]["rate"]
    # And another model's results do not go there
    with pytest.raises(GraniteError, match="weights was 'listener', is 'other'"):
        evaluation.evaluate(sets, tmp_path / "out", transcriber=(asr, "other"), part_size=2)


def test_two_runs_are_compared_utterance_by_utterance(manifest: Path, tmp_path: Path) -> None:
    # Given a run with 3 errors in 18 words, and one with one of them corrected
    evaluate([manifest], tmp_path / "a")
    evaluate([manifest], tmp_path / "b", HEARD | {"b.wav": "call dakfiki now"})
    # When they are compared, then the difference is one word in 18, and its interval does not reach above nothing
    found = evaluation.compare(tmp_path / "a", tmp_path / "b")
    (each,) = found["sets"]
    assert (each["name"], each["scored"]) == ("calls", 5)
    assert each["wer"]["difference"]["rate"] == pytest.approx(-100 / 18)
    assert each["wer"]["difference"]["low"] < -100 / 18 < each["wer"]["difference"]["high"] <= 0.0
    assert found["average"]["wer"] == each["wer"]
    assert "| calls | WER | 16.67 % (" in evaluation.comparison_to_markdown(found)
    # And a run compared with itself does not differ
    same = evaluation.compare(tmp_path / "a", tmp_path / "a")["average"]["wer"]["difference"]
    assert (same["rate"], same["low"], same["high"]) == (0.0, 0.0, 0.0)


def test_runs_that_cannot_be_compared_are_refused(manifest: Path, tmp_path: Path) -> None:
    # Given a run, and others of another normaliser, set or reference, and of nothing
    evaluate([manifest], tmp_path / "a")
    evaluate([manifest], tmp_path / "lowercase", normalizer="lowercase")
    evaluate([f"other={manifest}"], tmp_path / "other")
    write(manifest, *({"audio": name, "text": f"{text} sir"} for name, text in SAID.items()))
    evaluate([manifest], tmp_path / "texts")
    for other, message in {
        "lowercase": "the runs differ in normalizer: english in .*, lowercase in ",
        "other": "the runs are on other sets: calls in .*, other in ",
        "texts": "set calls: the runs have other utterances, references or keywords",
        "none": "results.json: is missing: the evaluation has not been finished",
    }.items():
        with pytest.raises(GraniteError, match=message):
            evaluation.compare(tmp_path / "a", tmp_path / other)
    # And a damaged one is named
    (tmp_path / "a" / "results.json").write_text("[]")
    with pytest.raises(GraniteError, match="results.json: is not the result of an evaluation"):
        evaluation.compare(tmp_path / "a", tmp_path / "a")


def test_translations_get_bleu_and_chrf(manifest: Path, tmp_path: Path) -> None:
    # Given two translations, one of them perfect
    texts = {name: f"das ist der Satz Nummer {place} von allen" for place, name in enumerate(SAID)}
    write(manifest, *({"audio": name, "text": text} for name, text in texts.items()))
    perfect, _ = evaluate([manifest], tmp_path / "a", texts, task="translate", to="de")
    evaluate([manifest], tmp_path / "b", texts | {"a.wav": "etwas ganz anderes hier"}, task="translate", to="de")
    # When scored, then there are BLEU and chrF in place of error rates, with how they were computed
    (found,) = perfect["sets"]
    assert found["bleu"]["rate"] == pytest.approx(100.0) and found["chrf"]["rate"] == pytest.approx(100.0)
    assert "wer" not in found and perfect["average"] == {}
    assert "BLEU nrefs:1" in (tmp_path / "a" / "results.md").read_text()
    # And compared, the perfect one is better
    (each,) = evaluation.compare(tmp_path / "a", tmp_path / "b")["sets"]
    assert each["bleu"]["a"]["rate"] > each["bleu"]["b"]["rate"] and 0 < each["bleu"]["p_value"] < 1
    assert "| calls | chrF | 100.00 (" in evaluation.comparison_to_markdown(
        evaluation.compare(tmp_path / "a", tmp_path / "b")
    )


# The command.


def invoke(*arguments: Any) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli.app, ["eval", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def test_the_command_evaluates_and_compares(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given the command with a listener for every checkpoint, and a file that is no audio
    (tmp_path / "e.wav").write_bytes(b"")
    monkeypatch.setattr("granite_jax.evaluation.run.Transcriber.from_pretrained", lambda *_, **__: Listener(HEARD))
    out = tmp_path / "out"
    # When it is run, then the tables come out, and the failure is told apart
    code, stdout, stderr = invoke(manifest, "--out", out)
    assert (code, stdout) == (0, (out / "results.md").read_text())
    assert stderr == (
        f"granite-jax: 1 utterances failed, and count as if nothing had been heard: see {out}/*/errors.jsonl\n"
    )
    code, stdout, _ = invoke(manifest, "--out", out, "--format", "json")
    assert json.loads(stdout) == json.loads((out / "results.json").read_text())
    code, stdout, _ = invoke("--compare", out, out)
    assert code == 0 and "| average | WER |" in stdout
    # And what cannot be done is one line
    for arguments, message in {
        (str(manifest),): "--out is missing",
        (str(manifest), "--compare", str(out), str(out)): "--compare is of runs that are finished",
        (str(manifest), "--out", "gs://bucket/out"): "an evaluation is written to a local directory",
        (str(manifest), "--out", str(out), "--language", "klingon"): "unknown language 'klingon'",
        (str(manifest), "--out", str(out), "--task", "punctuate"): "another job: options.task",
        ("--out", str(out)): "there is no set",
    }.items():
        code, stdout, stderr = invoke(*arguments)
        assert (code, stdout, stderr.count("\n")) == (2, "", 1)
        assert message in stderr


def test_the_command_ends_on_sigterm_and_resumes(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a listener who is told to end while it hears the third utterance
    asr = Listener(HEARD)
    monkeypatch.setattr("granite_jax.evaluation.run.Transcriber.from_pretrained", lambda *_, **__: asr)
    transcribe = asr.transcribe

    def interrupted(audio: list, **options: Any) -> list[Transcript]:
        if "c.wav" in [each.name for each in audio] and "c.wav" not in asr.heard:
            signal.raise_signal(signal.SIGTERM)
        return transcribe(audio, **options)

    monkeypatch.setattr(asr, "transcribe", interrupted)
    # When the command runs, then it says so, and the same command again does the rest
    arguments = (manifest, "--out", tmp_path / "out", "--part-size", 2, "--format", "json")
    code, stdout, stderr = invoke(*arguments)
    assert (code, stdout) == (143, "") and "stopped by SIGTERM; run again to resume" in stderr
    assert "f.wav" not in asr.heard
    code, stdout, _ = invoke(*arguments)
    assert code == 0 and asr.heard.count("a.wav") == 1
    expected, _ = evaluate([manifest], tmp_path / "whole")
    assert json.loads(stdout)["sets"][0]["wer"] == expected["sets"][0]["wer"]


def test_the_command_without_its_packages_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("granite_jax.evaluation")
    monkeypatch.setitem(sys.modules, "granite_jax.evaluation", None)
    code, _, stderr = invoke("demo", "--out", "x")
    assert code == 2 and stderr.startswith("granite-jax: eval needs pip install 'granite-jax[eval]'")


def test_the_demo_is_evaluated_for_real(clips: Path, tmp_path: Path) -> None:
    # Given the clips as a TFDS data set, when the embedded checkpoint is evaluated on it, then hardly a word is wrong
    prepared = heldout.prepare(tmp_path, clips)
    asr = Transcriber.from_pretrained("demo", dtype="float32")
    results = evaluation.evaluate([f"Demo=tfds:{prepared}#test"], tmp_path / "out", transcriber=(asr, "demo float32"))
    assert results is not None
    (found,) = results["sets"]
    assert (found["name"], found["scored"], found["failed"]) == ("Demo", 20, 0)
    assert 0.0 <= found["wer"]["low"] <= found["wer"]["rate"] <= found["wer"]["high"] < 15.0
    assert {"cer", "b_wer", "u_wer"} <= set(found)
    # And nothing was compiled while it was timed
    assert results["seconds"]["late_compilations"] == 0
    assert results["seconds"]["compile"] > 0 and results["rtfx"] > 0
