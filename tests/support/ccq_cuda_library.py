"""The CCQ kernels of the overlay's ggml-cuda: compiled by g++ for the emulator, by nvcc for what it says of them."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
OVERLAY = HERE.parents[1] / "native" / "overlay" / "ggml" / "src"
KINDS = ("CCQ2", "CCQ2_25", "CCQ2_5", "CCQ2_75", "CCQ2_B")  # the order of ccq_kind
BLOCK_BYTES = dict(zip(KINDS, (66, 74, 82, 90, 142), strict=True))
UNIT_BYTES = {name: n_bytes / (2 if name == "CCQ2_B" else 1) for name, n_bytes in BLOCK_BYTES.items()}
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-parentheses", "-Wno-unknown-pragmas")
Q8_1 = np.dtype([("d", "<f2"), ("sum", "<f2"), ("qs", "i1", 32)])  # block_q8_1


class Args(ctypes.Structure):
    """ccq_mul_mat_args; strides of x in bytes, of y in blocks, of dst in floats."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("n_units", "n_rows", "n_cols", "n_channels_y")),
        *((name, ctypes.c_int) for name in ("channel_ratio", "sample_ratio")),
        *((f"{unit}_x", ctypes.c_int64) for unit in ("row", "channel", "sample")),
        *((f"{unit}_y", ctypes.c_int64) for unit in ("col", "channel", "sample")),
        *((f"{unit}_dst", ctypes.c_int64) for unit in ("col", "channel", "sample")),
        ("stride_ids", ctypes.c_int64),
    ]


def _pointer(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


class Emulator:
    """The kernels on the CPU. `order` says in which order the threads of a block run: 0, 1, 2, ..."""

    def __init__(self, folder: Path, extra_flags: tuple[str, ...] = ()) -> None:
        path = folder / "libccq-cuda-emulated.so"
        source = HERE / "ccq_cuda_emulated.cpp"
        command = ["g++", *FLAGS, *extra_flags, "-Werror", "-shared", "-fPIC", f"-I{OVERLAY}", "-o", path, source]
        subprocess.run(command, check=True)
        self.lib = ctypes.CDLL(str(path))

    def _call(self, function: str, *args) -> None:
        if getattr(self.lib, f"emulated_{function}")(*args) != 0:
            raise ValueError(f"{function}: no such kind")

    def constants(self, name: str) -> np.ndarray:
        """k, m, t1 and t2 of both tables, in one row. Shapes: -> (72,) int32."""
        out = np.zeros(72, np.int32)
        self._call("constants", KINDS.index(name), ctypes.c_void_p(out.ctypes.data))
        return out

    def dequantize(self, name: str, blocks: np.ndarray, dtype: str = "fp32", order: int = 0) -> np.ndarray:
        """Shapes: (n, block bytes) uint8 -> (n, block size) float32, float16, or uint16 with the bits of bfloat16."""
        blocks = np.ascontiguousarray(blocks)
        n_units = round(blocks.size / UNIT_BYTES[name])
        out = np.zeros(256 * n_units, {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}[dtype])
        pointers = ctypes.c_void_p(blocks.ctypes.data), ctypes.c_void_p(out.ctypes.data)
        self._call(f"to_{dtype}", KINDS.index(name), *pointers, ctypes.c_int64(n_units), order)
        return out.reshape(len(blocks), -1)

    def get_rows(self, name: str, x: np.ndarray, rows: np.ndarray, order: int = 0) -> np.ndarray:
        """ggml's get_rows.

        Shapes: x (n3, n2, n1, row bytes) uint8, rows (i12, i11, i10) int32 -> (i12, i11, i10, row length) float32.
        """
        rows = np.ascontiguousarray(rows, np.int32)
        n_units = round(x.shape[3] / UNIT_BYTES[name])
        out = np.zeros((*rows.shape, 256 * n_units), np.float32)
        strides = [x.strides[2], x.strides[1], x.strides[0]]  # an index of rows' second axis names a matrix of x
        strides += [rows.strides[i] // 4 for i in (2, 1, 0)] + [out.strides[i] // 4 for i in (2, 1, 0)]
        ne = (ctypes.c_int64 * 3)(*reversed(rows.shape))
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (x, rows, out)]
        self._call("get_rows", KINDS.index(name), *pointers, n_units, ne, (ctypes.c_int64 * 9)(*strides), order)
        return out

    def mul_mat_vec(
        self, name, x, y, dst, args: Args, n_channels: int, n_samples: int, ids=None, order: int = 0
    ) -> None:
        pointers = [ctypes.c_void_p(_pointer(a)) for a in (x, y, ids, dst)]
        self._call("mul_mat_vec", KINDS.index(name), *pointers, ctypes.byref(args), n_channels, n_samples, order)

    def mul_mat_tiles(
        self, name, x, y, dst, args: Args, n_matrices: int, lists=(None, None, None), order: int = 0
    ) -> None:
        """lists: bounds, from and to of ccq_mul_mat_tiles()."""
        pointers = [ctypes.c_void_p(_pointer(a)) for a in (x, y, *lists, dst)]
        self._call("mul_mat_tiles", KINDS.index(name), *pointers, ctypes.byref(args), n_matrices, order)


def q8_1(values: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Activations as ggml-cuda quantizes them; the sums are rubbish, nothing of ours may read them.

    Shapes: (..., n) int8, (..., n // 32) float16 -> (..., n // 32) of Q8_1.
    """
    out = np.zeros(d.shape, Q8_1)
    out["d"], out["sum"] = d, np.float16(np.nan)
    out["qs"] = values.reshape(*d.shape, 32)
    return out


# nvcc


def nvcc() -> tuple[str, list[str]] | None:
    """The CUDA compiler and its include folders: that of the package nvidia-cuda-nvcc, else that of the PATH."""
    for folder in sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/cu1*"), reverse=True):
        if (folder / "bin" / "nvcc").exists():
            return str(folder / "bin" / "nvcc"), [f"-I{folder}/include", f"-I{folder}/include/cccl"]
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        return None
    folder = Path(found).resolve().parents[1]
    return found, [f"-I{folder}/include", f"-I{folder}/include/cccl"]


def patched_tree() -> Path | None:
    """The patched llama.cpp of the build folder that PYLLAMAERNIE_BUILD_DIR names."""
    build_dir = os.environ.get("PYLLAMAERNIE_BUILD_DIR")
    if not build_dir:
        return None
    for line in (Path(build_dir) / "CMakeCache.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("PYLLAMAERNIE_PATCHED_DIR:") and line.split("=", 1)[1]:
            return Path(line.split("=", 1)[1])
    return Path(build_dir) / "llama.cpp"


def compile_cuda(source: Path, tree: Path, arch: int, out: Path, *extra: str) -> subprocess.CompletedProcess:
    """An object for one architecture, with upstream's flags; cublas_v2.h is the one of tests/cuda_stubs."""
    found = nvcc()
    if found is None:
        raise FileNotFoundError("no nvcc")
    command = [found[0], "-std=c++17", "-O3", "-use_fast_math", "-extended-lambda", f"-arch=sm_{arch}"]
    command += ["-Werror", "all-warnings", "-DGGML_CUDA_USE_GRAPHS", "-DGGML_SCHED_MAX_COPIES=4"]
    command += [f"-I{HERE / 'cuda_stubs'}", *found[1], f"-I{tree}/ggml/include", f"-I{tree}/ggml/src"]
    return subprocess.run([*command, *extra, "-c", str(source), "-o", str(out)], capture_output=True, text=True)
