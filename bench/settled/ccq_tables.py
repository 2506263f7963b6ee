"""Trains the level tables T1, T2 of a CCQ type: `python bench/settled/ccq_tables.py --type CCQ2`.

Blocks of several sources (Gaussian, Laplace, Student-t 5, weights of the embedded model) are encoded with both tables,
each block choosing the better one; then the entries of each table, which enter the levels linearly, are solved for by
least squares from the blocks that chose it, and rounded. Repeated; the best round on other blocks wins. Needs gcc.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import paths  # noqa: F401

import numpy as np
from ccq_library import NAMES, Library, NativeCode, native_code
from ccq_sources import sources

from pyllamaernie.quant import ccq

BLOCKS = {"CCQ2": 800, "CCQ2_25": 500, "CCQ2_5": 350, "CCQ2_75": 250}  # of each source
PEAK = 63  # the largest level: two products of unsigned levels and int8 activations must fit 16 bits
SHARES = {"gauss": 1.0, "laplace": 0.5, "t5": 0.5, "model": 0.5}  # what counts how much in the choice of a round


def solved(code: NativeCode, x: np.ndarray, blocks: np.ndarray, name: str) -> NativeCode:
    """The code with both tables solved for from blocks encoded with it."""
    layout = ccq.CODES[name]
    scale, table, level, qs, e = ccq.split(blocks, layout.e_bits)
    index = ccq.indices(qs, e, np.array(code.k), np.array(code.m)).reshape(len(x), 256)
    gain = np.repeat(scale[:, None] * ccq.LEVELS[level], 64, axis=1).astype(np.float64)
    t1, t2 = np.array(code.t1), np.array(code.t2)
    for which in range(2):
        chosen = table == which
        if chosen.sum() < 20:
            continue
        high, low = index[chosen].ravel() >> 4, index[chosen].ravel() & 15
        g, target = gain[chosen].ravel(), x[chosen].ravel().astype(np.float64)
        joint = np.bincount(high * 16 + low, g * g, 256).reshape(16, 16)
        normal = np.block([[np.diag(joint.sum(1)), joint], [joint.T, np.diag(joint.sum(0))]])
        right = np.concatenate([np.bincount(high, g * target, 16), np.bincount(low, g * target, 16)])
        entries = np.linalg.solve(normal + 1e-9 * np.trace(normal) * np.eye(32), right)
        first, second = entries[:16] + entries[16:].mean(), entries[16:] - entries[16:].mean()
        largest = max(abs(first.max() + second.max()), abs(first.min() + second.min()))
        shrink = min(1.0, PEAK / largest)
        t1[which], t2[which] = np.rint(first * shrink), np.rint(second * shrink)
    return native_code(code.k, code.m, t1, t2, code.e_bits)


def errors(library: Library, code: NativeCode, data: dict[str, np.ndarray]) -> dict[str, float]:
    """Relative squared error of each source."""
    out = {}
    for name, x in data.items():
        y = library.decode(code, library.encode(code, x, beam=32))
        out[name] = float(((x - y) ** 2).sum() / (x**2).sum())
    return out


def train(library: Library, name: str, code: NativeCode, seed: int, rounds: int, log) -> NativeCode:
    """The code with the tables of the best round."""
    rng = np.random.default_rng([seed, code.e_bits])
    teach, judge = sources(rng, BLOCKS[name]), sources(rng, BLOCKS[name])
    x = np.concatenate(list(teach.values()))
    best, best_score, reference = code, np.inf, None
    for i in range(rounds + 1):
        found = errors(library, code, judge)
        reference = reference or found
        score = sum(share * found[source] / reference[source] for source, share in SHARES.items())
        log(
            f"{name}: round {i}: {score / sum(SHARES.values()):.4f} "
            + " ".join(f"{k} {v:.5f}" for k, v in found.items())
        )
        if score < best_score:
            best, best_score = code, score
        if i < rounds:
            code = solved(code, x, library.encode(code, x, beam=32), name)
    for label in ("t1", "t2"):
        log(f"{name}: {label} {[list(row) for row in getattr(best, label)]}")
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--type", choices=NAMES, required=True)
    parser.add_argument("--k", type=int, nargs=4, help="multipliers instead of the type's own")
    parser.add_argument("--m", type=int, nargs=4)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seed", type=int, default=20261121)
    parser.add_argument("--log", type=Path)
    args = parser.parse_args()
    started = time.monotonic()

    def log(text: str) -> None:
        print(f"{time.monotonic() - started:7.1f} s  {text}", flush=True)
        if args.log:
            with args.log.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    with tempfile.TemporaryDirectory() as folder:
        library = Library(Path(folder))
        own = library.codes[args.type]
        code = native_code(args.k or own.k, args.m or own.m, own.t1, own.t2, own.e_bits)
        best = train(library, args.type, code, args.seed, args.rounds, log)
    print(json.dumps({"t1": [list(r) for r in best.t1], "t2": [list(r) for r in best.t2]}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
