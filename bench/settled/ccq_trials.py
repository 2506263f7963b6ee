"""What lost, or was left for later, in docs/ccq.md: `python bench/settled/ccq_trials.py v2|ccq3|gain`.

v2: the code alone of a trellis with 4 bits for 2 weights and 12 bits of state, random and mutated multipliers, error on
fresh Gaussian weights with open ends. ccq3: the code alone with 16 refinements of a step (3 bits a weight), beside
CCQ2_75 on the same weights. gain: KL of the embedded model in CCQ2 with every matrix scaled up by a power of what the
least squared error took from it; after bench/ccq_quality.py, whose files it reads. The first two need gcc.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
from pathlib import Path

import paths  # noqa: F401

import numpy as np
from ccq_library import Library, native_code

UNIT = 22  # integer level of one standard deviation
V2 = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

// Summed squared error of the best path through n/2 steps, the first and last 32 steps aside; energy: of those weights.
// levels (256,): of the 8-bit index of each plane.
double v2_error(const float * x, int n, const float * levels, unsigned k0, unsigned k1, double * energy) {
    static uint8_t  index[2][65536];
    static uint32_t base[4096], best[4096], cost[2][256];
    const int n_steps = n/2;
    uint8_t (*from)[4096] = malloc(4096*(size_t) n_steps);
    for (unsigned w = 0; w < 65536; w++) {
        index[0][w] = (uint8_t) ((w*k0 & 0xFFFF) >> 8);
        index[1][w] = (uint8_t) ((w*k1 & 0xFFFF) >> 8);
    }
    memset(base, 0, sizeof(base));
    for (int i = 0; i < n_steps; i++) {
        for (int p = 0; p < 2; p++) {
            for (int h = 0; h < 256; h++) {
                const float v = levels[h] - x[2*i + p];
                cost[p][h] = (uint32_t) (v*v*4096);
            }
        }
        memset(best, 255, sizeof(best));
        for (unsigned a = 0; a < 16; a++) { // the state is 12 bits, the oldest four leave
            for (unsigned w = 0; w < 4096; w++) {
                const unsigned window = a << 12 | w;
                const uint32_t c = base[window >> 4] + cost[0][index[0][window]] + cost[1][index[1][window]];
                if (c < best[w]) {
                    best[w]    = c;
                    from[i][w] = (uint8_t) a;
                }
            }
        }
        uint32_t low = UINT32_MAX;
        for (int w = 0; w < 4096; w++) low = best[w] < low ? best[w] : low;
        for (int w = 0; w < 4096; w++) base[w] = best[w] - low;
    }
    unsigned s = 0;
    for (unsigned w = 1; w < 4096; w++) s = base[w] < base[s] ? w : s;
    double error = 0;
    *energy = 0;
    for (int i = n_steps - 1; i >= 0; i--) {
        const unsigned a = from[i][s], window = a << 12 | s;
        for (int p = 0; p < 2 && i >= 32 && i < n_steps - 32; p++) {
            const double v = (double) levels[index[p][window]] - x[2*i + p];
            error   += v*v;
            *energy += (double) x[2*i + p]*x[2*i + p];
        }
        s = a << 8 | s >> 4;
    }
    free(from);
    return error;
}
"""


def odd(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return 2 * rng.integers(0, 32768, shape) + 1


def search(rng: np.random.Generator, n: int, rounds: int, error) -> tuple[float, np.ndarray]:
    """The best of `rounds` sets of n multipliers: half of them drawn, half made of the best by changing one."""
    best, found = np.inf, odd(rng, (n,))
    for i in range(rounds):
        k = odd(rng, (n,))
        if i > rounds // 2:
            changed = rng.integers(n)
            k = np.where(np.arange(n) == changed, k, found)
            if rng.random() < 0.5:
                k[changed] = found[changed] ^ 1 << rng.integers(1, 16)
        e = error(k)
        if e < best:
            best, found = e, k
    return best, found


def v2(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "v2.c").write_text(V2)
        path = Path(folder) / "v2.so"
        subprocess.run(["gcc", "-O3", "-shared", "-fPIC", "-o", path, Path(folder) / "v2.c"], check=True)
        lib = ctypes.CDLL(str(path))
        ccq2 = Library(Path(folder))
    lib.v2_error.restype = ctypes.c_double
    pointer = ctypes.c_void_p
    lib.v2_error.argtypes = [pointer, ctypes.c_int, pointer, ctypes.c_uint, ctypes.c_uint, pointer]
    code = ccq2.codes["CCQ2"]
    h = np.arange(256)
    levels = ((np.array(code.t1[0])[h >> 4] + np.array(code.t2[0])[h & 15]) / UNIT).astype(np.float32)
    rng = np.random.default_rng(5)
    screen, fresh = rng.standard_normal(2048, np.float32), rng.standard_normal((8, 2048), np.float32)

    def error(k: np.ndarray, *parts: np.ndarray) -> float:
        energy, total, whole = ctypes.c_double(), 0.0, 0.0
        for x in parts or (screen,):
            total += lib.v2_error(x.ctypes.data, x.size, levels.ctypes.data, *map(int, k), ctypes.byref(energy))
            whole += energy.value
        return total / whole

    _, k = search(rng, 2, rounds, error)
    own = ccq2.code_error(code, fresh.reshape(-1, 256), 1 / UNIT)[0] / (fresh**2).mean()
    print(f"V = 2, K {k.tolist()}: {error(k, *fresh):.4f} on fresh weights, CCQ2 {own:.4f}")


def ccq3(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        library = Library(Path(folder), ("-DCCQ_E_BITS_MAX=4",))
    parent = library.codes["CCQ2_75"]
    rng = np.random.default_rng(3)
    screen, fresh = (rng.standard_normal((n, 256), np.float32) for n in (4, 24))

    def error(code, x: np.ndarray) -> float:
        return library.code_error(code, x, 1 / UNIT, beam=128)[0] / (x**2).mean()

    def made(k: np.ndarray):
        return native_code(k[:4], k[4:], parent.t1, parent.t2, 4)

    _, k = search(rng, 8, rounds, lambda k: error(made(k), screen))
    own = error(parent, fresh)
    print(f"3 bits, K and M {k.tolist()}: {error(made(k), fresh):.4f} on fresh weights, CCQ2_75 {own:.4f}")


def gain(n_pictures: int) -> None:
    import gguf
    from ccq_quality import CACHE, SEED_TEST, questions

    from pyllamaernie.compare.comparison import compare

    work = CACHE / "ccq-quality"
    original, coded = work / "ernie-4.5-vl-tiny.gguf", work / "ernie-4.5-vl-tiny-CCQ2.gguf"
    weights = {t.name: t for t in gguf.GGUFReader(original).tensors}
    scaled = []
    for power in (0.0, 0.5, 1.0):
        reader, path = gguf.GGUFReader(coded), work / f"gain-{power}.gguf"
        writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
        for key, field in reader.fields.items():
            if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
                inner = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(key, field.contents(), field.types[0], inner)
        for tensor in reader.tensors:
            y = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            y = y.reshape(tensor.shape[::-1])
            if tensor.tensor_type.name == "CCQ2":
                x = weights[tensor.name].data.astype(np.float32).reshape(y.shape)
                y = y * ((x * x).sum() / (x * y).sum()) ** power
            writer.add_tensor(tensor.name, y if tensor.tensor_type.name == "F32" else y.astype(np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        scaled.append(path)
    asked = [(picture, question) for picture, question, _ in questions(n_pictures, SEED_TEST)]
    mmproj = sorted(work.glob("mmproj*.gguf"))[0]
    found = compare([original, *scaled], None, images=asked, mmproj=mmproj, n_threads=1, speed_runs=0, progress=True)
    for i, power in ((2, "half"), (3, "all")):
        ratio, interval = found.kl_ratio(i, 1, pictures=True)
        print(f"scaled up by {power} of what was lost: KL over unscaled {ratio:.3f}, 95 % interval {interval}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trial", choices=("v2", "ccq3", "gain"))
    parser.add_argument("--rounds", type=int, default=160, help="candidates; for gain: pictures")
    args = parser.parse_args()
    {"v2": v2, "ccq3": ccq3, "gain": gain}[args.trial](args.rounds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
