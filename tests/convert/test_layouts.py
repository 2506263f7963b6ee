"""Tokenizer folders in every layout in which they are released or saved: ids, markers and the template in the GGUF."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import checkpoints
import layouts
import pytest
from gguf import GGUFReader, TokenType
from layouts import IDS, LAYOUTS, LISTED, LOST_IN_5, PIECES, write_files, write_layout
from tiny_vocabulary import CHAT_TEMPLATE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, sentencepiece_model

from pyllamaernie import Llama
from pyllamaernie.convert import convert
from pyllamaernie.convert.checkpoint import Checkpoint
from pyllamaernie.convert.tokenizer import read_vocabulary
from pyllamaernie.errors import TokenizerError


def gguf_of(folder: Path) -> Path:
    return convert(folder, folder / "x.gguf", type="f16", overwrite=True, mmproj=False).model


def vocabulary_of(folder: Path, model_type: str = "ernie4_5", n_vocab: int = 512):
    return read_vocabulary(Checkpoint(folder, {"model_type": model_type}, {}), n_vocab)


def value(vocabulary, name: str):
    return next(key.value for key in vocabulary.keys if key.name == f"tokenizer.{name}")


@pytest.mark.parametrize("kind", ["dense", "vl"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_keeps_every_token_its_id_and_its_kind(layout: str, kind: str, tmp_path: Path) -> None:
    file = GGUFReader(gguf_of(write_layout(tmp_path / "m", kind, layout)))
    tokens, types = (file.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    assert tokens[: len(IDS)] == list(IDS)
    assert {types[IDS[text]] for text in LISTED} == {TokenType.CONTROL}
    assert {types[IDS[digit]] for digit in "0123456789"} == {TokenType.USER_DEFINED}
    assert {types[IDS[tag]] for tag in ("<think>", "</think>")} == {TokenType.USER_DEFINED}
    assert {types[IDS[f"<0x{byte:02X}>"]] for byte in range(256)} == {TokenType.BYTE}
    assert set(types[len(IDS) :]) == {TokenType.UNUSED}
    assert file.fields["tokenizer.chat_template"].contents() == CHAT_TEMPLATE[kind == "vl"]


def test_all_layouts_give_the_same_ids(tmp_path: Path) -> None:
    found = {}
    some = layouts.texts(300)
    for layout in LAYOUTS:
        with Llama(gguf_of(write_layout(tmp_path / layout, "dense", layout)), n_ctx=512) as model:
            found[layout] = [model.tokenize(text, add_bos=False, special=True) for text in some]
    assert {layout for layout, ids in found.items() if ids != found["Baidu's list"]} == set()


@pytest.mark.parametrize("layout", ["Baidu's list", "5.24"])
def test_a_picture_is_told_without_a_blank_too_many(layout: str, tmp_path: Path) -> None:
    """As the released 28B's golden ids: begin, `User`, .., `?`, `Picture`, blank, `1`, `:`, START, placeholders."""
    text = "<|begin_of_sentence|>User: What?Picture 1:<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
    with Llama(gguf_of(write_layout(tmp_path / "m", "vl", layout)), mmproj=None, n_ctx=512) as model:
        ids = model.tokenize(text, special=True)
        pieces = [model.detokenize([i], special=True).decode() for i in ids]
    assert pieces[0] == "<|begin_of_sentence|>" and pieces[1].startswith("U") and "".join(pieces) == text
    assert ids[-6:] == [IDS[text] for text in ("\u2581", "1", ":", *LISTED[2:3], *LISTED[:1], *LISTED[3:4])]
    assert "".join(pieces[: pieces.index("?") + 2]).startswith("<|begin_of_sentence|>User: What?P")


def test_invalid_utf8_is_told_in_bytes(tmp_path: Path) -> None:
    broken = b"ab \xff\xe4\xb8x\xf0\x9fyz  c\x80"  # upstream takes a blank behind a cut character into its bytes
    with Llama(gguf_of(write_layout(tmp_path / "m", "dense", "5.24")), n_ctx=512) as model:
        ids = model.tokenize(broken, add_bos=False, special=True)
        assert model.detokenize(ids) == broken
    assert {IDS[f"<0x{byte:02X}>"] for byte in (0xFF, 0xE4, 0xB8, 0xF0, 0x9F, 0x80)} <= set(ids)


def test_the_list_of_the_released_28b_counts_on_from_its_pieces(tmp_path: Path) -> None:
    """100295 pieces, digits from 3 on, and Baidu's list in its order: the ids that transformers' own test expects."""
    rows = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    rows += [(digit, 0.0, USER_DEFINED) for digit in "0123456789"]
    rows += [(f"piece{i}", -float(i), NORMAL) for i in range(len(rows), 100295)]
    names = [f"LOC_{i}" for i in range(1001)] + ["LOC_BEGIN", "LOC_END", "LOC_SEP"]
    names = ["IMAGE_PLACEHOLDER", "AUDIO_PLACEHOLDER", *names, "CROP_COL_SEP", "CROP_ROW_SEP", "IMAGE_SEP"]
    names += ["IMAGE_START", "IMAGE_END", "VIDEO_START", "VIDEO_END"]
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(rows=tuple(rows)))
    listed = {"additional_special_tokens": [f"<|{name}|>" for name in names]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(listed))
    found = vocabulary_of(tmp_path, "ernie4_5_moe_vl", 103424)
    assert found.tokens[4] == "1" and found.tokens[100295] == "<|IMAGE_PLACEHOLDER|>"
    assert [found.find(f"<|{name}|>") for name in names[-4:]] == [101304, 101305, 101306, 101307]
    assert found.types[101304] == TokenType.CONTROL and found.types[101308] == TokenType.UNUSED


def warned(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def change(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_ids_that_leave_a_gap_are_counted_on_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_files(folder, LAYOUTS["added_tokens.json"]("dense"))
    (folder / "added_tokens.json").write_text(json.dumps({text: IDS[text] + 3 for text in LISTED}))
    assert [vocabulary_of(folder).find(text) for text in LISTED] == [IDS[text] for text in LISTED]
    assert f"id {IDS[LISTED[0]] + 3} in added_tokens.json, but transformers gives it {IDS[LISTED[0]]}" in warned(caplog)


@pytest.mark.parametrize("model_type", ["ernie4_5", "ernie4_5_moe_vl"])
def test_another_text_for_a_piece_is_taken(model_type: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As transformers 5.24 does in text models. Its class for VL models gives the text a new, untrained id."""
    write_files(folder, LAYOUTS["4.54, slow"]("dense"))
    entry = {"content": "<new>", "special": True}
    change(folder / "tokenizer_config.json", added_tokens_decoder={**layouts.decoder(), "300": entry})
    found = vocabulary_of(folder, model_type)
    assert found.find("<new>") == 300 and "<new>" in warned(caplog)
    assert [found.find(text) for text in LISTED] == [IDS[text] for text in LISTED]


def test_other_pieces_in_tokenizer_json_are_taken(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_files(folder, LAYOUTS["4.54"]("dense"))
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    assert vocabulary_of(folder).tokens[: len(IDS)] == list(IDS)
    assert "its pieces are not those of tokenizer.model" in warned(caplog)


@pytest.mark.parametrize("said", [True, False, None])
def test_the_dummy_blank_is_the_configurations_or_the_models(said: bool | None, folder: Path) -> None:
    for of_model in (True, False):
        write_files(folder, LAYOUTS["Baidu's list"]("dense"))
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(rows=PIECES, prefix=of_model))
        change(folder / "tokenizer_config.json", add_prefix_space=said)
        expected = of_model if said is None else said
        assert value(vocabulary_of(folder), "ggml.add_space_prefix") == expected


def test_more_added_tokens_than_rows_are_refused(folder: Path) -> None:
    write_files(folder, LAYOUTS["Baidu's list"]("dense"))
    with pytest.raises(TokenizerError, match=r"494 pieces and 7 added tokens.*496 rows.*IMAGE_START"):
        vocabulary_of(folder, n_vocab=496)


def without_merge(content: dict) -> None:
    content["model"]["merges"] = content["model"]["merges"][1:]


def scattered(content: dict) -> None:
    merges = content["model"]["merges"]
    i = next(i for i in range(1, len(merges)) if "".join(merges[i]) == "".join(merges[i - 1]))
    merges.append(merges.pop(i))


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (without_merge, "no merge of"),
        (scattered, "do not stand together"),
        (lambda content: content["model"].update(type="Unigram"), "Unigram with byte fallback"),
        (lambda content: content["model"].update(byte_fallback=False), "BPE without byte fallback"),
        (lambda content: content["model"]["vocab"].update(later=9000), "are not 0"),
        (lambda content: content.update(pre_tokenizer={"type": "ByteLevel"}), "byte-level"),
        (
            lambda content: content.update(
                pre_tokenizer={"type": "Split", "pattern": {"Regex": "[0-9]+"}, "behavior": "Isolated"}
            ),
            "texts are split at",
        ),
        (lambda content: content.pop("model"), "not a tokenizer.json"),
        (lambda content: content["model"].update(merges=[7]), "not a tokenizer.json"),
        (lambda content: content.update(added_tokens=[7]), "not a tokenizer.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "spoiled",
)
def test_a_tokenizer_json_that_llama_cpp_would_read_otherwise_is_refused(spoil, match: str, folder: Path) -> None:
    files = LAYOUTS["5.24"]("dense")
    spoil(files["tokenizer.json"])
    write_files(folder, files)
    with pytest.raises(TokenizerError, match=match):
        vocabulary_of(folder)


@pytest.mark.reference
@pytest.mark.parametrize("kind", ["dense", "vl"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in LOST_IN_5])
def test_ids_markers_and_template_are_transformers(layout: str, kind: str, tmp_path: Path) -> None:
    found = layouts.compare(tmp_path / "m", kind, layout)
    assert found == {"ids equal": "2000/2000", "markers": "7/7", "template": "same"}


@pytest.mark.reference
@pytest.mark.parametrize(("kind", "layout", "form"), [("dense", "Baidu's list", "5 text"), ("vl", "4.54, slow", "5")])
def test_tokenizer_json_is_what_transformers_saves(kind: str, layout: str, form: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.24")
    theirs = transformers.AutoTokenizer.from_pretrained(write_layout(tmp_path / "m", kind, layout))
    theirs.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer.json").read_text(encoding="utf-8"))
    assert {**saved, "post_processor": None} == layouts.tokenizer_json(form)


def test_a_whole_checkpoint_without_a_model_file_converts(tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "m", "dense")
    write_files(folder, LAYOUTS["5.24"]("dense"))
    assert convert(folder, dry_run=True).n_tensors > 0
