"""A corpus on disk: `audio.i16`, samples of all utterances one after another, and `index.jsonl`, a line for each."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Utterance:
    """One stored utterance; `samples` is int16 `[n]` at 16 kHz."""

    id: str
    text: str
    names: tuple[str, ...]
    kind: str
    voice: str
    speed: int
    snr_db: float | None
    samples: NDArray[np.int16]


class Corpus:
    """A generated directory, read through a memory map."""

    def __init__(self, entries: list[dict[str, Any]], audio: NDArray[np.int16]) -> None:
        self._entries, self._audio = entries, audio

    @classmethod
    def open(cls, directory: str | Path) -> "Corpus":
        """Opens what `generate` wrote. Raises FileNotFoundError, or ValueError if the index reaches past the audio."""
        root = Path(directory)
        with open(root / "index.jsonl", encoding="utf-8") as lines:
            entries = [json.loads(line) for line in lines]
        audio = np.memmap(root / "audio.i16", dtype="<i2", mode="r")
        end = max((e["offset"] + e["samples"] for e in entries), default=0)
        if end > audio.size:
            raise ValueError(f"{root / 'audio.i16'}: index needs {end} samples, file holds {audio.size}")
        return cls(entries, audio)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Utterance:
        entry = self._entries[index]
        samples = self._audio[entry["offset"] : entry["offset"] + entry["samples"]]
        fields = {key: entry[key] for key in ("id", "text", "kind", "voice", "speed", "snr_db")}
        return Utterance(names=tuple(entry["names"]), samples=samples, **fields)

    def __iter__(self) -> Iterator[Utterance]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Samples of every utterance, `[len(self)]`."""
        return np.array([e["samples"] for e in self._entries], np.int64)
