"""Reader processes: a thread has one of them read an entry, and survives its death."""

import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from granite_jax.errors import GraniteError

_CONTEXT = multiprocessing.get_context("spawn")  # a fork would copy the locks of JAX's threads
Item = TypeVar("Item")
Result = TypeVar("Result")


class Killed(Exception):
    """An item killed the processes that had it, one after another."""


class Closed(Exception):
    """The processes were ended meanwhile."""


class ReaderProcesses(Generic[Item, Result]):
    """Calls a function in processes, from as many threads as there are processes."""

    def __init__(self, function: Callable[[Item], Result], count: int):
        """
        Args:
          function: must be picklable.
          count: number of processes. They start when they are first needed.
        """
        self._function = function
        self._idle: queue.SimpleQueue[_Process | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._running: set[_Process] = set()
        self._closed = False
        # More at once would all be late. Besides, they notice their parent's death only when they have imported this.
        self._starting = threading.BoundedSemaphore(os.cpu_count() or 1)
        for _ in range(count):
            self._idle.put(None)

    def __call__(self, item: Item) -> Result:
        """The function's result.

        Raises:
          Killed: the process with this item died, and so did a new one.
          Closed: `close` was called.
        """
        process = self._idle.get()
        try:
            for _ in range(2):
                process = process or self._new()
                try:
                    return process.call(item)
                except (EOFError, OSError):
                    self._end(process)
                    process = None
            raise Killed
        finally:
            self._idle.put(process)

    def close(self) -> None:
        """Kills the processes, also while they read."""
        with self._lock:
            self._closed = True
            running = list(self._running)
        for process in running:
            process.kill()
        for process in running:
            self._end(process)

    def _new(self) -> "_Process":
        with self._starting:
            with self._lock:
                if self._closed:
                    raise Closed
                process = _Process(self._function)
                self._running.add(process)
            process.wait()
            return process

    def _end(self, process: "_Process") -> None:
        with self._lock:
            self._running.discard(process)
        process.end()


def check_processes() -> None:
    """Starts a process that does nothing.

    Raises:
      GraniteError: it cannot start, because it runs the calling script again, whose calls have no main guard.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(1)  # this is that process, and the script has come here again
    process = _Process(os.path.basename)
    try:
        process.call("")
    except (EOFError, OSError):
        raise GraniteError(
            "reader processes cannot start: a script that uses them must be a file, and do its work below "
            '`if __name__ == "__main__":` (or use readers="threads")'
        ) from None
    finally:
        process.end()


class _Process:
    """One process."""

    def __init__(self, function: Callable[[Any], Any]):
        self._ready = False
        self._connection, other = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(other,), daemon=True)
        self._process.start()
        other.close()  # so that the process's death is the connection's end
        # Not as an argument: to load it can take seconds, in which the process would not notice its parent's death.
        with contextlib.suppress(OSError):
            self._connection.send(function)

    def wait(self) -> None:
        """Waits until the process is ready, or dead."""
        self._connection.poll(None)

    def call(self, item: Any) -> Any:
        """Raises EOFError or OSError if the process dies."""
        self._ready = self._ready or self._connection.recv()
        self._connection.send(item)
        return self._connection.recv()

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(connection: Connection) -> None:
    """What a process does: calls the function until its parent ends."""
    for name in ("SIGINT", "SIGHUP"):  # of a terminal, which sends them to all processes; the parent decides
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        function = connection.recv()
        connection.send(True)
        while True:
            connection.send(function(connection.recv()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
