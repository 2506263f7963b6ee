"""A verb of the command line in a process of its own, as a user runs it."""

from __future__ import annotations

import subprocess
import sys

# the installed package, whatever folder the test runs in; Python 3.10 has no such option
_INSTALLED = ["-P"] if sys.version_info >= (3, 11) else []


def command(name: str, *words: object) -> list[str]:
    """The words that start it."""
    return [sys.executable, *_INSTALLED, "-m", "pyllamaernie", name, *map(str, words)]


def run(name: str, *words: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs it to its end, at most a minute. `options` are those of subprocess.run, such as `cwd`."""
    words_of_run = {"capture_output": True, "text": True, "timeout": 60, "check": False, **options}
    return subprocess.run(command(name, *words), **words_of_run)
