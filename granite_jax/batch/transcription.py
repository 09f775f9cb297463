"""One entry's way through a Transcriber, and a transcript's fields in a job's results."""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from granite_jax.audio.load import AccessError
from granite_jax.batch.manifest import Entry
from granite_jax.batch.reading import EntryAudio
from granite_jax.errors import GraniteError, printable
from granite_jax.keywords.options import Entry as Keyword
from granite_jax.options import TranscribeOptions
from granite_jax.results import Transcript
from granite_jax.transcriber import Transcriber


def submit_entry(
    asr: Transcriber, audio: EntryAudio, options: TranscribeOptions, keywords: Sequence[Keyword] | None = None
) -> "Future[Transcript]":
    """Begins to transcribe an entry; the future has all of its errors.

    Args:
      options: of entries that have none of their own.
      keywords: a list that overrides those of the entry and of the options.
    """
    entry = audio.entry
    named = entry.keywords if keywords is None else keywords
    try:
        if entry.error is not None:
            raise GraniteError(entry.error)
        try:
            return asr.submit(
                audio.recording, entry.options or options, keywords=None if named is None else list(named)
            )
        except GraniteError as error:
            raise GraniteError(f"{printable(entry.audio)}: {error}") from None
    except GraniteError as error:
        failed: Future[Transcript] = Future()
        failed.set_exception(error)
        return failed


def transcript_of(entry: Entry, future: "Future[Transcript]") -> Transcript:
    """The result of a future that is done; `error` is set, and `stats` say "transient", where it is a GraniteError."""
    try:
        return future.result()
    except GraniteError as error:
        stats: dict[str, Any] = {"transient": True} if isinstance(error, AccessError) else {}
        return Transcript(entry.audio, error=str(error), stats=stats, flags=error.flags)
