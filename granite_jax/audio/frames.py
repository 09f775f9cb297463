"""Frames of MP3 and of AAC (ADTS): each begins with a sync word and a header from which its length follows.

References: ISO 11172-3 and 13818-3 (MPEG audio), ISO 14496-3 (ADTS), and the Xing/Info header that LAME writes into the
first frame of an MP3.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from granite_jax.audio.markers import find_marker, read, skip_tags

JUNK = 1 << 16
"""Bytes in which the beginning of a recording is looked for."""
_BLOCK = 1 << 16
HEADER = 44
"""Bytes by which a frame, and a header of the stream in it, are recognized."""

_BITRATES = {  # kbit/s, by version and layer
    (1, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}  # Hz, by version bits
# The first bytes of a header with a version, a layer and a bitrate
_SYNC = re.compile(rb"\xff(?:[\xf0\xf1\xf8\xf9]|[\xe2-\xe7\xf2-\xf7\xfa-\xff](?=[\x10-\xef]))")
_AAC_RATES = (96_000, 88_200, 64_000, 48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8_000, 7_350)


class Frame(NamedTuple):
    """The length of a frame in bytes, and that of its sound in seconds."""

    length: int
    seconds: float
    is_aac: bool


def frame_at(data: bytes, i: int) -> Frame | None:
    """The frame that begins with byte `i`, if one can."""
    if i + 4 > len(data) or data[i] != 0xFF or data[i + 1] & 0xE0 != 0xE0:
        return None
    return _aac_frame(data, i) if data[i + 1] & 0xF6 == 0xF0 else _mpeg_frame(data[i + 1], data[i + 2])


def _aac_frame(data: bytes, i: int) -> Frame | None:
    if i + 7 > len(data) or (rate := data[i + 2] >> 2 & 15) >= len(_AAC_RATES):
        return None
    length = (data[i + 3] & 3) << 11 | data[i + 4] << 3 | data[i + 5] >> 5
    return Frame(length, 1024 * ((data[i + 6] & 3) + 1) / _AAC_RATES[rate], True) if length > 7 else None


@functools.cache
def _mpeg_frame(second: int, third: int) -> Frame | None:
    version, layer = second >> 3 & 3, 4 - (second >> 1 & 3)
    rate_index, bitrate_index, padding = third >> 2 & 3, third >> 4, third >> 1 & 1
    if version == 1 or layer == 4 or rate_index == 3 or not 0 < bitrate_index < 15:
        return None
    bits = 1000 * _BITRATES[1 if version == 3 else 2, layer][bitrate_index - 1]
    rate = _RATES[version][rate_index]
    samples = 384 if layer == 1 else 576 if layer == 3 and version != 3 else 1152
    size = 4 if layer == 1 else 1
    return Frame(size * (samples * bits // (8 * size * rate) + padding), samples / rate, False)


def find(data: bytes, end: int | None = None) -> int | None:
    """Where frames begin, before `end`: the first that others of its kind follow, or that ends a short file."""
    found = (match.start() for match in _SYNC.finditer(data, 0, len(data) if end is None else end + 3))
    return next((i for i in found if _is_followed(data, i)), None)


def begin(data: bytes) -> bool:
    """Whether data begins with frames."""
    return _is_followed(data, 0)


def _is_followed(data: bytes, i: int, count: int = 2) -> bool:
    """Whether further frames of the same kind follow the one at `i`, or the data ends with it."""
    first, frame = i, frame_at(data, i)
    for number in range(count):
        if frame is None:
            return False
        i += frame.length
        if i + 7 > len(data):
            return len(data) < JUNK and (number > 0 or first == 0)
        frame = frame_at(data, i) if data[i + 1] == data[first + 1] else None
    return frame is not None


def declared_frames(data: bytes) -> int | None:
    """The number of frames according to the header of an MP3 in its first frame; 0 if that does not tell it."""
    tag = 4 + _side_bytes(data)
    if data[1] & 6 != 2 or data[tag : tag + 4] not in (b"Xing", b"Info"):
        return None
    return int.from_bytes(data[tag + 8 : tag + 12], "big") if data[tag + 7] & 1 else 0


def encoder_delay(data: bytes) -> tuple[int, int] | None:
    """Samples that an encoder put in front and behind, according to the header of an MP3 in its first frame."""
    tag = 4 + _side_bytes(data)
    flags = data[tag + 7]
    encoder = tag + 8 + 4 * (flags & 1) + 2 * (flags & 2) + 25 * (flags & 4) + (flags & 8) // 2
    if declared_frames(data) is None or data[encoder : encoder + 4] not in (b"LAME", b"Lavf", b"Lavc"):
        return None
    delays = int.from_bytes(data[encoder + 21 : encoder + 24], "big")
    return delays >> 12, delays & 0xFFF


def _side_bytes(head: bytes) -> int:
    """Bytes between a frame's header and the tag that the first frame of a file may have."""
    is_mono, is_mpeg_1 = head[3] >> 6 == 3, head[1] >> 3 & 3 == 3
    return (17 if is_mono else 32) if is_mpeg_1 else (9 if is_mono else 17)


class Run(NamedTuple):
    """Frames one behind the other.

    Fields:
      start, end: bytes of the file; the last frame may reach beyond the end of the file.
      data: their bytes.
      frames: position in `data` and seconds of each.
      lost: bytes before it that are no frames.
    """

    start: int
    end: int
    data: bytes
    frames: list[tuple[int, float]]
    lost: int


def runs(file: BinaryIO, start: int, end: int) -> Iterator[Run]:
    """The frames from `start` on, up to the next recording, which has a header of its own."""
    position, is_first, lost = start, True, 0
    while position < end:
        block = read(file, position, min(_BLOCK, end - position))
        found, i, size = [], 0, len(block)
        has_header, is_last = b"Xing" in block or b"Info" in block, position + size == end
        while (frame := frame_at(block, i)) is not None:
            if has_header and not is_first and declared_frames(block[i : i + HEADER].ljust(HEADER, b"\0")) is not None:
                end = position + i
                break
            length, seconds, _ = frame
            if not is_last and i + max(length, HEADER) > size:
                break
            found.append((i, seconds))
            is_first = False
            i += length
        if found:
            yield Run(position, position + i, block[:i], found, lost)
            position, lost = position + i, 0
        elif position < end:
            behind_tags = skip_tags(file, position, end)
            following = _next_frame(file, behind_tags, end)
            if following is None:
                return
            lost += following - behind_tags
            position = following


def _next_frame(file: BinaryIO, position: int, end: int) -> int | None:
    """Where frames go on at or behind a position, if they do before another recording begins."""
    while position < end:
        block = read(file, position, min(2 * _BLOCK, end - position))
        marker, found = find_marker(block), find(block, _BLOCK)
        if marker is not None and (found is None or marker < found):
            return None
        if found is not None:
            return position + found
        position += _BLOCK
    return None
