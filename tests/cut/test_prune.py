"""A pruned model is the whole one with masked experts; what cannot be pruned is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from gguf_models import gguf

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
from cut_cases import IDS, N_EXPERT, biases, imatrix, logits, quantized, text
from gguf_contents import data_of, rewrite

from pyllamaernie import Llama, programs
from pyllamaernie.cut.prune import prune, rank_experts, report
from pyllamaernie.cut.scores import Ranking
from pyllamaernie.cut.slice import read_plan, slice_model
from pyllamaernie.cut.source import BIAS_REMOVED, open_source
from pyllamaernie.errors import InputError, PyllamaernieError
from pyllamaernie.gguf import file as gguf_file
from pyllamaernie.quant.imatrix import compute_imatrix


def removed_experts(rankings: list[Ranking]) -> dict[str, dict[int, list[int]]]:
    """By pool and layer."""
    return {pool: {r.layer: list(r.removed) for r in rankings if r.pool == pool} for pool in ("text", "vision")}


@pytest.mark.parametrize("type_", ["f32", "q8_0"])
@pytest.mark.parametrize("kind", ["moe", "vl"])
def test_pruned_model_is_the_whole_one_with_masked_experts(kind: str, type_: str, tmp_path: Path) -> None:
    """With even biases. Probabilities over fewer experts are all larger by one factor, which renormalizing removes."""
    path, picture = gguf(kind) if type_ == "f32" else quantized(kind), kind == "vl"
    whole = rewrite(path, tmp_path / "whole.gguf", biases(path, {}))
    result, rankings = prune(whole, imatrix(kind), tmp_path / "pruned.gguf", keep=5, score="energy", force=True)
    assert result.n_expert == 5 and not any("bias" in line for line in result.warnings)
    removed = removed_experts(rankings)
    rewrite(path, tmp_path / "masked.gguf", biases(path, removed))
    expected = logits(tmp_path / "masked.gguf", picture=picture)
    pruned = logits(tmp_path / "pruned.gguf", picture=picture)
    assert np.abs(pruned - expected).max() < 1e-3 * expected.std()
    with_all = logits(whole, picture=picture)
    assert np.abs(with_all - expected).max() > 0.1 * expected.std(), "the removed experts must matter"


@pytest.mark.parametrize("type_", ["f32", "q8_0"])
@pytest.mark.parametrize("kind", ["moe", "vl"])
def test_exact_pruning_is_masking_with_any_bias(kind: str, type_: str, tmp_path: Path) -> None:
    """The routers stay whole, so that the choice among the kept experts is that of the whole model."""
    path, picture = gguf(kind) if type_ == "f32" else quantized(kind), kind == "vl"
    result, rankings = prune(path, imatrix(kind), tmp_path / "exact.gguf", keep=5, exact=True, force=True)
    assert result.n_expert == 5 and not result.warnings
    removed = removed_experts(rankings)
    rewrite(path, tmp_path / "masked.gguf", biases(path, removed, even=False))
    expected = logits(tmp_path / "masked.gguf", picture=picture)
    exact = logits(tmp_path / "exact.gguf", picture=picture)
    np.testing.assert_array_equal(exact, expected)  # same operations in the same order
    prune(path, imatrix(kind), tmp_path / "compact.gguf", keep=5, force=True)
    compact = logits(tmp_path / "compact.gguf", picture=picture)
    assert np.abs(compact - expected).max() > 1e-3 * expected.std(), "the bias must matter here"


def test_file_with_whole_routers_can_be_cut_and_quantized_but_not_pruned_again(tmp_path: Path) -> None:
    path = tmp_path / "exact.gguf"
    prune(gguf("moe"), imatrix("moe"), path, keep=5, exact=True, force=True)
    source = open_source(path)
    assert (source.n_expert, source.n_stored) == (8, 5)
    shapes = {t.name: t.shape for t in source.tensors}
    assert shapes["blk.1.ffn_gate_inp.weight"][0] == 8 and shapes["blk.1.ffn_down_exps.weight"][0] == 5
    result = slice_model(path, tmp_path / "short.gguf", layers=[0, 1, 3], top_k=2)
    assert result.n_expert == 5 and np.isfinite(logits(tmp_path / "short.gguf")).all()
    for name, model in (("q8-whole.gguf", gguf("moe")), ("q8-exact.gguf", path)):
        programs.run("llama-quantize", [model, tmp_path / name, "q8_0", 1], capture=True, timeout=60)
    prune(tmp_path / "q8-whole.gguf", imatrix("moe"), tmp_path / "q8-cut.gguf", keep=5, exact=True, force=True)
    one, two = ({name: data.tobytes() for name, data in data_of(tmp_path / f"q8-{n}.gguf").items()}
                for n in ("exact", "cut"))  # fmt: skip
    assert one == two, "first cut and then quantized, or the other way round"
    compute_imatrix(path, text(), tmp_path / "i.gguf", chunk=128, n_chunks=2, n_threads=1)
    for options, match in (({"experts": 4}, "pruned with whole routers"), ({"top_k": 6}, "take 1 to 5")):
        with pytest.raises(InputError, match=match):
            slice_model(path, tmp_path / "never.gguf", **options)
    with pytest.raises(InputError, match="pruned with whole routers"):
        prune(path, tmp_path / "i.gguf", tmp_path / "never.gguf", keep=4, force=True)


@pytest.mark.parametrize("n_stored", [2, 9, 6])
def test_wrong_number_of_stored_experts_does_not_load(n_stored: int, tmp_path: Path) -> None:
    prune(gguf("moe"), imatrix("moe"), tmp_path / "exact.gguf", keep=5, exact=True, force=True)
    wrong = rewrite(
        tmp_path / "exact.gguf", tmp_path / "wrong.gguf", {}, {"ernie4_5-moe.expert_stored_count": ("u32", n_stored)}
    )
    with pytest.raises(
        PyllamaernieError, match="wrong shape" if n_stored == 6 else f"expert_stored_count is {n_stored}"
    ):
        Llama(wrong, n_threads=1)


def test_biases_that_do_not_say_what_is_removed_do_no_harm(tmp_path: Path) -> None:
    """Such a file is wrong, but it must not read weights that are not there."""
    prune(gguf("moe"), imatrix("moe"), tmp_path / "exact.gguf", keep=5, exact=True, force=True)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        names = [f"blk.{il}.exp_probs_b.bias" for il in (1, 2, 3)]
        change = {name: rng.choice(np.float32([0, -1e9, 1e9, np.nan]), 8) for name in names} if seed else {}
        change = change or {name: np.zeros(8, np.float32) for name in names}
        shapes = {t.name: t.shape for t in gguf_file.read_gguf(tmp_path / "exact.gguf")[1]}
        change = {name: data.reshape(shapes[name]) for name, data in change.items()}
        found = logits(rewrite(tmp_path / "exact.gguf", tmp_path / "odd.gguf", change))
        assert found.shape == (len(IDS), 512) and (seed or np.isfinite(found).all())


def test_bias_of_removed_experts_is_that_of_the_graph() -> None:
    header = Path(__file__).parents[2] / "native" / "overlay" / "src" / "models" / "pyllamaernie-experts.h"
    found = re.search(r"ERNIE4_5_BIAS_REMOVED = (\S+)f;", header.read_text())
    assert found is not None and float(found[1]) == BIAS_REMOVED


def test_uneven_biases_are_scaled_and_warned_of(tmp_path: Path) -> None:
    result, rankings = prune(gguf("moe"), imatrix("moe"), tmp_path / "out.gguf", keep=6)
    assert any("3 routers add a correction bias, scaled" in line and "over 6 experts instead of 8" in line
               for line in result.warnings)  # fmt: skip
    old, new = (data_of(p) for p in (gguf("moe"), tmp_path / "out.gguf"))
    sums = data_of(imatrix("moe"))
    for r in rankings:
        prob = sums[f"blk.{r.layer}.ffn_down_exps.weight.experts.prob"]
        assert prob.sum() == pytest.approx(sums["blk.0.attn_q.weight.counts"].sum(), rel=1e-4), "one for each token"
        growth = prob.sum() / prob[list(r.kept)].sum()
        name = f"blk.{r.layer}.exp_probs_b.bias"
        expected = old[name].reshape(-1)[list(r.kept)] * growth
        np.testing.assert_allclose(new[name].reshape(-1), expected, rtol=1e-5)


def test_ratio_is_the_share_that_stays() -> None:
    for ratio, n in ((1, 8), (0.75, 6), (0.7, 6), (0.5, 4), (0.01, 1)):
        assert {len(r.kept) for r in rank_experts(gguf("moe"), imatrix("moe"), ratio=ratio, force=True)} == {n}


def test_plan_makes_the_same_file_again(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    _, rankings = prune(gguf("vl"), imatrix("vl"), tmp_path / "a.gguf", ratio=0.6, top_k=2, plan=plan)
    slice_model(gguf("vl"), tmp_path / "b.gguf", experts=read_plan(plan), top_k=2)
    one, two = ({name: data.tobytes() for name, data in data_of(tmp_path / n).items()} for n in ("a.gguf", "b.gguf"))
    differ = {name for name in one if one[name] != two[name]}
    assert one.keys() == two.keys() and all("exp_probs_b" in name for name in differ), "a plan has no scales of biases"
    value = json.loads(plan.read_text())
    assert value["pools"]["vision"]["2"]["kept"] == list(rankings[4].kept) and value["n_kept"] == 5
    assert value["pools"]["text"]["1"]["counts"] == rankings[0].counts.tolist()
    source = open_source(tmp_path / "a.gguf")
    assert (source.n_expert, source.n_expert_used, source.keys["prune.score"].value) == (5, 2, "output")


def test_routing_groups_keep_as_many_each() -> None:
    source = open_source(gguf("moe"))
    key = gguf_file.Key("ernie4_5-moe.expert_group_count", "u32", 2)
    grouped = type(source)(source.path, {**source.keys, key.name: key}, source.tensors)
    for r in rank_experts(grouped, imatrix("moe"), ratio=0.6):
        assert len(r.kept) == 6 and sum(e < 4 for e in r.kept) == 3
        best = np.argsort(-r.scores[:4], kind="stable")[:3]
        assert sorted(best.tolist()) == [e for e in r.kept if e < 4]
    with pytest.raises(InputError, match="a multiple of its 2 routing groups"):
        rank_experts(grouped, imatrix("moe"), keep=5)


def test_refusals_name_the_value_and_leave_no_file(tmp_path: Path) -> None:
    only_text, broken, not_finite = (tmp_path / name for name in ("text.gguf", "broken.gguf", "nan.gguf"))
    compute_imatrix(gguf("vl"), text(), only_text, chunk=128, n_chunks=1, n_threads=1)
    broken.write_bytes(imatrix("moe").read_bytes()[:300])
    nan = np.full((N_EXPERT, 96), np.nan, np.float32)
    rewrite(imatrix("moe"), not_finite, {"blk.1.ffn_down_exps.weight.in_sum2": nan})
    old = tmp_path / "imatrix.dat"
    old.write_bytes(b"\x01\0\0\0")
    plain, grouped, other = tmp_path / "plain.gguf", tmp_path / "grouped.gguf", tmp_path / "other.gguf"
    compute_imatrix(gguf("moe"), text(), plain, chunk=128, n_chunks=1, n_threads=1, experts=False)
    rewrite(gguf("moe"), grouped, {}, {"ernie4_5-moe.expert_group_count": ("u32", 2)})
    slice_model(gguf("moe"), other, experts=4)
    before = sorted(tmp_path.iterdir())
    moe = imatrix("moe")
    for match, model, statistics, options in [
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
            prune(model, statistics, tmp_path / "out.gguf", **options)
    assert sorted(tmp_path.iterdir()) == before


def test_unused_experts_and_a_narrow_choice_are_reported(tmp_path: Path) -> None:
    model = rewrite(gguf("moe"), tmp_path / "model.gguf", biases(gguf("moe"), {"text": {2: [0, 1, 5]}}))
    compute_imatrix(model, text(), tmp_path / "i.gguf", chunk=128, n_threads=1)
    lines = list(report(*prune(model, tmp_path / "i.gguf", tmp_path / "out.gguf", keep=6)))
    assert len(lines) == 1 and "never reached 3 experts of 1 layers (layer 2: 0, 1, 5), 1 of them kept" in lines[0]
    forced = prune(model, tmp_path / "i.gguf", tmp_path / "out.gguf", keep=5, overwrite=True, force=True)
    lines = list(report(*forced))
    assert len(lines) == 2 and "a token uses 3 of 5 experts" in lines[1]
