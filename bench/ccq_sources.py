"""What the CCQ benches quantize: blocks of 256 weights, synthetic or of the embedded model. Not a program."""

from __future__ import annotations

import json

from paths import ROOT

import numpy as np

MODEL = ROOT / "models" / "ernie-4.5-vl-tiny" / "model.safetensors"
RMS = 0.02


def sources(rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    """n blocks of each source, (n, 256) float32, root mean square 0.02; see model_blocks() for `model`."""
    draws = {
        "gauss": rng.standard_normal((n, 256)),
        "laplace": rng.laplace(size=(n, 256)),
        "t5": rng.standard_t(5, (n, 256)),
        "model": model_blocks(rng, n),
    }
    return {name: (x * (RMS / np.sqrt((x * x).mean()))).astype(np.float32) for name, x in draws.items()}


def model_blocks(rng: np.random.Generator, n: int) -> np.ndarray:
    """n blocks of the embedded model's matrices, each scaled to the root mean square 1. Shapes: (n, 256)."""
    blocks = np.concatenate([x.reshape(-1, 256) for x in model_matrices().values()])
    blocks = blocks[rng.choice(len(blocks), n, replace=n > len(blocks))]
    return blocks / np.sqrt((blocks * blocks).mean(1, keepdims=True))


def model_matrices() -> dict[str, np.ndarray]:
    """The embedded model's bfloat16 matrices whose rows are whole blocks, as float32, without the embeddings."""
    data = np.memmap(MODEL, np.uint8, "r")
    n_header = int(data[:8].view("<u8")[0])
    header = json.loads(bytes(data[8 : 8 + n_header]))
    out = {}
    for name, entry in sorted(header.items()):
        if entry.get("dtype") == "BF16" and len(entry["shape"]) == 2 and entry["shape"][1] % 256 == 0:
            if "embed" not in name:
                start, end = (8 + n_header + offset for offset in entry["data_offsets"])
                bits = np.frombuffer(bytes(data[start:end]), "<u2").astype(np.uint32) << 16
                out[name] = bits.view(np.float32).reshape(entry["shape"])
    return out
