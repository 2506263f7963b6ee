"""The command line's table, help, version and exit codes; nothing here loads a model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyllamaernie import cli, errors, programs


def command(*words: str, cwd: Path, **options: object) -> subprocess.CompletedProcess:
    options = {"capture_output": True, "text": True, "timeout": 60, **options}
    return subprocess.run([sys.executable, "-m", "pyllamaernie", *words], check=False, cwd=cwd, **options)


def test_no_verb_and_unknown_verb_are_bad_usage(tmp_path: Path) -> None:
    assert command(cwd=tmp_path).returncode == 2
    done = command("quantise", cwd=tmp_path)
    assert done.returncode == 2 and "quantise" in done.stderr and done.stdout == ""
    done = command("run", "--no-such-option", cwd=tmp_path)
    assert done.returncode == 2 and "--no-such-option" in done.stderr


def test_every_verb_has_help_with_its_name(tmp_path: Path) -> None:
    done = command("--help", cwd=tmp_path)
    assert done.returncode == 0
    for verb in cli.VERBS:
        assert verb in done.stdout
        help_ = command(verb, "--help", cwd=tmp_path)
        assert help_.returncode == 0 and f"pyllamaernie {verb}" in help_.stdout


def test_help_imports_no_heavy_package_and_is_quick(tmp_path: Path) -> None:
    code = "import sys; from pyllamaernie.cli import main\ntry: main(['run', '--help'])\nexcept SystemExit: pass\n"
    code += "heavy = {'numpy', 'PIL', 'gguf', 'pyllamaernie._core'} & set(sys.modules); assert not heavy, heavy"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr

    def seconds(*words: str) -> float:
        """Processor time, which a busy machine stretches less."""
        before = os.times()
        subprocess.run([sys.executable, *words], capture_output=True, timeout=60, check=True, cwd=tmp_path)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    bare = min(seconds("-c", "pass") for _ in range(3))
    ours = min(seconds("-m", "pyllamaernie", "--help") for _ in range(5))
    assert ours - bare < 0.1, f"{ours:.3f} s, of which Python itself {bare:.3f} s"


def test_version_names_package_upstream_and_patches(tmp_path: Path) -> None:
    lines = command("--version", cwd=tmp_path).stdout.splitlines()
    assert lines[0].startswith("pyllamaernie ")
    assert len(lines) == 3 and lines[1].split()[0] == "llama.cpp" and lines[2].split()[0] == "patches"
    assert len(lines[1].split()[1]) == 40 and int(lines[2].split()[1], 16) > 0


class Fake:
    """A verb module that fails in a chosen way."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    @staticmethod
    def add_arguments(parser) -> None:
        parser.add_argument("word", nargs="?")

    def run(self, args) -> int:
        if self.error is not None:
            raise self.error
        return 7


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 7),
        (errors.InferenceError("a\nb"), 1),
        (errors.CorruptModelError("a b"), 4),
        (errors.OutOfMemoryError("a b"), 5),
        (errors.PatchConflictError("a b"), 3),
        (FileNotFoundError("a b"), 4),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("a b"), 1),
    ],
)
def test_exit_codes_and_one_line(
    error: BaseException | None, code: int, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setitem(cli.VERBS, "fake", ("fake_verb", "fails"))
    monkeypatch.setitem(sys.modules, "fake_verb", Fake(error))
    assert cli.main(["fake"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    if isinstance(error, Exception):
        assert captured.err.count("\n") == 1 and "a b" in captured.err and "Traceback" not in captured.err
        with pytest.raises(type(error)):
            cli.main(["fake", "--debug"])


def test_reader_of_stdout_may_go_away(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = command("--help", cwd=tmp_path, capture_output=False, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.stderr == ""


def test_tool_lists_runs_and_names_the_nearest(tmp_path: Path) -> None:
    listed = command("tool", cwd=tmp_path)
    assert listed.returncode == 0 and "llama-quantize" in listed.stdout
    done = command("tool", "llama-quantize", "--help", cwd=tmp_path)
    assert "llama-quantize" in done.stdout + done.stderr and "Q4_K_M" in done.stdout + done.stderr
    done = command("tool", "llama-quantise", cwd=tmp_path)
    assert done.returncode == 1 and "did you mean llama-quantize?" in done.stderr


def test_every_bundled_program_starts(tmp_path: Path) -> None:
    assert {"llama-cli", "llama-server", "llama-quantize", "llama-bench"} <= set(programs.names())
    for name in programs.names():
        done = subprocess.run(
            [str(programs.path(name)), "--help"], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
        )
        assert "error while loading shared libraries" not in done.stderr and done.stdout + done.stderr, name
