"""Baidu's rules for frames: which are taken, what is written into them, how large they become, how they are packed."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import pytest

from pyllamaernie.errors import MediaError
from pyllamaernie.media import frames as rules

NOISE = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
no_font_warning = pytest.mark.filterwarnings("ignore:the font Roboto")


def exact_sample(n_total: int, rate: Fraction, fps: Fraction, low: int, high: int) -> list[int]:
    """The rule in exact arithmetic, without numpy."""
    n_wanted = int(n_total / rate * fps)
    if low <= n_wanted <= high:
        chosen = []
        step = 0
        while step / fps < n_total / rate:
            index = round(step / fps * rate)  # Fraction rounds halves to even
            if index < n_total:
                chosen.append(index)
            step += 1
        return chosen
    n = min(n_total, low if n_wanted < low else high)
    return [i * n_total // n for i in range(n)]


@pytest.mark.parametrize("fps", [Fraction(1, 2), Fraction(1), Fraction(2), Fraction(4)])
@pytest.mark.parametrize("rate", [Fraction(1), Fraction(10), Fraction(24), Fraction(25), Fraction(30), Fraction(60)])
def test_sampling_equals_exact_arithmetic(rate: Fraction, fps: Fraction) -> None:
    for n_total in (1, 2, 15, 16, 17, 79, 80, 81, 100, 199, 200, 250, 2249, 2250, 2251, 2300, 5000, 100_003):
        expected = exact_sample(n_total, rate, fps, 16, 180)
        assert rules.sample(n_total, float(rate), fps=float(fps)) == expected, (n_total, rate, fps)


def test_sampling_written_out_by_hand() -> None:
    # 10 s at 25 per second: 20 frames wanted, one every 12.5 frames, halves to even
    steps = [0, 12, 25, 38, 50, 62, 75, 88, 100, 112, 125, 138, 150, 162, 175, 188, 200, 212, 225, 238]
    assert rules.sample(250, 25) == steps
    # 2 s: 4 wanted, so 16 by count, each the first frame of its interval of 3.125
    assert rules.sample(50, 25) == [0, 3, 6, 9, 12, 15, 18, 21, 25, 28, 31, 34, 37, 40, 43, 46]
    assert rules.sample(7, 25) == list(range(7))
    # 90.2 s: int(180.4) = 180 is inside the limits, and half-second steps from 0 to 90.0 are 181
    assert len(rules.sample(902, 10)) == 181
    assert len(rules.sample(905, 10)) == 180
    assert rules.sample(10_000, 10, min_frames=2, max_frames=4) == [0, 2500, 5000, 7500]


def test_time_text_has_hours_minutes_and_hundredths() -> None:
    assert rules.time_text(0) == "time: 00:00:00.00"
    assert rules.time_text(65.5) == "time: 00:01:05.50"
    assert rules.time_text(3 * 3600 + 2 * 60 + 1.25) == "time: 03:02:01.25"
    assert rules.time_text(59.999) == "time: 00:00:60.00"  # as the reference writes it
    assert rules.time_text(100 * 3600) == "time: 100:00:00.00"


@no_font_warning
def test_time_is_drawn_in_the_corner_and_the_frame_is_kept() -> None:
    before = NOISE.copy()
    drawn = rules.draw_time(NOISE, 65.5)
    assert np.array_equal(NOISE, before)
    rows, columns = np.nonzero((drawn != NOISE).any(axis=2))
    assert rows.min() < 6 and columns.min() < 6 and rows.max() < 20 and 60 < columns.max() < 150
    canvas = PIL.Image.fromarray(NOISE)
    found = rules.find_font()
    font = PIL.ImageFont.load_default(12) if found is None else PIL.ImageFont.truetype(str(found), 12)
    PIL.ImageDraw.Draw(canvas).text((0, 0), "time: 00:01:05.50", (0, 0, 0), font, stroke_width=1, stroke_fill="white")
    assert np.array_equal(drawn, np.asarray(canvas))
    assert np.array_equal(rules.draw_time(NOISE[:9], 1), NOISE[:9])  # no room


def test_the_font_is_the_one_that_the_environment_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(rules.FONT_VARIABLE, str(tmp_path / "none.ttf"))
    with pytest.raises(MediaError, match=rules.FONT_VARIABLE):
        rules.find_font()
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    monkeypatch.setenv(rules.FONT_VARIABLE, str(broken))
    assert rules.find_font() == broken
    with pytest.raises(MediaError, match="not a font"):
        rules.draw_time(NOISE, 0)


def test_a_missing_font_is_said_once_and_another_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "find_font", lambda: None)
    rules._font.cache_clear()
    rules._warn_of_font.cache_clear()
    with pytest.warns(UserWarning, match=r"pyllamaernie\[video\]"):
        first = rules.draw_time(NOISE, 0)
    assert (first != NOISE).any()
    assert (rules.draw_time(NOISE[:100], 0) != NOISE[:100]).any()  # another size; a second warning would be an error
    rules._font.cache_clear()


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((640, 480), (234416, 937664), (644, 476)),  # 22.86 -> 23, 17.14 -> 17 times 28
        ((70, 98), (1, 937664), (56, 112)),  # 2.5 -> 2 and 3.5 -> 4: halves to even
        ((1920, 1080), (234416, 937664), (1288, 700)),  # sqrt(2.2114..) = 1.48709: 46.11 -> 46, 25.94 -> 25
        ((64, 48), (234416, 937664), (560, 420)),  # sqrt(76.3) = 8.7355: 19.97 -> 20, 14.97 -> 15
        ((64, 48), (3136, 4842768), (56, 56)),  # 2.29 -> 2, 1.71 -> 2
        ((1, 1), (3136, 4842768), (56, 56)),
        ((13, 600), (1, 937664), (28, 588)),  # 0.46 would round to 0
        ((2000, 20), (1, 784 * 4), (560, 28)),  # sqrt(12.755) = 3.5714: 20 x 28 and 0.2 -> 1: breaks the limit
    ],
)
def test_sizes_by_hand(size: tuple[int, int], limits: tuple[int, int], expected: tuple[int, int]) -> None:
    assert rules.smart_resize(*size, *limits) == expected


def test_sizes_are_multiples_inside_the_limits() -> None:
    rng = np.random.default_rng(1)
    for width, height in rng.integers(1, 3000, (400, 2)).tolist():
        if max(width, height) >= 200 * min(width, height):
            continue
        new = rules.smart_resize(width, height)
        assert new[0] % 28 == new[1] % 28 == 0 and min(new) >= 28
        assert rules.MIN_PIXELS <= new[0] * new[1] <= rules.MAX_PIXELS
        assert rules.smart_resize(*new) == new


def test_sizes_that_are_refused() -> None:
    for size in ((200, 1), (1, 300), (28, 5600)):
        with pytest.raises(MediaError, match="200 times"):
            rules.smart_resize(*size)
    assert rules.smart_resize(199, 1)
    for limits in ((5, 4), (0, 5000), (1, 783), (-1, 5000), (1.5, 5000), (True, 5000), (1, None)):
        with pytest.raises(MediaError, match="pixel"):
            rules.smart_resize(100, 100, *limits)


def test_container_is_the_bytes_that_were_agreed() -> None:
    frames = np.arange(2 * 2 * 3 * 3, dtype=np.uint8).reshape(2, 2, 3, 3)  # 2 frames, 3 wide, 2 high
    data = rules.pack(frames)
    assert data == b"ERNIEVID" + struct.pack("<IIII", 1, 2, 3, 2) + bytes(range(36))
    assert np.array_equal(rules.unpack(data), frames)
    assert rules.pack(frames[:, :, ::-1])[24:27] == bytes([6, 7, 8])
    for broken in (
        b"",
        data[:20],
        b"X" + data[1:],
        data[:-1],
        data + b"\0",
        data[:8] + struct.pack("<I", 2) + data[12:],
        data[:12] + struct.pack("<III", 0, 3, 2),
        data[:12] + struct.pack("<III", 2**32 - 1, 2**32 - 1, 2**32 - 1) + data[24:],
    ):
        with pytest.raises(MediaError, match="container"):
            rules.unpack(broken)


# transformers' video processor needs torchvision only to pass pixels between PIL and torch; two lines stand in for it,
# in a process of its own so that nobody else imports them
TRANSFORMERS = """
import importlib, importlib.machinery, json, sys, types
import numpy as np, PIL.Image, torch
def module(name, **names):
    new = types.ModuleType(name)
    new.__spec__ = importlib.machinery.ModuleSpec(name, None)
    new.__path__ = []
    new.__dict__.update(names)
    sys.modules[name] = new
    return new
import transformers
module("torchvision")
module("torchvision.transforms", InterpolationMode=object)
module("torchvision.transforms.functional",
       pil_to_tensor=lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1),
       to_pil_image=lambda tensor: PIL.Image.fromarray(tensor.permute(1, 2, 0).numpy()))
functional = module("torchvision.transforms.v2.functional")
module("torchvision.transforms.v2", functional=functional)
found = importlib.import_module("transformers.models.ernie4_5_vl_moe.video_processing_ernie4_5_vl_moe")
processor = types.SimpleNamespace(font=sys.argv[1], num_frames=None, min_frames=16, max_frames=180)
cls = found.Ernie4_5_VLMoeVideoProcessor
frames = np.load(sys.argv[2])
times = json.loads(sys.argv[3])
out = [cls._render_image_with_timestamp(processor, torch.from_numpy(frame).permute(2, 0, 1),
                                        cls._convert_timestamp(processor, time)).permute(1, 2, 0).numpy()
       for frame, time in zip(frames, times)]
np.save(sys.argv[2] + ".out.npy", np.stack(out))
cases = json.loads(sys.argv[4])
print(json.dumps([cls.sample_frames(processor, types.SimpleNamespace(total_num_frames=n, fps=rate), fps=fps).tolist()
                  for n, rate, fps in cases]))
sizes = json.loads(sys.argv[5])
print(json.dumps([found.smart_resize(h, w, 28, low, high)[::-1] for w, h, low, high in sizes]))
"""


@pytest.mark.reference
def test_drawing_and_sizes_equal_transformers_and_sampling_differs_as_documented(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    font = rules.find_font()
    if font is None:
        pytest.skip("the font Roboto is not installed (extra `video`)")
    times = [0.0, 0.5, 61.03, 59.999, 3725.4, 7.005]
    rng = np.random.default_rng(2)
    cases = [(100, 25.0, 2.0), (250, 25.0, 2.0), (902, 10.0, 2.0), (5000, 25.0, 2.0)]
    cases += [(20, 25.0, None), (400, 25.0, None)]
    sides = rng.integers(28, 3000, (200, 2)).tolist()
    sizes = [(w, h, 234416, 937664) for w, h in sides] + [(w, h, 3136, 4842768) for w, h in sides]
    for number, (height, width) in enumerate(((48, 64), (120, 200), (361, 203))):
        frames = rng.integers(0, 256, (len(times), height, width, 3), dtype=np.uint8)
        path = tmp_path / f"{number}.npy"
        np.save(path, frames)
        command = [sys.executable, "-c", TRANSFORMERS, str(font), str(path), *map(json.dumps, (times, cases, sizes))]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stderr
        theirs = np.load(f"{path}.out.npy")
        ours = np.stack([rules.draw_time(frame, time) for frame, time in zip(frames, times, strict=True)])
        assert np.array_equal(ours, theirs)
        assert not np.array_equal(ours, frames)
    chosen, shapes = map(json.loads, answer.stdout.splitlines()[-2:])
    assert [list(rules.smart_resize(*size)) for size in sizes] == shapes
    ours = [rules.sample(n, rate, fps=fps or 2.0) for n, rate, fps in cases]
    assert chosen[0] == [i * 25 // 4 for i in range(16)] == ours[0]  # raised to 16 by both: the same frames
    assert chosen[3] == [i * 250 // 9 for i in range(180)] == ours[3]  # cut to 180 by both
    # between the limits: Baidu rounds each half second to the nearest frame, transformers rounds down
    assert chosen[1] == [i * 25 // 2 for i in range(20)]
    assert ours[1] == [round(Fraction(25 * i, 2)) for i in range(20)] != chosen[1]
    assert len(ours[2]) == 181 and len(chosen[2]) == 180
    assert chosen[4] == list(range(20)) and len(ours[4]) == 16  # without fps: all frames there, 2 per second here
    assert len(chosen[5]) == 180 and len(ours[5]) == 32
