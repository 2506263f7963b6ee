"""Our runtime against transformers on random checkpoints of every shape class.

`python -m tests.support.parity --table` prints the table of docs/parity.md.

Each row is a checkpoint, a prompt and a type: our logits of the whole prompt, then 64 greedy tokens decoded one by one,
against one pass of transformers over the same ids. Where that pass has our token on top at every step, greedy
decoding there gives the same tokens.
"""

# ruff: noqa: E402  the path to the installed package is set before the imports
from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
if __name__ == "__main__":  # the installed package, not the sources beside this folder, which have no native module
    sys.path[:] = [str(HERE), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]

import checkpoints
import numpy as np
import page
from logits_cases import ASK, TEXT, WHICH, encode, picture
from page import line
from shape_classes import CLASSES
from tiny_vocabulary import token_id

N_GREEDY = 64
TYPES = ("f32", "bf16")
BAR_KL = {False: 1e-6, True: 2e-5}  # mean KL of float32 rows, without and with media
PAGE = ROOT / "docs" / "parity.md"


@dataclass(frozen=True)
class Medium:
    """A picture (n_frames 0), resized as the processor likes, or a video whose frames have their final size."""

    height: int
    width: int
    rows: int
    columns: int
    n_frames: int = 0

    @property
    def grid(self) -> tuple[int, int, int]:
        return max(1, self.n_frames // 2), self.rows, self.columns

    def ids(self) -> list[int]:
        kind = "VIDEO" if self.n_frames else "IMAGE"
        t, h, w = self.grid
        inside = [token_id(f"<|{kind}_PLACEHOLDER|>")] * (t * h * w)
        return [token_id(f"<|{kind}_START|>"), *inside, token_id(f"<|{kind}_END|>")]

    def pixels(self, seed: int) -> np.ndarray:
        """Shapes: -> (height, width, 3) uint8, of a video (n_frames, height, width, 3)"""
        if not self.n_frames:
            return picture(self.height, self.width, seed=seed)
        return np.stack([picture(self.height, self.width, seed=seed + i) for i in range(self.n_frames)])


@dataclass(frozen=True)
class Prompt:
    """Texts and media in their order."""

    name: str
    parts: tuple[str | Medium, ...]

    @property
    def media(self) -> list[Medium]:
        return [part for part in self.parts if isinstance(part, Medium)]

    def input_ids(self) -> list[int]:
        return [i for part in self.parts for i in (encode(part) if isinstance(part, str) else part.ids())]

    def images(self, seed: int) -> list[np.ndarray]:
        return [medium.pixels(seed + 10 * i) for i, medium in enumerate(self.media) if not medium.n_frames]

    def videos(self, seed: int) -> list[np.ndarray]:
        return [medium.pixels(seed + 10 * i) for i, medium in enumerate(self.media) if medium.n_frames]

    def n_positions(self) -> int:
        """How far the prompt moves the position, by Baidu's rule."""
        text = sum(len(encode(part)) for part in self.parts if isinstance(part, str))
        return text + sum(2 + max(medium.grid) for medium in self.media)


# Sizes that Pillow resamples rows first (see logits_cases). In the clip Baidu's and transformers' positions agree.
WIDE, LONG, SMALL = Medium(100, 170, 4, 6), Medium(50, 150, 2, 5), Medium(80, 70, 3, 2)
CLIP = Medium(56, 84, 2, 3, n_frames=4)
PROMPTS = (
    Prompt("text", (TEXT,)),
    Prompt("image", ("User: Picture 1:", WIDE, ASK)),
    Prompt("two images", ("User: Picture 1:", LONG, "Picture 2:", SMALL, WHICH)),
    Prompt("video", ("User: Video 1:", CLIP, ASK)),
    Prompt("image, text, image", ("User: Picture 1:", SMALL, "How many stars?Picture 2:", LONG, WHICH)),
)


@dataclass(frozen=True)
class Row:
    """One line of the table. `own_kl`: transformers' bfloat16 against its float32, for scale."""

    name: str
    prompt: str
    type: str
    n_tokens: int
    error: float  # largest, over the standard deviation of the reference's logits
    top1: float
    greedy: int
    kl: float
    margin: float  # smallest of the generated steps, over the same deviation
    own_kl: float | None = None

    def ok(self) -> bool:
        return self.type != "f32" or (self.kl <= BAR_KL[self.prompt != "text"] and self.greedy == N_GREEDY)

    def cells(self) -> list[str]:
        own = "" if self.own_kl is None else f"{self.own_kl:.1e}"
        return [
            self.name, self.prompt, self.type, str(self.n_tokens), f"{self.error:.1e}", f"{100 * self.top1:.1f} %",
            f"{self.greedy} of {N_GREEDY}", f"{self.kl:.1e}", own,
        ]  # fmt: skip


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def mean_kl(theirs: np.ndarray, ours: np.ndarray) -> float:
    """Mean KL divergence of our distributions from theirs, in nats."""
    p, q = log_softmax(theirs), log_softmax(ours)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def our_logits(llm, prompt: Prompt, seed: int, n_greedy: int) -> tuple[list[int], np.ndarray]:
    """The prompt's ids with the greedy continuation, and the logits of every one of them.

    Shapes: -> (n_tokens + n_greedy, n_vocab) float32
    """
    ids = prompt.input_ids()
    scorer, at = llm.scorer(), prompt.n_positions()
    media = [prompt.images(seed)] + ([prompt.videos(seed)] if prompt.videos(seed) else [])
    rows = [llm.logits(ids, *media)]
    for i in range(n_greedy):
        ids.append(int(rows[-1][-1].argmax()))
        rows.append(scorer.session.decode_tokens(np.array([ids[-1]], np.int32), at + i))
    return ids, np.concatenate(rows)


def compare(
    name: str, prompt: Prompt, kind: str, ids: Sequence[int], ours: np.ndarray, theirs: np.ndarray, n_greedy: int
) -> Row:
    """A row of ours against the reference's logits of the same ids."""
    first = len(ids) - n_greedy
    right = theirs.argmax(-1)[first - 1 : -1] == np.asarray(ids[first:])
    second, best = np.sort(theirs[first - 1 : -1], axis=-1)[:, -2:].T
    return Row(
        name, prompt.name, kind, first,
        error=float(np.abs(ours - theirs).max() / theirs.std()),
        top1=float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
        greedy=int(right.cumprod().sum()),
        kl=mean_kl(theirs, ours),
        margin=float((best - second).min() / theirs.std()),
    )  # fmt: skip


def rows(
    root: Path, wanted: Callable[[str, str, str], bool] = lambda *_: True, *, seed: int = 0, n_greedy: int = N_GREEDY
) -> Iterator[Row]:
    """Every row that is wanted (by class, prompt and type), made under `root`."""
    from dataclasses import replace

    import reference
    import torch

    from pyllamaernie import Llama
    from pyllamaernie.convert import convert

    for name, options in CLASSES.items():
        for kind in TYPES:
            prompts = [p for p in PROMPTS if (options["kind"] == "vl" or not p.media) and wanted(name, p.name, kind)]
            if not prompts:
                continue
            folder = root / f"{name}-{kind}"
            checkpoints.write_checkpoint(folder, dtype=kind.upper(), seed=seed, **options)
            path = convert(folder, root / f"{name}-{kind}.gguf", type=kind).model
            cache = {"type_k": "f32", "type_v": "f32"} if kind == "f32" else {}
            with Llama(path, n_ctx=512, n_threads=1, **cache) as llm:  # too small for two
                for prompt in prompts:
                    ids, ours = our_logits(llm, prompt, seed, n_greedy)
                    given = folder, ids, prompt.images(seed)
                    theirs = reference.logits(*given, videos=prompt.videos(seed))
                    row = compare(name, prompt, kind, ids, ours, theirs, n_greedy)
                    if kind == "bf16":
                        own = reference.logits(*given, dtype=torch.bfloat16, videos=prompt.videos(seed))
                        row = replace(row, own_kl=mean_kl(theirs, own))
                    yield row


HEAD = (
    "checkpoint", "prompt", "type", "tokens", "largest error / deviation", "same top token", "greedy tokens equal",
    "mean KL", "its own bfloat16's KL",
)  # fmt: skip


def versions() -> str:
    from importlib.metadata import version

    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "numpy", "Pillow"))
    pin = json.loads((ROOT / "vendor" / "llama.cpp.json").read_text(encoding="utf-8"))["commit"][:9]
    return f"llama.cpp {pin}, {packages}, Python {platform.python_version()}, {platform.machine()}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.parity", description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help=f"all rows, and write them to {PAGE.name}")
    parser.add_argument("--row", action="append", default=[], help="only rows with this text; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="of weights and pictures (default: 0)")
    args = parser.parse_args()
    if not args.table and not args.row:
        parser.error("give --table or --row TEXT")

    def wanted(name: str, prompt: str, kind: str) -> bool:
        return all(text in f"{name} {prompt} {kind}" for text in args.row)

    table = [line(HEAD), line(["---"] * len(HEAD))]
    print("\n".join(table))
    good, started = True, time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        for row in rows(Path(root), wanted, seed=args.seed):
            table.append(line(row.cells()))
            good = good and row.ok()
            print(table[-1], "" if row.ok() else "MISSES ITS BAR", f"margin {row.margin:.1e}", flush=True)
    if args.table and not args.row:
        made = f"Made on {datetime.date.today():%Y-%m-%d} with\n{versions()}."
        page.write(PAGE, "table", [made, "", *table])
    print(f"{time.monotonic() - started:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
