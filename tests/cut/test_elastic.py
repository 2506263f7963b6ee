"""Sub-models that a file names: each is the cut that it says, and others are warned of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf_models import gguf

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
from cut_cases import logits
from gguf_contents import contents, rewrite

from pyllamaernie.cut.slice import slice_model, slice_preset
from pyllamaernie.errors import CorruptModelError, InputError


def elastic_file(path: Path) -> Path:
    keys = {
        "elastic.names": ("list:str", ["half", "sparse"]),
        "elastic.half.layers": ("list:u32", [0, 1, 3]),
        "elastic.half.expert_count": ("u32", 4),
        "elastic.half.expert_feed_forward_length": ("u32", 64),
        "elastic.half.expert_used_count": ("u32", 2),
        "elastic.sparse.expert_used_count": ("u32", 1),
    }
    return rewrite(gguf("moe"), path, {}, keys)


def test_preset_is_the_sub_model_that_the_file_names(tmp_path: Path) -> None:
    whole = elastic_file(tmp_path / "elastic.gguf")
    result = slice_preset(whole, tmp_path / "half.gguf", "half")
    assert (result.n_layer, result.n_expert, result.n_expert_used) == (3, 4, 2)
    assert not any("trained" in line for line in result.warnings)
    cuts = {"layers": [0, 1, 3], "experts": 4, "top_k": 2}
    by_hand = slice_model(whole, tmp_path / "hand.gguf", **cuts, expert_ff={"text": 64})
    assert not any("trained" in line for line in by_hand.warnings), "the same cut, however it was asked for"
    other = slice_model(whole, tmp_path / "other.gguf", **cuts)
    assert any("its file names half, sparse, not this one" in line for line in other.warnings)
    one, two = contents(tmp_path / "half.gguf"), contents(tmp_path / "hand.gguf")
    assert one == two and one[1]["elastic.chosen"] == "half" and "elastic.names" not in one[1]
    assert not [name for name in contents(tmp_path / "other.gguf")[1] if name.startswith("elastic.")]
    slice_preset(whole, tmp_path / "sparse.gguf", "sparse")
    plain = slice_model(gguf("moe"), tmp_path / "plain.gguf", top_k=1).path
    np.testing.assert_array_equal(logits(tmp_path / "sparse.gguf"), logits(plain))


def test_presets_that_are_not_there_are_refused(tmp_path: Path) -> None:
    whole = elastic_file(tmp_path / "elastic.gguf")
    broken = rewrite(whole, tmp_path / "broken.gguf", {}, {"elastic.half.expert_count": ("str", "four")})
    for error, match, model in [
        (InputError, "does not say that it was trained to be cut .no key elastic.names.", gguf("moe")),
        (InputError, "no preset 'tiny'; it was trained for half, sparse", whole),
        (CorruptModelError, "elastic.half.expert_count is 'four', expected a whole number", broken),
    ]:
        with pytest.raises(error, match=match):
            slice_preset(model, tmp_path / "out.gguf", "tiny")
