"""What a type checker sees of the installed package."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
from pyllamaernie import ComparisonTable, Image, Llama, Video, errors


def ask(path: str, picture: bytes, **more: str) -> str:
    with Llama("model.gguf", n_ctx=4096, mmproj=None) as llm:
        content = [{"type": "image", "image": Image.of(picture)}, {"type": "text", "text": "What is this?"}]
        try:
            reply = llm.create_chat_completion([{"role": "user", "content": content}], temperature=0.0, max_tokens=8)
        except errors.MediaError as error:
            return str(error)
        ids: list[int] = llm.tokenize("text", special=True)
        return str(reply["choices"][0]["message"]["content"]) + llm.detokenize(ids).decode()


def stream(llm: Llama) -> list[str]:
    return [chunk["choices"][0]["text"] for chunk in llm.create_completion("Once", stream=True)]


def table(found: ComparisonTable, clip: Video) -> tuple[str, int]:
    return found.to_markdown(), clip.n_tokens(1, 2)
"""

WRONG = {
    'from pyllamaernie import Llama\nLlama("m.gguf", n_ctx="many")\n': "arg-type",
    'from pyllamaernie import Llama\nLlama("m.gguf").create_chat_completion([], temperature="hot")\n': "call-overload",
    "from pyllamaernie import Llama\nx: str = Llama().tokenize('a')\n": "assignment",
}


def mypy(path: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--no-incremental",
        "--cache-dir",
        path.parent / "cache",
        path.name,
    ]
    return subprocess.run(command, cwd=path.parent, capture_output=True, text=True, timeout=300, check=False)


def test_a_strict_program_is_clean_and_wrong_ones_are_told(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    found = importlib.util.find_spec("pyllamaernie")
    assert found is not None and found.origin is not None
    assert (Path(found.origin).parent / "py.typed").is_file()
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    done = mypy(path)
    assert done.returncode == 0, done.stdout + done.stderr
    path.write_text("\n".join(WRONG))
    done = mypy(path)
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert [line.rsplit("[", 1)[1].rstrip("]") for line in lines] == list(WRONG.values()), done.stdout
