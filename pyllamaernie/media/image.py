"""Pictures: one value type, many ways in, and from there unchanged pixels to the projector.

Decoding is Pillow's; what a picture means (EXIF rotation, palettes, CMYK, transparency, first frame of an animation) is
settled here once. Resizing and normalisation are not done here: they belong to the model and happen in native code.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import io
import os
import urllib.parse
import urllib.request
import warnings
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps

from pyllamaernie.errors import InputError, MediaError, UnsupportedInputError

PIXELS_MAX = 89_478_485  # where Pillow starts to warn of decompression bombs; here it is an error
ASPECT_MAX = 200  # of pictures and video frames; from here on the reference refuses
REMOTE_BYTES_MAX = 64 * 1024 * 1024
REMOTE_TIMEOUT_S = 10


class Image:
    """One picture as 8-bit RGB.

    Shapes: `rgb` is (height, width, 3) uint8, contiguous and read-only.
    """

    __slots__ = ("_sha256", "rgb")

    def __init__(self, rgb: np.ndarray) -> None:
        if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or 0 in rgb.shape:
            raise MediaError(
                f"a picture is (height, width, 3) uint8, got {rgb.shape} {rgb.dtype}; Image.of() takes more forms"
            )
        self.rgb = np.ascontiguousarray(rgb)
        self.rgb.flags.writeable = False
        self._sha256: str | None = None

    @classmethod
    def of(cls, source: Any, *, allow_remote: bool = False) -> Image:
        """A picture from a path, bytes, a data: URL, an https URL, a PIL image, an array or another Image.

        Arrays are (height, width[, 1 | 3 | 4]), uint8 or float in [0, 1]. Transparency is flattened on white, an
        animation gives its first frame, the EXIF orientation is applied.
        Raises: MediaError, UnsupportedInputError (a remote URL without `allow_remote`).
        """
        if isinstance(source, cls):
            return source
        if isinstance(source, PIL.Image.Image):
            return cls(_guarded(source, "the PIL image"))
        if isinstance(source, np.ndarray):
            return cls(_rgb_of_array(source))
        if isinstance(source, (bytes, bytearray, memoryview)):
            return cls(_decode(bytes(source), "the picture"))
        if isinstance(source, str) and source[:5].lower() == "data:":
            return cls(_decode(data_url_bytes(source), "the data: URL"))
        if isinstance(source, str) and source.lower().startswith(("http://", "https://")):
            return cls(_decode(fetch(source, allow_remote), source))
        if isinstance(source, str) and source.lower().startswith("file:"):
            raise UnsupportedInputError(f"file: URLs are not read ({source}); pass the path itself")
        if isinstance(source, (str, os.PathLike)):
            return cls(_decode(_read(source), os.fspath(source)))
        raise MediaError(
            f"cannot make a picture from {type(source).__name__}; "
            "allowed: path, bytes, data: URL, PIL image, numpy array, Image"
        )

    @property
    def width(self) -> int:
        return int(self.rgb.shape[1])

    @property
    def height(self) -> int:
        return int(self.rgb.shape[0])

    @property
    def sha256(self) -> str:
        """Digest of size and pixels, the same whatever form the picture came in."""
        if self._sha256 is None:
            header = f"{self.width}x{self.height}:".encode()
            self._sha256 = hashlib.sha256(header + self.rgb.tobytes()).hexdigest()
        return self._sha256

    def to_rgb(self) -> np.ndarray:
        """A writable copy of the pixels. Shapes: (height, width, 3) uint8."""
        return self.rgb.copy()

    def to_data_url(self) -> str:
        """The exact pixels as an uncompressed portable pixmap, the cheapest lossless form that the engine decodes."""
        pixmap = b"P6\n%d %d\n255\n" % (self.width, self.height) + self.rgb.tobytes()
        return "data:image/x-portable-pixmap;base64," + base64.b64encode(pixmap).decode("ascii")

    def __repr__(self) -> str:
        return f"Image({self.width}x{self.height})"


def check_sides(width: int, height: int, words: str, error: type[InputError]) -> None:
    """Raise `error` for a picture or frame that is too long for its width, which the reference refuses as well.

    `words` name it, with {} for its size: "a picture of {} is".
    """
    if max(width, height) >= ASPECT_MAX * min(width, height):
        raise error(
            f"{words.format(f'{width}x{height}')} too long; "
            f"the longer side must be under {ASPECT_MAX} times the shorter"
        )


def _decode(data: bytes, name: Any) -> np.ndarray:
    try:
        with PIL.Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > PIXELS_MAX:
                raise PIL.Image.DecompressionBombError
            return _guarded(image, name)
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise MediaError(f"{name}: more than {PIXELS_MAX} pixels; make it smaller first") from None
    except PIL.UnidentifiedImageError:
        raise MediaError(f"{name}: not a picture that Pillow can read ({len(data)} bytes)") from None
    except (MediaError, UserWarning):
        raise
    except Exception as error:  # whatever a parser of foreign bytes comes up with
        raise MediaError(f"{name}: broken picture: {error or type(error).__name__}") from error


def _guarded(image: PIL.Image.Image, name: Any) -> np.ndarray:
    try:
        return rgb_of_pil(image, name)
    except (PIL.Image.DecompressionBombError, MediaError, UserWarning):
        raise
    except Exception as error:
        raise MediaError(f"{name}: broken picture: {error or type(error).__name__}") from error


def rgb_of_pil(image: PIL.Image.Image, name: Any = "the picture") -> np.ndarray:
    """The pixels of an opened picture, upright and flattened on white. Shapes: (height, width, 3) uint8."""
    n_frames = getattr(image, "n_frames", 1)
    if n_frames > 1 and image.format != "MPO":  # telephones put a preview or a depth map behind the picture
        warnings.warn(f"{name} holds {n_frames} pictures: only the first frame is used", UserWarning, stacklevel=5)
    if n_frames > 1:
        image.seek(0)
    image.load()
    with contextlib.suppress(Exception):  # a damaged EXIF block costs the orientation, not the picture
        image = PIL.ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        canvas.alpha_composite(image)
        image = canvas
    elif image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
        # Pillow would clip these to 255; 16-bit grey is what they hold in practice
        image = PIL.Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise MediaError(f"{name}: a picture of floating-point numbers has no agreed range; convert it to 8 bits first")
    return np.asarray(image.convert("RGB"))


def _rgb_of_array(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise MediaError(f"a picture array is (height, width[, 1 | 3 | 4]), got shape {array.shape}")
    if array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    elif np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise MediaError("a float picture array must lie in [0, 1]")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise MediaError(f"a picture array is uint8 or float in [0, 1], got {array.dtype}")
    if array.shape[2] == 1:
        return np.repeat(array, 3, axis=2)
    if array.shape[2] == 4:
        return rgb_of_pil(PIL.Image.fromarray(np.ascontiguousarray(array), "RGBA"), "the array")
    return array.copy()


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise MediaError(f"{os.fspath(path)}: no such picture") from None
    except (OSError, ValueError) as error:
        raise MediaError(f"{os.fspath(path)!r}: cannot be read: {error}") from error


def data_url_bytes(url: str) -> bytes:
    """What a data: URL holds. Raises: MediaError."""
    header, comma, payload = url.partition(",")
    if not comma:
        raise MediaError("a data: URL has a comma between its type and its data; this one has none")
    try:
        if header.lower().endswith(";base64"):
            return base64.b64decode("".join(urllib.parse.unquote(payload).split()), validate=True)
        return urllib.parse.unquote_to_bytes(payload)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"the data: URL is not valid base64: {error}") from error


def fetch(url: str, allow_remote: bool, what: str = "pictures") -> bytes:
    """The body behind an https URL, without redirects and up to REMOTE_BYTES_MAX.

    Raises: UnsupportedInputError unless `allow_remote`, MediaError where it cannot be had.
    """
    if not allow_remote:
        raise UnsupportedInputError(
            f"remote {what} are off ({url}); pass allow_remote=True to Llama, or download it first"
        )
    if not url.lower().startswith("https://"):
        raise UnsupportedInputError(f"only https {what} are fetched ({url})")
    try:
        with _opener().open(url, timeout=REMOTE_TIMEOUT_S) as response:
            data: bytes = response.read(REMOTE_BYTES_MAX + 1)
    except OSError as error:
        raise MediaError(f"{url}: {error}") from error
    if len(data) > REMOTE_BYTES_MAX:
        raise MediaError(f"{url}: larger than {REMOTE_BYTES_MAX} bytes")
    return data


def _opener() -> urllib.request.OpenerDirector:
    class NoRedirect(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: Any) -> None:
            return None  # a redirect could point into the private network

    return urllib.request.build_opener(NoRedirect)
