"""Matrix products of CCQ types in the built ggml, by rows and by tiles: the integers that follow from numpy's decoder.

Scales of weights and activations are powers of two here, so every float on the way is exact, whatever its order.
"""

from __future__ import annotations

import ctypes
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from pyllamaernie.gguf.types import QUANT_TYPES
from pyllamaernie.quant import ccq

N_COLS = 1536
F32, I32 = 0, 26  # ggml types
LIBRARIES = Path(str(resources.files("pyllamaernie"))) / "lib"


class Parameters(ctypes.Structure):
    """ggml_init_params"""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


@pytest.fixture(scope="module")
def ggml():
    base = ctypes.CDLL(str(LIBRARIES / "libggml-base-ernie.so"), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(LIBRARIES / "libggml-cpu-ernie.so"))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name, arguments in {
        "init": [Parameters],
        "new_tensor_3d": [pointer, ctypes.c_int, number, number, number],
        "mul_mat": [pointer, pointer, pointer],
        "mul_mat_id": [pointer, pointer, pointer, pointer],
        "new_graph": [pointer],
        "get_data": [pointer],
        "build_forward_expand": [pointer, pointer],
        "free": [pointer],
    }.items():
        function = getattr(base, f"ggml_{name}")
        function.argtypes, function.restype = arguments, pointer
    cpu.ggml_graph_compute_with_ctx.argtypes = [pointer, pointer, ctypes.c_int]
    cpu.ggml_cpu_init()
    base.compute = cpu.ggml_graph_compute_with_ctx
    return base


def product(ggml, kind: int, weights: np.ndarray, x: np.ndarray, n_rows: int, ids: np.ndarray | None = None):
    """What ggml computes; ids choose experts.

    Shapes: x (n_tokens, n_used or 1, n_cols), ids (n_tokens, n_used) -> (n_tokens, n_used, n_rows).
    """
    context = ggml.ggml_init(Parameters(weights.nbytes + 4 * x.nbytes + (1 << 24), None, False))

    def tensor(type_: int, data: np.ndarray, *shape: int):
        made = ggml.ggml_new_tensor_3d(context, type_, *shape)
        ctypes.memmove(ggml.ggml_get_data(made), data.ctypes.data, data.nbytes)
        return made

    n_tokens, n_used, n_cols = x.shape
    if ids is None:
        a = tensor(kind, weights, n_cols, n_rows, 1)
        out = ggml.ggml_mul_mat(context, a, tensor(F32, x, n_cols, n_tokens * n_used, 1))
    else:
        a = tensor(kind, weights, n_cols, n_rows, len(weights))
        chosen = tensor(I32, ids, ids.shape[1], n_tokens, 1)
        out = ggml.ggml_mul_mat_id(context, a, tensor(F32, x, n_cols, n_used, n_tokens), chosen)
        n_used = ids.shape[1]
    graph = ggml.ggml_new_graph(context)
    ggml.ggml_build_forward_expand(graph, out)
    assert ggml.compute(context, graph, 2) == 0
    size = n_tokens * n_used * n_rows
    result = np.ctypeslib.as_array((ctypes.c_float * size).from_address(ggml.ggml_get_data(out))).copy()
    ggml.ggml_free(context)
    return result.reshape(n_tokens, n_used, n_rows)


def random_weights(name: str, n_rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Blocks and what they decode to. Shapes: -> (n_rows, row bytes) uint8, (n_rows, N_COLS) float64."""
    row = QUANT_TYPES[name]
    blocks = rng.integers(0, 256, (n_rows * N_COLS // row.block_size, row.block_bytes), np.uint8)
    if name == "CCQ2_B":
        scale = rng.uniform(85, 125, len(blocks)).astype("<f4")
        blocks[:, :4] = scale.view(np.uint8).reshape(-1, 4)
        blocks[:, 4:8] = (16384 - np.float32(127.5) * scale).astype("<f4").view(np.uint8).reshape(-1, 4)
        blocks[:, 8:10] = [0x80, 0x3F]  # super scale 1
        decoded = ccq.decode_ccq2_b(blocks)
    else:
        blocks[:, 0] = 240 | blocks[:, 0] & 1  # scale 1/32
        decoded = ccq.decode(name, blocks)
    return blocks.reshape(n_rows, -1), decoded.reshape(n_rows, N_COLS).astype(np.float64)


def random_activations(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Integers that Q8_K holds exactly: its scale becomes 1."""
    x = rng.integers(-126, 127, shape).astype(np.float32)
    x[..., ::256] = -127
    return x


@pytest.mark.parametrize("name", QUANT_TYPES)
@pytest.mark.parametrize("n_rows", [1, 13, 40, 300])
def test_mul_mat_is_exact_for_any_number_of_rows_and_tokens(ggml, name, n_rows):
    rng = np.random.default_rng(n_rows)
    weights, decoded = random_weights(name, n_rows, rng)
    for n_tokens in (1, 2, 7, 8, 17, 40):  # from eight on by tiles
        x = random_activations((n_tokens, 1, N_COLS), rng)
        expected = x[:, 0].astype(np.float64) @ decoded.T
        got = product(ggml, QUANT_TYPES[name].ggml_id, weights, x, n_rows)[:, 0]
        np.testing.assert_array_equal(got, expected.astype(np.float32))


@pytest.mark.parametrize("name", QUANT_TYPES)
@pytest.mark.parametrize("n_tokens", [1, 3, 50])
@pytest.mark.parametrize("shared", [True, False], ids=["one-input", "input-per-expert"])
def test_mul_mat_id_is_exact_with_idle_and_busy_experts(ggml, name, n_tokens, shared):
    n_expert, n_used, n_rows = 5, 3, 75
    rng = np.random.default_rng(n_tokens)
    weights, decoded = random_weights(name, n_expert * n_rows, rng)
    weights, decoded = weights.reshape(n_expert, -1), decoded.reshape(n_expert, n_rows, N_COLS)
    x = random_activations((n_tokens, 1 if shared else n_used, N_COLS), rng)
    ids = np.stack([rng.permutation(n_expert - 1)[:n_used] for _ in range(n_tokens)]).astype(np.int32)  # never the last
    ids[n_tokens // 2 :, 0] = 0  # one expert with many tokens
    ids[n_tokens // 2 :, 1:] = [1, 2]
    got = product(ggml, QUANT_TYPES[name].ggml_id, weights, x, n_rows, ids)
    inputs = np.broadcast_to(x, (n_tokens, n_used, N_COLS)).astype(np.float64)
    expected = np.einsum("tuc,turc->tur", inputs, decoded[ids])
    np.testing.assert_array_equal(got, expected.astype(np.float32))
