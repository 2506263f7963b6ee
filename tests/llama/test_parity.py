"""A few rows of docs/parity.md, and the one place where Baidu's positions and transformers' part."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import numpy as np
import pytest

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
import parity

pytestmark = pytest.mark.reference

WANTED = {("21B-A3B", "text"), ("300B-A47B", "text"), ("VL-28B-A3B", "video"), ("VL-28B-A3B", "image, text, image")}


def test_float32_rows_meet_their_bars(tmp_path: Path) -> None:
    found = list(parity.rows(tmp_path, lambda name, prompt, kind: kind == "f32" and (name, prompt) in WANTED))
    assert {(row.name, row.prompt) for row in found} == WANTED
    for row in found:
        print(parity.line(row.cells()))
        assert row.ok() and row.error < 1e-3, row


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    from pyllamaernie import Llama
    from pyllamaernie.convert import convert

    root = tmp_path_factory.mktemp("video")
    folder = checkpoints.write_checkpoint(root / "vl", "vl", tied=False)
    with Llama(convert(folder, root / "vl.gguf", type="f32").model, type_k="f32", type_v="f32", n_ctx=512) as llm:
        yield folder, llm


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / b.std())


@pytest.mark.parametrize(("n_frames", "agree"), [(4, True), (6, True), (12, False)])
def test_positions_behind_a_video_follow_baidu(n_frames: int, agree: bool, model) -> None:
    """6 pairs of 2 x 3 tokens: Baidu's code goes on 6 positions further, transformers 3."""
    import reference

    folder, llm = model
    medium = parity.Medium(56, 84, 2, 3, n_frames=n_frames)
    prompt = parity.Prompt("video", ("User: Video 1:", medium, parity.ASK))
    ids, videos = prompt.input_ids(), prompt.videos(3)
    ours = llm.logits(ids, videos=videos)
    is_patch = [i == reference.token_id(reference.VIDEO_PLACEHOLDER) for i in ids]
    baidu = reference.baidu_positions(is_patch, [medium.grid])
    assert baidu.shape == (3, 1, len(ids)) and int(baidu.max()) == prompt.n_positions() - 1
    assert difference(ours, reference.logits(folder, ids, videos=videos, position_ids=baidu)) < 5e-3
    theirs = reference.logits(folder, ids, videos=videos)
    if agree:
        assert difference(ours, theirs) < 5e-3
    else:
        end = len(ids) - is_patch[::-1].index(True)
        assert difference(ours[:end], theirs[:end]) < 5e-3 and difference(ours[end:], theirs[end:]) > 0.1


def test_the_order_of_frames_matters(model) -> None:
    _, llm = model
    prompt = parity.Prompt("video", ("User: Video 1:", parity.CLIP, parity.ASK))
    ids, (video,) = prompt.input_ids(), prompt.videos(3)
    assert difference(llm.logits(ids, videos=[video[::-1].copy()])[-1], llm.logits(ids, videos=[video])[-1]) > 0.05
