"""All that is in a file: streams one after another, junk, headers that were never filled in, ends that are missing."""

import contextlib
import io
import struct

import numpy as np
import pytest
import soundfile as sf

from granite_jax.audio import frames
from granite_jax.audio.load import load_audio, load_segment
from granite_jax.errors import AudioError
from granite_jax.waveform import SAMPLING_RATE

FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "rf64": ("RF64", "PCM_16"),
    "w64": ("W64", "PCM_16"),
    "aiff": ("AIFF", "PCM_16"),
    "au": ("AU", "PCM_16"),
    "caf": ("CAF", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "vorbis": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", None),
    "mp3-vbr": ("MP3", None),
}
SECONDS = 1.5
ID3V1 = b"TAG" + bytes(125)
ID3V2 = b"ID3\x04\x00\x00" + bytes([0, 0, 2, 0]) + b"\xff\xfb\x90\x00" * 64  # 256 bytes that look like frames
APE = b"APETAGEX" + struct.pack("<IIII", 2000, 40, 1, 0xA000_0000) + bytes(8) + b"\x00artist" + bytes(33)


def sweep(low=200.0, seconds=SECONDS, rate=SAMPLING_RATE):
    """A tone that rises by an octave."""
    time = np.arange(int(seconds * rate)) / rate
    return (0.4 * np.sin(2 * np.pi * low * time * (1 + time / (2 * seconds)))).astype(np.float32)


def encode(samples, kind, rate=SAMPLING_RATE):
    form, subtype = FORMATS[kind]
    options = {"bitrate_mode": "VARIABLE", "compression_level": 0.5} if kind == "mp3-vbr" else {}
    buffer = io.BytesIO()
    sf.write(buffer, samples, rate, format=form, subtype=subtype, **options)
    return buffer.getvalue()


def seconds_of(audio):
    return pytest.approx(audio, abs=0.08)  # codecs without a record of their delay add or lose a frame


def assert_follow(samples, *parts):
    """`samples` are the parts one after another, as far as codecs can tell."""
    start = 0
    for part in parts:
        piece = samples[start : start + len(part)]
        spectrum, expected = (np.abs(np.fft.rfft(x, len(part))) for x in (piece, part))
        assert spectrum @ expected > 0.9 * np.linalg.norm(spectrum) * np.linalg.norm(expected)
        start += len(part)


# Streams one after another.


@pytest.mark.parametrize("kind", FORMATS)
def test_concatenated_files_are_decoded_to_the_end(kind):
    # Given three different recordings, one behind the other
    parts = [sweep(low) for low in (200, 700, 1500)]
    # When they are read as one file
    audio = load_audio(b"".join(encode(part, kind) for part in parts))
    # Then all of it is there
    assert audio.condition.flags == () and audio.duration == seconds_of(3 * SECONDS)
    assert_follow(audio.samples, *parts)


def test_concatenated_files_may_differ_in_format_rate_and_channels():
    parts = [sweep(200), sweep(700, rate=44_100), np.stack([sweep(1500, rate=8000)] * 2, 1)]
    data = encode(parts[0], "wav") + encode(parts[1], "flac", 44_100) + encode(parts[2], "aiff", 8000)
    audio = load_audio(data)
    assert audio.duration == seconds_of(3 * SECONDS)
    assert_follow(audio.samples, sweep(200), sweep(700), sweep(1500))


@pytest.mark.parametrize("kind", ["wav", "flac", "opus", "mp3"])
@pytest.mark.parametrize(("offset", "duration"), [(1.0, 1.2), (2.0, 0.5), (2.0, None), (0.2, 100_000)])
def test_a_segment_may_span_streams(kind, offset, duration):
    # Given two recordings one behind the other, when a part is read, then it is what the whole has there
    file = io.BytesIO(encode(sweep(), kind) + encode(sweep(700), kind))
    whole = load_audio(file.getvalue()).samples
    segment = load_segment(file, "a", offset=offset, duration=duration)
    start = int(offset * SAMPLING_RATE)
    expected = whole[start:] if duration is None else whole[start : start + int(duration * SAMPLING_RATE)]
    edge = 40 if kind == "opus" else 0  # of resampling from 48 kHz
    np.testing.assert_allclose(
        segment.samples[edge : len(expected) - edge], expected[edge : len(expected) - edge], atol=1e-3
    )


@pytest.mark.parametrize("kind", ["wav", "flac", "opus", "vorbis", "mp3"])
def test_a_segment_may_be_far_behind_the_first_streams(kind):
    # Given eight recordings one behind the other, when a part of the last is read, then it is what the whole has there
    file = io.BytesIO(b"".join(encode(sweep(200 + 100 * i), kind) for i in range(8)))
    whole = load_audio(file.getvalue()).samples
    segment = load_segment(file, "a", offset=11.0, duration=0.5).samples
    np.testing.assert_allclose(segment[40:-40], whole[11 * SAMPLING_RATE + 40 :][: len(segment) - 80], atol=2e-3)


def test_the_length_limit_is_of_all_streams_together():
    with pytest.raises(AudioError, match="longer than 4 seconds"):
        load_audio(encode(sweep(), "wav") * 3, max_seconds=4)


# Junk in front, between and behind.


@pytest.mark.parametrize("junk", [bytes(1000), b"\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", ID3V2, b"\xff" * 700])
@pytest.mark.parametrize("kind", FORMATS)
def test_junk_in_front_is_passed_over(kind, junk):
    audio = load_audio(junk + encode(sweep(), kind))
    assert audio.condition.flags == () and audio.duration == seconds_of(SECONDS)
    assert_follow(audio.samples, sweep())


@pytest.mark.parametrize("trailer", [bytes(5000), ID3V1, APE + ID3V1, b"\x00" * 100 + ID3V1, b"some words"])
@pytest.mark.parametrize("kind", FORMATS)
def test_tags_behind_are_not_audio(kind, trailer):
    audio = load_audio(encode(sweep(), kind) + trailer)
    assert audio.condition.flags == () and audio.duration == seconds_of(SECONDS)


@pytest.mark.parametrize("kind", ["wav", "opus", "mp3", "mp3-vbr"])
def test_tags_between_are_not_audio(kind):
    audio = load_audio(encode(sweep(), kind) + ID3V1 + ID3V2 + encode(sweep(700), kind))
    assert audio.duration == seconds_of(2 * SECONDS)
    assert_follow(audio.samples, sweep(), sweep(700))


@pytest.mark.parametrize("kind", ["wav", "au", "caf", "vorbis", "opus", "mp3"])
def test_bytes_behind_that_cannot_be_decoded_are_flagged(kind):
    # Given a recording with 20,000 bytes behind it that are neither tags nor audio
    noise = np.random.default_rng(0).integers(1, 200, 20_000, np.uint8).tobytes()
    # When it is read, then it is there, and flagged
    audio = load_audio(encode(sweep(), kind) + noise)
    assert audio.condition.flags == ("damaged-input",) and audio.duration == seconds_of(SECONDS)
    assert audio.condition.damage == ((pytest.approx(SECONDS, abs=0.08), pytest.approx(SECONDS, abs=0.08)),)


# Headers that lie.


def patched(data, position, field):
    return data[:position] + field + data[position + len(field) :]


def _wav(length, riff=None):
    data = encode(sweep(), "wav")
    riff = struct.pack("<I", length + 36 & 0xFFFF_FFFF) if riff is None else riff
    return patched(patched(data, 40, struct.pack("<I", length)), 4, riff)


@pytest.mark.parametrize(
    "data",
    [
        _wav(0),
        _wav(0, bytes(4)),
        _wav(8000),
        _wav(0xFFFF_FFFF),
        _wav(0x7FFF_FFDB, b"\xff\xff\xff\xff"),
        patched(encode(sweep(), "au"), 8, b"\xff\xff\xff\xff"),
        patched(encode(sweep(), "flac"), 22, bytes(4)),
    ],
    ids=["zero", "all zero", "stale", "pipe", "sox pipe", "au pipe", "flac"],
)
def test_lengths_that_were_never_filled_in_are_not_believed(data):
    audio = load_audio(data)
    assert audio.condition.flags == () and audio.duration == SECONDS
    assert_follow(audio.samples, sweep())


def test_an_empty_wav_with_chunks_behind_is_empty():
    data = encode(sweep(), "wav")[:40] + bytes(4) + b"LIST" + struct.pack("<I", 6000) + b"x" * 6000
    with pytest.raises(AudioError, match="holds no samples"):
        load_audio(patched(data, 4, struct.pack("<I", len(data) - 8)))


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_an_mp3_is_decoded_beyond_the_number_of_frames_in_its_header(share):
    # Given a variable-bitrate MP3 whose header names a part of its frames
    data = encode(sweep(seconds=10), "mp3-vbr")
    field = max(data.find(b"Xing"), data.find(b"Info")) + 8
    frames = struct.unpack(">I", data[field : field + 4])[0]
    # When it is read, then all of it is there
    audio = load_audio(patched(data, field, struct.pack(">I", int(share * frames))))
    assert audio.duration == pytest.approx(10, abs=0.15)


def without_first_frame(data):
    """An MP3 without the frame that has the header, as streams are recorded."""
    return data[data.find(data[:2], 4) :]


@pytest.mark.parametrize(("kind", "seconds"), [("mp3", 10), ("mp3-vbr", 10), ("mp3", 300)])
def test_an_mp3_without_its_header_is_decoded_to_the_end(kind, seconds):
    # Given silence and then noise, of which a variable bitrate takes much less and much more than the mean
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, seconds * SAMPLING_RATE // 2).astype(np.float32)
    data = without_first_frame(encode(np.concatenate([0 * noise, noise]), kind))
    # When it is read, then all of it is there
    audio = load_audio(data)
    assert audio.condition.flags == () and audio.duration == pytest.approx(seconds, abs=0.15)
    assert load_audio(data[:-50]).condition.flags == ("truncated-input",)


def test_junk_in_the_middle_of_an_mp3_is_passed_over():
    first, second = encode(sweep(seconds=5), "mp3"), encode(sweep(700, seconds=5), "mp3")
    audio = load_audio(first + b"\x01" * 9000 + without_first_frame(second))
    assert audio.duration == pytest.approx(10, abs=0.2)


# Ends that are missing.


@pytest.mark.parametrize("share", [0.4, 0.9])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_without_its_end_is_decoded_and_flagged(kind, share):
    # Given the first part of a recording, in which sound has little to predict it
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 5 * SAMPLING_RATE).astype(np.float32)
    data = encode(noise, kind)
    # When it is read
    audio = load_audio(data[: int(share * len(data))])
    # Then what is there is decoded, and the transcript is to be flagged
    assert audio.condition.flags == ("truncated-input",)
    assert share - 0.25 < audio.duration / 5 < share + 0.02
    assert load_audio(data).condition.flags == ()


@pytest.mark.parametrize("kind", ["flac", "opus"])
def test_a_stream_without_its_end_may_be_followed_by_another(kind):
    data = encode(sweep(seconds=5), kind)
    audio = load_audio(data[: int(0.7 * len(data))] + encode(sweep(700), kind))
    assert audio.condition.flags == ("truncated-input",) and SECONDS + 2.5 < audio.duration < SECONDS + 4.5


def test_a_segment_before_the_missing_end_is_not_flagged():
    file = io.BytesIO(encode(sweep(), "wav")[:20_000])
    assert load_segment(file, "a", duration=0.3).condition.flags == ()
    assert load_segment(file, "a", offset=0.3).condition.flags == ("truncated-input",)


# Parts of files that cannot seek.


@pytest.mark.parametrize(
    ("form", "subtype"), [("WAV", "GSM610"), ("WAV", "MS_ADPCM"), ("AU", "G721_32"), ("OGG", "VORBIS"), ("MP3", None)]
)
def test_a_part_is_the_same_whether_or_not_the_format_can_seek(form, subtype):
    # Given a recording in a format of which libsndfile may not be able to seek in
    buffer = io.BytesIO()
    sf.write(buffer, sweep(seconds=3, rate=8000), 8000, format=form, subtype=subtype)
    whole = load_audio(buffer.getvalue()).samples
    # When a part is read
    part = load_segment(buffer, "a", offset=1.5, duration=1.0).samples
    # Then it is what the whole has there, but for the resampling at its edges
    assert len(part) == SAMPLING_RATE
    np.testing.assert_allclose(part[500:-500], whole[24_500:39_500], atol=0.02)


def test_a_part_behind_the_end_is_an_error():
    with pytest.raises(AudioError, match="has no audio at 2 seconds"):
        load_segment(io.BytesIO(encode(sweep(), "wav")), "a", offset=2.0)


# Healthy files with unusual parts.


def _rf64(extra=b"", declared=None):
    data = encode(sweep(), "rf64") + extra
    position = data.find(b"ds64") + 16
    return data if declared is None else patched(data, position, struct.pack("<Q", declared))


def _flac_with_foreign_metadata():
    data = encode(sweep(), "flac")
    block = b"riff" + b"RIFF\x00\x00\x00\x00WAVEfmt " + bytes(500)
    return (
        data[:4]
        + bytes([data[4] & 0x7F])
        + data[5:42]
        + b"\x82"
        + len(block).to_bytes(3, "big")
        + block
        + _frames(data)
    )


def _frames(flac):
    position = 4
    while not flac[position] & 0x80:
        position += 4 + int.from_bytes(flac[position + 1 : position + 4], "big")
    return flac[position + 4 + int.from_bytes(flac[position + 1 : position + 4], "big") :]


def _with_bytes(data, extra):
    """An MP3 whose header counts other bytes than there are."""
    position = max(data.find(b"Xing"), data.find(b"Info")) + 12
    count = struct.unpack(">I", data[position : position + 4])[0]
    return patched(data, position, struct.pack(">I", count + extra))


APE_FOOTER = bytes(10_000) + b"APETAGEX" + struct.pack("<IIII", 2000, 10_032, 1, 0) + bytes(8)
LYRICS = b"LYRICSBEGIN" + b"x" * 6000 + b"006011LYRICS200"


@pytest.mark.parametrize(
    "data",
    [
        _wav(48_008),
        _wav(48_036),
        _wav(48_044),
        _rf64(b"axml" + struct.pack("<I", 6000) + b"x" * 6000),
        _rf64(declared=0),
        encode(sweep(), "caf") + b"free" + struct.pack(">q", 6000) + bytes(6000),
        encode(sweep(), "flac") + APE_FOOTER,
        encode(sweep(), "flac") + bytes(20_000),
        patched(encode(sweep(), "flac"), 22, bytes(4)) + ID3V1,
        _flac_with_foreign_metadata(),
        _flac_with_foreign_metadata() + ID3V1,
    ],
    ids=lambda data: f"{data[:4]!r}-{len(data)}",
)
def test_healthy_files_are_decoded_exactly(data):
    audio = load_audio(data)
    assert audio.condition.flags == ()
    np.testing.assert_allclose(audio.samples, sweep(), atol=1e-3)


@pytest.mark.parametrize("kind", ["mp3", "mp3-vbr"])
@pytest.mark.parametrize(
    "change",
    [
        *(lambda data, extra=extra: _with_bytes(data, extra) for extra in (-1, 1, 128, 4000, -400)),
        *(lambda data, tags=tags: data + tags for tags in (APE_FOOTER, LYRICS, APE_FOOTER + ID3V1, bytes(100_000))),
        lambda data: ID3V2 + _with_bytes(data, 5) + ID3V1,
    ],
)
def test_an_mp3_has_all_its_samples_whatever_its_tags_and_header_say(kind, change):
    expected = load_audio(encode(sweep(), kind))
    audio = load_audio(change(encode(sweep(), kind)))
    assert (audio.condition.flags, audio.samples.size) == ((), expected.samples.size)
    np.testing.assert_allclose(audio.samples, expected.samples, atol=1e-4)


def test_odd_samples_without_padding_may_be_followed_by_chunks():
    # Given 8-bit samples of an odd number, and behind them, without a byte between, text and a tag
    eight_bits = (sweep()[:-1] * 127 + 128).astype(np.uint8).tobytes()
    chunks = b"LIST" + struct.pack("<I", 5000) + b"INFO" + b"x" * 4996
    data = b"RIFF" + struct.pack("<I", 36 + len(eight_bits) + len(chunks)) + b"WAVEfmt "
    data += struct.pack("<IHHIIHH", 16, 1, 1, SAMPLING_RATE, SAMPLING_RATE, 1, 8)
    data += b"data" + struct.pack("<I", len(eight_bits)) + eight_bits + chunks
    assert load_audio(data).samples.size == len(eight_bits)


def test_layer_two_is_decoded_to_the_end():
    # Given 100 frames of silence as DAB and DVB have it
    frame = b"\xff\xfd\x80\xc4" + bytes(413)
    audio = load_audio(frame * 100)
    assert audio.duration == pytest.approx(100 * 1152 / 44_100, abs=0.06) and audio.condition.flags == ()


def test_a_header_without_frames_ends():
    # Given the first frame of an MP3, with a header that counts nothing, and nothing behind it
    frame = b"\xff\xfb\x90\x00" + bytes(32) + b"Info" + bytes(4)
    with pytest.raises(AudioError):
        load_audio(frame.ljust(417, b"\0"))


def test_junk_within_ogg_costs_little():
    data = encode(sweep(seconds=9), "opus")
    third = len(data) // 3
    audio = load_audio(data[:third] + b"\x01" * 200 + data[third:])
    assert audio.duration > 7


def test_zeros_within_an_mp3_cost_little():
    data = encode(sweep(seconds=9), "mp3")
    third = len(data) // 3
    assert load_audio(data[:third] + bytes(10_000) + data[third:]).duration > 8


def test_a_long_file_that_is_cut_is_flagged():
    assert load_audio(_rf64(declared=3 << 30)[:40_000]).condition.flags == ("truncated-input",)


def test_other_formats_may_follow():
    audio = load_audio(encode(sweep(), "wav") + encode(sweep(700), "vorbis"))
    assert_follow(audio.samples, sweep(), sweep(700))


@pytest.mark.parametrize("kind", ["wav", "aiff", "mp3"])
def test_hundreds_of_streams_are_joined(kind):
    part = encode(sweep(seconds=0.1), kind)
    assert load_audio(part * 300).duration == pytest.approx(30, rel=0.02)


def test_many_empty_streams_take_no_time(monkeypatch):
    # Given a thousand headers without samples, and junk that resembles frames
    empty = b".snd" + struct.pack(">IIIII", 24, 0, 3, SAMPLING_RATE, 1)
    scans = []
    monkeypatch.setattr(frames, "find", lambda data: scans.append(len(data)))
    with pytest.raises(AudioError):
        load_audio(empty * 1000 + b"\xff\xfb\x90\x00" * 16_000)
    # Then the junk is looked at a few times, not for each of them
    assert len(scans) < 10


@pytest.mark.parametrize(
    ("data", "most"),
    [
        # Headers without samples, pages with lengths that lead nowhere, and tags of no length
        (b".snd" + struct.pack(">IIIII", 24, 0, 3, SAMPLING_RATE, 1), 20_000),
        (b"OggS\0\2" + bytes(20) + b"\x05" + b"\xff" * 5, 30_000),
        (b"APETAGEX" + struct.pack("<IIII", 2000, 0, 1, 0) + bytes(8), 30_000),
        (b"ID3\x04\x00\x00\x00\x00\x00\x00", 30_000),
        (b"fLaC\x80\x00\x00\x22" + bytes(34), 10_000),
    ],
)
def test_hostile_repetitions_are_read_in_linear_time(data, most):
    # Given a valid beginning and many small parts, when they are read, then not many times the file is
    class Counting(io.BytesIO):
        total = 0

        def read(self, size=-1):
            part = super().read(size)
            Counting.total += len(part)
            return part

    file = Counting(encode(sweep(), "mp3") + data * most)
    with contextlib.suppress(AudioError):
        load_segment(file, "a")
    assert Counting.total < 300 * len(file.getvalue())


def test_a_segment_does_not_reach_into_the_next_stream():
    file = io.BytesIO(b"".join(encode(sweep(low, 3, 8000), "wav", 8000) for low in (200, 700)))
    assert len(load_segment(file, "a", offset=1, duration=2.00003).samples) == 2 * SAMPLING_RATE
    with pytest.raises(AudioError, match="duration is 0, not a positive number"):
        load_segment(file, "a", duration=0.0)
