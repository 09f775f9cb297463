"""Self-speculative decoding: lossless against plain greedy decoding, relaxed against the three steps of the paper."""

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_fixture import write_random_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from typer.testing import CliRunner

import granite_jax as gj
from granite_jax.cli import app
from granite_jax.decoding import REALIGN, DecodeState, Draft, Spelling, decode, verify, with_end
from granite_jax.programs import Bucket
from granite_jax.speculation import Acceptance, acceptance, drafts_of

VOCABULARY, PROMPT, DRAFT, ROOM, END, NEVER = 11, 6, 30, 20, 5, 2
CAPACITY = PROMPT + DRAFT + 1
SPELLING = Spelling(jnp.arange(VOCABULARY) % 3 == 0, jnp.arange(VOCABULARY, dtype=jnp.int32) % 4 + 1)


# A toy decoder: the tokens are its cache, and every history has logits of its own.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    tokens: jax.Array  # [b, s]
    lengths: jax.Array

    def rolled_back(self, lengths: jax.Array) -> "History":
        return dataclasses.replace(self, lengths=lengths)


def random_model(seed: int) -> np.ndarray:
    """Logits of 499 kinds of histories; end-of-text seldom wins."""
    table = 3 * np.random.default_rng(seed).standard_normal((499, VOCABULARY)).astype(np.float32)
    table[:, END] -= 2.5
    return table


def logits_of(table, history, length):
    """The logits after the first `length` tokens of a history. Works on numpy and on jax."""
    xp = jnp if isinstance(history, jax.Array) else np
    place = xp.arange(CAPACITY)
    return table[xp.sum(xp.where(place < length, (history + 1) * (place * place + 3), 0)) % len(table)]


def toy_step(table: jax.Array, tokens: jax.Array, cache: History) -> tuple[jax.Array, History]:
    # As the KV cache writes: a slice that would run past the end is moved back, over what was there.
    write = jax.vmap(lambda row, new, length: jax.lax.dynamic_update_slice(row, new, (length,)))
    history = write(cache.tokens, tokens, cache.lengths)
    ends = cache.lengths[:, None] + 1 + jnp.arange(tokens.shape[1])
    logits = jax.vmap(jax.vmap(logits_of, (None, None, 0)), (None, 0, 0))(table, history, ends)
    return logits, History(history, cache.lengths + tokens.shape[1])


@functools.partial(jax.jit, static_argnames=("window", "realign"))
def toy_decode(
    table: jax.Array,
    prompts: History,
    draft: Draft,
    limits: jax.Array,
    thresholds: jax.Array,
    window: int,
    realign: str,
) -> DecodeState:
    before = prompts.rolled_back(prompts.lengths - 1)
    last = jnp.take_along_axis(prompts.tokens, before.lengths[:, None], axis=1)
    logits, cache = toy_step(table, jnp.concatenate([last, draft.tokens], axis=1), before)
    return decode(
        functools.partial(toy_step, table),
        verify(logits, with_end(draft, END), (NEVER,)),
        cache.rolled_back(prompts.lengths),
        draft,
        limits,
        thresholds,
        SPELLING,
        room=ROOM,
        end_of_text=END,
        never=(NEVER,),
        window=window,
        realign=REALIGN[realign],
    )


def make_prompts(rows: int, seed: int) -> History:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY, (rows, CAPACITY))
    return History(jnp.asarray(tokens, jnp.int32), jnp.asarray(rng.integers(1, PROMPT + 1, rows), jnp.int32))


def make_drafts(drafts: list[list[int]]) -> Draft:
    padded = [[*draft[:DRAFT], *[3] * (DRAFT - len(draft))] for draft in drafts]
    return Draft(jnp.array(padded, jnp.int32), jnp.array([min(len(d), DRAFT) for d in drafts], jnp.int32))


def tokens_of(state: DecodeState) -> list[list[int]]:
    return [np.asarray(row)[:count].tolist() for row, count in zip(state.tokens, state.counts.tolist(), strict=True)]


# Plain references, one row and one token at a time.


def probabilities(table: np.ndarray, text: list[int]) -> np.ndarray:
    history = np.zeros(CAPACITY, np.int64)
    history[: len(text)] = text
    logits = np.array(logits_of(table, history, len(text)), np.float64)
    logits[NEVER] = -np.inf
    odds = np.exp(logits - logits.max())
    return odds / odds.sum()


def greedy(table: np.ndarray, prompt: list[int], limit: int, start: tuple[int, ...] = ()) -> list[int]:
    text = list(start)
    while len(text) < limit:
        chosen = int(np.argmax(probabilities(table, prompt + text)))
        if chosen == END:
            break
        text.append(chosen)
    return text


def paper(
    table: np.ndarray, prompt: list[int], draft: list[int], limit: int, threshold: float
) -> tuple[list[int], bool]:
    """Steps 2 and 3 of arXiv 2603.11243: (tokens, whether the draft was accepted as a whole)."""
    for place, token in enumerate([*draft, END]):
        if probabilities(table, prompt + draft[:place])[token] <= threshold:
            return greedy(table, prompt, limit, tuple(draft[:place])), False
        if token == END:
            return draft[:place], True
    raise AssertionError


# What a hostile caller may hand in as the draft of a text.


@st.composite
def hostile_drafts(draw: st.DrawFn, text: list[int]) -> list[int]:
    """Edits of `text`, or something else altogether."""
    token = st.integers(0, VOCABULARY - 1)
    draft = list(text)
    match draw(st.sampled_from(["edits", "edits", "noise", "empty"])):
        case "noise":
            return draw(st.lists(token, max_size=DRAFT))
        case "empty":
            return []
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(draft)))
        match draw(st.sampled_from(["insert", "delete", "substitute", "repeat", "end", "more", "cut"])):
            case "insert":
                draft.insert(place, draw(token))
            case "delete":
                del draft[place : place + draw(st.integers(1, 3))]
            case "substitute":
                draft[place : place + 1] = draw(st.lists(token, min_size=1, max_size=2))
            case "repeat":
                draft[place:place] = draft[max(0, place - 4) : place]
            case "end":
                draft.insert(place, END)
            case "more":
                draft += draw(st.lists(token, max_size=8))
            case "cut":
                draft = draft[:place]
    return draft[:DRAFT]


@pytest.mark.parametrize(
    ("rows", "window", "realign"), [(1, 4, "words"), (5, 4, "words"), (5, 1, "nearest"), (3, 7, "none")]
)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(data=st.data(), seed=st.integers(0, 10_000))
def test_lossless_is_greedy_whatever_the_drafts(
    rows: int, window: int, realign: str, data: st.DataObject, seed: int
) -> None:
    # Given a random model, and in one batch drafts from perfect to hostile, with limits of their own
    table, prompts = random_model(seed), make_prompts(rows, seed)
    limits = data.draw(st.lists(st.integers(0, ROOM), min_size=rows, max_size=rows))
    texts = [np.asarray(row)[:n].tolist() for row, n in zip(prompts.tokens, prompts.lengths.tolist(), strict=True)]
    expected = [greedy(table, text, limit) for text, limit in zip(texts, limits, strict=True)]
    # Past the limit too: drafts may be longer than what may be written.
    drafts = [data.draw(hostile_drafts(greedy(table, text, ROOM))) for text in texts]

    # When they are decoded with nothing relaxed
    state = toy_decode(
        table, prompts, make_drafts(drafts), jnp.array(limits, jnp.int32), jnp.full(rows, jnp.inf), window, realign
    )

    # Then the tokens are greedy decoding's, in no more passes, and never past the cache
    assert tokens_of(state) == expected
    greedy_passes = [max(1, min(len(text) + 1, limit)) for text, limit in zip(expected, limits, strict=True)]
    assert all(passes <= most for passes, most in zip(state.passes.tolist(), greedy_passes, strict=True))
    accepted_or_chosen = state.accepted + state.passes
    assert all(n >= len(text) for n, text in zip(accepted_or_chosen.tolist(), expected, strict=True))
    assert not np.asarray(state.tokens)[np.arange(ROOM) >= np.asarray(state.counts)[:, None]].any()


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(data=st.data(), seed=st.integers(0, 10_000), threshold=st.sampled_from([0.0, 0.02, 0.2, 0.6]))
def test_relaxed_is_the_papers_verification(data: st.DataObject, seed: int, threshold: float) -> None:
    # Given a random model and drafts that it finds more or less plausible
    rows = 5
    table, prompts = random_model(seed), make_prompts(rows, seed)
    texts = [np.asarray(row)[:n].tolist() for row, n in zip(prompts.tokens, prompts.lengths.tolist(), strict=True)]
    drafts = [data.draw(hostile_drafts(greedy(table, text, ROOM)))[:ROOM] for text in texts]

    # When they are decoded with a threshold
    state = toy_decode(
        table, prompts, make_drafts(drafts), jnp.full(rows, ROOM), jnp.full(rows, threshold), window=4, realign="words"
    )

    # Then tokens and acceptance as a whole are those of the three steps
    expected = [paper(table, text, draft, ROOM, threshold) for text, draft in zip(texts, drafts, strict=True)]
    assert tokens_of(state) == [tokens for tokens, _ in expected]
    assert all(passes == 1 for passes, (_, whole) in zip(state.passes.tolist(), expected, strict=True) if whole)


def test_one_wrong_token_costs_one_more_pass() -> None:
    # Given a text of 20 tokens one of which occurs nowhere near, and a draft with another of its length in its place
    for seed in range(100):
        table, prompts = random_model(seed), make_prompts(1, seed)
        table[:, END] = -100
        text = greedy(table, np.asarray(prompts.tokens)[0, : int(prompts.lengths[0])].tolist(), ROOM)
        place = next((i for i in range(3, 12) if text[max(0, i - 7) : i + 8].count(text[i]) == 1), None)
        if place is not None and (text[place] + 4) % 8 not in text[place - 1 : place + 2]:
            break
    draft = list(text)
    draft[place] = (text[place] + 4) % 8

    # When decoded with windows that hold the rest
    state = toy_decode(
        table, prompts, make_drafts([draft]), jnp.array([ROOM]), jnp.array([jnp.inf]), window=16, realign="words"
    )

    # Then the prefill and one window suffice
    assert tokens_of(state) == [text]
    assert state.passes.tolist() == [2]


def test_devices_decode_on_their_own() -> None:
    # Given a batch over eight devices, one of whose rows has a perfect draft, and the others none
    table, prompts = random_model(4), make_prompts(8, 4)
    table[:, END] = -100
    text = greedy(table, np.asarray(prompts.tokens)[0, : int(prompts.lengths[0])].tolist(), ROOM)
    draft, limits = make_drafts([text, *[[]] * 7]), jnp.full(8, ROOM)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data = PartitionSpec("data")

    # When each device runs its own loop under shard_map
    def split(*args):
        return toy_decode(*args, window=4, realign="words")

    specs = (PartitionSpec(), data, data, data, data)
    state = jax.jit(jax.shard_map(split, mesh=mesh, in_specs=specs, out_specs=data))(
        table, prompts, draft, limits, jnp.full(8, jnp.inf)
    )

    # Then passes are those that each row needs alone
    assert state.passes.tolist() == [1, *[ROOM] * 7]
    assert tokens_of(state)[0] == text


# Re-alignment.

_WORDS = ["call", " dak", "f", "iki", " now", " dag", " da", "g", " at", " noon", "x", "y"]
_WRITTEN = Spelling(
    jnp.array([token.startswith(" ") for token in _WORDS]), jnp.array([len(token) for token in _WORDS], jnp.int32)
)


@pytest.mark.parametrize(
    ("rule", "expected", "token", "proposed"),
    [
        ("words", 1, " dak", "f"),  # the expected token
        ("words", 1, " dag", "f"),  # another of the same length
        ("words", 1, " da", " now"),  # a shorter one: at the next word
        ("words", 4, "g", " now"),  # the decoder's word goes on, the draft's has ended
        ("words", 1, " now", " at"),  # words of the draft are left out
        ("words", 5, " dak", "f"),  # the decoder repeats itself
        ("words", 6, "x", None),  # past the end
        ("nearest", 1, "iki", " now"),
        ("nearest", 1, "g", "f"),  # nowhere: as if it had replaced the expected one
        ("none", 1, " dak", None),
    ],
)
def test_where_the_draft_goes_on(rule: str, expected: int, token: str, proposed: str | None) -> None:
    # Given the draft "call dakfiki now at noon"
    text = ["call", " dak", "f", "iki", " now", " at", " noon"]
    draft = Draft(jnp.array([[*map(_WORDS.index, text), 1, 1]], jnp.int32), jnp.array([len(text)]))

    # When the decoder has written a token where the draft has position `expected`
    cursor = REALIGN[rule](draft, _WRITTEN, jnp.array([expected]), jnp.array([_WORDS.index(token)]))

    # Then the draft goes on at what the rule says, or not at all
    assert ([*text, None][int(cursor[0])]) == proposed


# The whole pipeline, on a random checkpoint.

SECONDS = (1.0, 2.0, 1.5, 2.5, 0.7, 3.0, 1.2)
LIMIT = 10


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    directory: Path = tmp_path_factory.mktemp("random")
    write_random_checkpoint(directory, seed=1)
    bucket = Bucket(4, 48_000, 110, 140)
    asr = gj.Transcriber.from_pretrained(
        directory, dtype="float32", batch_size=4, buckets=[bucket], compilation_cache=False
    )
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
    options = {"task": "translate", "to": "fr"}
    greedy = pipeline.run(speculative=False, **options)
    drafts = [t.text for t in greedy]
    drafts[2] = None

    # When they are handed in
    found = pipeline.run(draft=drafts, **options)

    # Then the tokens stay, and all but that one take fewer passes in total
    assert [t.tokens for t in found] == [t.tokens for t in greedy]
    assert found[2].stats["route"] == "greedy"
    assert sum(t.stats["llm_passes"] for t in found) < sum(t.stats["llm_passes"] for t in greedy)


def test_relaxed_mode_is_the_papers_three_steps(pipeline: SimpleNamespace) -> None:
    # Given thresholds between the utterances' entropies, and between the drafts' likelihoods
    asr = pipeline.asr
    config, params, threshold = asr.config, asr._pipeline._params, 2e-3
    prompt = asr._prompt("can you transcribe the speech into a written format?")
    never = [config.audio_token_id, config.decoder.pad_token_id]
    encoded = []
    for samples in pipeline.audio:
        length = jnp.array([len(samples)])
        hidden = gj.encode(config, params, gj.log_mel(samples[None], length), gj.num_frames(length)).hidden
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


def test_all_modes_share_three_programs_a_bucket(pipeline: SimpleNamespace) -> None:
    # Given one bucket, when every mode, draft and task has run, then nothing was compiled but its three programs
    pipeline.run(speculative="relaxed-fast")
    pipeline.run(draft=["a" * 500] * len(pipeline.audio), task="punctuate")
    pipeline.run(draft=[""] * len(pipeline.audio))
    assert pipeline.asr.compilations == 3


def test_a_text_that_fills_the_models_last_position(tmp_path: Path) -> None:
    # Given a model with room for the prompt and 8 tokens, to the position
    audio = 0.1 * np.random.default_rng(5).standard_normal(16_000).astype(np.float32)
    write_random_checkpoint(tmp_path, seed=2, text_config={"max_position_embeddings": 100})
    bucket = Bucket(1, 24_000, 100, 100)
    asr = gj.Transcriber.from_pretrained(
        tmp_path, dtype="float32", batch_size=1, buckets=[bucket], compilation_cache=False
    )
    prompt = asr._prompt("can you transcribe the speech into a written format?")
    limit = 100 - len(prompt.prefix) - len(prompt.suffix) - 12

    # When decoded with drafts that reach past the end
    greedy = asr.transcribe(audio, speculative=False, max_new_tokens=limit)[0]
    found = asr.transcribe(audio, draft=greedy.text * 20, max_new_tokens=limit)[0]

    # Then the tokens are greedy's, as many as there is room for
    assert found.tokens == greedy.tokens
    assert len(found.tokens) == limit or found.stats["finish"] == "end"


# Options.


def test_presets_are_the_papers() -> None:
    assert acceptance("relaxed") == acceptance("relaxed-accurate") == Acceptance(True, 0.7, 0.2)
    assert acceptance("relaxed-fast") == Acceptance(True, 3.0, 0.1)
    assert acceptance("relaxed-fast", ctc_threshold=0.5) == Acceptance(True, 0.5, 0.1)
    assert acceptance(False) == Acceptance(drafts=False)


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
        acceptance(**options)


@pytest.mark.parametrize("draft", [["a"], ["a", 3], 7])
def test_a_draft_that_does_not_match_the_inputs_is_refused(draft: object) -> None:
    with pytest.raises(gj.GraniteError, match="draft"):
        drafts_of(draft, 2)  # pyright: ignore[reportArgumentType]


def test_a_draft_is_for_lossless_mode(pipeline: SimpleNamespace) -> None:
    with pytest.raises(gj.GraniteError, match="draft is for"):
        pipeline.asr.transcribe(pipeline.audio[0], draft="a", speculative="relaxed")


def test_command_line_options_reach_the_transcriber(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a transcriber that notes what it is asked for
    asked: dict = {}

    def transcribe(files, **options):
        asked.update(options)
        return [gj.Transcript("a.wav", "text", (1,), 1.0, "text", {"route": "ctc", "llm_passes": 0})]

    monkeypatch.setattr(gj.Transcriber, "from_pretrained", lambda *_, **__: SimpleNamespace(transcribe=transcribe))

    # When run with options of drafts
    options = ["--speculative", "relaxed-fast", "--ctc-threshold", "0.5", "--format", "json"]
    result = CliRunner().invoke(app, ["transcribe", "a.wav", *options])

    # Then they arrive, and the statistics are printed
    assert (asked["speculative"], asked["ctc_threshold"], asked["verify_threshold"]) == ("relaxed-fast", 0.5, None)
    assert json.loads(result.stdout)["stats"]["route"] == "ctc"
    CliRunner().invoke(app, ["transcribe", "a.wav", "--speculative", "off"])
    assert asked["speculative"] is False
