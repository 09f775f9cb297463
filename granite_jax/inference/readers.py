"""Inputs read by a few threads, ahead of the device, and results in order."""

import collections
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from granite_jax.inference.engine import Engine
from granite_jax.inference.results import Transcript

_READERS = 4


@dataclasses.dataclass(eq=False)
class _Input:
    """An input that was taken: its result, and its request once it is read and submitted."""

    result: "Future[Transcript]" = dataclasses.field(default_factory=Future)
    request: "Future[Transcript] | None" = None


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
    remaining, done = iter(inputs), queue.SimpleQueue[_Input]()
    taken: collections.deque[_Input] = collections.deque()
    reading = _Reading(engine)

    def read(one: _Input, arguments: tuple[Any, ...]) -> None:
        try:
            one.request = submit(*arguments)
        except BaseException as error:
            one.result.set_exception(error)
        else:
            one.request.add_done_callback(lambda request: _pass_on(request, one.result))
        reading.end()

    def take(pool: ThreadPoolExecutor) -> None:
        while len(taken) < window and not reading.exhausted:
            arguments = next(remaining, None)
            if arguments is None:
                reading.exhaust()
                return
            one = _Input()
            if not ordered:
                one.result.add_done_callback(lambda _, one=one: done.put(one))
            taken.append(one)
            reading.begin()
            pool.submit(read, one, arguments)

    with ThreadPoolExecutor(_READERS, thread_name_prefix="granite-jax-reader") as pool:
        try:
            take(pool)
            while taken:
                if ordered:
                    next_input = taken[0]
                    engine.wait(next_input.result)
                else:
                    engine.wait(taken[0].result, lambda: not done.empty())
                    next_input = done.get()
                taken.remove(next_input)
                yield next_input.result.result()
                take(pool)
        finally:
            for one in taken:
                if one.request is not None:
                    one.request.cancel()
            pool.shutdown(wait=False, cancel_futures=True)


class _Reading:
    """How many inputs are being read; has the engine flush when the last one is submitted."""

    def __init__(self, engine: Engine):
        self._engine, self._lock, self._count = engine, threading.Lock(), 0
        self.exhausted = False

    def begin(self) -> None:
        with self._lock:
            self._count += 1

    def end(self) -> None:
        with self._lock:
            self._count -= 1
            last = self.exhausted and not self._count
        if last:
            self._engine.flush()

    def exhaust(self) -> None:
        """There are no more inputs."""
        with self._lock:
            self.exhausted = True
            last = not self._count
        if last:
            self._engine.flush()


def _pass_on(request: "Future[Transcript]", result: "Future[Transcript]") -> None:
    if request.cancelled():
        result.cancel()
    elif (error := request.exception()) is not None:
        result.set_exception(error)
    else:
        result.set_result(request.result())
