"""The vocabulary of a tokenizer.json: pieces, scores and types for llama.cpp's tokenizer, or why it cannot have them.

transformers 5 saves nothing else. The file ranks merges of two pieces; llama.cpp merges any two whose sum is a piece,
best score first. Both give the same ids where the merges of each piece stand together and none is left out, as in every
tokenizer.json that was made from a sentencepiece model. Anything else is refused by name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pyllamaernie.convert.sentencepiece_model import Pieces
from pyllamaernie.errors import TokenizerError
from pyllamaernie.gguf.file import TokenType

log = logging.getLogger("pyllamaernie.convert")

BLANK = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def read_tokenizer_json(path: Path, content: Mapping[str, Any]) -> Pieces:
    """Raises: TokenizerError for a file of another shape, and for merges that llama.cpp would not do."""
    try:
        return _read(path, content)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise TokenizerError(f"{path}: not a tokenizer.json as transformers writes it ({error!r})") from error


def json_adds_prefix(path: Path, content: Mapping[str, Any]) -> bool:
    """Whether a blank goes before each stretch of text. Raises: TokenizerError for a file of another shape."""
    try:
        return _adds_prefix(path, list(_steps(content)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TokenizerError(f"{path}: not a tokenizer.json as transformers writes it ({error!r})") from error


def _read(path: Path, content: Mapping[str, Any]) -> Pieces:
    model = content["model"]
    if model.get("type", "BPE") != "BPE" or not model.get("byte_fallback"):
        kind = f"{model.get('type')} with{'' if model.get('byte_fallback') else 'out'} byte fallback"
        raise TokenizerError(
            f"{path}: model {kind}; ERNIE's is BPE with byte fallback, made from a sentencepiece model"
        )
    ids: dict[str, int] = model["vocab"]
    texts = sorted(ids, key=ids.__getitem__)
    if [ids[text] for text in texts] != list(range(len(texts))):
        raise TokenizerError(f"{path}: the ids of its {len(texts)} pieces are not 0 .. {len(texts) - 1}")
    steps = list(_steps(content))
    added = {entry["content"]: bool(entry.get("special")) for entry in content.get("added_tokens") or []}
    whole = {*added, *_isolated(path, steps)}
    merges = [_pair(merge) for merge in model["merges"]]
    ranks = _ranks(path, merges)
    _check_complete(path, ids, merges, whole)
    rows = []
    for i, text in enumerate(texts):
        piece = TokenType.NORMAL
        if _BYTE.fullmatch(text):
            piece = TokenType.BYTE
        elif text == (model.get("unk_token") or "<unk>"):
            piece = TokenType.UNKNOWN
        elif text in whole:
            piece = TokenType.CONTROL if added.get(text) else TokenType.USER_DEFINED
        score = -float(ranks.get(text, len(ranks) + i)) if piece == TokenType.NORMAL else 0.0
        rows.append((text, score, piece))
    return Pieces(path, rows, _adds_prefix(path, steps), _removes_blanks(steps))


def _pair(merge: Any) -> tuple[str, str]:
    """Two pieces: a list since transformers 4.45, before it a string with a blank between them."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _ranks(path: Path, merges: list[tuple[str, str]]) -> dict[str, int]:
    """The pieces that merges make, in their order."""
    ranks: dict[str, int] = {}
    last = None
    for left, right in merges:
        text = left + right
        if text != last and text in ranks:
            raise TokenizerError(
                f"{path}: merges to {text!r} do not stand together, which llama.cpp's scores cannot say; "
                "put the tokenizer.model that it was made from beside it"
            )
        ranks.setdefault(text, len(ranks))
        last = text
    return ranks


def _check_complete(path: Path, ids: Mapping[str, int], merges: list[tuple[str, str]], whole: Collection[str]) -> None:
    """Refuses when llama.cpp would merge two pieces that the file does not."""
    known = set(merges)
    for text in ids:
        if text in whole or _BYTE.fullmatch(text):
            continue
        for cut in range(1, len(text)):
            pair = text[:cut], text[cut:]
            if pair in known or any(part not in ids or part in whole for part in pair):
                continue
            raise TokenizerError(
                f"{path}: no merge of {pair[0]!r} and {pair[1]!r} to {text!r}, as in a sentencepiece model; "
                "llama.cpp's tokenizer would merge them"
            )


def _steps(content: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What is done to a text before it is merged, sequences unfolded."""
    left = [content.get("normalizer"), content.get("pre_tokenizer")]
    while left:
        step = left.pop(0)
        if step is None:
            continue
        if step["type"] == "Sequence":
            left[:0] = step["normalizers"] if "normalizers" in step else step["pretokenizers"]
        else:
            yield step


def _isolated(path: Path, steps: list[Mapping[str, Any]]) -> set[str]:
    """Pieces that are cut out of a text whole: sentencepiece's user-defined ones, which transformers 5 writes so."""
    found = set()
    for step in steps:
        if step["type"] != "Split":
            continue
        pattern = step["pattern"].get("Regex")
        parts = re.findall(r"(?:\\.|[^|\\])+", pattern, re.S) if pattern else [re.escape(step["pattern"]["String"])]
        texts = [re.sub(r"\\(.)", r"\1", part, flags=re.S) for part in parts]
        if step.get("behavior") != "Isolated" or (pattern or parts[0]) != "|".join(map(re.escape, texts)):
            raise TokenizerError(f"{path}: texts are split at {pattern!r}; llama.cpp's tokenizer does not do that")
        found.update(texts)
    return found


def _adds_prefix(path: Path, steps: list[Mapping[str, Any]]) -> bool:
    """Whether a blank goes before each stretch of text; llama.cpp knows always and never."""
    adds = False
    for step in steps:
        if step["type"] == "Prepend":
            adds = True
        elif step["type"] == "Metaspace":
            scheme = step.get("prepend_scheme", "always")
            adds = adds or scheme != "never"
            if scheme == "first":
                log.warning("%s: a blank goes before the first text only; llama.cpp adds it behind markers too", path)
        elif step["type"] == "ByteLevel":
            raise TokenizerError(f"{path}: byte-level pieces; ERNIE's are sentencepiece's")
    return adds


def _removes_blanks(steps: list[Mapping[str, Any]]) -> bool:
    return any(step["type"] == "Replace" and "{2,}" in str(step.get("pattern", {}).get("Regex")) for step in steps)
