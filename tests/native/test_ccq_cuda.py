"""The CCQ kernels of ggml-cuda. No GPU is needed: g++ and an emulator run the kernels, nvcc compiles them (`slow`)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ccq_cuda_library import BLOCK_BYTES, KINDS, Args, Emulator, compile_cuda, nvcc, patched_tree, q8_1

from pyllamaernie.quant import ccq

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
NATIVE = KINDS[:4]
ORDERS = (0, 1, 5)  # of the threads of a block


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return Emulator(tmp_path_factory.mktemp("cuda"), tuple(os.environ.get("CCQ_EMULATOR_FLAGS", "").split()))


def random_blocks(name: str, n: int, seed: int) -> np.ndarray:
    """Blocks of random bytes; those of CCQ2_B have the scales of a checkpoint."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (n, BLOCK_BYTES[name]), np.uint8)
    if name == "CCQ2_B":
        scale = rng.uniform(85, 125, n).astype("<f4")
        blocks[:, :4] = scale.view(np.uint8).reshape(-1, 4)
        blocks[:, 4:8] = (16384 - np.float32(127.5) * scale).astype("<f4").view(np.uint8).reshape(-1, 4)
        blocks[:, 8:10] = (
            (rng.uniform(0.001, 0.01, n).astype("<f4").view("<u4") >> 16).astype("<u2").view(np.uint8).reshape(-1, 2)
        )
    return blocks


def decode(name: str, blocks: np.ndarray) -> np.ndarray:
    return ccq.decode_ccq2_b(blocks) if name == "CCQ2_B" else ccq.decode(name, blocks)


def to_bf16(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


@pytest.mark.parametrize("name", NATIVE)
def test_the_constants_are_those_of_the_definition(emulator, name):
    code = ccq.CODES[name]
    expected = [*code.k, *code.m, *np.ravel(code.t1), *np.ravel(code.t2)]
    assert emulator.constants(name).tolist() == expected


@pytest.mark.parametrize("name", KINDS)
def test_random_bytes_become_the_same_floats_in_every_order_of_threads(emulator, name):
    blocks = random_blocks(name, 40, 1)
    expected = decode(name, blocks)
    for order in ORDERS:
        np.testing.assert_array_equal(emulator.dequantize(name, blocks, "fp32", order), expected)
    np.testing.assert_array_equal(emulator.dequantize(name, blocks, "fp16"), expected.astype(np.float16))
    np.testing.assert_array_equal(emulator.dequantize(name, blocks, "bf16"), to_bf16(expected))


@pytest.mark.parametrize("name", NATIVE)
def test_every_window_becomes_the_same_level(emulator, name):
    """All 65536 windows, with all refinement bits and both tables."""
    code = ccq.CODES[name]
    parts = [[i] + [byte for j in range(i + 1, 256) for byte in (i, j)] for i in range(256)]
    circle = np.concatenate(parts).astype(np.uint8)  # every pair of bytes once, the last byte with the first
    starts = np.arange(0, 65536, 63)
    qs = circle[(starts[:, None] + np.arange(64)) % 65536]
    windows = qs[:, :-1].astype(int) | qs[:, 1:].astype(int) << 8
    assert len(np.unique(windows)) == 65536
    for table in range(2):
        for e in range(1 << code.e_bits):
            n = len(qs)
            d = np.full(n, 240 + table)
            blocks = ccq.join(d, np.zeros((n, 4), int), qs, np.full((n, 64), e), code.e_bits)
            np.testing.assert_array_equal(emulator.dequantize(name, blocks), ccq.decode(name, blocks))


def test_any_bytes_of_ccq2_b_become_the_same_floats(emulator):
    """Also scales that are infinite, denormal or NaN."""
    blocks = np.random.default_rng(2).integers(0, 256, (400, 142), np.uint8)
    blocks[::4, :8] = np.array([1e30, -1e30], "<f4").view(np.uint8)
    blocks[1::4, 2:4] = 0xFF
    with np.errstate(invalid="ignore", over="ignore"):
        expected = ccq.decode_ccq2_b(blocks)
    assert not np.isfinite(expected).all()
    np.testing.assert_array_equal(emulator.dequantize("CCQ2_B", blocks), expected)


@pytest.mark.parametrize("name", KINDS)
def test_rows_are_those_asked_for(emulator, name):
    n_blocks = 3
    x = random_blocks(name, 2 * 3 * 5 * n_blocks, 3).reshape(2, 3, 5, n_blocks, -1)
    weights = decode(name, x.reshape(-1, x.shape[-1])).reshape(2, 3, 5, -1)
    rows = np.random.default_rng(4).integers(0, 5, (2, 3, 7)).astype(np.int32)
    got = emulator.get_rows(name, x.reshape(2, 3, 5, -1), rows)
    for i12, i11, i10 in np.ndindex(*rows.shape):
        np.testing.assert_array_equal(got[i12, i11, i10], weights[i12, i11, rows[i12, i11, i10]])


# products


class Product:
    """Weights and activations of small integers times powers of two, so that floats add them without rounding."""

    def __init__(
        self, name: str, n_units: int, x_shape: tuple[int, int, int], y_shape: tuple[int, int, int], seed: int
    ):
        rng = np.random.default_rng(seed)
        self.name, self.n_units = name, n_units
        self.n_blocks = n_units // 2 if name == "CCQ2_B" else n_units
        blocks = random_blocks(name, int(np.prod(x_shape)) * self.n_blocks, seed)
        if name == "CCQ2_B":
            blocks[:, 8:10] = [0x80, 0x3C]  # 1/64
        else:
            blocks[:, 0] = 240 + (blocks[:, 0] & 1)  # 1/32
        self.weights = decode(name, blocks).reshape(*x_shape, -1).astype(np.float64)
        gap = 10  # bytes between rows
        self.x = np.full((*x_shape, self.n_blocks * BLOCK_BYTES[name] + gap), 0xAA, np.uint8)
        self.x[..., :-gap] = blocks.reshape(*x_shape, -1)
        values = rng.integers(-127, 128, (*y_shape, 256 * n_units)).astype(np.int8)
        d = rng.choice([0.25, 0.5, 1, 0], (*y_shape, 8 * n_units)).astype(np.float16)
        self.activations = values * np.repeat(d, 32, axis=-1).astype(np.float64)
        self.y = np.zeros((*y_shape, 8 * n_units + 8), q8_1(values, d).dtype)  # padded, as ggml pads
        self.y[..., : 8 * n_units] = q8_1(values, d)

    def strides(self) -> dict[str, int]:
        x = dict(zip(("sample_x", "channel_x", "row_x"), self.x.strides, strict=False))
        y = {
            name: n // self.y.itemsize
            for name, n in zip(("sample_y", "channel_y", "col_y"), self.y.strides, strict=False)
        }
        return {**x, **y, "n_units": self.n_units, "n_rows": self.x.shape[2]}


def dense(emulator, p: Product, tiles: bool, order: int) -> np.ndarray:
    """Shapes: -> (samples, channels, n_cols, n_rows) float32."""
    n_samples, n_channels, n_cols = p.y.shape[:3]
    n_rows = p.x.shape[2]
    dst = np.full((n_samples, n_channels, n_cols, n_rows + 3), np.nan, np.float32)
    args = Args(
        **p.strides(),
        n_cols=n_cols,
        n_channels_y=n_channels,
        channel_ratio=n_channels // p.x.shape[1],
        sample_ratio=n_samples // p.x.shape[0],
        **dict(zip(("sample_dst", "channel_dst", "col_dst"), (n // 4 for n in dst.strides), strict=False)),
    )
    if tiles:
        emulator.mul_mat_tiles(p.name, p.x, p.y, dst, args, n_channels * n_samples, order=order)
    else:
        emulator.mul_mat_vec(p.name, p.x, p.y, dst, args, n_channels, n_samples, order=order)
    assert np.isnan(dst[..., n_rows:]).all()  # nothing written beside the rows
    return dst[..., :n_rows]


def expected_dense(p: Product) -> np.ndarray:
    n_samples, n_channels = p.y.shape[:2]
    weights = np.repeat(np.repeat(p.weights, n_channels // p.x.shape[1], axis=1), n_samples // p.x.shape[0], axis=0)
    total = np.einsum("scrk,scjk->scjr", weights, p.activations)
    unit = 2.0**-8 if p.name == "CCQ2_B" else 2.0**-11  # all terms are multiples of it
    assert np.abs(total).max() / unit < 2**24  # so that float32 holds it
    return total


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("n_cols", [1, 3, 8])
def test_product_with_vectors_is_exact(emulator, name, n_cols):
    p = Product(name, 6, (1, 2, 7), (2, 4, n_cols), 10 + n_cols)
    np.testing.assert_array_equal(dense(emulator, p, tiles=False, order=n_cols % 3), expected_dense(p))


@pytest.mark.parametrize("name", KINDS)
def test_product_by_tiles_is_exact_in_every_order_of_threads(emulator, name):
    p = Product(name, 2, (1, 1, 70), (1, 2, 67), 20)
    expected = expected_dense(p)
    for order in ORDERS:
        np.testing.assert_array_equal(dense(emulator, p, tiles=True, order=order), expected)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("n_channels_y", [1, 3])
def test_chosen_experts_of_a_few_tokens_are_exact(emulator, name, n_channels_y):
    """As ggml_cuda_ccq_mul_mat_id launches it for up to eight tokens: three of five experts for each of four tokens."""
    n_tokens, n_used, n_experts, n_rows = 4, 3, 5, 9
    p = Product(name, 4, (1, n_experts, n_rows), (1, n_tokens, n_channels_y), 30)
    rng = np.random.default_rng(31)
    ids = np.array([[*rng.permutation(n_experts)[:n_used], -1] for _ in range(n_tokens)], np.int32)  # a gap after each
    dst = np.full((n_tokens, n_used, n_rows), np.nan, np.float32)
    strides = p.strides()
    strides["sample_y"], strides["channel_y"] = strides["channel_y"], strides["col_y"]
    args = Args(
        **{**strides, "col_y": 0},
        n_cols=1,
        n_channels_y=n_channels_y,
        channel_ratio=1,
        sample_ratio=1,
        sample_dst=dst.strides[0] // 4,
        channel_dst=dst.strides[1] // 4,
        stride_ids=ids.shape[1],
    )
    emulator.mul_mat_vec(p.name, p.x, p.y, dst, args, n_used, n_tokens, ids)
    for token, slot in np.ndindex(n_tokens, n_used):
        activations = p.activations[0, token, slot % n_channels_y]
        np.testing.assert_array_equal(dst[token, slot], p.weights[0, ids[token, slot]] @ activations)


@pytest.mark.parametrize("name", KINDS)
def test_chosen_experts_of_many_tokens_are_exact(emulator, name):
    """By tiles; one expert has no token, one has more than a tile."""
    n_tokens, n_used, n_experts, n_rows = 70, 2, 4, 66
    p = Product(name, 2, (1, n_experts, n_rows), (1, n_tokens, n_used), 40)
    rng = np.random.default_rng(41)
    ids = np.column_stack([np.full(n_tokens, 2), rng.choice([0, 3], n_tokens)])
    from_, to, bounds = [], [], [0]
    for expert in range(n_experts):  # what mm_ids_helper writes
        pairs = [(token, slot) for token, slot in np.ndindex(n_tokens, n_used) if ids[token, slot] == expert]
        from_ += [token * n_used + slot % n_used for token, slot in pairs]
        to += [token * n_used + slot for token, slot in pairs]
        bounds.append(len(to))
    assert np.diff(bounds).min() == 0 and np.diff(bounds).max() > 64
    dst = np.full((n_tokens, n_used, n_rows), np.nan, np.float32)
    args = Args(**{**p.strides(), "channel_y": 0, "sample_y": 0}, n_cols=n_tokens, n_channels_y=1, channel_ratio=1,
                sample_ratio=1, col_dst=n_rows)  # fmt: skip
    lists = tuple(np.array(a, np.int32) for a in (bounds, from_, to))
    emulator.mul_mat_tiles(p.name, p.x, p.y, dst, args, n_experts, lists)
    for token, slot in np.ndindex(n_tokens, n_used):
        expected = p.weights[0, ids[token, slot]] @ p.activations[0, token, slot]
        np.testing.assert_array_equal(dst[token, slot], expected)


@pytest.mark.slow
def test_kernels_read_and_write_inside_their_buffers():
    """This file again, with the sanitizers of g++ for addresses and for undefined behaviour."""
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        if "/" not in found.stdout:
            pytest.skip(f"g++ has no {name}")
        libraries.append(found.stdout.strip())
    environment = {
        **os.environ,
        "CCQ_EMULATOR_FLAGS": "-g -fsanitize=address,undefined -fno-sanitize-recover=all",
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0,detect_stack_use_after_return=0",
        "PYTHONMALLOC": "malloc",
    }
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", __file__]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


# the compiler's view


@pytest.fixture(scope="module")
def tree() -> Path:
    if nvcc() is None:
        pytest.skip("no nvcc: neither the package nvidia-cuda-nvcc nor one on the PATH")
    if patched_tree() is None:
        pytest.skip("PYLLAMAERNIE_BUILD_DIR does not name a build folder; .ci/run does")
    return patched_tree()


@pytest.mark.slow
@pytest.mark.parametrize("arch", [75, 90])
def test_kernels_compile_without_warnings_and_keep_to_their_registers(tree, arch, tmp_path):
    run = compile_cuda(tree / "ggml/src/ggml-cuda/ccq.cu", tree, arch, tmp_path / "ccq.o", "-Xptxas", "-v")
    assert run.returncode == 0, run.stderr[-3000:]
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", run.stderr)]
    assert len(spilled) == 5 * (3 + 3 + 8 + 1)  # kinds, by conversions, rows, vectors, tiles
    assert not any(spilled)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convert", "getrows", "ggml-cuda"])
def test_what_the_patch_touches_compiles(tree, name, tmp_path):
    source = tree / f"ggml/src/ggml-cuda/{name}.cu"
    assert "ggml_cuda_is_ccq" in source.read_text(encoding="utf-8")
    run = compile_cuda(source, tree, 90, tmp_path / "object.o")
    assert run.returncode == 0, run.stderr[-3000:]
