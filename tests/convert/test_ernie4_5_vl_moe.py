"""The vision-language family: which rows go where, the rotation, the mmproj's keys, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import checkpoint_config
import checkpoints
import numpy as np
import pytest
from checkpoint_shapes import SHAPES, Shape
from gguf import GGUFReader
from tiny_vocabulary import token_id

from pyllamaernie.convert import convert
from pyllamaernie.convert.ernie4_5_vl_moe import Sections, head_order, rope_factors, source_pairs
from pyllamaernie.errors import ConvertError, TensorMappingError, TokenizerError

SHAPE = SHAPES["vl"]
PUBLISHED = Sections(t=20, h=22, w=22)  # ERNIE-4.5-VL-28B, head_dim 128


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[GGUFReader, GGUFReader]:
    root = tmp_path_factory.mktemp("vl")
    result = convert(checkpoints.write_checkpoint(root / "vl", "vl", use_bias=True), root / "x.gguf", type="f32")
    return GGUFReader(result.model), GGUFReader(result.mmproj)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return checkpoints.weights_of("vl", use_bias=True)


def arrays(file: GGUFReader) -> dict[str, np.ndarray]:
    return {t.name: t.data.reshape(t.shape[::-1]) for t in file.tensors}


def value(file: GGUFReader, key: str) -> object:
    return file.fields[key].contents()


def test_text_keys(files) -> None:
    text, _ = files
    prefix = "ernie4_5-vl-moe."
    found = {key.removeprefix(prefix): value(text, key) for key in text.fields if key.startswith(prefix)}
    assert found.pop("attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
    assert found == {
        "block_count": 4,
        "context_length": 4096,
        "embedding_length": 256,
        "feed_forward_length": 384,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 64,
        "attention.value_length": 64,
        "rope.freq_base": 500000.0,
        "rope.dimension_count": 64,
        "rope.dimension_sections": [10, 11, 11, 0],
        "expert_count": 8,
        "expert_used_count": 3,
        "expert_feed_forward_length": 96,
        "expert_feed_forward_length_vl": 32,
        "expert_shared_count": 2,
        "expert_shared_feed_forward_length": 192,
        "leading_dense_block_count": 1,
        "interleave_moe_layer_step": 1,
    }
    assert value(text, "general.architecture") == "ernie4_5-vl-moe" and value(text, "general.type") == "model"


def test_experts_go_to_their_bank_in_order(files, weights) -> None:
    found = arrays(files[0])
    for x in ("gate", "up", "down"):
        stacked = [weights[f"model.layers.2.mlp.experts.{e}.{x}_proj.weight"] for e in range(16)]
        assert np.array_equal(found[f"blk.2.ffn_{x}_exps.weight"], np.stack(stacked[:8]))
        assert np.array_equal(found[f"blk.2.ffn_{x}_exps_vl.weight"], np.stack(stacked[8:]))


def test_routers_are_transposed_and_biases_split(files, weights) -> None:
    found, mlp = arrays(files[0]), "model.layers.3.mlp"
    assert np.array_equal(found["blk.3.ffn_gate_inp.weight"], weights[f"{mlp}.gate.weight"].T)
    assert np.array_equal(found["blk.3.ffn_gate_inp_vl.weight"], weights[f"{mlp}.gate.weight_1"].T)
    bias = weights[f"{mlp}.moe_statics.e_score_correction_bias"]
    assert np.array_equal(found["blk.3.exp_probs_b.bias"], bias[0])
    assert np.array_equal(found["blk.3.exp_probs_b_vl.bias"], bias[1])


@pytest.mark.parametrize(("x", "n_head"), [("q", SHAPE.n_head), ("k", SHAPE.n_head_kv)])
def test_rows_of_q_and_k_are_permuted_within_their_heads(x: str, n_head: int, files, weights) -> None:
    order = head_order(Sections(t=10, h=11, w=11))
    for tail in ("weight", "bias"):
        stored = weights[f"model.layers.1.self_attn.{x}_proj.{tail}"]
        expected = np.concatenate([head[order] for head in np.split(stored, n_head)])
        assert np.array_equal(arrays(files[0])[f"blk.1.attn_{x}.{tail}"], expected)
        assert not np.array_equal(stored, expected)


def test_v_and_output_are_not_permuted(files, weights) -> None:
    for ours, theirs in (("attn_v", "v_proj"), ("attn_output", "o_proj")):
        for tail in ("weight", "bias"):
            assert np.array_equal(
                arrays(files[0])[f"blk.1.{ours}.{tail}"], weights[f"model.layers.1.self_attn.{theirs}.{tail}"]
            )


def rotate(x: np.ndarray, angles: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Turns the channels pairs[j] = (a, b) by angles[j]. Shapes: (n,), (n / 2,), (n / 2, 2) -> (n,)"""
    out = x.copy()
    a, b = pairs.T
    out[a] = x[a] * np.cos(angles) - x[b] * np.sin(angles)
    out[b] = x[a] * np.sin(angles) + x[b] * np.cos(angles)
    return out


@pytest.mark.parametrize("s", [PUBLISHED, Sections(10, 11, 11), Sections(6, 5, 5)], ids=str)
def test_permuted_heads_under_ggml_m_rope_score_as_ernies_rotation(s: Sections) -> None:
    """ERNIE: one ladder of frequencies; even fast pairs turn with the row, odd ones with the column, slow with time."""
    half, base, rng = s.t + s.h + s.w, 500000.0, np.random.default_rng(5)
    n, hw = 2 * half, s.h + s.w
    ladder = base ** (-2.0 * np.arange(half) / n)
    which = np.array([(1 if k % 2 == 0 else 2) if k < hw else 0 for k in range(half)])  # 0 time, 1 row, 2 column
    adjacent = np.stack([np.arange(0, n, 2), np.arange(1, n, 2)], axis=1)
    # ggml: pairs (j, j + n/2), runs of time, row, column, frequency step^j divided by the factor
    step = float(np.float32(base ** (-2.0 / n)))
    runs = np.repeat([0, 1, 2], [s.t, s.h, s.w])
    ggml = step ** np.arange(half) / rope_factors(s, base).astype(np.float64)
    halves = np.stack([np.arange(half), np.arange(half) + half], axis=1)
    order = head_order(s)
    for _ in range(20):
        q, k = rng.standard_normal((2, n))
        at_q, at_k = rng.integers(0, 500, (2, 3))
        theirs = rotate(q, ladder * at_q[which], adjacent) @ rotate(k, ladder * at_k[which], adjacent)
        ours = rotate(q[order], ggml * at_q[runs], halves) @ rotate(k[order], ggml * at_k[runs], halves)
        assert ours == pytest.approx(theirs, abs=5e-4)
        swapped = rotate(q[order], ggml * at_q[[0, 2, 1]][runs], halves) @ rotate(k[order], ggml * at_k[runs], halves)
        assert at_q[1] == at_q[2] or abs(swapped - theirs) > 1e-3


def test_factors_of_the_published_model_are_those_written_out_by_hand() -> None:
    """base^(2 (k - j) / 128): 8280.22 for time; 1.6560e-2 .. 1.2276 for rows; 2.2341e-4 .. 1.6560e-2 for columns."""
    factors = rope_factors(PUBLISHED, 500000.0)
    assert factors.dtype == np.float32 and factors.shape == (64,)
    assert factors[:20] == pytest.approx(8280.22, rel=1e-5)
    assert [factors[20], factors[41], factors[42], factors[63]] == pytest.approx(
        [1.6560e-2, 1.2276, 2.2341e-4, 1.6560e-2], rel=1e-4
    )


def test_every_pair_is_used_once() -> None:
    assert sorted(source_pairs(PUBLISHED)) == list(range(64))
    assert source_pairs(PUBLISHED)[[0, 19, 20, 21, 41, 42, 63]].tolist() == [44, 63, 0, 2, 42, 1, 43]


def test_the_factors_are_in_the_file(files) -> None:
    assert np.array_equal(arrays(files[0])["rope_freqs.weight"], rope_factors(Sections(10, 11, 11), 500000.0))


def test_vision_keys(files) -> None:
    _, vision = files
    found = {key: value(vision, key) for key in vision.fields if key.startswith("clip.")}
    assert found.pop("clip.vision.attention.layer_norm_epsilon") == pytest.approx(1e-6)
    assert found.pop("clip.vision.projector.layer_norm_epsilon") == pytest.approx(1e-5)
    assert found.pop("clip.vision.image_mean") == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert found.pop("clip.vision.image_std") == pytest.approx([0.26862954, 0.26130258, 0.27577711])
    assert found == {
        "clip.has_vision_encoder": True,
        "clip.projector_type": "ernie4_5_vl",
        "clip.vision.image_size": 392,
        "clip.vision.patch_size": 14,
        "clip.vision.embedding_length": 128,
        "clip.vision.feed_forward_length": 512,
        "clip.vision.block_count": 3,
        "clip.vision.attention.head_count": 4,
        "clip.vision.projection_dim": 256,
        "clip.vision.spatial_merge_size": 2,
        "clip.vision.image_min_pixels": 3136,
        "clip.vision.image_max_pixels": 156800,
        "clip.vision.video_min_pixels": 299 * 784,
        "clip.vision.video_max_pixels": 1196 * 784,
    }
    assert value(vision, "general.architecture") == "clip" and value(vision, "general.type") == "mmproj"


def test_vision_tensors_are_stored_untouched(files, weights) -> None:
    found = arrays(files[1])
    expected = {
        "v.patch_embd.weight": weights["vision_model.patch_embed.proj.weight"].reshape(128, 3, 14, 14),
        "v.boi": weights["model.embed_tokens.weight"][token_id("<|IMAGE_START|>")],
        "v.eoi": weights["model.embed_tokens.weight"][token_id("<|IMAGE_END|>")],
        "v.bov": weights["model.embed_tokens.weight"][token_id("<|VIDEO_START|>")],
        "v.eov": weights["model.embed_tokens.weight"][token_id("<|VIDEO_END|>")],
        "mm.post_norm.weight": weights["model.resampler_model.after_norm.weight"],
    }
    names = {"vision_model.ln": "v.post_ln", "model.resampler_model.mlp": "mm.6"}
    for il in range(3):
        for theirs, ours in (
            ("norm1", "ln1"),
            ("norm2", "ln2"),
            ("attn.qkv", "attn_qkv"),
            ("attn.proj", "attn_out"),
            ("mlp.fc1", "ffn_up"),
            ("mlp.fc2", "ffn_down"),
        ):
            names[f"vision_model.blocks.{il}.{theirs}"] = f"v.blk.{il}.{ours}"
    for first, part in ((0, "spatial_linear"), (3, "temporal_linear")):
        names |= {f"model.resampler_model.{part}.{i}": f"mm.{first + j}" for j, i in enumerate((0, 2, 3))}
    for theirs, ours in names.items():
        expected |= {f"{ours}.{tail}": weights[f"{theirs}.{tail}"] for tail in ("weight", "bias")}
    assert found.keys() == expected.keys()
    for name, data in expected.items():
        assert np.array_equal(found[name], data), name


def test_markers_stay_unquantized(tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "vl", "vl")
    result = convert(folder, tmp_path / "x.gguf", type="q8_0", mmproj_type="q8_0")
    row = checkpoints.weights_of("vl")["model.embed_tokens.weight"][token_id("<|IMAGE_END|>")]
    stored = next(t for t in GGUFReader(result.mmproj).tensors if t.name == "v.eoi")
    assert np.array_equal(stored.data, row)


def test_limits_are_the_released_ones_when_the_checkpoint_does_not_say(tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "vl", "vl")
    (folder / "preprocessor_config.json").unlink()
    vision = GGUFReader(convert(folder, tmp_path / "x.gguf").mmproj)
    assert [value(vision, f"clip.vision.image_{x}_pixels") for x in ("min", "max")] == [3136, 4842768]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"freq_allocation": None}, "neither rope_parameters.mrope_section nor freq_allocation"),
        ({"freq_allocation": 11}, "h=10, w=11, t=11; expected h = w"),
        ({"freq_allocation": 32}, "h=0, w=0, t=32"),
        ({"moe_num_experts": [8, 4]}, "8 text experts and 4 vision experts"),
        ({"moe_intermediate_size": 96}, "moe_intermediate_size is 96; expected two numbers"),
        ({"moe_layer_start_index": [1, 2]}, r"text experts in layers 1\.\.3, vision experts in 2\.\.3"),
        ({"moe_layer_end_index": [3, 2]}, r"text experts in layers 1\.\.3, vision experts in 1\.\.2"),
        ({"moe_layer_interval": 2}, "layers dSdS"),
        ({"temporal_conv_size": 1}, "temporal merge 1"),
        ({"temporal_conv_size": 4}, "temporal merge 4"),
        ({"spatial_conv_size": 4}, "spatial merge 4"),
        ({"use_temporal_conv": False}, "without its temporal stage"),
        ({"vision_config": None}, "no vision_config"),
    ],
    ids=str,
)
def test_what_cannot_be_expressed_is_refused(changes: dict, words: str, tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "vl", "vl", flat=True, config_changes=changes)
    with pytest.raises(ConvertError, match=words):
        convert(folder, tmp_path / "x.gguf")
    assert not list(tmp_path.glob("*gguf*"))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ([10, 12, 10], "h=10, w=12"),
        ([11, 11, 9], "half of head_dim 64"),
        ([11, 11, 10, 0], "expected three numbers"),
        (None, "neither"),
    ],
)
def test_odd_sections_of_the_nested_form_are_refused(section: list[int] | None, words: str, tmp_path: Path) -> None:
    text = checkpoint_config.config("vl", SHAPE)["text_config"]
    rope = {**text["rope_parameters"], "mrope_section": section}
    folder = checkpoints.write_checkpoint(
        tmp_path / "vl", "vl", config_changes={"text_config": {**text, "rope_parameters": rope}}
    )
    with pytest.raises(ConvertError, match=words):
        convert(folder, tmp_path / "x.gguf")


def test_a_missing_temporal_stage_is_refused(tmp_path: Path) -> None:
    drop = [name for name in checkpoints.weights_of("vl") if ".temporal_linear." in name]
    folder = checkpoints.write_checkpoint(tmp_path / "vl", "vl", drop=drop)
    with pytest.raises(TensorMappingError, match=r"6 missing: model\.resampler_model\.temporal_linear\.0\.weight"):
        convert(folder, tmp_path / "x.gguf")


def test_a_marker_id_that_contradicts_the_vocabulary_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "vl", "vl", config_changes={"image_end_token_id": 300})
    with pytest.raises(TokenizerError, match=r"image_end_token_id is 300, but <\|IMAGE_END\|> is token \d+"):
        convert(folder, tmp_path / "x.gguf")


def test_a_model_without_shared_experts_says_zero(tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "vl", "vl", shape=replace(SHAPE, n_shared=0))
    text = GGUFReader(convert(folder, tmp_path / "x.gguf").model)
    assert (
        value(text, "ernie4_5-vl-moe.expert_shared_count")
        == value(text, "ernie4_5-vl-moe.expert_shared_feed_forward_length")
        == 0
    )
    assert not [t.name for t in text.tensors if "shexp" in t.name]


def test_the_published_28b_configuration_is_understood(tmp_path: Path) -> None:
    """Sizes of ERNIE-4.5-VL-28B-A3B in Baidu's flat form with few layers and a small vocabulary, shapes only."""
    shape = Shape(
        n_embd=2560,
        n_head=20,
        n_head_kv=4,
        head_dim=128,
        n_layer=2,
        n_ff=128,
        n_expert=4,
        n_expert_used=2,
        n_ff_exp=48,
        n_ff_exp_vl=16,
        section_t=20,
        v_depth=1,
        v_width=80,
        v_head=1,
        v_ff=320,
    )
    folder = checkpoints.write_checkpoint(
        tmp_path / "vl",
        "vl",
        shape=shape,
        flat=True,
        names="baidu",
        dtype="BF16",
        config_changes={"moe_layer_end_index": [29, 28]},
    )
    text = GGUFReader(convert(folder, tmp_path / "x.gguf").model)
    assert value(text, "ernie4_5-vl-moe.rope.dimension_sections") == [20, 22, 22, 0]
    assert math.prod(next(t for t in text.tensors if t.name == "blk.1.attn_q.weight").shape.tolist()) == 2560 * 2560


def test_a_vocabulary_without_video_markers_makes_a_model_for_pictures_only(tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(
        tmp_path / "vl", "vl", config_changes={"video_start_token_id": None, "video_end_token_id": None}
    )
    for name in ("tokenizer.model", "tokenizer_config.json"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data.replace(b"<|VIDEO_START|>", b"<|OTHER_START|>"))
    result = convert(folder, tmp_path / "x.gguf", type="f32")
    vision = GGUFReader(result.mmproj)
    names = {tensor.name for tensor in vision.tensors}
    assert {"v.boi", "v.eoi"} <= names and not {"v.bov", "v.eov"} & names
    assert not [key for key in vision.fields if "video" in key]
    pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
    from pyllamaernie import Llama
    from pyllamaernie.errors import UnsupportedInputError

    video = [{"role": "user", "content": [{"type": "video", "video": np.zeros((2, 56, 56, 3), np.uint8)}]}]
    with Llama(result.model, n_ctx=256) as llm, pytest.raises(UnsupportedInputError, match="takes no videos"):
        llm.create_chat_completion(video)


def test_markers_under_other_names_are_taken_from_the_configuration(tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(
        tmp_path / "vl", "vl", config_changes={"video_start_token_id": token_id("<|VIDEO_START|>")}
    )
    data = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(data.replace(b"<|VIDEO_START|>", b"<|OTHER_START|>"))
    stored = next(t for t in GGUFReader(convert(folder, tmp_path / "x.gguf").mmproj).tensors if t.name == "v.bov")
    row = checkpoints.weights_of("vl")["model.embed_tokens.weight"][token_id("<|VIDEO_START|>")]
    assert np.array_equal(stored.data, row)
