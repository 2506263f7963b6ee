"""RPC: a model spread over two local workers says what it says alone; every wrong peer is one sentence, no crash."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import verb
from gguf_models import gguf, picture, question

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
from pyllamaernie import Llama, _core, programs
from pyllamaernie.errors import InferenceError, ModelLoadError
from pyllamaernie.llama import rpc
from pyllamaernie.llama.rpc import RpcError
from pyllamaernie.quant.imatrix import compute_imatrix
from pyllamaernie.server import http as serve

OPTIONS = {"n_ctx": 512, "n_threads": 1}
PICTURE = picture(84, 112)


running: dict[str, subprocess.Popen] = {}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def worker() -> Iterator[str]:
    """A worker started as a user does; it ends with the block."""
    port = free_port()
    command = verb.command("rpc", "--port", port, "--threads", 1)
    process = subprocess.Popen(command, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 30
        while True:
            try:
                rpc.hello(f"127.0.0.1:{port}")
                break
            except RpcError:
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.05)
        running[f"127.0.0.1:{port}"] = process
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def stop(endpoint: str) -> None:
    running[endpoint].kill()
    running[endpoint].wait()


@pytest.fixture(scope="module")
def workers() -> Iterator[list[str]]:
    with worker() as first, worker() as second:
        yield [first, second]


def greedy(llm: Llama, messages: list[dict]) -> str:
    answer = llm.create_chat_completion(messages, max_tokens=24, temperature=0, logit_bias={llm.token_eos(): -100})
    return answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize("kind", ["vl", "moe", "dense"])
def test_two_workers_give_the_tokens_of_one_process(workers: list[str], kind: str) -> None:
    messages = [{"role": "user", "content": "Tell me about a large red circle and 42 stars."}]
    asked = [messages, question(PICTURE), messages] if kind == "vl" else [messages]
    with Llama(gguf(kind), **OPTIONS) as llm:
        ids = llm.tokenize("What is in the picture?")
        alone = [greedy(llm, each) for each in asked], llm.logits(ids)
    with Llama(gguf(kind), **OPTIONS, rpc_servers=workers) as llm:
        spread = [greedy(llm, each) for each in asked], llm.logits(ids)
    assert spread[0] == alone[0] and all(alone[0])
    assert np.array_equal(spread[1], alone[1])  # the same kernels with one thread each


def test_the_layers_really_lie_on_both_workers(workers: list[str]) -> None:
    arguments = serve.arguments(gguf("vl"), n_ctx=512, n_threads=1, port=free_port(), rpc_servers=workers)
    lines = _server_log([*arguments, "-v"])
    sizes = [sum(float(line.split()[-2]) for line in lines if endpoint in line) for endpoint in workers]
    assert min(sizes) > 4 and max(sizes) < 12, lines  # MiB; four layers and the output matrix


def _server_log(arguments: list[str]) -> list[str]:
    process = subprocess.Popen(
        [str(programs.path("llama-server")), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    timer = threading.Timer(30, process.kill)
    timer.start()
    lines = []
    try:
        for line in process.stdout:
            if "model buffer size" in line:
                lines.append(line.strip())
            if "listening" in line:
                break
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
    return lines


def test_serve_over_two_workers_equals_one_process(workers: list[str]) -> None:
    pytest.importorskip("openai", reason="the OpenAI client is not installed")
    messages = [{"role": "user", "content": "Hello"}]
    with Llama(gguf("vl"), **OPTIONS) as llm:
        expected = llm.create_chat_completion(messages, max_tokens=12, temperature=0)["choices"][0]["message"][
            "content"
        ]
    with serve.Server(gguf("vl"), n_ctx=512, n_threads=1, rpc_servers=workers, timeout_s=60) as server:
        with server.openai_client(max_retries=0, timeout=30) as client:
            answer = client.chat.completions.create(model="any", messages=messages, max_tokens=12, temperature=0)
    assert answer.choices[0].message.content == expected


def test_a_later_model_does_not_land_on_the_workers() -> None:
    """A worker stays known to the process; a model without rpc_servers must not need it."""
    with worker() as endpoint, Llama(gguf("vl"), **OPTIONS, rpc_servers=endpoint) as llm:
        expected = greedy(llm, question(PICTURE))
    with pytest.raises(RpcError, match="nothing listens"):
        rpc.hello(endpoint)
    with Llama(gguf("vl"), **OPTIONS) as llm:
        assert greedy(llm, question(PICTURE)) == expected
        assert llm.logits(llm.tokenize("Hello")).shape[1] == llm.n_vocab()
    with pytest.raises(RpcError, match="nothing listens"):
        Llama(gguf("vl"), **OPTIONS, rpc_servers=endpoint)


def test_two_models_of_one_process_share_a_worker(workers: list[str]) -> None:
    with (
        Llama(gguf("vl"), **OPTIONS, rpc_servers=workers) as one,
        Llama(gguf("moe"), **OPTIONS, rpc_servers=workers[:1]) as two,
    ):
        first = greedy(one, question(PICTURE)), greedy(two, [{"role": "user", "content": "Hello"}])
        two.close()
        assert greedy(one, question(PICTURE)) == first[0]
    with Llama(gguf("moe"), **OPTIONS) as llm:
        assert greedy(llm, [{"role": "user", "content": "Hello"}]) == first[1]


def test_imatrix_over_two_workers_equals_one_process(workers: list[str], tmp_path: Path) -> None:
    """What the workers computed is fetched: nothing of it lies in this process's memory."""
    pictures = [(PICTURE, "What is in the picture?")]
    alone = compute_imatrix(gguf("vl"), None, tmp_path / "a.gguf", pictures=pictures, n_threads=1)
    spread = compute_imatrix(gguf("vl"), None, tmp_path / "b.gguf", pictures=pictures, n_threads=1, rpc_servers=workers)
    assert any(entry.sums.any() for entry in alone.entries)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert spread.missing == alone.missing


def test_a_worker_that_goes_away_fails_the_calls_and_nothing_else(workers: list[str]) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    with ExitStack() as stack:
        lost = stack.enter_context(worker())
        llm = stack.enter_context(Llama(gguf("vl"), n_ctx=4096, n_threads=1, rpc_servers=[workers[0], lost]))
        stream = llm.create_chat_completion(
            messages, max_tokens=4000, temperature=1.5, logit_bias={llm.token_eos(): -100}, stream=True
        )
        next(stream)
        stop(lost)
        with pytest.raises(InferenceError, match=f"the RPC server {lost} is gone"):
            for _ in stream:
                pass
        with pytest.raises(InferenceError, match=f"{lost} is gone"):
            llm.create_chat_completion(messages, max_tokens=4)
        with pytest.raises(InferenceError):
            llm.logits([5, 6, 7])
    with Llama(gguf("vl"), **OPTIONS, rpc_servers=workers) as llm:
        assert greedy(llm, messages)


class Peer:
    """A listener that answers each connection with fixed bytes, or with nothing at all."""

    def __init__(self, answer: bytes | None) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self.heard: list[bytes] = []
        self._answer = answer
        self._held: list[socket.socket] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                link, _ = self._socket.accept()
            except OSError:
                return
            self._held.append(link)
            self.heard.append(link.recv(64))
            if self._answer is not None:
                link.sendall(self._answer)
                link.shutdown(socket.SHUT_WR)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR) if sys.platform == "linux" else None
        self._socket.close()
        self._thread.join(5)
        for link in self._held:
            link.close()


def version_answer(*version: int) -> bytes:
    return struct.pack("<Q4B24x", 28, *version, 0)


def test_handshake_bytes_are_the_protocol_s() -> None:
    with Peer(version_answer(*_core.RPC_VERSION)) as peer:
        assert rpc.hello(peer.endpoint) == _core.RPC_VERSION
        rpc.check([peer.endpoint])
    assert peer.heard[0] == b"\x0e" + struct.pack("<Q", 24) + bytes(24)


def test_our_protocol_is_not_the_upstream_one() -> None:
    assert _core.RPC_VERSION[0] == 107, "100 more than the pin's major version"


@pytest.mark.parametrize("version", [(7, 0, 0), (107, 0, 9), (108, 0, 0), (5, 1, 0)])
def test_a_peer_of_another_build_is_refused_with_a_sentence(version: tuple[int, ...]) -> None:
    with Peer(version_answer(*version)) as peer:
        message = (
            rf"{peer.endpoint} is of another build: it speaks protocol {'.'.join(map(str, version))}, this one 107"
        )
        with pytest.raises(RpcError, match=message):
            Llama(gguf("vl"), **OPTIONS, rpc_servers=[peer.endpoint])
        with pytest.raises(RpcError, match="same version of pyllamaernie on both ends"):
            serve.arguments(gguf("vl"), rpc_servers=[peer.endpoint])


def test_the_bundled_programs_refuse_them_as_well() -> None:
    with Peer(version_answer(7, 0, 0)) as peer:
        done = programs.run("llama-cli", ["--rpc", peer.endpoint], check=False, capture=True, timeout=30)
    said = done.stdout + done.stderr
    assert done.returncode == 1 and f"the RPC server {peer.endpoint} is of another build" in said
    done = programs.run("llama-cli", ["--rpc", f"127.0.0.1:{free_port()}"], check=False, capture=True, timeout=30)
    assert done.returncode == 1 and "failed to connect to the RPC server 127.0.0.1:" in done.stdout + done.stderr


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", version_answer(107, 0, 0)[:20]])
def test_another_program_is_not_taken_for_a_worker(answer: bytes) -> None:
    with Peer(answer) as peer, pytest.raises(RpcError, match=f"{peer.endpoint} does not answer like an RPC worker"):
        rpc.check([peer.endpoint])


def test_nobody_there_and_nobody_answering() -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    with pytest.raises(ModelLoadError, match=f"{endpoint}: nothing listens there"):
        Llama(gguf("dense"), **OPTIONS, rpc_servers=[endpoint])
    with Peer(None) as peer, pytest.raises(RpcError, match=f"{peer.endpoint} does not answer within 0.2 s"):
        rpc.check([peer.endpoint], 0.2)
    with pytest.raises(RpcError, match=r"no-such-host\.invalid:1: the host is not known"):
        rpc.check(["no-such-host.invalid:1"])


def test_a_busy_worker_says_so_and_survives_the_question() -> None:
    with worker() as endpoint:
        host, port = endpoint.split(":")
        with socket.create_connection((host, int(port))):  # a client that holds the worker
            with pytest.raises(RpcError, match="busy"):
                rpc.check([endpoint], 0.3)
        rpc.check([endpoint])


@pytest.mark.parametrize(
    ("servers", "match"),
    [
        ("", "HOST:PORT"),
        ("localhost", "'localhost' is no RPC worker"),
        ("localhost:0", "is no RPC worker"),
        ("localhost:70000", "is no RPC worker"),
        (["::1:50052"], "is no RPC worker"),
        ("a:1,,b:2", "HOST:PORT"),
        ("a:1,a:1", "a:1 is given twice"),
        ([f"a:{n}" for n in range(1, 18)], "17 RPC workers were given; at most 16"),
    ],
)
def test_wrong_endpoints_are_named(servers: str | list[str], match: str) -> None:
    with pytest.raises(RpcError, match=match):
        rpc.endpoints(servers)
    assert rpc.endpoints(" a.b-c:1, 10.0.0.2:50052") == ["a.b-c:1", "10.0.0.2:50052"]


def test_public_address_needs_the_flag() -> None:
    for host in ("0.0.0.0", "192.0.2.1"):
        done = verb.run("rpc", "--host", host, cwd="/")
        assert done.returncode == 2 and "--public" in done.stderr and done.stderr.count("\n") == 1
    for words in (["--host", "somewhere"], ["--port", "0"], ["--threads", "0"]):
        done = verb.run("rpc", *words, cwd="/")
        assert done.returncode == 2 and words[0] in done.stderr, done.stderr


def test_check_answers_for_each_worker(workers: list[str]) -> None:
    done = verb.run("rpc", "--check", ",".join(workers), cwd="/")
    assert done.returncode == 0 and done.stdout.count("of this build (protocol 107.0.0)") == 2
    done = verb.run("rpc", "--check", f"127.0.0.1:{free_port()}", cwd="/")
    assert done.returncode == 1 and "nothing listens" in done.stderr and done.stdout == ""
