"""ERNIE 4.5 language and vision-language models on llama.cpp: the public names, each loaded when first used."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyllamaernie.compare.table import ComparisonTable as ComparisonTable
    from pyllamaernie.llama.llama import Llama as Llama
    from pyllamaernie.log import log_to_stderr as log_to_stderr
    from pyllamaernie.media.image import Image as Image
    from pyllamaernie.media.video import Video as Video
    from pyllamaernie.quant.imatrix import compute_imatrix as compute_imatrix

# name -> module; a table, so that `import pyllamaernie` costs no numpy. Not `convert`: that is also a module's name
_LAZY = {
    "Llama": "pyllamaernie.llama.llama",
    "Image": "pyllamaernie.media.image",
    "Video": "pyllamaernie.media.video",
    "ComparisonTable": "pyllamaernie.compare.table",
    "compute_imatrix": "pyllamaernie.quant.imatrix",
    "log_to_stderr": "pyllamaernie.log",
    "errors": "pyllamaernie.errors",
}

__all__ = ["ComparisonTable", "Image", "Llama", "Video", "compute_imatrix", "errors", "log_to_stderr"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("pyllamaernie")
    if name == "_core" and importlib.util.find_spec("pyllamaernie._core") is None:
        raise ImportError(
            f"{__path__[0]} is a source folder without the compiled module; "
            "`pip install .` builds it, then start Python in another folder"
        )
    if name not in _LAZY:
        raise AttributeError(f"module 'pyllamaernie' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    value = module if name == "errors" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
