"""Programs compiled from shapes alone: several at a time in threads, before they are run, or for chips that are absent.

this thread      lower encode | lower prefill | lower decode | wait for encode, run it ...
other threads                 | compile encode ─────────────►
                                              | compile prefill ─────────────►
                                                             | compile decode ─────────────►
"""

import collections
import contextlib
import dataclasses
import os
import tempfile
import threading
import warnings
import weakref
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


class _Threads:
    """Threads that compile what waits, and end when nothing does. They hold nothing but what is to be compiled."""

    def __init__(self, limit: int):
        self._free, self._lock = limit, threading.RLock()  # garbage collection can cancel amid anything
        self._waiting: collections.deque[tuple[Lowered, Future[None]]] = collections.deque()

    def submit(self, name: str, lowered: Lowered) -> "Future[None]":
        """A future that is done when the program is compiled, or has failed to."""
        compiled: Future[None] = Future()
        with self._lock:
            self._waiting.append((lowered, compiled))
            if self._free:
                with contextlib.suppress(RuntimeError):  # there can be no more threads
                    threading.Thread(target=self._run, name=name).start()
                    self._free -= 1
        return compiled

    def cancel(self) -> None:
        """Drops what no thread has begun."""
        with self._lock:
            while self._waiting:
                self._waiting.popleft()[1].cancel()

    def _run(self) -> None:
        while True:
            with self._lock:
                # A process that is to end waits for its threads, not for what they could still begin.
                if not self._waiting or not threading.main_thread().is_alive():
                    self._free += 1
                    return
                lowered, compiled = self._waiting.popleft()
            if compiled.set_running_or_notify_cancel():
                try:
                    with contextlib.suppress(Exception):  # the program's call will raise it
                        lowered.compile()
                finally:
                    compiled.set_result(None)


class Compiler:
    """Compiles the programs of buckets in threads, so that JAX finds them in its cache when they are called.

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
        self._params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
        self._threads = _Threads(threads or _num_cores())
        self._can_lower = programs.devices.parallel != "pmap" and programs.devices.mesh.shape["model"] == 1
        self._lock = threading.Lock()
        self._compiled: dict[tuple[Bucket, str], Future[None]] = {}
        self._audio: dict[Bucket, Any] = {}
        weakref.finalize(self, self._threads.cancel)

    def start(self, bucket: Bucket, *, with_logits: bool = False) -> None:
        """`start_encoder` and `start_decoder`."""
        self.start_encoder(bucket, with_logits=with_logits)
        self.start_decoder(bucket)

    def start_encoder(self, bucket: Bucket, *, with_logits: bool = False) -> None:
        """Begins to compile `encode` for a bucket, unless that has begun before.

        Args:
          with_logits: the form that returns logits, and `align`, which takes them.
        """
        encode = encode_form(with_logits)
        with self._lock:
            if not self._can_lower or (bucket, encode) in self._compiled:
                return
            lowering = Lowering(self._programs, self._params, bucket)
            lowered = lowering.encode(with_logits=with_logits)
            encoded = results(lowered, self._programs.result_shardings["encode"])
            self._audio[bucket] = encoded.audio
            self._compile(bucket, encode, lowered)
            if with_logits:
                self._compile(bucket, "align", lowering.align(encoded.logits))

    def start_decoder(self, bucket: Bucket) -> None:
        """Begins to compile `prefill` and `decode` for a bucket whose `encode` has begun, unless they have, too."""
        with self._lock:
            if not self._can_lower or (bucket, "decode") in self._compiled:
                return
            lowering = Lowering(self._programs, self._params, bucket)
            lowered = lowering.prefill(self._audio[bucket])
            self._compile(bucket, "prefill", lowered)
            verified, cache = results(lowered, self._programs.result_shardings["prefill"])
            self._compile(bucket, "decode", lowering.decode(verified, cache))

    def start_while(self, load: Callable[[], Any], buckets: Sequence[Bucket]) -> Any:
        """What `load` returns, which runs in a thread while the programs of buckets begin to be compiled."""
        if not buckets:
            return load()
        thread = ThreadPoolExecutor(1)
        loading = thread.submit(load)
        try:
            for bucket in buckets:
                if loading.done() and loading.exception():
                    break
                self.start(bucket)
            return loading.result()
        except BaseException:
            self._threads.cancel()
            raise
        finally:
            thread.shutdown(wait=False)

    def wait(self, bucket: Bucket, program: str) -> None:
        """Waits while a thread compiles a program. If none has begun, or if it failed, the program's call compiles it.

        Args:
          program: "prefill", "decode", "align", or what `encode_form` returns.
        """
        compiled = self._compiled.get((bucket, program))
        if compiled is not None and not compiled.cancel():
            compiled.result()

    def finish(self) -> None:
        """Waits until threads have compiled all that has begun."""
        for compiled in list(self._compiled.values()):
            if not compiled.cancelled():
                compiled.result()

    def _compile(self, bucket: Bucket, program: str, lowered: Lowered) -> None:
        self._compiled[bucket, program] = self._threads.submit(f"compile {program}", lowered)


def _num_cores() -> int:
    """The cores that this process may use, as far as the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
