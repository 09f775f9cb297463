"""Batches on their way through the device, stage by stage.

    device   encode 1   encode 2   decode 1   encode 3   decode 2   ...
    host                drafts 1   batch 3    drafts 2   texts 1, batch 4

At most two batches of first stages are on the device: the host works on the results of one while the next is computed.
What goes on from there does so in order. All recognizers share the device, so that their batches share this order.

Requests are submitted and canceled by any thread; one thread at a time calls `advance`. Replies are given by that
thread, while it holds no lock.
"""

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from granite_jax.engine.batch_queue import Batch, BatchQueue, Moment
from granite_jax.engine.stages import Collect, Done, Enqueue, Outcome, Partial, Reply, Request, Row, Stage, Ticket

_READ_AHEAD = 16  # full batches of requests held on the host at a time
_DEPTH = 2  # batches of first stages on the device


class Scheduler:
    """Takes requests through the stages of their recognizers."""

    def __init__(self, replicas: int, batch_size: int, *, clock: Callable[[], float] = time.monotonic):
        """
        Args:
          replicas: copies of the weights: the rows of every batch are a multiple of this.
          batch_size: rows of a full batch on each of them.
        """
        self.full_rows = batch_size * replicas
        self.read_ahead = _READ_AHEAD * self.full_rows
        self._replicas = replicas
        self._clock = clock
        self._changed = threading.Condition(threading.Lock())  # guards what follows
        self._entering: dict[Stage, BatchQueue] = {}
        self._regrouping: dict[Stage, BatchQueue] = {}
        self._admitted = self._unfinished = self._announced = self._expected = 0
        self._is_stopped = self._is_working = False
        self.idle_seconds = 0.0  # in which the device had nothing to do while more was expected
        self._idle_since: float | None = None
        # Batches on the device, of first stages and of others. Used by the thread that calls `advance` alone.
        self._entered: collections.deque[tuple[Batch, Collect]] = collections.deque()
        self._continued: collections.deque[tuple[Batch, Collect]] = collections.deque()

    # From any thread.

    @property
    def num_unfinished(self) -> int:
        """Requests that were admitted and have no final reply."""
        return self._unfinished

    def submit(self, request: Request, reply: Callable[[Reply], None]) -> Ticket:
        """Admits a request. It gets one final reply, unless it is canceled before its batch goes."""
        with self._changed:
            ticket = Ticket(request, self._admitted, self._clock(), reply)
            self._admitted += 1
            self._unfinished += 1
            self._queue(self._entering, request.stage).add(Row(ticket, request.payload), request.shape)
            self._note_idleness()
            self._changed.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> bool:
        """Withdraws a request that waits for its first batch; returns False, and does nothing, if it is further."""
        with self._changed:
            if ticket.is_running or ticket.is_finished:
                return False
            self._end(ticket)
            queue = self._entering[ticket.request.stage]
            queue.remove(lambda row: row.ticket is ticket)
            return True

    def announce(self, count: int) -> None:
        """Adds to the number of those who will submit more, now or when there is room: full batches wait for them."""
        with self._changed:
            self._announced += count
            self._changed.notify_all()

    def expect(self, count: int) -> None:
        """Adds to the number of those who are about to submit, for whom part-filled batches wait a little."""
        with self._changed:
            self._expected += count
            self._note_idleness()
            self._changed.notify_all()

    @contextlib.contextmanager
    def expecting(self) -> Iterator[None]:
        """Expects a submission while the context is open."""
        self.expect(1)
        try:
            yield
        finally:
            self.expect(-1)

    # From the thread that drives.

    @property
    def is_device_idle(self) -> bool:
        """Whether nothing is on the device."""
        return not (self._entered or self._continued)

    @property
    def has_work(self) -> bool:
        """Whether anything waits, or is on the device."""
        with self._changed:
            return not self.is_device_idle or any(map(len, (*self._entering.values(), *self._regrouping.values())))

    def wait(self, limit: float) -> None:
        """Waits until something changes, a row is due, or `limit` seconds are over."""
        with self._changed:
            moment = self._moment()
            queues = (*self._entering.values(), *self._regrouping.values())
            seconds = min([limit, *(queue.seconds_until_due(moment) for queue in queues)])
            if seconds > 0 and not self._is_stopped:
                self._changed.wait(seconds)

    def stop_waiting(self) -> None:
        """Ends a `wait`, and all later ones."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def advance(self) -> bool:
        """Does the next piece of work; returns whether there was one."""
        regrouped = self._take(self._regrouping, only_full=True)
        entering = self._take(self._entering) if len(self._entered) < _DEPTH else None
        if entering is None and regrouped is None and not self._entered:
            regrouped = self._take(self._regrouping)
        for taken, batches in ((regrouped, self._continued), (entering, self._entered)):
            if taken is not None:
                stage, batch = taken
                self._dispatch(batches, stage, batch, None)
        has_taken = is_busy = entering is not None or regrouped is not None
        if self._entered and (entering is None or len(self._entered) > 1):
            self._collect(self._entered)
            is_busy = True
        if self._continued and not has_taken:
            self._collect(self._continued)
            is_busy = True
        while len(self._continued) > 1:  # a batch that goes on to a third stage is there again
            self._collect(self._continued)
        return is_busy

    def abandon(self, error: BaseException) -> None:
        """Replies `error` to every request that has no final reply."""
        with self._changed:
            batches = [batch.rows for batch, _ in (*self._entered, *self._continued)]
            waiting: list[Row] = []
            for queue in (*self._entering.values(), *self._regrouping.values()):
                queue.remove(lambda row: waiting.append(row) is None)
            self._entered.clear()
            self._continued.clear()
        for row in [*waiting, *(row for rows in batches for row in rows)]:
            self._reply(row.ticket, Reply(error=error))

    def _note_idleness(self, *, is_working: bool | None = None) -> None:
        """Adds to `idle_seconds`; called under the lock when anything changes.

        Args:
          is_working: whether a batch is dispatched or collected from now on, if that changes.
        """
        now = self._clock()
        if is_working is not None:
            self._is_working = is_working
        if self._idle_since is not None:
            self.idle_seconds += now - self._idle_since
        self._idle_since = now if self._expected and self.is_device_idle and not self._is_working else None

    def _moment(self) -> Moment:
        expects_more, is_more_to_come = self._expected > 0, self._expected + self._announced > 0
        return Moment(self._admitted, self._clock(), expects_more, is_more_to_come, self.is_device_idle)

    def _queue(self, queues: dict[Stage, BatchQueue], stage: Stage) -> BatchQueue:
        if stage not in queues:
            queues[stage] = BatchQueue(self._replicas, self.read_ahead, reshapes=queues is self._entering)
        return queues[stage]

    def _take(self, queues: dict[Stage, BatchQueue], *, only_full: bool = False) -> tuple[Stage, Batch] | None:
        """The batch that goes next, of any stage: of several, the one with the oldest row."""
        with self._changed:
            moment = self._moment()
            # Stages take turns by the age of their oldest row.
            by_age = sorted((queue.oldest, number, stage) for number, (stage, queue) in enumerate(queues.items()))
            for _, _, stage in by_age:
                batch = queues[stage].take(moment, only_full=only_full)
                if batch is not None:
                    for row in batch.rows:
                        row.ticket.is_running = True
                    self._note_idleness(is_working=True)
                    return stage, batch
        return None

    def _dispatch(
        self, batches: "collections.deque[tuple[Batch, Collect]]", stage: Stage, batch: Batch, shared: Any
    ) -> None:
        try:
            batches.append((batch, stage(batch.shape, batch.rows, shared)))
        except BaseException as error:
            self._fail(batch.rows, error)
        with self._changed:
            self._note_idleness(is_working=False)

    def _collect(self, batches: "collections.deque[tuple[Batch, Collect]]") -> None:
        """Waits for the oldest batch, and does what its stage says."""
        with self._changed:
            self._note_idleness(is_working=True)
        batch, collect = batches.popleft()
        try:
            outcomes = list(collect())
            lost = _lost(batch.rows, outcomes)
            if lost:
                raise RuntimeError(f"a stage lost {len(lost)} of {len(batch.rows)} rows")
        except BaseException as error:
            self._fail(batch.rows, error)
            outcomes = []
        for outcome in outcomes:
            match outcome:
                case Done(results):
                    for row, value in results:
                        self._reply(row.ticket, Reply(value))
                case Partial(row, event):
                    row.ticket.reply(Reply(event, is_final=False))
                case Enqueue(stage, rows, shape, None):
                    with self._changed:
                        for row in rows:
                            self._queue(self._regrouping, stage).add(row, shape)
                case Enqueue(stage, rows, shape, shared):
                    self._dispatch(self._continued, stage, Batch(shape, list(rows)), shared)
        with self._changed:
            self._note_idleness(is_working=False)

    def _fail(self, rows: Iterable[Row], error: BaseException) -> None:
        for row in rows:
            self._reply(row.ticket, Reply(error=error))

    def _reply(self, ticket: Ticket, reply: Reply) -> None:
        with self._changed:
            if ticket.is_finished:
                return
            self._end(ticket)
        ticket.reply(reply)

    def _end(self, ticket: Ticket) -> None:
        ticket.is_finished = True
        self._unfinished -= 1


def _lost(rows: Sequence[Row], outcomes: Sequence[Outcome]) -> set[Ticket]:
    """The tickets that no outcome finishes or passes on."""
    kept = {row.ticket for outcome in outcomes if isinstance(outcome, Enqueue) for row in outcome.rows}
    done = {row.ticket for outcome in outcomes if isinstance(outcome, Done) for row, _ in outcome.results}
    return {row.ticket for row in rows} - kept - done
