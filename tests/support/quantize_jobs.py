"""What tests of the quantizer set up: a model whose rows are whole blocks of every type, recipes, interrupted jobs.

Each file is made once per test run, in the folder of `gguf_models`.
"""

from __future__ import annotations

import functools
import random
import subprocess
import time
from pathlib import Path

import checkpoints
import gguf_models
import numpy as np
import verb
from checkpoint_shapes import Shape
from gguf_contents import write_imatrix

from pyllamaernie.convert import convert
from pyllamaernie.quant.journal import journal_path, part_path
from pyllamaernie.quant.source import gguf_source

SHAPE = Shape(
    n_vocab=512, n_embd=256, n_head=4, n_head_kv=1, head_dim=64, n_layer=2, n_ff=256, n_expert=3, n_expert_used=2,
    n_shared=1, n_ff_exp=256,
)  # fmt: skip
FAST = ["Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q3_K", "IQ3_S", "IQ4_XS", "MXFP4", "BF16"]  # quickly encoded


def home() -> Path:
    return gguf_models.subfolder("quantize")


@functools.cache
def folder() -> Path:
    """The checkpoint, of the kind `moe`."""
    return checkpoints.write_checkpoint(home() / "hf", "moe", shape=SHAPE, tied=False)


@functools.cache
def model() -> Path:
    """Its file in BF16."""
    return convert(folder(), home() / "bf16.gguf", type="bf16").model


@functools.cache
def imatrix() -> Path:
    """Random importance of every matrix; in each expert tensor nothing reached one expert."""
    rng = np.random.default_rng(3)
    data = {}
    for w in gguf_source(model()).weights:
        if len(w.shape) > 1:
            counts = rng.integers(1, 900, (w.n_matrices, 1)).astype(np.float32)
            counts[-1] = 0 if w.n_matrices > 1 else counts[-1]
            sums = rng.lognormal(size=(w.n_matrices, w.n_cols)).astype(np.float32) * counts
            for suffix, values in (("in_sum2", sums), ("counts", counts)):
                data[f"{w.name}.{suffix}"] = values[0] if len(values) == 1 else values
    keys = {
        "general.type": ("str", "imatrix"),
        "imatrix.datasets": ("list", ["a text"]),
        "imatrix.chunk_count": ("u32", 7),
        "imatrix.chunk_size": ("u32", 128),
    }
    return write_imatrix(home() / "imatrix.gguf", data, keys)


@functools.cache
def text() -> Path:
    return gguf_models.random_words(home() / "text.txt", 1500)


def random_types(model: Path, seed: int, choices: list[str]) -> dict[str, str]:
    """A recipe: for every matrix that can be quantized one of at most five types out of `choices`."""
    rng = random.Random(seed)
    some = rng.sample(choices, min(5, len(choices)))
    return {
        w.name: rng.choice(some)
        for w in gguf_source(model).weights
        if len(w.shape) > 1 and w.name.endswith(".weight") and "_norm" not in w.name and "gate_inp" not in w.name
    }


def leftovers(output: Path) -> list[Path]:
    """Which of the three files of a job exist: the output, the unfinished one, its journal."""
    return [path for path in (output, part_path(output), journal_path(output)) if path.exists()]


def started(output: Path, *words: object, n_lines: int, **options: object) -> subprocess.Popen:
    """`pyllamaernie quantize` as a child that writes `output`; its journal has `n_lines` lines, or it has ended."""
    process = subprocess.Popen(verb.command("quantize", *words, "-o", output), stdout=subprocess.DEVNULL, **options)
    while process.poll() is None and _journal_lines(output) < n_lines:
        time.sleep(0.002)
    return process


def _journal_lines(output: Path) -> int:
    """-1 where there is none."""
    try:
        return journal_path(output).read_bytes().count(b"\n")
    except FileNotFoundError:
        return -1
