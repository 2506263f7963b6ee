"""The keywords of chat and completion calls, each stated once, and what the engine calls them.

A line `top_p: Annotated[float, 0.95]` is a name, its type and its default. Type checkers read the classes by way of
`**options: Unpack[ChatOptions]`; for `help()` and `inspect.signature` `shows` puts them into the method's signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, TypedDict, TypeVar, get_type_hints

from pyllamaernie.errors import InputError

TEMPERATURE = 0.2  # of calls, of `run` and of `serve`; the embedded model is greedy there

Method = TypeVar("Method", bound=Callable[..., Any])


class Sampling(TypedDict, total=False):
    """What has the same name here and in the engine."""

    temperature: Annotated[float, TEMPERATURE]
    top_p: Annotated[float, 0.95]
    top_k: Annotated[int, 40]
    min_p: Annotated[float, 0.05]
    typical_p: Annotated[float, 1.0]
    presence_penalty: Annotated[float, 0.0]
    frequency_penalty: Annotated[float, 0.0]
    repeat_penalty: Annotated[float, 1.0]
    cache_prompt: Annotated[bool, True]


class CallOptions(Sampling, total=False):
    """What every call takes."""

    max_tokens: Annotated[int | None, None]
    stop: Annotated[str | Sequence[str] | None, None]
    seed: Annotated[int | None, None]
    logit_bias: Annotated[Mapping[int, float] | None, None]
    grammar: Annotated[str | None, None]
    model: Annotated[str | None, None]


class CompletionOptions(CallOptions, total=False):
    """What `create_completion` takes beside its prompt and `stream`."""

    echo: Annotated[bool, False]


class ChatOptions(CallOptions, total=False):
    """What `create_chat_completion` takes beside its messages and `stream`."""

    logprobs: Annotated[bool | None, None]
    top_logprobs: Annotated[int | None, None]
    response_format: Annotated[Mapping[str, Any] | None, None]
    tools: Annotated[Sequence[Mapping[str, Any]] | None, None]
    tool_choice: Annotated[str | Mapping[str, Any] | None, None]
    parallel_tool_calls: Annotated[bool | None, None]
    enable_thinking: Annotated[bool | None, None]
    reasoning_max_tokens: Annotated[int | None, None]
    chat_template_kwargs: Annotated[Mapping[str, Any] | None, None]
    reasoning_format: Annotated[str | None, None]
    stream_options: Annotated[Mapping[str, Any] | None, None]


def shows(options: type, **defaults: Any) -> Callable[[Method], Method]:
    """A decorator that puts the keywords of `options` into the signature of a method with `**options`.

    `defaults` are those of this method that are not the table's.
    """
    keywords = [
        inspect.Parameter(
            word,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(word, *hint.__metadata__),
            annotation=hint.__origin__,
        )
        for word, hint in get_type_hints(options, include_extras=True).items()
    ]

    def decorate(method: Method) -> Method:
        plain = inspect.signature(method)
        *own, rest = plain.parameters.values()
        shown = [*own, *keywords, rest.replace(name="unknown", annotation=Any)]
        vars(method)["__signature__"] = plain.replace(parameters=shown)
        hints = {parameter.name: parameter.annotation for parameter in shown[1:]}
        method.__annotations__ = {**hints, "return": plain.return_annotation}
        return method

    return decorate


def filled(method: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """One call's keywords, and the defaults of those that it leaves out. Raises: TypeError for an unknown keyword."""
    parameters = inspect.signature(method).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}
    refuse_unknown(method.__name__, {word: given[word] for word in given if word not in defaults}, method)
    return {**defaults, **given}


def refuse_unknown(name: str, unknown: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Raise TypeError for a keyword that the function does not name, with the nearest that it does."""
    if not unknown:
        return
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    allowed = [one.name for one in parameters if one.kind in named and one.name != "self"]
    word = sorted(unknown)[0]
    near = get_close_matches(word, allowed, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else f"; allowed: {', '.join(allowed)}"
    raise TypeError(f"{name}() got an unexpected keyword {word!r}{hint}")


def sampling(given: Mapping[str, Any], *, stream: bool) -> dict[str, Any]:
    """The engine's names for a call's options; those that stay open are left out. Raises: InputError."""
    max_tokens, stop = given["max_tokens"], given["stop"]
    if not isinstance(given["temperature"], (int, float)) or given["temperature"] < 0:
        raise InputError(f"temperature is a number from 0 up, got {given['temperature']!r}")
    body = {word: given[word] for word in Sampling.__annotations__}
    body["max_tokens"] = body["n_predict"] = -1 if max_tokens is None or max_tokens <= 0 else int(max_tokens)
    body["stop"] = [stop] if isinstance(stop, str) else list(stop or ())
    body["stream"] = bool(stream)
    if given["seed"] is not None:
        body["seed"] = int(given["seed"]) & 0xFFFFFFFF
    if given["logit_bias"]:
        body["logit_bias"] = {str(token): float(bias) for token, bias in given["logit_bias"].items()}
    if given["grammar"]:
        body["grammar"] = given["grammar"]
    return body
