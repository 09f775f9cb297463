"""What a batch job costs: its throughput against the Transcriber's own, and its memory by the manifest's length.

    python benchmarks/batch.py throughput [--checkpoint demo] [--audio DIR] [--wav] [--batch 8]
        [--rounds 3] [--limit 150] [--repeat 4]
    python benchmarks/batch.py idle [--part-size 16 64 1024]
    python benchmarks/batch.py memory [--entries 1000 1000000]

`throughput` times, in turn and in this process, after a round that compiles: `transcribe()` on audio that is in memory
("device only"), and on the list of files, the job, and one file at a time. Medians of the rounds are printed, and the
job's share of the device-only rate. With `--wav` the files are rewritten as 16-bit WAV before, which leaves the job
next to nothing to decode. A CPU as the device takes all cores, those that decode files, too; to leave it one:

    NPROC=1 XLA_FLAGS=--xla_cpu_multi_thread_eigen=false python benchmarks/batch.py throughput

`idle` counts, in a job over the held-out clips, the batches that go to a device that has nothing to do: one at the
start, and one wherever the job has let the device run dry.

`memory` runs jobs over one short recording again and again with a stand-in for the model, a process for each shard of a
quarter of a million lines and one for `merge`, and prints the peak of resident memory: that of manifest, readers, parts
and commits.
"""

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import soundfile

from benchmarks.timing import measure_in_turns, paired_ratios
from granite_jax import Transcriber, batch
from granite_jax.audio.load import load_audio
from granite_jax.engine.scheduler import Scheduler
from granite_jax.evaluation.heldout import CLIPS

SHARD = 250_000  # entries


def to_wav(file: Path, directory: Path) -> Path:
    """A 16-bit WAV of the file."""
    samples, rate = soundfile.read(file, dtype="int16")
    written = directory / f"{file.stem}.wav"
    soundfile.write(written, samples, rate)
    return written


def idle(part_sizes: list[int]) -> None:
    """Prints a Markdown table of counts."""
    asr = Transcriber.from_pretrained("demo", dtype="float32", batch_size=8)
    asr.warmup()
    counts = {"batches": 0, "to an idle device": 0}
    dispatch = Scheduler._dispatch

    def counted(self: Scheduler, batches: Any, *arguments: Any) -> None:
        if batches is self._entered:
            counts["batches"] += 1
            counts["to an idle device"] += self.is_device_idle
        dispatch(self, batches, *arguments)

    Scheduler._dispatch = counted
    print("| part size | parts | batches | to an idle device |\n| --- | --- | --- | --- |")
    for size in part_sizes:
        counts.update(dict.fromkeys(counts, 0))
        with tempfile.TemporaryDirectory() as out:
            summary = batch.run(str(CLIPS), out, transcriber=(asr, "demo"), part_size=size)
        print(f"| {size} | {summary.parts} | {' | '.join(map(str, counts.values()))} |", flush=True)


def throughput(checkpoint: str, files: list[Path], batch_size: int, rounds: int, repeat: int) -> None:
    """Prints a Markdown table of audio seconds a second."""
    asr = Transcriber.from_pretrained(checkpoint, dtype="float32", batch_size=batch_size)
    loaded = [load_audio(file) for file in files]
    seconds = sum(each.duration for each in loaded)

    def job(times: int) -> None:
        with tempfile.TemporaryDirectory() as out:
            manifest = Path(out, "manifest.jsonl")
            manifest.write_text("".join(f"{json.dumps({'audio': str(file)})}\n" for file in files * times))
            batch.run(manifest, Path(out, "out"), transcriber=(asr, "benchmark"), root=files[0].parent)

    # With how often each goes through the files: a job begins by reading, which only a longer one makes up for.
    ways: dict[str, tuple[Callable[[int], Any], int]] = {
        "device only (audio in memory)": (lambda times: asr.transcribe(loaded * times), repeat),
        "transcribe() on the files": (lambda times: asr.transcribe(files * times), 1),
        "batch job": (job, repeat),
        "one file at a time": (lambda times: [asr.transcribe(file) for file in files * times], 1),
    }

    def measure(way: Callable[[int], Any], times: int) -> tuple[float, float]:
        began, cpu = time.perf_counter(), time.process_time()
        way(times)
        audio = seconds * times
        return audio / (time.perf_counter() - began), 3600 * (time.process_time() - cpu) / audio

    for way, _ in ways.values():
        way(1)  # compiles
    measured = measure_in_turns({name: functools.partial(measure, *way) for name, way in ways.items()}, rounds)
    rates = {name: [rate for rate, _ in pairs] for name, pairs in measured.items()}
    busy = {name: [cpu for _, cpu in pairs] for name, pairs in measured.items()}
    described = f"{len(files)} {files[0].suffix[1:]} files, {seconds:.0f} s of audio, {repeat} times"
    print(f"{described}, batches of {batch_size}, {rounds} rounds\n")
    print("| way | audio seconds a second | CPU seconds an hour of audio |\n| --- | --- | --- |")
    for name, found in rates.items():
        print(f"| {name} | {statistics.median(found):.1f} | {statistics.median(busy[name]):.0f} |")
    shares = paired_ratios(rates)["batch job"]  # the first way is the device alone
    percent = [f"{100 * share:.1f}" for share in (statistics.median(shares), min(shares), max(shares))]
    print("\nThe job has {} % of the device-only rate ({} to {} %).".format(*percent))


def memory(entries: list[int]) -> None:
    """Prints a Markdown table of peak resident memory."""
    print("| entries | peak of workers | peak of merge | seconds |\n| --- | --- | --- | --- |")
    for count in entries:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as work:
            prepare(Path(work), count)
            shards = -(-count // SHARD)
            workers = [in_process("work", work, str(shard), str(shards)) for shard in range(shards)]
            merged = in_process("merge", work, str(count))
        print(
            f"| {count:,} | {max(workers):.0f} MiB | {merged:.0f} MiB | {time.perf_counter() - began:.0f} |", flush=True
        )


def in_process(*arguments: str) -> float:
    """The peak memory of a command of this script, in MiB."""
    command = [sys.executable, __file__, *arguments]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def prepare(work: Path, count: int) -> None:
    soundfile.write(work / "a.wav", np.zeros(1600), 16000)
    with open(work / "manifest.jsonl", "w") as file:
        file.writelines('{"audio": "a.wav"}\n' for _ in range(count))


def work(directory: Path, shard: int, shards: int) -> None:
    """A worker's share with the stand-in."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import batch_worker

    batch_worker.run(directory / "manifest.jsonl", directory / "out", shard=shard, num_shards=shards)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    timed = commands.add_parser("throughput")
    timed.add_argument("--checkpoint", default="demo")
    timed.add_argument("--audio", type=Path, default=CLIPS)
    timed.add_argument("--wav", action="store_true", help="rewrite them as 16-bit WAV before")
    timed.add_argument("--batch", type=int, default=8)
    timed.add_argument("--rounds", type=int, default=3)
    timed.add_argument("--limit", type=int, help="of files")
    timed.add_argument("--repeat", type=int, default=4)
    sizes = commands.add_parser("idle")
    sizes.add_argument("--part-size", type=int, nargs="+", default=[16, 64, 1024])
    commands.add_parser("memory").add_argument("--entries", type=int, nargs="+", default=[1000, 1000_000])
    for name, numbers in {"prepare": ["count"], "work": ["shard", "shards"], "merge": ["count"]}.items():
        step = commands.add_parser(name)  # of `memory`
        step.add_argument("directory", type=Path)
        for number in numbers:
            step.add_argument(number, type=int)
    chosen = parser.parse_args()
    if chosen.command == "throughput":
        files = sorted(chosen.audio.glob("*.ogg"))[: chosen.limit]
        with tempfile.TemporaryDirectory() as directory:
            if chosen.wav:
                files = [to_wav(file, Path(directory)) for file in files]
            throughput(chosen.checkpoint, files, chosen.batch, chosen.rounds, chosen.repeat)
    elif chosen.command == "idle":
        idle(chosen.part_size)
    elif chosen.command == "memory":
        memory(chosen.entries)
    elif chosen.command == "prepare":
        prepare(chosen.directory, chosen.count)
    else:
        if chosen.command == "work":
            work(chosen.directory, chosen.shard, chosen.shards)
        else:
            assert batch.merge(chosen.directory / "out")["transcribed"] == chosen.count
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    main()
