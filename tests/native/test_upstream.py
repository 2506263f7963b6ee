"""Upstream's own conformance tests on our build, from a build folder made with PYLLAMAERNIE_UPSTREAM_TESTS=ON."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from pyllamaernie.gguf.types import QUANT_TYPES

pytestmark = pytest.mark.reference


def output(name: str, *args: str) -> str:
    """What one of upstream's test programs prints, without colours, if it succeeds."""
    build_dir = os.environ.get("PYLLAMAERNIE_BUILD_DIR")
    if not build_dir:
        pytest.skip("PYLLAMAERNIE_BUILD_DIR does not name a build folder; .ci/run does")
    run = subprocess.run([Path(build_dir) / "bin" / name, *args], capture_output=True, text=True, timeout=900)
    text = re.sub(r"\x1b\[[0-9;]*m", "", run.stdout)
    assert run.returncode == 0, text[-2000:] + run.stderr[-2000:]
    return text


@pytest.fixture(scope="module")
def rows() -> dict[str, list[list[str]]]:
    """Result rows of test-llama-archs by architecture: [device, config, NMSE, round trip]."""
    text = output("test-llama-archs", "-s", "42")
    table: dict[str, list[list[str]]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 5:
            table.setdefault(cells[0], []).append(cells[1:])
    return table


def test_ernie4_5_vl_moe_passes_upstreams_architecture_test(rows: dict[str, list[list[str]]]) -> None:
    device, config, nmse, roundtrip = rows["ernie4_5-vl-moe"][0]
    assert config == "MoE"
    assert nmse.startswith("OK") and roundtrip == "OK", (device, nmse, roundtrip)


def test_every_other_architecture_still_passes(rows: dict[str, list[list[str]]]) -> None:
    failed = {name: cells for name, cells in rows.items() if any("FAIL" in cell for row in cells for cell in row)}
    passed = [name for name, cells in rows.items() if cells[0][2].startswith("OK")]
    assert not failed
    assert len(passed) > 100


def test_our_types_pass_upstreams_test_of_quantization_functions() -> None:
    text = output("test-quantize-fns", "-v")
    for name in QUANT_TYPES:
        ours = re.findall(rf"^ *{name.lower()} (.*?): +(\w+) ", text, re.MULTILINE)
        expected = ["absolute quantization error", "reference implementation error", "dot product error"]
        assert ours == [(what, "ok") for what in expected]


def test_our_types_pass_upstreams_test_of_operations() -> None:
    text = output("test-backend-ops", "test", "-b", "CPU", "-p", "ccq")
    for name in QUANT_TYPES:
        found = re.findall(rf"^ *(\w+)\(type(?:_a)?={name.lower()},.*\): (\w+)$", text, re.MULTILINE)
        assert {op for op, _ in found} == {"GET_ROWS", "MUL_MAT", "MUL_MAT_ID"}
        assert {result for _, result in found} == {"OK"} and len(found) == 11
