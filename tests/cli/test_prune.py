"""`pyllamaernie prune`: what it prints, and one line for wrong words."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import verb
from gguf_models import gguf

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
from cut_cases import imatrix


def test_verb_prunes_and_says_what_it_did(tmp_path: Path) -> None:
    def prune(*words: object) -> subprocess.CompletedProcess[str]:
        return verb.run("prune", gguf("moe"), "--imatrix", imatrix("moe"), "-o", "out.gguf", *words, cwd=tmp_path)

    done = prune("--ratio", 0.75, "--plan", "plan.json")
    assert done.returncode == 0 and "6 experts, 3 per token" in done.stdout and "correction bias" in done.stderr
    assert json.loads((tmp_path / "plan.json").read_text())["format"] == "pyllamaernie-experts"
    for words, code, match in [
        ([], 2, "--keep"),
        (["--keep", 4, "--ratio", 0.5], 2, "not allowed"),
        (["--keep", 4, "--score", "best"], 2, "reap_sum, output, got best"),
        (["--keep", 4, "--score", "reap", "--overwrite"], 1, "--force"),
        (["--keep", 4, "--plan", "none/plan.json"], 1, "is not a folder"),
        (["--keep", 6], 1, "exists"),
        (["--keep", 6, "--threads", 0], 2, "--threads"),
    ]:
        done = prune(*words)
        assert (done.returncode, done.stdout) == (code, "") and match in done.stderr, (words, done.stderr)
    assert {path.name for path in tmp_path.iterdir()} == {"out.gguf", "plan.json"}
