"""What the text MoE reads: text that lies on any machine that builds the package, cut by document. Not a program.

This repository, the pinned llama.cpp and Python's standard library. A document is in one of the parts only: training,
calibration, selection or test.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path

from paths import ROOT

import numpy as np
from tiny_vocabulary import sentencepiece_model

SUFFIXES = (".py", ".md", ".txt", ".h", ".hpp", ".c", ".cpp", ".cuh", ".cu")
PIECE = 6144  # bytes that a document gives to a text at most, so that many documents are in each
PIECE_TRAIN = 9_000
TEXT_BYTES = {"calibration": 400_000, "selection": 60_000, "test": 200_000}
SHARES = {"calibration": 6, "selection": 3, "test": 5}  # of 100 documents; the others train


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


def write_texts(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Writes the three texts; the token ids of the training text and of the selection text come back."""
    texts = documents()
    parts = split(texts)
    folder.mkdir(parents=True, exist_ok=True)
    for part, n_bytes in TEXT_BYTES.items():
        (folder / f"{part}.txt").write_text(held_out(texts, parts[part], n_bytes), encoding="ascii")
    selection = {"selection": (folder / "selection.txt").read_text(encoding="ascii")}
    return tokens(texts, parts["train"]), tokens(selection, ["selection"], None)
