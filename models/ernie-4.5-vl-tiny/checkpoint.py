"""The checkpoint folder that training leaves: weights, configuration, tokenizer and processors. Not its own state."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import recipe
import torch
from torch import nn
from transformers import GenerationConfig

HERE = Path(__file__).resolve().parent
SIDE_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def processors() -> dict[str, dict[str, Any]]:
    """The configuration of the picture and of the video processor, by file name."""
    size = {"shortest_edge": recipe.PIXELS_MIN, "longest_edge": recipe.PIXELS_MAX}
    shared = dict(
        do_convert_rgb=True,
        do_resize=True,
        do_rescale=True,
        do_normalize=True,
        resample=3,
        rescale_factor=1 / 255,
        image_mean=[round(float(x), 8) for x in recipe.MEAN],
        image_std=[round(float(x), 8) for x in recipe.STD],
        patch_size=recipe.PATCH,
        merge_size=recipe.MERGE,
        size=size,
    )
    image = shared | dict(
        image_processor_type="Ernie4_5_VLMoeImageProcessor",
        temporal_patch_size=1,
        processor_class="Ernie4_5_VLMoeProcessor",
    )
    video = shared | dict(
        video_processor_type="Ernie4_5_VLMoeVideoProcessor",
        temporal_patch_size=2,
        processor_class="Ernie4_5_VLMoeProcessor",
    )
    return {"preprocessor_config.json": image, "video_preprocessor_config.json": video}


def save(model: nn.Module, out: Path, averages: dict[str, torch.Tensor] | None) -> None:
    """Write the checkpoint folder: bf16, routers and correction biases in F32."""
    out.mkdir(parents=True, exist_ok=True)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    if averages:
        model.load_state_dict(averages, strict=False)
    for name, p in model.named_parameters():
        if not ("gate.weight" in name or "statics" in name):
            p.data = p.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0, do_sample=False)
    model.save_pretrained(out)
    for p in model.parameters():
        p.data = p.data.float()
    model.load_state_dict(state)
    for name in SIDE_FILES:
        if (HERE / name).resolve() != (out / name).resolve():
            shutil.copyfile(HERE / name, out / name)
    for name, settings in processors().items():
        (out / name).write_text(json.dumps(settings, indent=1) + "\n")
