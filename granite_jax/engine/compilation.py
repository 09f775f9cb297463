"""Programs compiled from shapes alone: several at a time in threads, before they are run, or for chips that are absent.

this thread      lower encode | lower prefill | lower decode | wait for encode, run it ...
other threads                 | compile encode ─────────────►
                                              | compile prefill ─────────────►
                                                             | compile decode ─────────────►
"""

import atexit
import collections
import contextlib
import dataclasses
import os
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from jax.stages import Lowered

from granite_jax.engine.sharding import DeviceMesh


@dataclasses.dataclass(frozen=True)
class Lowerable:
    """A program for one shape, that can be lowered from shapes alone.

    Fields:
      name: of the program in messages and plans.
      lower: lowers it, from the results of programs that were lowered before, by name, as `abstract_results`.
      result_shardings: a tree that has the results' structure or begins like it; None if no program takes them.
      is_default: whether every input needs it.
    """

    name: str
    lower: Callable[[Mapping[str, Any]], Lowered]
    result_shardings: Any = None
    is_default: bool = True


Lowerables = Callable[[Any], Sequence[Lowerable]]
"""The programs for a shape, in an order in which they can be lowered."""


def keep_compiled_programs(directory: Path) -> None:
    """Keeps compiled programs in a directory, unless JAX was configured with one already.

    Warns if the directory cannot be written.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        advice = "XDG_CACHE_HOME sets another directory, --no-compilation-cache does without"
        warnings.warn(f"{directory}: compiled programs cannot be kept ({error.strerror}): {advice}", stacklevel=2)
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))


def abstract_results(lowered: Lowered, shardings: Any) -> Any:
    """The results of a lowered program, as shapes with shardings.

    Args:
      shardings: a tree of them that has the results' structure or begins like it.
    """
    return jax.tree.map(
        lambda sharding, part: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part),
        shardings,
        lowered.out_info,
    )


class _Threads:
    """Threads that compile what waits, and end when nothing does. They hold nothing but what is to be compiled."""

    def __init__(self, limit: int):
        self._limit, self._lock = limit, threading.RLock()  # garbage collection can cancel in the middle of anything
        self._threads: set[threading.Thread] = set()
        _THREADS.add(self)
        self._waiting: collections.deque[tuple[Lowered, Future[None]]] = collections.deque()

    def submit(self, name: str, lowered: Lowered) -> "Future[None]":
        """A future that is done when the program is compiled, or has failed to."""
        compiled: Future[None] = Future()
        with self._lock:
            self._waiting.append((lowered, compiled))
            if len(self._threads) < self._limit and threading.main_thread().is_alive():
                with contextlib.suppress(RuntimeError):  # there can be no more threads
                    thread = threading.Thread(target=self._run, name=name)
                    thread.start()
                    self._threads.add(thread)
        return compiled

    def cancel(self) -> None:
        """Drops what no thread has begun."""
        with self._lock:
            while self._waiting:
                self._waiting.popleft()[1].cancel()

    def join(self) -> None:
        """Waits for what threads have begun."""
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                # A process that is to end waits for its threads, not for what they could still begin.
                if not self._waiting or not threading.main_thread().is_alive():
                    self._threads.discard(threading.current_thread())
                    return
                lowered, compiled = self._waiting.popleft()
            if compiled.set_running_or_notify_cancel():
                try:
                    with contextlib.suppress(Exception):  # the program's call will raise it
                        lowered.compile()
                finally:
                    compiled.set_result(None)


_THREADS: "weakref.WeakSet[_Threads]" = weakref.WeakSet()


@atexit.register
def _join_all() -> None:
    """Those that an engine has started after Python waited for threads; a compiler does not survive Python's end."""
    for threads in list(_THREADS):
        threads.join()


class Compiler:
    """Compiles the programs of shapes in threads, so that JAX finds them in its cache when they are called.

    What cannot be lowered by itself is left to its first call: pmap, and weights that several devices share, where the
    compiler chooses how a program's results are spread over them.
    """

    def __init__(self, lowerables: Lowerables, devices: DeviceMesh, *, threads: int | None = None):
        """
        Args:
          lowerables: the programs for a shape.
          threads: how many programs are compiled at a time; default one for each core.
        """
        self._lowerables = lowerables
        self._threads = _Threads(threads or _num_cores())
        self._can_lower = devices.parallel != "pmap" and devices.parts == 1
        self._lock = threading.Lock()
        self._compiled: dict[tuple[Any, str], Future[None]] = {}
        self._results: dict[Any, dict[str, Any]] = collections.defaultdict(dict)
        weakref.finalize(self, self._threads.cancel)

    def start(self, shape: Any, *names: str) -> None:
        """Begins to compile programs of a shape, unless they have begun before.

        Args:
          names: default all that every input needs. A program whose results it takes must have begun before it.
        """
        with self._lock:
            if not self._can_lower or (names and all((shape, name) in self._compiled for name in names)):
                return
            for program in self._lowerables(shape):
                is_wanted = program.name in names if names else program.is_default
                if is_wanted and (shape, program.name) not in self._compiled:
                    lowered = program.lower(self._results[shape])
                    if program.result_shardings is not None:
                        self._results[shape][program.name] = abstract_results(lowered, program.result_shardings)
                    self._compiled[shape, program.name] = self._threads.submit(f"compile {program.name}", lowered)

    def start_while(self, load: Callable[[], Any], shapes: Sequence[Any]) -> Any:
        """What `load` returns, which runs in a thread while the programs of shapes begin to be compiled."""
        if not shapes:
            return load()
        thread = ThreadPoolExecutor(1)
        loading = thread.submit(load)
        try:
            for shape in shapes:
                if loading.done() and loading.exception():
                    break
                self.start(shape)
            return loading.result()
        except BaseException:
            self._threads.cancel()
            raise
        finally:
            thread.shutdown(wait=False)

    def wait(self, shape: Any, name: str) -> None:
        """Waits while a thread compiles a program. If none has begun, or it failed, the program's call compiles it."""
        compiled = self._compiled.get((shape, name))
        if compiled is not None and not compiled.cancel():
            compiled.result()

    def finish(self) -> None:
        """Waits until threads have compiled all that has begun."""
        for compiled in list(self._compiled.values()):
            if not compiled.cancelled():
                compiled.result()


def _num_cores() -> int:
    """The cores that this process may use, as far as the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
