"""Which chat template a GGUF gets, when a folder has several."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from pyllamaernie.convert.chat_templates import chat_template_keys
from pyllamaernie.convert.checkpoint import Checkpoint
from pyllamaernie.errors import TokenizerError

JINJA, FOLDER = "chat_template.jinja", "additional_chat_templates"
LEGACY, CONFIG = "chat_template.json", "tokenizer_config.json"


def keys(folder: Path, *, vision: bool = False) -> dict[str, object]:
    found = chat_template_keys(Checkpoint(folder, {}, {}), has_processor=vision)
    return {key.name.removeprefix("tokenizer."): key.value for key in found}


def put(folder: Path, *names: str) -> Path:
    """Files whose template is their own name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"chat_template": name}) if name.endswith(".json") else name)
    return folder


@pytest.mark.parametrize(
    ("names", "vision", "taken"),
    [
        ((JINJA, LEGACY, CONFIG), False, JINJA),
        ((JINJA, CONFIG), True, JINJA),
        ((LEGACY, CONFIG), True, LEGACY),
        ((LEGACY, CONFIG), False, CONFIG),
        ((LEGACY,), False, LEGACY),
        ((CONFIG,), True, CONFIG),
    ],
    ids=str,
)
def test_the_first_in_transformers_order_is_taken(
    names: tuple[str, ...], vision: bool, taken: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert keys(put(tmp_path, *names), vision=vision) == {"chat_template": taken}
    differ = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(differ) == len(names) - 1 and all(taken in text for text in differ)


def test_templates_that_agree_need_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, JINJA)
    (tmp_path / CONFIG).write_text(json.dumps({"chat_template": JINJA}))
    assert keys(tmp_path) == {"chat_template": JINJA} and not caplog.records


def test_further_templates_have_their_names(tmp_path: Path) -> None:
    put(tmp_path, JINJA, f"{FOLDER}/tool_use.jinja", f"{FOLDER}/rag-x.jinja")
    assert keys(tmp_path) == {
        "chat_template": JINJA,
        "chat_template.tool_use": f"{FOLDER}/tool_use.jinja",
        "chat_template.rag_x": f"{FOLDER}/rag-x.jinja",
        "chat_templates": ["rag_x", "tool_use"],
    }


def test_a_list_of_names_and_templates_is_the_same(tmp_path: Path) -> None:
    entries = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    (tmp_path / CONFIG).write_text(json.dumps({"chat_template": entries}))
    assert keys(tmp_path) == {"chat_template": "a", "chat_template.tool_use": "b", "chat_templates": ["tool_use"]}


def test_named_files_alone_leave_the_configuration_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, f"{FOLDER}/tool_use.jinja", CONFIG)
    assert "chat_template" not in keys(tmp_path)
    assert "none is the default" in caplog.text


def test_no_template_is_no_key(tmp_path: Path) -> None:
    assert keys(tmp_path) == {}


@pytest.mark.parametrize("value", [7, {"default": "a"}, [{"name": "a"}], ["a"]])
def test_what_is_no_template_is_refused(value: object, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"chat_template": value}))
    with pytest.raises(TokenizerError, match="neither a text nor a list"):
        keys(tmp_path)


def test_a_template_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / JINJA).write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match="cannot be read as text"):
        keys(tmp_path)


@pytest.mark.reference
@pytest.mark.parametrize(
    "names", [(JINJA, CONFIG), (LEGACY, CONFIG), (f"{FOLDER}/tool_use.jinja", JINJA, CONFIG)], ids=str
)
def test_transformers_takes_the_same(names: tuple[str, ...], tmp_path: Path) -> None:
    import layouts

    transformers = pytest.importorskip("transformers")
    folder = layouts.write_layout(tmp_path / "m", "dense", "Baidu's list")
    config = json.loads((folder / CONFIG).read_text())
    put(folder, *names)
    (folder / CONFIG).write_text(json.dumps({**config, "chat_template": CONFIG}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder).chat_template
    ours = keys(folder)
    assert ours["chat_template"] == (theirs if isinstance(theirs, str) else theirs["default"])
    if not isinstance(theirs, str):
        assert ours["chat_template.tool_use"] == theirs["tool_use"]
