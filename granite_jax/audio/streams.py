"""Finds the audio streams of an encoded file: where each begins and ends, whatever the headers claim.

libsndfile reads one stream that begins with the file and believes its header. Files from the field have junk in front,
several recordings one after another, sizes that were never filled in, and ends that were never written.

References: RIFF and RF64 (EBU Tech 3306), AIFF, AU, CAF, Wave64, Ogg (RFC 3533), FLAC (RFC 9639), ID3v2.4, and the
Xing/Info header that LAME writes into the first frame of an MP3.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO

_JUNK = 1 << 16  # bytes in which the beginning of a stream is looked for
_PLACEHOLDER = 0x7FFF_0000  # programs that write to a pipe leave such a size, or a larger one
_MAX_CHUNKS = 1000
_W64 = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"
_MARKERS = re.compile(
    rb"(RIFF|RIFX|RF64)....WAVE|FORM....AIF[FC]|caff\x00\x01\x00\x00|OggS\x00\x02|fLaC[\x00\x80]\x00\x00\x22"
    rb"|\.snd\x00\x00..|" + re.escape(_W64),
    re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Stream:
    """One stream of a file.

    Fields:
      start, end: bytes of the file.
      patches: what to read instead of header fields that lie, by position in the stream.
      is_truncated: whether the stream's end is missing.
      fallback: makes a stream of the same bytes that takes longer to make, for when decoding stops before `end`.
      is_parsed: whether `end` is known from the headers; it is the end of the file otherwise.
      prefix: bytes to read before those of the file.
      header_end: byte of the file behind the header, where it is long and can hold anything.
    """

    start: int
    end: int
    patches: Mapping[int, bytes] = dataclasses.field(default_factory=dict)
    is_truncated: bool = False
    fallback: Callable[[], Stream] | None = None
    is_parsed: bool = True
    prefix: bytes = b""
    header_end: int = 0


def find_stream(file: BinaryIO, start: int, size: int, *, behind_junk: bool = True) -> Stream | None:
    """The first stream of a seekable file of `size` bytes at or after `start`; None if there is no sign of one.

    Args:
      behind_junk: look for it in the first 64 KiB, instead of at `start` and behind tags alone.
    """
    start = _skip_tags(file, start, size)
    for position in _beginnings(file, start) if behind_junk else [0]:
        stream = _parse(file, start + position, size)
        if stream is not None:
            return stream
    return None


def is_only_tags(file: BinaryIO, start: int, size: int) -> bool:
    """Whether nothing but tags and zeros follow."""
    start, end = _skip_tags(file, start, size), _without_last_tags(file, start, size)
    return not any(any(block) for _, block in _blocks(file, start, end))


def looks_like_audio(head: bytes) -> bool:
    """Whether a file that begins with `head` is audio, by its marker."""
    has_id3 = re.match(rb"ID3[\x02-\x04][\x00-\x0f]", head) is not None
    return has_id3 or _MARKERS.match(head) is not None or (_frame(head) > 0 and _follows(head, 0))


def next_marker(file: BinaryIO, start: int, size: int) -> int:
    """Where the next stream begins that is not an MP3; `size` if there is none."""
    for position, block in _blocks(file, start, size, overlap=15):
        match = _MARKERS.search(block)
        if match is not None:
            return position + match.start()
    return size


def _blocks(file: BinaryIO, start: int, end: int, overlap: int = 0) -> Iterator[tuple[int, bytes]]:
    """Bytes of a file in blocks, each with its position: a small one, as what is looked for is often near."""
    step = 1 << 12
    while start < end:
        yield start, _read(file, start, min(step + overlap, end - start))
        start, step = start + step, 1 << 20


def _read(file: BinaryIO, position: int, count: int) -> bytes:
    file.seek(position)
    parts, missing = [], count
    while missing and (part := file.read(missing)):
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _beginnings(file: BinaryIO, start: int) -> list[int]:
    """Where streams may begin behind `start`: at known markers, or the frames of an MP3, which noise resembles."""
    if _MARKERS.match(_read(file, start, 16)):
        return [0]
    head = _read(file, start, _JUNK)
    marked = [match.start() for match in _MARKERS.finditer(head)]
    first_frame = next((i for i in _sync_positions(head) if _follows(head, i)), None)
    return marked if first_frame is None else sorted({*marked, first_frame})


def _parse(file: BinaryIO, start: int, size: int) -> Stream | None:
    head = _read(file, start, 12)
    marker, form = head[:4], head[8:]
    if marker in (b"RIFF", b"RIFX", b"RF64") and form == b"WAVE":
        return _chunked(file, start, size, "<" if marker != b"RIFX" else ">", b"data")
    if marker == b"FORM" and form in (b"AIFF", b"AIFC"):
        return _chunked(file, start, size, ">", b"SSND")
    if marker == b".snd" and len(head) == 12:
        offset, length = struct.unpack(">II", head[4:12])
        data = start + offset
        return _sized(start, data, length, size, lambda n: {8: struct.pack(">I", min(n, 0xFFFF_FFFF))})
    if head == _W64[:12]:
        length = int.from_bytes(_read(file, start + 16, 8), "little")
        return Stream(start, min(start + length, size), is_truncated=start + length > size)
    if marker == b"caff":
        return _caf(file, start, size)
    if marker == b"OggS":
        return _ogg(file, start, size)
    if marker == b"fLaC":
        return _flac(file, start, _without_last_tags(file, start, size))
    return _mp3(file, start, size) if _frame(head) else None


def _sized(
    start: int,
    data: int,
    length: int,
    size: int,
    patch: Callable[[int], Mapping[int, bytes]],
    placeholder: int = _PLACEHOLDER,
) -> Stream:
    """A stream whose samples begin at `data` and have a length in the header, which `patch` corrects."""
    available = size - data
    if length <= available:
        return Stream(start, data + length)
    # Some programs count the header in.
    return Stream(start, size, patch(available), available + data - start < length < placeholder)


def _chunked(file: BinaryIO, start: int, size: int, order: str, samples: bytes) -> Stream:
    """A stream of chunks with 32-bit lengths, one of which has the samples."""
    position, length_64, field_64 = start + 12, None, 0
    for _ in range(_MAX_CHUNKS):
        head = _read(file, position, 20)
        if len(head) < 8:
            return Stream(start, size)  # without samples: libsndfile says so
        name, length = struct.unpack(f"{order}4sI", head[:8])
        if name == b"ds64" and len(head) >= 20:
            field_64 = position + 16
            length_64 = struct.unpack("<Q", _read(file, field_64, 8).ljust(8, b"\0"))[0]
        if name == samples:
            break
        position += 8 + length + length % 2
    else:
        return Stream(start, size)
    data = position + 8
    is_long = length == 0xFFFF_FFFF and bool(length_64)
    if length_64 and is_long:
        length = length_64
    available = size - data
    if length <= available:
        end = _end_of_chunks(file, data + length, size, order)
        is_known = end == size or is_only_tags(file, end, size)
        # A length that was never brought up to date: more follows than it counts, and that resembles nothing.
        is_stale = not is_known and size - end > max(length, _JUNK // 16) and not _beginnings(file, end)
        if not is_stale and (length or end > data or is_known):
            return Stream(start, end)
    if is_long:
        return Stream(start, size, is_truncated=True)
    patches = {
        data - 4 - start: struct.pack(f"{order}I", min(available, 0xFFFF_FFFF)),
        4: struct.pack(f"{order}I", min(size - start - 8, 0xFFFF_FFFF)),
    }
    if length_64 is not None:
        patches = {field_64 - start: struct.pack("<Q", available)}
    # Some programs count the header in.
    return Stream(start, size, patches, available + data - start < length < _PLACEHOLDER)


def _end_of_chunks(file: BinaryIO, position: int, size: int, order: str) -> int:
    """The end of the chunks that follow the samples, which end at `position`, with or without a byte of padding."""
    for _ in range(_MAX_CHUNKS):
        head = _read(file, position, 21)
        if _MARKERS.match(head):
            break
        is_padded = not head[:1].strip(b"\0") and len(head) > 1
        name, length = struct.unpack(f"{order}4sI", head[is_padded : is_padded + 8].ljust(8, b"\0"))
        end = position + is_padded + 8 + length
        if not all(32 <= byte < 127 for byte in name) or end > size:
            break
        position = end
    return min(position, size)


def _caf(file: BinaryIO, start: int, size: int) -> Stream:
    position, samples = start + 8, None
    for _ in range(_MAX_CHUNKS):
        head = _read(file, position, 12)
        name, length = struct.unpack(">4sq", head) if len(head) == 12 else (b"", 0)
        if not re.fullmatch(rb"[ -~]{4}", name) or _MARKERS.match(_read(file, position, 12)):
            break
        data, field = position + 12, position + 4 - start
        if name == b"data":
            unknown = length == -1
            length = size - data if unknown else max(length, 0)
            samples = _sized(start, data, length, size, lambda n, field=field: {field: struct.pack(">q", n)}, 1 << 63)
            if unknown or data + length > size:
                return samples
        position = data + max(length, 0)
    return Stream(start, size if samples is None else min(position, size))


def _ogg(file: BinaryIO, start: int, size: int) -> Stream:
    """The pages until another stream begins. Streams that are interleaved begin together."""
    page, position, is_past_beginnings = start, start, False
    while position < size:
        head = _read(file, position, 27 + 255)
        if head[:4] != b"OggS" or len(head) < 27:
            following = _next_page(file, page + 4, size)  # in a page that lacks its end, or behind junk
            if following == size or _read(file, following + 5, 1)[0] & 2:
                is_cut = following < position or (following == size and head[:4] == b"OggS"[: len(head)])
                return Stream(start, min(following, position), is_truncated=is_cut)
            position = following
            continue
        begins, segments = bool(head[5] & 2), head[26]
        if begins and is_past_beginnings:
            return Stream(start, position)
        is_past_beginnings |= not begins
        page = position
        position += 27 + segments + sum(head[27 : 27 + segments])
    return Stream(start, min(position, size), is_truncated=position > size)


def _next_page(file: BinaryIO, start: int, size: int) -> int:
    """Where the next Ogg page begins; `size` if there is none."""
    for position, block in _blocks(file, start, size, overlap=4):
        found = block.find(b"OggS\0")
        if found >= 0:
            return position + found
    return size


def _flac(file: BinaryIO, start: int, size: int) -> Stream:
    position = start + 4
    for _ in range(_MAX_CHUNKS):
        head = _read(file, position, 4)
        if len(head) < 4:
            break
        position += 4 + int.from_bytes(head[1:], "big")
        if head[0] & 0x80:
            break
    return Stream(start, size, header_end=min(position, size))


# MP3. Frames have a sync word, and lengths that follow from their headers.

_BITRATES = {  # kbit/s, by version and layer
    (1, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}  # Hz, by version bits


def _frame(head: bytes) -> int:
    """The length in bytes of the frame that begins with `head`; 0 if it is no frame."""
    mean = _mean_length(head)
    padding = head[2] >> 1 & 1 if mean else 0
    is_layer_1 = mean and head[1] & 6 == 6
    return 4 * (int(mean / 4) + padding) if is_layer_1 else int(mean) + padding


def _mean_length(head: bytes) -> float:
    """The mean length of frames with the header `head`, which are padded to whole bytes by turns; 0 if it is none."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return 0.0
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    rate_index, bitrate_index = head[2] >> 2 & 3, head[2] >> 4
    if version == 1 or layer == 4 or rate_index == 3 or not 0 < bitrate_index < 15:
        return 0.0
    bits = 1000 * _BITRATES[1 if version == 3 else 2, layer][bitrate_index - 1]
    factor = 48 if layer == 1 else 72 if layer == 3 and version != 3 else 144
    return factor * bits / _RATES[version][rate_index]


def _sync_positions(data: bytes) -> Iterator[int]:
    i = data.find(b"\xff")
    while i >= 0:
        if _frame(data[i : i + 4]):
            yield i
        i = data.find(b"\xff", i + 1)


def _follows(data: bytes, position: int, count: int = 2) -> bool:
    """Whether further frames of the same kind follow the one at `position`, or the data ends with it."""
    kind = data[position + 1]
    first = position
    for number in range(count):
        position += _frame(data[position : position + 4])
        if position + 4 > len(data):
            return len(data) < _JUNK and (number > 0 or first == 0)
        if data[position + 1] != kind or not _frame(data[position : position + 4]):
            return False
    return True


def _mp3(file: BinaryIO, start: int, size: int) -> Stream:
    """The frames that the header in the first frame counts, if it counts right, or else all that follow each other."""
    size = _without_last_tags(file, start, size)
    head = _read(file, start, 256)
    is_layer_3 = head[1] & 6 == 2
    tag = 4 + _side_bytes(head)
    if not _has_tag(head) or not is_layer_3:
        if not is_layer_3 or _has_constant_bitrate(file, start, size):
            return Stream(start, size, is_truncated=_is_last_frame_cut(file, start, size))
        return _counted(file, start, size)
    flags = int.from_bytes(head[tag + 4 : tag + 8], "big")
    counted = functools.partial(_recounted, file, start, size, tag, flags)
    length = tag + 8 + 4 * (flags & 1)
    if flags & 2 and int.from_bytes(head[length : length + 4], "big") == size - start:
        return Stream(start, size, fallback=counted)
    return counted()


def _recounted(file: BinaryIO, start: int, size: int, tag: int, flags: int) -> Stream:
    """A stream whose header gets the true numbers of frames and bytes. The codec's delay stays in it."""
    head = _read(file, start, 256)
    end, count, is_cut = _count_frames(file, start + _frame(head), size)
    if not flags & 1:  # a header without a count: one that has it takes its place
        return _counted(file, start + _frame(head), size)
    declared = int.from_bytes(head[tag + 8 : tag + 12], "big")
    patches = {tag + 8: struct.pack(">I", count)}
    if flags & 2:
        patches[tag + 12] = struct.pack(">I", end - start)
    is_truncated = is_cut or (end == size and count < declared - 1)
    return Stream(start, end, patches, is_truncated)


def _has_tag(head: bytes) -> bool:
    """Whether a frame has the header of a stream, and not its first samples."""
    tag = 4 + _side_bytes(head)
    return head[tag : tag + 4] in (b"Xing", b"Info")


def _side_bytes(head: bytes) -> int:
    """Bytes between a frame's header and the tag that the first frame of a file may have."""
    is_mono, is_mpeg_1 = head[3] >> 6 == 3, head[1] >> 3 & 3 == 3
    return (17 if is_mono else 32) if is_mpeg_1 else (9 if is_mono else 17)


def _counted(file: BinaryIO, start: int, size: int) -> Stream:
    """All frames that follow each other, behind a header that counts them.

    libsndfile would estimate their number from the size of the first, and stop there.
    """
    end, count, is_cut = _count_frames(file, start, size)
    if not count:
        return Stream(start, size)
    first = _read(file, start, 4)
    # Without a checksum, of the highest bitrate, for room.
    first = bytes([first[0], first[1] | 1, first[2] & 0x0F | 0xE0, first[3]])
    room = _frame(first)
    header = first + bytes(_side_bytes(first)) + b"Info" + struct.pack(">III", 3, count, room + end - start)
    return Stream(start, end, is_truncated=is_cut, prefix=header.ljust(room, b"\0"))


def _count_frames(file: BinaryIO, start: int, size: int) -> tuple[int, int, bool]:
    """The end of the frames of one stream from `start` on, their number, and whether the last is cut off."""
    position, count, block, block_start = start, 0, b"", start
    while position < size:
        if position + 40 > block_start + len(block):
            block_start, block = position, _read(file, position, 1 << 20)
        head = block[position - block_start : position - block_start + 40]
        length = _frame(head)
        if not length or (count and _has_tag(head)):
            break
        position += length
        count += 1
    return min(position, size), count, position > size


def _has_constant_bitrate(file: BinaryIO, start: int, size: int) -> bool:
    """Whether frames of the first one's kind are where they would be, in 16 places."""
    if size - start < 1 << 20:
        return False  # counting is as fast
    head = _read(file, start, 4)
    bitrate, mean = head[2] >> 4, _mean_length(head)
    for number in range(1, 17):
        expected = start + int(number * (size - start) / 18 / mean) * mean
        near = _read(file, int(expected) - 1, 8)
        if not any(_frame(near[i : i + 4]) and near[i + 2] >> 4 == bitrate for i in range(4)):
            return False
    return True


def _is_last_frame_cut(file: BinaryIO, start: int, size: int) -> bool:
    tail_start = max(start, size - _JUNK // 4)
    tail = _read(file, tail_start, size - tail_start)
    first = next((i for i in _sync_positions(tail) if _follows(tail, i)), None)
    return first is not None and _count_frames(file, tail_start + first, size)[2]


def _skip_tags(file: BinaryIO, start: int, size: int) -> int:
    """Past ID3v2, ID3v1 and APE tags."""
    while start < size:
        head = _read(file, start, 32)
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


def _without_last_tags(file: BinaryIO, start: int, size: int) -> int:
    """The end of what precedes the ID3v1, APE and Lyrics3 tags at the end of a file."""
    end = size
    while end > start:
        tail_start = max(start, end - 128)
        tail = _read(file, tail_start, end - tail_start)
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
