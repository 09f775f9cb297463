"""A stand-in for the Transcriber, whose text is a hash of the audio, and workers of it that may be killed."""

import contextlib
import dataclasses
import hashlib
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from granite_jax import batch
from granite_jax.audio.load import load_audio
from granite_jax.batch.manifest import Entry
from granite_jax.batch.reading import LoadedEntry, Reader
from granite_jax.options import TranscribeOptions
from granite_jax.pretrained import open_checkpoint
from granite_jax.text.tasks import Capabilities, instruction
from granite_jax.transcriber import Transcript


class StandIn:
    """Takes `seconds` an utterance. Records the options and the keywords it was given."""

    def __init__(self, seconds: float = 0.0):
        self.read_ahead = 32
        self.readers = SimpleNamespace(limit=4)
        self.idle_seconds = 0.0
        self.config = open_checkpoint("demo").config
        self.capabilities = Capabilities()
        self.seconds = seconds
        self.options: list[TranscribeOptions] = []
        self.keywords: list[list[Any]] = []
        self._threads = ThreadPoolExecutor(1)
        self.expecting = contextlib.nullcontext

    def submit(
        self, audio: Any, options: TranscribeOptions, *, keywords: Sequence[Any] | None = None
    ) -> "Future[Transcript]":
        named = list(options.keywords if keywords is None else keywords)
        return self._threads.submit(self._transcribe, audio, options, named)

    def transcribe(self, audio: list[Any], options: TranscribeOptions) -> list[Transcript]:
        return [self._transcribe(each, options, list(options.keywords)) for each in audio]

    def _transcribe(self, audio: Any, options: TranscribeOptions, named: list[Any]) -> Transcript:
        asked = instruction(options.task, target_language=options.target_language, prompt=options.prompt)
        loaded = load_audio(audio)
        self.options.append(options)
        self.keywords.append(named)
        time.sleep(self.seconds)
        digest = hashlib.sha256(loaded.samples.tobytes() + f"{asked} {named}".encode()).hexdigest()
        return Transcript(loaded.name, digest, (1, 2), loaded.duration, 0.5, "heard", {"route": "greedy"})


def run(manifest: Any, out: Any, seconds: float = 0.0, **options: Any) -> batch.Summary:
    """`batch.run` with the stand-in."""
    asr: Any = StandIn(seconds)
    return batch.run(manifest, out, transcriber=(asr, "stand-in"), **{"num_readers": 2, **options})


def run_saving_at_once(*arguments: Any, **options: Any) -> batch.Summary:
    """`run`, by a worker that saves each line when it is finished."""
    from granite_jax.batch import job

    job.SAVE_SECONDS = 0.0
    return run(*arguments, **options)


def in_process(directory: Path, target: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Calls the target; its temporary files, which a kill would leave, go to the directory."""
    tempfile.tempdir = str(directory)
    target(*arguments, **options)


def run_with_quota(quota: int, *arguments: Any, **options: Any) -> None:
    """No file can grow beyond `quota` bytes, as on a disk that is full. Exits with 3 if that was an OSError."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (quota, resource.RLIM_INFINITY))
    try:
        run(*arguments, **options)
    except OSError:
        sys.exit(3)


def run_command(arguments: list[str], seconds: float) -> None:
    """The command, with the stand-in for every checkpoint."""
    from granite_jax import cli
    from granite_jax.batch import job
    from granite_jax.cli import signals

    asr = StandIn(seconds)
    job.Transcriber.from_pretrained = lambda *_, **__: asr  # pyright: ignore[reportAttributeAccessIssue]
    with signals.exit_on_signals():
        cli.app(arguments)


@dataclasses.dataclass(frozen=True)
class DeadlyReader(Reader):
    """Dies of files that are named so."""

    def load(self, entry: Entry) -> LoadedEntry:
        if "deadly" in entry.audio:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load(entry)
