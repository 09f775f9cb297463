"""Decodes what libsndfile does not know (MP4, WebM, AAC, WMA, AMR, video files, ...) by PyAV, of the extra `media`.

FFmpeg is told the format, and never probes for one: playlists and scripts among its formats name further files.

Times are those of the file: sound that begins later than the picture has silence in front. Of several audio tracks,
FFmpeg's choice is read, which is the one that is marked as the default, if any is.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from granite_jax.audio.resample import BLOCK_FRAMES, Blocks, Mixer, check_channels, check_rate, one_line, resample
from granite_jax.errors import AudioError

HEAD = 512
"""Bytes of a file by which its format is recognized."""
_SLACK = 0.5  # seconds that a header's duration and the decoded audio can differ by
_MIN_LEAD = 0.1  # seconds that sound begins after the file at least, to be more than a codec's delay
_PREROLL = 1.0  # seconds before a segment that are decoded, because lossy decoders depend on what was before


class MediaFormat(NamedTuple):
    """A format: its name for messages, and FFmpeg's demuxer."""

    name: str
    demuxer: str


_FORMATS = {
    rb"....(?:ftyp|moov|mdat|wide|free|skip|pnot)": MediaFormat("MP4 or QuickTime", "mov"),
    rb"\x1a\x45\xdf\xa3": MediaFormat("WebM or Matroska", "matroska"),
    rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11": MediaFormat("WMA or WMV", "asf"),
    rb"#!AMR": MediaFormat("AMR", "amr"),
    rb"\xff[\xf0\xf1\xf8\xf9]": MediaFormat("AAC", "aac"),
    rb"RIFF....AVI ": MediaFormat("AVI", "avi"),
    rb"FLV\x01": MediaFormat("Flash video", "flv"),
    rb"\x47.{187}\x47.{187}\x47": MediaFormat("an MPEG transport stream", "mpegts"),
    rb"\x00\x00\x01\xba": MediaFormat("an MPEG program stream", "mpeg"),
    rb"\x0b\x77": MediaFormat("AC-3", "ac3"),
    rb"wvpk": MediaFormat("WavPack", "wv"),
    rb"MAC \x96|MAC [^\x00]\x0f": MediaFormat("Monkey's Audio", "ape"),
    rb"TTA1": MediaFormat("True Audio", "tta"),
}
# Of libsndfile, too, but with codecs that only FFmpeg has.
_SHARED_FORMATS = {
    rb"RIFF....WAVE": MediaFormat("WAV with this codec", "wav"),
    rb"OggS": MediaFormat("Ogg with this codec", "ogg"),
    rb"caff": MediaFormat("CAF with this codec", "caf"),
    rb"FORM....AIF[FC]": MediaFormat("AIFF with this codec", "aiff"),
}


def read_head(file: BinaryIO) -> bytes:
    """The first bytes of a file behind an ID3v2 tag, which not only MP3 files have."""
    file.seek(0)
    head = file.read(HEAD)
    if head.startswith(b"ID3") and len(head) >= 10:
        file.seek(10 + sum((byte & 127) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True)))
        head = file.read(HEAD)
    return head


def media_format(head: bytes, *, shared: bool = False) -> MediaFormat | None:
    """The format of a file that begins with `head`, if it is one of FFmpeg's.

    Args:
      shared: look among the formats that libsndfile reads with other codecs.
    """
    formats = _SHARED_FORMATS if shared else _FORMATS
    return next((found for pattern, found in formats.items() if re.match(pattern, head, re.DOTALL)), None)


def decode_media(
    file: BinaryIO,
    kind: MediaFormat,
    sampling_rate: float | None,
    limit: float,
    offset: float = 0.0,
    duration: float | None = None,
    channel: int | None = None,
) -> Blocks:
    """Decodes an audio track in blocks. Arguments, result and errors are those of `decode.decode`."""
    return _Decoder(file, kind, sampling_rate, limit, offset, duration, channel).decode()


def num_media_channels(file: BinaryIO, kind: MediaFormat) -> int:
    """The channels of the audio track's first frame: headers of AAC can tell half of them."""
    with _Decoder(file, kind).open() as (av, container), contextlib.closing(_blocks(av, container)) as blocks:
        return blocks.num_channels


class _Decoder(NamedTuple):
    file: BinaryIO
    kind: MediaFormat
    sampling_rate: float | None = None
    limit: float = math.inf
    offset: float = 0.0
    duration: float | None = None
    channel: int | None = None

    def decode(self) -> Blocks:
        if self.offset > _PREROLL:
            with contextlib.suppress(_NoSeekError):
                return (yield from self._decode(seek=True))
        return (yield from self._decode(seek=False))

    def _decode(self, *, seek: bool) -> Blocks:
        """_NoSeekError is raised before any block is yielded."""
        with self.open() as (av, container), contextlib.ExitStack() as stack:
            from av.error import FFmpegError

            blocks = stack.enter_context(contextlib.closing(_blocks(av, container)))
            rate, lead, zero = blocks.rate, blocks.lead, blocks.start - blocks.lead
            if seek:
                if self.offset - _PREROLL < lead / rate:
                    raise _NoSeekError
                try:
                    container.seek(int((self.offset - _PREROLL) * 1e6))
                    blocks = stack.enter_context(contextlib.closing(_blocks(av, container)))
                    blocks.lead = 0
                except (FFmpegError, AudioError):
                    raise _NoSeekError from None
            if self.sampling_rate is not None and check_rate(self.sampling_rate) != rate:
                raise AudioError(
                    f"has a sampling rate of {rate:g} Hz, but sampling_rate={self.sampling_rate!r} was given"
                )
            skip = round(self.offset * rate)
            take = None if self.duration is None else max(1, round(self.duration * rate))
            position = blocks.start - blocks.lead - zero
            if position > skip:
                raise _NoSeekError
            skip -= position
            mixer, num_samples = Mixer(self.channel), 0
            for block in resample(mixer(_cut(blocks, skip, take)), rate, self.limit):
                num_samples += len(block)
                yield block
            flags = mixer.flags
            flags += ("one-track",) if len(container.streams.audio) > 1 else ()
            if take is not None and blocks.num_frames >= skip + take:
                return flags
            is_truncated = blocks.error is not None
            if blocks.error is not None and not (self._is_at_end() and blocks.num_frames > blocks.lead):
                raise AudioError(f"is damaged ({blocks.error})")
            seconds = _declared_seconds(container, _track(container), lead / rate)
            if seconds is not None:
                is_truncated |= (position + blocks.num_frames) / rate < seconds - _SLACK
            if self.offset and num_samples == 0:
                raise AudioError(f"has no audio at {self.offset:g} seconds")
            return ("truncated-input", *flags) if is_truncated else flags

    @contextlib.contextmanager
    def open(self) -> Iterator[tuple[ModuleType, Any]]:
        try:
            import av
            from av.error import FFmpegError
        except ImportError:
            raise AudioError(f"is {self.kind.name}, which needs pip install 'granite-jax[media]'") from None
        self.file.seek(0)
        try:
            with av.open(_Readable(self.file), format=self.kind.demuxer, **_metadata_option(av)) as container:
                yield av, container
        except FFmpegError as error:
            raise AudioError(f"is not {self.kind.name} that can be read ({one_line(error.strerror)})") from error

    def _is_at_end(self) -> bool:
        position = self.file.tell()
        return self.file.read(1) == b"" or position == 0


def _track(container: Any) -> Any:
    if not container.streams.audio:
        raise AudioError("has no audio track")
    return container.streams.best("audio") or container.streams.audio[0]


def _blocks(av: ModuleType, container: Any) -> _Blocks:
    return _Blocks(av, container, _track(container))


class _NoSeekError(Exception):
    """The format does not allow to begin amid the recording, or does not tell where it did."""


class _Blocks:
    """The decoded blocks of a track, float32 `[n, channels]` each.

    Fields:
      rate: in Hz, as the decoder has it: headers of AAC can tell half of it.
      num_channels: of the first frame.
      start: the time of the first frame, in frames of the file's clock.
      lead: frames of silence that come first, because the track begins after the file.
      num_frames: frames that were yielded.
      error: why decoding ended, if an error ended it.
    """

    def __init__(self, av: ModuleType, container: Any, track: Any):
        self._av = av
        self._frames = container.decode(track)
        self._first = next(self._frames, None)
        if self._first is None:
            raise AudioError("holds no samples")
        self.rate = check_rate(self._first.sample_rate)
        self.num_channels: int = self._first.layout.nb_channels
        check_channels(self.num_channels)
        self.num_frames, self.error = 0, None
        self.start, self.lead = 0, 0
        if self._first.pts is not None:
            self.start = round(float(self._first.pts * self._first.time_base) * self.rate)
            self.lead = self._lead(container)

    def _lead(self, container: Any) -> int:
        if container.start_time is None or container.duration is None:
            return 0
        lead = self.start - round(container.start_time / 1e6 * self.rate)
        # What begins when the file has ended has a broken clock.
        return lead if _MIN_LEAD <= lead / self.rate < container.duration / 1e6 else 0

    def __iter__(self) -> Iterator[np.ndarray]:
        from av.error import FFmpegError

        resampler = self._av.AudioResampler(format="fltp")
        while self.num_frames < self.lead:
            silence = np.zeros((min(BLOCK_FRAMES, self.lead - self.num_frames), self.num_channels), np.float32)
            self.num_frames += len(silence)
            yield silence
        try:
            for frame in itertools.chain([self._first], self._frames):
                yield from self._converted(resampler, frame)
        except FFmpegError as error:
            self.error = one_line(error.strerror)
        except ValueError:  # of the resampler
            raise AudioError("changes its sampling rate or channels within the recording") from None

    def close(self) -> None:
        """Ends decoding."""
        self._frames.close()

    def _converted(self, resampler: Any, frame: Any) -> Iterator[np.ndarray]:
        for converted in resampler.resample(frame):
            block = converted.to_ndarray().T
            self.num_frames += len(block)
            yield block


def _cut(blocks: _Blocks, skip: int, take: int | None) -> Iterator[np.ndarray]:
    """The blocks without their first `skip` frames, and at most `take` of them."""
    position = 0
    for block in blocks:
        low = max(0, skip - position)
        high = len(block) if take is None else min(len(block), skip + take - position)
        position += len(block)
        if low < high:
            yield block[low:high]
        if take is not None and position >= skip + take:
            return


def _declared_seconds(container: Any, track: Any, lead: float) -> float | None:
    """When the track ends according to its header; None where that is missing or an estimate.

    Args:
      lead: seconds before its beginning, which lengths of tracks in MP4 do not contain.
    """
    if container.format.name in ("aac", "amr", "ac3", "mpegts", "mpeg", "flv"):
        return None
    is_filled_in = "matroska" in container.format.name  # from the whole file, whose picture can go on
    if track.duration is not None and track.time_base is not None and not is_filled_in:
        return float(track.duration * track.time_base) + (lead if "mp4" in container.format.name else 0.0)
    clock = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", track.metadata.get("DURATION", ""))
    if clock is not None:
        return int(clock[1]) * 3600 + int(clock[2]) * 60 + float(clock[3])
    is_alone = len(container.streams) == 1
    return container.duration / 1e6 if is_alone and container.duration is not None else None


def _metadata_option(av: ModuleType) -> dict[str, Any]:
    """Lets tags be in another encoding than UTF-8: since its version 19, PyAV always does."""
    return {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


class _Readable:
    """A file without its name, by which FFmpeg would look for others."""

    def __init__(self, file: BinaryIO):
        self.read, self.seek, self.tell = file.read, file.seek, file.tell
