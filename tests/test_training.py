"""Losses, optimizer steps, batches and evaluation of the embedded checkpoint's recipe."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from granite_jax.models import granite_speech
from granite_jax.models.granite_speech.config import Config
from granite_jax.models.layers.features import num_frames
from granite_jax.training import batches, steps
from granite_jax.training.recipes.demo import recipe

TINY = recipe.CONFIG | {
    "encoder_config": recipe.CONFIG["encoder_config"]
    | {"num_layers": 2, "hidden_dim": 32, "num_heads": 2, "dim_head": 16, "conv_kernel_size": 5},
    "projector_config": recipe.CONFIG["projector_config"]
    | {"hidden_size": 32, "encoder_hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64},
    "text_config": recipe.CONFIG["text_config"] | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1},
}


@pytest.fixture(scope="module")
def config() -> Config:
    return Config.from_dict(TINY)


@pytest.fixture(scope="module")
def params(config):
    return jax.jit(functools.partial(granite_speech.init, config))(jax.random.key(0))


def promoting(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer under JAX's own rules of promotion: optax takes powers of floats to integer counts of steps."""

    def update(*args):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(*args)

    return optax.GradientTransformation(optimizer.init, update)


@pytest.mark.slow
def test_ctc_steps_learn_one_batch_and_keep_real_running_statistics(config, params):
    # Given one batch of noise with labels, and a fresh encoder
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(2, 16_000)).astype(np.float32)
    lengths, labels = np.array([16_000, 12_000]), rng.integers(97, 123, (2, 8))
    label_lengths = np.array([8, 5])
    optimizer = promoting(steps.make_optimizer(3e-3, 40, 2))
    state = steps.TrainState({"encoder": params["encoder"]}, None)
    state = steps.TrainState(state.params, optimizer.init(state.params))
    before = params["encoder"]["layers"]["convolution"]["batch_norm"]
    step = steps.ctc_step(config, optimizer)
    # When trained on it
    losses = []
    for i in range(25):
        state, loss = step(state, jax.random.key(i), samples, lengths, labels, label_lengths)
        losses.append(float(loss))
    # Then the loss falls, and the statistics have left their initial values without becoming negative
    after = state.params["encoder"]["layers"]["convolution"]["batch_norm"]
    assert losses[-1] < 0.8 * losses[0]
    assert not np.allclose(after["mean"], before["mean"]) and not np.allclose(after["var"], before["var"])
    assert np.all(np.asarray(after["var"]) > 0)


@pytest.mark.slow
def test_bpe_steps_learn_one_batch_on_a_frozen_encoder(config, params):
    # Given one batch of noise with tokens, a fresh encoder that stays as it is, and an empty head of nine labels
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(2, 16_000)).astype(np.float32)
    lengths, labels, label_lengths = np.array([16_000, 12_000]), rng.integers(1, 9, (2, 5)), np.array([5, 3])
    config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, bpe_output_dim=9))
    optimizer = promoting(steps.make_optimizer(3e-2, 60, 2))
    head = {"out_bpe": {"kernel": jnp.zeros((32, 9)), "bias": jnp.zeros(9)}}
    state = steps.TrainState(head, optimizer.init(head))
    step = steps.bpe_step(config, optimizer, params["encoder"])
    # When trained on it
    losses = []
    for _ in range(40):
        state, loss = step(state, samples, lengths, labels, label_lengths)
        losses.append(float(loss))
    # Then the loss falls
    assert losses[-1] < 0.6 * losses[0]


def test_batch_statistics_ignore_padding(config, params):
    # Given the same utterance alone, and padded with garbage
    features = jnp.asarray(np.random.default_rng(1).normal(size=(1, 30, 160)), jnp.float32)
    padded = jnp.concatenate([features, jnp.full((1, 20, 160), 50.0)], axis=1)
    # When encoded in training mode
    alone = granite_speech.encode(config, params, features, jnp.array([30]), train=True)
    other = granite_speech.encode(config, params, padded, jnp.array([30]), train=True)
    # Then statistics and activations agree
    np.testing.assert_allclose(alone.batch_statistics.mean, other.batch_statistics.mean, atol=1e-5)
    np.testing.assert_allclose(alone.batch_statistics.var, other.batch_statistics.var, rtol=1e-4)
    np.testing.assert_allclose(alone.hidden, other.hidden[:, :30], atol=1e-4)


def test_lm_loss_is_the_mean_over_the_answer_alone(config, params):
    # Given a prompt of three tokens and answers of two and one tokens
    hidden = jnp.asarray(np.random.default_rng(2).normal(size=(2, 15, 32)), jnp.float32)
    audio = config.audio_token_id
    tokens = jnp.array([[audio, audio, audio, 9, 7, 8], [audio, audio, audio, 9, 7, 0]])
    lengths, prompt_lengths = jnp.array([6, 5]), jnp.array([4, 4])
    # When the loss is computed
    loss = steps.lm_loss(config, params, hidden, jnp.array([15, 15]), tokens, tokens, prompt_lengths, lengths)
    # Then it is the mean negative log-likelihood of exactly those three tokens
    embeddings = granite_speech.project(config, params, hidden, jnp.array([15, 15]))
    positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
    logits, _ = granite_speech.prefill(
        config, params, tokens[:, :-1], lengths - 1, embeddings, logit_positions=positions
    )
    likelihood = jax.nn.log_softmax(logits)
    wanted = [likelihood[0, 3, 7], likelihood[0, 4, 8], likelihood[1, 3, 7]]
    np.testing.assert_allclose(loss, -np.mean(wanted), rtol=1e-5)


def test_lm_loss_asks_for_what_was_said_after_a_history_with_mistakes(config, params):
    # Given an answer of three tokens, the second of which is misheard in the history
    hidden = jnp.asarray(np.random.default_rng(2).normal(size=(1, 15, 32)), jnp.float32)
    audio, frames = config.audio_token_id, jnp.array([15])
    said, history = jnp.array([[audio, audio, audio, 9, 7, 8, 1]]), jnp.array([[audio, audio, audio, 9, 7, 300, 1]])
    # When the loss is computed
    loss = steps.lm_loss(config, params, hidden, frames, history, said, jnp.array([4]), jnp.array([7]))
    # Then it is that of what was said, where the decoder reads the mistake
    embeddings = granite_speech.project(config, params, hidden, frames)
    logits, _ = granite_speech.prefill(
        config, params, history[:, :-1], jnp.array([6]), embeddings, logit_positions=jnp.array([[3, 4, 5]])
    )
    likelihood = jax.nn.log_softmax(logits)[0]
    np.testing.assert_allclose(loss, -np.mean([likelihood[0, 7], likelihood[1, 8], likelihood[2, 1]]), rtol=1e-5)


def test_losses_of_batches_in_which_nothing_is_said_are_finite(config, params):
    # Given a second of noise that says nothing
    nothing, frames = jnp.zeros((1, 4), jnp.int32), jnp.array([50])
    features = jnp.asarray(np.random.default_rng(1).normal(size=(1, 50, 160)), jnp.float32)
    hidden = jnp.asarray(np.random.default_rng(2).normal(size=(1, 50, 32)), jnp.float32)
    alignment = jnp.zeros((64, config.decoder.vocab_size))
    tokens = jnp.array([[*[config.audio_token_id] * 12, 9, 1, 0]])
    # When the losses are computed
    ctc, _ = steps.ctc_loss(config, params, features, frames, nothing, jnp.array([0]))
    lm = steps.lm_loss(
        config, {**params, "alignment": alignment}, hidden, frames, tokens, tokens, jnp.array([13]), jnp.array([14])
    )
    # Then they are numbers
    assert np.isfinite(ctc) and ctc > 0
    assert np.isfinite(lm) and lm > 0


def test_corruption_is_of_the_answer_alone_and_as_frequent_as_asked():
    # Given many rows of one token, whose answers start at 5
    tokens = np.full((2000, 25), 7, np.int32)
    # When half of them are corrupted, up to 30 %
    corrupted = batches.corrupt(np.random.default_rng(0), tokens, np.full(2000, 5), 0.5, 0.3, range(100, 200))
    # Then
    wrong = corrupted != tokens
    assert not wrong[:, :5].any() and set(corrupted[wrong].tolist()) == set(range(100, 200))
    assert wrong[:, 5:].mean() == pytest.approx(0.5 * 0.15, rel=0.1)
    assert (~wrong.any(axis=1)).mean() > 0.5


def test_an_interrupted_stage_goes_on_where_it_was_saved(tmp_path, monkeypatch):
    # Given a stage that adds what each step is made of, saves every two steps, and is interrupted at the fourth
    monkeypatch.setattr(recipe, "SAVE_EVERY", 2)
    seen = []

    def run(stop):
        def inputs(index, item):
            if index == stop:
                raise KeyboardInterrupt
            seen.append((index, item))
            return (item,)

        def step(state, item):
            return steps.TrainState(state.params + item, state.optimizer + 1), jnp.float32(0)

        state = steps.TrainState(jnp.float32(0), jnp.int32(0))
        return recipe.train(tmp_path, "stage", step, state, iter(range(10, 99)), inputs, 6)

    with pytest.raises(KeyboardInterrupt):
        run(stop=3)
    # When it is run again
    params = run(stop=None)
    # Then the steps after the last save are done once more, and the result is that of one run
    assert seen == [(0, 10), (1, 11), (2, 12), (2, 12), (3, 13), (4, 14), (5, 15)]
    assert params == sum(range(10, 16))


def test_every_utterance_is_in_a_bucket_that_holds_it_and_seen_at_most_once_an_epoch():
    # Given utterances of random lengths, one too long for any bucket
    samples = np.append(np.random.default_rng(3).integers(20_000, 400_000, 500), 10_000_000)
    buckets = batches.make_buckets(samples, 3_000)
    # When an epoch is drawn
    drawn = list(batches.epoch(buckets, np.random.default_rng(0)))
    # Then batches are full, rows fit, and none repeats
    rows = np.concatenate([rows for _, rows in drawn])
    assert len(set(rows.tolist())) == len(rows) >= 450 and 500 not in rows
    assert all(len(rows) == bucket.batch_size and samples[rows].max() <= bucket.samples for bucket, rows in drawn)
    assert all(num_frames(bucket.samples) == bucket.frames for bucket, _ in drawn)


def test_joined_rows_fill_long_buckets_and_come_as_often_as_asked():
    # Given utterances of random lengths, one too long for any bucket
    samples = np.append(np.random.default_rng(3).integers(20_000, 60_000, 500), [300_000, 10_000_000])
    frames, buckets = num_frames(samples), batches.make_buckets(samples, 3_000)
    # When batches are drawn, a third of them joined
    drawn = [batch for _, batch in zip(range(600), batches.joining(buckets, frames, 1 / 3, 0), strict=False)]
    # Then that many have rows of several utterances, which fit, and fill most of their bucket
    joined = [(bucket, rows) for bucket, rows in drawn if any(len(row) > 1 for row in rows)]
    assert 150 < len(joined) <= 250
    assert all(len(rows) == bucket.batch_size for bucket, rows in drawn)
    fill = [frames[row].sum() / bucket.frames for bucket, rows in joined for row in rows]
    assert max(fill) <= 1 and np.mean(fill) > 0.6


def test_spec_augment_masks_some_of_every_row_and_no_more_than_its_spans():
    # Given features of ones
    features = jnp.ones((8, 200, 160))
    # When augmented
    masked = np.asarray(steps.spec_augment(jax.random.key(0), features)) == 0
    # Then mels are masked in both stacked frames alike, and at most two spans each way
    mels, frames = masked.all(axis=1), masked.all(axis=2)
    assert np.array_equal(mels[:, :80], mels[:, 80:])
    assert mels[:, :80].sum(1).max() <= 32 and frames.sum(1).max() <= 16
    assert 0 < masked.mean() < 0.5
