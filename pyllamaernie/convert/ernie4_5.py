"""ERNIE 4.5 dense: names, metadata and tensors of the text stack that all families share.

Writes what upstream's `conversion/ernie.py` (class `Ernie4_5Model`, at the pin) writes, tensor for tensor.
Canonical names are those of Baidu's `-PT` files; `canonical_name` brings every other spelling to them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyllamaernie.convert.checkpoint import Checkpoint
from pyllamaernie.convert.plan import ImpliedPool, Pool, out_tensor
from pyllamaernie.convert.tokenizer import Vocabulary
from pyllamaernie.errors import ConvertError
from pyllamaernie.gguf.file import FILE_TYPES, QUANTIZATION_VERSION, Key, OutTensor, TensorType

ARCH = "ernie4_5"

# Left out, as upstream and transformers leave them out: counters and derived tables.
DROPPED = re.compile(r"\.moe_statics\.expert_usage$|\.inv_freq$")

_MLP = (("gate_proj", "ffn_gate"), ("up_proj", "ffn_up"), ("down_proj", "ffn_down"))


@dataclass(frozen=True)
class TextConfig:
    """The text stack's sizes, whatever the flavour of config.json."""

    values: Mapping[str, Any]
    n_layer: int
    n_embd: int
    n_vocab: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    rms_eps: float
    freq_base: float
    use_bias: bool
    tied: bool | None  # None: config.json does not say


def canonical_name(name: str) -> str:
    """A tensor's name in Baidu's spelling: `model.language_model.` and an `ernie.` prefix go."""
    if name.startswith("ernie."):
        name = "model." + name.removeprefix("ernie.")
    return name.replace("model.language_model.", "model.", 1)


def need(config: Mapping[str, Any], *names: str) -> Any:
    """The first of the keys that is there and not null. Raises ConvertError naming them."""
    for name in names:
        if config.get(name) is not None:
            return config[name]
    raise ConvertError(f"config.json: no {' or '.join(names)}; it is required")


def text_config(config: Mapping[str, Any], *, default_head_dim: int | None = None) -> TextConfig:
    """Reads the flat or the nested form.

    Raises: ConvertError for a missing key, or a RoPE scaling, which no ERNIE 4.5 has.
    """
    text = {**config, **(config.get("text_config") or {})}
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", None):
        raise ConvertError(f"config.json: rope type {rope_type!r}; only 'default' is known for ERNIE 4.5")
    if text.get("hidden_act", "silu") != "silu":
        raise ConvertError(f"config.json: hidden_act {text['hidden_act']!r}; ERNIE 4.5 uses 'silu'")
    n_head = need(text, "num_attention_heads")
    n_embd = need(text, "hidden_size")
    return TextConfig(
        values=text,
        n_layer=need(text, "num_hidden_layers"),
        n_embd=n_embd,
        n_vocab=need(text, "vocab_size"),
        n_ff=need(text, "intermediate_size"),
        n_head=n_head,
        n_head_kv=text.get("num_key_value_heads") or n_head,
        head_dim=text.get("head_dim") or default_head_dim or n_embd // n_head,
        rms_eps=need(text, "rms_norm_eps"),
        freq_base=float(
            rope.get("rope_theta") or text.get("rope_theta") or 500000.0
        ),  # the family's documented default
        use_bias=bool(text.get("use_bias")),
        tied=text.get("tie_word_embeddings"),
    )


def text_keys(arch: str, c: TextConfig, file_type: TensorType, *, n_layer: int | None = None) -> list[Key]:
    """The keys that every text model has."""
    keys = [Key(f"{arch}.block_count", "u32", c.n_layer if n_layer is None else n_layer)]
    if c.values.get("max_position_embeddings") is not None:
        keys.append(Key(f"{arch}.context_length", "u32", c.values["max_position_embeddings"]))
    return [
        *keys,
        Key(f"{arch}.embedding_length", "u32", c.n_embd),
        Key(f"{arch}.feed_forward_length", "u32", c.n_ff),
        Key(f"{arch}.attention.head_count", "u32", c.n_head),
        Key(f"{arch}.attention.head_count_kv", "u32", c.n_head_kv),
        Key(f"{arch}.rope.freq_base", "f32", c.freq_base),
        Key(f"{arch}.attention.layer_norm_rms_epsilon", "f32", c.rms_eps),
        Key("general.file_type", "u32", FILE_TYPES[file_type]),
        Key("general.quantization_version", "u32", QUANTIZATION_VERSION),
    ]


def head_size_keys(arch: str, c: TextConfig) -> list[Key]:
    return [
        Key(f"{arch}.attention.key_length", "u32", c.head_dim),
        Key(f"{arch}.attention.value_length", "u32", c.head_dim),
    ]


def stem_tensors(pool: Pool, c: TextConfig, wanted: TensorType) -> list[OutTensor]:
    """Embedding, output norm and, where it is stored or must be, the output matrix."""
    table = (c.n_vocab, c.n_embd)
    out = [
        out_tensor("token_embd.weight", [pool.take("model.embed_tokens.weight", table)], table, wanted),
        out_tensor("output_norm.weight", [pool.take("model.norm.weight", (c.n_embd,))], (c.n_embd,), wanted),
    ]
    if "lm_head.weight" in pool or c.tied is False:
        out.append(out_tensor("output.weight", [pool.take("lm_head.weight", table)], table, wanted))
    if "lm_head.bias" in pool:
        out.append(out_tensor("output.bias", [pool.take("lm_head.bias", (c.n_vocab,))], (c.n_vocab,), wanted))
    return out


def attention_tensors(
    pool: Pool, c: TextConfig, il: int, wanted: TensorType, *, order: Sequence[int] = (), stack: str = "model.layers"
) -> list[OutTensor]:
    """Both norms and the four projections of a layer; `order` permutes the rows of Q and K within each head."""
    layer, blk = f"{stack}.{il}", f"blk.{il}"
    n_q, n_kv = c.n_head * c.head_dim, c.n_head_kv * c.head_dim
    out = [
        out_tensor(f"{blk}.{ours}.weight", [pool.take(f"{layer}.{theirs}.weight", (c.n_embd,))], (c.n_embd,), wanted)
        for theirs, ours in (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"))
    ]
    for tail, dims in (("weight", (c.n_embd,)), ("bias", ())) if c.use_bias else (("weight", (c.n_embd,)),):
        names = [f"{layer}.self_attn.{x}_proj.{tail}" for x in "qkv"]
        rows = pool.take_split(f"{layer}.self_attn.qkv_proj.{tail}", names, (n_q, n_kv, n_kv), dims)
        for x, n, piece in zip("qkv", (n_q, n_kv, n_kv), rows, strict=True):
            if order and x != "v" and piece is not None:
                piece = piece.permuted(order)
            out.append(out_tensor(f"{blk}.attn_{x}.{tail}", [piece], (n, *dims), wanted))
    out.append(
        out_tensor(
            f"{blk}.attn_output.weight",
            [pool.take(f"{layer}.self_attn.o_proj.weight", (c.n_embd, n_q))],
            (c.n_embd, n_q),
            wanted,
        )
    )
    if c.use_bias:
        out.append(
            out_tensor(
                f"{blk}.attn_output.bias",
                [pool.take(f"{layer}.self_attn.o_proj.bias", (c.n_embd,))],
                (c.n_embd,),
                wanted,
            )
        )
    return out


def mlp_tensors(
    pool: Pool, c: TextConfig, prefix: str, blk: str, n_ff: int, wanted: TensorType, *, suffix: str = ""
) -> list[OutTensor]:
    """A SwiGLU block; `suffix` is `_shexp` for the shared expert."""
    out = []
    for tail, wide, narrow in (("weight", (n_ff, c.n_embd), (c.n_embd, n_ff)), ("bias", (n_ff,), (c.n_embd,))):
        if tail == "bias" and not c.use_bias:
            continue
        pair = pool.take_split(
            f"{prefix}.up_gate_proj.{tail}",
            [f"{prefix}.{x}_proj.{tail}" for x in ("gate", "up")],
            (n_ff, n_ff),
            wide[1:],
        )
        pieces = (*pair, pool.take(f"{prefix}.down_proj.{tail}", narrow))
        out += [
            out_tensor(f"{blk}.{ours}{suffix}.{tail}", [piece], shape, wanted)
            for (_, ours), piece, shape in zip(_MLP, pieces, (wide, wide, narrow), strict=True)
        ]
    return out


def pool(checkpoint: Checkpoint) -> Pool:
    """The checkpoint's tensors under canonical names, without those that are dropped."""
    return make_pool(checkpoint, canonical_name)


def make_pool(checkpoint: Checkpoint, rename: Callable[[str], str]) -> Pool:
    if not checkpoint.has_weights:
        names = checkpoint.names and [key for key in map(rename, checkpoint.names) if not DROPPED.search(key)]
        return ImpliedPool(names, _optional(checkpoint.config), "BF16")
    renamed: dict[str, Any] = {}
    for name, tensor in checkpoint.tensors.items():
        key = rename(name)
        if DROPPED.search(key):
            continue
        if key in renamed:
            raise ConvertError(f"{name} and {renamed[key].name} are two spellings of one tensor; keep one of them")
        renamed[key] = tensor
    return Pool(renamed)


def _optional(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Which tensors that may be there are there, as far as config.json says (without weights and without an index)."""
    text = {**config, **(config.get("text_config") or {})}

    def there(name: str) -> bool:
        if name == "lm_head.weight":
            return text.get("tie_word_embeddings") is False
        if name.endswith(".mlp.moe_statics.e_score_correction_bias"):
            return text.get("moe_use_aux_free") is not False
        block = re.match(r"model\.mtp_\w+\.(\d+)\.", name)
        odd = any(part in name for part in ("up_gate_proj", "qkv_proj", ".experts."))
        return block is not None and int(block[1]) < (text.get("num_nextn_predict_layers") or 0) and not odd

    return there


def dropped(checkpoint: Checkpoint) -> list[str]:
    """Names of the tensors that are left out on purpose."""
    return sorted(name for name in (checkpoint.names or checkpoint.tensors) if DROPPED.search(canonical_name(name)))


def read_config(config: Mapping[str, Any]) -> TextConfig:
    return text_config(
        config, default_head_dim=None if "head_dim" in config else 128
    )  # transformers' default, not n_embd / n_head


def text_model(
    checkpoint: Checkpoint, pool: Pool, vocabulary: Vocabulary, wanted: TensorType
) -> tuple[list[Key], list[OutTensor]]:
    """Keys and tensors of the text GGUF."""
    c = read_config(checkpoint.config)
    out = stem_tensors(pool, c, wanted)
    for il in range(c.n_layer):
        out += attention_tensors(pool, c, il, wanted)
        out += mlp_tensors(pool, c, f"model.layers.{il}.mlp", f"blk.{il}", c.n_ff, wanted)
    return [*text_keys(ARCH, c, wanted), *head_size_keys(ARCH, c)], out
