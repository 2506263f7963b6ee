"""Train `ernie-4.5-vl-tiny` from nothing, on CPU or on a CUDA device, within a budget of wall-clock time.

    python train.py --out FOLDER --minutes 64

First the vision tower and the resampler alone, told what lies under each of their tokens; then everything together.
Checkpoints are written along the way. The network is in `network.py`, what a step does to it in `learning.py`. Needs
torch, transformers, sentencepiece, Pillow.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import recipe
import sentencepiece
import torch
from checkpoint import HERE, save
from exam import evaluation_rows, exact_shares, exam_line
from learning import Averages, Balance, Optimizer, Team
from network import TokenHeads, answer_loss, collate, experts_forward, forward, make_model
from recipe import Row, world
from torch import multiprocessing, nn
from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe


def batches(
    tokenizer: sentencepiece.SentencePieceProcessor, rng: random.Random, size: int, side_max: int, clips: float
) -> Iterator[list[Row]]:
    """Yield batches of rows of similar length, for ever: mostly single pictures, some pairs, texts and clips."""
    while True:
        rows = []
        for _ in range(4 * size):
            pick = rng.random()
            canvas = [world.random_canvas(rng, side_max=side_max) for _ in range(2)]
            if pick < 0.05:
                rows.append(
                    recipe.pair_row(
                        tokenizer, rng, [world.random_canvas(rng, side_max=min(side_max, 252)) for _ in range(2)]
                    )
                )
            elif pick < 0.07:
                rows.append(recipe.text_row(tokenizer, rng))
            else:
                rows.append(recipe.picture_row(tokenizer, rng, canvas[0]))
        rows.sort(key=lambda row: len(row.ids))
        groups = [rows[i : i + size] for i in range(0, len(rows), size)]
        if rng.random() < clips:
            n_frames = rng.choice((4, 6, 8, 8, 12, 16, 16, 24))
            canvas = world.random_canvas(rng, 112, rng.choice((140, 168, 224)))
            groups.append([recipe.clip_row(tokenizer, rng, n_frames, canvas) for _ in range(max(4, 80 // n_frames))])
        rng.shuffle(groups)
        yield from groups


def train_tower(
    model: nn.Module, heads: TokenHeads, args: argparse.Namespace, rng: random.Random, seconds: float, team: Team
) -> None:
    """Teach tower and resampler alone; crowded canvases give more to learn per picture."""
    parts = [*model.model.vision_tower.parameters(), *model.model.resampler_model.parameters(), *heads.parameters()]
    optimizer = Optimizer([(parts, 1.0)], args.tower_rate)
    start, step, mean = time.time(), 0, None
    while (done := team.agree((time.time() - start) / seconds)) < 1:
        side_max = round(168 + (world.SIDE_MAX - 168) * min(1, done * 1.3))
        pixels, grids, labels = [], [], []
        room = args.patches
        while room > 0:
            crowd = rng.choice((1, 2, 3, 4, 5, 6, 7)) if done < 0.8 else None
            canvas = world.random_canvas(rng, side_max=side_max)
            scene = world.random_scene(rng, crowd, canvas)
            x, (gh, gw) = recipe.patches(world.draw_scene(scene))
            pixels.append(x)
            grids.append((1, gh, gw))
            labels.append(recipe.token_labels(scene))
            room -= gh * gw
        with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
            x, grid = torch.from_numpy(np.concatenate(pixels)).to(args.device), torch.tensor(grids, device=args.device)
            features = torch.cat(model.model.get_image_features(x, grid).pooler_output)
            loss, right = heads.loss(features, torch.from_numpy(np.concatenate(labels)).to(args.device))
        loss.backward()
        team.share_gradients(parts)
        nn.utils.clip_grad_norm_(parts, 1.0)
        optimizer.step(min(1, (step + 1) / 60) * (1 - 0.85 * done))
        step += 1
        now = np.array([loss.item(), *right])
        mean = now if mean is None else 0.97 * mean + 0.03 * now
        if step % 50 == 0 and team.rank == 0:
            names = ("kind", "colour", "size", "row", "column", "centre")
            shares = " ".join(f"{name} {x:.3f}" for name, x in zip(names, mean[1:], strict=True))
            print(f"tower {step} {time.time() - start:.0f} s loss {mean[0]:.3f} right: {shares}", flush=True)


def joint_loss(
    model: nn.Module,
    heads: TokenHeads,
    batch: dict[str, torch.Tensor],
    args: argparse.Namespace,
    done: float,
    means: dict[str, float],
) -> torch.Tensor:
    """Return the loss of a batch, answers and what lies under vision tokens; its parts go into the running means."""
    with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
        logits, places, features = forward(model, batch)
        loss = answer_loss(logits, places, batch)
        means["loss"] = 0.98 * means.get("loss", loss.item()) + 0.02 * loss.item()
        if features is not None:
            aux, right = heads.loss(features, batch["labels"])
            means["aux"] = 0.98 * means.get("aux", aux.item()) + 0.02 * aux.item()
            means["kind"] = 0.98 * means.get("kind", right[0]) + 0.02 * right[0]
            loss = loss + 0.3 * (1 - 0.7 * done) * aux
    return loss


def keep_all(model: nn.Module, heads: TokenHeads, averages: Averages, out: Path) -> None:
    """Write the checkpoint, and the state that `--resume` takes."""
    save(model, out, averages.values)
    torch.save({"model": model.state_dict(), "heads": heads.state_dict()}, out / "state.pt")


def train_all(
    model: nn.Module,
    heads: TokenHeads,
    tokenizer: sentencepiece.SentencePieceProcessor,
    args: argparse.Namespace,
    rng: random.Random,
    seconds: float,
    team: Team,
) -> None:
    """Train everything together; worker 0 reports, examines and saves."""
    tower = [p for n, p in model.named_parameters() if "vision_tower" in n or "resampler" in n]
    rest = [p for n, p in model.named_parameters() if not ("vision_tower" in n or "resampler" in n) and p.requires_grad]
    optimizer = Optimizer(
        [(rest, 1.0), ([*tower, *heads.parameters()], 0.3)], args.rate, (model.model.get_input_embeddings().weight,)
    )
    balance, averages = Balance(model), Averages(model)
    exam = evaluation_rows(tokenizer, 64, seed=2_000_000_001)
    start = report = saved = time.time()
    means: dict[str, float] = {}
    source = None
    for step in range(10**9):
        done = team.agree((time.time() - start) / seconds)
        if done >= 1:
            break
        if source is None or (step % 200 == 0 and done < 0.5):
            side_max = world.SIDE_MAX if args.resume else round(224 + (world.SIDE_MAX - 224) * min(1, done * 2.5))
            source = batches(tokenizer, rng, args.batch, side_max, args.clips)
        joint_loss(model, heads, collate(next(source), args.device), args, done, means).backward()
        team.share_gradients([*rest, *tower, *heads.parameters()])
        nn.utils.clip_grad_norm_([*rest, *tower], 1.0)
        optimizer.step(min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * done)))
        balance.step(1e-3 * (1 - done), team)
        if step % 4 == 0:
            averages.update(step)
        now = time.time()
        if team.rank > 0:
            continue
        if step % 50 == 0:
            print(f"all {step} {now - start:.0f} s " + " ".join(f"{k} {v:.3f}" for k, v in means.items()), flush=True)
        if now - report > 300:
            report = now
            with averages.in_place():
                shares = exact_shares(model, exam, args.device, args.amp)
            balance.loads.clear()
            print(f"exact {step} {exam_line(shares)}", flush=True)
        if now - saved > 420:
            saved = now
            keep_all(model, heads, averages, args.out)
    if team.rank == 0:
        keep_all(model, heads, averages, args.out)


def work(rank: int, args: argparse.Namespace, meeting_point: str) -> None:
    """Run one worker of the team from the first step to the last."""
    if args.workers > 1:
        torch.set_num_threads(1)
    team = Team(rank, args.workers, meeting_point)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(HERE / "tokenizer.model"))
    rng = random.Random(args.seed * 1000 + rank)
    modeling_ernie4_5_vl_moe.Ernie4_5_VLMoeMoeExperts.forward = experts_forward
    model = make_model(tokenizer, args.seed).to(args.device)
    heads = TokenHeads(recipe.TEXT_CONFIG["hidden_size"]).to(args.device)
    seconds = args.minutes * 60
    args.out.mkdir(parents=True, exist_ok=True)
    if args.resume:
        state = torch.load(args.resume)
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
    if args.tower_share > 0:
        train_tower(model, heads, args, rng, seconds * args.tower_share, team)
        if rank == 0:
            torch.save({"model": model.state_dict(), "heads": heads.state_dict()}, args.out / "tower.pt")
    if args.tower_share < 1:
        train_all(model, heads, tokenizer, args, rng, seconds * (1 - args.tower_share), team)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--minutes", type=float, default=64.0, help="wall-clock budget")
    parser.add_argument("--tower-share", type=float, default=0.1, help="share of the budget for the tower alone")
    parser.add_argument("--tower-rate", type=float, default=2e-3)
    parser.add_argument(
        "--patches", type=int, default=1600, help="patches per batch and worker while the tower is alone"
    )
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--batch", type=int, default=12, help="rows per batch and worker")
    parser.add_argument("--clips", type=float, default=0.25, help="batches of clips per four batches of pictures")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, help="processes (default: 1 on cuda, 2 on cpu)")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    parser.add_argument("--resume", type=Path, help="a state to go on from")
    args = parser.parse_args()
    args.workers = args.workers or (1 if args.device == "cuda" else 2)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (args, f"{folder}/meet"), nprocs=args.workers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
