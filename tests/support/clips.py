"""Small video files for the tests, made when a test runs. Not a test."""

from __future__ import annotations

import fractions
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllamaernie.media.video import Video


def require_av() -> Any:
    """PyAV, or a skip that says that it is missing."""
    return pytest.importorskip("av", reason="PyAV is not installed (extra `video`)")


def grey_ramp(n_frames: int, width: int = 64, height: int = 48, step: int = 8) -> np.ndarray:
    """Frame i is all grey of value i * step, so that a decoded frame tells its own index.

    Shapes: (n_frames, height, width, 3) uint8.
    """
    assert (n_frames - 1) * step < 256
    values = (np.arange(n_frames) * step).astype(np.uint8)
    return np.broadcast_to(values[:, None, None, None], (n_frames, height, width, 3)).copy()


def index_of(rgb: np.ndarray, step: int = 8) -> int:
    """Which frame of `grey_ramp` this is, after lossy compression and with the time written over a part."""
    return round(float(np.median(rgb)) / step)


def indices(video: Video, step: int = 8) -> list[int]:
    """Which frames of `grey_ramp` a video holds."""
    return [index_of(frame.rgb, step) for frame in video.frames]


def clip(
    frames: np.ndarray,
    *,
    rate: int = 10,
    format: str = "mp4",
    codec: str | None = None,
    times: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    pixel_format: str = "yuv420p",
    audio: bool = False,
    cover: bool = False,
) -> bytes:
    """The frames as a video file; `times` are presentation times in ticks of 1/rate, the default is one a tick.

    With `cover` the picture stream is marked as the cover of a piece of music.
    """
    av = require_av()
    codec = codec or next(name for name in ("libx264", "mpeg4") if name in av.codecs_available)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip.{format}"
        with av.open(path, "w", format=format, options=container_options or {}) as container:
            if len(frames):
                stream = container.add_stream(codec, rate=rate, options=options or {})
                stream.height, stream.width = frames.shape[1:3]
                stream.pix_fmt = pixel_format
                if cover:
                    stream.disposition = av.stream.Disposition.attached_pic
                stream.bit_rate = 2_000_000  # plenty, so that a grey level survives
            sound = container.add_stream("aac", rate=8000) if audio else None
            for index, rgb in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
                frame.pts = index if times is None else times[index]
                frame.time_base = fractions.Fraction(1, rate)
                container.mux(stream.encode(frame))
            if len(frames):
                container.mux(stream.encode())
            if sound is not None:
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                silence.sample_rate = 8000
                container.mux(sound.encode(silence))
                container.mux(sound.encode())
        return path.read_bytes()


def turned_clockwise(mp4: bytes, width: int, height: int) -> bytes:
    """The same file with the matrix of a telephone held upright: shown, its left side is at the top.

    The nine numbers of the track header (ISO/IEC 14496-12, 8.3.2), in 16.16 and 2.30 fixed point.
    """
    one = 1 << 16
    upright = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, one, 0, -one, 0, 0, height * one, 0, 1 << 30)
    at = mp4.index(upright, mp4.index(b"tkhd"))
    return mp4[:at] + turned + mp4[at + len(turned) :]
