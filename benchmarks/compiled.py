"""What the TPU compiler makes of the full-size model: memory, aliasing, copies and collectives, without a TPU.

    TPU_LIBRARY_PATH=.../libtpu.so python benchmarks/compiled.py [--topology v5e:2x4] [--batch 64]

Compiles encode, prefill and decode of granite-4.0-1b-speech in bfloat16 ahead of time, data-parallel over the topology
with replicated weights, and prints one JSON object a program. `batch` counts rows a chip; memory is bytes a chip.
This shows that the programs compile and fit, and which layouts and collectives the compiler chose; it runs nothing.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).parents[1]))

from granite_jax import gate, model
from granite_jax.config import Config
from granite_jax.decoding import Draft, Spelling, no_keywords
from granite_jax.programs import Bucket, Programs

CONFIG = Path(__file__).parent / "granite-4.0-1b-speech.json"
DTYPE = jnp.bfloat16


def shaped(tree, sharding: NamedSharding):
    """The arrays of `tree` as ShapeDtypeStructs with a sharding."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def sharded(function, mesh: Mesh, in_specs, out_specs):
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def compile_programs(config: Config, topology: str, bucket: Bucket):
    """Yields (name, compiled program, bytes of the KV cache a chip)."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(devices, ("data",), axis_types=(AxisType.Auto,))
    rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    programs = Programs(config, DTYPE)
    params = shaped(model.abstract_params(config, DTYPE), whole)
    batch = bucket.batch * len(devices)
    int32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)  # noqa: E731
    samples = jax.ShapeDtypeStruct((batch, bucket.samples), jnp.float32, sharding=rows)

    data, everywhere = PartitionSpec("data"), PartitionSpec()
    kv = PartitionSpec(None, "data")
    cache_spec = model.KVCache(kv, kv, data)
    labels = jax.ShapeDtypeStruct((batch, gate.MAX_KEYWORDS, gate.WIDTH), jnp.int16, sharding=rows)
    sounds = gate.Candidates(labels, int32(batch))  # pyright: ignore[reportArgumentType]
    encode = jax.jit(sharded(programs._encode, mesh, (everywhere, data, data, data), data))
    yield "encode", encode.lower(params, samples, int32(batch), sounds).compile(), 0

    encoded = jax.eval_shape(encode, params, samples, int32(batch), sounds)
    tables = dataclasses.replace(jax.tree.map(lambda _: everywhere, no_keywords(1)), starts=data)
    prefill = jax.jit(
        sharded(
            lambda *args: programs._prefill(*args, capacity=bucket.capacity),
            mesh, (everywhere, data, data, data, data, tables), (data, cache_spec),
        )
    )  # fmt: skip
    draft = Draft(int32(batch, bucket.draft), int32(batch))  # pyright: ignore[reportArgumentType]
    automata = dataclasses.replace(shaped(no_keywords(1), whole), starts=int32(batch))
    inputs = (params, int32(batch, bucket.prompt), int32(batch), shaped(encoded.audio, rows), draft, automata)
    verified, cache = jax.eval_shape(prefill, *inputs)
    cache_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in (cache.k, cache.v)) // len(devices)
    yield "prefill", prefill.lower(*inputs).compile(), cache_bytes

    def decode(*args):
        return programs._decode(*args, room=bucket.room)

    vocabulary = config.decoder.vocab_size
    spelling = Spelling(
        jax.ShapeDtypeStruct((vocabulary,), jnp.bool, sharding=whole),  # pyright: ignore[reportArgumentType]
        jax.ShapeDtypeStruct((vocabulary,), jnp.int32, sharding=whole),  # pyright: ignore[reportArgumentType]
    )
    thresholds = jax.ShapeDtypeStruct((batch,), jnp.float32, sharding=rows)
    rest = (draft, int32(batch), thresholds, spelling, automata)
    specs = (everywhere, data, cache_spec, data, data, data, everywhere, tables)
    state = jax.tree.map(lambda _: data, jax.eval_shape(decode, params, verified, cache, *rest))
    state_spec = type(state)(**{**vars(state), "cache": cache_spec})
    decode = jax.jit(sharded(decode, mesh, specs, state_spec), donate_argnums=2)
    split = NamedSharding(mesh, kv)
    cache = model.KVCache(shaped(cache.k, split), shaped(cache.v, split), shaped(cache.lengths, rows))
    yield "decode", decode.lower(params, shaped(verified, rows), cache, *rest).compile(), cache_bytes


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
    parser.add_argument("--batch", type=int, default=64, help="rows a chip")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--capacity", type=int, default=544, help="positions of the KV cache")
    parser.add_argument("--dump", type=Path, help="directory for the optimised HLO")
    args = parser.parse_args()
    samples = int(args.seconds * 16000) // 4800 * 4800
    config = Config.from_file(CONFIG)
    bucket = Bucket(args.batch, samples, args.capacity - 200, args.capacity)
    for name, compiled, cache_bytes in compile_programs(config, args.topology, bucket):
        if args.dump:
            (args.dump / f"{name}.hlo").write_text(compiled.as_text())
        print(json.dumps(report(name, compiled, cache_bytes, config.decoder.vocab_size)), flush=True)


if __name__ == "__main__":
    main()
