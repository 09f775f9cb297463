"""An input on its way: read in segments, each of which is decoded, to a transcript.

file ──► blocks ──► segments ──► engine ──► RecordingDecoder ──► transcript
"""

import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable, Generator
from typing import Any

from granite_jax.audio.load import Audio, check_samples, is_encoded, open_recording
from granite_jax.audio.resample import Condition
from granite_jax.audio.segment import AudioSegment, cut
from granite_jax.engine.engine import Engine
from granite_jax.engine.readers import Readers
from granite_jax.engine.stages import Reply, Request, Ticket
from granite_jax.errors import AudioError, ContextError, GraniteError, printable
from granite_jax.recognition.recordings import RecordingDecoder
from granite_jax.recognition.utterances import Utterance

LONG_PASS = 60.0  # seconds
ANY_LENGTH = 'segment_seconds="auto", the default, takes any length'

Segments = Generator[AudioSegment, None, Condition]
"""A recording's segments; whether its file was whole, at the end."""


class RecordingJob:
    """Reads a recording's segments for a `RecordingDecoder`, as a `Job` of `Readers`.

    Fields:
      result: the transcript, or the error. Canceling it withdraws what waits, and ends reading.
    """

    def __init__(
        self,
        engine: Engine,
        readers: Readers,
        segments: Segments,
        make_decoder: Callable[..., RecordingDecoder],
        make_request: Callable[[Utterance], Request],
    ):
        """
        Args:
          make_decoder: the decoder, from its `submit` and `cancel`.
          make_request: what the engine takes for an utterance.
        """
        self._engine, self._readers = engine, readers
        self._segments, self._make_request = segments, make_request
        self._decoder = make_decoder(self._submit, engine.cancel, settling=functools.partial(readers.blocking, self))
        self.result = self._decoder.result
        end = weakref.WeakMethod(self._end)  # a future that is done does not keep the model
        self.result.add_done_callback(lambda result: (call := end()) and call(result))

    @property
    def has_room(self) -> bool:
        """Whether fewer than two full batches are unfinished, or nothing else is wanted."""
        return self.result.done() or self._decoder.num_unfinished < 2 * self._engine.full_rows

    def read(self) -> bool:
        """Reads and submits the next segment; returns whether there is more."""
        if self.result.done():
            self.close()
            return False
        try:
            segment = next(self._segments)
        except StopIteration as end:
            self._decoder.close(end.value)
            return False
        self._decoder.submit(segment)
        return self.read() if segment.is_last else True

    def take(self, message: Callable[[], None]) -> None:
        """Does what another thread has posted."""
        message()

    def fail(self, error: BaseException) -> None:
        """Ends with an error."""
        self.close()
        self._decoder.fail(error)

    def close(self) -> None:
        """Closes the file."""
        self._segments.close()

    def _submit(self, utterance: Utterance, take: Callable[[Reply], None]) -> Ticket:
        reply = lambda reply: self._readers.post(self, functools.partial(take, reply))  # noqa: E731
        return self._engine.submit(self._make_request(utterance), reply)

    def _end(self, result: Any) -> None:
        """Withdraws what is unfinished, because the result is there without it: canceled, or an error."""
        if result.cancelled():
            result.set_running_or_notify_cancel()  # or concurrent.futures.wait would wait for ever
        if result.cancelled() or result.exception() is not None:
            self._readers.post(self, self._decoder.cancel)


def read_segments(
    source: Any,
    name: str,
    *,
    sampling_rate: float | None = None,
    channel: int | None = None,
    seconds: float,
    overlap: bool = True,
    one_only: str = "",
) -> Segments:
    """Segments of any input.

    Args:
      source: as in `Transcriber.transcribe`.
      name: of the input, for errors.
      sampling_rate: in Hz, of arrays that come without one.
      channel: from 0 on; None for the mean of all.
      seconds: length of the longest segment.
      overlap: as in `segment.cut`.
      one_only: why there can be only one segment, if so.

    Raises:
      AudioError: the input is not readable, too short or not finite.
      GraniteError: it has several segments, and `one_only` says why it must not.
    """
    rate = None if is_encoded(source) else sampling_rate  # files have their own
    recording = open_recording(source, sampling_rate=rate, name=name, channel=channel)
    with contextlib.closing(recording.blocks()) as blocks:
        for segment in cut(blocks, seconds, overlap=overlap):
            if segment.is_whole:
                _check_length(segment, name)
            elif one_only:
                raise GraniteError(f"{printable(name)}: {one_only}, and this is longer than {seconds:g} s")
            yield segment
        return blocks.condition


def read_whole(
    source: Any,
    name: str,
    load: Callable[[Any, float | None, str], Audio],
    *,
    sampling_rate: float | None = None,
    channel: int | None = None,
) -> Segments:
    """Any input as one segment.

    Args:
      load: reads a source, of a sampling rate if it has none itself, under a name; its errors are raised.
      source, name, sampling_rate, channel: as in `read_segments`.
    """
    if channel is not None:
        rate = None if is_encoded(source) else sampling_rate
        source = open_recording(source, sampling_rate=rate, name=name, channel=channel)
    try:
        audio = load(source, sampling_rate, name)
    except ContextError as error:
        raise ContextError(f"{error}; {ANY_LENGTH}") from None
    if audio.duration > LONG_PASS:
        warnings.warn(
            f"{printable(name)}: {audio.duration:.0f} s in one pass; text gets worse beyond a minute or two, "
            "which segment_seconds avoids",
            stacklevel=2,
        )
    yield AudioSegment(0, audio.samples, 0, len(audio.samples), is_last=True)
    return audio.condition


def _check_length(segment: AudioSegment, name: str) -> None:
    try:
        check_samples(len(segment.samples))
    except AudioError as error:
        raise AudioError(f"{printable(name)}: {error}") from None
