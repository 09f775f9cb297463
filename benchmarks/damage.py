"""What is left of a recording whose file is damaged: the words outside of the damage, and their times.

    python benchmarks/damage.py [--places 6] [--formats WAV,FLAC] [--kinds zeros,cut] [--misses]

A recording with known words is encoded in nine formats. The audio data of each file is damaged at random places, in
five ways: up to 6 kB that are overwritten by zeros or by noise, that are cut out (every second time: one or two whole
packets), or that change places with the 6 kB behind them; and one bit. Packets of the whole file tell which seconds the
damaged bytes had; an Ogg page or a PES packet is damaged as a whole.

Every word that the transcript of the whole file has half a second or more away from the damage must be in that of the
damaged file, and begin within 50 ms of its time. "Silenced" is the share of these words where the samples of the whole
file are transcribed with silence instead of the damage, as by a decoder that loses nothing else: what it lacks is the
recognizer's. "Windows" is the share of half seconds outside of the damage whose samples agree, at most 50 ms shifted.
"""

import argparse
import dataclasses
import io
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile

from granite_jax import AudioError, Transcriber
from granite_jax.audio.load import load_audio

SAMPLES = Path(__file__).parents[1] / "samples"
SPOKEN = ("request", "one-name", "two-names", "bakery", "lantern", "numbers")
RATE = 16000
# Muxer, encoder and sampling rate. PyAV has no good encoder of Vorbis, libsndfile has.
FORMATS = {
    "WAV": ("wav", "pcm_s16le", 44100),
    "FLAC": ("flac", "flac", 44100),
    "MP3": ("mp3", "libmp3lame", 44100),
    "M4A": ("ipod", "aac", 44100),
    "AAC": ("adts", "aac", 44100),
    "MPEG-TS": ("mpegts", "aac", 44100),
    "Ogg Vorbis": None,
    "Ogg Opus": ("ogg", "libopus", 48000),
    "WebM": ("webm", "libopus", 48000),
}
KINDS = ("zeros", "noise", "cut", "bit", "swap")
MARGIN = 0.5  # seconds from the damage that may suffer, too
SHIFT = 0.05  # seconds
QUIET = 0.003  # RMS below which there is nothing to compare

Span = tuple[float, float]


def recording() -> np.ndarray:
    """Sentences with pauses of a second and a half, float32 `[n]` at 16 kHz."""
    generator = np.random.default_rng(0)
    parts = []
    for name in SPOKEN:
        samples, _ = soundfile.read(SAMPLES / f"{name}.wav", dtype="float32")
        parts += [samples, generator.normal(0, 3e-4, RATE * 3 // 2).astype(np.float32)]
    return np.concatenate(parts[:-1])


def encode(samples: np.ndarray, form: str, rate: int | None = None) -> bytes:
    """A file of float samples `[n]` at 16 kHz, with a sampling rate in Hz other than the format's, if it is given."""
    written = io.BytesIO()
    kind = FORMATS[form]
    if kind is None:
        soundfile.write(written, samples, RATE, format="OGG", subtype="VORBIS")
        return written.getvalue()
    muxer, codec, usual_rate = kind
    rate = rate or usual_rate
    with av.open(written, "w", format=muxer) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.layout, stream.bit_rate = "mono", 64000
        resampler = av.AudioResampler(format=stream.codec_context.format, layout="mono", rate=rate)
        for begin in range(0, len(samples), 1600):
            frame = av.AudioFrame.from_ndarray(samples[None, begin : begin + 1600].copy(), "fltp", "mono")
            frame.sample_rate, frame.pts = RATE, begin
            for resampled in resampler.resample(frame):
                container.mux(stream.encode(resampled))
        for resampled in resampler.resample(None):
            container.mux(stream.encode(resampled))
        container.mux(stream.encode(None))
    return written.getvalue()


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Packets that begin at the same byte: bytes `start` to `end` of the file, seconds `time` to `until`."""

    start: int
    end: int
    time: float
    until: float


def stretches(data: bytes) -> list[Stretch]:
    """The packets of a whole file; those of an Ogg page or of a PES packet are one."""
    found: list[Stretch] = []
    container: Any = av.open(io.BytesIO(data))
    with container:
        track = container.streams.audio[0]
        packets = [packet for packet in container.demux(track) if packet.size]
        tick = float(track.time_base)
    zero = packets[0].pts or 0
    ends = [packet.pos for packet in packets[1:]] + [packets[-1].pos + packets[-1].size]
    for packet, end in zip(packets, ends, strict=True):
        time = (packet.pts - zero) * tick
        new = Stretch(packet.pos, max(end, packet.pos), time, time + (packet.duration or 0) * tick)
        if found and found[-1].start == new.start:
            new = dataclasses.replace(new, time=found.pop().time)
        found.append(new)
    return found


@dataclasses.dataclass(frozen=True)
class Damaged:
    """A file, and the seconds of the recording that were in the bytes that were damaged."""

    data: bytes
    span: Span
    place: str


def damage(data: bytes, packets: Sequence[Stretch], kind: str, generator: random.Random) -> Damaged:
    """The file, damaged at a random place of its audio data."""
    first, last = packets[0].start, packets[-1].end
    size = 1 if kind == "bit" else 4 * generator.randint(500, 1500)  # whole samples, or a WAV would be noise
    start = generator.randrange(first, last - 2 * size)
    end = start + size
    if kind == "cut" and generator.random() < 0.5:
        index = generator.randrange(len(packets) - 1)
        start, end = packets[index].start, packets[min(index + generator.randrange(2), len(packets) - 1)].end
    until = end
    if kind == "zeros":
        middle = bytes(size)
    elif kind == "noise":
        middle = generator.randbytes(size)
    elif kind == "cut":
        middle = b""
    elif kind == "bit":
        middle = bytes([data[start] ^ 1 << generator.randrange(8)])
    else:
        until = end + size
        middle = data[end:until] + data[start:end]
    hit = [packet for packet in packets if packet.start < until and packet.end > start]
    span = min(packet.time for packet in hit), max(packet.until for packet in hit)
    return Damaged(data[:start] + middle + data[until:], span, f"{kind}, bytes {start} to {until}")


def is_outside(start: float, end: float, span: Span) -> bool:
    """Whether something is half a second or more away from the damage."""
    return end <= span[0] - MARGIN or start >= span[1] + MARGIN


def silenced(samples: np.ndarray, span: Span) -> np.ndarray:
    """Samples with silence instead of the damage."""
    samples = samples.copy()
    samples[round(span[0] * RATE) : round(span[1] * RATE)] = 0.0
    return samples


def is_kept(samples: np.ndarray, expected: np.ndarray, start: int, shift: float = SHIFT) -> bool:
    """Whether half a second of what is expected, from a sample on, is there, at most so many seconds shifted."""
    size, reach = RATE // 2, round(shift * RATE)
    window = expected[start : start + size].astype(np.float64)
    around = samples[max(start - reach, 0) : start + size + reach].astype(np.float64)
    around = np.pad(around, (max(reach - start, 0), 0))
    around = np.pad(around, (0, size + 2 * reach - len(around)))
    if np.sqrt(np.mean(window**2)) < QUIET:
        return float(np.sqrt(np.mean(around[reach : reach + size] ** 2))) < 2 * QUIET
    length = 1 << (len(around) + size).bit_length()
    spectrum = np.fft.rfft(around, length) * np.conj(np.fft.rfft(window, length))
    products = np.fft.irfft(spectrum, length)[: 2 * reach + 1]
    energies = np.cumsum(np.concatenate([[0.0], around**2]))
    energies = np.maximum(energies[size:] - energies[:-size], 1e-12)[: 2 * reach + 1]
    best = float(np.max(products / np.sqrt(energies)))
    return best > 0.9 * float(np.linalg.norm(window))


def windows_kept(samples: np.ndarray, expected: np.ndarray, span: Span, shift: float = SHIFT) -> list[float]:
    """For each half second outside of the damage: 1 if it is there, or else 0."""
    starts = range(0, len(expected) - RATE // 2, RATE // 2)
    outside = [start for start in starts if is_outside(start / RATE, start / RATE + 0.5, span)]
    return [float(is_kept(samples, expected, start, shift)) for start in outside]


def words_of(transcript: Any) -> list[tuple[str, float, float]]:
    return [(word.text, word.start, word.end) for segment in transcript.segments for word in segment.words]


def words_kept(transcript: Any, expected: Any, span: Span) -> dict[tuple[str, float], float]:
    """For each word outside of the damage, with its start: 1 if it is there and in time, or else 0."""
    words = words_of(transcript)
    return {
        (text, start): float(any(text == other and abs(start - time) <= SHIFT for other, time, _ in words))
        for text, start, end in words_of(expected)
        if is_outside(start, end, span)
    }


def decoded(data: bytes) -> np.ndarray:
    try:
        return load_audio(data).samples
    except AudioError:
        return np.zeros(0, np.float32)


@dataclasses.dataclass
class Measures:
    """Of one damaged file: words and half seconds that are there, words with silence alone, flags."""

    words: dict[tuple[str, float], float]
    silenced: dict[tuple[str, float], float]
    windows: list[float]
    is_lost: bool
    is_flagged: bool


def measure(asr: Transcriber, data: bytes, files: Sequence[Damaged]) -> Iterator[Measures]:
    """Compares transcripts of damaged files with that of the whole file."""
    samples = load_audio(data).samples
    inputs = [data, *[each.data for each in files], *[silenced(samples, each.span) for each in files]]
    expected, *transcripts = asr.transcribe(inputs, word_timestamps=True, on_error="return")
    for i, each in enumerate(files):
        found, control = transcripts[i], transcripts[len(files) + i]
        yield Measures(
            words_kept(found, expected, each.span),
            words_kept(control, expected, each.span),
            windows_kept(decoded(each.data), samples, each.span),
            found.error is not None,
            bool({"damaged-input", "truncated-input"} & set(found.flags)),
        )


def share(values: Sequence[float]) -> str:
    return f"{100 * sum(values) / len(values):.1f}" if values else ""


def row(name: str, by_kind: dict[str, list[Measures]]) -> str:
    everything = [each for measures in by_kind.values() for each in measures]
    cells = [share([kept for each in measures for kept in each.words.values()]) for measures in by_kind.values()]
    cells.append(share([kept for each in everything for kept in each.silenced.values()]))
    cells.append(share([kept for each in everything for kept in each.windows]))
    cells.append(str(sum(each.is_lost for each in everything)))
    noticeable = [each for kind, measures in by_kind.items() if kind != "bit" for each in measures]
    cells.append(share([each.is_flagged for each in noticeable]))
    cells.append(share([each.is_flagged for each in by_kind.get("bit", [])]))
    return f"| {name} | {' | '.join(cells)} |"


def print_misses(file: Damaged, found: Measures) -> None:
    """Words that are missing, and would not be with silence alone."""
    missing = [f"{text} at {start:.1f}" for (text, start), kept in found.words.items() if not kept]
    fault = sum(found.silenced[word] > kept for word, kept in found.words.items())
    windows = found.windows.count(0.0)
    if fault or windows:
        span = f"{file.span[0]:.2f} to {file.span[1]:.2f} s"
        outcome = "error" if found.is_lost else f"{fault} words lost by the decoder, of {len(missing)}"
        print(f"  {file.place} ({span}): {outcome}; {windows} windows; flagged: {found.is_flagged}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", type=int, default=6, help="of each kind of damage in each format")
    parser.add_argument("--formats", default=",".join(FORMATS), help="separated by commas")
    parser.add_argument("--kinds", default=",".join(KINDS), help="separated by commas")
    parser.add_argument("--misses", action="store_true", help="print every file of which more is lost than was damaged")
    options = parser.parse_args()
    asr, samples = Transcriber.from_pretrained("demo", dtype="float32"), recording()
    kinds = options.kinds.split(",")
    print(f"| {' | '.join(['format', *kinds, 'silenced', 'windows', 'lost', 'flagged', 'bits flagged'])} |")
    print("|---|" + "---:|" * (len(kinds) + 5))
    for form in options.formats.split(","):
        data = encode(samples, form)
        packets = stretches(data)
        by_kind = {}
        for kind in kinds:
            generator = random.Random(f"{form} {kind}")
            files = [damage(data, packets, kind, generator) for _ in range(options.places)]
            by_kind[kind] = list(measure(asr, data, files))
            for file, found in zip(files, by_kind[kind], strict=True) if options.misses else ():
                print_misses(file, found)
        print(row(form, by_kind), flush=True)


if __name__ == "__main__":
    main()
