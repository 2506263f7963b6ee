"""Scores of experts against planted truths: dead ones go first, rare and strong ones stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf_models import gguf

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
from cut_cases import N_EXPERT, N_USED, PICTURES, biases, imatrix, logits, text
from gguf_contents import data_of, rewrite

from pyllamaernie import Llama
from pyllamaernie.compare.divergence import kl_rows
from pyllamaernie.cut.prune import prune, rank_experts
from pyllamaernie.cut.scores import SCORES
from pyllamaernie.quant.imatrix import compute_imatrix


@pytest.mark.parametrize("seeds", [range(1), pytest.param(range(1, 10), marks=pytest.mark.slow)])
def test_experts_that_are_never_chosen_go_first(seeds: range, tmp_path: Path) -> None:
    """Two dead experts in each layer, other ones in each of 10 seeds; without them nothing changes."""
    for seed in seeds:
        rng = np.random.default_rng(seed)
        dead = {il: sorted(rng.choice(N_EXPERT, 2, replace=False).tolist()) for il in (1, 2, 3)}
        model = rewrite(gguf("moe"), tmp_path / "model.gguf", biases(gguf("moe"), {"text": dead}))
        compute_imatrix(model, text(), tmp_path / "i.gguf", chunk=128, n_chunks=3, n_threads=1, overwrite=True)
        for score in SCORES:
            found = {r.layer: list(r.removed) for r in rank_experts(model, tmp_path / "i.gguf", keep=6, score=score)}
            assert found == dead, (seed, score)
        if seed < 2:
            prune(model, tmp_path / "i.gguf", tmp_path / "out.gguf", keep=6, overwrite=True)
            expected = logits(model)
            assert np.abs(logits(tmp_path / "out.gguf") - expected).max() < 1e-3 * expected.std()


def test_pools_are_ranked_apart(tmp_path: Path) -> None:
    dead = {"text": {1: [0, 7], 2: [1, 2], 3: [4, 5]}, "vision": {1: [3, 4], 2: [0, 6], 3: [2, 7]}}
    model = rewrite(gguf("vl"), tmp_path / "model.gguf", biases(gguf("vl"), dead))
    (tmp_path / "mmproj-model.gguf").write_bytes((gguf("vl").parent / "mmproj-vl.gguf").read_bytes())
    compute_imatrix(model, text(), tmp_path / "i.gguf", pictures=PICTURES, chunk=128, n_threads=1)
    found: dict[str, dict[int, list[int]]] = {}
    for r in rank_experts(model, tmp_path / "i.gguf", keep=6):
        found.setdefault(r.pool, {})[r.layer] = list(r.removed)
    assert found == dead


def test_rare_and_strong_expert_is_kept_by_energy_and_dropped_by_count(tmp_path: Path) -> None:
    """Expert 3 of layer 2 answers 20 times as loud, and a bias makes it rare."""
    change = biases(gguf("moe"), {})
    change["blk.2.exp_probs_b.bias"].reshape(-1)[3] = -0.4
    down = data_of(gguf("moe"))["blk.2.ffn_down_exps.weight"].copy()
    down[3] *= 20
    model = rewrite(gguf("moe"), tmp_path / "model.gguf", {**change, "blk.2.ffn_down_exps.weight": down})
    compute_imatrix(model, text(), tmp_path / "i.gguf", chunk=128, n_threads=1)
    by = {s: rank_experts(model, tmp_path / "i.gguf", keep=6, score=s, force=True)[1] for s in SCORES}
    share = by["count"].counts / by["count"].counts.sum() * N_USED
    assert 0 < share[3] < 0.05 and share.argmin() == 3
    assert all(3 in by[s].removed for s in ("count", "weight"))
    assert all(3 in by[s].kept for s in ("energy", "norm", "reap", "output"))
    ids = np.random.default_rng(3).integers(5, 500, 256).tolist()
    kls = {}
    with Llama(model, n_ctx=512, n_threads=1) as whole:
        reference = whole.logits(ids)
    for score in ("count", "reap"):
        out = tmp_path / f"{score}.gguf"
        prune(model, tmp_path / "i.gguf", out, keep=6, score=score, exact=True, force=True)
        with Llama(out, n_ctx=512, n_threads=1) as llm:
            kls[score] = kl_rows(reference, llm.logits(ids))[0].mean()
    assert kls["reap"] < 0.9 * kls["count"], kls
    assert 3 in rank_experts(model, tmp_path / "i.gguf", keep=6, score="count")[1].kept, "it is beyond all others"


@pytest.mark.slow
def test_rare_and_strong_experts_anywhere_are_kept_by_what_they_add(tmp_path: Path) -> None:
    """Another expert in each of 10 seeds, 20 times as loud, its bias lowered until it is rare."""
    tensors = data_of(gguf("moe"))
    for seed in range(10):
        il, expert = 1 + seed % 3, seed * 3 % 8
        down, bias = f"blk.{il}.ffn_down_exps.weight", f"blk.{il}.exp_probs_b.bias"
        loud = tensors[down].copy()
        loud[expert] *= 20
        change = {**biases(gguf("moe"), {}), down: loud}
        for lower in np.arange(0.1, 1, 0.05):
            change[bias].reshape(-1)[expert] = -lower
            model = rewrite(gguf("moe"), tmp_path / "model.gguf", change)
            compute_imatrix(model, text(), tmp_path / "i.gguf", chunk=128, n_threads=1, overwrite=True)
            by = {s: rank_experts(model, tmp_path / "i.gguf", keep=6, score=s, force=True)[il - 1] for s in SCORES}
            share = by["count"].counts / by["count"].counts.sum() * N_USED
            if share[expert] < 0.03:
                break
        assert 0 < share[expert] < 0.03, (seed, share)
        assert expert in by["count"].removed
        assert all(expert in by[s].kept for s in ("reap", "output", "energy")), seed


def test_energy_is_the_output_norm_for_uncorrelated_inputs(tmp_path: Path) -> None:
    """One column of down at a time: the score is then the sum of the squared outputs exactly, by any reckoning."""
    tensors = data_of(gguf("moe"))
    sums = data_of(imatrix("moe"))
    name = "blk.1.ffn_down_exps.weight"
    only = np.zeros_like(tensors[name])
    only[:, :, 7] = tensors[name][:, :, 7]
    model = rewrite(gguf("moe"), tmp_path / "model.gguf", {name: only})
    scores = ("count", "energy", "norm")
    count, energy, norm = (rank_experts(model, imatrix("moe"), keep=8, score=score)[0] for score in scores)
    for e in range(N_EXPERT):
        outputs = sum(w * w for w in only[e, :, 7].astype(float)) * sums[f"{name}.in_sum2"][e, 7]
        assert energy.scores[e] == pytest.approx(outputs, rel=1e-5)
        assert norm.scores[e] == pytest.approx((outputs / count.scores[e]) ** 0.5, rel=1e-5)
