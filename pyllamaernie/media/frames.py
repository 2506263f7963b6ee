"""What ERNIE 4.5 does to the frames of a video, as plain functions: choose, write the time, resize, pack.

Nothing is decoded here. The rules are Baidu's own (sampling, time text, sizes); where transformers' processor differs,
the docstring says so.
Source: PaddlePaddle/ERNIE and FastDeploy, `ernie4_5_vl_processor`; transformers 5.23,
`video_processing_ernie4_5_vl_moe`.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from pyllamaernie.errors import MediaError
from pyllamaernie.media.image import check_sides

FACTOR = 28  # patch size 14, two patches merged in each direction
MIN_PIXELS = 299 * FACTOR * FACTOR  # of one frame
MAX_PIXELS = 1196 * FACTOR * FACTOR
FPS = 2.0
MIN_FRAMES = 16
MAX_FRAMES = 180
TIME_SCALE = 0.1  # font height over the shorter side; stroke width over the font height
FONT_VARIABLE = "PYLLAMAERNIE_FONT"
MAGIC = b"ERNIEVID"
VERSION = 1
_HEADER = struct.Struct("<8s4I")


def sample(
    n_total: int,
    rate: float,
    *,
    fps: float = FPS,
    min_frames: int = MIN_FRAMES,
    max_frames: int = MAX_FRAMES,
) -> list[int]:
    """Indices of the frames that Baidu's processor takes from `n_total` frames at `rate` frames per second.

    int(duration * fps) frames are wanted. From `min_frames` to `max_frames` of them: the frame nearest to every
    multiple of 1/fps seconds (a half rounds to even), so there may be one more than `max_frames`. Outside: exactly that
    limit, by `sample_by_count`. transformers spaces the clamped count evenly in both cases and rounds down.
    """
    duration = n_total / rate
    n_wanted = int(duration * fps)
    if n_wanted < min_frames:
        return sample_by_count(n_total, min_frames)
    if n_wanted > max_frames:
        return sample_by_count(n_total, max_frames)
    indices = np.around(np.arange(0, duration, 1 / fps) * rate).astype(np.int64)
    return [int(index) for index in indices if index < n_total]


def sample_by_count(n_total: int, n_wanted: int) -> list[int]:
    """The first frame of each of `n_wanted` nearly equal intervals of the frames, or all if there are fewer."""
    edges = np.linspace(0, n_total, min(n_wanted, n_total) + 1).astype(np.int64)
    return [int(index) for index in edges[:-1]]


def time_text(seconds: float) -> str:
    """What is written into a frame, such as "time: 00:01:05.50". Like the reference, 59.999 gives "00:00:60.00"."""
    return f"time: {int(seconds // 3600):02d}:{int(seconds % 3600 // 60):02d}:{seconds % 60:05.2f}"


def draw_time(rgb: np.ndarray, seconds: float) -> np.ndarray:
    """A copy of the frame with its time at the top left, black with a white edge; frames under 10 pixels have no room.

    Shapes: (height, width, 3) uint8 -> the same.
    """
    size = int(min(rgb.shape[:2]) * TIME_SCALE)
    if size < 1:
        return rgb
    image = PIL.Image.fromarray(rgb)
    PIL.ImageDraw.Draw(image).text(
        (0, 0),
        time_text(seconds),
        font=_font(find_font(), size),
        fill=(0, 0, 0),
        stroke_width=int(size * TIME_SCALE),
        stroke_fill=(255, 255, 255),
    )
    return np.asarray(image)


def find_font() -> Path | None:
    """Roboto-Regular: the file that PYLLAMAERNIE_FONT names, else of the package `font-roboto`; None if there is none.

    Raises: MediaError where PYLLAMAERNIE_FONT names no file.
    """
    named = os.environ.get(FONT_VARIABLE)
    if named:
        if not os.path.isfile(named):
            raise MediaError(f"{FONT_VARIABLE} names {named!r}, which is not a file; name a TrueType font or unset it")
        return Path(named)
    found = importlib.util.find_spec("font_roboto")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "files" / "Roboto-Regular.ttf"
    return path if path.is_file() else None


@functools.lru_cache(maxsize=8)
def _font(path: Path | None, size: int) -> PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont:
    if path is None:
        _warn_of_font()
        return PIL.ImageFont.load_default(size)
    try:
        return PIL.ImageFont.truetype(os.fspath(path), size)
    except OSError as error:
        raise MediaError(f"{path}: not a font that Pillow can read: {error}") from None


@functools.lru_cache(maxsize=1)
def _warn_of_font() -> None:
    warnings.warn(
        "the font Roboto is not installed, so times are written into video frames in Pillow's own font, which ERNIE "
        "was not trained on; `pip install 'pyllamaernie[video]'` brings it, or name a Roboto-Regular.ttf in "
        f"{FONT_VARIABLE}",
        UserWarning,
        stacklevel=2,
    )


def check_size(width: int, height: int) -> None:
    """Raise MediaError for a frame that is too long for its width."""
    check_sides(width, height, "video frames of {} are", MediaError)


def check_limits(min_pixels: int, max_pixels: int) -> None:
    """Raise MediaError unless 1 <= min_pixels <= max_pixels and at least one token fits."""
    for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise MediaError(f"{name} is a whole number, got {value!r}")
    if not 1 <= min_pixels <= max_pixels or max_pixels < FACTOR * FACTOR:
        raise MediaError(
            f"pixel limits need 1 <= min_pixels <= max_pixels and max_pixels >= {FACTOR * FACTOR}, "
            f"got {min_pixels} and {max_pixels}"
        )


def smart_resize(
    width: int, height: int, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """The (width, height) that a picture or frame is stretched to: multiples of 28 with an area inside the limits.

    Halves round to even. Each side is at least 28. Raises: MediaError (`check_size`, `check_limits`).
    """
    check_size(width, height)
    check_limits(min_pixels, max_pixels)
    new_width = max(FACTOR, round(width / FACTOR) * FACTOR)
    new_height = max(FACTOR, round(height / FACTOR) * FACTOR)
    if new_width * new_height > max_pixels:
        scale = math.sqrt(width * height / max_pixels)
        new_width = max(FACTOR, math.floor(width / scale / FACTOR) * FACTOR)
        new_height = max(FACTOR, math.floor(height / scale / FACTOR) * FACTOR)
    elif new_width * new_height < min_pixels:
        scale = math.sqrt(min_pixels / (width * height))
        new_width = math.ceil(width * scale / FACTOR) * FACTOR
        new_height = math.ceil(height * scale / FACTOR) * FACTOR
    return new_width, new_height


def resize(rgb: np.ndarray, width: int, height: int) -> np.ndarray:
    """The frame stretched to width x height with Pillow's bicubic filter; the frame itself where it fits already.

    Shapes: (any, any, 3) uint8 -> (height, width, 3) uint8.
    """
    if rgb.shape[:2] == (height, width):
        return rgb
    return np.asarray(PIL.Image.fromarray(rgb).resize((width, height), PIL.Image.Resampling.BICUBIC))


def pack(frames: np.ndarray) -> bytes:
    """The container that the native side reads: magic, then version, n_frames, width, height as u32, then the pixels.

    Shapes: (n_frames, height, width, 3) uint8. Little-endian; RGB, row by row, without padding.
    """
    n_frames, height, width, _ = frames.shape
    return _HEADER.pack(MAGIC, VERSION, n_frames, width, height) + frames.tobytes()


def unpack(data: bytes) -> np.ndarray:
    """The frames in a container. Shapes: (n_frames, height, width, 3) uint8. Raises: MediaError."""
    if len(data) < _HEADER.size or data[:8] != MAGIC:
        raise MediaError(f"not a container of frames: no {MAGIC!r} and header of {_HEADER.size} bytes at its start")
    _, version, n_frames, width, height = _HEADER.unpack_from(data)
    if version != VERSION:
        raise MediaError(f"a container of frames has version {version}; this build reads version {VERSION}")
    expected = _HEADER.size + n_frames * height * width * 3
    if 0 in (n_frames, width, height) or len(data) != expected:
        raise MediaError(
            f"a container of {n_frames} frames of {width}x{height} needs {expected} bytes and has no 0 among these; "
            f"it has {len(data)} bytes"
        )
    return np.frombuffer(data, np.uint8, offset=_HEADER.size).reshape(n_frames, height, width, 3)
