"""The search of CCQ's multipliers K, M: `python bench/settled/ccq_constants.py --type CCQ2`.

Random candidates, then mutations of the best, all judged by the exact Viterbi search on the same unit Gaussian blocks;
the few best are judged again on more, other blocks. Tables are trained by `ccq_tables.py`. Needs gcc.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import paths  # noqa: F401

import numpy as np
from ccq_library import NAMES, Library, native_code

SIZES = {"CCQ2": (12, 96), "CCQ2_25": (10, 80), "CCQ2_5": (8, 48), "CCQ2_75": (6, 32)}  # blocks: screening, judging
UNIT = 22  # integer level of one standard deviation


def odd(rng: np.random.Generator, n: int) -> np.ndarray:
    return 2 * rng.integers(0, 32768, n) + 1


def mutated(rng: np.random.Generator, k: np.ndarray, m: np.ndarray, refined: bool) -> tuple[np.ndarray, np.ndarray]:
    """A copy with one or two multipliers changed: replaced, moved a little, or one bit flipped."""
    k, m = k.copy(), m.copy()
    for _ in range(rng.integers(1, 3)):
        target = m if refined and rng.random() < 0.4 else k
        p, way = rng.integers(4), rng.integers(3)
        if way == 0:
            target[p] = odd(rng, 1)[0]
        elif way == 1:
            target[p] = (target[p] + 2 * rng.integers(-64, 65)) % 65536
        else:
            target[p] ^= 1 << rng.integers(1, 16)
    return k, m


def search(library: Library, name: str, seed: int, rounds: int, log) -> dict:
    """The best multipliers found, and how good they are on blocks that chose nothing."""
    start, e_bits = library.codes[name], NAMES.index(name)
    t1, t2 = np.array(start.t1), np.array(start.t2)
    rng = np.random.default_rng([seed, e_bits])
    small, large, fresh = (rng.standard_normal((n, 256), np.float32) for n in (*SIZES[name], 4 * SIZES[name][1]))

    def error(k: np.ndarray, m: np.ndarray, x: np.ndarray) -> float:
        return library.code_error(native_code(k, m, t1, t2, e_bits), x, 1 / UNIT)[0]

    def judged(k: np.ndarray, m: np.ndarray, at_small: float) -> tuple[float, float, np.ndarray, np.ndarray]:
        return error(k, m, large), at_small, k, m

    k0, m0 = np.array(start.k, np.int64), np.array(start.m, np.int64)
    log(f"{name}: start {error(k0, m0, fresh):.5f} on fresh blocks, {error(k0, m0, large):.5f} on judging blocks")
    screened = []
    for _ in range(rounds // 2):
        k, m = odd(rng, 4), odd(rng, 4) if e_bits else np.zeros(4, np.int64)
        screened.append((error(k, m, small), k, m))
    screened.sort(key=lambda c: c[0])
    pool = [judged(k0, m0, error(k0, m0, small))]
    pool += [judged(k, m, at_small) for at_small, k, m in screened[: max(8, rounds // 100)]]
    pool = sorted(pool, key=lambda c: c[0])[:8]
    log(f"{name}: {rounds // 2} random candidates, best {pool[0][0]:.5f}")
    for i in range(rounds - rounds // 2):
        _, parent_small, parent_k, parent_m = pool[rng.integers(len(pool))]
        k, m = mutated(rng, parent_k, parent_m, e_bits > 0)
        at_small = error(k, m, small)
        if at_small > parent_small * 1.002:
            continue
        child = judged(k, m, at_small)
        if child[0] < pool[-1][0] and not any((k == c[2]).all() and (m == c[3]).all() for c in pool):
            pool = sorted([*pool, child], key=lambda c: c[0])[:8]
            if child is pool[0]:
                log(f"{name}: mutation {i}: {child[0]:.5f} K {k.tolist()} M {m.tolist()}")
    finals = sorted(((error(k, m, fresh), k, m) for _, _, k, m in pool), key=lambda c: c[0])
    best = finals[0]
    log(f"{name}: best on fresh blocks {best[0]:.5f} K {best[1].tolist()} M {best[2].tolist()}")
    return {"name": name, "error": best[0], "k": best[1].tolist(), "m": best[2].tolist()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--type", choices=NAMES, action="append", dest="types")
    parser.add_argument("--rounds", type=int, default=3000, help="candidates per type")
    parser.add_argument("--seed", type=int, default=20261121)
    parser.add_argument("--log", type=Path, help="append what is found to this file")
    args = parser.parse_args()
    started = time.monotonic()

    def log(text: str) -> None:
        print(f"{time.monotonic() - started:7.1f} s  {text}", flush=True)
        if args.log:
            with args.log.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    log(f"seed {args.seed}, {args.rounds} candidates per type")
    with tempfile.TemporaryDirectory() as folder:
        library = Library(Path(folder))
        results = [search(library, name, args.seed, args.rounds, log) for name in args.types or NAMES]
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
