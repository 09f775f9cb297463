"""What the TPU compiler makes of the full-size model: memory, aliasing, copies and collectives, without a TPU.

    TPU_LIBRARY_PATH=.../libtpu.so python benchmarks/compiled.py [--topology v5e:2x4] [--batch 64]
        [--model-parallel 1]

`granite-jax plan` for granite-4.0-1b-speech in bfloat16, in shapes of your own; prints one JSON object a program.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[1]))

from granite_jax.models.granite_speech.config import Config
from granite_jax.planning.aot import plan
from granite_jax.recognition.buckets import Bucket


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--batch", type=int, default=64, help="rows a copy of the weights")
    parser.add_argument("--model-parallel", type=int, default=1, help="chips that share a copy of the weights")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--capacity", type=int, default=544, help="positions of the KV cache")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    samples = int(args.seconds * 16000) // 4800 * 4800
    bucket = Bucket(args.batch, samples, args.capacity - 200, args.capacity)
    for found in plan(Config.granite_4_0_1b(), args.topology, bucket, model_parallel=args.model_parallel):
        print(json.dumps(dataclasses.asdict(found)), flush=True)


if __name__ == "__main__":
    main()
