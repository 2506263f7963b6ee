"""`pyllamaernie convert`: what it prints, its exit codes, and a signal in the middle of the work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
import verb


@pytest.fixture(scope="module")
def vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "vl", "vl", dtype="BF16")


@pytest.mark.parametrize("signal", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_command_with_130_and_no_file(signal: str, vl: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom pyllamaernie import cli\nfrom pyllamaernie.convert.progress import Bar\n"
        f"Bar.advance = lambda self, n: os.kill(os.getpid(), signal.{signal})\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", code, "convert", vl, "-o", tmp_path / "x.gguf"], capture_output=True)
    assert done.returncode == 130, done.stderr
    assert not list(tmp_path.iterdir())


def test_the_command_writes_both_files_and_prints_their_paths(vl: Path, tmp_path: Path) -> None:
    done = verb.run("convert", vl, "-o", tmp_path / "x.gguf", "--type", "q8_0")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith(f"{tmp_path / 'x.gguf'}: ") and first.endswith("q8_0")
    assert second.startswith(f"{tmp_path / 'mmproj-x.gguf'}: ") and second.endswith("f16")


def test_the_command_lists_tensors_in_a_dry_run(vl: Path, tmp_path: Path) -> None:
    done = verb.run("convert", vl, "-o", tmp_path / "x.gguf", "--dry-run")
    assert done.returncode == 0 and not list(tmp_path.iterdir())
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["text", "blk.1.ffn_gate_exps_vl.weight", "256x32x8", "BF16", "131072"] in rows
    assert ["mmproj", "v.patch_embd.weight", "14x14x3x128", "F16", "150528"] in rows


@pytest.mark.parametrize(("source", "code", "words"), [("nowhere", 4, "no such folder"), ("dense", 1, "supported are")])
def test_a_refusal_is_one_line_with_the_documented_exit_code(
    source: str, code: int, words: str, tmp_path: Path
) -> None:
    checkpoints.write_checkpoint(tmp_path / "dense", "dense", config_changes={"model_type": "llama"})
    done = verb.run("convert", tmp_path / source, "-o", tmp_path / "x.gguf")
    assert done.returncode == code
    assert words in done.stderr and len(done.stderr.splitlines()) == 1 and done.stdout == ""
