"""How long the TPU compiler takes for the full-size model, one program after another and several at a time.

    TPU_LIBRARY_PATH=.../libtpu.so python benchmarks/compile_time.py [--topology v5e:2x4] [--batch 64] [--buckets 1]

Compiles the three programs of each of the first so many default buckets of granite-4.0-1b-speech in bfloat16, with one
thread and with one for each core, in one run and from nothing: JAX cannot read what it keeps on disk without a TPU.
Prints a line of JSON for each number of threads: seconds to trace and lower, seconds until all are compiled, and
processor seconds; and the ratio of the seconds.
"""

import argparse
import functools
import json
import os
import sys
import time
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[1]))

from granite_jax.engine.compilation import Compiler
from granite_jax.engine.sharding import DeviceMesh
from granite_jax.models.granite_speech.config import Config
from granite_jax.planning.aot import topology_devices
from granite_jax.recognition.buckets import Bucket, default_buckets
from granite_jax.recognition.partition import abstract_params
from granite_jax.recognition.speech_lm_programs import SpeechLMPrograms


def measure(config: Config, mesh: DeviceMesh, buckets: list[Bucket], threads: int) -> dict[str, float]:
    """Compiles the programs of all buckets from nothing."""
    started, used = time.monotonic(), time.process_time()
    programs = SpeechLMPrograms(config, "bfloat16", devices=mesh)
    abstract = abstract_params(config, programs.dtype, mesh)
    compiler = Compiler(functools.partial(programs.lowerables, abstract), mesh, threads=threads)
    for bucket in buckets:
        compiler.start(bucket)
    lowered = time.monotonic()
    compiler.finish()
    return {
        "threads": threads,
        "programs": 3 * len(buckets),
        "lowered": round(lowered - started, 1),
        "compiled": round(time.monotonic() - started, 1),
        "processor": round(time.process_time() - used, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--batch", type=int, default=64, help="rows of a full batch on each copy of the weights")
    parser.add_argument("--buckets", type=int, default=1, help="how many of the default buckets")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    config = Config.granite_4_0_1b()
    buckets = list(default_buckets(config, args.batch)[: args.buckets])
    seconds = []
    for threads in args.threads:
        result = measure(config, DeviceMesh.make(topology_devices(args.topology)), buckets, threads)
        seconds.append(result["compiled"])
        print(json.dumps(result), flush=True)
    if len(seconds) > 1:
        print(json.dumps({"ratio": round(seconds[-1] / seconds[0], 2)}))


if __name__ == "__main__":
    main()
