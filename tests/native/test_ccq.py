"""CCQ in C against numpy: the same numbers from the same bytes, the same bytes from the same numbers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from ccq_library import FOLDER, NAMES, PATHS, SOURCES, Library, compiler, usable_paths

from pyllamaernie.quant import ccq

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs gcc")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return Library(tmp_path_factory.mktemp("ccq"))


def draws(seed: int = 3) -> dict[str, np.ndarray]:
    """Ordinary and extreme blocks, (n, 256) float32, all of them finite."""
    rng = np.random.default_rng(seed)
    outlier = rng.standard_normal((1, 256)) * 0.02
    outlier[0, 100] = 1e6
    return {
        "gauss": (rng.standard_normal((2, 256)) * 0.02).astype(np.float32),
        "student": (rng.standard_t(3, (1, 256)) * 0.005).astype(np.float32),
        "outlier": outlier.astype(np.float32),
        "equal": np.full((1, 256), 0.01, np.float32),
        "one weight": np.eye(1, 256, 70, dtype=np.float32),
        "denormal": np.full((1, 256), 1e-40, np.float32),
        "huge": (rng.standard_normal((1, 256)) * 1e37).astype(np.float32),
        "tiny": (rng.standard_normal((1, 256)) * 1e-9).astype(np.float32),
        "zero": np.zeros((1, 256), np.float32),
    }


@pytest.mark.parametrize("name", NAMES)
def test_c_and_numpy_have_the_same_constants(library, name):
    native, code = library.codes[name], ccq.CODES[name]
    assert (tuple(native.k), tuple(native.m), native.e_bits) == (code.k, code.m, code.e_bits)
    assert (tuple(map(tuple, native.t1)), tuple(map(tuple, native.t2))) == (code.t1, code.t2)


@pytest.mark.parametrize("name", NAMES)
def test_c_decodes_any_bytes_as_numpy_does(library, name):
    blocks = np.random.default_rng(1).integers(0, 256, (2000, ccq.CODES[name].block_bytes), np.uint8)
    expected = ccq.decode(name, blocks)
    assert np.isfinite(expected).all()
    assert (library.dequantize(name, blocks).view(np.uint32) == expected.view(np.uint32)).all()


def test_c_decodes_any_bytes_of_ccq2_b_as_numpy_does(library):
    blocks = np.random.default_rng(2).integers(0, 256, (2000, 142), np.uint8)
    blocks[1000:, :8] = 0
    blocks[1000:, :4] = np.random.default_rng(3).uniform(0, 400, 1000).astype("<f4").view(np.uint8).reshape(-1, 4)
    blocks[1000:, 8:10] = [0x80, 0x3C]
    got, expected = library.dequantize("CCQ2_B", blocks, 512), ccq.decode_ccq2_b(blocks)
    both_nan = np.isnan(got) & np.isnan(expected)
    assert ((got.view(np.uint32) == expected.view(np.uint32)) | both_nan).all()
    assert not both_nan[1000:].any()


@pytest.mark.parametrize(
    ("sort", "name"),
    [
        pytest.param(
            sort, name, marks=() if name == "CCQ2" or sort in ("gauss", "outlier", "zero") else pytest.mark.slow
        )
        for sort in draws()
        for name in NAMES
    ],
)
def test_c_encodes_the_bytes_that_numpy_encodes(library, name, sort):
    x = draws()[sort][:1]
    assert (library.encode(name, x, beam=8) == ccq.encode(name, x, beam=8)).all()


@pytest.mark.parametrize("name", [*NAMES[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[2:])])
def test_ggmls_entry_encodes_with_importances_as_numpy_does(library, name):
    x = draws()["gauss"]
    w = np.exp(2 * np.random.default_rng(5).standard_normal(512)).astype(np.float32)
    w[:3] = 0, -1, 1e30
    rows = library.quantize(name, x.reshape(1, 512), w)
    assert (rows.reshape(2, -1) == ccq.encode(name, x, w.reshape(2, 256))).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_no_value_stops_the_encoder(library, value):
    x = draws()["gauss"]
    x[0, 17] = value
    x[1] = value
    for name in NAMES:
        y = library.decode(name, library.encode(name, x, beam=8))
        assert np.isfinite(y).all()
        if not np.isfinite(value):  # what is not finite counts for nothing
            others = np.arange(256) != 17
            assert ((y - x)[0, others] ** 2).sum() < 0.1 * (x[0, others] ** 2).sum()


@pytest.mark.parametrize("weights", [0.0, np.nan, np.inf, 1e38, 1e-40, -1.0])
def test_no_importance_stops_the_encoder(library, weights):
    x = draws()["gauss"]
    w = np.full((2, 256), weights, np.float32)
    equal = library.encode("CCQ2", x, beam=8)
    assert (library.encode("CCQ2", x, w, beam=8) == equal).all()


def test_find_bad_names_the_first_value_that_is_not_finite(library):
    x = draws()["gauss"].ravel()
    assert library.lib.ggml_ccq_find_bad(x.ctypes.data, x.size) == -1
    x[40], x[30] = np.nan, -np.inf
    assert library.lib.ggml_ccq_find_bad(x.ctypes.data, x.size) == 30
    blocks = np.zeros((3, 142), np.uint8)
    assert library.lib.ggml_ccq2_b_find_bad(blocks.ctypes.data, 3) == -1
    blocks[2, 2:4] = [0x80, 0x7F]  # an infinite code_scale
    assert library.lib.ggml_ccq2_b_find_bad(blocks.ctypes.data, 3) == 2


def test_every_row_is_encoded_by_itself(library):
    x = draws()["gauss"]
    together = library.quantize("CCQ2_5", np.concatenate([x, x[::-1]]))
    assert (together[:2] == together[:1:-1]).all()


def test_an_outlier_leaves_the_rest_of_its_block_alone_when_it_counts_for_nothing(library):
    x = draws()["outlier"]
    w = np.ones((1, 256), np.float32)
    w[0, 100] = 0
    y = library.decode("CCQ2", library.encode("CCQ2", x, w))
    assert (w * (x - y) ** 2).sum() < 0.09 * (w * x**2).sum()


@pytest.mark.slow
def test_every_instruction_set_makes_the_same_bytes(library, tmp_path):
    plain = Library(tmp_path, ("-DCCQ_CLONES=",))
    x = (np.random.default_rng(9).standard_normal((40, 256)) * 0.02).astype(np.float32)
    for name in NAMES:
        assert (library.encode(name, x, beam=32) == plain.encode(name, x, beam=32)).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "most"), [("CCQ2", 0.0700), ("CCQ2_25", 0.0506), ("CCQ2_5", 0.0367), ("CCQ2_75", 0.0264)]
)
def test_gaussian_error_is_below_the_bar(library, name, most):
    x = (np.random.default_rng(10).standard_normal((800, 256)) * 0.02).astype(np.float32)
    y = library.dequantize(name, library.quantize(name, x.reshape(1, -1)).reshape(800, -1))
    assert ((x - y) ** 2).sum() / (x.astype(np.float64) ** 2).sum() <= most


def test_ccq2_b_encoder_is_near_the_best_of_its_code_and_takes_any_value(library):
    x = (np.random.default_rng(11).standard_normal((20, 512)) * 0.02).astype(np.float32)
    y = library.dequantize("CCQ2_B", library.quantize_b(x), 512)
    assert ((x - y) ** 2).sum() / (x**2).sum() < 0.125  # 0.107 is the best known of this code on a Gaussian
    for value in (0.0, np.nan, np.inf, 1e-40, 3e38):
        y = library.dequantize("CCQ2_B", library.quantize_b(np.full((1, 512), value, np.float32)), 512)
        assert np.isfinite(y).all()


SANITIZED = (
    *("-std=gnu11", "-O1", "-g", "-ffp-contract=off", "-fno-sanitize-recover=all", "-DCCQ_CLONES="),
    "-fsanitize=address,undefined,float-cast-overflow",
)


@pytest.mark.slow
@pytest.mark.parametrize("path", usable_paths())
def test_sanitizers_find_nothing_in_random_blocks_and_hostile_numbers(path, tmp_path):
    empty = tmp_path / "empty.c"
    empty.write_text("int main(void) { return 0; }\n")
    if subprocess.run([compiler(), *SANITIZED, "-o", tmp_path / "empty", empty], capture_output=True).returncode:
        pytest.skip("gcc has no sanitizer libraries here")
    sources = [Path(__file__).parents[1] / "support" / "ccq_fuzz.c", *SOURCES]
    program = tmp_path / "fuzz"
    subprocess.run([compiler(), *SANITIZED, *PATHS[path][0], "-I", FOLDER, "-o", program, *sources, "-lm"], check=True)
    for seed in (1, 2):
        done = subprocess.run([program, str(seed), "8"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        assert done.stdout.split()[-1] == path
