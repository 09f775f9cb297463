"""Damaged files: what is not damaged is there, at its time, and what is damaged is flagged."""

import io
import math
import random
import runpy
import struct
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import soundfile

from granite_jax.audio import decode, frames
from granite_jax.audio.clock import Clock, Sound, joined_spans
from granite_jax.audio.load import Audio, load_audio, load_segment

ROOT = Path(__file__).parents[1]
benchmark = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "damage.py")))
FORMATS, KINDS, RATE = benchmark.FORMATS, benchmark.KINDS, benchmark.RATE
PLACES = 3
# Seconds by which later sound may be shifted, where nothing in the file tells how much is missing, or too little.
SHIFTS = {
    ("WAV", "cut"): 0.1,
    ("MP3", "cut"): 1.0,
    ("AAC", "cut"): 1.0,
    ("AAC", "zeros"): 0.6,
    ("AAC", "noise"): 0.6,
    ("MPEG-TS", "cut"): 0.1,  # PES packets of which nothing is left; clocks may differ by this much
}
CLUSTER = 5.0  # seconds of WebM, in which FFmpeg finds nothing behind the damage


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    parts = [soundfile.read(ROOT / "samples" / f"{name}.wav", dtype="float32")[0] for name in ("request", "bakery")]
    return np.concatenate([*parts, parts[0]])


@pytest.fixture(scope="module")
def files(speech: np.ndarray) -> dict[str, bytes]:
    return {form: benchmark.encode(speech, form) for form in FORMATS}


def touches(spans: Iterable[tuple[float, float]], other: tuple[float, float]) -> bool:
    return any(start - 0.1 <= other[1] and end + 0.1 >= other[0] for start, end in spans)


def is_flagged(audio: Audio, span: tuple[float, float]) -> bool:
    """Whether the flags and the damage tell of it."""
    return "damaged-input" in audio.condition.flags and touches(audio.condition.damage, span)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMATS)
def test_what_is_not_damaged_is_kept(form: str, kind: str, files: dict[str, bytes]) -> None:
    # Given a file that is damaged at random places, not at its ends
    data, whole = files[form], load_audio(files[form])
    packets = [packet for packet in benchmark.stretches(data) if packet.time >= 1.5 and packet.until <= 7.5]
    generator = random.Random(f"{form} {kind}")
    shift = SHIFTS.get((form, kind), 0.05)
    for _ in range(PLACES):
        damaged = benchmark.damage(data, packets, kind, generator)

        # When it is read
        audio = load_audio(damaged.data)

        # Then all values are samples, and those outside of the damage are there in time
        assert np.isfinite(audio.samples).all() and np.abs(audio.samples).max() < 1.5  # resampling noise adds to it
        if (form, kind) == ("M4A", "cut"):  # its index does not fit what is behind the cut
            kept = round(max(0.0, damaged.span[0] - 0.5) * 16_000)
            np.testing.assert_array_equal(audio.samples[:kept], whole.samples[:kept])
            assert set(audio.condition.flags) & {"damaged-input", "truncated-input"}
        elif kind != "swap":
            start, end = damaged.span
            span = (start, math.ceil(end / CLUSTER) * CLUSTER) if form == "WebM" else damaged.span
            assert all(benchmark.windows_kept(audio.samples, whole.samples, span, shift)), damaged.place
            if span[1] < whole.duration:
                assert audio.duration == pytest.approx(whole.duration, abs=shift), damaged.place
        # And the damage is flagged, unless it cannot be noticed, or nothing but the end of the file tells of it
        if form != "WAV" and kind in ("zeros", "noise"):
            is_to_the_end = form == "WebM" and "truncated-input" in audio.condition.flags
            assert is_flagged(audio, damaged.span) or is_to_the_end, damaged.place


@pytest.mark.parametrize("form", ["Ogg Vorbis", "Ogg Opus"])
@pytest.mark.parametrize("index", [0, 1, -2])
def test_pages_at_the_ends_of_ogg_may_be_missing(form: str, index: int, files: dict[str, bytes]) -> None:
    # Given Ogg without a page of sound: the first or second one, or that before the last one
    data = files[form]
    page = benchmark.stretches(data)[index]
    # When it is read
    audio, whole = load_audio(data[: page.start] + data[page.end :]), load_audio(data)
    # Then there is silence of its length, which is flagged
    span = page.time, page.until
    assert audio.duration == pytest.approx(whole.duration, abs=0.05)
    assert all(benchmark.windows_kept(audio.samples, whole.samples, span))
    # And FFmpeg gives the last page the time of the missing one, so that what is missing is noticed behind it
    assert audio.condition.flags == ("damaged-input",) and (index == -2 or is_flagged(audio, span))


def remuxed(data: bytes, muxer: str, gap_at: float, seconds: float) -> bytes:
    """The packets of a file in another one, those from a time on so many seconds later."""
    written = io.BytesIO()
    source: Any = av.open(io.BytesIO(data))
    with source, av.open(written, "w", format=muxer) as target:
        track = source.streams.audio[0]
        stream = target.add_stream_from_template(track)
        for packet in source.demux(track):
            if packet.pts is None or packet.dts is None or packet.time_base is None:
                continue
            late = round(seconds / packet.time_base) if packet.pts * packet.time_base >= gap_at else 0
            packet.pts, packet.dts, packet.stream = packet.pts + late, packet.dts + late, stream
            target.mux(packet)
    return written.getvalue()


@pytest.mark.parametrize(
    ("form", "muxer"), [("M4A", "mp4"), ("M4A", "matroska"), ("AAC", "mpegts"), ("WebM", "webm"), ("WebM", "matroska")]
)
def test_a_gap_in_the_clock_is_silence(form: str, muxer: str, files: dict[str, bytes]) -> None:
    # Given packets that are three seconds late from the fourth second on
    data = files[form]
    whole = load_audio(data).samples
    # When the file is read
    audio = load_audio(remuxed(data, muxer, 4.0, 3.0))
    # Then the gap is silent and flagged, and the rest is in its place
    assert audio.duration == pytest.approx(len(whole) / RATE + 3.0, abs=0.1)
    assert is_flagged(audio, (4.0, 7.0)) and "truncated-input" not in audio.condition.flags
    assert np.abs(audio.samples[round(4.1 * RATE) : round(6.9 * RATE)]).max() < 0.02
    for start in range(0, len(whole) - RATE // 2, RATE // 2):
        seconds = start / RATE
        if seconds <= 3.0:
            assert benchmark.is_kept(audio.samples, whole, start)
        elif seconds >= 4.5:
            assert benchmark.is_kept(audio.samples[3 * RATE :], whole, start)
    # And an excerpt behind it is that of the whole
    excerpt = load_segment(io.BytesIO(remuxed(data, muxer, 4.0, 3.0)), "x", offset=8.0, duration=1.0).samples
    assert benchmark.is_kept(excerpt, audio.samples[8 * RATE :], 0)


@pytest.mark.parametrize("form", ["AAC", ("MPEG-TS")])
def test_streams_one_after_another_are_read(form: str, speech: np.ndarray, files: dict[str, bytes]) -> None:
    # Given three recordings in one file, the second with another sampling rate, each with a clock of its own
    other = benchmark.encode(speech[: 3 * RATE], form, rate=22050)
    size = len(load_audio(files[form]).samples)
    # When the file is read
    audio = load_audio(files[form] + other + files[form])
    # Then all of them are there
    assert audio.duration == pytest.approx((2 * len(speech)) / RATE + 3.0, abs=0.2)
    second, third = audio.samples[size:], audio.samples[-size:]
    for start in range(RATE // 2, 2 * RATE, RATE // 2):
        assert benchmark.is_kept(audio.samples, speech, start)
        assert benchmark.is_kept(second, speech, start, 0.1)
        assert benchmark.is_kept(third, speech, start, 0.1)


def test_a_float_wav_with_values_that_no_sound_has_is_read(speech: np.ndarray) -> None:
    # Given a WAV with NaN, infinite and huge values within it
    broken = speech.copy()
    broken[5 * RATE : 5 * RATE + 300] = np.repeat(np.array([np.nan, np.inf, -1e30], np.float32), 100)
    written = io.BytesIO()
    soundfile.write(written, broken, RATE, format="WAV", subtype="FLOAT")
    # When it is read, then these are silent, and all others as they are
    audio = load_audio(written.getvalue())
    broken[5 * RATE : 5 * RATE + 300] = 0.0
    np.testing.assert_array_equal(audio.samples, broken)
    assert is_flagged(audio, (5.0, 5.02))


def test_a_wav_beyond_4_gib_is_read_to_its_end(speech: np.ndarray, tmp_path: Path) -> None:
    # Given a sparse WAV of eight channels whose 32-bit size wrapped, with speech at its end
    tail = np.repeat(speech[:, None], 8, axis=1).tobytes()
    size = (0x1_0000_0000 + 300_000_000) // 32 * 32
    form = struct.pack("<IHHIIHH", 16, 3, 8, RATE, RATE * 32, 32, 32)
    head = b"RIFF" + struct.pack("<I", size + 36 & 0xFFFF_FFFF) + b"WAVEfmt " + form
    with tempfile.TemporaryFile(dir=tmp_path) as file:
        file.write(head + b"data" + struct.pack("<I", size & 0xFFFF_FFFF))
        file.seek(44 + (size & 0xFFFF_FFFF))
        file.write(b"\xff" * 64)  # sound, where other chunks would follow
        file.seek(44 + size - len(tail))
        file.write(tail)
        # When the end is read, then it is there
        excerpt = load_segment(file, "x", offset=(size - len(tail)) / (RATE * 32))
    np.testing.assert_allclose(excerpt.samples, speech, atol=1e-6)


# The clock alone


def sounds(start: float, seconds: float, step: float = 0.1) -> list[Sound]:
    """Sounds one after another, at 1 kHz, whose samples are their own times in milliseconds, plus one."""
    milliseconds = np.arange(round(start * 1000), round((start + seconds) * 1000), dtype=np.float32)
    size = round(step * 1000)
    return [
        Sound(float(milliseconds[i]) / 1000, milliseconds[i : i + size, None] + 1, 1000.0)
        for i in range(0, len(milliseconds), size)
    ]


def placed(given: Sequence[Sound], **options: Any) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """What the clock makes of sounds: samples, and the damage in seconds."""
    clock = Clock(**options)
    chunks = [chunk for sound in given for chunk in clock.place(sound)] + list(clock.finish())
    starts = [chunk.start for chunk in chunks]
    assert starts == np.cumsum([0, *[len(chunk.frames) for chunk in chunks]])[:-1].tolist()
    return np.concatenate([chunk.frames for chunk in chunks])[:, 0], clock.damage


def times(start: float, seconds: float) -> np.ndarray:
    return np.concatenate([sound.frames[:, 0] for sound in sounds(start, seconds)])


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * 1000), np.float32)


def later(sound: Sound, seconds: float) -> Sound:
    assert sound.time is not None
    return sound._replace(time=sound.time + seconds)


def test_clocks_fill_gaps() -> None:
    # Given sound that goes on two seconds later, when it is placed, then there is silence, which is damage
    samples, damage = placed([*sounds(0, 1), *sounds(3, 1)])
    np.testing.assert_array_equal(samples, np.concatenate([times(0, 1), silence(2), times(3, 1)]))
    assert damage == [pytest.approx((1.0, 3.0))]


def test_clocks_fill_short_gaps_behind_a_loss_alone() -> None:
    # Given 20 ms that are missing, with and without a packet that could not be decoded
    first, second = sounds(0, 1), sounds(1.02, 1)
    # When they are placed, then it is silence in the first case alone
    samples, damage = placed([*first, second[0]._replace(follows_loss=True), *second[1:]])
    assert len(samples) == 2020 and damage == [pytest.approx((1.0, 1.02))]
    samples, damage = placed([*first, *second])
    assert len(samples) == 2000 and damage == []


def test_clocks_follow_jitter() -> None:
    # Given times that are up to 60 ms wrong, when sounds are placed, then they follow one another
    jitter = np.random.default_rng(0).uniform(-0.06, 0.06, 30)
    samples, damage = placed([later(sound, float(by)) for sound, by in zip(sounds(0, 3), jitter, strict=True)])
    np.testing.assert_array_equal(samples, times(0, 3))
    assert damage == []


@pytest.mark.parametrize("by", [0.3, 50.0, 1e6])
def test_clocks_do_not_believe_a_single_time(by: float) -> None:
    # Given one sound whose time is wrong, when it is placed, then it follows what is before
    given = sounds(0, 3)
    given[12] = later(given[12], by)
    samples, damage = placed(given)
    np.testing.assert_array_equal(samples, times(0, 3))
    assert damage == []


def test_clocks_leave_out_what_comes_twice() -> None:
    # Given half a second for the second time, when it is placed, then it is left out, which is damage
    samples, damage = placed([*sounds(0, 3), *sounds(2, 0.5), *sounds(3, 1)])
    np.testing.assert_array_equal(samples, times(0, 4))
    assert damage == [pytest.approx((3.0, 3.0))]


def test_clocks_go_on_behind_a_loss_amid_disorder() -> None:
    # Given two stretches that changed places, and 20 ms behind them that could not be decoded
    behind = sounds(3.62, 5)
    given = [*sounds(0, 3), *sounds(3.3, 0.3), *sounds(3, 0.3), behind[0]._replace(follows_loss=True), *behind[1:]]
    # When they are placed, then what follows is where its time says
    samples, _ = placed(given)
    np.testing.assert_array_equal(samples[3620:], times(3.62, 5))


def test_clocks_may_start_anew_several_times() -> None:
    # Given three recordings with clocks of their own, when they are placed, then all of them follow one another
    samples, damage = placed([*sounds(0, 9), *sounds(0, 3), *sounds(0, 9)])
    np.testing.assert_array_equal(samples, np.concatenate([times(0, 9), times(0, 3), times(0, 9)]))
    assert damage == []


@pytest.mark.parametrize("start", [0.0, 5.0])
def test_clocks_may_start_anew(start: float) -> None:
    # Given a clock that goes back for good, when its sound is placed, then it follows what is before
    samples, damage = placed([*sounds(0, 20), *sounds(start, 25)])
    np.testing.assert_array_equal(samples, np.concatenate([times(0, 20), times(start, 25)]))
    assert damage == []


def test_clocks_correct_drift() -> None:
    # Given sound of which a hundredth is missing throughout
    given = [later(sound, 0.001 * i) for i, sound in enumerate(sounds(0, 100))]
    # When it is placed, then it ends when it should
    samples, damage = placed(given)
    assert len(samples) / 1000 == pytest.approx(101.0, abs=0.15)
    np.testing.assert_array_equal(samples[samples > 0], times(0, 100))
    assert damage


def test_gaps_do_not_reach_beyond_the_length() -> None:
    # Given a jump to the second hour of ten seconds, when it is placed, then it is no gap
    samples, damage = placed([*sounds(0, 5), *sounds(5000, 5)], longest=10.0)
    np.testing.assert_array_equal(samples, np.concatenate([times(0, 5), times(5000, 5)]))
    assert damage == []


def test_spans_are_joined() -> None:
    # Given spans out of order, some of them close, when they are joined, then they are sorted, and none are close
    assert joined_spans([(8.0, 8.0), (1.0, 4.0), (2.0, 3.0), (4.9, 5.0), (6.0, 6.5)]) == [
        (1.0, 5.0),
        (6.0, 6.5),
        (8.0, 8.0),
    ]
    assert joined_spans([]) == []
    # And there are never more than a hundred
    many = joined_spans([(10.0 * i, 10.0 * i + 1) for i in range(1000)])
    assert len(many) == 100 and (many[0], many[-1]) == ((0.0, 1.0), (990.0, 9991.0))


def pcm(channels: int = 1, rate: int = RATE, **options: Any) -> bytes:
    """A WAV of a second of silence."""
    written = io.BytesIO()
    soundfile.write(written, np.zeros((rate, channels), np.int16), rate, format="WAV", **options)
    return written.getvalue()


STUB = b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0"
NOISE = np.random.default_rng(0).integers(1, 255, 200_000, np.uint8).tobytes()


@pytest.mark.parametrize(
    "between",
    [
        STUB,
        pcm(65),
        pcm(rate=500),
        b"fLaC\x80\0\0\x22" + bytes(34) + b"\x55" * 9000,
        b"OggS\0\2" + b"\xff" * 300,
        NOISE,
    ],
    ids=["stub", "65 channels", "500 Hz", "FLAC", "Ogg", "noise"],
)
def test_recordings_are_read_around_what_is_none(between: bytes, files: dict[str, bytes]) -> None:
    # Given two recordings with something between them that cannot be decoded
    whole = load_audio(files["WAV"])
    # When they are read, then both are there, and a flag tells where something is missing
    audio = load_audio(files["WAV"] + between + files["WAV"])
    np.testing.assert_array_equal(audio.samples, np.concatenate([whole.samples] * 2))
    assert audio.condition.flags == ("damaged-input",)
    assert audio.condition.damage == (
        (pytest.approx(whole.duration, abs=1e-3), pytest.approx(whole.duration, abs=1e-3)),
    )


def test_very_many_recordings_are_read_up_to_a_limit(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    # Given more recordings than a file may hold, when it is read, then the first ones are there, and a flag tells
    monkeypatch.setattr(decode, "_MAX_PARTS", 2)
    audio, whole = load_audio(files["WAV"] * 3), load_audio(files["WAV"])
    assert audio.condition.flags == ("damaged-input",) and len(audio.samples) == 2 * len(whole.samples)


def test_recordings_far_apart_are_read(files: dict[str, bytes]) -> None:
    # Given an MP3, a megabyte of zeros, and another one, when they are read, then both are there
    whole = load_audio(files["MP3"])
    audio = load_audio(files["MP3"] + bytes(1 << 20) + files["MP3"])
    assert audio.condition.flags == () and len(audio.samples) == 2 * len(whole.samples)


def test_big_endian_files_are_read(files: dict[str, bytes]) -> None:
    # Given the bytes of a WAV in the other order, when it is read, then it is the same
    samples, rate = soundfile.read(io.BytesIO(files["WAV"]), dtype="int16")
    written = io.BytesIO()
    soundfile.write(written, samples, rate, format="WAV", subtype="PCM_16", endian="BIG")
    np.testing.assert_array_equal(load_audio(written.getvalue()).samples, load_audio(files["WAV"]).samples)


def test_frames_are_counted_once(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    # Given an MP3 that counts its frames, with damage every few kilobytes
    data, begun, runs = bytearray(files["MP3"]), [], frames.runs
    for place in range(3000, len(data) - 300, 2000):
        data[place : place + 300] = bytes(300)
    monkeypatch.setattr(frames, "runs", lambda *given: begun.append(given) or runs(*given))
    # When it is read, then all of its frames are looked for twice, not for each of the places
    assert load_audio(bytes(data)).duration == pytest.approx(load_audio(files["MP3"]).duration, abs=0.1)
    assert len([start for _, start, _ in begun if start > 0]) <= 4  # twice in the damaged file, once in the other one


def test_more_channels_than_eight_are_read() -> None:
    # Given planes of sixteen channels, of which PyAV shows more, when it is read, then it is their mean
    written = io.BytesIO()
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE).astype(np.float32)
    with av.open(written, "w", format="matroska") as container:
        stream: Any = container.add_stream("wavpack", rate=RATE)
        stream.layout = "hexadecagonal"
        packed = np.repeat(tone, 16).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(packed, format="flt", layout="hexadecagonal")
        frame.sample_rate = RATE
        for planar in av.AudioResampler(stream.codec_context.format, "hexadecagonal", RATE).resample(frame):
            container.mux(stream.encode(planar))
        container.mux(stream.encode(None))
    audio = load_audio(written.getvalue())
    assert audio.duration == pytest.approx(2.0, abs=0.2) and 0.1 < np.abs(audio.samples).max() < 0.5
