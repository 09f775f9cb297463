"""The contract between the engine and a recognizer.

    submit ──► queue ──► stage: dispatch a batch ──► collect it ──┬─► Done: replies to whoever submitted
                                                                  ├─► Partial: a reply on the way
                 queue of another stage ◄── rows, regrouped ──────┴─► Enqueue

A stage dispatches a batch to the device without waiting, and returns a function that waits for the results. The
payload of a request or a row is the business of its recognizer: the engine sees shapes, sizes and deadlines alone.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol


class BatchShape(Protocol):
    """The shapes that a batch is computed in; hashable."""

    @property
    def batch(self) -> int:
        """Rows of a batch on each copy of the weights."""
        ...

    @property
    def cost(self) -> Any:
        """Orders shapes: what contains another shape costs no less."""
        ...

    def contains(self, other: Any) -> bool:
        """Whether every row that fits the other shape fits this one, in a batch of as many rows."""
        ...


@dataclasses.dataclass(frozen=True)
class Reply:
    """What comes of a request.

    Fields:
      value: a result, or an event on the way to it.
      error: why there is no result.
      is_final: whether nothing else follows.
    """

    value: Any = None
    error: BaseException | None = None
    is_final: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One row of some batch.

    Fields:
      stage: the first stage.
      payload: what that stage takes.
      shape: the shapes of its batch.
      single: shapes of a batch with one row on each copy of the weights, which goes in place of a mostly empty one.
      size: rows of similar size go together.
      deadline: seconds that it waits for a full batch. Infinite: until there is nothing else to come.
      is_urgent: whether it goes with the next batch.
    """

    stage: "Stage"
    payload: Any
    shape: BatchShape
    single: BatchShape | None = None
    size: int = 0
    deadline: float = math.inf
    is_urgent: bool = False


@dataclasses.dataclass(eq=False)
class Ticket:
    """An admitted request.

    Fields:
      number: of the requests admitted before it.
      time: of its admission, by the scheduler's clock.
      reply: takes its replies, in the engine's thread: it must return at once, and may submit and cancel.
    """

    request: Request
    number: int
    time: float
    reply: Callable[[Reply], None]
    is_running: bool = False
    is_finished: bool = False


class Row(NamedTuple):
    """A request on its way, with what the stage before has made of it."""

    ticket: Ticket
    payload: Any

    @property
    def request(self) -> Request:
        return self.ticket.request


class Done(NamedTuple):
    """Results of rows that are finished."""

    results: Sequence[tuple[Row, Any]]


class Partial(NamedTuple):
    """An event of a row that goes on."""

    row: Row
    event: Any


class Enqueue(NamedTuple):
    """Rows that go on to another stage.

    Fields:
      rows: each with its payload for that stage.
      shape: of their batch.
      shared: what the rows have in common, such as arrays on the device: they go on at once, as they are. None: they
        wait for rows of other batches that are on the same way.
    """

    stage: "Stage"
    rows: Sequence[Row]
    shape: BatchShape
    shared: Any = None


Outcome = Done | Partial | Enqueue
Collect = Callable[[], Sequence[Outcome]]
"""Waits for a batch; every row of it is in a `Done` or an `Enqueue`."""
Stage = Callable[[Any, Sequence[Row], Any], Collect]
"""Dispatches a batch of a shape; the last argument is `Enqueue.shared`. What it raises fails the batch's rows alone."""
