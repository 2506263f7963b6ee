"""Baidu's 2-bit releases to GGUF: bits, refusals, and the model that comes out.

The releases are synthetic, in the documented layout; whether one fits its original is in test_wint2_check.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import two_bit
from checkpoint_shapes import Shape
from gguf import GGMLQuantizationType as T
from gguf import GGUFReader

from pyllamaernie import cli
from pyllamaernie.convert import check_two_bit, convert
from pyllamaernie.errors import ConvertError, MissingFileError, TensorMappingError
from pyllamaernie.quant import ccq

SHAPE = two_bit.SHAPE
UP_GATE = "ernie.layers.2.mlp.experts.0.up_gate_proj"


def test_the_formula_written_out_gives_what_numpy_decodes(experts) -> None:
    rng = np.random.default_rng(5)
    for p in ("up_gate_proj", "down_proj"):
        five = two_bit.five_of(experts, 3, 2, p)
        whole = two_bit.decoded(five)
        for n, k in zip(rng.integers(0, len(whole), 200), rng.integers(0, 512, 200), strict=True):
            assert two_bit.weights_one_by_one(five, n, k) == whole[n, k]


def test_the_synthetic_codes_are_as_good_as_the_code_can_be(experts) -> None:
    weights = two_bit.bf16_weights()["model.layers.2.mlp.experts.1.down_proj.weight"]
    error = ((two_bit.decoded(two_bit.five_of(experts, 2, 1, "down_proj")) - weights) ** 2).sum() / (weights**2).sum()
    assert 0.10 < error < 0.13  # docs/ccq.md: Baidu's code has 0.107 at best on a Gaussian


def test_imported_experts_are_the_codes_bit_for_bit(imported: Path, experts) -> None:
    tensors = {t.name: t for t in GGUFReader(imported).tensors}
    weights = two_bit.decoded_experts(experts)
    for il, e in two_bit.EXPERTS:
        for x in ("gate", "up", "down"):
            tensor = tensors[f"blk.{il}.ffn_{x}_exps.weight"]
            assert tensor.tensor_type.name == "CCQ2_B" and tensor.shape.tolist() == [512, 512, SHAPE.n_expert]
            got = ccq.decode_ccq2_b(np.ascontiguousarray(tensor.data[e]).reshape(-1, 142)).reshape(512, 512)
            expected = weights[f"model.layers.{il}.mlp.experts.{e}.{x}_proj.weight"]
            assert np.array_equal(got.view("u4"), expected.view("u4")), (il, e, x)


def test_all_else_comes_from_the_original(imported: Path, original: Path, tmp_path: Path) -> None:
    ours = {t.name: t for t in GGUFReader(imported).tensors}
    plain = {t.name: t for t in GGUFReader(convert(original, tmp_path / "x.gguf", type="q8_0").model).tensors}
    assert ours.keys() == plain.keys()
    for name, tensor in ours.items():
        if "_exps" not in name:
            assert tensor.tensor_type == plain[name].tensor_type and np.array_equal(tensor.data, plain[name].data), name
    assert {ours[f"blk.1.ffn_{x}_exps.weight"].tensor_type for x in ("gate", "up", "down")} == {T.Q4_0}
    assert GGUFReader(imported).fields["general.file_type"].contents() == 116


def test_a_wanted_type_holds_for_experts_in_4_bits_too(release: Path, original: Path, tmp_path: Path) -> None:
    rows = convert(release, tmp_path / "x.gguf", original=original, type="bf16").tensors
    types = {row.name: row.type for row in rows}
    assert types["blk.1.ffn_up_exps.weight"] == types["blk.0.attn_q.weight"] == "BF16"
    assert types["blk.2.ffn_up_exps.weight"] == "CCQ2_B"


SPELLINGS = {
    "unsigned": {"signed": False},
    "model.layers": {"rename": lambda name: name.replace("ernie.", "model.", 1)},
    "super_scale": {"rename": lambda name: name.replace("super_scales", "super_scale")},
    "one file": {"shards": 1},
}


@pytest.mark.parametrize("options", SPELLINGS.values(), ids=SPELLINGS)
def test_other_spellings_give_the_same_file(options: dict, experts, original, imported, tmp_path: Path) -> None:
    folder = two_bit.write_release(tmp_path / "r", experts, **options)
    assert convert(folder, tmp_path / "toy.gguf", original=original).model.read_bytes() == imported.read_bytes()


@pytest.mark.parametrize("names", ["memory", "fused"])
def test_the_original_may_be_stored_in_other_ways(names: str, release, imported, tmp_path: Path) -> None:
    other = two_bit.write_original(tmp_path / "Toy-PT", names=names)
    assert convert(release, tmp_path / "toy.gguf", original=other).model.read_bytes() == imported.read_bytes()


@pytest.mark.parametrize("n_slices", [2, 4])
def test_a_release_in_slices_gives_the_same_file(n_slices: int, experts, original, imported, tmp_path: Path) -> None:
    folder = two_bit.write_sliced(tmp_path / f"Toy-2Bits-TP{n_slices}-Paddle", experts, n_slices)
    assert convert(folder, tmp_path / "toy.gguf", original=original).model.read_bytes() == imported.read_bytes()


def test_slices_with_parameters_of_their_own_need_whole_blocks(experts, original: Path, tmp_path: Path) -> None:
    two_bit.write_sliced(tmp_path / "r", experts, 2)
    weights = two_bit.bf16_weights()["model.layers.2.mlp.experts.0.down_proj.weight"]
    second = two_bit.encode(weights[:, 256:], seed=9)
    stem = "ernie.layers.2.mlp.experts.0.down_proj"
    tensors = two_bit.read_tensors(tmp_path / "r" / "rank1")
    tensors |= {f"{stem}.{name}": (tensors[f"{stem}.{name}"][0], data) for name, data in second.items()}
    two_bit.write_shards(tmp_path / "r" / "rank1", tensors, 1)
    with pytest.raises(
        ConvertError, match=r"down_proj\.quant_weight: the 2 slices have parameters of their own for 256"
    ):
        convert(tmp_path / "r", tmp_path / "x.gguf", original=original)


@pytest.mark.slow
def test_slices_of_whole_blocks_may_have_parameters_of_their_own(tmp_path: Path) -> None:
    shape = Shape(**{**vars(SHAPE), "n_layer": 3, "n_expert": 2, "n_ff_exp": 1024})
    experts = two_bit.encoded_experts(shape)
    folder = two_bit.write_sliced(tmp_path / "r", experts, 2, shape)
    stem, weights = "layers.2.mlp.experts.1.down_proj", two_bit.bf16_weights(shape)
    second = two_bit.encode(weights[f"model.{stem}.weight"][:, 512:], seed=9)
    tensors = two_bit.read_tensors(folder / "rank1")
    tensors |= {f"ernie.{stem}.{name}": (tensors[f"ernie.{stem}.{name}"][0], data) for name, data in second.items()}
    two_bit.write_shards(folder / "rank1", tensors, 1)
    model = convert(folder, tmp_path / "x.gguf", original=two_bit.write_original(tmp_path / "o", shape)).model
    tensor = next(t for t in GGUFReader(model).tensors if t.name == "blk.2.ffn_down_exps.weight")
    got = ccq.decode_ccq2_b(np.ascontiguousarray(tensor.data[1]).reshape(-1, 142)).reshape(512, 1024)
    first = two_bit.decoded({name: experts[f"ernie.{stem}.{name}"] for name in two_bit.FIVE})[:, :512]
    assert np.array_equal(got, np.concatenate([first, two_bit.decoded(second)], axis=1))


def refused(tmp_path: Path, original: Path, experts, match: str, error: type[Exception], **options: object) -> None:
    folder = two_bit.write_release(tmp_path / "r", experts, **options)
    with pytest.raises(error, match=match):
        convert(folder, tmp_path / "x.gguf", original=original)
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def with_value(experts: Mapping, name: str, at: int, value: float) -> dict:
    data = experts[f"{UP_GATE}.{name}"].copy()
    data[at] = value
    return experts | {f"{UP_GATE}.{name}": data}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("code_scale", np.nan, r"code_scale of channel 7 is nan, expected a positive number"),
        ("code_scale", -120.0, r"code_scale of channel 7 is -120\.0, expected a positive number"),
        ("code_zp", np.inf, r"code_zp of channel 7 is inf, expected a finite number"),
        ("super_scales", 0x7F80, r"super scale of channel 7 is inf, expected a finite number"),
        ("code_zp", -9000.0, r"channel 7 has words from -\d+ to \d+, expected 0 to 32767"),
        ("code_scale", 130.0, r"channel 7 has words from \d+ to 3[34]\d+, expected 0 to 32767"),
    ],
)
def test_a_parameter_that_cannot_be_is_named(name, value, words, experts, original, tmp_path: Path) -> None:
    refused(tmp_path, original, with_value(experts, name, 7, value), rf"{UP_GATE}\.quant_weight: {words}", ConvertError)


def test_a_word_out_of_range_that_does_not_occur_is_no_reason(experts, original: Path, tmp_path: Path) -> None:
    unused = experts[f"{UP_GATE}.quant_weight"][:, 7].max()
    top = 32767 / (int(unused) + 0.5)  # every code that occurs stays below
    edited = with_value(with_value(experts, "code_zp", 7, 0.0), "code_scale", 7, top)
    check_two_bit(two_bit.write_release(tmp_path / "r", edited), original)


@pytest.mark.parametrize("name", [f"{UP_GATE}.code_zp", "ernie.layers.3.mlp.experts.2.down_proj.weight_scale"])
def test_a_missing_tensor_is_named(name: str, experts, original, tmp_path: Path) -> None:
    expected = name.replace("ernie", "model").replace(".", r"\.")
    refused(tmp_path, original, experts, f"1 missing: {expected}$", TensorMappingError, drop=[name])


@pytest.mark.parametrize(
    "name",
    [f"{UP_GATE}.activation_scale", f"{UP_GATE}.super_scale", "ernie.layers.3.mlp.experts.3.down_proj.code_zp",
     "ernie.layers.1.mlp.experts.0.down_proj.code_scale"],
)  # fmt: skip
def test_an_extra_tensor_is_named(name: str, experts, original, tmp_path: Path) -> None:
    extra = {name: ("BF16", np.zeros(1024, np.uint16))}
    refused(tmp_path, original, experts, "(unknown|odd|missing)", TensorMappingError, extra=extra)


@pytest.mark.parametrize(
    ("name", "dtype", "words"),
    [
        ("quant_weight", "BF16", r"quant_weight is BF16, expected one of I8, U8"),
        ("super_scales", "F16", r"super_scales is F16, expected one of BF16, U16"),
        ("code_scale", "I32", r"code_scale is I32, expected one of F32"),
    ],
)
def test_a_tensor_of_another_type_is_named(name, dtype, words, experts, original, tmp_path: Path) -> None:
    data = experts[f"{UP_GATE}.{name}"]
    data = data.astype(np.uint16) if dtype == "BF16" else data
    extra = {f"{UP_GATE}.{name}": (dtype, data)}
    refused(tmp_path, original, experts, words, TensorMappingError, extra=extra)


def test_a_transposed_tensor_is_named(experts, original, tmp_path: Path) -> None:
    extra = {f"{UP_GATE}.quant_weight": ("I8", np.ascontiguousarray(experts[f"{UP_GATE}.quant_weight"].T))}
    words = r"has shape \[1024, 128\], expected \[128, 1024\] \(transposed\)"
    refused(tmp_path, original, experts, words, TensorMappingError, extra=extra)


def test_a_truncated_shard_is_refused(experts, original, tmp_path: Path) -> None:
    folder = two_bit.write_release(tmp_path / "r", experts)
    path = folder / "model-00002-of-00003.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(ConvertError, match=r"model-00002-of-00003\.safetensors: cut short"):
        check_two_bit(folder, original)


def test_a_missing_slice_is_refused(experts, original, tmp_path: Path) -> None:
    folder = two_bit.write_sliced(tmp_path / "r", experts, 2)
    shutil.move(folder / "rank1", folder / "rank3")
    with pytest.raises(MissingFileError, match="has rank0, rank3; expected rank0 and on"):
        check_two_bit(folder, original)


def test_an_original_of_another_size_is_refused(release: Path, tmp_path: Path) -> None:
    other = checkpoints.write_checkpoint(tmp_path / "o", "moe", tied=False)
    with pytest.raises(ConvertError, match=r"hidden_size is 256, in .*Toy-2Bits-Paddle it is 512.*Toy-PT"):
        check_two_bit(release, other)


def test_a_release_as_its_own_original_is_refused(release: Path) -> None:
    with pytest.raises(ConvertError, match="is quantized too; the original is Toy-PT"):
        check_two_bit(release, release)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantization": "wint4"}, "quantization 'wint4'; of Baidu's quantized releases only 'wint2'.*Toy-PT"),
        ({"moe_quant_config": {"moe_w2_quant_config": {"quant_group_size": 128}}}, "quant_group_size 128; only 64"),
        ({"moe_quant_config": {"moe_w2_quant_config": {"quant_type": "wint2.5"}}}, "quant_type 'wint2.5'"),
        ({"moe_quant_config": {"moe_w2_quant_config": {"quant_start_layer": 9}}}, "2 bits begin with layer 9"),
        ({"moe_quant_config": {"moe_w4_quant_config": {"quant_end_layer": 3}}}, "no layer has experts in 2 bits"),
    ],
)
def test_another_quantization_is_named(change: dict, words: str, original, tmp_path: Path) -> None:
    said = {**two_bit.quantization_config(SHAPE), **change}
    folder = tmp_path / "Toy-2Bits-Paddle"
    two_bit.write_release(folder, {}, config_changes={"quantization_config": said})
    with pytest.raises(ConvertError, match=words):
        convert(folder, tmp_path / "x.gguf", original=original)


def test_rows_that_fill_no_block_are_refused(original, tmp_path: Path) -> None:
    shape = Shape(**{**vars(SHAPE), "n_ff_exp": 384})
    two_bit.write_release(tmp_path / "r", {}, shape)
    two_bit.write_original(tmp_path / "o", shape)
    with pytest.raises(ConvertError, match="moe_intermediate_size 384 does not divide into blocks of CCQ2_B"):
        convert(tmp_path / "r", tmp_path / "x.gguf", original=tmp_path / "o")


def test_the_command_prints_how_well_it_fits_and_what_it_wrote(release, original, tmp_path: Path, capsys) -> None:
    words = ["convert", release, "--original", original, "-o", tmp_path / "x.gguf"]
    assert cli.main([str(word) for word in words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("read as documented: correlation with the original 0.9")
    assert lines[-1].startswith(f"{tmp_path / 'x.gguf'}: ") and lines[-1].endswith("ccq2_b")


def test_wrong_options_are_one_sentence(release, original, tmp_path: Path) -> None:
    def refusal(*args: object) -> str:
        with pytest.raises(ConvertError) as error:
            cli.main(["--debug", "convert", *map(str, args), "-o", str(tmp_path / "x.gguf")])
        return str(error.value)

    assert "pass --original with the folder of Toy-PT" in refusal(release)
    assert "pass --original with the folder of Toy-PT" in refusal(release, "--check")
    assert "needs no --original" in refusal(original, "--original", original)
    assert "--dry-run shows what any other folder becomes" in refusal(original, "--check")
    assert "reading 'upside-down'; expected documented, or" in refusal(
        release, "--original", original, "--reading", "upside-down"
    )


def test_a_dry_run_says_the_sizes_with_and_without_weights(release, original, imported, tmp_path: Path) -> None:
    written = {t.name: int(t.n_bytes) for t in GGUFReader(imported).tensors}
    planned = convert(release, tmp_path / "x.gguf", original=original, dry_run=True)
    assert {row.name: row.n_bytes for row in planned.tensors} == written and planned.check is None
    for name, source in (("r", release), ("o", original)):
        (tmp_path / name).mkdir()
        shutil.copy(source / "config.json", tmp_path / name)
    with pytest.raises(ConvertError, match="pass --original with the folder of"):  # before any weights are missed
        convert(tmp_path / "r", tmp_path / "x.gguf")
    planned = convert(tmp_path / "r", tmp_path / "x.gguf", original=tmp_path / "o", dry_run=True)
    assert {row.name: row.n_bytes for row in planned.tensors} == written
    assert "experts of layers 2 and up in 2 bits" in planned.assumed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o", "r"]


class Interrupted:
    """Raises KeyboardInterrupt at the n-th step of all work."""

    def __init__(self, left: int) -> None:
        self.left = left

    def start(self, total: int, unit: str, text: str) -> None:
        self.total = total

    def advance(self, n: int) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def close(self) -> None:
        pass


@pytest.mark.parametrize("at", [2, 10, 60], ids=["while checking", "early", "late"])
def test_an_interrupted_import_leaves_nothing(at: int, release, original, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(release, tmp_path / "x.gguf", original=original, progress=Interrupted(at))
    assert not list(tmp_path.iterdir())


def write_decoded(folder: Path, experts: Mapping[str, np.ndarray]) -> Path:
    """The original in float32, with the weights that the codes stand for."""
    weights = two_bit.bf16_weights() | two_bit.decoded_experts(experts)
    return checkpoints.write_checkpoint(folder, "moe", shape=SHAPE, tied=False, extra=weights)


def test_the_imported_model_computes_what_its_codes_say(experts, release, original, tmp_path: Path) -> None:
    pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
    from pyllamaernie import Llama

    ours = convert(release, tmp_path / "ours.gguf", original=original, type="f32").model
    plain = convert(write_decoded(tmp_path / "f32", experts), tmp_path / "f32.gguf", type="f32").model
    prompt = [1, *range(40, 70)]
    with Llama(ours, n_threads=1) as a, Llama(plain, n_threads=1) as b:
        got, expected = a.logits(prompt), b.logits(prompt)
    error = ((got - expected) ** 2).mean() / expected.var()
    print(f"squared error of logits over their variance: {error:.2e}")
    assert error < 1e-3  # what rounding the activations to 8 bits costs


@pytest.mark.reference
def test_the_imported_model_in_f32_equals_transformers(experts, release, original, tmp_path: Path) -> None:
    """llama-quantize decodes CCQ2_B with the C code, so both sides compute in float32."""
    import reference

    from pyllamaernie import Llama, programs

    ours = convert(release, tmp_path / "ours.gguf", original=original, type="f32").model
    programs.run("llama-quantize", ["--allow-requantize", ours, tmp_path / "f32.gguf", "F32", 1], capture=True)
    types = {t.name: t.tensor_type for t in GGUFReader(tmp_path / "f32.gguf").tensors}
    assert types["blk.2.ffn_up_exps.weight"] == T.F32
    prompt = [1, *range(40, 70)]
    with Llama(tmp_path / "f32.gguf", type_k="f32", type_v="f32", n_threads=1) as llm:
        got = llm.logits(prompt)
    expected = reference.logits(write_decoded(tmp_path / "hf", experts), prompt, [])
    error = np.abs(got - expected).max() / expected.std()
    print(f"largest error of a logit over their deviation: {error:.2e}")
    assert error < 1e-3  # as in test_logits_parity


@pytest.mark.slow
def test_memory_stays_flat_at_the_sizes_of_the_300b(tmp_path: Path) -> None:
    """Both folders are holes, so nothing fits: only the writing is measured, without the comparison before it."""
    shape = Shape(
        n_embd=8192, n_head=64, n_head_kv=8, head_dim=128, n_layer=3, n_ff=512, n_expert=8, n_expert_used=2,
        n_shared=0, n_ff_exp=3584, n_vocab=512,
    )  # fmt: skip
    two_bit.write_holes(tmp_path / "r", tmp_path / "o", shape)
    code = (
        "import re, sys\nfrom pyllamaernie.convert import conversion\n"
        "conversion.compare_experts = lambda *a: None\n"
        "done = conversion.convert(sys.argv[1], sys.argv[3], original=sys.argv[2])\n"
        "print(sum(r.n_bytes for r in done.tensors if r.type == 'CCQ2_B'))\n"
        "print(1024 * int(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1]))"
    )
    words = [sys.executable, "-c", code, tmp_path / "r", tmp_path / "o", tmp_path / "x.gguf"]
    n_bytes, peak = map(int, subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())
    print(f"{n_bytes / 1e6:.0f} MB of CCQ2_B: peak {peak / 1e6:.0f} MB")
    assert n_bytes == 8 * 3 * 3584 * 8192 // 512 * 142 and peak < 2**30
