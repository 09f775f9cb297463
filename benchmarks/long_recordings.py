"""Recordings of any length against the same utterances one by one: words, seams, memory, throughput.

    python benchmarks/long_recordings.py [--checkpoint demo] [--corpus DIR] [--minutes 10] [--segment-seconds auto]
    python benchmarks/long_recordings.py memory [--minutes 10]     peak memory of one process
    python benchmarks/long_recordings.py noise [--minutes 3]       silence, hum, tones, noise, clicks, repetition

A recording is made of utterances in random order, with pauses of 0.2 to 3 s between most of them and none in a tenth,
room noise that changes, silences of up to 20 s, and hum. `--corpus` is a directory of `recipes.demo.recipe`; the
default are the held-out clips. Every utterance is also transcribed alone, with the noise that it has in the recording.

Letters at a cut are lost, or doubled, if the recording's text has three letters less there, or more, than the text of
the same utterances one by one. Spaces do not count, because the model often writes words together.
"""

import argparse
import dataclasses
import difflib
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
from granite_jax.audio.resample import SAMPLE_RATE
from granite_jax.evaluation.heldout import CLIPS
from granite_jax.training.recipes.demo import noise

_FULL_SCALE = 32768.0
_WINDOW = 5  # words on both sides of a cut that are compared
_NEAR, _LETTERS = 2, 3


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
    while size < seconds * SAMPLE_RATE:
        order = order or list(rng.permutation(len(spoken)))
        piece = spoken[order.pop()]
        if rng.random() < 0.1:  # the room changes
            level = float(10 ** rng.uniform(-4.5, -2.2))
        yield Spoken(_in_room(rng, piece.samples, level), piece.text)
        size += len(piece.samples)
        if rng.random() < 0.1:
            continue  # no pause
        length = int(SAMPLE_RATE * (rng.uniform(5, 20) if rng.random() < 0.02 else rng.uniform(0.2, 3.0)))
        pause = np.zeros(length, np.float32)
        if rng.random() < 0.05:
            pause += noise.hum(rng, length) * np.float32(0.02)
        yield Spoken(_in_room(rng, pause, level))
        size += length


def _in_room(rng: np.random.Generator, samples: np.ndarray, level: float) -> np.ndarray:
    return samples + np.float32(level) * noise.white(rng, len(samples))


def write(path: Path, pieces: Iterator[Spoken]) -> None:
    """Writes a recording as FLAC, piece by piece."""
    with soundfile.SoundFile(path, "w", SAMPLE_RATE, 1, "PCM_16") as file:
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
    for cut in cuts:
        first, last = max(0, cut - _WINDOW), min(len(hypothesis), cut + _WINDOW)
        heard, said = "".join(hypothesis[first:last]), "".join(reference[before[first] : before[last]])
        letter = len("".join(hypothesis[first:cut]))
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
    alone_duration = sum(len(piece.samples) for piece in spoken) / SAMPLE_RATE
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
    size = int(seconds * SAMPLE_RATE)
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
        print(f"| {name} | {len(samples) / SAMPLE_RATE / 60:.1f} | {words} | {', '.join(guarded.flags)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["compare", "memory", "peak", "noise"], default="compare")
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--segment-seconds", type=float, nargs="*", default=[])
    parser.add_argument("--no-guards", action="store_true")
    parser.add_argument("--ctc", action="store_true", help="the encoder's text alone")
    arguments = parser.parse_args()
    if arguments.command != "compare":
        return {"memory": _measure_memory, "peak": _print_peak, "noise": _print_noises}[arguments.command](arguments)
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
