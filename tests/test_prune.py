"""`pyllamaernie prune`: a pruned model is the whole one with masked experts, and the right experts go."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import checkpoints
import gguf_models
import numpy as np
import pytest
from gguf_models import gguf, random_words

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
from pyllamaernie import Llama, _upstream, programs
from pyllamaernie.divergence import kl_rows
from pyllamaernie.errors import InputError, PyllamaernieError, UnsupportedInputError
from pyllamaernie.expert_scores import SCORES, Ranking, read_importance
from pyllamaernie.imatrix import compute_imatrix
from pyllamaernie.prune import prune, rank_experts, report, write_pruned
from pyllamaernie.prune_probe import refine
from pyllamaernie.slice_model import read_plan, slice_model
from pyllamaernie.slice_source import BIAS_REMOVED, open_source

N_EXPERT, N_USED = 8, checkpoints.SHAPES["moe"].n_expert_used
PICTURES = [(gguf_models.picture(140, 196, seed=seed), gguf_models.QUESTION) for seed in range(6)]
IDS = [5, 60, 200, 17, 300, 42, 90, 7, 150, 33, 410, 8, 77, 123, 61, 250]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_words(tmp_path_factory.mktemp("prune") / "text.txt", 700)


@pytest.fixture(scope="module")
def imatrices(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("imatrices")
    for kind in ("moe", "vl"):
        pictures = PICTURES if kind == "vl" else []
        compute_imatrix(gguf(kind), text, home / f"{kind}.gguf", pictures=pictures, chunk=128, n_threads=1)
    return {kind: home / f"{kind}.gguf" for kind in ("moe", "vl")}


def logits(path: Path, kind: str) -> np.ndarray:
    mmproj = gguf("vl").parent / "mmproj-vl.gguf" if kind == "vl" else None
    with Llama(path, mmproj=mmproj, type_k="f32", type_v="f32", n_ctx=512, n_threads=1) as llm:
        if kind == "moe":
            return llm.logits(IDS)
        ids = [*IDS[:4], *gguf_models.image_ids(5, 7), *IDS[4:]]
        return llm.logits(ids, images=[gguf_models.picture(140, 196, seed=9)])


def copy(path: Path, out: Path, change: dict[str, np.ndarray]) -> Path:
    """A copy with some F32 tensors replaced."""
    keys, tensors = _upstream.read_gguf(path)
    assert change.keys() <= {t.name for t in tensors if t.type.name == "F32"}
    written = [
        _upstream.OutTensor(t.name, t.shape, t.type, lambda t=t: iter((change.get(t.name, t.data),))) for t in tensors
    ]
    arch = str(keys.pop("general.architecture").value)
    _upstream.write_gguf(out, arch, list(keys.values()), written)
    return out


def biases(path: Path, masked: dict[str, dict[int, list[int]]], *, even: bool = True) -> dict[str, np.ndarray]:
    """Correction biases that keep the masked experts from being chosen; the others' are 0 or as they were."""
    out = {}
    for tensor in _upstream.read_gguf(path)[1]:
        if "exp_probs_b" in tensor.name:
            il, pool = int(tensor.name.split(".")[1]), "vision" if "_vl" in tensor.name else "text"
            out[tensor.name] = np.zeros_like(tensor.data) if even else np.array(tensor.data)
            out[tensor.name].reshape(-1)[masked.get(pool, {}).get(il, [])] = -1e9
    return out


def with_key(path: Path, out: Path, name: str, value: int) -> Path:
    keys, tensors = _upstream.read_gguf(path)
    keys[name] = _upstream.Key(name, "u32", value)
    written = [_upstream.OutTensor(t.name, t.shape, t.type, lambda t=t: iter((t.data,))) for t in tensors]
    arch = str(keys.pop("general.architecture").value)
    _upstream.write_gguf(out, arch, list(keys.values()), written)
    return out


# ---- pruned = masked


def in_type(kind: str, type_: str, folder: Path) -> Path:
    """The model of one kind, quantized unless `type_` is its own."""
    if type_ == "f32":
        return gguf(kind)
    path = folder / "q.gguf"
    programs.run("llama-quantize", [gguf(kind), path, type_, 1], capture=True, timeout=60)
    return path


def removed_experts(rankings: list[Ranking]) -> dict[str, dict[int, list[int]]]:
    """By pool and layer."""
    return {pool: {r.layer: list(r.removed) for r in rankings if r.pool == pool} for pool in ("text", "vision")}


@pytest.mark.parametrize("type_", ["f32", "q8_0"])
@pytest.mark.parametrize("kind", ["moe", "vl"])
def test_pruned_model_is_the_whole_one_with_masked_experts(
    kind: str, type_: str, imatrices: dict[str, Path], tmp_path: Path
) -> None:
    """With even biases. Probabilities over fewer experts are all larger by one factor, which renormalizing removes."""
    path = in_type(kind, type_, tmp_path)
    whole = copy(path, tmp_path / "whole.gguf", biases(path, {}))
    result, rankings = prune(whole, imatrices[kind], tmp_path / "pruned.gguf", keep=5, score="energy", force=True)
    assert result.n_expert == 5 and not any("bias" in line for line in result.warnings)
    removed = removed_experts(rankings)
    copy(path, tmp_path / "masked.gguf", biases(path, removed))
    expected, pruned = logits(tmp_path / "masked.gguf", kind), logits(tmp_path / "pruned.gguf", kind)
    assert np.abs(pruned - expected).max() < 1e-3 * expected.std()
    assert np.abs(logits(whole, kind) - expected).max() > 0.1 * expected.std(), "the removed experts must matter"


@pytest.mark.parametrize("type_", ["f32", "q8_0"])
@pytest.mark.parametrize("kind", ["moe", "vl"])
def test_exact_pruning_is_masking_with_any_bias(
    kind: str, type_: str, imatrices: dict[str, Path], tmp_path: Path
) -> None:
    """The routers stay whole, so that the choice among the kept experts is that of the whole model."""
    path = in_type(kind, type_, tmp_path)
    result, rankings = prune(path, imatrices[kind], tmp_path / "exact.gguf", keep=5, exact=True, force=True)
    assert result.n_expert == 5 and not result.warnings
    removed = removed_experts(rankings)
    copy(path, tmp_path / "masked.gguf", biases(path, removed, even=False))
    expected, exact = logits(tmp_path / "masked.gguf", kind), logits(tmp_path / "exact.gguf", kind)
    np.testing.assert_array_equal(exact, expected)  # same operations in the same order
    prune(path, imatrices[kind], tmp_path / "compact.gguf", keep=5, force=True)
    compact = logits(tmp_path / "compact.gguf", kind)
    assert np.abs(compact - expected).max() > 1e-3 * expected.std(), "the bias must matter here"


def test_file_with_whole_routers_can_be_cut_and_quantized_but_not_pruned_again(
    imatrices: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    path = tmp_path / "exact.gguf"
    prune(gguf("moe"), imatrices["moe"], path, keep=5, exact=True, force=True)
    source = open_source(path)
    assert (source.n_expert, source.n_stored) == (8, 5)
    shapes = {t.name: t.shape for t in source.tensors}
    assert shapes["blk.1.ffn_gate_inp.weight"][0] == 8 and shapes["blk.1.ffn_down_exps.weight"][0] == 5
    result = slice_model(path, tmp_path / "short.gguf", layers=[0, 1, 3], top_k=2)
    assert result.n_expert == 5 and np.isfinite(logits(tmp_path / "short.gguf", "moe")).all()
    for name, model in (("q8-whole.gguf", gguf("moe")), ("q8-exact.gguf", path)):
        programs.run("llama-quantize", [model, tmp_path / name, "q8_0", 1], capture=True, timeout=60)
    prune(tmp_path / "q8-whole.gguf", imatrices["moe"], tmp_path / "q8-cut.gguf", keep=5, exact=True, force=True)
    one, two = ({t.name: t.data.tobytes() for t in _upstream.read_gguf(tmp_path / f"q8-{n}.gguf")[1]}
                for n in ("exact", "cut"))  # fmt: skip
    assert one == two, "first cut and then quantized, or the other way round"
    compute_imatrix(path, text, tmp_path / "i.gguf", chunk=128, n_chunks=2, n_threads=1)
    for options, match in (({"experts": 4}, "pruned with whole routers"), ({"top_k": 6}, "take 1 to 5")):
        with pytest.raises(InputError, match=match):
            slice_model(path, tmp_path / "never.gguf", **options)
    with pytest.raises(InputError, match="pruned with whole routers"):
        prune(path, tmp_path / "i.gguf", tmp_path / "never.gguf", keep=4, force=True)


@pytest.mark.parametrize("n_stored", [2, 9, 6])
def test_wrong_number_of_stored_experts_does_not_load(
    n_stored: int, imatrices: dict[str, Path], tmp_path: Path
) -> None:
    prune(gguf("moe"), imatrices["moe"], tmp_path / "exact.gguf", keep=5, exact=True, force=True)
    wrong = with_key(tmp_path / "exact.gguf", tmp_path / "wrong.gguf", "ernie4_5-moe.expert_stored_count", n_stored)
    with pytest.raises(
        PyllamaernieError, match="wrong shape" if n_stored == 6 else f"expert_stored_count is {n_stored}"
    ):
        Llama(wrong, n_threads=1)


def test_biases_that_do_not_say_what_is_removed_do_no_harm(imatrices: dict[str, Path], tmp_path: Path) -> None:
    """Such a file is wrong, but it must not read weights that are not there."""
    prune(gguf("moe"), imatrices["moe"], tmp_path / "exact.gguf", keep=5, exact=True, force=True)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        names = [f"blk.{il}.exp_probs_b.bias" for il in (1, 2, 3)]
        change = {name: rng.choice(np.float32([0, -1e9, 1e9, np.nan]), 8) for name in names} if seed else {}
        change = change or {name: np.zeros(8, np.float32) for name in names}
        shapes = {t.name: t.shape for t in _upstream.read_gguf(tmp_path / "exact.gguf")[1]}
        change = {name: data.reshape(shapes[name]) for name, data in change.items()}
        found = logits(copy(tmp_path / "exact.gguf", tmp_path / "odd.gguf", change), "moe")
        assert found.shape == (len(IDS), 512) and (seed or np.isfinite(found).all())


def test_bias_of_removed_experts_is_that_of_the_graph() -> None:
    header = Path(__file__).parents[1] / "native" / "overlay" / "src" / "models" / "pyllamaernie-experts.h"
    found = re.search(r"ERNIE4_5_BIAS_REMOVED = (\S+)f;", header.read_text())
    assert found is not None and float(found[1]) == BIAS_REMOVED


def test_uneven_biases_are_scaled_and_warned_of(imatrices: dict[str, Path], tmp_path: Path) -> None:
    result, rankings = prune(gguf("moe"), imatrices["moe"], tmp_path / "out.gguf", keep=6)
    assert any("3 routers add a correction bias, scaled" in line and "over 6 experts instead of 8" in line
               for line in result.warnings)  # fmt: skip
    old, new = ({t.name: t.data for t in _upstream.read_gguf(p)[1]} for p in (gguf("moe"), tmp_path / "out.gguf"))
    sums = {t.name: np.array(t.data) for t in _upstream.read_gguf(imatrices["moe"])[1]}
    for r in rankings:
        prob = sums[f"blk.{r.layer}.ffn_down_exps.weight.experts.prob"]
        assert prob.sum() == pytest.approx(sums["blk.0.attn_q.weight.counts"].sum(), rel=1e-4), "one for each token"
        growth = prob.sum() / prob[list(r.kept)].sum()
        name = f"blk.{r.layer}.exp_probs_b.bias"
        expected = old[name].reshape(-1)[list(r.kept)] * growth
        np.testing.assert_allclose(new[name].reshape(-1), expected, rtol=1e-5)


# ---- planted truths


@pytest.mark.parametrize("seeds", [range(1), pytest.param(range(1, 10), marks=pytest.mark.slow)])
def test_experts_that_are_never_chosen_go_first(seeds: range, text: Path, tmp_path: Path) -> None:
    """Two dead experts in each layer, other ones in each of 10 seeds; without them nothing changes."""
    for seed in seeds:
        rng = np.random.default_rng(seed)
        dead = {il: sorted(rng.choice(N_EXPERT, 2, replace=False).tolist()) for il in (1, 2, 3)}
        model = copy(gguf("moe"), tmp_path / "model.gguf", biases(gguf("moe"), {"text": dead}))
        compute_imatrix(model, text, tmp_path / "i.gguf", chunk=128, n_chunks=3, n_threads=1, overwrite=True)
        for score in SCORES:
            found = {r.layer: list(r.removed) for r in rank_experts(model, tmp_path / "i.gguf", keep=6, score=score)}
            assert found == dead, (seed, score)
        if seed < 2:
            prune(model, tmp_path / "i.gguf", tmp_path / "out.gguf", keep=6, overwrite=True)
            expected = logits(model, "moe")
            assert np.abs(logits(tmp_path / "out.gguf", "moe") - expected).max() < 1e-3 * expected.std()


def test_pools_are_ranked_apart(text: Path, tmp_path: Path) -> None:
    dead = {"text": {1: [0, 7], 2: [1, 2], 3: [4, 5]}, "vision": {1: [3, 4], 2: [0, 6], 3: [2, 7]}}
    model = copy(gguf("vl"), tmp_path / "model.gguf", biases(gguf("vl"), dead))
    (tmp_path / "mmproj-model.gguf").write_bytes((gguf("vl").parent / "mmproj-vl.gguf").read_bytes())
    compute_imatrix(model, text, tmp_path / "i.gguf", pictures=PICTURES, chunk=128, n_threads=1)
    found: dict[str, dict[int, list[int]]] = {}
    for r in rank_experts(model, tmp_path / "i.gguf", keep=6):
        found.setdefault(r.pool, {})[r.layer] = list(r.removed)
    assert found == dead


def test_rare_and_strong_expert_is_kept_by_energy_and_dropped_by_count(text: Path, tmp_path: Path) -> None:
    """Expert 3 of layer 2 answers 20 times as loud, and a bias makes it rare."""
    change = biases(gguf("moe"), {})
    change["blk.2.exp_probs_b.bias"].reshape(-1)[3] = -0.4
    down = next(t.data for t in _upstream.read_gguf(gguf("moe"))[1] if t.name == "blk.2.ffn_down_exps.weight").copy()
    down[3] *= 20
    model = copy(gguf("moe"), tmp_path / "model.gguf", {**change, "blk.2.ffn_down_exps.weight": down})
    compute_imatrix(model, text, tmp_path / "i.gguf", chunk=128, n_threads=1)
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
def test_rare_and_strong_experts_anywhere_are_kept_by_what_they_add(text: Path, tmp_path: Path) -> None:
    """Another expert in each of 10 seeds, 20 times as loud, its bias lowered until it is rare."""
    tensors = {t.name: t.data for t in _upstream.read_gguf(gguf("moe"))[1]}
    for seed in range(10):
        il, expert = 1 + seed % 3, seed * 3 % 8
        down, bias = f"blk.{il}.ffn_down_exps.weight", f"blk.{il}.exp_probs_b.bias"
        loud = tensors[down].copy()
        loud[expert] *= 20
        change = {**biases(gguf("moe"), {}), down: loud}
        for lower in np.arange(0.1, 1, 0.05):
            change[bias].reshape(-1)[expert] = -lower
            model = copy(gguf("moe"), tmp_path / "model.gguf", change)
            compute_imatrix(model, text, tmp_path / "i.gguf", chunk=128, n_threads=1, overwrite=True)
            by = {s: rank_experts(model, tmp_path / "i.gguf", keep=6, score=s, force=True)[il - 1] for s in SCORES}
            share = by["count"].counts / by["count"].counts.sum() * N_USED
            if share[expert] < 0.03:
                break
        assert 0 < share[expert] < 0.03, (seed, share)
        assert expert in by["count"].removed
        assert all(expert in by[s].kept for s in ("reap", "output", "energy")), seed


def test_energy_is_the_output_norm_for_uncorrelated_inputs(imatrices: dict[str, Path], tmp_path: Path) -> None:
    """One column of down at a time: the score is then the sum of the squared outputs exactly, by any reckoning."""
    tensors = {t.name: np.array(t.data) for t in _upstream.read_gguf(gguf("moe"))[1]}
    sums = {t.name: np.array(t.data) for t in _upstream.read_gguf(imatrices["moe"])[1]}
    name = "blk.1.ffn_down_exps.weight"
    only = np.zeros_like(tensors[name])
    only[:, :, 7] = tensors[name][:, :, 7]
    model = copy(gguf("moe"), tmp_path / "model.gguf", {name: only})
    scores = ("count", "energy", "norm")
    count, energy, norm = (rank_experts(model, imatrices["moe"], keep=8, score=score)[0] for score in scores)
    for e in range(N_EXPERT):
        outputs = sum(w * w for w in only[e, :, 7].astype(float)) * sums[f"{name}.in_sum2"][e, 7]
        assert energy.scores[e] == pytest.approx(outputs, rel=1e-5)
        assert norm.scores[e] == pytest.approx((outputs / count.scores[e]) ** 0.5, rel=1e-5)


# ---- probing


def test_probing_masks_as_the_written_file_does_and_chooses_what_costs_less(
    imatrices: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    source, importance = open_source(gguf("moe")), read_importance(imatrices["moe"])
    words = tmp_path / "selection.txt"
    words.write_text(" ".join(np.random.default_rng(11).choice(text.read_text().split(), 1500)))
    worst = [flipped(r) for r in rank_experts(source, imatrices["moe"], keep=6, score="output")]
    options = {"band": 0.25, "n_chunks": 2, "n_threads": 1}
    refined, before, after = refine(source, worst, importance, words, **options)
    assert all(len(r.kept) == 6 and r.kept == tuple(sorted(r.kept)) for r in refined)
    assert after < 0.9 * before, "the strongest experts were removed, so nearly any change is better"
    with Llama(gguf("moe"), n_ctx=512, n_threads=1) as llm:
        ids = llm.tokenize(words.read_text(), add_bos=True)[512:1024]  # the chunk that judges
        reference = llm.logits(ids)[:-1]
    with pytest.raises(InputError, match="cannot be halved"):
        refine(source, worst, importance, words, n_chunks=1, n_threads=1)
    for rankings, kl in ((worst, before), (refined, after)):
        write_pruned(source, tmp_path / "out.gguf", rankings, "x", exact=True, overwrite=True)
        with Llama(tmp_path / "out.gguf", n_ctx=512, n_threads=1) as llm:
            found = kl_rows(reference, llm.logits(ids)[:-1])[0].mean()
        assert found == pytest.approx(kl, rel=0.02), "the model in memory is that of the file"


def flipped(r: Ranking) -> Ranking:
    """The strongest experts go instead of the weakest."""
    gone = set(np.argsort(-r.scores)[:2].tolist())
    return replace(r, kept=tuple(e for e in range(N_EXPERT) if e not in gone))


def test_masking_needs_a_bias(imatrices: dict[str, Path], text: Path, tmp_path: Path) -> None:
    source = open_source(gguf("moe"))
    without = replace(source, tensors=[t for t in source.tensors if "exp_probs_b" not in t.name])
    rankings = rank_experts(source, imatrices["moe"], keep=6)
    with pytest.raises(UnsupportedInputError, match="without one an ordinary cut is exact"):
        write_pruned(without, tmp_path / "never.gguf", rankings, "count", exact=True)
    with pytest.raises(UnsupportedInputError, match="layer 1 has no correction bias in F32 for text"):
        refine(without, rankings, read_importance(imatrices["moe"]), text, n_chunks=1, n_threads=1)
    with pytest.raises(InputError, match="above 0 and at most 1, got 2"):
        refine(source, rankings, read_importance(imatrices["moe"]), text, band=2)


# ---- what is asked for, what is refused


def test_ratio_is_the_share_that_stays(imatrices: dict[str, Path]) -> None:
    for ratio, n in ((1, 8), (0.75, 6), (0.7, 6), (0.5, 4), (0.01, 1)):
        assert {len(r.kept) for r in rank_experts(gguf("moe"), imatrices["moe"], ratio=ratio, force=True)} == {n}


def test_plan_makes_the_same_file_again(imatrices: dict[str, Path], tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    _, rankings = prune(gguf("vl"), imatrices["vl"], tmp_path / "a.gguf", ratio=0.6, top_k=2, plan=plan)
    slice_model(gguf("vl"), tmp_path / "b.gguf", experts=read_plan(plan), top_k=2)
    one, two = ({t.name: t.data.tobytes() for t in _upstream.read_gguf(tmp_path / n)[1]} for n in ("a.gguf", "b.gguf"))
    differ = {name for name in one if one[name] != two[name]}
    assert one.keys() == two.keys() and all("exp_probs_b" in name for name in differ), "a plan has no scales of biases"
    value = json.loads(plan.read_text())
    assert value["pools"]["vision"]["2"]["kept"] == list(rankings[4].kept) and value["n_kept"] == 5
    assert value["pools"]["text"]["1"]["counts"] == rankings[0].counts.tolist()
    source = open_source(tmp_path / "a.gguf")
    assert (source.n_expert, source.n_expert_used, source.keys["prune.score"].value) == (5, 2, "output")


def test_routing_groups_keep_as_many_each(imatrices: dict[str, Path]) -> None:
    source = open_source(gguf("moe"))
    key = _upstream.Key("ernie4_5-moe.expert_group_count", "u32", 2)
    grouped = type(source)(source.path, {**source.keys, key.name: key}, source.tensors)
    for r in rank_experts(grouped, imatrices["moe"], ratio=0.6):
        assert len(r.kept) == 6 and sum(e < 4 for e in r.kept) == 3
        best = np.argsort(-r.scores[:4], kind="stable")[:3]
        assert sorted(best.tolist()) == [e for e in r.kept if e < 4]
    with pytest.raises(InputError, match="a multiple of its 2 routing groups"):
        rank_experts(grouped, imatrices["moe"], keep=5)


def test_refusals_name_the_value_and_leave_no_file(imatrices: dict[str, Path], text: Path, tmp_path: Path) -> None:
    only_text, broken, not_finite = (tmp_path / name for name in ("text.gguf", "broken.gguf", "nan.gguf"))
    compute_imatrix(gguf("vl"), text, only_text, chunk=128, n_chunks=1, n_threads=1)
    broken.write_bytes(imatrices["moe"].read_bytes()[:300])
    nan = np.full((N_EXPERT, 96), np.nan, np.float32)
    copy(imatrices["moe"], not_finite, {"blk.1.ffn_down_exps.weight.in_sum2": nan})
    old = tmp_path / "imatrix.dat"
    old.write_bytes(b"\x01\0\0\0")
    plain, grouped, other = tmp_path / "plain.gguf", tmp_path / "grouped.gguf", tmp_path / "other.gguf"
    compute_imatrix(gguf("moe"), text, plain, chunk=128, n_chunks=1, n_threads=1, experts=False)
    with_key(gguf("moe"), grouped, "ernie4_5-moe.expert_group_count", 2)
    slice_model(gguf("moe"), other, experts=4)
    before = sorted(tmp_path.iterdir())
    moe = imatrices["moe"]
    for match, model, imatrix, options in [
        ("no blk.1.ffn_down_exps.weight.experts.gate_out, which the score 'reap' needs; make the file", gguf("moe"),
         plain, {"keep": 6, "score": "reap"}),
        ("4 experts are less than 2 for each of the 3 .* keep at least 6", gguf("moe"), moe, {"keep": 4}),
        ("whole routers are only possible for ernie4_5-moe", grouped, moe, {"keep": 6, "exact": True}),
        ("'best' is not known", gguf("moe"), moe, {"keep": 4, "score": "best"}),
        ("9 experts cannot be kept; .* has 8", gguf("moe"), moe, {"keep": 9}),
        ("a token uses 3 experts, 2 would be left", gguf("moe"), moe, {"keep": 2}),
        ("got 1.5", gguf("moe"), moe, {"ratio": 1.5}),
        ("not both", gguf("moe"), moe, {"keep": 4, "ratio": 0.5}),
        ("has no experts", gguf("dense"), moe, {"keep": 4}),
        ("no statistics for blk.1.ffn_down_exps_vl.weight; experts for vision need pictures", gguf("vl"), only_text,
         {"keep": 6}),
        ("is of another model: .* has 8 counts", other, moe, {"keep": 4, "force": True}),
        ("not all finite", gguf("moe"), not_finite, {"keep": 6}),
        ("cannot be read as an importance matrix", gguf("moe"), broken, {"keep": 6}),
        ("is not a GGUF importance matrix", gguf("moe"), old, {"keep": 6}),
        ("expected 'imatrix'", gguf("moe"), gguf("moe"), {"keep": 6}),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=match):
            prune(model, imatrix, tmp_path / "out.gguf", **options)
    assert sorted(tmp_path.iterdir()) == before


def test_unused_experts_and_a_narrow_choice_are_reported(text: Path, tmp_path: Path) -> None:
    model = copy(gguf("moe"), tmp_path / "model.gguf", biases(gguf("moe"), {"text": {2: [0, 1, 5]}}))
    compute_imatrix(model, text, tmp_path / "i.gguf", chunk=128, n_threads=1)
    lines = list(report(*prune(model, tmp_path / "i.gguf", tmp_path / "out.gguf", keep=6)))
    assert len(lines) == 1 and "never reached 3 experts of 1 layers (layer 2: 0, 1, 5), 1 of them kept" in lines[0]
    forced = prune(model, tmp_path / "i.gguf", tmp_path / "out.gguf", keep=5, overwrite=True, force=True)
    lines = list(report(*forced))
    assert len(lines) == 2 and "a token uses 3 of 5 experts" in lines[1]


def test_verb_prunes_and_says_what_it_did(imatrices: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pyllamaernie", "prune", str(gguf("moe")), "--imatrix", str(imatrices["moe"])]

    def verb(*words: object) -> subprocess.CompletedProcess[str]:
        line = [*command, "-o", "out.gguf", *map(str, words)]
        return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)

    done = verb("--ratio", 0.75, "--plan", "plan.json")
    assert done.returncode == 0 and "6 experts, 3 per token" in done.stdout and "correction bias" in done.stderr
    assert json.loads((tmp_path / "plan.json").read_text())["format"] == "pyllamaernie-experts"
    for words, code, match in [
        ([], 2, "--keep"),
        (["--keep", 4, "--ratio", 0.5], 2, "not allowed"),
        (["--keep", 4, "--score", "best"], 2, "reap_sum, output, got best"),
        (["--keep", 4, "--score", "reap", "--overwrite"], 1, "--force"),
        (["--keep", 4, "--plan", "none/plan.json"], 1, "is not a folder"),
        (["--keep", 6], 1, "exists"),
        (["--keep", 6, "--threads", 0], 2, "--threads"),
    ]:
        done = verb(*words)
        assert (done.returncode, done.stdout) == (code, "") and match in done.stderr, (words, done.stderr)
    assert {path.name for path in tmp_path.iterdir()} == {"out.gguf", "plan.json"}
