"""The vocabulary of a checkpoint as GGUF keys.

Pieces come from the sentencepiece model, or from tokenizer.json where there is no other; which tokens are added, and
under which ids, is transformers' choice (`added_tokens.py`). Follows upstream's sentencepiece path
(`conversion/base.py` at the pin) and differs where that path loses information: piece types, and texts without an id.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyllamaernie.convert.added_tokens import NAMED, AddedToken, added_tokens, named_tokens
from pyllamaernie.convert.chat_templates import chat_template_keys
from pyllamaernie.convert.checkpoint import Checkpoint
from pyllamaernie.convert.sentencepiece_model import Pieces, read_sentencepiece
from pyllamaernie.convert.tokenizer_json import json_adds_prefix, read_tokenizer_json
from pyllamaernie.errors import TokenizerError
from pyllamaernie.gguf.file import Key, TokenType

log = logging.getLogger("pyllamaernie.convert")

MODEL_FILES = ("tokenizer.model", "spm.model", "ernie_token_100k.model")
VOCABULARY_FILES = (*MODEL_FILES, "tokenizer.json")
END_OF_TURN = "<|end_of_sentence|>"
VISIBLE = ("<think>", "</think>")  # special to Hugging Face, but part of the answer that a reasoning parser must see
# transformers loads tokenizer.json of these as a whole; of others it takes the pieces, and tokenizer_config.json rules
_OWN_BACKEND = ("ernie4_5", "ernie4_5_moe")
_NO_MERGE = -1000.0


@dataclass(frozen=True)
class Vocabulary:
    """Token texts, scores and types by id, padded to the rows of the embedding."""

    tokens: list[str]
    scores: list[float]
    types: list[TokenType]
    keys: list[Key]

    def find(self, text: str) -> int | None:
        """The id of a token that is not padding."""
        for i, token in enumerate(self.tokens):
            if token == text and self.types[i] != TokenType.UNUSED:
                return i
        return None


def read_vocabulary(checkpoint: Checkpoint, n_vocab: int) -> Vocabulary:
    """The vocabulary with all `tokenizer.*` keys.

    Raises: TokenizerError when the files are missing, not what llama.cpp can do, or larger than the embedding.
    """
    own_backend = checkpoint.config.get("model_type") in _OWN_BACKEND
    pieces = read_pieces(checkpoint)
    if len(pieces.rows) > n_vocab:
        raise TokenizerError(
            f"{pieces.path}: {len(pieces.rows)} pieces, but the embedding has {n_vocab} rows; the files are of "
            "different models"
        )
    rows = [(text, score, _piece_type(text, kind)) for text, score, kind in pieces.rows]
    has_json = (checkpoint.folder / "tokenizer.json").is_file()
    _add(rows, added_tokens(checkpoint, own_backend=own_backend), renames=not has_json)
    if len(rows) > n_vocab:
        raise TokenizerError(
            f"{checkpoint.folder}: {len(pieces.rows)} pieces and {len(rows) - len(pieces.rows)} added tokens, but the "
            f"embedding has {n_vocab} rows; the first without one is {rows[n_vocab][0]!r}"
        )
    rows += [(f"[PAD{i}]", -10000.0, TokenType.UNUSED) for i in range(len(rows), n_vocab)]
    tokens, scores, types = [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]
    vocabulary = Vocabulary(tokens, scores, types, [])
    vocabulary.keys.extend(
        [
            Key("tokenizer.ggml.model", "str", "llama"),
            Key("tokenizer.ggml.pre", "str", "default"),
            Key("tokenizer.ggml.tokens", "list", tokens),
            Key("tokenizer.ggml.scores", "list", scores),
            Key("tokenizer.ggml.token_type", "list", [int(t) for t in types]),
            *_special_keys(checkpoint, vocabulary),
            *chat_template_keys(checkpoint, has_processor=not own_backend),
            Key("tokenizer.ggml.add_space_prefix", "bool", _adds_prefix(checkpoint, pieces, own_backend)),
        ]
    )
    return vocabulary


def read_pieces(checkpoint: Checkpoint) -> Pieces:
    """The pieces of the sentencepiece model; of tokenizer.json where there is no other, or where it has others.

    Raises: TokenizerError when there is neither, or a file cannot be used.
    """
    folder = checkpoint.folder
    model = next((folder / name for name in MODEL_FILES if (folder / name).is_file()), None)
    path = folder / "tokenizer.json"
    if not path.is_file():
        if model is None:
            raise TokenizerError(
                f"{folder}: no vocabulary; expected one of {', '.join(VOCABULARY_FILES)} beside config.json"
            )
        return read_sentencepiece(model)
    if model is None:
        return read_tokenizer_json(path, checkpoint.json(path.name))
    pieces, ids = read_sentencepiece(model), _json_ids(checkpoint)
    if pieces.ids == ids:
        return pieces
    log.warning("%s: its pieces are not those of %s; the former are taken, as transformers does", path, model.name)
    return read_tokenizer_json(path, checkpoint.json(path.name))


def _json_ids(checkpoint: Checkpoint) -> Any:
    model = checkpoint.json("tokenizer.json").get("model")
    return model.get("vocab") if isinstance(model, dict) else None


def _piece_type(text: str, kind: TokenType) -> TokenType:
    return TokenType.CONTROL if kind == TokenType.USER_DEFINED and _looks_special(text) else kind


def _add(rows: list[tuple[str, float, TokenType]], added: Sequence[AddedToken], *, renames: bool) -> None:
    """Gives each added token its place: that of the piece with its text, or the next one.

    `renames`: one whose file gives it the id of a piece with another text takes that piece's place, as in transformers
    5.24 for text models; for VL models it adds a token, which no row of the embedding was trained for.
    """
    ids = {text: i for i, (text, _, _) in enumerate(rows)}
    n_pieces = len(rows)
    for token in added:
        i = ids.get(token.text)
        if i is None and renames and token.id is not None and token.id < n_pieces:
            i = token.id
            log.warning(
                "token %d: %r in the model, %r in %s; the latter is taken", i, rows[i][0], token.text, token.file
            )
        elif i is None:
            i = len(rows)
            rows.append((token.text, _NO_MERGE, TokenType.UNUSED))
        if token.id not in (None, i):
            log.warning("token %r: id %s in %s, but transformers gives it %d", token.text, token.id, token.file, i)
        if token.strips:
            log.warning("token %r takes the blanks beside it in transformers, but not in llama.cpp", token.text)
        ids[token.text] = i
        if token.id is None and rows[i][2] in (TokenType.CONTROL, TokenType.UNKNOWN):
            continue
        special = (token.special or _looks_special(token.text)) and token.text not in VISIBLE
        text = token.text if special else token.text.replace("\u2581", " ")
        rows[i] = (text, _NO_MERGE, TokenType.CONTROL if special else TokenType.USER_DEFINED)
    for i, (text, score, kind) in enumerate(rows):
        if text in VISIBLE and kind != TokenType.USER_DEFINED:
            rows[i] = (text, score, TokenType.USER_DEFINED)


def _special_keys(checkpoint: Checkpoint, vocabulary: Vocabulary) -> list[Key]:
    """Special ids: config.json's, else those of the named texts; never a BOS or EOS that is added on its own."""
    config = checkpoint.config
    nested = config.get("text_config")
    text_config = nested if isinstance(nested, dict) else {}
    defaults = {"bos": "<s>", "eos": "</s>"}
    named = defaults | (named_tokens(checkpoint) if (checkpoint.folder / "tokenizer.json").is_file() else {})
    found = {}
    for name in NAMED:
        said = config.get(f"{name}_token_id")
        said = text_config.get(f"{name}_token_id") if said is None else said
        i = vocabulary.find(named[name]) if name in named else None
        if isinstance(said, int) and not isinstance(said, bool):
            if said < 0:
                raise TokenizerError(f"{checkpoint.folder / 'config.json'}: {name}_token_id is {said}; correct it")
            if said < len(vocabulary.tokens):
                i = said
            else:
                log.warning("config.json: %s_token_id %d is behind the embedding; it is left out", name, said)
        if i is not None:
            found[name] = i
    end_of_turn = vocabulary.find(END_OF_TURN)
    if end_of_turn is not None:
        found["eot"] = end_of_turn
    keys = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # as GGUF spells them
    return [
        *(Key(f"tokenizer.ggml.{keys.get(name, name)}_token_id", "u32", i) for name, i in found.items()),
        *(Key(f"tokenizer.ggml.add_{name}_token", "bool", False) for name in ("bos", "eos")),
    ]


def _adds_prefix(checkpoint: Checkpoint, pieces: Pieces, own_backend: bool) -> bool:
    """Whether a blank goes before a text: as tokenizer.json says for text models, else the configuration or model."""
    path = checkpoint.folder / "tokenizer.json"
    if pieces.removes_blanks and own_backend:
        log.warning("%s: runs of blanks become one in transformers, but not in llama.cpp", pieces.path)
    if own_backend and path.is_file():
        return json_adds_prefix(path, checkpoint.json(path.name))
    config = checkpoint.json("tokenizer_config.json")
    said = config.get("add_prefix_space")
    adds = said if isinstance(said, bool) else bool(pieces.adds_prefix)
    if adds != pieces.adds_prefix:
        log.warning(
            "%s: add_prefix_space is %s, but %s says %s; the former is taken",
            checkpoint.folder / "tokenizer_config.json",
            said,
            pieces.path.name,
            pieces.adds_prefix,
        )
    if adds and config.get("legacy") is False:
        log.warning(
            "%s: a blank goes before the first text only; llama.cpp adds it behind markers too", checkpoint.folder
        )
    return adds


def _looks_special(text: str) -> bool:
    return (
        (text.startswith("<|") and text.endswith("|>"))
        or text in ("<pad>", "<mask>")
        or (text.startswith("<unused") and text.endswith(">"))
    )
