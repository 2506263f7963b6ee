"""Synthetic 2-bit releases in Baidu's documented layout, made of a random checkpoint, and the encoder for them.

Source of the layout: PaddlePaddle/FastDeploy (develop, 2025-09), as told in docs/ccq.md. Experts of the last layers are
really encoded; tensors that no importer reads (attention, experts in 4 bits) have the documented shapes and no sense.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import checkpoint_config
import checkpoints
import numpy as np
from checkpoint_shapes import Shape

from pyllamaernie.quant import ccq

# Rows of 512 are one block, rows of 1024 two; layers 0 dense, 1 in 4 bits, 2 and 3 in 2 bits.
SHAPE = Shape(
    n_embd=512, n_head=4, n_head_kv=2, head_dim=128, n_layer=4, n_ff=512, n_expert=3, n_expert_used=2, n_shared=0,
    n_ff_exp=512, n_dense=1,
)  # fmt: skip
W4_END = 1
FIVE = ("quant_weight", "weight_scale", "super_scales", "code_scale", "code_zp")
EXPERTS = [(il, e) for il in (2, 3) for e in range(SHAPE.n_expert)]  # in 2 bits
_LEVEL_UNIT = 0.06  # of a group's root mean square


def encode(weights: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """The five tensors of one projection, with a small squared error: all 256 codes are tried for every four weights.

    Shapes: (N, K) float32 -> quant_weight (K/4, N) uint8, weight_scale (K/128, N) uint8, super_scales (N,) uint16 bits
    of bfloat16, code_scale, code_zp (N,) float32
    """
    n, k = weights.shape
    code_scale = np.random.default_rng(seed).uniform(118.5, 121.5, n).astype(np.float32)  # best at 120, bad at 128
    code_zp = (np.float32(16384) - np.float32(127.5) * code_scale).astype(np.float32)
    # doubles hold the product and the sum, so that rounding them to float32 rounds once
    exact = np.arange(256) * code_scale.astype(np.float64)[:, None] + (code_zp + np.float32(0.5))[:, None]
    word = np.floor(exact.astype(np.float32)).astype(np.int64)  # (N, 256)
    level = (((word[:, None] >> np.array([9, 6, 3, 0])[:, None]) & 63) - 32).astype(np.float32)  # (N, 4, 256)
    groups = weights.reshape(n, k // 64, 64)
    target = _LEVEL_UNIT * np.sqrt((groups**2).mean(2))
    super_bits = checkpoints.encode(np.maximum(target.max(1) / 15, 1e-30).astype(np.float32), "BF16")
    super_scale = (super_bits.astype(np.uint32) << 16).view(np.float32)
    for last in (False, True):
        local = np.clip(np.rint(target / super_scale[:, None]), 1, 15)
        scaled = (groups / (local * super_scale[:, None])[:, :, None]).reshape(n, k // 4, 4).astype(np.float32)
        half = (level**2).sum(1)[:, None] / 2  # (N, 1, 256)
        runs = [slice(at, at + 16) for at in range(0, n, 16)]  # few enough that the costs stay in the cache
        q = np.concatenate([(half[run] - scaled[run] @ level[run]).argmin(2) for run in runs])
        if not last:  # scales that suit the codes best
            chosen = np.take_along_axis(level.transpose(0, 2, 1), q[:, :, None], 1).reshape(groups.shape)
            target = (groups * chosen).sum(2) / np.maximum((chosen**2).sum(2), 1)
    local = local.astype(np.uint8)
    return {
        "quant_weight": np.ascontiguousarray(q.T.astype(np.uint8)),
        "weight_scale": np.ascontiguousarray((local[:, 0::2] << 4 | local[:, 1::2]).T),
        "super_scales": super_bits,
        "code_scale": code_scale,
        "code_zp": code_zp,
    }


def weights_one_by_one(five: Mapping[str, np.ndarray], n: int, k: int) -> np.float32:
    """The formula for a single weight, written out; tests hold whole matrices against it."""
    zero = np.float32(five["code_zp"][n]) + np.float32(0.5)
    exact = int(five["quant_weight"][k // 4, n]) * float(five["code_scale"][n]) + float(zero)
    word = int(np.floor(np.float32(exact)))
    level = (word >> (9, 6, 3, 0)[k % 4] & 63) - 32
    local = int(five["weight_scale"][k // 128, n]) >> (0 if k // 64 % 2 else 4) & 15
    super_scale = (np.uint32(five["super_scales"][n]) << np.uint32(16)).view(np.float32)
    return np.float32(level) * (np.float32(local) * super_scale)


def encoded_experts(shape: Shape = SHAPE, seed: int = 0) -> dict[str, np.ndarray]:
    """The experts in 2 bits of the checkpoint that `write_original` writes, under the documented names."""
    weights, out = bf16_weights(shape, seed), {}
    for il in range(W4_END + 1, shape.n_layer):
        for e in range(shape.n_expert):
            stem = f"model.layers.{il}.mlp.experts.{e}"
            parts = {
                "up_gate_proj": np.concatenate([weights[f"{stem}.{w}_proj.weight"] for w in ("gate", "up")]),
                "down_proj": weights[f"{stem}.down_proj.weight"],
            }
            for p, matrix in parts.items():
                for name, data in encode(matrix, seed=100 * il + e).items():
                    out[f"ernie.layers.{il}.mlp.experts.{e}.{p}.{name}"] = data
    return out


def five_of(experts: Mapping[str, np.ndarray], il: int, e: int, p: str) -> dict[str, np.ndarray]:
    return {name: experts[f"ernie.layers.{il}.mlp.experts.{e}.{p}.{name}"] for name in FIVE}


def decoded(five: Mapping[str, np.ndarray]) -> np.ndarray:
    """Shapes: -> (N, K)"""
    scale = ccq.bf16_to_float32(five["super_scales"])
    return ccq.baidu_weights(five["quant_weight"], five["weight_scale"], five["code_scale"], five["code_zp"], scale).T


def decoded_experts(experts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Under Hugging Face's names: what the codes stand for, in float32."""
    out = {}
    for il, e in EXPERTS:
        stem = f"model.layers.{il}.mlp.experts.{e}"
        gate, up = np.split(decoded(five_of(experts, il, e, "up_gate_proj")), 2)
        down = decoded(five_of(experts, il, e, "down_proj"))
        parts = {"gate": gate, "up": up, "down": down}
        out |= {f"{stem}.{x}_proj.weight": np.ascontiguousarray(w) for x, w in parts.items()}
    return out


def changed(experts: Mapping[str, np.ndarray], edit: Callable[[str, dict], Mapping]) -> dict[str, np.ndarray]:
    """All experts with `edit(projection, its five tensors)` instead of each five."""
    out = dict(experts)
    for il, e in EXPERTS:
        for p in ("up_gate_proj", "down_proj"):
            new = edit(p, five_of(experts, il, e, p))
            out |= {f"ernie.layers.{il}.mlp.experts.{e}.{p}.{name}": np.ascontiguousarray(a) for name, a in new.items()}
    return out


@functools.cache
def bf16_weights(shape: Shape = SHAPE, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of the original as float32, rounded as its files are: routers and their biases are not."""
    weights = checkpoints.weights_of("moe", shape=shape, seed=seed, tied=False)
    return {
        name: data
        if ".mlp.gate.weight" in name or "e_score_correction_bias" in name
        else (checkpoints.encode(data, "BF16").astype(np.uint32) << 16).view(np.float32)
        for name, data in weights.items()
    }


def write_original(folder: Path, shape: Shape = SHAPE, **options: object) -> Path:
    """The BF16 release."""
    return checkpoints.write_checkpoint(
        folder, "moe", shape=shape, tied=False, dtype="BF16", flat=True, **{"shards": 2, **options}
    )


def write_release(
    folder: Path,
    experts: Mapping[str, np.ndarray],
    shape: Shape = SHAPE,
    *,
    signed: bool = True,
    drop: Iterable[str] = (),
    extra: Mapping[str, tuple[str, np.ndarray]] | None = None,
    config_changes: Mapping | None = None,
    shards: int = 3,
    rename: Callable[[str], str] = str,
    plain_seed: int = 0,
) -> Path:
    """Writes a 2-bit release of these experts. `extra`: name -> (safetensors dtype, data), which may replace.

    Norms, routers and the embedding are those of the original of seed `plain_seed`.
    """
    small = "I8" if signed else "U8"
    kinds = {
        **dict.fromkeys(("quant_weight", "weight_scale"), small),
        **dict.fromkeys(("super_scales", "super_scale"), "BF16"),
        **dict.fromkeys(("code_scale", "code_zp"), "F32"),
    }
    tensors = {name: (kinds[name.rsplit(".", 1)[1]], data) for name, data in experts.items()}
    tensors |= {**_rest(shape, small), **_plain(shape, plain_seed), **(extra or {})}
    tensors = {rename(name): entry for name, entry in tensors.items() if name not in set(drop)}
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, tensors, shards)
    _write_config(folder, shape, config_changes)
    return folder


def write_sliced(folder: Path, experts: Mapping[str, np.ndarray], n_slices: int, shape: Shape = SHAPE) -> Path:
    """The release for `n_slices` GPUs: folders rank0 and on, with parts of gate, up and down's columns."""
    slices: list[dict[str, tuple[str, np.ndarray]]] = [{} for _ in range(n_slices)]
    for name, data in experts.items():
        dtype = {"code_scale": "F32", "code_zp": "F32", "super_scales": "BF16"}.get(name.rsplit(".", 1)[1], "I8")
        for rank, out in enumerate(slices):
            if "up_gate_proj" in name:
                gate, up = np.split(data, 2, axis=-1)
                part = np.concatenate([np.split(half, n_slices, axis=-1)[rank] for half in (gate, up)], axis=-1)
            else:
                part = np.split(data, n_slices)[rank] if data.ndim == 2 else data
            out[name] = dtype, np.ascontiguousarray(part)
    for name, (dtype, data) in _plain(shape, 0).items():
        for rank, out in enumerate(slices):
            out[name] = dtype, np.split(data, n_slices)[rank] if "embed_tokens" in name else data
    for rank, tensors in enumerate(slices):
        (folder / f"rank{rank}").mkdir(parents=True)
        write_shards(folder / f"rank{rank}", tensors, 1)
    _write_config(folder, shape, None)
    return folder


def quantization_config(shape: Shape) -> dict:
    """As in FastDeploy's docs/quantization/wint2.md."""
    return {
        "dense_quant_type": "wint8",
        "moe_quant_type": "w4w2",
        "quantization": "wint2",
        "moe_quant_config": {
            "moe_w4_quant_config": {
                "quant_type": "wint4",
                "quant_granularity": "per_channel",
                "quant_start_layer": 0,
                "quant_end_layer": W4_END,
            },
            "moe_w2_quant_config": {
                "quant_type": "wint2",
                "quant_granularity": "pp_acc",
                "quant_group_size": 64,
                "quant_start_layer": W4_END + 1,
                "quant_end_layer": shape.n_layer - 1,
            },
        },
    }


def _rest(shape: Shape, small: str) -> dict[str, tuple[str, np.ndarray]]:
    """What else such a release has quantized, in the documented shapes; all of it must come from elsewhere."""
    out: dict[str, tuple[str, np.ndarray]] = {}

    def quantized(name: str, n_rows: int, n_cols: int, n_channels: int) -> None:
        out[f"{name}.quant_weight"] = small, np.full((n_rows, n_cols), 77, np.uint8)
        out[f"{name}.weight_scale"] = "BF16", np.full(n_channels, 0x3C00, np.uint16)

    heads, n_embd = shape.head_dim * (shape.n_head + 2 * shape.n_head_kv), shape.n_embd
    for il in range(shape.n_layer):
        layer = f"ernie.layers.{il}"
        quantized(f"{layer}.self_attn.qkv_proj", heads, n_embd, heads)
        quantized(f"{layer}.self_attn.o_proj", n_embd, shape.head_dim * shape.n_head, n_embd)
        if il < shape.n_dense:
            quantized(f"{layer}.mlp.up_gate_proj", 2 * shape.n_ff, n_embd, 2 * shape.n_ff)
            quantized(f"{layer}.mlp.down_proj", n_embd, shape.n_ff, n_embd)
        elif il <= W4_END:  # two weights in a byte
            for e in range(shape.n_expert):
                quantized(f"{layer}.mlp.experts.{e}.up_gate_proj", shape.n_ff_exp, n_embd, 2 * shape.n_ff_exp)
                quantized(f"{layer}.mlp.experts.{e}.down_proj", n_embd // 2, shape.n_ff_exp, n_embd)
    return out


def _plain(shape: Shape, seed: int) -> dict[str, tuple[str, np.ndarray]]:
    """What is not quantized; Paddle has matrices as [in, out], but the embedding."""
    out: dict[str, tuple[str, np.ndarray]] = {}
    for name, data in bf16_weights(shape, seed).items():
        key = name.replace("model.", "ernie.", 1)
        if name.endswith("mlp.gate.weight"):
            out[key] = "F32", np.ascontiguousarray(data.T)
        elif name.endswith("e_score_correction_bias"):
            out[key] = "F32", data
        elif "norm" in name or "embed_tokens" in name:
            out[key] = "BF16", checkpoints.encode(data, "BF16")
        elif name == "lm_head.weight":
            out[name] = "BF16", checkpoints.encode(np.ascontiguousarray(data.T), "BF16")
    return out


def plain_names(shape: Shape = SHAPE) -> list[str]:
    """Names of what is not quantized."""
    return list(_plain(shape, 0))


def read_tensors(folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    """What `write_shards` wrote into one file: name -> (safetensors dtype, data)."""
    raw = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    kinds = {"I8": "u1", "U8": "u1", "BF16": "<u2", "F32": "<f4"}
    return {
        name: (
            entry["dtype"],
            np.frombuffer(raw, kinds[entry["dtype"]], offset=start + entry["data_offsets"][0],
                          count=int(np.prod(entry["shape"]))).reshape(entry["shape"]),
        )
        for name, entry in json.loads(raw[8:start]).items()
    }  # fmt: skip


def write_holes(release: Path, original: Path, shape: Shape) -> None:
    """A release and its original with all weights zero, as holes in files that take no disk."""
    names: dict[str, tuple[str, tuple[int, ...]]] = {}
    for il in range(W4_END + 1, shape.n_layer):
        for e in range(shape.n_expert):
            for p, k, n in (
                ("up_gate_proj", shape.n_embd, 2 * shape.n_ff_exp),
                ("down_proj", shape.n_ff_exp, shape.n_embd),
            ):
                dims = ((k // 4, n), (k // 128, n), (n,), (n,), (n,))
                kinds = ("I8", "I8", "BF16", "F32", "F32")
                stem = f"ernie.layers.{il}.mlp.experts.{e}.{p}"
                names |= {f"{stem}.{x}": entry for x, *entry in zip(FIVE, kinds, dims, strict=True)}
    release.mkdir()
    _write_hole(release / "model.safetensors", names)
    _write_config(release, shape, None)
    write_original(original, SHAPE, shards=1)
    shapes = checkpoints.tensor_shapes("moe", shape, tied=False)
    _write_hole(original / "model.safetensors", {name: ("BF16", dims) for name, dims in shapes.items()})
    config = checkpoint_config.config("moe", shape, flat=True, tied=False, dtype="bfloat16")
    (original / "config.json").write_text(json.dumps(config))


def _write_hole(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    header, offset = {}, 0
    for name, (dtype, dims) in tensors.items():
        end = offset + int(np.prod(dims)) * {"I8": 1, "BF16": 2, "F32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": list(dims), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def write_shards(folder: Path, tensors: Mapping[str, tuple[str, np.ndarray]], n_shards: int) -> None:
    names = sorted(tensors)
    shards = [names[i * len(names) // n_shards : (i + 1) * len(names) // n_shards] for i in range(n_shards)]
    files = ["model.safetensors"] if n_shards == 1 else [
        f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors" for i in range(n_shards)
    ]  # fmt: skip
    for file, shard in zip(files, shards, strict=True):
        header, offset = {}, 0
        for name in shard:
            dtype, data = tensors[name]
            header[name] = {
                "dtype": dtype,
                "shape": list(data.shape),
                "data_offsets": [offset, offset + data.nbytes],
            }
            offset += data.nbytes
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.writelines(np.ascontiguousarray(tensors[name][1]).tobytes() for name in shard)
    if n_shards > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _write_config(folder: Path, shape: Shape, changes: Mapping | None) -> None:
    full = checkpoint_config.config("moe", shape, flat=True, tied=False, dtype="bfloat16")
    full |= {"quantization_config": quantization_config(shape), **(changes or {})}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in full.items() if v is not None}))
