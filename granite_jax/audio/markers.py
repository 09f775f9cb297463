"""What tells where recordings and tags begin and end in a file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

TRAILER = 4096
"""Bytes behind the audio that may be anything."""
W64_HEAD = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"
MARKERS = re.compile(
    rb"(RIFF|RIFX|RF64)....WAVE|FORM....AIF[FC]|caff\x00\x01\x00\x00|OggS\x00[\2\6]|fLaC[\x00\x80]\x00\x00\x22"
    rb"|\.snd\x00\x00..|" + re.escape(W64_HEAD),
    re.DOTALL,
)
"""Beginnings of recordings, of formats in which several can follow one another."""
_BEGINNINGS = (b"fLaC", b"OggS\0\2", b"OggS\0\6", b"RIFF", b"FORM")  # what is behind FLAC or MP3 at all, if anything


def read(file: BinaryIO, position: int, count: int) -> bytes:
    """As many bytes of a file as there are."""
    if count <= 0:
        return b""
    file.seek(position)
    parts, missing = [], count
    while missing and (part := file.read(missing)):
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def blocks(file: BinaryIO, start: int, end: int, overlap: int = 0) -> Iterator[tuple[int, bytes]]:
    """Bytes of a file in blocks, each with its position: a small one first, as what is looked for is often near."""
    size = 1 << 12
    while start < end:
        yield start, read(file, start, min(size + overlap, end - start))
        start, size = start + size, 1 << 17


def is_only_tags(file: BinaryIO, start: int, size: int) -> bool:
    """Whether nothing but tags and zeros follow."""
    end = without_last_tags(file, start, size)
    while start < end:
        behind = _skip_zeros(file, skip_tags(file, start, size), end)
        if behind == start:
            return False
        start = behind
    return True


def _skip_zeros(file: BinaryIO, start: int, end: int) -> int:
    for position, block in blocks(file, start, end):
        rest = block.lstrip(b"\0")
        if rest:
            return position + len(block) - len(rest)
    return end


def skip_tags(file: BinaryIO, start: int, size: int) -> int:
    """Past ID3v2, ID3v1 and APE tags."""
    while start < size:
        head = read(file, start, 32)
        if head[:3] == b"ID3" and len(head) >= 10 and all(byte < 128 for byte in head[6:10]):
            length = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
            start += 10 + length + (10 if head[5] & 16 else 0)
        elif head[:3] == b"TAG" and size - start >= 128:
            start += 128
        elif head[:8] == b"APETAGEX" and len(head) == 32:
            start += 32 + int.from_bytes(head[12:16], "little")
        else:
            break
    return min(start, size)


def without_last_tags(file: BinaryIO, start: int, size: int) -> int:
    """The end of what precedes the ID3v1, APE and Lyrics3 tags at the end of a file."""
    end = size
    while end > start:
        tail_start = max(start, end - 128)
        tail = read(file, tail_start, end - tail_start)
        if len(tail) == 128 and tail.startswith(b"TAG"):
            end -= 128
        elif tail[-32:-24] == b"APETAGEX" and (length := int.from_bytes(tail[-20:-16], "little")) >= 32:
            has_header = tail[-9] & 0x80
            end -= length + (32 if has_header else 0)
        elif tail.endswith(b"LYRICS200") and tail[-15:-9].isdigit():
            end -= int(tail[-15:-9]) + 15
        else:
            break
    return max(end, start)


def find_marker(data: bytes, start: int = 0) -> int | None:
    """Where the first recording begins that has a marker."""
    if all(data.find(each, start) < 0 for each in _BEGINNINGS):  # many times faster than the expression
        return None
    marker = MARKERS.search(data, start)
    return None if marker is None else marker.start()
