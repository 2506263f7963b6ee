"""Whether files have one vocabulary, so that their rows can be compared: by their headers, then by their tokens."""

from __future__ import annotations

from dataclasses import dataclass

from pyllamaernie.errors import InputError
from pyllamaernie.gguf.header import Header
from pyllamaernie.llama.llama import Llama

SAME = "only files with the same vocabulary can be compared"


@dataclass(frozen=True)
class Vocabulary:
    """What the other files are checked against: the bytes of every token, and `ids`, the tokens of the text if any."""

    path: str
    pieces: list[bytes]
    ids: list[int] | None


def read_vocabulary(llm: Llama, words: str | None) -> Vocabulary:
    """The vocabulary of a loaded model and how it cuts a text."""
    ids = None if words is None else llm.tokenize(words, add_bos=True)
    pieces = [llm.detokenize([i], special=True) for i in range(llm.n_vocab())]
    return Vocabulary(llm.model_path, pieces, ids)


def check_headers(reference: Header, other: Header) -> None:
    """Raises: InputError when the headers alone tell that the vocabularies differ."""
    for key in ("tokenizer.ggml.model", "tokenizer.ggml.tokens"):
        ours, theirs = (h.metadata.get(key) for h in (reference, other))
        if ours != theirs:
            what = "tokens" if key.endswith("tokens") else "as its tokenizer"
            raise InputError(f"{reference.path} has {ours} {what}, {other.path} has {theirs}: {SAME}")


def check_tokens(reference: Vocabulary, other: Vocabulary) -> None:
    """Raises: InputError for the first token that differs, in the vocabulary or in how the text is cut."""
    ours, theirs = reference.pieces, other.pieces
    if len(theirs) != len(ours):
        raise InputError(f"{reference.path} has {len(ours)} tokens, {other.path} has {len(theirs)}: {SAME}")
    bad = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
    if bad is not None:
        raise InputError(
            f"token {bad} is {ours[bad]!r} in {reference.path} and {theirs[bad]!r} in {other.path}: {SAME}"
        )
    if other.ids != reference.ids:
        raise InputError(f"{reference.path} and {other.path} cut the text into different tokens: {SAME}")
