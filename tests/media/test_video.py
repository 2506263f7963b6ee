"""Videos: every way in gives the frames that the rules name, and what is no video is refused."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import clips
import numpy as np
import PIL.Image
import pytest

from pyllamaernie.errors import MediaError, UnsupportedInputError
from pyllamaernie.media import decode as video_decode
from pyllamaernie.media import frames as rules
from pyllamaernie.media.__main__ import main
from pyllamaernie.media.image import Image
from pyllamaernie.media.video import Video

pytestmark = pytest.mark.filterwarnings("ignore:the font Roboto")

LIMITS = (3136, 4842768)
NOISE = np.random.default_rng(0).integers(0, 256, (5, 48, 64, 3), dtype=np.uint8)


def test_every_form_in_memory_gives_the_same_frames() -> None:
    forms = [
        NOISE,
        NOISE.astype(np.float64) / 255,
        list(NOISE),
        tuple(Image.of(frame) for frame in NOISE),
        [PIL.Image.fromarray(frame) for frame in NOISE],
        (frame for frame in NOISE),
    ]
    videos = [Video.of(form) for form in forms]
    for video in videos:
        assert np.array_equal(np.stack([frame.rgb for frame in video.frames]), NOISE)
        assert video.timestamps == (0, 0.5, 1, 1.5, 2)  # as at 2 frames per second
    assert len({video.sha256 for video in videos}) == 1
    assert Video.of(NOISE[::-1]).sha256 != videos[0].sha256
    assert Video.of(NOISE[:4]).sha256 != videos[0].sha256
    assert len(videos[0]) == 5
    assert Video.of(videos[0]) is videos[0]
    assert Video.of(NOISE[..., 0]).frames[0].rgb.shape == (48, 64, 3)  # grey
    assert Video.of(NOISE[:1]).timestamps == (0,)


def test_times_are_drawn_where_they_are_known() -> None:
    def drawn(**options: object) -> list[float | None]:
        video = Video.of(NOISE, **options)
        times: list[float | None] = []
        for index, (frame, time) in enumerate(zip(video.frames, video.timestamps, strict=True)):
            expected = rules.draw_time(NOISE[index], time)
            assert np.array_equal(frame.rgb, expected) or np.array_equal(frame.rgb, NOISE[index])
            times.append(None if np.array_equal(frame.rgb, NOISE[index]) else time)
        return times

    assert drawn() == [None] * 5
    assert drawn(fps=10) == [0, 0.1, 0.2, 0.3, 0.4]
    assert drawn(timestamps=[0, 1, 1, 5, 60.5]) == [0, 1, 1, 5, 60.5]
    assert drawn(draw_timestamps=True) == [0, 0.5, 1, 1.5, 2]
    assert drawn(fps=10, draw_timestamps=False) == [None] * 5


def test_many_frames_are_thinned_and_windows_cut() -> None:
    frames = clips.grey_ramp(200, 4, 4, 1)
    chosen = Video.of(frames)
    assert clips.indices(chosen, 1) == [i * 200 // 180 for i in range(180)]
    assert Video.of(frames, max_frames=3).timestamps == (0, 33, 66.5)
    assert clips.indices(Video.of(frames, max_frames=300, min_frames=250), 1) == list(range(200))
    cut = Video.of(frames, fps=10, start=1, end=1.5)
    assert cut.timestamps == (1, 1.1, 1.2, 1.3, 1.4)
    assert Video.of(frames, timestamps=np.arange(200) * 2.0, start=397).timestamps == (398,)


def test_frames_array_has_the_models_size_and_an_even_count() -> None:
    video = Video.of(NOISE)
    array = video.frames_array(*LIMITS)
    assert array.shape == (6, 56, 56, 3) and array.dtype == np.uint8
    for index in range(5):
        small = PIL.Image.fromarray(NOISE[index]).resize((56, 56), PIL.Image.Resampling.BICUBIC)
        assert np.array_equal(array[index], np.asarray(small))
    assert np.array_equal(array[5], array[4])
    assert video.n_tokens(*LIMITS) == 3 * 2 * 2
    assert video.size() == (560, 420) and video.n_tokens() == 3 * 20 * 15
    assert video.frames_array().shape == (6, 420, 560, 3)
    assert Video.of(NOISE[:4]).frames_array(*LIMITS).shape == (4, 56, 56, 3)


def test_the_time_is_drawn_before_the_frame_is_resized_and_the_last_is_doubled_with_it() -> None:
    array = Video.of(NOISE[:1], timestamps=[65.5]).frames_array(*LIMITS)
    expected = rules.resize(rules.draw_time(NOISE[0], 65.5), 56, 56)
    assert np.array_equal(array, np.stack([expected, expected]))


def test_limits_given_early_or_late_give_the_same_frames() -> None:
    early = Video.of(NOISE, fps=4, min_pixels=LIMITS[0], max_pixels=LIMITS[1])
    late = Video.of(NOISE, fps=4)
    assert early.frames[0].rgb.shape == (56, 56, 3) and late.frames[0].rgb.shape == (48, 64, 3)
    assert np.array_equal(early.frames_array(), late.frames_array(*LIMITS))
    assert np.array_equal(early.frames_array(), early.frames_array(*LIMITS))
    again = Video.of(late, min_pixels=LIMITS[0], max_pixels=LIMITS[1])
    assert again.sha256 == early.sha256 and again.timestamps == late.timestamps
    assert Video.of(again, max_frames=2).frames_array().shape == (2, 56, 56, 3)
    for options, low, high in (({"max_pixels": 9000}, 1, 9000), ({"min_pixels": 10**6}, 10**6, 4 * 10**6)):
        width, height = Video.of(NOISE, **options).size()
        assert low <= width * height <= high


def test_frames_of_several_sizes_take_the_size_of_the_first() -> None:
    frames = [NOISE[0], NOISE[1, :30], NOISE[2].transpose(1, 0, 2)]
    array = Video.of(frames).frames_array(*LIMITS)
    assert array.shape == (4, 56, 56, 3)
    assert np.array_equal(array, Video.of(frames, min_pixels=LIMITS[0], max_pixels=LIMITS[1]).frames_array())


def test_data_url_carries_the_frames_and_is_itself_a_source() -> None:
    video = Video.of(NOISE, min_pixels=LIMITS[0], max_pixels=LIMITS[1])
    url = video.to_data_url()
    assert url.startswith("data:video/x-ernie-frames;base64,")
    data = base64.b64decode(url.partition(",")[2])
    assert data == video.to_frames_bytes() == rules.pack(video.frames_array())
    for source in (url, data):
        assert np.array_equal(Video.of(source).frames_array(*LIMITS), video.frames_array())


@pytest.mark.parametrize(
    ("format", "codec"),
    [("mp4", "libx264"), ("mp4", "mpeg4"), ("matroska", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4"),
     ("mpegts", "libx264"), ("h264", "libx264")],
)  # fmt: skip
def test_a_file_is_sampled_and_timed_by_the_rule(format: str, codec: str) -> None:
    av = clips.require_av()
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    options = {"g": "6", "bf": "2"} if codec == "libx264" else {}
    rate = 25 if format == "h264" else 10  # a raw stream has no rate; 25 is what FFmpeg assumes
    data = clips.clip(clips.grey_ramp(30), rate=rate, format=format, codec=codec, options=options)
    video = Video.of(data)
    assert video.fps_source == rate
    assert clips.indices(video) == [i * 30 // 16 for i in range(16)]
    assert list(video.timestamps) == pytest.approx([i * 30 // 16 / rate for i in range(16)])
    assert clips.indices(Video.of(data, min_frames=1, fps=5)) == [
        round(i * rate / 5) for i in range(len(video)) if round(i * rate / 5) < 30
    ]


def test_the_time_is_drawn_into_decoded_frames() -> None:
    data = clips.clip(clips.grey_ramp(10, 256, 128), rate=2)
    plain = Video.of(data, draw_timestamps=False)
    video = Video.of(data)
    assert video.timestamps == plain.timestamps == tuple(i / 2 for i in range(10))
    for frame, before, time in zip(video.frames, plain.frames, video.timestamps, strict=True):
        assert np.array_equal(frame.rgb, rules.draw_time(before.rgb, time))
        assert not np.array_equal(frame.rgb, before.rgb)


def test_path_bytes_open_file_data_url_and_pictures_agree(tmp_path: Path) -> None:
    data = clips.clip(clips.grey_ramp(8))
    path = tmp_path / "a clip.mp4"
    path.write_bytes(data)
    url = "data:video/mp4;base64," + base64.b64encode(data).decode()
    with open(path, "rb") as file:
        videos = [Video.of(source) for source in (path, str(path), data, bytearray(data), memoryview(data), url, file)]
    assert len({video.sha256 for video in videos}) == 1
    plain = Video.of(data, draw_timestamps=False)
    listed = Video.of(plain.frames, timestamps=plain.timestamps)
    assert listed.sha256 == videos[0].sha256
    assert Video.of(np.stack([frame.rgb for frame in plain.frames]), fps=10).sha256 == listed.sha256


def test_start_and_end_cut_a_file_and_keep_its_times() -> None:
    data = clips.clip(clips.grey_ramp(30), rate=10)
    video = Video.of(data, start=1, end=2)
    assert clips.indices(video) == list(range(10, 20))
    assert list(video.timestamps) == pytest.approx([i / 10 for i in range(10, 20)])
    assert clips.indices(Video.of(data, start=2.75, fps=1, min_frames=1)) == [28]
    assert clips.indices(Video.of(data, end=0.05)) == [0]
    with pytest.raises(MediaError, match=r"it lasts 3\.000 s"):
        Video.of(data, start=3)


def test_a_variable_rate_is_sampled_by_frame_and_timed_evenly() -> None:
    times = [0, 1, 2, 3, 4, 10, 20, 30, 31, 32, 33, 34, 60, 61, 62, 63, 90, 100, 110, 120]
    video = Video.of(clips.clip(clips.grey_ramp(20), times=times, format="matroska"))
    assert clips.indices(video) == [i * 20 // 16 for i in range(16)]
    assert list(video.timestamps) == pytest.approx([i * 20 // 16 / video.fps_source for i in range(16)])


def test_frames_that_are_too_large_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = clips.clip(clips.grey_ramp(6))
    with monkeypatch.context() as patch:
        patch.setattr(video_decode, "PIXELS_MAX", 64 * 48 - 1)
        with pytest.raises(MediaError, match="64x48 have more than 3071 pixels"):
            Video.of(data)
    monkeypatch.setattr("pyllamaernie.media.video.MEMORY_BYTES_MAX", 64 * 48 * 3 * 5)
    assert len(Video.of(data, max_frames=5)) == 5
    assert len(Video.of(data, min_pixels=1, max_pixels=784)) == 6  # made smaller while they are read
    with pytest.raises(MediaError, match="max_frames"):
        Video.of(data)


def test_tiny_and_long_frames() -> None:
    one = Video.of(np.full((3, 1, 1, 3), 9, np.uint8), fps=1)
    assert one.frames_array(*LIMITS).shape == (4, 56, 56, 3)
    assert (one.frames_array(*LIMITS) == 9).all()  # no room for the time
    for shape in ((1, 2, 600, 3), (1, 400, 2, 3)):
        with pytest.raises(MediaError, match="200 times"):
            Video.of(np.zeros(shape, np.uint8))
    with pytest.raises(MediaError, match="1200x4"):
        Video.of(clips.clip(np.zeros((2, 4, 1200, 3), np.uint8), codec="mpeg4"))


@pytest.mark.parametrize(
    ("source", "options", "match"),
    [
        (None, {}, "NoneType"),
        (5, {}, "int"),
        (Image.of(NOISE[0]), {}, "Image"),
        ([], {}, "empty"),
        (NOISE[:0], {}, "empty"),
        (NOISE[0, 0], {}, "shape"),
        ([NOISE[0], None], {}, "NoneType"),
        ("no/such.mp4", {}, "no such video"),
        (".", {}, "cannot be read"),
        ("a\0b", {}, "cannot be read"),
        (io.StringIO("text"), {}, "binary"),
        (b"ERNIEVID" + bytes(16), {}, "version 0"),
        ("data:video/mp4;base64,!!", {}, "base64"),
        (NOISE, {"timestamps": [0, 1]}, "5 frames and 2 timestamps"),
        (NOISE, {"timestamps": [0, 1, 2, 3, np.nan]}, "nan"),
        (NOISE, {"timestamps": [0, 1, 2, 3, np.inf]}, "inf"),
        (NOISE, {"timestamps": [0, 1, 2, 3, "4"]}, "'4'"),
        (NOISE, {"timestamps": [-1, 1, 2, 3, 4]}, "never go back"),
        (NOISE, {"timestamps": [0, 1, 2, 3, 2]}, "never go back"),
        (NOISE, {"fps": 0}, "fps"),
        (NOISE, {"fps": -2}, "fps"),
        (NOISE, {"fps": np.nan}, "fps"),
        (NOISE, {"fps": 1e9}, "fps"),
        (NOISE, {"fps": "2"}, "fps"),
        (NOISE, {"max_frames": 0}, "max_frames"),
        (NOISE, {"max_frames": 2.5}, "max_frames"),
        (NOISE, {"min_frames": 9, "max_frames": 8}, "min_frames"),
        (NOISE, {"start": -1}, "start"),
        (NOISE, {"start": 2, "end": 2}, "start"),
        (NOISE, {"start": 100}, "no frame lies"),
        (NOISE, {"end": np.nan}, "end"),
        (NOISE, {"min_pixels": 10, "max_pixels": 5}, "pixel"),
    ],
)
def test_what_is_no_video_is_named(source: object, options: dict[str, object], match: str) -> None:
    with pytest.raises(MediaError, match=match):
        Video.of(source, **options)


def test_a_file_takes_no_timestamps_and_urls_are_not_followed_unless_allowed() -> None:
    with pytest.raises(MediaError, match="timestamps"):
        Video.of(b"anything", timestamps=[0])
    for url in ("https://example.invalid/a.mp4", "http://example.invalid/a.mp4", "file:///etc/hostname"):
        with pytest.raises(UnsupportedInputError):
            Video.of(url)
    with pytest.raises(UnsupportedInputError, match="https"):
        Video.of("http://example.invalid/a.mp4", allow_remote=True)


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc")
def test_500_mixed_sources_leave_memory_flat() -> None:
    frames = clips.grey_ramp(20)
    whole = clips.clip(frames)
    gif = io.BytesIO()
    pictures = [PIL.Image.fromarray(frame) for frame in frames]
    pictures[0].save(gif, "GIF", save_all=True, append_images=pictures[1:], duration=100)
    sources = [
        whole,
        whole[: len(whole) // 2],
        clips.clip(frames, format="matroska")[:-300],
        gif.getvalue(),
        gif.getvalue()[:-2000],
        b"no video" * 50,
        frames,
        clips.clip(clips.grey_ramp(0), audio=True),
        np.zeros((1, 2, 600, 3), np.uint8),
        clips.clip(frames, format="mpegts"),
    ]
    n_refused = 0
    sizes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(600):
            try:
                Video.of(sources[number % len(sources)], max_frames=8, max_pixels=3136).to_data_url()
            except MediaError:
                n_refused += 1
            if number % 100 == 99:
                sizes.append(resident_bytes())
    assert n_refused == 600 // len(sources) * 4
    assert max(sizes[1:]) <= sizes[0] * 1.05, sizes


def test_the_program_writes_the_container(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(clips.clip(clips.grey_ramp(20)))
    command = [sys.executable, "-W", "error", "-W", "ignore:the font", "-m", "pyllamaernie.media"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    options = ["--min-pixels", "3136", "--max-pixels", "4842768", "--max-frames", "5"]
    expected = Video.of(path, max_frames=5).to_frames_bytes(*LIMITS)
    for arguments, given in (([str(path)], None), (["-"], path.read_bytes())):
        answer = subprocess.run(
            [*command, *arguments, *options], input=given, capture_output=True, check=False, env=environment
        )
        assert (answer.returncode, answer.stderr) == (0, b"")
        assert answer.stdout == expected
    code = "import sys; sys.argv = ['x', '--help']; import pyllamaernie.media.video; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert not {"torch", "av", "pyllamaernie._core", "gguf"} & set(loaded.stdout.split())


def test_the_program_says_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([str(tmp_path / "none.mp4")]) == 4
    assert capsys.readouterr().err.startswith("error: ")
    assert main(["x.mp4", "--fps", "-1"]) == 4
    assert "fps" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([])
