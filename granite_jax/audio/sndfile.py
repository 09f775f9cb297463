"""Decodes parts of files by libsndfile: formats and codecs that FFmpeg does not have, or has otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import soundfile as sf

from granite_jax.audio.clock import Sound
from granite_jax.audio.resample import BLOCK_FRAMES
from granite_jax.audio.views import UnreadableError, View
from granite_jax.errors import one_line

_UNKNOWN_FRAMES = 1 << 62  # libsndfile reports 2**63 - 1 frames for streams of unknown length.


class _Sequential(sf.SoundFile):
    """Decodes front to back. soundfile would otherwise cut reads at the length in the header and seek after each."""

    def seekable(self) -> bool:
        return False


class SndfileDecoder:
    """Decodes a part, as `FFmpegDecoder` does."""

    num_tracks, is_lossy, skipped = 1, False, 0.0

    def __init__(self, view: View):
        """Raises UnreadableError if libsndfile does not know the format."""
        self._view, self.has_failed = view, False
        try:
            self._file = _Sequential(cast(Any, view))  # without a name: `x.raw` would be taken for headerless data
        except (sf.SoundFileError, TypeError, ValueError) as error:
            view.check()
            reason = one_line(getattr(error, "error_string", None) or error).rstrip(".")
            raise UnreadableError(f"is not audio that can be read ({reason})") from error
        self.num_channels: int = self._file.channels
        self.seconds = self._file.frames / self._file.samplerate if 0 < self._file.frames < _UNKNOWN_FRAMES else None

    def sounds(self, skip: float = 0.0, *, seek: bool = False) -> Iterator[Sound]:
        """Decodes to the end, from the beginning on."""
        while not self.has_failed:
            try:
                frames = self._file.read(BLOCK_FRAMES, dtype="float32", always_2d=True)
            except (sf.SoundFileError, ValueError):
                frames, self.has_failed = None, True
            self._view.check()
            if frames is None or len(frames) == 0:
                return
            yield Sound(None, frames, self._file.samplerate)

    def close(self) -> None:
        """Closes the decoder."""
        self._file.close()
