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
from pyllamaernie.convert.json_file import flag, number, section, shown, whole
from pyllamaernie.convert.plan import ImpliedPool, Pool, out_tensor
from pyllamaernie.convert.tokenizer import Vocabulary
from pyllamaernie.errors import ConvertError, TensorMappingError
from pyllamaernie.gguf.file import FILE_TYPES, QUANTIZATION_VERSION, Key, OutTensor, TensorType

ARCH = "ernie4_5"

# Left out, as upstream and transformers leave them out: counters and derived tables.
DROPPED = re.compile(r"\.moe_statics\.expert_usage$|\.inv_freq$")

N_LAYER_MAX = 512  # LLAMA_MAX_LAYERS of llama.cpp at the pin
N_MTP_MAX = 16
SIZE_MAX = 2**24
_HEAD_DIM_MAX, _N_VOCAB_MAX = 2**14, 2**20
_LAYER = re.compile(r"^model\.layers\.(\d{1,6})\.")

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


def text_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the flat or the nested form says of the text stack. Raises: ConvertError for an odd text_config."""
    return {**config, **section(config, "text_config")}


def rope_values(text: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of the rotation, in either spelling."""
    return section(text, "rope_parameters") or section(text, "rope_scaling")


def text_config(config: Mapping[str, Any], *, default_head_dim: int | None = None) -> TextConfig:
    """Reads the flat or the nested form.

    Raises: ConvertError for a missing key, a value out of range, or a RoPE scaling, which no ERNIE 4.5 has.
    """
    text = text_values(config)
    rope = rope_values(text)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", None):
        raise ConvertError(f"config.json: rope type {shown(rope_type)}; only 'default' is known for ERNIE 4.5")
    if text.get("hidden_act", "silu") != "silu":
        raise ConvertError(f"config.json: hidden_act {shown(text['hidden_act'])}; ERNIE 4.5 uses 'silu'")
    n_head = whole(text, "num_attention_heads", low=1, high=SIZE_MAX)
    n_embd = whole(text, "hidden_size", low=1, high=SIZE_MAX)
    n_head_kv = whole(text, "num_key_value_heads", low=1, high=n_head, default=n_head)
    head_dim = whole(text, "head_dim", low=2, high=_HEAD_DIM_MAX, default=default_head_dim or max(2, n_embd // n_head))
    if n_head % n_head_kv:
        raise ConvertError(
            f"config.json: num_attention_heads {n_head} is no multiple of num_key_value_heads {n_head_kv}"
        )
    if head_dim % 2:
        raise ConvertError(f"config.json: head_dim is {head_dim}; expected an even number, for the rotation")
    return TextConfig(
        values=text,
        n_layer=whole(text, "num_hidden_layers", low=1, high=N_LAYER_MAX),
        n_embd=n_embd,
        n_vocab=whole(text, "vocab_size", low=1, high=_N_VOCAB_MAX),
        n_ff=whole(text, "intermediate_size", low=1, high=SIZE_MAX),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        rms_eps=number(text, "rms_norm_eps", low=0, high=1),
        freq_base=float(
            number(
                {"rope_theta": rope.get("rope_theta") or text.get("rope_theta")},
                "rope_theta",
                low=1,
                high=1e12,
                default=500000.0,
            )
        ),  # the family's documented default
        use_bias=bool(flag(text, "use_bias")),
        tied=flag(text, "tie_word_embeddings"),
    )


def vocabulary_size(checkpoint: Checkpoint) -> int:
    """How many tokens there are: what config.json says, held against the embedding before anything is as long.

    Raises: ConvertError, TensorMappingError.
    """
    n_vocab = whole(text_values(checkpoint.config), "vocab_size", low=1, high=_N_VOCAB_MAX)
    for name, tensor in checkpoint.tensors.items():
        if canonical_name(name) == "model.embed_tokens.weight" and tensor.shape[:1] != (n_vocab,):
            raise TensorMappingError(
                f"config.json: vocab_size is {n_vocab}, but {name} has shape {list(tensor.shape)}; expected "
                f"as many rows"
            )
    return n_vocab


def check_layers(pool: Pool, c: TextConfig) -> None:
    """Raises TensorMappingError if config.json counts more layers than tensors are of, before a loop believes it."""
    found = pool.numbers(_LAYER)
    if found is not None and c.n_layer > len(found):
        raise TensorMappingError(
            f"config.json: num_hidden_layers is {c.n_layer}, but there are tensors of {len(found)} layers; "
            "expected as many"
        )


def text_keys(arch: str, c: TextConfig, file_type: TensorType, *, n_layer: int | None = None) -> list[Key]:
    """The keys that every text model has."""
    keys = [Key(f"{arch}.block_count", "u32", c.n_layer if n_layer is None else n_layer)]
    if c.values.get("max_position_embeddings") is not None:
        n_ctx = whole(c.values, "max_position_embeddings", low=1, high=2**31 - 1)
        keys.append(Key(f"{arch}.context_length", "u32", n_ctx))
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
    text = text_values(config)
    n_mtp = whole(text, "num_nextn_predict_layers", low=0, high=N_MTP_MAX, default=0)

    def there(name: str) -> bool:
        if name == "lm_head.weight":
            return text.get("tie_word_embeddings") is False
        if name.endswith(".mlp.moe_statics.e_score_correction_bias"):
            return text.get("moe_use_aux_free") is not False
        block = re.match(r"model\.mtp_\w+\.(\d{1,6})\.", name)
        odd = any(part in name for part in ("up_gate_proj", "qkv_proj", ".experts."))
        return block is not None and int(block[1]) < n_mtp and not odd

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
    check_layers(pool, c)
    out = stem_tensors(pool, c, wanted)
    for il in range(c.n_layer):
        out += attention_tensors(pool, c, il, wanted)
        out += mlp_tensors(pool, c, f"model.layers.{il}.mlp", f"blk.{il}", c.n_ff, wanted)
    return [*text_keys(ARCH, c, wanted), *head_size_keys(ARCH, c)], out
