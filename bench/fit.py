"""`quantize --fit` says what running a model will take; this loads random models for real and compares.

    python bench/fit.py [--scale 1] [--keep FOLDER]

For each type and context: predicted and measured memory of a process that loads the model, reads a prompt of 500
tokens and answers. The bar is 3 % or 200 MiB. Only the CPU; models of `--scale` 1 have 0.25 billion weights.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import paths  # noqa: F401

import checkpoints
from checkpoint_shapes import Shape

from pyllamaernie.convert import convert
from pyllamaernie.plan.fit import MIB, needs
from pyllamaernie.quant.choice import choose_types
from pyllamaernie.quant.source import gguf_source
from pyllamaernie.quant.writer import write_quantized

SHARE, BYTES = 0.03, 200 * MIB
CASES = [("f16", 512), ("f16", 8192), ("Q8_0", 4096), ("Q4_0", 4096), ("Q4_K", 4096), ("Q4_K", 16384)]
# A repacked tensor is in memory of its own; its pages of the mapped file stay until somebody else wants the room. So
# all of the file is let go once, and what a further answer brings back is what is needed.
LOAD = """
import ctypes, sys
from pathlib import Path
from pyllamaernie import Llama
with Llama(sys.argv[1], n_ctx=int(sys.argv[2]), mmproj=None, n_threads=2) as llm:
    llm.create_completion(list(range(40, 540)), max_tokens=2)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(sys.argv[1]):
            begin, end = (int(x, 16) for x in line.split()[0].split("-"))
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), 4)  # MADV_DONTNEED
    llm.create_completion(list(range(41, 541)), max_tokens=2)
    status = Path("/proc/self/status").read_text().splitlines()
    print(sum(int(line.split()[1]) for line in status if line.startswith(("RssAnon", "RssFile"))))
"""


def measured(path: Path, n_ctx: int) -> int:
    """Resident memory at work, mapped file included, in bytes."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOAD, path, str(n_ctx)], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of weights")
    parser.add_argument("--keep", metavar="FOLDER", help="keep the models here, and take them from here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(args.keep or scratch)
        home.mkdir(exist_ok=True)
        shape = Shape(
            n_vocab=4096, n_embd=2048, n_head=16, n_head_kv=4, head_dim=128, n_layer=max(1, round(4 * args.scale)),
            n_ff=8192,
        )  # fmt: skip
        source = home / "f16.gguf"
        if not source.exists():
            folder = checkpoints.write_checkpoint(home / "hf", "dense", shape=shape, tied=False)
            convert(folder, source, type="f16")
        print(f"{'type':6} {'context':>8} {'predicted':>10} {'measured':>10} {'off by':>9}")
        n_missed = 0
        for name, n_ctx in CASES:
            path = home / f"{name}.gguf"
            if not path.exists():
                weights = gguf_source(source)
                write_quantized(weights, choose_types(weights, type=name, pure=True).types, path)
            said, took = needs(path, n_ctx=n_ctx).total, measured(path, n_ctx)
            off = said - took
            n_missed += abs(off) > max(SHARE * took, BYTES)
            print(f"{name:6} {n_ctx:8} {said / MIB:6.0f} MiB {took / MIB:6.0f} MiB {off / MIB:+5.0f} MiB", flush=True)
    print(f"{len(CASES) - n_missed} of {len(CASES)} within {SHARE:.0%} or {BYTES // MIB} MiB")


if __name__ == "__main__":
    main()
