"""Recordings of the embedded checkpoint's held-out clips: seams, words, silence, subtitles, memory."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from subtitle_rules import violations

import granite_jax as gj
from benchmarks.long_recordings import compare, compose, noises, utterances
from granite_jax.formats.cues import cues
from granite_jax.training.recipes.demo.noise import white
from granite_jax.waveform import SAMPLING_RATE

ROOT = Path(__file__).parents[2]
CTC = {"speculative": "relaxed-fast", "ctc_threshold": 1e9}  # every text is the encoder's own


@pytest.fixture(scope="module")
def asr() -> gj.Transcriber:
    return gj.Transcriber.from_pretrained("demo", dtype="float32", compilation_cache=False)


@pytest.mark.parametrize("minutes", [10, pytest.param(120, marks=pytest.mark.soak)])
def test_no_word_is_lost_or_doubled_at_a_seam(asr: gj.Transcriber, minutes: float) -> None:
    # Given utterances with and without pauses in a room that changes
    pieces = list(compose(utterances(None), 60 * minutes))
    # When transcribed by the encoder, as one recording and one by one
    result = compare(asr, pieces, **CTC)
    # Then the texts are alike at every cut, but for a few, and elsewhere nearly
    cuts = result["segments"] - 1
    assert cuts > 3 * minutes
    assert result["lost"] + result["doubled"] <= 0.05 * cuts
    assert result["wer_whole"] - result["wer_alone"] < 4.0


def test_nothing_is_written_where_nobody_speaks(asr: gj.Transcriber) -> None:
    # Given three minutes each of silence, noise, hum, tones and clicks, and a sentence a hundred times
    spoken = utterances(None)[120]
    sounds = noises(np.random.default_rng(0), 180, spoken.samples)
    transcripts = dict(zip(sounds, asr.transcribe(list(sounds.values())), strict=True))
    # When transcribed, then there is no text, but for what tones and clicks sound like
    repeated = transcripts.pop("one sentence 100 times")
    for name, transcript in transcripts.items():
        few = 3 if name in ("tones and chords", "telephone clicks", "clicks") else 0
        assert len(transcript.text.split()) <= few, (name, transcript.text)
        assert ("silence" in transcript.flags) == (not transcript.text)
    # And the sentence is there a hundred times, not fewer, not more
    assert "loop" not in repeated.flags
    assert len(repeated.text.split()) == pytest.approx(100 * len(spoken.text.split()), rel=0.1)


@pytest.mark.soak
def test_nothing_is_written_in_three_hours_of_faint_noise(asr: gj.Transcriber) -> None:
    # Given a recording, half of it silence and half hardly audible noise
    half = 90 * 60 * SAMPLING_RATE
    sound = np.concatenate([np.zeros(half, np.float32), white(np.random.default_rng(0), half) * np.float32(1e-3)])
    # When transcribed, then there is no text
    transcript = asr.transcribe(sound)
    assert transcript.text == "" and transcript.flags == ("silence",)


def test_subtitles_of_a_recording_keep_the_rules(asr: gj.Transcriber) -> None:
    # Given three minutes with word times
    samples = np.concatenate([piece.samples for piece in compose(utterances(None), 180)])
    transcript = asr.transcribe(samples, word_timestamps=True)
    # When they become subtitles, then no rule is broken, and words follow one another within the recording
    assert violations(cues(transcript.segments)) == []
    words = [word for segment in transcript.segments for word in segment.words]
    assert " ".join(word.text for word in words) == transcript.text
    for word, following in itertools.pairwise(words):
        assert word.start < word.end <= following.start + 1e-6
    assert words[0].start >= 0 and words[-1].end <= len(samples) / SAMPLING_RATE
    # And each segment begins and ends with its words
    for segment in transcript.segments:
        if segment.words:
            assert (segment.start, segment.end) == pytest.approx(
                (segment.words[0].start, segment.words[-1].end), abs=1e-3
            )


@pytest.mark.soak
def test_memory_does_not_grow_with_the_recording() -> None:
    # Given recordings of ten and forty minutes, when each is transcribed by a process, then both need as much memory
    command = [sys.executable, "benchmarks/long_recordings.py", "memory", "--minutes", "40"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    shown = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    ratio = float(shown.splitlines()[-1].split(", ")[1].split()[0])
    assert ratio < 1.1, shown
