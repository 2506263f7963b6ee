"""GGUF files as a source: split ones give the same bytes, broken ones are named."""

from __future__ import annotations

from pathlib import Path

import gguf as gguf_py
import pytest

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
from gguf_contents import payload
from quantize_jobs import FAST, leftovers, random_types

from pyllamaernie import programs
from pyllamaernie.errors import CorruptModelError, ModelNotFoundError, QuantizeError
from pyllamaernie.quant.source import gguf_source
from pyllamaernie.quant.writer import write_quantized


def test_a_split_source_gives_the_same_file(model: Path, tmp_path: Path) -> None:
    programs.run("llama-gguf-split", ["--split", "--split-max-tensors", 9, model, tmp_path / "part"], capture=True)
    parts = sorted(tmp_path.glob("part-*.gguf"))
    assert len(parts) > 2
    types = random_types(model, 1, FAST)
    write_quantized(gguf_source(model), types, tmp_path / "whole.gguf")
    write_quantized(gguf_source(parts[1]), types, tmp_path / "split.gguf")
    assert payload(tmp_path / "whole.gguf") == payload(tmp_path / "split.gguf")
    assert "split.count" not in gguf_py.GGUFReader(tmp_path / "split.gguf").fields
    parts[0].unlink()
    with pytest.raises(ModelNotFoundError, match="00001-of"):
        gguf_source(parts[1])


def test_a_truncated_source(model: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(model.read_bytes()[:-5000])
    with pytest.raises(CorruptModelError, match="cut short"):
        gguf_source(short)
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(model.read_bytes())
    source = gguf_source(copy)
    with copy.open("r+b") as file:  # while it is worked on
        file.truncate(len(short.read_bytes()) // 2)
    with pytest.raises(CorruptModelError, match="became shorter"):
        write_quantized(source, {}, tmp_path / "out.gguf")
    assert leftovers(tmp_path / "out.gguf") == []


def test_a_tensor_named_twice(model: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice.gguf"
    data = model.read_bytes()
    assert data.count(b"blk.0.attn_k.weight") == 1
    twice.write_bytes(data.replace(b"blk.0.attn_k.weight", b"blk.0.attn_q.weight"))
    with pytest.raises(CorruptModelError, match="not a sound GGUF file"):
        gguf_source(twice)


@pytest.mark.parametrize("type_name", ["Q4_K", None])
def test_a_weight_that_is_no_number(type_name: str | None, model: Path, tmp_path: Path) -> None:
    bad = tmp_path / "nan.gguf"
    bad.write_bytes(model.read_bytes())
    tensor = next(t for t in gguf_py.GGUFReader(model).tensors if t.name == "blk.1.ffn_up_exps.weight")
    with bad.open("r+b") as file:
        file.seek(int(tensor.data_offset) + 2 * (256 * 700 + 9))
        file.write(b"\xc0\x7f")
    types = {} if type_name is None else {"blk.1.ffn_up_exps.weight": type_name}
    with pytest.raises(QuantizeError, match=r"blk.1.ffn_up_exps.weight: \w+: row 700, column 9 is nan"):
        write_quantized(gguf_source(bad), types, tmp_path / "out.gguf")
    assert leftovers(tmp_path / "out.gguf") == []
