"""What several verbs say on stderr and stdout, in one form."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from pyllamaernie.errors import EXIT_USAGE

if TYPE_CHECKING:
    from pyllamaernie.cut.slice import SliceResult


def say(verb: str, text: str) -> None:
    """One line on stderr."""
    print(f"pyllamaernie {verb}: {text}", file=sys.stderr, flush=True)


def warn(verb: str, text: str) -> None:
    say(verb, f"warning: {text}")


def bad_usage(verb: str, text: str) -> int:
    """One line on stderr; the exit code."""
    say(verb, text)
    return EXIT_USAGE


def show_cut(verb: str, result: SliceResult) -> None:
    """Warnings on stderr, one line about the file on stdout."""
    for line in result.warnings:
        warn(verb, line)
    share = result.n_bytes / result.n_bytes_before
    experts = f", {result.n_expert} experts, {result.n_expert_used} per token" if result.n_expert else ""
    print(f"{result.path}: {result.n_layer} layers{experts}, {result.n_bytes / 1e6:.1f} MB ({share:.1%} of before)")
