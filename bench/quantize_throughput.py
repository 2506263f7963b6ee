"""`pyllamaernie quantize` beside llama-quantize: the same types, source and threads, in turns, several times.

    python bench/quantize_throughput.py MODEL.gguf [--types Q8_0,Q4_0,Q4_K] [--rounds 3] [--threads 2]
    python bench/quantize_throughput.py --random FOLDER [--layers 16]     makes a random model of 0.9 billion weights

Whole commands are timed, start of Python and last fsync included. Ratios are theirs over ours, of each round, so above
1 ours is faster; their median is what counts, on a shared machine above all. Payloads are compared, and the peak of
our anonymous memory is measured. Bars: ratio at least 1; memory below 1.5 times the largest tensor and 1 GiB.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import paths  # noqa: F401

import checkpoints
import gguf
import numpy as np
from checkpoint_shapes import Shape
from turns import medians, ratios, take_turns

from pyllamaernie import programs

MIB = 2**20


def timed(command: list[object]) -> dict[str, float]:
    """Seconds, seconds of CPU, and peak of anonymous memory of a command; it must not fail."""
    started, before = time.monotonic(), os.times()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak, status = 0, Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            rows = [line.split() for line in status.read_text().splitlines()]
            peak = max([peak, *(int(row[1]) * 1024 for row in rows if row[0] == "RssAnon:")])
        except OSError:  # it has just ended
            pass
        time.sleep(0.02)
    seconds, after = time.monotonic() - started, os.times()
    if process.returncode:
        raise SystemExit(f"{command} ended with code {process.returncode}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": seconds, "cpu": cpu, "peak": peak}


def same_payload(a: Path, b: Path) -> bool:
    one, two = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in (a, b))
    return one.keys() == two.keys() and all(
        one[n].tensor_type == two[n].tensor_type and np.array_equal(one[n].data, two[n].data, equal_nan=False)
        for n in one
    )


def random_model(folder: Path, n_layer: int) -> Path:
    from pyllamaernie.convert import convert

    path = folder / f"f16-{n_layer}.gguf"
    if not path.exists():
        shape = Shape(
            n_vocab=4096, n_embd=2048, n_head=16, n_head_kv=4, head_dim=128, n_layer=n_layer, n_ff=8192
        )  # fmt: skip
        convert(checkpoints.write_checkpoint(folder / "hf", "dense", shape=shape, tied=False), path, type="f16")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="MODEL.gguf")
    parser.add_argument("--random", metavar="FOLDER", help="make and keep a random model here")
    parser.add_argument("--layers", type=int, default=16, metavar="N", help="of the random model")
    parser.add_argument("--types", default="Q8_0,Q4_0,Q4_K", help="presets, all matrices in the basic type")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if (args.model is None) == (args.random is None):
        parser.error("give a model or --random")
    model = Path(args.model) if args.model else random_model(Path(args.random), args.layers)
    largest = max(t.n_bytes for t in gguf.GGUFReader(model).tensors)
    bar = min(1.5 * largest, 1024 * MIB)
    print(f"{model.name}: {model.stat().st_size / MIB:.0f} MiB, {args.threads} threads, {args.rounds} rounds")
    print(f"{'type':8} {'ours':>8} {'theirs':>8} {'ratio':>7} {'of CPU':>7} {'memory':>10} (bar {bar / MIB:.0f} MiB)")
    with tempfile.TemporaryDirectory(dir=model.absolute().parent) as home:
        ours, theirs = Path(home) / "ours.gguf", Path(home) / "theirs.gguf"
        for name in args.types.split(","):
            one = [sys.executable, "-P", "-m", "pyllamaernie", "quantize", model, "-o", ours, "--type", name, "--pure"]
            one += ["--threads", args.threads, "--overwrite"]
            two = [programs.path("llama-quantize"), "--pure", model, theirs, name, args.threads]
            rounds = take_turns({"ours": partial(timed, one), "theirs": partial(timed, two)}, args.rounds)
            if not same_payload(ours, theirs):
                raise SystemExit(f"{name}: the payloads differ")
            wall, cpu = (statistics.median(ratios(rounds, what, "theirs", "ours")) for what in ("seconds", "cpu"))
            seconds = [figures["seconds"] for figures in medians(rounds).values()]
            peak = max(rounds["ours"]["peak"])
            print(
                f"{name:8} {seconds[0]:6.1f} s {seconds[1]:6.1f} s {wall:7.2f} {cpu:7.2f} {peak / MIB:6.0f} MiB "
                f"{'' if peak < bar else ' OVER'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
