"""The CCQ encoder's bars: `python bench/ccq_encoder.py [--rows 24] [--rounds 5]`.

Three things, each printed with its bar as met or missed: CPU time per weight beside IQ2_XXS's, in the installed
package's ggml_quantize_chunk, the types taking turns, median of the rounds; error beside that of the same encoder with
every search keeping every state (compiled with -DCCQ_EXACT; needs gcc); wall time of one thread over that of two that
share the rows, as llama-quantize does it. The last one needs two free cores.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import statistics
import tempfile
import threading
import time
from pathlib import Path

import paths  # noqa: F401

import numpy as np
from ccq_library import NAMES, Library
from turns import medians, ratios, seconds, take_turns

import pyllamaernie

TYPES = {"CCQ2": (112, 66), "CCQ2_25": (113, 74), "CCQ2_5": (114, 82), "CCQ2_75": (115, 90), "IQ2_XXS": (16, 66)}
N_PER_ROW = 2560
LOSS_MOST, SPEEDUP_LEAST = 0.01, 1.8


def load_ggml(path: Path | None) -> ctypes.CDLL:
    found = sorted((Path(pyllamaernie.__file__).parent / "lib").glob("*ggml-base*"))
    if path is None and not found:
        raise SystemExit("the package has no ggml-base library; name one with --ggml")
    lib = ctypes.CDLL(str(path or found[0]))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_init.argtypes = [ctypes.c_int]
    for number, _ in TYPES.values():
        lib.ggml_quantize_init(number)  # IQ2_XXS makes its tables at first use
    return lib


class Rows:
    """Gaussian rows, equal importances, and room for their blocks."""

    def __init__(self, ggml: ctypes.CDLL, n_rows: int):
        self.ggml = ggml
        self.x = (np.random.default_rng(1).standard_normal((n_rows, N_PER_ROW)) * 0.02).astype(np.float32)
        self.importance = np.ones(N_PER_ROW, np.float32)

    def quantize(self, name: str, first: int = 0, n_rows: int | None = None) -> None:
        number, size = TYPES[name]
        out = np.zeros((len(self.x), N_PER_ROW // 256 * size), np.uint8)
        self.ggml.ggml_quantize_chunk(
            number, self.x.ctypes.data, out.ctypes.data, first * N_PER_ROW, n_rows or len(self.x), N_PER_ROW,
            self.importance.ctypes.data,
        )  # fmt: skip

    def cpu_us(self, name: str) -> float:
        return seconds(lambda: self.quantize(name), time.thread_time) / self.x.size * 1e6

    def speedup(self, name: str) -> float:
        def both() -> None:
            half = len(self.x) // 2
            threads = [threading.Thread(target=self.quantize, args=(name, first, half)) for first in (0, half)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        return seconds(lambda: self.quantize(name)) / seconds(both)

    def figures(self, name: str) -> dict[str, float]:
        return {"us": self.cpu_us(name), "faster": self.speedup(name)}


def losses(n_blocks: int) -> dict[str, dict[str, float]]:
    """Error over that of the exact encoder, less one: by type and source."""
    rng = np.random.default_rng(2)
    sources = {
        "Gaussian": (rng.standard_normal((n_blocks, 256)), None),
        "Student-t 5": (rng.standard_t(5, (n_blocks, 256)), None),
        "weighted": (rng.standard_normal((n_blocks, 256)), np.exp(rng.standard_normal(n_blocks * 256))),
    }
    found: dict[str, dict[str, float]] = {name: {} for name in NAMES}
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        libraries = Library(Path(one)), Library(Path(other), ("-DCCQ_EXACT",))
        for source, (draws, weights) in sources.items():
            x = (0.02 * draws).astype(np.float32)
            w = None if weights is None else weights.astype(np.float32)
            scale = 1.0 if w is None else w.reshape(x.shape)
            for name in NAMES:
                errors = []
                for library in libraries:
                    rows = library.quantize(name, x.reshape(1, -1), w).reshape(n_blocks, -1)
                    errors.append((scale * (library.dequantize(name, rows) - x.astype(np.float64)) ** 2).sum())
                found[name][source] = errors[0] / errors[1] - 1
    return found


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=24, help=f"rows of {N_PER_ROW} weights for the times")
    parser.add_argument("--blocks", type=int, default=200, help="blocks of 256 weights a source for the losses")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ggml", type=Path, help="the shared library ggml-base (default: the package's)")
    args = parser.parse_args()
    if args.rows < 2 or args.rows % 2:
        parser.error(f"--rows {args.rows}: an even number, at least 2")

    found = losses(args.blocks)
    print(f"{'':9}" + "".join(f"{source:>13}" for source in found["CCQ2"]) + "   loss against exact, bar 1 %")
    for name, loss in found.items():
        cells = "".join(f"{value:>13.2%}" for value in loss.values())
        print(f"{name:9}{cells}   {verdict(max(loss.values()) < LOSS_MOST)}", flush=True)

    rows = Rows(load_ggml(args.ggml), args.rows)
    # IQ2_XXS is also sped up by two threads: what the machine gives to rows of any type
    times = take_turns({name: functools.partial(rows.figures, name) for name in ("IQ2_XXS", *NAMES)}, args.rounds)
    middle = medians(times)
    print(f"\n{'':9}{'us a weight':>13}{'to IQ2_XXS':>13}{'':10}{'two threads':>13}")
    for name in TYPES:
        line, f = f"{name:9}{middle[name]['us']:>13.1f}", middle[name]["faster"]
        if name in NAMES:
            r = statistics.median(ratios(times, "us", name, "IQ2_XXS"))
            print(f"{line}{r:>13.2f}  {verdict(r <= 1):8}{f:>12.2f}x  {verdict(f >= SPEEDUP_LEAST)}")
        else:
            print(f"{line}{'':23}{f:>12.2f}x")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
