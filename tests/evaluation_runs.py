"""Evaluations for tests: recordings, and runs with a listener that hears what it is told."""

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from batch_jobs import write_lines
from batch_worker import StandIn

from granite_jax import evaluation
from granite_jax.audio.load import load_audio
from granite_jax.recognition.buckets import Bucket
from granite_jax.transcriber import Transcript

BUCKETS = [Bucket(1, 16000, 8, 16), Bucket(2, 16000, 8, 16), Bucket(2, 48000, 8, 16), Bucket(2, 96000, 8, 16)]
SAID = {
    "a.wav": "Turn on the lamp!",
    "b.wav": "call Dakfiki now",
    "c.wav": "it is twenty five degrees",
    "d.wav": "(laughs)",
    "e.wav": "open the door",
    "f.wav": "close the window please",
}
HEARD = {
    "a.wav": "turn off the big lamp",  # 2 errors in 4 words
    "b.wav": "call dagfigi now",  # 1 in 3
    "c.wav": "it is 25 degrees",  # none in 4
    "d.wav": "ha ha",  # not scored
    "e.wav": "open the door",  # none in 3
    "f.wav": "close the window please",  # none in 4
}


class Listener(StandIn):
    """Hears what it is told, by the file's name; records what it transcribed."""

    def __init__(self, texts: dict[str, str]):
        super().__init__()
        self.texts = texts
        self.buckets = BUCKETS
        self.flags: tuple[str, ...] = ()
        self.compilations = 0
        self.heard: list[str] = []
        self.keywords: dict[str, Any] = {}

    def recognizer(self, _: Any) -> Any:
        return self

    def segment_seconds(self, _: Any) -> float:
        return 30.0

    def warmup(self, buckets: Sequence[Bucket], _: Any = None, *, words: bool) -> None:
        self.compilations += len(buckets) * (2 if words else 1)

    def submit(self, audio: Any, *_: Any, keywords: Any = None) -> "Future[Transcript]":
        loaded = load_audio(audio)
        self.keywords[loaded.name] = keywords
        self.heard.append(loaded.name)
        future: Future[Transcript] = Future()
        future.set_result(Transcript(loaded.name, self.texts[loaded.name], (1,), loaded.duration, flags=self.flags))
        return future


def write_recordings(directory: Path) -> Path:
    """Writes six recordings of half a second, and the manifest of what is said in them, whose path is returned."""
    for name in SAID:
        soundfile.write(directory / name, np.full(8000, 0.1), 16000)
    return write_lines(directory / "calls.jsonl", *({"audio": name, "text": text} for name, text in SAID.items()))


def evaluate(sets: Any, out: Path, texts: dict[str, str] = HEARD, **options: Any) -> tuple[dict[str, Any], Listener]:
    asr: Any = Listener(texts)
    found = evaluation.evaluate(
        [str(each) for each in sets], out, transcriber=(asr, "listener"), **{"part_size": 2, **options}
    )
    assert found is not None
    return found, asr


def numbers(results: dict[str, Any]) -> dict[str, Any]:
    """Without times."""
    timed = ("seconds", "rtfx")
    sets = [{key: value for key, value in each.items() if key not in timed} for each in results["sets"]]
    return {key: value for key, value in results.items() if key not in timed} | {"sets": sets}
