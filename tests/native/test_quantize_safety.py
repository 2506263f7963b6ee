"""Quantizing ends in finite numbers or in an error that names the place, never in the end of the process.

Single rows go through ggml_quantize_chunk, each call in a child process (quantize_cases.py); whole models through
llama-quantize, with importance matrices as they go wrong (upstream's issue 14788).
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import checkpoints
import gguf
import gguf_models
import numpy as np
import pytest
import quantize_cases
from checkpoint_shapes import Shape
from quantize_cases import CASES, IDS, N_COLS, NEEDS_IMATRIX, OURS, TYPES, Library, plain_imatrix, plain_rows

from pyllamaernie import programs
from pyllamaernie.convert import convert
from pyllamaernie.quant import imatrix

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

SECONDS = 60  # of one llama-quantize
# each ended the process, gave infinities, or lost a whole row in the library without our patches
SHARP = (
    *("zeros", "no importance", "one -1e6", "one 1e19", "one 1e25", "one -3.4e38", "all 3e38", "a NaN", "an Inf"),
    *("one 1e25, no importance", "a NaN, no importance", "importance zero", "importance 5e-22", "importance 3e38"),
    *("importance with a NaN", "importance with an Inf", "importance below zero", "all 1e12, one importance 1e30"),
)
QUICK = ("F16", "Q4_0", "Q2_K", "Q4_K", "IQ2_XXS", "IQ3_XXS", "IQ3_S", "MXFP4")
GRIDS = ("IQ1_S", "IQ1_M", "IQ2_XS", "IQ2_S")  # whose tables take seconds to make


def marked(names: Iterable[str]) -> list:
    return [pytest.param(name, marks=pytest.mark.slow) if name in GRIDS else name for name in names]


@pytest.fixture(scope="module")
def library() -> Library:
    folder = programs.folder().parent / "lib"
    return Library(next(path for path in sorted(folder.iterdir()) if path.name.startswith("libggml-base")))


def problem(library: Library, name: str, case_name: str) -> str:
    """What is wrong with the outcome of a case; empty if nothing is."""
    case = CASES[case_name]
    rows, weights = case.rows(), case.imatrix and case.imatrix()
    outcome = library.outcome(IDS[name], rows, weights)
    if weights is None and name in NEEDS_IMATRIX:
        return "" if outcome.kind == "error" and "needs an importance matrix" in outcome.text else f"{outcome}"
    if case.bad is not None:
        what, row, column = case.bad
        expected = f"row {row or 0}, column {column}: the {what} is "
        return "" if outcome.kind == "error" and outcome.text.startswith(expected) else f"{outcome}"
    if outcome.kind != "ok":
        return f"{outcome.kind}: {outcome.text}"
    if not np.isfinite(outcome.values).all():
        return "not finite"
    for i in (0, 2):  # the odd row harms no other
        if np.abs(outcome.values[i] - rows[i]).max() > 8 * np.abs(rows[i]).max():
            return f"row {i} is destroyed"
    return ""


def problems(library: Library, names: tuple[str, ...], cases: tuple[str, ...]) -> list[str]:
    found = ((name, case, problem(library, name, case)) for name in names for case in cases)
    return [f"{name}, {case}: {text}" for name, case, text in found if text]


def test_no_row_and_no_importance_ends_the_process(library: Library) -> None:
    assert problems(library, QUICK, SHARP) == []


def test_our_types_stand_the_same(library: Library) -> None:
    assert problems(library, ("CCQ2_5", "CCQ2_B"), ("one 1e25", "a NaN", "importance zero", "importance 3e38")) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TYPES, *OURS])
def test_every_case_ends_in_finite_numbers_or_in_an_error(library: Library, name: str) -> None:
    assert problems(library, (name,), tuple(CASES)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
def test_no_finite_row_is_refused_whatever_its_magnitudes(library: Library, name: str) -> None:
    rng = np.random.default_rng(11)
    for i in range(40):
        powers = rng.uniform(*sorted(rng.uniform(-149, 128, 2)), (3, N_COLS)) * (rng.random((3, N_COLS)) < rng.random())
        rows = (np.exp2(powers).clip(0, 3.4e38) * rng.choice([-1, 0, 1], (3, N_COLS), p=[0.4, 0.2, 0.4])).astype("f4")
        weights = np.exp2(rng.uniform(*sorted(rng.uniform(-149, 128, 2)), N_COLS)).clip(0, 3.4e38).astype("f4")
        weights *= rng.random(N_COLS) < rng.random()
        outcome = library.outcome(IDS[name], rows, weights if i % 4 or name in NEEDS_IMATRIX else None)
        assert outcome.kind == "ok", (i, outcome.kind, outcome.text)
        assert np.isfinite(outcome.values).all(), i


def encoder(library: Library, name: str) -> ctypes._FuncPointer:
    """Upstream's own function for the type, which nothing of ours stands before."""
    short = name.lower()
    function = getattr(library.lib, f"quantize_{short[:-1] + 'K' if name.endswith('_K') else short}")
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    function.restype = ctypes.c_size_t
    return function


def encoded(library: Library, name: str, rows: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    rows = np.ascontiguousarray(rows, np.float32)
    out = np.full((len(rows), library.lib.ggml_row_size(IDS[name], rows.shape[1])), 0xA5, np.uint8)
    library.lib.ggml_quantize_init(IDS[name])
    pointer = None if weights is None else weights.ctypes.data
    encoder(library, name)(rows.ctypes.data, out.ctypes.data, *rows.shape, pointer)
    return out


def ordinary_rows() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(12)
    shape = (4, N_COLS)
    return {
        "Gaussian": rng.standard_normal(shape) / 50,
        "Laplace": rng.laplace(size=shape) / 50,
        "Student": rng.standard_t(2, shape) / 50,
        "Cauchy": rng.standard_cauchy(shape).clip(-1000, 1000),
        "great": rng.standard_normal(shape) * 3000,  # above the bound from where on results are looked at
    }


@pytest.mark.parametrize("name", marked(name for name in TYPES if name not in ("F16", "BF16")))
def test_ordinary_rows_get_the_bytes_of_upstreams_encoder(library: Library, name: str) -> None:
    for source, values in ordinary_rows().items():
        rows = values.astype(np.float32)
        for weights in (plain_imatrix(), None):
            if weights is not None or name not in NEEDS_IMATRIX:
                expected = encoded(library, name, rows, weights)
                if np.isfinite(library.dequantize(IDS[name], expected, N_COLS)).all():
                    assert np.array_equal(library.quantize(IDS[name], rows, weights), expected), source
                else:
                    assert source in ("Cauchy", "great")


@pytest.mark.parametrize("name", marked(["Q4_0", "Q2_K", "Q4_K", "IQ4_XS", *GRIDS, "IQ2_XXS", "IQ3_XXS"]))
def test_only_the_ratios_of_importances_count(library: Library, name: str) -> None:
    rows = plain_rows()
    expected = library.quantize(IDS[name], rows, plain_imatrix())
    for exponent in (-30, 25, 60):
        weights = plain_imatrix() * np.float32(4.0**exponent)
        assert np.array_equal(library.quantize(IDS[name], rows, weights), expected), exponent
    none, ones = np.zeros(N_COLS, np.float32), np.ones(N_COLS, np.float32)
    assert np.array_equal(library.quantize(IDS[name], rows, none), library.quantize(IDS[name], rows, ones))


@pytest.mark.parametrize(
    ("name", "value", "most"), [("F16", 1e6, 65504), ("Q8_0", 1e25, 127 * 65504), ("Q4_0", 1e12, 8 * 65504)]
)
def test_a_value_beyond_the_type_becomes_nearly_the_greatest_that_it_can_hold(
    library: Library, name: str, value: float, most: float
) -> None:
    rows = plain_rows()
    rows[1, 77] = value
    outcome = library.outcome(IDS[name], rows, None)
    assert 0.9 * most < outcome.values[1, 77] <= most
    untouched = library.quantize(IDS[name], plain_rows(), None)
    assert np.array_equal(outcome.data[[0, 2]], untouched[[0, 2]])


def test_calls_that_make_no_sense_are_refused(library: Library) -> None:
    rows = plain_rows()
    for type_id, text in ((15, "type 15 (q8_K) is"), (24, "type 24 (i8) is"), (99, "type 99 (unknown) is none to")):
        assert library.check(type_id, rows, None).startswith(text)
        out = np.zeros(1 << 16, np.uint8)
        assert library.lib.ggml_quantize_chunk(type_id, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, None) == 0
    assert "not whole rows of whole blocks of q4_K" in library.check(IDS["Q4_K"], rows[:, :300], None)
    rows[2, 5] = np.nan
    assert library.check(IDS["Q8_0"], rows, None, first_row=100).startswith("row 102, column 5: the weight is nan")


EXPERTS = "blk.1.ffn_down_exps.weight"
VISION = "blk.1.ffn_down_exps_vl.weight"


@pytest.fixture(scope="module", params=["moe", "vl"])
def model(request: pytest.FixtureRequest) -> Path:
    return small_model(request.param)


def small_model(kind: str) -> Path:
    """One dense and one sparse layer whose expert rows are whole blocks."""
    home = gguf_models.folder() / "safety"
    out = home / f"{kind}.gguf"
    if not out.exists():
        shape = Shape(
            n_embd=256, n_head=2, n_head_kv=1, head_dim=128, n_layer=2, n_ff=256, n_expert=3, n_expert_used=2,
            n_shared=1, n_ff_exp=256, section_t=20, n_ff_exp_vl=256,
        )  # fmt: skip
        folder = checkpoints.write_checkpoint(home / f"{kind}-hf", kind, shape=shape, tied=False)
        convert(folder, out, type="f32")
    return out


def statistics(path: Path) -> dict[str, imatrix.Statistics]:
    """An importance matrix for every matrix of the layers, as if each expert had seen 100 tokens."""
    rng, out = np.random.default_rng(13), {}
    for tensor in gguf.GGUFReader(path).tensors:
        n_mat, n_cols = (*tensor.shape[2:], 1)[0], tensor.shape[0]
        if len(tensor.shape) > 1 and tensor.name.startswith("blk.") and "gate_inp" not in tensor.name:
            sums = (rng.chisquare(1, (n_mat, n_cols)) * 100 + 0.1).astype(np.float32)
            out[tensor.name] = imatrix.Statistics(tensor.name, sums, np.full(n_mat, 100))
    return out


def write_imatrix(path: Path, entries: Mapping[str, imatrix.Statistics]) -> Path:
    imatrix.write_imatrix(path, list(entries.values()), ["none"], 512)
    return path


def write_old_imatrix(path: Path, entries: Mapping[str, imatrix.Statistics]) -> Path:
    """The format before GGUF, which has no counts: what no token reached is zero. That of issue 14788."""
    with path.open("wb") as file:
        file.write(np.int32(len(entries)).tobytes())
        for name, entry in entries.items():
            file.write(np.int32(len(name)).tobytes() + name.encode())
            file.write(np.array([1, entry.sums.size], np.int32).tobytes() + entry.sums.astype("<f4").tobytes())
    return path


def quantize(
    library: Library, source: Path, out: Path, type_name: str, *, weights: Path | None = None
) -> tuple[int, str]:
    """Exit code and output of llama-quantize with the down projections of experts in the type, the rest in Q8_0.

    It runs in a fork of this process, which has the tables of the grids: each program would spend seconds on them.
    """
    library.lib.ggml_quantize_init(IDS[type_name])
    lib = programs.folder().parent / "lib"
    llama = ctypes.CDLL(str(next(lib.glob("libllama-ernie.*"))))
    main = ctypes.CDLL(str(next(lib.glob("*llama-quantize-impl*"))))._Z14llama_quantizeiPPc
    words = ["llama-quantize", "--tensor-type", f"ffn_down_exps={type_name.lower()}"]
    words += ["--imatrix", str(weights)] if weights else []
    words += [str(source), str(out), "Q8_0", "2"]
    log = out.with_suffix(".log")
    child = quantize_cases.fork()
    if child == 0:
        code = 99
        try:
            quantize_cases.begin_child(log, SECONDS)
            llama.llama_log_set(None, None)  # else the package's own, if that has been imported
            code = main(len(words), (ctypes.c_char_p * (len(words) + 1))(*(word.encode() for word in words), None))
            ctypes.CDLL(None).fflush(None)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")


def worst_error(source: Path, out: Path, name: str) -> float:
    """Relative squared error of the expert that came out worst; infinite where a number is not finite."""
    x, y = (
        gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1, *tensor.shape[1::-1].tolist())
        for path in (source, out)
        for tensor in gguf.GGUFReader(path).tensors
        if tensor.name == name
    )
    x, y = x.astype(np.float64), y.astype(np.float64)
    return float((((x - y) ** 2).sum((1, 2)) / (x**2).sum((1, 2))).max()) if np.isfinite(y).all() else np.inf


def change(
    entries: Mapping[str, imatrix.Statistics], edit: Callable[[np.ndarray, np.ndarray], object]
) -> dict[str, imatrix.Statistics]:
    """A copy whose matrices of experts `edit(sums, counts)` has changed."""
    out = {}
    for name, entry in entries.items():
        sums, counts = entry.sums.copy(), entry.counts.copy()
        if "_exps" in name:
            edit(sums, counts)
        out[name] = imatrix.Statistics(name, sums, counts)
    return out


def unused_expert(sums: np.ndarray, counts: np.ndarray) -> None:
    sums[1], counts[1] = 0, 0


def zero_sums(sums: np.ndarray, counts: np.ndarray) -> None:
    sums[1] = 0


UNUSUAL = {
    "an expert without tokens": (write_imatrix, unused_expert),
    "an expert without tokens, old format": (write_old_imatrix, unused_expert),
    "an expert whose inputs are zero": (write_imatrix, zero_sums),
    "all zero, old format": (write_old_imatrix, lambda sums, counts: sums.fill(0)),
    "tiny, old format": (write_old_imatrix, lambda sums, counts: sums.__imul__(np.float32(1e-25))),
    "huge, old format": (write_old_imatrix, lambda sums, counts: sums.__imul__(np.float32(1e30))),
}
SENSIBLE = {"IQ1_S": 0.4, "IQ1_M": 0.4, "IQ2_XXS": 0.3, "IQ2_XS": 0.25, "IQ2_S": 0.2, "IQ3_XXS": 0.15}


@pytest.mark.slow
@pytest.mark.parametrize("type_name", SENSIBLE)
@pytest.mark.parametrize("unusual", UNUSUAL)
def test_no_importance_matrix_costs_an_expert(library: Library, model: Path, unusual: str, type_name: str) -> None:
    write, edit = UNUSUAL[unusual]
    weights = write(model.with_name("imatrix"), change(statistics(model), edit))
    out = model.with_name("out.gguf")
    code, said = quantize(library, model, out, type_name, weights=weights)
    assert code == 0, said[-2000:]
    for name in (EXPERTS, VISION) if model.name == "vl.gguf" else (EXPERTS,):
        assert worst_error(model, out, name) < SENSIBLE[type_name], name


def test_an_expert_without_importances_is_quantized_like_the_others(library: Library) -> None:
    model = small_model("moe")
    weights = write_old_imatrix(model.with_name("imatrix"), change(statistics(model), unused_expert))
    code, said = quantize(library, model, model.with_name("out.gguf"), "IQ3_XXS", weights=weights)
    assert code == 0, said[-2000:]
    assert worst_error(model, model.with_name("out.gguf"), EXPERTS) < SENSIBLE["IQ3_XXS"]


def test_the_error_names_vision_experts_without_importances_and_what_to_do(library: Library) -> None:
    model = small_model("vl")
    entries = {name: entry for name, entry in statistics(model).items() if "_exps_vl" not in name}
    out = model.with_name("partial.gguf")
    code, said = quantize(library, model, out, "IQ3_XXS", weights=write_imatrix(model.with_name("imatrix"), entries))
    assert code == 1
    assert f"Missing importance matrix for tensor {VISION}" in said
    assert "pyllamaernie imatrix --images" in said
    assert not out.exists()


def test_importances_of_another_model_are_an_error(library: Library) -> None:
    model = small_model("moe")
    entries = {
        name: imatrix.Statistics(name, np.ones((len(entry.sums), 128), np.float32), entry.counts)
        for name, entry in statistics(model).items()
    }
    out = model.with_name("other.gguf")
    code, said = quantize(library, model, out, "IQ3_XXS", weights=write_imatrix(model.with_name("imatrix"), entries))
    assert code == 1
    assert "imatrix size" in said
    assert not out.exists()


@pytest.mark.parametrize(("value", "word"), [(np.nan, "nan"), (np.inf, "inf"), (-1.0, "-1")])
def test_an_importance_that_is_none_is_an_error_with_its_place(library: Library, value: float, word: str) -> None:
    model = small_model("moe")
    entries = statistics(model)
    entries[EXPERTS].sums[2, 7] = value * 100
    out = model.with_name("bad.gguf")
    code, said = quantize(library, model, out, "IQ3_XXS", weights=write_imatrix(model.with_name("imatrix"), entries))
    assert code == 1
    assert EXPERTS in said
    if value < 0:
        assert f"tensor '{EXPERTS}', row 512, column 7: the importance is {word}, not a finite number" in said
    else:
        assert f"non-finite value {word} for {EXPERTS} at {2 * 256 + 7}" in said
    assert not out.exists()


def with_weight(path: Path, value: float) -> Path:
    """A copy of the model with one weight of an expert replaced, in row 400 and column 9."""
    out = path.with_name("changed.gguf")
    shutil.copyfile(path, out)
    offset = next(int(tensor.data_offset) for tensor in gguf.GGUFReader(path).tensors if tensor.name == EXPERTS)
    with out.open("r+b") as file:
        file.seek(offset + 4 * (256 * 400 + 9))
        file.write(np.float32(value).tobytes())
    return out


@pytest.mark.parametrize(("value", "word"), [(np.nan, "nan"), (-np.inf, "-inf")])
def test_a_weight_that_is_no_number_is_an_error_with_its_place(library: Library, value: float, word: str) -> None:
    model = small_model("moe")
    out, weights = model.with_name("bad.gguf"), write_imatrix(model.with_name("imatrix"), statistics(model))
    code, said = quantize(library, with_weight(model, value), out, "IQ3_XXS", weights=weights)
    assert code == 1
    assert f"tensor '{EXPERTS}' has invalid data: row 400, column 9 is {word}" in said
    assert not out.exists()


def test_a_great_weight_in_a_model_is_clamped_and_said(library: Library) -> None:
    model = small_model("moe")
    out, weights = model.with_name("great.gguf"), write_imatrix(model.with_name("imatrix"), statistics(model))
    source = with_weight(model, 1e25)
    code, said = quantize(library, source, out, "IQ3_XXS", weights=weights)
    assert code == 0, said[-2000:]
    assert "weights of up to 1e+25 are beyond the range of iq3_xxs" in said
    assert worst_error(source, out, EXPERTS) <= 1


def test_a_refusal_before_writing_leaves_the_old_file(library: Library) -> None:
    model = small_model("moe")
    old = model.with_name("old.gguf")
    old.write_bytes(b"something of worth")
    code, said = quantize(library, model, old, "IQ3_XXS")
    assert code == 1
    assert "this quantization requires an imatrix" in said
    assert old.read_bytes() == b"something of worth"
