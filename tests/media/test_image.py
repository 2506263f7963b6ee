"""Pictures: every way in gives the same pixels, and the traps of real files are settled as documented."""

from __future__ import annotations

import base64
import io
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from pyllamaernie.errors import MediaError, UnsupportedInputError
from pyllamaernie.media.image import Image

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def encoded(image: PIL.Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_every_form_gives_the_same_pixels(tmp_path: Path) -> None:
    data = encoded(PIL.Image.fromarray(PIXELS))
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    forms = [
        path,
        str(path),
        data,
        bytearray(data),
        memoryview(data),
        f"data:image/png;base64,{text}",
        f"DATA:;base64,{text[:40]}\n{text[40:]}",
        PIL.Image.open(path),
        PIXELS,
        PIXELS.astype(np.float32) / 255,
        PIXELS[:, ::-1][:, ::-1],
        Image(PIXELS),
        encoded(PIL.Image.fromarray(PIXELS), "BMP"),
    ]
    images = [Image.of(form) for form in forms]
    assert all(np.array_equal(image.rgb, PIXELS) for image in images)
    assert len({image.sha256 for image in images}) == 1
    assert (images[0].width, images[0].height) == (7, 5)
    assert Image.of(PIXELS[:, ::-1]).sha256 != images[0].sha256
    assert Image(PIXELS.reshape(7, 5, 3)).sha256 != images[0].sha256


def test_pixels_are_kept_from_later_changes() -> None:
    source = PIXELS.copy()
    image = Image.of(source)
    source[:] = 0
    assert np.array_equal(image.rgb, PIXELS)
    with pytest.raises(ValueError, match="read-only"):
        image.rgb[0] = 1
    image.to_rgb()[0] = 1
    assert np.array_equal(image.rgb, PIXELS)


def test_data_url_carries_the_exact_pixels() -> None:
    url = Image.of(PIXELS).to_data_url()
    assert url.startswith("data:image/")
    assert np.array_equal(Image.of(url).rgb, PIXELS)


def test_transparency_is_flattened_on_white() -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (255, 0, 0, 255)
    rgba[0, 1] = (255, 0, 0, 0)
    rgba[1, 0] = (0, 0, 0, 128)
    rgba[1, 1] = (10, 20, 30, 255)
    expected = [[[255, 0, 0], [255, 255, 255]], [[127, 127, 127], [10, 20, 30]]]
    for form in (rgba, PIL.Image.fromarray(rgba, "RGBA"), encoded(PIL.Image.fromarray(rgba, "RGBA"))):
        assert np.abs(Image.of(form).rgb.astype(int) - expected).max() <= 1
    palette = PIL.Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putdata([0, 1])
    data = encoded(palette, transparency=1)
    assert Image.of(data).rgb.tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_grey_palette_cmyk_and_one_bit_become_rgb() -> None:
    assert Image.of(PIXELS[:, :, 0]).rgb.tolist() == np.repeat(PIXELS[:, :, :1], 3, axis=2).tolist()
    assert Image.of(encoded(PIL.Image.new("L", (2, 3), 77))).rgb.tolist() == [[[77] * 3] * 2] * 3
    assert Image.of(PIL.Image.new("1", (2, 1), 1)).rgb.tolist() == [[[255] * 3] * 2]
    assert Image.of(PIL.Image.new("CMYK", (1, 1), (0, 255, 255, 0))).rgb.tolist() == [[[255, 0, 0]]]
    deep = PIL.Image.fromarray(np.array([[0, 65535, 257 * 100]], np.uint16))
    assert Image.of(encoded(deep)).rgb[0, :, 0].tolist() == [0, 255, 100]


def test_exif_orientation_is_applied() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was held turned: rotate by 90 degrees clockwise
    data = encoded(PIL.Image.fromarray(PIXELS), exif=exif)
    assert np.array_equal(Image.of(data).rgb, np.rot90(PIXELS, -1))


def test_a_damaged_orientation_costs_no_picture() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    block = exif.tobytes()
    for broken in (
        block[:-6],
        block.replace(b"\x01\x12\x00\x03", b"\x01\x12\x00\x0c"),
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0",
    ):
        assert np.array_equal(Image.of(encoded(PIL.Image.fromarray(PIXELS), exif=broken)).rgb, PIXELS)


def test_a_telephones_second_picture_is_no_animation() -> None:
    picture = PIL.Image.new("RGB", (8, 8), "red")
    data = encoded(picture, "MPO", save_all=True, append_images=[PIL.Image.new("RGB", (8, 8), "blue")])
    assert PIL.Image.open(io.BytesIO(data)).n_frames == 2
    assert Image.of(data).rgb[0, 0].tolist() == [254, 0, 0]  # without a warning, which would be an error


def test_deep_and_odd_modes_become_rgb_or_are_named() -> None:
    deep = PIL.Image.fromarray(np.array([[0, 65535, 25700]], np.uint16))
    for form in (deep, encoded(deep, "TIFF")):
        assert Image.of(form).rgb[0, :, 0].tolist() == [0, 255, 100]
    assert Image.of(PIL.Image.new("HSV", (1, 1), (0, 255, 255))).rgb.tolist() == [[[255, 0, 0]]]
    assert Image.of(PIL.Image.new("YCbCr", (1, 1), (255, 128, 128))).rgb.tolist() == [[[255, 255, 255]]]
    assert Image.of(PIL.Image.new("LA", (1, 1), (0, 0))).rgb.tolist() == [[[255, 255, 255]]]
    with pytest.raises(MediaError, match="floating-point"):
        Image.of(encoded(PIL.Image.new("F", (2, 2)), "TIFF"))


def test_a_pil_image_that_was_not_read_yet_is_checked_too() -> None:
    cut = encoded(PIL.Image.fromarray(PIXELS))[:-30]
    with pytest.raises(MediaError, match="the PIL image: broken picture"):
        Image.of(PIL.Image.open(io.BytesIO(cut)))


def test_damaged_bytes_never_escape_as_another_error() -> None:
    rng = np.random.default_rng(6)
    large = PIL.Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    n_refused = 0
    for format in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "MPO", "PPM", "TGA", "ICO", "JPEG2000"):
        data = encoded(large, format)
        for _ in range(30):
            broken = bytearray(data)
            for at in rng.integers(0, min(len(data), 400), 4):
                broken[at] ^= int(rng.integers(1, 256))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    assert Image.of(bytes(broken)).rgb.ndim == 3
                except MediaError:
                    n_refused += 1
    assert n_refused > 50


def test_animation_gives_its_first_frame_and_says_so() -> None:
    frames = [PIL.Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="first frame"):
        assert Image.of(data).rgb[0, 0].tolist() == [255, 0, 0]


def test_decompression_bomb_is_refused_before_it_is_decoded() -> None:
    header = bytearray(encoded(PIL.Image.new("1", (8, 8))))
    ihdr = header.index(b"IHDR")
    for side in (12_000, 60_000):  # above Pillow's warning, above Pillow's own error
        header[ihdr + 4 : ihdr + 12] = side.to_bytes(4, "big") * 2
        import zlib

        header[ihdr + 17 : ihdr + 21] = zlib.crc32(header[ihdr : ihdr + 17]).to_bytes(4, "big")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(MediaError, match="pixels"):
                Image.of(bytes(header))


@pytest.mark.parametrize(
    ("source", "match"),
    [
        (b"", "not a picture"),
        (b"<html>", "not a picture"),
        (encoded(PIL.Image.fromarray(PIXELS))[:-30], "broken picture"),
        ("data:image/png;base64", "comma"),
        ("data:image/png;base64,!!", "base64"),
        ("no/such/file.png", "no such picture"),
        ("a\0b", "cannot be read"),
        (".", "cannot be read"),
        (np.zeros((3, 3, 2), np.uint8), "shape"),
        (np.zeros(3, np.uint8), "shape"),
        (np.zeros((3, 3), np.int64), "int64"),
        (np.full((3, 3, 3), 1.5), r"\[0, 1\]"),
        (np.full((3, 3, 3), np.nan), r"\[0, 1\]"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_picture_is_named(source: object, match: str) -> None:
    with pytest.raises(MediaError, match=match):
        Image.of(source)


@pytest.mark.parametrize(
    "url", ["https://example.invalid/a.png", "http://example.invalid/a.png", "file:///etc/hostname"]
)
def test_urls_are_not_followed_unless_allowed(url: str) -> None:
    with pytest.raises(UnsupportedInputError):
        Image.of(url)
    if not url.startswith("https"):
        with pytest.raises(UnsupportedInputError):
            Image.of(url, allow_remote=True)
