"""Self-speculative decoding in the whole pipeline, on a random checkpoint, and its options."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_fixture import write_random_checkpoint
from plain_transcriber import PlainTranscriber
from retraces import retraces
from typer.testing import CliRunner

import granite_jax as gj
from granite_jax.cli import app
from granite_jax.options import SpeculativeOptions, TranscribeOptions, drafts_for
from granite_jax.recognition.buckets import Bucket

# The whole pipeline, on a random checkpoint.

SECONDS = (1.0, 2.0, 1.5, 2.5, 0.7, 3.0, 1.2)
LIMIT = 10


@pytest.fixture(scope="module")
def pipeline(random_asr: gj.Transcriber) -> SimpleNamespace:
    asr = random_asr
    rng = np.random.default_rng(0)
    audio = [0.1 * rng.standard_normal(int(16_000 * seconds)).astype(np.float32) for seconds in SECONDS]
    texts = asr.transcribe(audio, speculative=False, max_new_tokens=LIMIT)
    return SimpleNamespace(
        asr=asr, audio=audio, greedy=texts, run=functools.partial(asr.transcribe, audio, max_new_tokens=LIMIT)
    )


def test_lossless_is_the_default_and_writes_greedys_tokens(pipeline: SimpleNamespace) -> None:
    # Given drafts of an untrained CTC head, when transcribed, then only the statistics differ from greedy decoding
    found = pipeline.run()
    assert [t.tokens for t in found] == [t.tokens for t in pipeline.greedy]
    assert {t.stats["route"] for t in pipeline.greedy} == {"greedy"}
    assert {t.stats["route"] for t in found} == {"resumed"}
    assert all(t.stats["llm_passes"] + t.stats["accepted_tokens"] >= len(t.tokens) for t in found)


def test_a_draft_of_the_callers_own_is_used_for_any_task(pipeline: SimpleNamespace) -> None:
    # Given drafts that share passages with the translation, for all inputs but one
    options = {"task": "translate", "target_language": "fr"}
    greedy = pipeline.run(speculative=False, **options)
    drafts = [t.text for t in greedy]
    drafts[2] = None

    # When they are handed in
    found = pipeline.run(draft=drafts, **options)

    # Then the tokens stay, and all but that one take fewer passes in total
    assert [t.tokens for t in found] == [t.tokens for t in greedy]
    assert found[2].stats["route"] == "greedy"
    assert sum(t.stats["llm_passes"] for t in found) < sum(t.stats["llm_passes"] for t in greedy)


@pytest.mark.slow
def test_relaxed_mode_is_the_papers_three_steps(pipeline: SimpleNamespace) -> None:
    # Given thresholds between the utterances' entropies, and between the drafts' likelihoods
    asr = pipeline.asr
    config, params, threshold = asr.config, asr.params, 2e-3
    prompt = asr.template.tokens(asr.tokenizer, "can you transcribe the speech into a written format?")
    never = [config.audio_token_id, config.decoder.pad_token_id]
    encoded = []
    for samples in pipeline.audio:
        length = jnp.array([len(samples)])
        hidden = gj.encode(config, params, gj.log_mel(jnp.asarray(samples)[None], length), gj.num_frames(length)).hidden
        logits = np.asarray(gj.ctc_logits(config, params, hidden), np.float64)[0]
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        encoded.append((gj.project(config, params, hidden, gj.num_frames(length)), (-p * np.log(p)).sum(-1).max()))
    entropies = [entropy for _, entropy in encoded]
    gate = float(np.mean(sorted(entropies)[2:4]))

    @jax.jit
    def run(tokens, length, audio):
        return gj.prefill(config, params, tokens, length, audio, logit_positions=jnp.arange(tokens.shape[1])[None])[0]

    def probabilities(audio: jax.Array, text: list[int]) -> np.ndarray:
        tokens = np.zeros((1, 140), np.int32)
        tokens[0, : len(text)] = text
        audio = jnp.pad(audio, ((0, 0), (0, 40 - audio.shape[1]), (0, 0)))
        logits = np.asarray(run(tokens, jnp.array([len(text)]), audio), np.float64)[0]
        logits[:, never] = -np.inf
        odds = np.exp(logits - logits.max(-1, keepdims=True))
        return odds / odds.sum(-1, keepdims=True)

    def three_steps(index: int, draft: list[int]) -> tuple[str, list[int]]:
        audio, entropy = encoded[index]
        if entropy < gate:
            return "ctc", draft
        before = [*prompt.prefix, *[config.audio_token_id] * audio.shape[1], *prompt.suffix]
        p = probabilities(audio, before + draft)[len(before) - 1 :]
        end = config.decoder.eos_token_id
        likelihoods = [p[i, token] for i, token in enumerate([*draft, end])]
        agreed = next((i for i, x in enumerate(likelihoods) if x <= threshold), None)
        if agreed is None:
            return "verified", draft
        text = draft[:agreed]
        while len(text) < LIMIT:
            chosen = int(np.argmax(probabilities(audio, before + text)[len(before) + len(text) - 1]))
            if chosen == end:
                break
            text.append(chosen)
        return "resumed", text

    # When transcribed
    found = pipeline.run(speculative="relaxed", ctc_threshold=gate, verify_threshold=threshold)

    # Then routes and tokens are those of the plain implementation, and the drafts were accepted in part
    drafts = [asr.tokenizer.encode(t.ctc_text)[:LIMIT] for t in found]
    expected = [three_steps(i, draft) for i, draft in enumerate(drafts)]
    assert [(t.stats["route"], list(t.tokens)) for t in found] == expected
    assert [t.stats["llm_passes"] == 0 for t in found] == [entropy < gate for entropy in entropies]
    assert {route for route, _ in expected} >= {"ctc", "resumed"}
    assert any(t.stats["accepted_tokens"] for t in found if t.stats["route"] == "resumed")


@pytest.mark.parametrize("mode", ["ctc", "own", "relaxed"])
def test_what_was_accepted_is_on_record(pipeline: SimpleNamespace, mode: str) -> None:
    # Given drafts, when transcribed, then each accepted run is the same tokens in draft and text, in the text's order
    own = {"draft": [t.text for t in pipeline.greedy]}
    found = pipeline.run(**{"ctc": {}, "own": own, "relaxed": {"speculative": "relaxed", "ctc_threshold": 5.5}}[mode])
    assert any(t.accepted_spans for t in found)
    for t in found:
        assert len(t.draft) == t.stats["draft_tokens"]
        assert sum(size for _, _, size in t.accepted_spans) == t.stats["accepted_tokens"]
        places = [place for place, _, size in t.accepted_spans for place in range(place, place + size)]
        assert places == sorted(set(places))
        for place, source, size in t.accepted_spans:
            assert size > 0
            assert t.tokens[place : place + size] == t.draft[source : source + size]

    # And without drafts there is none
    assert all((t.draft, t.accepted_spans) == ((), ()) for t in pipeline.greedy)


def test_all_modes_share_three_programs_a_bucket(pipeline: SimpleNamespace) -> None:
    # Given one bucket, when every mode, draft and task has run, then nothing was compiled but its three programs
    pipeline.run(speculative="relaxed-fast")
    pipeline.run(draft=["a" * 500] * len(pipeline.audio), task="punctuate")
    pipeline.run(draft=[""] * len(pipeline.audio))
    assert retraces(pipeline.asr.recognizer().programs, 1) == []
    assert pipeline.asr.compilations == 3


@pytest.mark.slow
def test_a_text_that_fills_the_models_last_position(tmp_path: Path) -> None:
    # Given a model with room for the prompt and 8 tokens, to the position
    audio = 0.1 * np.random.default_rng(5).standard_normal(16_000).astype(np.float32)
    write_random_checkpoint(tmp_path, seed=2, text_config={"max_position_embeddings": 100})
    bucket = Bucket(1, 24_000, 100, 100)
    asr = PlainTranscriber.from_pretrained(
        tmp_path, dtype="float32", batch_size=1, buckets=[bucket], compilation_cache=False
    )
    prompt = asr.template.tokens(asr.tokenizer, "can you transcribe the speech into a written format?")
    limit = 100 - len(prompt.prefix) - len(prompt.suffix) - 12

    # When decoded with drafts that reach past the end
    greedy = asr.transcribe(audio, speculative=False, max_new_tokens=limit)
    found = asr.transcribe(audio, draft=greedy.text * 20, max_new_tokens=limit)

    # Then the tokens are greedy's, as many as there is room for
    assert found.tokens == greedy.tokens
    assert len(found.tokens) == limit or found.stats["finish"] == "end"


# Options.


def test_presets_are_the_papers() -> None:
    assert (
        SpeculativeOptions.from_mode("relaxed")
        == SpeculativeOptions.from_mode("relaxed-accurate")
        == SpeculativeOptions(True, 0.7, 0.2)
    )
    assert SpeculativeOptions.from_mode("relaxed-fast") == SpeculativeOptions(True, 3.0, 0.1)
    assert SpeculativeOptions.from_mode("relaxed-fast", ctc_threshold=0.5) == SpeculativeOptions(True, 0.5, 0.1)
    assert SpeculativeOptions.from_mode(False) == SpeculativeOptions(drafts=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculative": "sometimes"}, "speculative is one of lossless"),
        ({"speculative": True}, "speculative is one of lossless"),
        ({"speculative": "lossless", "ctc_threshold": 0.7}, "ctc_threshold is for relaxed modes"),
        ({"speculative": "relaxed", "verify_threshold": -1}, "verify_threshold is -1"),
        ({"speculative": "relaxed", "ctc_threshold": float("nan")}, "ctc_threshold is nan"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(gj.GraniteError, match=message):
        SpeculativeOptions.from_mode(**options)


@pytest.mark.parametrize("draft", [["a"], ["a", 3], 7])
def test_a_draft_that_does_not_match_the_inputs_is_refused(draft: object) -> None:
    with pytest.raises(gj.GraniteError, match="draft"):
        drafts_for(draft, 2)  # pyright: ignore[reportArgumentType]


def test_a_draft_is_for_lossless_mode(pipeline: SimpleNamespace) -> None:
    with pytest.raises(gj.GraniteError, match="draft is for"):
        pipeline.asr.transcribe(pipeline.audio[0], draft="a", speculative="relaxed")


def test_command_line_options_reach_the_transcriber(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a transcriber that notes what it is asked for
    asked: list[TranscribeOptions] = []

    def stream(files, options, **_):
        asked.append(options)
        yield gj.Transcript("a.wav", "text", (1,), 1.0, 0.5, "text", {"route": "ctc", "llm_passes": 0})

    monkeypatch.setattr(gj.Transcriber, "from_options", lambda *_, **__: SimpleNamespace(stream=stream))

    # When run with options of drafts
    options = ["--speculative", "relaxed-fast", "--ctc-threshold", "0.5", "--format", "json"]
    result = CliRunner().invoke(app, ["transcribe", "a.wav", *options])

    # Then they arrive, and the statistics are printed
    assert asked == [TranscribeOptions(speculative="relaxed-fast", ctc_threshold=0.5)]
    assert json.loads(result.stdout)["stats"]["route"] == "ctc"
    CliRunner().invoke(app, ["transcribe", "a.wav", "--speculative", "off"])
    assert asked[1].speculative is False
