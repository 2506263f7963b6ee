"""The series as a whole: `check`, `status` and `new`."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from patch_checkout import GIT_ENV, call, check_says, edit, git, refused

from pyllamaernie.patching.editing import BASE


def test_check_passes_on_a_good_series(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(root, "check", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] and [row["name"] for row in said["patches"]] == ["fix-tile-barrier.patch", "hook-arch-ours.patch"]


def test_check_against_another_tree_tells_patch_from_patch(
    root: Path, upstream: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = root / "other/thirdparty/llama.cpp"
    shutil.copytree(upstream / "tree", other, ignore=shutil.ignore_patterns(".git"))
    edit(other / "src/arch.h", "enum", "// new here\n// and here\nenum")
    edit(other / "src/tile.cpp", "line 19;", "line nineteen;")
    text = (root / "patches/fix-tile-barrier.patch").read_text()
    first = "@@ -1,6 +1,7 @@\n line 0;\n line 1;\n line two;\n+more;\n line 3;\n line 4;\n line 5;\n"
    (root / "patches/fix-tile-barrier.patch").write_text(text.replace("@@ -", first + "@@ -", 1))
    assert call(root, "check", "--against", root / "other") == 3
    out = capsys.readouterr().out
    assert re.search(r"FAIL   fix-tile-barrier.patch\n.*expected 'line two;' at line 3, found 'line 2;'.*\n", out)
    assert "expected 'line 19;' at line 20, found 'line nineteen;'" in out  # every hunk that fails is named
    assert re.search(r"moved  hook-arch-ours.patch\n.*\+2 lines away", out)
    archive = root / "other.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(other, "x-2/thirdparty/llama.cpp")
    assert call(root, "check", "--against", archive) == 3
    assert "1 apply, 1 fail" in capsys.readouterr().out
    (root / "patches/fix-tile-barrier.patch").write_text(text)
    assert call(root, "check", "--against", upstream / "tree") == 0
    assert call(root, "check", "--against", root / "patches") == 1
    assert "no llama.cpp tree here" in capsys.readouterr().err


def test_new_starts_a_listed_patch_that_the_check_refuses_until_it_has_content(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(root, "new", "fix-llama-header", "--subject", "fix: llama: mend the header") == 0
    assert (root / "patches/series").read_text().splitlines()[:3] == [
        "# fixes",
        "fix-tile-barrier.patch",
        "fix-llama-header.patch",
    ]
    check_says(capsys, root, "it changes nothing")
    refused(capsys, root, "fix-llama-header.patch: changes nothing")
    for field in ("Why", "Upstream-Status", "Drop-when"):
        edit(root / "patches/fix-llama-header.patch", f"{field}:\n", f"{field}: Pending\n")
    tree = root / "tree"
    assert call(root, "apply", "--git", "--into", tree) == 0
    edit(tree / "include/llama.h", "int llama;", "long llama;")
    git(tree, "commit", "-q", "-a", "--fixup", ":/^fix: llama")
    subprocess.run(
        ["git", "rebase", "-q", "-i", "--autosquash", BASE],
        cwd=tree,
        env={**GIT_ENV, "GIT_SEQUENCE_EDITOR": "true"},
        check=True,
    )
    assert call(root, "export", tree) == 0
    assert call(root, "check") == 0
    assert call(root, "new", "fix-llama-header", "--subject", "fix: llama: again") == 1
    assert call(root, "new", "llama-header", "--subject", "fix: llama: again") == 1


def test_status_names_pin_digest_and_patches(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(root, "status", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    pin = json.loads((root / "vendor/llama.cpp.json").read_text())
    assert (said["commit"], said["build_number"], said["source"]) == (pin["commit"], 7, "pkg==1")
    rows = "".join(
        f"{hashlib.sha256((root / 'patches' / n).read_bytes()).hexdigest()} {n}\n"
        for n in ("fix-tile-barrier.patch", "hook-arch-ours.patch")
    )
    assert said["digest"] == hashlib.sha256(rows.encode()).hexdigest()
    assert said["patches"][1]["size_bytes"] == (root / "patches/hook-arch-ours.patch").stat().st_size
    assert said["patches"][1]["upstream_status"] == "Inappropriate [a test]"
    assert call(root, "status") == 0
    assert pin["commit"] in capsys.readouterr().out
