"""Applying with exact context only; git is the witness."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest
from patch_checkout import FIX, GIT_ENV, call, check_says, diff_of, edit, git, make_patch, refused

from pyllamaernie.errors import PatchError
from pyllamaernie.patching.applying import apply_patch
from pyllamaernie.patching.files import parse_patch


def test_fuzzy_context_is_refused_where_patch_would_take_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(root / "patches/fix-tile-barrier.patch", "\n line 18;\n", "\n line eighteen;\n")
    refused(capsys, root, "fix-tile-barrier.patch:", "src/tile.cpp", "expected 'line eighteen;'", "found 'line 18;'")
    check_says(capsys, root, "expected 'line eighteen;'")


def test_unique_offset_is_applied_and_reported(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(root / "patches/fix-tile-barrier.patch", "@@ -19,6 +19,7 @@", "@@ -9,6 +9,7 @@")
    assert call(root, "apply", "--into", root / "out") == 0
    assert "line 20;\nbarrier;\nline 21;" in (root / "out/src/tile.cpp").read_text()
    capsys.readouterr()
    assert call(root, "check") == 0
    assert "moved  fix-tile-barrier.patch" in (out := capsys.readouterr().out) and "+10 lines" in out


def test_offset_into_one_of_several_equal_places_is_refused(
    root: Path, upstream: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diff = diff_of(upstream, {"src/twins.cpp": ("here\n", "here\nadded\n")})
    make_patch(root, "fix-tile-barrier", diff)
    assert call(root, "apply", "--into", root / "fine") == 0
    edit(root / "patches/fix-tile-barrier.patch", "@@ -2,6 +2,7 @@", "@@ -4,6 +4,7 @@")
    refused(capsys, root, "src/twins.cpp", "fits 3 places", "2, 9, 16")


def test_hunk_with_too_little_context_is_refused(
    root: Path, upstream: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_patch(root, "fix-tile-barrier", diff_of(upstream, FIX, ("-U1",)))
    refused(capsys, root, "src/tile.cpp", "less than 3 lines of context")


@pytest.mark.parametrize(("first", "last"), [(1, 6), (3, 6), (1, 4)])
def test_too_little_context_on_one_side_is_refused(root: Path, first: int, last: int) -> None:
    before = [f"line {k};\n".encode() for k in range(10)]
    body = (
        "".join(f" line {k};\n" for k in range(first, 4))
        + "+new;\n"
        + "".join(f" line {k};\n" for k in range(4, last + 1))
    )
    n = last + 1 - first
    diff = f"diff --git a/f b/f\n--- a/f\n+++ b/f\n@@ -{first + 1},{n} +{first + 1},{n + 1} @@\n{body}"
    patch = parse_patch("x.patch", diff.encode())
    enough = 4 - first >= 3 and last - 3 >= 3
    if enough:
        assert apply_patch({"f": b"".join(before)}.get, patch)[0]["f"].splitlines()[4] == b"new;"
    else:
        with pytest.raises(PatchError, match="less than 3 lines of context"):
            apply_patch({"f": b"".join(before)}.get, patch)


def test_second_hunk_may_not_reach_into_the_first(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "patches/fix-tile-barrier.patch"
    head, mark, hunk = path.read_text().partition("@@ -")
    path.write_text(head + mark + hunk + mark + hunk)
    refused(capsys, root, "does not apply to src/tile.cpp at line 19")


def test_change_that_is_there_already_is_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (root / "patches/hook-arch-ours.patch").read_text().replace("hook: arch: ours", "hook: arch: zweit")
    (root / "patches/hook-arch-zweit.patch").write_text(text)
    edit(root / "patches/series", "hook-arch-ours.patch\n", "hook-arch-ours.patch\nhook-arch-zweit.patch\n")
    refused(capsys, root, "hook-arch-zweit.patch", "already there")


def test_random_edits_apply_as_git_applies_them(tmp_path: Path) -> None:
    rng = random.Random(7)
    git(tmp_path, "init", "-q")
    for trial in range(40):
        lines = [f"{rng.choice('abcde')}{rng.randrange(9)}\n" for _ in range(rng.randrange(1, 120))]
        end = rng.choice(["", "\n"])
        before = "".join(lines).rstrip("\n") + end
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(lines) + 1)
            lines[at : at + rng.randrange(3)] = [f"new {rng.randrange(99)}\r\n" for _ in range(rng.randrange(3))]
        after = "".join(lines).rstrip("\n") + rng.choice(["", "\n"])
        (tmp_path / "f").write_bytes(before.encode())
        git(tmp_path, "add", "f")
        (tmp_path / "f").write_bytes(after.encode())
        diff = subprocess.run(["git", "diff"], cwd=tmp_path, env=GIT_ENV, capture_output=True, check=True).stdout
        if not diff or not after.strip():
            continue
        changed, moved = apply_patch({"f": before.encode()}.get, parse_patch("x.patch", diff))
        assert changed == {"f": after.encode()} and not moved, trial
