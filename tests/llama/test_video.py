"""Videos through `Llama`: one block with its own positions, and the same answer whatever form the frames come in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf_models import gguf
from logits_cases import encode, picture
from tiny_vocabulary import token_id

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
from pyllamaernie import Llama, programs
from pyllamaernie.errors import InputError, MediaError, UnsupportedInputError
from pyllamaernie.media.video import Video

FRAMES = np.stack([picture(84, 112, seed=i) for i in range(6)])  # 3 pairs of 3x4 tokens
GREEDY = {"max_tokens": 8, "temperature": 0}


def video_ids(n_slots: int) -> list[int]:
    return [token_id("<|VIDEO_START|>"), *[token_id("<|VIDEO_PLACEHOLDER|>")] * n_slots, token_id("<|VIDEO_END|>")]


def prompt(n_slots: int) -> list[int]:
    return [*encode("User: Video 1:"), *video_ids(n_slots), *encode("What is in the picture?")]


def ask(*media: object, text: str = "What?") -> list[dict]:
    parts = [{"type": "video", "video": m, "min_pixels": 3136, "max_pixels": 9408} for m in media]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.mark.parametrize(
    ("n_frames", "height", "width", "n_tokens", "n_pos"),
    [
        (2, 56, 112, 2 * 4 + 2, 4 + 2),  # a pair alone: as wide as it is
        (6, 84, 112, 3 * 12 + 2, 4 + 2),
        (16, 56, 56, 8 * 4 + 2, 8 + 2),  # more pairs than rows or columns: time decides, as in Baidu's code
    ],
)
def test_a_video_is_one_block_that_advances_by_its_longest_side(
    vl: Llama, n_frames: int, height: int, width: int, n_tokens: int, n_pos: int
) -> None:
    scorer = vl.scorer()
    vl.logits(prompt(36), videos=[FRAMES])  # loads the projector
    chunk = scorer.session.tokenize_video(np.zeros((n_frames, height, width, 3), np.uint8))
    assert (chunk.n_tokens, chunk.n_pos) == (n_tokens, n_pos)


def test_frames_of_a_pair_count_in_their_order(vl: Llama) -> None:
    straight = vl.logits(prompt(36), videos=[FRAMES])[-1]
    swapped = vl.logits(prompt(36), videos=[FRAMES[[1, 0, 2, 3, 4, 5]]])[-1]
    later = vl.logits(prompt(36), videos=[FRAMES[[2, 3, 0, 1, 4, 5]]])[-1]
    assert np.abs(straight - swapped).max() > 0.05 * straight.std()
    assert np.abs(straight - later).max() > 0.05 * straight.std()


def test_an_odd_last_frame_is_there_twice(vl: Llama) -> None:
    odd = vl.logits(prompt(36), videos=[FRAMES[:5]])
    even = vl.logits(prompt(36), videos=[FRAMES[[0, 1, 2, 3, 4, 4]]])
    assert np.array_equal(odd, even)


def test_a_video_is_not_a_picture_even_of_one_frame(vl: Llama) -> None:
    still = [token_id("<|IMAGE_START|>"), *[token_id("<|IMAGE_PLACEHOLDER|>")] * 12, token_id("<|IMAGE_END|>")]
    as_video = vl.logits(video_ids(12), videos=[FRAMES[:1]])
    as_picture = vl.logits(still, images=[FRAMES[0]])
    assert np.abs(as_video - as_picture).max() > 0.05 * as_picture.std()  # START and END are other rows


def test_wrong_room_for_a_video_is_named(vl: Llama) -> None:
    with pytest.raises(InputError, match=r"a video of 6 frames of .* but input_ids hold 37 for it"):
        vl.logits(prompt(35), videos=[FRAMES])
    with pytest.raises(InputError, match="1 videos were given"):
        vl.logits(encode("User: "), videos=[FRAMES])
    with pytest.raises(MediaError, match="video array"):
        vl.logits(prompt(36), videos=[FRAMES[0, 0]])


def test_a_model_without_projector_takes_no_video() -> None:
    with Llama(gguf("vl"), mmproj=None, n_ctx=256) as llm, pytest.raises(UnsupportedInputError, match="no videos"):
        llm.create_chat_completion(ask(FRAMES))


def test_chat_labels_videos_and_pictures_apart_and_counts_their_tokens(vl: Llama) -> None:
    head, tail = "<|begin_of_sentence|>User: ", "What?\nAssistant: "
    video, still = f"Video {{}}:{'<|VIDEO_START|>' * 38}", f"Picture {{}}:{'<|IMAGE_START|>' * 14}"
    reply = vl.create_chat_completion(ask(FRAMES), **GREEDY)
    assert reply["usage"]["prompt_tokens"] == len(vl.tokenize(head + video.format(1) + tail, special=True))
    messages = ask(FRAMES, FRAMES)
    messages[0]["content"].insert(1, {"type": "image", "image": FRAMES[0]})
    reply = vl.create_chat_completion(messages, **GREEDY)
    text = head + video.format(1) + still.format(1) + video.format(2) + tail
    assert reply["usage"]["prompt_tokens"] == len(vl.tokenize(text, special=True))


def test_chat_gives_the_same_answer_for_frames_in_any_form(vl: Llama) -> None:
    answers = {
        vl.create_chat_completion(ask(form), **GREEDY)["choices"][0]["message"]["content"]
        for form in (FRAMES, list(FRAMES), Video.of(FRAMES), Video.of(FRAMES, min_pixels=3136).to_frames_bytes())
    }
    assert len(answers) == 1
    other = vl.create_chat_completion(ask(FRAMES[::-1]), **GREEDY)["choices"][0]["message"]["content"]
    assert other not in answers


def test_chat_answers_as_logits_do(vl: Llama) -> None:
    text = vl.apply_template(ask(FRAMES))
    before, after = text.split("User: ")[0] + "User: Video 1:", "What?" + text.split("What?")[1]
    ids = [*vl.tokenize(before, special=True), *video_ids(36), *vl.tokenize(after, special=True)]
    n_prompt = len(ids)
    for _ in range(GREEDY["max_tokens"]):
        ids.append(int(vl.logits(ids, videos=[FRAMES])[-1].argmax()))
    reply = vl.create_chat_completion(ask(FRAMES), **GREEDY)
    assert reply["usage"]["prompt_tokens"] == n_prompt
    assert vl.detokenize(ids[n_prompt:]).decode("utf-8", "replace") == reply["choices"][0]["message"]["content"]


def test_a_program_has_its_video_decoded_by_the_package(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    clip = tmp_path / "clip.avi"
    with av.open(str(clip), "w") as container:
        stream = container.add_stream("mjpeg", rate=8)
        stream.width, stream.height, stream.pix_fmt = 112, 84, "yuvj420p"
        for frame in np.repeat(FRAMES, 3, axis=0):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    model = gguf("vl")
    projector = model.with_name(f"mmproj-{model.name}")
    command = [str(programs.path("llama-mtmd-cli")), "-m", str(model), "--mmproj", str(projector), "--jinja"]
    command += ["--image", str(clip), "-p", "What?", "-n", "4", "--temp", "0", "-c", "4096"]
    environment = {**os.environ, "PYLLAMAERNIE_PYTHON": sys.executable}
    run = dict(capture_output=True, text=True, errors="replace", timeout=120)
    done = subprocess.run(command, env=environment, **run)
    assert done.returncode == 0, done.stderr[-2000:]
    with Llama(model, n_ctx=4096, n_threads=1) as llm:
        messages = [{"role": "user", "content": [{"type": "video", "video": clip}, {"type": "text", "text": "What?"}]}]
        reply = llm.create_chat_completion(messages, max_tokens=4, temperature=0)
    assert reply["choices"][0]["message"]["content"].strip() == done.stdout.strip()
    del environment["PYLLAMAERNIE_PYTHON"]
    refused = subprocess.run(command, env=environment, **run)
    assert refused.returncode != 0 and "start this program by `pyllamaernie tool`" in refused.stderr
