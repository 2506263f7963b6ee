"""`pyllamaernie run` as a user meets it: a process with stdin, stdout, signals and exit codes."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import PIL.Image
import pytest
from gguf_models import gguf, picture, question

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
from pyllamaernie import Llama

RUN = [sys.executable, "-m", "pyllamaernie", "run", "--threads", "1", "--ctx", "512"]
GREEDY = ["--temperature", "0", "--max-tokens", "8"]


def run(*words: object, cwd: Path, **options: object) -> subprocess.CompletedProcess:
    options = {"capture_output": True, "timeout": 60, "stdin": subprocess.DEVNULL, **options}
    return subprocess.run([*RUN, *map(str, words)], check=False, cwd=cwd, **options)


@pytest.fixture
def png(tmp_path: Path) -> Path:
    path = tmp_path / "p.png"
    PIL.Image.fromarray(picture(84, 112)).save(path)
    return path


def test_answer_goes_to_stdout_alone_and_equals_llama(tmp_path: Path, png: Path) -> None:
    with Llama(gguf("vl"), n_ctx=512, n_threads=1) as llm:
        result = llm.create_chat_completion(question(png), max_tokens=8, temperature=0)
    expected = result["choices"][0]["message"]["content"]
    done = run("-m", gguf("vl"), "--image", png, *GREEDY, "What is in the picture?", cwd=tmp_path)
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, expected + "\n", b"")
    # the prompt may stand first, options between, and the question may come through a pipe
    done = run("What is in the picture?", "-m", gguf("vl"), *GREEDY, "--image", png, cwd=tmp_path)
    assert done.stdout.decode() == expected + "\n"
    done = run("-m", gguf("vl"), *GREEDY, "--image", png, cwd=tmp_path, stdin=None, input=b"What is in the picture?\n")
    assert done.stdout.decode() == expected + "\n"
    done = run("-m", gguf("vl"), *GREEDY, "--image", png, "--json", "What is in the picture?", cwd=tmp_path)
    printed = json.loads(done.stdout)
    assert (
        printed["choices"] == result["choices"]
        and printed["usage"]["prompt_tokens"] == result["usage"]["prompt_tokens"]
    )


def test_system_message_and_seed_count(tmp_path: Path) -> None:
    base = ["-m", gguf("dense"), *GREEDY, "Hello"]
    assert run(*base, cwd=tmp_path).stdout != run("--system", "Be brief.", *base, cwd=tmp_path).stdout
    warm = ["-m", gguf("dense"), "--temperature", "1.5", "--max-tokens", "12", "Hello"]
    first, again, other = (run("--seed", seed, *warm, cwd=tmp_path).stdout for seed in (1, 1, 2))
    assert first == again != other


def test_errors_are_one_line_with_the_documented_code(tmp_path: Path, png: Path) -> None:
    not_gguf = tmp_path / "x.gguf"
    not_gguf.write_bytes(b"something else")
    broken = tmp_path / "broken.png"
    broken.write_bytes(png.read_bytes()[:100])
    vl = ["-m", gguf("vl")]
    for words, code, match in [
        (["-m", tmp_path / "nowhere.gguf", "Hi"], 4, "nowhere.gguf"),
        (["-m", not_gguf, "Hi"], 4, "not a GGUF"),
        ([*vl, "--mmproj", gguf("dense"), "Hi"], 1, "not a projector"),
        ([*vl, "--image", tmp_path / "nowhere.png", "Hi"], 4, "nowhere.png"),
        ([*vl, "--image", broken, "Hi"], 4, "broken.png"),
        (["-m", gguf("dense"), "--image", png, "Hi"], 1, "projector"),
        ([*vl, "red " * 600], 1, "the context holds 512"),
        ([*vl, "  "], 2, "empty"),
        ([*vl, "--temperature", "-1", "Hi"], 2, "temperature"),
    ]:
        done = run(*words, cwd=tmp_path)
        error = done.stderr.decode()
        assert (done.returncode, done.stdout) == (code, b""), (words, error)
        assert match in error and error.count("\n") == 1 and "Traceback" not in error, error


def test_ctrl_c_ends_a_running_answer_cleanly(tmp_path: Path) -> None:
    words = [*RUN, "--ctx", "4096", "--temperature", "1.5", "-m", str(gguf("dense")), "Hello"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(1)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130 and b"Traceback" not in error and time.monotonic() - start < 5


def test_reader_that_goes_away_ends_it_silently(tmp_path: Path) -> None:
    words = [*RUN, "--ctx", "4096", "--temperature", "1.5", "-m", str(gguf("dense")), "Hello"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.wait(20) == 141 and process.stderr.read() == b""
    process.stderr.close()


def test_chat_on_a_terminal(tmp_path: Path, png: Path) -> None:
    master, slave = pty.openpty()
    words = [*RUN, *GREEDY, "-m", str(gguf("vl"))]
    environment = {**os.environ, "TERM": "dumb"}
    process = subprocess.Popen(
        words, cwd=tmp_path, stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    os.close(slave)
    for line in (f"/image {png}", "/image nowhere.png", "/dance", "What is in the picture?", "And now?", "/quit"):
        os.write(master, line.encode() + b"\n")
    out, error = process.communicate(timeout=60)
    os.close(master)
    with Llama(gguf("vl"), n_ctx=512, n_threads=1) as llm:
        expected = llm.create_chat_completion(question(png), max_tokens=8, temperature=0)["choices"][0]["message"][
            "content"
        ]
    assert process.returncode == 0
    assert expected in out.decode()
    assert b"picture 112x84 goes with the next question" in error and b"nowhere.png: no such picture" in error
    assert b"unknown command /dance" in error and b"Traceback" not in error
