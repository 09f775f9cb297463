"""The form of audio that files become and models take: float32, mono, at 16 kHz."""

SAMPLING_RATE = 16_000
"""Hz; the only rate the models' features are defined for."""
MIN_SAMPLES = 257
"""The shortest audio: fewer samples cannot be reflected at the margin of the features' FFT of 512."""
