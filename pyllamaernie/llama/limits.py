"""Sizes of pictures and frames that a projector takes."""

from __future__ import annotations

from pyllamaernie.errors import InputError
from pyllamaernie.gguf.header import Header
from pyllamaernie.gguf.projector import is_ernie_projector
from pyllamaernie.media.frames import FACTOR, resize, smart_resize
from pyllamaernie.media.image import Image


def video_limits(mmproj: Header) -> tuple[int, int] | None:
    """Smallest and largest number of pixels of a video's frame, None for a projector that takes no videos."""
    low, high = (mmproj.metadata.get(f"clip.vision.video_{end}_pixels") for end in ("min", "max"))
    return None if low is None or high is None else (int(low), int(high))


def image_limits(mmproj: Header, min_tokens: int | None, max_tokens: int | None) -> tuple[int, int] | None:
    """The same of a picture, by an ERNIE 4.5 VL projector's keys or by numbers of tokens; None for other projectors."""
    if not is_ernie_projector(mmproj):
        return None
    low, high = (int(mmproj.metadata[f"clip.vision.image_{end}_pixels"]) for end in ("min", "max"))
    low, high = (n * FACTOR**2 if n else limit for n, limit in ((min_tokens, low), (max_tokens, high)))
    if low > high:
        raise InputError(f"pictures of {low} to {high} pixels: image_min_tokens is at most image_max_tokens")
    return low, high


def fitted(image: Image, limits: tuple[int, int]) -> Image:
    """The picture as the reference processor stretches it, by the same library: native code then leaves it alone."""
    width, height = smart_resize(image.width, image.height, *limits)
    return image if (width, height) == (image.width, image.height) else Image(resize(image.rgb, width, height))
