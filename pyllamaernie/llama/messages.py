"""Chat messages as callers write them, into the messages that the engine takes.

Every picture or video part, in whatever form, becomes an `image_url` part: with the exact pixels of the picture, or
with the video's frames in the container that the engine reads. Neighbouring text parts are joined without a separator,
as the reference chat template does (the engine would put a newline between them).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pyllamaernie.errors import InputError, UnsupportedInputError
from pyllamaernie.media.image import Image
from pyllamaernie.media.video import OPTIONS as VIDEO_OPTIONS
from pyllamaernie.media.video import Video

ROLES = ("system", "developer", "user", "assistant", "tool")
IMAGE_TYPES = ("image_url", "input_image", "image")
VIDEO_TYPES = ("video_url", "input_video", "video", "video_path")

LoadImage = Callable[[Any], Image]
LoadVideo = Callable[..., Video]


def no_videos(source: Any, **options: Any) -> Video:
    """The `load_video` of a caller that takes none."""
    raise UnsupportedInputError("videos are not supported here; pass pictures instead")


def normalize(
    messages: Sequence[Mapping[str, Any]], load_image: LoadImage, *, load_video: LoadVideo = no_videos
) -> list[dict[str, Any]]:
    """Messages for the engine.

    `load_image` turns one picture source into an Image or raises; `load_video` takes one video source and, as keywords,
    those options of `Video.of` that the part names, and returns the Video with the model's pixel limits or raises.
    Raises: InputError, UnsupportedInputError, and what the two raise.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InputError('messages is a list of messages such as [{"role": "user", "content": "Hello"}]')
    if not messages:
        raise InputError("messages is empty; at least one message is needed")
    return [_message(message, index, load_image, load_video) for index, message in enumerate(messages)]


def _message(message: Mapping[str, Any], index: int, load_image: LoadImage, load_video: LoadVideo) -> dict[str, Any]:
    if not isinstance(message, Mapping) or "role" not in message:
        raise InputError(f"messages[{index}] is not a mapping with a role")
    if message["role"] not in ROLES:
        raise InputError(f"messages[{index}]: unknown role {message['role']!r}; allowed: {', '.join(ROLES)}")
    result = dict(message)
    content = result.get("content")
    if content is None:
        if message["role"] != "assistant":
            raise InputError(f"messages[{index}] has no content")
    elif isinstance(content, (list, tuple)):
        result["content"] = _parts(content, index, load_image, load_video)
    elif not isinstance(content, str):
        raise InputError(f"messages[{index}]: content is a string or a list of parts, got {type(content).__name__}")
    return result


def _parts(
    content: Sequence[Any], index: int, load_image: LoadImage, load_video: LoadVideo
) -> list[dict[str, Any]] | str:
    parts: list[dict[str, Any]] = []
    for number, part in enumerate(content):
        where = f"messages[{index}].content[{number}]"
        text = _text(part, where)
        if text is not None:
            if parts and parts[-1]["type"] == "text":
                parts[-1]["text"] += text
            else:
                parts.append({"type": "text", "text": text})
        else:
            media: Image | Video
            if is_video(part):
                source, options = video_source(part, where)
                media = load_video(source, **options)
            else:
                media = load_image(image_source(part, where))
            parts.append({"type": "image_url", "image_url": {"url": media.to_data_url()}})
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _text(part: Any, where: str) -> str | None:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") in ("text", "input_text"):
        text = part.get("text")
        if not isinstance(text, str):
            raise InputError(f"{where}: a text part has a string under 'text'")
        return text
    return None


def image_source(part: Any, where: str) -> Any:
    """What a picture part points at: a path, bytes, a URL, a PIL image, an array or an Image."""
    if not isinstance(part, Mapping):
        return part
    kind = part.get("type")
    if kind in ("input_audio", "audio", "audio_url"):
        raise UnsupportedInputError(f"{where}: the model takes no audio")
    if kind not in IMAGE_TYPES:
        raise InputError(f"{where}: unknown part type {kind!r}; allowed: text, {', '.join(IMAGE_TYPES + VIDEO_TYPES)}")
    for key in ("image_url", "image", "url", "path", "data"):
        if key in part:
            source = part[key]
            return source.get("url") if isinstance(source, Mapping) else source
    raise InputError(f"{where}: a picture part names its picture under 'image_url', 'image', 'url' or 'path'")


def is_video(part: Any) -> bool:
    """Whether a media part is a video."""
    return isinstance(part, Video) or (isinstance(part, Mapping) and part.get("type") in VIDEO_TYPES)


def video_source(part: Any, where: str) -> tuple[Any, dict[str, Any]]:
    """What a video part points at, and its options of `Video.of`, beside the video or inside its mapping."""
    if not isinstance(part, Mapping):
        return part, {}
    options = _video_options(part)
    for key in ("video_url", "input_video", "video", "video_path", "url", "path", "data"):
        if key not in part:
            continue
        source = part[key]
        if isinstance(source, Mapping):
            options.update(_video_options(source))
            key = next((name for name in ("url", "path", "video", "data", "frames") if name in source), "")
            source = source.get(key)
        if source is None:
            break
        return (_base64(source, where) if key == "data" else source), options
    raise InputError(
        f"{where}: a video part names its video under {', '.join(map(repr, VIDEO_TYPES))}, 'url' or 'path'"
    )


def _video_options(part: Mapping[str, Any]) -> dict[str, Any]:
    return {name: part[name] for name in VIDEO_OPTIONS if part.get(name) is not None}


def _base64(source: Any, where: str) -> Any:
    """Upstream's `input_video` has bare base64 under 'data'; URLs are left alone."""
    if not isinstance(source, str) or source[:5].lower() == "data:" or "://" in source[:10]:
        return source
    try:
        return base64.b64decode("".join(source.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{where}: 'data' of a video is base64 or a URL: {error}") from None
