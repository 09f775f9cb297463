"""Batch jobs for tests: a corpus, manifests, and runs with the stand-in for the Transcriber."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from batch_worker import StandIn

from granite_jax import batch
from granite_jax.audio.load import load_audio
from granite_jax.options import TranscribeOptions

RATE = 16000


def write_corpus(directory: Path) -> Path:
    """Writes ten short files in two directories."""
    for i in range(10):
        path = directory / ("a" if i % 2 else "b") / f"{i}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tone(0.1 + 0.01 * i), RATE)
    return directory


def tone(seconds: float) -> np.ndarray:
    return 0.1 * np.sin(np.arange(round(seconds * RATE)))


def write_lines(path: Path, *lines: Any) -> Path:
    """Writes a file of JSON lines. Strings are written as they are."""
    text = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(f"{line}\n" for line in text), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def results(out: Path) -> list[dict[str, Any]]:
    return [line for part in sorted(out.glob("part-*.jsonl")) for line in read_lines(part)]


def run(manifest: Any, out: Any, **options: Any) -> tuple[batch.Summary, StandIn]:
    asr: Any = StandIn()
    return batch.run(manifest, out, transcriber=(asr, "stand-in"), num_readers=2, **options), asr


def text_of(
    path: Path, asked: str = "can you transcribe the speech into a written format?", keywords: Sequence[str] = ()
) -> str:
    """The text that the stand-in writes for a file."""
    options = TranscribeOptions(prompt=asked)
    return StandIn().submit(load_audio(path), options, keywords=list(keywords)).result().text
