"""`pyllamaernie serve` on loopback: an OpenAI client, the web page, refusals, and the flags that llama-server gets."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import chat_templates
import checkpoints
import PIL.Image
import pytest
import verb
from gguf_models import QUESTION, gguf, picture

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
pytest.importorskip("openai", reason="the OpenAI client is not installed")
import openai

from pyllamaernie import Llama, programs
from pyllamaernie.convert import convert
from pyllamaernie.errors import ModelNotFoundError, ProjectorMismatchError, PyllamaernieError
from pyllamaernie.server import http as serve

PICTURE = picture(84, 112)
GREEDY = {"model": "any", "max_tokens": 12, "temperature": 0, "timeout": 60}


def data_url(kind: str = "png") -> str:
    out = io.BytesIO()
    PIL.Image.fromarray(PICTURE).save(out, kind)
    return f"data:image/{kind};base64," + base64.b64encode(out.getvalue()).decode()


def with_picture(text: str = QUESTION, url: str | None = None) -> list[dict]:
    part = {"type": "image_url", "image_url": {"url": url or data_url()}}
    return [{"role": "user", "content": [part, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random VL model with a template as released: it thinks only when asked."""
    home = tmp_path_factory.mktemp("serve")
    source = checkpoints.write_checkpoint(home / "hf", "vl", tied=False)
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["chat_template"] = chat_templates.VL
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    limits = {"size": {"shortest_edge": 3136, "longest_edge": 9408}}  # a clip fits into a small context
    (source / "video_preprocessor_config.json").write_text(json.dumps(limits))
    return convert(source, home / "thinker.gguf", type="f32").model


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[serve.Server]:
    # 48 tokens where a request names no limit, as the page does
    with serve.Server(model, n_ctx=1024, n_threads=1, timeout_s=60, args=["--predict", "48", "--temp", "0"]) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: serve.Server):
    with server.openai_client(max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def llama(model: Path) -> Iterator[Llama]:
    with Llama(model, n_ctx=1024, n_threads=1) as llm:
        yield llm


@pytest.mark.parametrize("messages", [[{"role": "user", "content": "Hello"}], with_picture()], ids=["text", "picture"])
def test_answers_equal_those_of_llama(client, llama: Llama, messages: list[dict]) -> None:
    expected = llama.create_chat_completion(messages, max_tokens=12, temperature=0)
    answer = client.chat.completions.create(messages=messages, **GREEDY)
    choice = answer.choices[0]
    assert choice.message.content == expected["choices"][0]["message"]["content"] != ""
    assert choice.finish_reason == "length" and answer.model == "thinker"
    assert answer.usage.prompt_tokens == expected["usage"]["prompt_tokens"]
    chunks = list(client.chat.completions.create(messages=messages, stream=True, **GREEDY))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == choice.message.content


def test_the_picture_reaches_the_answer(client) -> None:
    def probabilities(url: str) -> list[float]:
        options = {**GREEDY, "max_tokens": 1, "extra_body": {"cache_prompt": False}}
        answer = client.chat.completions.create(
            messages=with_picture(url=url), logprobs=True, top_logprobs=5, **options
        )
        return [entry.logprob for entry in answer.choices[0].logprobs.content[0].top_logprobs]

    out = io.BytesIO()
    PIL.Image.fromarray(255 - PICTURE).save(out, "png")
    other = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
    assert probabilities(data_url("png")) == probabilities(data_url("bmp")) != probabilities(other)


def test_a_video_url_is_decoded_without_ffmpeg(client, llama: Llama) -> None:
    av = pytest.importorskip("av")
    out = io.BytesIO()
    with av.open(out, "w", "avi") as container:
        stream = container.add_stream("mjpeg", rate=4)
        stream.width, stream.height, stream.pix_fmt = 112, 84, "yuvj420p"
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(picture(84, 112, seed=i), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    url = "data:video/avi;base64," + base64.b64encode(out.getvalue()).decode()
    content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    expected = llama.create_chat_completion(messages, max_tokens=12, temperature=0)
    answer = client.chat.completions.create(messages=messages, **GREEDY)
    assert answer.usage.prompt_tokens == expected["usage"]["prompt_tokens"] > 8 * 12
    assert answer.choices[0].message.content == expected["choices"][0]["message"]["content"] != ""


def test_thinking_is_off_until_a_request_asks(server: serve.Server, client) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}

    def prompt(**extra: object) -> str:
        body = json.dumps({"messages": messages, **extra}).encode()
        request = urllib.request.Request(f"{server.url}/apply-template", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)["prompt"]

    assert prompt().endswith("<think>\n\n</think>\n\n")
    assert prompt(**thinking).endswith("Assistant: <think>")
    for output, extra, thoughts in (("blue star", {}, ""), ("red</think>blue star", thinking, "red")):
        options = {**GREEDY, "max_tokens": 60, "messages": messages}
        options["extra_body"] = {"grammar": f'root ::= "{output}"', **extra}
        message = client.chat.completions.create(**options).choices[0].message
        assert (message.content, getattr(message, "reasoning_content", None) or "") == ("blue star", thoughts)
        chunks = client.chat.completions.create(stream=True, **options)
        deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
        assert "".join(delta.content or "" for delta in deltas) == "blue star"
        assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == thoughts


def test_errors_are_openai_errors(client) -> None:
    with pytest.raises(openai.BadRequestError, match="context"):
        client.chat.completions.create(messages=[{"role": "user", "content": "red circle " * 2000}], **GREEDY)
    broken = "data:image/png;base64," + base64.b64encode(b"no picture").decode()
    with pytest.raises(openai.BadRequestError, match="image"):
        client.chat.completions.create(messages=with_picture(url=broken), **GREEDY)
    with pytest.raises(openai.BadRequestError, match="file://"):
        client.chat.completions.create(messages=with_picture(url="file:///etc/hostname"), **GREEDY)
    assert client.chat.completions.create(messages=[{"role": "user", "content": "Hello"}], **GREEDY).choices


def test_four_requests_at_once_equal_one_at_a_time(client, llama: Llama) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def ask(text: str) -> str:
        messages = with_picture(text) if "picture" in text else [{"role": "user", "content": text}]
        return client.chat.completions.create(messages=messages, **GREEDY).choices[0].message.content

    texts = ["Hello", QUESTION, "Which picture?", "And now?"]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(ask, texts))
    assert together == [ask(text) for text in texts]


def test_the_page_is_ours_small_and_loads_nothing_else(server: serve.Server) -> None:
    with urllib.request.urlopen(server.url, timeout=10) as answer:
        page = answer.read()
        assert answer.headers["Content-Type"].startswith("text/html")
    text = page.decode()
    assert page == (serve.WEB / "index.html").read_bytes() and len(page) < 20_000
    assert not re.search(r"https?://", text) and "prefers-color-scheme: dark" in text
    for needed in ("enable_thinking", "image_url", "reasoning_content", "stream: true", "v1/chat/completions"):
        assert needed in text


@pytest.mark.skipif(shutil.which("node") is None, reason="runs the page's script in node")
def test_the_page_chats_with_pictures_and_thoughts(server: serve.Server, llama: Llama) -> None:
    steps = [
        {"text": QUESTION, "picture": data_url()},
        {"text": "Why?", "think": True},
    ]
    script = Path(__file__).parents[1] / "data" / "run_page.mjs"
    command = ["node", str(script), str(serve.WEB / "index.html"), server.url, json.dumps(steps)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert (seen["title"], seen["attach"], seen["thinking"]) == ("thinker", True, True)
    question, answer, facts, second, _, last = seen["turns"]
    assert (question["kind"], question["text"], question["pictures"]) == ("turn user", QUESTION, 1)
    assert answer["text"] and not answer["thoughts"]
    assert second["text"] == "Why?"
    for line in (facts, last):  # a random model may say nothing that can be printed, but it says something
        assert re.fullmatch(r"\d+ tokens read, [1-9]\d* written, [0-9.]+ a second", line["text"])
    first, again = seen["sent"]
    assert first["messages"] == with_picture() and first["chat_template_kwargs"] == {"enable_thinking": False}
    assert [message["role"] for message in again["messages"]] == ["user", "assistant", "user"]
    assert again["messages"][:1] == first["messages"] and again["chat_template_kwargs"] == {"enable_thinking": True}
    assert again["messages"][1]["content"] == answer["text"]


def test_other_web_sites_may_not_read_answers(server: serve.Server) -> None:
    def allowed(origin: str) -> str | None:
        request = urllib.request.Request(f"{server.base_url}/models", headers={"Origin": origin})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.headers["Access-Control-Allow-Origin"]

    assert allowed("http://localhost:3000") == "http://localhost:3000"
    assert allowed("https://example.org") is None


def test_api_key_is_asked_for_and_is_not_in_the_process_list() -> None:
    with serve.Server(gguf("dense"), n_ctx=512, n_threads=1, api_key="secret-7", timeout_s=60) as server:
        assert b"secret-7" not in Path(f"/proc/{server.process.pid}/cmdline").read_bytes()
        good = server.openai_client(max_retries=0)
        assert [entry.id for entry in good.models.list()] == ["dense"]
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=server.base_url, api_key="other", max_retries=0).models.list()
        good.close()


def test_public_address_needs_the_flag() -> None:
    for words in (
        ["--host", "0.0.0.0"],
        ["--host", "::"],
        ["--host", "some-host"],
        ["--", "--host", "0.0.0.0"],
        ["--", "--host=192.0.2.1"],
    ):
        done = verb.run("serve", "-m", gguf("dense"), *words, cwd="/")
        assert done.returncode == 2 and "--public" in done.stderr, words


def test_wrong_words_are_one_line_with_the_documented_code(tmp_path: Path) -> None:
    dense = gguf("dense")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for words, code, match in [
            (["-m", tmp_path / "nowhere.gguf", "--port", 0], 4, "nowhere.gguf"),
            (["-m", dense, "--mmproj", dense, "--port", 0], 1, "not a projector"),
            (["-m", dense, "--port", 70000], 2, "--port"),
            (["-m", dense, "--port", 0, "--ctx", 0], 2, "--ctx"),
            (["-m", dense, "--port", port], 1, f"127.0.0.1:{port}"),
            (["-m", dense, "--port", 0, "--rpc", "127.0.0.1"], 1, "HOST:PORT"),
            (["-m", dense, "--port", 0, "--rpc", f"127.0.0.1:{port + 1 if port < 65535 else 1}"], 1, "nothing listens"),
        ]:
            done = verb.run("serve", *words, cwd="/")
            assert done.returncode == code and match in done.stderr, (words, done.stderr)
            assert done.stdout == "" and "Traceback" not in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_the_verb_becomes_llama_server_prints_the_address_and_ends_on_ctrl_c() -> None:
    command = verb.command("serve", "-m", gguf("dense"), "--port", 0, "--ctx", 512)
    process = subprocess.Popen(
        [*command, "--threads", "1", "--", "--alias", "renamed"],
        cwd="/",
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    try:
        line = process.stderr.readline().decode()
        url = re.search(r"http://127\.0\.0\.1:\d+", line)[0]
        end = time.monotonic() + 30
        while True:
            try:
                with urllib.request.urlopen(f"{url}/v1/models", timeout=5) as answer:
                    assert json.load(answer)["data"][0]["id"] == "renamed"
                break
            except OSError:
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.05)
        assert b"llama-server" in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        process.send_signal(signal.SIGINT)
        assert process.wait(15) in (0, 130, -signal.SIGINT)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_arguments_follow_the_model(model: Path) -> None:
    words = serve.arguments(model, n_threads=2)
    options = dict(pairwise(words))
    assert options["--mmproj"].endswith("mmproj-thinker.gguf") and options["--temp"] == "0.2"
    assert json.loads(options["--chat-template-kwargs"]) == {"enable_thinking": False}
    assert options["--chat-template"].startswith("{%- set add_generation_prompt =")
    assert options["--host"] == "127.0.0.1" and options["--cors-origins"] == "localhost"
    dense = serve.arguments(gguf("dense"))
    assert "--no-mmproj" in dense and "--chat-template-kwargs" not in dense
    with pytest.raises(ModelNotFoundError):
        serve.arguments("nowhere.gguf")
    with pytest.raises(ProjectorMismatchError):
        serve.arguments(model, gguf("dense"))


def test_server_that_cannot_start_says_why_and_leaves_nothing() -> None:
    with pytest.raises(PyllamaernieError, match=r"ended with code 1.*no-such-flag"):
        serve.Server(gguf("dense"), n_ctx=512, timeout_s=30, args=["--no-such-flag"])
    assert programs.path("llama-server").is_file()
