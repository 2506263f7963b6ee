"""Thoughts: the switches of the three released kinds of template, streams cut anywhere, budgets, thoughts in history.

The models of these tests write a given text byte by byte (`scripted_model`), so every byte is a place to cut.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import chat_templates
import pytest
import scripted_model
from gguf_models import folder, gguf

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
from pyllamaernie import Llama, errors
from pyllamaernie.llama import engine

OPTIONS = {"type_k": "f32", "type_v": "f32", "n_ctx": 1024, "n_threads": 1}
ASK = [{"role": "user", "content": "Hi"}]
THOUGHTS = "thé文🙂 <x, </thin"
ANSWER = "an图 🙂 <end>\n\nof it"
THINKING_SCRIPT = f"\n{THOUGHTS}\n</think>\n\n{ANSWER}"
PLAIN_ANSWER = "no 图🙂 thought"


def model(name: str, template: str, scripts: dict[str, str], **options: object) -> Llama:
    path: Path = folder() / f"scripted-{name}.gguf"
    return Llama(scripted_model.write(path, scripts, template), **OPTIONS, **options)


@pytest.fixture(scope="module")
def vl() -> Iterator[Llama]:
    with model("vl", chat_templates.VL, {"<think>": THINKING_SCRIPT, "\n": PLAIN_ANSWER}) as llm:
        yield llm


@pytest.fixture(scope="module")
def vl_thinking() -> Iterator[Llama]:
    with model("vl-thinking", chat_templates.VL_THINKING, {"\n": "well\n</think>\n\nfour"}) as llm:
        yield llm


@pytest.fixture(scope="module")
def text_thinking() -> Iterator[Llama]:
    script = "well\n</think>\n\n\n<response>\nfour\n\nor five\n</response>\n"
    with model("text-thinking", chat_templates.TEXT_THINKING, {"\n": script}) as llm:
        yield llm


def whole(llm: Llama, **options: object) -> tuple[dict[str, str], str, dict]:
    """The texts of an answer, why it ended, and its usage without what the cache contributed."""
    result = llm.create_chat_completion(ASK, **{"temperature": 0, "max_tokens": 200, **options})
    choice, usage = result["choices"][0], dict(result["usage"])
    usage.pop("prompt_tokens_details")
    return {key: text for key, text in choice["message"].items() if text}, choice["finish_reason"], usage


def streamed(llm: Llama, **options: object) -> tuple[dict[str, str], str, dict, list[dict]]:
    """The same put together from the chunks, and the chunks."""
    options = {"temperature": 0, "max_tokens": 200, "stream_options": {"include_usage": True}, **options}
    chunks = list(llm.create_chat_completion(ASK, stream=True, **options))
    *body, last = chunks
    assert last["choices"] == [] and body[-1]["choices"][0]["finish_reason"]
    usage = dict(last["usage"])
    usage.pop("prompt_tokens_details")
    return add_up(body), body[-1]["choices"][0]["finish_reason"], usage, body


def add_up(chunks: Iterable[dict]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for chunk in chunks:
        for key, text in chunk["choices"][0]["delta"].items():
            texts[key] = texts.get(key, "") + text
    return texts


def tail(llm: Llama, **options: object) -> str:
    return llm.apply_template(ASK, **options).split("Hi", 1)[1]


def test_vl_thinks_only_when_asked(vl: Llama) -> None:
    off, on = "\nAssistant: <think>\n\n</think>\n\n", "\nAssistant: <think>"
    assert tail(vl) == tail(vl, enable_thinking=False) == off
    assert tail(vl, chat_template_kwargs={"enable_thinking": False}) == off
    assert tail(vl, enable_thinking=True) == tail(vl, chat_template_kwargs={"enable_thinking": True}) == on
    assert whole(vl)[0] == {"role": "assistant", "content": PLAIN_ANSWER}
    assert whole(vl, enable_thinking=True)[0] == {
        "role": "assistant",
        "content": ANSWER,
        "reasoning_content": THOUGHTS,
    }


def test_vl_thinking_thinks_unless_its_mode_is_close(vl_thinking: Llama) -> None:
    on, off = "\nAssistant: \n<think>\n", "\nAssistant: \n<think>\n\n</think>\n\n"
    assert tail(vl_thinking) == tail(vl_thinking, enable_thinking=True) == on
    closed = {"options": {"thinking_mode": "close"}}
    assert tail(vl_thinking, enable_thinking=False) == tail(vl_thinking, chat_template_kwargs=closed) == off
    assert tail(vl_thinking, enable_thinking=True, chat_template_kwargs=closed) == on
    assert whole(vl_thinking)[0] == {"role": "assistant", "content": "four", "reasoning_content": "well"}


def test_text_thinking_always_thinks_and_loses_its_answer_marks(text_thinking: Llama) -> None:
    assert tail(text_thinking) == "<|im_end|>\n\n<|im_start|>assistant\n<think>\n"
    expected = {"role": "assistant", "content": "four\n\nor five", "reasoning_content": "well"}
    assert whole(text_thinking)[0] == streamed(text_thinking)[0] == expected
    with pytest.raises(errors.InputError, match=r"always thinks.*reasoning_max_tokens"):
        text_thinking.create_chat_completion(ASK, enable_thinking=False)
    assert text_thinking.apply_template(ASK, add_generation_prompt=False).endswith("Hi<|im_end|>\n\n")


@pytest.mark.parametrize(
    ("output", "content"),
    [
        ("well\n</think>\n\n\n<response>\nfour\n</response>", "four"),
        ("well\n</think>\n\nfour", "four"),  # the marks forgotten
        ("well\n</think>\n\n\n<response>four", "four"),
        ("well\n</think>\n\n<respo", "<respo"),
        ("well\n</think>\n\n\n<response>\n</response>\n", ""),
    ],
)
def test_an_answer_without_all_of_its_marks_is_still_an_answer(output: str, content: str) -> None:
    with model("marks", chat_templates.TEXT_THINKING, {"\n": output}) as llm:
        for texts in (whole(llm)[0], streamed(llm)[0]):
            assert (texts["reasoning_content"], texts.get("content", "")) == ("well", content)


def test_template_kwargs_are_taken_at_load_and_per_call() -> None:
    with model("vl-on", chat_templates.VL, {"\n": "x"}, chat_template_kwargs={"enable_thinking": True}) as llm:
        assert tail(llm).endswith("<think>")
        assert tail(llm, enable_thinking=False).endswith("</think>\n\n")
        assert tail(llm, chat_template_kwargs={"enable_thinking": False}).endswith("</think>\n\n")


def test_a_model_without_thoughts_says_so_when_asked_to_think() -> None:
    template = "{%- for m in messages -%}{{- 'User: ' + m.content + '\nAssistant: ' -}}{%- endfor -%}"
    with model("plain", template, {"\u2581": "fine"}) as llm:
        assert whole(llm, enable_thinking=False)[0]["content"] == "fine"
        with pytest.raises(errors.InputError, match="knows no thoughts"):
            llm.create_chat_completion(ASK, enable_thinking=True)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"enable_thinking": "yes"}, "True, False or None, got 'yes'"),
        ({"chat_template_kwargs": ["enable_thinking"]}, "maps names to values"),
        ({"reasoning_max_tokens": -1}, "from 0 up, or None, got -1"),
        ({"reasoning_max_tokens": 2.5}, "got 2.5"),
        ({"reasoning_format": "html"}, "auto, deepseek, none, got 'html'"),
    ],
)
def test_wrong_wishes_are_refused(vl: Llama, options: dict, match: str) -> None:
    with pytest.raises(errors.InputError, match=match):
        vl.create_chat_completion(ASK, **options)


def test_thoughts_stay_in_the_content_when_asked_for(vl: Llama, vl_thinking: Llama) -> None:
    texts = whole(vl, enable_thinking=True, reasoning_format="none")[0]
    assert texts["content"] == "<think>" + THINKING_SCRIPT and "reasoning_content" not in texts
    assert streamed(vl, enable_thinking=True, reasoning_format="none")[0] == texts
    for read in (whole, streamed):
        assert read(vl, reasoning_format="none")[0] == {"role": "assistant", "content": PLAIN_ANSWER}
    raw = whole(vl_thinking, reasoning_format="none")[0]["content"]
    assert raw == "<think>\nwell\n</think>\n\nfour"
    raw = whole(vl_thinking, reasoning_format="none", enable_thinking=False)[0]["content"]
    assert raw == "well\n</think>\n\nfour"  # what the model wrote, without the prompt's empty thought


@pytest.mark.parametrize("think", [False, True])
def test_cut_after_any_byte_streamed_and_whole_agree(vl: Llama, think: bool) -> None:
    full, _, usage = whole(vl, enable_thinking=think)
    n_tokens = usage["completion_tokens"]
    script = THINKING_SCRIPT.replace("</think>", "\0") if think else PLAIN_ANSWER  # the mark is one token
    assert n_tokens == len(script.encode()) + 1
    for n in range(1, n_tokens + 1):
        texts, reason, usage = whole(vl, enable_thinking=think, max_tokens=n)
        assert (texts, reason, usage) == streamed(vl, enable_thinking=think, max_tokens=n)[:3]
        assert usage["completion_tokens"] == n and reason == ("stop" if n == n_tokens else "length")
        for key, text in texts.items():
            assert full[key].startswith(text) and "\ufffd" not in text, (n, key, text)
        assert texts.get("content") is None or texts.get("reasoning_content") == full.get("reasoning_content")


def test_noise_and_stop_words_come_whole_and_streamed_alike() -> None:
    noise = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "cache_prompt": False}
    with Llama(gguf("dense"), **OPTIONS, chat_template=chat_templates.VL) as llm:
        for seed in range(8):
            for stop, n, think in itertools.product((None, "ent", "\n\n\n"), (15, 30), (False, True)):
                options = {**noise, "seed": seed, "stop": stop, "max_tokens": n, "enable_thinking": think}
                assert whole(llm, **options) == streamed(llm, **options)[:3], options


def test_a_stream_dropped_after_any_chunk_holds_whole_characters_and_no_half_mark(vl: Llama) -> None:
    full, _, _, chunks = streamed(vl, enable_thinking=True)
    assert full == {"role": "assistant", "content": ANSWER, "reasoning_content": THOUGHTS}
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant" and len(chunks) > 20
    for n in range(1, len(chunks) + 1):
        texts = add_up(chunks[:n])
        for key, text in texts.items():
            assert full[key].startswith(text)
            text.encode()  # no lone surrogates either
        if "content" in texts:
            assert texts["reasoning_content"] == THOUGHTS


def test_pieces_of_the_engine_cut_at_any_byte_give_the_same_chunks(vl: Llama) -> None:
    class Pieces:
        def __init__(self, data: bytes, size: int) -> None:
            self.data, self.size, self.closed = data, size, False

        def next(self) -> bytes | None:
            piece, self.data = self.data[: self.size], self.data[self.size :]
            return piece or None

        def close(self) -> None:
            self.closed = True

    chunks = streamed(vl, enable_thinking=True)[3]
    data = b"".join(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode() for chunk in chunks)
    for size in (1, 2, 3, 7, 1000):
        pieces = Pieces(data + b"data: [DONE]\n\n", size)
        assert list(engine.chunks(pieces, lambda: False)) == chunks and pieces.closed
    for n in range(0, len(data), 101):  # broken off anywhere: whole events or nothing
        got = list(engine.chunks(Pieces(data[:n], 64), lambda: False))
        assert got == chunks[: len(got)] and len(got) == data[:n].count(b"\n\n")


def test_closing_a_stream_in_a_thought_frees_the_model_at_once(vl: Llama) -> None:
    endless = "ab" * 400
    with model("endless", chat_templates.VL, {"<think>": endless}) as llm:
        for n in (1, 2, 5):
            stream = llm.create_chat_completion(ASK, enable_thinking=True, temperature=0, stream=True)
            thoughts = [next(stream)["choices"][0]["delta"].get("reasoning_content") or "" for _ in range(n)]
            assert endless.startswith("".join(thoughts))
            stream.close()
            start = time.monotonic()
            assert whole(llm, max_tokens=1)[2]["completion_tokens"] == 1  # waits for the only slot
            assert time.monotonic() - start < 1.0
        unread = llm.create_chat_completion(ASK, enable_thinking=True, temperature=0, stream=True)
        unread.close()
        assert whole(llm, max_tokens=1)[2]["completion_tokens"] == 1


def test_a_budget_ends_the_thought_and_the_answer_follows() -> None:
    thoughts = "one two three four five"
    with model("budget", chat_templates.VL, {"<think>": f"{thoughts}\n</think>\n\nfour"}) as llm:
        for n in (0, 1, 2, 7, len(thoughts)):
            options = {"enable_thinking": True, "reasoning_max_tokens": n}
            texts, reason, usage = whole(llm, **options)
            assert (texts.get("reasoning_content", ""), texts["content"], reason) == (
                thoughts[:n].rstrip("\n"),
                "four",
                "stop",
            )
            assert usage["completion_tokens"] == n + len(["</think>"]) + len("\n\nfour") + len(["</s>"])
            assert (texts, reason, usage) == streamed(llm, **options)[:3]
        for n in (100, None):
            assert whole(llm, enable_thinking=True, reasoning_max_tokens=n)[0]["reasoning_content"] == thoughts
        texts, reason, usage = whole(llm, enable_thinking=True, reasoning_max_tokens=8, max_tokens=5)
        assert (texts.get("content"), texts["reasoning_content"], reason) == (None, thoughts[:5], "length")
        assert whole(llm, reasoning_max_tokens=3, max_tokens=4)[2]["completion_tokens"] <= 4  # no thought to limit


def test_a_budget_never_cuts_a_character(vl: Llama) -> None:
    for n in range(20):
        texts = whole(vl, enable_thinking=True, reasoning_max_tokens=n)[0]
        assert texts["content"] == ANSWER and THOUGHTS.startswith(texts.get("reasoning_content", ""))


def test_a_budget_of_the_text_model_closes_the_thought_on_its_own_line(text_thinking: Llama) -> None:
    texts = whole(text_thinking, reasoning_max_tokens=2)[0]
    assert texts == {"role": "assistant", "content": "four\n\nor five", "reasoning_content": "we"}
    raw = whole(text_thinking, reasoning_max_tokens=2, reasoning_format="none")[0]["content"]
    assert raw.startswith("<think>\nwe\n</think>\n\n\n<response>\nfour")


def test_earlier_thoughts_are_shown_as_the_template_says(vl: Llama, text_thinking: Llama) -> None:
    past = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Uno.", "reasoning_content": "Count.\n"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "<think>Again.</think>\n\nDos.", "tool_calls": None, "refusal": None},
        {"role": "user", "content": "Three?"},
    ]
    assert vl.apply_template(past) == (
        "<|begin_of_sentence|>Be brief.\nUser: One?\nAssistant: <think>\nCount.\n</think>\nUno.<|end_of_sentence|>"
        "User: Two?\nAssistant: <think>\nAgain.\n</think>\nDos.<|end_of_sentence|>"
        "User: Three?\nAssistant: <think>\n\n</think>\n\n"
    )
    del past[3:5]
    assert text_thinking.apply_template(past) == (
        "<|im_start|>system\n<system_setting>\nBe brief.\n</system_setting>\n\n"
        "<global_setting>\nthink_mode=True\n</global_setting><|im_end|>\n\n"
        "<|im_start|>user\nOne?<|im_end|>\n\n"
        "<|im_start|>assistant\n<think>\nCount.\n</think>\n\n\n<response>\nUno.\n</response>\n<|im_end|>\n\n"
        "<|im_start|>user\nThree?<|im_end|>\n\n<|im_start|>assistant\n<think>\n"
    )


def test_an_answer_put_back_into_the_conversation_gives_the_prompt_it_came_from(vl: Llama) -> None:
    message = vl.create_chat_completion(ASK, enable_thinking=True, temperature=0)["choices"][0]["message"]
    prompt = vl.apply_template([*ASK, message, {"role": "user", "content": "And?"}])
    assert f"<think>\n{THOUGHTS}\n</think>\n{ANSWER}<|end_of_sentence|>User: And?" in prompt


def test_a_model_without_a_template_says_so_and_takes_one() -> None:
    path = scripted_model.write(folder() / "scripted-base.gguf", {"\u2581": "fine"}, None)
    with Llama(path, **OPTIONS) as llm:
        for call in (llm.create_chat_completion, llm.apply_template):
            with pytest.raises(errors.ChatTemplateError, match=r"scripted-base\.gguf has no chat template"):
                call(ASK)
        assert llm.create_completion("Hi ", max_tokens=4, temperature=0)["choices"][0]["text"] == "fine"
    with Llama(path, **OPTIONS, chat_template="{{ messages[0].content + ' ' }}") as llm:
        assert whole(llm)[0]["content"] == "fine"
