"""Makes logits-CASE.npz: what transformers says to each case of `logits_cases.py`, in float32 on the CPU.

Run in tests/: `python data/make_logits.py`. Each file holds, uncompressed (random float32 does not shrink):
logits (n_tokens, n_vocab), greedy (32,) tokens each from a full pass, margin (1,) the smallest distance between the two
best logits on that way, digest: sha256 of the checkpoint's weights, so that a changed random stream is noticed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import checkpoints
import reference
from logits_cases import CASES, CHECKPOINTS


def main() -> None:
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        for name, options in CHECKPOINTS.items():
            checkpoints.write_checkpoint(Path(folder) / name, **options)
        for case in CASES:
            path, images = Path(folder) / case.checkpoint, case.images()
            grids = [part for part in case.parts if not isinstance(part, str)]
            found = [reference.merged_grid(path, image) for image in images]
            assert found == grids, f"{case.name}: the processor makes grids {found}, the case says {grids}"
            ids = case.input_ids()
            logits = reference.logits(path, ids, images)
            greedy, margin = reference.greedy(path, ids, images)
            # twice the widest error that the tests allow: then the way cannot fork
            assert margin > 2 * (5e-3 if images else 1e-3) * logits.std(), (
                f"{case.name}: margin {margin}; choose another seed"
            )
            digest = checkpoints.digest(checkpoints.weights_of(**CHECKPOINTS[case.checkpoint]))
            np.savez(
                Path(__file__).parent / f"logits-{case.name}.npz",
                logits=logits,
                greedy=np.array(greedy, np.int32),
                margin=np.array([margin], np.float32),
                digest=np.array(digest),
            )
            print(f"{case.name}: {len(ids)} tokens, std {logits.std():.3f}, smallest greedy margin {margin:.4f}")


if __name__ == "__main__":
    main()
