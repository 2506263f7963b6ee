"""transformers as the reference: logits, greedy continuations, pictures and videos. Needs torch, but no torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open
from tiny_vocabulary import token_id
from transformers import AutoModelForCausalLM, Ernie4_5_VLMoeForConditionalGeneration
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

PLACEHOLDER, VIDEO_PLACEHOLDER = "<|IMAGE_PLACEHOLDER|>", "<|VIDEO_PLACEHOLDER|>"
_MARKERS = tuple(f"<|{kind}_{side}|>" for kind in ("IMAGE", "VIDEO") for side in ("START", "END"))


@lru_cache(maxsize=4)
def load(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The model of a folder, in float32 by default, with eager attention. Every key must be found and used.

    But a correction bias: transformers has one always, of zeros where the checkpoint has none.
    """
    kind = (
        Ernie4_5_VLMoeForConditionalGeneration
        if (Path(folder) / "preprocessor_config.json").is_file()
        else AutoModelForCausalLM
    )
    model, info = kind.from_pretrained(folder, dtype=dtype, attn_implementation="eager", output_loading_info=True)
    absent = {name for name in info["missing_keys"] if name.endswith("e_score_correction_bias")}
    assert all(not model.get_parameter(name).any() for name in absent)
    wrong = {key: sorted(set(info[key]) - absent) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    assert not any(wrong.values()), wrong
    return model.eval()


@lru_cache(maxsize=4)
def image_processor(folder: Path) -> Ernie4_5_VLMoeImageProcessorPil:
    """The reference's Pillow image processor; needs no torchvision."""
    return Ernie4_5_VLMoeImageProcessorPil.from_pretrained(folder)


def merged_grid(folder: Path, image: np.ndarray) -> tuple[int, int]:
    """Rows and columns of placeholder tokens of a picture (height, width, 3) uint8."""
    grid = image_processor(folder)(images=[image], return_tensors="np")["image_grid_thw"][0]
    return int(grid[1]) // 2, int(grid[2]) // 2


def grid_of(video: np.ndarray) -> tuple[int, int, int]:
    """Pairs, rows and columns of the placeholder tokens of a video (frames, height, width, 3) of final size."""
    n, height, width, _ = video.shape
    return n // 2, height // 28, width // 28


def baidu_positions(is_patch: Sequence[bool], grids: Sequence[tuple[int, int, int]]) -> torch.Tensor:
    """Position ids by the rule of Baidu's own code, where a medium takes as many positions as its longest axis.

    `is_patch` tells the placeholders, `grids` are the merged ones of the media in their order.
    Shapes: -> (3, 1, len(is_patch)) int64, time, row, column
    """
    left, rows, at, i = list(grids), [], 0, 0
    while i < len(is_patch):
        if not is_patch[i]:
            rows.append(torch.full((3, 1), at))
            at, i = at + 1, i + 1
            continue
        t, h, w = left.pop(0)
        axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
        rows.append(torch.stack(axes).reshape(3, -1) + at)
        at, i = at + max(t, h, w), i + t * h * w
    return torch.cat(rows, dim=1)[:, None]


def _inputs(
    folder: Path, input_ids: Sequence[int], images: Sequence[np.ndarray], videos: Sequence[np.ndarray]
) -> dict[str, torch.Tensor]:
    ids = torch.tensor([list(input_ids)], dtype=torch.long)
    out = {"input_ids": ids}
    if not len(images) and not len(videos):
        return out
    kinds = (ids == token_id(PLACEHOLDER)).int() + 2 * (ids == token_id(VIDEO_PLACEHOLDER)).int()
    is_vision = (kinds > 0) | torch.isin(ids, torch.tensor([token_id(text) for text in _MARKERS]))
    out |= {"mm_token_type_ids": kinds, "moe_mm_token_type_ids": is_vision.int()}
    if len(images):
        pixels = image_processor(folder)(images=list(images), return_tensors="pt")
        out |= {"pixel_values": pixels["pixel_values"], "image_grid_thw": pixels["image_grid_thw"]}
    if len(videos):
        # the reference's video processor imports torchvision; of frames of final size it makes the same patches
        pixels = [image_processor(folder)(images=list(video), return_tensors="pt") for video in videos]
        both = zip(videos, pixels, strict=True)
        grids = [torch.tensor([len(video), *pixel["image_grid_thw"][0, 1:]]) for video, pixel in both]
        sizes = [(int(h) * 14, int(w) * 14) for _, h, w in grids]
        assert sizes == [video.shape[1:3] for video in videos], "frames must have a size that the processor keeps"
        out["pixel_values_videos"] = torch.cat([pixel["pixel_values"] for pixel in pixels])
        out["video_grid_thw"] = torch.stack(grids)
    return out


@torch.no_grad()
def logits(
    folder: Path,
    input_ids: Sequence[int],
    images: Sequence[np.ndarray] = (),
    dtype: torch.dtype = torch.float32,
    *,
    videos: Sequence[np.ndarray] = (),
    position_ids: torch.Tensor | None = None,
) -> np.ndarray:
    """Logits of every position; `position_ids` in place of transformers' own.

    Shapes: -> (len(input_ids), n_vocab) float32
    """
    inputs = _inputs(folder, input_ids, images, videos)
    for name in {"pixel_values", "pixel_values_videos"} & inputs.keys():
        inputs[name] = inputs[name].to(dtype)
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    return load(folder, dtype)(**inputs, use_cache=False).logits[0].float().numpy()


def greedy(
    folder: Path, input_ids: Sequence[int], images: Sequence[np.ndarray] = (), n: int = 32
) -> tuple[list[int], float]:
    """n tokens, each from a full pass without a cache, and the smallest margin between first and second choice."""
    ids, margin = list(input_ids), np.inf
    for _ in range(n):
        row = logits(folder, ids, images)[-1]
        second, first = np.sort(row)[-2:]
        margin = min(margin, float(first - second))
        ids.append(int(row.argmax()))
    return ids[len(input_ids) :], margin


@torch.no_grad()
def drafts(folder: Path, input_ids: Sequence[int]) -> list[int]:
    """What the first multi-token-prediction layer takes for the token after each one, reading the ids themselves.

    transformers has no such layer; this is its decoder layer, fed as llama.cpp feeds one: with each token comes the
    hidden state of the token before it, nothing with the first.
    """
    model = load(folder)
    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if ".mtp_" in name]
        weights = {name.removeprefix("model.mtp_"): file.get_tensor(name).float() for name in names}
    block = type(model.model.layers[0])(model.config, 0).float().eval()  # layer 0 is a dense one
    stem = "block.0."
    block.load_state_dict({k.removeprefix(stem): v for k, v in weights.items() if k.startswith(stem)})

    def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps) * weight

    ids = torch.tensor([list(input_ids)])
    hidden = model.model(ids, use_cache=False).last_hidden_state  # behind the output norm
    hidden = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], dim=1)
    embedded = rms(model.model.embed_tokens(ids), weights["emb_norm.0.weight"])
    x = torch.cat([embedded, rms(hidden, weights["hidden_norm.0.weight"])], dim=-1) @ weights["linear_proj.0.weight"].T
    n = ids.shape[1]
    mask = torch.full((n, n), -torch.inf).triu(1)[None, None]
    turned = model.model.rotary_emb(x, torch.arange(n)[None])
    x = block(x, attention_mask=mask, position_embeddings=turned)
    return model.lm_head(model.model.norm(x))[0].argmax(-1).tolist()
