"""Audio of a batch job: it is decoded where it is used, and again after an error that passes."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from batch_jobs import RATE, tone, write_lines

from granite_jax.audio.load import AccessError, Recording, load_audio
from granite_jax.batch.access import AudioStorage
from granite_jax.batch.manifest import Manifest
from granite_jax.batch.reading import Kind, Reader, opening
from granite_jax.options import TranscribeOptions


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
    return Manifest.scan(write_lines(tmp_path / "m.jsonl", *lines), TranscribeOptions())


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_entries_are_decoded_as_often_as_needed(tmp_path: Path, manifest: Manifest, kind: Kind) -> None:
    # Given a reader, whose processes hold 10 seconds
    reader = Reader(AudioStorage(str(tmp_path)), None, hold_seconds=10.0)
    # When entries are opened, then each can be decoded again
    whole = load_audio(tmp_path / "long.flac").samples
    with opening(reader, kind, 1) as open_entry:
        short, long, part, damaged = map(open_entry, manifest.read(range(4)))
        for opened, expected in ((long, whole), (part, whole[11 * RATE // 2 :][: 20 * RATE])):
            for _ in range(2):
                np.testing.assert_array_equal(np.concatenate([*opened.recording.blocks()]), expected)
            assert opened.recording.name == "long.flac"
            assert opened.file["bytes"] == (tmp_path / "long.flac").stat().st_size
        assert len(load_audio(short.recording).samples) == RATE
        # And damage is silence of its length
        blocks = damaged.recording.blocks()
        assert sum(map(len, blocks)) == 30 * RATE
        ((start, end),) = blocks.condition.damage
        assert blocks.condition.flags == ("damaged-input",) and 29 < start < end < 30
        # And a file that is gone by then is out of reach
        (tmp_path / "long.flac").unlink()
        with pytest.raises(AccessError, match=r"^long\.flac: no such file"):
            list(long.recording.blocks())


def test_long_audio_is_not_held_by_a_process(tmp_path: Path, manifest: Manifest) -> None:
    # Given a reader that holds 10 seconds, when a process loads a long entry, then it returns where to read it again
    loaded = Reader(AudioStorage(str(tmp_path)), None, hold_seconds=10.0).load(manifest.read(range(4))[1])
    assert isinstance(loaded.audio, Recording)
    whole = load_audio(tmp_path / "long.flac").samples
    np.testing.assert_array_equal(np.concatenate([*pickle.loads(pickle.dumps(loaded.audio)).blocks()]), whole)
    # And the limit holds for what is longer
    loaded = Reader(AudioStorage(str(tmp_path)), 20.0, hold_seconds=10.0).load(manifest.read(range(4))[1])
    assert loaded.error == "is longer than 20 seconds"


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
    opened = Reader(FlakyStorage(str(tmp_path)), None).open(manifest.read(range(4))[1])
    # When it is decoded, then each sample is there once
    monkeypatch.setattr(FlakyStorage, "failures", 0)
    samples = np.concatenate([*opened.recording.blocks()])
    np.testing.assert_array_equal(samples, load_audio(tmp_path / "long.flac").samples)
    assert len(naps) >= 3
    # And an error that stays is one of access
    monkeypatch.setattr(FlakyStorage, "failures", -1000)
    with pytest.raises(AccessError, match=r"^long\.flac: cannot be read \(no answer\)"):
        list(opened.recording.blocks())
