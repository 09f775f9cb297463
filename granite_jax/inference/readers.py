"""Inputs read by a few threads, ahead of the device, and results in order."""

import collections
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from granite_jax.inference.engine import Engine
from granite_jax.inference.results import Transcript

_READERS = 4


def read_ahead(
    inputs: Iterable[tuple[Any, ...]],
    submit: Callable[..., "Future[Transcript]"],
    engine: Engine,
    window: int,
    ordered: bool,
) -> Iterator[Transcript]:
    """Yields the result of each input.

    Args:
      inputs: arguments of `submit`, read lazily.
      submit: reads an input and submits it to the engine; runs in the readers' threads.
      window: the most inputs that are taken and not yet yielded.
      ordered: yield in the inputs' order; otherwise as they are done.
    """
    remaining, done = iter(inputs), queue.SimpleQueue[Future[Transcript]]()
    taken: collections.deque[Future[Transcript]] = collections.deque()
    state = _Reading(engine)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="granite-jax-reader") as pool:

        def read(result: "Future[Transcript]", arguments: tuple[Any, ...]) -> None:
            try:
                submitted = submit(*arguments)
            except BaseException as error:
                result.set_exception(error)
            else:
                result.inner = submitted  # type: ignore[attr-defined]
                submitted.add_done_callback(lambda inner: _pass_on(inner, result))
            state.read_one()

        def take() -> None:
            while len(taken) < window and not state.exhausted:
                arguments = next(remaining, None)
                if arguments is None:
                    state.finish()
                    return
                result: Future[Transcript] = Future()
                result.add_done_callback(done.put)
                taken.append(result)
                state.start_one()
                pool.submit(read, result, arguments)

        try:
            take()
            while taken:
                if ordered:
                    first = taken[0]
                    engine.wait(first)
                else:
                    while done.empty():
                        engine.wait(taken[0], lambda: not done.empty())
                    first = done.get()
                taken.remove(first)
                yield first.result()
                take()
        finally:
            for result in taken:
                inner = getattr(result, "inner", None)
                if inner is not None:
                    inner.cancel()
            pool.shutdown(wait=False, cancel_futures=True)


class _Reading:
    """How many inputs are being read; has the engine flush when the last one is."""

    def __init__(self, engine: Engine):
        self._engine, self._lock, self._count = engine, threading.Lock(), 0
        self.exhausted = False

    def start_one(self) -> None:
        with self._lock:
            self._count += 1

    def read_one(self) -> None:
        with self._lock:
            self._count -= 1
            last = self.exhausted and not self._count
        if last:
            self._engine.flush()

    def finish(self) -> None:
        """There are no more inputs."""
        with self._lock:
            self.exhausted = True
            last = not self._count
        if last:
            self._engine.flush()


def _pass_on(inner: "Future[Transcript]", result: "Future[Transcript]") -> None:
    if inner.cancelled():
        result.cancel()
    elif (error := inner.exception()) is not None:
        result.set_exception(error)
    else:
        result.set_result(inner.result())
