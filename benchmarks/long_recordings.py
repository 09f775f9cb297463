"""Recordings of any length against the same utterances one by one: words, seams, memory, throughput.

    python benchmarks/long_recordings.py [--checkpoint demo] [--corpus DIR] [--minutes 10] [--segment-seconds auto]
    python benchmarks/long_recordings.py memory [--minutes 10]     peak memory of one process
    python benchmarks/long_recordings.py noise [--minutes 3]       silence, hum, tones, noise, clicks, repetition
    python benchmarks/long_recordings.py cuts [--minutes 10]       cuts within words, with offset, hum and noise

A recording is made of utterances in random order, with pauses of 0.2 to 3 s between most of them and none in a tenth,
room noise that changes, silences of up to 20 s, and hum. `--corpus` is a directory of `recipes.demo.recipe`; the
default are the held-out clips. Every utterance is also transcribed alone, with the noise that it has in the recording.

`cuts` joins clean held-out clips, with gaps of 0 to 1.5 s, and counts the sharp cuts that are within a word (40 ms or
more from its ends) for segments of 7 and 30 s. The voices are every second one; with `--tune`, the others, which the
thresholds were chosen on.

Letters at a cut are lost, or doubled, if the recording's text has three letters less there, or more, than the text of
the same utterances one by one. Spaces do not count, because the model often writes words together.
"""

import argparse
import dataclasses
import difflib
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).parents[1]))

import granite_jax as gj
from granite_jax.audio.segment import cut
from granite_jax.evaluation.heldout import CLIPS
from granite_jax.recognition.words import locate_words
from granite_jax.training.recipes.demo import noise
from granite_jax.waveform import SAMPLING_RATE

_FULL_SCALE = 32768.0
_WINDOW = 5  # words on both sides of a cut that are compared
_NEAR, _LETTERS = 2, 3
_SPEECH = 0.05  # RMS


@dataclasses.dataclass(frozen=True)
class Spoken:
    """A piece of a recording: samples, float32 `[n]` at 16 kHz, and what is said in them."""

    samples: np.ndarray
    text: str = ""


def utterances(corpus: Path | None) -> list[Spoken]:
    """The utterances of a corpus, or the held-out clips."""
    if corpus is None:
        lines = map(json.loads, (CLIPS / "heldout.jsonl").read_text(encoding="utf-8").splitlines())
        return [Spoken(soundfile.read(CLIPS / line["audio"], dtype="float32")[0], line["text"]) for line in lines]
    from granite_jax.training.corpus import Corpus

    return [Spoken(u.samples / np.float32(_FULL_SCALE), u.text) for u in Corpus.open(corpus) if u.text]


def compose(spoken: list[Spoken], seconds: float, seed: int = 0) -> Iterator[Spoken]:
    """The pieces of a recording of at least `seconds`, which does not depend on how long it goes on."""
    rng = np.random.default_rng(seed)
    size, level, order = 0, 1e-3, []
    while size < seconds * SAMPLING_RATE:
        order = order or list(rng.permutation(len(spoken)))
        piece = spoken[order.pop()]
        if rng.random() < 0.1:  # the room changes
            level = float(10 ** rng.uniform(-4.5, -2.2))
        yield Spoken(_in_room(rng, piece.samples, level), piece.text)
        size += len(piece.samples)
        if rng.random() < 0.1:
            continue  # no pause
        length = int(SAMPLING_RATE * (rng.uniform(5, 20) if rng.random() < 0.02 else rng.uniform(0.2, 3.0)))
        pause = np.zeros(length, np.float32)
        if rng.random() < 0.05:
            pause += noise.hum(rng, length) * np.float32(0.02)
        yield Spoken(_in_room(rng, pause, level))
        size += length


def _in_room(rng: np.random.Generator, samples: np.ndarray, level: float) -> np.ndarray:
    return samples + np.float32(level) * noise.white(rng, len(samples))


def write(path: Path, pieces: Iterator[Spoken]) -> None:
    """Writes a recording as FLAC, piece by piece."""
    with soundfile.SoundFile(path, "w", SAMPLING_RATE, 1, "PCM_16") as file:
        for piece in pieces:
            file.write(np.clip(piece.samples, -1, 1 - 1 / _FULL_SCALE))


def seams(alone: list[str], together: str, cuts: list[int]) -> tuple[int, int]:
    """Cuts at which letters are lost, and doubled; `cuts` are numbers of words of `together` before each."""
    reference, hypothesis = " ".join(alone).split(), together.split()
    before = np.zeros(len(hypothesis) + 1, int)  # words of the reference before each of the hypothesis
    for chunk in jiwer.process_words(" ".join(reference), " ".join(hypothesis)).alignments[0]:
        count = chunk.hyp_end_idx - chunk.hyp_start_idx
        before[chunk.hyp_start_idx : chunk.hyp_end_idx] = chunk.ref_start_idx + np.minimum(
            np.arange(count), chunk.ref_end_idx - chunk.ref_start_idx
        )
    before[-1] = len(reference)
    lost = doubled = 0
    for seam in cuts:
        first, last = max(0, seam - _WINDOW), min(len(hypothesis), seam + _WINDOW)
        heard, said = "".join(hypothesis[first:last]), "".join(reference[before[first] : before[last]])
        letter = len("".join(hypothesis[first:seam]))
        for _, i, j, k, end in difflib.SequenceMatcher(None, said, heard, autojunk=False).get_opcodes():
            if k - _NEAR <= letter <= end + _NEAR:
                lost += (j - i) - (end - k) >= _LETTERS
                doubled += (end - k) - (j - i) >= _LETTERS
    return lost, doubled


def compare(asr: gj.Transcriber, pieces: list[Spoken], **options: Any) -> dict[str, Any]:
    """Transcribes a recording, and its utterances one by one."""
    spoken = [piece for piece in pieces if piece.text]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "recording.flac"
        write(path, iter(pieces))
        began = time.monotonic()
        whole = asr.transcribe(str(path), **options)
        seconds_whole = time.monotonic() - began
    began = time.monotonic()
    texts = [t.text for t in asr.transcribe([piece.samples for piece in spoken], **options)]
    seconds_alone = time.monotonic() - began
    alone_duration = sum(len(piece.samples) for piece in spoken) / SAMPLING_RATE
    reference = " ".join(piece.text for piece in spoken)
    cuts = np.cumsum([len(segment.text.split()) for segment in whole.segments])[:-1].tolist()
    lost, doubled = seams(texts, whole.text, cuts)
    return {
        "minutes": round(whole.duration / 60, 1),
        "segments": len(whole.segments),
        "wer_whole": 100 * jiwer.wer(reference, whole.text),
        "wer_alone": 100 * jiwer.wer(reference, " ".join(texts)),
        "lost": lost,
        "doubled": doubled,
        # seconds of audio a second; pauses are audio, too
        "throughput_ratio": whole.duration / seconds_whole / (alone_duration / seconds_alone),
        "flags": whole.flags,
        "retried": sum("retried" in segment.flags for segment in whole.segments),
    }


def _measure_memory(arguments: argparse.Namespace) -> None:
    """Peak memory of a process that transcribes a short and a long recording, each in a process of its own."""
    peaks = {}
    for minutes in (10.0, arguments.minutes):
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "recording.flac"
            write(path, compose(utterances(arguments.corpus), 60 * minutes))
            command = [sys.executable, __file__, "peak", "--checkpoint", arguments.checkpoint, "--file", str(path)]
            peaks[minutes] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    for minutes, peak in peaks.items():
        print(f"{minutes:g} minutes: {peak / 2**20:.0f} MiB, {peak / peaks[10.0]:.2f} of that of 10 minutes")


def _print_peak(arguments: argparse.Namespace) -> None:
    gj.Transcriber.from_pretrained(arguments.checkpoint, dtype="float32").transcribe(str(arguments.file))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def noises(rng: np.random.Generator, seconds: float, sentence: np.ndarray) -> dict[str, np.ndarray]:
    """What nobody says anything in, float32 `[n]` at 16 kHz each, and a sentence a hundred times."""
    size = int(seconds * SAMPLING_RATE)
    sounds = {
        "silence": np.zeros(size, np.float32),
        "white noise": noise.white(rng, size) * np.float32(0.05),
        "pink noise": noise.pink(rng, size) * np.float32(0.05),
        "hum": noise.hum(rng, size) * np.float32(0.1),
        "tones and chords": noise.tones(rng, size) * np.float32(0.1),
        "clicks": noise.clicks(rng, size) * np.float32(0.1),
        "telephone clicks": noise.telephone(noise.clicks(rng, size) * np.float32(0.1)),
    }
    return sounds | {"one sentence 100 times": np.concatenate([sentence, np.zeros(8000, np.float32)] * 100)}


def _print_noises(arguments: argparse.Namespace) -> None:
    asr = gj.Transcriber.from_pretrained(arguments.checkpoint, dtype="float32")
    spoken = utterances(arguments.corpus)[0]
    sounds = noises(np.random.default_rng(0), 60 * arguments.minutes, spoken.samples)
    print("| sound | minutes | words | without guards | flags |\n| --- | --- | --- | --- | --- |")
    for (name, samples), guarded, bare in zip(
        sounds.items(),
        asr.transcribe(list(sounds.values())),
        asr.transcribe(list(sounds.values()), guards=False),
        strict=True,
    ):
        words = f"{len(guarded.text.split())} | {len(bare.text.split())}"
        print(f"| {name} | {len(samples) / SAMPLING_RATE / 60:.1f} | {words} | {', '.join(guarded.flags)} |")


@dataclasses.dataclass(frozen=True)
class Timed:
    """Speech, float32 `[n]` at 16 kHz, from its first word to its last, and each word's start and end in samples."""

    samples: np.ndarray
    words: np.ndarray


def timed_clips(asr: gj.Transcriber, tune: bool) -> list[Timed]:
    """The clean held-out clips of half of the voices, at one level, with word times by alignment of their text."""
    lines = map(json.loads, (CLIPS / "heldout.jsonl").read_text(encoding="utf-8").splitlines())
    clean = [line for line in lines if line["snr_db"] is None and line["kind"] != "joined"]
    voices = sorted({line["voice"] for line in clean})[0 if tune else 1 :: 2]
    clips = []
    for line in clean:
        if line["voice"] in voices:
            samples = soundfile.read(CLIPS / line["audio"], dtype="float32")[0]
            logits = asr.ctc_emissions(samples, sampling_rate=SAMPLING_RATE).ctc_logits
            words = locate_words(
                logits, line["text"], duration=len(samples) / SAMPLING_RATE, offsets=asr.capabilities.word_offsets
            )
            times = (SAMPLING_RATE * np.array([(word.start, word.end) for word in words])).astype(int)
            first, last = max(times[0, 0] - 480, 0), times[-1, 1] + 960
            speech = samples[first:last] * np.float32(_SPEECH / np.sqrt(np.mean(samples[first:last] ** 2)))
            clips.append(Timed(speech, times - first))
    return clips


def join(clips: list[Timed], seconds: float, rng: np.random.Generator) -> Timed:
    """A recording of at least `seconds`: a third of the gaps is below 0.15 s, a fifth above 0.5 s."""
    pieces, words, size, order = [], [], 0, []
    while size < seconds * SAMPLING_RATE:
        order = order or list(rng.permutation(len(clips)))
        clip = clips[order.pop()]
        low, high = [(0, 0.15), (0.15, 0.5), (0.5, 1.5)][rng.choice(3, p=[0.35, 0.45, 0.2])]
        gap = int(SAMPLING_RATE * rng.uniform(low, high))
        pieces += [clip.samples * np.float32(10 ** (rng.normal(0, 3) / 20)), np.zeros(gap, np.float32)]
        words.append(clip.words + size)
        size += len(clip.samples) + gap
    return Timed(_in_room(rng, np.concatenate(pieces), 3e-4), np.concatenate(words))


def disturbances(clips: list[Timed], size: int, rng: np.random.Generator) -> dict[str, list[np.ndarray]]:
    """What is added to a recording whose speech has an RMS of 0.05, float32 `[size]` each, by kind."""
    seconds = np.arange(size) / SAMPLING_RATE
    hums = {"hum, 50 and 60 Hz": [], "hum with harmonics to 300 Hz": []}
    for mains, level in itertools.product((50, 60), (0.03, 0.1, 0.3)):
        waves = [np.sin(2 * np.pi * mains * k * seconds + k * k) for k in range(1, 300 // mains + 1)]
        hums["hum, 50 and 60 Hz"].append(level * waves[0])
        for power in (0, 1):
            wave = np.sum([wave / k**power for k, wave in enumerate(waves, 1)], axis=0)
            hums["hum with harmonics to 300 Hz"].append(level / np.sqrt(2) * wave / wave.std())
    walk = np.cumsum(rng.standard_normal(size)) * 5e-4
    drifts = [walk, np.linspace(-0.3, 0.3, size), 0.2 * np.sin(2 * np.pi * 0.1 * seconds)]
    sounds = {"nothing": [np.zeros(size)], "offset": [np.full(size, level) for level in (0.02, 0.05, 0.1, 0.3)]}
    sounds |= {"offset that drifts": drifts} | hums
    babble = noise.babble(rng, size, [clip.samples for clip in clips])
    for name, wave in {"white": noise.white(rng, size), "pink": noise.pink(rng, size), "babble": babble}.items():
        for ratios in ((30,), (20, 15), (10, 5, 0)):
            scales = [_SPEECH / wave.std() / 10 ** (ratio / 20) for ratio in ratios]
            sounds[f"{name} noise, {', '.join(map(str, ratios))} dB"] = [wave * scale for scale in scales]
    return {name: [np.asarray(wave, np.float32) for wave in waves] for name, waves in sounds.items()}


def count_cuts(samples: np.ndarray, words: np.ndarray, seconds: float) -> np.ndarray:
    """How many cuts there are, how many of these are sharp, and how many of these are within a word: int `[3]`."""
    segments = list(cut([samples], seconds))
    sharp = np.array([s.end for s in segments[:-1] if s.offset + len(s.samples) == s.end], int)[:, None]
    margin = SAMPLING_RATE // 25
    within = ((words[:, 0] + margin < sharp) & (sharp < words[:, 1] - margin)).any(axis=1)
    return np.array([len(segments) - 1, len(sharp), within.sum()])


def _print_cuts(arguments: argparse.Namespace) -> None:
    asr = gj.Transcriber.from_pretrained(arguments.checkpoint, dtype="float32")
    clips, rng = timed_clips(asr, arguments.tune), np.random.default_rng(arguments.seed)
    recording = join(clips, 60 * arguments.minutes, rng)
    print("| added | cuts at 7 s | sharp | within words | at 30 s | sharp | within words |\n" + "| --- " * 7 + "|")
    for name, waves in disturbances(clips, len(recording.samples), rng).items():
        counts = [sum(count_cuts(recording.samples + w, recording.words, s) for w in waves) for s in (7, 30)]
        print(f"| {name} |", " | ".join(map(str, np.concatenate(counts))), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["compare", "memory", "peak", "noise", "cuts"], default="compare")
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--segment-seconds", type=float, nargs="*", default=[])
    parser.add_argument("--tune", action="store_true", help="cuts: the other voices")
    parser.add_argument("--no-guards", action="store_true")
    parser.add_argument("--ctc", action="store_true", help="the encoder's text alone")
    arguments = parser.parse_args()
    if arguments.command != "compare":
        commands = {"memory": _measure_memory, "peak": _print_peak, "noise": _print_noises, "cuts": _print_cuts}
        return commands[arguments.command](arguments)
    asr = gj.Transcriber.from_pretrained(arguments.checkpoint, dtype="float32")
    pieces = list(compose(utterances(arguments.corpus), 60 * arguments.minutes, arguments.seed))
    options: dict[str, Any] = {"guards": not arguments.no_guards}
    if arguments.ctc:
        options |= {"speculative": "relaxed-fast", "ctc_threshold": 1e9}
    for seconds in arguments.segment_seconds or ["auto"]:
        compare(asr, pieces[:60], segment_seconds=seconds, **options)  # compiles
        result = compare(asr, pieces, segment_seconds=seconds, **options)
        print(f"segment_seconds={seconds}:", json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
