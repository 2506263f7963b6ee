"""A model with fewer layers or experts: what stays is the same bytes, what is cut is as if it had never been there."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import checkpoints
import gguf as gguf_py
import numpy as np
import pytest
from checkpoint_shapes import SHAPES, shape_with
from gguf_models import gguf

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
from cut_cases import IDS, logits, quantized
from gguf_contents import contents, data_of, rewrite

from pyllamaernie.cli.slice import parse_layers
from pyllamaernie.convert import convert
from pyllamaernie.cut.slice import first_experts, read_plan, slice_model
from pyllamaernie.cut.source import open_source
from pyllamaernie.errors import CorruptModelError, InputError, ModelNotFoundError, UnsupportedInputError
from pyllamaernie.gguf import file as gguf_file


@pytest.mark.parametrize("kind", ["dense", "moe", "vl"])
def test_cutting_nothing_gives_the_same_keys_tensors_and_logits(kind: str, tmp_path: Path) -> None:
    n = SHAPES[kind]
    options = {} if kind == "dense" else {"experts": n.n_expert, "top_k": n.n_expert_used}
    result = slice_model(gguf(kind), tmp_path / "same.gguf", layers=range(n.n_layer), **options)
    (before, keys), (after, new_keys) = contents(gguf(kind)), contents(tmp_path / "same.gguf")
    assert before == after and list(before) == list(after)
    added = {name: new_keys.pop(name) for name in list(new_keys) if name.startswith("prune.")}
    assert keys == new_keys and set(added) <= {"prune.kept.text", "prune.kept.vision"}
    assert result.warnings == ()
    np.testing.assert_array_equal(logits(gguf(kind)), logits(tmp_path / "same.gguf"))


def test_every_key_keeps_its_type(tmp_path: Path) -> None:
    odd = {
        "x.u8": ("u8", 7),
        "x.i32": ("i32", -7),
        "x.f64": ("f64", 0.1),
        "x.i64s": ("list:i64", [-(2**40), 3]),
        "x.u16s": ("list:u16", [1, 2]),
        "x.bools": ("list:bool", [True, False]),
    }
    path = rewrite(gguf("dense"), tmp_path / "odd.gguf", {}, odd)
    slice_model(path, tmp_path / "out.gguf", layers=[0, 1, 2, 3])
    kinds = [
        {n: ([t.name for t in f.types], f.contents()) for n, f in gguf_py.GGUFReader(p).fields.items() if n[0] != "G"}
        for p in (path, tmp_path / "out.gguf")
    ]
    assert kinds[0] == kinds[1] and kinds[1]["x.i64s"] == (["ARRAY", "INT64"], [-(2**40), 3])


@pytest.mark.parametrize("source", ["f32", "q8_0"])
@pytest.mark.parametrize("kind", ["moe", "vl"])
def test_kept_experts_are_the_same_bytes(kind: str, source: str, tmp_path: Path) -> None:
    path = gguf(kind) if source == "f32" else quantized(kind)
    slice_model(path, tmp_path / "out.gguf", experts=5)
    (before, keys), (after, new_keys) = contents(path), contents(tmp_path / "out.gguf")
    assert new_keys[f"{keys['general.architecture']}.expert_count"] == 5 and before.keys() == after.keys()
    cut = {n for n in before if "_exps" in n or "ffn_gate_inp" in n or "exp_probs_b" in n}
    assert len(cut) == 3 * 5 * (2 if kind == "vl" else 1)
    for name, (shape, kind_, data) in before.items():
        size = len(data) * 5 // 8 if name in cut else len(data)
        small = tuple(5 if name in cut and i == shape.index(8) else n for i, n in enumerate(shape))
        assert after[name] == (small, kind_, data[:size]), name
    assert np.isfinite(logits(tmp_path / "out.gguf")).all()


def test_dropped_layers_are_as_if_they_added_nothing(tmp_path: Path) -> None:
    """A layer whose two output projections are zero passes its input on, so it equals a layer that is not there."""
    path = gguf("moe")
    slice_model(path, tmp_path / "cut.gguf", layers=[0, 2])
    tensors = data_of(path)
    tails = ("attn_output.weight", "ffn_down_exps.weight", "ffn_down_shexp.weight")
    silent = {f"blk.{il}.{tail}": np.zeros_like(tensors[f"blk.{il}.{tail}"]) for il in (1, 3) for tail in tails}
    rewrite(path, tmp_path / "silent.gguf", silent)
    expected = logits(tmp_path / "silent.gguf")
    np.testing.assert_allclose(logits(tmp_path / "cut.gguf"), expected, rtol=0, atol=1e-4 * expected.std())
    _, keys = contents(tmp_path / "cut.gguf")
    assert keys["ernie4_5-moe.block_count"] == 2 and keys["slice.layers"] == [0, 2]
    slice_model(quantized("vl"), tmp_path / "vl.gguf", layers=[0, 3])
    assert np.isfinite(logits(tmp_path / "vl.gguf", picture=True)).all()


@pytest.mark.parametrize("kind", ["moe", "vl"])
def test_dense_lead_follows_the_layers(kind: str, tmp_path: Path) -> None:
    for layers, lead in (([1, 3], 0), ([0], 1), ([0, 3], 1)):
        out = tmp_path / f"{layers}.gguf"
        slice_model(gguf(kind), out, layers=layers)
        _, keys = contents(out)
        assert keys[f"{keys['general.architecture']}.leading_dense_block_count"] == lead
        assert np.isfinite(logits(out)).all()


def test_arrays_by_layer_are_cut_and_others_are_not(tmp_path: Path) -> None:
    arch = "ernie4_5-vl-moe"  # has 4 layers, and 4 rope sections
    arrays = {f"{arch}.expert_feed_forward_length": ("list:u32", [96] * 4)}
    arrays[f"{arch}.attention.head_count_kv"] = ("list:u32", [2] * 4)
    path = rewrite(gguf("vl"), tmp_path / "a.gguf", {}, arrays)
    slice_model(path, tmp_path / "out.gguf", layers=[0, 2, 3])
    (_, old), (_, new) = contents(path), contents(tmp_path / "out.gguf")
    assert new[f"{arch}.expert_feed_forward_length"] == [96] * 3 and new[f"{arch}.attention.head_count_kv"] == [2] * 3
    assert new[f"{arch}.rope.dimension_sections"] == old[f"{arch}.rope.dimension_sections"]
    np.testing.assert_array_equal(
        logits(tmp_path / "out.gguf"), logits(slice_model(gguf("vl"), tmp_path / "b.gguf", layers=[0, 2, 3]).path)
    )
    odd = rewrite(gguf("vl"), tmp_path / "odd.gguf", {}, {f"{arch}.mystery": ("list:u32", [1] * 4)})
    with pytest.raises(UnsupportedInputError, match="mystery has 4 values for 4 layers"):
        slice_model(odd, tmp_path / "never.gguf", layers=[0])


def test_every_second_layer_sparse_is_cut_only_where_the_keys_can_say_so(tmp_path: Path) -> None:
    """No converter writes such a file and no loader takes it, so only the keys are looked at."""
    whole = open_source(gguf("moe"))
    changed = {"interleave_moe_layer_step": 2, "leading_dense_block_count": 0}
    keys = {f"{whole.arch}.{n}": replace(whole.keys[f"{whole.arch}.{n}"], value=v) for n, v in changed.items()}
    dense = [t for t in whole.tensors if not (t.name.startswith("blk.2.") and ("exp" in t.name or "_inp" in t.name))]
    source = replace(whole, keys={**whole.keys, **keys}, tensors=dense)
    for layers in ([0, 1], [2, 3], [0, 3]):
        slice_model(source, tmp_path / "out.gguf", layers=layers, overwrite=True)
        assert contents(tmp_path / "out.gguf")[1]["ernie4_5-moe.leading_dense_block_count"] == 0
    with pytest.raises(InputError, match=r"layers \[1, 2\] .*cannot be expressed: its dense layers are \[0, 2\]"):
        slice_model(source, tmp_path / "never.gguf", layers=[1, 2])


def test_top_k_is_one_key(tmp_path: Path) -> None:
    slice_model(gguf("moe"), tmp_path / "out.gguf", top_k=1)
    (before, keys), (after, new) = contents(gguf("moe")), contents(tmp_path / "out.gguf")
    keys["ernie4_5-moe.expert_used_count"] = 1
    assert before == after and keys == new
    assert not np.allclose(logits(gguf("moe")), logits(tmp_path / "out.gguf"))


def test_groups_keep_as_many_each(tmp_path: Path) -> None:
    path = rewrite(gguf("moe"), tmp_path / "g.gguf", {}, {"ernie4_5-moe.expert_group_count": ("u32", 4)})
    assert first_experts(open_source(path), 4)["text"][1] == [0, 2, 4, 6]
    for experts, match in (
        (6, "4 groups"),
        ({"text": {il: [0, 1, 4, 6] for il in (1, 2, 3)}}, "each must keep as many"),
    ):
        with pytest.raises(InputError, match=match):
            slice_model(path, tmp_path / "out.gguf", experts=experts)


def test_plan_names_the_experts(tmp_path: Path) -> None:
    rows = {"1": [0, 2, 5], "2": {"kept": [1, 2, 3], "scores": []}, "3": [5, 6, 7]}
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"format": "pyllamaernie-experts", "pools": {"text": rows}}))
    slice_model(gguf("moe"), tmp_path / "out.gguf", experts=read_plan(plan), layers=[0, 1, 3])
    before = data_of(gguf("moe"))
    after = data_of(tmp_path / "out.gguf")
    for tail in ("ffn_gate_inp.weight", "exp_probs_b.bias", "ffn_up_exps.weight"):
        experts = before[f"blk.3.{tail}"].take([5, 6, 7], axis=int("bias" in tail))
        np.testing.assert_array_equal(after[f"blk.2.{tail}"], experts)
    _, keys = contents(tmp_path / "out.gguf")
    assert keys["prune.kept.text"] == [0, 2, 5, 5, 6, 7] and keys["slice.layers"] == [0, 1, 3]


@pytest.mark.reference
def test_cut_model_is_what_transformers_makes_of_the_cut_weights(tmp_path: Path) -> None:
    """Layers 0 and 2, experts 1, 3, 4, 6 and 7, 64 of 96 neurons, 2 experts per token: all at once."""
    reference = pytest.importorskip("reference")
    experts = [1, 3, 4, 6, 7]
    kept = {"text": {il: experts for il in (1, 2, 3)}}
    slice_model(gguf("moe"), tmp_path / "out.gguf", layers=[0, 2], experts=kept, top_k=2, expert_ff={"text": 64})
    weights, cut = checkpoints.weights_of("moe", tied=False), {}
    for name, data in weights.items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        if layer in (1, 3):
            continue
        if layer == 2:
            name = name.replace(".layers.2.", ".layers.1.")
            if ".experts." in name:
                old = int(name.split(".")[5])
                if old not in experts:
                    continue
                name = name.replace(f".experts.{old}.", f".experts.{experts.index(old)}.")
                data = data[:, :64] if "down_proj" in name else data[:64]
            elif name.endswith("mlp.gate.weight"):
                data = data[experts]
            elif name.endswith("e_score_correction_bias"):
                data = data[:, experts]
        cut[name] = data
    shape = shape_with("moe", n_layer=2, n_expert=5, n_expert_used=2, n_ff_exp=64, n_shared=3)  # 3 x 64
    folder = checkpoints.write_checkpoint(tmp_path / "hf", "moe", shape=shape, tied=False, extra=cut)
    assert set(checkpoints.tensors("moe", shape, tied=False)) == set(cut)
    expected = reference.logits(folder, IDS)
    np.testing.assert_allclose(logits(tmp_path / "out.gguf"), expected, rtol=0, atol=2e-3 * expected.std())


def test_refusals_name_the_value_and_leave_no_file(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    rows = {il: [0, 1, 2] for il in (1, 2, 3)}
    step = rewrite(gguf("moe"), tmp_path / "step.gguf", {}, {"ernie4_5-moe.interleave_moe_layer_step": ("u32", 2)})
    cut_short = tmp_path / "short.gguf"
    cut_short.write_bytes(gguf("moe").read_bytes()[:-1000])
    before = sorted(tmp_path.iterdir())
    for error, match, model, options in [
        (InputError, "9 experts per token are not possible with 8; take 1 to 8", gguf("moe"), {"top_k": 9}),
        (InputError, "a token uses 3 experts, 2 would be left", gguf("moe"), {"experts": 2}),
        (InputError, "0 experts cannot be kept", gguf("moe"), {"experts": 0}),
        (InputError, "9 experts cannot be kept", gguf("moe"), {"experts": 9}),
        (InputError, "no layer is left", gguf("moe"), {"layers": []}),
        (InputError, "no layer 4; .* has layers 0 to 3", gguf("moe"), {"layers": [0, 4]}),
        (InputError, "layer 1 is named twice", gguf("moe"), {"layers": [1, 0, 1]}),
        (UnsupportedInputError, "do not say which layers are dense", step, {"layers": [1, 2]}),
        (InputError, "has no experts", gguf("dense"), {"experts": 4}),
        (InputError, "has no experts", gguf("dense"), {"top_k": 1}),
        (InputError, "the plan names pools", gguf("vl"), {"experts": {"text": rows}}),
        (InputError, "not an ascending list", gguf("moe"), {"experts": {"text": {**rows, 2: [1, 0, 2]}}}),
        (InputError, "not an ascending list", gguf("moe"), {"experts": {"text": {**rows, 2: [1, 2, 8]}}}),
        (InputError, r"keep \[2, 3\] experts", gguf("moe"), {"experts": {"text": {**rows, 2: [1, 2]}}}),
        (UnsupportedInputError, "'clip'", gguf("vl").parent / "mmproj-vl.gguf", {"layers": [0]}),
        (CorruptModelError, "short.gguf", cut_short, {"layers": [0]}),
        (ModelNotFoundError, "nowhere", tmp_path / "nowhere.gguf", {"layers": [0]}),
    ]:
        with pytest.raises(error, match=match):
            slice_model(model, out, **options)
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(InputError, match="is not a folder"):
        slice_model(gguf("moe"), tmp_path / "none" / "out.gguf", top_k=1)
    out.write_bytes(b"precious")
    with pytest.raises(InputError, match="exists"):
        slice_model(gguf("moe"), out, top_k=1)
    assert out.read_bytes() == b"precious"
    for text in ("", "3-1", "a", "1-", "0-99999999999"):
        with pytest.raises(InputError, match="--layers"):
            parse_layers(text)


def test_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*words: object) -> None:
        Path(words[0]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_file, "write_gguf", fail)
    with pytest.raises(OSError, match="No space"):
        slice_model(gguf("moe"), tmp_path / "out.gguf", top_k=1)
    assert not os.listdir(tmp_path)


def test_size_label_is_that_of_the_cut_model(tmp_path: Path) -> None:
    shape = shape_with("moe", n_expert=4)
    source = checkpoints.write_checkpoint(tmp_path / "hf", "moe", shape=shape, tied=False)
    _, small = contents(convert(source, tmp_path / "small.gguf", type="f32").model)
    slice_model(gguf("moe"), tmp_path / "out.gguf", experts=4)
    _, cut = contents(tmp_path / "out.gguf")
    assert cut["general.size_label"] == small["general.size_label"] != contents(gguf("moe"))[1]["general.size_label"]
