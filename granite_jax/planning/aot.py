"""What the TPU compiler reports about a model on a topology: memory, aliasing, copies and collectives, without a TPU.

Programs are compiled ahead of time, for chips that need not be present. This shows that they compile and fit, and which
layouts and collectives the compiler chose; nothing is run.
"""

import dataclasses
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
from jax.stages import Lowered

from granite_jax.engine.compilation import abstract_results
from granite_jax.engine.sharding import REPLICATED, DeviceList, DeviceMesh
from granite_jax.errors import GraniteError, one_line
from granite_jax.options import RecognizerName
from granite_jax.recognition.buckets import Bucket
from granite_jax.recognition.partition import abstract_params
from granite_jax.recognition.recognizers import make_programs
from granite_jax.recognition.speech_lm_programs import PREFILL, SpeechLMPrograms

_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to query
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used, so processes cannot compete for one
    # Any values will do; libtpu complains without them.
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}
"""Set before the TPU compiler is loaded, in the planning process only."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Figures of one compiled program; bytes are per chip.

    Fields:
      program: "encode", "prefill" or "decode".
      fits: whether it fits in the chip's memory; if it does not even compile, what it takes is unknown, and 0.
      limit_bytes: the chip's memory available to programs.
      peak_bytes: peak memory in use, weights included.
      argument_bytes, temporary_bytes: weights and inputs, and memory that is freed when the program ends.
      alias_bytes: arguments whose memory is reused for results.
      cache_bytes: size of the KV cache.
      cache_copies: number of copies of the cache's keys or values.
      vocabulary_positions: rows times positions in the largest float32 array over the whole vocabulary.
      collectives: number of operations in which chips wait for each other.
      note: why the last three, which are read from the program's text, are None; or empty.
    """

    program: str
    fits: bool
    limit_bytes: int
    peak_bytes: int = 0
    argument_bytes: int = 0
    temporary_bytes: int = 0
    alias_bytes: int = 0
    cache_bytes: int = 0
    cache_copies: int | None = 0
    vocabulary_positions: int | None = 0
    collectives: int | None = 0
    note: str = ""

    def __str__(self) -> str:
        limit = f"{self.limit_bytes / 2**30:.2f} GiB that programs have of a chip"
        if not self.fits:
            return f"{self.program}: takes more than the {limit}"
        texts = [f"{self.program}: peak {self.peak_bytes / 2**30:.2f} of the {limit}"]
        if self.collectives is not None:
            texts.append(f"{self.collectives} collectives")
        if self.cache_bytes:
            copies = "" if self.cache_copies is None else f", {self.cache_copies} copies of it"
            texts.append(f"KV cache {self.cache_bytes / 2**30:.2f} GiB{copies}")
        return ", ".join([*texts, self.note] if self.note else texts)


def plan(
    config: Any,
    topology: str,
    bucket: Bucket,
    *,
    dtype: Any = jnp.bfloat16,
    model_parallel: int = 1,
    recognizer: RecognizerName = "speech-lm",
) -> Iterator[Plan]:
    """Compiles a recognizer's programs, data-parallel over a topology; decode only if prefill fits.

    Args:
      topology: as libtpu names it: "v5e:2x4", "v5p:2x2x1", "v6e:2x2", ...
      bucket: shapes; its rows are those of each copy of the weights.
      model_parallel: chips that share a copy of the weights.
      recognizer: "speech-lm" for encode, prefill and decode; "ctc" for the encoder's own text alone.

    Raises:
      GraniteError: the TPU compiler is not installed or does not match this JAX, there is no such topology, or
        model_parallel does not divide it.
    """
    chips = topology_devices(topology)
    limit = _limit(chips[0])
    devices = DeviceMesh.make(chips, model_parallel=model_parallel)
    abstract = abstract_params(config, dtype, devices)
    programs = make_programs(config, recognizer, dtype, devices)
    vocabulary = config.decoder.vocab_size if isinstance(programs, SpeechLMPrograms) else None
    results: dict[str, Any] = {}
    cache_bytes = 0
    for program in programs.lowerables(abstract, bucket):
        if not program.is_default:
            continue
        lowered = program.lower(results)
        compiled = _compile(lowered)
        if program.name == PREFILL:
            cache = lowered.out_info[1]
            cache_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in (cache.k, cache.v)) // len(chips)
        yield _read(program.name, compiled, cache_bytes, vocabulary, limit)
        if compiled is None and program.name == PREFILL:
            return
        if program.result_shardings is not None:
            # As the compiler chose them: over `model`, that is its own business.
            shardings = program.result_shardings if compiled is None else compiled.output_shardings
            results[program.name] = abstract_results(lowered, shardings)


def topology_devices(topology: str) -> DeviceList:
    """The chips of a topology, for which programs can be compiled but not run; raises as `plan`."""
    if "TPU_LIBRARY_PATH" not in os.environ and importlib.util.find_spec("libtpu") is None:
        raise GraniteError(
            "planning needs the TPU compiler: pip install 'granite-jax[plan]' (Linux on x86-64); "
            "--no-compile prints the roofline, which needs none"
        )
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        raise GraniteError(f"topology {topology!r:.60}: {one_line(error)}") from None


def _limit(chip: Any) -> int:
    """Bytes of a chip's memory available to programs, from the compiler's error when asked for too much."""
    sharding = NamedSharding(Mesh(np.array([chip]), ("x",)), REPLICATED)
    huge = jax.ShapeDtypeStruct((1 << 50,), jnp.int8, sharding=sharding)
    try:
        jax.jit(jnp.negative).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        match = re.search(r"available HBM \((\d+\.?\d*)G\)|of (\d+\.?\d*)G hbm", str(error))
        if match:
            return int(float(match[1] or match[2]) * 2**30)
    raise GraniteError("this TPU compiler does not say how much memory a chip has")


def _compile(lowered: Lowered) -> Any:
    """The compiled program, or None if it takes more memory than a chip has."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def _read(name: str, compiled: Any, cache_bytes: int, vocabulary: int | None, limit: int) -> Plan:
    if compiled is None:
        return Plan(name, False, limit, cache_bytes=cache_bytes)
    memory = compiled.memory_analysis()
    plan = Plan(
        program=name,
        fits=memory.peak_memory_in_bytes <= limit,
        limit_bytes=limit,
        peak_bytes=memory.peak_memory_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        cache_bytes=cache_bytes,
    )
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        note = (
            f"copies and collectives unknown: JAX {jax.__version__} cannot read this TPU compiler's programs, "
            f"releases of the same time can ({one_line(error)})"
        )
        return dataclasses.replace(plan, cache_copies=None, vocabulary_positions=None, collectives=None, note=note)
    copies = _sizes(r"= bf16\[([\d,]+)\][^=]* copy\(", text)
    logits = _sizes(rf"= f32\[((?:\d+,)*{vocabulary}(?:,\d+)*)\]", text) if vocabulary else []
    collectives = r"\b(?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    return dataclasses.replace(
        plan,
        # Keys alone, or values alone, are half of the cache.
        cache_copies=sum(cache_bytes > 0 and 2 * size >= cache_bytes // 2 for size in copies),
        vocabulary_positions=max(logits, default=0) // vocabulary if vocabulary else 0,
        collectives=len(re.findall(collectives, text)),
    )


def _sizes(pattern: str, text: str) -> list[int]:
    """Elements of the arrays whose dimensions a pattern finds."""
    return [math.prod(map(int, dimensions.split(","))) for dimensions in re.findall(pattern, text)]
