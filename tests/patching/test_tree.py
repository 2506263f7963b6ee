"""The patched tree: what git makes, nothing written that is right, and an overlay that holds new files only."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from patch_checkout import FILES, age, call, check_says, diff_of, edit, git, make_patch, refused, times

from pyllamaernie.patching import tree


def test_apply_makes_what_git_makes_and_lays_the_overlay(root: Path, upstream: Path) -> None:
    assert call(root, "apply", "--into", root / "out") == 0
    git(upstream / "tree", "clone", "-q", ".", str(root / "by-git"))
    git(
        root / "by-git",
        "am",
        "-q",
        "-k",
        *map(str, (root / "patches/fix-tile-barrier.patch", root / "patches/hook-arch-ours.patch")),
    )
    for name in FILES:
        assert (root / "out" / name).read_bytes() == (root / "by-git" / name).read_bytes(), name
    assert "barrier;" in (root / "out/src/tile.cpp").read_text()
    assert (root / "out/src/models/ours.cpp").read_text() == "int ours;\n"
    assert os.access(root / "out/run.sh", os.X_OK) and not os.access(root / "out/src/tile.cpp", os.X_OK)
    assert (root / "vendor/llama.cpp/src/tile.cpp").read_text() == FILES["src/tile.cpp"]


def test_repeated_apply_keeps_every_time_and_a_changed_series_touches_only_its_files(
    root: Path, upstream: Path
) -> None:
    out = root / "out"
    assert call(root, "apply", "--into", out) == 0
    before = age(out)
    assert call(root, "apply", "--into", out) == 0
    assert times(out) == before

    make_patch(root, "fix-tile-barrier", diff_of(upstream, {"src/tile.cpp": ("line 20;\n", "line 20;\nother;\n")}))
    assert call(root, "apply", "--into", out) == 0
    assert {n for n, t in times(out).items() if t != before.get(n)} == {"src/tile.cpp", tree.STAMP}

    before = age(out)
    (root / "patches/fix-tile-barrier.patch").unlink()
    edit(root / "patches/series", "fix-tile-barrier.patch\n", "")
    (root / "native/overlay/src/models/ours.cpp").rename(root / "native/overlay/src/models/theirs.cpp")
    assert call(root, "apply", "--into", out) == 0
    assert {n for n, t in times(out).items() if t != before.get(n)} == {
        "src/tile.cpp",
        "src/models/theirs.cpp",
        tree.STAMP,
    }
    assert (out / "src/tile.cpp").read_text() == FILES["src/tile.cpp"]
    assert not (out / "src/models/ours.cpp").exists()


def test_apply_repairs_a_tampered_or_interrupted_tree(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = root / "out"
    real, n_calls = tree.write_if_other, []

    def stop_at_fourth(*args) -> bool:
        n_calls.append(1)
        if len(n_calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(tree, "write_if_other", stop_at_fourth)
    assert call(root, "apply", "--into", out) == 130
    monkeypatch.setattr(tree, "write_if_other", real)
    assert json.loads((out / tree.STAMP).read_text())["unfinished"]
    assert call(root, "apply", "--into", out) == 0
    assert {*FILES, "src/models/ours.cpp", tree.STAMP} == set(times(out))
    (out / "src/tile.cpp").write_text("tampered")
    assert call(root, "apply", "--into", out) == 0
    assert "barrier;" in (out / "src/tile.cpp").read_text()


def test_apply_never_writes_into_a_foreign_folder(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "mine").mkdir()
    (root / "mine/letter.txt").write_text("dear")
    assert call(root, "apply", "--into", root / "mine") == 1
    assert "was not made by this tool" in capsys.readouterr().err
    assert [p.name for p in (root / "mine").iterdir()] == ["letter.txt"]


def test_overlay_collision_fails_loudly(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "native/overlay/src/tile.cpp").write_text("int mine;\n")
    refused(capsys, root, "native/overlay", "src/tile.cpp", "exists upstream")
    check_says(capsys, root, "src/tile.cpp exists upstream")


def test_overlay_file_in_place_of_an_upstream_folder_fails_loudly(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "native/overlay/ggml").write_text("a file\n")
    refused(capsys, root, "ggml exists upstream")


def test_missing_overlay_fails_loudly(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(root / "native/overlay")
    refused(capsys, root, "native/overlay", "missing")
