"""The small hub, and commands that see it and an empty cache of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import verb
from small_hub import Run, SmallHub


@pytest.fixture
def hub() -> Iterator[SmallHub]:
    pytest.importorskip("huggingface_hub")
    with SmallHub() as served:
        yield served


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def environment(hub: SmallHub, cache: Path) -> dict[str, str]:
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and not k.lower().endswith("proxy")
    }
    return {**kept, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(cache.parent / "home"), "HF_HUB_CACHE": str(cache)}


@pytest.fixture
def run(environment: dict[str, str], tmp_path: Path) -> Run:
    """A verb of ours."""

    def start(name: str, *words: object, **more: str) -> subprocess.CompletedProcess:
        return verb.run(name, *words, env={**environment, **more}, cwd=tmp_path, stdin=subprocess.DEVNULL)

    return start


@pytest.fixture
def python(environment: dict[str, str], tmp_path: Path) -> Run:
    """Lines of Python."""

    def start(code: str) -> subprocess.CompletedProcess:
        words = [sys.executable, "-c", code]
        return subprocess.run(
            words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )

    return start
