"""Errors of types on sampled rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pyllamaernie.errors import InputError
from pyllamaernie.plan.measure import ErrorTable, candidate_types, expert_shares, is_quantizable, measure, sample_tensor
from pyllamaernie.quant import native
from pyllamaernie.quant.importance import Importance
from pyllamaernie.quant.source import ModelSource, Piece, Weights, cut

RNG = np.random.default_rng(3)


def weights(name: str, values: np.ndarray) -> Weights:
    """A tensor in memory. Shapes: (..., n_rows, n_cols) float32"""
    flat = np.ascontiguousarray(values, np.float32).reshape(-1, values.shape[-1])

    def pieces() -> Iterator[Piece]:
        for first, n in cut(0, len(flat), flat.shape[1], values.shape[-2]):
            yield Piece(first, n, lambda first=first, n=n: flat[first : first + n].view(np.uint8))

    return Weights(name, values.shape, "F32", flat.nbytes, pieces)


def importance(name: str, columns: np.ndarray, counts: list[int]) -> Importance:
    return Importance(Path("imatrix.gguf"), {name: columns}, {name: np.array(counts)}, (), 1)


def full_error(type_name: str, values: np.ndarray, columns: np.ndarray, shares: np.ndarray) -> float:
    """The definition, in float64, over every row of every expert."""
    lost = whole = 0.0
    for x, m, share in zip(values, columns, shares, strict=True):
        y = native.dequantize(type_name, native.quantize(type_name, x, m), x.shape[1])
        lost += share * float((m.astype(np.float64) * (y.astype(np.float64) - x) ** 2).sum())
        whole += share * float((m.astype(np.float64) * x.astype(np.float64) ** 2).sum())
    return lost / whole


def test_error_over_all_rows_is_the_definition() -> None:
    values = RNG.standard_normal((3, 40, 256)).astype(np.float32)
    columns = RNG.lognormal(size=(3, 256)).astype(np.float32)
    shares = np.array([5.0, 1.0, 2.0])
    found = sample_tensor(weights("w.weight", values), ["Q4_K", "Q2_K"], columns, shares, n_rows=10_000)
    for name in ("Q4_K", "Q2_K"):
        assert found[name].n_rows == 120
        assert found[name].error == pytest.approx(full_error(name, values, columns, shares), rel=1e-5)


def test_sampled_error_is_within_its_standard_error() -> None:
    misses, n = 0, 60
    for seed in range(n):
        rng = np.random.default_rng(seed)
        values = (rng.standard_normal((1, 900, 256)) * rng.lognormal(0, 0.5, (1, 900, 1))).astype(np.float32)
        columns = rng.lognormal(size=(1, 256)).astype(np.float32)
        found = sample_tensor(weights(f"{seed}.weight", values), ["Q4_0"], columns, None, n_rows=64)["Q4_0"]
        assert found.n_rows < 900
        exact = full_error("Q4_0", values, columns, np.ones(1))
        misses += abs(found.error - exact) > 3 * found.standard_error
    assert misses <= 2  # 0.3 % of them are expected


def test_sampling_goes_on_until_the_error_is_known() -> None:
    values = RNG.standard_normal((4096, 256)).astype(np.float32)
    values[RNG.random(4096) < 0.05, ::32] *= 50  # few rows hold most of the error
    found = sample_tensor(weights("w.weight", values), ["Q4_0"], None, None, n_rows=16)["Q4_0"]
    assert found.n_rows > 16
    assert found.standard_error <= 0.03 * found.error or found.n_rows == 4096


@pytest.mark.timeout(60)
def test_sampling_ends_when_only_one_expert_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are all there is, however little they say."""
    monkeypatch.setattr("pyllamaernie.plan.measure.STANDARD_ERROR", 0.0)  # never reached
    values = RNG.standard_normal((4, 8, 256)).astype(np.float32)
    shares, columns = np.array([0.0, 3.0, 0.0, 0.0]), np.ones((4, 256), np.float32)
    found = sample_tensor(weights("w.weight", values), ["Q4_0"], columns, shares)["Q4_0"]
    assert found.n_rows == 8
    assert found.error == pytest.approx(full_error("Q4_0", values, columns, shares), rel=1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_expert_without_traffic_does_not_count(seed: int) -> None:
    """Planted truth: rows that no type holds well, in an expert that no token reaches."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((8, 32, 256)).astype(np.float32)
    bad, columns = values.copy(), np.ones((8, 256), np.float32)
    bad[5, :, ::32] *= 60  # ruins its blocks, for the sake of columns that do not matter
    columns[5, ::32] = 1e-6
    counts = rng.integers(50, 500, 8)
    counts[5] = 0
    name = "blk.0.ffn_up_exps.weight"
    data = importance(name, columns, counts.tolist())

    def error(x: np.ndarray, shares: np.ndarray | None) -> float:
        return sample_tensor(weights(name, x), ["Q4_0"], columns, shares)["Q4_0"].error

    shares = expert_shares(weights(name, bad), data)
    assert error(bad, shares) == error(values, shares)
    assert error(bad, None) > 1.5 * error(values, None)  # it would have counted


def test_only_types_whose_blocks_divide_the_row_are_candidates() -> None:
    known = importance("w.weight", np.ones((1, 256), np.float32), [10])
    wide = candidate_types(weights("w.weight", np.ones((4, 256))), known)
    narrow = candidate_types(weights("w.weight", np.ones((4, 96))), known)
    assert {"IQ2_XXS", "Q4_K", "Q8_0", "F16"} <= set(wide) and "CCQ2" not in wide  # slow ones are asked for
    assert {"Q4_0", "Q8_0", "F16"} <= set(narrow)
    assert not {"Q4_K", "IQ2_XXS", "CCQ2"} & set(narrow)
    assert candidate_types(weights("w.weight", np.ones((4, 50))), known) == ["BF16", "F16"]


def test_types_that_need_importance_are_no_candidates_without() -> None:
    found = candidate_types(weights("w.weight", np.ones((4, 256))), None)
    assert not set(found) & native.WANT_IMPORTANCE
    assert "Q2_K" in found


def test_norms_routers_and_vectors_are_not_quantized() -> None:
    matrix = np.ones((4, 256))
    assert is_quantizable(weights("blk.0.attn_q.weight", matrix))
    assert not is_quantizable(weights("blk.0.ffn_gate_inp.weight", matrix))
    assert not is_quantizable(weights("blk.0.ffn_gate_inp_vl.weight", matrix))
    assert not is_quantizable(weights("blk.0.attn_norm.weight", matrix))
    assert not is_quantizable(weights("blk.0.exp_probs_b.bias", matrix))


def test_table_is_kept_and_read_again(tmp_path: Path) -> None:
    source = ModelSource(Path("m.gguf"), "ernie4_5", {}, [weights("a.weight", RNG.standard_normal((8, 256)))], "f")
    first = measure(source, types=["Q4_0", "Q8_0"], cache=tmp_path)
    (path,) = tmp_path.glob("errors-*.json")
    assert ErrorTable.from_json(path.read_text()) == first
    path.write_text(path.read_text().replace('"n_rows": 8', '"n_rows": 7'))
    assert measure(source, types=["Q4_0", "Q8_0"], cache=tmp_path).errors["a.weight"]["Q4_0"].n_rows == 7
    assert measure(source, types=["Q4_0"], cache=tmp_path).errors["a.weight"]["Q4_0"].n_rows == 8  # another table


def test_unknown_type_is_refused() -> None:
    source = ModelSource(Path("m.gguf"), "ernie4_5", {}, [weights("a.weight", np.ones((8, 256)))], "f")
    with pytest.raises(InputError, match=r"Q4_7.*types are"):
        measure(source, types=["Q4_7"])
