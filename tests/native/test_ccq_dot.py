"""Dot products of CCQ rows with Q8_K rows: every path gives the numbers that follow from the numpy definition."""

from __future__ import annotations

import numpy as np
import pytest
from ccq_library import NAMES, PATHS, Library, compiler, q8_k, usable_paths

from pyllamaernie.gguf.types import QUANT_TYPES
from pyllamaernie.quant import ccq

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs gcc")
N_BLOCKS = 200


@pytest.fixture(scope="module", params=usable_paths())
def library(request, tmp_path_factory):
    built = Library(tmp_path_factory.mktemp(request.param), ("-O2", "-DCCQ_CLONES=", *PATHS[request.param][0]))
    assert built.lib.ggml_ccq_cpu_path().decode() == request.param
    return built


def activations(n_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(12)
    values = rng.integers(-128, 128, (n_blocks, 256)).astype(np.int8)
    values[0], values[1] = 127, -128
    return values, rng.uniform(0.001, 0.1, n_blocks).astype(np.float32)


def totals(name: str, blocks: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integer part of every block, and the float that belongs to it. Shapes: (n,) int64, (n,) float32."""
    code = ccq.CODES[name]
    scale, table, level, qs, e = ccq.split(blocks, code.e_bits)
    y = code.levels[table[:, None, None], ccq.indices(qs, e, np.array(code.k), np.array(code.m))]
    planes = (y * values.reshape(-1, 4, 64).astype(np.int64)).sum(2)
    return (planes * (16 * ccq.LEVELS[level]).astype(np.int64)).sum(1), scale / np.float32(16)


@pytest.mark.parametrize("name", NAMES)
def test_dot_of_any_bytes_is_exact_in_the_integers_and_equal_in_the_floats(library, name):
    blocks = np.random.default_rng(13).integers(0, 256, (N_BLOCKS, ccq.CODES[name].block_bytes), np.uint8)
    values, d = activations(N_BLOCKS)
    integers, scale = totals(name, blocks, values)
    rows = q8_k(values, d)
    for i in range(N_BLOCKS):
        expected = scale[i] * d[i] * np.float32(integers[i])
        assert library.vec_dot(name, 256, blocks[i], rows[i]) == expected
    expected = np.float32(0)
    for i in range(N_BLOCKS):
        expected += scale[i] * d[i] * np.float32(integers[i])
    assert library.vec_dot(name, 256 * N_BLOCKS, blocks, rows) == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n_rows", [1, 3, 8, 21])
def test_rows_together_give_the_bits_of_rows_alone(library, name, n_rows):
    code = ccq.CODES[name]
    rows = np.random.default_rng(n_rows).integers(0, 256, (n_rows, 3, code.block_bytes), np.uint8)
    values, d = activations(3)
    expected = np.zeros(n_rows, np.float32)
    for i in range(3):
        integers, scale = totals(name, rows[:, i], np.broadcast_to(values[i], (n_rows, 256)))
        expected += scale * d[i] * integers.astype(np.float32)
    got = library.dot_rows(QUANT_TYPES[name].ggml_id, 768, rows.reshape(n_rows, -1), q8_k(values, d))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", NAMES)
def test_unpacked_rows_are_the_decoded_ones(library, name):
    blocks = np.random.default_rng(15).integers(0, 256, (40, ccq.CODES[name].block_bytes), np.uint8)
    d, scales, q = library.unpack_rows(QUANT_TYPES[name].ggml_id, blocks)
    weights = (q.reshape(40, 8, 32) * scales[:, :, None]).reshape(40, 256) * d[:, None].astype(np.float64)
    np.testing.assert_array_equal(weights.astype(np.float32), ccq.decode(name, blocks))


@pytest.mark.parametrize("name", NAMES)
def test_levels_and_activations_at_their_ends_do_not_overflow(library, name):
    code = ccq.CODES[name]
    values = np.where(np.arange(256) % 2, -128, 127).astype(np.int8)[None]
    for byte in range(256):  # constant codes reach the largest levels of both signs
        block = np.full((1, code.block_bytes), byte, np.uint8)
        block[0, :2] = 254 + byte % 2, 255
        integers, scale = totals(name, block, values)
        got = library.vec_dot(name, 256, block, q8_k(values, np.ones(1, np.float32)))
        assert got == scale[0] * np.float32(integers[0])


def test_dot_of_ccq2_b_is_the_dot_of_its_decoded_levels(library):
    rng = np.random.default_rng(14)
    blocks = rng.integers(0, 256, (20, 142), np.uint8)
    scale = rng.uniform(85, 125, 20).astype("<f4")
    blocks[:, :4] = scale.view(np.uint8).reshape(-1, 4)
    blocks[:, 4:8] = (16384 - np.float32(127.5) * scale).astype("<f4").view(np.uint8).reshape(-1, 4)
    blocks[:, 8:10] = [0x80, 0x3F]  # super scale 1: the decoded weights are integers
    values, d = activations(40)
    levels = ccq.decode_ccq2_b(blocks).reshape(40, 256).astype(np.int64)
    expected = np.float32(0)
    for i in range(40):
        expected += d[i] * np.float32((levels[i] * values[i]).sum())
    assert library.vec_dot("CCQ2_B", 512 * 20, blocks, q8_k(values, d)) == expected


def test_dot_of_ccq2_b_with_any_parameters_is_exact_in_the_integers(library):
    """Scales and offsets of any bit pattern: words beyond 15 bits, infinite, no numbers at all."""
    rng = np.random.default_rng(16)
    blocks = rng.integers(0, 256, (300, 142), np.uint8)
    offsets = np.array(
        [2.0**30, -(2.0**30), 2.0**30 - 64, 2.0**31, -(2.0**31), 1e20, np.inf, np.nan, -0.5, 32767.5], "<f4"
    )
    blocks[: len(offsets), :4] = np.array([1.0], "<f4").view(np.uint8)
    blocks[: len(offsets), 4:8] = offsets.view(np.uint8).reshape(-1, 4)
    blocks[:, 8:10] = [0x80, 0x3F]
    values, _ = activations(2)
    ones = q8_k(values, np.ones(2, np.float32))
    levels = ccq.decode_ccq2_b(blocks).astype(np.int64)
    for block, level in zip(blocks, levels, strict=True):
        halves = (level.reshape(2, 256) * values).sum(1)
        assert library.dot_rows(116, 512, block[None], ones)[0] == np.float32(halves[0]) + np.float32(halves[1])
