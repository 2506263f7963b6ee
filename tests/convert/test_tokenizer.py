"""The vocabulary in the GGUF: texts, types, special ids, the chat template, and broken tokenizer files."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoints
import pytest
from checkpoint_shapes import shape_with
from gguf import GGUFReader, TokenType
from tiny_vocabulary import CHAT_TEMPLATE, N_PIECES, pieces, sentencepiece_model, token_id

from pyllamaernie.convert import convert
from pyllamaernie.errors import TokenizerError


def fields(folder: Path) -> dict[str, object]:
    file = GGUFReader(convert(folder, folder / "x.gguf", type="f16", overwrite=True).model)
    return {
        key.removeprefix("tokenizer."): field.contents()
        for key, field in file.fields.items()
        if key.startswith("tokenizer.")
    }


@pytest.fixture(params=["with added tokens", "sentencepiece alone"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, object]:
    """transformers lists markers and digits as added tokens; a bare model file has them as user-defined pieces."""
    folder = checkpoints.write_checkpoint(tmp_path / "vl", "vl")
    if request.param == "sentencepiece alone":
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text())
        path.write_text(
            json.dumps(
                {
                    k: v
                    for k, v in config.items()
                    if k not in ("added_tokens_decoder", "add_prefix_space", "add_bos_token")
                }
            )
        )
    return fields(folder)


def test_pieces_keep_their_places_and_padding_is_unused(tokenizer) -> None:
    tokens, types = tokenizer["ggml.tokens"], tokenizer["ggml.token_type"]
    assert tokens[:N_PIECES] == [text for text, _, _ in pieces()]
    assert tokens[N_PIECES:] == [f"[PAD{i}]" for i in range(N_PIECES, 512)]
    assert set(types[N_PIECES:]) == {TokenType.UNUSED} and TokenType.UNUSED not in types[:N_PIECES]
    assert len(tokenizer["ggml.scores"]) == 512
    assert tokenizer["ggml.model"] == "llama"


def test_markers_are_control_tokens(tokenizer) -> None:
    names = [
        "<s>",
        "</s>",
        "<|begin_of_sentence|>",
        "<|end_of_sentence|>",
        "<|IMAGE_START|>",
        "<|IMAGE_PLACEHOLDER|>",
        "<|VIDEO_END|>",
    ]
    assert {tokenizer["ggml.token_type"][token_id(name)] for name in names} == {TokenType.CONTROL}


def test_digits_and_think_tags_are_visible(tokenizer) -> None:
    digits = {tokenizer["ggml.token_type"][token_id(digit)] for digit in "0123456789"}
    assert digits <= {TokenType.NORMAL, TokenType.USER_DEFINED}
    assert {tokenizer["ggml.token_type"][token_id(tag)] for tag in ("<think>", "</think>")} == {TokenType.USER_DEFINED}


def test_bytes_stay_bytes(tokenizer) -> None:
    types = tokenizer["ggml.token_type"]
    assert {types[token_id(f"<0x{b:02X}>")] for b in range(256)} == {TokenType.BYTE}


def test_nothing_is_added_on_its_own_and_both_ends_are_known(tokenizer) -> None:
    assert [tokenizer[f"ggml.{x}"] for x in ("add_bos_token", "add_eos_token", "add_space_prefix")] == [
        False,
        False,
        False,
    ]
    assert (tokenizer["ggml.bos_token_id"], tokenizer["ggml.eos_token_id"]) == (1, 2)
    assert tokenizer["ggml.eot_token_id"] == token_id("<|end_of_sentence|>")


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja", "chat_template.json"])
def test_the_chat_template_is_found(where: str, tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "vl", "vl")
    if where != "tokenizer_config.json":
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
        text = CHAT_TEMPLATE[True]
        (folder / where).write_text(text if where.endswith("jinja") else json.dumps({"chat_template": text}))
    assert fields(folder)["chat_template"] == CHAT_TEMPLATE[True]


@pytest.mark.parametrize("name", ["spm.model", "ernie_token_100k.model"])
def test_other_names_of_the_model_file_are_known(name: str, tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "dense", "dense")
    expected = fields(folder)
    (folder / "tokenizer.model").rename(folder / name)
    assert fields(folder) == expected


def refused(folder: Path, match: str) -> None:
    with pytest.raises(TokenizerError, match=match):
        convert(folder, folder / "x.gguf")


def test_a_missing_model_file_is_named(tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "dense", "dense")
    (folder / "tokenizer.model").unlink()
    refused(folder, "expected one of tokenizer.model, spm.model")


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", sentencepiece_model()[:-3]]
)
def test_a_broken_model_file_is_refused(content: bytes, tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "dense", "dense")
    (folder / "tokenizer.model").write_bytes(content)
    refused(folder, "not a sentencepiece model")


def test_a_unigram_model_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.write_checkpoint(tmp_path / "dense", "dense")
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(model_type=1))
    refused(folder, "model type unigram")


def test_more_pieces_than_embedding_rows_are_refused(tmp_path: Path) -> None:
    refused(
        checkpoints.write_checkpoint(tmp_path / "dense", "dense", shape=shape_with("dense", n_vocab=480)),
        "500 pieces.*480 rows",
    )


@pytest.mark.reference
def test_our_reader_agrees_with_sentencepiece(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    found = fields(checkpoints.write_checkpoint(tmp_path / "vl", "vl"))
    assert [processor.id_to_piece(i) for i in range(processor.vocab_size())] == found["ggml.tokens"][:N_PIECES]
    for i in range(processor.vocab_size()):
        if found["ggml.token_type"][i] == TokenType.NORMAL:
            assert processor.get_score(i) == pytest.approx(found["ggml.scores"][i])
        assert processor.is_byte(i) == (found["ggml.token_type"][i] == TokenType.BYTE)
