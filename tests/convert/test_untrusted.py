"""A folder is not trusted: each thing that is off is one line with the file, the key, the value and what is allowed."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from checkpoint_shapes import shape_with
from gguf import GGUFReader

from pyllamaernie.convert import convert
from pyllamaernie.errors import ConvertError, MissingFileError, TensorMappingError

SMALL = shape_with("dense", n_embd=64, n_head=2, n_head_kv=1, head_dim=32, n_layer=2, n_ff=64)
MOE = shape_with("moe", n_embd=64, n_head=2, n_head_kv=1, head_dim=32, n_layer=2, n_ff=64, n_ff_exp=32, n_expert=4)
NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoints.write_checkpoint(tmp_path / "toy", "dense", shape=SMALL)


def refused(folder: Path, match: str, error: type[ConvertError] = ConvertError, **options: Any) -> None:
    """That the folder is refused in one line, and that nothing is left of what was begun."""
    out = folder.parent / "out"
    out.mkdir()
    with pytest.raises(error, match=match) as caught:
        convert(folder, out / "x.gguf", **options)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 1000
    assert not list(out.iterdir())


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text()) if path.is_file() else {}
    change(value)
    path.write_text(json.dumps(value))


def change_header(path: Path, change: Callable[[dict], object]) -> None:
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :])


# ---- JSON


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[" * 100_000, "config.json: nested more than 64 deep"),
        ('{"a": ' * 70 + "1" + "}" * 70, "config.json: nested more than 64 deep"),
        ("[1]", "config.json: holds a list, expected an object"),
        ("null", "config.json: holds null, expected an object"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": 1e999}', "1e999 is beyond a double"),
        ('{"a": 1, "a": 2}', "the key 'a' comes twice"),
        (r'{"a": "\ud800"}', "holds half of a surrogate pair"),
        ('{"a": ' + "9" * 5000 + "}", "cannot be read as JSON"),
        ('{"a": [' + "[]," * 1_000_000 + "0]}", "more than 1000000 objects and lists"),
        ("\xff", "cannot be read as JSON"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_what_is_no_json_object_is_refused(name: str, text: str, match: str, folder: Path) -> None:
    (folder / name).write_bytes(text.encode("latin-1"))
    refused(folder, match.replace("config.json", name))


def test_a_huge_file_is_not_read(folder: Path) -> None:
    os.truncate(folder / "tokenizer_config.json", 2**40)
    refused(folder, "tokenizer_config.json: more than 33554432 bytes")


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        "chat_template.jinja",
        "generation_config.json",
        "README.md",
    ],
)
def test_a_pipe_in_place_of_a_file_is_named_and_not_waited_for(name: str, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused(folder, f"{name}: is a pipe, expected a regular file", MissingFileError)


def test_a_folder_or_a_device_in_place_of_a_file_is_named(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to("/dev/zero")
    refused(folder, "generation_config.json: is a device, expected a regular file", MissingFileError)
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").mkdir()
    (folder.parent / "out").rmdir()
    refused(folder, "generation_config.json: is a folder, expected a regular file", MissingFileError)


# ---- numbers of config.json


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("num_hidden_layers", "2", "num_hidden_layers is '2'; expected a whole number from 1 to 512"),
        ("num_hidden_layers", 2**63, "num_hidden_layers is 9223372036854775808; expected a whole number from 1 to 512"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0; expected"),
        ("num_hidden_layers", True, "num_hidden_layers is True; expected"),
        ("num_hidden_layers", 2.0, "num_hidden_layers is 2.0; expected"),
        pytest.param("hidden_size", 10**4000, "hidden_size is a number of 13288 bits; expected a whole", id="digits"),
        ("hidden_size", [64], "hidden_size is a list of 1; expected"),
        ("num_attention_heads", 0, "num_attention_heads is 0; expected a whole number from 1"),
        ("num_attention_heads", -2, "num_attention_heads is -2; expected a whole number from 1"),
        ("num_key_value_heads", 3, "num_key_value_heads is 3; expected a whole number from 1 to 2"),
        ("head_dim", 33, "head_dim is 33; expected an even number"),
        ("vocab_size", 2**40, "vocab_size is 1099511627776; expected a whole number from 1 to 1048576"),
        ("vocab_size", 511, r"vocab_size is 511, but model.embed_tokens.weight has shape \[512, 64\]"),
        ("rms_norm_eps", "1e-5", "rms_norm_eps is '1e-5'; expected a number from 0 to 1"),
        ("rope_theta", {"a": 1}, "rope_theta is an object of 1; expected a number"),
        ("max_position_embeddings", 2**32, "max_position_embeddings is 4294967296; expected"),
        ("use_bias", "false", "use_bias is 'false'; expected true or false"),
        ("tie_word_embeddings", 1, "tie_word_embeddings is 1; expected true or false"),
        ("text_config", [1], "text_config is a list of 1; expected an object"),
        ("rope_scaling", "none", "rope_scaling is 'none'; expected an object"),
        ("model_type", ["ernie4_5"], "model_type a list of 1; supported are"),
        ("_name_or_path", 5, "_name_or_path is 5; expected a text"),
    ],
)
def test_a_number_of_another_kind_or_size_is_named(key: str, value: object, match: str, folder: Path) -> None:
    change_json(folder / "config.json", lambda config: config.update({key: value}))
    refused(folder, match)


def test_more_layers_than_tensors_are_refused_before_a_loop_counts_them(folder: Path) -> None:
    change_json(folder / "config.json", lambda config: config.update(num_hidden_layers=512))
    refused(folder, "num_hidden_layers is 512, but there are tensors of 2 layers", TensorMappingError)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"moe_k": 5}, "moe_k is 5, but there are 4 experts; a token cannot use more"),
        ({"moe_k": 0}, "moe_k is 0; expected a whole number from 1 to 1024"),
        ({"moe_num_experts": 1000}, "1000 experts in a layer, but there are tensors of 4"),
        ({"moe_num_experts": 2**63}, "moe_num_experts is 9223372036854775808 in 2 layers; expected 1 to 1024"),
        ({"moe_num_experts": "4"}, "moe_num_experts is '4' in 2 layers"),
        ({"moe_num_shared_experts": -1}, "moe_num_shared_experts is -1; expected a whole number from 0"),
        ({"moe_layer_interval": 0}, "moe_layer_interval is 0; expected a whole number from 1"),
        ({"moe_layer_start_index": None}, "no moe_layer_start_index; it is required"),
        ({"mlp_layer_types": ["sparse"] * 10**5}, "mlp_layer_types is a list of 100000; expected 'dense' or 'sparse'"),
        ({"mlp_layer_types": "dense"}, "mlp_layer_types is 'dense'; expected"),
    ],
    ids=str,
)
def test_numbers_of_experts_are_held_against_each_other(changes: dict, match: str, tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "toy", "moe", shape=MOE, config_changes=changes)
    refused(folder, match)


def test_a_dry_run_without_weights_does_not_count_on(tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "toy", "moe", shape=MOE)
    (folder / "model.safetensors").unlink()
    change_json(folder / "config.json", lambda c: c.update(num_hidden_layers=512, moe_num_experts=1024))
    refused(folder, "expected 1 to 1024, and at most 65536 in all layers", dry_run=True)
    change_json(folder / "config.json", lambda c: c.update(num_hidden_layers=2, moe_num_experts=4))
    change_json(folder / "config.json", lambda c: c.update(num_nextn_predict_layers=2**63))
    (folder.parent / "out").rmdir()
    refused(
        folder, "num_nextn_predict_layers is 9223372036854775808; expected a whole number from 0 to 16", dry_run=True
    )


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("patch_size", [], "patch_size is a list of 0; only square patches"),
        ("patch_size", "14", "vision_config: patch_size is '14'; expected a whole number"),
        ("num_heads", 0, "vision_config: num_heads is 0; expected a whole number from 1"),
        ("num_heads", 3, "hidden_size 128 in 3 heads; expected heads of a multiple of 4"),
        ("depth", 10**6, "vision_config: depth is 1000000; expected a whole number from 1 to 512"),
        ("intermediate_size", 1.5, "vision_config: intermediate_size is 1.5; expected"),
        ("spatial_merge_size", [2], "spatial merge a list of 1, temporal merge 2; only 2 and 2"),
    ],
)
def test_numbers_of_the_tower_are_named(key: str, value: object, match: str, tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "toy", "vl")
    change_json(folder / "config.json", lambda config: config["vision_config"].update({key: value}))
    refused(folder, match)


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("generation_config.json", {"top_k": 2**31}, "generation_config.json: top_k is 2147483648; expected a whole"),
        ("generation_config.json", {"temperature": "hot"}, "generation_config.json: temperature is 'hot'; expected a"),
        ("generation_config.json", {"sequence": 5}, "generation_config.json: sequence is 5; expected a text"),
        ("preprocessor_config.json", {"size": 5}, "preprocessor_config.json: size is 5; expected an object"),
        ("preprocessor_config.json", {"min_pixels": 9, "max_pixels": 8}, "at least 9 and at most 8 pixels"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, "image_mean is a list of 1; expected three numbers"),
        ("preprocessor_config.json", {"image_std": [0, 1, 1]}, "image_std is 0; expected a number from 1e-06"),
        ("processor_config.json", {"image_processor": []}, "image_processor is a list of 0; expected an object"),
        ("processor_config.json", {"video_processor": {"max_pixels": "9"}}, "video_processor: longest_edge is '9'"),
    ],
    ids=str,
)
def test_numbers_of_other_files_are_named(file: str, content: dict, match: str, tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "toy", "vl")
    (folder / file).write_text(json.dumps(content))
    refused(folder, match)


def test_sampling_of_generation_config_is_written(folder: Path, tmp_path: Path) -> None:
    change_json(folder / "generation_config.json", lambda c: c.update(top_k=40, temperature=1, top_p=0.8))
    fields = GGUFReader(convert(folder, tmp_path / "x.gguf").model).fields
    said = {name: fields[f"general.sampling.{name}"].contents() for name in ("top_k", "temp", "top_p")}
    assert said == {"top_k": 40, "temp": 1.0, "top_p": pytest.approx(0.8)}


# ---- safetensors


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"dtype": None}, f"{NAME} has dtype None, expected one such as 'BF16'"),
        ({"dtype": 5}, f"{NAME} has dtype 5"),
        ({"shape": None}, f"{NAME} has shape None, expected at most 8 whole numbers"),
        ({"shape": [2] * 5000}, f"{NAME} has shape .* expected at most 8 whole numbers"),
        ({"shape": [-64, -64]}, f"{NAME} has shape .*-64.* expected at most 8 whole numbers"),
        ({"shape": ["64", 64]}, f"{NAME} has shape .* expected at most 8 whole numbers"),
        ({"data_offsets": None}, f"{NAME} has data_offsets None, expected two whole numbers"),
        ({"data_offsets": [0]}, f"{NAME} has data_offsets .* expected two whole numbers"),
        ({"data_offsets": [-16384, 0]}, f"{NAME} has data_offsets .*-16384.* expected two whole numbers, none below 0"),
        ({"data_offsets": [16384, 0]}, f"{NAME} has data_offsets .16384, 0., which end before they begin"),
        ({"data_offsets": [2**50, 2**50 + 16384]}, f"cut short, {NAME} ends at byte"),
        ({"data_offsets": [0, 16384]}, "expected data_offsets that do not overlap"),
        ({"data_offsets": [0, 4]}, f"{NAME} has 4 bytes, not what F32"),
    ],
    ids=str,
)
def test_an_entry_of_a_header_is_held_against_the_format(entry: dict, match: str, folder: Path) -> None:
    change_header(folder / "model.safetensors", lambda header: header[NAME].update(entry))
    refused(folder, match)


def test_other_things_than_entries_and_names_are_refused(folder: Path) -> None:
    change_header(folder / "model.safetensors", lambda header: header.update({NAME: [1]}))
    refused(folder, f"{NAME} is a list of 1, expected an object")
    change_header(folder / "model.safetensors", lambda header: header.update({"a\nb": header.pop(NAME)}))
    (folder.parent / "out").rmdir()
    refused(folder, r"a tensor is called 'a\\nb'; expected 1 to 512 printable characters")


def test_a_huge_header_is_not_read(folder: Path) -> None:
    with open(folder / "model.safetensors", "r+b") as file:
        file.write((2**40).to_bytes(8, "little"))
        file.truncate(2**41)
    refused(folder, "broken safetensors header: more than 33554432 bytes of JSON")


@pytest.mark.parametrize(
    "file",
    [
        "../toy/model-00001-of-00002.safetensors",
        "{folder}/model-00001-of-00002.safetensors",
        "x/../model-00001-of-00002.safetensors",
        *("/etc/passwd", "a\0.safetensors", "", 5, None),
    ],
)
def test_a_weight_map_stays_in_its_folder(file: Any, tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "toy", "dense", shape=SMALL, shards=2)
    file = file.format(folder=folder) if isinstance(file, str) else file
    change_json(folder / "model.safetensors.index.json", lambda index: index["weight_map"].update({NAME: file}))
    refused(folder, f"{NAME} is in .*; expected the name of a .safetensors file in this folder")


def test_links_to_weights_elsewhere_are_followed_as_caches_have_them(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to("../blob")
    assert convert(folder, tmp_path / "x.gguf").model.is_file()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("stored", "type"), [("F32", "f32"), ("F32", "bf16"), ("BF16", "bf16"), ("F16", "f16"), ("F32", "q8_0")]
)
def test_a_weight_that_is_not_finite_is_named(value: float, stored: str, type: str, tmp_path: Path) -> None:
    weight = checkpoints.weights_of("dense", shape=SMALL)[NAME]
    weight[3, 17] = value
    folder = checkpoints.write_checkpoint(tmp_path / "toy", "dense", shape=SMALL, dtype=stored, extra={NAME: weight})
    what = "not a number" if np.isnan(value) else "infinite"
    refused(folder, rf"blk\.0\.ffn_up\.weight: the value at \[3, 17\] is {what}", type=type)


# ---- what belongs to no number


@pytest.mark.parametrize(
    "head",
    ["license: {a: b}", "license: no", "tags: [1, [2]]", "base_model: [{name: [1]}]", "version: 4.5", "a: b: c",
     "- a", "[" * 3000, 'name: "\\ud800"', "x: !!python/object/apply:os.system [ls]", "datasets: [[1]]",
     f"name: {'x' * 70000}", "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nlicense: *c"],
)  # fmt: skip
def test_a_model_card_of_any_kind_costs_no_model(head: str, folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_text(f"---\n{head}\n---\n")
    assert convert(folder, tmp_path / "x.gguf").model.is_file()


def test_a_folder_whose_name_is_not_utf_8_converts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = Path(os.fsdecode(os.fsencode(folder.parent) + b"/toy\xff"))
    folder.rename(odd)
    monkeypatch.chdir(tmp_path)
    path = convert(odd, type="F16").model
    assert os.fsencode(path) == b"toy\xff-F16.gguf"
    assert struct.unpack("<I", path.read_bytes()[:4]) == (0x46554747,)
