"""Synthetic speech: `texts`, `grammar` or given sentences in the voices of espeak-ng and flite, as 16 kHz int16.

    python -m granite_jax.training.recipes.demo.synthesis OUT --split train --count 30000 --seed 1

Utterance i of a seed depends on (seed, i) alone, so neither thread timing nor the count changes it.
`generate` writes `audio.i16` (all samples, one utterance after another), `index.jsonl` and `recipe.json`.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import soxr
import typer
from numpy.typing import NDArray
from rich.progress import track

from granite_jax.files import atomic
from granite_jax.training.corpus import Utterance
from granite_jax.training.recipes.demo import noise
from granite_jax.training.recipes.demo.grammar import Sentence, Split, compose
from granite_jax.training.recipes.demo.noise import Samples
from granite_jax.training.recipes.demo.texts import TextSource
from granite_jax.waveform import SAMPLING_RATE

# espeak-ng ignores the variant in "en-gb+f2" without a word; "en+f2" is the same accent with the variant applied.
ESPEAK_VOICES = (
    "en-us", "en-gb", "en-us+f3", "en+f2", "en-us+m7", "en-gb-x-rp+m3", "en-us+f1", "en+m1", "en-us+m2", "en-us+f4",
    "en-gb-scotland", "en-us-nyc",
)  # fmt: skip
FLITE_VOICES = ("flite:slt", "flite:awb", "flite:kal16")
HELDOUT_VOICE = "flite:rms"
VOICES = ESPEAK_VOICES + FLITE_VOICES
FLITE_SHARE = 0.25
SPEEDS: dict[Split, tuple[int, ...]] = {"train": (135, 150, 165, 180, 195), "heldout": (143, 158, 173, 188)}
NOISES = ("white", "pink", "babble", "hum")
NOISE_SHARE = 0.25
SNR_DB = (5.0, 25.0)
GAIN_DB = (-20.0, 0.0)
EDGE_SECONDS, LONG_EDGE_SECONDS, LONG_EDGE_SHARE = (0.05, 0.4), (0.4, 3.0), 0.1
PAUSE_SECONDS = (0.1, 0.6)
LONG_SHARE = 0.08
MAX_SECONDS = 28.0
WARP, WARP_SHARE = (0.94, 1.07), 0.3
TELEPHONE_SHARE = 0.06
SILENT_SOUNDS = ("nothing", "white", "pink", "hum", "tones", "clicks", "babble")
SILENCE_SECONDS, SILENCE_DB, FAINT_BABBLE_DB = (0.6, 22.0), (-70.0, -6.0), (-60.0, -42.0)
_FULL_SCALE = 0.95
_BABBLE_CLIPS = 24
_BABBLE_STREAM = 0xBABB1E
_BATCH = 512
_FLITE_SPEED = 180  # words a minute at flite's own pace, about

Draw = Callable[[np.random.Generator, int], Sequence[Sentence]]
"""What utterance i says: (its random generator, i) -> sentences, one after another."""


@dataclass(frozen=True)
class Recipe:
    """How one utterance is spoken. Seconds, words a minute, decibels; `snr_db` is None for clean speech.

    Fields:
      warp: factor by which the voice is played faster, so that the speaker sounds smaller; the pace is kept.
      seconds: length of an utterance that says nothing.
    """

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
    warp: float = 1.0
    telephone: bool = False
    seconds: float = 0.0


# --- how to say it -------------------------------------------------------------------------------------------


def draw_recipe(
    rng: np.random.Generator,
    sentences: Sequence[Sentence],
    split: Split,
    *,
    voice: str | None = None,
    noisy: bool | None = None,
) -> Recipe:
    """Draws how `sentences` are spoken; `voice` and `noisy` fix the speaker and the presence of noise."""
    silent = not any(sentence.text for sentence in sentences)
    if noisy is None:
        noisy = bool(rng.random() < NOISE_SHARE)
    if voice is None:
        voices = FLITE_VOICES if rng.random() < FLITE_SHARE else ESPEAK_VOICES
        voice = voices[int(rng.integers(len(voices)))]
    edges = [LONG_EDGE_SECONDS if rng.random() < LONG_EDGE_SHARE else EDGE_SECONDS for _ in range(2)]
    sound = SILENT_SOUNDS[int(rng.integers(len(SILENT_SOUNDS)))] if silent else NOISES[int(rng.integers(len(NOISES)))]
    loudness = FAINT_BABBLE_DB if sound == "babble" else SILENCE_DB
    return Recipe(
        sentences=tuple(sentences),
        voice=voice,
        speed=int(rng.choice(SPEEDS[split])),
        pitch=int(rng.integers(38, 63)),
        gain_db=round(float(rng.uniform(*(loudness if silent else GAIN_DB))), 1),
        lead=float(rng.uniform(*edges[0])),
        trail=float(rng.uniform(*edges[1])),
        pauses=tuple(float(p) for p in rng.uniform(*PAUSE_SECONDS, size=len(sentences))),
        noise=sound if noisy or silent else None,
        snr_db=round(float(rng.uniform(*SNR_DB)), 1) if noisy and not silent else None,
        warp=round(float(rng.uniform(*WARP)), 2) if rng.random() < WARP_SHARE else 1.0,
        telephone=bool(rng.random() < TELEPHONE_SHARE),
        seconds=float(np.exp(rng.uniform(*np.log(SILENCE_SECONDS)))) if silent else 0.0,
    )


def require_synthesizers() -> dict[str, str]:
    """The versions of both synthesizers. Raises RuntimeError that names one that is not installed."""
    for program in ("espeak-ng", "flite"):
        if shutil.which(program) is None:
            raise RuntimeError(f"{program} not found: install it (`apt-get install {program}`) to synthesize speech")
    espeak = subprocess.run(["espeak-ng", "--version"], capture_output=True, text=True, check=True).stdout
    flite = subprocess.run(["flite", "--version"], capture_output=True, text=True).stdout
    version = next(line for line in flite.splitlines() if "version" in line)
    return {"espeak-ng": espeak.split("Data at")[0].strip(), "flite": version.strip()}


def speak(text: str, voice: str, speed: int, pitch: int) -> Samples:
    """Speaks `text`; float32 `[n]` at 16 kHz in [-1, 1]. Raises RuntimeError with the synthesizer's own message.

    Args:
      voice: one of espeak-ng's, or "flite:" and one of flite's, which ignore `pitch`.
    """
    if voice.startswith("flite:"):
        stretch = f"duration_stretch={_FLITE_SPEED / speed:.3f}"
        command = ["flite", "-voice", voice.removeprefix("flite:"), "--setf", stretch, "-t", text, "-o", "/dev/stdout"]
    else:
        command = ["espeak-ng", "-z", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", text]
    process = subprocess.run(command, capture_output=True)
    if process.returncode or not process.stdout:
        message = process.stderr.decode(errors="replace").strip()
        raise RuntimeError(f"{command[0]} failed on {text!r} ({voice}): {message}")
    # A piped WAV header cannot know its length, so only its sample rate is used.
    rate = int.from_bytes(process.stdout[24:28], "little")
    start = process.stdout.index(b"data") + 8
    raw = np.frombuffer(process.stdout[start : start + (len(process.stdout) - start) // 2 * 2], "<i2")
    wave = (raw / 32768).astype(np.float32)
    return soxr.resample(_trim(wave), rate, SAMPLING_RATE).astype(np.float32)


def _trim(samples: Samples) -> Samples:
    """Drops the synthesizer's own near-silence at both ends; the recipe adds its own."""
    loud = np.flatnonzero(np.abs(samples) > 1e-3)
    return samples[loud[0] : loud[-1] + 1] if loud.size else samples


def _voiced(text: str, recipe: Recipe) -> Samples:
    """`text` by the recipe's speaker, warped: 1.1 raises pitch and formants by a tenth, at the same pace."""
    speech = speak(text, recipe.voice, round(recipe.speed / recipe.warp), recipe.pitch)
    return (
        speech
        if recipe.warp == 1.0
        else soxr.resample(speech, SAMPLING_RATE * recipe.warp, SAMPLING_RATE).astype(np.float32)
    )


# --- rendering -----------------------------------------------------------------------------------------------


def babble_clips(seed: int, split: Split) -> list[Samples]:
    """The speech that babble noise is mixed from, the same for every utterance of a seed."""
    clips = []
    for i in range(_BABBLE_CLIPS):
        rng = np.random.default_rng([seed, _BABBLE_STREAM, i])
        recipe = draw_recipe(rng, [compose(rng, split)], split)
        clips.append(speak(recipe.sentences[0].text, recipe.voice, recipe.speed, recipe.pitch))
    return clips


def _silence(seconds: float) -> Samples:
    return np.zeros(int(seconds * SAMPLING_RATE), np.float32)


def _sound(kind: str, rng: np.random.Generator, size: int, clips: list[Samples]) -> Samples:
    makers: dict[str, Callable[[np.random.Generator, int], Samples]] = {
        "nothing": lambda _, size: np.zeros(size, np.float32),
        "white": noise.white, "pink": noise.pink, "hum": noise.hum, "tones": noise.tones, "clicks": noise.clicks,
        "babble": lambda rng, size: noise.babble(rng, size, clips),
    }  # fmt: skip
    return makers[kind](rng, size)


def _peak(audio: Samples, scale: float = 0.0) -> Samples:
    """`audio` with its peak scaled to full scale; a peak below `scale` is scaled as `scale` would be."""
    return audio * np.float32(_FULL_SCALE / max(float(np.abs(audio).max()), scale, 1e-6))


def render(recipe: Recipe, rng: np.random.Generator, clips: list[Samples]) -> tuple[Recipe, NDArray[np.int16]]:
    """Speaks a recipe: int16 `[n]` at 16 kHz, at most 28 s. Returns the recipe with the sentences that fit."""
    if recipe.seconds:
        audio, count = (
            _peak(_sound(str(recipe.noise), rng, int(recipe.seconds * SAMPLING_RATE), clips)),
            len(recipe.sentences),
        )
    else:
        audio, count = _speech(recipe)
        audio = _peak(audio)
        if recipe.noise is not None and recipe.snr_db is not None:
            audio = noise.mix_at_snr(audio, _sound(recipe.noise, rng, audio.size, clips), recipe.snr_db)
        if recipe.telephone:
            audio = noise.telephone(audio)
        audio = _peak(audio, _FULL_SCALE)  # never clip
    audio = audio * np.float32(10 ** (recipe.gain_db / 20))
    fitted = replace(recipe, sentences=recipe.sentences[:count])
    return fitted, np.rint(audio * 32767).astype(np.int16)


def _speech(recipe: Recipe) -> tuple[Samples, int]:
    """The sentences with their pauses, and how many of them fit in 28 s."""
    pieces, count, total = [_silence(recipe.lead)], 0, recipe.lead + recipe.trail
    for sentence, pause in zip(recipe.sentences, recipe.pauses, strict=True):
        speech = _voiced(sentence.text, recipe) if sentence.text else _silence(pause)
        total += speech.size / SAMPLING_RATE + (pause if count else 0)
        if count and total > MAX_SECONDS:
            break
        pieces += [_silence(pause), speech] if count else [speech]
        count += 1
    return np.concatenate([*pieces, _silence(recipe.trail)]), count


def utterance(seed: int, index: int, split: Split, draw: Draw, clips: list[Samples], **fixed: Any) -> Utterance:
    """Synthesizes utterance `index` of `seed`, which says what `draw` does; `fixed` goes to `draw_recipe`."""
    rng = np.random.default_rng([seed, index])
    recipe, samples = render(draw_recipe(rng, draw(rng, index), split, **fixed), rng, clips)
    text = " ".join(s.text for s in recipe.sentences if s.text)
    names = tuple(name for s in recipe.sentences for name in s.names)
    kind = recipe.sentences[0].kind if len(recipe.sentences) == 1 else "joined"
    ident = f"{split}-{seed}-{index:06d}"
    return Utterance(ident, text, names, kind, recipe.voice, recipe.speed, recipe.snr_db, samples)


def joining(source: Callable[[np.random.Generator], Sentence]) -> Draw:
    """Draws one sentence of `source`, or occasionally two to eight."""

    def draw(rng: np.random.Generator, index: int) -> list[Sentence]:
        parts = int(rng.integers(2, 9)) if rng.random() < LONG_SHARE else 1
        return [source(rng) for _ in range(parts)]

    return draw


def stream(seed: int, indices: Sequence[int], split: Split, draw: Draw, **fixed: Any) -> Iterator[Utterance]:
    """Yields utterances in order, synthesized by a pool of threads (the synthesizers run outside Python)."""
    clips = babble_clips(seed, split)
    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        for start in range(0, len(indices), _BATCH):
            batch = indices[start : start + _BATCH]
            yield from pool.map(lambda i: utterance(seed, i, split, draw, clips, **fixed), batch)


def write_corpus(utterances: Iterator[Utterance], out: Path) -> None:
    """Writes `audio.i16` and then `index.jsonl`, or neither."""
    out.mkdir(parents=True, exist_ok=True)
    offset = 0
    with atomic.writing(out / "index.jsonl") as index, atomic.writing(out / "audio.i16") as audio:
        for item in utterances:
            audio.write(item.samples.astype("<i2").tobytes())
            entry = manifest_entry(item) | {"offset": offset, "samples": item.samples.size}
            index.write((json.dumps(entry) + "\n").encode())
            offset += item.samples.size


def manifest_entry(item: Utterance) -> dict[str, Any]:
    """The line of an utterance in a manifest, without its audio."""
    return {k: getattr(item, k) for k in ("id", "text", "names", "kind", "voice", "speed", "snr_db")}


# --- commands ------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, help="Synthesize speech for training and tests with espeak-ng and flite.")


@app.command()
def generate(
    out: Path,
    split: Annotated[str, typer.Option(help="train or heldout")] = "train",
    count: Annotated[int, typer.Option(min=1)] = 30_000,
    seed: Annotated[int, typer.Option(min=0)] = 1,
) -> None:
    """Synthesize COUNT utterances of a split into OUT, which say what `texts` draws."""
    if split not in SPEEDS:
        raise typer.BadParameter(f"split is train or heldout, not {split!r}")
    versions = _require_synthesizers()
    utterances = stream(seed, range(count), split, joining(TextSource.open(split).draw))
    write_corpus(iter(track(utterances, "synthesizing", total=count)), out)
    recipe = {**versions, "split": split, "seed": seed, "count": count, "voices": VOICES, "speeds": SPEEDS[split]}
    (out / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")


def _require_synthesizers() -> dict[str, str]:
    try:
        return require_synthesizers()
    except RuntimeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app()
