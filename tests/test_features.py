"""Log-mel features against their definition in float64, and against themselves in other shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile as sf
from goldens.cases import SAMPLES, sounds

from granite_jax import features
from granite_jax.features import MIN_SAMPLES, log_mel, num_frames

run = jax.jit(log_mel)


def exact_log_mel(samples: np.ndarray) -> np.ndarray:
    """The definition, in float64: centred frames of 512, periodic Hann of 400, power, mel, log, floor at -80 dB."""
    padded = np.pad(samples.astype(np.float64), 256, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, 512)[::160]
    window = np.pad(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400), 56)
    power = np.abs(np.fft.rfft(frames * window)) ** 2
    log = np.log10(np.maximum(power @ exact_mel_filters(), 1e-10))
    log = np.maximum(log, log.max() - 8) / 4 + 1
    return log[: len(log) // 2 * 2].reshape(-1, 160)


def exact_mel_filters() -> np.ndarray:
    """Triangles between 82 edges that are equally spaced on the HTK scale from 0 to 8 kHz."""
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 82) / 2595) - 1)
    bins = np.arange(257) * 31.25
    return np.stack([np.interp(bins, edges[i : i + 3], [0, 1, 0]) for i in range(80)], axis=1)


@pytest.mark.parametrize("name", [name for name, sound in sounds().items() if len(sound) < 200_000])
def test_log_mel_is_its_definition_however_quiet_a_bin_beside_loud_ones(name):
    # Given a sound, among them clean tones and speech whose quiet bins are 80 dB below the loud ones
    samples = sounds()[name]
    # When its features are computed / Then they are those of exact arithmetic
    found = run(samples[None], np.array([len(samples)]))[0]
    # (the reference's own filters, rounded to float32, are worth up to 2e-5 here)
    np.testing.assert_allclose(found, exact_log_mel(samples), atol=3e-5)


def test_float32_filters_apart_log_mel_is_exact(monkeypatch):
    # Given clean speech, for which plain float32 products are off by 1e-4, and exact filters
    samples, _ = sf.read(SAMPLES / "long.wav", dtype="float32", stop=96_000)
    filters = exact_mel_filters()
    assert np.abs(features._mel_filters() - filters).max() < 1e-5
    monkeypatch.setattr(features, "_mel_filters", lambda: filters.astype(np.float32))
    # When computed / Then nothing of float32's rounding is left
    found = jax.jit(lambda x: log_mel(x, jnp.array([len(samples)])))(samples[None])
    np.testing.assert_allclose(found[0], exact_log_mel(samples), atol=3e-6)


@pytest.mark.parametrize("scale", [1e-4, 3.0])
def test_precision_does_not_depend_on_loudness(scale):
    # Given a loud and a very quiet recording of the same
    samples = sounds()["chirp-2.5s"] * np.float32(scale)
    # When computed / Then both are exact
    found = run(samples[None], np.array([len(samples)]))[0]
    np.testing.assert_allclose(found, exact_log_mel(samples), atol=3e-5)


@pytest.mark.parametrize("length", [MIN_SAMPLES, 320, 399, 400, 479, 480, 639, 640])
@pytest.mark.parametrize("room", [0, 1, 97, 160])
def test_every_length_in_any_room_gives_its_own_frames(length, room):
    # Given a short sound in a row with some room after it, full of something else
    samples = np.random.default_rng(length).standard_normal(length).astype(np.float32)
    row = np.pad(samples, (0, room), constant_values=50)
    # When computed / Then there are its frames and no others
    found = np.asarray(log_mel(jnp.asarray(row[None]), jnp.array([length]))[0])
    assert len(found) == num_frames(length + room)
    np.testing.assert_allclose(found[: num_frames(length)], exact_log_mel(samples), atol=3e-5)
    assert not found[num_frames(length) :].any()


def test_a_row_is_computed_as_if_alone():
    # Given a quiet row beside a loud one, whose maximum must not become its own
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2, 16_000)).astype(np.float32) * np.array([[1e-3], [1.0]], np.float32)
    # When computed together and alone
    together = run(rows, np.array([16_000, 16_000]))
    # Then the quiet row is the same
    np.testing.assert_allclose(together[0], run(rows[:1], np.array([16_000]))[0], atol=1e-6)


def test_silence_is_finite_with_finite_gradients():
    # Given silence and noise
    samples = np.zeros((2, 4_000), np.float32)
    samples[1] = np.random.default_rng(1).standard_normal(4_000)
    # When computed and differentiated
    found, gradients = jax.value_and_grad(lambda x: log_mel(x, jnp.array([4_000, 4_000])).sum())(samples)
    # Then all is finite, and the noise has a gradient
    assert np.isfinite(found) and np.isfinite(gradients).all() and np.any(gradients[1] != 0)
