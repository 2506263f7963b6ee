"""Mixed requests in one process: memory stays flat, nothing crashes, no request is left behind.

Text, pictures, thinking, tools, schemas, wrong requests, streams cancelled, closed before and after their first chunk.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from typing import Any

import chat_templates
import numpy as np
import pytest
from gguf_models import gguf, picture

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
from pyllamaernie import Llama, errors

OPTIONS = {"type_k": "f32", "type_v": "f32", "n_ctx": 1024, "n_threads": 1, "n_parallel": 2}


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


@pytest.fixture(scope="module")
def llm() -> Iterator[Llama]:
    with Llama(gguf("vl"), **OPTIONS, chat_template=chat_templates.VL) as model:
        yield model


class Caller:
    """Makes one request after the other, each drawn at random, and keeps count of what was asked."""

    def __init__(self, llm: Llama, seed: int) -> None:
        self.llm = llm
        self.rng = random.Random(seed)
        self.kinds: dict[str, Callable[[], None]] = {
            "text": self.text,
            "completion": self.completion,
            "picture": self.picture,
            "pictures": self.pictures,
            "thinking": self.thinking,
            "schema": self.schema,
            "broken picture": self.broken_picture,
            "wrong request": self.wrong_request,
            "too long": self.too_long,
            "closed early": self.closed_early,
            "never read": self.never_read,
            "dropped": self.dropped,
            "two at once": self.two_at_once,
        }
        self.counts = dict.fromkeys(self.kinds, 0)

    def call(self) -> None:
        kind = self.rng.choice(list(self.kinds))
        self.kinds[kind]()
        self.counts[kind] += 1

    def words(self) -> str:
        n = self.rng.randint(1, 30)
        return " ".join(self.rng.choice(("red", "star", "where", "图", "42", "picture")) for _ in range(n))

    def image(self) -> np.ndarray:
        return picture(self.rng.randint(28, 140), self.rng.randint(28, 140), seed=self.rng.randint(0, 9999))

    def chat(self, *parts: Any, **options: Any) -> Any:
        content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
        options = {"max_tokens": self.rng.randint(1, 12), "temperature": 1.5, "seed": 1, **options}
        return self.llm.create_chat_completion([{"role": "user", "content": content}], **options)

    def text(self) -> None:
        assert self.chat(self.words())["usage"]["completion_tokens"] > 0

    def completion(self) -> None:
        assert self.llm.create_completion(self.words(), max_tokens=5)["usage"]["completion_tokens"] > 0

    def picture(self) -> None:
        assert self.chat(self.image(), self.words())["usage"]["completion_tokens"] > 0

    def pictures(self) -> None:
        assert list(self.chat(self.image(), self.words(), self.image(), stream=True))

    def thinking(self) -> None:
        assert self.chat(self.words(), enable_thinking=True, reasoning_max_tokens=4, logprobs=True, top_logprobs=3)
        assert list(self.chat(self.words(), enable_thinking=True, reasoning_max_tokens=4, stream=True))

    def schema(self) -> None:
        schema = {"type": "array", "items": {"enum": [1, self.rng.randint(2, 99)]}, "minItems": 1, "maxItems": 3}
        format_ = {"type": "json_schema", "json_schema": {"schema": schema}}
        assert self.chat(self.words(), response_format=format_, max_tokens=30)

    def broken_picture(self) -> None:
        with pytest.raises(errors.MediaError):
            self.chat(self.rng.randbytes(self.rng.randint(0, 5000)), "What?")

    def wrong_request(self) -> None:
        wrong: list[dict[str, Any]] = [
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "animal"}}}},
            {"grammar": "root ::= ("},
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            {"temperature": -1},
            {"chat_template_kwargs": {"enable_thinking": "yes"}},
        ]
        with pytest.raises(errors.InputError):
            self.chat(self.words(), **self.rng.choice(wrong))

    def too_long(self) -> None:
        with pytest.raises(errors.ContextOverflowError):
            self.chat(self.words() * 100 + " red" * 1000)

    def closed_early(self) -> None:
        stream = self.chat(self.image(), stream=True, max_tokens=400, enable_thinking=True)
        for _ in range(self.rng.randint(1, 4)):
            next(stream)
        stream.close()

    def never_read(self) -> None:
        self.chat(self.words(), stream=True, max_tokens=400).close()

    def dropped(self) -> None:
        next(self.llm.create_completion(self.words(), stream=True, max_tokens=400))

    def two_at_once(self) -> None:
        first = self.chat(self.words(), stream=True, max_tokens=40)
        second = self.chat(self.image(), stream=True, max_tokens=3)
        next(first)
        assert list(second)
        if self.rng.random() < 0.5:
            assert list(first)


def memory_over(llm: Llama, n_requests: int, n_parts: int) -> list[int]:
    """Resident bytes after each part of the requests, every part with the same mix."""
    sizes = []
    for _ in range(n_parts):
        caller = Caller(llm, seed=1)
        for _ in range(n_requests // n_parts):
            caller.call()
        gc.collect()
        sizes.append(resident_bytes())
    return sizes


def test_every_kind_of_request_leaves_the_model_free(llm: Llama) -> None:
    for kind, call in Caller(llm, seed=0).kinds.items():
        call()
        result = llm.create_completion("Hello", max_tokens=1)
        assert result["usage"]["completion_tokens"] == 1, kind


def test_sixty_mixed_requests_leave_memory_flat(llm: Llama) -> None:
    before = memory_over(llm, 30, 1)[0]  # by then the buffers of the engine and of the allocator have their size
    sizes = memory_over(llm, 60, 2)
    assert max(sizes) < 1.05 * before, (before, sizes)


@pytest.mark.slow
def test_five_hundred_mixed_requests_leave_memory_flat(llm: Llama) -> None:
    before = memory_over(llm, 50, 1)[0]
    sizes = memory_over(llm, 500, 10)
    assert max(sizes) < 1.05 * before, (before, sizes)
