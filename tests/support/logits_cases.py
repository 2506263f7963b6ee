"""The prompts of the logits tests: fixed texts, and pictures from a seed, of sizes that the processor must change."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tiny_vocabulary import pieces, token_id


@dataclass(frozen=True)
class Case:
    """`parts`: texts and, for pictures, merged grids (rows, columns); `sizes`: heights and widths of the pictures."""

    name: str
    checkpoint: str
    parts: tuple[str | tuple[int, int], ...]
    sizes: tuple[tuple[int, int], ...] = ()
    seed: int = 0  # of the pictures; chosen so that no step of the greedy way is nearly a tie

    def images(self) -> list[np.ndarray]:
        """Shapes: (height, width, 3) uint8 each."""
        return [picture(height, width, seed=self.seed + i) for i, (height, width) in enumerate(self.sizes)]

    def n_positions(self) -> int:
        """How far the prompt moves the position: a picture takes as many as its longer side, START and END one each."""
        return sum(len(encode(part)) if isinstance(part, str) else max(part) + 2 for part in self.parts)

    def input_ids(self) -> list[int]:
        """What the reference processor makes: START, placeholders, END around nothing else."""
        ids: list[int] = []
        for part in self.parts:
            if isinstance(part, str):
                ids += encode(part)
            else:
                ids += [
                    token_id("<|IMAGE_START|>"),
                    *[token_id("<|IMAGE_PLACEHOLDER|>")] * (part[0] * part[1]),
                    token_id("<|IMAGE_END|>"),
                ]
        return ids


TEXT = "User: What is in the picture? 42 stars\nAssistant: a large red"
WHICH = "Which picture has more shapes?\nAssistant: "
ASK = "What is in the picture?\nAssistant: "

# Name -> options of `checkpoints.write_checkpoint`. A tied random model repeats its last token for ever, so most are
# untied; seeds are chosen so that no step of the greedy way is nearly a tie.
CHECKPOINTS: dict[str, dict] = {
    "dense": {"kind": "dense", "tied": False, "seed": 1},
    "dense_tied": {"kind": "dense", "tied": True, "seed": 1},
    "moe": {"kind": "moe", "tied": False, "seed": 2},
    "vl": {"kind": "vl", "tied": False},
    "vl_tied": {"kind": "vl", "tied": True, "seed": 1},
}

# Grids are not square and differ, so that swapped axes or pictures show. Sizes: 100x170 becomes 112x168, 50x150 becomes
# 56x140, 80x70 (2.5 factors wide, rounded to even) becomes 84x56. All grow in height and shrink in width: there every
# Pillow resamples rows first, as mtmd does; elsewhere Pillow 13 resamples columns first (Pillow 11 does not), which
# changes single levels, and a random network makes much of a level.
CASES = (
    Case("dense_text", "dense", (TEXT,)),
    Case("dense_tied_text", "dense_tied", (TEXT,)),
    Case("moe_text", "moe", (TEXT,)),
    Case("vl_text", "vl", (TEXT,)),
    Case("vl_image", "vl", ("User: Picture 1:", (4, 6), ASK), ((100, 170),), seed=20),
    Case(
        "vl_two_images", "vl", ("User: Picture 1:", (2, 5), "Picture 2:", (3, 2), WHICH), ((50, 150), (80, 70)), seed=12
    ),
    Case("vl_tied_image", "vl_tied", ("User: Picture 1:", (4, 6), ASK), ((100, 170),)),
)


def picture(height: int, width: int, *, seed: int) -> np.ndarray:
    """Smooth waves with noise: colours differ along both axes, and resampling matters.

    Shapes: -> (height, width, 3) uint8
    """
    rng = np.random.Generator(np.random.PCG64(seed + 100))
    y, x = np.mgrid[0:height, 0:width] / 16.0
    waves = np.stack([np.sin(x + seed) + y / 8, np.cos(y) + x / 8, np.sin(x * 0.7 - y)], axis=-1)
    return np.clip(128 + 60 * waves + rng.integers(-20, 21, (height, width, 3)), 0, 255).astype(np.uint8)


def encode(text: str) -> list[int]:
    """Greedy longest match over the vocabulary. Any ids will do for logits; this is not how the tokenizer splits."""
    table = {piece: i for i, (piece, _, _) in enumerate(pieces())}
    text, ids = text.replace(" ", "\u2581"), []
    while text:
        n = next(n for n in range(min(len(text), 24), 0, -1) if text[:n] in table)
        ids.append(table[text[:n]])
        text = text[n:]
    return ids
