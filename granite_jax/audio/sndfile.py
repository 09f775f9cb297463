"""Decodes parts of files by libsndfile: formats and codecs that FFmpeg does not have, or has otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import soundfile as sf

from granite_jax.audio.clock import Sound
from granite_jax.audio.decoder import UnreadableError
from granite_jax.audio.resample import BLOCK_FRAMES, one_line
from granite_jax.audio.views import FileView

_UNKNOWN_FRAMES = 1 << 62  # libsndfile reports 2**63 - 1 frames for streams of unknown length.


class _Sequential(sf.SoundFile):
    """Decodes front to back. soundfile would otherwise cut reads at the length in the header and seek after each."""

    def seekable(self) -> bool:
        return False


@contextlib.contextmanager
def open_sndfile(view: FileView) -> Iterator[SndfileDecoder]:
    """Opens a part. Raises UnreadableError if libsndfile does not."""
    try:
        file = _Sequential(cast(Any, _Quiet(view)))
    except (sf.SoundFileError, TypeError, ValueError) as error:
        view.check()
        raise UnreadableError(f"is not audio that can be read ({_reason(error)})") from error
    with file:
        yield SndfileDecoder(view, file)
    view.check()


class SndfileDecoder:
    """Decodes an open part, once. A `Decoder`."""

    codec, num_tracks, is_lossy, skipped = "", 1, False, 0.0

    def __init__(self, view: FileView, file: sf.SoundFile):
        self._view, self._file = view, file
        self.num_channels: int = file.channels
        self.seconds = file.frames / file.samplerate if 0 < file.frames < _UNKNOWN_FRAMES else None
        self.has_failed = False

    def sounds(self, skip: float = 0.0, *, seek: bool = False) -> Iterator[Sound]:
        """Decodes to the end, from the beginning on."""
        while True:
            try:
                frames = self._file.read(BLOCK_FRAMES, dtype="float32", always_2d=True)
            except (sf.SoundFileError, ValueError):
                self.has_failed = True
                return
            finally:
                self._view.check()
            if len(frames) == 0:
                return
            yield Sound(None, frames, self._file.samplerate)


class _Quiet:
    """A view without errors, which libsndfile's callbacks cannot raise: the view keeps them.

    It has no name: soundfile would take `x.raw` for headerless data and ask for its format.
    """

    def __init__(self, view: FileView):
        self._view, self.seek, self.tell = view, view.seek, view.tell

    def read(self, size: int) -> bytes:
        try:
            return self._view.read(size)
        except OSError:
            return b""


def _reason(error: Exception) -> str:
    return one_line(getattr(error, "error_string", None) or error).rstrip(".")
