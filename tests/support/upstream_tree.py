"""Where upstream's own converter lies, for tests that compare with it."""

from __future__ import annotations

import os
from pathlib import Path


def upstream() -> Path:
    root = Path(os.environ.get("LLAMA_CPP_DIR") or Path(__file__).parents[2] / "vendor" / "llama.cpp")
    assert (root / "convert_hf_to_gguf.py").is_file(), (
        f"{root}: no llama.cpp tree; run `pyllamaernie patch fetch` or set LLAMA_CPP_DIR"
    )
    return root
