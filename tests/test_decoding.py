"""The decode loop against the same loop in plain Python."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from granite_jax.decoding import DecodeState, greedy_decode

VOCABULARY, CAPACITY, END = 13, 40, 5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """A toy cache: the tokens themselves, `[b, s]`, of which `lengths` count; `steps` counts the decoder's runs."""

    tokens: jax.Array
    lengths: jax.Array
    steps: jax.Array

    def rolled_back(self, lengths: jax.Array) -> "History":
        return dataclasses.replace(self, lengths=lengths)


def toy_logits(history, length):
    """Logits of one row: a different order of the vocabulary for every history. Works on numpy and on jax."""
    xp = jnp if isinstance(history, jax.Array) else np
    place = xp.arange(CAPACITY)
    digest = xp.sum(xp.where(place < length, history * (place * place + 3) + place, 0))
    return ((digest + 1) * (xp.arange(VOCABULARY) * 7 + 3) % 101).astype(xp.float32)


def toy_step(tokens: jax.Array, cache: History) -> tuple[jax.Array, History]:
    """As `Decoder`: each row's token goes to the row's own length."""
    written = jax.vmap(lambda row, token, length: row.at[length].set(token))
    history = written(cache.tokens, tokens[:, 0], cache.lengths)
    lengths = cache.lengths + 1
    return jax.vmap(toy_logits)(history, lengths)[:, None], History(history, lengths, cache.steps + 1)


def prompts(rows: int, seed: int) -> History:
    """Prompts of several lengths, with rubbish after them."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCABULARY, (rows, CAPACITY))
    lengths = rng.integers(3, 9, rows)
    return History(jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32), jnp.zeros(1, jnp.int32))


@functools.partial(jax.jit, static_argnames=("length", "never"))
def decode(cache: History, limits: jax.Array, length: int, never: tuple[int, ...] = ()) -> DecodeState:
    logits = jax.vmap(toy_logits)(cache.tokens, cache.lengths)[:, None]
    return greedy_decode(toy_step, logits, cache, limits, max_out_length=length, end_of_text=END, suppress_tokens=never)


def decode_row(cache: History, row: int, limit: int, never: tuple[int, ...] = ()) -> tuple[list[int], int, bool]:
    """(tokens, decoder passes, whether the text ended), one token at a time."""
    history, length = np.array(cache.tokens[row]), int(cache.lengths[row])
    produced: list[int] = []
    passes = 1
    while len(produced) < limit:
        logits = toy_logits(history, length)
        logits[list(never)] = -np.inf
        chosen = int(np.argmax(logits))
        if chosen == END:
            return produced, passes, True
        produced.append(chosen)
        if len(produced) < limit:
            history[length], length, passes = chosen, length + 1, passes + 1
    return produced, passes, False


def tokens_of(state: DecodeState, row: int) -> list[int]:
    return np.asarray(state.tokens)[row, : int(state.num_tokens[row])].tolist()


@pytest.mark.parametrize("never", [(), (2, 11)])
def test_every_row_is_what_a_plain_loop_makes_of_it(never: tuple[int, ...]) -> None:
    # Given rows with prompts of several lengths and limits of their own, when they are decoded together
    cache, limits = prompts(rows=40, seed=0), np.random.default_rng(1).integers(1, 25, 40)
    state = decode(cache, jnp.asarray(limits, jnp.int32), length=25, never=never)

    # Then each has the tokens, passes and end it has alone, and both kinds of end occur
    expected = [decode_row(cache, row, int(limits[row]), never) for row in range(40)]
    found = [(tokens_of(state, row), int(state.num_forward_passes[row]), bool(state.ended[row])) for row in range(40)]
    assert found == expected
    assert {ended for _, _, ended in expected} == {True, False}
    assert not {token for tokens, _, _ in found for token in tokens} & {*never, END}


def test_nothing_follows_the_last_token() -> None:
    # Given a decoded batch, then the result past each row's count is zero
    state = decode(prompts(rows=16, seed=2), jnp.full(16, 9, jnp.int32), length=12)
    past = np.arange(12) >= np.asarray(state.num_tokens)[:, None]
    assert not np.asarray(state.tokens)[past].any()


def test_rows_without_a_limit_to_fill_cost_nothing() -> None:
    # Given rows of limit 0 only, when they are decoded, then the decoder never runs
    state = decode(prompts(rows=4, seed=3), jnp.zeros(4, jnp.int32), length=8)
    assert state.num_tokens.tolist() == [0] * 4
    assert state.num_forward_passes.tolist() == [1] * 4
    assert state.cache.steps.tolist() == [0]


def test_the_loop_stops_with_its_slowest_row() -> None:
    # Given rows that need different numbers of passes, with fill-up rows among them
    cache, limits = prompts(rows=12, seed=4), [3, 0, 20, 1, 7, 0, 2, 4, 5, 6, 8, 9]

    # When they are decoded, then the decoder runs as often as the slowest row needs: the prefill was a pass of its own
    state = decode(cache, jnp.asarray(limits, jnp.int32), length=20)
    slowest = max(decode_row(cache, row, limit)[1] for row, limit in enumerate(limits))
    assert slowest > 3
    assert state.cache.steps.tolist() == [slowest - 1]


def test_finished_rows_leave_their_cache_alone() -> None:
    # Given a row whose limit is reached long before the other's, when both are decoded
    cache = prompts(rows=2, seed=5)
    state = decode(cache, jnp.asarray([2, 25], jnp.int32), length=25, never=(END,))

    # Then its length stays at prompt and tokens without the last one, which was never run
    assert state.num_tokens.tolist() == [2, 25]
    assert (state.cache.lengths - cache.lengths).tolist() == [1, 24]


def test_devices_finish_on_their_own() -> None:
    # Given a batch split over eight devices, when each runs its own loop under shard_map
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    cache, limits = prompts(rows=16, seed=6), np.random.default_rng(7).integers(0, 25, 16)
    data = PartitionSpec("data")
    split = jax.jit(
        jax.shard_map(functools.partial(decode, length=25), mesh=mesh, in_specs=(data, data), out_specs=data)
    )
    state = split(dataclasses.replace(cache, steps=jnp.zeros(8, jnp.int32)), jnp.asarray(limits, jnp.int32))

    # Then tokens are those of one device, and each stopped with its own slowest row
    expected = [decode_row(cache, row, int(limits[row])) for row in range(16)]
    assert [tokens_of(state, row) for row in range(16)] == [tokens for tokens, _, _ in expected]
    assert state.cache.steps.tolist() == [max(expected[2 * i][1], expected[2 * i + 1][1]) - 1 for i in range(8)]
    assert len(set(state.cache.steps.tolist())) > 1


def test_finished_rows_are_empty_to_the_decoder() -> None:
    # Given a long row that takes one token and a short one that takes more, and a decoder that notes its longest row
    cache = prompts(2, seed=0)
    cache = dataclasses.replace(cache, lengths=jnp.array([30, 5], jnp.int32))

    def noting_step(tokens: jax.Array, cache: History) -> tuple[jax.Array, History]:
        longest = jnp.maximum(cache.steps, cache.lengths.max())
        logits, cache = toy_step(tokens, cache)
        return logits, dataclasses.replace(cache, steps=longest)

    # When they are decoded
    logits = jax.vmap(toy_logits)(cache.tokens, cache.lengths)[:, None]
    limits = jnp.array([1, 8], jnp.int32)
    state = greedy_decode(noting_step, logits, cache, limits, max_out_length=8, end_of_text=VOCABULARY)
    # Then no step has seen the long row, and the cache's lengths are those of the tokens
    assert state.num_tokens.tolist() == [1, 8]
    assert state.cache.steps.tolist() == [5 + 7 - 1]
    assert state.cache.lengths.tolist() == [30, 5 + 7]
