"""Finds the parts of a file: recordings one behind the other, between tags and junk, without believing headers.

FFmpeg reads one recording that begins with the file. Files from the field have junk in front, several recordings one
after another, sizes that were never filled in or wrapped, and ends that were never written.

References: RIFF and RF64 (EBU Tech 3306), AIFF, AU, CAF, Wave64, Ogg (RFC 3533), FLAC (RFC 9639), ID3v2.4.
"""

from __future__ import annotations

import dataclasses
import re
import struct
from collections.abc import Iterator, Mapping
from typing import BinaryIO, NamedTuple

from granite_jax.audio import frames
from granite_jax.audio.markers import (
    MARKERS,
    W64_HEAD,
    blocks,
    find_marker,
    is_only_tags,
    read,
    skip_tags,
    without_last_tags,
)

HEAD = 512
"""Bytes of a file by which its format is recognized."""
_PLACEHOLDER = 0x7FFF_0000  # programs that write to a pipe leave such a size, or a larger one
_MAX_CHUNKS = 1000
_NEAR = 1 << 24  # bytes in which another recording is looked for behind one whose length is doubtful


class Format(NamedTuple):
    """A format: its name for messages, and FFmpeg's demuxer."""

    name: str
    demuxer: str


# A part of a file each; several can follow one another.
_WAV, _AIFF, _AU = Format("WAV", "wav"), Format("AIFF", "aiff"), Format("AU", "au")
_W64, _CAF, _OGG = Format("Wave64", "w64"), Format("CAF", "caf"), Format("Ogg", "ogg")
_FLAC, _MP3, _AAC = Format("FLAC", "flac"), Format("MP3", "mp3"), Format("AAC", "aac")
# Codecs that FFmpeg decodes otherwise than the programs that write them do: MS ADPCM, G.721, G.723 and NMS.
_WAV_CODECS, _AU_CODECS = (2, 0x14, 0x38, 0x40, 0x45, 0x64), (23, 25, 26)
# The whole of a file.
_FORMATS = {
    rb"....(?:ftyp|moov|mdat|wide|free|skip|pnot)": Format("MP4 or QuickTime", "mov"),
    rb"\x1a\x45\xdf\xa3": Format("WebM or Matroska", "matroska"),
    rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11": Format("WMA or WMV", "asf"),
    rb"#!AMR": Format("AMR", "amr"),
    rb"RIFF....AVI ": Format("AVI", "avi"),
    rb"FLV\x01": Format("Flash video", "flv"),
    rb"\x47.{187}\x47.{187}\x47": Format("an MPEG transport stream", "mpegts"),
    rb"\x00\x00\x01\xba": Format("an MPEG program stream", "mpeg"),
    rb"\x0b\x77": Format("AC-3", "ac3"),
    rb"\x7f\xfe\x80\x01|\xfe\x7f\x01\x80|\x1f\xff\xe8\x00|\xff\x1f\x00\xe8": Format("DTS", "dts"),
    rb"....\xf8\x72\x6f[\xba\xbb]": Format("TrueHD", "truehd"),
    rb"\.ra\xfd|\.RMF": Format("RealAudio", "rm"),
    rb"wvpk": Format("WavPack", "wv"),
    rb"MAC \x96|MAC [^\x00]\x0f": Format("Monkey's Audio", "ape"),
    rb"TTA1": Format("True Audio", "tta"),
    rb"(?:[\xd0-\xdf].{32}){12}": Format("GSM", "gsm"),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """One recording in a file.

    Fields:
      start, end: bytes of the file. FLAC, Ogg, MP3 and AAC may end before: `views` finds out where.
      format: None for libsndfile.
      is_truncated: whether its end is known to be missing.
      patches: what to read instead of a header that lies, by byte of the file.
      sound_end: the byte behind its sound, where something else follows that belongs to it.
    """

    start: int
    end: int
    format: Format | None
    is_truncated: bool = False
    patches: Mapping[int, bytes] = dataclasses.field(default_factory=dict)
    sound_end: int | None = None

    @property
    def is_framed(self) -> bool:
        """Whether it consists of frames with a sync word each, and of nothing else."""
        return self.format in (_MP3, _AAC)

    @property
    def is_exact(self) -> bool:
        """Whether its header counts samples, and its frames have their numbers."""
        return self.format in (None, _FLAC)

    @property
    def is_marked(self) -> bool:
        """Whether only the marker of another recording tells where it ends."""
        return self.format in (_FLAC, _OGG)


def media_format(head: bytes) -> Format | None:
    """The format of a file that begins with `head`, of those that take all of a file."""
    return next((found for pattern, found in _FORMATS.items() if re.match(pattern, head, re.DOTALL)), None)


def looks_like_audio(head: bytes) -> bool:
    """Whether a file that begins with `head` is audio, by its marker."""
    has_id3 = re.match(rb"ID3[\x02-\x04][\x00-\x0f]", head) is not None
    return has_id3 or MARKERS.match(head) is not None or frames.begin(head) or media_format(head) is not None


def find_parts(file: BinaryIO, start: int, size: int) -> Iterator[Part]:
    """What the first part of a seekable file of `size` bytes at or after `start` can be, likeliest first."""
    behind_tags = skip_tags(file, start, size)
    if start == 0:
        head = read(file, behind_tags, HEAD)
        if (found := media_format(head)) is not None:
            yield Part(behind_tags, size, found)
            if found.demuxer == "mov" and (patches := _found_index(file, behind_tags, size)):
                yield Part(behind_tags, size, found, patches=patches)
        elif (part := _parse(file, behind_tags, size)) is not None:
            yield part
            if part.format is None:
                others = {b".snd": _AU, b"riff": _W64, b"caff": _CAF}
                yield dataclasses.replace(part, format=others.get(head[:4], _WAV))
        yield Part(0, size, None)
    for window in range(behind_tags, size if start else behind_tags + 1, frames.JUNK - 16):
        for position in _beginnings(file, window):
            if (part := _parse(file, window + position, size)) is not None:
                yield part
                return


def _beginnings(file: BinaryIO, start: int) -> list[int]:
    """Where parts may begin behind `start`: at known markers, or at frames, which noise resembles."""
    if MARKERS.match(read(file, start, 16)):
        return [0]
    head = read(file, start, frames.JUNK)
    marked = [match.start() for match in MARKERS.finditer(head)]
    first_frame = frames.find(head)
    return marked if first_frame is None else sorted({*marked, first_frame})


def _parse(file: BinaryIO, start: int, size: int) -> Part | None:
    head = read(file, start, 16)
    marker, form = head[:4], head[8:12]
    if marker == b"RIFX" and form == b"WAVE":
        return _chunked(file, start, size, ">", b"data", None)
    if marker in (b"RIFF", b"RF64") and form == b"WAVE":
        return _chunked(file, start, size, "<", b"data", _WAV)
    if marker == b"FORM" and form in (b"AIFF", b"AIFC"):
        return _chunked(file, start, size, ">", b"SSND", _AIFF)
    if marker == b".snd" and len(head) >= 12:
        offset, length, codec = struct.unpack(">III", read(file, start + 4, 12).ljust(12))
        end = start + offset + length
        # Some programs count the header in.
        is_truncated = size < end < start + _PLACEHOLDER and length != size - start
        return Part(start, min(end, size), None if codec in _AU_CODECS else _AU, is_truncated)
    if head == W64_HEAD:
        length = int.from_bytes(read(file, start + 16, 8), "little")
        codec = int.from_bytes(read(file, start + 64, 2), "little")
        form = None if codec in _WAV_CODECS else _W64
        return Part(start, min(start + length, size), form, start + length > size)
    if marker == b"caff":
        return _caf(file, start, size)
    if MARKERS.match(head):
        is_ogg = marker == b"OggS"
        return Part(start, size if is_ogg else without_last_tags(file, start, size), _OGG if is_ogg else _FLAC)
    frame = frames.frame_at(head, 0)
    if frame is None:
        return None
    return Part(start, without_last_tags(file, start, size), _AAC if frame.is_aac else _MP3)


def _chunked(file: BinaryIO, start: int, size: int, order: str, samples: bytes, form: Format | None) -> Part:
    """A part of chunks with 32-bit lengths, one of which has the samples."""
    position, length_64 = start + 12, 0
    for _ in range(_MAX_CHUNKS):
        head = read(file, position, 20)
        if len(head) < 8:
            return Part(start, size, form)  # without samples
        name, length = struct.unpack(f"{order}4sI", head[:8])
        if name == b"ds64" and len(head) >= 20:
            length_64 = struct.unpack("<Q", read(file, position + 16, 8).ljust(8, b"\0"))[0]
        if name == b"fmt " and struct.unpack(f"{order}H", head[8:10].ljust(2, b"\0"))[0] in _WAV_CODECS:
            form = None
        if name == samples:
            break
        position += 8 + length + length % 2
    else:
        return Part(start, size, form)
    data = position + 8
    is_long = length == 0xFFFF_FFFF and bool(length_64)
    length = length_64 if is_long else length
    if data + length <= size:
        end = _end_of_chunks(file, data + length, size, order)
        is_known = end == size or is_only_tags(file, end, size)
        # A length that wrapped, or was never brought up to date: more follows than it counts, which resembles nothing.
        is_stale = not is_known and size - end > max(length, frames.JUNK // 16) and not _is_followed(file, end, size)
        if not is_stale and (length or end > data or is_known):
            return Part(start, end, form, sound_end=data + length)
    is_truncated = is_long or size - start < length < _PLACEHOLDER  # some programs count the header in
    if form != _WAV or is_long:
        return Part(start, size, form, is_truncated)
    # FFmpeg reads what there is of a WAV whose header has no length.
    return Part(start, size, form, is_truncated, {start: b"RIFF", data - 4: bytes(4)})


def _is_followed(file: BinaryIO, start: int, size: int) -> bool:
    """Whether another recording begins not far behind `start`."""
    near = blocks(file, start, min(size, start + _NEAR), overlap=16)
    return bool(_beginnings(file, start)) or any(find_marker(block) is not None for _, block in near)


def _end_of_chunks(file: BinaryIO, position: int, size: int, order: str) -> int:
    """The end of the chunks that follow the samples, which end at `position`, with or without a byte of padding."""
    for _ in range(_MAX_CHUNKS):
        head = read(file, position, 21)
        if MARKERS.match(head):
            break
        is_padded = not head[:1].strip(b"\0") and len(head) > 1
        name, length = struct.unpack(f"{order}4sI", head[is_padded : is_padded + 8].ljust(8, b"\0"))
        end = position + is_padded + 8 + length
        if not all(32 <= byte < 127 for byte in name) or end > size:
            break
        position = end
    return min(position, size)


def _caf(file: BinaryIO, start: int, size: int) -> Part:
    # FFmpeg loses the end of ALAC that libsndfile writes.
    form = None if read(file, start + 28, 4) == b"alac" else _CAF
    position, is_truncated = start + 8, False
    for _ in range(_MAX_CHUNKS):
        head = read(file, position, 12) if position < size else b""
        name, length = struct.unpack(">4sq", head) if len(head) == 12 else (b"", 0)
        if not re.fullmatch(rb"[ -~]{4}", name) or MARKERS.match(head):
            break
        # The samples of a pipe have the length -1.
        is_truncated |= name == b"data" and position + 12 + length > size
        position = size if length < 0 else position + 12 + length
    return Part(start, min(position, size), form, is_truncated)


def _found_index(file: BinaryIO, start: int, size: int) -> dict[int, bytes]:
    """What to read instead of the length of an MP4's samples, so that the index behind them is found."""
    position = start
    for _ in range(_MAX_CHUNKS):
        length, name = struct.unpack(">I4s", read(file, position, 8).ljust(8, b"\0"))
        if name == b"mdat" and length >= 8:
            break
        if length < 8 or position + length > size:
            return {}
        position += length
    for at, block in blocks(file, position, min(size, position + (1 << 32) - 1), overlap=16) if name == b"mdat" else ():
        found = re.search(rb"moov.{4}mvhd", block, re.DOTALL)
        if found is not None:
            return {position: struct.pack(">I", at + found.start() - 4 - position)}
    return {}
