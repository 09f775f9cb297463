"""Log-mel features on the device: waveform -> pairs of stacked log-mel frames.

Computes the same numbers as the reference's feature extractor (torchaudio's MelSpectrogram and the normalization of
`GraniteSpeechFeatureExtractor`), for every row as if it were alone: the signal is reflected at the row's true end, and
the maximum is that of its valid frames.
"""

import jax
import jax.numpy as jnp
import numpy as np

from granite_jax.array_types import Features, Lengths, Samples
from granite_jax.waveform import SAMPLING_RATE

HOP = 160  # samples: 10 ms
WINDOW = 400  # samples: 25 ms, centered in the FFT
FFT = 512
NUM_MELS = 80

_MARGIN = WINDOW // 2  # the window is zero beyond it, so no more of the reflected signal is read


def num_frames(num_samples):
    """Encoder frames (20 ms) of `num_samples` samples: works on ints and on integer arrays."""
    return (num_samples // HOP + 1) // 2


def _mel_filters() -> np.ndarray:
    """Triangular HTK mel filters from 0 to 8 kHz, not area-normalized: float32 [FFT // 2 + 1, NUM_MELS].

    Rounds at every step where torchaudio rounds: the edges of the narrow filters change the features by up to 1e-5.
    """
    top = np.float32(2595.0 * np.log10(1.0 + SAMPLING_RATE / 2 / 700.0))
    index, last = np.arange(NUM_MELS + 2, dtype=np.float32), np.float32(NUM_MELS + 1)
    mels = np.where(index <= last / 2, index * (top / last), top - (last - index) * (top / last))
    powers = 10.0 ** (mels / np.float32(2595.0)).astype(np.float64)
    edges = np.float32(700.0) * (powers.astype(np.float32) - np.float32(1.0))
    frequencies = np.linspace(0.0, SAMPLING_RATE / 2, FFT // 2 + 1, dtype=np.float32)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return np.maximum(np.float32(0.0), np.minimum(rising, falling))


def _fourier_basis() -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines under half of a periodic Hann window, from its center on: both [_MARGIN, FFT // 2 + 1]."""
    time = np.arange(_MARGIN)[:, None]
    hann = 0.5 + 0.5 * np.cos(2.0 * np.pi * time / WINDOW)
    hann[0] /= 2.0  # the center is its own mirror image
    angle = 2.0 * np.pi * time * np.arange(FFT // 2 + 1) / FFT
    return hann * np.cos(angle), hann * np.sin(angle)


def log_mel(samples: Samples, lengths: Lengths) -> Features:
    """Stacked, normalized log-mel features.

    Args:
      samples: float32 waveforms in [-1, 1] at 16 kHz, padded on the right with anything finite.
      lengths: valid samples of each row, at least MIN_SAMPLES.

    Returns:
      float32 features `[b, num_frames(n), 160]`, two log-mel frames of 80 to an encoder frame; row `i` holds
      `num_frames(lengths[i])` of them, zeros follow. Within 1e-5 of the reference's formula in exact arithmetic.
    """
    samples, lengths = jnp.asarray(samples, jnp.float32), jnp.asarray(lengths, jnp.int32)
    log = log_mel_energies(split_windows(split_hops(samples, lengths)))
    valid = jnp.arange(log.shape[1], dtype=jnp.int32)[None, :] < (lengths // HOP + 1)[:, None]
    # The maximum includes an odd last frame, which stacking then drops.
    peak = jnp.max(jnp.where(valid[..., None], log, -jnp.inf), axis=(1, 2), keepdims=True)
    log = normalize(log, peak)
    batch, mel_frames, _ = log.shape
    stacked = log[:, : mel_frames // 2 * 2].reshape(batch, mel_frames // 2, 2 * NUM_MELS)
    return jnp.where(
        (jnp.arange(mel_frames // 2, dtype=jnp.int32)[None, :] < num_frames(lengths)[:, None])[..., None], stacked, 0.0
    )


def normalize(log: jax.Array, peak: jax.Array) -> jax.Array:
    """Log-mel energies as the model takes them: at most 80 dB below a row's peak."""
    return jnp.maximum(log, peak - 8.0) / 4.0 + 1.0


def log_mel_energies(frames: jax.Array) -> jax.Array:
    """Decimal logarithms of the mel energies of windows: `[b, t, WINDOW]` -> `[b, t, NUM_MELS]`."""
    with jax.default_matmul_precision("highest"):
        return jnp.log10(jnp.maximum(_power_spectrum(frames) @ _mel_filters(), 1e-10))


def _power_spectrum(frames: jax.Array) -> jax.Array:
    """Squared magnitudes of the windowed frames' Fourier transform: `[b, t, WINDOW]` -> `[b, t, FFT // 2 + 1]`.

    Matrix products take only the 400 samples under the window, and run on a TPU's matrix unit. Cosines are even and
    sines odd about the window's center, so sums and differences of mirrored samples halve the work.

    In a quiet bin beside loud ones, large terms cancel and float32's rounding shows: in the features up to 1e-4 with a
    plain product, 5e-5 with an FFT (also the reference's). So samples and basis are split into a coarse part of 8 bits
    and a residual. Sums of coarse products are exact, even with bfloat16 inputs; products with a residual are small,
    and so is their rounding.
    """
    peak = jax.lax.stop_gradient(jnp.maximum(jnp.max(jnp.abs(frames), axis=-1, keepdims=True), 1e-30))
    scale = jnp.ldexp(jnp.ones_like(peak), jnp.frexp(peak)[1])  # a power of two, by which division is exact
    frames /= scale
    coarse = jnp.round(frames * 128.0) / 128.0
    power = jnp.zeros((), jnp.float32)
    for sign, basis in zip((1.0, -1.0), _fourier_basis(), strict=True):
        coarse_basis = np.round(basis * 256.0) / 256.0
        folded, residual = (x[..., _MARGIN:] + sign * x[..., _MARGIN:0:-1] for x in (coarse, frames - coarse))
        exact = jnp.matmul(folded, coarse_basis.astype(np.float32), precision=jax.lax.Precision.DEFAULT)
        small = folded @ (basis - coarse_basis).astype(np.float32) + residual @ basis.astype(np.float32)
        power += (exact + small) ** 2
    return power * scale**2


def split_hops(samples: jax.Array, lengths: jax.Array) -> jax.Array:
    """The reflected signal: [b, n // HOP + 3, HOP]."""
    count = samples.shape[1] // HOP + 3
    signal = jax.vmap(_reflect)(samples, lengths)
    return jnp.pad(signal, ((0, 0), (0, HOP)))[:, : count * HOP].reshape(len(signal), count, HOP)


def split_windows(hops: jax.Array) -> jax.Array:
    """Overlapping windows of the signal, one every HOP samples: [b, hops, HOP] -> [b, hops - 2, WINDOW]."""
    # 2.5 hops make a window: three shifted views of the hops, no gather.
    return jnp.concatenate([hops[:, :-2], hops[:, 1:-1], hops[:, 2:, : WINDOW - 2 * HOP]], axis=-1)


def _reflect(row: jax.Array, length: jax.Array) -> jax.Array:
    """Reflects one waveform at its start and at its true end, `_MARGIN` samples each; zeros follow."""
    row = jnp.pad(row, (0, _MARGIN))
    tail = jax.lax.dynamic_slice(row, (length - 1 - _MARGIN,), (_MARGIN,))[::-1]
    row = jnp.where(jnp.arange(len(row), dtype=jnp.int32) < length, row, 0.0)
    row = jax.lax.dynamic_update_slice(row, tail, (length,))
    return jnp.concatenate([row[1 : _MARGIN + 1][::-1], row])
