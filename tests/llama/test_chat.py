"""Conversations: pictures kept and numbered over the turns, system prompts, schemas, callers at the same time."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from gguf_models import EXACT, folder, gguf, image_ids, picture

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
from pyllamaernie import Llama, errors

FIRST, SECOND = picture(84, 112), picture(56, 140, seed=7)  # multiples of 28 a side: 3 x 4 and 2 x 5 tokens


def user(*parts: Any) -> dict[str, Any]:
    """A user's message of texts and pictures."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return {"role": "user", "content": content}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    user(FIRST, "What is this?"),
    assistant("a star"),
    user("Compare: ", SECOND, " and ", FIRST),
    assistant("the first"),
    user("Which is larger?"),
]
PICTURES = [FIRST, SECOND, FIRST]


def conversation_ids(llm: Llama) -> list[int]:
    """The ids of CONVERSATION by hand: pictures numbered from 1 over all turns, nothing between the parts."""
    ids: list[int] = []
    for part in (
        "<|begin_of_sentence|>Be brief.\nUser: Picture 1:",
        (3, 4),
        "What is this?\nAssistant: a star<|end_of_sentence|>User: Compare: Picture 2:",
        (2, 5),
        " and Picture 3:",
        (3, 4),
        "\nAssistant: the first<|end_of_sentence|>User: Which is larger?\nAssistant: ",
    ):
        ids += llm.tokenize(part, add_bos=False, special=True) if isinstance(part, str) else image_ids(*part)
    return ids


def greedy(llm: Llama, ids: Sequence[int], n: int, images: Sequence[np.ndarray]) -> list[int]:
    ids = list(ids)
    for _ in range(n):
        ids.append(int(llm.logits(ids, images=images)[-1].argmax()))
    return ids[-n:]


def ask(llm: Llama, messages: list[dict], **options: Any) -> dict[str, Any]:
    return llm.create_chat_completion(messages, **{"temperature": 0, "max_tokens": 10, **options})


def text(result: dict[str, Any]) -> str:
    return result["choices"][0]["message"]["content"]


def test_pictures_of_earlier_turns_stay_and_are_numbered_over_the_conversation(vl: Llama) -> None:
    ids = conversation_ids(vl)
    expected = vl.detokenize(greedy(vl, ids, 10, PICTURES)).decode("utf-8", "replace")
    result = ask(vl, CONVERSATION)
    assert text(result) == expected and result["usage"]["prompt_tokens"] == len(ids)


def test_every_picture_of_the_conversation_counts(vl: Llama) -> None:
    answer = text(ask(vl, CONVERSATION))
    other = picture(84, 112, seed=3)
    swapped = [CONVERSATION[0], user(other, "What is this?"), *CONVERSATION[2:]]
    assert text(ask(vl, swapped)) != answer
    assert text(ask(vl, [*CONVERSATION[:3], user("Compare: ", FIRST, " and ", SECOND), *CONVERSATION[4:]])) != answer


def test_turns_grown_one_by_one_reuse_what_was_read_and_answer_as_a_fresh_start(vl: Llama) -> None:
    fresh = [text(ask(vl, CONVERSATION[:n], cache_prompt=False)) for n in (2, 4, 6)]
    vl.create_completion("Something else.", max_tokens=1)
    results = [ask(vl, CONVERSATION[:n]) for n in (2, 4, 6)]
    assert [text(result) for result in results] == fresh
    cached = [result["usage"]["prompt_tokens_details"]["cached_tokens"] for result in results]
    lengths = [result["usage"]["prompt_tokens"] for result in results]
    assert cached[0] < 4 and cached[1] >= lengths[0] - 4 and cached[2] >= lengths[1] - 4, (cached, lengths)


def test_system_prompt_and_developer_prompt_are_the_same_and_count(dense: Llama) -> None:
    question = {"role": "user", "content": "Where is the star?"}
    prompts = [
        dense.apply_template([{"role": role, "content": "Be brief."}, question]) for role in ("system", "developer")
    ]
    assert prompts[0] == prompts[1] == "<|begin_of_sentence|>Be brief.\nUser: Where is the star?\nAssistant: "
    answers = [text(ask(dense, [{"role": "system", "content": word}, question])) for word in ("Be brief.", "Be long.")]
    assert answers[0] != answers[1] != text(ask(dense, [question]))


@pytest.mark.reference
def test_prompt_and_answer_equal_those_of_the_reference(vl: Llama) -> None:
    import reference
    from transformers import AutoTokenizer

    checkpoint = folder() / "vl" / "hf"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    typed = [
        {**message, "content": [{**part, "type": part["type"]} for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in CONVERSATION
    ]
    prompt = tokenizer.apply_chat_template(typed, tokenize=False, add_generation_prompt=True)
    marker = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
    ours = vl.apply_template(CONVERSATION)
    media = vl.media_marker()
    assert ours.count(media) == 3
    for number in range(1, 4):
        ours = ours.replace(media, f"Picture {number}:{marker}", 1)
    assert ours == prompt

    slots = [rows * columns for rows, columns in (reference.merged_grid(checkpoint, image) for image in PICTURES)]
    placeholder = tokenizer.convert_tokens_to_ids("<|IMAGE_PLACEHOLDER|>")
    ids: list[int] = []
    for token in tokenizer(prompt, add_special_tokens=False)["input_ids"]:
        ids += [token] * (slots.pop(0) if token == placeholder else 1)
    assert ids == conversation_ids(vl)
    expected, margin = reference.greedy(
        checkpoint, ids, PICTURES, n=6
    )  # the seventh is a marker, to it a picture's end
    assert margin > 1e-2
    result = ask(vl, CONVERSATION, max_tokens=6)
    assert text(result) == vl.detokenize(expected).decode("utf-8", "replace")


PERSON = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 3, "maximum": 17},
        "colour": {"enum": ["red", "blue"]},
        "code": {"type": "string", "pattern": "^[a-c]{2}$"},
        "parts": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    },
    "required": ["n", "colour", "code", "parts"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}},
        {"type": "json_object", "schema": PERSON},
        {"type": "json_schema", "name": "person", "schema": PERSON},
    ],
)
def test_a_schema_holds_the_answer_whole_and_streamed(dense: Llama, response_format: dict) -> None:
    messages = [{"role": "user", "content": "Who?"}]
    for seed in range(3):
        options = {"response_format": response_format, "max_tokens": 300, "temperature": 1.0, "seed": seed}
        result = ask(dense, messages, **options)
        value = json.loads(text(result))
        assert set(value) == {"n", "colour", "code", "parts"} and 3 <= value["n"] <= 17
        assert value["colour"] in ("red", "blue") and len(value["code"]) == 2 and set(value["code"]) <= set("abc")
        assert len(value["parts"]) in (2, 3) and result["choices"][0]["finish_reason"] == "stop"
        chunks = ask(dense, messages, stream=True, **options)
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text(result)


def test_a_json_object_is_one(dense: Llama) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    result = ask(dense, messages, response_format={"type": "json_object"}, max_tokens=100)
    assert isinstance(json.loads(text(result)), dict)
    assert text(ask(dense, messages, response_format={"type": "text"})) == text(ask(dense, messages))


def schema(**keywords: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": keywords}}


@pytest.mark.parametrize(
    ("response_format", "match"),
    [
        (5, "response_format is .* got 5"),
        ({"type": "yaml"}, "one of text, json_object, json_schema"),
        ({"type": "json_schema"}, 'holds no "json_schema"'),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, 'holds no "schema"'),
        ({"type": "json_schema", "json_schema": {"schema": 5}}, "is not a JSON schema .* got 5"),
        ({"type": "json_object", "schema": []}, r"response_format\.schema is not a JSON schema"),
        (schema(type="animal"), "unknown type 'animal'; allowed: object, array"),
        (schema(type="integer", multipleOf=3), "'multipleOf' cannot be enforced for the type integer"),
        (schema(type="number", minimum=0), "'minimum' cannot be enforced for the type number"),
        (schema(type="object", properties={"a": {"not": {}}}), r"schema\.properties\.a: 'not' cannot be enforced"),
        (schema(type="array", items={"if": {}}), r"schema\.items: 'if'"),
        (schema(anyOf=[{"type": "null"}, {"maxProperties": 1}]), r"schema\.anyOf\[1\]: 'maxProperties'"),
        (schema(**{"$ref": "#/$defs/a", "$defs": {"a": {"contains": 1}}}), r"schema\.\$defs\.a: 'contains'"),
        (schema(**{"$ref": "#/$defs/none", "$defs": {}}), "cannot resolve .ref"),
        (schema(type="object", properties={"a": True}), r"properties\.a is not a JSON schema"),
        (schema(type="object", properties={}, required=["a"]), "'a' is required but is none of the properties"),
        (schema(type="string", pattern="[a-c]{2}"), "begin with .* and end with"),
        (schema(type="string", pattern=r"^(?=a)b$"), "only plain groups"),
        (schema(type="string", pattern=r"^\d+$"), r"\\d is not known; write a class such as \[0-9\]"),
        (schema(type="string", pattern="^a$", maxLength=1), "'maxLength' cannot be enforced beside pattern"),
        (schema(type="string", format="date", minLength=1), "'minLength' cannot be enforced beside format 'date'"),
        (schema(type=["string", "null"], minimum=1), "'minimum' cannot be enforced for the type string or null"),
        (schema(allOf=[], type="object"), "is a list of schemas that is not empty"),
        (schema(minItems="two", type="array"), "minItems must be a non-negative integer"),
    ],
)
def test_a_schema_that_cannot_be_held_to_is_refused_by_name(dense: Llama, response_format: object, match: str) -> None:
    with pytest.raises(errors.InputError, match=match) as caught:
        ask(dense, [{"role": "user", "content": "Who?"}], response_format=response_format)
    assert "\n" not in str(caught.value)
    if isinstance(response_format, dict) and response_format.get("type") == "json_schema":
        assert isinstance(caught.value, errors.SchemaError)


def test_four_threads_on_two_slots_get_the_answers_of_one_after_the_other() -> None:
    jobs: list[list[dict]] = [
        [user(picture(56, 84, seed=1), "How many?")],
        [{"role": "user", "content": "Where is the star? It was here a moment ago."}],
        CONVERSATION,
        [user("Both: ", SECOND, picture(84, 56, seed=2))],
    ]
    with Llama(gguf("vl"), **{**EXACT, "n_ctx": 2048}, n_parallel=2) as llm:
        serial = [text(ask(llm, job, cache_prompt=False)) for job in jobs]
        assert len(set(serial)) == len(jobs)
        results: list[list[str]] = [[] for _ in jobs]

        def work(i: int) -> None:
            for turn in range(4):
                job = (i + turn) % len(jobs)
                if turn % 2:
                    results[job].append(text(ask(llm, jobs[job])))
                else:
                    pieces = [
                        chunk["choices"][0]["delta"].get("content", "") for chunk in ask(llm, jobs[job], stream=True)
                    ]
                    results[job].append("".join(pieces))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert results == [[answer] * 4 for answer in serial]


PAST: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Uno.", "reasoning_content": "Count.\n"},
    {"role": "user", "content": "Two?\n"},
]
CALL = {"type": "function", "function": {"name": "get_time", "arguments": {"city": "Köln 图", "n": 1}}}
CALLED = [*PAST, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "12:00"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "the time <there>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "n": {"enum": [1, 2]}}},
    },
}


@pytest.mark.reference
@pytest.mark.parametrize(
    ("name", "messages", "options", "variables"),
    [
        ("VL", PAST, {}, {}),
        ("VL", PAST, {"enable_thinking": True}, {"enable_thinking": True}),
        ("VL", PAST, {"add_generation_prompt": False}, {"add_generation_prompt": False}),
        ("VL_THINKING", CALLED, {"tools": [TOOL]}, {"tools": [TOOL]}),
        ("VL_THINKING", PAST, {"enable_thinking": False}, {"options": {"thinking_mode": "close"}}),
        ("TEXT_THINKING", CALLED, {"tools": [TOOL]}, {"tools": [TOOL]}),
        ("TEXT_THINKING", PAST[1:], {}, {}),
    ],
)
def test_released_forms_of_template_render_as_in_transformers(
    name: str, messages: list[dict], options: dict, variables: dict
) -> None:
    import chat_templates
    from transformers.utils.chat_template_utils import render_jinja_template

    template = getattr(chat_templates, name)
    variables = {"add_generation_prompt": True, **variables}
    expected = render_jinja_template(conversations=[messages], chat_template=template, **variables)[0][0]
    with Llama(gguf("dense"), **EXACT, chat_template=template) as llm:
        assert llm.apply_template(messages, **options) == expected
