"""Noise for synthetic speech, mixing it with speech at a given ratio, and telephone sound; everything is float32."""

import numpy as np
import soxr
from numpy.typing import NDArray

from granite_jax.waveform import SAMPLING_RATE

Samples = NDArray[np.float32]

BABBLE_SPEAKERS = 6
_TELEPHONE_RATE, _TELEPHONE_LOW = 8_000, 300.0


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


def hum(rng: np.random.Generator, size: int) -> Samples:
    """Mains hum of 50 or 60 Hz with some of its harmonics; float32 `[size]`, unit variance."""
    time, mains = np.arange(size) / SAMPLING_RATE, float(rng.choice([50.0, 60.0]))
    harmonics = range(1, int(rng.integers(2, 12)))
    waves = [np.sin(2 * np.pi * (k * mains * time + rng.random())) * rng.random() / k for k in harmonics]
    return _unit(np.sum(waves, axis=0))


def tones(rng: np.random.Generator, size: int) -> Samples:
    """Beeps, chords and glides of 0.1 to 2 s, some followed by silence; float32 `[size]`, about unit variance."""
    pieces, total = [], 0
    while total < size:
        time = np.arange(int(rng.uniform(0.1, 2.0) * SAMPLING_RATE)) / SAMPLING_RATE
        glide = rng.uniform(-100, 100) if rng.random() < 0.3 else 0.0
        pitches = np.exp(rng.uniform(np.log(90), np.log(4000), size=int(rng.integers(1, 5))))
        wave = np.sum([np.sin(2 * np.pi * (f * time + glide * time**2 / 2)) for f in pitches], axis=0)
        wave *= np.exp(-rng.choice([0.0, 3.0, 8.0]) * time) * min(1.0, rng.uniform(0.3, 1.5))
        pieces += [wave, np.zeros(int(rng.uniform(0.0, 0.5) * SAMPLING_RATE))]
        total += pieces[-1].size + wave.size
    return _unit(np.concatenate(pieces)[:size])


def clicks(rng: np.random.Generator, size: int) -> Samples:
    """Short bursts of noise, one to twelve a second, like keys and steps; float32 `[size]`, about unit variance."""
    wave = np.zeros(size, np.float32)
    for start in rng.integers(0, size, size=max(1, int(size / SAMPLING_RATE * rng.uniform(1, 12)))):
        burst = white(rng, int(rng.uniform(0.002, 0.06) * SAMPLING_RATE))[: size - int(start)]
        wave[start : start + burst.size] += burst * np.exp(-np.arange(burst.size) / rng.uniform(20, 300))
    return _unit(wave)


def _unit(wave: NDArray[np.floating]) -> Samples:
    return np.asarray(wave / max(float(wave.std()), 1e-9), np.float32)


def telephone(speech: Samples) -> Samples:
    """What a telephone leaves of `speech`, 300 Hz to 4 kHz; float32 `[n]`."""
    narrow = soxr.resample(soxr.resample(speech, SAMPLING_RATE, _TELEPHONE_RATE), _TELEPHONE_RATE, SAMPLING_RATE)[
        : speech.size
    ]
    padded = 1 << (speech.size - 1).bit_length()
    spectrum = np.fft.rfft(narrow, padded)
    frequency = np.fft.rfftfreq(padded, 1 / SAMPLING_RATE)
    spectrum *= np.clip((frequency / _TELEPHONE_LOW) ** 4, 0.0, 1.0)
    return np.asarray(np.fft.irfft(spectrum, padded)[: speech.size], np.float32)


def mix_at_snr(speech: Samples, noise: Samples, snr_db: float) -> Samples:
    """`speech + a * noise` with the power ratio of the whole arrays equal to `snr_db`; both float32 `[n]`."""
    ratio = np.mean(np.square(speech, dtype=np.float64)) / max(np.mean(np.square(noise, dtype=np.float64)), 1e-20)
    scale = np.float32(np.sqrt(ratio / 10 ** (snr_db / 10)))
    return np.asarray(speech + noise * scale, np.float32)
