"""Requests that wait for a batch: which go next, and with which others.

A batch goes when it is full, when it is flushed, when one of its requests has waited for the deadline, or when more
than `read_ahead` requests were admitted after one of its own. Due requests of other buckets fill up one that is not
full.
"""

import collections
import dataclasses
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

from granite_jax.inference.buckets import Bucket, choose_bucket
from granite_jax.inference.requests import Decoded, Request, Ticket

Batch = tuple[Bucket, list[Ticket]]

_READ_AHEAD = 16  # full batches of audio held on the host at a time


class RequestQueue:
    """Admits requests from any thread, and forms batches of them for whoever drives it."""

    def __init__(self, buckets: Sequence[Bucket], batch_size: int, replicas: int, *, deadline: float = math.inf):
        """
        Args:
          batch_size: rows of a full batch on each copy of the weights, of which there are `replicas`.
          deadline: seconds after which a request is due even in a part-filled batch.
        """
        self.deadline = deadline
        self._buckets = tuple(buckets)
        self._batch_size = batch_size
        self._replicas = replicas
        self._changed = threading.Condition()  # guards what follows
        self._pending: dict[Bucket, list[Ticket]] = collections.defaultdict(list)
        self._unfinished: dict[int, Ticket] = {}
        self._admitted = 0
        self._flushed = 0  # requests with a lower number do not wait for a full batch

    def bucket(self, request: Request, batch: int) -> Bucket | None:
        """The bucket of `batch` rows for a request, or None."""
        samples = len(request.audio.samples)
        return choose_bucket(self._buckets, batch, samples, request.prompt_length, request.max_new_tokens)

    def rows(self, bucket: Bucket) -> int:
        """Rows of a batch on all devices together."""
        return bucket.batch * self._replicas

    @property
    def num_unfinished(self) -> int:
        """Requests that were admitted and are not done."""
        return len(self._unfinished)

    @property
    def full_rows(self) -> int:
        """Rows of a full batch on all devices together."""
        return self._batch_size * self._replicas

    @property
    def read_ahead(self) -> int:
        """How many requests can be admitted after a request before its batch is dispatched, full or not."""
        return _READ_AHEAD * self.full_rows

    def fits(self, request: Request) -> bool:
        """Whether there is any bucket for a request."""
        return any(self.bucket(request, batch) is not None for batch in {1, self._batch_size})

    def submit(self, request: Request) -> "Future[Decoded]":
        """Admits a request that `fits`. Its future completes only while a caller drives the engine: see `wait`."""
        bucket = self.bucket(request, self._batch_size) or self.bucket(request, 1)
        assert bucket is not None, "checked when the request was made"
        with self._changed:
            ticket = Ticket(request, self._admitted, time.monotonic(), Future())
            self._admitted += 1
            self._pending[bucket].append(ticket)
            self._unfinished[ticket.number] = ticket
            self._changed.notify_all()
        return ticket.future

    def flush(self) -> None:
        """Makes all requests admitted so far due, in part-filled batches if necessary."""
        with self._changed:
            self._flushed = self._admitted
            self._changed.notify_all()

    def _next_batch(self) -> Batch | None:
        """Removes and returns the next batch that is due: one with a late request, or a full one."""
        with self._changed:
            for tickets in self._pending.values():
                tickets[:] = [t for t in tickets if not (t.future.cancelled() and self._unfinished.pop(t.number))]
            late = {b: [t for t in tickets if self._is_late(t)] for b, tickets in self._pending.items()}
            late = {b: min(tickets, key=_number) for b, tickets in late.items() if tickets}
            full = [b for b, tickets in self._pending.items() if len(tickets) >= self.rows(b)]
            if late:
                bucket, first = min(late.items(), key=lambda item: item[1].number)
            elif full:
                bucket = max(full, key=lambda b: len(self._pending[b]))
                first = min(self._pending[bucket], key=_number)
            else:
                return None
            joined = [bucket]
            if len(self._pending[bucket]) < self.rows(bucket):
                # Rows cost the same in any shape: due requests of other buckets fill the batch up.
                bucket = max(
                    (b for b in late if b.contains(bucket)), key=lambda b: (b.capacity, b.samples), default=bucket
                )
                joined = [b for b in late if bucket.contains(b)]
            waiting = [ticket for b in joined for ticket in self._pending[b]]
            batch = _nearest(waiting, first, self.rows(bucket))
            if bucket.batch > 1 and 4 * len(batch) <= self.rows(bucket):
                bucket, batch = self._row_by_row(bucket, batch, first)
            numbers = set(map(_number, batch))
            for tickets in self._pending.values():
                tickets[:] = [ticket for ticket in tickets if ticket.number not in numbers]
            # From here on a request cannot be cancelled.
            batch = [t for t in batch if self._is_wanted(t)]
            return (bucket, batch) if batch else None

    def _row_by_row(self, bucket: Bucket, batch: list[Ticket], first: Ticket) -> Batch:
        """In place of a mostly empty batch, whose empty rows take part in decode steps, one row for each device."""
        for tickets in (_nearest(batch, first, self._replicas), [first]):
            singles = [self.bucket(ticket.request, 1) for ticket in tickets]
            known = [single for single in singles if single is not None]
            largest = next((b for b in known if all(map(b.contains, known))), None)
            if largest is not None and len(known) == len(tickets):
                return largest, tickets
        return bucket, batch

    def _is_wanted(self, ticket: Ticket) -> bool:
        """Whether a request that leaves the queue has not been cancelled."""
        is_wanted = ticket.request.is_retry or ticket.future.set_running_or_notify_cancel()
        if not is_wanted:
            del self._unfinished[ticket.number]
        return is_wanted

    def _is_late(self, ticket: Ticket) -> bool:
        return (
            ticket.request.is_retry
            or ticket.request.is_urgent
            or ticket.number < self._flushed
            or self._admitted - ticket.number > self.read_ahead
            or time.monotonic() - ticket.time > self.deadline
        )

    def _retry(self, ticket: Ticket) -> None:
        """Admits a request again, without boosts."""
        request = dataclasses.replace(ticket.request, is_retry=True)
        bucket = self.bucket(request, self._batch_size) or self.bucket(request, 1)
        assert bucket is not None
        with self._changed:
            retry = dataclasses.replace(ticket, request=request)
            self._pending[bucket].append(retry)
            self._unfinished[ticket.number] = retry


def _number(ticket: Ticket) -> int:
    return ticket.number


def _nearest(tickets: Sequence[Ticket], first: Ticket, size: int) -> list[Ticket]:
    """At most `size` of the tickets, one of them `first`, in order of length: rows alike decode for a similar time."""
    ordered = sorted(tickets, key=lambda ticket: len(ticket.request.audio.samples))
    start = max(0, min(ordered.index(first) - size // 2, len(ordered) - size))
    return ordered[start : start + size]
