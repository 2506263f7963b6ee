"""Tokens that a folder names besides its vocabulary, in the order in which transformers adds them.

Ids in the files are what somebody expected: transformers gives a text that is no piece the next free id, whatever the
files say. Source: transformers 5.24 `tokenization_utils_base.py` `_from_pretrained`, `tokenization_utils_tokenizers.py`
`__init__`; 4.54 does the same, but reads `additional_special_tokens` of special_tokens_map.json as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pyllamaernie.convert.checkpoint import Checkpoint
from pyllamaernie.errors import TokenizerError

NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class AddedToken:
    """A text that is found whole. `id` is what its file says, None where it says none."""

    text: str
    special: bool
    file: str
    id: int | None = None
    strips: bool = False  # blanks beside it belong to it


def added_tokens(checkpoint: Checkpoint, *, own_backend: bool) -> list[AddedToken]:
    """All of them, the first mention of a text first; `own_backend`: tokenizer.json is loaded as a whole.

    Raises: TokenizerError for an entry that is no token.
    """
    try:
        return list(_tokens(checkpoint, own_backend))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TokenizerError(f"{checkpoint.folder}: an added token is no token ({error!r})") from error


def named_tokens(checkpoint: Checkpoint) -> dict[str, str]:
    """Texts of bos, eos, unk, sep, pad, cls and mask, where the folder names them."""
    values = _named_values(checkpoint)
    return {name: _text(values[f"{name}_token"]) for name in NAMED if values.get(f"{name}_token")}


def _tokens(checkpoint: Checkpoint, own_backend: bool) -> Iterator[AddedToken]:
    config = checkpoint.json("tokenizer_config.json")
    values = _named_values(checkpoint)
    from_json = [
        _entry(entry, int(entry["id"]), "tokenizer.json")
        for entry in checkpoint.json("tokenizer.json").get("added_tokens") or []
    ]
    if "added_tokens_decoder" in config:
        decoder = config["added_tokens_decoder"] or {}
        listed = [_entry(entry, int(i), "tokenizer_config.json") for i, entry in decoder.items()]
    else:
        special = {_text(values[name]) for name in values if name.endswith("_token") and values[name]}
        special.update(_text(token) for token in _extra(values))
        by_id = {
            int(i): AddedToken(text, text in special, "added_tokens.json", int(i))
            for text, i in checkpoint.json("added_tokens.json").items()
        }
        listed = list((by_id | {token.id: token for token in from_json}).values())
    both = [from_json, listed] if own_backend else [listed, from_json]
    for tokens in both:
        yield from sorted(tokens, key=lambda token: token.id or 0)
    for name in [f"{name}_token" for name in NAMED]:
        if values.get(name):
            yield _entry(values[name], None, name)
    for name, value in values.items():  # image_token and others of one kind of model
        if name.endswith("_token") and name[: -len("_token")] not in NAMED and isinstance(value, (str, dict)):
            yield _entry(value, None, name)
    for value in _extra(values):
        yield _entry(value, None, "additional_special_tokens")


def _named_values(checkpoint: Checkpoint) -> dict[str, Any]:
    """tokenizer_config.json, with special_tokens_map.json over it as long as no `added_tokens_decoder` is there."""
    config = checkpoint.json("tokenizer_config.json")
    if "added_tokens_decoder" in config:
        return config
    said = checkpoint.json("special_tokens_map.json")
    lists = {name: [*(config.get(name) or []), *said[name]] for name in _LISTS if isinstance(said.get(name), list)}
    return {**config, **said, **lists}


def _extra(values: Mapping[str, Any]) -> list[Any]:
    """The tokens of both spellings; transformers 5 has names for some of them."""
    out: list[Any] = []
    for name in _LISTS:
        entries = values.get(name) or []
        out += entries.values() if isinstance(entries, dict) else entries
    return out


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else value["content"]
    if not isinstance(text, str) or not text:
        raise ValueError(f"text {text!r}")
    return text


def _entry(value: Any, i: int | None, file: str) -> AddedToken:
    if i is not None and i < 0:
        raise ValueError(f"id {i}")
    if isinstance(value, str):
        return AddedToken(value, True, file, i)
    strips = bool(value.get("lstrip") or value.get("rstrip"))
    return AddedToken(_text(value), bool(value.get("special", i is None)), file, i, strips)
