"""GGUF files by name: no file, or a name that native code cannot open, is told before anything waits for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import verb

from pyllamaernie.errors import CorruptModelError
from pyllamaernie.gguf.header import read_header

VERBS = (
    ["run", "hello", "-m"],
    ["quantize", "--type", "Q8_0", "-o", "out.gguf"],
    ["slice", "--layers", "0", "-o", "out.gguf"],
)


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(CorruptModelError, match=r"model\.gguf is a pipe or device; a regular file is needed"):
        read_header(tmp_path / "model.gguf")


@pytest.mark.parametrize("words", VERBS, ids=lambda words: words[0])
def test_verbs_refuse_a_pipe_and_a_name_that_is_not_utf_8(words: list[str], tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"model\xff.gguf")
    odd.write_bytes(b"GGUF")
    os.mkfifo(tmp_path / "pipe.gguf")
    for path, said in ((odd, "by names in UTF-8; rename it"), (tmp_path / "pipe.gguf", "is a pipe or device")):
        done = verb.run(*words, path, cwd=tmp_path)
        assert done.returncode == 4 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
