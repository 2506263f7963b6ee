"""`pyllamaernie patch` as the build runs it, before anything is installed, and as an installed wheel runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from patch_checkout import REPO, call

PARTS = ("__init__.py", "__main__.py", "errors.py", "machine.py", "cli/__init__.py", "cli/patch.py", "patching/*.py")


def copy_package(folder: Path) -> Path:
    """The part of the package that the verb needs, in a new folder."""
    sources = REPO / "pyllamaernie"
    for path in (found for part in PARTS for found in sources.glob(part)):
        target = folder / path.relative_to(sources)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return folder


def run_verb(*words: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The verb with the standard library alone: no installed package is found (-S)."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    command = [sys.executable, "-S", "-m", "pyllamaernie", "patch", *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_verb_runs_from_the_sources_beside_modules_named_like_pythons(root: Path) -> None:
    package = copy_package(root / "pyllamaernie")
    for folder in (package, package / "cli", package / "patching"):
        for name in ("inspect", "json", "tarfile", "logging"):
            (folder / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    done = run_verb("apply", "--into", str(root / "out"), cwd=root)
    assert done.returncode == 0, done.stderr
    (root / "patches/hook-arch-ours.patch").unlink()
    done = run_verb("apply", "--into", str(root / "out"), cwd=root)
    assert done.returncode == 1 and "hook-arch-ours.patch" in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: patch apply: ") and done.stdout == ""


def test_installed_wheel_reports_its_record_and_asks_for_a_checkout(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site-packages"
    package = copy_package(site / "pyllamaernie")
    assert call(root, "status", "--json") == 0
    (package / "data").mkdir()
    (package / "data/build.json").write_text(capsys.readouterr().out)
    done = run_verb("status", "--json", cwd=tmp_path, path=site)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["from"] == "wheel" and said["build_number"] == 7
    for verb in (["fetch"], ["check"], ["apply", "--into", "x"], ["export", "x"]):
        done = run_verb(*verb, cwd=tmp_path, path=site)
        assert done.returncode == 1 and "needs a source checkout" in done.stderr
    done = run_verb("check", cwd=root, path=site)  # an installed package, called inside a checkout
    assert done.returncode == 0, done.stderr
