"""Reading audio: what arrives is 16 kHz mono float32, or one clear error that names the input."""

import io
import os
import random

import ml_dtypes
import numpy as np
import pytest
import soundfile as sf
import soxr

from granite_jax.audio.ffmpeg import FFmpegDecoder
from granite_jax.audio.load import load_audio, open_recording
from granite_jax.errors import AudioError, GraniteError
from granite_jax.waveform import SAMPLING_RATE


def tone(seconds=1.0, rate=SAMPLING_RATE, hertz=440.0):
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def noise(seconds=1.0):
    return np.random.default_rng(0).uniform(-0.5, 0.5, int(seconds * SAMPLING_RATE)).astype(np.float32)


def encode(samples, rate=SAMPLING_RATE, form="WAV", subtype=None):
    buffer = io.BytesIO()
    sf.write(buffer, samples, rate, format=form, subtype=subtype)
    return buffer.getvalue()


def with_flac_length(flac, frames):
    """The same stream, its header claiming another number of frames (the low 36 bits of bytes 18 to 25)."""
    field = int.from_bytes(flac[18:26], "big") >> 36 << 36 | frames
    return flac[:18] + field.to_bytes(8, "big") + flac[26:]


# What can be read.


@pytest.mark.parametrize(("form", "tolerance"), [("WAV", 1e-4), ("FLAC", 1e-4), ("OGG", 0.02), ("MP3", 0.02)])
def test_encoded_audio_is_decoded(form, tolerance):
    samples = tone()
    audio = load_audio(encode(samples, form=form))
    assert audio.samples.dtype == np.float32 and audio.samples.ndim == 1
    np.testing.assert_allclose(audio.samples[: len(samples)], samples, atol=tolerance)


def test_every_kind_of_source_gives_the_same_samples(tmp_path):
    class Pipe(io.RawIOBase):
        def __init__(self, data):
            self.data = io.BytesIO(data)

        def read(self, size=-1):
            return self.data.read(size)

    path = tmp_path / "a.wav"
    path.write_bytes(data := encode(tone()))
    with open(path, "rb") as file:
        sources = [str(path), path, data, bytearray(data), memoryview(data), io.BytesIO(data), Pipe(data), file]
        samples = [load_audio(source).samples for source in sources]
    for other in samples[1:]:
        np.testing.assert_array_equal(other, samples[0])


def test_audio_is_called_by_its_path_or_by_the_given_name(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(data := encode(tone()))
    with open(path, "rb") as file:
        assert load_audio(file).name == str(path)
    assert load_audio(path).name == str(path)
    assert load_audio(data).name == "audio"
    assert load_audio(path, name="call 7").name == "call 7"


def test_duration_is_in_seconds_of_the_original_recording():
    assert load_audio(tone(2.0, 44_100), sampling_rate=44_100).duration == pytest.approx(2.0, abs=1e-4)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint8", "uint16", "uint32"])
def test_integers_are_scaled_by_the_range_of_their_type(dtype):
    samples, info = tone(), np.iinfo(dtype)
    half = (info.max - info.min + 1) // 2
    integers = np.round(samples.astype(np.float64) * half + (half if info.min == 0 else 0)).astype(dtype)
    np.testing.assert_allclose(load_audio(integers).samples, samples, atol=1 / half + 1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ml_dtypes.bfloat16])
def test_floats_are_taken_as_they_are(dtype):
    samples = tone().astype(dtype)
    np.testing.assert_array_equal(load_audio(samples).samples, samples.astype(np.float32))


def test_lists_and_foreign_arrays_are_taken():
    class Foreign:
        def __array__(self, dtype=None, copy=None):
            return tone()

    np.testing.assert_array_equal(load_audio(tone().tolist()).samples, tone())
    np.testing.assert_array_equal(load_audio(Foreign()).samples, tone())


@pytest.mark.parametrize("axis", [0, 1])
def test_channels_are_averaged_whichever_axis_they_are_on(axis):
    left, right = tone(hertz=440), tone(hertz=880)
    np.testing.assert_allclose(load_audio(np.stack([left, right], axis)).samples, (left + right) / 2, atol=1e-7)


def test_the_audio_of_data_sets_is_taken(tmp_path):
    # Given a recording as Hugging Face's `datasets` have it: decoded, as bytes, as a path, or as torchcodec's decoder
    class Decoder:
        def get_all_samples(self):
            return type("AudioSamples", (), {"data": tone(2.0, 8000)[None], "sample_rate": 8000})

    (tmp_path / "a.wav").write_bytes(data := encode(tone(2.0, 8000), 8000))
    sources = [
        {"path": "a.wav", "array": tone(2.0, 8000), "sampling_rate": 8000},
        {"path": "a.wav", "bytes": data},
        {"path": str(tmp_path / "a.wav"), "bytes": None},
        Decoder(),
        (tone(2.0, 8000), np.array(8000)),
        (tone(2.0, 8000), np.float32(8000)),
    ]
    # When they are read, then all are the same audio, called by its path if it has one
    for source in sources:
        np.testing.assert_allclose(load_audio(source).samples, load_audio(data).samples, atol=1e-4)
    assert [load_audio(source).name for source in sources[:4]] == ["a.wav", "a.wav", str(tmp_path / "a.wav"), "audio"]


def test_a_file_object_at_its_end_is_read_from_its_beginning():
    file = io.BytesIO()
    sf.write(file, tone(), SAMPLING_RATE, format="WAV")
    assert load_audio(file).duration == 1.0


def test_samples_are_the_callers_no_more():
    samples = tone()
    audio = load_audio(samples)
    samples[:] = 1
    np.testing.assert_array_equal(audio.samples, tone())


def test_silence_is_audio():
    assert not load_audio(np.zeros(SAMPLING_RATE, np.float32)).samples.any()


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling_block_by_block_equals_resampling_at_once(rate):
    # Given more than two blocks of noise
    samples = noise(10.0)
    # When they are read as an array, as a pair and as a file
    as_array = load_audio(samples, sampling_rate=rate).samples
    as_pair = load_audio((samples, rate)).samples
    as_file = load_audio(encode(samples, rate, subtype="FLOAT")).samples
    # Then all equal the one-shot result
    expected = soxr.resample(samples, rate, SAMPLING_RATE)
    for read in (as_array, as_pair, as_file):
        np.testing.assert_allclose(read, expected, atol=1e-6)


@pytest.mark.parametrize("source", ["file", "array"])
def test_a_channel_that_is_the_same_as_an_earlier_one_is_flagged(source):
    # Given channels of which the third is the first, and the fourth is that except for its last sample
    frames = np.stack([tone(9), tone(9, hertz=880), tone(9), tone(9)], 1).astype(np.float32)
    frames[-1, 3] += 0.1
    given = encode(frames, subtype="FLOAT") if source == "file" else frames
    # When each is read, then the third is flagged
    flags = []
    for channel in range(4):
        blocks = open_recording(given, channel=channel).blocks()
        assert sum(map(len, blocks)) == 9 * SAMPLING_RATE
        flags.append(blocks.condition.flags)
    assert flags == [(), (), ("duplicate-channel",), ()]


def test_long_stereo_files_are_mixed_and_resampled():
    left, right = tone(5, 48_000), tone(5, 48_000, hertz=880)
    audio = load_audio(encode(np.stack([left, right], 1), 48_000, "FLAC"))
    assert audio.samples.shape == (5 * SAMPLING_RATE,) and audio.condition.flags == ()
    np.testing.assert_allclose(audio.samples, soxr.resample((left + right) / 2, 48_000, SAMPLING_RATE), atol=1e-4)


@pytest.mark.parametrize("source", ["file", "array"])
@pytest.mark.parametrize(
    ("gains", "flags", "channel"),
    [
        ((1, -1), ("one-channel",), 0),
        ((0.6, -0.8), ("one-channel",), 1),
        ((0.0, 1, -1, 0.0), ("one-channel",), 1),
        ((1, 1), (), None),
        ((1, 0), (), None),
        ((0, 0), (), None),
        ((1, -0.2), (), None),
    ],
)
def test_channels_that_cancel_are_not_mixed(source, gains, flags, channel):
    # Given channels of the same sound with these gains, longer than a block
    frames = np.stack([gain * tone(5) for gain in gains], 1)
    # When they are read
    audio = load_audio(encode(frames, subtype="FLOAT") if source == "file" else frames.astype(np.float32))
    # Then the mean is taken, or one channel where the mean is next to nothing
    expected = frames.mean(axis=1) if channel is None else frames[:, channel]
    assert audio.condition.flags == flags
    np.testing.assert_allclose(audio.samples, expected, atol=1e-6)


def test_the_extension_does_not_matter(tmp_path):
    path = tmp_path / "a.raw"
    path.write_bytes(encode(tone()))
    assert load_audio(path).duration == 1.0


# Headers that lie.


@pytest.mark.parametrize("claimed", [1 << 20, 0xFFFFFFFF])
def test_wav_with_less_data_than_its_header_claims_gives_what_is_there(claimed):
    wav = bytearray(encode(tone()))
    wav[40:44] = claimed.to_bytes(4, "little")
    assert load_audio(bytes(wav)).samples.shape == (SAMPLING_RATE,)


@pytest.mark.parametrize("claimed", [0, 50_000_000], ids=["unknown", "too many"])
def test_flac_of_unknown_or_overstated_length_is_read_to_its_end(claimed):
    assert load_audio(with_flac_length(encode(tone(), form="FLAC"), claimed)).samples.shape == (SAMPLING_RATE,)


def test_overlong_files_are_refused_by_their_header_before_any_decoding(monkeypatch):
    monkeypatch.setattr(FFmpegDecoder, "sounds", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(AudioError, match="audio: is longer than 14400 seconds"):
        load_audio(with_flac_length(encode(tone(), form="FLAC"), 1 << 35))


def test_decoding_stops_at_the_limit_when_the_header_keeps_silent(monkeypatch):
    # Given a small file that unpacks to ten minutes
    bomb = with_flac_length(encode(np.zeros(600 * SAMPLING_RATE, np.int16), form="FLAC"), 0)
    assert len(bomb) < 100_000
    # When it is read up to 5 seconds
    seconds, sounds = [], FFmpegDecoder.sounds
    monkeypatch.setattr(
        FFmpegDecoder,
        "sounds",
        lambda *given, **named: (seconds.append(s.seconds) or s for s in sounds(*given, **named)),
    )
    with pytest.raises(AudioError, match="longer than 5 seconds"):
        load_audio(bomb, max_seconds=5)
    # Then hardly more than that is decoded
    assert 0 < sum(seconds) < 10


def test_mutated_files_raise_nothing_but_audio_errors(num_cases):
    # Given files of all formats with damaged headers and bodies
    generator = random.Random(0)
    files = [encode(tone(0.2), form=form) for form in ("WAV", "FLAC", "OGG", "MP3")]
    files.append(encode(np.stack([tone(0.2)] * 2, 1), 44_100, subtype="FLOAT"))
    outcomes = {"read": 0, "refused": 0}
    for _ in range(num_cases):
        data = bytearray(generator.choice(files))
        reach = generator.choice([64, len(data)])
        for _ in range(generator.randint(1, 8)):
            data[generator.randrange(reach)] = generator.choice([0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256)])
        if generator.random() < 0.3:
            del data[generator.randrange(len(data)) :]
        # When one is read, then it gives finite samples or an AudioError of one line
        try:
            assert np.isfinite(load_audio(bytes(data)).samples).all()
            outcomes["read"] += 1
        except AudioError as error:
            assert str(error).startswith("audio: ") and "\n" not in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > num_cases / 5


# What cannot be read.


def bad(samples, **options):
    return lambda: load_audio(samples, name="in", **options)


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (bad(b""), "is empty"),
        (bad(b"hello, this is no audio at all"), "is not audio that can be read"),
        (bad(encode(tone())[:44]), "holds no samples"),
        (bad(encode(noise(), form="FLAC")[:90] + b"\x55" * 9000), "is damaged: nothing of it can be decoded"),
        (bad(encode(np.zeros((400, 65), np.int16))), "has 65 channels"),
        (bad(encode(tone()), sampling_rate=8_000), "sampling rate of 16000 Hz, but sampling_rate=8000"),
        (bad(io.StringIO("text")), "binary mode"),
        (bad(np.zeros(0, np.float32)), "holds no samples"),
        (bad(np.zeros(256, np.float32)), "too short: 256 samples"),
        (bad((np.zeros(700, np.float32), 48_000)), "too short: 233 samples"),
        (bad(np.full(400, np.nan, np.float32)), "NaN or infinite"),
        (bad(np.array([0.0] * 400 + [-np.inf])), "NaN or infinite"),
        (bad(encode(np.full(400, 20_000.0), subtype="FLOAT")), "within [-1, 1]"),
        (bad(np.full(400, 1e300)), "within [-1, 1]"),
        (bad(np.full(400, 20_000.0)), "within [-1, 1]"),
        (bad([100] * 400), "unsupported dtype int64"),
        (bad(np.zeros(400, bool)), "unsupported dtype bool"),
        (bad(np.zeros(400, complex)), "unsupported dtype complex128"),
        (bad(np.array(["a"] * 400)), "unsupported dtype <U1"),
        (bad(None), "unsupported NoneType"),
        (bad({"samples": [0.0]}), 'a dict needs "array" and "sampling_rate"'),
        (bad({"array": np.zeros(400, np.int16), "sampling_rate": "16000"}), "sampling rate must be between"),
        (bad({"bytes": b"", "path": None}), "is empty"),
        (bad((tone(), "16000")), "sampling rate must be between"),
        (bad(np.full(400, 32_767, np.int32)), "convert 16-bit samples to int16"),
        (bad([[0.0], [0.0, 0.0]]), "cannot be made an array"),
        (bad(([[0.0], [0.0, 0.0]], 16_000)), "cannot be made an array"),
        (bad(np.float32(0)), "not []"),
        (bad(np.zeros((1, 2, 400))), "not [1, 2, 400]"),
        (bad(np.zeros((70, 400))), "has 70 channels"),
        (bad(np.zeros((400, 0))), "has 0 channels"),
        (bad(tone(), sampling_rate=0), "sampling rate must be between"),
        (bad(tone(), sampling_rate=float("nan")), "sampling rate must be between"),
        (bad(tone(), sampling_rate="16000"), "sampling rate must be between"),
        (bad(tone(), sampling_rate=True), "sampling rate must be between"),
        (bad((tone(), 10**400)), "sampling rate must be between"),
        (bad((tone(), 16_000), sampling_rate=8_000), "comes with a rate of 16000 Hz"),
        (bad(tone(3), max_seconds=2), "is longer than 2 seconds"),
        (bad(encode(tone(3)), max_seconds=2), "is longer than 2 seconds"),
        (bad(tone(), max_seconds=0), "max_seconds must be a positive number"),
        (bad(tone(), max_seconds=float("nan")), "max_seconds must be a positive number"),
    ],
)
def test_unusable_input_is_an_audio_error_that_names_it(load, reason):
    with pytest.raises(AudioError) as caught:
        load()
    message = str(caught.value)
    assert message.startswith("in: ") and reason in message and "\n" not in message


def test_257_samples_are_enough():
    assert len(load_audio(np.zeros(257, np.float32)).samples) == 257


@pytest.mark.parametrize(
    ("name", "reason"),
    [("", "no such file"), ("missing.wav", "no such file"), (".", "is a directory"), ("a\0b", "cannot be read")],
)
def test_unusable_paths_are_audio_errors(tmp_path, monkeypatch, name, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AudioError, match=reason):
        load_audio(name)


def test_messages_stay_one_line_whatever_the_file_is_called():
    with pytest.raises(AudioError, match=r"^'a\\nb\\udcff\.wav': no such file$"):
        load_audio("a\nb\udcff.wav")


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AudioError, match="not a regular file"):
        load_audio(tmp_path / "pipe")


def test_a_failing_disk_is_not_taken_for_the_end_of_the_file(tmp_path, monkeypatch):
    class FailingFile(io.BytesIO):
        def read(self, size: int | None = -1, /):
            if self.tell() > 8_000:
                raise OSError(5, "Input/output error")
            return super().read(size)

    path = tmp_path / "a.wav"
    path.write_bytes(data := encode(tone()))
    monkeypatch.setattr("builtins.open", lambda *_: FailingFile(data))
    with pytest.raises(AudioError, match=r"a\.wav: cannot be read \(Input/output error\)"):
        load_audio(path)


def test_a_stream_that_fails_is_an_audio_error():
    class Broken:
        def read(self, size):
            raise RuntimeError("connection lost")

    with pytest.raises(AudioError, match="connection lost"):
        load_audio(Broken())


def test_audio_errors_are_value_errors_of_the_package():
    assert issubclass(AudioError, GraniteError) and issubclass(GraniteError, ValueError)
