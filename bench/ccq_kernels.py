"""How long one CPU core takes for a dot product of 256 weights, in CCQ types and in ggml's own of the same size.

    python bench/ccq_kernels.py

Calls what the installed package's ggml calls for a token: vec_dot of its own types, 16 rows at a time of ours. Rows of
2560 weights that stay in the cache; the best of several rounds that take turns, in CPU time of the thread. Needs gcc
for the loop around the calls.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

import paths  # noqa: F401

import numpy as np
from turns import take_turns

N_PER_ROW, N_ROWS, N_ROUNDS = 2560, 48, 5
# name in ggml -> (type id, bytes of 256 weights)
TYPES = {
    "ccq2": (112, 66),
    "ccq2_25": (113, 74),
    "ccq2_5": (114, 82),
    "ccq2_75": (115, 90),
    "ccq2_b": (116, 71),
    "iq2_xxs": (16, 66),
    "iq2_xs": (17, 74),
    "iq2_s": (22, 82),
    "q2_K": (10, 84),
    "iq3_xxs": (18, 98),
}
LOOP = r"""
#include <stddef.h>
#include <time.h>
typedef void (*dot)(int, float *, size_t, const void *, size_t, const void *, size_t, int);
typedef _Bool (*dot_rows)(int, int, float *, const void *, size_t, int, const void *);
double best_ns(void * function, int ccq_id, int n, const char * x, size_t row_bytes, const void * y,
               int n_rows, int n_reps) {
    volatile float sink;
    double best = 1e18;
    for (int r = 0; r < n_reps; r++) {
        struct timespec a, b;
        float s[16];
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &a);
        for (int i = 0; i < n_rows; i += ccq_id ? 16 : 1) {
            if (ccq_id) {
                ((dot_rows) function)(ccq_id, n, s, x + i*row_bytes, row_bytes, 16, y);
            } else {
                ((dot) function)(n, s, 0, x + i*row_bytes, 0, y, 0, 1);
            }
            sink = s[0];
        }
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &b);
        double ns = (b.tv_sec - a.tv_sec)*1e9 + (b.tv_nsec - a.tv_nsec);
        if (ns < best) best = ns;
    }
    (void) sink;
    return best/((double) n_rows*n/256);
}
"""


def load_loop(folder: Path) -> ctypes.CDLL:
    """The timing loop, compiled."""
    (folder / "loop.c").write_text(LOOP)
    library = folder / "loop.so"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, folder / "loop.c"], check=True)
    loop = ctypes.CDLL(str(library))
    loop.best_ns.restype = ctypes.c_double
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    number = ctypes.c_int
    loop.best_ns.argtypes = [pointer, number, number, pointer, size, pointer, number, number]
    return loop


def q8_k(rng: np.random.Generator) -> np.ndarray:
    """A row of activations in Q8_K: scale, 256 values, 16 sums. Shapes: -> (n_blocks * 292,) uint8."""
    values = rng.integers(-127, 128, (N_PER_ROW // 256, 256)).astype(np.int8)
    sums = values.reshape(-1, 16, 16).sum(-1).astype(np.int16)
    scale = np.full((len(values), 1), 0.01, np.float32)
    return np.concatenate([scale.view(np.uint8), values.view(np.uint8), sums.view(np.uint8)], axis=1).reshape(-1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=N_ROUNDS)
    args = parser.parse_args()
    libraries = Path(str(resources.files("pyllamaernie"))) / "lib"
    base = ctypes.CDLL(str(libraries / "libggml-base-ernie.so"), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(libraries / "libggml-cpu-ernie.so"))
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    base.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, long, long, long, pointer]
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    rng = np.random.default_rng(0)
    weights = (rng.standard_normal((N_ROWS, N_PER_ROW)) * 0.02).astype(np.float32)
    importance = np.ones(N_PER_ROW, np.float32)
    activations = q8_k(rng)
    rows = {}
    for name, (number, n_bytes) in TYPES.items():
        rows[name] = np.zeros((N_ROWS, N_PER_ROW // 256 * n_bytes), np.uint8)
        base.ggml_quantize_chunk(
            number, weights.ctypes.data, rows[name].ctypes.data, 0, N_ROWS, N_PER_ROW, importance.ctypes.data
        )
    with tempfile.TemporaryDirectory() as folder:
        loop = load_loop(Path(folder))

        def dot(name: str) -> dict[str, float]:
            ours, quantized = TYPES[name][0] >= 112, rows[name]
            function = cpu.ggml_ccq_dot_rows if ours else getattr(cpu, f"ggml_vec_dot_{name}_q8_K")
            ns = loop.best_ns(
                ctypes.cast(function, pointer), TYPES[name][0] if ours else 0, N_PER_ROW, quantized.ctypes.data,
                quantized.shape[1], activations.ctypes.data, N_ROWS, 30,
            )  # fmt: skip
            return {"ns": ns}

        found = take_turns({name: functools.partial(dot, name) for name in TYPES}, args.rounds)
    best = {name: min(figures["ns"]) for name, figures in found.items()}
    print(f"{'type':10}{'bytes per 256':>14}{'ns per 256':>12}{'to IQ2_XXS':>12}")
    for name, ns in best.items():
        print(f"{name.upper():10}{TYPES[name][1]:>14}{ns:>12.1f}{ns / best['iq2_xxs']:>12.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
