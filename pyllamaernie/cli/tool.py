"""`pyllamaernie tool`: a bundled llama.cpp program, arguments untouched."""

from __future__ import annotations

from collections.abc import Sequence

from pyllamaernie.programs import execute, names


def run_words(words: Sequence[str]) -> int:
    """`pyllamaernie tool NAME [ARGS...]`; without a name the list of programs."""
    if not words or words[0] in ("-h", "--help"):
        print(
            "usage: pyllamaernie tool NAME [ARGS...]\n\nRun a bundled llama.cpp program, arguments untouched:\n  "
            + "\n  ".join(names())
        )
        return 0
    return execute(words[0], words[1:])
