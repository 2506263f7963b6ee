"""Frames out of video files: PyAV for videos, Pillow for animated pictures. No sampling rule lives here.

The file is opened here and handed to the decoder as a stream, and the decoder may open nothing else: a playlist
that names other files or addresses is refused. PyAV is the optional package `av`, imported when a video is opened.
Order of frames is the order in which they are shown; rotation stored in the file is applied; pixels that are not square
are not stretched (the reference does not either).
"""

from __future__ import annotations

import bisect
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Protocol

import numpy as np
import PIL.Image

from pyllamaernie.errors import MediaError
from pyllamaernie.media.image import PIXELS_MAX, rgb_of_pil

INSTALL = "pip install 'pyllamaernie[video]'"
RATE_UNKNOWN = 24.0  # what transformers assumes
FRAMES_LISTED_MAX = 5_000_000  # a day and a half at 40 per second: a way to fill the memory rather than a video
SEEK_FRAMES_MIN = 16  # frames that a jump must save


class Clip(Protocol):
    """An opened video. `rate` is its average number of frames per second."""

    n_frames: int
    rate: float

    def read(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """The wanted frames that can be decoded, as (index, (height, width, 3) uint8), in ascending order."""


def open_clip(source: BinaryIO, name: str) -> Clip:
    """The video in a seekable binary file. Raises: MediaError, naming what is wrong with it."""
    head = source.read(16)
    source.seek(0)
    if not head:
        raise MediaError(f"{name}: empty, 0 bytes")
    if head[:6] in (b"GIF87a", b"GIF89a") or head[:8] == b"\x89PNG\r\n\x1a\n" or head[8:12] == b"WEBP":
        return AnimatedPicture(source, name)
    return VideoFile(source, name)


class AnimatedPicture:
    """A GIF, WebP or PNG; a still one is a clip of one frame."""

    def __init__(self, source: BinaryIO, name: str) -> None:
        self._name = name
        duration_ms = 0.0
        self.n_frames = 0
        try:
            self._image = PIL.Image.open(source)
            _check_pixels(*self._image.size, name)
            for index in range(int(getattr(self._image, "n_frames", 1))):
                self._image.seek(index)
                self._image.load()  # a WebP tells how long a frame lasts only now
                duration_ms += float(self._image.info.get("duration", 0) or 0)
                self.n_frames += 1
        except MediaError:
            raise
        except Exception as error:  # whatever a parser of foreign bytes comes up with
            if self.n_frames == 0:
                raise MediaError(f"{name}: broken animation: {error}") from None
            _warn(f"{name} is cut short or damaged: only its first {self.n_frames} frames are there")
        self.rate = self.n_frames * 1000 / duration_ms if duration_ms > 0 else RATE_UNKNOWN

    def read(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        for index in sorted(set(indices)):
            try:
                self._image.seek(index)
                rgb = rgb_of_pil(self._image.copy())
            except Exception:
                return  # the caller says how many are missing
            yield index, rgb


class _SeekMissed(Exception):
    """A jump landed behind the frame it was for."""


class VideoFile:
    """What PyAV can open. The packets are listed first, so that the number of frames is counted and not believed."""

    def __init__(self, source: BinaryIO, name: str) -> None:
        self._av = _import_av(name)
        # PyAV lets IndexError through where a damaged file shows a new stream; ValueError is its word for odd numbers
        self._damage = (self._av.error.FFmpegError, IndexError, ValueError, OverflowError)
        self._source = source
        self._name = name
        with self._open() as container:
            stream = self._stream(container)
            _check_pixels(stream.codec_context.width, stream.codec_context.height, name)
            packets = self._packets(container, stream)
            rates = (stream.average_rate, stream.guessed_rate, stream.base_rate)
            self.rate = next((float(rate) for rate in rates if rate), RATE_UNKNOWN)
            n_declared, span_s = stream.frames, self._span(container, stream)
            tick_s = float(stream.time_base or 0)
        self.n_frames = len(packets)
        if self.n_frames == 0:
            raise MediaError(f"{name}: its video stream has no frames")
        times = [pts for pts, _ in packets if pts is not None]
        # order of showing, and where decoding may begin; empty where the file has no usable times
        ordered = len(set(times)) == len(packets)
        self._shown: list[int] = sorted(times) if ordered else []
        self._index_of = {pts: index for index, pts in enumerate(self._shown)}
        self._keys = sorted(self._index_of[pts] for pts, is_key in packets if is_key and pts in self._index_of)
        seen_s = (self._shown[-1] - self._shown[0]) * tick_s if ordered else span_s
        if n_declared > self.n_frames:
            _warn(f"{name} is cut short: {self.n_frames} of its {n_declared} frames are there")
        elif seen_s < 0.9 * span_s - 0.5:
            _warn(f"{name} is cut short or damaged: its pictures end after {seen_s:.2f} of {span_s:.2f} s")

    def read(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        wanted = sorted(set(indices))
        while wanted:
            try:
                with self._open() as container:
                    for index, frame in self._decode(container, wanted):
                        _check_pixels(frame.width, frame.height, self._name)
                        turns = round((frame.rotation or 0) / 90) % 4
                        yield index, np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
                return
            except _SeekMissed:
                self._keys = []  # the rest without jumps

    def _decode(self, container: Any, wanted: list[int]) -> Iterator[tuple[int, Any]]:
        """The wanted frames, taken off the list as they come; where the next is far away, from the key frame before."""
        stream = self._stream(container)
        position = sought = 0  # of the next frame out of the decoder; the furthest frame jumped to
        while wanted:
            jumped = self._key_before(wanted[0]) > max(position, sought) + SEEK_FRAMES_MIN
            if jumped:
                position = sought = self._key_before(wanted[0])
                self._seek(container, stream, sought)
            for frame in self._frames(container, stream):
                index = self._index_of.get(frame.pts, position)
                if jumped and index > wanted[0]:
                    raise _SeekMissed
                jumped = False
                position = index + 1
                while wanted and wanted[0] < index:
                    wanted.pop(0)  # lost to damage
                if wanted and wanted[0] == index:
                    yield wanted.pop(0), frame
                if not wanted or self._key_before(wanted[0]) > max(position, sought) + SEEK_FRAMES_MIN:
                    break
            else:
                return

    def _key_before(self, index: int) -> int:
        return self._keys[max(0, bisect.bisect_right(self._keys, index) - 1)] if self._keys else 0

    def _seek(self, container: Any, stream: Any, key: int) -> None:
        try:
            container.seek(self._shown[key], stream=stream)
        except self._damage:
            raise _SeekMissed from None

    def _open(self) -> Any:
        self._source.seek(0)
        try:
            return self._av.open(self._source, metadata_errors="ignore", options={"protocol_whitelist": "none"})
        except self._damage as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise MediaError(f"{self._name}: not a video that can be read: {reason}") from None

    def _stream(self, container: Any) -> Any:
        attached = self._av.stream.Disposition.attached_pic  # the cover of a piece of music is no video
        for stream in container.streams.video:
            if not stream.disposition & attached:
                if stream.codec_context is None:
                    raise MediaError(f"{self._name}: the coding of its video stream is not known to this PyAV")
                stream.thread_type = "AUTO"
                return stream
        kinds = sorted({"cover" if stream.type == "video" else stream.type for stream in container.streams}) or ["none"]
        raise MediaError(f"{self._name}: it has no video stream; its streams are: {', '.join(kinds)}")

    def _packets(self, container: Any, stream: Any) -> list[tuple[int | None, bool]]:
        """Time and key flag of every frame's packet, in file order, up to the first damage."""
        packets: list[tuple[int | None, bool]] = []
        try:
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    packets.append((packet.pts, packet.is_keyframe))
                if len(packets) > FRAMES_LISTED_MAX:
                    raise MediaError(f"{self._name}: more than {FRAMES_LISTED_MAX} frames; cut it first")
        except MediaError:
            raise
        except self._damage as error:
            _warn(f"{self._name} is damaged after {len(packets)} frames: {error}")
        return packets

    def _span(self, container: Any, stream: Any) -> float:
        """How long the file says that it lasts, in seconds; 0 where it does not."""
        if stream.duration and stream.time_base:
            return float(stream.duration * stream.time_base)
        return float((container.duration or 0) / self._av.time_base)

    def _frames(self, container: Any, stream: Any) -> Iterator[Any]:
        try:
            for packet in container.demux(stream):
                try:
                    yield from packet.decode()
                except self._damage:
                    continue  # one broken packet; the next key frame heals the picture
        except self._damage:
            return


def _import_av(name: str) -> Any:
    try:
        import av
    except ImportError:
        raise MediaError(f"{name}: decoding a video needs PyAV; `{INSTALL}` brings it") from None
    return av


def _check_pixels(width: int, height: int, name: str) -> None:
    if width * height > PIXELS_MAX:
        raise MediaError(
            f"{name}: frames of {width}x{height} have more than {PIXELS_MAX} pixels; make it smaller first"
        )


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=6)
