"""Background noise for synthetic speech, and its mixture with speech at a given ratio. Everything is float32."""

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]

BABBLE_SPEAKERS = 6


def white(rng: np.random.Generator, size: int) -> Samples:
    """White noise, float32 `[size]`, unit variance."""
    return rng.standard_normal(size, dtype=np.float32)


def pink(rng: np.random.Generator, size: int) -> Samples:
    """Noise whose power falls as 1/f, float32 `[size]`, about unit variance."""
    padded = 1 << (size - 1).bit_length()  # an FFT of a prime length is slow
    spectrum = np.fft.rfft(white(rng, padded))
    spectrum /= np.sqrt(np.maximum(np.arange(spectrum.size), 1))
    noise = np.fft.irfft(spectrum, padded)[:size]
    return (noise / (noise.std() + 1e-12)).astype(np.float32)


def babble(rng: np.random.Generator, size: int, clips: list[Samples]) -> Samples:
    """Several of `clips` at once, each repeated from a random point; float32 `[size]`."""
    total = np.zeros(size, np.float32)
    for index in rng.choice(len(clips), size=min(BABBLE_SPEAKERS, len(clips)), replace=False):
        clip = clips[index]
        total += np.resize(np.roll(clip, int(rng.integers(clip.size))), size)
    return total


def mix_at_snr(speech: Samples, noise: Samples, snr_db: float) -> Samples:
    """`speech + a * noise` with the power ratio of the whole arrays equal to `snr_db`; both float32 `[n]`."""
    ratio = np.mean(np.square(speech, dtype=np.float64)) / max(np.mean(np.square(noise, dtype=np.float64)), 1e-20)
    scale = np.float32(np.sqrt(ratio / 10 ** (snr_db / 10)))
    return np.asarray(speech + noise * scale, np.float32)
