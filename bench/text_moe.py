"""Train the text MoE that the quality benches measure on: `python bench/text_moe.py [--output FOLDER] [--steps 450]`.

ERNIE 4.5's text MoE at a size that two CPU cores train: 12 layers, the first dense, 16 experts of which 2 are used
beside a shared one, every row length a multiple of 256, 8 query and 2 key heads, untied output. Its text is what lies
on any machine that builds the package: this repository, the pinned llama.cpp and Python's standard library, cut by
document into training, calibration, selection and test. Needs the extra `reference` (torch). Writes a Hugging Face
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
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import checkpoints  # noqa: E402
from tiny_vocabulary import sentencepiece_model  # noqa: E402

SHAPE = checkpoints.Shape(
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
BALANCE, BIAS_RATE = 2e-3, 1e-3  # mild, so that the experts' shares stay uneven
SUFFIXES = (".py", ".md", ".txt", ".h", ".hpp", ".c", ".cpp", ".cuh", ".cu")
PIECE = 6144  # bytes that a document gives to a text at most, so that many documents are in each
PIECE_TRAIN = 9_000
TEXT_BYTES = {"calibration": 400_000, "selection": 60_000, "test": 200_000}
SHARES = {"calibration": 6, "selection": 3, "test": 5}  # of 100 documents; the others train
CACHE = Path(os.environ.get("PYLLAMAERNIE_BENCH_CACHE", ROOT / "build" / "bench-cache"))


# ---- text


def roots() -> list[tuple[str, Path]]:
    """Label and folder of each source of text; the pinned tree is left out where nothing fetched it."""
    tree = Path(os.environ.get("LLAMA_CPP_DIR") or ROOT / "vendor" / "llama.cpp")
    found = [("repository", ROOT), ("python", Path(sysconfig.get_paths()["stdlib"]))]
    return found + ([("llama.cpp", tree)] if (tree / "LICENSE").is_file() else [])


def documents() -> dict[str, str]:
    """Label and path -> ASCII text, sorted; no tests, no vendored copies, no data tables."""
    skipped = {"vendor", "build", "dist", "test", "tests", "site-packages", "dist-packages", "encodings", "unicode"}
    out: dict[str, str] = {}
    for label, root in roots():
        for folder, names, files in os.walk(root):
            names[:] = sorted(n for n in names if n not in skipped and not n.startswith((".", "__")))
            for name in sorted(files):
                path = Path(folder) / name
                if path.suffix not in SUFFIXES and name not in ("LICENSE", "AUTHORS"):
                    continue
                data = path.read_bytes()
                if not 500 <= len(data) <= 400_000 or b"\0" in data:
                    continue
                text = data.decode("utf-8", "ignore").encode("ascii", "ignore").decode("ascii")
                out[f"{label}/{path.relative_to(root).as_posix()}"] = text.replace("\r\n", "\n")
    return out


def split(texts: dict[str, str]) -> dict[str, list[str]]:
    """Names by part. A document is in one part only, chosen by the hash of its content."""
    parts: dict[str, list[str]] = {"train": [], **{part: [] for part in TEXT_BYTES}}
    seen = set()
    for name, text in texts.items():
        digest = hashlib.sha256(text.encode()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        number = int.from_bytes(digest[:4], "big") % 100
        for part, share in SHARES.items():
            if number < share:
                parts[part].append(name)
                break
            number -= share
        else:
            parts["train"].append(name)
    return parts


def held_out(texts: dict[str, str], names: list[str], n_bytes: int) -> str:
    """Pieces of many documents, in an order that does not depend on their names."""
    order = sorted(names, key=lambda n: hashlib.sha256(b"order" + n.encode()).digest())
    pieces = []
    for name in order:
        start = max(0, (len(texts[name]) - PIECE) // 2)
        pieces.append(texts[name][start : start + PIECE])
        if sum(map(len, pieces)) >= n_bytes:
            break
    return "\n\n".join(pieces)[:n_bytes]


def tokens(texts: dict[str, str], names: list[str], n_bytes: int | None = PIECE_TRAIN) -> np.ndarray:
    """Token ids of the first bytes of documents, each after the start token."""
    import sentencepiece

    vocabulary = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    pieces = [np.array([1, *vocabulary.encode(texts[name][:n_bytes])], np.int16) for name in names]
    return np.concatenate(pieces)


# ---- the model


def build(torch, shape: checkpoints.Shape, seed: int):  # type: ignore[no-untyped-def]
    """The network as a torch module; experts of a projection are one parameter."""
    from torch import nn
    from torch.nn import functional as F

    generator = torch.Generator().manual_seed(seed)

    def matrix(*dims: int, gain: float = 1.0) -> nn.Parameter:
        return nn.Parameter(torch.randn(dims, generator=generator) * gain / math.sqrt(dims[-1]))

    def rotate(x, cos, sin):  # type: ignore[no-untyped-def]  # pairs of neighbours, as ERNIE's
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)

    class Norm(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(n))

        def forward(self, x):  # type: ignore[no-untyped-def]
            return F.rms_norm(x.float(), (x.shape[-1],), self.weight, 1e-5)

    class Mlp(nn.Module):
        def __init__(self, n_ff: int) -> None:
            super().__init__()
            self.gate, self.up = matrix(n_ff, shape.n_embd), matrix(n_ff, shape.n_embd)
            self.down = matrix(shape.n_embd, n_ff, gain=out_gain)

        def forward(self, x):  # type: ignore[no-untyped-def]
            return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            n, width = shape.n_expert, shape.n_ff_exp
            self.router = matrix(n, shape.n_embd)
            self.gate, self.up = matrix(n, width, shape.n_embd), matrix(n, width, shape.n_embd)
            self.down = matrix(n, shape.n_embd, width, gain=out_gain)
            self.shared = Mlp(shape.n_shared * width)
            self.register_buffer("bias", torch.zeros(n))
            self.register_buffer("load", torch.zeros(n))
            self.balance = 0.0

        def forward(self, x):  # type: ignore[no-untyped-def]
            flat = x.flatten(0, 1)
            with torch.autocast("cpu", enabled=False):
                p = F.linear(flat.float(), self.router).softmax(-1)
            chosen = (p.detach() + self.bias).topk(shape.n_expert_used, -1).indices
            g = p.gather(1, chosen)
            g = g / g.sum(-1, keepdim=True)
            counts = torch.bincount(chosen.flatten(), minlength=shape.n_expert)
            if self.training:
                share = counts / counts.sum()
                self.balance = shape.n_expert * (share * p.mean(0)).sum()
                self.bias += BIAS_RATE * (1 / shape.n_expert - share).sign()
            self.load.lerp_(counts / counts.sum(), 0.05)
            order = chosen.flatten().argsort()
            source = order // shape.n_expert_used
            parts = flat.bfloat16().index_select(0, source).split(counts.tolist())
            weights = zip(*(w.bfloat16().unbind(0) for w in (self.gate, self.up, self.down)), strict=True)
            rows = [
                F.linear(F.silu(F.linear(part, gate)) * F.linear(part, up), down)
                for part, (gate, up, down) in zip(parts, weights, strict=True)
            ]
            y = torch.cat(rows) * g.flatten()[order][:, None]
            routed = torch.zeros_like(flat).index_add(0, source, y.to(flat.dtype))
            return routed.view_as(x) + self.shared(x)

    class Layer(nn.Module):
        def __init__(self, il: int) -> None:
            super().__init__()
            n, kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
            self.norm_in, self.norm_post = Norm(shape.n_embd), Norm(shape.n_embd)
            self.q, self.k, self.v = matrix(n, shape.n_embd), matrix(kv, shape.n_embd), matrix(kv, shape.n_embd)
            self.o = matrix(shape.n_embd, n, gain=out_gain)
            self.mlp = Mlp(shape.n_ff) if il < shape.n_dense else Experts()

        def forward(self, x, cos, sin):  # type: ignore[no-untyped-def]
            y = self.norm_in(x)
            q, k, v = (
                F.linear(y, w).unflatten(-1, (-1, shape.head_dim)).transpose(1, 2) for w in (self.q, self.k, self.v)
            )
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True, enable_gqa=True)
            x = x + F.linear(y.transpose(1, 2).flatten(-2), self.o)
            return x + self.mlp(self.norm_post(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Parameter(torch.randn(shape.n_vocab, shape.n_embd, generator=generator) * 0.5)
            self.layers = nn.ModuleList(Layer(il) for il in range(shape.n_layer))
            self.norm = Norm(shape.n_embd)
            self.head = matrix(shape.n_vocab, shape.n_embd)

        def forward(self, ids):  # type: ignore[no-untyped-def]
            angles = torch.arange(ids.shape[1])[:, None] * 500000.0 ** (
                -torch.arange(0, shape.head_dim, 2) / shape.head_dim
            )
            x = F.embedding(ids, self.embed)
            for layer in self.layers:
                x = layer(x, angles.cos(), angles.sin())
            return F.linear(self.norm(x), self.head)

        def experts(self) -> list[Experts]:
            return [layer.mlp for layer in self.layers if isinstance(layer.mlp, Experts)]

    out_gain = 1 / math.sqrt(2 * shape.n_layer)
    return Model()


def named_weights(model) -> dict[str, np.ndarray]:  # type: ignore[no-untyped-def]
    """Weights under Baidu's names."""

    def array(x):  # type: ignore[no-untyped-def]
        return np.ascontiguousarray(x.detach().float().numpy())

    out = {
        "model.embed_tokens.weight": array(model.embed),
        "model.norm.weight": array(model.norm.weight),
        "lm_head.weight": array(model.head),
    }
    for il, layer in enumerate(model.layers):
        name = f"model.layers.{il}"
        out[f"{name}.input_layernorm.weight"] = array(layer.norm_in.weight)
        out[f"{name}.post_attention_layernorm.weight"] = array(layer.norm_post.weight)
        for letter in "qkvo":
            out[f"{name}.self_attn.{letter}_proj.weight"] = array(getattr(layer, letter))
        mlp = layer.mlp
        if hasattr(mlp, "router"):
            out[f"{name}.mlp.gate.weight"] = array(mlp.router)
            out[f"{name}.mlp.moe_statics.e_score_correction_bias"] = array(mlp.bias)[None]
        for part in ("gate", "up", "down"):
            if hasattr(mlp, "router"):
                out[f"{name}.mlp.shared_experts.{part}_proj.weight"] = array(getattr(mlp.shared, part))
                for e, one in enumerate(array(getattr(mlp, part))):
                    out[f"{name}.mlp.experts.{e}.{part}_proj.weight"] = one
            else:
                out[f"{name}.mlp.{part}_proj.weight"] = array(getattr(mlp, part))
    return out


# ---- training


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
    from torch.nn import functional as F

    torch.manual_seed(seed)
    torch.set_num_threads(n_threads)
    model = build(torch, SHAPE, seed)
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
    from pyllamaernie.convert import convert

    fresh = folder / "checkpoint.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    checkpoints.write_safetensors(fresh / "model.safetensors", named_weights(model))
    config = checkpoints.config("moe", SHAPE, tied=False)
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


def write_texts(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Writes the three texts; the token ids of the training text and of the selection text come back."""
    texts = documents()
    parts = split(texts)
    folder.mkdir(parents=True, exist_ok=True)
    for part, n_bytes in TEXT_BYTES.items():
        (folder / f"{part}.txt").write_text(held_out(texts, parts[part], n_bytes), encoding="ascii")
    selection = {"selection": (folder / "selection.txt").read_text(encoding="ascii")}
    return tokens(texts, parts["train"]), tokens(selection, ["selection"], None)


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
    """The folder of a trained model, made if it is not there; its name is a hash of this file and its options."""
    key = hashlib.sha256(Path(__file__).read_bytes() + f"{seed} {n_steps}".encode()).hexdigest()[:16]
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
