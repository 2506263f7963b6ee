"""Small random ERNIE 4.5 checkpoints (dense, text MoE, vision-language MoE), remade from a seed with numpy only.

They load in transformers with no missing or unexpected key. Weights are drawn so that every part of the network
matters: 1/sqrt(fan-in) (the library's 0.02 gives a nearly linear model that hides mistakes), norms 1 + 0.2 N,
biases 0.1 N, correction bias 0.15 N, router 1.5 times, embeddings 0.5 N. Each tensor has its own stream, keyed by its
name, so that options which rename, split or shard tensors never change a value.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from checkpoint_config import config, preprocessor_config
from checkpoint_names import with_names
from checkpoint_shapes import SHAPES, Shape
from tiny_vocabulary import CHAT_TEMPLATE, added_tokens, sentencepiece_model


def tensors(
    kind: str, shape: Shape, *, seed: int = 0, tied: bool = True, use_bias: bool = False
) -> dict[str, np.ndarray]:
    """All tensors in float32 under Baidu's names (vision tower at the root), in file layout."""
    out: dict[str, np.ndarray] = {}

    def draw(name: str, dims: tuple[int, ...], scale: float, mean: float = 0.0) -> None:
        rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
        out[name] = (mean + scale * rng.standard_normal(dims)).astype(np.float32)

    _lay_out(kind, shape, draw, tied, use_bias)
    return out


def tensor_shapes(kind: str, shape: Shape, *, tied: bool = True) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the same tensors, for sizes that no test wants to fill."""
    out: dict[str, tuple[int, ...]] = {}
    _lay_out(kind, shape, lambda name, dims, scale, mean=0.0: out.update({name: dims}), tied, False)
    return out


def _lay_out(kind: str, shape: Shape, draw: Callable, tied: bool, use_bias: bool) -> None:
    def linear(name: str, n_out: int, n_in: int, *, bias: bool = False, gain: float = 1.0) -> None:
        draw(f"{name}.weight", (n_out, n_in), gain / np.sqrt(n_in))
        if bias:
            draw(f"{name}.bias", (n_out,), 0.1)

    def norm(name: str, n: int, *, bias: bool = False) -> None:
        draw(f"{name}.weight", (n,), 0.2, 1.0)
        if bias:
            draw(f"{name}.bias", (n,), 0.1)

    def mlp(name: str, n_ff: int, *, bias: bool) -> None:
        linear(f"{name}.gate_proj", n_ff, shape.n_embd, bias=bias)
        linear(f"{name}.up_proj", n_ff, shape.n_embd, bias=bias)
        linear(f"{name}.down_proj", shape.n_embd, n_ff, bias=bias)

    def attention(layer: str) -> None:
        norm(f"{layer}.input_layernorm", shape.n_embd)
        norm(f"{layer}.post_attention_layernorm", shape.n_embd)
        linear(f"{layer}.self_attn.q_proj", shape.n_head * shape.head_dim, shape.n_embd, bias=use_bias)
        linear(f"{layer}.self_attn.k_proj", shape.n_head_kv * shape.head_dim, shape.n_embd, bias=use_bias)
        linear(f"{layer}.self_attn.v_proj", shape.n_head_kv * shape.head_dim, shape.n_embd, bias=use_bias)
        linear(f"{layer}.self_attn.o_proj", shape.n_embd, shape.n_head * shape.head_dim, bias=use_bias)

    draw("model.embed_tokens.weight", (shape.n_vocab, shape.n_embd), shape.embed)
    norm("model.norm", shape.n_embd)
    if not tied:
        draw("lm_head.weight", (shape.n_vocab, shape.n_embd), shape.embed)
    if kind == "moe" and use_bias:
        draw("lm_head.bias", (shape.n_vocab,), 0.1)
    for il in range(shape.n_layer):
        layer = f"model.layers.{il}"
        attention(layer)
        if kind == "dense" or il < shape.n_dense:
            mlp(f"{layer}.mlp", shape.n_ff, bias=use_bias)
            continue
        if kind == "moe":
            linear(f"{layer}.mlp.gate", shape.n_expert, shape.n_embd, gain=1.5)
            widths = [shape.n_ff_exp] * shape.n_expert
        else:  # stored [n_embd, n_expert], text bank first
            for tail in ("weight", "weight_1"):
                draw(f"{layer}.mlp.gate.{tail}", (shape.n_embd, shape.n_expert), 1.5 / np.sqrt(shape.n_embd))
            widths = [shape.n_ff_exp] * shape.n_expert + [shape.n_ff_exp_vl] * shape.n_expert
        n_banks = 1 if kind == "moe" else 2
        if shape.correction_bias:
            draw(f"{layer}.mlp.moe_statics.e_score_correction_bias", (n_banks, shape.n_expert), 0.15)
        for e, width in enumerate(widths):
            mlp(f"{layer}.mlp.experts.{e}", width, bias=False)
        if shape.n_shared:
            mlp(f"{layer}.mlp.shared_experts", shape.n_shared * shape.n_ff_exp, bias=use_bias)
    for i in range(shape.n_mtp):
        attention(f"model.mtp_block.{i}")
        mlp(f"model.mtp_block.{i}.mlp", shape.n_ff, bias=use_bias)
        norm(f"model.mtp_emb_norm.{i}", shape.n_embd)
        norm(f"model.mtp_hidden_norm.{i}", shape.n_embd)
        linear(f"model.mtp_linear_proj.{i}", shape.n_embd, 2 * shape.n_embd)
    if kind == "vl":
        _vision_tensors(shape, draw, linear, norm)


def _vision_tensors(shape: Shape, draw, linear, norm) -> None:
    width, merged = shape.v_width, 4 * shape.v_width
    linear("vision_model.patch_embed.proj", width, 3 * shape.patch**2)
    for il in range(shape.v_depth):
        block = f"vision_model.blocks.{il}"
        norm(f"{block}.norm1", width, bias=True)
        norm(f"{block}.norm2", width, bias=True)
        linear(f"{block}.attn.qkv", 3 * width, width, bias=True)
        linear(f"{block}.attn.proj", width, width, bias=True)
        linear(f"{block}.mlp.fc1", shape.v_ff, width, bias=True)
        linear(f"{block}.mlp.fc2", width, shape.v_ff, bias=True)
    norm("vision_model.ln", width, bias=True)
    resampler = "model.resampler_model"
    for part, n_in in (("spatial_linear", merged), ("temporal_linear", 2 * merged)):
        linear(f"{resampler}.{part}.0", merged, n_in, bias=True)
        linear(f"{resampler}.{part}.2", merged, merged, bias=True)
        norm(f"{resampler}.{part}.3", merged, bias=True)
    linear(f"{resampler}.mlp", shape.n_embd, merged, bias=True)
    norm(f"{resampler}.after_norm", shape.n_embd)


def weights_of(
    kind: str, *, seed: int = 0, tied: bool = True, use_bias: bool = False, shape: Shape | None = None, **_: object
) -> dict[str, np.ndarray]:
    """The tensors that `write_checkpoint` writes for the same options; those about names and files are ignored."""
    return tensors(kind, shape or SHAPES[kind], seed=seed, tied=tied, use_bias=use_bias)


def digest(weights: Mapping[str, np.ndarray]) -> str:
    """sha256 over names and float32 bytes; golden files carry it so that a changed random stream is noticed."""
    state = hashlib.sha256()
    for name in sorted(weights):
        state.update(name.encode())
        state.update(np.ascontiguousarray(weights[name], dtype="<f4").tobytes())
    return state.hexdigest()


def write_safetensors(path: Path, weights: Mapping[str, np.ndarray], dtype: str = "F32") -> None:
    """A safetensors file; `dtype` F32, F16 or BF16 (nearest even). Correction biases and routers stay F32."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    blobs: list[bytes] = []
    offset = 0
    for name, data in weights.items():
        kept = "F32" if "e_score_correction_bias" in name or ".mlp.gate.weight" in name else dtype
        if data.dtype != np.float32:
            kept, blob = {"int64": "I64", "float64": "F64"}[data.dtype.name], np.ascontiguousarray(data).tobytes()
        else:
            blob = encode(np.ascontiguousarray(data), kept).tobytes()
        header[name] = {"dtype": kept, "shape": list(data.shape), "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.writelines(blobs)


def encode(data: np.ndarray, dtype: str) -> np.ndarray:
    """float32 -> F32, F16, or BF16 bit patterns as uint16."""
    if dtype == "BF16":
        bits = data.view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return data.astype({"F32": "<f4", "F16": "<f2"}[dtype])


def write_checkpoint(
    folder: Path,
    kind: str,
    *,
    shape: Shape | None = None,
    seed: int = 0,
    flat: bool = False,
    names: str = "saved",
    shards: int = 1,
    tied: bool = True,
    use_bias: bool = False,
    dtype: str = "F32",
    extra: Mapping[str, np.ndarray] | None = None,
    drop: Iterable[str] = (),
    config_changes: Mapping | None = None,
    chat_template: bool = True,
) -> Path:
    """Writes a whole checkpoint folder and returns it.

    `names` is that of `checkpoint_names.with_names`. `extra` adds tensors, `drop` leaves out those of the written
    names, `config_changes` is merged into the top level of config.json (a value None removes the key).
    `chat_template=False`: as in the -Base models.
    """
    shape = shape or SHAPES[kind]
    weights = with_names(kind, tensors(kind, shape, seed=seed, tied=tied, use_bias=use_bias), names)
    weights = {k: v for k, v in weights.items() if k not in set(drop)} | dict(extra or {})
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(folder, weights, shards, dtype)
    stored = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype]
    full = config(kind, shape, flat=flat, tied=tied, use_bias=use_bias, dtype=stored)
    full.update(config_changes or {})
    _write_json(folder / "config.json", {k: v for k, v in full.items() if v is not None})
    _write_json(
        folder / "generation_config.json", {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0, "do_sample": False}
    )
    write_tokenizer(folder, kind, chat_template=chat_template)
    if kind == "vl":
        _write_json(folder / "preprocessor_config.json", preprocessor_config(shape, flat=flat))
    return folder


def _write_weights(folder: Path, weights: Mapping[str, np.ndarray], shards: int, dtype: str) -> None:
    """One file, or an index and as many files."""
    if shards == 1:
        write_safetensors(folder / "model.safetensors", weights, dtype)
        return
    keys = sorted(weights)
    files = {k: f"model-{i * shards // len(keys) + 1:05d}-of-{shards:05d}.safetensors" for i, k in enumerate(keys)}
    for file in sorted(set(files.values())):
        write_safetensors(folder / file, {k: weights[k] for k in keys if files[k] == file}, dtype)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})


def write_tokenizer(folder: Path, kind: str, *, chat_template: bool = True) -> None:
    """tokenizer.model and tokenizer_config.json; the vocabulary is the same for all kinds."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": True,
            "add_bos_token": False,
            "add_eos_token": False,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<unk>",
            "cls_token": "<|begin_of_sentence|>",
            "sep_token": "<|end_of_sentence|>",
            "mask_token": "<mask:1>",
            "model_max_length": 4096,
            "added_tokens_decoder": added_tokens(),
            **({"chat_template": CHAT_TEMPLATE[kind == "vl"]} if chat_template else {}),
        },
    )


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
