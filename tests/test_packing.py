"""Packed rows: where they lie, how much is computed, and that the model says of them what it says of plain rows."""

import functools
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens.cases import CASES

from granite_jax.models import granite_speech
from granite_jax.models.layers import ctc
from granite_jax.models.layers.features import log_mel, num_frames
from granite_jax.models.layers.packed.features import packed_log_mel
from granite_jax.models.layers.packed.packing import Packing
from granite_jax.pretrained import open_checkpoint

SECOND = 16_000
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Config and random weights."""
    checkpoint = open_checkpoint(CASES["base"].write(tmp_path_factory.mktemp("base")))
    return checkpoint.config, checkpoint.load_params("float32")


def lengths_of(rng: np.random.Generator, rows: int, longest: int, shortest: int = 1) -> np.ndarray:
    """Random lengths, a third of them 0, and the longest."""
    lengths = rng.integers(shortest, longest + 1, rows, dtype=np.int32) * (rng.random(rows) > 1 / 3)
    lengths[rng.integers(rows)] = longest
    return lengths.astype(np.int32)


@pytest.mark.parametrize("seed", range(5))
def test_rows_lie_apart_and_every_position_knows_its_own(seed: int) -> None:
    # Given rows of random lengths, when they are packed with a gap at multiples of seven
    rng = np.random.default_rng(seed)
    lengths, gap = lengths_of(rng, 20, 90), int(rng.integers(0, 9))
    packing = Packing.of(jnp.asarray(lengths), 90, gap=gap, multiple=7)
    starts = np.asarray(packing.starts)

    # Then rows start at multiples, are a gap apart, and fit the capacity
    filled = np.flatnonzero(lengths)
    assert np.all(starts[filled] % 7 == 0) and packing.ends[-1] <= packing.capacity
    assert np.all(np.diff(starts[filled]) >= lengths[filled][:-1] + gap)
    # And positions belong to the row that they lie in
    rows, local, valid = map(np.asarray, packing.rows_of(jnp.arange(packing.capacity, dtype=jnp.int32)))
    expected = np.full(packing.capacity, -1)
    for row in filled:
        expected[starts[row] : starts[row] + lengths[row]] = row
    np.testing.assert_array_equal(np.where(valid, rows, -1), expected)
    np.testing.assert_array_equal(local[valid], np.arange(packing.capacity)[valid] - starts[rows[valid]])
    # And rows come back as they were
    back = np.asarray(packing.unpack(jnp.arange(packing.capacity, dtype=jnp.int32)))
    for row in filled:
        np.testing.assert_array_equal(back[row, : lengths[row]], starts[row] + np.arange(lengths[row]))


@pytest.mark.parametrize("lengths", [[0, 0], [1, 0], [256, 1], [300, 300]])
def test_only_chunks_that_hold_a_position_are_computed(lengths: list[int]) -> None:
    # Given rows of up to 300 positions, when a loop over their chunks counts
    packing = Packing.of(jnp.array(lengths, jnp.int32), 300)
    visited = packing.for_chunks(lambda start, seen: seen.at[start // packing.chunk].add(1), jnp.zeros(9, jnp.int32))
    # Then it visits each chunk up to the last position once
    count = -(-sum(lengths) // packing.chunk)
    assert visited.tolist() == [1] * count + [0] * (9 - count)
    assert int(packing.computed) == count * packing.chunk


@functools.partial(jax.jit, static_argnums=0)
def plain(config, params, samples, lengths):
    """Features, activations, CTC logits, labels and audio embeddings by row, and what is counted of each."""
    frames = num_frames(lengths)
    features = log_mel(samples, lengths)
    hidden = granite_speech.encode(config, params, features, frames).hidden
    logits = granite_speech.ctc_logits(config, params, hidden)
    valid = jnp.arange(features.shape[1], dtype=jnp.int32)[None, :] < frames[:, None]
    speech = jnp.sum(ctc.has_speech(logits) & valid, axis=1)
    audio = granite_speech.project(config, params, hidden, frames)
    by_frame = features, hidden, logits, ctc.best_labels(logits, frames)
    return by_frame, audio, (ctc.frame_entropy(logits, frames).max(axis=1), speech)


@functools.partial(jax.jit, static_argnums=0)
def packed(config, params, samples, lengths):
    """The same, packed and brought back."""
    packing = granite_speech.pack_frames(config, num_frames(lengths), num_frames(samples.shape[1]))
    features = packed_log_mel(samples, lengths, packing)
    _, _, output, labels, audio = granite_speech.encode_packed(config, params, features, packing)
    by_frame = features, output.hidden, labels.logits, labels.labels
    return tuple(map(packing.unpack, by_frame)), audio, (labels.entropy, labels.speech_frames)


def test_encoder_and_projector_say_the_same_of_packed_rows(model) -> None:
    # Given eighteen rows of noise, an empty one, one of the fewest samples and one of the most among them
    config, params = model
    rng = np.random.default_rng(0)
    lengths = lengths_of(rng, 18, 3 * SECOND, 400)
    lengths[:3] = 0, 400, 3 * SECOND
    samples = rng.normal(0, 0.1, (18, 3 * SECOND)).astype(np.float32)

    # When they are encoded, then each is what the plain functions make of it
    expected, found = plain(config, params, samples, np.maximum(lengths, 400)), packed(config, params, samples, lengths)
    filled = np.flatnonzero(lengths)
    frames = num_frames(lengths)
    for row in filled:
        for ours, theirs in zip(found[0], expected[0], strict=True):
            np.testing.assert_allclose(ours[row, : frames[row]], theirs[row, : frames[row]], atol=3e-5)
        size = config.num_audio_tokens(frames[row])
        np.testing.assert_allclose(found[1][row, :size], expected[1][row, :size], atol=3e-5)
    for ours, theirs in zip(found[2], expected[2], strict=True):
        np.testing.assert_allclose(ours[filled], theirs[filled], atol=3e-5)

    # And when one is not finite, then the others stay what they are
    middle = filled[len(filled) // 2]
    dirty = np.where(np.arange(18)[:, None] == middle, np.float32(np.nan), samples)
    (_, hidden, *_), audio, _ = packed(config, params, dirty, lengths)
    assert not np.isfinite(audio[middle, 0]).any()
    for row in set(filled) - {middle}:
        np.testing.assert_allclose(hidden[row, : frames[row]], found[0][1][row, : frames[row]], atol=1e-6)


prefill = jax.jit(granite_speech.prefill, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def scores(config, params, tokens, lengths, audio, draft, draft_lengths):
    """The best logit after each prompt and each draft token, and the cache."""

    def best(logits, _):
        return logits.max(axis=-1)

    operand = jnp.zeros((len(tokens), draft.shape[1] + 1))
    inputs = tokens, lengths, audio, draft, draft_lengths, best, operand
    return granite_speech.prefill_packed(config, params, *inputs, capacity=tokens.shape[1] + draft.shape[1] + 8)


def test_the_language_model_says_the_same_of_packed_prompts(model) -> None:
    # Given rows whose prompts with audio, and drafts, take several chunks each, and an empty row
    config, params = model
    rng = np.random.default_rng(1)
    rows, width, drafted = 6, 300, 60
    lengths = np.array([300, 20, 0, 280, 1, 150], np.int32)
    draft_lengths = np.array([60, 0, 0, 7, 1, 60], np.int32)
    tokens = rng.integers(0, 250, (rows, width), dtype=np.int32)
    tokens[:, 5:15] = config.audio_token_id
    draft = rng.integers(0, 250, (rows, drafted), dtype=np.int32)
    audio = jnp.asarray(rng.standard_normal((rows, 10, config.decoder.hidden_size), np.float32))

    # When they are run packed
    found, cache = scores(config, params, tokens, lengths, audio, draft, draft_lengths)

    # Then logits, keys and values are those of plain rows
    ends = lengths + draft_lengths
    joined = np.zeros((rows, width + drafted), np.int32)
    for row in range(rows):
        joined[row, : ends[row]] = *tokens[row, : lengths[row]], *draft[row, : draft_lengths[row]]
    positions = np.clip(lengths[:, None] - 1 + np.arange(drafted + 1, dtype=np.int32), 0, width + drafted - 1)
    logits, expected = prefill(config, params, joined, lengths, audio, logit_positions=positions)
    for row in np.flatnonzero(lengths):
        size = draft_lengths[row] + 1
        np.testing.assert_allclose(found[row, :size], logits.max(axis=-1)[row, :size], atol=3e-5)
        for ours, theirs in ((cache.k, expected.k), (cache.v, expected.v)):
            np.testing.assert_allclose(ours[:, row, :, : ends[row]], theirs[:, row, :, : ends[row]], atol=3e-5)
    np.testing.assert_array_equal(cache.lengths, lengths)

    # And when the audio of one is not finite, then the others stay what they are
    broken, _ = scores(config, params, tokens, lengths, audio.at[1].set(jnp.nan), draft, draft_lengths)
    assert not np.isfinite(broken[1, 0])
    for row in (0, 3, 4, 5):
        size = draft_lengths[row] + 1
        np.testing.assert_allclose(broken[row, :size], found[row, :size], atol=1e-6)


def test_little_is_computed_that_nobody_needs() -> None:
    # Given a hundred durations in any order, when the engine's batches of eight are counted
    sys.path.insert(0, str(BENCHMARKS.parent))
    waste = SimpleNamespace(**runpy.run_path(str(BENCHMARKS / "waste.py")))
    durations = np.random.default_rng(5).uniform(2, 25, 96).tolist()
    found = waste.run(waste.release(waste.MODEL).config, durations, 8)
    # Then each utterance went once, and the counts are near the least, and not below
    assert found.batches >= 12
    ratios = found.ratios()
    for name in ("frames", "windows", "positions", "decode_bytes", "flops"):
        assert 1 <= ratios[name] < 1.15, name
