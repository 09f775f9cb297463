"""From the start of a process to its first transcript, and where the time goes.

    python benchmarks/startup.py [--checkpoint demo] [--runs 5] [--dtype float32] [--programs first|all] [--format json]

Every run is a process of its own that transcribes one held-out clip. `cold` runs begin with an empty directory of
compiled programs, `warm` ones with what a cold run left there. Prints the median of each step's seconds, and of the
processor seconds of both together. Files are in the system's cache, because earlier runs have read them. With
`--programs all` the programs of all buckets are compiled ahead, and the transcript follows when they are. As programs
are traced, compiled and looked up side by side, the seconds of these parts can be more than those of the step.

    interpreter          Python starts
    imports              JAX, Flax, Orbax and this package
    device               JAX starts its platform
    load                 the checkpoint, of which
      hashes               SHA-256 of the tensors; the sum over threads, which the time of `load` need not contain
    first transcript     reads, computes and writes, of which
      trace, lower         JAX turns the programs into StableHLO, warm or cold
      compile              XLA compiles them
      cache                compiled programs are looked up and read
      run                  what is left, if anything is
"""

import argparse
import collections
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CLIP = ROOT / "granite_jax" / "evaluation" / "heldout_clips" / "free-132.ogg"
STEPS = ("interpreter", "imports", "device", "load", "first transcript")
PARTS = {"load": ("hashes",), "first transcript": ("trace", "lower", "compile", "cache", "run")}
EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",  # look-ups included
    "/jax/compilation_cache/cache_retrieval_time_sec": "cache",
}

Seconds = dict[str, float]


def first_transcript(started: float, checkpoint: str, dtype: str | None, *, all_programs: bool) -> Seconds:
    """Transcribes one clip in this process, which was `started` at a time of the system's clock."""
    seconds = {"interpreter": time.time() - started}
    start = time.perf_counter()

    def step(name: str) -> None:
        nonlocal start
        now = time.perf_counter()
        seconds[name], start = now - start, now

    sys.path.insert(0, str(ROOT))
    import jax
    import jax.monitoring

    import granite_jax as gj
    from granite_jax.checkpoint import orbax

    load = gj.Transcriber.from_pretrained
    step("imports")
    jax.devices()
    step("device")
    seconds["hashes"] = 0.0
    record = orbax.record

    def timed_record(array: Any) -> Any:
        before = time.perf_counter()
        result = record(array)
        seconds["hashes"] += time.perf_counter() - before
        return result

    orbax.record = timed_record
    parts: Seconds = collections.defaultdict(float)

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        parts[EVENTS.get(event, "other")] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    asr = load(checkpoint, dtype=dtype, compile_ahead=all_programs)
    step("load")
    if all_programs:
        asr.warmup()
    asr.transcribe(CLIP)
    step("first transcript")
    parts["compile"] -= parts["cache"]
    run = max(0.0, seconds["first transcript"] - sum(parts[name] for name in EVENTS.values()))
    used = os.times()
    return {**seconds, **{name: parts[name] for name in EVENTS.values()}, "run": run, "processor": used[0] + used[1]}


def measure(cache: str, options: argparse.Namespace) -> Seconds:
    """Runs a process with a directory for compiled programs."""
    environment = os.environ | {"XDG_CACHE_HOME": cache}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, __file__, "--checkpoint", options.checkpoint, "--programs", options.programs]
    command += ["--dtype", options.dtype] if options.dtype else []
    started = time.time()
    output = subprocess.run(
        [*command, "--child", str(started)], capture_output=True, text=True, check=True, env=environment
    )
    total = time.time() - started
    return {**json.loads(output.stdout.splitlines()[-1]), "all": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--programs", choices=("first", "all"), default="first", help="which are compiled")
    parser.add_argument("--format", choices=("txt", "json"), default="txt")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        all_programs = options.programs == "all"
        print(json.dumps(first_transcript(options.child, options.checkpoint, options.dtype, all_programs=all_programs)))
        return
    runs: dict[str, list[Seconds]] = {"cold": [], "warm": []}
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory() as cache:
            for found in runs.values():
                found.append(measure(cache, options))
    medians = {
        kind: {name: statistics.median(run[name] for run in found) for name in found[0]} for kind, found in runs.items()
    }
    if options.format == "json":
        print(json.dumps({"checkpoint": options.checkpoint, "runs": options.runs, **medians}))
        return
    print(f"{options.checkpoint}, median of {options.runs} runs, seconds\n")
    print("| step | cold | warm |\n| --- | --- | --- |")
    for name in (*(row for step in STEPS for row in (step, *PARTS.get(step, ()))), "all", "processor"):
        label = f"- {name}" if any(name in parts for parts in PARTS.values()) else name
        print(f"| {label} | {medians['cold'][name]:.2f} | {medians['warm'][name]:.2f} |")


if __name__ == "__main__":
    main()
