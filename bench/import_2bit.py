"""How fast a 2-bit release becomes CCQ2_B, and in how much memory: `python bench/import_2bit.py [--experts 2]`.

One layer with experts of the 300B's sizes (8192 x 3584), random codes, and as original what they stand for with noise,
so that the check finds what it would in a release. Times are the process's own, so the disk does not count where it is
waited for; a 300B has 3008 experts in 2 bits, of 20 MB each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import paths  # noqa: F401

import numpy as np
import two_bit
from checkpoint_shapes import Shape

from pyllamaernie.quant import ccq

N_EXPERTS_300B = 47 * 64
MEASURE = """
import json, re, sys, time
import numpy as np
from pyllamaernie.gguf.file import TensorType, encode_rows
from pyllamaernie.convert import check_two_bit, convert
source, original, out = sys.argv[1:]
def timed(work):
    begin = time.process_time()
    result = work()
    return time.process_time() - begin, result
seconds, report = timed(lambda: check_two_bit(source, original))
whole, done = timed(lambda: convert(source, out, original=original))
peak = 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
n_bytes = sum(row.n_bytes for row in done.tensors if row.type == "CCQ2_B")
rows = np.random.default_rng(0).standard_normal((512, 8192)).astype(np.float32)
small = {name: timed(lambda: encode_rows(rows, TensorType[name]))[0] / rows.size * 1e9 for name in ("Q8_0", "Q4_0")}
print(json.dumps([seconds, whole - seconds, n_bytes, peak, report.lines(), small]))
"""


def write_folders(root: Path, n_expert: int) -> tuple[Path, Path]:
    """The release and its original."""
    two_bit.W4_END = 0  # a dense layer, then the one in 2 bits
    shape = Shape(
        n_embd=8192, n_head=4, n_head_kv=2, head_dim=128, n_layer=2, n_ff=512, n_expert=n_expert, n_expert_used=2,
        n_shared=0, n_ff_exp=3584,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    codes, weights = {}, {}
    for e in range(n_expert):
        for p, k, n in (
            ("up_gate_proj", shape.n_embd, 2 * shape.n_ff_exp),
            ("down_proj", shape.n_ff_exp, shape.n_embd),
        ):
            scale = rng.uniform(118.5, 121.5, n).astype(np.float32)
            local = rng.integers(10, 16, (2, k // 128, n), dtype=np.uint8)
            five = {
                "quant_weight": rng.integers(0, 256, (k // 4, n), dtype=np.uint8),
                "weight_scale": local[0] << 4 | local[1],
                "super_scales": np.full(n, 0x3880, np.uint16),
                "code_scale": scale,
                "code_zp": np.float32(16384) - np.float32(127.5) * scale,
            }
            codes |= {f"ernie.layers.1.mlp.experts.{e}.{p}.{name}": data for name, data in five.items()}
            whole = ccq.baidu_weights(
                five["quant_weight"], five["weight_scale"], scale, five["code_zp"],
                ccq.bf16_to_float32(five["super_scales"]),
            ).T  # fmt: skip
            noise = rng.standard_normal(whole.shape, dtype=np.float32)
            whole = whole + np.float32(0.363) * whole.std() * noise  # a correlation of 0.94
            stem = f"model.layers.1.mlp.experts.{e}"
            parts = {"down": whole} if p == "down_proj" else dict(zip(("gate", "up"), np.split(whole, 2), strict=True))
            weights |= {f"{stem}.{name}_proj.weight": data for name, data in parts.items()}
    few_heads = {"head_dim": shape.head_dim}
    original = two_bit.write_original(root / "Bench-PT", shape, extra=weights, shards=1, config_changes=few_heads)
    return two_bit.write_release(root / "Bench-2Bits-Paddle", codes, shape, shards=1), original


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experts", type=int, default=2, help="experts of the layer (default: 2)")
    n_expert = parser.parse_args().experts
    with tempfile.TemporaryDirectory() as folder:
        source, original = write_folders(Path(folder), n_expert)
        words = [sys.executable, "-P", "-c", MEASURE, source, original, Path(folder) / "x.gguf"]
        done = subprocess.run(list(map(str, words)), stdout=subprocess.PIPE, text=True, check=True)
        checked, written, n_bytes, peak, lines, small = json.loads(done.stdout.splitlines()[-1])
    print("\n".join(lines))
    print(f"check: {checked:.1f} s CPU, most of it for experts that are sampled in full (9 of 3008 in the 300B)")
    print(
        f"write: {n_bytes / 1e6:.0f} MB of CCQ2_B in {written:.1f} s CPU ({written / n_expert:.2f} s an expert; "
        f"{written / n_expert * N_EXPERTS_300B / 60:.0f} min for {N_EXPERTS_300B}), peak memory {peak / 1e6:.0f} MB"
    )
    print("the rest, ns CPU per weight: " + ", ".join(f"{name} {ns:.0f}" for name, ns in small.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
