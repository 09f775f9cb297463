"""Decodes parts of files by FFmpeg: packet by packet, so that one that is damaged is all that is lost.

FFmpeg is given the format, and never probes for one: playlists and scripts among its formats name further files.

Times are those of the file: sound that begins later than the picture has silence in front. Of several audio tracks,
FFmpeg's choice is read, which is the one that is marked as the default, if any is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, cast

import av
import numpy as np
from av.error import FFmpegError

from granite_jax.audio.clock import Sound
from granite_jax.audio.parts import Part
from granite_jax.audio.resample import BLOCK_FRAMES
from granite_jax.audio.views import UnreadableError, View
from granite_jax.errors import AudioError, one_line

_MIN_LEAD = 0.1  # seconds that sound begins after the file at least, to be more than a codec's delay
_MAX_LOST = 10.0  # seconds that can be missing from the beginning of Ogg; others' clocks begin later
_PREROLL = 1.0  # seconds before what is wanted that are decoded, because lossy decoders depend on what was before
_DTYPES = {"u8": np.uint8, "s16": np.int16, "s32": np.int32, "flt": np.float32, "dbl": np.float64}
_MAX_PLANES = 7  # behind eight, PyAV takes memory that is not the frame's for more of them
_JOINED = BLOCK_FRAMES // 2  # samples that are handed on at once
_JITTER = 0.05  # seconds by which times of sounds that follow each other can differ from their lengths
_MAX_ERRORS = 10_000  # of a demuxer
# PyAV has always replaced since version 19 what is no UTF-8 in tags.
_METADATA: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
# Headers of these have no length, or one that is estimated from the size of the file.
_NO_LENGTH = ("mp3", "aac", "amr", "ac3", "dts", "truehd", "gsm", "rm", "mpegts", "mpeg", "flv", "ogg")


class NoSeekError(Exception):
    """The format does not allow to begin within the recording, or does not tell where it did."""


class FFmpegDecoder:
    """Decodes the audio track of a part, once.

    Fields:
      num_tracks: of audio, one of which is decoded.
      is_lossy: whether the codec may give samples beyond those that were encoded.
      has_failed: whether something behind the last sound could not be decoded; final at the end.
      skipped: seconds that were skipped; final at the end.
    """

    def __init__(self, view: View, part: Part):
        """Raises UnreadableError if FFmpeg does not know the format or its codec, and AudioError without a track."""
        assert part.format is not None
        self._view, self._part = view, part
        options = {}
        if part.format.demuxer == "wav":  # FFmpeg would look for other codecs in a megabyte of PCM
            options = {"max_size": "65536", "probesize": "2048"}
        try:
            file, demuxer = cast(Any, view), part.format.demuxer
            self._container: Any = av.open(file, format=demuxer, options=options, **_METADATA)
        except FFmpegError as error:
            view.check()
            raise UnreadableError(f"is not {part.format.name} that can be read ({one_line(error.strerror)})") from error
        tracks = self._container.streams.audio
        if not tracks:
            raise UnreadableError("has no audio track")
        self._track = self._container.streams.best("audio") or tracks[0]
        context = self._track.codec_context
        if context is None:
            raise UnreadableError(f"is {part.format.name} with a codec that is not known")
        self._is_flac = part.is_exact
        if context.name == "flac":  # whose frames have checksums
            context.options = {"err_detect": "crccheck+explode"}
        if view.knows_end:
            context.options = {"flags2": "+skip_manual"}
        self.num_tracks = len(tracks)
        self.is_lossy = not context.name.startswith(("pcm_", "wavpack"))
        self.has_failed, self.skipped = False, 0.0
        self._lead, self._delay, self._rate, self._tick = 0.0, 0, 0.0, float(self._track.time_base)
        self._block = 0  # samples of frames of FLAC that are numbered

    def close(self) -> None:
        """Closes the decoder."""
        self._container.close()

    @property
    def num_channels(self) -> int:
        """The channels of the first frame: headers of AAC can tell half of them. Decodes it."""
        for sound in self._decoded(-1.0, None):
            return sound.frames.shape[1]
        raise AudioError("holds no samples")

    @property
    def seconds(self) -> float | None:
        """When the track ends according to its header; None where that is missing or an estimate."""
        container, track = self._container, self._track
        if self._part.patches or container.format.name in _NO_LENGTH:
            return None
        is_filled_in = "matroska" in container.format.name  # from the whole file, whose picture can go on
        if track.duration is not None and track.time_base is not None and not is_filled_in:
            # Lengths of tracks in MP4 do not contain what is before their beginning.
            return float(track.duration * track.time_base) + (self._lead if "mp4" in container.format.name else 0.0)
        clock = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", track.metadata.get("DURATION", ""))
        if clock is not None:
            return int(clock[1]) * 3600 + int(clock[2]) * 60 + float(clock[3])
        is_alone = len(container.streams) == 1
        return container.duration / 1e6 if is_alone and container.duration is not None else None

    def sounds(self, skip: float = 0.0, *, seek: bool = False) -> Iterator[Sound]:
        """Decodes to the end, from at most a second before `skip` seconds on.

        Args:
          seek: go there, instead of reading what is before.

        Raises:
          NoSeekError: before anything is yielded: that is not possible.
          AudioError: the data is at fault.
        """
        wanted, zero = skip - _PREROLL, None
        if seek:
            first = next(self._decoded(-1.0, None), None)
            if first is None or first.time is None or wanted <= self._lead:
                raise NoSeekError
            zero = first.time - self._lead
            try:
                self._container.seek(int((wanted + zero) * 1e6))
            except FFmpegError:
                raise NoSeekError from None
        is_first, last = True, None
        for sound in _joined(self._decoded(wanted, zero)):
            if sound.time is not None:
                zero = sound.time - self._lead + self._delay / sound.rate if zero is None else zero
                time = sound.time - zero
                sound = _within(sound._replace(time=time), time, self._view.seconds(sound.rate))
                if len(sound.frames) == 0 or time + sound.seconds < wanted:
                    self.skipped = max(self.skipped, time + sound.seconds)
                    continue  # a codec's padding, or only decoded to learn when the track begins
            if is_first and seek and (sound.time is None or sound.time > skip):
                raise NoSeekError
            if is_first and not seek and wanted < self._lead:
                yield from _silence(max(0.0, wanted), self._lead, sound)
            is_first, last = False, sound
            yield sound
        if last is not None and last.time is not None:
            end = self._view.seconds(last.rate)
            if last.time + last.seconds + _MIN_LEAD < end < math.inf:  # pages are missing
                yield Sound(end - 1 / last.rate, last.frames[-1:] * 0, last.rate, follows_loss=True)
        if is_first and seek:
            raise NoSeekError  # it is not known how much is there
        if self.skipped and (seconds := self._view.seconds(self._rate)) < math.inf:
            self.skipped = seconds

    def _decoded(self, wanted: float, zero: float | None) -> Iterator[Sound]:
        """Decodes the first packet and what is not before `wanted`, counted from `zero`, which is the first's time."""
        self.has_failed, is_first = False, zero is None
        for packet in self._packets():
            time = self._time(packet)
            if not is_first and wanted > _PREROLL and time is not None and zero is not None:
                end = time + (packet.duration or 0) * self._tick - zero + self._lead - self._delay / self._rate
                if end < wanted:
                    self.skipped = end
                    continue
            try:
                decoded = packet.decode()
            except (FFmpegError, ValueError):  # the latter, of a codec that is not known
                self.has_failed = True
                continue
            for frame in decoded:
                if time is not None and frame.pts is not None and packet.pts is not None:
                    frame_time = time + (frame.pts - packet.pts) * self._tick
                else:  # of several frames in one packet, only the first has its time
                    frame_time, time = time, None
                try:
                    sound = Sound(frame_time, self._array(frame), frame.sample_rate, self.has_failed)
                except (FFmpegError, ValueError):  # what damage made of its channels
                    self.has_failed = True
                    continue
                if is_first:
                    self._begin(sound)
                    zero, is_first = sound.time, False
                self.has_failed = False
                yield sound
            if packet.pts is None and packet.size and self._is_flac:
                self.has_failed = True  # FLAC that is damaged, with whole frames behind it in one packet

    def _packets(self) -> Iterator[Any]:
        """The packets of the track, with errors between them or not."""
        for _ in range(_MAX_ERRORS):
            try:
                yield from self._container.demux(self._track)
                break
            except FFmpegError:
                self._view.check()
                self.has_failed = True
        self._view.check()

    def _time(self, packet: Any) -> float | None:
        """When a packet sounds, by its own clock or what else tells it, where FFmpeg counts what there is."""
        if self._is_flac and packet.size:
            self._block = self._block or packet.duration or 0
            return self._flac_time(bytes(memoryview(packet)[:16]))
        if packet.pos is None or packet.pts is None or self._container.format.name == "rm":
            return None  # of a packet that begins within another one of MPEG, FFmpeg guesses the time
        time = self._view.time(packet.pos) if self._view.has_clock else None
        return packet.pts * self._tick if time is None else time

    def _flac_time(self, header: bytes) -> float | None:
        """When a frame of FLAC sounds, by the number in its header, which is coded like UTF-8 (RFC 9639, 9.1.5)."""
        size = 8 - (~header[4] & 0xFF).bit_length()
        number = header[4] & 0x7F >> size
        for byte in header[5 : 4 + size]:
            number = number << 6 | byte & 0x3F
        return number * (1 if header[1] & 1 else self._block) * self._tick

    def _array(self, frame: Any) -> np.ndarray:
        """Its samples `[n, channels]`."""
        dtype = _DTYPES.get(frame.format.packed.name)
        if dtype is None:
            raise AudioError(f"has samples of an unknown kind ({frame.format.name})")
        num_channels = frame.layout.nb_channels
        if frame.format.is_planar and num_channels > _MAX_PLANES:
            (frame,) = av.AudioResampler(frame.format.packed.name).resample(frame)
        if frame.format.is_planar and num_channels > 1:
            return np.stack([np.frombuffer(plane, dtype, frame.samples) for plane in frame.planes], axis=1)
        return np.frombuffer(frame.planes[0], dtype, frame.samples * num_channels).reshape(-1, num_channels)

    def _begin(self, first: Sound) -> None:
        """Learns from the first sound when the track begins, and what of it is only a codec's."""
        self._rate = first.rate
        self._delay = len(first.frames) if self._view.knows_end else self._view.delay
        start, seconds = self._container.start_time, self._container.duration
        if first.time is None or self._part.is_framed:
            return
        if self._container.format.name == "ogg" and _MIN_LEAD <= first.time < _MAX_LOST:
            self._lead = first.time  # pages are missing
            self._view.lost.append((0.0, self._lead))
        if self._container.format.name == "ogg" or start is None or seconds is None:
            return
        lead = first.time - start / 1e6
        # What begins when the file has ended has a broken clock.
        self._lead = lead if _MIN_LEAD <= lead < seconds / 1e6 else 0.0


def _joined(sounds: Iterator[Sound]) -> Iterator[Sound]:
    """Sounds that follow each other, as fewer ones."""
    ready: list[Sound] = []
    size = 0
    for sound in sounds:
        if ready and (size >= _JOINED or not _follows(ready, size, sound)):
            yield _concatenated(ready)
            ready, size = [], 0
        ready.append(sound)
        size += len(sound.frames)
    if ready:
        yield _concatenated(ready)


def _concatenated(sounds: list[Sound]) -> Sound:
    if len(sounds) == 1:
        return sounds[0]
    return sounds[0]._replace(frames=np.concatenate([each.frames for each in sounds]))


def _follows(ready: list[Sound], size: int, sound: Sound) -> bool:
    first = ready[0]
    return (
        not sound.follows_loss
        and (
            sound.time is None
            or (first.time is not None and abs(sound.time - first.time - size / first.rate) < _JITTER)
        )
        and sound.rate == first.rate
        and sound.frames.dtype == first.frames.dtype
        and sound.frames.shape[1] == first.frames.shape[1]
    )


def _silence(start: float, end: float, like: Sound) -> Iterator[Sound]:
    """Silence in front of sound, in blocks."""
    position, last = round(start * like.rate), round(end * like.rate)
    while position < last:
        frames = np.zeros((min(BLOCK_FRAMES, last - position), like.frames.shape[1]), np.float32)
        yield Sound(position / like.rate, frames, like.rate)
        position += len(frames)


def _within(sound: Sound, time: float, end: float) -> Sound:
    """What of a sound at `time` is between 0 and `end` seconds."""
    if time >= 0.0 and time + sound.seconds <= end:
        return sound
    low = round(max(-time, 0.0) * sound.rate)
    high = len(sound.frames) if end == math.inf else max(low, round((end - time) * sound.rate))
    return sound._replace(time=max(time, 0.0), frames=sound.frames[low:high])
