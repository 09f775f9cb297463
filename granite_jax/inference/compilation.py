"""Programs compiled from shapes alone: several at a time in threads, before they are run, or for chips that are absent.

this thread      lower encode | lower prefill | lower decode | wait for encode, run it ...
other threads                 | compile encode ─────────────►
                                              | compile prefill ─────────────►
                                                             | compile decode ─────────────►
"""

import dataclasses
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.stages import Lowered

from granite_jax.checkpoint.files import cache_directory
from granite_jax.decoding import Draft
from granite_jax.errors import CheckpointError
from granite_jax.inference.buckets import Bucket
from granite_jax.inference.programs import Programs
from granite_jax.inference.sharding import REPLICATED
from granite_jax.keywords.automaton import no_keywords
from granite_jax.keywords.spotter import MAX_KEYWORDS, WIDTH, KeywordBatch
from granite_jax.model import granite_speech

_POLL_SECONDS = 0.2


class Lowering:
    """Lowers the programs of a bucket for arguments of the types that the engine passes.

    `prefill`, `decode` and `align` take results of an earlier program as shapes, see `results`.
    """

    def __init__(self, programs: Programs, params: Any, bucket: Bucket):
        """
        Args:
          params: the model's parameters, or their shapes with shardings.
        """
        self._programs = programs
        self._params = params
        self._bucket = bucket
        self._rows = bucket.batch * programs.devices.replicas
        self._counts = self._of_rows(jnp.int32)

    def encode(self, *, with_logits: bool = False) -> Lowered:
        keywords = KeywordBatch(self._of_rows(jnp.int16, MAX_KEYWORDS, WIDTH), self._counts)
        samples = self._of_rows(jnp.float32, self._bucket.samples)
        encode = self._programs.encode
        return encode.lower(self._params, samples, self._counts, keywords, self._counts, with_logits=with_logits)

    def prefill(self, audio: Any) -> Lowered:
        tokens = self._of_rows(jnp.int32, self._bucket.prompt)
        arguments = (self._params, tokens, self._counts, audio, self._draft(), self._automata())
        return self._programs.prefill.lower(*arguments, capacity=self._bucket.capacity)

    def decode(self, verified: Any, cache: Any) -> Lowered:
        thresholds = self._of_rows(jnp.float32)
        arguments = (self._params, verified, cache, self._draft(), self._counts, thresholds, self._automata())
        return self._programs.decode.lower(*arguments, max_out_length=self._bucket.max_out_length)

    def align(self, logits: Any) -> Lowered:
        labels = self._of_rows(jnp.int32, self._bucket.max_labels)
        return self._programs.align.lower(logits, self._counts, labels, self._counts)

    def _of_rows(self, dtype: Any, *shape: int) -> Any:
        """An array of the host: which rows go to which device is the program's business."""
        return jax.ShapeDtypeStruct((self._rows, *shape), dtype)

    def _draft(self) -> Draft:
        return Draft(self._of_rows(jnp.int32, self._bucket.draft), self._counts)

    def _automata(self) -> Any:
        replicated = NamedSharding(self._programs.devices.mesh, REPLICATED)
        tables = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), no_keywords(self._rows)
        )
        return dataclasses.replace(tables, starts=self._counts)


def enable_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache directory, unless JAX was configured with a directory already.

    Warns if that directory cannot be written.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return
    try:
        directory = cache_directory() / "xla"
    except CheckpointError:  # the user has no home directory
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        advice = "XDG_CACHE_HOME sets another directory, --no-compilation-cache does without"
        warnings.warn(f"{directory}: compiled programs cannot be kept ({error.strerror}): {advice}", stacklevel=2)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))


def abstract_params(programs: Programs) -> Any:
    """The model's parameters as shapes with shardings."""
    shapes = granite_speech.abstract_params(programs.config, programs.dtype)
    shardings = programs.devices.param_shardings(programs.config)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
    )


def results(lowered: Lowered, shardings: Any) -> Any:
    """The results of a lowered program, as shapes with shardings.

    Args:
      shardings: a tree of them that has the results' structure or begins like it.
    """
    return jax.tree.map(
        lambda sharding, part: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part),
        shardings,
        lowered.out_info,
    )


def encode_form(with_logits: bool) -> str:
    """The name of the form of `encode` with or without logits."""
    return "encode with logits" if with_logits else "encode"


class Compilations:
    """Compiles the programs of buckets in threads, each once, so that JAX finds them in its cache when they are called.

    What cannot be lowered by itself is left to its first call: pmap, and weights that several devices share, where the
    compiler chooses how a program's results are spread over them.
    """

    def __init__(self, programs: Programs, params: Any, *, threads: int | None = None):
        """
        Args:
          params: the model's parameters, or their shapes with shardings.
          threads: how many programs are compiled at a time; default one for each core.
        """
        self._programs = programs
        self._params = params
        self._free = threading.Semaphore(threads or os.cpu_count() or 1)
        self._lock = threading.Lock()
        self._compiled: dict[tuple[Bucket, str], Future[None]] = {}

    def start(self, bucket: Bucket, *, with_logits: bool = False) -> None:
        """Begins to compile the programs of a bucket.

        Args:
          with_logits: `align`, too, and the form of `encode` that returns logits in place of the other.
        """
        encode = encode_form(with_logits)
        devices = self._programs.devices
        if not hasattr(self._programs.encode, "lower") or devices.mesh.shape["model"] > 1:
            return
        with self._lock:
            if (bucket, encode) in self._compiled:
                return
            lowering = Lowering(self._programs, self._params, bucket)
            shardings = self._programs.result_shardings
            lowered = self._compile(bucket, encode, lowering.encode(with_logits=with_logits))
            encoded = results(lowered, shardings["encode"])
            if with_logits:
                self._compile(bucket, "align", lowering.align(encoded.logits))
            if (bucket, "decode") not in self._compiled:
                lowered = self._compile(bucket, "prefill", lowering.prefill(encoded.audio))
                self._compile(bucket, "decode", lowering.decode(*results(lowered, shardings["prefill"])))

    def start_while(self, load: Callable[[], Any], buckets: Sequence[Bucket]) -> Any:
        """Runs `load` in a thread, begins to compile the programs of buckets meanwhile, and returns what it returns."""
        with ThreadPoolExecutor(1) as thread:
            loading = thread.submit(load)
            for bucket in buckets:
                if loading.done() and loading.exception():
                    break
                self.start(bucket)
            return loading.result()

    def wait(self, bucket: Bucket, program: str) -> None:
        """Waits while a thread compiles a program. If none has begun, or if it failed, the program's call compiles it.

        Args:
          program: "prefill", "decode", "align", or what `encode_form` returns.
        """
        compiled = self._compiled.get((bucket, program))
        if compiled is not None and not compiled.cancel():
            compiled.exception()

    def _compile(self, bucket: Bucket, program: str, lowered: Lowered) -> Lowered:
        self._compiled[bucket, program] = compiled = Future()
        threading.Thread(target=self._run, args=(lowered, compiled), name=f"compile {program}").start()
        return lowered

    def _run(self, lowered: Lowered, compiled: "Future[None]") -> None:
        while not self._free.acquire(timeout=_POLL_SECONDS):
            # A process that is to end waits for its threads, not for what they could still begin.
            if compiled.cancelled() or not threading.main_thread().is_alive():
                compiled.cancel()
                return
        try:
            if compiled.set_running_or_notify_cancel():
                lowered.compile()
                compiled.set_result(None)
        except BaseException as error:
            compiled.set_exception(error)
        finally:
            self._free.release()
