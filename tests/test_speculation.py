"""Self-speculative decoding: lossless against plain greedy decoding, relaxed against the three steps of the paper."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from granite_jax.decoding import REALIGN, Choice, DecodeState, Draft, DraftProposal, Greedy, LogitBias, decode, verify
from granite_jax.keywords.automaton import (
    BatchedAutomata,
    KeywordAutomaton,
    Phrase,
    batch_automata,
    build_automaton,
    no_keywords,
)
from granite_jax.keywords.bias import KeywordBias

VOCABULARY, PROMPT, DRAFT, ROOM, END, NEVER = 11, 6, 30, 20, 5, 2
CAPACITY = PROMPT + DRAFT + 1


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
    ends = cache.lengths[:, None] + 1 + jnp.arange(tokens.shape[1])[None, :]
    logits = jax.vmap(jax.vmap(logits_of, (None, None, 0)), (None, 0, 0))(table, history, ends)
    return logits, History(history, cache.lengths + tokens.shape[1])


@functools.partial(jax.jit, static_argnames=("window", "realign"))
def toy_decode(
    table: jax.Array,
    prompts: History,
    draft: Draft,
    max_new_tokens: jax.Array,
    thresholds: jax.Array,
    keywords: BatchedAutomata,
    window: int = 4,
    realign: str = "nearest",
) -> DecodeState:
    bias = KeywordBias.from_automata(keywords, VOCABULARY)
    return biased_decode(
        table, prompts, draft, max_new_tokens, thresholds, bias, Greedy(END, (NEVER,)), window, realign
    )


def biased_decode(
    table: jax.Array,
    prompts: History,
    draft: Draft,
    max_new_tokens: jax.Array,
    thresholds: jax.Array,
    bias: LogitBias,
    choice: Choice,
    window: int = 4,
    realign: str = "nearest",
) -> DecodeState:
    before = prompts.rolled_back(prompts.lengths - 1)
    last = jnp.take_along_axis(prompts.tokens, before.lengths[:, None], axis=1)
    logits, cache = toy_step(table, jnp.concatenate([last, draft.tokens], axis=1), before)
    return decode(
        functools.partial(toy_step, table),
        verify(logits, DraftProposal.from_draft(draft, bias, END), bias, choice),
        cache.rolled_back(prompts.lengths),
        draft,
        max_new_tokens,
        thresholds,
        bias,
        choice,
        max_out_length=ROOM,
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
    return [
        np.asarray(row)[:count].tolist() for row, count in zip(state.tokens, state.num_tokens.tolist(), strict=True)
    ]


# Plain references, one row and one token at a time.


def probabilities(table: np.ndarray, text: list[int]) -> np.ndarray:
    history = np.zeros(CAPACITY, np.int64)
    history[: len(text)] = text
    logits = np.array(logits_of(table, history, len(text)), np.float64)
    logits[NEVER] = -np.inf
    odds = np.exp(logits - logits.max())
    return odds / odds.sum()


def greedy(
    table: np.ndarray, prompt: list[int], limit: int, start: tuple[int, ...] = (), phrases: tuple[Phrase, ...] = ()
) -> list[int]:
    text = list(start)
    while len(text) < limit:
        odds = probabilities(table, prompt + text)
        chosen = int(np.argmax(odds))
        if chosen == END:
            break
        odds[END] = 0  # no boost causes an end
        text.append(int(np.argmax(odds * np.exp(boosts_after(text, phrases)))))
    return text


def boosts_after(text: list[int], phrases: tuple[Phrase, ...]) -> np.ndarray:
    """Of every token, in nats: the largest boost of a phrase that it continues."""
    boosts = np.zeros(VOCABULARY)
    for tokens, boost, anywhere, context, first in phrases:
        for place in range(context, len(tokens)):
            before = list(tokens[:place])
            if text == before or (anywhere and text[len(text) - place :] == before):
                share = first + (1 - first) * (place - context) / max(len(tokens) - context - 1, 1)
                boosts[tokens[place]] = max(boosts[tokens[place]], boost * share)
    return boosts


@st.composite
def keyword_lists(draw: st.DrawFn) -> tuple[Phrase, ...]:
    """Phrases that share prefixes, are each other's suffixes, repeat themselves: of few tokens, so that they match."""
    token = st.integers(0, 4) | st.integers(0, VOCABULARY - 1)
    boost, share = st.floats(0.125, 8, width=16), st.floats(0.125, 1, width=16)
    return tuple(
        Phrase(tuple(tokens), draw(boost), draw(st.booleans()), draw(st.integers(0, len(tokens) - 1)), draw(share))
        for tokens in draw(st.lists(st.lists(token, min_size=1, max_size=4), max_size=5))
    )


NO_KEYWORDS = no_keywords(5, states=128)


def pooled(lists: list[tuple[Phrase, ...]]) -> BatchedAutomata:
    """Equal lists share an automaton, as in the pipeline; empty ones have none."""
    built: dict[tuple[Phrase, ...], KeywordAutomaton] = {p: build_automaton(p) for p in lists if p}
    return batch_automata(list(built.values()), [list(built).index(p) if p else -1 for p in lists], states=128)


@pytest.mark.parametrize("threshold", [np.inf, 0.05])
def test_log_probs_are_those_of_the_tokens_without_boosts(threshold: float) -> None:
    # Given drafts with mistakes, strong keywords, and lossless or relaxed verification
    table, prompts = random_model(3), make_prompts(6, 4)
    phrases = (Phrase((1, 3), 6.0), Phrase((4,), 5.0))
    keywords = pooled([phrases] * 6)
    drafts = make_drafts([[1, 3, 4, 0, 7, 8]] * 6)
    # When decoded
    thresholds = jnp.full(6, threshold, jnp.float32)
    state = toy_decode(jnp.asarray(table), prompts, drafts, jnp.full(6, ROOM), thresholds, keywords)
    # Then each token comes with its own log-probability after those before it
    for row, text in enumerate(tokens_of(state)):
        prompt = np.asarray(prompts.tokens)[row, : int(prompts.lengths[row])].tolist()
        text = [*text, END] if state.ended[row] else text  # with the end behind them
        odds = [probabilities(table, prompt + text[:place])[token] for place, token in enumerate(text)]
        np.testing.assert_allclose(np.exp(state.log_probs[row, : len(text)]), odds, rtol=1e-4)
        assert not np.any(state.log_probs[row, len(text) :])


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
    ("rows", "window", "realign"),
    [(1, 4, "nearest"), (5, 4, "nearest"), (5, 1, "nearest"), (3, 7, "none")],
)
@given(data=st.data(), seed=st.integers(0, 10_000))
def test_lossless_is_greedy_whatever_the_drafts(
    rows: int, window: int, realign: str, data: st.DataObject, seed: int
) -> None:
    # Given a random model, and in one batch drafts from perfect to hostile, with limits and keywords of their own
    table, prompts = random_model(seed), make_prompts(rows, seed)
    limits = data.draw(st.lists(st.integers(0, ROOM), min_size=rows, max_size=rows))
    texts = [np.asarray(row)[:n].tolist() for row, n in zip(prompts.tokens, prompts.lengths.tolist(), strict=True)]
    lists = data.draw(st.lists(keyword_lists(), min_size=rows, max_size=rows))
    lists[-1] = lists[0]
    expected = [
        greedy(table, text, limit, (), phrases) for text, limit, phrases in zip(texts, limits, lists, strict=True)
    ]
    # Past the limit too: drafts may be longer than what may be written.
    drafts = [
        data.draw(hostile_drafts(greedy(table, text, ROOM, (), phrases)))
        for text, phrases in zip(texts, lists, strict=True)
    ]

    # When they are decoded with nothing relaxed
    state = toy_decode(
        table,
        prompts,
        make_drafts(drafts),
        jnp.array(limits, jnp.int32),
        jnp.full(rows, jnp.inf),
        pooled(lists),
        window,
        realign,
    )

    # Then the tokens are greedy decoding's, in no more passes, and never past the cache
    assert tokens_of(state) == expected
    greedy_passes = [max(1, min(len(text) + 1, limit)) for text, limit in zip(expected, limits, strict=True)]
    assert all(passes <= most for passes, most in zip(state.num_forward_passes.tolist(), greedy_passes, strict=True))
    accepted_or_chosen = state.num_accepted + state.num_forward_passes
    assert all(n >= len(text) for n, text in zip(accepted_or_chosen.tolist(), expected, strict=True))
    assert not np.asarray(state.tokens)[np.arange(ROOM) >= np.asarray(state.num_tokens)[:, None]].any()


@given(data=st.data(), seed=st.integers(0, 10_000), threshold=st.sampled_from([0.0, 0.02, 0.2, 0.6]))
def test_relaxed_is_the_papers_verification(data: st.DataObject, seed: int, threshold: float) -> None:
    # Given a random model and drafts that it finds more or less plausible
    rows = 5
    table, prompts = random_model(seed), make_prompts(rows, seed)
    texts = [np.asarray(row)[:n].tolist() for row, n in zip(prompts.tokens, prompts.lengths.tolist(), strict=True)]
    drafts = [data.draw(hostile_drafts(greedy(table, text, ROOM)))[:ROOM] for text in texts]

    # When they are decoded with a threshold
    state = toy_decode(
        table, prompts, make_drafts(drafts), jnp.full(rows, ROOM), jnp.full(rows, threshold), NO_KEYWORDS
    )

    # Then tokens and acceptance as a whole are those of the three steps
    expected = [paper(table, text, draft, ROOM, threshold) for text, draft in zip(texts, drafts, strict=True)]
    assert tokens_of(state) == [tokens for tokens, _ in expected]
    assert all(
        passes == 1 for passes, (_, whole) in zip(state.num_forward_passes.tolist(), expected, strict=True) if whole
    )


def test_one_wrong_token_costs_one_more_pass() -> None:
    # Given a text of 20 tokens one of which occurs only once, and a draft with another in its place
    for seed in range(100):
        table, prompts = random_model(seed), make_prompts(1, seed)
        table[:, END] = -100
        text = greedy(table, np.asarray(prompts.tokens)[0, : int(prompts.lengths[0])].tolist(), ROOM)
        place = next((i for i in range(3, 12) if text.count(text[i]) == 1), None)
        if place is not None and (text[place] + 4) % 8 not in text[place - 1 : place + 2]:
            break
    draft = list(text)
    draft[place] = (text[place] + 4) % 8

    # When decoded with windows that hold the rest
    keywords = no_keywords(1, states=8)
    state = toy_decode(
        table, prompts, make_drafts([draft]), jnp.array([ROOM]), jnp.array([jnp.inf]), keywords, window=16
    )

    # Then the prefill and one window suffice
    assert tokens_of(state) == [text]
    assert state.num_forward_passes.tolist() == [2]


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
        return toy_decode(*args)

    tables = dataclasses.replace(jax.tree.map(lambda _: PartitionSpec(), no_keywords(8, states=8)), starts=data)
    specs = (PartitionSpec(), data, data, data, data, tables)
    state = jax.jit(jax.shard_map(split, mesh=mesh, in_specs=specs, out_specs=data))(
        table, prompts, draft, limits, jnp.full(8, jnp.inf), no_keywords(8, states=8)
    )

    # Then passes are those that each row needs alone
    assert state.num_forward_passes.tolist() == [1, *[ROOM] * 7]
    assert tokens_of(state)[0] == text


# Re-alignment.

_WORDS = ["call", " dak", "f", "iki", " now", " dag", " at", " noon"]


@pytest.mark.parametrize(
    ("rule", "expected", "token", "proposed"),
    [
        ("nearest", 1, " dak", "f"),  # the expected token
        ("nearest", 1, "iki", " now"),  # others are left out
        ("nearest", 5, " dak", "f"),  # the decoder repeats itself
        ("nearest", 1, " dag", "f"),  # nowhere: as if it had replaced the expected one
        ("nearest", 7, " dag", None),  # past the end
        ("none", 1, " dak", None),
    ],
)
def test_where_the_draft_goes_on(rule: str, expected: int, token: str, proposed: str | None) -> None:
    # Given the draft "call dakfiki now at noon"
    text = ["call", " dak", "f", "iki", " now", " at", " noon"]
    draft = Draft(jnp.array([[*map(_WORDS.index, text), 1, 1]], jnp.int32), jnp.array([len(text)]))

    # When the decoder has written a token where the draft has position `expected`
    cursor = REALIGN[rule](draft, jnp.array([expected]), jnp.array([_WORDS.index(token)]))

    # Then the draft goes on at what the rule says, or not at all
    assert ([*text, None][int(cursor[0])]) == proposed
