"""The CCQ code of the overlay, `ggml-ccq*.c` and `ggml-cpu/ccq.c`, compiled alone with gcc and called by ctypes.

For the tests and the programs of bench/; the package itself reaches the same code through its compiled module.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parents[2] / "native" / "overlay" / "ggml" / "src"
SOURCES = (*sorted(FOLDER.glob("ggml-ccq*.c")), FOLDER / "ggml-cpu" / "ccq.c")
FLAGS = ["-std=gnu11", "-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-shared", "-fPIC"]
PATHS = {  # of the dot products: the compiler's flags, and what the processor must have
    "portable": ((), ()),
    "avx2": (("-mavx2", "-mfma"), ("avx2", "fma")),
    "avx512": (("-mavx512f", "-mavx512bw", "-mavx512vnni"), ("avx512f", "avx512bw", "avx512_vnni")),
    "avx512-vbmi": (
        ("-mavx512f", "-mavx512bw", "-mavx512vnni", "-mavx512vbmi"),
        ("avx512f", "avx512bw", "avx512_vnni", "avx512vbmi"),
    ),
}
NAMES = ("CCQ2", "CCQ2_25", "CCQ2_5", "CCQ2_75")  # the order of ggml_ccq_codes


class NativeCode(ctypes.Structure):
    """ggml_ccq_code: what tells one native type from another."""

    _fields_ = [
        ("k", ctypes.c_uint16 * 4),
        ("m", ctypes.c_uint16 * 4),
        ("t1", ctypes.c_int8 * 16 * 2),
        ("t2", ctypes.c_int8 * 16 * 2),
        ("e_bits", ctypes.c_int32),
    ]


def native_code(k, m, t1, t2, e_bits: int) -> NativeCode:
    """Shapes: k, m (4,); t1, t2 (2, 16)."""
    code = NativeCode(e_bits=e_bits)
    code.k[:], code.m[:] = list(map(int, k)), list(map(int, m))
    for table in range(2):
        code.t1[table][:], code.t2[table][:] = list(map(int, t1[table])), list(map(int, t2[table]))
    return code


def usable_paths() -> list[str]:
    """The paths that this processor can run; only the portable one where its features cannot be read."""
    try:
        features = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        features = set()
    return [name for name, (_, needed) in PATHS.items() if features.issuperset(needed)]


def q8_k(values: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Rows of ggml's Q8_K. Shapes: (n_blocks, 256) int8, (n_blocks,) float32 -> (n_blocks, 292) uint8."""
    sums = values.astype(np.int16).reshape(-1, 16, 16).sum(2, dtype=np.int16)
    parts = [np.ascontiguousarray(a).view(np.uint8).reshape(len(d), -1) for a in (d.astype("<f4"), values, sums)]
    return np.concatenate(parts, axis=1)


def compiler() -> str | None:
    """Path of gcc, or None."""
    return shutil.which("gcc")


class Library:
    """The compiled code. Arrays in and out are numpy's; a type is given by its name or by a NativeCode."""

    def __init__(self, folder: Path, extra_flags: tuple[str, ...] = ()) -> None:
        path = folder / "libggml-ccq.so"
        command = [compiler() or "gcc", *FLAGS, *extra_flags, "-o", str(path), *map(str, SOURCES), "-lm"]
        subprocess.run(command, check=True)
        self.lib = lib = ctypes.CDLL(str(path))
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        lib.ggml_ccq_encode.argtypes = [pointer, pointer, pointer, count, ctypes.c_int, pointer]
        lib.ggml_ccq_decode.argtypes = [pointer, pointer, count, pointer]
        lib.ggml_ccq_code_error.argtypes = [pointer, pointer, count, pointer, ctypes.c_int, pointer]
        lib.ggml_ccq_code_error.restype = ctypes.c_double
        lib.ggml_ccq_find_bad.argtypes = [pointer, count]
        lib.ggml_ccq_find_bad.restype = count
        lib.ggml_ccq2_b_find_bad.argtypes = [pointer, count]
        lib.ggml_ccq2_b_find_bad.restype = count
        for name in (*NAMES, "CCQ2_B"):
            getattr(lib, f"dequantize_row_{name.lower()}").argtypes = [pointer, pointer, count]
            getattr(lib, f"ggml_vec_dot_{name.lower()}_q8_K").argtypes = [
                *(ctypes.c_int, pointer, ctypes.c_size_t, pointer, ctypes.c_size_t),
                *(pointer, ctypes.c_size_t, ctypes.c_int),
            ]
        lib.ggml_ccq_cpu_path.restype = ctypes.c_char_p
        lib.ggml_ccq_dot_rows.argtypes = [
            *(ctypes.c_int, ctypes.c_int, pointer, pointer, ctypes.c_size_t, ctypes.c_int, pointer),
        ]
        lib.ggml_ccq_dot_rows.restype = ctypes.c_bool
        lib.ggml_ccq_unpack_rows.argtypes = [
            *(ctypes.c_int, pointer, ctypes.c_size_t, ctypes.c_int, pointer),
            *(pointer, ctypes.c_int, pointer, ctypes.c_int),
        ]
        for name in NAMES:
            function = getattr(lib, f"quantize_{name.lower()}")
            function.argtypes, function.restype = [pointer, pointer, count, count, pointer], ctypes.c_size_t
        lib.quantize_ccq2_b.argtypes = [pointer, pointer, count, count, pointer]
        lib.quantize_ccq2_b.restype = ctypes.c_size_t
        self.codes = dict(zip(NAMES, (NativeCode * 4).in_dll(lib, "ggml_ccq_codes"), strict=True))

    def encode(self, name: str | NativeCode, x: np.ndarray, weights=None, beam: int = 256) -> np.ndarray:
        """Shapes: (n_blocks, 256) float32 -> (n_blocks, block bytes) uint8."""
        code = self.codes[name] if isinstance(name, str) else name
        x = np.ascontiguousarray(x, np.float32)
        w = None if weights is None else np.ascontiguousarray(np.broadcast_to(weights, x.shape), np.float32)
        out = np.zeros((len(x), 66 + 8 * code.e_bits), np.uint8)
        self.lib.ggml_ccq_encode(
            ctypes.byref(code), x.ctypes.data, None if w is None else w.ctypes.data, len(x), beam, out.ctypes.data
        )
        return out

    def decode(self, name: str | NativeCode, blocks: np.ndarray) -> np.ndarray:
        """Shapes: (n_blocks, block bytes) uint8 -> (n_blocks, 256) float32."""
        code = self.codes[name] if isinstance(name, str) else name
        blocks = np.ascontiguousarray(blocks)
        out = np.zeros((len(blocks), 256), np.float32)
        self.lib.ggml_ccq_decode(ctypes.byref(code), blocks.ctypes.data, len(blocks), out.ctypes.data)
        return out

    def quantize(self, name: str, rows: np.ndarray, imatrix: np.ndarray | None = None) -> np.ndarray:
        """ggml's entry. Shapes: (n_rows, n_cols) float32 -> (n_rows, row bytes) uint8."""
        rows = np.ascontiguousarray(rows, np.float32)
        w = None if imatrix is None else np.ascontiguousarray(imatrix, np.float32)
        out = np.zeros((len(rows), rows.shape[1] // 256 * (66 + 8 * self.codes[name].e_bits)), np.uint8)
        written = getattr(self.lib, f"quantize_{name.lower()}")(
            rows.ctypes.data, out.ctypes.data, *rows.shape, None if w is None else w.ctypes.data
        )
        if written != out.nbytes:
            raise AssertionError(f"quantize_{name.lower()} wrote {written} bytes, expected {out.nbytes}")
        return out

    def quantize_b(self, rows: np.ndarray) -> np.ndarray:
        """CCQ2_B by its plain encoder. Shapes: (n, 512) float32 -> (n, 142) uint8."""
        rows, out = np.ascontiguousarray(rows, np.float32), np.zeros((len(rows), 142), np.uint8)
        self.lib.quantize_ccq2_b(rows.ctypes.data, out.ctypes.data, len(rows), 512, None)
        return out

    def dequantize(self, name: str, blocks: np.ndarray, block_size: int = 256) -> np.ndarray:
        """ggml's entry. Shapes: (n_blocks, block bytes) uint8 -> (n_blocks, block_size) float32."""
        blocks = np.ascontiguousarray(blocks)
        out = np.zeros((len(blocks), block_size), np.float32)
        getattr(self.lib, f"dequantize_row_{name.lower()}")(blocks.ctypes.data, out.ctypes.data, out.size)
        return out

    def vec_dot(self, name: str, n_weights: int, blocks: np.ndarray, activations: np.ndarray) -> np.float32:
        """Dot product of a row with a row of q8_k()."""
        out = np.zeros(1, np.float32)
        blocks, activations = np.ascontiguousarray(blocks), np.ascontiguousarray(activations)
        function = getattr(self.lib, f"ggml_vec_dot_{name.lower()}_q8_K")
        function(n_weights, out.ctypes.data, 0, blocks.ctypes.data, 0, activations.ctypes.data, 0, 1)
        return out[0]

    def dot_rows(self, number: int, n_weights: int, rows: np.ndarray, activations: np.ndarray) -> np.ndarray:
        """Dot products of rows of the type with this id with a row of q8_k(). Shapes: (n_rows, bytes) -> (n_rows,)."""
        rows, activations, out = (
            np.ascontiguousarray(rows),
            np.ascontiguousarray(activations),
            np.zeros(len(rows), "f4"),
        )
        if not self.lib.ggml_ccq_dot_rows(
            number, n_weights, out.ctypes.data, rows.ctypes.data, rows.shape[1], len(rows), activations.ctypes.data
        ):
            raise AssertionError(f"ggml_ccq_dot_rows does not know type {number}")
        return out

    def unpack_rows(self, number: int, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scales of blocks and of 32 weights, and weights. Shapes: (n, bytes) -> (n,), (n, 8) int32, (n, 256) int64."""
        n, blocks = len(blocks), np.ascontiguousarray(blocks)
        d, scales, q = np.zeros(n, "f4"), np.zeros((n, 8), np.int32), np.zeros((n, 256), np.uint8)
        self.lib.ggml_ccq_unpack_rows(
            number, blocks.ctypes.data, blocks.shape[1], n, d.ctypes.data, scales.ctypes.data, 8, q.ctypes.data, 256
        )
        return d, scales, q.astype(np.int64) - 128

    def code_error(self, code: NativeCode, x: np.ndarray, gain: float, beam: int = 256):
        """Mean squared error with one fixed gain, and the table index of every weight.

        Shapes: (n_blocks, 256) float32 -> float, (n_blocks, 256) uint8.
        """
        x = np.ascontiguousarray(x, np.float32)
        index, gains = np.zeros(x.shape, np.uint8), np.full(4, gain, np.float32)
        total = self.lib.ggml_ccq_code_error(
            ctypes.byref(code), x.ctypes.data, len(x), gains.ctypes.data, beam, index.ctypes.data
        )
        return total / x.size, index
