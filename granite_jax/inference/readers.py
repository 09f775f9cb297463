"""Reads inputs in a few threads, ahead of the device, and yields their results."""

import collections
import dataclasses
import queue
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from granite_jax.inference.engine import Engine
from granite_jax.inference.results import Transcript

_READERS = 4


@dataclasses.dataclass(eq=False)
class _Input:
    """An input in progress: its result, and its request once it is read and submitted."""

    result: "Future[Transcript]" = dataclasses.field(default_factory=Future)
    request: "Future[Transcript] | None" = None


def read_ahead(
    inputs: Iterable[tuple[Any, ...]],
    submit: Callable[..., "Future[Transcript]"],
    engine: Engine,
    window: int,
    ordered: bool,
    stopped: threading.Event,
) -> Generator[Transcript]:
    """Yields the result of each input.

    Args:
      inputs: arguments of `submit`, read lazily.
      submit: reads an input and submits it to the engine; runs in the readers' threads.
      window: the most inputs in progress, from reading to yielding.
      ordered: yield in input order; otherwise as results are done.
      stopped: set when no more results are wanted, for readers that wait.
    """
    remaining, done = iter(inputs), queue.SimpleQueue[_Input]()
    in_progress: collections.deque[_Input] = collections.deque()
    counter = _ReadCounter(engine)

    def read(item: _Input, arguments: tuple[Any, ...]) -> None:
        try:
            item.request = submit(*arguments)
        except BaseException as error:
            item.result.set_exception(error)
        else:
            if stopped.is_set():
                item.request.cancel()
            item.request.add_done_callback(lambda request: _copy_outcome(request, item.result))
        counter.end()

    def start_reads(pool: ThreadPoolExecutor) -> None:
        while len(in_progress) < window and not counter.exhausted:
            arguments = next(remaining, None)
            if arguments is None:
                counter.exhaust()
                return
            item = _Input()
            if not ordered:
                item.result.add_done_callback(lambda _, item=item: done.put(item))
            in_progress.append(item)
            counter.begin()
            pool.submit(read, item, arguments)

    with ThreadPoolExecutor(_READERS, thread_name_prefix="granite-jax-reader") as pool:
        try:
            start_reads(pool)
            while in_progress:
                if ordered:
                    next_input = in_progress[0]
                    engine.wait(next_input.result)
                else:
                    engine.wait(in_progress[0].result, lambda: not done.empty())
                    next_input = done.get()
                in_progress.remove(next_input)
                yield next_input.result.result()
                start_reads(pool)
        finally:
            stopped.set()
            for item in in_progress:
                if item.request is not None:
                    item.request.cancel()
            pool.shutdown(wait=False, cancel_futures=True)


class _ReadCounter:
    """Counts the inputs being read, and flushes the engine when the last one is submitted."""

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
        """Notes that there are no more inputs."""
        with self._lock:
            self.exhausted = True
            last = not self._count
        if last:
            self._engine.flush()


def _copy_outcome(request: "Future[Transcript]", result: "Future[Transcript]") -> None:
    if request.cancelled():
        result.cancel()
    elif (error := request.exception()) is not None:
        result.set_exception(error)
    else:
        result.set_result(request.result())
