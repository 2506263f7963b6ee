"""The width of experts: narrow ones are the wide ones without the neurons that add least."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf_models import gguf

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
from cut_cases import logits, quantized
from gguf_contents import contents, data_of, rewrite

from pyllamaernie.cut.scores import ExpertStatistics
from pyllamaernie.cut.slice import slice_model
from pyllamaernie.errors import InputError


def silenced(kind: str, lost: dict[tuple[str, int], np.ndarray]) -> dict[str, np.ndarray]:
    """Down projections with the columns of lost neurons at zero. Shapes: lost[pool, layer] (n_expert, n_ff) bool"""
    out = {}
    tensors = data_of(gguf(kind))
    for (pool, il), mask in lost.items():
        name = f"blk.{il}.ffn_down_exps{'_vl' if pool == 'vision' else ''}.weight"
        out[name] = np.where(mask[:, None, :], 0, tensors[name]).astype(np.float32)
    return out


@pytest.mark.parametrize("kind", ["moe", "vl"])
def test_narrow_experts_are_the_wide_ones_without_some_neurons(kind: str, tmp_path: Path) -> None:
    widths = {"text": 40} | ({"vision": 10} if kind == "vl" else {})
    result = slice_model(gguf(kind), tmp_path / "out.gguf", expert_ff=widths)
    full = {"text": 96, "vision": 32}
    lost = {(p, il): np.tile(np.arange(full[p]) >= n, (8, 1)) for p, n in widths.items() for il in (1, 2, 3)}
    rewrite(gguf(kind), tmp_path / "silent.gguf", silenced(kind, lost))
    for picture in [False] + [True] * (kind == "vl"):
        expected = logits(tmp_path / "silent.gguf", picture=picture)
        cut = logits(tmp_path / "out.gguf", picture=picture)
        np.testing.assert_allclose(cut, expected, rtol=0, atol=1e-4 * expected.std())
        assert np.abs(logits(gguf(kind), picture=picture) - cut).max() > 0.1 * expected.std()
    _, keys = contents(tmp_path / "out.gguf")
    arch = keys["general.architecture"]
    assert keys[f"{arch}.expert_feed_forward_length"] == 40
    assert keys.get(f"{arch}.expert_feed_forward_length_vl") == widths.get("vision")
    assert keys["general.size_label"] != contents(gguf(kind))[1]["general.size_label"]
    assert any("was trained as one" in line for line in result.warnings)


def test_neurons_that_add_most_are_kept(tmp_path: Path) -> None:
    """Importance is squared input times squared column of down; here both are known by construction."""
    rng = np.random.default_rng(5)
    tensors = data_of(gguf("moe"))
    statistics, lost = {}, {}
    for il in (1, 2, 3):
        name = f"blk.{il}.ffn_down_exps.weight"
        inputs = rng.lognormal(0, 2, (8, 96))
        statistics |= {f"{name}.counts": np.full((8, 1), 5.0), f"{name}.in_sum2": inputs}
        added = inputs * np.square(tensors[name].astype(float)).sum(1)
        lost["text", il] = added < np.sort(added, axis=1)[:, 96 - 32, None]
    importance = ExpertStatistics(tmp_path / "i.gguf", statistics)
    slice_model(gguf("moe"), tmp_path / "out.gguf", expert_ff={"text": 32}, importance=importance)
    rewrite(gguf("moe"), tmp_path / "silent.gguf", silenced("moe", lost))
    expected = logits(tmp_path / "silent.gguf")
    np.testing.assert_allclose(logits(tmp_path / "out.gguf"), expected, rtol=0, atol=1e-4 * expected.std())


def test_width_of_a_quantized_file_is_cut_at_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    names = [f"blk.{il}.ffn_down_exps.weight" for il in (1, 2, 3)]
    statistics = {f"{name}.counts": np.full((8, 1), 5.0) for name in names}
    statistics |= {f"{name}.in_sum2": rng.lognormal(0, 3, (8, 96)) for name in names}
    importance = ExpertStatistics(tmp_path / "i.gguf", statistics)
    slice_model(quantized("moe"), tmp_path / "first.gguf", expert_ff={"text": 64})
    slice_model(quantized("moe"), tmp_path / "best.gguf", expert_ff={"text": 64}, importance=importance)
    before, first, best = (
        data_of(path) for path in (quantized("moe"), tmp_path / "first.gguf", tmp_path / "best.gguf")
    )
    moved = 0
    for il in (1, 2, 3):
        down, up = f"blk.{il}.ffn_down_exps.weight", f"blk.{il}.ffn_up_exps.weight"
        blocks = before[down].reshape(8, 256, 3, 34)
        assert first[down].tobytes() == blocks[:, :, :2].tobytes()
        assert first[up].tobytes() == before[up][:, :64].tobytes()
        for e in range(8):
            kept = [b for b in range(3) if blocks[e][:, b].tobytes() in
                    [best[down].reshape(8, 256, 2, 34)[e][:, i].tobytes() for i in (0, 1)]]  # fmt: skip
            moved += kept != [0, 1]
            rows = np.concatenate([before[up][e][32 * b : 32 * b + 32] for b in kept])
            assert len(kept) == 2 and best[up][e].tobytes() == rows.tobytes()
    assert moved > 4 and np.isfinite(logits(tmp_path / "best.gguf")).all()
    for error, match, options in [
        (InputError, "50 neurons cannot be kept: blk.1.ffn_down_exps.weight is Q8_0, .* in blocks of 32", {"text": 50}),
        (InputError, "97 neurons cannot be kept; .* have 96", {"text": 97}),
        (InputError, "has no experts for vision, only for text", {"vision": 16}),
    ]:
        with pytest.raises(error, match=match):
            slice_model(quantized("moe"), tmp_path / "never.gguf", expert_ff=options)
    assert not (tmp_path / "never.gguf").exists()
