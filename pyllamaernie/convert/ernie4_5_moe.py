"""ERNIE 4.5 text mixture of experts: the dense stack plus routers, stacked experts and a shared expert.

Writes what upstream's `conversion/ernie.py` (class `Ernie4_5MoeModel`, at the pin) writes, except one key: upstream
puts the shared expert's width down as intermediate_size // num_key_value_heads, which is true of the released models
by coincidence; here it is moe_intermediate_size times the number of shared experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyllamaernie.convert import ernie4_5
from pyllamaernie.convert.checkpoint import Checkpoint
from pyllamaernie.convert.ernie4_5 import SIZE_MAX, TextConfig, need
from pyllamaernie.convert.json_file import shown, whole
from pyllamaernie.convert.plan import Pool, Rows, out_tensor
from pyllamaernie.convert.tokenizer import Vocabulary
from pyllamaernie.errors import ConvertError, TensorMappingError
from pyllamaernie.gguf.file import Key, OutTensor, TensorType

ARCH = "ernie4_5-moe"
N_EXPERT_MAX = 1024  # LLAMA_MAX_EXPERTS of llama.cpp at the pin
_N_EXPERTS_MAX = 2**16  # of all layers; the largest ERNIE 4.5 has 3,456
_N_SHARED_MAX = 64
_EXPERT = re.compile(r"^model\.layers\.\d{1,6}\.mlp\.experts\.(\d{1,6})\.")


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


def n_experts(c: TextConfig, value: object, name: str) -> int:
    """A number of routed experts, no more than llama.cpp loads and no fewer than a token uses. Raises: ConvertError."""
    if type(value) is not int or not 1 <= value <= N_EXPERT_MAX or value * c.n_layer > _N_EXPERTS_MAX:
        raise ConvertError(
            f"config.json: {name} is {shown(value)} in {c.n_layer} layers; expected 1 to {N_EXPERT_MAX}, and at most "
            f"{_N_EXPERTS_MAX} in all layers"
        )
    n_used = whole(c.values, "moe_k", low=1, high=N_EXPERT_MAX)
    if n_used > value:
        raise ConvertError(f"config.json: moe_k is {n_used}, but there are {value} experts; a token cannot use more")
    return value


def n_shared_experts(c: TextConfig) -> int | None:
    """How many experts every token uses; None where config.json does not say."""
    if c.values.get("moe_num_shared_experts") is None:
        return None
    return whole(c.values, "moe_num_shared_experts", low=0, high=_N_SHARED_MAX)


def check_experts(pool: Pool, n: int, fused: bool) -> None:
    """Raises TensorMappingError if config.json counts more experts than tensors are of, before a loop believes it.

    `n`: of all banks of a layer. `fused`: they are stored in one tensor, whose shape says how many there are.
    """
    found = pool.numbers(_EXPERT)
    if found is not None and not fused and n > len(found):
        raise TensorMappingError(
            f"config.json: {n} experts in a layer, but there are tensors of {len(found)}; expected as many"
        )


def expert_keys(arch: str, c: TextConfig, bank: Bank, n_dense: int, n_shared: int | None) -> list[Key]:
    keys = [
        Key(f"{arch}.expert_count", "u32", bank.n_expert),
        Key(f"{arch}.expert_used_count", "u32", whole(c.values, "moe_k", low=1, high=bank.n_expert)),
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
    """Layer i is sparse iff (i + 1) % interval == 0 and start <= i <= end.

    Raises: ConvertError for values of another kind, and for a list that is not as long as there are layers.
    """
    v = c.values
    kinds = v.get("mlp_layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != c.n_layer or not all(k in ("dense", "sparse") for k in kinds):
            raise ConvertError(
                f"config.json: mlp_layer_types is {shown(kinds)}; expected 'dense' or 'sparse' for each of the "
                f"{c.n_layer} layers"
            )
        return [kind == "sparse" for kind in kinds]
    first = whole(v, "moe_layer_start_index", low=0, high=SIZE_MAX)
    last = whole(v, "moe_layer_end_index", low=-1, high=SIZE_MAX, default=-1)
    step = whole(v, "moe_layer_interval", low=1, high=SIZE_MAX, default=1)
    last = c.n_layer - 1 if last == -1 else last
    return [(i + 1) % step == 0 and first <= i <= last for i in range(c.n_layer)]


def text_bank(c: TextConfig) -> Bank:
    """The routed experts."""
    n = n_experts(c, need(c.values, "moe_num_experts", "num_experts"), "moe_num_experts")
    return Bank(n, whole(c.values, "moe_intermediate_size", low=1, high=SIZE_MAX))


def text_model(
    checkpoint: Checkpoint, pool: Pool, vocabulary: Vocabulary, wanted: TensorType
) -> tuple[list[Key], list[OutTensor]]:
    """Keys and tensors of the text GGUF."""
    c = read_config(checkpoint.config)
    bank = text_bank(c)
    n_shared = n_shared_experts(c)
    n_dense = leading_dense(sparse_layers(c))
    ernie4_5.check_layers(pool, c)
    check_experts(pool, bank.n_expert, f"model.layers.{n_dense}.mlp.experts.gate_up_proj" in pool)
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
