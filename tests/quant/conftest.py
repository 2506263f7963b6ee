"""The quantizer's model and its importance matrix, for all tests of this folder that need the native module."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model() -> Path:
    import quantize_jobs  # the tests say themselves whether they need the native module

    return quantize_jobs.model()


@pytest.fixture(scope="session")
def imatrix() -> Path:
    import quantize_jobs

    return quantize_jobs.imatrix()
