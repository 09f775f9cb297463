"""What decodes a part of a file: by FFmpeg or by libsndfile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from granite_jax.audio.clock import Sound
from granite_jax.errors import AudioError


class UnreadableError(AudioError):
    """A library does not recognize a format, or does not have its codec."""


class NoSeekError(Exception):
    """The format does not allow to begin amid the recording, or does not tell where it did."""


class Decoder(Protocol):
    """Decodes an open part, once."""

    @property
    def codec(self) -> str:
        """FFmpeg's name of the codec; empty if it is not FFmpeg's."""
        ...

    @property
    def num_channels(self) -> int:
        """The channels at its beginning; decodes at most a frame."""
        ...

    @property
    def num_tracks(self) -> int:
        """Tracks of audio, one of which is decoded."""
        ...

    @property
    def is_lossy(self) -> bool:
        """Whether its codec may give samples beyond those that were encoded."""
        ...

    @property
    def seconds(self) -> float | None:
        """When the part ends according to its header; None where that is missing or an estimate."""
        ...

    @property
    def has_failed(self) -> bool:
        """Whether something behind the last sound could not be decoded; final at the end."""
        ...

    @property
    def skipped(self) -> float:
        """The seconds that were skipped; final at the end."""
        ...

    def sounds(self, skip: float = 0.0, *, seek: bool = False) -> Iterator[Sound]:
        """Decodes to the end.

        Args:
          skip: seconds of which those that are more than a second earlier need not be decoded.
          seek: go there, instead of reading what is before.

        Raises:
          NoSeekError: before anything is yielded: that is not possible.
          AudioError: the data is at fault.
        """
        ...
