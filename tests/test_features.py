"""Log-mel features against their definition in float64, and against themselves in other shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens.cases import sounds

from granite_jax.models.layers import features
from granite_jax.models.layers.features import log_mel, num_frames
from granite_jax.waveform import MIN_SAMPLES

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


@pytest.fixture(scope="module")
def rows() -> dict[str, np.ndarray]:
    """Sounds of up to 10 s, one of them also very quiet and beyond full scale."""
    short = {name: sound for name, sound in sounds().items() if len(sound) < 200_000}
    chirp = sounds()["chirp-2.5s"]
    return short | {"chirp-quiet": chirp * np.float32(1e-4), "chirp-loud": chirp * np.float32(3)}


def batched(rows, room: int = 0) -> np.ndarray:
    """Features of all rows, computed at once; `room` samples follow the longest. Padding is loud."""
    lengths = [len(row) for row in rows]
    batch = np.full((len(rows), max(lengths) + room), 50, np.float32)
    for i, row in enumerate(rows):
        batch[i, : len(row)] = row
    return np.asarray(run(batch, np.array(lengths)))


def test_log_mel_is_its_definition_however_quiet_a_bin_beside_loud_ones(rows, monkeypatch):
    # Given clean tones and speech with bins 80 dB below the loud ones, where plain float32 products are off by 1e-4,
    # and exact filters instead of those rounded as the reference's are
    filters = exact_mel_filters()
    assert np.abs(features._mel_filters() - filters).max() < 1e-5
    monkeypatch.setattr(features, "_mel_filters", lambda: filters.astype(np.float32))
    # When all are computed at once / Then each is as in exact arithmetic, whatever its loudness
    for name, found in zip(rows, batched(list(rows.values())), strict=True):
        exact = exact_log_mel(rows[name])
        np.testing.assert_allclose(found[: len(exact)], exact, atol=5e-6, err_msg=name)
        assert not found[len(exact) :].any(), name


@pytest.mark.parametrize("room", [0, 1, 81, 160])
def test_every_length_in_any_room_gives_its_own_frames(room):
    # Given sounds of lengths about the multiples of a hop and of a frame, with some room after the longest
    rng = np.random.default_rng(room)
    lengths = [MIN_SAMPLES, 319, 320, 399, 400, 401, 479, 480, 639, 640]
    sounds = [rng.standard_normal(length).astype(np.float32) for length in lengths]
    # When computed / Then there are their frames and no others
    found = batched(sounds, room)
    assert found.shape[1] == num_frames(640 + room)
    for row, sound in zip(found, sounds, strict=True):
        frames = num_frames(len(sound))
        np.testing.assert_allclose(row[:frames], exact_log_mel(sound), atol=3e-5)
        assert not row[frames:].any()


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
