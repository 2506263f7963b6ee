"""The engine in this process: loading it, JSON requests to it, and its errors as our exceptions."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NoReturn

from pyllamaernie import _core, log
from pyllamaernie.errors import (
    ChatTemplateError,
    ClosedError,
    InferenceError,
    InputError,
    ModelLoadError,
    OutOfMemoryError,
    UnsupportedArchitectureError,
)
from pyllamaernie.gguf.header import Header
from pyllamaernie.llama.answers import raise_error


def load(args: Sequence[str], model: Header) -> _core.Engine:
    """An engine started with upstream's server options.

    Raises: ChatTemplateError, InputError, UnsupportedArchitectureError, OutOfMemoryError, ModelLoadError.
    """
    try:
        return _core.Engine(list(args))
    except (RuntimeError, ValueError, MemoryError) as error:
        lines = log.drain()
        text = "\n".join([*lines, str(error)])
        last = lines[-1] if lines else str(error)
        reason = next((line for line in lines if "failed to load" not in line), last).split(": ", 1)[-1]
        if "chat template" in text and isinstance(error, ValueError):
            raise ChatTemplateError(str(error)) from None
        if "unknown model architecture" in text:
            raise UnsupportedArchitectureError(
                f"{model.path}: architecture {model.arch!r} is not known to this build; "
                "`pyllamaernie --version` names its llama.cpp"
            ) from None
        if isinstance(error, MemoryError) or "allocate" in text:
            raise OutOfMemoryError(
                f"{model.path} does not fit into memory: {reason}; a smaller n_ctx or a smaller type helps"
            ) from None
        if isinstance(error, ValueError):
            raise InputError(str(error)) from None
        raise ModelLoadError(f"{model.path} could not be loaded: {reason}") from None
    finally:
        log.drain()


def request(engine: _core.Engine, route: str, body: Mapping[str, Any], is_closed: Callable[[], bool]) -> Any:
    """The engine's answer, or for a streaming request an iterator of its chunks; closing that cancels the request."""
    try:
        text = json.dumps(body)
    except (TypeError, ValueError) as error:
        raise InputError(f"the request cannot be written as JSON: {error}") from error
    try:
        answer = engine.open(route, text)
    except (RuntimeError, ValueError) as error:
        _raise_native(error, is_closed())
    finally:
        log.drain()
    if not answer.data:
        return chunks(answer, is_closed)
    result = json.loads(answer.data)
    if answer.status >= 400:
        raise_error(result.get("error", {}))
    return result


def chunks(answer: _core.Stream, is_closed: Callable[[], bool]) -> Generator[dict[str, Any], None, None]:
    """Server-sent events as dicts."""
    pending = b""
    try:
        while True:
            try:
                piece = answer.next()
            except (RuntimeError, ValueError) as error:
                _raise_native(error, is_closed())
            if piece is None:
                return
            *events, pending = (pending + piece).split(b"\n\n")
            for event in events:
                data = event.removeprefix(b"data: ")
                if data == b"[DONE]" or not event.startswith(b"data: "):
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise_error(chunk["error"])
                yield chunk
    finally:
        answer.close()
        log.drain()


def _raise_native(error: Exception, is_closed: bool) -> NoReturn:
    if is_closed:
        raise ClosedError("this Llama was closed during the call") from None
    if str(error).startswith("the engine "):
        raise InferenceError(str(error)) from None
    raise_error({"message": str(error), "type": "invalid_request_error"})
