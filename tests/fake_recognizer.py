"""A recognizer without a model, for tests of the engine: batches of strings, in capitals."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from granite_jax.engine.stages import Collect, Done, Enqueue, Outcome, Partial, Reply, Request, Row


@dataclasses.dataclass(frozen=True)
class Shape:
    """So many rows of at most so many letters."""

    batch: int
    cost: int

    def contains(self, other: "Shape") -> bool:
        return self.batch == other.batch and self.cost >= other.cost


class FakeRecognizer:
    """Two stages. Words with a "?" take a second one; those with a "!" go there by themselves, to be regrouped."""

    def __init__(self, rows: int = 8, lengths: Sequence[int] = (4, 9)):
        self.rows, self.lengths = rows, lengths
        self.batches: list[list[str]] = []  # of the first stage
        self.regrouped: list[list[str]] = []  # of the second
        self.fails: Callable[[Sequence[str]], bool] = lambda words: False

    def request(self, word: str, **options: Any) -> Request:
        length = next(length for length in self.lengths if len(word) <= length)
        return Request(self.first, word, Shape(self.rows, length), Shape(1, length), len(word), **options)

    def first(self, shape: Shape, rows: Sequence[Row], shared: Any = None) -> Collect:
        self.batches.append([row.payload for row in rows])
        together = [row for row in rows if "?" in row.payload]
        alone = [row for row in rows if "!" in row.payload and row not in together]
        done = [row for row in rows if row not in together and row not in alone]

        def collect() -> list[Outcome]:
            if self.fails([row.payload for row in rows]):
                raise RuntimeError("out of memory")
            outcomes: list[Outcome] = [Partial(row, "heard") for row in together]
            outcomes += [Done([(row, row.payload.upper()) for row in done])] if done else []
            outcomes += [Enqueue(self.second, together, shape, shared="together")] if together else []
            return outcomes + ([Enqueue(self.second, alone, shape)] if alone else [])

        return collect

    def second(self, shape: Shape, rows: Sequence[Row], shared: Any = None) -> Collect:
        self.regrouped.append([row.payload for row in rows])
        return lambda: [Done([(row, row.payload.upper()) for row in rows])]


class Replies:
    """What came of requests, by word."""

    def __init__(self) -> None:
        self.values: dict[str, list[Any]] = {}
        self.events: list[tuple[str, Any]] = []

    def of(self, word: str) -> Callable[[Reply], None]:
        def take(reply: Reply) -> None:
            value = reply.value if reply.error is None else reply.error
            if reply.is_final:
                self.values.setdefault(word, []).append(value)
            else:
                self.events.append((word, value))

        return take


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits for a condition; fails if it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.001)
