"""The rows that wait for one stage: which go next, and with which others.

A batch goes when it is full, or when one of its rows is due. Rows of other shapes that are due fill it up. A row is due

    - if it is urgent, or if more than `read_ahead` requests were admitted after it;
    - if its deadline is over, or if it has none and there is nothing else to come;
    - if the device is idle, at once or, where something else is expected soon, a moment later.
"""

import collections
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from granite_jax.engine.stages import BatchShape, Row

LINGER = 0.2
"""Seconds that a row waits on an idle device for others that are expected."""


class Batch(NamedTuple):
    """Rows that go together."""

    shape: BatchShape
    rows: list[Row]


class Moment(NamedTuple):
    """What decides whether rows are due.

    Fields:
      admitted: requests admitted so far.
      time: by the scheduler's clock.
      expects_more: whether someone is about to submit more.
      is_more_to_come: whether someone will submit more, now or when there is room.
      is_idle: whether the device has nothing to do.
    """

    admitted: int
    time: float
    expects_more: bool
    is_more_to_come: bool
    is_idle: bool


class BatchQueue:
    """Forms batches. Its caller has a lock."""

    def __init__(self, replicas: int, read_ahead: int, *, reshapes: bool):
        """
        Args:
          replicas: copies of the weights, each of which takes `shape.batch` rows.
          read_ahead: how many requests can be admitted after a row before that is due.
          reshapes: whether rows can go in other shapes than their own: rows that were in a batch cannot.
        """
        self._reshapes = reshapes
        self._replicas = replicas
        self._read_ahead = read_ahead
        self._waiting: dict[BatchShape, list[Row]] = collections.defaultdict(list)

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def oldest(self) -> float:
        """The number of the oldest request that waits; infinite if none does."""
        return min((row.ticket.number for rows in self._waiting.values() for row in rows), default=math.inf)

    def add(self, row: Row, shape: BatchShape) -> None:
        """Adds a row whose batch is of this shape."""
        self._waiting[shape].append(row)

    def remove(self, row_is_unwanted: Callable[[Row], bool]) -> None:
        """Removes rows."""
        for rows in self._waiting.values():
            rows[:] = [row for row in rows if not row_is_unwanted(row)]

    def num_rows(self, shape: BatchShape) -> int:
        """Rows of a full batch on all devices together."""
        return shape.batch * self._replicas

    def take(self, moment: Moment, *, only_full: bool = False) -> Batch | None:
        """Removes and returns the batch that goes next: one with a row that is due, or a full one."""
        due = {} if only_full else self._first_due(moment)
        full = [shape for shape, rows in self._waiting.items() if len(rows) >= self.num_rows(shape)]
        if due:
            shape, first = min(due.items(), key=lambda item: item[1].ticket.number)
        elif full:
            shape = max(full, key=lambda shape: len(self._waiting[shape]))
            first = min(self._waiting[shape], key=_number)
        else:
            return None
        joined = [shape]
        if self._reshapes and len(self._waiting[shape]) < self.num_rows(shape):
            # Rows cost the same in any shape: due rows of other shapes fill the batch up.
            shape = max((s for s in due if s.contains(shape)), key=lambda s: s.cost, default=shape)
            joined = [s for s in due if shape.contains(s)]
        waiting = [row for s in joined for row in self._waiting[s]]
        batch = Batch(shape, _nearest(waiting, first, self.num_rows(shape)))
        if self._reshapes and shape.batch > 1 and 4 * len(batch.rows) <= self.num_rows(shape):
            batch = self._row_by_row(batch, first)
        taken = set(map(_number, batch.rows))
        for rows in self._waiting.values():
            rows[:] = [row for row in rows if row.ticket.number not in taken]
        return batch

    def seconds_until_due(self, moment: Moment) -> float:
        """How long it takes until a row is due, if nothing else happens; infinite if none will be."""
        waits = [
            row.ticket.time - moment.time + min(row.request.deadline, LINGER if moment.is_idle else math.inf)
            for rows in self._waiting.values()
            for row in rows
        ]
        return max(min(waits, default=math.inf), 0.0)

    def _first_due(self, moment: Moment) -> dict[BatchShape, Row]:
        due = {shape: [row for row in rows if self._is_due(row, moment)] for shape, rows in self._waiting.items()}
        return {shape: min(rows, key=_number) for shape, rows in due.items() if rows}

    def _is_due(self, row: Row, moment: Moment) -> bool:
        waited, deadline = moment.time - row.ticket.time, row.request.deadline
        return (
            row.request.is_urgent
            or moment.admitted - row.ticket.number > self._read_ahead
            or (waited >= deadline if deadline < math.inf else not moment.is_more_to_come)
            or (moment.is_idle and (not moment.expects_more or waited >= LINGER))
        )

    def _row_by_row(self, batch: Batch, first: Row) -> Batch:
        """In place of a mostly empty batch, whose empty rows take part in decode steps, one row for each device."""
        for rows in (_nearest(batch.rows, first, self._replicas), [first]):
            known = [row.request.single for row in rows if row.request.single is not None]
            largest = next((shape for shape in known if all(map(shape.contains, known))), None)
            if largest is not None and len(known) == len(rows):
                return Batch(largest, rows)
        return batch


def _number(row: Row) -> int:
    return row.ticket.number


def _nearest(rows: Sequence[Row], first: Row, size: int) -> list[Row]:
    """At most `size` of the rows, one of them `first`, in order of size: rows of similar size take a similar time."""
    ordered = sorted(rows, key=lambda row: row.request.size)
    start = max(0, min(ordered.index(first) - size // 2, len(ordered) - size))
    return ordered[start : start + size]
