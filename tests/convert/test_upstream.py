"""Our dense and MoE files against those of upstream's own converter: every tensor byte for byte, every key but few."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
from checkpoint_shapes import shape_with
from gguf import GGUFReader
from tiny_vocabulary import token_id
from upstream_tree import upstream

from pyllamaernie.convert import TYPES, convert

pytestmark = pytest.mark.reference

# Ours alone: generation also stops at the end of a turn. Different on purpose: the think tags stay visible.
OURS_ONLY = {"tokenizer.ggml.eot_token_id"}
DIFFERENT = {"tokenizer.ggml.token_type"}
SHARED_WIDTH = "ernie4_5-moe.expert_shared_feed_forward_length"


def convert_upstream(folder: Path, out: Path, kind: str) -> GGUFReader:
    done = subprocess.run(
        [sys.executable, upstream() / "convert_hf_to_gguf.py", folder, "--outfile", out, "--outtype", kind],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return GGUFReader(out)


def keys(file: GGUFReader) -> dict[str, tuple]:
    return {
        name: (field.contents(), field.types) for name, field in file.fields.items() if not name.startswith("GGUF.")
    }


def assert_equal_tensors(theirs: GGUFReader, ours: GGUFReader) -> None:
    a, b = ({t.name: t for t in file.tensors} for file in (theirs, ours))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert (tensor.tensor_type, tensor.shape.tolist()) == (b[name].tensor_type, b[name].shape.tolist()), name
        assert tensor.data.tobytes() == b[name].data.tobytes(), name


@pytest.mark.parametrize("name", [*TYPES, "auto"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dense", {"dtype": "BF16"}),
        ("dense", {"tied": False, "flat": True, "names": "fused"}),
        ("moe", {"dtype": "BF16", "flat": True}),
        ("moe", {"tied": False}),
    ],
    ids=str,
)
def test_tensors_and_keys_equal_upstreams(kind: str, options: dict, name: str, tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / f"ERNIE-4.5-{kind}", kind, **options)
    theirs = convert_upstream(folder, tmp_path / "theirs.gguf", name)
    ours = GGUFReader(convert(folder, tmp_path / "ours.gguf", type=name).model)
    assert_equal_tensors(theirs, ours)
    a, b = keys(theirs), keys(ours)
    assert a.keys() ^ b.keys() == OURS_ONLY
    assert {key for key in a if a[key] != b[key]} == DIFFERENT
    types = a["tokenizer.ggml.token_type"][0], b["tokenizer.ggml.token_type"][0]
    changed = [i for i, (x, y) in enumerate(zip(*types, strict=True)) if x != y]
    assert changed == [token_id("<think>"), token_id("</think>")]


def test_only_the_shared_width_differs_where_upstream_guesses_it(tmp_path: Path) -> None:
    """12 experts of 128, 2 shared: 256 is right; upstream writes 384 // 2 = 192, and its file cannot be loaded."""
    shape = shape_with("moe", n_expert=12, n_ff_exp=128)
    folder = checkpoints.write_checkpoint(tmp_path / "moe", "moe", shape=shape)
    theirs = convert_upstream(folder, tmp_path / "theirs.gguf", "f16")
    ours = GGUFReader(convert(folder, tmp_path / "ours.gguf", type="f16").model)
    assert_equal_tensors(theirs, ours)
    a, b = keys(theirs), keys(ours)
    assert {key for key in a if a[key] != b[key]} == DIFFERENT | {SHARED_WIDTH}
    assert (a[SHARED_WIDTH][0], b[SHARED_WIDTH][0]) == (192, 256)
