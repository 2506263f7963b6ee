"""The chat templates of a folder as GGUF keys, in transformers' order.

Files come first: chat_template.jinja and those of additional_chat_templates. Without any, a vision-language model has
chat_template.json, the processor's own, before tokenizer_config.json; a text model, which has no processor, the other
way round. Source: transformers 5.24 `tokenization_utils_base.py` `_from_pretrained`, `processing_utils.py`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyllamaernie.convert.checkpoint import Checkpoint
from pyllamaernie.convert.json_file import read_whole
from pyllamaernie.errors import TokenizerError
from pyllamaernie.gguf.file import Key

log = logging.getLogger("pyllamaernie.convert")

FILE, FOLDER = "chat_template.jinja", "additional_chat_templates"


def chat_template_keys(checkpoint: Checkpoint, *, has_processor: bool) -> list[Key]:
    """`tokenizer.chat_template`, and one key for each further name. Raises: TokenizerError for what is no template."""
    found = _sources(checkpoint, has_processor)
    if not found:
        return []
    file, templates = found[0]
    for other, others in found[1:]:
        if others.get("default") != templates.get("default"):
            log.warning("%s: %s and %s differ; the former is taken", checkpoint.folder, file, other)
    keys = []
    names = sorted(set(templates) - {"default"})
    for name in names:
        keys.append(Key(f"tokenizer.chat_template.{name}", "str", templates[name]))
    if names:
        keys.append(Key("tokenizer.chat_templates", "list", names))
    if "default" in templates:
        keys.append(Key("tokenizer.chat_template", "str", templates["default"]))
    else:
        log.warning("%s: of its chat templates (%s) none is the default", checkpoint.folder, ", ".join(names))
    return keys


def _sources(checkpoint: Checkpoint, has_processor: bool) -> list[tuple[str, dict[str, str]]]:
    """What each place says, the one that transformers takes first."""
    files = _files(checkpoint.folder)
    jsons = ["chat_template.json", "tokenizer_config.json"]
    out = [(FILE if "default" in files else FOLDER, files)] if files else []
    for name in jsons if has_processor else reversed(jsons):
        value = checkpoint.json(name).get("chat_template")
        if value:
            out.append((name, _named(checkpoint.folder / name, value)))
    return out


def _files(folder: Path) -> dict[str, str]:
    paths = {path.stem: path for path in sorted((folder / FOLDER).glob("*.jinja"))}
    if (folder / FILE).is_file():
        paths["default"] = folder / FILE
    out = {}
    for name, path in paths.items():
        try:
            out[_plain(name)] = read_whole(path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path}: cannot be read as text ({error})") from error
    return out


def _named(path: Path, value: Any) -> dict[str, str]:
    """One text, or a list of {name, template}."""
    entries = [{"name": "default", "template": value}] if isinstance(value, str) else value
    if not isinstance(entries, list) or not all(_is_entry(entry) for entry in entries):
        raise TokenizerError(f"{path}: chat_template is neither a text nor a list of names and templates")
    return {_plain(entry["name"]): entry["template"] for entry in entries}


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, Mapping) and all(isinstance(entry.get(key), str) for key in ("name", "template"))


def _plain(name: str) -> str:
    """A name as it can stand in a key, as the gguf package writes it."""
    return re.sub(r"[^A-Za-z0-9]", "_", name)
