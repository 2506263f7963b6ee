"""Rows and importances over which a quantizer may stumble, and a runner that survives an abort: every call of
ggml_quantize_chunk gets a child process.

    python tests/support/quantize_cases.py LIBGGML_BASE.so [TYPE ...]  what becomes of each case, with any build of ggml
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

N_COLS = 512  # a whole block of every type
N_ROWS = 3  # the second one is the odd one
SECONDS = 20  # a call that takes longer is killed

# name -> ggml id; all that ggml_quantize_chunk writes
TYPES: dict[str, int] = {
    "F16": 1, "BF16": 30, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12,
    "Q5_K": 13, "Q6_K": 14, "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19, "IQ4_NL": 20, "IQ3_S": 21,
    "IQ2_S": 22, "IQ4_XS": 23, "IQ1_M": 29, "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39, "NVFP4": 40, "Q1_0": 41, "Q2_0": 42,
}  # fmt: skip
OURS: dict[str, int] = {"CCQ2": 112, "CCQ2_25": 113, "CCQ2_5": 114, "CCQ2_75": 115, "CCQ2_B": 116}
IDS = TYPES | OURS
NEEDS_IMATRIX = ("IQ2_XXS", "IQ2_XS", "IQ1_S")
NO_RANGE = ("F16", "BF16")  # NaN and infinities have a code of their own there


@dataclass(frozen=True)
class Case:
    """`rows` and `imatrix` make float32 arrays of (N_ROWS, N_COLS) and (N_COLS,); `bad` is the place of the value that
    nothing but an error can answer: ("weight", row, column), ("importance", None, column)."""

    rows: Callable[[], np.ndarray]
    imatrix: Callable[[], np.ndarray] | None
    bad: tuple[str, int | None, int] | None = None


def plain_rows() -> np.ndarray:
    return np.random.default_rng(5).standard_normal((N_ROWS, N_COLS)).astype(np.float32) / 50


def plain_imatrix() -> np.ndarray:
    return np.random.default_rng(6).chisquare(1, N_COLS).astype(np.float32) + np.float32(1e-3)


def _rows(change: Callable[[np.ndarray], object]) -> Callable[[], np.ndarray]:
    def make() -> np.ndarray:
        rows = plain_rows()
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            change(rows[1])
        return rows

    return make


def _imatrix(change: Callable[[np.ndarray], object]) -> Callable[[], np.ndarray]:
    def make() -> np.ndarray:
        imatrix = plain_imatrix()
        change(imatrix)
        return imatrix

    return make


def _set(where: object, value: float) -> Callable[[np.ndarray], object]:
    return lambda row: row.__setitem__(where, value)


def _scale(factor: float) -> Callable[[np.ndarray], object]:
    return lambda row: row.__imul__(np.float32(factor))


ALL = slice(None)
ROWS: dict[str, Callable[[np.ndarray], object]] = {
    "zeros": _set(ALL, 0.0),
    "minus zeros": _set(ALL, -0.0),
    "denormals": _set(ALL, 1e-40),
    "least denormal": _set(5, 1e-45),
    "all 1e-30": _scale(5e-29),
    "all 1e-18": _scale(5e-17),
    "one block of zeros": _set(slice(0, 256), 0.0),
    "all equal": _set(ALL, 0.02),
    "all equal, negative": _set(ALL, -0.02),
    "one 1e4": _set(77, 1e4),
    "one 1e6": _set(77, 1e6),
    "one -1e6": _set(77, -1e6),
    "one 1e8": _set(77, 1e8),
    "one 1e12": _set(77, 1e12),
    "one 1e19": _set(77, 1e19),
    "one 1e25": _set(77, 1e25),
    "one 3e38": _set(77, 3e38),
    "one -3.4e38": _set(77, -3.4e38),
    "all 1e6": _scale(5e7),
    "all 1e12": _scale(5e13),
    "all 1e25": _scale(5e26),
    "all 1e37": _scale(1e38),
    "all 3e38": _set(ALL, 3e38),
}
IMATRICES: dict[str, Callable[[np.ndarray], object]] = {
    "importance zero": _set(ALL, 0.0),
    "importance half zero": _set(slice(0, None, 2), 0.0),
    "importance zero in a block": _set(slice(0, 256), 0.0),
    "importance zero but one": lambda w: (w.fill(0.0), w.__setitem__(3, 1.0)),
    "importance 1e-38": _set(ALL, 1e-38),
    "importance 1e-45": _set(ALL, 1e-45),
    "importance 5e-22": _scale(5e-22),
    "importance 1e-12": _scale(1e-12),
    "importance 1e12": _scale(1e12),
    "importance 1e30": _set(ALL, 1e30),
    "importance 3e38": _set(ALL, 3e38),
    "one importance 1e30": _set(9, 1e30),
    "one importance 3e38": _set(9, 3e38),
}

CASES: dict[str, Case] = {"plain": Case(plain_rows, plain_imatrix), "no importance": Case(plain_rows, None)}
CASES |= {name: Case(_rows(change), plain_imatrix) for name, change in ROWS.items()}
CASES |= {f"{name}, no importance": Case(_rows(change), None) for name, change in ROWS.items()}
CASES |= {name: Case(plain_rows, _imatrix(change)) for name, change in IMATRICES.items()}
CASES |= {
    f"{rows}, {imatrix}": Case(_rows(ROWS[rows]), _imatrix(IMATRICES[imatrix]))
    for rows in ("one 1e6", "one 1e25", "all 1e12", "all 1e37", "all 1e-18", "zeros")
    for imatrix in (
        "importance zero",
        "importance half zero",
        "importance 1e30",
        "one importance 1e30",
        "importance 5e-22",
    )
}
CASES |= {
    f"{name}{suffix}": Case(_rows(_set(300, value)), imatrix, ("weight", 1, 300))
    for name, value in (("a NaN", np.nan), ("an Inf", np.inf), ("a -Inf", -np.inf))
    for suffix, imatrix in (("", plain_imatrix), (", no importance", None))
}
CASES |= {
    name: Case(plain_rows, _imatrix(_set(301, value)), ("importance", None, 301))
    for name, value in (
        ("importance with a NaN", np.nan),
        ("importance with an Inf", np.inf),
        ("importance below zero", -1.0),
    )
}


@dataclass(frozen=True)
class Outcome:
    """`kind`: "ok", "error", "abort", "hang"; of a written row its decoded values; of an error its text."""

    kind: str
    data: np.ndarray | None = None
    values: np.ndarray | None = None
    text: str = ""


class Traits(ctypes.Structure):
    """The head of ggml_type_traits."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


class Library:
    """ggml_quantize_chunk of a build of ggml-base."""

    def __init__(self, path: Path) -> None:
        self.lib = lib = ctypes.CDLL(str(path))
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
        lib.ggml_quantize_chunk.restype = ctypes.c_size_t
        lib.ggml_get_type_traits.argtypes, lib.ggml_get_type_traits.restype = [ctypes.c_int], ctypes.POINTER(Traits)
        lib.ggml_row_size.argtypes, lib.ggml_row_size.restype = [ctypes.c_int, count], ctypes.c_size_t
        lib.ggml_validate_row_data.argtypes = [ctypes.c_int, pointer, ctypes.c_size_t]
        lib.ggml_validate_row_data.restype = ctypes.c_bool
        lib.ggml_quantize_init.argtypes = [ctypes.c_int]
        if hasattr(lib, "ggml_quantize_check"):  # not upstream's
            lib.ggml_quantize_check.argtypes = [
                *(ctypes.c_int, pointer, count, count, count, pointer),
                *(count, ctypes.c_char_p, ctypes.c_size_t),
            ]
            lib.ggml_quantize_check.restype = ctypes.c_bool

    def check(self, type_id: int, rows: np.ndarray, imatrix: np.ndarray | None, first_row: int = 0) -> str:
        """Why the library refuses the rows; empty where it does not."""
        text = ctypes.create_string_buffer(512)
        rows = np.ascontiguousarray(rows, np.float32)
        w = None if imatrix is None else np.ascontiguousarray(imatrix, np.float32)
        good = self.lib.ggml_quantize_check(
            *(type_id, rows.ctypes.data, 0, *rows.shape, None if w is None else w.ctypes.data),
            *(first_row, text, len(text)),
        )
        return "" if good else text.value.decode()

    def quantize(self, type_id: int, rows: np.ndarray, imatrix: np.ndarray | None) -> np.ndarray | None:
        """The written bytes, (n_rows, row bytes); None when the library refuses."""
        rows = np.ascontiguousarray(rows, np.float32)
        out = np.full((len(rows), self.lib.ggml_row_size(type_id, rows.shape[1])), 0xA5, np.uint8)
        w = None if imatrix is None else np.ascontiguousarray(imatrix, np.float32)
        written = self.lib.ggml_quantize_chunk(
            type_id, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, None if w is None else w.ctypes.data
        )
        if written not in (0, out.nbytes):
            raise AssertionError(f"{written} bytes of {out.nbytes}")
        return out if written else None

    def dequantize(self, type_id: int, data: np.ndarray, n_cols: int) -> np.ndarray:
        """Shapes: (n_rows, row bytes) -> (n_rows, n_cols) float32."""
        out = np.zeros((len(data), n_cols), np.float32)
        to_float = self.lib.ggml_get_type_traits(type_id).contents.to_float
        to_float(np.ascontiguousarray(data).ctypes.data, out.ctypes.data, out.size)
        return out

    def outcome(self, type_id: int, rows: np.ndarray, imatrix: np.ndarray | None) -> Outcome:
        """What a call does, made in a child process; every thread of this one but the caller's is lost in there."""
        self.lib.ggml_quantize_init(type_id)  # the tables of the grids, once
        n_bytes = len(rows) * self.lib.ggml_row_size(type_id, rows.shape[1])
        read, write = os.pipe()
        child = fork()
        if child == 0:
            try:
                begin_child(os.devnull, SECONDS)
                self.lib.ggml_log_set(None, None)  # else the package's own, if that has been imported
                data = self.quantize(type_id, rows, imatrix)
                answer = b"E" + self.check(type_id, rows, imatrix).encode() if data is None else b"D" + data.tobytes()
                with os.fdopen(write, "wb") as pipe:
                    pipe.write(answer)
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            return Outcome("hang" if name == "SIGALRM" else "abort", text=name)
        if answer[:1] == b"E":
            return Outcome("error", text=answer[1:].decode())
        data = np.frombuffer(answer[1:], np.uint8)
        if len(data) != n_bytes:
            return Outcome("abort", text="no answer")
        data = data.reshape(len(rows), -1)
        return Outcome("ok", data, self.dequantize(type_id, data, rows.shape[1]))


def fork() -> int:
    """os.fork() without Python's warning that other threads are lost in the child, which only calls ggml."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def begin_child(log: str | Path, seconds: int) -> None:
    """Output goes to a file, an abort prints no backtrace, and there is an end."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["GGML_NO_BACKTRACE"] = "1"
    signal.alarm(seconds)


def verdict(outcome: Outcome, rows: np.ndarray) -> str:
    """A word for the table: what became of the odd row; for finite ones its relative squared error."""
    if outcome.kind != "ok":
        return outcome.kind if outcome.kind != "abort" else outcome.text.replace("SIG", "").lower()
    if not np.isfinite(outcome.values).all():
        return "nonfinite"
    x, y = rows[1].astype(np.float64), outcome.values[1].astype(np.float64)
    power = (x**2).sum()
    return f"{((x - y) ** 2).sum() / power:.2g}" if power > 0 else ("0" if not y.any() else "nonzero")


def table(library: Library, names: list[str]) -> None:
    """Prints a line for each case, a column for each type."""
    print(f"{'':40s}" + "".join(f"{name:>10s}" for name in names))
    for case_name, case in CASES.items():
        rows, imatrix = case.rows(), case.imatrix and case.imatrix()
        words = [verdict(library.outcome(IDS[name], rows, imatrix), rows) for name in names]
        print(f"{case_name:40s}" + "".join(f"{word:>10s}" for word in words), flush=True)


if __name__ == "__main__":
    table(Library(Path(sys.argv[1])), sys.argv[2:] or list(TYPES))
