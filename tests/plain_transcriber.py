"""A Transcriber of random weights, whose text no guard should mend: one pass, and what the model writes."""

from collections.abc import Iterator
from typing import Any

from granite_jax import Transcriber
from granite_jax.results import Transcript

PLAIN: dict[str, Any] = {"guards": False, "segment_seconds": None}


class PlainTranscriber(Transcriber):
    """Takes `PLAIN` options unless it is told otherwise."""

    def stream(self, audio: Any, options: Any = None, **fields: Any) -> Iterator[Transcript]:
        return super().stream(audio, options, **PLAIN | fields)
