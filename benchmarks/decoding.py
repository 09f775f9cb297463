"""How fast speech is read from files of several formats, beside the libraries that decode them.

    python benchmarks/decoding.py [--rate 16000] [--turns 9]

Files are mono, of five minutes. `open_recording` ("here") also checks and resamples. Prints median ratios of time to
soundfile, or to PyAV where soundfile does not read the format, and the speed "here" in seconds of audio a second.
"""

import argparse
import functools
import io
import statistics
import sys
from collections import deque
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import av
import numpy as np
import soundfile
import soxr

from benchmarks.timing import elapsed, measure_in_turns, paired_ratios
from granite_jax.audio.load import load_audio, open_recording

SPEECH = Path(__file__).parents[1] / "samples" / "long.wav"
SECONDS = 300
FORMATS = {"WAV": "pcm_s16le", "FLAC": "flac", "MP3": "libmp3lame", "M4A": "aac", "Opus": "libopus"}
MUXERS = {"M4A": "ipod", "Opus": "ogg"}


def encode(samples: np.ndarray, rate: int, muxer: str, codec: str) -> bytes:
    """A file of float samples `[n]`."""
    file = io.BytesIO()
    with av.open(file, "w", format=muxer) as container:
        own_rate = 48_000 if codec == "libopus" else rate
        stream: Any = container.add_stream(codec, own_rate, layout="mono", bit_rate=64_000)
        frame = av.AudioFrame.from_ndarray((samples[None] * 32767).astype(np.int16), "s16", "mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(stream.format, "mono", own_rate, stream.frame_size or 4096)
        for each in (*resampler.resample(frame), *resampler.resample(None), None):
            container.mux(stream.encode(each))
    return file.getvalue()


def read_by_soundfile(data: bytes) -> None:
    soundfile.read(io.BytesIO(data), dtype="float32")  # at once: between blocks it seeks


def read_by_pyav(data: bytes) -> None:
    with av.open(io.BytesIO(data), "r") as container:
        deque((frame.to_ndarray() for frame in container.decode(audio=0)), maxlen=0)


def read_here(data: bytes) -> None:
    deque(open_recording(data).blocks(), maxlen=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=int, default=16_000, help="Hz; Opus has 48,000")
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    samples = np.resize(soxr.resample(load_audio(SPEECH).samples, 16_000, options.rate), SECONDS * options.rate)
    print("| file | soundfile | PyAV | here | speed |\n| --- | --- | --- | --- | --- |")
    for name, codec in FORMATS.items():
        data = encode(samples, options.rate, MUXERS.get(name, name.lower()), codec)
        readers = {"soundfile": read_by_soundfile} if name != "M4A" else {}
        readers |= {"PyAV": read_by_pyav, "here": read_here}
        measures = {key: functools.partial(elapsed, functools.partial(read, data)) for key, read in readers.items()}
        seconds = measure_in_turns(measures, options.turns)
        ratios = {key: f"{statistics.median(values):.2f}" for key, values in paired_ratios(seconds).items()}
        speed = SECONDS / statistics.median(seconds["here"])
        print(f"| {name} | {ratios.get('soundfile', '')} | {ratios['PyAV']} | {ratios['here']} | {speed:,.0f} |")


if __name__ == "__main__":
    main()
