"""The keywords of calls: seen in signatures with their defaults, and an unknown one refused."""

from __future__ import annotations

import inspect
from typing import Any, get_type_hints

import pytest

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
from pyllamaernie import Llama
from pyllamaernie.llama.keywords import ChatOptions, CompletionOptions, filled

SHARED = {
    "temperature": 0.2,
    "top_p": 0.95,
    "top_k": 40,
    "min_p": 0.05,
    "typical_p": 1.0,
    "max_tokens": None,
    "stop": None,
    "seed": None,
    "stream": False,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repeat_penalty": 1.0,
    "logit_bias": None,
    "grammar": None,
    "cache_prompt": True,
    "model": None,
}
CHAT = {
    **SHARED,
    "logprobs": None,
    "top_logprobs": None,
    "response_format": None,
    "tools": None,
    "tool_choice": None,
    "parallel_tool_calls": None,
    "enable_thinking": None,
    "reasoning_max_tokens": None,
    "chat_template_kwargs": None,
    "reasoning_format": None,
    "stream_options": None,
}
COMPLETION = {**SHARED, "temperature": 0.8, "max_tokens": 16, "echo": False}
METHODS = [
    (Llama.create_chat_completion, "messages", CHAT),
    (Llama.create_completion, "prompt", COMPLETION),
    (Llama.__call__, "prompt", COMPLETION),
]


@pytest.mark.parametrize(("method", "first", "expected"), METHODS, ids=lambda value: getattr(value, "__name__", None))
def test_signature_shows_each_keyword_with_its_default(method: Any, first: str, expected: dict[str, Any]) -> None:
    *own, rest = inspect.signature(method).parameters.values()
    assert [one.name for one in own[:2]] == ["self", first]
    assert all(one.kind is one.KEYWORD_ONLY for one in own[2:])
    assert {one.name: one.default for one in own[2:]} == expected
    assert rest.kind is rest.VAR_KEYWORD
    assert get_type_hints(method)["temperature"] is float
    assert get_type_hints(method)["seed"] == int | None


def test_help_shows_the_defaults() -> None:
    for text in ("temperature: float = 0.2", "stream: 'bool' = False", "enable_thinking: bool | None = None"):
        assert text in str(inspect.signature(Llama.create_chat_completion))
    assert "max_tokens: int | None = 16" in str(inspect.signature(Llama.create_completion))


@pytest.mark.parametrize(("table", "expected"), [(ChatOptions, CHAT), (CompletionOptions, COMPLETION)])
def test_type_checkers_see_the_same_keywords(table: type, expected: dict[str, Any]) -> None:
    assert {*get_type_hints(table), "stream"} == {*expected}


def test_keywords_left_out_have_their_defaults() -> None:
    given = {"top_k": 1, "seed": 0}
    assert filled(Llama.create_completion, given) == {**COMPLETION, **given}


@pytest.mark.parametrize(
    ("method", "word", "message"),
    [
        ("create_chat_completion", "temprature", "unexpected keyword 'temprature'; did you mean 'temperature'"),
        ("create_chat_completion", "echo", "create_chat_completion.. got an unexpected keyword 'echo'"),
        ("create_chat_completion", "unknown", "unexpected keyword 'unknown'"),
        ("create_chat_completion", "xyzzy", "unexpected keyword 'xyzzy'; allowed: messages, .*stream_options"),
        ("create_completion", "max_token", "unexpected keyword 'max_token'; did you mean 'max_tokens'"),
        ("create_completion", "tools", "create_completion.. got an unexpected keyword 'tools'"),
        ("__call__", "tok_p", "create_completion.. got an unexpected keyword 'tok_p'; did you mean 'top_p'"),
    ],
)
def test_unknown_keyword_is_refused_with_the_nearest(method: str, word: str, message: str) -> None:
    closed = Llama.__new__(Llama)  # keywords are looked at before the model
    with pytest.raises(TypeError, match=message):
        getattr(closed, method)("a", **{word: 1})
    with pytest.raises(TypeError, match=r"takes 2 positional arguments but 3"):
        getattr(closed, method)("a", 0.5)


def test_unknown_keyword_of_the_constructor_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        TypeError, match=r"^Llama\(\) got an unexpected keyword 'n_thread'; did you mean 'n_threads'\?$"
    ):
        Llama(n_thread=1)
