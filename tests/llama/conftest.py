"""The small models, open for the tests of one module, with caches in float32 so that logits compare exactly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from gguf_models import EXACT, gguf

if TYPE_CHECKING:
    from pyllamaernie import Llama


@pytest.fixture(scope="module")
def dense() -> Iterator[Llama]:
    from pyllamaernie import Llama  # the tests say themselves whether they need the native module

    with Llama(gguf("dense"), **EXACT) as llm:
        yield llm


@pytest.fixture(scope="module")
def vl() -> Iterator[Llama]:
    from pyllamaernie import Llama

    with Llama(gguf("vl"), **EXACT) as llm:
        yield llm
