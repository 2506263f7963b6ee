"""Videos: one value type, many ways in, and from there the frames that ERNIE 4.5 sees, times written into them.

Decoding is `decode`, the rules are `frames`; neither the compiled module nor torch is needed. `__main__` makes the
program of it that native programs run.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import itertools
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import PIL.Image

from pyllamaernie.errors import MediaError, UnsupportedInputError
from pyllamaernie.media import frames as rules
from pyllamaernie.media.decode import open_clip
from pyllamaernie.media.image import Image, data_url_bytes, fetch

MEMORY_BYTES_MAX = 2 << 30  # of frames at full size; with pixel limits they are made smaller while they are decoded
COUNT_MAX = 100_000  # of min_frames and max_frames
DATA_URL_TYPE = "video/x-ernie-frames"
# what Video.of takes besides its source, and a message part beside its video
OPTIONS = (
    "fps",
    "max_frames",
    "min_frames",
    "start",
    "end",
    "timestamps",
    "draw_timestamps",
    "min_pixels",
    "max_pixels",
)


class Video:
    """The chosen frames of one video, 8-bit RGB, in order, with their times in seconds.

    `frames` are Images with the time already written in (where it was), `timestamps` their times, `fps_source` the
    frames per second of what they were taken from. Native code never sees `frames` but `frames_array()`.
    """

    __slots__ = ("_limits", "_sha256", "fps_source", "frames", "timestamps")

    def __init__(
        self,
        frames: Iterable[Image],
        timestamps: Iterable[float],
        fps_source: float,
        limits: tuple[int, int] | None = None,
    ) -> None:
        self.frames = tuple(frames)
        self.timestamps = tuple(float(value) for value in timestamps)
        self.fps_source = float(fps_source)
        self._limits = limits
        self._sha256: str | None = None
        if not self.frames:
            raise MediaError("a video has at least one frame, got none")
        if len(self.frames) != len(self.timestamps):
            raise MediaError(f"{len(self.frames)} frames and {len(self.timestamps)} timestamps; one for each is needed")

    @classmethod
    def of(
        cls,
        source: Any,
        *,
        fps: float | None = None,
        max_frames: int = rules.MAX_FRAMES,
        min_frames: int = rules.MIN_FRAMES,
        start: float | None = None,
        end: float | None = None,
        timestamps: Sequence[float] | None = None,
        draw_timestamps: bool | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        allow_remote: bool = False,
    ) -> Video:
        """A video from a path, bytes, a data: or https URL, an open file, a list of frames, an array or another Video.

        Files are sampled as Baidu does: `fps` (default 2) frames per second, at least `min_frames` and at most
        `max_frames` (`frames.sample`); the time is drawn into each. Frames given in memory are all taken, up to
        `max_frames` evenly spaced ones; there `fps` is *their* rate, and the time is drawn only where `timestamps`
        or `fps` is given (without, they count as 2 per second). `draw_timestamps` overrides either.
        `start` and `end` cut to the times start <= t < end, in seconds. With pixel limits the frames are resized at
        once; without, by `frames_array`.

        Shapes: an array is (n_frames, height, width[, 1 | 3 | 4]), uint8 or float in [0, 1].
        Raises: MediaError, UnsupportedInputError (a remote URL without `allow_remote`).
        """
        limits = _limits(min_pixels, max_pixels)
        n_min, n_max = _counts(min_frames, max_frames)
        fps = _positive("fps", fps)
        window = _window(start, end)
        if isinstance(source, cls):
            return source._again(fps, n_max, window, timestamps, draw_timestamps, limits)
        data = _in_memory(source, allow_remote)
        if isinstance(data, np.ndarray):
            data = list(data)
        if isinstance(data, list):
            return cls._of_frames(data, fps, n_max, window, timestamps, draw_timestamps, limits, allow_remote)
        if timestamps is not None:
            raise MediaError("timestamps go with frames given in memory; a file has its own times")
        with _opened(data) as (file, name):
            clip = open_clip(file, name)
            first, last = _range(clip.n_frames, clip.rate, window, name)
            rate = fps or rules.FPS
            chosen = rules.sample(last - first, clip.rate, fps=rate, min_frames=n_min, max_frames=n_max)
            chosen = [first + index for index in chosen]
            draw = draw_timestamps is not False
            prepared = _Preparation(limits)
            duration = clip.n_frames / clip.rate
            # multiplied and divided in the reference's order, which decides the last digit
            times = {index: index * duration / clip.n_frames for index in chosen}
            decoded = {index: prepared(rgb, times[index] if draw else None) for index, rgb in clip.read(chosen)}
        kept = [index for index in chosen if index in decoded]
        if not kept:
            raise MediaError(f"{name}: none of its {clip.n_frames} frames can be decoded")
        if len(kept) < len(chosen):
            _warn(f"{name} is damaged: {len(chosen) - len(kept)} of the {len(chosen)} chosen frames are left out")
        return cls([decoded[index] for index in kept], [times[index] for index in kept], clip.rate, limits)

    @classmethod
    def _of_frames(
        cls,
        frames: list[Any],
        fps: float | None,
        n_max: int,
        window: tuple[float, float],
        timestamps: Sequence[float] | None,
        draw: bool | None,
        limits: tuple[int, int] | None,
        allow_remote: bool = False,
    ) -> Video:
        if not frames:
            raise MediaError("a video has at least one frame, got an empty list")
        rate = fps or rules.FPS
        times = [index / rate for index in range(len(frames))] if timestamps is None else _times(timestamps)
        if len(times) != len(frames):
            raise MediaError(f"{len(frames)} frames and {len(times)} timestamps; one for each is needed")
        inside = [index for index, time in enumerate(times) if window[0] <= time < window[1]]
        if not inside:
            raise MediaError(
                f"no frame lies in the time from {window[0]} to {window[1]} s; the last is at {times[-1]} s"
            )
        chosen = [inside[index] for index in rules.sample_by_count(len(inside), n_max)]
        if draw is None:
            draw = timestamps is not None or fps is not None
        prepared = _Preparation(limits)
        images = [
            prepared(Image.of(frames[index], allow_remote=allow_remote).rgb, times[index] if draw else None)
            for index in chosen
        ]
        return cls(images, [times[index] for index in chosen], rate, limits)

    def _again(
        self,
        fps: float | None,
        n_max: int,
        window: tuple[float, float],
        timestamps: Sequence[float] | None,
        draw: bool | None,
        limits: tuple[int, int] | None,
    ) -> Video:
        whole = fps is None and timestamps is None and window == (0.0, math.inf) and len(self.frames) <= n_max
        if whole and not draw and limits in (None, self._limits):
            return self
        times = self.timestamps if timestamps is None and fps is None else timestamps
        frames = [image.rgb for image in self.frames]
        return Video._of_frames(frames, fps, n_max, window, times, bool(draw), limits or self._limits)

    @property
    def sha256(self) -> str:
        """Digest of sizes and pixels, the same whatever form the frames came in."""
        if self._sha256 is None:
            digest = hashlib.sha256(f"video {len(self.frames)}:".encode())
            for frame in self.frames:
                digest.update(frame.sha256.encode())
            self._sha256 = digest.hexdigest()
        return self._sha256

    def size(self, min_pixels: int | None = None, max_pixels: int | None = None) -> tuple[int, int]:
        """(width, height) of all frames in `frames_array`, by the size of the first frame."""
        first = self.frames[0]
        limits = _limits(min_pixels, max_pixels) or self._limits or (rules.MIN_PIXELS, rules.MAX_PIXELS)
        if limits == self._limits:
            return first.width, first.height
        return rules.smart_resize(first.width, first.height, *limits)

    def n_tokens(self, min_pixels: int | None = None, max_pixels: int | None = None) -> int:
        """How many tokens the frames become, without the START and END around them."""
        width, height = self.size(min_pixels, max_pixels)
        return (len(self.frames) + 1) // 2 * (width // rules.FACTOR) * (height // rules.FACTOR)

    def frames_array(self, min_pixels: int | None = None, max_pixels: int | None = None) -> np.ndarray:
        """What the model sees: an even number of frames of one size; an odd last one is there twice.

        Limits are those of the projector; without, those given to `of`, else Baidu's 234416 and 937664.
        Shapes: (n_frames, height, width, 3) uint8.
        """
        width, height = self.size(min_pixels, max_pixels)
        n_frames = len(self.frames)
        shape = (n_frames + n_frames % 2, height, width, 3)
        if math.prod(shape) > MEMORY_BYTES_MAX:
            raise MediaError(
                f"{n_frames} frames of {width}x{height} take more than {MEMORY_BYTES_MAX} bytes; "
                "give fewer max_frames or smaller max_pixels"
            )
        result = np.empty(shape, np.uint8)
        for index, frame in enumerate(self.frames):
            result[index] = rules.resize(frame.rgb, width, height)
        if n_frames % 2:
            result[-1] = result[-2]
        return result

    def to_frames_bytes(self, min_pixels: int | None = None, max_pixels: int | None = None) -> bytes:
        """`frames_array` in the container that the native side reads (`frames.pack`)."""
        return rules.pack(self.frames_array(min_pixels, max_pixels))

    def to_data_url(self, min_pixels: int | None = None, max_pixels: int | None = None) -> str:
        """That container as a data: URL."""
        data = base64.b64encode(self.to_frames_bytes(min_pixels, max_pixels)).decode("ascii")
        return f"data:{DATA_URL_TYPE};base64,{data}"

    def __len__(self) -> int:
        return len(self.frames)

    def __repr__(self) -> str:
        first = self.frames[0]
        return f"Video({len(self.frames)} frames of {first.width}x{first.height}, {self.timestamps[-1]:.2f} s)"


class _Preparation:
    """Writes the time and resizes, frame by frame, to the size that the first frame sets; counts what is kept."""

    def __init__(self, limits: tuple[int, int] | None) -> None:
        self._limits = limits
        self._size: tuple[int, int] | None = None
        self._n_bytes = 0

    def __call__(self, rgb: np.ndarray, seconds: float | None) -> Image:
        height, width = rgb.shape[:2]
        rules.check_size(width, height)
        if seconds is not None:
            rgb = rules.draw_time(rgb, seconds)
        if self._limits is not None:
            if self._size is None:
                self._size = rules.smart_resize(width, height, *self._limits)
            rgb = rules.resize(rgb, *self._size)
        self._n_bytes += rgb.nbytes
        if self._n_bytes > MEMORY_BYTES_MAX:
            raise MediaError(
                f"the frames take more than {MEMORY_BYTES_MAX} bytes at {width}x{height}; "
                "give Video.of pixel limits, fewer max_frames or a shorter time"
            )
        return Image(rgb)


def _in_memory(source: Any, allow_remote: bool) -> Any:
    """The source as an array, a list of frames, bytes, a path or an open file."""
    if isinstance(source, np.ndarray):
        if source.ndim not in (3, 4):
            raise MediaError(f"a video array is (n_frames, height, width[, 1 | 3 | 4]), got shape {source.shape}")
        return source
    if isinstance(source, str):
        if source[:5].lower() == "data:":
            source = data_url_bytes(source)
        elif source.lower().startswith(("http://", "https://")):
            source = fetch(source, allow_remote, "videos")
        elif source.lower().startswith("file:"):
            raise UnsupportedInputError(f"file: URLs are not read ({source}); pass the path itself")
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        return rules.unpack(data) if data.startswith(rules.MAGIC) else data
    if isinstance(source, (str, os.PathLike)) or hasattr(source, "read"):
        return source
    if isinstance(source, (Image, PIL.Image.Image)) or not isinstance(source, Iterable):
        raise MediaError(
            f"cannot make a video from {type(source).__name__}; "
            "allowed: path, bytes, data: URL, open file, list of frames, numpy array, Video"
        )
    return list(source)


@contextlib.contextmanager
def _opened(source: Any) -> Iterator[tuple[BinaryIO, str]]:
    if isinstance(source, bytes):
        yield io.BytesIO(source), "the video"
    elif hasattr(source, "read"):
        data = source.read()
        if not isinstance(data, bytes):
            raise MediaError("the open file of a video is a binary one (mode 'rb')")
        yield io.BytesIO(data), str(getattr(source, "name", "the video"))
    else:
        name = os.fspath(source)
        try:
            file = open(source, "rb")
        except FileNotFoundError:
            raise MediaError(f"{name}: no such video") from None
        except (OSError, ValueError) as error:
            raise MediaError(f"{name!r}: cannot be read: {error}") from error
        with file:
            if file.read(len(rules.MAGIC)) == rules.MAGIC:
                raise MediaError(f"{name}: a container of frames; pass its bytes")
            file.seek(0)
            yield file, name


def _range(n_total: int, rate: float, window: tuple[float, float], name: str) -> tuple[int, int]:
    """First and past-the-last index of the frames whose times lie in the window."""
    first = math.ceil(window[0] * rate - 1e-6)
    last = n_total if math.isinf(window[1]) else min(n_total, math.ceil(window[1] * rate - 1e-6))
    if first >= last:
        raise MediaError(
            f"{name}: no frame lies in the time from {window[0]} to {window[1]} s; it lasts {n_total / rate:.3f} s"
        )
    return first, last


def _limits(min_pixels: int | None, max_pixels: int | None) -> tuple[int, int] | None:
    # one alone moves the other only where it must, to Baidu's ratio of 4
    if max_pixels is None:
        if min_pixels is None:
            return None
        rules.check_limits(min_pixels, 1 << 62)
        return int(min_pixels), max(rules.MAX_PIXELS, 4 * int(min_pixels))
    if min_pixels is None:
        rules.check_limits(1, max_pixels)
        return min(rules.MIN_PIXELS, int(max_pixels) // 4), int(max_pixels)
    rules.check_limits(min_pixels, max_pixels)
    return int(min_pixels), int(max_pixels)


def _counts(min_frames: Any, max_frames: Any) -> tuple[int, int]:
    for name, value in (("min_frames", min_frames), ("max_frames", max_frames)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 1 <= value <= COUNT_MAX:
            raise MediaError(f"{name} is a whole number from 1 to {COUNT_MAX}, got {value!r}")
    if min_frames == rules.MIN_FRAMES:
        min_frames = min(min_frames, max_frames)  # the default gives way to a lower maximum
    if min_frames > max_frames:
        raise MediaError(f"min_frames is at most max_frames, got {min_frames} and {max_frames}")
    return int(min_frames), int(max_frames)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
        raise MediaError(f"{name} is a finite number, got {value!r}")
    return float(value)


def _positive(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if not 1e-6 <= _number(name, value) <= 1e6:
        raise MediaError(f"{name} is from 0.000001 to 1000000, got {value!r}")
    return float(value)


def _window(start: Any, end: Any) -> tuple[float, float]:
    low = 0.0 if start is None else _number("start", start)
    high = math.inf if end is None else _number("end", end)
    if low < 0 or high <= low:
        raise MediaError(f"start and end need 0 <= start < end, got {start!r} and {end!r}")
    return low, high


def _times(timestamps: Sequence[float]) -> list[float]:
    times = [_number("a timestamp", value) for value in timestamps]
    if any(value < 0 for value in times) or any(b < a for a, b in itertools.pairwise(times)):
        raise MediaError("timestamps are seconds from 0 on that never go back")
    return times


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)
