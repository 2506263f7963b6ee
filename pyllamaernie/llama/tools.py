"""Checks of `tools`, `tool_choice` and of messages with tool calls, before the engine sees them.

The engine derives the format of a call from the chat template and enforces it with a grammar. What it would ignore
without a word (tools of a template that shows none, a named choice, a wrong shape) is refused or mended here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyllamaernie.errors import ChatTemplateError, InputError
from pyllamaernie.llama.schema import check_schema

CHOICES = ("auto", "none", "required")


def tool_fields(tools: Any, choice: Any, parallel: bool | None) -> dict[str, Any]:
    """The engine's `tools`, `tool_choice` and `parallel_tool_calls`. Raises: InputError, SchemaError."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise InputError(f"tool_choice={choice!r} needs tools")
        return {}
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise InputError('tools is a list of {"type": "function", "function": {"name": ..., "parameters": {...}}}')
    names = [_name(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise InputError(f"two tools are called {twice!r}")
    tools = list(tools)
    if isinstance(choice, Mapping):
        wanted = choice.get("function", {}).get("name") if choice.get("type") == "function" else None
        if wanted not in names:
            raise InputError(f"tool_choice names {wanted!r}; the tools are {', '.join(names)}")
        tools, choice = [tools[names.index(wanted)]], "required"  # the engine knows no named choice
    elif choice is not None and choice not in CHOICES:
        raise InputError(f"tool_choice is one of {', '.join(CHOICES)} or names a function, got {choice!r}")
    fields = {"tools": tools, "tool_choice": choice or "auto"}
    if parallel is not None:
        fields["parallel_tool_calls"] = bool(parallel)
    return fields


def _name(tool: Any, where: str) -> str:
    function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise InputError(f'{where} is not a {{"type": "function", "function": {{"name": ...}}}}, got {tool!r}')
    parameters = function.get("parameters", {})
    if not isinstance(parameters, Mapping):
        raise InputError(f"{where}: parameters is a JSON schema, got {parameters!r}")
    if function.get("strict"):
        check_schema(parameters, f"{where}.function.parameters")
    return str(function["name"])


def tidy_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages without the empty fields that clients send back (`"tool_calls": null`), which the engine refuses."""
    return [
        {key: value for key, value in message.items() if key == "content" or value not in (None, [])}
        for message in messages
    ]


def check_template(tools: Any, messages: Sequence[Mapping[str, Any]], caps: Mapping[str, bool], model: str) -> None:
    """Raise ChatTemplateError when the template would leave the tools, or what became of them, out of the prompt."""
    if tools and not caps.get("supports_tools"):
        raise ChatTemplateError(
            f"the chat template of {model} takes no tools; give one that does as chat_template, or leave tools out"
        )
    if caps.get("supports_tool_calls"):
        return
    for index, message in enumerate(messages):
        if message["role"] == "tool" or message.get("tool_calls"):
            what = "a tool's result" if message["role"] == "tool" else "tool calls"
            raise ChatTemplateError(f"messages[{index}] holds {what}, which the chat template of {model} cannot show")
