"""Llama: answers, tokens, streaming, threads and lifetime. The engine is compared with the token level, `logits()`."""

from __future__ import annotations

import base64
import gc
import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from gguf_models import EXACT, QUESTION, gguf, image_ids, picture, question

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
from pyllamaernie import Image, Llama
from pyllamaernie.errors import ClosedError, InputError, UnsupportedInputError

PICTURE = picture(84, 112)  # a multiple of 28 a side: 3 x 4 tokens, never resized
TEXT = "User: What is in the picture? 42 stars\nAssistant: a large red"


def greedy(llm: Llama, ids: list[int], n: int, images: list[np.ndarray] = []) -> list[int]:  # noqa: B006
    ids = list(ids)
    for _ in range(n):
        ids.append(int(llm.logits(ids, images=images)[-1].argmax()))
    return ids[-n:]


def answer(llm: Llama, messages: list[dict], **options: object) -> str:
    options = {"max_tokens": 12, "temperature": 0, **options}
    return llm.create_chat_completion(messages, **options)["choices"][0]["message"]["content"]


def test_completion_equals_greedy_logits(dense: Llama) -> None:
    ids = dense.tokenize(TEXT)
    result = dense.create_completion(ids, max_tokens=16, temperature=0)
    choice = result["choices"][0]
    assert choice["tokens"] == greedy(dense, ids, 16)
    assert choice["finish_reason"] == "length"
    assert result["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 16, "total_tokens": len(ids) + 16}
    assert dense(TEXT, max_tokens=16, temperature=0)["choices"][0]["tokens"] == choice["tokens"]


def test_streamed_completion_equals_the_whole_one(dense: Llama) -> None:
    whole = dense.create_completion(TEXT, max_tokens=12, temperature=0, echo=True)["choices"][0]
    chunks = list(dense.create_completion(TEXT, max_tokens=12, temperature=0, echo=True, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert whole["text"].startswith(TEXT) and len({chunk["id"] for chunk in chunks}) == 1


def test_stop_text_ends_the_answer_before_it(dense: Llama) -> None:
    free = dense.create_completion(TEXT, max_tokens=24, temperature=0)["choices"][0]["text"]
    word = next(
        free[i : i + 2]
        for i in range(4, len(free) - 2)
        if free[i : i + 2].isascii() and free.index(free[i : i + 2]) == i
    )
    stopped = dense.create_completion(TEXT, max_tokens=24, temperature=0, stop=word)["choices"][0]
    assert stopped["text"] == free[: free.index(word)] and stopped["finish_reason"] == "stop"


def test_same_seed_same_text_and_other_seed_other_text(dense: Llama) -> None:
    def draw(seed: int) -> list[int]:
        return dense.create_completion(TEXT, max_tokens=16, temperature=1.5, top_k=0, min_p=0, top_p=1, seed=seed)[
            "choices"
        ][0]["tokens"]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


def test_tokens_round_trip_as_bytes(dense: Llama) -> None:
    for text in ("Hello world", "two  spaces, 42", "émigré 图 🙂", ""):
        ids = dense.tokenize(text)
        assert dense.detokenize(ids).decode() == text
        assert dense.tokenize(text.encode()) == ids
    assert len(dense.tokenize("<|IMAGE_START|>", special=True)) == 1
    assert dense.detokenize(dense.tokenize("<|IMAGE_START|>", special=True), special=True) == b"<|IMAGE_START|>"
    with pytest.raises(InputError, match="token id"):
        dense.detokenize([dense.n_vocab()])


def test_logits_have_a_row_for_every_token_and_do_not_depend_on_the_batch(dense: Llama) -> None:
    ids = dense.tokenize(TEXT)
    whole = dense.logits(ids)
    assert whole.shape == (len(ids), dense.n_vocab()) and whole.dtype == np.float32
    with Llama(gguf("dense"), **EXACT, n_batch=3, n_ubatch=2) as small:
        assert np.abs(small.logits(ids) - whole).max() < 1e-4 * whole.std()
    assert np.abs(dense.logits(ids[:5]) - whole[:5]).max() < 1e-4 * whole.std()


def test_chat_answer_is_the_completion_of_the_rendered_template(dense: Llama) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": ["What is ", {"type": "text", "text": "this?"}]},
    ]
    prompt = dense.apply_template(messages)
    assert prompt == "<|begin_of_sentence|>Be brief.\nUser: What is this?\nAssistant: "
    text = dense.create_completion(prompt, max_tokens=12, temperature=0)["choices"][0]["text"]
    assert answer(dense, messages).strip() == text.strip()


def test_streamed_chat_equals_the_whole_answer(dense: Llama) -> None:
    messages = [{"role": "user", "content": "Where is the star?"}]
    chunks = list(dense.create_chat_completion(messages, max_tokens=12, temperature=0, stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant" and chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert "".join(delta.get("content") or "" for delta in deltas) == answer(dense, messages)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_chat_about_a_picture_equals_greedy_logits(vl: Llama) -> None:
    ids = (
        vl.tokenize("<|begin_of_sentence|>User: Picture 1:", special=True)
        + image_ids(3, 4)
        + vl.tokenize(QUESTION + "\nAssistant: ")
    )
    expected = vl.detokenize(greedy(vl, ids, 12, [PICTURE])).decode("utf-8", "replace")
    result = vl.create_chat_completion(question(PICTURE), max_tokens=12, temperature=0)
    assert result["choices"][0]["message"]["content"] == expected.strip()
    assert result["usage"]["prompt_tokens"] == len(ids)


def test_every_form_of_a_picture_gives_the_same_answer(vl: Llama, tmp_path) -> None:
    path = tmp_path / "p.png"
    PIL.Image.fromarray(PICTURE).save(path)
    data = path.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    forms = [
        str(path),
        path,
        data,
        bytearray(data),
        url,
        PIL.Image.open(io.BytesIO(data)),
        PICTURE / 255.0,
        Image.of(data),
    ]
    expected = answer(vl, question(PICTURE))
    assert [answer(vl, question(form)) for form in forms] == [expected] * len(forms)
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": str(path)},
        {"type": "image", "path": path},
    ]
    for part in parts:
        assert answer(vl, [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}]) == expected
    assert answer(vl, question(PICTURE[:, ::-1])) != expected


def test_two_pictures_are_numbered_and_their_order_counts(vl: Llama) -> None:
    other = picture(56, 56, seed=5)

    def ask(first: np.ndarray, second: np.ndarray) -> str:
        parts = [
            {"type": "image", "image": first},
            {"type": "image", "image": second},
            {"type": "text", "text": "Which picture?"},
        ]
        return answer(vl, [{"role": "user", "content": parts}])

    ids = vl.tokenize("<|begin_of_sentence|>User: Picture 1:", special=True) + image_ids(3, 4)
    ids += vl.tokenize("Picture 2:") + image_ids(2, 2) + vl.tokenize("Which picture?\nAssistant: ")
    expected = vl.detokenize(greedy(vl, ids, 12, [PICTURE, other])).decode("utf-8", "replace")
    assert ask(PICTURE, other) == expected.strip()
    assert ask(other, PICTURE) != ask(PICTURE, other)


def test_a_picture_does_not_leak_into_the_next_conversation(vl: Llama) -> None:
    a, b, c = PICTURE, picture(84, 112, seed=1), picture(84, 112, seed=2)
    fresh = {
        name: answer(vl, question(image), cache_prompt=False) for name, image in zip("abc", (a, b, c), strict=True)
    }
    assert len(set(fresh.values())) == 3
    assert [answer(vl, question(image)) for image in (a, b, a, c)] == [fresh[name] for name in "abac"]


def test_logits_refuse_ids_that_do_not_fit_the_pictures(vl: Llama, dense: Llama) -> None:
    ids = vl.tokenize("a") + image_ids(3, 4) + vl.tokenize("b")
    assert vl.logits(ids, [PICTURE]).shape == (len(ids), vl.n_vocab())
    with pytest.raises(InputError, match=r"takes 14 tokens .* hold 8"):
        vl.logits(image_ids(2, 3), [PICTURE])
    with pytest.raises(InputError, match=r"1 <.*> runs, but 0 images"):
        vl.logits(ids)
    with pytest.raises(InputError, match=r"0 <.*> runs, but 1 images"):
        vl.logits(vl.tokenize("ab"), [PICTURE])
    with pytest.raises(InputError, match=r"12 placeholders no <.IMAGE_END.> .* follows"):
        vl.logits(image_ids(3, 4)[:-1], [PICTURE])
    with pytest.raises(InputError, match=r"input_ids\[1\] is 512"):
        vl.logits([0, 512])
    with pytest.raises(InputError, match=r"0 <.*> runs, but 1 videos"):
        vl.logits(vl.tokenize("ab"), videos=[np.stack([PICTURE, PICTURE])])
    with pytest.raises(UnsupportedInputError, match="without a projector"):
        dense.logits(dense.tokenize("ab"), [PICTURE])


# As the released templates: an undefined add_generation_prompt counts as true, no thinking unless asked for.
THINKING = (
    "{%- if not add_generation_prompt is defined -%}{%- set add_generation_prompt = true -%}{%- endif -%}"
    "{{- '<|begin_of_sentence|>' -}}{%- for m in messages -%}{%- if m.role == 'user' -%}{{- 'User: ' + m.content -}}"
    "{%- else -%}{{- '\nAssistant: ' -}}{%- if m.reasoning_content -%}"
    "{{- '<think>\n' + m.reasoning_content + '\n</think>\n' -}}{%- endif -%}"
    "{{- m.content + '<|end_of_sentence|>' -}}{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}"
    "{{- '\nAssistant: ' + ('<think>' if enable_thinking else '<think>\n\n</think>\n\n') -}}{%- endif -%}"
)


@pytest.fixture(scope="module")
def thinker() -> Iterator[Llama]:
    with Llama(gguf("dense"), **EXACT, chat_template=THINKING) as llm:
        yield llm


def test_ernie_thinks_only_when_asked(thinker: Llama) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    closed, opened = "\nAssistant: <think>\n\n</think>\n\n", "\nAssistant: <think>"
    assert thinker.apply_template(messages).endswith(closed)
    assert thinker.apply_template(messages, enable_thinking=False).endswith(closed)
    assert thinker.apply_template(messages, enable_thinking=True).endswith(opened)
    assert thinker.apply_template(messages, chat_template_kwargs={"enable_thinking": True}).endswith(opened)
    assert thinker.apply_template(messages, add_generation_prompt=False).endswith("User: Hi")


@pytest.mark.parametrize(
    ("think", "output", "thoughts", "text"),
    [
        (None, "blue", "", "blue"),
        (None, "  blue star", "", "  blue star"),
        (True, "\\nred\\n</think>\\n\\nblue", "red", "blue"),
        (True, "red</think>blue", "red", "blue"),
        (True, "\\nred\\n</think>\\nblue\\n\\nstar", "red", "blue\n\nstar"),
    ],
)
def test_thoughts_are_kept_apart_from_the_answer(thinker: Llama, think, output: str, thoughts: str, text: str) -> None:
    options = {"max_tokens": 60, "temperature": 0, "enable_thinking": think, "grammar": f'root ::= "{output}"'}
    messages = [{"role": "user", "content": "Hi"}]
    message = thinker.create_chat_completion(messages, **options)["choices"][0]["message"]
    assert (message["content"], message.get("reasoning_content", "").strip()) == (text, thoughts)
    deltas = [c["choices"][0]["delta"] for c in thinker.create_chat_completion(messages, stream=True, **options)]
    assert "".join(delta.get("content") or "" for delta in deltas) == text
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == message.get("reasoning_content", "")


def test_an_unfinished_thought_is_no_answer(thinker: Llama) -> None:
    options = {
        "max_tokens": 4,
        "temperature": 0,
        "enable_thinking": True,
        "grammar": 'root ::= "red star, blue circle"',
    }
    message = thinker.create_chat_completion([{"role": "user", "content": "Hi"}], **options)["choices"][0]["message"]
    assert not message["content"] and message["reasoning_content"].startswith("r")


def test_eight_threads_get_the_serial_answers(vl: Llama) -> None:
    jobs = [
        question(picture(56, 84, seed=i)) if i % 2 else [{"role": "user", "content": f"How many shapes? {i}"}]
        for i in range(8)
    ]
    serial = [answer(vl, job, max_tokens=6) for job in jobs]
    results: list[str | None] = [None] * len(jobs)

    def work(i: int) -> None:
        for _ in range(3):
            results[i] = answer(vl, jobs[i], max_tokens=6)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == serial


def test_a_dropped_stream_frees_the_model_at_once(dense: Llama) -> None:
    for drop in ("close", "garbage"):
        stream = dense.create_completion(TEXT, max_tokens=900, temperature=0, stream=True)
        next(stream)
        if drop == "close":
            stream.close()
        del stream
        gc.collect()
        start = time.monotonic()
        dense.create_completion("Hello", max_tokens=1, temperature=0)  # waits for the only slot
        assert time.monotonic() - start < 1.0


def test_use_after_close_says_so() -> None:
    with Llama(gguf("dense"), **EXACT) as llm:
        stream = llm.create_completion(TEXT, max_tokens=500, stream=True)
        next(stream)
        llm.logits([1, 2, 3])
    llm.close()
    for call in (
        lambda: llm("a"),
        lambda: llm.tokenize("a"),
        lambda: llm.logits([1]),
        lambda: llm.create_chat_completion([{"role": "user", "content": "a"}]),
    ):
        with pytest.raises(ClosedError, match="closed"):
            call()
    with pytest.raises(ClosedError):
        list(stream)


def test_close_ends_a_call_in_another_thread() -> None:
    llm = Llama(gguf("dense"), **EXACT)
    errors: list[BaseException] = []
    started = threading.Event()

    def work() -> None:
        try:
            for _ in llm.create_completion(TEXT, max_tokens=100_000, temperature=0, stream=True):
                started.set()
            for _ in range(100):
                llm.create_completion(TEXT, max_tokens=900, temperature=0, cache_prompt=False)
        except ClosedError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(20)
    llm.close()
    thread.join(20)
    assert not thread.is_alive() and len(errors) == 1


LOADS = """
import gc, json, sys
from gguf_models import EXACT, picture, question
from pyllamaernie import Llama

def resident_kib():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4

sizes = []
for _ in range(12):
    with Llama(sys.argv[1], **EXACT) as llm:
        llm.create_chat_completion(question(picture(84, 112)), max_tokens=2, temperature=0)
        llm.logits([1, 2, 3])
    gc.collect()
    sizes.append(resident_kib())
print(json.dumps(sizes))
"""


def test_loading_and_closing_does_not_grow_the_process(tmp_path: Path) -> None:
    """In a process of its own: elsewhere the memory of other tests comes and goes meanwhile."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LOADS, str(gguf("vl"))]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout)
    assert len(sizes) == 12
    assert max(sizes[6:]) < max(sizes[:6]) * 1.05, sizes  # they swing with what the allocator gives back


PROGRAM = """
import sys
from pyllamaernie import Llama
llm = Llama(sys.argv[1], n_threads=1, n_ctx=512)
stream = llm.create_completion("Hello", max_tokens=200, stream=True)
next(stream)
llm.logits([1, 2, 3])
"""


def test_nothing_is_printed_and_the_interpreter_exits_clean_without_close(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(gguf("vl"))]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_native_lines_reach_logging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pyllamaernie"):
        Llama(gguf("dense"), **EXACT).close()
    names = {record.name for record in caplog.records}
    assert {"pyllamaernie.ggml", "pyllamaernie.engine"} <= names
    assert any("general.architecture" in record.message for record in caplog.records)
