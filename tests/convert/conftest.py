"""A 2-bit release of Baidu's, its original and what is made of them, for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import two_bit

from pyllamaernie.convert import convert


@pytest.fixture(scope="session")
def experts() -> dict[str, np.ndarray]:
    return two_bit.encoded_experts()


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_bit.write_original(tmp_path_factory.mktemp("original") / "Toy-PT")


@pytest.fixture(scope="session")
def release(experts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_bit.write_release(tmp_path_factory.mktemp("release") / "Toy-2Bits-Paddle", experts)


@pytest.fixture(scope="session")
def imported(release: Path, original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(release, tmp_path_factory.mktemp("gguf") / "toy.gguf", original=original).model
