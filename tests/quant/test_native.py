"""ggml's quantizers through the compiled module."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest

from pyllamaernie.errors import InputError, QuantizeError
from pyllamaernie.gguf import file as _upstream  # noqa: F401  - registers our types with the gguf package
from pyllamaernie.gguf.types import QUANT_TYPES
from pyllamaernie.quant import native

ROWS = np.random.default_rng(5).standard_normal((6, 512)).astype(np.float32)
KNOWN = sorted(set(native.TYPES) & set(gguf.GGMLQuantizationType.__members__))  # the package may lack the newest
LATE = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"}  # ggml makes their tables at the first use, for seconds
COLUMNS = np.random.default_rng(6).lognormal(size=512).astype(np.float32)


def test_the_table_has_ours_and_the_numbers_of_the_gguf_package() -> None:
    for row in QUANT_TYPES.values():
        ours = native.TYPES[row.name]
        assert (ours.ggml_id, ours.block_size, ours.block_bytes) == (row.ggml_id, row.block_size, row.block_bytes)
    for name in KNOWN:
        row = native.TYPES[name]
        kind = gguf.GGMLQuantizationType[name]
        assert (row.ggml_id, row.block_size, row.block_bytes) == (kind.value, *gguf.GGML_QUANT_SIZES[kind])
    assert {"F32", "F16", "BF16", "Q4_K", "IQ1_S"} <= set(native.TYPES)
    assert not {"Q8_1", "Q8_K", "I32"} & set(native.TYPES)  # no weights are stored in them


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LATE else n for n in native.TYPES])
def test_every_type_of_the_table_goes_there_and_back(name: str) -> None:
    data = native.quantize(name, ROWS, COLUMNS)
    assert data.shape == (6, native.TYPES[name].row_bytes(512))
    assert native.validate(name, data)
    values = native.dequantize(name, data, 512)
    if name in KNOWN and name != "Q1_0":  # which the package knows, but does not decode
        expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
        assert np.array_equal(values, np.asarray(expected, np.float32).reshape(6, 512))
    error = ((values - ROWS) ** 2 * COLUMNS).sum() / (ROWS**2 * COLUMNS).sum()
    assert error < (1.0 if name in ("Q1_0", "Q2_0", "TQ1_0", "TQ2_0") else 0.3)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "BF16", "F16"])
def test_bytes_equal_those_of_the_gguf_package(name: str) -> None:
    expected = gguf.quants.quantize(ROWS, gguf.GGMLQuantizationType[name])
    assert np.array_equal(native.quantize(name, ROWS), np.ascontiguousarray(expected).view(np.uint8).reshape(6, -1))


@pytest.mark.parametrize("name", ["IQ3_S", "Q2_K", "CCQ2"])
def test_rows_one_by_one_and_in_many_threads_give_the_same_bytes(name: str) -> None:
    whole = native.quantize(name, ROWS, COLUMNS)
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda i: native.quantize(name, ROWS[i : i + 1], COLUMNS), range(6)))
    assert np.array_equal(np.concatenate(rows), whole)


@pytest.mark.parametrize("source", ["F16", "BF16", "Q8_0"])
def test_requantizing_equals_quantizing_the_numbers(source: str) -> None:
    data = native.quantize(source, ROWS)
    numbers = native.dequantize(source, data, 512)
    assert np.array_equal(native.requantize("Q3_K", source, data, 512), native.quantize("Q3_K", numbers))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["Q4_K", "IQ3_S", "MXFP4", "CCQ2", "F16"])
def test_a_value_that_is_no_number_is_named_with_its_place(name: str, value: float) -> None:
    rows = ROWS.copy()
    rows[3, 77] = value
    with pytest.raises(QuantizeError, match=rf"(?i){name}: row 3, column 77 is {value}"):
        native.quantize(name, rows, COLUMNS)


def test_the_named_row_counts_from_the_first_row_of_the_tensor() -> None:
    rows = ROWS.copy()
    rows[3, 77] = np.nan
    with pytest.raises(QuantizeError, match="row 1003, column 77"):
        native.requantize("Q4_K", "F32", rows.view(np.uint8), 512, None, 1000)


@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q4_K", "Q4_0"])
def test_a_value_beyond_the_type_is_named(name: str) -> None:
    rows = ROWS.copy()
    rows[2, 300] = 3e9
    with pytest.raises(QuantizeError, match=r"row 2, column 300 is 3e\+09, beyond what"):
        native.quantize(name, rows)


@pytest.mark.parametrize("name", ["IQ1_S", "IQ2_XXS", "IQ2_XS"])
def test_a_type_that_needs_importance_data_says_so(name: str) -> None:
    assert native.TYPES[name].needs_importance
    with pytest.raises(QuantizeError, match="cannot be written without importance data"):
        native.quantize(name, ROWS)


@pytest.mark.parametrize(("value", "text"), [(np.nan, "nan"), (np.inf, "inf"), (-1.0, "-1")])
def test_importance_that_is_no_weight_is_named_with_its_column(value: float, text: str) -> None:
    bad = COLUMNS.copy()
    bad[9] = value
    with pytest.raises(QuantizeError, match=f"column 9 is {text}"):
        native.quantize("Q4_K", ROWS, bad)


def test_odd_shapes_and_names_are_refused() -> None:
    with pytest.raises(QuantizeError, match="rows of 48 values are not whole blocks of 256"):
        native.quantize("Q4_K", np.zeros((1, 48), np.float32))
    with pytest.raises(QuantizeError, match="importance of 3 columns for rows of 512"):
        native.quantize("Q4_K", ROWS, COLUMNS[:3])
    with pytest.raises(QuantizeError, match="not whole rows of 544"):
        native.dequantize("Q8_0", np.zeros(7, np.uint8), 512)
    with pytest.raises(InputError, match="'Q9_Z' is not known; types are F32"):
        native.quantize("Q9_Z", ROWS)


def test_python_runs_on_while_rows_are_quantized() -> None:
    rows = np.tile(ROWS, (200, 1))
    started, done = threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        native.quantize("IQ3_S", rows, COLUMNS)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    n = 0
    while not done.wait(0.001):
        n += 1
    thread.join()
    assert n > 3  # the call takes some 30 ms, and this thread ran meanwhile
