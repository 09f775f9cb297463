"""Synthetic speech: the sentences of `grammar`, spoken by espeak-ng in several voices, as 16 kHz int16.

    python -m granite_jax.training.recipes.demo.synthesis generate OUT --split train --count 30000 --seed 1
    python -m granite_jax.training.recipes.demo.synthesis export-heldout granite_jax/evaluation/heldout_clips
    python -m granite_jax.training.recipes.demo.synthesis export-samples samples

Utterance i of a seed depends on (seed, i) alone, so neither thread timing nor the count changes it.
`generate` writes `audio.i16` (all samples, one utterance after another), `index.jsonl` and `recipe.json`.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import soundfile as sf
import soxr
import typer
from numpy.typing import NDArray
from rich.progress import track

from granite_jax.training.corpus import Utterance
from granite_jax.training.recipes.demo.grammar import Sentence, Split, compose
from granite_jax.training.recipes.demo.noise import Samples, babble, mix_at_snr, pink, white

RATE = 16_000
# espeak-ng ignores the variant in "en-gb+f2" without a word; "en+f2" is the same accent with the variant applied.
VOICES = ("en-us", "en-gb", "en-us+f3", "en+f2", "en-us+m7", "en-gb-x-rp+m3", "en-us+f1", "en+m1")
SPEEDS: dict[Split, tuple[int, ...]] = {"train": (135, 150, 165, 180, 195), "heldout": (143, 158, 173, 188)}
NOISES = ("white", "pink", "babble")
NOISE_SHARE = 0.25
SNR_DB = (5.0, 25.0)
GAIN_DB = (-20.0, 0.0)
EDGE_SECONDS = (0.05, 0.4)
PAUSE_SECONDS = (0.1, 0.6)
LONG_SHARE = 0.08
MAX_SECONDS = 28.0
_FULL_SCALE = 0.95
_BABBLE_CLIPS = 24
_BABBLE_STREAM, _SAMPLES_SEED, _HELDOUT_SEED = 0xBABB1E, 7, 2
_BATCH = 512
_OPUS_COMPRESSION = 0.9  # 0 (largest) to 1 (smallest)


@dataclass(frozen=True)
class Recipe:
    """How one utterance is spoken. Seconds, words a minute, decibels; `snr_db` is None for clean speech."""

    sentences: tuple[Sentence, ...]
    voice: str
    speed: int
    pitch: int
    gain_db: float
    lead: float
    trail: float
    pauses: tuple[float, ...]
    noise: str | None
    snr_db: float | None


# --- what to say, and how ------------------------------------------------------------------------------------


def draw_recipe(
    rng: np.random.Generator, split: Split, *, parts: int | None = None, noisy: bool | None = None
) -> Recipe:
    """Draws an utterance of `split`; `parts` and `noisy` fix the number of sentences and the presence of noise."""
    if parts is None:
        parts = int(rng.integers(2, 9)) if rng.random() < LONG_SHARE else 1
    if noisy is None:
        noisy = bool(rng.random() < NOISE_SHARE)
    return Recipe(
        sentences=tuple(compose(rng, split) for _ in range(parts)),
        voice=VOICES[int(rng.integers(len(VOICES)))],
        speed=int(rng.choice(SPEEDS[split])),
        pitch=int(rng.integers(38, 63)),
        gain_db=round(float(rng.uniform(*GAIN_DB)), 1),
        lead=float(rng.uniform(*EDGE_SECONDS)),
        trail=float(rng.uniform(*EDGE_SECONDS)),
        pauses=tuple(float(p) for p in rng.uniform(*PAUSE_SECONDS, size=parts)),
        noise=NOISES[int(rng.integers(len(NOISES)))] if noisy else None,
        snr_db=round(float(rng.uniform(*SNR_DB)), 1) if noisy else None,
    )


def espeak_version() -> str:
    """The synthesiser's version line. Raises RuntimeError when espeak-ng is not installed."""
    if shutil.which("espeak-ng") is None:
        raise RuntimeError("espeak-ng not found: install it (`apt-get install espeak-ng`) to synthesise speech")
    answer = subprocess.run(["espeak-ng", "--version"], capture_output=True, text=True, check=True)
    return answer.stdout.split("Data at")[0].strip()


def speak(text: str, voice: str, speed: int, pitch: int) -> Samples:
    """Speaks `text`; float32 `[n]` at 16 kHz in [-1, 1]. Raises RuntimeError with espeak-ng's own message."""
    options = ["-z", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout"]
    done = subprocess.run(["espeak-ng", *options, text], capture_output=True)
    if done.returncode or not done.stdout:
        raise RuntimeError(f"espeak-ng failed on {text!r} ({voice}): {done.stderr.decode(errors='replace').strip()}")
    # A piped WAV header cannot know its length, so only its sample rate is used.
    rate = int.from_bytes(done.stdout[24:28], "little")
    start = done.stdout.index(b"data") + 8
    raw = np.frombuffer(done.stdout[start : start + (len(done.stdout) - start) // 2 * 2], "<i2")
    wave = (raw / 32768).astype(np.float32)
    return soxr.resample(_trim(wave), rate, RATE).astype(np.float32)


def _trim(samples: Samples) -> Samples:
    """Drops the synthesiser's own near-silence at both ends; the recipe adds its own."""
    loud = np.flatnonzero(np.abs(samples) > 1e-3)
    return samples[loud[0] : loud[-1] + 1] if loud.size else samples


# --- rendering -----------------------------------------------------------------------------------------------


def babble_clips(seed: int, split: Split) -> list[Samples]:
    """The voices that babble noise is made of, the same for every utterance of a seed."""
    rngs = [np.random.default_rng([seed, _BABBLE_STREAM, i]) for i in range(_BABBLE_CLIPS)]
    recipes = [draw_recipe(rng, split, parts=1) for rng in rngs]
    return [speak(r.sentences[0].text, r.voice, r.speed, r.pitch) for r in recipes]


def _silence(seconds: float) -> Samples:
    return np.zeros(int(seconds * RATE), np.float32)


def render(recipe: Recipe, rng: np.random.Generator, clips: list[Samples]) -> tuple[Recipe, NDArray[np.int16]]:
    """Speaks a recipe: int16 `[n]` at 16 kHz, at most 28 s. Returns the recipe with the sentences that fitted."""
    pieces, used, total = [_silence(recipe.lead)], 0, recipe.lead + recipe.trail
    for sentence, pause in zip(recipe.sentences, recipe.pauses, strict=True):
        spoken = speak(sentence.text, recipe.voice, recipe.speed, recipe.pitch)
        total += spoken.size / RATE + (pause if used else 0)
        if used and total > MAX_SECONDS:
            break
        pieces += [_silence(pause), spoken] if used else [spoken]
        used += 1
    audio = np.concatenate([*pieces, _silence(recipe.trail)])
    audio *= _FULL_SCALE / max(float(np.abs(audio).max()), 1e-6)
    if recipe.noise is not None and recipe.snr_db is not None:
        makers = {"white": lambda: white(rng, audio.size), "pink": lambda: pink(rng, audio.size)}
        noise = makers[recipe.noise]() if recipe.noise in makers else babble(rng, audio.size, clips)
        audio = mix_at_snr(audio, noise, recipe.snr_db)
        audio *= _FULL_SCALE / max(float(np.abs(audio).max()), _FULL_SCALE)  # never clip
    audio *= 10 ** (recipe.gain_db / 20)
    fitted = replace(recipe, sentences=recipe.sentences[:used])
    return fitted, np.rint(audio * 32767).astype(np.int16)


def utterance(seed: int, index: int, split: Split, clips: list[Samples], **fixed: Any) -> Utterance:
    """Synthesises utterance `index` of `seed`; `fixed` goes to `draw_recipe`."""
    rng = np.random.default_rng([seed, index])
    recipe, samples = render(draw_recipe(rng, split, **fixed), rng, clips)
    text = " ".join(s.text for s in recipe.sentences)
    names = tuple(name for s in recipe.sentences for name in s.names)
    return Utterance(f"{split}-{seed}-{index:06d}", text, names, recipe.voice, recipe.speed, recipe.snr_db, samples)


def stream(seed: int, count: int, split: Split, threads: int) -> Iterator[Utterance]:
    """Yields `count` utterances in order, synthesised by a pool of threads (espeak-ng runs outside Python)."""
    clips = babble_clips(seed, split)
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, count, _BATCH):
            indices = range(start, min(start + _BATCH, count))
            yield from pool.map(lambda i: utterance(seed, i, split, clips), indices)


def write_corpus(utterances: Iterator[Utterance], out: Path) -> None:
    """Writes `audio.i16` and `index.jsonl` under temporary names and renames both when complete."""
    out.mkdir(parents=True, exist_ok=True)
    audio_part, index_part = out / "audio.i16.part", out / "index.jsonl.part"
    offset = 0
    with open(audio_part, "wb") as audio, open(index_part, "w", encoding="utf-8") as index:
        for item in utterances:
            audio.write(item.samples.astype("<i2").tobytes())
            entry = _manifest_entry(item) | {"offset": offset, "samples": item.samples.size}
            index.write(json.dumps(entry) + "\n")
            offset += item.samples.size
    os.replace(audio_part, out / "audio.i16")
    os.replace(index_part, out / "index.jsonl")


def _manifest_entry(item: Utterance) -> dict[str, Any]:
    return {k: getattr(item, k) for k in ("id", "text", "names", "voice", "speed", "snr_db")}


# --- commands ------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, help="Synthesise speech for training and tests with espeak-ng.")


def _require_espeak() -> str:
    try:
        return espeak_version()
    except RuntimeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


@app.command()
def generate(
    out: Path,
    split: Annotated[str, typer.Option(help="train or heldout")] = "train",
    count: Annotated[int, typer.Option(min=1)] = 30_000,
    seed: Annotated[int, typer.Option(min=0)] = 1,
    threads: Annotated[int, typer.Option(min=1)] = max(2, os.cpu_count() or 1),
) -> None:
    """Synthesise COUNT utterances of a split into OUT."""
    if split not in SPEEDS:
        raise typer.BadParameter(f"split is train or heldout, not {split!r}")
    version = _require_espeak()
    write_corpus(iter(track(stream(seed, count, split, threads), "synthesising", total=count)), out)
    recipe = {
        "espeak": version,
        "split": split,
        "seed": seed,
        "count": count,
        "voices": VOICES,
        "speeds": SPEEDS[split],
    }
    (out / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")


@app.command("export-heldout")
def export_heldout(
    out: Path = Path("granite_jax/evaluation/heldout_clips"),
    count: Annotated[int, typer.Option(min=1)] = 300,
) -> None:
    """Write the first held-out utterances as Ogg/Opus clips with a manifest, heldout.jsonl."""
    _require_espeak()
    out.mkdir(parents=True, exist_ok=True)
    entries = []
    for item in stream(_HELDOUT_SEED, count, "heldout", max(2, os.cpu_count() or 1)):
        name = f"{item.id}.ogg"
        sf.write(out / name, item.samples, RATE, format="OGG", subtype="OPUS", compression_level=_OPUS_COMPRESSION)
        entries.append({"audio": name, **_manifest_entry(item), "duration": round(item.samples.size / RATE, 3)})
    _write_lines(out / "heldout.jsonl", entries)


@app.command("export-samples")
def export_samples(out: Path = Path("samples")) -> None:
    """Write a few held-out utterances as WAV files for people to try, with their texts in samples.jsonl."""
    _require_espeak()
    out.mkdir(parents=True, exist_ok=True)
    clips = babble_clips(_SAMPLES_SEED, "heldout")
    entries = []
    for order, sample in enumerate(_SAMPLES):
        item = _find_sample(sample, 1000 * order, clips)
        audio = item.samples
        if sample.rate != RATE:
            wide = soxr.resample(audio, RATE, sample.rate)
            audio = np.stack([wide, wide // 2], axis=1)  # stereo, the voice nearer to the left
        sf.write(out / f"{sample.name}.wav", audio, sample.rate, subtype="PCM_16")
        entries.append({"audio": f"{sample.name}.wav", "text": item.text})
    _write_lines(out / "samples.jsonl", entries)


@dataclass(frozen=True)
class _Sample:
    """What an exported sample must be like: the fewest invented names and seconds, noise, and the file's rate."""

    name: str
    parts: int = 1
    noisy: bool = False
    names: int = 0
    seconds: float = 0.0
    rate: int = RATE


_SAMPLES = (
    _Sample("request"),
    _Sample("numbers"),
    _Sample("one-name", names=1),
    _Sample("two-names", names=2),
    _Sample("noisy", noisy=True, names=1),
    _Sample("stereo-44k", names=1, rate=44_100),
    _Sample("long", parts=8, names=3, seconds=20.0),
)


def _find_sample(sample: _Sample, first: int, clips: list[Samples]) -> Utterance:
    """The first utterance from index `first` on that is like `sample`."""
    for index in range(first, first + 1000):
        item = utterance(_SAMPLES_SEED, index, "heldout", clips, parts=sample.parts, noisy=sample.noisy)
        if len(item.names) >= sample.names and item.samples.size >= sample.seconds * RATE:
            return item
    raise RuntimeError(f"no utterance fits the sample {sample.name!r}")


def _write_lines(path: Path, entries: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


if __name__ == "__main__":
    app()
