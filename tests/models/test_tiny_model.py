"""The embedded model on pictures and clips that it never saw; `bench/tiny_accuracy.py` measures it on many more."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import shapes_world as world  # noqa: E402

pytest.importorskip("pyllamaernie._core", reason="the native module is not built")
from pyllamaernie import Llama  # noqa: E402

SEED = 4_000_000_000  # far from the seeds of training and of the bench
SORTS = ("what", "many", "colour", "where", "there")


@pytest.fixture(scope="module")
def tiny() -> Iterator[Llama]:
    with Llama(n_ctx=4096, n_threads=1) as llm:  # a model this small only waits for a second thread
        yield llm


def answer(llm: Llama, question: str, *media: dict, **options: object) -> str:
    messages = [{"role": "user", "content": [*media, {"type": "text", "text": question}]}]
    return llm.create_chat_completion(messages, temperature=0, max_tokens=96, **options)["choices"][0]["message"][
        "content"
    ]


def share_right(n: int, ask: Callable[[random.Random], tuple[str, str]]) -> float:
    """The share of n cases whose answer, the first of the pair, equals the truth."""
    rng = random.Random(SEED)
    return sum(said == truth for said, truth in (ask(rng) for _ in range(n))) / n


def test_it_answers_questions_about_a_fresh_picture(tiny: Llama) -> None:
    def ask(rng: random.Random) -> tuple[str, str]:
        asked = None
        while asked is None:
            scene = world.random_scene(rng)
            asked = world.ask(scene, rng.choice(SORTS), rng)
        return answer(tiny, asked[0], {"type": "image", "image": world.draw_scene(scene)}), asked[1]

    assert share_right(50, ask) >= 0.9


def test_it_tells_which_of_two_pictures_has_more_shapes(tiny: Llama) -> None:
    def ask(rng: random.Random) -> tuple[str, str]:
        scenes = world.random_pair(rng)
        question, truth = world.ask_pair(scenes)
        return answer(tiny, question, *({"type": "image", "image": world.draw_scene(s)} for s in scenes)), truth

    assert share_right(20, ask) >= 0.9


def test_it_tells_which_way_a_shape_moves(tiny: Llama) -> None:
    def ask(rng: random.Random) -> tuple[str, str]:
        clip = world.random_clip(rng, 16, world.random_canvas(rng, 140, 168))
        question, truth = world.ask_clip(clip)
        return answer(tiny, question, {"type": "video", "video": world.draw_clip(clip)}), truth

    assert share_right(20, ask) >= 0.9


def test_it_thinks_only_when_asked_and_then_describes_the_picture_first(tiny: Llama) -> None:
    scene = world.random_scene(random.Random(SEED), 2)
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": world.draw_scene(scene)},
                {"type": "text", "text": world.QUESTION_MANY},
            ],
        }
    ]
    plain = tiny.create_chat_completion(messages, temperature=0)["choices"][0]["message"]
    thought = tiny.create_chat_completion(messages, temperature=0, enable_thinking=True)["choices"][0]["message"]
    assert plain["content"] == thought["content"] == "two"
    assert not plain.get("reasoning_content")
    assert thought["reasoning_content"].strip() == world.describe(scene)


def test_it_answers_the_readme(tiny: Llama) -> None:
    truths = json.loads((ROOT / "examples/shapes.json").read_text())["answers"]
    said = [
        answer(tiny, row["question"], {"type": "image", "image": ROOT / "examples/shapes.png"}) for row in truths[:8]
    ]
    assert said == [row["answer"] for row in truths[:8]]


@pytest.mark.reference
@pytest.mark.slow
def test_it_answers_as_transformers_does() -> None:
    sys.path.insert(0, str(ROOT / "bench"))
    import tiny_accuracy  # torch is optional

    reference = tiny_accuracy.Reference(ROOT / "models/ernie-4.5-vl-tiny")
    runtime = tiny_accuracy.Runtime(None)
    cases = tiny_accuracy.cases(60, 10, SEED)
    differing = [case for case in cases if reference.answer(case).split("</think>")[-1].strip() != runtime.answer(case)]
    assert len(differing) <= 1, [case.question for case in differing]
