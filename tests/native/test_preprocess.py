"""Pictures as mtmd hands them to the tower, against the reference processor: sizes, token counts, pixels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from gguf_models import image_ids, picture

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
import checkpoints

from pyllamaernie import Llama, _core
from pyllamaernie.convert import convert

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
FILE = json.loads((Path(__file__).parents[1] / "data/image_sizes.json").read_text())
SMALL = [row for row in FILE["sizes"] if row[0] * row[1] < 400_000][:60]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = checkpoints.write_checkpoint(tmp_path_factory.mktemp("preprocess") / "vl", "vl", tied=False)
    (path / "preprocessor_config.json").unlink()  # then the limits are those of the released models
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[Llama]:
    with Llama(convert(folder, folder / "vl.gguf", type="f32").model, n_ctx=512, n_threads=1) as llm:
        llm.logits(image_ids(2, 2), [picture(56, 56)])  # loads the projector
        yield llm


@pytest.fixture(scope="module")
def session(llm: Llama) -> _core.Session:
    return llm.scorer().session


def test_token_counts_equal_the_references_for_200_sizes(session: _core.Session) -> None:
    found = []
    for height, width, rows, columns in FILE["sizes"]:
        chunk = session.tokenize_image(np.zeros((height, width, 3), np.uint8))
        _, new_height, new_width, _ = chunk.pixels().shape
        found.append([height, width, new_height // 28, new_width // 28])
        assert chunk.n_tokens == rows * columns + 2 and chunk.n_pos == max(rows, columns) + 2
    assert len(found) == 200 and found == FILE["sizes"]


def test_pixels_equal_pillows_bicubic_stretch(session: _core.Session) -> None:
    errors = []
    for height, width, rows, columns in SMALL:
        rgb = picture(height, width, seed=height + width)
        stretched = PIL.Image.fromarray(rgb).resize((28 * columns, 28 * rows), PIL.Image.Resampling.BICUBIC)
        levels = session.tokenize_image(rgb).pixels()[0] * STD + MEAN
        errors.append(np.abs(levels - np.asarray(stretched) / 255).mean())
    assert len(errors) == 60
    # newer Pillows take the cheaper order of the two passes, mtmd rows first: Llama stretches with Pillow itself
    assert max(errors) <= 1 / 255 / 4


def test_llama_stretches_exactly_as_the_reference_does(llm: Llama) -> None:
    for height, width, rows, columns in SMALL:
        rgb = picture(height, width, seed=height + width)
        stretched = PIL.Image.fromarray(rgb).resize((28 * columns, 28 * rows), PIL.Image.Resampling.BICUBIC)
        levels = llm.scorer().session.tokenize_image(llm.load_image(rgb).rgb).pixels()[0] * STD + MEAN
        assert np.abs(levels * 255 - np.asarray(stretched)).max() < 1e-3


def test_a_picture_that_fits_is_left_alone(session: _core.Session) -> None:
    rgb = picture(84, 140)
    levels = session.tokenize_image(rgb).pixels()[0] * STD + MEAN
    assert np.abs(levels * 255 - rgb).max() < 1e-3


@pytest.mark.reference
def test_patches_equal_the_reference_processors(session: _core.Session, folder: Path) -> None:
    from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import (
        Ernie4_5_VLMoeImageProcessorPil,
    )

    processor = Ernie4_5_VLMoeImageProcessorPil()
    for height, width, rows, columns in SMALL[:20]:
        rgb = picture(height, width, seed=height + width)
        theirs = processor(images=[rgb], return_tensors="np")["pixel_values"]
        ours = session.tokenize_image(rgb).pixels()[0]
        blocks = ours.reshape(rows, 2, 14, columns, 2, 14, 3).transpose(0, 3, 1, 4, 6, 2, 5)
        error = np.abs(blocks.reshape(theirs.shape) - theirs) * STD.mean()
        assert error.mean() <= 1 / 255, (height, width)
