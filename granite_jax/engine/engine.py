"""A scheduler with the thread that drives it.

The thread begins with the first request and ends when there is nothing to do, so that an engine without references is
freed. A process that ends waits for what is on the device.
"""

import atexit
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager

import jax

from granite_jax.engine.scheduler import Scheduler
from granite_jax.engine.stages import Reply, Request, Ticket

_WAIT_SECONDS = 60.0


class Engine:
    """Takes requests from any thread, and gives replies in a thread of its own."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler
        self._lock = threading.Lock()  # guards the thread
        self._thread: threading.Thread | None = None
        self._is_stopped = False
        _ENGINES.add(self)

    @property
    def full_rows(self) -> int:
        """Rows of a full batch on all devices together."""
        return self._scheduler.full_rows

    @property
    def read_ahead(self) -> int:
        """How many requests can be admitted after a request before its batch goes, full or not."""
        return self._scheduler.read_ahead

    @property
    def num_unfinished(self) -> int:
        """Requests that were admitted and have no final reply."""
        return self._scheduler.num_unfinished

    @property
    def idle_seconds(self) -> float:
        """Seconds that the device has had nothing to do, while more was expected."""
        return self._scheduler.idle_seconds

    def submit(self, request: Request, reply: Callable[[Reply], None]) -> Ticket:
        """As `Scheduler.submit`."""
        ticket = self._scheduler.submit(request, reply)
        with self._lock:
            if self._thread is None and not self._is_stopped:
                thread = threading.Thread(target=self._run, name="granite-jax-engine", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # there can be no more threads
                    self._scheduler.cancel(ticket)
                    raise
                self._thread = thread
        return ticket

    def cancel(self, ticket: Ticket) -> bool:
        """As `Scheduler.cancel`."""
        return self._scheduler.cancel(ticket)

    def announce(self, count: int) -> None:
        """As `Scheduler.announce`."""
        self._scheduler.announce(count)

    def expect(self, count: int) -> None:
        """As `Scheduler.expect`."""
        self._scheduler.expect(count)

    def expecting(self) -> AbstractContextManager[None]:
        """As `Scheduler.expecting`."""
        return self._scheduler.expecting()

    def stop(self) -> None:
        """Ends the thread after what it is just doing. Requests that are left get no reply."""
        with self._lock:
            self._is_stopped = True
            thread = self._thread
        self._scheduler.stop_waiting()
        if thread is not None:
            thread.join()

    @jax.transfer_guard("allow")  # what a program has set is for its own transfers
    def _run(self) -> None:
        while True:
            with self._lock:
                if self._is_stopped or not self._scheduler.has_work:
                    self._thread = None
                    return
            try:
                if not self._scheduler.advance():
                    self._scheduler.wait(_WAIT_SECONDS)
            except BaseException as error:  # of the engine itself: stages' own are replies
                self._scheduler.abandon(error)


_ENGINES: "weakref.WeakSet[Engine]" = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """Before JAX ends its clients, which was imported earlier."""
    for engine in list(_ENGINES):
        engine.stop()
