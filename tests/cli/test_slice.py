"""`pyllamaernie slice`: what it prints, and one line for wrong words."""

from __future__ import annotations

from pathlib import Path

import pytest
import verb
from gguf_models import gguf

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")


def test_verb_cuts_and_warns(tmp_path: Path) -> None:
    done = verb.run(
        "slice", gguf("moe"), "-o", "a.gguf", "--layers", "0-1,3", "--experts", 4, "--top-k", 2, cwd=tmp_path
    )
    assert done.returncode == 0 and "3 layers, 4 experts, 2 per token" in done.stdout, done.stderr
    assert "its file names none" in done.stderr and "correction bias" in done.stderr
    done = verb.run("slice", gguf("moe"), "-o", "b.gguf", cwd=tmp_path)
    assert done.returncode == 2 and "give --layers, --experts, --expert-ff, --top-k or --preset" in done.stderr
    (tmp_path / "plan.json").write_text('{"format": "other"}')
    for words, code, match in [
        (["--top-k", 9], 1, "take 1 to 8"),
        (["--layers", "0,x"], 1, "'x' is not a layer"),
        (["--experts", "plan.json"], 1, "format is 'other'"),
        (["--experts", "nowhere.json"], 4, "nowhere.json"),
        (["--expert-ff", 97], 1, "have 96, so 1 to that many"),
        (["--expert-ff", 64, "--imatrix", "nowhere.gguf"], 4, "nowhere.gguf"),
        (["--top-k", 1, "--imatrix", "x.gguf"], 2, "--imatrix chooses neurons"),
        (["--preset", "half", "--top-k", 1], 2, "give it alone"),
        (["--preset", "half"], 1, "no key elastic.names"),
    ]:
        done = verb.run("slice", gguf("moe"), "-o", "b.gguf", *words, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (code, "") and match in done.stderr, (words, done.stderr)
        assert done.stderr.count("\n") == 1, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"a.gguf", "plan.json"}
