"""Every bundled program on a random ERNIE 4.5 VL model: its output is compared, not only the exit code."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import gguf as gguf_py
import numpy as np
import PIL.Image
import pytest
from gguf_models import gguf, picture, question

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
from pyllamaernie import Llama, programs
from pyllamaernie.errors import PyllamaernieError
from pyllamaernie.llama import rpc

NAMES = """ggml-rpc-server llama-bench llama-cli llama-gguf-split llama-imatrix llama-mtmd-cli llama-perplexity
llama-quantize llama-server llama-tokenize""".split()
SMALL = ["-t", 1, "-c", 512]
TEXT = "What is in the picture? A large red circle and 42 green stars. Hello! "


def run(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    return programs.run(name, words, capture=True, timeout=60)


def tensors(path: Path) -> dict[str, gguf_py.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf_py.GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def model() -> Path:
    return gguf("vl")


@pytest.fixture(scope="module")
def llama(model: Path) -> Iterator[Llama]:
    with Llama(model, n_ctx=512, n_threads=1) as llm:
        yield llm


def greedy(llm: Llama, messages: list[dict], n: int) -> str:
    message = llm.create_chat_completion(messages, max_tokens=n, temperature=0)["choices"][0]["message"]
    return message["content"]


def whole_characters(text: str) -> str:
    """A text without the halves of characters at which two programs print different things."""
    return text.split("\ufffd")[0]


def test_the_programs_of_the_family_are_there() -> None:
    assert set(NAMES) <= set(programs.names())


def test_failing_program_is_an_exception_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(programs.ProgramError, match=r"llama-quantize ended with code 1: .*nowhere\.gguf"):
        run("llama-quantize", tmp_path / "nowhere.gguf", tmp_path / "out.gguf", "q8_0")
    done = programs.run("llama-quantize", [tmp_path / "nowhere.gguf", "q8_0"], check=False, capture=True)
    assert done.returncode == 1 and "nowhere.gguf" in done.stdout + done.stderr
    with pytest.raises(PyllamaernieError, match="did you mean llama-quantize"):
        programs.run("llama-quantise")


def test_llama_cli_gives_the_answer_of_llama(model: Path, llama: Llama) -> None:
    words = ["-m", model, *SMALL, "-p", "Hello", "-n", 12, "--temp", 0, "--single-turn", "--simple-io", "--no-warmup"]
    done = run("llama-cli", *words)
    expected = whole_characters(greedy(llama, [{"role": "user", "content": "Hello"}], 12))
    assert expected and expected in done.stdout.split("> Hello")[1]


def test_llama_mtmd_cli_sees_the_picture(model: Path, tmp_path: Path) -> None:
    answers = []
    for name, pixels in (("a", picture(84, 112)), ("b", 255 - picture(84, 112)), ("a2", picture(84, 112))):
        PIL.Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        words = ["-m", model, "--mmproj", model.parent / "mmproj-vl.gguf", *SMALL, "--jinja", "--no-warmup"]
        words += ["--image", tmp_path / f"{name}.png", "-p", "What is it?", "-n", 16, "--temp", 0]
        answers.append(run("llama-mtmd-cli", *words).stdout)
    assert answers[0] == answers[2] != answers[1]


def test_llama_tokenize_gives_the_ids_of_llama(model: Path, llama: Llama) -> None:
    done = run("llama-tokenize", "-m", model, "-p", TEXT, "--ids", "--log-disable")
    assert json.loads(done.stdout) == llama.tokenize(TEXT, special=True)


def test_llama_bench_measures_this_model(model: Path) -> None:
    done = run("llama-bench", "-m", model, "-p", 16, "-n", 4, "-r", 1, "-t", 1, "-o", "json")
    prompt, generation = json.loads(done.stdout)
    assert (prompt["n_prompt"], generation["n_gen"]) == (16, 4)
    assert min(prompt["avg_ts"], generation["avg_ts"]) > 0 and prompt["model_type"].startswith("ernie4_5-vl-moe")
    assert prompt["model_n_params"] == sum(int(tensor.n_elements) for tensor in tensors(model).values())


def test_llama_perplexity_is_that_of_the_logits(model: Path, llama: Llama, tmp_path: Path) -> None:
    """The second half of each chunk is predicted, as upstream does; computed here from `logits()`."""
    n_ctx, n_chunks = 64, 4
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 30)
    words = ["-m", model, "-f", text, "-c", n_ctx, "-b", n_ctx, "-t", 1, "--chunks", n_chunks]
    done = run("llama-perplexity", *words)
    said = float(re.search(rf"\[{n_chunks}\]([0-9.]+)", done.stdout + done.stderr)[1])
    ids = llama.tokenize(TEXT * 30)
    losses = []
    for i in range(n_chunks):
        chunk = ids[i * n_ctx : (i + 1) * n_ctx]
        logits = llama.logits(chunk).astype(np.float64)[n_ctx // 2 : -1]
        log_sum = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
        losses += list(log_sum - logits[np.arange(len(logits)), chunk[n_ctx // 2 + 1 :]])
    assert abs(np.log(said) - np.mean(losses)) < 1e-3 * np.mean(losses)  # half-precision KV cache, other batch shapes


@pytest.mark.parametrize(("type_", "likeness"), [("q8_0", 0.999), ("q4_0", 0.9)])
def test_llama_quantize_leaves_routers_and_norms_alone(
    model: Path, llama: Llama, tmp_path: Path, type_: str, likeness: float
) -> None:
    out = tmp_path / "vl.gguf"
    run("llama-quantize", model, out, type_, 1)
    before, after = tensors(model), tensors(out)
    assert before.keys() == after.keys()
    kinds = {name: tensor.tensor_type.name for name, tensor in after.items()}
    words = ("_norm.", "ffn_gate_inp", "exp_probs_b", "rope_freqs")
    kept = {name for name in kinds if any(word in name for word in words)}
    assert {"blk.1.ffn_gate_inp.weight", "blk.1.ffn_gate_inp_vl.weight"} <= kept
    assert {name for name, kind in kinds.items() if kind == "F32"} == kept
    assert all(np.array_equal(after[name].data, before[name].data) for name in kept)
    experts = [
        kinds[f"blk.{il}.ffn_{part}_exps{bank}.weight"]
        for il in (1, 2, 3)
        for part in ("up", "gate", "down")
        for bank in ("", "_vl")
    ]
    assert set(experts) == {type_.upper()}
    (tmp_path / "mmproj-vl.gguf").symlink_to(model.parent / "mmproj-vl.gguf")
    with Llama(out, n_ctx=512, n_threads=1) as llm:
        ids = llm.tokenize(TEXT)
        ours, exact = llm.logits(ids).ravel(), llama.logits(ids).ravel()
        assert np.corrcoef(ours, exact)[0, 1] > likeness
        assert llm.create_chat_completion(question(picture(84, 112)), max_tokens=4)["usage"]["completion_tokens"] > 0


def test_llama_gguf_split_and_merge_give_the_model_back(model: Path, llama: Llama, tmp_path: Path) -> None:
    run("llama-gguf-split", "--split", "--split-max-tensors", 20, model, tmp_path / "vl")
    parts = sorted(tmp_path.glob("vl-*.gguf"))
    assert len(parts) == 4 and parts[0].name == "vl-00001-of-00004.gguf"
    (tmp_path / "mmproj-vl.gguf").symlink_to(model.parent / "mmproj-vl.gguf")
    messages = question(picture(84, 112))
    with Llama(parts[0], n_ctx=512, n_threads=1) as llm:
        assert greedy(llm, messages, 12) == greedy(llama, messages, 12) != ""
    merged = tmp_path / "merged.gguf"
    run("llama-gguf-split", "--merge", parts[0], merged)
    before, after = tensors(model), tensors(merged)
    assert before.keys() == after.keys()
    assert all(np.array_equal(after[name].data, before[name].data) for name in before)


def test_ggml_rpc_server_speaks_our_protocol() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [str(programs.path("ggml-rpc-server")), "--port", str(port), "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    timer = threading.Timer(30, process.kill)
    timer.start()
    try:
        for _ in range(200):
            try:
                rpc.check([f"127.0.0.1:{port}"])
                break
            except rpc.RpcError as error:
                assert "nothing listens" in str(error)
                timer.join(0.05)
        else:
            pytest.fail("the worker did not start")
    finally:
        timer.cancel()
        process.kill()
        printed = process.communicate()[0]
    assert "Starting RPC server v107.0.0" in printed and f"127.0.0.1:{port}" in printed
