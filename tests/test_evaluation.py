"""Evaluation runs that are interrupted, resumed and compared, and the command."""

import json
import signal
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from batch_jobs import read_lines, write_lines
from evaluation_runs import BUCKETS, HEARD, SAID, Listener, evaluate, numbers, write_recordings
from typer.testing import CliRunner

from granite_jax import GraniteError, cli, evaluation
from granite_jax.evaluation.datasets import Utterance
from granite_jax.evaluation.run import needed_buckets
from granite_jax.transcriber import Transcript


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write_recordings(tmp_path)


def test_lists_are_for_the_utterances_they_name(manifest: Path, tmp_path: Path) -> None:
    # Given a manifest with ids, and its lists
    write_lines(manifest, *({"audio": name, "id": name[0], "text": text} for name, text in SAID.items()))
    rows = [f"{name[0]}\t{text.upper()}\t{json.dumps(['DAKFIKI', 'LAMP'])}" for name, text in SAID.items()]
    lists = write_lines(tmp_path / "lists.tsv", *rows)
    # When evaluated with them, then lamp is right and Dakfiki wrong: 1 of 2
    results, _ = evaluate([manifest], tmp_path / "out", keyword_lists=[lists])
    (found,) = results["sets"]
    assert found["b_wer"]["rate"] == 50.0
    assert found["u_wer"]["rate"] == pytest.approx(100 * 2 / 16)
    # And lists that are incomplete, or of other texts, are refused
    write_lines(lists, *rows[1:])
    with pytest.raises(GraniteError, match="set calls: utterance 'a' and 0 others have no keyword list"):
        evaluate([manifest], tmp_path / "out", keyword_lists=[lists])
    write_lines(lists, rows[0].replace("LAMP!", "LIGHT!"), *rows[1:])
    with pytest.raises(GraniteError, match="set calls: the keyword list of utterance 'a' is that of another text"):
        evaluate([manifest], tmp_path / "out", keyword_lists=[lists])


def test_the_model_is_told_of_lists_if_asked_to(manifest: Path, tmp_path: Path) -> None:
    # Given lists with distractors for utterances, and a listener who notes what it is told
    write_lines(manifest, *({"audio": name, "id": name[0], "text": text} for name, text in SAID.items()))
    rows = [f"{name[0]}\t{text.upper()}\t[]\t{json.dumps(['ZURICH', name])}" for name, text in SAID.items()]
    lists = write_lines(tmp_path / "lists.tsv", *rows)
    # When evaluated with and without bias, then it is told of the fourth column, or of nothing
    _, told = evaluate([manifest], tmp_path / "biased", keyword_lists=[lists], bias=True)
    assert told.keywords == {name: ["ZURICH", name] for name in SAID}
    _, told = evaluate([manifest], tmp_path / "plain", keyword_lists=[lists])
    assert set(map(str, told.keywords.values())) == {"None"}
    # And these are different jobs, and a set without lists cannot bias
    with pytest.raises(GraniteError, match="another job: keyword_lists"):
        evaluate([manifest], tmp_path / "plain", keyword_lists=[lists], bias=True)
    with pytest.raises(GraniteError, match="set calls: has no keyword lists to bias with"):
        evaluate([manifest], tmp_path / "none", bias=True)


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


@pytest.mark.parametrize(
    "change",
    [
        {"text": "call dagfigi now"},
        {"keywords": ["lamp"]},
        {"text": "other words", "wer": 0.1, "speaker": "b"},
    ],
    ids=["reference", "keywords", "several"],
)
def test_other_references_are_scored_without_transcribing(manifest: Path, tmp_path: Path, change: dict) -> None:
    # Given a finished run, when references and what else decides nothing have changed, then it is only scored again
    before, _ = evaluate([manifest], tmp_path / "run")
    lines = [line | change | {"text": change.get("text", line["text"])} for line in read_lines(manifest)]
    write_lines(manifest, *lines)
    after, asr = evaluate([manifest], tmp_path / "run")
    assert asr.heard == []
    assert (after["sets"][0]["wer"] != before["sets"][0]["wer"]) == ("text" in change)
    # But other audio is another run
    write_lines(manifest, *reversed(lines))
    with pytest.raises(GraniteError, match="results of another job: manifest"):
        evaluate([manifest], tmp_path / "run")


@pytest.mark.parametrize("text", ["", "(laughs)", "ignore time segment in scoring", "[noise]"])
def test_sets_without_words_are_refused_before_the_work(manifest: Path, tmp_path: Path, text: str) -> None:
    # Given a set whose references all have no word, when it is evaluated, then it is named, and nothing is transcribed
    silent = write_lines(manifest.with_name("silent.jsonl"), *(line | {"text": text} for line in read_lines(manifest)))
    with pytest.raises(GraniteError, match="set silent: no reference has a word in it"):
        evaluate([manifest, silent], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_keywords_of_a_manifest_are_for_scoring(manifest: Path, tmp_path: Path) -> None:
    # Given references with keywords, when they are not to bias, then the model is told none
    write_lines(manifest, *(line | {"keywords": ["lamp"]} for line in read_lines(manifest)))
    assert set(map(str, evaluate([manifest], tmp_path / "run")[1].keywords.values())) == {"None"}
    biased = evaluate([manifest], tmp_path / "biased", bias=True)[1].keywords
    assert set(map(str, biased.values())) == {"['lamp']"}


def test_sets_have_all_forms_of_manifests(manifest: Path, tmp_path: Path) -> None:
    # Given a set as a JSON array, when it is evaluated, then its numbers are those of the JSON lines
    array = manifest.with_name("calls.json")
    array.write_text(json.dumps(read_lines(manifest)))
    expected, found = (evaluate([path], tmp_path / path.suffix)[0]["sets"][0] for path in (manifest, array))
    assert found["wer"] == expected["wer"] and found["scored"] == expected["scored"]


def test_another_set_is_added_to_the_results(manifest: Path, tmp_path: Path) -> None:
    # Given a finished run, and a run of two sets at once
    other = write_lines(manifest.with_name("other.jsonl"), *read_lines(manifest)[:2])
    evaluate([manifest], tmp_path / "run")
    expected, _ = evaluate([manifest, other], tmp_path / "both")
    # When the other set is evaluated into the first one's directory, then the results are the same
    found, asr = evaluate([other], tmp_path / "run")
    assert numbers(found) == numbers(expected) and len(asr.heard) == 2
    # And the same set again replaces its own results alone; other options need another directory
    assert numbers(evaluate([manifest], tmp_path / "run")[0])["average"] == numbers(expected)["average"]
    third = write_lines(manifest.with_name("third.jsonl"), *read_lines(manifest)[:1])
    for options, name in (
        ({"max_new_tokens": 5}, "options"),
        ({"reference_language": "fr"}, "scoring"),
        ({"bias": True}, "bias"),
    ):
        with pytest.raises(GraniteError, match=f"has results of set other with other {name}"):
            evaluate([third, manifest], tmp_path / "run", **options)
    # And results that are gone are noticed before the work
    (tmp_path / "run" / "other" / "utterances.jsonl").unlink()
    with pytest.raises(GraniteError, match="utterances.jsonl: is not the result of an evaluation"):
        evaluate([third], tmp_path / "run")
    assert not (tmp_path / "run" / "third").exists()


def test_two_runs_into_one_directory_keep_both_sets(manifest: Path, tmp_path: Path) -> None:
    # Given two runs of different sets, when one ends while the other works, then the results have both
    other = write_lines(manifest.with_name("other.jsonl"), *read_lines(manifest)[:2])
    progressed: list[Any] = []

    def disturb(progress: Any) -> None:
        if not progressed:
            progressed.append(progress)
            evaluate([other], tmp_path / "run")

    found, _ = evaluate([manifest], tmp_path / "run", progress=disturb)
    assert sorted(each["name"] for each in found["sets"]) == ["calls", "other"]


def test_only_programs_that_are_needed_are_compiled_and_times_are_apart(manifest: Path, tmp_path: Path) -> None:
    # Given lengths that fit the smallest buckets, when evaluated, then these alone are compiled, before anything else
    results, asr = evaluate([manifest], tmp_path / "out")
    assert asr.compilations == 2
    assert set(results["seconds"]) == {"load", "compile", "steady", "wait", "audio", "late_compilations"}
    assert results["seconds"]["audio"] == 3.0 and results["seconds"]["late_compilations"] == 0
    assert results["rtfx"] == pytest.approx(3.0 / results["seconds"]["steady"])
    # And for recordings that are cut into segments those of the segments
    assert needed_buckets(BUCKETS, [Utterance("", "", None, 3600.0)], 0.5) == [BUCKETS[0], BUCKETS[1]]
    # And for what is longer than a bucket the next one, and for lengths that are not known all
    assert needed_buckets(BUCKETS, [Utterance("", "", None, 2.0)], 30.0) == [BUCKETS[2]]
    assert needed_buckets(BUCKETS, [Utterance("", "", None, 0.5), Utterance("", "", None, None)], 30.0) == BUCKETS


def test_flags_of_transcripts_are_counted(manifest: Path, tmp_path: Path) -> None:
    # Given transcripts of which all are flagged, when evaluated, then results and report say how many
    asr: Any = Listener(HEARD)
    asr.flags = ("loop", "retried")
    results = evaluation.evaluate([str(manifest)], tmp_path / "out", transcriber=(asr, "listener"))
    assert results is not None and results["sets"][0]["flags"] == {"loop": 6, "retried": 6}
    assert "Flags in calls: loop 6, retried 6." in (tmp_path / "out" / "results.md").read_text()


def test_an_interrupted_run_goes_on_to_the_same_numbers(manifest: Path, tmp_path: Path) -> None:
    # Given a run that is stopped amid its second set
    other = write_lines(tmp_path / "again.jsonl", *({"audio": name, "text": text} for name, text in SAID.items()))
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
    # And a finished one is scored again, by another normalizer, without loading anything
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
    # Given a run, and others of another normalizer, set or reference, and of nothing
    evaluate([manifest], tmp_path / "a")
    evaluate([manifest], tmp_path / "lowercase", normalizer="lowercase")
    evaluate([f"other={manifest}"], tmp_path / "other")
    write_lines(manifest, *({"audio": name, "text": f"{text} sir"} for name, text in SAID.items()))
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
    write_lines(manifest, *({"audio": name, "text": text} for name, text in texts.items()))
    perfect, _ = evaluate([manifest], tmp_path / "a", texts, task="translate", target_language="de")
    evaluate(
        [manifest], tmp_path / "b", texts | {"a.wav": "etwas ganz anderes hier"}, task="translate", target_language="de"
    )
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
        (str(manifest), "--compare", str(out), str(out)): "--compare takes two finished runs and no SET",
        (str(manifest), "--out", "gs://bucket/out"): "an evaluation is written to a local directory",
        (str(manifest), "--out", str(out), "--reference-language", "klingon"): "unknown language 'klingon'",
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
    submit = asr.submit

    def interrupted(audio: Any, *options: Any, **others: Any) -> "Future[Transcript]":
        if audio.name == "c.wav" and "c.wav" not in asr.heard:
            signal.raise_signal(signal.SIGTERM)
        return submit(audio, *options, **others)

    monkeypatch.setattr(asr, "submit", interrupted)
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
