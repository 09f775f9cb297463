"""The committed audio: held-out clips of `eval demo`, and samples for people to try.

    python -m granite_jax.training.recipes.demo.clips heldout granite_jax/evaluation/heldout_clips
    python -m granite_jax.training.recipes.demo.clips samples samples

All sentences were written for this project. The clips are a part of the recipe's test set, plus joined sentences.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
import soxr
import typer

from granite_jax.training.corpus import Utterance
from granite_jax.training.recipes.demo import sets, synthesis
from granite_jax.training.recipes.demo.grammar import Sentence
from granite_jax.waveform import SAMPLING_RATE

FREE_CLIPS, GRAMMAR_CLIPS, JOINED_CLIPS = 150, 120, 30
_JOINED_SEED, _SAMPLES_SEED = 8, 7
_OPUS_COMPRESSION = 0.9  # 0 (largest) to 1 (smallest)

app = typer.Typer(add_completion=False, help=__doc__)


def _joined(rng: np.random.Generator, index: int) -> list[Sentence]:
    """Two to eight sentences, alternately free ones and the grammar's."""
    lines = rng.choice(len(sets.TEST_LINES), size=8, replace=False)
    pairs = ((sets.free_sentence(rng, sets.TEST_LINES[i]), *sets.grammar(rng, index)) for i in lines)
    return list(itertools.islice(itertools.chain.from_iterable(pairs), int(rng.integers(2, 9))))


def _clips() -> Iterator[tuple[str, Utterance]]:
    for kind, count in (("free", FREE_CLIPS), ("grammar", GRAMMAR_CLIPS)):
        utterances = (item for item in sets.SETS["test"]() if item.kind == kind)
        yield from ((f"{kind}-{i:03d}", item) for i, item in enumerate(itertools.islice(utterances, count)))
    utterances = synthesis.stream(_JOINED_SEED, range(JOINED_CLIPS), "heldout", _joined)
    yield from ((f"joined-{i:03d}", item) for i, item in enumerate(utterances))


@app.command()
def heldout(out: Path) -> None:
    """Write the clips to OUT as Ogg/Opus files with a manifest, heldout.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    entries = []
    for name, item in _clips():
        path = out / f"{name}.ogg"
        sf.write(path, item.samples, SAMPLING_RATE, format="OGG", subtype="OPUS", compression_level=_OPUS_COMPRESSION)
        entry = synthesis.manifest_entry(item) | {"id": name, "duration": round(item.samples.size / SAMPLING_RATE, 3)}
        entries.append({"audio": path.name, **entry})
    _write_lines(out / "heldout.jsonl", entries)


@dataclass(frozen=True)
class Sample:
    """A sample: sentences that are said one after another, the voice, and the recording."""

    name: str
    voice: str
    sentences: tuple[str, ...]
    noisy: bool = False
    rate: int = SAMPLING_RATE


SAMPLES = (
    Sample("request", "en-us+f3", ("i need you to turn on the screen in the main hall",)),
    Sample("numbers", "en-us", ("open the file named vuknoba and read line fifty eight",)),
    Sample("one-name", "en+f2", ("druknop left the contract near the garage",)),
    Sample("two-names", "en-us+m7", ("share the training video with kravdab but not with zikdik",)),
    Sample("noisy", "en-us+f1", ("share the survey with huntubo but not with brikvifi",), noisy=True),
    Sample("stereo-44k", "en-gb", ("search for hotels near blevkub for three nights",), rate=44_100),
    Sample("lantern", "flite:slt", ("the old lantern swung from a hook above the stable door",)),
    Sample("bakery", "en+m1", ("piznosh and timbado opened a bakery beside the canal",)),
    Sample(
        "long",
        "en-us+m2",
        (
            "i need you to call hizposh on january second",
            "open the minutes and go to page thirty three",
            "can you send the receipt to kilpim in ten days",
            "the night train from dublin is twenty three minutes late",
            "the password for the velnak account is seven nine eight two",
            "i'd like to learn more about tax law at eight ten",
            "don't forget to pay primgazi thirteen dollars at noon",
        ),
    ),
)


@app.command()
def samples(out: Path) -> None:
    """Write the samples to OUT as WAV files, with their texts in samples.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    babble = synthesis.babble_clips(_SAMPLES_SEED, "heldout")
    entries = []
    for index, sample in enumerate(SAMPLES):
        sentences = [Sentence(text, ()) for text in sample.sentences]
        fixed = {"voice": sample.voice, "noisy": sample.noisy}
        item = synthesis.utterance(
            _SAMPLES_SEED, index, "heldout", lambda rng, i, sentences=sentences: sentences, babble, **fixed
        )
        audio = item.samples
        if sample.rate != SAMPLING_RATE:
            resampled = soxr.resample(audio, SAMPLING_RATE, sample.rate)
            audio = np.stack([resampled, resampled // 2], axis=1)  # stereo, the voice nearer to the left
        sf.write(out / f"{sample.name}.wav", audio, sample.rate, subtype="PCM_16")
        entries.append({"audio": f"{sample.name}.wav", "text": item.text})
    _write_lines(out / "samples.jsonl", entries)


def _write_lines(path: Path, entries: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


if __name__ == "__main__":
    app()
