"""Keywords through the whole pipeline, on a random checkpoint."""

import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from retraces import retraces
from typer.testing import CliRunner

import granite_jax as gj
from granite_jax.cli import app
from granite_jax.keywords.automaton import FullError, batch_automata
from granite_jax.options import TranscribeOptions
from granite_jax.recognition.repetition import has_repetition_loop

LIMIT = 12


@pytest.fixture(scope="module")
def pipeline(random_asr: gj.Transcriber) -> SimpleNamespace:
    rng = np.random.default_rng(0)
    audio = [0.1 * rng.standard_normal(int(16_000 * s)).astype(np.float32) for s in (1.0, 2.0, 1.5, 2.5, 0.7, 3.0)]
    run = functools.partial(random_asr.transcribe, audio, max_new_tokens=LIMIT)
    return SimpleNamespace(asr=random_asr, audio=audio, run=run, plain=run())


def tokens_of(transcripts: list[gj.Transcript]) -> list[tuple[int, ...]]:
    return [t.tokens for t in transcripts]


def test_speculative_is_greedy_with_keywords_and_nothing_more_is_compiled(pipeline: SimpleNamespace) -> None:
    # Given lists of keywords from none to hundreds, one each, and strong boosts
    rng = np.random.default_rng(1)
    words = ["".join(map(chr, rng.integers(97, 123, 5))) for _ in range(400)]
    lists = [words[:3], None, words, ["2024", "the", "speech"], words[:40], words]
    options = {"keywords": lists, "keyword_boost": 20.0, "keyword_gate": False}

    # When they are used, heard or not
    greedy, lossless = pipeline.run(speculative=False, **options), pipeline.run(**options)

    # Then both write the same, in which the keywords have left their mark, but not in the row without
    assert tokens_of(lossless) == tokens_of(greedy)
    changed = [a.tokens != b.tokens for a, b in zip(greedy, pipeline.plain, strict=True)]
    assert sum(changed) >= 4 and not changed[1]
    # And each writes what it writes alone, with a gate, too
    alone = [pipeline.asr.transcribe(a, max_new_tokens=LIMIT, **(options | {"keywords": k or []})).tokens
             for a, k in zip(pipeline.audio, lists, strict=True)]  # fmt: skip
    assert alone == tokens_of(greedy)
    gated = pipeline.run(**options | {"keyword_gate": -8.0})
    assert any(t.stats.get("keywords") for t in gated)
    assert tokens_of(gated) == tokens_of(pipeline.run(speculative=False, **options | {"keyword_gate": -8.0}))
    assert retraces(pipeline.asr.recognizer().programs, 1) == []
    assert pipeline.asr.compilations == 3


def test_no_keywords_change_nothing(pipeline: SimpleNamespace) -> None:
    # Given empty lists, keywords without boost, and keywords of which none is heard
    for options in ({"keywords": []}, {"keywords": [[]] * 6}, {"keywords": ["speech"], "keyword_boost": 0.0},
                    {"keywords": ["speech"], "keyword_gate": -1e-6}):  # fmt: skip
        # Then the tokens are those without biasing
        assert tokens_of(pipeline.run(**options)) == tokens_of(pipeline.plain)


def test_without_keywords_no_automaton_is_read(pipeline: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given tables that boost one token most, whatever was written, in batches without keywords
    def poisoned(tries, rows):
        assert not tries
        automata = batch_automata(tries, rows)
        full = np.arange(len(automata.first), dtype=np.int32)
        return dataclasses.replace(
            automata, failures=np.ones_like(automata.failures), first=full, boosts=automata.boosts + 1e6
        )

    monkeypatch.setattr("granite_jax.recognition.speech_lm.batch_automata", poisoned)
    monkeypatch.setattr(pipeline.asr.recognizer(), "_pools", {})

    # When transcribed by the programs that serve batches with keywords, too, then the tokens stay
    assert tokens_of(pipeline.run()) == tokens_of(pipeline.plain)
    assert tokens_of(pipeline.run(speculative=False)) == tokens_of(pipeline.plain)
    assert retraces(pipeline.asr.recognizer().programs, 1) == []


def test_a_bad_list_costs_only_its_own_input(pipeline: SimpleNamespace) -> None:
    # Given a list for each input, one of which has a control character, when errors are returned
    found = pipeline.run(keywords=[["speech"], ["a\x00b"], *[None] * 4], on_error="return", keyword_boost=0.0)

    # Then that input alone has one
    assert [t.error is None for t in found] == [True, False, True, True, True, True]
    assert "control character" in found[1].error
    assert tokens_of(found[2:]) == tokens_of(pipeline.plain[2:])


def test_long_lists_of_their_own_are_run_in_turn(pipeline: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given room for the states of one row's list only
    lists = [[f"{chr(97 + i)}{n}" for n in range(100, 130)] for i in range(6)]
    options = {"keywords": lists, "keyword_gate": False, "keyword_boost": 9.0}
    expected = tokens_of(pipeline.run(**options))
    monkeypatch.setattr("granite_jax.recognition.speech_lm.batch_automata", functools.partial(limited_pool, edges=80))

    # When transcribed, then batches are split, and the tokens stay
    pipeline.asr.recognizer()._pools.clear()
    assert tokens_of(pipeline.run(**options)) == expected


def limited_pool(tries, rows, edges: int):
    if sum(len(trie.tokens) for trie in tries) > edges:
        raise FullError("full")
    return batch_automata(tries, rows)


def test_keywords_in_the_prompt_are_the_released_models(pipeline: SimpleNamespace) -> None:
    # Given keywords for the prompt, then the result is that of the prompt with its clause, decoded without biasing
    by_hand = pipeline.run(prompt="transcribe the speech to text. Keywords: Kai, Zoe", speculative=False)
    assert tokens_of(pipeline.run(keywords=["Kai", "Zoe"], keywords_in="prompt")) == tokens_of(by_hand)
    both = pipeline.run(keywords=["Kai", "Zoe"], keywords_in="both", keyword_gate=False, keyword_boost=50.0)
    assert tokens_of(both) != tokens_of(by_hand)
    with pytest.raises(gj.PromptError, match="101 keywords are too many for a prompt, at most 100"):
        pipeline.run(keywords=[f"x{i}" for i in range(101)], keywords_in="prompt")


def test_repaired_drafts_are_the_result_where_no_language_model_runs(
    pipeline: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a gate that lets a keyword pass, and a draft of which it takes all words' place
    monkeypatch.setattr(
        "granite_jax.recognition.rows.repair", lambda labels, heard, keywords: keywords.texts[heard[0].keyword]
    )

    # When every CTC text is final
    found = pipeline.run(keywords=["Kai"], keyword_gate=-1e4, speculative="relaxed", ctc_threshold=100.0)

    # Then the repaired draft is the text, while the encoder's own is reported as it was
    assert {(t.stats["route"], t.text, t.stats["keywords"]) for t in found} == {("ctc", "kai", ("kai",))}
    assert [t.ctc_text for t in found] == [t.ctc_text for t in pipeline.plain]


def test_command_line_options_reach_the_transcriber(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Given a file of keywords, and a transcriber that notes what it is asked for
    asked: list[TranscribeOptions] = []

    def stream(files, options, **_):
        asked.append(options)
        yield gj.Transcript("a.wav", "text", (1,), 1.0)

    monkeypatch.setattr(gj.Transcriber, "from_options", lambda *_, **__: SimpleNamespace(stream=stream))
    (tmp_path / "names.txt").write_text("\ufeffKai\nZoe\t2.5\n", encoding="utf-8")

    # When run with keywords, then they arrive
    options = ["--keywords-file", str(tmp_path / "names.txt"), "--keyword", "Ada", "--keyword", "B C"]
    CliRunner().invoke(app, ["transcribe", "a.wav", *options, "--keyword-boost", "3", "--keywords-in", "both"])
    keywords = ("Kai", ("Zoe", 2.5), "Ada", "B C")
    assert asked == [TranscribeOptions(keywords=keywords, keyword_boost=3.0, keywords_in="both")]
    # And a bad line is named with its file
    (tmp_path / "names.txt").write_text("Kai\tmuch\n")
    result = CliRunner().invoke(app, ["transcribe", "a.wav", *options[:2]])
    assert result.exit_code == 2
    assert "names.txt, line 1: keyword 'Kai': its boost is 'much', not a number" in result.output


@pytest.mark.parametrize("speculative", ["lossless", False])
def test_a_boost_that_makes_a_keyword_repeat_is_taken_back(pipeline: SimpleNamespace, speculative: object) -> None:
    # Given boosts beyond reason for some inputs of a batch, when they are transcribed
    lists = [["the"], None, ["the", "speech"], [], ["the"], None]
    found = pipeline.run(keywords=lists, keyword_boost=50.0, keyword_gate=False, speculative=speculative)
    # Then those alone are written again without boosts, and say so; all have the tokens of a run without keywords
    assert [t.flags.count("retried") for t in found] == [1, 0, 1, 0, 1, 0]
    assert tokens_of(found) == tokens_of(pipeline.plain)
    assert pipeline.asr.compilations == 3


@pytest.mark.parametrize(
    ("text", "ctc_text", "keywords", "expected"),
    [
        ("call kai kai kai kai", "call kai", ["Kai"], True),
        ("call kai kai kai", "call kai", ["Kai"], False),
        ("kai zoe kai zoe kai zoe kai zoe", "kai zoe", ["zoe"], True),
        ("kaikaikaikai", "kai", ["kai"], True),
        ("no no no no no kai", "no no no no no kai", ["kai"], False),
        ("no no no no no kai", "no kai", ["kai"], False),
        ("kai kai kai kai kai", "kai kai kai kai", ["kai"], False),
        ("new york new york new york new york", "new york", ["New York"], True),
        ("No, no, no, no, no.", "no no no no no", ["no"], False),
        ("Bravo! Bravo! Bravo! Bravo! Bravo!", "bravo", ["Bravo"], True),
        ("New York, New York, New York, New York.", "new york new york new york", ["New York"], False),
        ("Call 555-5555.", "call five five five five five five five", ["5"], False),
        ("1,000,000,000,000", "one trillion", ["000"], False),
        ("", "", ["kai"], False),
        ("x" * 5000 + " kai" * 5, "kai", ["kai"], True),
    ],
)
def test_what_repeats_with_a_keyword_in_it_is_found(
    text: str, ctc_text: str, keywords: list[str], expected: bool
) -> None:
    assert has_repetition_loop(text, ctc_text, keywords) == expected
