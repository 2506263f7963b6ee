"""Train the text MoE that the quality benches measure on: `python bench/text_moe.py [--output FOLDER] [--steps 450]`.

ERNIE 4.5's text MoE at a size that two CPU cores train: 12 layers, the first dense, 16 experts of which 2 are used
beside a shared one, every row length a multiple of 256, 8 query and 2 key heads, untied output. What it reads is in
`text_moe_texts.py`, the network in `text_moe_network.py`. Needs the extra `reference` (torch). Writes a Hugging Face
folder that `pyllamaernie convert` takes, the F16 GGUF made from it, and the three texts.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from paths import ROOT

import checkpoint_config
import checkpoints
import numpy as np
from checkpoint_shapes import Shape
from text_moe_texts import write_texts

SHAPE = Shape(
    n_vocab=512,
    n_embd=256,
    n_head=8,
    n_head_kv=2,
    head_dim=32,
    n_layer=12,
    n_ff=1024,  # over the key heads this is the shared width, as in the released models
    n_expert=16,
    n_expert_used=2,
    n_shared=2,
    n_ff_exp=256,
)
BATCH = 12
N_CTX, N_CTX_EARLY, EARLY = 512, 256, 0.75  # windows are shorter for the first 75 % of the steps, which is cheaper
STEPS = 450
PEAK_LR, LAST_LR, WARMUP = 2e-3, 1e-4, 60
BALANCE = 2e-3  # mild, so that the experts' shares stay uneven
CACHE = Path(os.environ.get("PYLLAMAERNIE_BENCH_CACHE", ROOT / "build" / "bench-cache"))


def batches(data: np.ndarray, n_steps: int, seed: int) -> Iterator[np.ndarray]:
    """Windows at random places. Shapes: -> (BATCH, context + 1) int64."""
    rng = np.random.default_rng(seed)
    for step in range(n_steps):
        n_ctx = N_CTX_EARLY if step < EARLY * n_steps else N_CTX
        starts = rng.integers(0, len(data) - n_ctx - 1, BATCH)
        yield np.stack([data[s : s + n_ctx + 1] for s in starts]).astype(np.int64)


def keep_memory() -> None:
    """Have glibc give freed memory to the next step instead of to the system: faulting it in again costs most."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28), (-8, 1)):  # mmap max, trim, top pad, arenas
            mallopt(option, value)


def train(data: np.ndarray, check: np.ndarray, n_steps: int, seed: int, n_threads: int, save) -> dict:  # type: ignore[no-untyped-def]
    """The last losses and the experts' shares; `save(model)` is called every few minutes."""
    keep_memory()
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # a waiting thread gives its core away: the machine may be shared
    import torch
    from text_moe_network import Model
    from torch.nn import functional as F

    torch.manual_seed(seed)
    torch.set_num_threads(n_threads)
    model = Model(SHAPE, seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=PEAK_LR,
        betas=(0.9, 0.95),
        fused=True,
    )

    def loss_of(ids):  # type: ignore[no-untyped-def]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    def validation() -> float:
        model.eval()
        windows = check[: 16 * (N_CTX + 1)].astype(np.int64).reshape(16, -1)
        with torch.no_grad():
            value = loss_of(torch.from_numpy(windows)).item()
        model.train()
        return value

    model.train()
    started = saved = time.monotonic()
    mean = spent = 0.0
    for step, batch in enumerate(batches(data, n_steps, seed)):
        share = min(1.0, (step + 1) / WARMUP)
        decay = 0.5 + 0.5 * math.cos(math.pi * step / n_steps)
        for group in optimizer.param_groups:
            group["lr"] = share * (LAST_LR + (PEAK_LR - LAST_LR) * decay)
        loss = loss_of(torch.from_numpy(batch))
        (loss + BALANCE * sum(e.balance for e in model.experts())).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = loss.item() if step == 0 else 0.95 * mean + 0.05 * loss.item()
        if step % 20 == 0 or step < 5:
            spent = time.monotonic() - started
            print(f"step {step:5d}/{n_steps}  loss {mean:.4f}  {spent:6.0f} s", flush=True)
        if time.monotonic() - saved > 240:
            save(model)
            saved = time.monotonic()
            print(f"saved; loss of the selection text {validation():.4f}", flush=True)
    model.eval()
    save(model)
    shares = torch.stack([e.load for e in model.experts()])
    return {"loss": mean, "selection_loss": validation(), "expert_shares": shares.tolist(), "seconds": spent}


def unigram_loss(data: np.ndarray, check: np.ndarray) -> float:
    """Nats per token when every token is guessed from its frequency alone."""
    counts = np.bincount(data, minlength=SHAPE.n_vocab) + 1
    return float(-np.log(counts / counts.sum())[check].mean())


def write_model(model, folder: Path) -> None:  # type: ignore[no-untyped-def]
    """The Hugging Face folder and the F16 GGUF, each replaced when the new one is whole."""
    from text_moe_network import named_weights

    from pyllamaernie.convert import convert

    fresh = folder / "checkpoint.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    checkpoints.write_safetensors(fresh / "model.safetensors", named_weights(model))
    config = checkpoint_config.config("moe", SHAPE, tied=False)
    (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    checkpoints.write_tokenizer(fresh, "moe")
    convert(fresh, folder / "new.gguf", type="f16", overwrite=True)
    old = folder / "checkpoint.old"
    shutil.rmtree(old, ignore_errors=True)
    if (folder / "checkpoint").exists():
        (folder / "checkpoint").rename(old)
    fresh.rename(folder / "checkpoint")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(folder / "new.gguf", folder / "text-moe-f16.gguf")


def make(folder: Path, *, n_steps: int = STEPS, seed: int = 0, n_threads: int = 2) -> None:
    """Train into a folder and leave `done.json` there."""
    data, check = write_texts(folder)
    unigram = unigram_loss(data, check)
    print(f"{len(data)} tokens of training text; unigram loss {unigram:.4f} nats", flush=True)
    result = train(data, check, n_steps, seed, n_threads, lambda model: write_model(model, folder))
    result |= {"unigram_loss": unigram, "n_steps": n_steps, "seed": seed}
    (folder / "done.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    loss = result["selection_loss"]
    print(f"loss of the selection text {loss:.4f}, {loss / unigram:.1%} of the unigram loss", flush=True)


def cached(*, seed: int = 0, n_steps: int = STEPS) -> Path:
    """The folder of a trained model, made if it is not there; its name is a hash of `text_moe*.py` and options."""
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("text_moe*.py")))
    key = hashlib.sha256(sources + f"{seed} {n_steps}".encode()).hexdigest()[:16]
    folder = CACHE / f"text-moe-{key}"
    if not (folder / "done.json").is_file():
        make(folder, n_steps=n_steps, seed=seed, n_threads=len(os.sched_getaffinity(0)))
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help=f"folder (default: a name from a hash, under {CACHE})")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {BATCH} windows (default: {STEPS})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    if args.output is None:
        print(cached(seed=args.seed, n_steps=args.steps))
    else:
        make(args.output, n_steps=args.steps, seed=args.seed, n_threads=args.threads)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
