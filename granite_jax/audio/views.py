"""A part of a file as a decoder reads it: without its name, by which FFmpeg would look for other files."""

from __future__ import annotations

import collections
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

from granite_jax.audio import frames
from granite_jax.audio.clock import Span
from granite_jax.audio.markers import blocks, find_marker, read
from granite_jax.audio.parts import Part
from granite_jax.errors import AudioError, one_line

_DECODER_DELAY = 529  # samples of MP3
_AROUND = 25  # frames, whose mean length says how much sound was in bytes that cannot be decoded
_BLOCK = 1 << 17
_HEAD = 1 << 12  # bytes of a recording's beginning
_OVERLAP = 16  # bytes of a marker


class UnreadableError(AudioError):
    """A library does not know a format, or its codec."""


def view_of(file: BinaryIO, part: Part) -> View:
    """The view for a part's format."""
    views = {"flac": MarkedView, "ogg": MarkedView, "mp3": FrameView, "aac": FrameView}
    return views.get(part.format.demuxer if part.format else "", FileView)(file, part)


class _SafeFile:
    """A file that ends where an error is, which is kept: libsndfile's callbacks cannot raise, and PyAV's print."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.error: OSError | None = None

    def read(self, size: int) -> bytes:
        return self._checked(lambda: self._file.read(size)) or b""

    def seek(self, position: int) -> None:
        self._checked(lambda: self._file.seek(position))

    def _checked(self, call: Callable[[], Any]) -> Any:
        if self.error is not None:
            return None
        try:
            return call()
        except Exception as error:  # a remote file raises what it likes
            self.error = error if isinstance(error, OSError) else OSError(one_line(error))
            return None


class View:
    """A part of a file.

    Fields:
      end: the byte of the file where the part ends; final when all was read.
      is_truncated: whether its end is missing; final when all was read.
      lost: seconds, from and to, that FFmpeg does not know to be missing.
      delay: samples at the beginning that are a codec's, and that FFmpeg does not leave out.
      has_clock: whether `time` is to be asked, because FFmpeg's own count of frames is not the time any longer.
      knows_end: whether `seconds` does, and FFmpeg need not leave out a codec's padding.
    """

    def __init__(self, file: BinaryIO, part: Part):
        self.delay, self.knows_end, self.has_clock = 0, False, False
        self._safe = _SafeFile(file)
        self._file = cast(BinaryIO, self._safe)
        self._start, self._size = part.start, part.end
        self.end, self.is_truncated = part.end, part.is_truncated
        self.lost: list[Span] = []

    def read(self, size: int) -> bytes:
        """The next bytes; at most as many as asked for, and none at the end."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises the error of a read that failed."""
        if self._safe.error is not None:
            raise self._safe.error

    def time(self, position: int) -> float | None:
        """Seconds at which the frame sounds that begins with this byte of what was read, if the view knows."""
        return None

    def seconds(self, rate: float) -> float:
        """The length of all that was read: what is behind is a codec's padding. Infinite where FFmpeg knows it."""
        return math.inf


class FileView(View):
    """A part that is read in any order."""

    def __init__(self, file: BinaryIO, part: Part):
        super().__init__(file, part)
        self._offset, self._patches = 0, part.patches
        self._limit = part.end if part.sound_end is None else part.sound_end

    def read(self, size: int) -> bytes:
        position = self._start + self._offset
        data = read(self._file, position, max(0, min(size, self._limit - position)))
        self._offset += len(data)
        for byte, patch in self._patches.items():
            at = byte - position
            low, high = max(at, 0), min(at + len(patch), len(data))
            if low < high:
                data = data[:low] + patch[low - at : high - at] + data[high:]
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Goes to a byte, as files do."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._offset, os.SEEK_END: self._limit - self._start}
        target = origin.get(whence, 0) + offset
        if target >= 0:  # Damaged headers point to before the start.
            self._offset = target
        return self._offset

    def tell(self) -> int:
        """The next byte."""
        return self._offset


class _SequentialView(View):
    """A part that is read once, from its beginning."""

    def __init__(self, file: BinaryIO, part: Part):
        super().__init__(file, part)
        self._pieces, self._ready = self._read_pieces(), bytearray()

    def read(self, size: int) -> bytes:
        while len(self._ready) < size and (piece := next(self._pieces, None)) is not None:
            self._ready += piece
        data = bytes(self._ready[:size])
        del self._ready[:size]
        return data

    def _read_pieces(self) -> Iterator[bytes]:
        raise NotImplementedError


class MarkedView(_SequentialView):
    """FLAC or Ogg, up to the marker of another recording."""

    def __init__(self, file: BinaryIO, part: Part):
        super().__init__(file, part)
        self._num_samples = math.inf
        head = read(file, part.start, _HEAD)
        self._is_ogg = head.startswith(b"OggS")
        second = _page_length(head, 0)
        is_alone = head[second + 5 : second + 6] != b"\2"
        # FFmpeg takes too much from the end of Vorbis whose first page is its last.
        self.knows_end = is_alone and head[28:35] == b"\x01vorbis"
        is_opus = is_alone and head[28:36] == b"OpusHead"
        self._first = int.from_bytes(head[38:40], "little") if is_opus else 0 if self.knows_end else None
        self._body = part.start + _body(head)

    def seconds(self, rate: float) -> float:
        return self._num_samples / rate

    def _read_pieces(self) -> Iterator[bytes]:
        position, size = self._start, 1 << 12
        while position < self.end:
            block = read(self._file, position, min(size + _OVERLAP, self._size - position))
            if not block:  # reading failed
                return
            marker = find_marker(block, max(0, self._body - position))
            if marker is not None:
                self.end = position + marker
            piece = block[: min(size, self.end - position)]
            position, size = position + len(piece), _BLOCK
            if position == self.end and self._is_ogg:
                self._find_end()
            yield piece

    def _find_end(self) -> None:
        """Looks at the last page of Ogg."""
        start = max(self._start, self.end - _BLOCK)
        tail = read(self._file, start, self.end - start)
        last = tail.rfind(b"OggS\0")
        length = _page_length(tail, last) if last >= 0 else 0
        self.is_truncated = last + length > len(tail) or tail.endswith((b"O", b"Og", b"Ogg", b"OggS"))
        if tail[last + 5 : last + 6] in (b"\4", b"\5") and self._first is not None and not self.is_truncated:
            self._num_samples = int.from_bytes(tail[last + 6 : last + 14], "little") - self._first
        self.end = min(start + last + length, self.end) if length else self.end


def _page_length(data: bytes, i: int) -> int:
    """The length of the Ogg page that begins with byte `i`; 0 if none does, or its header is not all there."""
    if not data.startswith(b"OggS\0", i) or i + 27 > len(data):
        return 0
    return 27 + data[i + 26] + sum(data[i + 27 : i + 27 + data[i + 26]])


def _body(head: bytes) -> int:
    """Where markers begin to tell another recording from one of Ogg or FLAC."""
    if head.startswith(b"OggS"):  # streams that are interleaved begin together
        following = re.search(rb"OggS\0[^\2]", head)
        return following.start() if following else len(head)
    position = 4
    while position + 4 <= len(head):  # metadata of FLAC, which can contain anything
        first, position = head[position], position + 4 + int.from_bytes(head[position + 1 : position + 4], "big")
        if first & 0x80:
            break
    return position


def has_marker(file: BinaryIO, part: Part, end: int) -> bool:
    """Whether another recording begins in the first `end` bytes of one of Ogg or FLAC."""
    start = part.start + _body(read(file, part.start, _HEAD))
    found = blocks(file, start, part.start + end, overlap=_OVERLAP)
    return any(find_marker(block) is not None for _, block in found)


class FrameView(_SequentialView):
    """The frames of an MP3 or of AAC as a file that is read once, without what lies between them.

    Where bytes are left out that are no tags, as much time passes as they had sound.
    """

    def __init__(self, file: BinaryIO, part: Part):
        super().__init__(file, part)
        self.end = part.start
        self._num_bytes, self._num_frames, self._seconds, self._padding = 0, 0, 0.0, 0
        self._times: collections.deque[tuple[int, float]] = collections.deque()
        self._lengths: collections.deque[tuple[int, float]] = collections.deque(maxlen=_AROUND)
        self._declared: int | None = None
        self._missing: tuple[int, int, bool] | None = None

    def _read_pieces(self) -> Iterator[bytes]:
        for run in frames.runs(self._file, self._start, self._size):
            self._add(run)
            yield run.data

    def time(self, position: int) -> float | None:
        while self._times and self._times[0][0] < position:
            self._times.popleft()
        return self._times[0][1] if self._times and self._times[0][0] == position else None

    def seconds(self, rate: float) -> float:
        return self._seconds - self._padding / rate if self._num_frames == self._declared else math.inf

    def _begin(self, data: bytes) -> None:
        """Reads the header that the first frame may have."""
        data = data[:512].ljust(512, b"\0")
        self._declared = frames.declared_frames(data)
        delays = frames.encoder_delay(data)
        is_mp3 = data[1] & 6 == 2
        if delays is not None:
            self._padding = delays[0] + delays[1]
        elif is_mp3:
            self.delay = _DECODER_DELAY

    def _add(self, run: frames.Run) -> None:
        if self._num_bytes == 0:
            self._begin(run.data)
        if run.lost:
            self._skip(run)
        ends = [start for start, _ in run.frames[1:]] + [len(run.data)]
        for (start, seconds), end in zip(run.frames, ends, strict=True):
            self._times.append((self._num_bytes + start, self._seconds))
            self._lengths.append((end - start, seconds))
            has_sound = self._num_bytes + start > 0 or self._declared is None
            self._seconds += seconds * has_sound
            self._num_frames += has_sound
        self.has_clock |= bool(run.lost) or len({seconds for _, seconds in [*self._lengths, *run.frames]}) > 1
        self._num_bytes += len(run.data)
        is_short = self._declared is not None and self._num_frames < self._declared - 1
        self.is_truncated = run.end > self._size or (run.end == self._size and is_short)
        self.end = min(run.end, self._size)

    def _skip(self, run: frames.Run) -> None:
        """Lets as much time pass as was in lost bytes, by the frames around them, or by the number of all."""
        ends = [start for start, _ in run.frames[1 : _AROUND + 1]]
        behind = [(end - start, seconds) for (start, seconds), end in zip(run.frames, ends, strict=False)]
        around = [*self._lengths, *behind] or [(len(run.data), run.frames[0][1])]
        length, seconds = sum(each for each, _ in around), sum(each for _, each in around)
        count = round(run.lost * len(around) / length)
        if self._declared:
            if self._missing is None:
                self._missing = self._find_missing(run.start, run.lost)
            missing, lost, is_exact = self._missing
            share = round(missing * run.lost / lost)
            count = share if is_exact else min(count, share)
        self.lost.append((self._seconds, self._seconds))
        self._seconds += count * seconds / len(around)
        self._num_frames += count

    def _find_missing(self, start: int, lost: int) -> tuple[int, int, bool]:
        """The frames that the header counts and that are not there, the bytes that are lost from the first loss on,
        and whether the frames are missing there, and not at the end.
        """
        num_frames, end = self._num_frames, start
        for run in frames.runs(self._file, start, self._size):
            num_frames, lost, end = num_frames + len(run.frames), lost + run.lost, run.end
        return max(0, (self._declared or 0) - num_frames), lost, end <= self._size
