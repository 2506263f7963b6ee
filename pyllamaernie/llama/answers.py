"""The engine's JSON into the dicts that callers get, or into our exceptions."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from typing import Any, NoReturn

from pyllamaernie.errors import (
    ChatTemplateError,
    ContextOverflowError,
    InferenceError,
    InputError,
    SchemaError,
    UnsupportedInputError,
)
from pyllamaernie.llama.reasoning import ANSWER_END, ANSWER_START


def raise_error(error: Mapping[str, Any]) -> NoReturn:
    """Raise what an error object of the engine means."""
    kind, message = error.get("type"), str(error.get("message", "the engine gave no reason"))
    if kind == "exceed_context_size_error":
        n_prompt, n_ctx = error.get("n_prompt_tokens"), error.get("n_ctx")
        raise ContextOverflowError(
            f"the prompt has {n_prompt} tokens, the context holds {n_ctx}; raise n_ctx or shorten the prompt"
        )
    if kind == "not_supported_error":
        raise UnsupportedInputError(message)
    if "does not match the expected" in message:
        raise InferenceError(message)
    if kind == "invalid_request_error":
        if "JSON schema" in message:
            raise SchemaError(" ".join(message[message.index("JSON schema") :].split()))
        if any(word in message for word in ("template", "jinja", "Jinja", "While executing")):
            raise ChatTemplateError(message)
        raise InputError(message)
    raise InferenceError(message)


def completion(result: Mapping[str, Any], head: dict[str, Any], prefix: str) -> dict[str, Any]:
    """An OpenAI-shaped completion; `head` holds id, model and time, `prefix` is echoed text."""
    n_prompt, n_generated = result["tokens_evaluated"], result["tokens_predicted"]
    choice = {
        "text": prefix + result["content"],
        "index": 0,
        "logprobs": None,
        "tokens": result["tokens"],
        "finish_reason": "length" if result["stop_type"] == "limit" else "stop",
    }
    usage = {"prompt_tokens": n_prompt, "completion_tokens": n_generated, "total_tokens": n_prompt + n_generated}
    return {**head, "choices": [choice], "usage": usage, "timings": result.get("timings")}


def completion_chunks(chunks: Iterator[dict[str, Any]], head: dict[str, Any], prefix: str) -> Iterator[dict[str, Any]]:
    """The same in pieces."""
    for chunk in chunks:
        last = chunk.get("stop", False)
        reason = ("length" if chunk["stop_type"] == "limit" else "stop") if last else None
        # no "tokens" here: the engine holds back the ids of a character that is not whole yet, and drops them
        choice = {"text": prefix + chunk["content"], "index": 0, "logprobs": None, "finish_reason": reason}
        prefix = ""
        yield {**head, "choices": [choice]}


class Tidy:
    """Chat answers without what lies at the seams between thoughts, answer and calls.

    `thoughts`: no newlines around thoughts nor before the answer. `calls`: none behind the answer. `marks`: nor
    <response> around it. Whole answers go through the same path as streams, so both come out equal.
    """

    def __init__(self, *, thoughts: bool, calls: bool, marks: bool) -> None:
        answer_marks = (ANSWER_START, ANSWER_END) if marks else ("", "")
        self._seams = {
            "reasoning_content": _Seam(before=thoughts, behind=thoughts),
            "content": _Seam(thoughts or marks, calls or marks, *answer_marks),
        }

    def answer(self, result: dict[str, Any]) -> dict[str, Any]:
        """A whole answer, tidied."""
        for choice in result["choices"]:
            message = choice["message"]
            for key, seam in self._seams.items():
                if message.get(key):
                    message[key] = seam.take(message[key]) + seam.rest(choice["finish_reason"])
            if message.get("tool_calls") and not message.get("content"):
                message["content"] = None
        return result

    def chunks(self, chunks: Generator[dict[str, Any], None, None]) -> Iterator[dict[str, Any]]:
        """The chunks, tidied, with the role in the first one: the engine may leave it out. Closing ends the request."""
        first = True
        with closing(chunks):
            for chunk in chunks:
                for choice in chunk["choices"]:
                    delta = choice["delta"]
                    was_empty = not delta
                    for key, seam in self._seams.items():
                        text = seam.take(delta.pop(key, None) or "")
                        if choice["finish_reason"]:
                            text += seam.rest(choice["finish_reason"])
                        if text:
                            delta[key] = text
                    if first:
                        delta.setdefault("role", "assistant")
                        first = False
                    elif not delta and not was_empty:
                        break  # all of it is held back
                else:
                    yield chunk


class _Seam:
    """A text that arrives in pieces, without newlines before and behind it, without a mark at its start and end."""

    def __init__(self, before: bool, behind: bool, start: str = "", end: str = "") -> None:
        self._before, self._behind, self._start, self._end = before, behind, start, end
        self._held = ""
        self._ended = False

    def take(self, piece: str) -> str:
        """What can be passed on now."""
        if self._ended:
            return ""
        text, self._held = self._held + piece, ""
        if self._before:  # nothing was passed on yet
            text = text.lstrip("\n")
            if self._start and text.startswith(self._start):
                text, self._start = text[len(self._start) :].lstrip("\n"), ""
            elif self._start.startswith(text):
                self._held = text
                return ""
            self._before = not text
        kept = text
        if self._end:
            kept, mark, _ = text.partition(self._end)
            self._ended = bool(mark)
            if not mark:
                n_held = next(n for n in range(len(self._end) - 1, -1, -1) if text.endswith(self._end[:n]))
                kept = text[: len(text) - n_held]
        kept = kept.rstrip("\n") if self._behind else kept
        self._held = "" if self._ended else text[len(kept) :]
        return kept

    def rest(self, reason: str) -> str:
        """What was held back for a mark that did not come; in an answer that was cut off it may have been one."""
        held, self._held = self._held.rstrip("\n"), ""
        return "" if reason == "length" else held
