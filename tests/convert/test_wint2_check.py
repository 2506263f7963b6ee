"""Does a 2-bit release fit its original: readings of the bytes, pieces mixed up or damaged."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import two_bit

from pyllamaernie import cli
from pyllamaernie.convert import check_two_bit, convert
from pyllamaernie.convert.wint2 import READINGS
from pyllamaernie.convert.wint2_check import sample_runs
from pyllamaernie.errors import WeightMismatchError


def swapped_nibbles(p: str, five: dict) -> dict:
    return {**five, "weight_scale": five["weight_scale"] >> 4 | five["weight_scale"] << 4}


def up_first(p: str, five: dict) -> dict:
    return five if p == "down_proj" else {k: np.concatenate(np.split(a, 2, -1)[::-1], -1) for k, a in five.items()}


def with_sign(p: str, five: dict) -> dict:
    return {**five, "quant_weight": (five["quant_weight"].astype(np.int64) - 128).astype(np.int8).view(np.uint8)}


def by_channel(p: str, five: dict) -> dict:
    return {k: np.ascontiguousarray(a.T).reshape(a.shape) if a.ndim == 2 else a for k, a in five.items()}


def in_tiles(p: str, five: dict) -> dict:
    rows, n = five["quant_weight"].shape
    tiles = five["quant_weight"].reshape(rows // 16, 16, n // 8, 8).transpose(2, 0, 3, 1)
    return {**five, "quant_weight": np.ascontiguousarray(tiles).reshape(rows, n)}


DEFECTS = dict(
    zip(("low-first", "up-first", "signed", "by-channel", "tiled"),
        (swapped_nibbles, up_first, with_sign, by_channel, in_tiles), strict=True)
)  # fmt: skip


def test_every_reading_has_a_folder_that_wants_it() -> None:
    assert list(DEFECTS) == list(READINGS)


@pytest.mark.parametrize("reading", READINGS)
def test_a_folder_meant_otherwise_is_refused_and_told(
    reading: str, experts, original: Path, imported: Path, tmp_path: Path
) -> None:
    folder = two_bit.write_release(tmp_path / "r", two_bit.changed(experts, DEFECTS[reading]))
    with pytest.raises(WeightMismatchError) as refusal:
        convert(folder, tmp_path / "x.gguf", original=original)
    text = str(refusal.value)
    assert "ernie.layers.2.mlp.experts.0.up_gate_proj.quant_weight: read as documented" in text
    assert f"--reading {reading} takes it so" in text and "seen: documented " in text
    assert [p.name for p in tmp_path.iterdir()] == ["r"]
    model = convert(folder, tmp_path / "x.gguf", original=original, reading=reading).model
    assert model.read_bytes() == imported.read_bytes()


@pytest.mark.parametrize("reading", READINGS)
def test_a_wrong_reading_of_a_good_folder_is_refused(reading: str, release, original, tmp_path: Path) -> None:
    with pytest.raises(WeightMismatchError, match=f"read as {reading}.*--reading documented takes it so"):
        convert(release, tmp_path / "x.gguf", original=original, reading=reading)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("reading", ["low-first+up-first", "up-first+by-channel", "low-first+tiled"])
def test_two_deviations_at_once_are_found(reading: str, experts, original, imported, tmp_path: Path) -> None:
    for name in reading.split("+"):  # meanings first, then places
        experts = two_bit.changed(experts, DEFECTS[name])
    folder = two_bit.write_release(tmp_path / "r", experts)
    with pytest.raises(WeightMismatchError, match=rf"--reading {re.escape(reading)} takes it so"):
        check_two_bit(folder, original)
    backwards = "+".join(reversed(reading.split("+")))
    model = convert(folder, tmp_path / "x.gguf", original=original, reading=backwards).model
    assert model.read_bytes() == imported.read_bytes()


def test_a_damaged_piece_is_told_from_a_wrong_reading(experts, original: Path, tmp_path: Path) -> None:
    name = "ernie.layers.3.mlp.experts.1.down_proj.quant_weight"
    data = experts[name].copy()
    for run in sample_runs(512, 2, (3, 1)):  # where this expert is looked at
        data[:, run] = 0
    folder = two_bit.write_release(tmp_path / "r", experts | {name: data})
    with pytest.raises(WeightMismatchError, match=r"experts\.1\.down_proj.*elsewhere they fit with 0\.[789].*damaged"):
        check_two_bit(folder, original)


def test_nibbles_that_cannot_be_told_apart_are_no_reason(experts, original: Path, tmp_path: Path) -> None:
    def alike(p: str, five: dict) -> dict:
        return {**five, "weight_scale": (five["weight_scale"] >> 4) * np.uint8(17)}

    report = check_two_bit(two_bit.write_release(tmp_path / "r", two_bit.changed(experts, alike)), original)
    assert "low-first" not in report.readings["down_proj"]


def test_fields_in_reverse_order_are_refused(experts, original: Path, tmp_path: Path) -> None:
    name = "layers.3.mlp.experts.1.down_proj"
    weights = two_bit.bf16_weights()[f"model.{name}.weight"]
    turned = two_bit.encode(weights.reshape(512, -1, 4)[:, :, ::-1].reshape(512, 512))
    folder = two_bit.write_release(tmp_path / "r", experts | {f"ernie.{name}.{k}": a for k, a in turned.items()})
    with pytest.raises(WeightMismatchError, match=rf"{name}.*in reverse order it fits, which CCQ2_B cannot hold"):
        check_two_bit(folder, original)


def exchanged(experts: Mapping[str, np.ndarray], a: str, b: str) -> dict[str, np.ndarray]:
    other = {a: b, b: a}
    return {
        next((name.replace(x, y) for x, y in other.items() if x in name), name): data for name, data in experts.items()
    }


@pytest.mark.parametrize(
    ("a", "b", "place"),
    [("experts.1.", "experts.2.", "expert 2 of layer 2"), ("layers.2.", "layers.3.", "expert 0 of layer 3")],
)
def test_experts_in_another_order_are_refused(a, b, place, experts, original: Path, tmp_path: Path) -> None:
    folder = two_bit.write_release(tmp_path / "r", exchanged(experts, a, b))
    with pytest.raises(WeightMismatchError, match=f"it fits {place} of the original"):
        check_two_bit(folder, original)


def test_one_wrong_expert_of_all_is_found(experts, original: Path, tmp_path: Path) -> None:
    two = {f".experts.{e}.down_proj": f".experts.{1 - e}.down_proj" for e in range(2)}
    mixed = {
        next((n.replace(x, y) for x, y in two.items() if x in n and "layers.3" in n), n): a for n, a in experts.items()
    }
    folder = two_bit.write_release(tmp_path / "r", mixed)
    with pytest.raises(WeightMismatchError, match=r"layers\.3\.mlp\.experts\.0\.down_proj.*fits expert 1 of layer 3"):
        check_two_bit(folder, original)


def test_super_scales_of_another_size_are_refused(experts, original: Path, tmp_path: Path) -> None:
    name = "ernie.layers.3.mlp.experts.1.down_proj.super_scales"
    folder = two_bit.write_release(tmp_path / "r", experts | {name: experts[name] + np.uint16(3 << 7)})
    with pytest.raises(WeightMismatchError, match=r"down_proj\.quant_weight: its weights are 7\.\d+ times as large"):
        check_two_bit(folder, original)


def test_the_original_of_another_model_is_refused(experts, tmp_path: Path) -> None:
    other = two_bit.write_original(tmp_path / "o", seed=1)
    folder = two_bit.write_release(tmp_path / "r", experts, plain_seed=1)
    with pytest.raises(WeightMismatchError, match=r"up_gate_proj.*no known reading fits.*documented -?0\.0\d\d"):
        check_two_bit(folder, other)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.3.mlp.gate.weight", "model.embed_tokens.weight"])
def test_another_training_state_is_refused(name: str, release, tmp_path: Path) -> None:
    """Its experts hardly differ, so their correlation would not tell."""
    data = two_bit.bf16_weights()[name].copy()
    data[..., ::20] *= 1.02
    other = two_bit.write_original(tmp_path / "o", extra={name: data})
    with pytest.raises(WeightMismatchError, match=rf"{name[5:]}: 9[45]\.\d % of its values.*Base and chat releases"):
        convert(release, tmp_path / "x.gguf", original=other)
    assert [p.name for p in tmp_path.iterdir()] == ["o"]


def test_a_release_with_no_plain_tensors_is_judged_by_its_experts(experts, original: Path, tmp_path: Path) -> None:
    folder = two_bit.write_release(tmp_path / "r", experts, drop=two_bit.plain_names())
    assert check_two_bit(folder, original).n_plain == 0


def test_a_router_of_another_shape_is_named(experts, original: Path, tmp_path: Path) -> None:
    extra = {"ernie.layers.2.mlp.gate.weight": ("F32", np.zeros((512, 4), np.float32))}
    folder = two_bit.write_release(tmp_path / "r", experts, extra=extra)
    with pytest.raises(WeightMismatchError, match=r"gate\.weight: has shape \[512, 4\], the original \[3, 512\]"):
        check_two_bit(folder, original)


def test_the_report_says_how_well_it_fits(release: Path, original: Path) -> None:
    report = check_two_bit(release, original)
    assert report.n_plain == 2 * 4 + 2 * 3 + 2 and report.same == 1
    assert report.n_experts == 6 and 0.93 < report.lowest < report.median < 0.945 and 0.85 < report.size < 0.92
    for found in report.readings.values():
        assert 0.93 < found["documented"] < 0.945 and found["low-first"] < found["documented"] - 0.004
        assert max(value for name, value in found.items() if name not in ("documented", "low-first")) < 0.1
    assert "up-first" not in report.readings["down_proj"]  # it is the same there


def test_check_writes_nothing_and_fails_with_3(release, experts, original, tmp_path: Path, capsys) -> None:
    words = ["--original", str(original), "--check", "-o", str(tmp_path / "x.gguf")]
    assert cli.main(["convert", str(release), *words]) == 0
    assert "low-first 0.9" in capsys.readouterr().out and not list(tmp_path.iterdir())
    folder = two_bit.write_release(tmp_path / "r", two_bit.changed(experts, up_first))
    assert cli.main(["convert", str(folder), *words]) == 3
    out, err = capsys.readouterr()
    assert "--reading up-first takes it so" in err and len(err.splitlines()) == 1 and out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["r"]
