"""CCQ types on a CUDA device: are products right, and how many tokens per second, beside ggml's types of the same size.

    python bench/ccq_cuda.py                       tokens per second at the shapes of ERNIE-4.5-21B-A3B
    python bench/ccq_cuda.py --tiles 0 128 100000  prefill of CCQ types by where the int8 tiles give way to cuBLAS
    PYLLAMAERNIE_BUILD_DIR=build/... python bench/ccq_cuda.py --check

Needs a package built with CMAKE_ARGS=-DGGML_CUDA=ON and a device. Writes one GGUF per type with random blocks, as
bench/ccq_speed.py does, and runs llama-bench on them in turns, everything on the device; medians. --check runs
upstream's test-backend-ops (a build folder made with PYLLAMAERNIE_UPSTREAM_TESTS=ON and the target test-backend-ops)
on the cases of our types, CUDA against CPU.

Never run so far: there was no CUDA device.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import paths  # noqa: F401

from ccq_speed import TYPES, llama_bench, n_bytes_read, write_models
from turns import medians, take_turns

from pyllamaernie import _core
from pyllamaernie.gguf.file import TensorType

TILES = "GGML_CUDA_CCQ_TILES_MAX"  # read by ccq.cu
BATCHES = (1, 4, 8)  # tokens decoded at once: what several users or a draft model ask for


def check(device: str) -> int:
    """Compares our types' products and rows on the device with the CPU's."""
    build_dir = os.environ.get("PYLLAMAERNIE_BUILD_DIR")
    if not build_dir:
        sys.exit("PYLLAMAERNIE_BUILD_DIR must name a build folder with bin/test-backend-ops")
    program = Path(build_dir) / "bin" / "test-backend-ops"
    failed = 0
    for op in ("MUL_MAT", "MUL_MAT_ID", "GET_ROWS"):
        run = subprocess.run([program, "test", "-b", device, "-o", op, "-p", "ccq"], capture_output=True, text=True)
        cases = [line for line in run.stdout.splitlines() if "ccq" in line]
        bad = [line for line in cases if "OK" not in line]
        print(f"{op}: {len(cases)} cases, {len(bad)} not right")
        print("\n".join(bad[:10]))
        failed += bool(bad) or not cases or run.returncode != 0
    return 1 if failed else 0


def speeds(model: Path, args: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of one round."""
    words = ("-ngl", "99", *args.bench)
    found = llama_bench(model, 1, args.prompt, args.tokens, *words)
    for n in BATCHES[1:]:
        batch = llama_bench(model, 1, 16 * n, 0, *words, "-b", str(n), "-ub", str(n))
        found[f"{n} at once"] = batch["prefill"]
    return found


def measured(models: dict[str, Path], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Medians over rounds in which the models take turns."""
    works = {name: functools.partial(speeds, path, args) for name, path in models.items()}
    return medians(take_turns(works, args.rounds, progress=True))


def show(table: dict[str, dict[str, float]], base: str) -> None:
    columns = list(next(iter(table.values())))
    print("| | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for name, row in table.items():
        cells = [f"{row[what]:.1f} ({row[what] / table[base][what]:.2f})" for what in columns]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(f"tokens per second (over {base})")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--types", nargs="+", default=(*TYPES, "CCQ2_B"), help="default: those of CCQ and of its size")
    parser.add_argument("--layers", type=int, default=8, help="the first is dense (default: 8)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every type (default: 5)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (default: 512)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that are decoded (default: 64)")
    parser.add_argument("--folder", type=Path, help="keeps the models here, and uses those that are there")
    parser.add_argument("--tiles", type=int, nargs="+", metavar="N", help=f"values of {TILES} to compare")
    parser.add_argument("--check", action="store_true", help="whether products are right, not how fast they are")
    parser.add_argument("--device", default="CUDA0", help="for --check (default: CUDA0)")
    parser.add_argument("--bench", nargs=argparse.REMAINDER, default=[], help="the rest goes to llama-bench")
    args = parser.parse_args()
    if args.check:
        return check(args.device)
    devices = [name for name in _core.gpu_devices(False) if re.match("CUDA", name)]
    if not devices:
        sys.exit(f"no CUDA device; this build sees {_core.gpu_devices(False) or 'no device at all'}")
    with tempfile.TemporaryDirectory() as temporary:
        models = write_models(args.folder or Path(temporary), args.types, args.layers)
        if args.tiles is None:
            table = measured(models, args)
            show(table, "IQ2_XXS" if "IQ2_XXS" in table else next(iter(table)))
            for name, row in table.items():
                gigabytes = n_bytes_read(TensorType[name], args.layers) / 1e9 * row["decode"]
                print(f"{name}: decode reads {gigabytes:.0f} GB/s")
            return 0
        ours = {name: path for name, path in models.items() if name.startswith("CCQ")}
        for n in args.tiles:
            os.environ[TILES] = str(n)
            print(f"{TILES}={n}")
            show(measured(ours, args), next(iter(ours)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
