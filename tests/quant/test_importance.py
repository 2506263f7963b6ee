"""Importance matrices that are read for a model: experts without tokens, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
from gguf_contents import data_of, write_imatrix
from quantize_jobs import leftovers

from pyllamaernie.errors import InputError
from pyllamaernie.gguf import file as gguf_file
from pyllamaernie.quant.importance import read_importance
from pyllamaernie.quant.source import gguf_source
from pyllamaernie.quant.writer import write_quantized


def changed_imatrix(imatrix: Path, out: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """A copy whose tensors `change` has edited."""
    data = {name: np.array(values) for name, values in data_of(imatrix).items()}
    change(data)
    keys = {name: (key.kind, key.value) for name, key in gguf_file.read_gguf(imatrix)[0].items()}
    del keys["general.architecture"]
    return write_imatrix(out, data, keys)


def test_importance_that_is_no_number(imatrix: Path, tmp_path: Path) -> None:
    name = "blk.0.attn_q.weight"

    def spoil(data: dict[str, np.ndarray]) -> None:
        data[f"{name}.in_sum2"][5] = np.nan

    with pytest.raises(InputError, match=r"blk.0.attn_q.weight is nan in column 5 of matrix 0"):
        read_importance(changed_imatrix(imatrix, tmp_path / "nan.gguf", spoil))


def test_importance_of_another_model(model: Path, imatrix: Path, tmp_path: Path) -> None:
    def narrower(data: dict[str, np.ndarray]) -> None:
        data["blk.0.attn_q.weight.in_sum2"] = data["blk.0.attn_q.weight.in_sum2"][:128]

    def renamed(data: dict[str, np.ndarray]) -> None:
        for name in list(data):
            data[f"model.{name}"] = data.pop(name)

    types = {"blk.0.attn_q.weight": "Q4_K"}
    for change, text in ((narrower, "importance of 128 columns, the model has 1 x 256"), (renamed, "another model")):
        importance = read_importance(changed_imatrix(imatrix, tmp_path / "other.gguf", change))
        with pytest.raises(InputError, match=text):
            write_quantized(gguf_source(model), types, tmp_path / "out.gguf", importance=importance)
    with pytest.raises(InputError, match="holds 'model'; an importance matrix is needed"):
        read_importance(model)
    assert leftovers(tmp_path / "out.gguf") == []


def test_experts_that_nothing_reached_count_alike(model: Path, imatrix: Path) -> None:
    importance = read_importance(imatrix)
    columns = importance.columns["blk.1.ffn_up_exps.weight"]
    assert (columns[-1] == 1).all() and not (columns[0] == 1).any()
