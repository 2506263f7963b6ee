"""A 500-piece sentencepiece BPE model for the test checkpoints, built by hand: no trainer, no protobuf package.

Layout as ERNIE's: <unk>, <s>, </s>, 256 byte pieces, user-defined markers and digits, then merges learned from a fixed
text and characters. Ids 500..511 of the 512 embedding rows stay without a piece, like the padding of the real models.
"""

from __future__ import annotations

import struct
from collections import Counter
from functools import lru_cache
from itertools import pairwise

N_PIECES = 500
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BPE = 2

MARKERS = (
    "<|begin_of_sentence|>",
    "<|end_of_sentence|>",
    "<mask:1>",
    "<think>",
    "</think>",
    "<|IMAGE_PLACEHOLDER|>",
    "<|IMAGE_START|>",
    "<|IMAGE_END|>",
    "<|VIDEO_START|>",
    "<|VIDEO_END|>",
    "<|VIDEO_PLACEHOLDER|>",
)
CHARACTERS = "\u2581\nabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:;!?'\"()-/<>|_éüß文"

# Our own sentences; they only have to make some merges more frequent than others.
CORPUS = """
The picture shows a large red circle at the top left and a small blue square at the centre.
How many shapes are there in the picture? There are three shapes in the picture.
What colour is the circle? The circle is red. Where is the star? The star is at the bottom right.
Is there a green triangle? There is a green triangle in the middle left of the picture.
User: Picture : What is in the picture? Assistant: a small yellow star at the top centre and a large purple square.
A question and an answer, then another question. The other picture has more shapes than the first picture.
"""

# How the text model (False) and the vision-language model (True) put a conversation into a prompt.
CHAT_TEMPLATE = {
    vision: (
        "{{- '<|begin_of_sentence|>' -}}{%- set count = namespace(value=0) -%}{%- for m in messages -%}"
        "{%- if m['role'] == 'system' -%}{{- m['content'] + '\n' -}}"
        "{%- elif m['role'] == 'user' -%}{{- 'User: ' -}}{%- if m['content'] is string -%}{{- m['content'] -}}"
        "{%- else -%}"
        "{%- for part in m['content'] -%}{%- if part['type'] == 'text' -%}{{- part['text'] -}}"
        + (
            "{%- elif part['type'] in ('image', 'image_url') -%}{%- set count.value = count.value + 1 -%}"
            "{{- 'Picture ' ~ count.value ~ ':<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' -}}"
            if vision
            else ""
        )
        + "{%- endif -%}{%- endfor -%}{%- endif -%}"
        "{%- elif m['role'] == 'assistant' -%}{{- '\nAssistant: ' + m['content'] -}}"
        "{{- '<|end_of_sentence|>' -}}{%- endif -%}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- '\nAssistant: ' -}}{%- endif -%}"
    )
    for vision in (False, True)
}


@lru_cache(maxsize=1)
def pieces() -> tuple[tuple[str, float, int], ...]:
    """(text, score, type) of every piece, by id."""
    out: list[tuple[str, float, int]] = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    out += [(f"<0x{b:02X}>", 0.0, BYTE) for b in range(256)]
    out += [(text, 0.0, USER_DEFINED) for text in MARKERS + tuple("0123456789")]
    merges = _learn_merges(N_PIECES - len(out) - len(CHARACTERS))
    out += [(text, -float(i), NORMAL) for i, text in enumerate(merges)]
    out += [(char, -float(len(merges) + i), NORMAL) for i, char in enumerate(CHARACTERS)]
    assert len(out) == N_PIECES and len({text for text, _, _ in out}) == N_PIECES
    return tuple(out)


def token_id(text: str) -> int:
    """Id of a piece. Raises KeyError when there is none."""
    return {piece: i for i, (piece, _, _) in enumerate(pieces())}[text]


def added_tokens() -> dict[str, dict]:
    """`added_tokens_decoder` as transformers writes it: markers special, digits not."""
    out = {}
    for i, (text, _, kind) in enumerate(pieces()):
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            out[str(i)] = {
                "content": text,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": not text.isdigit(),
            }
    return out


def _learn_merges(count: int) -> list[str]:
    words = Counter("\u2581" + word for line in CORPUS.splitlines() for word in line.split())
    split = {word: list(word) for word in words}
    merges: list[str] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        left, right = max(sorted(pairs), key=pairs.__getitem__)
        for parts in split.values():
            i = 0
            while i + 1 < len(parts):
                if parts[i] == left and parts[i + 1] == right:
                    parts[i : i + 2] = [left + right]
                i += 1
        if left + right not in merges:
            merges.append(left + right)
    return merges


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out + bytes([value]))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _blob(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def sentencepiece_model(
    model_type: int = BPE, *, rows: tuple[tuple[str, float, int], ...] | None = None, prefix: bool = False
) -> bytes:
    """The serialized ModelProto, of other pieces if given. Field numbers: sentencepiece's sentencepiece_model.proto."""
    rows = pieces() if rows is None else rows
    out = b"".join(
        _blob(1, _blob(1, text.encode()) + _varint(2 << 3 | 5) + struct.pack("<f", score) + _number(3, kind))
        for text, score, kind in rows
    )
    trainer = _number(3, model_type) + _number(4, len(rows)) + _number(35, 1)  # byte_fallback
    trainer += _number(40, 0) + _number(41, 1) + _number(42, 2) + _number(43, 2**64 - 1)  # unk, bos, eos, pad = -1
    normalizer = (
        _blob(1, b"identity") + _number(3, prefix) + _number(4, 0) + _number(5, 1)
    )  # prefix, whitespace, escape
    return out + _blob(2, trainer) + _blob(3, normalizer)
