"""Tool calls in ERNIE's format: read whole and streamed, shown in history, chosen, and refused where they cannot be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import chat_templates
import pytest
import scripted_model
from gguf_models import folder

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
from pyllamaernie import Llama, errors

OPTIONS = {"type_k": "f32", "type_v": "f32", "n_ctx": 2048, "n_threads": 1}
ASK = [{"role": "user", "content": "Is it raining?"}]
TEMPLATES = {"vl": chat_templates.VL_THINKING, "text": chat_templates.TEXT_THINKING}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": "does it", "parameters": parameters}}


WEATHER = tool("get_weather", city={"type": "string"}, unit={"type": "string", "enum": ["c", "f"]})
CLOCK = tool("get_time", city={"type": "string"})
TOOLS = [WEATHER, CLOCK]
WEATHER_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "北京 <3", "unit": "c"}}\n</tool_call>'
CLOCK_CALL = '<tool_call>\n{"name": "get_time", "arguments": {"city": "Köln"}}\n</tool_call>'


@pytest.fixture(scope="module", params=TEMPLATES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def model(kind: str, script: str, template: str | None = None) -> Llama:
    """A model that says `script` behind the newline at which both templates end."""
    path = folder() / f"scripted-tools-{kind}.gguf"
    return Llama(scripted_model.write(path, {"\n": script}, template or TEMPLATES[kind]), **OPTIONS)


def whole(llm: Llama, **options: Any) -> tuple[dict[str, Any], str, dict]:
    """The message without the ids of its calls, why it ended, and its usage."""
    result = llm.create_chat_completion(ASK, temperature=0, **{"max_tokens": 400, "tools": TOOLS, **options})
    choice = result["choices"][0]
    message = {key: value for key, value in choice["message"].items() if value and key != "role"}
    if "tool_calls" in message:
        ids = [call.pop("id") for call in message["tool_calls"]]
        assert len(set(ids)) == len(ids) and all(ids)
    return message, choice["finish_reason"], result["usage"]


def streamed(llm: Llama, **options: Any) -> tuple[dict[str, Any], str, dict]:
    options = {"max_tokens": 400, "tools": TOOLS, "stream_options": {"include_usage": True}, **options}
    *chunks, last = llm.create_chat_completion(ASK, temperature=0, stream=True, **options)
    message: dict[str, Any] = {}
    for chunk in chunks:
        delta = dict(chunk["choices"][0]["delta"])
        delta.pop("role", None)
        for part in delta.pop("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if part["index"] == len(calls):  # the first piece of a call names it
                assert part["id"] and part["function"]["name"]
                calls.append({"type": part["type"], "function": {"name": part["function"]["name"], "arguments": ""}})
            else:
                assert part["index"] == len(calls) - 1 and "name" not in part["function"]
            calls[part["index"]]["function"]["arguments"] += part["function"].get("arguments", "")
        for key, text in delta.items():
            message[key] = message.get(key, "") + text
    return message, chunks[-1]["choices"][0]["finish_reason"], last["usage"]


def calls_of(message: dict[str, Any]) -> list[tuple[str, dict]]:
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]]


WEATHER_READ = ("get_weather", {"city": "北京 <3", "unit": "c"})
CLOCK_READ = ("get_time", {"city": "Köln"})


@pytest.mark.parametrize(
    ("output", "calls", "content"),
    [
        (WEATHER_CALL, [WEATHER_READ], None),
        (WEATHER_CALL + "\n", [WEATHER_READ], None),
        (f"{WEATHER_CALL}\n\n{CLOCK_CALL}", [WEATHER_READ, CLOCK_READ], None),
        (f"{CLOCK_CALL}\n{WEATHER_CALL}\n", [CLOCK_READ, WEATHER_READ], None),
        (f"I look.\n{WEATHER_CALL}", [WEATHER_READ], "I look."),
    ],
)
def test_calls_are_read_whole_and_streamed(kind: str, output: str, calls: list, content: str | None) -> None:
    gap = "\n</think>\n\n" if kind == "vl" else "\n</think>\n\n\n"
    with model(kind, f"I must know.{gap}{output}") as llm:
        message, reason, usage = whole(llm)
        assert (calls_of(message), reason) == (calls, "tool_calls")
        assert message["reasoning_content"] == "I must know." and (message.get("content") or None) == content
        again, reason, usage_again = streamed(llm)
        assert (again, reason) == (message, "tool_calls")
        assert usage_again["completion_tokens"] == usage["completion_tokens"]


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_cut_after_any_byte_streamed_and_whole_agree(kind: str, step: int) -> None:
    script = f"So.\n</think>\n\n{WEATHER_CALL}\n{CLOCK_CALL}"
    with model(kind, script) as llm:
        full = whole(llm)[0]
        n_tokens = whole(llm)[2]["completion_tokens"]
        for n in range(1, n_tokens + 1, step):
            message, reason, usage = whole(llm, max_tokens=n)
            assert reason == ("tool_calls" if n == n_tokens else "length") and usage["completion_tokens"] == n
            again = streamed(llm, max_tokens=n)
            assert (again[0], again[1]) == (message, reason), n
            assert full["reasoning_content"].startswith(message.get("reasoning_content", ""))
            assert not message.get("content")
            for index, call in enumerate(message.get("tool_calls", ())):
                function, complete = call["function"], full["tool_calls"][index]["function"]
                assert function["name"] == complete["name"]
                assert complete["arguments"].startswith(function["arguments"])


def test_an_answer_without_a_call_is_text(kind: str) -> None:
    answer = "No. <b>1</b>" if kind == "vl" else "<response>\nNo. <b>1</b>\n</response>\n"
    with model(kind, f"I know.\n</think>\n\n\n{answer}") as llm:
        expected = {"content": "No. <b>1</b>", "reasoning_content": "I know."}
        assert whole(llm)[0] == streamed(llm)[0] == expected
        assert whole(llm)[1] == "stop"


def test_a_call_without_a_thought_is_read() -> None:
    with model("vl", WEATHER_CALL) as llm:
        message, reason, _ = whole(llm, enable_thinking=False)
        assert (calls_of(message), reason) == ([WEATHER_READ], "tool_calls") and "reasoning_content" not in message
        assert streamed(llm, enable_thinking=False)[0] == message


def test_choices_are_kept(kind: str) -> None:
    with model(kind, f"Hm.\n</think>\n\n{WEATHER_CALL}") as llm:
        assert calls_of(whole(llm, tool_choice="auto")[0]) == [WEATHER_READ]
        assert calls_of(whole(llm, tool_choice="required")[0]) == [WEATHER_READ]
        message, reason, _ = whole(llm, tool_choice="none")
        assert (message["content"], reason) == (WEATHER_CALL, "stop") and "tool_calls" not in message


def test_a_required_call_keeps_the_model_from_ending_without_one(kind: str) -> None:
    with model(kind, "Hm.\n</think>\n\nI will not.") as llm:
        assert whole(llm)[1] == "stop"
        assert whole(llm, tool_choice="required", max_tokens=60)[1] == "length"  # noise, as it knows no more words


def test_a_named_choice_forces_that_function_on_a_model_that_would_call_another(kind: str) -> None:
    named = {"type": "function", "function": {"name": "get_time"}}
    with model(kind, f"Hm.\n</think>\n\n{WEATHER_CALL}") as llm:
        message = whole(llm, tool_choice=named, max_tokens=120)[0]
        assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_time"]


def test_tools_calls_and_results_are_shown_as_the_template_says(kind: str) -> None:
    arguments = {"city": "Köln"}
    past = [
        {"role": "user", "content": "Time?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "Ask.",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "get_time", "arguments": json.dumps(arguments)}}
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "12:00"},
    ]
    with model(kind, "x") as llm:
        prompt = llm.apply_template(past, tools=[CLOCK])
        as_mapping = [past[0], {**past[1]}, past[2]]
        as_mapping[1]["tool_calls"] = [{"type": "function", "function": {"name": "get_time", "arguments": arguments}}]
        assert llm.apply_template(as_mapping, tools=[CLOCK]) == prompt
    listed = prompt.split("<tool_list>\n")[1].split("\n</tool_list>")[0]
    assert json.loads(listed) == [CLOCK]
    call = '<tool_call>\n{"name": "get_time", "arguments": {"city": "Köln"}}\n</tool_call>'
    if kind == "vl":
        assert prompt.endswith(
            "\n</tool_list>\nUser: Time?\nAssistant: \n<think>\nAsk.\n</think>\n\n\n" + call + "<|end_of_sentence|>"
            "User: <tool_output>\n12:00\n</tool_output>\n\nAssistant: \n<think>\n"
        )
    else:
        assert prompt.endswith(
            "<|im_start|>user\nTime?<|im_end|>\n\n<|im_start|>assistant\n<think>\nAsk.\n</think>\n\n\n" + call + "\n"
            "<|im_end|>\n\n<|im_start|>tool\n<tool_output>\n12:00\n</tool_output><|im_end|>\n\n"
            "<|im_start|>assistant\n<think>\n"
        )


def test_a_template_without_tools_refuses_them_by_name() -> None:
    with model("none", "x", chat_templates.VL) as llm:
        with pytest.raises(errors.ChatTemplateError, match=r"template of scripted-tools-none\.gguf takes no tools"):
            llm.create_chat_completion(ASK, tools=TOOLS)
        call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
        for message, word in (
            ({"role": "tool", "content": "12:00", "tool_call_id": "a"}, "a tool's result"),
            ({"role": "assistant", "content": "", "tool_calls": [call]}, "tool calls"),
        ):
            with pytest.raises(errors.ChatTemplateError, match=rf"messages\[1\] holds {word}, which .* cannot show"):
                llm.create_chat_completion([*ASK, message, *ASK])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tools": WEATHER}, "tools is a list"),
        ({"tools": ["get_weather"]}, r"tools\[0\] is not a"),
        ({"tools": [{"type": "function", "function": {}}]}, r"tools\[0\] is not a"),
        ({"tools": [WEATHER, WEATHER]}, "two tools are called 'get_weather'"),
        ({"tools": TOOLS, "tool_choice": "any"}, "auto, none, required or names a function, got 'any'"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "'f'; the tools are get_w"),
        ({"tool_choice": "required"}, "needs tools"),
        ({"tools": TOOLS, "grammar": 'root ::= "a"'}, "exclude each other"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "exclude each other"),
        (
            {"tools": [{"type": "function", "function": {**CLOCK["function"], "parameters": [1]}}]},
            r"tools\[0\]: parameters is a JSON schema",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}]},
            r"tools\[0\]\.function\.parameters: 'not' cannot be enforced",
        ),
    ],
)
def test_wrong_tools_are_refused(asked: Llama, options: dict, match: str) -> None:
    with pytest.raises(errors.InputError, match=match):
        asked.create_chat_completion(ASK, **options)


@pytest.fixture(scope="module")
def asked() -> Iterator[Llama]:
    with model("vl", "x") as llm:
        yield llm
