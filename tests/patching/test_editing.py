"""A git tree with one commit per patch, and the way back. The last test runs on the real series."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from patch_checkout import GIT_ENV, REPO, call, edit, git

from pyllamaernie.patching.editing import BASE, export
from pyllamaernie.patching.source import cache_path, load_pin


def test_export_round_trip_is_byte_stable(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p.name: p.read_bytes() for p in (root / "patches").iterdir()}
    assert call(root, "apply", "--git", "--into", root / "tree") == 0
    assert git(root / "tree", "status", "--porcelain") == ""
    assert (root / "tree/src/models/ours.cpp").is_file()
    capsys.readouterr()
    assert call(root, "export", root / "tree") == 0
    assert capsys.readouterr().out == "nothing changed\n"
    assert {p.name: p.read_bytes() for p in (root / "patches").iterdir()} == before


def test_edited_commit_exports_to_its_file_and_only_there(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = root / "tree"
    assert call(root, "apply", "--git", "--into", tree) == 0
    edit(tree / "src/tile.cpp", "barrier;", "better barrier;")
    assert call(root, "export", tree) == 1
    assert "not committed, the first is src/tile.cpp" in capsys.readouterr().err
    git(tree, "commit", "-q", "-a", "--fixup", ":/^fix: tile")
    assert call(root, "export", tree) == 1
    assert "is not folded in yet" in capsys.readouterr().err
    subprocess.run(
        ["git", "rebase", "-q", "-i", "--autosquash", BASE],
        cwd=tree,
        env={**GIT_ENV, "GIT_SEQUENCE_EDITOR": "true"},
        check=True,
    )
    assert call(root, "export", tree) == 0
    assert capsys.readouterr().out == "rewrote patches/fix-tile-barrier.patch\n"
    assert "+better barrier;" in (root / "patches/fix-tile-barrier.patch").read_text()
    assert call(root, "check") == 0


def test_new_commit_and_dropped_commit_reach_the_series(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = root / "tree"
    assert call(root, "apply", "--git", "--into", tree) == 0
    edit(tree / "include/llama.h", "int llama;", "int llama;\nint more;")
    git(
        tree,
        "commit",
        "-q",
        "-a",
        "-m",
        "feat: llama: say more\n\nWhy: a test\nUpstream-Status: Pending\nDrop-when: never",
    )
    git(tree, "rebase", "-q", "--onto", BASE, f"{BASE}~0", "HEAD")
    assert call(root, "export", tree) == 0
    assert (
        (root / "patches/series").read_text()
        == "# fixes\nfix-tile-barrier.patch\n# hooks\nhook-arch-ours.patch\n# feats\nfeat-llama-say-more.patch\n"
    )
    first = git(tree, "rev-list", "--reverse", f"{BASE}..HEAD").split()[0]
    git(tree, "rebase", "-q", "--onto", BASE, first, "HEAD")
    capsys.readouterr()
    assert call(root, "export", tree) == 0
    assert "removed patches/fix-tile-barrier.patch" in capsys.readouterr().out
    assert call(root, "check") == 0


def test_export_refuses_what_check_would_refuse_and_writes_nothing(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = root / "tree"
    assert call(root, "apply", "--git", "--into", tree) == 0
    before = {p.name: p.read_bytes() for p in (root / "patches").iterdir()}
    edit(tree / "include/llama.h", "int llama;", "int lama;")
    git(
        tree,
        "commit",
        "-q",
        "-a",
        "-m",
        "hook: llama: change a line\n\nWhy: a test\nUpstream-Status: Pending\nDrop-when: never",
    )
    assert call(root, "export", tree) == 1
    assert "a hook only adds lines" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (root / "patches").iterdir()} == before


def real_source_is_here() -> bool:
    pin = load_pin(REPO)
    return (
        bool(os.environ.get("LLAMA_CPP_DIR"))
        or (REPO / "vendor/llama.cpp").is_dir()
        or cache_path(REPO, pin, os.environ).is_file()
    )


def test_real_series_applies_exactly_and_round_trips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not real_source_is_here():
        pytest.skip("the pinned llama.cpp is not on this machine: run `pyllamaernie patch fetch`")
    assert call(REPO, "check") == 0, capsys.readouterr().out
    shutil.copytree(REPO / "patches", tmp_path / "patches")
    before = {p.name: p.read_bytes() for p in (tmp_path / "patches").glob("*.patch")}
    assert call(REPO, "apply", "--git", "--into", tmp_path / "tree") == 0
    export(tmp_path, tmp_path / "tree")
    assert {p.name: p.read_bytes() for p in (tmp_path / "patches").glob("*.patch")} == before
