"""Media files that FFmpeg decodes: containers, segments, ends that are missing, and what must not be opened."""

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from av.stream import Disposition

from granite_jax import AudioError, Transcriber
from granite_jax.audio.load import RecordingBlocks, load_audio, load_segment
from granite_jax.results import disagreement

RATE = 16000
SAMPLES = Path(__file__).parents[1] / "samples"
# Container: muxer, encoder, rate
KINDS = {
    "m4a": ("ipod", "aac", 44100),
    "mp4": ("mp4", "aac", 16000),
    "mov": ("mov", "alac", 16000),
    "3gp": ("3gp", "aac", 16000),
    "webm": ("webm", "libopus", 48000),
    "mkv": ("matroska", "aac", 16000),
    "wma": ("asf", "wmav2", 16000),
    "aac": ("adts", "aac", 16000),
    "avi": ("avi", "mp2", 16000),
    "ts": ("mpegts", "aac", 16000),
    "ac3": ("ac3", "ac3", 48000),
    "tta": ("tta", "tta", 16000),
    "wv": ("wv", "wavpack", 16000),
    # libsndfile's, too, with a codec that it does not have
    "caf": ("caf", "alac", 16000),
    "wav": ("wav", "wmav2", 16000),
}
# Files that can be read without their end, and whether their headers tell that it is missing
FLAGGED, UNFLAGGED = ("webm", "mkv", "wma", "tta", "wv", "wav"), ("avi", "ts", "ac3")


def encode(samples: np.ndarray, kind: str, *, video: bool = False, start: int = 0, **options: str) -> bytes:
    """A file of float samples `[n]` or `[channels, n]` at 16 kHz, with a video track before them, if asked for.

    Args:
      start: samples of the clock, at the beginning of the sound.
    """
    muxer, codec, rate = KINDS[kind]
    samples = np.atleast_2d(samples).astype(np.float32)
    layout = {1: "mono", 2: "stereo"}[len(samples)]
    written = io.BytesIO()
    with av.open(written, "w", format=muxer, options=options) as container:
        pictures: Any = container.add_stream("mpeg4", rate=10, width=32, height=32) if video else None
        stream: Any = container.add_stream(codec, rate=rate)
        stream.layout, stream.bit_rate = layout, 96000
        resampler = av.AudioResampler(format=stream.codec_context.format, layout=layout, rate=rate)
        for begin in range(0, samples.shape[1], 1600):
            if video:
                container.mux(pictures.encode(av.VideoFrame(32, 32, "yuv420p")))
            frame = av.AudioFrame.from_ndarray(samples[:, begin : begin + 1600].copy(), format="fltp", layout=layout)
            frame.sample_rate, frame.pts = RATE, begin + start
            for resampled in resampler.resample(frame):
                container.mux(stream.encode(resampled))
        for resampled in resampler.resample(None):
            container.mux(stream.encode(resampled))
        container.mux(stream.encode(None))
        if video:
            for _ in range(20):  # two seconds more
                container.mux(pictures.encode(av.VideoFrame(32, 32, "yuv420p")))
            container.mux(pictures.encode(None))
    return written.getvalue()


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    samples, _ = soundfile.read(SAMPLES / "request.wav", dtype="float32")
    return np.tile(samples, 3)


def likeness(found: np.ndarray, expected: np.ndarray, lag: int) -> float:
    """The correlation of a second of both, at the best lag of at most so many samples, either way."""
    expected, found = expected[8000:24000], found[8000 - lag : 24000 + lag]
    products = np.correlate(found, expected, "valid")
    best = found[int(np.argmax(products)) :][: len(expected)]
    return float(np.dot(best, expected) / np.linalg.norm(best) / np.linalg.norm(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_media_files_are_decoded(speech: np.ndarray, kind: str) -> None:
    # Given a file, when it is read, then all of it is there, but for the encoder's own beginning and end
    data = encode(speech, kind)
    audio = load_audio(data)
    assert audio.condition.flags == ()
    assert abs(audio.duration - len(speech) / RATE) < 0.1
    assert likeness(audio.samples, speech, 1600) > 0.9
    # And a segment is that of the whole; containers count milliseconds
    segment = load_segment(io.BytesIO(data), "x", offset=3.0, duration=2.0)
    assert len(segment.samples) == 2 * RATE
    assert likeness(segment.samples, audio.samples[3 * RATE : 5 * RATE], 16) > 0.9


@pytest.mark.parametrize(
    ("kind", "seconds", "lead"),
    [*((kind, seconds, seconds // 1) for kind in ("mp4", "mkv", "ts") for seconds in (0.05, 3.0)), ("ts", 3600.0, 0.0)],
)
def test_times_are_those_of_the_file(speech: np.ndarray, kind: str, seconds: float, lead: float) -> None:
    # Given a video whose sound begins later than the picture, or, by a broken clock, when all has ended
    data = encode(speech, kind, video=True, start=round(seconds * RATE))
    # When it is read, then as much silence comes first, unless that is a codec's delay
    audio = load_audio(data)
    assert audio.condition.flags == ()
    shifted = np.concatenate([np.zeros(round(lead * RATE), np.float32), speech])
    assert abs(audio.duration - len(shifted) / RATE) < 0.2
    assert likeness(audio.samples[round(lead * RATE) :], speech, 1600) > 0.9
    assert np.abs(audio.samples[: max(0, round((lead - 0.1) * RATE))]).max(initial=0.0) == 0.0
    # And a segment is that of the whole, whether it begins before the sound or after it
    for offset in (1.0, 2.5, 4.5):
        segment = load_segment(io.BytesIO(data), "x", offset=offset, duration=2.0).samples
        np.testing.assert_allclose(segment, audio.samples[round(offset * RATE) :][: 2 * RATE], atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "video"), [("m4a", False), ("mp4", True)])
def test_a_recording_is_transcribed_as_its_samples_are(
    kind: str, video: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a sample of several segments as an array and as a file
    samples, _ = soundfile.read(SAMPLES / "long.wav", dtype="float32")
    path = tmp_path / f"long.{kind}"
    path.write_bytes(encode(samples, kind, video=video))
    asr = Transcriber.from_pretrained("demo", dtype="float32")
    expected = asr.transcribe(samples, word_timestamps=True)
    sizes: list[int] = []
    following = RecordingBlocks.__next__

    def counted(blocks: RecordingBlocks) -> np.ndarray:
        block = following(blocks)
        sizes.append(len(block))
        return block

    # When the file is transcribed
    monkeypatch.setattr(RecordingBlocks, "__next__", counted)
    found = asr.transcribe(path, word_timestamps=True)
    # Then text and times are those of the array, but for what the codec changes
    assert disagreement(found.text, expected.text) < 0.04
    assert len(found.segments) == len(expected.segments) > 3
    for ours, theirs in zip(found.segments, expected.segments, strict=True):
        assert (ours.start, ours.end) == pytest.approx((theirs.start, theirs.end), abs=0.1)
    # And it was read in blocks that are shorter than a segment
    assert sum(sizes) == pytest.approx(len(samples), abs=RATE / 10) and max(sizes) < 5 * RATE


@pytest.mark.parametrize("kind", [*FLAGGED, *UNFLAGGED, "m4a", "mov", "caf"])
def test_files_without_their_end_are_told(speech: np.ndarray, kind: str) -> None:
    # Given two thirds of a file, when it is read, then what is there is flagged, or the error names the format
    data = encode(speech, kind)
    data = data[: len(data) * 2 // 3]
    if kind in FLAGGED + UNFLAGGED:
        audio = load_audio(data)
        assert 3 < audio.duration < 7
        assert audio.condition.flags == (("truncated-input",) if kind in FLAGGED else ())
    else:  # the index is at the end
        with pytest.raises(AudioError, match=r"is not (MP4 or QuickTime|CAF) that can be read \("):
            load_audio(data)


def test_tags_in_another_encoding_are_no_fault(speech: np.ndarray) -> None:
    # Given Matroska whose tags are Latin-1, when it is read, then it is that of the file without
    data = encode(speech, "mkv")
    assert b"Lavf" in data
    np.testing.assert_array_equal(load_audio(data.replace(b"Lavf", b"L\xe9vf")).samples, load_audio(data).samples)


@pytest.mark.parametrize("size", [0, 300, 100_000])
def test_tags_before_the_audio_are_skipped(speech: np.ndarray, size: int) -> None:
    # Given AAC behind an ID3 tag, as in segments of streams, when it is read, then it is that of the file without
    data = encode(speech, "aac")
    tag = b"ID3\x04\0\0" + bytes((size >> shift) & 127 for shift in (21, 14, 7, 0)) + bytes(size)
    np.testing.assert_array_equal(load_audio(tag + data).samples, load_audio(data).samples)


def test_channels_that_cancel_out_are_noticed(speech: np.ndarray) -> None:
    # Given channels of opposite phase, when they are read, then one of them is taken
    audio = load_audio(encode(np.stack([speech, -speech]), "mov"))
    assert audio.condition.flags == ("one-channel",)
    np.testing.assert_allclose(np.abs(audio.samples), np.abs(speech), atol=1e-4)


@pytest.mark.parametrize("default", [0, 1])
def test_of_several_tracks_the_default_is_read(default: int) -> None:
    # Given a file with two audio tracks, one of which is silent
    written = io.BytesIO()
    with av.open(written, "w", format="matroska") as container:
        for index in range(2):
            track: Any = container.add_stream("pcm_f32le", rate=RATE)
            track.layout, track.disposition = "mono", Disposition(index == default)
        for index, track in enumerate(container.streams):
            frame = av.AudioFrame.from_ndarray(np.full((1, RATE), 0.5 * index, np.float32), "flt", "mono")
            frame.sample_rate = RATE
            container.mux(track.encode(frame))
    # When it is read, then the track is the default one, and a flag says that there are more
    audio = load_audio(written.getvalue())
    assert audio.condition.flags == ("one-track",)
    np.testing.assert_array_equal(audio.samples, np.full(RATE, 0.5 * default, np.float32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling_rate": 8000}, "has a sampling rate of 16000 Hz, but sampling_rate=8000 was given"),
        ({"max_seconds": 5.0}, "is longer than 5 seconds"),
    ],
)
def test_limits_hold(speech: np.ndarray, options: dict[str, Any], message: str) -> None:
    with pytest.raises(AudioError, match=f"audio: {message}"):
        load_audio(encode(speech, "mov"), **options)


def test_what_is_not_there_is_told(speech: np.ndarray) -> None:
    # Given a video without sound, and a segment behind the end, then the errors say so
    written = io.BytesIO()
    with av.open(written, "w", format="mp4") as container:
        video: Any = container.add_stream("mpeg4", rate=5)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        container.mux(video.encode(av.VideoFrame(32, 32, "yuv420p")))
        container.mux(video.encode(None))
    with pytest.raises(AudioError, match="audio: has no audio track"):
        load_audio(written.getvalue())
    with pytest.raises(AudioError, match="has no audio at 60 seconds"):
        load_segment(io.BytesIO(encode(speech, "mov")), "x", offset=60.0)
    with pytest.raises(AudioError, match="has no audio at 60 seconds"):
        load_segment(io.BytesIO(encode(speech, "wav")), "x", offset=60.0)


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{path}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{path}'\n",
        "<?xml version='1.0'?><MPD><Period><BaseURL>{path}</BaseURL></Period></MPD>",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 0\n",
    ],
    ids=["HLS", "concat", "DASH", "SDP"],
)
def test_lists_of_other_files_are_no_audio(speech: np.ndarray, text: str, tmp_path: Path) -> None:
    # Given a list that FFmpeg would follow, when it is read, then it is no audio
    (tmp_path / "secret.mp4").write_bytes(encode(speech, "mp4"))
    (tmp_path / "list.mp4").write_text(text.format(path=tmp_path / "secret.mp4"))
    with pytest.raises(AudioError, match=r"list\.mp4: is not audio that can be read"):
        load_audio(tmp_path / "list.mp4")
