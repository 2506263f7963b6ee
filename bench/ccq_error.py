"""Error of the CCQ types beside ggml's own: `python bench/ccq_error.py [--weights 200000] [--write]`.

Relative squared error (mean square of what is lost over mean square of the weights) on synthetic sources, on Gaussian
weights with log-normal importances known to the encoder, and on the embedded model's matrices; with the encoder's CPU
time. D(R) is 2^(-2R), the least error that any code can have on a Gaussian. Needs gcc and the built package.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from paths import ROOT

import numpy as np
import page
from ccq_library import NAMES, Library
from ccq_sources import RMS, model_matrices, sources

import pyllamaernie
from pyllamaernie.gguf.types import QUANT_TYPES

PAGE = ROOT / "docs" / "ccq.md"
# upstream's name in C, ggml's id, bytes of 256 weights
STOCK = {
    "IQ1_M": ("iq1_m", 29, 56),
    "IQ2_XXS": ("iq2_xxs", 16, 66),
    "IQ2_XS": ("iq2_xs", 17, 74),
    "IQ2_S": ("iq2_s", 22, 82),
    "Q2_K": ("q2_K", 10, 84),
    "IQ3_XXS": ("iq3_xxs", 18, 98),
}
COLUMNS = ("gauss", "laplace", "t5", "weighted", "model")


@dataclass(frozen=True)
class Type:
    """One type: a round trip through its bytes. Shapes: (n, 256) float32, (n, 256) or None -> (n, 256) float32."""

    name: str
    bpw: float
    round_trip: Callable[[np.ndarray, np.ndarray | None], np.ndarray]


def own_types(library: Library) -> list[Type]:
    def bind(name: str) -> Callable[[np.ndarray, np.ndarray | None], np.ndarray]:
        def round_trip(x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
            rows = library.quantize(name, x.reshape(1, -1), None if weights is None else weights.ravel())
            return library.dequantize(name, rows.reshape(len(x), -1))

        return round_trip

    return [Type(name, QUANT_TYPES[name].bpw, bind(name)) for name in NAMES]


def stock_types(path: Path) -> list[Type]:
    """Upstream's types through the package's ggml; without importances they all count the same."""
    lib = ctypes.CDLL(str(path))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_init.argtypes = [ctypes.c_int]

    def bind(c_name: str, number: int, size: int) -> Callable[[np.ndarray, np.ndarray | None], np.ndarray]:
        dequantize = getattr(lib, f"dequantize_row_{c_name}")
        dequantize.argtypes = [pointer, pointer, count]
        lib.ggml_quantize_init(number)  # the tables of the IQ types take seconds, once; they are no part of the time

        def round_trip(x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
            x = np.ascontiguousarray(x)
            w = np.ones(x.size, np.float32) if weights is None else np.ascontiguousarray(weights, np.float32)
            blocks, y = np.zeros((len(x), size), np.uint8), np.empty_like(x)
            lib.ggml_quantize_chunk(number, x.ctypes.data, blocks.ctypes.data, 0, 1, x.size, w.ctypes.data)
            dequantize(blocks.ctypes.data, y.ctypes.data, x.size)
            return y

        return round_trip

    return [Type(name, 8 * size / 256, bind(c_name, number, size)) for name, (c_name, number, size) in STOCK.items()]


def relative(x: np.ndarray, y: np.ndarray, w: np.ndarray | float = 1.0) -> float:
    x, y = x.astype(np.float64), y.astype(np.float64)
    return float((w * (x - y) ** 2).sum() / (w * x * x).sum())


def measured(of: Type, data: dict[str, np.ndarray], importances: np.ndarray) -> tuple[list[float], float]:
    """Errors in the order of COLUMNS, and the encoder's microseconds of CPU per Gaussian weight."""
    found = {}
    for name in ("gauss", "laplace", "t5"):
        started = time.process_time()
        y = of.round_trip(data[name], None)
        if name == "gauss":
            us = (time.process_time() - started) / y.size * 1e6
        found[name] = relative(data[name], y)
    found["weighted"] = relative(data["gauss"], of.round_trip(data["gauss"], importances), importances)
    found["model"] = relative(data["model"], of.round_trip(data["model"], None))
    return [found[name] for name in COLUMNS], us


def table(types: list[Type], n_blocks: int, seed: int) -> list[str]:
    """The lines of a Markdown table."""
    rng = np.random.default_rng(seed)
    data = sources(rng, n_blocks)
    importances = np.exp(rng.standard_normal((n_blocks, 256))).astype(np.float32)
    whole = np.concatenate([x.reshape(-1, 256) for x in model_matrices().values()])
    chosen = np.sort(rng.choice(len(whole), min(n_blocks, len(whole)), replace=False))
    data["model"] = np.ascontiguousarray(whole[chosen])  # with the scales they have
    lines = ["| type | bpw | Gaussian | D(R) | Laplace | Student-t 5 | weighted | the model | encoder, us |"]
    lines.append("|---" * 9 + "|")
    for of in sorted(types, key=lambda t: t.bpw):
        errors, us = measured(of, data, importances)
        cells = [f"{errors[0]:.4f}", f"{2 ** (-2 * of.bpw):.4f}", *(f"{e:.4f}" for e in errors[1:]), f"{us:.1f}"]
        name = f"**{of.name}**" if of.name in NAMES else of.name
        lines.append(page.line([name, f"{of.bpw:g}", *cells]))
        print(lines[-1], flush=True)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=int, default=200_000, help="of each source")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="put the table into docs/ccq.md")
    parser.add_argument("--ggml", type=Path, help="the shared library ggml-base (default: the package's)")
    args = parser.parse_args()
    found = sorted((Path(pyllamaernie.__file__).parent / "lib").glob("*ggml-base*"))
    ggml = args.ggml or (found[0] if found else None)
    if ggml is None:
        parser.error("the package has no ggml-base library; name one with --ggml")
    print(f"root mean square of the synthetic weights: {RMS}")
    with tempfile.TemporaryDirectory() as folder:
        lines = table(own_types(Library(Path(folder))) + stock_types(ggml), args.weights // 256, args.seed)
    if args.write:
        page.write(PAGE, "errors", lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
