"""The NEON dot products, cross-compiled by zig and run by qemu: the bits of the portable path."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys

import numpy as np
import pytest
from ccq_library import FLAGS, SOURCES, Library, compiler, q8_k

from pyllamaernie.gguf.types import QUANT_TYPES

QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
pytestmark = [
    pytest.mark.slow,  # zig compiles its C library first
    pytest.mark.skipif(compiler() is None, reason="needs gcc"),
    pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs `pip install ziglang`"),
    pytest.mark.skipif(QEMU is None, reason="needs qemu-aarch64"),
]
N_COLS, N_ROWS = 1024, 24
# reads type, rows and activations; writes the path's name, the dot products, and unpacked blocks of native types
PROGRAM = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "ggml-cpu/ccq.h"
int main(void) {
    int head[4]; // type, columns, rows, bytes of a row
    if (fread(head, sizeof(head), 1, stdin) != 1) return 1;
    char  * rows = malloc((size_t) head[2]*head[3]);
    char  * y    = malloc((size_t) head[1]/256*292);
    float * s    = malloc(head[2]*sizeof(float));
    if (fread(rows, head[3], head[2], stdin) != (size_t) head[2] || fread(y, 292, head[1]/256, stdin) == 0) return 1;
    char name[16] = { 0 };
    strncpy(name, ggml_ccq_cpu_path(), 15);
    fwrite(name, 16, 1, stdout);
    if (!ggml_ccq_dot_rows(head[0], head[1], s, rows, head[3], head[2], y)) return 1;
    fwrite(s, sizeof(float), head[2], stdout);
    for (int r = 0; r < head[2] && head[0] < 116; r++) {
        float d;
        int32_t scales[8];
        uint8_t q[256];
        ggml_ccq_unpack_rows(head[0], rows + (size_t) r*head[3], head[3], 1, &d, scales, 8, q, 256);
        fwrite(q, 256, 1, stdout);
    }
    return 0;
}
"""


@pytest.fixture(scope="module")
def portable(tmp_path_factory):
    return Library(tmp_path_factory.mktemp("portable"), ("-O2", "-DCCQ_CLONES="))


@pytest.fixture(scope="module", params=["neon", "neon-dotprod"])
def program(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "main.c").write_text(PROGRAM, encoding="utf-8")
    target = ["-target", "aarch64-linux-musl", *(["-mcpu=generic+dotprod"] if "dotprod" in request.param else [])]
    flags = [flag for flag in FLAGS if flag not in ("-shared", "-fPIC", "-O3")]
    include = SOURCES[0].parent
    sources = [folder / "main.c", *SOURCES]
    command = [sys.executable, "-m", "ziglang", "cc", *target, *flags, "-O1", "-DCCQ_CLONES=", "-static"]
    subprocess.run([*command, "-I", include, "-o", folder / "dot", *sources, "-lm"], check=True)
    return request.param, folder / "dot"


@pytest.mark.parametrize("name", QUANT_TYPES)
def test_neon_gives_the_bits_of_the_portable_path(program, portable, name):
    path, executable = program
    kind, rng = QUANT_TYPES[name], np.random.default_rng(17)
    rows = rng.integers(0, 256, (N_ROWS, N_COLS // kind.block_size * kind.block_bytes), np.uint8)
    if name == "CCQ2_B":  # random parameters but in the first rows, where they are of use
        blocks = rows.reshape(-1, kind.block_bytes)
        blocks[:, 8:10] = [0x80, 0x3F]
        blocks[:32, :8] = np.array([100.3, 3634.2], "<f4").view(np.uint8)
    values = rng.integers(-128, 128, (N_COLS // 256, 256)).astype(np.int8)
    values[0], values[1] = 127, -128
    activations = q8_k(values, rng.uniform(0.001, 0.1, len(values)).astype(np.float32))
    head = np.array([kind.ggml_id, N_COLS, *rows.shape], np.int32)
    given = head.tobytes() + rows.tobytes() + activations.tobytes()
    done = subprocess.run([QEMU, executable], input=given, capture_output=True, check=True)
    assert done.stdout[:16].rstrip(b"\0").decode() == path
    dots = np.frombuffer(done.stdout, np.float32, N_ROWS, 16)
    np.testing.assert_array_equal(dots, portable.dot_rows(kind.ggml_id, N_COLS, rows, activations))
    if name != "CCQ2_B":
        unpacked = np.frombuffer(done.stdout, np.uint8, offset=16 + dots.nbytes).reshape(N_ROWS, 256)
        block = kind.block_bytes
        expected = portable.unpack_rows(kind.ggml_id, rows[:, :block])[2] + 128
        np.testing.assert_array_equal(unpacked, expected)
