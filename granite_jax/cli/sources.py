"""What FILE arguments can be besides paths: standard input, pipes, and URLs."""

import os
import stat
import sys
from collections.abc import Sequence
from typing import Any

from granite_jax.batch.access import AudioStorage, check_protocols, retried, scheme
from granite_jax.errors import AudioError, GraniteError

_STDIN = "-"
_MAX_BYTES = (1 << 31) + 1


def to_sources(arguments: Sequence[str], allowed: Sequence[str], *, reread: bool = False) -> list[Any]:
    """What `load_audio` reads for each argument: a path, or a stream that is read when it is needed.

    Args:
      allowed: protocols of URLs.
      reread: whether streams can be read twice, for which their bytes are kept.

    Raises:
      GraniteError: standard input is given twice, or a protocol is unknown.
    """
    check_protocols(allowed)
    if arguments.count(_STDIN) > 1:
        raise GraniteError("standard input, -, can be given once")
    storage = AudioStorage("/", tuple(allowed))
    return [_Stream(each, storage, reread) if _is_stream(each) else each for each in arguments]


def _is_stream(argument: str) -> bool:
    if argument == _STDIN or scheme(argument) not in (None, "tfds"):
        return True
    try:
        mode = os.stat(argument).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


class _Stream:
    """A stream with a name, which is read as a whole."""

    def __init__(self, name: str, storage: AudioStorage, reread: bool):
        self.name = name
        self._storage = storage
        self._reread = reread
        self._content: bytes | None = None

    def read(self, size: int = -1) -> bytes:
        if self._content is not None:
            return self._content
        content = self._read()
        self._content = content if self._reread else b""
        return content

    def _read(self) -> bytes:
        if self.name == _STDIN:
            return sys.stdin.buffer.read(_MAX_BYTES)
        if scheme(self.name) is None:
            with open(self.name, "rb") as file:
                return file.read(_MAX_BYTES)
        try:
            return retried(self._download)
        except FileNotFoundError:
            raise AudioError("no such file") from None

    def _download(self) -> bytes:
        with self._storage.open(self.name) as file:
            return file.read(_MAX_BYTES)
