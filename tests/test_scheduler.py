"""The engine with a recognizer that has no model: when batches go, with whom, and that every request gets one reply."""

import collections
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fake_recognizer import FakeRecognizer, Replies, wait_until

from granite_jax.engine.batch_queue import LINGER
from granite_jax.engine.engine import Engine
from granite_jax.engine.scheduler import Scheduler
from granite_jax.engine.stages import Reply


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A scheduler that is driven by hand."""

    def __init__(self, rows: int = 8):
        self.clock = Clock()
        self.scheduler = Scheduler(1, rows, clock=self.clock)
        self.recognizer = FakeRecognizer(rows)
        self.replies = Replies()

    def submit(self, *words: str, **options: Any) -> list[Any]:
        requests = [self.recognizer.request(word, **options) for word in words]
        return [self.scheduler.submit(r, self.replies.of(r.payload)) for r in requests]

    def run(self) -> None:
        while self.scheduler.advance():
            pass

    @property
    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.recognizer.batches]


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def busy(bench: Bench) -> Iterator[Bench]:
    """One for which more is expected, so that part-filled batches wait."""
    with bench.scheduler.expecting():
        yield bench


def words(count: int, start: int = 0) -> list[str]:
    return [f"{number:03}" for number in range(start, start + count)]


def test_full_batches_go_and_what_is_left_when_nothing_more_is_expected(busy: Bench) -> None:
    # Given nineteen requests of one length, when more is expected, then two full batches go
    busy.submit(*words(19))
    busy.run()
    assert busy.sizes == [8, 8] and len(busy.replies.values) == 16
    # And when nothing is any more, the rest
    busy.scheduler.expect(-1)
    busy.run()
    assert busy.replies.values == {word: [word] for word in words(19)}
    busy.scheduler.expect(1)


def test_part_filled_batches_wait_for_what_is_to_come_while_the_device_is_busy(bench: Bench) -> None:
    # Given a batch on the device and one request more, when others will come, but not soon
    bench.scheduler.announce(1)
    bench.submit(*words(9))
    assert bench.scheduler.advance() and bench.scheduler._take(bench.scheduler._entering) is None
    # Then it goes when the device is idle, or when there is nothing more to come
    bench.run()
    assert bench.sizes == [8, 1]
    bench.submit(*words(9, 100))
    assert bench.scheduler.advance() and bench.scheduler._take(bench.scheduler._entering) is None
    bench.scheduler.announce(-1)
    assert bench.scheduler._take(bench.scheduler._entering) is not None


def test_an_idle_device_waits_a_moment_and_not_longer(busy: Bench) -> None:
    # Given a request that is alone, while more is expected, then it goes after a moment
    busy.submit("one")
    busy.run()
    assert busy.sizes == []
    busy.clock.now += LINGER
    busy.run()
    assert busy.sizes == [1]


def test_a_request_goes_at_its_deadline_though_the_device_is_busy(bench: Bench) -> None:
    # Given a batch on the device, and a request with a deadline
    bench.submit(*words(8))
    assert bench.scheduler.advance()
    bench.submit("one", deadline=0.05)
    # When its deadline is over, then it goes beside the other; before, it waits
    assert bench.scheduler._take(bench.scheduler._entering) is None
    bench.clock.now += 0.05
    bench.run()
    assert bench.sizes == [8, 1]


def test_rows_of_a_mostly_empty_batch_go_one_by_one(bench: Bench) -> None:
    bench.submit("a", "b")
    bench.run()
    assert bench.sizes == [1, 1]


def test_part_filled_batches_of_two_shapes_go_as_one(bench: Bench) -> None:
    bench.submit("a", "b", "c", "long1", "long2", "long3", "long4")
    bench.run()
    assert bench.sizes == [7]


def test_a_request_does_not_wait_for_ever_while_others_go_by(busy: Bench) -> None:
    # Given a long request and then many short ones, while more is expected
    busy.submit("long")
    busy.submit(*words(busy.scheduler.read_ahead + 8))
    busy.run()
    # Then the long one has gone before later ones, and short ones have filled its batch
    assert busy.recognizer.batches[0][-1] == "long" and busy.sizes[:2] == [8, 8]


def test_a_due_request_goes_before_those_that_came_later(bench: Bench) -> None:
    # Given requests that are due at once: a long one, and a short one that comes before each step
    bench.submit("long", deadline=0.0)
    for number in range(3):
        bench.submit(str(number), deadline=0.0)
        bench.scheduler.advance()
    bench.run()
    assert bench.recognizer.batches[0] == ["long"] and len(bench.replies.values) == 4


def test_urgent_requests_go_first(busy: Bench) -> None:
    busy.submit("late")
    busy.submit("now", is_urgent=True)
    busy.run()
    assert busy.recognizer.batches == [["now"]]


def test_full_batches_hold_requests_of_similar_length(busy: Bench) -> None:
    # Given sixteen requests of one shape whose lengths alternate, when two batches go, then one of each
    busy.submit(*[f"{i:x}" * (9 if i % 2 else 5) for i in range(16)])
    busy.run()
    assert sorted({len(word) for word in batch} == {5} for batch in busy.recognizer.batches) == [False, True]


def test_two_batches_of_the_first_stage_are_on_the_device(busy: Bench) -> None:
    # Given four full batches, when steps are done, then the host waits for one when a later one is on the device
    busy.submit(*words(32))
    steps = []
    while busy.scheduler.advance():
        steps.append((len(busy.recognizer.batches), len(busy.replies.values)))
    assert steps[:3] == [(1, 0), (2, 8), (3, 16)]


def test_rows_that_leave_their_batch_are_regrouped(busy: Bench) -> None:
    # Given two batches of which some rows go on by themselves, when they are run, then these go on together
    busy.submit(*[f"{i}!" if i % 2 else f"{i}" for i in range(16)])
    busy.run()
    assert busy.recognizer.regrouped == [[f"{i}!" for i in range(1, 16, 2)]]
    # And what is left of them goes when the device is idle and nothing is expected
    busy.submit(*[f"{i}!" for i in range(20, 28)], *["30!"], *words(7))
    busy.run()
    assert [len(batch) for batch in busy.recognizer.regrouped] == [8, 8]
    busy.clock.now += LINGER
    busy.run()
    assert [len(batch) for batch in busy.recognizer.regrouped] == [8, 8, 1]
    assert all(len(values) == 1 for values in busy.replies.values.values())


def test_full_batches_of_regrouped_rows_do_not_wait_for_the_end(busy: Bench) -> None:
    # Given many full batches whose rows all leave them, when steps are done, then they go on while others still enter
    busy.submit(*[f"{number:02}!" for number in range(64)])
    while busy.scheduler.advance() and not busy.recognizer.regrouped:
        pass
    assert len(busy.recognizer.batches) < 4
    busy.run()
    assert len(busy.replies.values) == 64


def test_rows_that_stay_together_go_on_at_once_and_events_come_before(bench: Bench) -> None:
    bench.submit("a?", "b", "c?")
    bench.run()
    assert bench.recognizer.regrouped == [["a?", "c?"]]
    assert bench.replies.events == [("a?", "heard"), ("c?", "heard")]
    assert bench.replies.values == {"a?": ["A?"], "b": ["B"], "c?": ["C?"]}


def test_several_recognizers_share_the_device(bench: Bench) -> None:
    # Given requests of two recognizers, when they are run, then each has its own batches
    other = FakeRecognizer(8)
    bench.submit(*words(8))
    for word in words(8, 100):
        bench.scheduler.submit(other.request(word), bench.replies.of(word))
    bench.run()
    assert bench.recognizer.batches == [words(8)] and other.batches == [words(8, 100)]
    assert len(bench.replies.values) == 16


def test_what_is_canceled_does_not_go(bench: Bench) -> None:
    # Given nine requests of which one is canceled, when they are run, then the others go
    tickets = bench.submit(*words(9))
    assert bench.scheduler.cancel(tickets[4]) and not bench.scheduler.cancel(tickets[4])
    bench.run()
    assert bench.replies.values == {word: [word] for word in words(9) if word != "004"}
    # And what is on the device, or done, cannot be canceled
    assert not bench.scheduler.cancel(tickets[0]) and bench.scheduler.num_unfinished == 0


def test_an_error_of_the_device_fails_its_batch_alone(bench: Bench) -> None:
    # Given two batches, the first of which fails
    bench.recognizer.fails = lambda batch: "003" in batch
    bench.submit(*words(16))
    bench.run()
    # Then its requests have the error, and the others their results
    found = [bench.replies.values[word][0] for word in words(16)]
    assert [isinstance(value, RuntimeError) for value in found] == [True] * 8 + [False] * 8


def test_a_stage_that_loses_a_row_is_an_error(bench: Bench) -> None:
    bench.recognizer.first = lambda *_: lambda: []  # type: ignore[method-assign]
    bench.submit("one")
    bench.run()
    assert "lost 1 of 1 rows" in str(bench.replies.values["one"][0])


def test_replies_may_submit_and_cancel(busy: Bench) -> None:
    # Given a reply that submits another request and cancels a third, which waits
    (waiting,) = busy.submit("3rd")

    def reply(_: Reply) -> None:
        busy.submit("second", is_urgent=True)
        busy.scheduler.cancel(waiting)

    busy.scheduler.submit(busy.recognizer.request("first", is_urgent=True), reply)
    # When it is run, by a thread that a lock would stop for ever, then both happen
    thread = threading.Thread(target=busy.run, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive() and busy.replies.values == {"second": ["SECOND"]}


def test_idle_time_is_that_in_which_more_was_expected(bench: Bench) -> None:
    bench.clock.now = 5.0
    with bench.scheduler.expecting():
        bench.clock.now = 7.0  # two seconds of reading
        bench.submit(*words(8))
        bench.scheduler.advance()
        bench.clock.now = 10.0  # three on the device
        bench.run()
        bench.clock.now = 11.0  # one more of reading
    bench.clock.now = 20.0
    assert bench.scheduler.idle_seconds == 3.0


# Any schedule.


def drive(seed: int) -> None:
    """Submits, cancels, expects, fails and waits at random; every step checks that nothing waits for nothing."""
    rng = random.Random(seed)
    bench = Bench(rng.choice([1, 2, 3, 8]))
    scheduler, clock = bench.scheduler, bench.clock
    failing = {word for word in words(40) if rng.random() < 0.1}
    bench.recognizer.fails = lambda batch: bool(failing.intersection(batch))
    tickets: dict[str, Any] = {}
    canceled, expected, announced = set[str](), 0, 0
    endings = ["", "?", "!", "xxxx", "?xxx", "!xxx"]
    pending = collections.deque(f"{number:03}{rng.choice(endings)}" for number in range(rng.randint(0, 40)))
    while pending or scheduler.has_work or expected or announced:
        match rng.randrange(7):
            case 0 | 1 if pending:
                word = pending.popleft()
                deadline = rng.choice([float("inf"), float("inf"), 0.0, 0.05, 3.0])
                request = bench.recognizer.request(word, deadline=deadline, is_urgent=rng.random() < 0.1)
                tickets[word] = scheduler.submit(request, bench.replies.of(word))
            case 2 if tickets and rng.random() < 0.3:
                word = rng.choice(list(tickets))
                if scheduler.cancel(tickets[word]):
                    canceled.add(word)
            case 3 if pending or expected:
                change = rng.choice([-1, 1]) if expected and pending else 1 if pending else -1
                scheduler.expect(change)
                expected += change
            case 4 if announced or pending:
                change = -1 if announced and (not pending or rng.random() < 0.5) else 1
                scheduler.announce(change)
                announced += change
            case 5:
                clock.now += rng.choice([0.0, 0.01, 0.3])
            case _:
                if not scheduler.advance() and scheduler.has_work:
                    # The device is idle: what waits has company on its way, and does not wait for it for long.
                    assert expected, "a request waits for nothing"
                    clock.now += LINGER + 1e-6
                    assert scheduler.advance(), "a request waits too long"
    unanswered = set(tickets) - set(bench.replies.values)
    assert unanswered == canceled, "a request got no reply"
    assert all(len(values) == 1 for values in bench.replies.values.values()), "a request got two replies"
    assert scheduler.num_unfinished == 0 and scheduler.is_device_idle


@pytest.mark.fuzz
def test_every_request_gets_one_reply_and_none_waits_while_the_device_is_idle(num_cases: int) -> None:
    for seed in range(20 * num_cases):
        try:
            drive(seed)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise


# The thread.


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(Scheduler(1, 4))
    yield engine
    engine.stop()


def submit_all(engine: Engine, recognizer: FakeRecognizer, replies: Replies, listed: list[str]) -> None:
    for word in listed:
        engine.submit(recognizer.request(word), replies.of(word))


def test_threads_share_batches(engine: Engine) -> None:
    # Given four threads with a request each, while all are expected, then they go in one batch
    recognizer, replies, ready = FakeRecognizer(4), Replies(), threading.Barrier(4)

    def call(number: int) -> None:
        ready.wait()
        with engine.expecting():
            submit_all(engine, recognizer, replies, [str(number)])

    with engine.expecting():
        threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        wait_until(lambda: len(replies.values) == 4)
    assert [len(batch) for batch in recognizer.batches] == [4]


def test_the_thread_ends_when_there_is_nothing_to_do_and_begins_again(engine: Engine) -> None:
    recognizer, replies = FakeRecognizer(4), Replies()
    for number in range(50):
        submit_all(engine, recognizer, replies, [str(number)])
        wait_until(lambda count=number + 1: len(replies.values) == count)
    wait_until(lambda: engine._thread is None)


def test_a_part_filled_batch_goes_by_itself(engine: Engine) -> None:
    # Given someone who is expected and does not come, when a request waits, then it goes nevertheless
    recognizer, replies = FakeRecognizer(4), Replies()
    with engine.expecting():
        submit_all(engine, recognizer, replies, ["one"])
        wait_until(lambda: replies.values == {"one": ["ONE"]})


def test_an_engine_that_stops_waits_for_nothing(engine: Engine) -> None:
    # Given a request that waits for a deadline far away, when the engine stops, then that takes no time
    recognizer = FakeRecognizer(4)
    with engine.expecting():
        engine.submit(recognizer.request("one", deadline=1e6), Replies().of("one"))
        stopping = threading.Thread(target=engine.stop, daemon=True)
        stopping.start()
        stopping.join(10)
    assert not stopping.is_alive()


def test_errors_of_the_engine_itself_reach_everyone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a scheduler that is broken, when requests wait, then they have its error, and the next one has none
    recognizer, replies = FakeRecognizer(4), Replies()
    with monkeypatch.context() as patch:
        patch.setattr(engine._scheduler, "advance", lambda: 1 / 0)
        submit_all(engine, recognizer, replies, ["one", "two"])
        wait_until(lambda: len(replies.values) == 2)
    assert all(isinstance(values[0], ZeroDivisionError) for values in replies.values.values())
    submit_all(engine, recognizer, replies, ["next"])
    wait_until(lambda: replies.values.get("next") == ["NEXT"])
