"""Long audio of a batch job: it is not held in memory, but decoded again where it is used."""

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from batch_jobs import RATE, tone, write_lines

from granite_jax.audio.load import AccessError, Audio, Recording, load_audio
from granite_jax.batch.access import AudioStorage
from granite_jax.batch.manifest import Manifest
from granite_jax.batch.reading import Kind, Reader, Source, Task, reading
from granite_jax.inference.options import TranscribeOptions


def read_all(reader: Reader, manifest: Manifest, kind: Kind = "threads") -> list[Any]:
    with reading(Source(manifest, [Task(0, manifest.indices(0))]), reader, kind, 1) as entries:
        return list(entries)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """A short file, a long one, a segment of it, and a long one whose end is damaged."""
    noise = np.random.default_rng(0).normal(0, 0.1, 30 * RATE)
    soundfile.write(tmp_path / "short.wav", tone(1), RATE)
    soundfile.write(tmp_path / "long.flac", noise, RATE)
    data = bytearray((tmp_path / "long.flac").read_bytes())
    data[-20_000:-10_000] = b"\x55" * 10_000
    (tmp_path / "damaged.flac").write_bytes(data)
    lines: list[dict[str, Any]] = [
        {"audio": "short.wav"},
        {"audio": "long.flac"},
        {"audio": "long.flac", "offset": 5.5, "duration": 20, "id": "part"},
        {"audio": "damaged.flac"},
    ]
    return Manifest.scan(write_lines(tmp_path / "m.jsonl", *lines), 4, TranscribeOptions())


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_long_audio_is_a_recording(tmp_path: Path, manifest: Manifest, kind: Kind) -> None:
    # Given a reader that holds 10 seconds, and no limit
    reader = Reader(AudioStorage(str(tmp_path)), None, hold_seconds=10.0)
    # When entries are read, then what is longer can be decoded again, as often as needed, also after pickling
    short, long, part, damaged = read_all(reader, manifest, kind)
    assert isinstance(short.audio, Audio) and len(short.audio.samples) == RATE
    whole = load_audio(tmp_path / "long.flac").samples
    for loaded, expected in ((long, whole), (part, whole[11 * RATE // 2 :][: 20 * RATE])):
        assert isinstance(loaded.audio, Recording) and loaded.audio.name == "long.flac"
        assert loaded.file["bytes"] == (tmp_path / "long.flac").stat().st_size
        for recording in (loaded.audio, loaded.audio, pickle.loads(pickle.dumps(loaded.audio))):
            np.testing.assert_array_equal(np.concatenate([*recording.blocks()]), expected)
    # And damage behind what is held is noticed by the process, or else when it is decoded again
    if kind == "processes":
        assert damaged.audio is None and damaged.error.startswith("damaged.flac: is damaged")
    else:
        with pytest.raises(ValueError, match=r"^damaged\.flac: is damaged"):
            list(damaged.audio.blocks())
    # And a file that is gone by then is out of reach
    (tmp_path / "long.flac").unlink()
    with pytest.raises(AccessError, match=r"^long\.flac: no such file"):
        list(long.audio.blocks())


def test_only_what_is_held_is_decoded_at_first(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a count of the decoded samples
    from granite_jax.batch import reading

    counts: list[int] = []
    decode = reading.decode

    def counted(*arguments: Any) -> Iterator[np.ndarray]:
        blocks = decode(*arguments)
        while True:
            try:
                block = next(blocks)
            except StopIteration as end:
                return end.value
            counts.append(len(block))
            yield block

    monkeypatch.setattr(reading, "decode", counted)
    # When a long entry is read by a thread, then hardly more than what is held has been decoded
    reader = Reader(AudioStorage(str(tmp_path)), None, hold_seconds=10.0)
    reader(manifest.read(0)[1])
    assert 10 * RATE < sum(counts) <= 10 * RATE + (1 << 16)
    # And the limit holds for what is longer
    loaded = Reader(AudioStorage(str(tmp_path)), 20.0, hold_seconds=10.0)(manifest.read(0)[1])
    assert loaded.error == "long.flac: is longer than 20 seconds"


class FlakyStorage(AudioStorage):
    """Each file that is opened fails at a later position than the one before, as remote ones do."""

    failures = 0

    def open(self, name: str) -> Any:
        data = (Path(self.root) / name).read_bytes()
        end = len(data) * (2 + self.__class__.failures) // 6
        self.__class__.failures += 1

        class FlakyFile(io.BytesIO):
            def read(self, size: int | None = -1, /) -> bytes:
                if self.tell() + (size or 0) > end and self.tell() > 100_000:
                    raise TimeoutError("no answer")
                return super().read(size)

        return FlakyFile(data)


def test_errors_that_pass_are_not_noticed(tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a long file whose server fails again and again, later each time
    naps: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", naps.append)
    loaded = Reader(FlakyStorage(str(tmp_path)), None, hold_seconds=5.0)(manifest.read(0)[1])
    assert isinstance(loaded.audio, Recording)
    naps.clear()
    # When it is decoded, then each sample is there once
    monkeypatch.setattr(FlakyStorage, "failures", 0)
    samples = np.concatenate([*loaded.audio.blocks()])
    np.testing.assert_array_equal(samples, load_audio(tmp_path / "long.flac").samples)
    assert len(naps) >= 3
    # And an error that stays is one of access
    monkeypatch.setattr(FlakyStorage, "failures", -1000)
    with pytest.raises(AccessError, match=r"^long\.flac: cannot be read \(no answer\)"):
        list(loaded.audio.blocks())
