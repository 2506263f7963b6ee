"""How many questions about unseen pictures the model answers right while it is trained, as its likeliest tokens."""

from __future__ import annotations

import random

import recipe
import sentencepiece
import torch
from network import collate, forward
from recipe import Row, world
from torch import nn


def evaluation_rows(tokenizer: sentencepiece.SentencePieceProcessor, n: int, seed: int) -> list[Row]:
    rng = random.Random(seed)
    rows = [recipe.picture_row(tokenizer, rng, None, plain=True) for _ in range(n)]
    rows += [recipe.pair_row(tokenizer, rng, [None, None]) for _ in range(n // 8)]
    rows += [recipe.clip_row(tokenizer, rng, 8, world.random_canvas(rng, 140, 168)) for _ in range(n // 8)]
    return sorted(rows, key=lambda row: len(row.ids))


@torch.no_grad()
def exact_shares(model: nn.Module, rows: list[Row], device: str, amp: bool) -> dict[str, tuple[int, int]]:
    """Return per sort of question (answers right, answers). Right: every token is the likeliest after the true ones,
    which is when a greedy answer is right as a whole."""
    right: dict[str, list[int]] = {}
    for i in range(0, len(rows), 16):
        part = rows[i : i + 16]
        batch = collate(part, device)
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            logits, places, _ = forward(model, batch)
        good = (logits.argmax(-1) == batch["ids"][places]).cpu().numpy()
        which = (places[0].cpu().numpy(), batch["sort"][places].cpu().numpy())
        for r, row in enumerate(part):
            for s, (sort, _, _) in enumerate(row.questions):
                right.setdefault(sort, []).append(int(good[(which[0] == r) & (which[1] == s + 1)].all()))
    return {sort: (sum(v), len(v)) for sort, v in sorted(right.items())}


def exam_line(shares: dict[str, tuple[int, int]]) -> str:
    """The mean over the sorts of question about one picture, and all counts."""
    single = [shares[sort] for sort in recipe.SORTS]
    total = sum(a / b for a, b in single) / len(single)
    return f"mean {total:.3f} " + " ".join(f"{k} {a}/{b}" for k, (a, b) in shares.items())
