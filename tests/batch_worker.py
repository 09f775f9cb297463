"""A stand-in for the Transcriber, whose text is a hash of the audio, and workers of it that may be killed."""

import dataclasses
import hashlib
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from granite_jax import batch
from granite_jax.audio.load import load_audio
from granite_jax.batch.manifest import Entry
from granite_jax.batch.reading import LoadedEntry, Reader
from granite_jax.inference.options import TranscribeOptions
from granite_jax.inference.transcriber import Transcript
from granite_jax.pretrained import open_checkpoint
from granite_jax.text.tasks import Capabilities, instruction


class StandIn:
    """Takes `seconds` an utterance. Records the batches and the keywords it was given."""

    def __init__(self, seconds: float = 0.0):
        self.read_ahead = 32
        self.config = open_checkpoint("demo").config
        self.capabilities = Capabilities()
        self.seconds = seconds
        self.calls: list[tuple[int, TranscribeOptions]] = []
        self.keywords: list[list[Any]] = []

    def transcribe(
        self,
        audio: list,
        options: TranscribeOptions,
        *,
        keywords: Sequence[Any] | None = None,
        on_error: str = "raise",
        progress: Callable[[int], None] | None = None,
    ) -> list[Transcript]:
        asked = instruction(options.task, target_language=options.target_language, prompt=options.prompt)
        self.calls.append((len(audio), options))
        results = []
        for source, listed in zip(audio, keywords or [None] * len(audio), strict=True):
            each = load_audio(source)
            time.sleep(self.seconds)
            named = list(options.keywords if listed is None else listed)
            self.keywords.append(named)
            digest = hashlib.sha256(each.samples.tobytes() + f"{asked} {named}".encode())
            stats = {"route": "greedy"}
            results.append(Transcript(each.name, digest.hexdigest(), (1, 2), each.duration, 0.5, "heard", stats))
            if progress is not None:
                progress(1)
        return results


def run(manifest: Any, out: Any, seconds: float = 0.0, **options: Any) -> batch.Summary:
    """`batch.run` with the stand-in."""
    asr: Any = StandIn(seconds)
    return batch.run(manifest, out, transcriber=(asr, "stand-in"), **{"num_readers": 2, **options})


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

    def __call__(self, entry: Entry) -> LoadedEntry:
        if "deadly" in entry.audio:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(entry)
