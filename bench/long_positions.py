"""How far rotation drifts at long positions, and what it does to logits: `python bench/long_positions.py [--write]`.

Few tokens stand for a long text: sixteen at position 0, sixteen more far behind, on random checkpoints with the
released width of a head (128) and rotation sections. Text architectures take no gap between positions, so there all
thirty-two stand far from 0 and near one another. Needs the extra `reference`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from types import MethodType

import paths  # noqa: F401

import checkpoint_config
import checkpoints
import numpy as np
import page
import reference
import torch
from checkpoint_shapes import Shape
from page import line
from parity import PAGE, mean_kl
from tiny_vocabulary import N_PIECES

from pyllamaernie import Llama
from pyllamaernie.convert import convert
from pyllamaernie.convert.ernie4_5_vl_moe import Sections, rope_factors, source_pairs

FAR = (4096, 32768, 131072 - 32)
BASE, HEAD = 500000.0, 128
SECTIONS = Sections(t=20, h=22, w=22)
N_GROUP = 16
SMALL = {"n_embd": 256, "n_head": 4, "n_head_kv": 1, "head_dim": HEAD, "n_layer": 3, "embed": 0.15}
MODELS = {
    "dense": {"kind": "dense", "shape": Shape(**SMALL)},
    "VL": {"kind": "vl", "shape": Shape(**{**SMALL, "n_head": 2}, section_t=SECTIONS.t)},
}


def angles(position: int) -> dict[str, np.ndarray]:
    """The angle of each pair as its program computes it, in float64, and exactly. Shapes: each (64,)"""
    one, step = np.float32(1), np.float32(BASE ** (-2 / HEAD))
    ladder = np.multiply.accumulate(np.r_[np.float32(position), np.full(HEAD // 2 - 1, step)], dtype=np.float32)
    k = source_pairs(SECTIONS)
    frequency = one / np.float32(BASE) ** (np.arange(0, HEAD, 2, dtype=np.float32) / np.float32(HEAD))
    exact = position * BASE ** (-np.arange(0, HEAD, 2) / HEAD)
    ours_vl = np.empty_like(exact)
    ours_vl[k] = (ladder / rope_factors(SECTIONS, BASE)).astype(np.float64)
    return {
        "exact": exact,
        "ours, text": ladder.astype(np.float64),
        "ours, VL": ours_vl,
        "transformers": (np.float32(position) * frequency).astype(np.float64),
    }


def exactly(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of a rotary module's forward: the same in float64."""
    frequency = BASE ** (-torch.arange(0, HEAD, 2, dtype=torch.float64) / HEAD)
    if not hasattr(self, "recomposition_frequencies"):
        turned = position_ids[..., None].double() * frequency
        both = torch.cat([turned, turned], dim=-1)
        return both.cos().float(), both.sin().float()
    hw = SECTIONS.h + SECTIONS.w
    frequency = torch.cat([frequency[:hw][0::2], frequency[:hw][1::2], frequency[hw:]])
    turned = position_ids.expand(3, -1, -1)[..., None].double() * frequency
    cos, sin = (self.recomposition_frequencies(part).float() for part in (turned.cos(), turned.sin()))
    return cos, sin


def probe(name: str, root: Path) -> list[list[str]]:
    options = MODELS[name]
    changes = {"max_position_embeddings": 131072}
    if options["kind"] == "vl":
        text = checkpoint_config.config("vl", options["shape"], tied=False)["text_config"]
        changes = {"text_config": {**text, **changes}}
    folder = checkpoints.write_checkpoint(root / name, tied=False, config_changes=changes, **options)
    path = convert(folder, root / f"{name}.gguf", type="f32").model
    ids = np.random.default_rng(0).integers(259, N_PIECES, 2 * N_GROUP).astype(np.int32)
    out = []
    with Llama(path, type_k="f32", type_v="f32", n_ctx=512) as llm:
        session = llm.scorer().session
        for far in FAR:
            first = 0 if options["kind"] == "vl" else far
            starts = (first, far if options["kind"] == "vl" else far + N_GROUP)
            session.clear()
            ours = np.concatenate(
                [session.decode_tokens(part, start) for part, start in zip(np.split(ids, 2), starts, strict=True)]
            )
            positions = torch.tensor(np.concatenate([start + np.arange(N_GROUP) for start in starts]))[None]
            if options["kind"] == "vl":
                positions = positions.expand(3, 1, -1)
            theirs = reference.logits(folder, ids, position_ids=positions)
            rotary = reference.load(folder, torch.float32)
            rotary = (rotary.model.language_model if options["kind"] == "vl" else rotary.model).rotary_emb
            before, rotary.forward = rotary.forward, MethodType(exactly, rotary)
            exact = reference.logits(folder, ids, position_ids=positions)
            rotary.forward = before
            kept = [str(far), "0 and far" if options["kind"] == "vl" else "all far", name]
            pairs = ((theirs, ours), (exact, ours), (exact, theirs))
            errors = [f"{np.abs(a - b)[N_GROUP:].max() / exact.std():.1e}" for a, b in pairs]
            kls = [f"{mean_kl(a[N_GROUP:], b[N_GROUP:]):.1e}" for a, b in pairs]
            same = (theirs.argmax(-1) == ours.argmax(-1))[N_GROUP:].mean()
            out.append([*kept, *(f"{e}, {k}" for e, k in zip(errors, kls, strict=True)), f"{100 * same:.0f} %"])
    return out


def tables() -> list[str]:
    turns_of = ("ours, text", "ours, VL", "transformers")
    turns = [line(["positions from", *turns_of]), line(["---"] * 4)]
    for far in FAR:
        found = [angles(far + i) for i in range(N_GROUP)]  # a power of two alone would hide the rounding
        worst = [max(np.abs(at[name] - at["exact"]).max() for at in found) for name in turns_of]
        turns.append(line([str(far), *(f"{error:.1e}" for error in worst)]))
    head = ["far position", "tokens at", "checkpoint", "ours to transformers", "ours to exact", "transformers to exact"]
    logits = [line([*head, "same top token"]), line(["---"] * 7)]
    with tempfile.TemporaryDirectory() as root:
        for name in MODELS:
            logits += [line(cells) for cells in probe(name, Path(root))]
    return ["Largest error of an angle, in radians:", "", *turns, "",
            "Logits of the far tokens: largest error over the deviation, and mean KL:", "", *logits]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="also put the tables into docs/parity.md")
    args = parser.parse_args()
    found = tables()
    print("\n".join(found))
    if args.write:
        page.write(PAGE, "long positions", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
