"""Folders that are no whole checkpoint: files missing, cut short or of another format are named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import checkpoints
import pytest

from pyllamaernie.convert import convert
from pyllamaernie.convert.json_file import read_json
from pyllamaernie.errors import ConvertError, MissingFileError, TensorMappingError


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="nowhere: no such folder"):
        convert(tmp_path / "nowhere", tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("name", "match"), [("config.json", "config.json: missing"), ("model.safetensors", "no model.safetensors")]
)
def test_a_missing_file_is_named(name: str, match: str, tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "d", "dense")
    (folder / name).unlink()
    with pytest.raises(MissingFileError, match=match):
        convert(folder, tmp_path / "x.gguf")


def test_weights_in_another_format_are_named(tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "d", "dense")
    (folder / "model.safetensors").rename(folder / "model_state.pdparams")
    with pytest.raises(MissingFileError, match=r"model_state\.pdparams, which cannot be converted"):
        convert(folder, tmp_path / "x.gguf")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "d", "dense", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(MissingFileError, match=r"1 of 3 weight files are missing: model-00002-of-00003\.safetensors"):
        convert(folder, tmp_path / "x.gguf")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "d", "dense")
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(ConvertError, match="cut short"):
        convert(folder, tmp_path / "x.gguf")


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x10" + bytes(7) + b"{not json here.}"]
)
def test_what_is_not_safetensors_is_refused(content: bytes, tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "d", "dense")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ConvertError, match="safetensors"):
        convert(folder, tmp_path / "x.gguf")


def test_an_index_that_names_a_tensor_no_file_has_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "d", "dense", shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TensorMappingError, match=r"do not hold: model\.extra\.weight"):
        convert(folder, tmp_path / "x.gguf")


def test_each_json_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "d", "vl")
    parsed: list[str] = []

    def read(path: Path) -> dict[str, object]:
        parsed.append(path.name)
        return read_json(path)

    monkeypatch.setattr("pyllamaernie.convert.checkpoint.read_json", read)
    convert(folder, tmp_path / "x.gguf", dry_run=True)
    again = {name for name in parsed if parsed.count(name) > 1} - {"config.json"}  # asked first for the kind of folder
    assert "tokenizer_config.json" in parsed and not again
