"""What running a model takes, and the file size that this leaves; `bench/fit.py` compares with real loads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gguf_models import gguf

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
from pyllamaernie.errors import BudgetError, CorruptModelError, InputError
from pyllamaernie.plan import fit

GIB = 2**30


def test_a_longer_context_takes_more_and_the_weights_stay() -> None:
    short, long = (fit.needs(gguf("moe"), n_ctx=n) for n in (512, 16384))
    # 4 layers, 2 heads of 64 for keys and as many for values, 2 bytes each: 2 KiB a token; the program cuts to MiB
    assert long.context - short.context == pytest.approx(2048 * (16384 - 512), abs=fit.MIB)
    assert long.weights == short.weights and long.compute >= short.compute > 0


def test_a_smaller_cache_type_takes_less() -> None:
    full, small = (fit.needs(gguf("moe"), n_ctx=16384, kv_type=t).context for t in ("f16", "q8_0"))
    assert small / full == pytest.approx(8.5 / 16, abs=0.05)


def test_the_budget_is_what_is_left_and_the_sentence_adds_up() -> None:
    budget, text = fit.file_budget(gguf("moe"), n_ctx=512, limit=8 * GIB)
    needs = fit.needs(gguf("moe"), n_ctx=512)
    assert budget == 8 * GIB - GIB - (needs.context + needs.compute + needs.process)
    limit, *parts, left = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) MiB", text))
    assert limit == 8192 and abs(limit - sum(parts) - left) <= len(parts)
    assert fit.file_budget(gguf("moe"), n_ctx=512, limit=8 * GIB, reserve=0)[0] == budget + GIB


def test_a_projector_beside_the_model_takes_its_share() -> None:
    budget, text = fit.file_budget(gguf("vl"), n_ctx=512, limit=8 * GIB)
    projector = (gguf("vl").parent / "mmproj-vl.gguf").stat().st_size
    needs = fit.needs(gguf("vl"), n_ctx=512)
    assert budget == 7 * GIB - 2 * projector - (needs.total - needs.weights) and "projector" in text


def test_the_reserve_is_five_percent_and_a_gibibyte_at_least() -> None:
    assert fit.reserve_bytes(4 * GIB) == GIB and fit.reserve_bytes(100 * GIB) == 5 * GIB


def test_no_room_for_weights_says_what_takes_it() -> None:
    with pytest.raises(BudgetError, match=r"memory 1,024 MiB: 1,024 MiB stay free, context of 512 .*: nothing is left"):
        fit.file_budget(gguf("moe"), n_ctx=512, limit=GIB)


def test_wrong_wishes_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 1 token, got 0"):
        fit.needs(gguf("moe"), n_ctx=0)
    with pytest.raises(InputError, match="q3_z"):
        fit.needs(gguf("moe"), n_ctx=512, kv_type="q3_z")
    (tmp_path / "short.gguf").write_bytes(gguf("moe").read_bytes()[:5000])
    with pytest.raises(CorruptModelError):
        fit.needs(tmp_path / "short.gguf", n_ctx=512)


def cgroup(root: Path, name: str, files: dict[str, object]) -> None:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, value in files.items():
        (folder / file).write_text(f"{value}\n")


def test_the_tightest_cgroup_counts(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/user/job\n")
    cgroup(tmp_path, "two/user/job", {"memory.max": "max", "memory.current": 5 * GIB})
    cgroup(
        tmp_path, "two/user", {"memory.max": 8 * GIB, "memory.current": 5 * GIB, "memory.stat": f"inactive_file {GIB}"}
    )
    assert list(fit._cgroup_rooms(tmp_path / "two", own)) == [4 * GIB]

    own.write_text("4:memory:/user\n2:cpu:/user\n")
    cgroup(tmp_path, "one/memory/user", {"memory.limit_in_bytes": 2 * GIB, "memory.usage_in_bytes": GIB})
    cgroup(tmp_path, "one/memory", {"memory.limit_in_bytes": 2**63 - 4096, "memory.usage_in_bytes": GIB})
    assert list(fit._cgroup_rooms(tmp_path / "one", own)) == [GIB]
