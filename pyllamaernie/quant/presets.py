"""What a stock preset of llama-quantize would give to each tensor, found without quantizing: the plans to beat."""

from __future__ import annotations

import os
import re

from pyllamaernie import programs
from pyllamaernie.errors import PyllamaernieError

PRESETS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K_S", "Q2_K", "IQ3_XXS", "IQ3_XS", "IQ3_S")
PRESETS += ("IQ3_M", "Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ4_XS", "IQ4_NL", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K")
PRESETS += ("Q8_0",)

_LINE = re.compile(r"^\[ *\d+/ *\d+\] (\S+) +- \[.*type = +(\w+), size = .*?(?:\((\w+)\))?$", re.MULTILINE)


def preset_types(
    model: str | os.PathLike[str], preset: str, imatrix: str | os.PathLike[str] | None = None
) -> dict[str, str]:
    """The type of every tensor of a GGUF file under a preset.

    Raises: PyllamaernieError when llama-quantize refuses: a preset below three bits needs an importance matrix.
    """
    options = ["--dry-run", *(["--imatrix", imatrix] if imatrix is not None else []), model, preset]
    done = programs.run("llama-quantize", options, check=False, capture=True)
    text = done.stdout + done.stderr
    found = {name: (new or old).upper() for name, old, new in _LINE.findall(text)}
    if done.returncode or not found:
        reason = next((line for line in reversed(text.splitlines()) if "error" in line.lower()), "no tensors listed")
        raise PyllamaernieError(f"llama-quantize has no plan for {preset}: {reason}")
    return found
