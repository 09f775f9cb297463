"""What a batch job costs: its throughput against the Transcriber's own, and its memory by the manifest's length.

    python benchmarks/batch.py throughput [--checkpoint demo] [--audio tests/data/heldout] [--batch 8] [--rounds 3]
    python benchmarks/batch.py memory [--entries 1000 1000000]

`throughput` times, in turn and in this process, after a round that compiles: `transcribe()` on audio that is in memory
("device only"), and on the list of files, the job, and one file at a time. The median of the rounds is printed, and the
job's share of the device-only rate. A CPU as the device takes all cores, those that decode files, too; to leave it one:

    NPROC=1 XLA_FLAGS=--xla_cpu_multi_thread_eigen=false python benchmarks/batch.py throughput

`memory` runs jobs over one short recording again and again with a stand-in for the model, a process for each shard of a
quarter of a million lines and one for `merge`, and prints the peak of resident memory: that of manifest, readers, parts
and commits.
"""

import argparse
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

from granite_jax import Transcriber, batch
from granite_jax.audio import load_audio

SHARD = 250_000  # entries
HELDOUT = Path(__file__).parents[1] / "tests" / "data" / "heldout"


def throughput(checkpoint: str, audio: Path, batch_size: int, rounds: int, limit: int | None) -> None:
    """Prints a Markdown table of audio seconds a second."""
    asr = Transcriber.from_pretrained(checkpoint, dtype="float32", batch_size=batch_size)
    files = sorted(audio.glob("*.ogg"))[:limit]
    loaded = [load_audio(file) for file in files]
    seconds = sum(each.duration for each in loaded)

    def job() -> None:
        with tempfile.TemporaryDirectory() as out:
            manifest = Path(out, "manifest.jsonl")
            manifest.write_text("".join(f"{json.dumps({'audio': str(file)})}\n" for file in files))
            batch.run(manifest, Path(out, "out"), transcriber=(asr, "benchmark"), root=audio)

    ways: dict[str, Callable[[], Any]] = {
        "device only (audio in memory)": lambda: asr.transcribe(loaded),
        "transcribe() on the files": lambda: asr.transcribe(list(files)),
        "batch job": job,
        "one file at a time": lambda: [asr.transcribe(file) for file in files],
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    busy = dict.fromkeys(ways, 0.0)
    for turn in range(rounds + 1):
        for name, way in ways.items():
            began, cpu = time.perf_counter(), time.process_time()
            way()
            if turn:  # the first compiles
                times[name].append(time.perf_counter() - began)
                busy[name] += (time.process_time() - cpu) / rounds
    print(f"{len(files)} files, {seconds:.0f} s of audio, batches of {batch_size}, {rounds} rounds\n")
    print("| way | median | CPU time, mean | audio seconds a second |\n| --- | --- | --- | --- |")
    for name, found in times.items():
        middle = statistics.median(found)
        print(f"| {name} | {middle:.2f} s | {busy[name]:.2f} s | {seconds / middle:.1f} |")
    device = times["device only (audio in memory)"]
    shares = [alone / whole for alone, whole in zip(device, times["batch job"], strict=True)]
    print(f"\nThe job has {100 * statistics.median(shares):.1f} % of the device-only rate.")


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
    timed.add_argument("--audio", type=Path, default=HELDOUT)
    timed.add_argument("--batch", type=int, default=8)
    timed.add_argument("--rounds", type=int, default=3)
    timed.add_argument("--limit", type=int)
    commands.add_parser("memory").add_argument("--entries", type=int, nargs="+", default=[1000, 1000_000])
    for name, numbers in {"prepare": ["count"], "work": ["shard", "shards"], "merge": ["count"]}.items():
        step = commands.add_parser(name)  # of `memory`
        step.add_argument("directory", type=Path)
        for number in numbers:
            step.add_argument(number, type=int)
    chosen = parser.parse_args()
    if chosen.command == "throughput":
        throughput(chosen.checkpoint, chosen.audio, chosen.batch, chosen.rounds, chosen.limit)
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
