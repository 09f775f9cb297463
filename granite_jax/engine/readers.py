"""Threads that run jobs: inputs on their way from a file to a result.

    add ──► waiting ──► open, at most `limit` at a time ──► read to its end ──► done
                          │ read: submits to the engine         ▲
                          └───────── messages: its replies ─────┘

A job is run by one thread at a time, so that it needs no locks. Messages go before reading, and a job is read only
while it has room, those before it have, and the engine has. Threads begin with the first job and end when there is
nothing to do.
"""

import atexit
import collections
import contextlib
import functools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from granite_jax.engine.engine import Engine

NUM_READERS = 4
_STOP_SECONDS = 5.0  # at exit, for a reader that waits for a file


class Job(Protocol):
    """An input on its way."""

    @property
    def has_room(self) -> bool:
        """Whether it can read more before its results come."""
        ...

    def read(self) -> bool:
        """Reads and submits a part of the input; returns whether there is more."""
        ...

    def take(self, message: Any) -> None:
        """Takes what was posted to it."""
        ...

    def fail(self, error: BaseException) -> None:
        """Takes what `read` or `take` has raised."""
        ...

    def close(self) -> None:
        """Closes what is read from."""
        ...


class Readers:
    """Runs jobs.

    Fields:
      limit: how many jobs are read at a time.
    """

    def __init__(self, engine: Engine, limit: int = NUM_READERS):
        self.limit = limit
        self._engine = engine
        self._lock = threading.Lock()  # guards what follows
        self._waiting: collections.deque[Job] = collections.deque()
        self._open: list[Job] = []
        self._messages: dict[Job, collections.deque[Any]] = {}
        self._running: set[Job] = set()
        self._threads: set[threading.Thread] = set()
        self._blocked: set[Job] = set()  # that run callers' code
        self._is_announced = self._is_expected = self._is_stopped = False
        _READERS.add(self)

    def add(self, job: Job) -> None:
        """Adds a job, which is opened after those that were added before."""
        with self._lock:
            is_stopped = self._is_stopped
            if not is_stopped:
                self._waiting.append(job)
                try:
                    self._start()
                except RuntimeError:  # there can be no more threads
                    self._waiting.remove(job)
                    raise
        if is_stopped:
            job.fail(RuntimeError("this process ends"))

    def post(self, job: Job, message: Any) -> None:
        """Sends a message to a job."""
        with self._lock:
            self._messages.setdefault(job, collections.deque()).append(message)
            with contextlib.suppress(RuntimeError):  # there can be no more threads: a later start finds the message
                self._start()

    @contextlib.contextmanager
    def blocking(self, job: Job) -> Iterator[None]:
        """Around a caller's code in a job, which may wait for other jobs: these run as if this one were not there."""
        with self._lock:
            is_outer = job not in self._blocked
            self._blocked.add(job)
            with contextlib.suppress(RuntimeError):
                self._start()
        try:
            yield
        finally:
            with self._lock:
                if is_outer:
                    self._blocked.discard(job)
                self._tell_engine()

    def stop(self) -> None:
        """Ends the threads after what they are just doing, and closes what they were reading.

        Does not wait for ever for one that reads.
        """
        with self._lock:
            self._is_stopped = True
            threads = list(self._threads)
        end = time.monotonic() + _STOP_SECONDS
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        with self._lock:
            left = [job for job in self._open if job not in self._running]
        for job in left:
            job.close()

    def _start(self) -> None:
        """Starts a thread if one is needed."""
        self._tell_engine()
        if len(self._threads) < self._most_threads and not self._is_stopped and self._next() is not None:
            thread = threading.Thread(target=self._run, name="granite-jax-reader", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                if not self._threads:
                    raise
            else:
                self._threads.add(thread)

    @property
    def _most_threads(self) -> int:
        return max(self.limit, 1) + len(self._blocked)

    def _tell_engine(self) -> None:
        """Says whether more will be submitted, and whether soon."""
        is_announced = bool(self._waiting or self._open)
        if is_announced != self._is_announced:
            self._is_announced = is_announced
            self._engine.announce(1 if is_announced else -1)
        # What follows from messages is that a job has room again, or that it submits something once more.
        has_messages = any(job not in self._blocked for job in self._messages)
        is_expected = has_messages or next(self._readable(), None) is not None
        if is_expected != self._is_expected:
            self._is_expected = is_expected
            self._engine.expect(1 if is_expected else -1)

    def _readable(self) -> Iterator[Job]:
        """The jobs that may be read now, in order: up to the first that has no room, because the device is behind.

        So long inputs are finished one after another, and not all at the end.
        """
        if self._engine.num_unfinished >= 2 * self._engine.read_ahead:
            return
        opened = [job for job in self._open if job not in self._blocked]
        for job in opened:
            if not job.has_room:
                return
            yield job
        if self._waiting and len(opened) < max(self.limit, 1):
            yield self._waiting[0]

    def _next(self) -> tuple[Job, Callable[[], Any]] | None:
        """A job that no thread runs, and what to do for it."""
        for job in self._messages:
            if job not in self._running:
                return job, functools.partial(self._take, job)
        for job in self._readable():
            if job not in self._running:
                return job, functools.partial(self._read, job)
        return None

    def _run(self) -> None:
        while True:
            with self._lock:
                task = None if self._is_stopped else self._next()
                if task is None or len(self._threads) > self._most_threads:
                    self._threads.discard(threading.current_thread())
                    return
                job, work = task
                self._running.add(job)
                if self._waiting and job is self._waiting[0]:
                    self._open.append(self._waiting.popleft())
                self._start()  # another thread, if there is more to do
            try:
                work()
            except BaseException as error:
                with contextlib.suppress(BaseException):  # of callbacks
                    job.fail(error)
            with self._lock:
                self._running.discard(job)
                self._tell_engine()

    def _read(self, job: Job) -> None:
        has_more = False
        try:
            has_more = job.read()
        finally:
            if not has_more:
                with self._lock:
                    self._open.remove(job)

    def _take(self, job: Job) -> None:
        while True:
            with self._lock:
                messages = self._messages.get(job)
                if not messages:
                    self._messages.pop(job, None)
                    return
                message = messages.popleft()
            job.take(message)


_READERS: "weakref.WeakSet[Readers]" = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """Before the engines stop, whose replies would have come to these."""
    for readers in list(_READERS):
        readers.stop()
