"""Which type the bundled llama-quantize would give each tensor: for a preset, and for the lines of a recipe file.

The program itself is asked, by a dry run, so its rules are nowhere repeated. A model that is no GGUF yet is shown to it
as a file of the right header and size without content, which takes no room on file systems that know holes.
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyllamaernie import programs
from pyllamaernie.errors import InputError, QuantizeError
from pyllamaernie.gguf.file import Key, gguf_header
from pyllamaernie.quant import native
from pyllamaernie.quant.source import ModelSource, gguf_parts, tensor_type

_LINE = re.compile(
    r"^\[ *\d+/ *\d+\] (?P<name>\S+) +- \[.*\], type = +(?P<old>\S+), "
    r"size = +\S+ MiB(?: -> +\S+ MiB \((?P<new>\w+)\))?"
)
_FALLBACK = re.compile(r"warning: (\S+) +- ncols +(\d+) not divisible by +(\d+) \(required for type +(\S+)\)")
_PRESET = re.compile(r"^ +(\d+) +or +(\w+) *:", re.MULTILINE)


@dataclass(frozen=True)
class StockTypes:
    """Tensor name -> type for all tensors of a model, and what the program had to change, as sentences."""

    types: dict[str, str]
    warnings: tuple[str, ...]


@functools.cache
def presets() -> Mapping[str, int]:
    """Name -> file type of the presets that llama-quantize knows, ours among them."""
    text = programs.run("llama-quantize", ["--help"], check=False, capture=True).stdout
    return {name: int(number) for number, name in _PRESET.findall(text)}


def stock_types(
    source: ModelSource,
    preset: str,
    *,
    recipe: str | None = None,
    imatrix: Path | None = None,
    pure: bool = False,
) -> StockTypes:
    """The types of a preset; `recipe` holds lines `regex=type`, of which the first that matches a name decides.

    Raises: InputError for an unknown preset or a broken recipe; QuantizeError when the program fails.
    """
    known = presets()
    if preset.upper() not in known:
        raise InputError(f"preset {preset!r} is not known; there are {', '.join(known)}")
    words: list[object] = ["--dry-run", "--allow-requantize"]
    with tempfile.TemporaryDirectory(prefix="pyllamaernie-") as folder:
        if recipe is not None:
            lines = check_recipe(recipe)
            path = Path(folder) / "recipe.txt"
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            words += ["--tensor-type-file", path]
        if imatrix is not None:
            words += ["--imatrix", imatrix]
        if pure:
            words.append("--pure")
        model = source.path if source.path.is_file() else _skeleton(source, Path(folder))
        model = gguf_parts(model)[0]
        done = programs.run("llama-quantize", [*words, model, preset], check=False, capture=True)
    said = done.stdout + done.stderr
    types = {m["name"]: (m["new"] or m["old"]).upper() for m in map(_LINE.match, said.splitlines()) if m}
    missing = [w.name for w in source.weights if w.name not in types]
    if done.returncode or missing:
        lines = [line.strip() for line in said.splitlines() if "failed" in line or "rror" in line]
        reason = lines[0] if lines else f"it does not say what becomes of {missing[:1]}"
        raise QuantizeError(f"llama-quantize --dry-run {source.path} {preset}: {reason}")
    return StockTypes(types, tuple(_fallbacks(said, types)))


def check_recipe(text: str) -> list[str]:
    """The entries of a recipe, each checked.

    Raises: InputError naming the entry that is wrong, and why.
    """
    entries = text.split()
    if not entries:
        raise InputError("the recipe is empty; a line is NAME=TYPE, such as ffn_down_exps=q4_k")
    for entry in entries:
        pattern, sign, name = entry.partition("=")
        if not pattern or not sign or not name:
            raise InputError(f"recipe entry {entry!r}: expected NAME=TYPE, such as ffn_down_exps=q4_k (no comments)")
        native.ggml_type(name)
    return entries


def unused_entries(entries: Sequence[str], names: Sequence[str]) -> list[str]:
    """Entries whose pattern is found in no name, as far as Python reads regular expressions as the program does."""
    out = []
    for entry in entries:
        try:
            pattern = re.compile(entry.partition("=")[0].lower())
        except re.error:
            continue
        if not any(pattern.search(name) for name in names):
            out.append(entry)
    return out


def _fallbacks(said: str, types: dict[str, str]) -> list[str]:
    seen: dict[tuple[str, str, str], list[str]] = {}
    for name, n_cols, _, wanted in _FALLBACK.findall(said):
        seen.setdefault((wanted.upper(), types.get(name, "?"), n_cols), []).append(name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {got} instead of {wanted}, "
        f"whose blocks do not divide rows of {n_cols}"
        for (wanted, got, n_cols), names in seen.items()
    ]


def _skeleton(source: ModelSource, folder: Path) -> Path:
    keys: list[Key] = [key for name, key in source.keys.items() if name != "general.architecture"]
    header, offsets = gguf_header(
        source.arch, keys, [(w.name, w.shape, tensor_type(w.type), w.n_bytes) for w in source.weights]
    )
    path = folder / "model.gguf"
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(offsets[-1] + -(-source.weights[-1].n_bytes // 32) * 32)
    return path
