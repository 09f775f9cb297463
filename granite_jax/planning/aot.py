"""What the TPU compiler makes of a model on a topology: memory, aliasing, copies and collectives, without a TPU.

Programs are compiled ahead of time, for chips that need not be there. This shows that they compile and fit, and which
layouts and collectives the compiler chose; it runs nothing.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from granite_jax.audio.resample import one_line
from granite_jax.decoding import Draft
from granite_jax.errors import GraniteError
from granite_jax.inference.buckets import Bucket
from granite_jax.inference.programs import Programs
from granite_jax.inference.sharding import BATCH, REPLICATED, DeviceList, DeviceMesh
from granite_jax.keywords.automaton import no_keywords
from granite_jax.keywords.spotter import MAX_KEYWORDS, WIDTH, KeywordBatch
from granite_jax.model import granite_speech
from granite_jax.model.config import Config

_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no machine to ask
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used, so that none has to be shared out
    # Any will do: otherwise libtpu complains.
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}
"""Set before the TPU compiler is loaded, in the process that plans alone."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is read from one compiled program; bytes are a chip's.

    Fields:
      program: "encode", "prefill" or "decode".
      fits: whether it compiles within the chip's memory; if not, what it takes is not known, and 0.
      limit_bytes: what programs can have of the chip's memory.
      peak_bytes: at most in use at a time, weights included.
      argument_bytes, temporary_bytes: weights and inputs, and what is freed at the program's end.
      alias_bytes: of arguments whose memory the results take.
      cache_bytes: of the KV cache; `cache_copies` is how many copies of its size there are.
      vocabulary_positions: rows times positions for which float32 numbers of the whole vocabulary are held at once.
      collectives: operations in which chips wait for each other.
    """

    program: str
    fits: bool
    limit_bytes: int
    peak_bytes: int = 0
    argument_bytes: int = 0
    temporary_bytes: int = 0
    alias_bytes: int = 0
    cache_bytes: int = 0
    cache_copies: int = 0
    vocabulary_positions: int = 0
    collectives: int = 0

    def __str__(self) -> str:
        limit = f"{self.limit_bytes / 2**30:.2f} GiB that programs have of a chip"
        if not self.fits:
            return f"{self.program}: takes more than the {limit}"
        cache = f", KV cache {self.cache_bytes / 2**30:.2f} GiB, {self.cache_copies} copies of it"
        peak = f"{self.program}: peak {self.peak_bytes / 2**30:.2f} of the {limit}, {self.collectives} collectives"
        return peak + (cache if self.cache_bytes else "")


def plan(
    config: Config, topology: str, bucket: Bucket, *, dtype: Any = jnp.bfloat16, model_parallel: int = 1
) -> Iterator[Plan]:
    """Compiles encode, prefill and decode, data-parallel over a topology; decode only if prefill fits.

    Args:
      topology: as libtpu names it: "v5e:2x4", "v5p:2x2x1", "v6e:2x2", ...
      bucket: shapes, with the rows of each copy of the weights.
      model_parallel: chips that share a copy of the weights.

    Raises:
      GraniteError: the TPU compiler is not installed or of another time than JAX, there is no such topology, or
        model_parallel does not divide it.
    """
    chips = _chips(topology)
    limit = _limit(chips[0])
    devices = DeviceMesh.make(chips, model_parallel=model_parallel)
    rows = NamedSharding(devices.mesh, BATCH)
    programs = Programs(config, dtype, devices=devices)
    params = _placed(granite_speech.abstract_params(config, dtype), devices.param_shardings(config), dtype)
    batch = bucket.batch * devices.replicas

    def of_rows(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=rows)

    sounds = KeywordBatch(of_rows(jnp.int16, MAX_KEYWORDS, WIDTH), of_rows(jnp.int32))
    samples = (params, of_rows(jnp.float32, bucket.samples), of_rows(jnp.int32), sounds)
    yield _read("encode", _compile(programs.encode.lower(*samples)), 0, config, limit)

    audio = jax.tree.map(lambda x: of_rows(x.dtype, *x.shape[1:]), jax.eval_shape(programs.encode, *samples).audio)
    draft = Draft(of_rows(jnp.int32, bucket.draft), of_rows(jnp.int32))
    tables = no_keywords(batch)
    automata = _placed(tables, jax.tree.map(lambda _: NamedSharding(devices.mesh, REPLICATED), tables))
    automata = dataclasses.replace(automata, starts=of_rows(jnp.int32))
    prompts = (params, of_rows(jnp.int32, bucket.prompt), of_rows(jnp.int32), audio, draft, automata)
    prefill = _compile(programs.prefill.lower(*prompts, capacity=bucket.capacity))
    verified, cache = jax.eval_shape(functools.partial(programs.prefill, capacity=bucket.capacity), *prompts)
    cache_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in (cache.k, cache.v)) // len(chips)
    yield _read("prefill", prefill, cache_bytes, config, limit)

    if prefill is not None:
        # Laid out as the prefill leaves them: over `model` by the compiler's choice.
        placed = _placed((verified, cache), prefill.output_shardings)
        drafts = (params, *placed, draft, of_rows(jnp.int32), of_rows(jnp.float32), automata)
        decode = _compile(programs.decode.lower(*drafts, max_out_length=bucket.max_out_length))
        yield _read("decode", decode, cache_bytes, config, limit)


def _placed(tree: Any, shardings: Any, dtype: Any = None) -> Any:
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=where), tree, shardings
    )


def _chips(topology: str) -> DeviceList:
    if "TPU_LIBRARY_PATH" not in os.environ and importlib.util.find_spec("libtpu") is None:
        raise GraniteError("planning needs the TPU compiler: pip install 'granite-jax[plan]' (Linux on x86-64)")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        raise GraniteError(f"topology {topology!r:.60}: {one_line(error)}") from None


def _limit(chip: Any) -> int:
    """Bytes of a chip's memory that programs can have: what the compiler says when asked for too much."""
    sharding = NamedSharding(Mesh(np.array([chip]), ("x",)), REPLICATED)
    huge = jax.ShapeDtypeStruct((1 << 50,), jnp.int8, sharding=sharding)
    try:
        jax.jit(jnp.negative).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"available HBM \((\d+\.?\d*)G\)|of (\d+\.?\d*)G hbm", str(error))
        if found:
            return int(float(found[1] or found[2]) * 2**30)
    return 0


def _compile(lowered: Any) -> Any:
    """The compiled program, or None if it takes more than a chip has."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def _read(name: str, compiled: Any, cache_bytes: int, config: Config, limit: int) -> Plan:
    if compiled is None:
        return Plan(name, False, limit, cache_bytes=cache_bytes)
    memory, vocabulary = compiled.memory_analysis(), config.decoder.vocab_size
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        versions = f"JAX {jax.__version__} cannot read what this TPU compiler wrote"
        raise GraniteError(f"{name}: {versions}, use releases of the same time ({one_line(error)})") from None
    copies = _sizes(r"= bf16\[([\d,]+)\][^=]* copy\(", text)
    collectives = r"\b(?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    return Plan(
        program=name,
        fits=memory.peak_memory_in_bytes <= limit,
        limit_bytes=limit,
        peak_bytes=memory.peak_memory_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        cache_bytes=cache_bytes,
        # Of keys or of values alone: half of the cache.
        cache_copies=sum(cache_bytes > 0 and 2 * size >= cache_bytes // 2 for size in copies),
        vocabulary_positions=max(_sizes(rf"= f32\[([\d,]*{vocabulary}[\d,]*)\]", text), default=0) // vocabulary,
        collectives=len(re.findall(collectives, text)),
    )


def _sizes(pattern: str, text: str) -> list[int]:
    """Elements of the arrays whose dimensions a pattern finds."""
    return [math.prod(map(int, dimensions.split(","))) for dimensions in re.findall(pattern, text)]
