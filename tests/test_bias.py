"""Biases and choices in the decode loop, against the same loop in plain Python, and what each of their methods does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_speculation import (
    CAPACITY,
    END,
    NEVER,
    ROOM,
    VOCABULARY,
    History,
    biased_decode,
    hostile_drafts,
    logits_of,
    make_drafts,
    make_prompts,
    pooled,
    random_model,
    tokens_of,
)

from granite_jax.decoding import Choice, Greedy, LogitBias, NoBias, Selection, greedy_decode
from granite_jax.keywords.automaton import Phrase, no_keywords
from granite_jax.keywords.bias import KeywordBias

PUSH = 2.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quota:
    """A toy bias whose states have two leaves: a token is forbidden after `quota` times, and pushes the next id.

    States: counts int32 `[b, v]`, of each token, and int32 `[b]`, the last token, -1 before the first.
    """

    used: jax.Array  # [b, v], counts before the first token
    quotas: jax.Array  # [b]

    @property
    def starts(self):
        return {"counts": self.used, "last": jnp.zeros_like(self.quotas) - 1}

    def boosts(self, states) -> jax.Array:
        forbidden = states["counts"] >= self.quotas[:, None, None]
        pushed = jax.nn.one_hot(jnp.where(states["last"] < 0, -1, (states["last"] + 1) % VOCABULARY), VOCABULARY) > 0
        return jnp.where(forbidden, -jnp.inf, jnp.where(pushed, jnp.float32(PUSH), jnp.float32(0.0)))

    def add(self, logits, states):
        return logits + self.boosts(states)

    def best(self, logits, states, unbiased):
        return jnp.argmax(self.add(logits, states), axis=-1).astype(jnp.int32)

    def advance(self, states, tokens):
        rows = jnp.arange(len(tokens))
        return {"counts": states["counts"].at[rows, tokens].add(1), "last": tokens}

    def walk(self, states, tokens, count):
        path = [states]
        for column in range(tokens.shape[1]):
            path.append(self.advance(path[-1], tokens[:, column]))
        states = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *path)
        before = jax.tree.map(lambda x: x[:, :-1], states)
        return states, jnp.take_along_axis(self.boosts(before), tokens[..., None], axis=2)[..., 0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """A toy choice: draws from the biased distribution with a seed for each row, int32 `[b]`."""

    seeds: jax.Array
    end_of_text: int = dataclasses.field(default=END, metadata={"static": True})

    def pick(self, logits, bias, states, positions):
        draw = jax.vmap(jax.vmap(noise, (None, 0)))(self.seeds, positions)
        tokens = jnp.argmax(bias.add(logits, states) + draw, axis=-1).astype(jnp.int32)
        return Selection(tokens, self.log_probs(logits, tokens))

    def log_probs(self, logits, tokens):
        return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]


@jax.jit
def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
    return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (VOCABULARY,), jnp.float32)


decode = jax.jit(biased_decode, static_argnames=("window", "realign"))


@dataclasses.dataclass
class Row:
    """One row of a batch, decoded one token at a time."""

    table: np.ndarray
    prompt: list[int]
    used: np.ndarray
    quota: int
    seed: int | None  # None: greedy

    def logits(self, text: list[int]) -> np.ndarray:
        history = np.zeros(CAPACITY, np.int64)
        history[: len(self.prompt) + len(text)] = self.prompt + text
        logits = np.array(logits_of(self.table, history, len(self.prompt) + len(text)), np.float32)
        if self.seed is None:
            logits[NEVER] = -np.inf
        return logits

    def boosts(self, text: list[int]) -> np.ndarray:
        boosts = np.zeros(VOCABULARY, np.float32)
        if text:
            boosts[(text[-1] + 1) % VOCABULARY] = PUSH
        boosts[self.used + np.bincount(text, minlength=VOCABULARY) >= self.quota] = -np.inf
        return boosts

    def next(self, text: list[int]) -> int:
        logits = self.logits(text)
        if self.seed is not None:
            return int(np.argmax(logits + self.boosts(text) + noise(jnp.int32(self.seed), jnp.int32(len(text)))))
        if np.argmax(logits) == END:
            return END
        logits[END] = -np.inf
        return int(np.argmax(logits + self.boosts(text)))

    def decode(self, limit: int, start: list[int] | None = None) -> list[int]:
        text = list(start or [])
        while len(text) < limit and (token := self.next(text)) != END:
            text.append(token)
        return text

    def relaxed(self, draft: list[int], threshold: float) -> list[int]:
        """The text after the likely part of a draft, whose likelihoods the bias multiplies, up to 1."""
        for place, token in enumerate([*draft, END]):
            logits = self.logits(draft[:place]).astype(np.float64)
            boost = self.boosts(draft[:place])[token] if place < len(draft) else 0.0
            if np.exp(min(logits[token] - np.log(np.exp(logits).sum()) + boost, 0)) <= threshold:
                return self.decode(ROOM, draft[:place])
        return draft


def make_rows(rows: int, seed: int, *, drawn: bool = False) -> tuple[History, list[Row]]:
    """Rows whose quotas differ, and which have used some of them before their first token."""
    rng = np.random.default_rng(seed)
    table, prompts = random_model(seed), make_prompts(rows, seed)
    used = rng.integers(0, 2, (rows, VOCABULARY))
    texts = [np.asarray(row)[:n].tolist() for row, n in zip(prompts.tokens, prompts.lengths.tolist(), strict=True)]
    return prompts, [
        Row(table, text, used[i], 4 + int(rng.integers(0, 2)), 100 * seed + i if drawn else None)
        for i, text in enumerate(texts)
    ]


def bias_of(rows: list[Row]) -> Quota:
    return Quota(jnp.array([row.used for row in rows], jnp.int32), jnp.array([row.quota for row in rows], jnp.int32))


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize(("num_rows", "window", "realign"), [(5, 4, "nearest"), (3, 1, "none")])
@given(data=st.data(), seed=st.integers(0, 10_000))
def test_any_bias_and_choice_write_what_a_plain_loop_writes(
    num_rows: int, window: int, realign: str, drawn: bool, data: st.DataObject, seed: int
) -> None:
    # Given a bias with states of two leaves, a choice, greedy or drawn by row and position, and drafts up to hostile
    prompts, rows = make_rows(num_rows, seed, drawn=drawn)
    limits = data.draw(st.lists(st.integers(0, ROOM), min_size=num_rows, max_size=num_rows))
    drafts = [data.draw(hostile_drafts(row.decode(ROOM))) for row in rows]
    seeds = jnp.array([row.seed or 0 for row in rows], jnp.int32)
    choice: Choice = Drawn(seeds) if drawn else Greedy(END, (NEVER,))

    # When decoded in windows, with proposals accepted, rejected and found again
    state = decode(
        rows[0].table,
        prompts,
        make_drafts(drafts),
        jnp.array(limits, jnp.int32),
        jnp.full(num_rows, jnp.inf),
        bias_of(rows),
        choice,
        window=window,
        realign=realign,
    )

    # Then the tokens are those of one row and one token at a time
    assert tokens_of(state) == [row.decode(limit) for row, limit in zip(rows, limits, strict=True)]


@given(data=st.data(), seed=st.integers(0, 10_000), threshold=st.sampled_from([0.0, 0.02, 0.2, 0.6]))
def test_a_bias_counts_for_the_likelihood_of_a_draft(data: st.DataObject, seed: int, threshold: float) -> None:
    # Given drafts that a biased model finds more or less plausible
    prompts, rows = make_rows(4, seed)
    drafts = [[t for t in data.draw(hostile_drafts(row.decode(ROOM))) if t != END][:ROOM] for row in rows]

    # When decoded with a threshold
    thresholds = jnp.full(4, threshold, jnp.float32)
    limits, choice = jnp.full(4, ROOM), Greedy(END, (NEVER,))
    state = decode(rows[0].table, prompts, make_drafts(drafts), limits, thresholds, bias_of(rows), choice)

    # Then that part of each draft is kept which exceeds it with what the bias adds
    assert tokens_of(state) == [row.relaxed(draft, threshold) for row, draft in zip(rows, drafts, strict=True)]


def keyword_bias() -> KeywordBias:
    lists = [(Phrase((1, 3, 4), 6.0), Phrase((3, 4), 3.0), Phrase((4,), 5.0)), (), (Phrase((1, 1), 2.0, False),)]
    return KeywordBias.from_automata(jax.tree.map(jnp.asarray, pooled(lists)), VOCABULARY)


def poisoned_bias() -> KeywordBias:
    """Without keywords; tables that would boost every token, if they were read."""
    automata = jax.tree.map(jnp.asarray, no_keywords(3, states=8))
    first = jnp.arange(9, dtype=jnp.int32)
    tables = dataclasses.replace(automata, failures=automata.failures + 1, first=first, boosts=automata.boosts + 1e6)
    return KeywordBias.from_automata(tables, VOCABULARY)


def quota_bias() -> Quota:
    return bias_of(make_rows(3, seed=0)[1])


@pytest.mark.parametrize("make_bias", [NoBias, keyword_bias, poisoned_bias, quota_bias])
def test_the_methods_of_a_bias_agree(make_bias) -> None:
    # Given a bias, texts that it has to do with, and logits of which some are minus infinity
    bias, length = make_bias(), 8
    assert isinstance(bias, LogitBias)
    tokens = jnp.array([[1, 3, 4, 4, 1, 1, 3, 4], [1, 3, 4, 4, 4, 4, 4, 4], [1, 1, 3, 4, 1, 1, 4, 4]], jnp.int32)
    logits = 3 * jax.random.normal(jax.random.key(0), (3, length + 1, VOCABULARY), jnp.float32)
    logits = logits.at[:, 2:4, 1:5].set(1.0).at[:, :, NEVER].set(-jnp.inf)

    # When it walks over a text, and when it advances a token at a time
    path, boosts = bias.walk(bias.starts, tokens, jnp.int32(length))
    advanced = [bias.starts]
    for column in range(length):
        advanced.append(bias.advance(advanced[-1], tokens[:, column]))

    # Then the states are the same
    expected = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *advanced)
    jax.tree.map(np.testing.assert_array_equal, path, expected)
    # And what is added to logits is what the walk says of its tokens
    biased = bias.add(logits, path)
    before, after = (jnp.take_along_axis(x[:, :-1], tokens[..., None], axis=2)[..., 0] for x in (logits, biased))
    np.testing.assert_allclose(after, before + boosts, rtol=1e-6)
    assert np.all(np.isneginf(biased[..., NEVER]))
    # And the best tokens are those of the biased logits, or as given where nothing is added
    unbiased = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    best = bias.best(logits, path, unbiased)
    np.testing.assert_array_equal(best, jnp.argmax(biased, axis=-1))
    assert bool((best != unbiased).any()) == (make_bias in (keyword_bias, quota_bias))


def test_a_walk_of_no_tokens_ends_where_it_begins() -> None:
    # Given states of keywords, when a walk counts none of its tokens, then the first state is that given
    bias = keyword_bias()
    states = bias.advance(bias.starts, jnp.array([1, 1, 1], jnp.int32))
    path, _ = bias.walk(states, jnp.array([[3], [3], [1]], jnp.int32), jnp.int32(0))
    assert path[:, 0].tolist() == states.tolist()
    assert bias.walk(states, jnp.zeros((3, 0), jnp.int32), jnp.int32(0))[0].shape == (3, 1)


def test_keywords_boost_the_next_token_and_not_the_row_beside_it() -> None:
    # Given a list in the first row, none in the second, and one at the beginning of the third
    bias = keyword_bias()
    zeros = jnp.zeros((3, 1, VOCABULARY))

    # When a row's token continues a keyword, and when it does not
    begun = bias.add(zeros, bias.starts[:, None])[:, 0]
    states = bias.advance(bias.starts, jnp.array([1, 1, 1], jnp.int32))
    continued = bias.add(zeros, states[:, None])[:, 0]

    # Then each of the next tokens gets its largest boost, in this row alone
    assert np.flatnonzero(begun[0]).tolist() == np.flatnonzero(continued[0]).tolist() == [1, 3, 4]
    assert continued[0, 3] > begun[0, 3] > 0
    assert not begun[1].any() and not continued[1].any()
    assert (np.flatnonzero(begun[2]).tolist(), np.flatnonzero(continued[2]).tolist()) == ([1], [1])


def test_no_bias_adds_nothing_to_a_program() -> None:
    # Given the methods of no bias in one program
    bias = NoBias()

    def run(logits: jax.Array, tokens: jax.Array) -> object:
        states, boosts = bias.walk(bias.starts, tokens, tokens.max())
        best = bias.best(bias.add(logits, states), states, tokens)
        return bias.advance(states, tokens[:, 0]), boosts, best

    # When compiled, then no loop, condition or array over the vocabulary is there
    text = str(jax.jit(run).lower(jnp.zeros((2, 3, 977)), jnp.zeros((2, 3), jnp.int32)).compile().as_text())
    assert not any(word in text for word in ("while", "conditional", "977"))


def test_no_bias_and_no_keywords_write_greedy_text() -> None:
    # Given a random model, and neither drafts nor keywords
    table, prompts = random_model(7), make_prompts(3, 7)
    limits, thresholds = jnp.full(3, ROOM), jnp.full(3, jnp.inf)
    run = functools.partial(decode, table, prompts, make_drafts([[]] * 3), limits, thresholds)

    # When decoded without a bias, and with one whose batch has no keywords and whose tables must not be read
    plain, poisoned = run(NoBias(), Greedy(END)), run(poisoned_bias(), Greedy(END))

    # Then the states have no arrays, the roots no boosts, and both texts are those of `greedy_decode`
    assert jax.tree.leaves(plain.bias_states) == []
    assert not poisoned_bias().root_boosts.any()
    logits = jax.vmap(logits_of, (None, 0, 0))(jnp.asarray(table), prompts.tokens, prompts.lengths)[:, None]

    def step(tokens: jax.Array, cache: History) -> tuple[jax.Array, History]:
        history = jax.vmap(lambda row, token, at: row.at[at].set(token))(cache.tokens, tokens[:, 0], cache.lengths)
        after = jax.vmap(logits_of, (None, 0, 0))(jnp.asarray(table), history, cache.lengths + 1)
        return after[:, None], History(history, cache.lengths + 1)

    greedy = greedy_decode(step, logits, prompts, limits, max_out_length=ROOM, end_of_text=END)
    assert tokens_of(plain) == tokens_of(poisoned) == tokens_of(greedy)
    np.testing.assert_array_equal(plain.log_probs, poisoned.log_probs)


def pick(choice: Greedy, logits: list[float], boosts: list[float]) -> Selection:
    """Of one position, with these boosts."""

    class Fixed(NoBias):
        def best(self, logits, states, unbiased):
            return jnp.argmax(logits + jnp.array([[boosts]]), axis=-1).astype(jnp.int32)

    return choice.pick(jnp.array([[logits]]), Fixed(), (), jnp.zeros((1, 1), jnp.int32))


@pytest.mark.parametrize(
    ("logits", "boosts", "token"),
    [
        ([1.0, 2.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0], 1),
        ([1.0, 2.0, 0.0, 0.5], [1.5, 0.0, 0.0, 0.0], 0),  # boosted
        ([1.0, 1.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0], 0),  # the first of equals
        ([1.0, 2.0, 3.0, 0.5], [0.0, 5.0, 0.0, 0.0], 2),  # 2 is the end: a boost does not suppress it
        ([1.0, 2.0, 1.5, 0.5], [0.0, 0.0, 5.0, 0.0], 1),  # nor cause it
        ([1.0, 2.0, 0.0, 9.0], [0.0, 0.0, 0.0, 5.0], 1),  # 3 is never picked
        ([1.0, 2.0, 3.0, 9.0], [0.0, 0.0, 0.0, 0.0], 2),  # nor does it hide the end
    ],
)
def test_greedy_picks_the_best_token_but_ends_without_boosts(
    logits: list[float], boosts: list[float], token: int
) -> None:
    # Given logits and boosts of one position, when a token is picked
    choice = Greedy(end_of_text=2, suppress_tokens=(3,))
    assert isinstance(choice, Choice)
    selection = pick(choice, logits, boosts)

    # Then it is this one, with its log-probability before boosts, among the tokens that can be picked
    assert selection.tokens.tolist() == [[token]]
    expected = logits[token] - np.log(np.exp(logits[:3]).sum())
    np.testing.assert_allclose(selection.log_probs, [[expected]], rtol=1e-6)
    scored = choice.log_probs(jnp.array([[logits]]), jnp.array([[token]]))
    np.testing.assert_allclose(scored, [[expected]], rtol=1e-6)
