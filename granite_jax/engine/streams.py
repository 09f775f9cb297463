"""Inputs from an iterator, one after another, and their results while more inputs come.

A thread of its own takes inputs, which may come slowly, or only when results were given back: at most `window` of them
are between taking and yielding. It is a daemon, so that an iterator that waits for ever does not keep a process alive.
"""

import _thread
import atexit
import collections
import contextlib
import dataclasses
import functools
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


@dataclasses.dataclass(eq=False)
class _Source:
    """What a stream takes inputs with. Its generator alone owns it, so that an abandoned stream can be freed."""

    inputs: Iterator[Any]
    submit: Callable[[Any, Notify], "Future[Any]"]
    events: "queue.SimpleQueue[Any]"


class _Outlook:
    """What an engine expects of a stream: withdrawn when that ends, though its iterator may wait for ever."""

    def __init__(self, engine: Engine):
        self._engine, self._lock = engine, threading.Lock()
        self._is_expected = self._is_withdrawn = False
        engine.announce(1)

    def expect(self, is_expected: bool) -> None:
        with self._lock:
            if is_expected != self._is_expected and not self._is_withdrawn:
                self._is_expected = is_expected
                self._engine.expect(1 if is_expected else -1)

    def withdraw(self) -> None:
        self.expect(False)
        with self._lock:
            if not self._is_withdrawn:
                self._is_withdrawn = True
                self._engine.announce(-1)


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
    # Inputs that were taken, and again when they are done; functions to call; the end.
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    free: queue.SimpleQueue[None] = queue.SimpleQueue()  # places in the window
    for _ in range(window):
        free.put(None)
    source, stopped, outlook = _Source(inputs, submit, events), threading.Event(), _Outlook(engine)
    arguments = weakref.ref(source), free, stopped, outlook
    threading.Thread(target=_take, args=arguments, name="granite-jax-inputs", daemon=True).start()
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
                    free.put(None)
                    yield first.item, first.future
                    if not ordered:
                        break
        if end.error is not None:
            raise end.error
    finally:
        # Garbage collection may run this while the same thread holds a lock that canceling needs: another thread does
        # it, and nothing here waits for a lock.
        stopped.set()
        free.put(None)
        with contextlib.suppress(RuntimeError):  # there can be no more threads, or Python ends
            _thread.start_new_thread(_cancel, (outlook, events, list(in_progress)))


def _take(
    reference: "weakref.ref[_Source]",
    free: "queue.SimpleQueue[None]",
    stopped: threading.Event,
    outlook: _Outlook,
) -> None:
    """Takes inputs and begins with them, in a thread of its own."""
    end = _End()
    try:
        while True:
            free.get()
            source = reference()
            if source is None or stopped.is_set():
                break
            outlook.expect(True)
            try:
                item = next(source.inputs)
            except StopIteration:
                break
            taken = _Input(item, source.submit(item, source.events.put))
            outlook.expect(False)
            source.events.put(taken)
            taken.future.add_done_callback(functools.partial(_put, source.events, taken))
            if stopped.is_set():
                taken.future.cancel()
            del source, item, taken
    except BaseException as error:
        end = _End(error)
    outlook.withdraw()
    if (source := reference()) is not None:
        source.events.put(end)


def _put(events: "queue.SimpleQueue[Any]", taken: _Input, _: Any) -> None:
    events.put(taken)


def _cancel(outlook: _Outlook, events: "queue.SimpleQueue[Any]", in_progress: list[_Input]) -> None:
    """Cancels what a stream has begun."""
    outlook.withdraw()
    with contextlib.suppress(queue.Empty):
        while True:
            if isinstance(event := events.get_nowait(), _Input):
                event.future.cancel()
    for taken in in_progress:
        taken.future.cancel()


_STREAMS: "weakref.WeakSet[Generator[Any]]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Ends streams that still have a name, while there are modules to do it with."""
    for stream in list(_STREAMS):
        with contextlib.suppress(ValueError):  # it is running, in a thread that is left
            stream.close()
