"""Find and run the upstream programs that the package carries in `pyllamaernie/bin`. Standard library only."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from pyllamaernie.errors import PyllamaernieError
from pyllamaernie.machine import installed

_SUFFIX = ".exe" if os.name == "nt" else ""


def folder() -> Path:
    """Where the programs of this installation are."""
    return installed("bin")


def names() -> list[str]:
    """The programs that this installation carries, sorted."""
    if not folder().is_dir():
        return []
    return sorted(path.name.removesuffix(_SUFFIX) for path in folder().iterdir() if path.is_file())


def path(name: str) -> Path:
    """The file of one program; `quantize` is understood as `llama-quantize`.

    Raises: PyllamaernieError naming the programs that exist.
    """
    available = names()
    for candidate in (name, f"llama-{name}", f"ggml-{name}"):
        if candidate in available:
            return folder() / (candidate + _SUFFIX)
    if not available:
        raise PyllamaernieError(f"this installation carries no programs ({folder()} is missing or empty)")
    near = get_close_matches(name, available, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise PyllamaernieError(f"no program named {name}{hint} Available: {', '.join(available)}")


def environment() -> dict[str, str]:
    """The environment of a bundled program: this process's, and what ERNIE needs where it says nothing else."""
    return {
        "PYLLAMAERNIE_PYTHON": sys.executable,  # chooses and decodes the frames of videos
        "LLAMA_ARG_JINJA": "1",  # the templates need it, and llama-mtmd-cli is without by default
        **os.environ,
    }


def run(
    name: str,
    arguments: Sequence[object] = (),
    *,
    check: bool = True,
    capture: bool = False,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; with `capture` its output is in `stdout` and `stderr`.

    Raises: ProgramError when `check` is set and the program fails; PyllamaernieError for an unknown name.
    """
    command = [str(path(name)), *map(str, arguments)]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=capture,
        text=True,
        errors="replace",
        timeout=timeout,
        env=environment(),
        check=False,
    )
    if check and done.returncode:
        raise ProgramError(done.returncode, command, done.stdout, done.stderr)
    return done


class ProgramError(PyllamaernieError, subprocess.CalledProcessError):
    """A bundled program ended with an error; the message holds the end of what it printed."""

    def __str__(self) -> str:
        lines = [line.strip() for line in (self.stderr or self.output or "").splitlines() if line.strip()]
        said = f": {' | '.join(lines[-4:])}" if lines else ""
        return f"{Path(self.cmd[0]).name} ended with code {self.returncode}{said}"


def execute(name: str, arguments: Sequence[str]) -> int:
    """Replace this process by the program (on Windows: run it and return its exit code)."""
    command = [str(path(name)), *arguments]
    os.environ.update(environment())
    if os.name == "nt":
        return subprocess.run(command, check=False).returncode
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)
