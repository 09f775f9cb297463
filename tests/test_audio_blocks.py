"""Recordings of any length are read in blocks: the samples of `load_audio`, in bounded memory, as often as needed."""

import contextlib
import io
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile as sf

from granite_jax.audio import load, resample
from granite_jax.audio.load import Audio, Recording, load_audio, num_channels, open_recording
from granite_jax.errors import AudioError
from granite_jax.waveform import SAMPLING_RATE

RATE = 8000


def tone(seconds: float = 1.0, rate: int = SAMPLING_RATE, hertz: float = 440.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def encode(samples: np.ndarray, rate: int = SAMPLING_RATE, form: str = "WAV", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    sf.write(buffer, samples, rate, format=form, subtype=subtype)
    return buffer.getvalue()


def joined(recording: Recording) -> tuple[np.ndarray, tuple[str, ...]]:
    blocks = recording.blocks()
    samples = np.concatenate([*blocks])
    return samples, blocks.condition.flags


class Pipe(io.RawIOBase):
    """A file that can be read once."""

    def __init__(self, data: bytes):
        self.data = io.BytesIO(data)

    def read(self, size: int = -1) -> bytes:
        return self.data.read(size)


# Memory.


@pytest.mark.parametrize(("form", "channels", "megabytes"), [("FLAC", 1, 8), ("FLAC", 2, 64), ("WAV", 1, 8)])
def test_memory_is_bounded(tmp_path: Path, form: str, channels: int, megabytes: int) -> None:
    # Given a file of an hour
    path = tmp_path / f"long.{form}"
    with sf.SoundFile(path, "w", RATE, channels, "PCM_16", format=form) as file:
        for _ in range(60):
            file.write(np.zeros((60 * RATE, channels), np.int16))
    # When its blocks are read, then they are small, are all there, and no more than a chunk of them is in memory
    num_samples = 0
    tracemalloc.start()
    try:
        for block in open_recording(path).blocks():
            assert block.dtype == np.float32 and 0 < len(block) <= 1 << 18
            num_samples += len(block)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert num_samples == 3600 * SAMPLING_RATE
    assert peak < megabytes << 20


def test_there_is_a_limit_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given audio that is longer than the default limit, when it is opened, then the limit is that of the caller
    monkeypatch.setattr(load, "MAX_SECONDS", 2.0)
    for source in (data := encode(tone(3)), tone(3), Audio("audio", tone(3))):
        assert len(joined(open_recording(source))[0]) == 3 * SAMPLING_RATE
        with pytest.raises(AudioError, match="audio: is longer than 1 seconds"):
            joined(open_recording(source, max_seconds=1))
    with pytest.raises(AudioError, match="audio: is longer than 2 seconds"):
        load_audio(open_recording(data))


# Samples.


@pytest.mark.parametrize("rate", [8000, 44_100, 48_000])
@pytest.mark.parametrize("form", ["WAV", "FLAC", "MP3", "OGG"])
def test_blocks_are_what_load_audio_joins(form: str, rate: int) -> None:
    # Given stereo of more than two blocks, when it is read in blocks, then they are those of the whole
    data = encode(np.stack([tone(20, rate), tone(20, rate, 880)], 1), rate, form)
    whole = load_audio(data)
    samples, flags = joined(open_recording(data))
    np.testing.assert_array_equal(samples, whole.samples)
    assert flags == whole.condition.flags == () and abs(whole.duration - 20) < 0.1


def test_an_mp3_that_goes_on_behind_its_declared_end_is_decoded_once() -> None:
    # Given two MP3s whose first header claims the bytes of both
    data = encode(tone(6), form="MP3") + encode(tone(6, hertz=880), form="MP3")
    size_field = max(data.find(b"Info"), data.find(b"Xing")) + 12
    data = data[:size_field] + len(data).to_bytes(4, "big") + data[size_field + 4 :]
    # When they are read, then neither is there twice
    samples, _ = joined(open_recording(data))
    assert abs(len(samples) / SAMPLING_RATE - 12) < 0.2
    spectra = [
        np.abs(np.fft.rfft(samples[start * SAMPLING_RATE :][: 4 * SAMPLING_RATE])).argmax() / 4 for start in (1, 7)
    ]
    assert spectra == [440, 880]


@pytest.mark.parametrize("source", ["file", "array"])
def test_channels_may_cancel_in_one_chunk_only(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    # Given channels that are alike, then of opposite phase, then alike
    monkeypatch.setattr(resample, "CHUNK_VALUES", 2 << 16)
    size = 1 << 16
    one, other = tone(3 * size / SAMPLING_RATE), tone(3 * size / SAMPLING_RATE) / 2
    other[size : 2 * size] *= -2
    frames = np.stack([one, other], 1)
    # When they are mixed, then the loudest is taken where they cancel out, and the mean elsewhere
    samples, flags = joined(open_recording(frames if source == "array" else encode(frames, subtype="FLOAT")))
    expected = frames.mean(axis=1)
    expected[size : 2 * size] = one[size : 2 * size]
    np.testing.assert_allclose(samples, expected, atol=1e-6)
    assert flags == ("one-channel",)


def test_a_channel_can_be_chosen() -> None:
    # Given two channels, when one is chosen, then it is read alone, whatever the other one is
    frames = np.stack([tone(5), -tone(5)], 1)
    for source in (frames, encode(frames, subtype="FLOAT"), io.BytesIO(encode(frames, subtype="FLOAT"))):
        for channel in (0, 1):
            samples, flags = joined(open_recording(source, channel=channel))
            np.testing.assert_array_equal(samples, frames[:, channel])
            assert flags == ()
        with pytest.raises(AudioError, match="audio: has 2 channels, and no channel 2"):
            joined(open_recording(source, channel=2))
    for wrong in (-1, True, 0.5, "left"):
        with pytest.raises(AudioError, match="audio: channel must be a number from 0 on"):
            open_recording(frames, channel=wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(AudioError, match="has 1 channel, and no channel 1"):
        open_recording(Audio("a", tone()), channel=1)


# Media files.


@pytest.mark.parametrize("channels", [1, 2])
def test_media_files_are_read_in_blocks(channels: int) -> None:
    # Given a QuickTime file without loss
    written, rows = io.BytesIO(), np.stack([tone(12), tone(12, hertz=880)])[:channels]
    layout = {1: "mono", 2: "stereo"}[channels]
    with av.open(written, "w", format="mov") as container:
        stream: Any = container.add_stream("pcm_s16le", rate=SAMPLING_RATE, layout=layout)
        packed = np.round(rows * 32767).astype(np.int16).T.reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(packed, format="s16", layout=layout)
        frame.sample_rate = SAMPLING_RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    recording = open_recording(written.getvalue())
    # When it is read, then there are several blocks, which are the file
    blocks = [*recording.blocks()]
    assert len(blocks) > 2
    np.testing.assert_allclose(np.concatenate(blocks), rows.mean(axis=0), atol=1e-4)
    # And it has its channels, which can be chosen, and ends before its end
    assert num_channels(written.getvalue()) == channels
    samples, _ = joined(open_recording(written.getvalue(), channel=channels - 1))
    np.testing.assert_allclose(samples, rows[-1], atol=1e-4)
    begun = recording.blocks()
    next(begun)
    begun.close()


# Reading again, and ending early.


def test_recordings_can_be_read_again(tmp_path: Path) -> None:
    # Given a recording in every form, when it is read twice, and once only in part, then it is the same
    path = tmp_path / "a.flac"
    path.write_bytes(data := encode(tone(10), form="FLAC"))
    expected = load_audio(data).samples
    behind = io.BytesIO(b"header" + data)
    behind.seek(6)
    with open(path, "rb") as file:
        sources: list[Any] = [path, str(path), data, bytearray(data), io.BytesIO(data), Pipe(data), file, behind]
        for source in [*sources, expected, (expected, SAMPLING_RATE), Audio("a", expected), {"bytes": data}]:
            recording = open_recording(source)
            begun = recording.blocks()
            assert len(next(begun)) < len(expected)
            begun.close()
            for _ in range(2):
                np.testing.assert_array_equal(joined(recording)[0], expected)
            assert open_recording(recording) is recording
            np.testing.assert_array_equal(load_audio(recording).samples, expected)
        assert load_audio(file).duration == 10  # a file that was read to its end is read from its beginning
    for source in (path, data, expected, Audio("a", expected)):
        copy = pickle.loads(pickle.dumps(open_recording(source)))
        np.testing.assert_array_equal(joined(copy)[0], expected)


def test_closing_the_blocks_closes_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given blocks of a file, of which some were read
    path = tmp_path / "a.wav"
    path.write_bytes(data := encode(tone(20)))
    opened: list[Any] = []
    monkeypatch.setattr("builtins.open", lambda *_: opened.append(io.BytesIO(data)) or opened[-1])
    recording = open_recording(path)
    assert opened == []
    blocks = recording.blocks()
    next(blocks)
    assert not opened[0].closed
    # When they are closed, then so is the file, and there are no more of them
    blocks.close()
    assert opened[0].closed and list(blocks) == []


def test_errors_on_the_way_name_the_recording(tmp_path: Path) -> None:
    # Given a file that fails in the middle, and one that is missing
    data = encode(tone(60) + np.random.default_rng(0).normal(0, 0.01, 960_000).astype(np.float32), form="FLAC")

    class FailingFile(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if len(data) * 2 // 3 < self.tell() < len(data) - 50_000:
                raise RuntimeError("connection lost")
            return super().read(size)

    # When they are read, then blocks come before the error, which names the recording
    blocks = open_recording(FailingFile(data), name="call\n7").blocks()
    assert len(next(blocks))
    with pytest.raises(AudioError, match=r"^'call\\n7': cannot be read \(connection lost\)"):
        list(blocks)
    missing = open_recording(tmp_path / "missing.wav")
    with pytest.raises(AudioError, match=r"missing\.wav: no such file"):
        next(missing.blocks())


# Channels.


def test_channels_are_counted(tmp_path: Path) -> None:
    # Given sources of several channels, when they are counted, then no samples are decoded
    for channels in (1, 2, 5):
        frames = np.zeros((1000, channels), np.float32)
        path = tmp_path / "a.wav"
        path.write_bytes(data := encode(frames))
        sources = [path, data, io.BytesIO(data), frames, (frames, 8000), {"bytes": data}, frames.T, b"\0" * 99 + data]
        assert [num_channels(source) for source in sources] == [channels] * len(sources)
    assert num_channels(Audio("a", tone())) == num_channels(open_recording(data)) == 1
    # And a file can be read afterwards
    file = io.BytesIO(data)
    assert num_channels(file) == 5 and load_audio(file).duration == 1000 / SAMPLING_RATE


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "audio: is empty"),
        (b"hello", "audio: is not audio that can be read"),
        ("missing.wav", "missing.wav: no such file"),
        (None, "audio: unsupported NoneType"),
        (Pipe(b""), "audio: is a file that is not seekable"),
    ],
)
def test_what_has_no_channels_is_named(source: Any, message: str) -> None:
    with pytest.raises(AudioError, match=f"^{message}"):
        num_channels(source)


def test_checks_of_lengths_are_the_same_for_all() -> None:
    for number, message in ((0, "holds no samples"), (256, "too short: 256 samples")):
        with pytest.raises(AudioError, match=message):
            load.check_samples(number)
    with contextlib.closing(open_recording(np.zeros(0, np.float32)).blocks()) as blocks:
        assert list(blocks) == []
    load.check_samples(257)
