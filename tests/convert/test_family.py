"""Every checkpoint kind of the family: shape classes through the converter, full sizes through a dry run."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import checkpoint_config
import checkpoints
import numpy as np
import pytest
import verb
from checkpoint_shapes import KINDS, shape_with
from gguf import GGUFReader
from shape_classes import CLASSES, RELEASED

from pyllamaernie.convert import ConvertResult, convert, mtp_path
from pyllamaernie.errors import ConvertError, MissingFileError, TensorMappingError

MTP = "ernie4_5-mtp"


def arrays(path: Path) -> dict[str, np.ndarray]:
    return {t.name: t.data.reshape(t.shape[::-1]) for t in GGUFReader(path).tensors}


def keys(path: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items() if "tokenizer" not in name}


def config_folder(folder: Path, name: str, *, flat: bool = True) -> Path:
    """A folder with the released model's config.json and nothing else."""
    model = RELEASED[name]
    folder.mkdir(parents=True)
    config = checkpoint_config.config(model.kind, model.shape, flat=flat, tied=model.tied, dtype="bfloat16")
    if not model.shape.correction_bias:
        config["moe_use_aux_free"] = False
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def add_index(folder: Path, name: str, n_shards: int = 7) -> dict[str, tuple[int, ...]]:
    model = RELEASED[name]
    shapes = checkpoints.tensor_shapes(model.kind, model.shape, tied=model.tied)
    files = {key: f"model-{i % n_shards + 1:05d}-of-{n_shards:05d}.safetensors" for i, key in enumerate(shapes)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return shapes


def add_headers(folder: Path, shapes: dict[str, tuple[int, ...]], *, sparse: bool) -> None:
    """Safetensors files whose data are a hole (`sparse`) or missing, as after a download of the first bytes."""
    files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for file in sorted(set(files.values())):
        header, end = {}, 0
        for key in (key for key in shapes if files[key] == file):
            begin, end = end, end + 2 * math.prod(shapes[key])
            header[key] = {"dtype": "BF16", "shape": shapes[key], "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            if sparse:
                out.truncate(8 + len(text) + end)


def dry(folder: Path, **options: object) -> ConvertResult:
    return convert(folder, folder / "x.gguf", dry_run=True, **options)


@pytest.mark.parametrize("name", RELEASED)
def test_full_sizes_have_the_published_number_of_parameters(name: str, tmp_path: Path) -> None:
    model, result = RELEASED[name], dry(config_folder(tmp_path / name, name))
    assert abs(result.n_params - model.params) <= 0.5 * model.digits + 1e-3 * model.params, model.where
    if model.digits / model.params < 2e-3:  # published closely enough: then the rounded number must be the same
        assert round(result.n_params / model.digits) == round(model.params / model.digits), model.where
    shapes = checkpoints.tensor_shapes(model.kind, model.shape, tied=model.tied)
    assert result.n_params == sum(math.prod(dims) for dims in shapes.values())
    assert result.type == "bf16"
    assert result.assumed == "shapes from config.json, names from it too; no tokenizer to check"
    assert not [path for path in (tmp_path / name).iterdir() if path.suffix == ".gguf"]


@pytest.mark.parametrize("name", RELEASED)
def test_config_index_and_headers_plan_the_same_file(name: str, tmp_path: Path) -> None:
    folder = config_folder(tmp_path / name, name)
    first = dry(folder)
    shapes = add_index(folder, name)
    second = dry(folder)
    add_headers(folder, shapes, sparse=False)
    third = dry(folder)
    assert first.tensors == second.tensors == third.tensors
    assert second.assumed == "shapes from config.json, names from the index; no tokenizer to check"
    assert third.assumed == "no tokenizer to check"
    if name == "0.3B":  # larger files would need a file system that allows terabyte holes
        add_headers(folder, shapes, sparse=True)
        assert dry(folder).tensors == first.tensors


@pytest.mark.parametrize("name", [name for name in RELEASED if RELEASED[name].kind == "vl"])
def test_the_nested_configuration_plans_the_same_file(name: str, tmp_path: Path) -> None:
    flat, nested = (config_folder(tmp_path / f"{f}" / name, name, flat=f) for f in (True, False))
    assert dry(flat).tensors == dry(nested).tensors


def test_planned_sizes_are_those_of_the_written_file(tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "m", dtype="BF16", **CLASSES["21B-A3B"])
    result = convert(folder, tmp_path / "x.gguf")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert dry(folder, type="bf16").tensors == result.tensors
    with pytest.raises(MissingFileError, match=r"no model\.safetensors"):
        convert(folder, tmp_path / "y.gguf")


def test_the_index_names_what_is_missing_or_unknown(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "m", "21B-A3B")
    add_index(folder, "21B-A3B")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.3.mlp.gate.weight"]
    index["weight_map"]["model.layers.3.surprise"] = "model-00001-of-00007.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TensorMappingError, match=r"missing: model\.layers\.3\.mlp\.gate.*unknown: model.*surprise"):
        dry(folder)


def test_a_dry_run_needs_no_more_than_a_config_on_the_command_line(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "ERNIE-4.5-300B-A47B-PT", "300B-A47B")
    done = verb.run("convert", folder, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    cells = [row.split() for row in rows]
    assert ["text", "blk.3.ffn_gate_exps.weight", "8192x3584x64", "BF16", str(2 * 8192 * 3584 * 64)] in cells
    assert ["mtp", "blk.0.nextn.eh_proj.weight", "16384x8192", "BF16", str(2 * 16384 * 8192)] in cells
    assert rows[-1].startswith("total: 300.5 billion parameters, ")
    assert rows[-1].endswith("(shapes from config.json, names from it too; no tokenizer to check)")


@pytest.fixture(scope="module", params=CLASSES)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(options, result) of a class in float32."""
    root = tmp_path_factory.mktemp("class")
    options = CLASSES[request.param]
    return options, convert(checkpoints.write_checkpoint(root / "m", **options), root / "x.gguf", type="f32")


def test_the_class_has_its_parts_and_no_others(converted) -> None:
    options, result = converted
    shape, names = options["shape"], arrays(result.model).keys()
    first = f"blk.{shape.n_dense}"
    moe = options["kind"] != "dense"
    assert ("output.weight" in names) == (not options["tied"])
    assert (f"{first}.exp_probs_b.bias" in names) == (moe and shape.correction_bias)
    assert (f"{first}.ffn_up_shexp.weight" in names) == (moe and shape.n_shared > 0)
    assert (f"blk.{shape.n_dense - 1}.ffn_gate_inp.weight" in names) is False
    assert (f"{first}.ffn_gate_inp.weight" in names) == moe
    assert (result.mmproj is not None) == (options["kind"] == "vl")
    assert (result.mtp is not None) == (shape.n_mtp > 0)


def test_every_parameter_is_counted_once(converted) -> None:
    options, result = converted
    assert result.n_params == sum(w.size for w in checkpoints.weights_of(**options).values())


@pytest.mark.parametrize("kind", ["moe", "vl"])
def test_a_correction_bias_may_be_missing(kind: str, tmp_path: Path) -> None:
    shape = shape_with(kind, correction_bias=False)
    folder = checkpoints.write_checkpoint(tmp_path / "m", kind, shape=shape)
    assert not [name for name in arrays(convert(folder, tmp_path / "x.gguf").model) if "exp_probs_b" in name]


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_checkpoint_converts_with_a_warning(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "base", kind, chat_template=False)
    result = convert(folder, tmp_path / "x.gguf")
    assert [r.levelno for r in caplog.records if "no chat template" in r.message] == [logging.WARNING]
    assert "tokenizer.chat_template" not in GGUFReader(result.model).fields
    caplog.clear()
    convert(checkpoints.write_checkpoint(tmp_path / "chat", kind), tmp_path / "y.gguf")
    assert "no chat template" not in caplog.text


def mtp_checkpoint(folder: Path, **options: object) -> Path:
    return checkpoints.write_checkpoint(folder, **{"kind": "moe", "shape": shape_with("moe", n_mtp=1), **options})


@pytest.mark.parametrize("tied", [True, False])
def test_prediction_layers_become_a_draft_model(tied: bool, tmp_path: Path) -> None:
    result = convert(mtp_checkpoint(tmp_path / "m", tied=tied), tmp_path / "x.gguf", type="f32")
    weights = checkpoints.weights_of("moe", shape=shape_with("moe", n_mtp=1), tied=tied)
    assert result.mtp == mtp_path(result.model) == tmp_path / "mtp-x.gguf"
    found = arrays(result.mtp)
    pairs = {
        "token_embd": "embed_tokens", "output_norm": "norm",
        "blk.0.nextn.eh_proj": "mtp_linear_proj.0", "blk.0.nextn.enorm": "mtp_emb_norm.0",
        "blk.0.nextn.hnorm": "mtp_hidden_norm.0", "blk.0.attn_norm": "mtp_block.0.input_layernorm",
        "blk.0.attn_q": "mtp_block.0.self_attn.q_proj", "blk.0.attn_k": "mtp_block.0.self_attn.k_proj",
        "blk.0.attn_v": "mtp_block.0.self_attn.v_proj", "blk.0.attn_output": "mtp_block.0.self_attn.o_proj",
        "blk.0.ffn_norm": "mtp_block.0.post_attention_layernorm", "blk.0.ffn_gate": "mtp_block.0.mlp.gate_proj",
        "blk.0.ffn_up": "mtp_block.0.mlp.up_proj", "blk.0.ffn_down": "mtp_block.0.mlp.down_proj",
    }  # fmt: skip
    assert found.keys() == {f"{ours}.weight" for ours in pairs} | (set() if tied else {"output.weight"})
    for ours, theirs in pairs.items():
        assert np.array_equal(found[f"{ours}.weight"], weights[f"model.{theirs}.weight"]), ours
    said = keys(result.mtp)
    assert said["general.architecture"] == MTP and said["general.type"] == "model"
    assert (said[f"{MTP}.block_count"], said[f"{MTP}.nextn_predict_layers"]) == (1, 1)
    assert (
        GGUFReader(result.mtp).fields["tokenizer.ggml.tokens"].contents()
        == GGUFReader(result.model).fields["tokenizer.ggml.tokens"].contents()
    )


def test_the_text_model_does_not_depend_on_prediction_layers(tmp_path: Path) -> None:
    with_layers = convert(mtp_checkpoint(tmp_path / "a" / "m"), tmp_path / "a.gguf")
    without = convert(checkpoints.write_checkpoint(tmp_path / "b" / "m", "moe"), tmp_path / "b.gguf")
    assert without.mtp is None and with_layers.model.read_bytes() == without.model.read_bytes()
    left_out = convert(tmp_path / "a" / "m", tmp_path / "c.gguf", mtp=False)
    assert left_out.mtp is None and not mtp_path(left_out.model).exists()


def test_fused_prediction_layers_are_split(tmp_path: Path) -> None:
    plain = convert(mtp_checkpoint(tmp_path / "a" / "m"), tmp_path / "a.gguf", type="f32")
    fused = convert(mtp_checkpoint(tmp_path / "b" / "m", names="fused"), tmp_path / "b.gguf", type="f32")
    assert plain.mtp.read_bytes() == fused.mtp.read_bytes()


def test_prediction_layers_with_experts_are_refused_with_a_way_out(tmp_path: Path) -> None:
    extra = {"model.mtp_block.0.mlp.experts.0.down_proj.weight": np.ones((256, 96), np.float32)}
    folder = mtp_checkpoint(tmp_path / "m", extra=extra)
    with pytest.raises(ConvertError, match=r"mtp_block\.0\.mlp has experts.*--no-mtp"):
        convert(folder, tmp_path / "x.gguf")
    assert convert(folder, tmp_path / "x.gguf", mtp=False).mtp is None


def test_a_prediction_layer_without_its_projection_is_named(tmp_path: Path) -> None:
    folder = mtp_checkpoint(tmp_path / "m", drop=["model.mtp_linear_proj.0.weight"])
    with pytest.raises(TensorMappingError, match=r"unknown: model\.mtp_block\.0\."):
        convert(folder, tmp_path / "x.gguf")


def test_prediction_layers_of_a_vision_model_are_left_out_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pyllamaernie.convert")
    shape = shape_with("vl", n_mtp=1)
    result = convert(checkpoints.write_checkpoint(tmp_path / "m", "vl", shape=shape), tmp_path / "x.gguf")
    assert result.mtp is None and "model.mtp_linear_proj.0.weight: not part of the network" in caplog.text
