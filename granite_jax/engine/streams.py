"""Inputs from an iterator, one after another, and their results while more inputs come.

A thread of its own takes inputs, which may come slowly, or only when results were given back: at most `window` of them
are between taking and yielding. It is a daemon, so that an iterator that waits for ever does not keep a process alive.
"""

import atexit
import collections
import contextlib
import dataclasses
import queue
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from granite_jax.engine.engine import Engine

T = TypeVar("T")
R = TypeVar("R")
Notify = Callable[[Callable[[], None]], None]


@dataclasses.dataclass(eq=False)
class _Input:
    """An input in progress."""

    item: Any
    future: "Future[Any]"
    is_done: bool = False


@dataclasses.dataclass(frozen=True)
class _End:
    """There are no more inputs, perhaps because of an error."""

    error: BaseException | None = None


def results(
    inputs: Iterator[T],
    submit: "Callable[[T, Notify], Future[R]]",
    engine: Engine,
    *,
    window: int,
    ordered: bool,
) -> "Generator[tuple[T, Future[R]]]":
    """Yields every input with its future, which is done.

    An iterator that fails loses nothing that was given before: its error is raised after the results of that. Leaving
    the generator, or the process, cancels the rest.

    Args:
      submit: begins with an input. What it passes to its second argument is called by whoever iterates here, before the
        input's result is yielded.
      engine: which waits a moment for an input that is asked for.
      ordered: yield in input order; otherwise as results are done.
    """
    stream = _results(inputs, submit, engine, window, ordered)
    _STREAMS.add(stream)
    return stream


def _results(
    inputs: Iterator[T], submit: "Callable[[T, Notify], Future[R]]", engine: Engine, window: int, ordered: bool
) -> "Generator[tuple[T, Future[R]]]":
    # An input that was taken, and again when it is done; functions to call; the end.
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    free, stopped = threading.Semaphore(window), threading.Event()

    def take() -> None:
        end = _End()
        engine.announce(1)
        try:
            while free.acquire() and not stopped.is_set():
                with engine.expecting():
                    try:
                        item = next(inputs)
                    except StopIteration:
                        break
                    taken = _Input(item, submit(item, events.put))
                events.put(taken)
                taken.future.add_done_callback(lambda _, taken=taken: events.put(taken))
                if stopped.is_set():
                    taken.future.cancel()
        except BaseException as error:
            end = _End(error)
        engine.announce(-1)
        events.put(end)

    threading.Thread(target=take, name="granite-jax-inputs", daemon=True).start()
    in_progress: collections.deque[_Input] = collections.deque()
    known: set[_Input] = set()
    end: _End | None = None
    try:
        while end is None or in_progress:
            event = events.get()
            if isinstance(event, _End):
                end = event
            elif not isinstance(event, _Input):
                event()
            elif event not in known:
                known.add(event)
                in_progress.append(event)
            else:
                event.is_done = True
                while in_progress and (first := in_progress[0] if ordered else event).is_done:
                    in_progress.remove(first)
                    known.remove(first)
                    free.release()
                    yield first.item, first.future
                    if not ordered:
                        break
        if end.error is not None:
            raise end.error
    finally:
        stopped.set()
        free.release()
        with contextlib.suppress(queue.Empty):
            while True:
                if isinstance(event := events.get_nowait(), _Input):
                    event.future.cancel()
        for each in in_progress:
            each.future.cancel()


_STREAMS: "weakref.WeakSet[Generator[Any]]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Ends streams that still have a name, while there are modules to do it with."""
    for stream in list(_STREAMS):
        with contextlib.suppress(ValueError):  # it is running, in a thread that is left
            stream.close()
