"""Patch files and their list: every form that is refused, and every rule that `check` holds a patch to."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from patch_checkout import REPO, call, check_says, diff_of, edit, git, make_patch, refused, without_ids

from pyllamaernie.patching.files import problems, read_series


def test_missing_series_fails_loudly(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "patches/series").unlink()
    refused(capsys, root, "patches/series", "missing")


def test_missing_patches_folder_fails_loudly(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(root / "patches")
    refused(capsys, root, "patches/series", "missing")


def test_deleted_patch_fails_loudly(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "patches/hook-arch-ours.patch").unlink()
    refused(capsys, root, "hook-arch-ours.patch is listed in patches/series but missing")
    check_says(capsys, root, "hook-arch-ours.patch is listed in patches/series but missing")


def test_deleted_name_in_series_fails_loudly(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(root / "patches/series", "fix-tile-barrier.patch\n", "")
    refused(capsys, root, "fix-tile-barrier.patch is not listed in patches/series")
    check_says(capsys, root, "fix-tile-barrier.patch is not listed in patches/series")


def test_name_listed_twice_fails_loudly(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(root / "patches/series", "# hooks\n", "# hooks\nhook-arch-ours.patch\n")
    refused(capsys, root, "names hook-arch-ours.patch 2 times")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("--- a/src/tile.cpp", "--- src/tile.cpp", "lines are not '--- a/src/tile.cpp'"),
        (
            "diff --git a/src/tile.cpp b/src/tile.cpp",
            "diff --git a/src/tile.cpp b/src/tile2.cpp",
            "renames are refused",
        ),
        ("diff --git a/src/tile.cpp b/src/tile.cpp", "diff --git a/../x b/../x", "leaves the tree"),
        ("\n--- a/", "\nold mode 100644\n--- a/", "only text hunks"),
        (" line 22;\n", "", "ends before its count"),
        ("src/tile.cpp", "src/gone.cpp", "which is not in the tree"),
    ],
)
def test_malformed_diff_is_refused_with_its_line(
    root: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, words: str
) -> None:
    path = root / "patches/fix-tile-barrier.patch"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert re.search(r"fix-tile-barrier\.patch:\d+: ", refused(capsys, root, words))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("Why: a test\n", "", "no Why: line"),
        ("Why: a test\n", "Why:\n", "no Why: line"),
        ("Drop-when: never\n", "", "no Drop-when: line"),
        ("Upstream-Status: Inappropriate [a test]", "Upstream-Status: Maybe", "'Maybe' is not one of"),
        ("Upstream-Status: Inappropriate [a test]", "Upstream-Status: Inappropriate", "is not one of"),
        ("Upstream-Status: Inappropriate [a test]", "Upstream-Status: Backport [soon]", "is not one of"),
        ("Upstream-Status: Inappropriate [a test]", "Upstream-Status: Submitted [url]", "Submitted is refused"),
        ("Drop-when: never", "Drop-when: never\nDrop-when: ever", "Drop-when: twice"),
        ("Subject: hook: arch: ours", "Subject: add a thing", "is not 'kind: area: what'"),
        ("Subject: hook: arch: ours", "Subject: fix: arch: ours", "begins with 'fix'"),
        ("Subject: hook: arch: ours", "Subject: hook: model: ours", "names the area 'model'"),
        ("Subject: hook: arch: ours", "Subject: hook: arch: ours" + " and more" * 8, "at most 72"),
        ("From 0000000000", "From 1234567890", "the first line is not"),
        ("Date: Fri", "Day: Fri", "no Date: line"),
        ("Why: a test", "Why: a t\u00e9st", "outside ASCII"),
        ("never\n---\n", "never\n---\n src/arch.h | 1 +\n 1 file changed\n\n", "diffstat"),
    ],
)
def test_bad_header_fails_the_check(
    root: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, words: str
) -> None:
    edit(root / "patches/hook-arch-ours.patch", old, new)
    check_says(capsys, root, words)


def test_signature_fails_the_check(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "patches/hook-arch-ours.patch"
    path.write_text(path.read_text() + "-- \n2.39.5\n\n")
    check_says(capsys, root, "ends with a signature")


def test_bad_name_fails_the_check(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "patches/hook-arch-ours.patch").rename(root / "patches/0001-hook-arch.patch")
    edit(root / "patches/series", "hook-arch-ours.patch", "0001-hook-arch.patch")
    check_says(capsys, root, "the name is not <kind>-<area>-<what>.patch")


@pytest.mark.parametrize(
    ("kind", "old", "new", "words"),
    [
        ("hook", "    LLM_ARCH_12,\n", "", "a hook only adds lines"),
        ("hook", "    LLM_ARCH_12,\n", "    LLM_ARCH_12,\n    // ours\n", "a hook adds no comments"),
        ("fix", "    LLM_ARCH_12,\n", "    LLM_ARCH_12,\n    OURS, \n", "white space at the end"),
        ("fix", "    LLM_ARCH_12,\n", "\tLLM_ARCH_12,\n", "a change of white space only"),
        ("fix", "    LLM_ARCH_12,\n", "    LLM_ARCH_12,\n" + "    OURS_AND_OURS,\n" * 600, "at most 10240 are allowed"),
    ],
)
def test_rule_of_the_hunks_fails_the_check(
    root: Path, upstream: Path, capsys: pytest.CaptureFixture[str], kind: str, old: str, new: str, words: str
) -> None:
    (root / "patches/hook-arch-ours.patch").unlink()
    make_patch(root, f"{kind}-arch-ours", diff_of(upstream, {"src/arch.h": (old, new)}))
    edit(root / "patches/series", "hook-arch-ours.patch", f"{kind}-arch-ours.patch")
    check_says(capsys, root, words)


def test_verbatim_backport_may_be_large_but_stands_first(
    root: Path, upstream: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = "line 20;\nbarrier;\n" + "a long backport;\n" * 700
    make_patch(
        root,
        "fix-tile-barrier",
        diff_of(upstream, {"src/tile.cpp": ("line 20;\n", new)}),
        status="Backport [0123456789ab]",
    )
    assert call(root, "check") == 0
    (root / "patches/series").write_text("hook-arch-ours.patch\nfix-tile-barrier.patch\n")
    check_says(capsys, root, "the order is backports, fixes, hooks, feats")


def test_new_file_belongs_into_the_overlay(root: Path, upstream: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = upstream / "tree"
    (tree / "extra.h").write_text("int extra;\n")
    git(tree, "add", "-N", "extra.h")
    diff = without_ids(git(tree, "diff"))
    git(tree, "rm", "-q", "-f", "extra.h")
    make_patch(root, "fix-tile-barrier", diff)
    check_says(capsys, root, "a new file belongs into native/overlay/")
    make_patch(root, "fix-tile-barrier", diff, status="Backport [0123456]")
    assert call(root, "apply", "--into", root / "out") == 0
    assert (root / "out/extra.h").read_text() == "int extra;\n"


def test_real_series_is_listed_and_every_patch_is_in_order() -> None:
    series, wrong = read_series(REPO)
    assert series and not wrong
    assert {p.name: problems(p) for p in series} == {p.name: [] for p in series}
