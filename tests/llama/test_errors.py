"""Llama: every wrong file, option or request is one exception of ours with one clear line; none ends the process."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from gguf_models import gguf, picture, question

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
from pyllamaernie import Llama, errors

OPTIONS = {"n_ctx": 512, "n_threads": 1}


@pytest.fixture(scope="module")
def vl() -> Iterator[Llama]:
    with Llama(gguf("vl"), **OPTIONS) as llm:
        yield llm


def refused(error: type[Exception], match: str, *args: object, **options: object) -> None:
    with pytest.raises(error, match=match) as caught:
        Llama(*args, **{**OPTIONS, **options})
    assert "\n" not in str(caught.value)


def edited(path: Path, target: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert old in data and len(old) == len(new)
    target.write_bytes(data.replace(old, new, 1))
    return target


def test_missing_file_and_folder(tmp_path: Path) -> None:
    refused(errors.ModelNotFoundError, r"no model file at .*nowhere\.gguf", tmp_path / "nowhere.gguf")
    refused(errors.ModelNotFoundError, "is a folder.*pyllamaernie convert", tmp_path)
    refused(
        errors.ModelNotFoundError, r"no model file at .*nowhere\.gguf", gguf("vl"), mmproj=tmp_path / "nowhere.gguf"
    )
    assert issubclass(errors.ModelNotFoundError, (FileNotFoundError, ValueError))


def test_file_that_is_not_gguf(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for data in (b"", b"GG", b"PK\x03\x04 something else entirely"):
        path.write_bytes(data)
        refused(errors.CorruptModelError, f"not a GGUF file.*{len(data)} bytes", path)


def test_truncated_files(tmp_path: Path) -> None:
    data = gguf("dense").read_bytes()
    path = tmp_path / "x.gguf"
    path.write_bytes(data[:-1000])
    refused(errors.CorruptModelError, f"cut short: its tensors end at byte .*, the file has {len(data) - 1000}", path)
    for n in (4, 8, 24, 200, 5000):
        path.write_bytes(data[:n])
        refused(errors.CorruptModelError, "not a sound GGUF file", path)


def test_header_with_absurd_counts(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60) + b"\0" * 64)
    refused(errors.CorruptModelError, "not a sound GGUF file", path)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    path = edited(gguf("dense"), tmp_path / "x.gguf", b"blk.1.attn_q.weight", b"blk.1.attn_x.weight")
    refused(errors.ModelLoadError, "blk.1.attn_q.weight", path)


def test_unknown_architecture_is_named(tmp_path: Path) -> None:
    path = edited(gguf("dense"), tmp_path / "x.gguf", b"ernie4_5", b"ernie9_9")
    refused(errors.UnsupportedArchitectureError, "'ernie9_9' is not known", path)


def test_projector_in_the_wrong_place(tmp_path: Path) -> None:
    mmproj = gguf("vl").parent / "mmproj-vl.gguf"
    refused(errors.UnsupportedArchitectureError, "is a projector", mmproj)
    refused(errors.ProjectorMismatchError, "is not a projector", gguf("vl"), mmproj=gguf("dense"))


def test_projector_of_another_model_names_both_files_and_widths(tmp_path: Path) -> None:
    mmproj = (gguf("vl").parent / "mmproj-vl.gguf").read_bytes()
    key = b"clip.vision.projection_dim"
    at = mmproj.index(key) + len(key) + 4
    wrong = tmp_path / "mmproj-wrong.gguf"
    wrong.write_bytes(mmproj[:at] + struct.pack("<I", 2560) + mmproj[at + 4 :])
    refused(
        errors.ProjectorMismatchError,
        r"mmproj-wrong\.gguf makes rows of width 2560, but .*vl\.gguf takes width 256",
        gguf("vl"),
        mmproj=wrong,
    )


def test_vision_model_without_projector_warns_once_and_refuses_pictures(tmp_path: Path) -> None:
    alone = tmp_path / "vl.gguf"
    alone.symlink_to(gguf("vl"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Llama(alone, **OPTIONS) as llm:
            assert llm.mmproj_path is None
            with pytest.raises(errors.UnsupportedInputError, match="without a projector"):
                llm.create_chat_completion(question(picture(56, 56)))
            llm.create_completion("a", max_tokens=1)
    assert len(caught) == 1 and "text only" in str(caught[0].message)
    with Llama(alone, mmproj=None, **OPTIONS) as llm:  # asked for: no warning
        assert llm.mmproj_path is None


def test_projector_is_found_beside_the_model_or_alone_in_its_folder(tmp_path: Path) -> None:
    mmproj = gguf("vl").parent / "mmproj-vl.gguf"
    model = tmp_path / "renamed.gguf"
    model.symlink_to(gguf("vl"))
    (tmp_path / "some-mmproj-f32.gguf").symlink_to(mmproj)
    with Llama(model, **OPTIONS) as llm:
        assert Path(llm.mmproj_path).name == "some-mmproj-f32.gguf"
    (tmp_path / "mmproj-renamed.gguf").symlink_to(mmproj)
    with Llama(model, **OPTIONS) as llm:
        assert Path(llm.mmproj_path).name == "mmproj-renamed.gguf"


def test_unknown_keyword_names_the_nearest(vl: Llama) -> None:
    with pytest.raises(TypeError, match="unexpected keyword 'n_context'; did you mean 'n_ctx'"):
        Llama(gguf("dense"), n_context=5)
    with pytest.raises(TypeError, match="'max_token'; did you mean 'max_tokens'"):
        vl.create_chat_completion([{"role": "user", "content": "a"}], max_token=3)
    with pytest.raises(TypeError, match="'temprature'; did you mean 'temperature'"):
        vl("a", temprature=3)


@pytest.mark.parametrize(
    "options",
    [{"n_ctx": -1}, {"n_batch": 0}, {"n_threads": "two"}, {"type_k": "f33"}, {"type_v": 99}, {"type_k": "q2_k"}],
)
def test_option_values_are_checked(options: dict) -> None:
    name = next(iter(options))
    refused(errors.InputError, name, gguf("dense"), **options)


@pytest.mark.parametrize("type_", ["f32", 0, "f16", 1, "bf16", "q8_0", 8])
def test_cache_types_by_name_and_number(type_: str | int) -> None:
    with Llama(gguf("dense"), **OPTIONS, type_k=type_, type_v=type_) as llm:
        assert len(llm("Hello", max_tokens=2, temperature=0)["choices"][0]["tokens"]) == 2


def test_broken_chat_template_is_an_error_of_ours() -> None:
    refused(errors.ChatTemplateError, "template", gguf("dense"), chat_template="{% if %}{{ nothing ")
    refused(errors.ChatTemplateError, "template", gguf("dense"), chat_template="{{ raise_exception('always') }}")
    picky = "{% if messages[0].content == 'boom' %}{{ raise_exception('no such luck') }}{% endif %}"
    picky += "{{ messages[0].content }}"
    with Llama(gguf("dense"), **OPTIONS, chat_template=picky) as llm:
        with pytest.raises(errors.InputError, match="no such luck"):
            llm.create_chat_completion([{"role": "user", "content": "boom"}])
        assert llm.apply_template([{"role": "user", "content": "fine"}]) == "fine"


def test_prompt_longer_than_the_context_gives_both_numbers(vl: Llama) -> None:
    n_ctx = vl.n_ctx()
    ids = [5] * (n_ctx + 10)
    for stream in (False, True):
        with pytest.raises(errors.ContextOverflowError, match=f"{n_ctx + 10} tokens, the context holds {n_ctx}"):
            list(vl.create_completion(ids, stream=stream))
    with pytest.raises(errors.ContextOverflowError, match=f"the context holds {n_ctx}"):
        vl.create_chat_completion([{"role": "user", "content": "red circle " * n_ctx}])
    with pytest.raises(errors.ContextOverflowError, match=f"the context holds {n_ctx}"):
        vl.create_chat_completion([{"role": "user", "content": [{"type": "image", "image": picture(112, 112)}] * 30}])
    assert vl.create_completion("still alive", max_tokens=1)["usage"]["completion_tokens"] == 1


def test_an_answer_that_fills_the_context_ends_there(vl: Llama) -> None:
    result = vl.create_completion(
        [5] * (vl.n_ctx() - 5), max_tokens=None, temperature=0, logit_bias={vl.token_eos(): -100}
    )
    assert result["choices"][0]["finish_reason"] == "length"
    assert result["usage"]["total_tokens"] <= vl.n_ctx() + 1


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ("Hello", "list of messages"),
        ([], "empty"),
        ([{"content": "a"}], "role"),
        ([{"role": "wizard", "content": "a"}], "unknown role 'wizard'"),
        ([{"role": "user"}], "no content"),
        ([{"role": "user", "content": 5}], "string or a list"),
        ([{"role": "user", "content": [{"type": "smell"}]}], "unknown part type 'smell'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "names its picture"),
        ([{"role": "user", "content": [{"type": "video", "video": "x.mp4"}]}], "x.mp4: no such video"),
        ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], "audio"),
        ([{"role": "user", "content": "a \ud800 b"}], "(?i)json|utf|surrogate|parse"),
    ],
)
def test_wrong_messages(vl: Llama, messages: object, match: str) -> None:
    with pytest.raises(errors.InputError, match=match):
        vl.create_chat_completion(messages, max_tokens=1)


def test_wrong_pictures(vl: Llama, tmp_path: Path) -> None:
    good = io.BytesIO()
    PIL.Image.fromarray(picture(64, 64)).save(good, "PNG")
    broken = tmp_path / "broken.png"
    broken.write_bytes(good.getvalue()[:200])
    for source, error, match in [
        (broken, errors.MediaError, "broken.png"),
        (tmp_path / "nowhere.png", errors.MediaError, "no such picture"),
        (b"not a picture", errors.MediaError, "not a picture"),
        ("data:image/png;base64,@@@", errors.MediaError, "base64"),
        (np.zeros((4, 4, 7), np.uint8), errors.MediaError, "shape"),
        (np.zeros((0, 4, 3), np.uint8), errors.MediaError, "shape"),
        (np.zeros((2, 500, 3), np.uint8), errors.InputError, "too long"),
        ("https://example.invalid/a.png", errors.UnsupportedInputError, "allow_remote"),
        (17, errors.MediaError, "int"),
    ]:
        with pytest.raises(error, match=match):
            vl.create_chat_completion(question(source), max_tokens=1)


def test_smallest_and_unusual_pictures_are_answered(vl: Llama) -> None:
    for height, width in ((1, 1), (1, 150), (27, 29), (300, 20)):
        result = vl.create_chat_completion(question(picture(height, width)), max_tokens=1, temperature=0)
        assert result["usage"]["completion_tokens"] == 1


def test_wrong_prompts_and_sampling(vl: Llama) -> None:
    for call, match in [
        (lambda: vl.create_completion([]), "empty"),
        (lambda: vl.create_completion([1, 99999]), "99999"),
        (lambda: vl.create_completion([-1]), "-1"),
        (lambda: vl.create_completion("a", temperature=-1), "temperature"),
        (lambda: vl.create_completion("a", grammar="root ::= ("), "grammar"),
    ]:
        with pytest.raises(errors.InputError, match=match):
            call()
    assert vl.create_completion("", max_tokens=1)["usage"]["prompt_tokens"] == 1
