"""What a local recording was when it was read, so that a later run of its job notices a change."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any, Literal

from granite_jax.batch.access import AudioStorage, scheme
from granite_jax.errors import AudioError

Detection = Literal["time", "hash", "off"]
"""By size and time of modification, by a hash of the bytes, or not at all."""


_MAX_HASHES = 1000
_hashes: dict[tuple[int, ...], str] = {}  # of the files read last: a recording can be that of many entries


def version_of(file: Any, detection: Detection) -> dict[str, Any]:
    """Describes an open file: `bytes`, `modified` in seconds of the epoch, and a `sha256` if asked for.

    Empty for remote files. The file's position is afterwards as before.
    """
    try:
        status = os.fstat(file.fileno())
    except (AttributeError, OSError, ValueError):  # UnsupportedOperation is both
        return {}
    if detection == "off":
        return {}
    version = {"bytes": status.st_size, "modified": round(status.st_mtime, 6)}
    if detection == "hash":
        key = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        if key not in _hashes:
            position = file.tell()
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(position)
            if len(_hashes) >= _MAX_HASHES:
                _hashes.clear()
            _hashes[key] = digest
        version["sha256"] = _hashes[key]
    return version


class ChangeDetector:
    """Says of lines of results whether their recordings have changed since."""

    def __init__(self, access: AudioStorage, detection: Detection):
        self._access = access
        self._detection: Detection = detection
        self._current: dict[tuple[str, bool], dict[str, Any]] = {}  # by name, and whether there is a hash

    def __call__(self, line: Mapping[str, Any]) -> bool:
        """Whether a line's recording has changed. One that is out of reach, or was remote, has not."""
        recorded = line.get("file")
        if self._detection == "off" or not isinstance(recorded, dict):
            return False
        current = self._version(line["audio"], False)
        if not current or current["bytes"] != recorded.get("bytes"):
            return bool(current)
        is_as_old = current["modified"] == recorded.get("modified")
        if "sha256" in recorded and (self._detection == "hash" or not is_as_old):
            return self._version(line["audio"], True).get("sha256") != recorded["sha256"]
        return not is_as_old

    def _version(self, name: str, hashed: bool) -> dict[str, Any]:
        key = name, hashed
        if key not in self._current:
            self._current[key] = {}
            try:
                if scheme(self._access.resolve(name)) is None:
                    with self._access.open(name) as file:
                        self._current[key] = version_of(file, "hash" if hashed else "time")
            except (AudioError, OSError):
                pass
        return self._current[key]
