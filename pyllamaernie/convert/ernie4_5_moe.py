"""ERNIE 4.5 text mixture of experts: the dense stack plus routers, stacked experts and a shared expert.

Writes what upstream's `conversion/ernie.py` (class `Ernie4_5MoeModel`, at the pin) writes, except one key: upstream
puts the shared expert's width down as intermediate_size // num_key_value_heads, which is true of the released models
by coincidence; here it is moe_intermediate_size times the number of shared experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyllamaernie.convert import ernie4_5
from pyllamaernie.convert.checkpoint import Checkpoint
from pyllamaernie.convert.ernie4_5 import TextConfig, need
from pyllamaernie.convert.plan import Pool, Rows, out_tensor
from pyllamaernie.convert.tokenizer import Vocabulary
from pyllamaernie.errors import ConvertError
from pyllamaernie.gguf.file import Key, OutTensor, TensorType

ARCH = "ernie4_5-moe"


@dataclass(frozen=True)
class Bank:
    """One set of routed experts: its experts' place among those of the file, and its spellings."""

    n_expert: int
    n_ff: int
    first: int = 0
    memory: str = ""  # "text_moe." or "vision_moe." in transformers' module names of the VL model
    suffix: str = ""  # "_vl" in GGUF names of the vision bank


def leading_dense(sparse: list[bool]) -> int:
    """How many layers come before the first sparse one, all later ones being sparse.

    Raises: ConvertError for any other pattern, which the GGUF keys cannot express.
    """
    n_dense = sparse.index(True) if True in sparse else len(sparse)
    if not all(sparse[n_dense:]) or n_dense == len(sparse):
        marks = "".join("S" if s else "d" for s in sparse)
        raise ConvertError(
            f"config.json: layers {marks} (d dense, S sparse); only dense layers followed by sparse ones are supported"
        )
    return n_dense


def expert_keys(arch: str, c: TextConfig, bank: Bank, n_dense: int, n_shared: int | None) -> list[Key]:
    keys = [
        Key(f"{arch}.expert_count", "u32", bank.n_expert),
        Key(f"{arch}.expert_used_count", "u32", need(c.values, "moe_k")),
        Key(f"{arch}.interleave_moe_layer_step", "u32", 1),
        Key(f"{arch}.leading_dense_block_count", "u32", n_dense),
        Key(f"{arch}.expert_feed_forward_length", "u32", bank.n_ff),
    ]
    if n_shared is not None:
        keys.append(Key(f"{arch}.expert_shared_count", "u32", n_shared))
        if n_shared > 0:
            keys.append(Key(f"{arch}.expert_shared_feed_forward_length", "u32", bank.n_ff * n_shared))
    return keys


def bank_rows(pool: Pool, c: TextConfig, il: int, bank: Bank) -> dict[str, list[Rows | None]]:
    """Rows of gate, up and down of every expert of one layer, stored one by one or fused."""
    mlp = f"model.layers.{il}.mlp"
    n, n_ff, n_embd = bank.n_expert, bank.n_ff, c.n_embd
    pieces: dict[str, list[Rows | None]] = {"gate": [], "up": [], "down": []}
    fused = f"{mlp}.{bank.memory}experts"
    if f"{fused}.gate_up_proj" in pool or f"{fused}.down_proj" in pool:
        both = pool.take(f"{fused}.gate_up_proj", (n, 2 * n_ff, n_embd))
        down = pool.take(f"{fused}.down_proj", (n, n_embd, n_ff))
        for e in range(n):
            at = 2 * n_ff * e
            pieces["gate"].append(both and both.part(at, at + n_ff))
            pieces["up"].append(both and both.part(at + n_ff, at + 2 * n_ff))
            pieces["down"].append(down and down.part(n_embd * e, n_embd * (e + 1)))
    else:
        for e in range(bank.first, bank.first + n):
            stem = f"{mlp}.experts.{e}"
            gate, up = pool.take_split(
                f"{stem}.up_gate_proj.weight",
                [f"{stem}.{x}_proj.weight" for x in ("gate", "up")],
                (n_ff, n_ff),
                (n_embd,),
            )
            pieces["gate"].append(gate)
            pieces["up"].append(up)
            pieces["down"].append(pool.take(f"{stem}.down_proj.weight", (n_embd, n_ff)))
    return pieces


def bank_tensors(pool: Pool, c: TextConfig, il: int, bank: Bank, wanted: TensorType) -> list[OutTensor]:
    """The stacked experts of one layer."""
    n, n_ff, n_embd = bank.n_expert, bank.n_ff, c.n_embd
    pieces = bank_rows(pool, c, il, bank)
    return [
        out_tensor(
            f"blk.{il}.ffn_{x}_exps{bank.suffix}.weight",
            pieces[x],
            (n, n_embd, n_ff) if x == "down" else (n, n_ff, n_embd),
            wanted,
        )
        for x in ("gate", "up", "down")
    ]


def shared_tensors(pool: Pool, c: TextConfig, il: int, n_ff: int, wanted: TensorType) -> list[OutTensor]:
    if n_ff == 0:
        return []
    return ernie4_5.mlp_tensors(
        pool, c, f"model.layers.{il}.mlp.shared_experts", f"blk.{il}", n_ff, wanted, suffix="_shexp"
    )


pool = ernie4_5.pool


def read_config(config: Mapping[str, Any]) -> TextConfig:
    return ernie4_5.text_config(config)


def sparse_layers(c: TextConfig) -> list[bool]:
    """Layer i is sparse iff (i + 1) % interval == 0 and start <= i <= end."""
    v = c.values
    if v.get("mlp_layer_types") is not None:
        return [kind == "sparse" for kind in v["mlp_layer_types"]]
    first, last, step = (
        need(v, "moe_layer_start_index"),
        v.get("moe_layer_end_index", -1),
        v.get("moe_layer_interval") or 1,
    )
    last = c.n_layer - 1 if last in (-1, None) else last
    return [(i + 1) % step == 0 and first <= i <= last for i in range(c.n_layer)]


def text_bank(c: TextConfig) -> Bank:
    """The routed experts."""
    return Bank(need(c.values, "moe_num_experts", "num_experts"), need(c.values, "moe_intermediate_size"))


def text_model(
    checkpoint: Checkpoint, pool: Pool, vocabulary: Vocabulary, wanted: TensorType
) -> tuple[list[Key], list[OutTensor]]:
    """Keys and tensors of the text GGUF."""
    c = read_config(checkpoint.config)
    bank = text_bank(c)
    n_shared = c.values.get("moe_num_shared_experts")
    n_dense = leading_dense(sparse_layers(c))
    out = ernie4_5.stem_tensors(pool, c, wanted)
    for il in range(c.n_layer):
        out += ernie4_5.attention_tensors(pool, c, il, wanted)
        mlp = f"model.layers.{il}.mlp"
        if il < n_dense:
            out += ernie4_5.mlp_tensors(pool, c, mlp, f"blk.{il}", c.n_ff, wanted)
            continue
        out.append(
            out_tensor(
                f"blk.{il}.ffn_gate_inp.weight",
                [pool.take(f"{mlp}.gate.weight", (bank.n_expert, c.n_embd))],
                (bank.n_expert, c.n_embd),
                wanted,
            )
        )
        for bias in (f"{mlp}.moe_statics.e_score_correction_bias", f"{mlp}.gate.moe_statics.e_score_correction_bias"):
            if bias in pool:  # absent where the model was trained without balancing by bias
                out.append(
                    out_tensor(
                        f"blk.{il}.exp_probs_b.bias", [pool.take(bias, (1, bank.n_expert))], (1, bank.n_expert), wanted
                    )
                )
        out += bank_tensors(pool, c, il, bank, wanted)
        out += shared_tensors(pool, c, il, bank.n_ff * (n_shared or 0), wanted)
    keys = ernie4_5.text_keys(ARCH, c, wanted) + expert_keys(ARCH, c, bank, n_dense, n_shared)
    if c.values.get("head_dim") is not None:
        keys += ernie4_5.head_size_keys(ARCH, c)
    return keys, out
