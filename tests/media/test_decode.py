"""Decoding: the frames that are in a file come out as they are shown, and broken files give the documented result."""

from __future__ import annotations

import io
import re
import sys
import warnings
from pathlib import Path

import clips
import numpy as np
import PIL.Image
import pytest

from pyllamaernie.errors import MediaError
from pyllamaernie.media.decode import VideoFile
from pyllamaernie.media.video import Video

pytestmark = pytest.mark.filterwarnings("ignore:the font Roboto")


def test_far_apart_frames_are_reached_by_jumps_with_the_same_pixels() -> None:
    av = clips.require_av()
    if "libx264" not in av.codecs_available:
        pytest.skip("this PyAV has no libx264, whose order of frames is the hard one")
    frames = np.random.default_rng(3).integers(0, 256, (160, 3, 4, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    for format in ("mp4", "matroska", "mpegts"):
        for options in ({"g": "12", "bf": "3"}, {"g": "40", "x264-params": "open-gop=1:bframes=3"}):
            data = clips.clip(frames, format=format, codec="libx264", options=options)
            clip = VideoFile(io.BytesIO(data), "it")
            wanted = [0, 37, 90, 91, 158]
            jumped = dict(clip.read(wanted))
            assert len(clip._keys) > 2 or format == "mpegts"
            whole = dict(VideoFile(io.BytesIO(data), "it").read(range(160)))
            assert sorted(jumped) == wanted and sorted(whole) == list(range(160))
            for index in wanted:
                assert np.array_equal(jumped[index], whole[index])


def test_rotation_in_the_file_is_applied() -> None:
    frames = np.zeros((2, 48, 64, 3), np.uint8)
    frames[:, :, :32] = 255
    data = clips.turned_clockwise(clips.clip(frames), 64, 48)
    video = Video.of(data, draw_timestamps=False)
    shown = video.frames[0].rgb
    assert shown.shape == (64, 48, 3)  # the white left half is at the top now
    assert shown[:28].min() > 230 and shown[36:].max() < 25


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animated_pictures_need_no_pyav(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    frames = [PIL.Image.fromarray(frame) for frame in clips.grey_ramp(20)]
    buffer = io.BytesIO()
    options = {"lossless": True} if format == "WEBP" else {}
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:], duration=100, **options)
    video = Video.of(buffer.getvalue(), draw_timestamps=False)
    assert clips.indices(video) == [i * 20 // 16 for i in range(16)]
    assert video.fps_source == pytest.approx(10)
    frames[3].save(buffer := io.BytesIO(), format)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert clips.indices(Video.of(buffer.getvalue())) == [3]  # a still picture is one frame


def test_a_missing_pyav_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MediaError, match=r"pip install 'pyllamaernie\[video\]'"):
        Video.of(b"\0\0\0\x20ftypisom" + bytes(100))


def test_a_truncated_animation_gives_the_frames_that_are_there() -> None:
    frames = [PIL.Image.fromarray(frame) for frame in clips.grey_ramp(20)]
    frames[0].save(buffer := io.BytesIO(), "GIF", save_all=True, append_images=frames[1:], duration=100)
    with pytest.warns(UserWarning, match="cut short"):
        found = clips.indices(Video.of(buffer.getvalue()[: len(buffer.getvalue()) * 2 // 3]))
    assert 8 <= len(found) < 20 and found == list(range(len(found)))
    with pytest.raises(MediaError, match="broken animation"):
        Video.of(buffer.getvalue()[:30])


def test_truncated_files() -> None:
    frames = np.random.default_rng(5).integers(0, 256, (30, 6, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    whole = clips.clip(frames)
    with pytest.raises(MediaError, match="not a video that can be read"):
        Video.of(whole[: len(whole) // 2])  # the table of contents is at the end
    for format, options, message in (
        ("mp4", {"movflags": "faststart"}, r"cut short: \d+ of its 30 frames are there"),
        ("matroska", {}, r"cut short or damaged: its pictures end after .* of 3\.0"),
    ):
        data = clips.clip(frames, format=format, options={"g": "5"}, container_options=options)
        complete = Video.of(data, min_frames=30, draw_timestamps=False)
        assert len(complete) == 30
        with pytest.warns(UserWarning) as said:
            video = Video.of(data[: len(data) // 2], draw_timestamps=False)
        assert re.search(message, str(said[0].message))
        assert 4 <= len(video) <= 16
        for frame, time in zip(video.frames, video.timestamps, strict=True):
            assert time < 2
            assert np.array_equal(frame.rgb, complete.frames[round(time * 10)].rgb)


def test_damaged_bytes_never_escape_as_another_error() -> None:
    rng = np.random.default_rng(4)
    for format in ("mp4", "matroska", "mpegts", "avi"):
        data = clips.clip(clips.grey_ramp(30), format=format, codec="mpeg4" if format == "avi" else None)
        for _ in range(12):
            broken = bytearray(data)
            for at in rng.integers(0, len(data), 40):
                broken[at] ^= int(rng.integers(1, 256))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    video = Video.of(bytes(broken), draw_timestamps=False)
                except MediaError:
                    continue
            assert 1 <= len(video) <= 180


def test_files_without_pictures() -> None:
    clips.require_av()
    with pytest.raises(MediaError, match="no video stream; its streams are: audio"):
        Video.of(clips.clip(clips.grey_ramp(0), audio=True))
    with pytest.raises(MediaError, match="no video stream; its streams are: audio, cover"):
        Video.of(clips.clip(clips.grey_ramp(1), audio=True, cover=True, codec="mjpeg", pixel_format="yuvj420p"))
    assert len(Video.of(clips.clip(clips.grey_ramp(3), audio=True))) == 3
    for data in (b"", b"hello world" * 100, bytes(5000), b"GIF89a" + bytes(30), b"RIFF\0\0\0\0WEBPVP8 "):
        with pytest.raises(MediaError):
            Video.of(data)


def test_a_playlist_opens_no_other_file(tmp_path: Path) -> None:
    clips.require_av()
    inner = tmp_path / "inner.ts"
    inner.write_bytes(clips.clip(clips.grey_ramp(3), format="mpegts"))
    for name, text in (
        ("a.m3u8", f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{inner}\n#EXT-X-ENDLIST\n"),
        ("b.m3u8", f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{inner}\n#EXT-X-ENDLIST\n"),
        ("c.ffconcat", "ffconcat version 1.0\nfile inner.ts\n"),
    ):
        (tmp_path / name).write_text(text)
        for source in (tmp_path / name, text.encode()):
            with pytest.raises(MediaError, match="not a video that can be read"):
                Video.of(source)
