"""ERNIE 4.5 vision-language MoE: two expert banks, 3-D RoPE brought to ggml's M-RoPE, tower and resampler.

The text model becomes one GGUF (arch `ernie4_5-vl-moe`), the vision side another (`clip`, projector `ernie4_5_vl`).
Source of the layout: Baidu's `-PT` files; of the numbers: transformers 5.23 `models/ernie4_5_vl_moe`.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pyllamaernie.convert import ernie4_5, ernie4_5_moe
from pyllamaernie.convert.checkpoint import Checkpoint
from pyllamaernie.convert.ernie4_5 import N_LAYER_MAX, SIZE_MAX, TextConfig, need
from pyllamaernie.convert.ernie4_5_moe import Bank
from pyllamaernie.convert.json_file import as_whole, flag, number, section, shown, whole
from pyllamaernie.convert.plan import Pool, Rows, computed_tensor, out_tensor
from pyllamaernie.convert.tokenizer import Vocabulary
from pyllamaernie.errors import ConvertError, TokenizerError
from pyllamaernie.gguf.file import FILE_TYPES, QUANTIZATION_VERSION, Key, OutTensor, TensorType

log = logging.getLogger("pyllamaernie.convert")

ARCH = "ernie4_5-vl-moe"
PROJECTOR = "ernie4_5_vl"
_PROCESSOR = "processor_config.json"
VISION_EPS = 1e-6  # of every LayerNorm on the vision side; in the code of both references, not in all configurations

# What both reference processors use when the checkpoint does not say.
MIN_PIXELS, MAX_PIXELS = 4 * 28 * 28, 6177 * 28 * 28
VIDEO_MIN_PIXELS, VIDEO_MAX_PIXELS = 299 * 28 * 28, 1196 * 28 * 28  # of one frame
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

_MARKERS = (
    ("v.boi", "<|IMAGE_START|>", "image_start_token_id"),
    ("v.eoi", "<|IMAGE_END|>", "image_end_token_id"),
    ("v.bov", "<|VIDEO_START|>", "video_start_token_id"),
    ("v.eov", "<|VIDEO_END|>", "video_end_token_id"),
)
_IN_SEQUENTIAL = {"fc1": "0", "fc2": "2", "ln": "3"}
_BLOCK = (
    ("norm1", "ln1"),
    ("norm2", "ln2"),
    ("attn.qkv", "attn_qkv"),
    ("attn.proj", "attn_out"),
    ("mlp.fc1", "ffn_up"),
    ("mlp.fc2", "ffn_down"),
)


@dataclass(frozen=True)
class Sections:
    """How many rotation pairs turn with time, row and column."""

    t: int
    h: int
    w: int


def canonical_name(name: str) -> str:
    """Baidu's spelling, with the tower at the root."""
    name = ernie4_5.canonical_name(name)
    name = re.sub(r"^(model\.)?vision_(model|tower)\.", "vision_model.", name)
    name = re.sub(r"^(model\.)?resampler_model\.", "model.resampler_model.", name)
    if name.startswith("model.resampler_model."):
        name = re.sub(r"_linear\.(fc1|fc2|ln)\.", lambda m: f"_linear.{_IN_SEQUENTIAL[m[1]]}.", name)
    return name


def sections(c: TextConfig) -> Sections:
    """From `mrope_section` = [h, w, t] (transformers) or `freq_allocation` = t (Baidu).

    Raises: ConvertError when neither is there, h and w differ, or the sum is not half of a head.
    """
    rope = ernie4_5.rope_values(c.values)
    half = c.head_dim // 2
    if rope.get("mrope_section") is not None:
        parts = rope["mrope_section"]
        if not isinstance(parts, list) or len(parts) != 3:
            said = [shown(part) for part in parts[:4]] if isinstance(parts, list) else shown(parts)
            raise ConvertError(f"config.json: mrope_section {said}; expected three numbers, for height, width and time")
        h, w, t = (as_whole(part, "mrope_section", 1, half) for part in parts)
        s = Sections(t=t, h=h, w=w)
    elif c.values.get("freq_allocation") is not None:
        t = whole(c.values, "freq_allocation", low=1, high=half)
        s = Sections(t=t, h=(half - t) // 2, w=half - t - (half - t) // 2)
    else:
        raise ConvertError(
            "config.json: neither rope_parameters.mrope_section nor freq_allocation says how the rotation is split"
        )
    if s.h != s.w or s.t + s.h + s.w != half or min(s.t, s.h) < 1:
        raise ConvertError(
            f"config.json: rotation split h={s.h}, w={s.w}, t={s.t}; "
            f"expected h = w and h + w + t = {half}, half of head_dim {c.head_dim}"
        )
    return s


def source_pairs(s: Sections) -> np.ndarray:
    """k(j): which of ERNIE's rotation pairs becomes ggml's pair j.

    ERNIE: even pairs of the fast end turn with the row, odd ones with the column, the slow end with time.
    ggml's M-RoPE: contiguous runs in the order time, row, column.
    """
    hw = s.h + s.w
    return np.concatenate([np.arange(hw, hw + s.t), np.arange(0, hw, 2), np.arange(1, hw, 2)])


def head_order(s: Sections) -> list[int]:
    """Row of a head that goes to each place: pairs (2k, 2k + 1) become (j, j + n/2)."""
    k = source_pairs(s)
    return [int(row) for row in np.concatenate([2 * k, 2 * k + 1])]


def rope_factors(s: Sections, freq_base: float) -> np.ndarray:
    """What ggml must divide its own frequency of pair j by, to get ERNIE's of pair k(j).

    ggml multiplies a float32 step up to the power j; taking that rounded step here cancels its systematic error.
    Shapes: -> (head_dim / 2,) float32
    """
    k = source_pairs(s)
    n = 2 * k.size
    step = float(np.float32(freq_base ** (-2.0 / n)))
    return (step ** np.arange(k.size, dtype=np.float64) * float(freq_base) ** (2.0 * k / n)).astype(np.float32)


def _pair(value: Any, what: str, low: int, high: int) -> tuple[int, int]:
    """One whole number, or two, for text and vision. Raises: ConvertError."""
    both = value if isinstance(value, list) else [value, value]
    if len(both) != 2:
        raise ConvertError(
            f"config.json: {what} is a list of {len(both)}; expected one number or two, for text and vision"
        )
    return as_whole(both[0], what, low, high), as_whole(both[1], what, low, high)


def banks(c: TextConfig) -> tuple[Bank, Bank]:
    """Text and vision experts. Raises ConvertError when their numbers differ."""
    said = need(c.values, "moe_num_experts", "num_experts")
    n_text, n_vision = _pair(said, "moe_num_experts", 1, ernie4_5_moe.N_EXPERT_MAX)
    if n_text != n_vision:
        raise ConvertError(
            f"config.json: {n_text} text experts and {n_vision} vision experts; only equal numbers are supported"
        )
    n = ernie4_5_moe.n_experts(c, n_text, "moe_num_experts")
    widths = need(c.values, "moe_intermediate_size")
    if not isinstance(widths, list):
        raise ConvertError(
            f"config.json: moe_intermediate_size is {shown(widths)}; expected two numbers, for text and vision"
        )
    f_text, f_vision = _pair(widths, "moe_intermediate_size", 1, SIZE_MAX)
    return Bank(n, f_text, 0, "text_moe."), Bank(n, f_vision, n, "vision_moe.", "_vl")


def sparse_layers(c: TextConfig) -> list[bool]:
    """Which layers have experts. Raises ConvertError when the two banks have different layers."""
    v = c.values
    if v.get("mlp_layer_types") is not None:
        return ernie4_5_moe.sparse_layers(c)
    starts = _pair(need(v, "moe_layer_start_index"), "moe_layer_start_index", 0, SIZE_MAX)
    end = v.get("moe_layer_end_index")
    said = _pair(-1 if end is None else end, "moe_layer_end_index", -1, SIZE_MAX)
    ends = [c.n_layer - 1 if end == -1 else min(end, c.n_layer - 1) for end in said]
    if starts[0] != starts[1] or ends[0] != ends[1]:
        raise ConvertError(
            f"config.json: text experts in layers {starts[0]}..{ends[0]}, vision experts in {starts[1]}..{ends[1]}; "
            "only equal ranges are supported"
        )
    one = {**v, "moe_layer_start_index": starts[0], "moe_layer_end_index": ends[0]}
    return ernie4_5_moe.sparse_layers(replace(c, values=one))


def pool(checkpoint: Checkpoint) -> Pool:
    return ernie4_5.make_pool(checkpoint, canonical_name)


def _router(pool: Pool, c: TextConfig, il: int, bank: Bank) -> Rows | None:
    """A router as [n_expert, n_embd]; files hold it the other way round, transformers' modules do not."""
    mlp = f"model.layers.{il}.mlp"
    if f"{mlp}.{bank.memory}gate.weight" in pool:
        return pool.take(f"{mlp}.{bank.memory}gate.weight", (bank.n_expert, c.n_embd))
    found = pool.take(f"{mlp}.gate.weight{'_1' if bank.suffix else ''}", (c.n_embd, bank.n_expert))
    return found and replace(found, transposed=True)


def _correction_biases(pool: Pool, il: int, both: Sequence[Bank]) -> list[Rows | None]:
    mlp, n = f"model.layers.{il}.mlp", both[0].n_expert
    apart = [f"{mlp}.{bank.memory}gate.moe_statics.e_score_correction_bias" for bank in both]
    if any(name in pool for name in apart):
        return [pool.take(name, (1, n)) for name in apart]
    both_rows = f"{mlp}.moe_statics.e_score_correction_bias"
    if both_rows not in pool:  # a model that was trained without balancing by bias
        return []
    found = pool.take(both_rows, (2, n))
    return [found and found.part(row, row + 1) for row in range(2)]


def text_model(
    checkpoint: Checkpoint, pool: Pool, vocabulary: Vocabulary, wanted: TensorType
) -> tuple[list[Key], list[OutTensor]]:
    """Keys and tensors of the text GGUF."""
    c = ernie4_5.text_config(checkpoint.config)
    s, both, n_dense = sections(c), banks(c), ernie4_5_moe.leading_dense(sparse_layers(c))
    n_shared = ernie4_5_moe.n_shared_experts(c) or 0
    ernie4_5.check_layers(pool, c)
    fused = f"model.layers.{n_dense}.mlp.{both[0].memory}experts.gate_up_proj" in pool
    ernie4_5_moe.check_experts(pool, 2 * both[0].n_expert, fused)
    keys = [
        *ernie4_5.text_keys(ARCH, c, wanted),
        *ernie4_5.head_size_keys(ARCH, c),
        *ernie4_5_moe.expert_keys(ARCH, c, both[0], n_dense, n_shared or None),
        Key(f"{ARCH}.expert_feed_forward_length_vl", "u32", both[1].n_ff),
        Key(f"{ARCH}.rope.dimension_count", "u32", c.head_dim),
        Key(f"{ARCH}.rope.dimension_sections", "list", [s.t, s.h, s.w, 0]),
    ]
    if not n_shared:
        keys += [
            Key(f"{ARCH}.expert_shared_count", "u32", 0),
            Key(f"{ARCH}.expert_shared_feed_forward_length", "u32", 0),
        ]
    out = [*ernie4_5.stem_tensors(pool, c, wanted), computed_tensor("rope_freqs.weight", rope_factors(s, c.freq_base))]
    for il in range(c.n_layer):
        out += ernie4_5.attention_tensors(pool, c, il, wanted, order=head_order(s))
        if il < n_dense:
            out += ernie4_5.mlp_tensors(pool, c, f"model.layers.{il}.mlp", f"blk.{il}", c.n_ff, wanted)
            continue
        biases = _correction_biases(pool, il, both)
        for row, bank in enumerate(both):
            blk, n = f"blk.{il}", bank.n_expert
            out.append(
                out_tensor(
                    f"{blk}.ffn_gate_inp{bank.suffix}.weight", [_router(pool, c, il, bank)], (n, c.n_embd), wanted
                )
            )
            if biases:
                out.append(out_tensor(f"{blk}.exp_probs_b{bank.suffix}.bias", [biases[row]], (n,), wanted))
            out += ernie4_5_moe.bank_tensors(pool, c, il, bank, wanted)
        out += ernie4_5_moe.shared_tensors(pool, c, il, both[0].n_ff * n_shared, wanted)
    return keys, out


def _vision_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    need(config, "vision_config")
    v, where = section(config, "vision_config"), "config.json: vision_config"
    merge = config.get("spatial_conv_size") or need(v, "spatial_merge_size")
    temporal = config.get("temporal_conv_size") or need(v, "temporal_merge_size")
    if merge != 2 or temporal != 2:
        raise ConvertError(
            f"config.json: spatial merge {shown(merge)}, temporal merge {shown(temporal)}; only 2 and 2 are supported"
        )
    if flag(config, "use_temporal_conv") is False:
        raise ConvertError(
            "config.json: use_temporal_conv is false; a resampler without its temporal stage is not supported"
        )
    if v.get("hidden_act", "quick_gelu") != "quick_gelu":
        raise ConvertError(f"config.json: vision hidden_act {shown(v['hidden_act'])}; expected 'quick_gelu'")
    patch = need(v, "patch_size")
    if isinstance(patch, list):
        if not patch or any(side != patch[0] for side in patch):
            raise ConvertError(f"config.json: patch_size is {shown(patch)}; only square patches are supported")
        patch = patch[0]
    width = whole({"hidden_size": v.get("embed_dim") or v.get("hidden_size")}, "hidden_size", low=1, high=SIZE_MAX,
                  where=where)  # fmt: skip
    n_head = whole(v, "num_heads", "num_attention_heads", low=1, high=width, where=where)
    if width % (4 * n_head):
        raise ConvertError(f"{where}: hidden_size {width} in {n_head} heads; expected heads of a multiple of 4")
    n_ff = int(width * number(v, "mlp_ratio", low=0, high=1024, default=0, where=where))
    return {
        "depth": whole(v, "depth", "num_hidden_layers", low=1, high=N_LAYER_MAX, where=where),
        "width": width,
        "n_head": n_head,
        "n_ff": whole(v, "intermediate_size", low=1, high=SIZE_MAX, default=n_ff or None, where=where),
        "channels": whole(v, "in_channels", low=1, high=64, default=3, where=where),
        "patch": as_whole(patch, "patch_size", 1, 1024, where),
        "merge": 2,
    }


def _limits(processor: Mapping[str, Any], low: int, high: int, where: str) -> tuple[int, int]:
    """Smallest and largest number of pixels that a processor's configuration allows, or these."""
    size = section(processor, "size", where)
    said = {
        "shortest_edge": size.get("shortest_edge") or processor.get("min_pixels"),
        "longest_edge": size.get("longest_edge") or processor.get("max_pixels"),
    }
    least = whole(said, "shortest_edge", low=1, high=2**31 - 1, default=low, where=where)
    most = whole(said, "longest_edge", low=1, high=2**31 - 1, default=max(high, least), where=where)
    if least > most:
        raise ConvertError(f"{where}: at least {least} and at most {most} pixels; expected the first to be the smaller")
    return least, most


def _three(processor: Mapping[str, Any], name: str, default: Sequence[float], low: float, where: str) -> list[float]:
    """A value for each of red, green and blue. Raises: ConvertError."""
    values = default if processor.get(name) is None else processor[name]
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise ConvertError(f"{where}: {name} is {shown(values)}; expected three numbers")
    return [float(number({name: value}, name, low=low, high=1e6, where=where)) for value in values]


def _processor(checkpoint: Checkpoint, file: str, part: str) -> tuple[dict[str, Any], str]:
    """What is said of pictures or videos, and in which file: a file of its own, or a part of processor_config.json."""
    found, inner = checkpoint.json(file), section(checkpoint.json(_PROCESSOR), part, _PROCESSOR)
    return {**found, **inner}, f"{_PROCESSOR}: {part}" if inner else file


def _image_keys(checkpoint: Checkpoint) -> list[Key]:
    """Limits and normalisation from the processor's configuration, in Baidu's or transformers' form."""
    found, where = _processor(checkpoint, "preprocessor_config.json", "image_processor")
    if not found:
        log.info("no preprocessor_config.json: the limits and the normalisation of the released models are taken")
    low, high = _limits(found, MIN_PIXELS, MAX_PIXELS, where)
    side = math.isqrt(high) // 28 * 28
    return [
        Key("clip.vision.image_size", "u32", side),
        Key("clip.vision.image_min_pixels", "u32", low),
        Key("clip.vision.image_max_pixels", "u32", high),
        Key("clip.vision.image_mean", "list", _three(found, "image_mean", IMAGE_MEAN, -1e6, where)),
        Key("clip.vision.image_std", "list", _three(found, "image_std", IMAGE_STD, 1e-6, where)),
    ]


def _video_keys(checkpoint: Checkpoint) -> list[Key]:
    """Limits of a video's frames; that they are there says that the model takes videos."""
    found, where = _processor(checkpoint, "video_preprocessor_config.json", "video_processor")
    low, high = _limits(found, VIDEO_MIN_PIXELS, VIDEO_MAX_PIXELS, where)
    return [Key("clip.vision.video_min_pixels", "u32", low), Key("clip.vision.video_max_pixels", "u32", high)]


def _marker_rows(
    checkpoint: Checkpoint, pool: Pool, c: TextConfig, vocabulary: Vocabulary, wanted: TensorType
) -> list[OutTensor]:
    """The embeddings of START and END, which belong to the picture or video, in float32.

    Those of videos are left out where neither the vocabulary nor the configuration knows them.
    """
    table = pool.take("model.embed_tokens.weight", (c.n_vocab, c.n_embd))
    out: list[OutTensor] = []
    for name, text, key in _MARKERS:
        token, said = vocabulary.find(text), checkpoint.config.get(key)
        if said is not None:
            as_whole(said, key, 0, c.n_vocab - 1)
        if not vocabulary.tokens:  # a dry run without a tokenizer: any row is as long
            token = said = 0
        if token is None and said is not None:
            log.warning("no token %s in the vocabulary; config.json says that %s is %d", text, key, said)
            token = said
        if token is None and "VIDEO" in text:
            log.warning("no token %s in the vocabulary: the converted model takes no videos", text)
            return [row for row in out if row.name in ("v.boi", "v.eoi")]
        if token is None:
            raise TokenizerError(f"no token {text} in the vocabulary; it opens or closes every picture")
        if said is not None and said != token:
            raise TokenizerError(f"config.json: {key} is {said}, but {text} is token {token} of the vocabulary")
        out.append(out_tensor(name, [table and table.part(token, token + 1)], (c.n_embd,), wanted))
    return out


def vision_model(
    checkpoint: Checkpoint, pool: Pool, vocabulary: Vocabulary, wanted: TensorType
) -> tuple[list[Key], list[OutTensor]]:
    """Keys and tensors of the mmproj GGUF."""
    c, v = ernie4_5.text_config(checkpoint.config), _vision_sizes(checkpoint.config)
    tensors = _vision_tensors(pool, c, v, wanted)
    markers = _marker_rows(checkpoint, pool, c, vocabulary, wanted)
    keys = _vision_keys(checkpoint, c, v, wanted, takes_videos=len(markers) == len(_MARKERS))
    return keys, [*tensors, *markers]


def _vision_tensors(pool: Pool, c: TextConfig, v: Mapping[str, int], wanted: TensorType) -> list[OutTensor]:
    """The tower, block by block, and the resampler; `v` is what _vision_sizes says."""
    width, n_ff, merged = v["width"], v["n_ff"], v["width"] * v["merge"] ** 2
    out: list[OutTensor] = []

    def linear(theirs: str, ours: str, n_out: int, n_in: int) -> None:
        out.append(out_tensor(f"{ours}.weight", [pool.take(f"{theirs}.weight", (n_out, n_in))], (n_out, n_in), wanted))
        vector(f"{theirs}.bias", f"{ours}.bias", n_out)

    def vector(theirs: str, ours: str, n: int) -> None:
        out.append(out_tensor(ours, [pool.take(theirs, (n,))], (n,), wanted))

    def norm(theirs: str, ours: str, n: int) -> None:
        vector(f"{theirs}.weight", f"{ours}.weight", n)
        vector(f"{theirs}.bias", f"{ours}.bias", n)

    patch = (v["channels"], v["patch"], v["patch"])  # stored as channel, row, column: the convolution's own order
    kernel = pool.take("vision_model.patch_embed.proj.weight", (width, math.prod(patch)))
    out.append(out_tensor("v.patch_embd.weight", [kernel], (width, *patch), wanted))
    sizes = {
        "attn_qkv": (3 * width, width),
        "attn_out": (width, width),
        "ffn_up": (n_ff, width),
        "ffn_down": (width, n_ff),
    }
    for il in range(v["depth"]):
        for theirs, ours in _BLOCK:
            names = f"vision_model.blocks.{il}.{theirs}", f"v.blk.{il}.{ours}"
            linear(*names, *sizes[ours]) if ours in sizes else norm(*names, width)
    norm("vision_model.ln", "v.post_ln", width)
    resampler = "model.resampler_model"
    for first, part, n_in in ((0, "spatial_linear", merged), (3, "temporal_linear", 2 * merged)):
        linear(f"{resampler}.{part}.0", f"mm.{first}", merged, n_in)
        linear(f"{resampler}.{part}.2", f"mm.{first + 1}", merged, merged)
        norm(f"{resampler}.{part}.3", f"mm.{first + 2}", merged)
    linear(f"{resampler}.mlp", "mm.6", c.n_embd, merged)
    vector(f"{resampler}.after_norm.weight", "mm.post_norm.weight", c.n_embd)
    return out


def _vision_keys(
    checkpoint: Checkpoint, c: TextConfig, v: Mapping[str, int], wanted: TensorType, *, takes_videos: bool
) -> list[Key]:
    return [
        Key("general.file_type", "u32", FILE_TYPES[wanted]),
        Key("general.quantization_version", "u32", QUANTIZATION_VERSION),
        Key("clip.has_vision_encoder", "bool", True),
        Key("clip.projector_type", "str", PROJECTOR),
        *_image_keys(checkpoint),
        *(_video_keys(checkpoint) if takes_videos else []),
        Key("clip.vision.patch_size", "u32", v["patch"]),
        Key("clip.vision.embedding_length", "u32", v["width"]),
        Key("clip.vision.feed_forward_length", "u32", v["n_ff"]),
        Key("clip.vision.block_count", "u32", v["depth"]),
        Key("clip.vision.attention.head_count", "u32", v["n_head"]),
        Key("clip.vision.attention.layer_norm_epsilon", "f32", VISION_EPS),
        Key("clip.vision.projection_dim", "u32", c.n_embd),
        Key("clip.vision.spatial_merge_size", "u32", v["merge"]),
        Key("clip.vision.projector.layer_norm_epsilon", "f32", c.rms_eps),
    ]
