"""The table of quantization types."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
import pytest

from pyllamaernie.gguf.file import TensorType
from pyllamaernie.gguf.types import QUANT_TYPES
from pyllamaernie.quant import ccq


@pytest.mark.parametrize(
    ("name", "ggml_id", "block_size", "block_bytes", "bpw"),
    [
        ("CCQ2", 112, 256, 66, 2.0625),
        ("CCQ2_25", 113, 256, 74, 2.3125),
        ("CCQ2_5", 114, 256, 82, 2.5625),
        ("CCQ2_75", 115, 256, 90, 2.8125),
        ("CCQ2_B", 116, 512, 142, 2.21875),
    ],
)
def test_a_type_keeps_its_number_and_its_size(name, ggml_id, block_size, block_bytes, bpw):
    row = QUANT_TYPES[name]
    assert (row.name, row.ggml_id, row.block_size, row.block_bytes, row.bpw) == (
        name,
        ggml_id,
        block_size,
        block_bytes,
        bpw,
    )


def test_ids_are_unique_and_clear_of_upstreams():
    ids = [row.ggml_id for row in QUANT_TYPES.values()]
    assert len(set(ids)) == len(ids)
    assert min(ids) > max(TensorType(t) for t in TensorType if t < 112)
    assert all(112 <= i <= 127 for i in ids)


def test_the_codes_fill_the_blocks_of_the_table():
    assert {name: code.block_bytes for name, code in ccq.CODES.items()} == {
        name: row.block_bytes for name, row in QUANT_TYPES.items() if row.block_size == 256
    }


def test_the_gguf_package_reads_and_dequantizes_our_types(tmp_path):
    rng = np.random.default_rng(1)
    written = {
        row.name: rng.integers(0, 127, (3, 2 * 512 // row.block_size * row.block_bytes), np.uint8)
        for row in QUANT_TYPES.values()
    }
    writer = gguf.GGUFWriter(tmp_path / "all.gguf", "none")
    for name, rows in written.items():
        writer.add_tensor(name, rows, raw_dtype=TensorType[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for tensor in gguf.GGUFReader(tmp_path / "all.gguf").tensors:
        row, blocks = QUANT_TYPES[tensor.name], written[tensor.name].reshape(-1, QUANT_TYPES[tensor.name].block_bytes)
        assert tensor.tensor_type == row.ggml_id and tensor.shape.tolist() == [1024, 3]
        expected = ccq.decode(row.name, blocks) if row.name in ccq.CODES else ccq.decode_ccq2_b(blocks)
        assert np.array_equal(gguf.quants.dequantize(tensor.data, tensor.tensor_type), expected.reshape(3, 1024))
        assert gguf.LlamaFileType(row.ggml_id).name == f"MOSTLY_{row.name}"


def test_the_table_is_that_of_the_c_code():
    path = Path(__file__).resolve().parents[2] / "native" / "overlay" / "ggml" / "include" / "pyllamaernie-types.inc"
    rows = re.findall(
        r"^PYLLAMAERNIE_TYPE\((\w+), +(\w+), +(\d+), (\d+), \"([\d.]+) bpw", path.read_text(), re.MULTILINE
    )
    assert [(name, lower, int(i), int(size), float(bpw)) for name, lower, i, size, bpw in rows] == [
        (row.name, row.name.lower(), row.ggml_id, row.block_size, row.bpw) for row in QUANT_TYPES.values()
    ]
