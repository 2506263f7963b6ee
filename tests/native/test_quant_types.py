"""Our types in the built llama.cpp: llama-quantize writes them, models run in them."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import gguf
import gguf_models
import numpy as np
import pytest
from checkpoint_shapes import Shape
from tiny_vocabulary import token_id

from pyllamaernie import Llama, programs
from pyllamaernie.convert import convert
from pyllamaernie.gguf.types import QUANT_TYPES
from pyllamaernie.quant import ccq

PROMPT = [token_id("<s>"), *range(40, 60)]
# relative squared error of Gaussian weights; CCQ2_B's encoder is a plain one
ERRORS = {"CCQ2": 0.08, "CCQ2_25": 0.06, "CCQ2_5": 0.045, "CCQ2_75": 0.033, "CCQ2_B": 0.13}


MEASURED = (
    "blk.1.ffn_up_exps.weight",
    "blk.1.attn_k.weight",
)  # 200,000 weights: the encoder takes 6 us and more of each
NAMES = [
    *("CCQ2", "CCQ2_25", "CCQ2_B"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("CCQ2_5", "CCQ2_75")),
]


@pytest.fixture(scope="module")
def source() -> Path:
    """A MoE whose rows of 512 are whole blocks of every type."""
    home = gguf_models.folder() / "ccq"
    shape = Shape(
        n_embd=512, n_head=4, n_head_kv=1, head_dim=128, n_layer=2, n_ff=256, n_expert=2, n_expert_used=2, n_shared=1,
        n_ff_exp=128,
    )  # fmt: skip
    folder = checkpoints.write_checkpoint(home / "hf", "moe", shape=shape, tied=False)
    return convert(folder, home / "source.gguf", type="f32").model


def quantized(source: Path, name: str) -> Path:
    """The model in Q8_0 but for the measured tensors, which are in the type."""
    out = source.with_name(f"{name}.gguf")
    if not out.exists():
        chosen = [word for tensor in MEASURED for word in ("--tensor-type", f"{tensor[:-7]}={name.lower()}")]
        programs.run("llama-quantize", [*chosen, source, out, "Q8_0", 2], capture=True)
    return out


def dequantized(path: Path) -> Path:
    """The same model with every tensor in F32, by numpy's decoders."""
    out = path.with_name(path.stem + "-f32.gguf")
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            sub_type = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values.reshape(tensor.shape[::-1]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize("name", NAMES)
def test_a_model_with_tensors_of_the_type_computes_what_its_numbers_say(source: Path, name: str) -> None:
    path = quantized(source, name)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert {types[tensor] for tensor in MEASURED} == {name}
    with Llama(path) as ours, Llama(dequantized(path)) as plain:
        got, expected = ours.logits(PROMPT), plain.logits(PROMPT)
    error = ((got - expected) ** 2).mean() / expected.var()
    assert error < 1e-3  # what rounding the activations to 8 bits costs


@pytest.mark.parametrize("name", NAMES)
def test_the_written_blocks_decode_to_the_weights(source: Path, name: str) -> None:
    original = {t.name: t.data for t in gguf.GGUFReader(source).tensors}
    for tensor in gguf.GGUFReader(quantized(source, name)).tensors:
        if tensor.name in MEASURED:
            x = original[tensor.name].astype(np.float64)
            y = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert ((x - y) ** 2).sum() / (x**2).sum() < ERRORS[name], tensor.name


def test_the_built_encoder_makes_the_bytes_of_the_numpy_one(source: Path) -> None:
    original = {t.name: t.data for t in gguf.GGUFReader(source).tensors}
    for tensor in gguf.GGUFReader(quantized(source, "CCQ2")).tensors:
        if tensor.name in MEASURED:
            rows = original[tensor.name].reshape(-1, 256)[:3]
            assert np.array_equal(tensor.data.reshape(-1, 66)[:3], ccq.encode("CCQ2", rows))


def test_a_whole_file_is_of_the_type_and_short_rows_fall_back() -> None:
    home = gguf_models.folder() / "ccq-whole"
    shape = Shape(n_head=2, n_head_kv=1, n_layer=1, n_ff=96)
    folder = checkpoints.write_checkpoint(home / "hf", "dense", shape=shape, tied=False)
    model = convert(folder, home / "source.gguf", type="f32").model
    out = home / "whole.gguf"
    programs.run("llama-quantize", [model, out, "CCQ2", 2], capture=True)
    reader = gguf.GGUFReader(out)
    assert reader.fields["general.file_type"].contents() == QUANT_TYPES["CCQ2"].ggml_id
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.ffn_down.weight"] == "IQ4_NL"  # rows of 96
    assert {types[f"blk.0.{name}.weight"] for name in ("ffn_up", "ffn_gate", "attn_q")} == {"CCQ2"}
    assert types["token_embd.weight"] == "CCQ2"  # read row by row
    with Llama(out) as ours, Llama(dequantized(out)) as plain:
        got, expected = ours.logits(PROMPT), plain.logits(PROMPT)
    assert ((got - expected) ** 2).mean() / expected.var() < 1e-3


def test_a_nan_is_an_error_that_names_the_tensor(source: Path) -> None:
    bad = source.with_name("nan.gguf")
    bad.write_bytes(source.read_bytes())
    tensor = next(t for t in gguf.GGUFReader(source).tensors if t.name == "blk.1.ffn_up_exps.weight")
    with bad.open("r+b") as file:
        file.seek(int(tensor.data_offset) + 4 * 300)
        file.write(np.float32(np.nan).tobytes())
    words = ["--tensor-type", "blk.1.ffn_up_exps=ccq2", bad, bad.with_name("out.gguf"), "Q8_0", 2]
    done = programs.run("llama-quantize", words, check=False, capture=True)
    assert done.returncode == 1
    assert "blk.1.ffn_up_exps.weight' has invalid data" in done.stdout + done.stderr
