"""Segments of recordings: where they are cut, and that they lose nothing."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from granite_jax.audio.segment import AudioSegment, cut, halve
from granite_jax.waveform import SAMPLING_RATE


def speech(seconds: float, seed: int = 0) -> np.ndarray:
    """A noise whose level changes four times a second, and is never low for long."""
    size = round(seconds * SAMPLING_RATE)
    level = 0.55 + 0.45 * np.sin(2 * np.pi * 4 * np.arange(size) / SAMPLING_RATE)
    return (0.2 * level * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def silence(seconds: float, level: float = 1e-3) -> np.ndarray:
    rng = np.random.default_rng(1)
    return (level * rng.standard_normal(round(seconds * SAMPLING_RATE))).astype(np.float32)


def check_tiles(samples: np.ndarray, segments: list[AudioSegment], seconds: float) -> None:
    """Every sample is some segment's own, in order, and where it says that it is."""
    assert segments[0].begin == 0 and segments[-1].end == len(samples)
    assert [segment.is_last for segment in segments] == [False] * (len(segments) - 1) + [True]
    for segment, following in itertools.pairwise(segments):
        assert segment.begin < segment.end == following.begin
    for segment in segments:
        end = segment.offset + len(segment.samples)
        assert segment.offset <= segment.begin and segment.end <= end
        assert len(segment.samples) <= seconds * SAMPLING_RATE
        np.testing.assert_array_equal(segment.samples, samples[segment.offset : end])


@given(st.integers(0, 1000), st.floats(5, 30), st.integers(1, 200_000), st.booleans())
def test_segments_tile_any_recording(seed: int, seconds: float, block: int, overlap: bool) -> None:
    # Given speech, noise and silences of any lengths, when cut from blocks of any size, then nothing is lost
    rng = np.random.default_rng(seed)
    parts = [rng.choice([0.0, 1e-3, 0.1]) * rng.standard_normal(rng.integers(1, 200_000)) for _ in range(8)]
    samples = np.concatenate(parts).astype(np.float32)
    blocks = [samples[i : i + block] for i in range(0, len(samples), block)]
    segments = list(cut(blocks, seconds, overlap=overlap))
    check_tiles(samples, segments, seconds)
    assert overlap or not any(segment.overlaps for segment in segments)


def test_short_audio_is_one_segment() -> None:
    for size in (0, 1, 30 * SAMPLING_RATE):
        (segment,) = cut([np.ones(size, np.float32)], 30.0)
        assert segment.is_whole and len(segment.samples) == size and not segment.overlaps


def test_cuts_are_in_pauses() -> None:
    # Given sentences with pauses of half a second, of which some are noisy
    parts, pauses, position = [], [], 0.0
    for i in range(30):
        level = 1e-4 if i < 15 else 0.02
        parts += [speech(3.3, i) + silence(3.3, level), silence(0.5, level)]
        pauses.append((position + 3.3, position + 3.8))
        position += 3.8
    samples = np.concatenate(parts)
    # When cut, then every cut is in a pause, sharp
    segments = list(cut([samples], 20.0))
    check_tiles(samples, segments, 20.0)
    assert not any(segment.overlaps for segment in segments)
    for segment in segments[:-1]:
        assert any(start < segment.end / SAMPLING_RATE < end for start, end in pauses)


def talk(seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Words of a loud vowel and a weak consonant, ten before each pause of 0.5 s; and whether a sample is in a word."""
    rng, vowel, consonant = np.random.default_rng(2), round(0.2 * SAMPLING_RATE), round(0.25 * SAMPLING_RATE)
    level = np.concatenate([np.full(vowel, 0.1), np.full(consonant, 0.01)] * 10 + [np.zeros(SAMPLING_RATE // 2)])
    level = np.resize(level, round(seconds * SAMPLING_RATE))
    return (level * rng.standard_normal(len(level)) + silence(seconds)).astype(np.float32), level > 0


def sharp_cuts(samples: np.ndarray, seconds: float) -> list[int]:
    """The samples at which neither side hears the other's."""
    segments = list(cut([samples], seconds))
    check_tiles(samples, segments, seconds)
    return [s.end for s in segments[:-1] if s.end == s.offset + len(s.samples)]


_TIME = np.arange(120 * SAMPLING_RATE) / SAMPLING_RATE


def mains(hertz: float, harmonics: int) -> np.ndarray:
    return np.sum([np.sin(2 * np.pi * hertz * k * _TIME + k) for k in range(1, harmonics + 1)], axis=0)


@pytest.mark.parametrize("seconds", [7.0, 30.0])
@pytest.mark.parametrize(
    "added",
    [
        0 * _TIME,
        np.full(len(_TIME), 0.3),
        np.linspace(-0.5, 0.5, len(_TIME)),
        0.3 * np.sin(2 * np.pi * 0.2 * _TIME),
        0.3 * mains(50, 1),
        0.3 * mains(60, 1),
        0.05 * mains(50, 6),
        0.05 * mains(60, 5),
    ],
    ids=["nothing", "offset", "ramp", "drift", "50 Hz", "60 Hz", "harmonics of 50 Hz", "harmonics of 60 Hz"],
)
def test_offset_and_hum_move_no_cut_into_a_word(added: np.ndarray, seconds: float) -> None:
    # Given speech with pauses, and an offset or a hum
    samples, is_word = talk(120)
    # When cut, then all cuts are sharp, and none is within a word
    cuts = sharp_cuts((samples + added).astype(np.float32), seconds)
    assert len(cuts) >= 120 / seconds - 1 and not is_word[cuts].any()


@pytest.mark.parametrize("level", [0.005, 0.01, 0.02, 0.05, 0.1])
@pytest.mark.parametrize("seconds", [7.0, 30.0])
def test_words_that_noise_hides_are_no_pauses(level: float, seconds: float) -> None:
    # Given speech in noise that is as loud as its consonants, or as its vowels
    samples, is_word = talk(120)
    samples += level * np.random.default_rng(3).standard_normal(len(samples)).astype(np.float32)
    # When cut, then no sharp cut is within a word
    assert not is_word[sharp_cuts(samples, seconds)].any()


def test_digital_silence_is_cut_sharply() -> None:
    assert len(sharp_cuts(np.full(100 * SAMPLING_RATE, 0.1, np.float32), 30.0)) >= 3


def test_offsets_are_those_of_the_cuts() -> None:
    # Given 65 s with pauses at 29 and 58 s, when cut at 30 s, then the segments begin there, not at 30 and 60
    samples = speech(65)
    for second in (29, 58):
        samples[second * SAMPLING_RATE : round((second + 0.5) * SAMPLING_RATE)] = silence(0.5)
    begins = [segment.begin / SAMPLING_RATE for segment in cut([samples], 30.0)]
    np.testing.assert_allclose(begins, [0, 29.25, 58.25], atol=0.1)


def test_speech_without_pauses_overlaps_at_the_quietest_place() -> None:
    # Given speech without a pause, and one place that is quieter for 80 ms
    samples = speech(40)
    quiet = round(27.3 * SAMPLING_RATE)
    samples[quiet : quiet + 1280] *= 0.01
    first, second = cut([samples], 30.0)
    # Then it is cut there, and both sides have a second more
    assert abs(first.end - quiet - 640) < 640
    assert first.overlaps and second.overlaps
    assert first.offset + len(first.samples) - first.end == first.end - second.offset == SAMPLING_RATE


def test_the_quietest_place_can_be_at_the_end_of_the_window() -> None:
    samples = speech(40)
    samples[29 * SAMPLING_RATE - 1600 : 29 * SAMPLING_RATE] *= 0.001
    first, _ = cut([samples], 30.0)
    assert 28.9 <= first.end / SAMPLING_RATE <= 29.0


@pytest.mark.parametrize("level", [0.0, 1e-4, 0.3])
def test_monotonous_audio_ends(level: float) -> None:
    # Given silence, or noise that never changes, when cut, then cuts advance
    samples = silence(200, level)
    check_tiles(samples, list(cut(np.array_split(samples, 50), 30.0)), 30.0)


def test_halves_of_a_segment_tile_it() -> None:
    samples = speech(100)
    for segment in list(cut([samples], 30.0)):
        if segment.end - segment.begin < 5 * SAMPLING_RATE:
            continue
        for at in (None, -5, 8 * SAMPLING_RATE, 10**9):
            left, right = halve(segment, at=at)
            assert (left.begin, left.end, right.end) == (segment.begin, right.begin, segment.end)
            assert (left.is_last, right.is_last) == (False, segment.is_last)
            for half in (left, right):
                end = half.offset + len(half.samples)
                np.testing.assert_array_equal(half.samples, samples[half.offset : end])
                assert segment.offset <= half.offset <= half.begin < half.end <= end
                assert half.end - half.begin >= SAMPLING_RATE
