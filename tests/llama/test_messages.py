"""Messages: every way of naming a picture or a video becomes the one part that the engine takes."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from pyllamaernie.errors import InputError, MediaError, UnsupportedInputError
from pyllamaernie.llama.messages import normalize
from pyllamaernie.media.image import Image
from pyllamaernie.media.video import Video

FRAMES = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
LIMITS = {"min_pixels": 3136, "max_pixels": 4842768}
VIDEO = Video.of(FRAMES, **LIMITS)


def load_video(source: Any, **options: Any) -> Video:
    return Video.of(source, **{**LIMITS, **options})


def content(*parts: Any) -> Any:
    return normalize([{"role": "user", "content": list(parts)}], Image.of, load_video=load_video)[0]["content"]


def url_of(media: Image | Video) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": media.to_data_url()}}


@pytest.mark.parametrize(
    "part",
    [
        VIDEO,
        Video.of(FRAMES),
        {"type": "video", "video": FRAMES},
        {"type": "video", "video": list(FRAMES)},
        {"type": "video", "video": VIDEO.to_data_url()},
        {"type": "video", "video": {"frames": FRAMES}},
        {"type": "video", "url": VIDEO.to_data_url()},
        {"type": "video", "video_path": {"path": VIDEO.to_data_url()}},
        {"type": "video_path", "video_path": VIDEO.to_data_url()},
        {"type": "video_url", "video_url": {"url": VIDEO.to_data_url()}},
        {"type": "video_url", "video_url": VIDEO.to_data_url()},
        {"type": "input_video", "input_video": {"url": VIDEO.to_data_url()}},
        {"type": "input_video", "video_url": VIDEO.to_data_url()},
        {"type": "input_video", "input_video": {"data": base64.b64encode(VIDEO.to_frames_bytes()).decode()}},
        {"type": "input_video", "input_video": {"data": VIDEO.to_data_url()}},
        {"type": "video", "video": FRAMES, "fps": None, "detail": "high"},
    ],
)
def test_every_way_of_naming_a_video_gives_its_frames(part: Any) -> None:
    assert content("Look: ", part) == [{"type": "text", "text": "Look: "}, url_of(VIDEO)]


def test_options_reach_the_video_from_the_part_and_from_its_mapping() -> None:
    timed = Video.of(FRAMES, timestamps=[1, 2, 3], **LIMITS)
    assert timed.sha256 != VIDEO.sha256
    assert content({"type": "video", "video": FRAMES, "timestamps": [1, 2, 3]}) == [url_of(timed)]
    few = Video.of(FRAMES, fps=10, max_frames=2, min_pixels=10_000, max_pixels=90_000)
    outside = {"fps": 10, "max_frames": 2, "min_pixels": 10_000, "max_pixels": 90_000}
    assert content({"type": "video", "video": FRAMES, **outside}) == [url_of(few)]
    inside = {"video": FRAMES, **outside}
    assert content({"type": "video", "video": inside}) == [url_of(few)]
    with pytest.raises(MediaError, match="fps"):
        content({"type": "video", "video": FRAMES, "fps": -1})


def test_pictures_and_videos_keep_their_order_and_texts_are_joined() -> None:
    picture = Image.of(FRAMES[0])
    parts = content({"type": "image", "image": picture, "detail": "low", "min_pixels": 1}, "a", "b", VIDEO, picture)
    assert parts == [url_of(picture), {"type": "text", "text": "ab"}, url_of(VIDEO), url_of(picture)]


@pytest.mark.parametrize(
    ("part", "match"),
    [
        ({"type": "video"}, r"content\[0\]: a video part names its video"),
        ({"type": "video_url", "video_url": {}}, "names its video"),
        ({"type": "video_url", "video_url": None}, "names its video"),
        ({"type": "input_video", "input_video": {"data": "!!"}}, "base64"),
        ({"type": "video", "video": "no/such.mp4"}, "no such video"),
        ({"type": "film"}, "unknown part type 'film'.*video_url"),
        ({"type": "input_audio", "input_audio": {}}, "no audio"),
    ],
)
def test_wrong_video_parts_are_named(part: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        content(part)


def test_a_caller_without_videos_says_so() -> None:
    with pytest.raises(UnsupportedInputError, match="videos"):
        normalize([{"role": "user", "content": [VIDEO]}], Image.of)
