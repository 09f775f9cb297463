"""The engine's queue and the readers in front of it: when batches go, in what order results come, what is done once."""

import dataclasses
import itertools
import threading
import time
from typing import Any

import numpy as np
import pytest

import granite_jax as gj
from granite_jax.audio.load import Audio
from granite_jax.inference import transcriber as module
from granite_jax.inference.buckets import Bucket
from granite_jax.inference.engine import Engine
from granite_jax.inference.guards import Verdict
from granite_jax.inference.options import TranscribeOptions
from granite_jax.inference.requests import Decoded, Request
from granite_jax.inference.results import Transcript
from granite_jax.text.tasks import PromptTokens

SECOND = 16_000
SHORT, LONG = 0.2, 0.9  # seconds of two buckets
PROMPT = PromptTokens((1,), (2,))
STATS = {
    **{"route": "greedy", "draft_from": None, "finish": "end"},
    **{"llm_passes": 1, "draft_tokens": 0, "accepted_tokens": 0},
}


class Counting(Engine):
    """An engine whose batches are done as soon as they go; records them."""

    batches: list[list[str]]

    def _encode(self, bucket: Bucket, batch: list) -> Any:
        self.batches.append([ticket.request.audio.name for ticket in batch])

    def _advance_encoded(self) -> None:
        (_, batch), _ = self._encoded.popleft()
        self._finish([(ticket, decoded(ticket.request.audio.name)) for ticket in batch])


def decoded(name: str) -> Decoded:
    return Decoded(Transcript(name, stats=STATS), np.zeros(1, np.int32))


@pytest.fixture
def engine(random_asr: gj.Transcriber) -> Counting:
    asr = random_asr
    buckets = [Bucket(rows, int(seconds * SECOND), 60, 300) for seconds in (SHORT, LONG) for rows in (1, 8)]
    counting = Counting(asr.config, None, asr._engine.programs, asr.tokenizer, buckets, 8)
    counting.batches = []
    return counting


def request(name: str, seconds: float = SHORT) -> Request:
    return Request(Audio(name, np.zeros(int(seconds * SECOND), np.float32)), 5, PROMPT, 10)


@pytest.fixture
def asr(random_asr: gj.Transcriber, engine: Counting, monkeypatch: pytest.MonkeyPatch) -> gj.Transcriber:
    monkeypatch.setattr(random_asr, "_engine", engine)
    return random_asr


# Batches.


def test_a_batch_goes_when_it_is_full_and_what_is_left_when_it_is_flushed(engine: Counting) -> None:
    # Given nineteen requests of one length
    futures = [engine.submit(request(f"{i}")) for i in range(19)]
    # When the first is waited for, then full batches have gone
    assert engine.wait(futures[0])
    engine.wait(futures[8])
    assert list(map(len, engine.batches)) == [8, 8] and not futures[18].done()
    # And when flushed, the rest
    engine.flush()
    assert engine.wait(futures[18]) and [f.result().transcript.audio for f in futures] == [f"{i}" for i in range(19)]


def test_rows_of_a_mostly_empty_batch_go_one_by_one(engine: Counting) -> None:
    # Given two requests for batches of eight, when flushed, then each is a batch of one row
    futures = [engine.submit(request(f"{i}")) for i in range(2)]
    engine.flush()
    assert all(engine.wait(future) for future in futures) and list(map(len, engine.batches)) == [1, 1]


def test_a_request_does_not_wait_for_ever_while_others_go_by(engine: Counting) -> None:
    # Given a long request and then many short ones, without a flush
    first = engine.submit(request("long", LONG))
    others = [engine.submit(request(f"{i}")) for i in range(engine.read_ahead + 8)]
    # When one of them is waited for, then the long one has gone before, and short ones have filled its batch
    assert engine.wait(others[8]) and first.done() and engine.batches[0][-1] == "long"
    assert list(map(len, engine.batches[:2])) == [8, 8]


def test_a_due_request_goes_before_those_that_came_later(engine: Counting) -> None:
    # Given requests that are due at once: a long one, and a short one that comes before each step of the engine
    engine.deadline = 0.0
    long = engine.submit(request("long", LONG))
    for number in range(3):
        engine.submit(request(f"{number}"))
        with engine._driving:
            engine.advance(0.0)
    # When three steps are done, then the long one was in the first batch, and nothing is lost
    assert engine.batches[0] == ["long"]
    engine.wait(long)
    assert long.done()


def test_part_filled_batches_of_two_buckets_go_as_one(engine: Counting) -> None:
    # Given three short requests and four long ones, when flushed, then one batch holds them all
    futures = [engine.submit(request(f"{i}", SHORT if i < 3 else LONG)) for i in range(7)]
    engine.flush()
    assert all(map(engine.wait, futures)) and list(map(len, engine.batches)) == [7]


def test_a_part_filled_batch_goes_at_its_deadline(engine: Counting) -> None:
    # Given a deadline, when a single request is waited for, then it goes without a flush
    engine.deadline = 0.02
    assert engine.wait(engine.submit(request("one")))


def test_full_batches_hold_requests_of_similar_length(engine: Counting) -> None:
    # Given sixteen requests of one bucket whose lengths alternate, when two batches go, then one of each
    lengths = [0.3, 0.8] * 8
    futures = [engine.submit(request(f"{i}", seconds)) for i, seconds in enumerate(lengths)]
    engine.flush()
    assert all(map(engine.wait, futures))
    assert [{lengths[int(name)] for name in batch} for batch in engine.batches] in ([{0.3}, {0.8}], [{0.8}, {0.3}])


def test_what_is_cancelled_does_not_go(engine: Counting) -> None:
    # Given nine requests of which one is cancelled, when flushed, then the others go
    futures = [engine.submit(request(f"{i}")) for i in range(9)]
    futures[4].cancel()
    engine.flush()
    assert all(engine.wait(future) for future in futures)
    assert sorted(name for batch in engine.batches for name in batch) == [str(i) for i in range(9) if i != 4]


def test_what_is_on_the_device_cannot_be_cancelled(engine: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a full batch, one request of which is cancelled while it is encoded, by another thread
    futures = [engine.submit(request(f"{i}")) for i in range(8)]
    encode = engine._encode
    cancelled = []

    def late(*batch: Any) -> Any:
        cancelled.append(futures[3].cancel())
        return encode(*batch)

    monkeypatch.setattr(engine, "_encode", late)
    # When waited for, then it is too late, and nobody loses a result
    assert all(map(engine.wait, futures)) and cancelled == [False]
    assert [future.result().transcript.audio for future in futures] == [f"{i}" for i in range(8)]


def test_an_error_of_the_device_reaches_everyone_who_waits(engine: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a device that fails, when one caller drives the engine, then it gets the error, and so do the others
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    futures = [engine.submit(request(f"{i}")) for i in range(9)]
    monkeypatch.setattr(engine, "_advance_encoded", fail)
    engine.flush()
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.wait(futures[0])
    assert all(isinstance(future.exception(), RuntimeError) for future in futures)
    # And the next request is none of that
    monkeypatch.undo()
    future = engine.submit(request("next"))
    engine.flush()
    assert engine.wait(future) and future.result().transcript.audio == "next"


def test_callers_in_several_threads_share_batches(engine: Counting) -> None:
    # Given four threads with two requests each, when all wait, then all are done, in one batch
    ready, results = threading.Barrier(4), []

    def call(number: int) -> None:
        futures = [engine.submit(request(f"{number}{i}")) for i in range(2)]
        ready.wait()
        results.extend(future.result().transcript.audio for future in futures if engine.wait(future))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(results) == 8 and list(map(len, engine.batches)) == [8]


# Streams.


def test_what_is_decoded_again_does_not_wait_for_others(
    asr: gj.Transcriber, engine: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a text with a problem, whatever the last input of all says
    engine._buckets = tuple(Bucket(rows, 12 * SECOND, 200, 400) for rows in (1, 8))

    def advance() -> None:
        (_, batch), _ = engine._encoded.popleft()
        problem = lambda ticket: None if ticket.request.is_final else Verdict("hole", "", 1.0)  # noqa: E731
        name = batch[0].request.audio.name
        engine._finish([(ticket, dataclasses.replace(decoded(name), verdict=problem(ticket))) for ticket in batch])

    monkeypatch.setattr(engine, "_advance_encoded", advance)
    # When transcribed, then its halves and theirs are decoded, too, and nothing waits for ever
    transcript = asr.transcribe(np.zeros(11 * SECOND, np.float32))
    assert [len(segment.text) for segment in transcript.segments] == [0, 0, 0]


class Source:
    """Inputs that are generated by hand, and count how many were read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, asr: gj.Transcriber, seconds: float = 0.0):
        self.read = 0
        load = asr._load

        def slow(source: Any, rate: Any, name: str) -> Audio:
            time.sleep(seconds)
            self.read += 1
            return load(source, rate, name)

        monkeypatch.setattr(asr, "_load", slow)


def test_the_device_begins_before_one_in_twenty_is_read(
    asr: gj.Transcriber, engine: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given 2,000 inputs of one length behind readers that take 10 ms each
    source, first = Source(monkeypatch, asr, 0.01), []
    encode = engine._encode

    def noted(*batch: Any) -> Any:
        first.append(source.read)
        return encode(*batch)

    monkeypatch.setattr(engine, "_encode", noted)
    inputs = [np.zeros(int(SHORT * SECOND), np.float32)] * 2000
    # When transcribed, then the first batch went when fewer than 5 % were read, and results are in input order
    found = asr.transcribe(inputs)
    assert first[0] < 100
    assert [transcript.audio for transcript in found] == [f"audio[{i}]" for i in range(2000)]


def test_results_come_in_order_while_later_inputs_are_read(
    asr: gj.Transcriber, engine: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given inputs without end, of which some are long
    source = Source(monkeypatch, asr)
    sound = {i: np.zeros(int((LONG if i % 7 == 3 else SHORT) * SECOND), np.float32) for i in range(7)}
    endless = (sound[i % 7] for i in itertools.count())
    # When the first 500 results are taken
    stream = asr.stream(endless)
    taken = [transcript.audio for transcript in itertools.islice(stream, 500)]
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    # Then they are in order, and no more was read than the bounded look-ahead
    assert taken == [f"audio[{i}]" for i in range(500)]
    assert source.read <= 500 + 2 * engine.read_ahead + 1


def test_results_come_as_they_are_done_if_order_does_not_matter(
    asr: gj.Transcriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given slow readers, and a long input before short ones without end, whose batches are soon full
    Source(monkeypatch, asr, 0.01)
    long, short = (np.zeros(int(seconds * SECOND), np.float32) for seconds in (LONG, SHORT))
    # When order does not matter, then the short ones come first
    stream = asr.stream(itertools.chain([long], itertools.repeat(short)), ordered=False)
    found = {transcript.audio for transcript in itertools.islice(stream, 8)}
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert len(found) == 8 and "audio[0]" not in found


def test_errors_are_in_their_places(asr: gj.Transcriber) -> None:
    # Given bad inputs among good ones
    good = np.zeros(int(SHORT * SECOND), np.float32)
    inputs = [good, b"no audio", good, np.full(SECOND, np.nan, np.float32), good]
    # When errors are returned, then each is in its place
    found = list(asr.stream(inputs, on_error="return"))
    assert [transcript.error is None for transcript in found] == [True, False, True, False, True]
    # And when they are raised, what is before is yielded
    stream, taken = asr.stream(inputs), []
    with pytest.raises(gj.AudioError, match=r"audio\[1\]"):
        taken.extend(transcript.audio for transcript in stream)
    with pytest.raises(gj.GraniteError, match="max_new_tokens"):
        asr.stream(inputs, max_new_tokens=0)  # at once


def test_a_list_for_all_inputs_is_prepared_once(
    asr: gj.Transcriber, engine: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given 2,000 keywords for many inputs, in one call and then in others
    prepared = []
    monkeypatch.setattr(module, "prepare", lambda entries, *_: prepared.append(len(entries)))
    inputs = [np.zeros(int(SHORT * SECOND), np.float32)] * 50
    names = [f"name{i}" for i in range(2000)]
    # When transcribed, then the list is prepared once
    asr.transcribe(inputs, keywords=names)
    asr.transcribe(inputs, TranscribeOptions(keywords=tuple(names)))
    asr.transcribe(inputs, keywords=[list(names), None] * 25)
    assert prepared == [2000]
