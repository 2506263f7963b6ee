"""Small random GGUF files for tests, made once per test run by our own converter, and prompts for them."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import checkpoints
import numpy as np
from tiny_vocabulary import token_id

from pyllamaernie.convert import convert

QUESTION = "What is in the picture?"
EXACT = {"type_k": "f32", "type_v": "f32", "n_ctx": 1024, "n_threads": 1}  # of Llama: nothing is rounded but weights


@functools.cache
def folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="pyllamaernie-test-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def subfolder(name: str) -> Path:
    path = folder() / name
    path.mkdir(exist_ok=True)
    return path


def random_words(path: Path, n: int) -> Path:
    """A text of `n` words that the vocabulary knows."""
    words = "red blue circle star picture what is the in Hello large small 42 17 green User Assistant".split()
    path.write_text(" ".join(np.random.default_rng(7).choice(words, n)) + "\n")
    return path


@functools.cache
def gguf(kind: str) -> Path:
    """The F32 file of one kind; for `vl` its mmproj lies beside it. Untied, so that answers vary."""
    home = folder() / kind
    source = checkpoints.write_checkpoint(home / "hf", kind, tied=False)
    return convert(source, home / f"{kind}.gguf", type="f32").model


def image_ids(rows: int, columns: int) -> list[int]:
    """START, placeholders, END of one picture whose merged grid is rows x columns."""
    placeholders = [token_id("<|IMAGE_PLACEHOLDER|>")] * (rows * columns)
    return [token_id("<|IMAGE_START|>"), *placeholders, token_id("<|IMAGE_END|>")]


def picture(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    """Shapes: -> (height, width, 3) uint8, blocks of colour with noise."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (3, 4, 3))
    rows, columns = np.arange(height) * 3 // height, np.arange(width) * 4 // width
    return np.clip(blocks[rows][:, columns] + rng.integers(-9, 10, (height, width, 3)), 0, 255).astype(np.uint8)


def question(image: object, text: str = QUESTION) -> list[dict]:
    """One user message with a picture before the text."""
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
