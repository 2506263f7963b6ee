"""PaddleOCR-VL, upstream's architecture on ERNIE 4.5's text stack: upstream's converter, our runtime, transformers."""

from __future__ import annotations

import json
import subprocess
import sys

import checkpoints
import numpy as np
import pytest
from logits_cases import encode, picture
from tiny_vocabulary import token_id
from upstream_tree import upstream

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
pytestmark = pytest.mark.reference

PLACEHOLDER = "<|IMAGE_PLACEHOLDER|>"
HEIGHT, WIDTH = 112, 168  # of final size: upstream pads where the processor stretches, see docs/parity.md


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    """(transformers' model, its image processor, our `Llama`) of a random checkpoint."""
    import torch
    import transformers
    from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil

    from pyllamaernie import Llama

    transformers.utils.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("paddleocr")
    rope = {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [8, 12, 12]}
    config = transformers.PaddleOCRVLConfig(
        text_config={
            "vocab_size": 512, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "rope_parameters": rope,
            "max_position_embeddings": 4096,
        },
        vision_config={
            "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": 112, "architectures": ["PaddleOCRVisionModel"],
        },
        image_token_id=token_id(PLACEHOLDER), video_token_id=token_id("<|VIDEO_PLACEHOLDER|>"),
        vision_start_token_id=token_id("<|IMAGE_START|>"), vision_end_token_id=token_id("<|IMAGE_END|>"),
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.PaddleOCRVLForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if weight.ndim >= 2:
                weight.normal_(0, 0.3 if "embed" in name else weight[0].numel() ** -0.5)
            else:
                weight.normal_(*((1, 0.2) if "norm" in name and name.endswith("weight") else (0, 0.1)))
    folder = root / "PaddleOCR-VL"
    theirs.save_pretrained(folder)
    said = json.loads((folder / "config.json").read_text())
    said["vision_config"]["architectures"] = ["PaddleOCRVisionModel"]
    (folder / "config.json").write_text(json.dumps(said))
    checkpoints.write_tokenizer(folder, "vl")
    limits = {"min_pixels": 3136, "max_pixels": 156800, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = {"image_processor_type": "PaddleOCRVLImageProcessor", "patch_size": 14, "merge_size": 2, **limits}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    text, mmproj = root / "ocr.gguf", root / "mmproj-ocr.gguf"
    for out, option in ((text, []), (mmproj, ["--mmproj"])):
        program = [sys.executable, upstream() / "convert_hf_to_gguf.py", folder, "--outfile", out, "--outtype", "f32"]
        done = subprocess.run([*program, *option], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    with Llama(text, type_k="f32", type_v="f32", n_ctx=512) as llm:
        yield theirs, PaddleOCRVLImageProcessorPil.from_pretrained(folder), llm


def test_logits_of_text_and_picture_equal_transformers(model) -> None:
    import torch

    theirs, processor, llm = model
    image = picture(HEIGHT, WIDTH, seed=0)
    pixels = processor(images=[image], return_tensors="pt")
    n = int(pixels["image_grid_thw"].prod()) // 4
    before = [*encode("User: "), token_id("<|IMAGE_START|>")]
    after = [token_id("<|IMAGE_END|>"), *encode("What is in the picture?")]
    ids = torch.tensor([before + [token_id(PLACEHOLDER)] * n + after])
    kinds = (ids == token_id(PLACEHOLDER)).int()
    with torch.no_grad():
        expected = theirs(input_ids=ids, mm_token_type_ids=kinds, use_cache=False, **pixels).logits[0].numpy()

    error = np.abs(llm.logits(ids[0].tolist(), images=[image]) - expected).max(-1) / expected.std()
    print(f"largest error over the deviation: text {error[: len(before)].max():.1e}, all {error.max():.1e}")
    assert error[: len(before)].max() < 1e-4
    assert error.max() < 1e-2  # its GELU comes from a half-precision table


def test_a_picture_is_answered(model) -> None:
    _, _, llm = model
    question = {"type": "text", "text": "What is in the picture?"}

    def answer(seed: int) -> dict:
        shown = {"type": "image", "image": picture(HEIGHT, WIDTH, seed=seed)}
        return llm.create_chat_completion([{"role": "user", "content": [shown, question]}], max_tokens=8, temperature=0)

    first, again, other = (answer(seed) for seed in (0, 0, 5))
    assert first["usage"]["completion_tokens"] > 0
    assert first["choices"][0]["message"] == again["choices"][0]["message"] != other["choices"][0]["message"]
