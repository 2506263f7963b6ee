"""What nvcc makes of the CCQ kernels for CUDA: registers, spills, and instructions for a weight. Needs no device.

    pip install nvidia-cuda-nvcc nvidia-cuda-cccl nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
    PYLLAMAERNIE_BUILD_DIR=build/... python bench/ccq_cuda_sass.py
    PYLLAMAERNIE_BUILD_DIR=build/... python bench/ccq_cuda_sass.py --upstream    IQ2_XXS and others too, some minutes

Counts the instructions of the innermost loop of a product with one vector, and divides by the weights that a thread
takes in one turn. Figures of a compiler: they say nothing of memory, of latency, or of which units are busy.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import paths  # noqa: F401

from ccq_cuda_library import KINDS, compile_cuda, patched_tree

# name -> (ggml's number, weights of a thread in a turn) in upstream's mul_mat_vec_q
UPSTREAM = {"IQ2_XXS": (16, 32), "IQ2_XS": (17, 32), "IQ2_S": (22, 32), "Q2_K": (10, 16), "IQ3_XXS": (18, 32)}
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)([^;]*);")


def loop_length(sass: str) -> int:
    """Instructions of the longest loop of a function."""
    code = [(int(m[1], 16), m[2], m[3]) for m in INSTRUCTION.finditer(sass)]
    longest = 0
    for address, name, rest in code:
        target = re.findall(r"0x([0-9a-f]+)", rest)
        if name.startswith("BRA") and target and int(target[-1], 16) < address:
            longest = max(longest, sum(int(target[-1], 16) <= a <= address for a, _, _ in code))
    return longest


def functions(binary: Path, cuobjdump: str) -> dict[str, str]:
    """Machine code by mangled name."""
    text = subprocess.run([cuobjdump, "-sass", binary], check=True, capture_output=True, text=True).stdout
    parts = re.split(r"\n\s*Function : ", text)[1:]
    return {part.split("\n", 1)[0].strip(): part for part in parts}


def registers(log: str) -> dict[str, tuple[int, int]]:
    """(registers, bytes spilled) by mangled name."""
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    return {m[1]: (int(m[3]), int(m[2])) for m in re.finditer(pattern, log, re.S)}


def find_cuobjdump() -> str:
    packaged = sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/cu1*/bin/cuobjdump"))
    found = str(packaged[-1]) if packaged else shutil.which("cuobjdump")
    if found is None:
        sys.exit("no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--arch", type=int, default=90, help="compute capability, times ten (default: 90)")
    parser.add_argument("--upstream", action="store_true", help="also upstream's kernel, for types of the same size")
    args = parser.parse_args()
    tree = patched_tree()
    if tree is None:
        sys.exit("PYLLAMAERNIE_BUILD_DIR must name a build folder")
    cuobjdump = find_cuobjdump()
    wanted = {"ccq": {name: (rf"ccq_mul_mat_vecIL8ccq_kind{i}ELi1E", 32) for i, name in enumerate(KINDS)}}
    if args.upstream:
        wanted["mmvq"] = {
            name: (rf"13mul_mat_vec_qIL9ggml_type{number}ELi1ELb0ELb0ELb0E", n)
            for name, (number, n) in UPSTREAM.items()
        }
    print("| type | registers | bytes spilled | loop | for a weight |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for file, kernels in wanted.items():
            out = Path(folder) / f"{file}.o"
            run = compile_cuda(tree / f"ggml/src/ggml-cuda/{file}.cu", tree, args.arch, out, "-Xptxas", "-v")
            if run.returncode != 0:
                sys.exit(run.stderr[-3000:])
            code, used = functions(out, cuobjdump), registers(run.stderr)
            for name, (pattern, n_weights) in kernels.items():
                (function,) = (f for f in code if re.search(pattern, f))
                length = loop_length(code[function])
                shown = " | ".join(map(str, (*used[function], length)))
                print(f"| {name} | {shown} | {length / n_weights:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
