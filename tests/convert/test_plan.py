"""Checkpoints whose tensors or settings do not fit together are refused by name, and leave no file."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import numpy as np
import pytest
from checkpoint_shapes import KINDS

from pyllamaernie.convert import convert
from pyllamaernie.errors import ConvertError, TensorMappingError


def refused(tmp_path: Path, kind: str, match: str, error: type[Exception] = ConvertError, **options: object) -> None:
    """Converting such a checkpoint is refused with these words and leaves no file."""
    folder = checkpoints.write_checkpoint(tmp_path / kind, kind, **options)
    (tmp_path / "out").mkdir()
    with pytest.raises(error, match=match):
        convert(folder, tmp_path / "out" / "x.gguf", type="f32")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("dense", "model.layers.2.self_attn.k_proj.weight"),
        ("moe", "model.layers.1.mlp.experts.5.up_proj.weight"),
        ("vl", "model.layers.3.mlp.gate.weight_1"),
        ("vl", "model.layers.1.mlp.experts.12.down_proj.weight"),
        ("vl", "model.resampler_model.temporal_linear.2.bias"),
        ("vl", "model.vision_model.ln.weight"),
    ],
)
def test_a_missing_tensor_is_named(kind: str, name: str, tmp_path: Path) -> None:
    canonical = name.replace("model.vision_model", "vision_model").replace(".", r"\.")
    refused(tmp_path, kind, f"1 missing: {canonical}$", TensorMappingError, drop=[name])


def test_many_missing_tensors_are_counted_and_five_are_named(tmp_path: Path) -> None:
    names = [f"model.layers.1.mlp.experts.{e}.up_proj.weight" for e in range(7)]
    refused(tmp_path, "moe", r"7 missing: .*experts\.4\.up_proj\.weight and 2 more", TensorMappingError, drop=names)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_tensor_is_named(kind: str, tmp_path: Path) -> None:
    extra = {"model.layers.0.surprise.weight": np.ones((2, 2), np.float32)}
    refused(tmp_path, kind, r"1 unknown: model\.layers\.0\.surprise\.weight", TensorMappingError, extra=extra)


def test_an_odd_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    extra = {"model.layers.0.mlp.down_proj.weight": np.ones((256, 100), np.float32)}
    refused(
        tmp_path,
        "dense",
        r"down_proj\.weight has shape \[256, 100\], expected \[256, 384\]",
        TensorMappingError,
        extra=extra,
    )


def test_paddle_layout_is_suspected_where_a_matrix_is_transposed(tmp_path: Path) -> None:
    up = checkpoints.weights_of("dense")["model.layers.0.mlp.up_proj.weight"]
    refused(
        tmp_path, "dense", "Paddle.*-PT", TensorMappingError, extra={"model.layers.0.mlp.up_proj.weight": up.T.copy()}
    )


def test_a_tensor_of_integers_is_named(tmp_path: Path) -> None:
    extra = {"model.norm.weight": np.ones(256, np.int64)}
    refused(
        tmp_path,
        "dense",
        r"model\.norm\.weight is I64, expected one of F32, F16, BF16",
        TensorMappingError,
        extra=extra,
    )


def test_an_untied_model_without_output_matrix_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "dense", r"missing: lm_head\.weight", TensorMappingError, tied=False, drop=["lm_head.weight"])


@pytest.mark.parametrize("name", ["llama", "ernie", None])
def test_another_model_type_names_the_supported_ones(name: str | None, tmp_path: Path) -> None:
    refused(
        tmp_path,
        "dense",
        f"model_type {name!r}; supported are ernie4_5, ernie4_5_moe, ernie4_5_vl_moe",
        config_changes={"model_type": name},
    )


def test_a_scaled_rope_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "dense", "rope type 'linear'", config_changes={"rope_scaling": {"type": "linear", "factor": 2.0}})


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps", "vocab_size"]
)
def test_a_missing_config_key_is_named(key: str, tmp_path: Path) -> None:
    refused(tmp_path, "dense", f"no {key}", config_changes={key: None})


def test_moe_layers_in_a_pattern_that_gguf_cannot_say_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "moe", "layers dSdS", config_changes={"moe_layer_interval": 2})
