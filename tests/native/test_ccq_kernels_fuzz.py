"""Random bytes as blocks and activations in every CPU kernel, under the address and undefined behaviour sanitizers."""

from __future__ import annotations

import subprocess

import pytest
from ccq_library import FLAGS, PATHS, SOURCES, compiler, usable_paths

pytestmark = [
    pytest.mark.slow,  # the sanitizers make the compiler take its time
    pytest.mark.skipif(compiler() is None, reason="needs gcc"),
]
# buffers of exactly the size that a kernel may read or write, so that one byte more is an error
PROGRAM = r"""
#include <stdio.h>
#include <stdlib.h>
#include "ggml-cpu/ccq.h"
static void * random_bytes(size_t n) {
    unsigned char * bytes = malloc(n);
    for (size_t i = 0; i < n; i++) bytes[i] = (unsigned char) (rand() >> 7);
    return bytes;
}
int main(void) {
    static const int block_bytes[5] = { 66, 74, 82, 90, 142 };
    for (int round = 0; round < 400; round++) {
        const int    id       = 112 + rand() % 5;
        const int    n_rows   = 1 + rand() % 19;
        const int    n_blocks = 1 + rand() % 4;
        const int    n        = n_blocks*(id == 116 ? 512 : 256);
        const size_t row      = (size_t) n_blocks*block_bytes[id - 112];
        char  * x = random_bytes(n_rows*row);
        char  * y = random_bytes((size_t) n/256*292);
        float * s = malloc(n_rows*sizeof(float));
        if (!ggml_ccq_dot_rows(id, n, s, x, row, n_rows, y)) return 1;
        if (id < 116) {
            float   * d      = malloc(n_rows*sizeof(float));
            int32_t * scales = malloc(n_rows*8*sizeof(int32_t));
            uint8_t * q      = malloc(n_rows*256);
            ggml_ccq_unpack_rows(id, x, row, n_rows, d, scales, 8, q, 256);
            for (int i = 0; i < n_rows*256; i++) {
                if (q[i] < 64 || q[i] > 192) return 2; // levels are at most 64
            }
            free(d); free(scales); free(q);
        }
        free(x); free(y); free(s);
    }
    puts(ggml_ccq_cpu_path());
    return 0;
}
"""


@pytest.mark.parametrize("path", usable_paths())
def test_random_bytes_are_read_and_written_within_bounds(path, tmp_path):
    (tmp_path / "fuzz.c").write_text(PROGRAM, encoding="utf-8")
    flags = [flag for flag in FLAGS if flag not in ("-shared", "-fPIC", "-O3")]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [tmp_path / "fuzz.c", *SOURCES]
    command = [compiler(), *flags, "-O1", "-DCCQ_CLONES=", *PATHS[path][0], *sanitize, "-I", SOURCES[0].parent]
    subprocess.run([*command, "-o", tmp_path / "fuzz", *sources, "-lm"], check=True)
    done = subprocess.run([tmp_path / "fuzz"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, path), done.stderr[-2000:]
