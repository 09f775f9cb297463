"""What the TPU compiler makes of the full-size model: memory, aliasing, copies and collectives, without a TPU.

    TPU_LIBRARY_PATH=.../libtpu.so python benchmarks/compiled.py [--topology v5e:2x4] [--batch 64]
        [--model-parallel 1]

Compiles encode, prefill and decode of granite-4.0-1b-speech in bfloat16 ahead of time, data-parallel over the topology
(each copy of the weights on one chip, or split over several), and prints one JSON object a program. `batch` counts rows
a copy; memory is bytes a chip.
This shows that the programs compile and fit, and which layouts and collectives the compiler chose; it runs nothing.
"""

import argparse
import functools
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

sys.path.insert(0, str(Path(__file__).parents[1]))

from granite_jax import model
from granite_jax.config import Config
from granite_jax.decoding import Draft
from granite_jax.programs import Bucket, Programs
from granite_jax.sharding import DATA, Devices

CONFIG = Path(__file__).parent / "granite-4.0-1b-speech.json"
DTYPE = jnp.bfloat16


def shaped(tree, sharding: NamedSharding):
    """The arrays of `tree` as ShapeDtypeStructs with a sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def compile_programs(config: Config, topology: str, bucket: Bucket, model_parallel: int):
    """Yields (name, compiled program, bytes of the KV cache a chip)."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    devices = Devices.make(chips, model_parallel=model_parallel)
    rows = NamedSharding(devices.mesh, DATA)
    programs = Programs(config, DTYPE, devices=devices)
    params = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, DTYPE, sharding=where),
        model.abstract_params(config, DTYPE), devices.param_shardings(config),
    )  # fmt: skip
    batch = bucket.batch * devices.replicas

    def of_rows(dtype, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=rows)

    samples = (params, of_rows(jnp.float32, bucket.samples), of_rows(jnp.int32))
    yield "encode", programs.encode.lower(*samples).compile(), 0

    audio = shaped(jax.eval_shape(programs.encode, *samples).audio, rows)
    draft = Draft(of_rows(jnp.int32, bucket.draft), of_rows(jnp.int32))
    prompts = (params, of_rows(jnp.int32, bucket.prompt), of_rows(jnp.int32), audio, draft)
    compiled = programs.prefill.lower(*prompts, capacity=bucket.capacity).compile()
    verified, cache = jax.eval_shape(functools.partial(programs.prefill, capacity=bucket.capacity), *prompts)
    cache_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in (cache.k, cache.v)) // len(chips)
    yield "prefill", compiled, cache_bytes

    # Laid out as the prefill leaves them: over `model` by the compiler's choice.
    placed = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        (verified, cache), compiled.output_shardings,
    )  # fmt: skip
    drafts = (params, *placed, draft, of_rows(jnp.int32), of_rows(jnp.float32))
    yield "decode", programs.decode.lower(*drafts, room=bucket.room).compile(), cache_bytes


def report(name: str, compiled, cache_bytes: int, vocabulary: int) -> dict:
    """Counts read from a compiled program."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    copies = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"= bf16\[([\d,]+)\][^=]* copy\(", text)]
    # Logits, or likelihoods of the whole vocabulary, in float32: positions held at once, rows times positions of a row.
    wide = [
        math.prod(map(int, dims.split(","))) // vocabulary
        for dims in re.findall(rf"= f32\[([\d,]*{vocabulary}[\d,]*)\]", text)
    ]
    return {
        "program": name,
        "peak_bytes": memory.peak_memory_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "cache_bytes": cache_bytes,
        "vocabulary_positions": max(wide, default=0),
        # Of keys or of values alone: half of the cache.
        "cache_sized_copies": sum(cache_bytes > 0 and 2 * size >= cache_bytes // 2 for size in copies),
        "collectives": len(
            re.findall(r"\b(?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\(", text)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--batch", type=int, default=64, help="rows a copy of the weights")
    parser.add_argument("--model-parallel", type=int, default=1, help="chips that share a copy of the weights")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--capacity", type=int, default=544, help="positions of the KV cache")
    parser.add_argument("--dump", type=Path, help="directory for the optimised HLO")
    args = parser.parse_args()
    samples = int(args.seconds * 16000) // 4800 * 4800
    config = Config.from_file(CONFIG)
    bucket = Bucket(args.batch, samples, args.capacity - 200, args.capacity)
    for name, compiled, cache_bytes in compile_programs(config, args.topology, bucket, args.model_parallel):
        if args.dump:
            (args.dump / f"{name}.hlo").write_text(compiled.as_text())
        print(json.dumps(report(name, compiled, cache_bytes, config.decoder.vocab_size)), flush=True)


if __name__ == "__main__":
    main()
