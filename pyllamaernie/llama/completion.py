"""Completion: text or token ids continued, without a chat template."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from pyllamaernie.errors import InputError
from pyllamaernie.llama.answers import completion, completion_chunks
from pyllamaernie.llama.keywords import CompletionOptions, filled, sampling, shows
from pyllamaernie.llama.tokens import Tokens

if TYPE_CHECKING:
    from typing_extensions import Unpack

_shows_keywords = shows(CompletionOptions, temperature=0.8, max_tokens=16)


class Completion(Tokens):
    """The methods that continue a prompt."""

    @overload
    def create_completion(
        self, prompt: str | Sequence[int], *, stream: Literal[False] = False, **options: Unpack[CompletionOptions]
    ) -> dict[str, Any]: ...
    @overload
    def create_completion(
        self, prompt: str | Sequence[int], *, stream: Literal[True], **options: Unpack[CompletionOptions]
    ) -> Iterator[dict[str, Any]]: ...
    @overload
    def create_completion(
        self, prompt: str | Sequence[int], *, stream: bool, **options: Unpack[CompletionOptions]
    ) -> dict[str, Any] | Iterator[dict[str, Any]]: ...
    @_shows_keywords
    def create_completion(
        self, prompt: str | Sequence[int], *, stream: bool = False, **options: Unpack[CompletionOptions]
    ) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """The continuation of a text or of token ids, without a template, as an OpenAI-shaped dict or its chunks.

        `choices[0]["tokens"]` of a whole answer holds the generated ids. Raises: as `create_chat_completion`.
        """
        given = filled(Completion.create_completion, options)
        self._require_open()
        if isinstance(prompt, str):
            ids = self.tokenize(prompt, add_bos=True, special=True) or [
                token for token in (self.token_bos(),) if token >= 0
            ]
            text = prompt
        else:
            ids = [int(token) for token in prompt]
            text = self.detokenize(ids, special=True).decode("utf-8", "replace")
        if not ids:
            raise InputError("the prompt is empty")
        body = sampling(given, stream=stream)
        body.update({"prompt": ids, "return_tokens": True})
        head = {
            "id": f"cmpl-{uuid.uuid4()}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": given["model"] or self.model_path,
        }
        result = self.request("completions", body)
        prefix = text if given["echo"] else ""
        return completion_chunks(result, head, prefix) if stream else completion(result, head, prefix)

    @overload
    def __call__(
        self, prompt: str | Sequence[int], *, stream: Literal[False] = False, **options: Unpack[CompletionOptions]
    ) -> dict[str, Any]: ...
    @overload
    def __call__(
        self, prompt: str | Sequence[int], *, stream: Literal[True], **options: Unpack[CompletionOptions]
    ) -> Iterator[dict[str, Any]]: ...
    @overload
    def __call__(
        self, prompt: str | Sequence[int], *, stream: bool, **options: Unpack[CompletionOptions]
    ) -> dict[str, Any] | Iterator[dict[str, Any]]: ...
    @_shows_keywords
    def __call__(
        self, prompt: str | Sequence[int], *, stream: bool = False, **options: Unpack[CompletionOptions]
    ) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """The same as `create_completion`."""
        return self.create_completion(prompt, stream=stream, **options)
