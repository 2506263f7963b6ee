"""Names of upstream's vision layer stand in one header of ours, so that a pin that renames them changes one file.

A plain text search. Keys of files, such as "clip.vision.block_count", are no names of the layer: strings may hold them.
"""

from __future__ import annotations

import re
from pathlib import Path

NATIVE = Path(__file__).parents[2] / "native"
HEADER = NATIVE / "overlay/tools/mtmd/pyllamaernie-vision.h"

# functions, types, enumerators and headers of the layer; its macros; its enumerators without a prefix of the layer
NAMES = re.compile(
    r"\b(?:clip_\w+|CLIP_\w+|clip(?:-\w+)?\.(?:h|cpp)\b)"
    r"|\b(?:KEY|TN|PROJECTOR_TYPE)_[A-Z0-9_]+"
    r"|\b(?:FFN|NORM_TYPE|PAD|RESIZE_ALGO)_[A-Z0-9_]+"
    r"|\bstring_format\b"
)


def found_in(text: str) -> list[str]:
    return NAMES.findall(text)


def test_names_of_the_vision_layer_stand_in_our_header_only() -> None:
    found = []
    for path in sorted(path for path in NATIVE.rglob("*") if path.is_file() and path != HEADER):
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            found += [f"{path.relative_to(NATIVE.parent)}:{number}: {name}" for name in found_in(line)]
    assert not found, f"reach these through {HEADER.name}:\n" + "\n".join(found)


def test_search_finds_what_it_looks_for() -> None:
    """Each kind of name is in the header, so the test above cannot pass by a wrong pattern."""
    found = set(found_in(HEADER.read_text("utf-8")))
    assert {"clip.h", "clip-graph.h", "clip_graph", "clip_image_f32", "KEY_IMAGE_MIN_PIXELS", "TN_TOK_BOI"} <= found
    assert {"PROJECTOR_TYPE_ERNIE4_5_VL", "FFN_GELU_ERF", "NORM_TYPE_RMS", "PAD_NONE", "RESIZE_ALGO_BICUBIC"} <= found
    assert not found_in('// the key "clip.vision.block_count"; LLM_KV_X, LLM_TENSOR_FFN_GATE, VISION_KEY_X')
