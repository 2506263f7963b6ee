"""How often `ernie-4.5-vl-tiny` answers right, on fresh pictures of the shapes world.

    python bench/tiny_accuracy.py                    (transformers)
    python bench/tiny_accuracy.py --runtime          (also pyllamaernie.Llama, and how often both agree)

Answers are greedy and count only when the whole text equals the true answer. The pictures' seed starts far from any
that training used. Needs torch and transformers; the pictures go through transformers' own image processor.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from paths import ROOT

import numpy as np
import shapes_world as world
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoTokenizer, Ernie4_5_VLMoeForConditionalGeneration
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil

SORTS = ("what", "many", "colour", "where", "there")
SEED = 3_000_000_000


@dataclass(frozen=True)
class Case:
    """One question with its media and true answer."""

    sort: str
    question: str
    answer: str
    images: tuple[Image.Image, ...] = ()
    frames: tuple[Image.Image, ...] = ()
    thinking: bool = False


def picture_case(rng: random.Random, sort: str, thinking: bool = False) -> Case:
    while True:
        scene = world.random_scene(rng)
        asked = world.ask(scene, sort, rng)
        if asked:
            return Case("thinking" if thinking else sort, *asked, images=(world.draw_scene(scene),), thinking=thinking)


def cases(n_pictures: int, n_other: int, seed: int) -> list[Case]:
    """Return `n_pictures` questions drawn evenly over the five sorts, and `n_other` of each further mode."""
    rng = random.Random(seed)
    out = [picture_case(rng, rng.choice(SORTS)) for _ in range(n_pictures)]
    for _ in range(n_other):
        scenes = world.random_pair(rng)
        pictures = tuple(world.draw_scene(scene) for scene in scenes)
        out.append(Case("two pictures", *world.ask_pair(scenes), images=pictures))
        clip = world.random_clip(rng, 16)
        out.append(Case("video", *world.ask_clip(clip), frames=tuple(world.draw_clip(clip))))
        out.append(picture_case(rng, rng.choice(SORTS), thinking=True))
    return out


class Reference:
    """The checkpoint run by transformers on CPU in float32."""

    def __init__(self, folder: Path):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.images = Ernie4_5_VLMoeImageProcessorPil.from_pretrained(folder)
        settings = json.loads((folder / "video_preprocessor_config.json").read_text())
        self.frames = Ernie4_5_VLMoeImageProcessorPil(size=settings["size"])

    def inputs(self, case: Case) -> dict[str, torch.Tensor]:
        """Return what the reference processor would hand to the model."""
        content = [{"type": "image"}] * len(case.images) + [{"type": "video"}] * bool(case.frames)
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": case.question}]}]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=case.thinking
        )
        config, tensors = self.model.config, {}
        slots = {config.image_token_id: [], config.video_token_id: []}
        if case.images:
            done = self.images([image.convert("RGB") for image in case.images], return_tensors="pt")
            tensors |= dict(pixel_values=done["pixel_values"], image_grid_thw=done["image_grid_thw"])
            slots[config.image_token_id] = [int(grid.prod()) // 4 for grid in done["image_grid_thw"]]
        if case.frames:
            frames = list(case.frames) + [case.frames[-1]] * (len(case.frames) % 2)
            done = self.frames([frame.convert("RGB") for frame in frames], return_tensors="pt")
            grid = done["image_grid_thw"][:1].clone()
            grid[0, 0] = len(frames)
            tensors |= dict(pixel_values_videos=done["pixel_values"], video_grid_thw=grid)
            slots[config.video_token_id] = [int(grid.prod()) // 8]
        ids: list[int] = []
        for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]:
            ids += [token] * (slots[token].pop(0) if token in slots else 1)
        array = np.array([ids])
        types = (array == config.image_token_id) * 1 + (array == config.video_token_id) * 2
        moe = types.copy()
        moe[(array == config.image_start_token_id) | (array == config.image_end_token_id)] = 1
        moe[(array == config.video_start_token_id) | (array == config.video_end_token_id)] = 2
        input_ids = torch.from_numpy(array)
        return tensors | dict(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            mm_token_type_ids=torch.from_numpy(types),
            moe_mm_token_type_ids=torch.from_numpy(moe),
        )

    @torch.no_grad()
    def answer(self, case: Case) -> str:
        inputs = self.inputs(case)
        out = self.model.generate(**inputs, max_new_tokens=160, do_sample=False, eos_token_id=2, pad_token_id=0)
        return self.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class Runtime:
    """The same model run by pyllamaernie."""

    def __init__(self, model: Path | None):
        from pyllamaernie import Llama

        self.llama = Llama(str(model) if model else None)

    def answer(self, case: Case) -> str:
        content: list[dict[str, object]] = [{"type": "image", "image": image} for image in case.images]
        if case.frames:
            content.append({"type": "video", "video": list(case.frames)})
        content.append({"type": "text", "text": case.question})
        reply = self.llama.create_chat_completion(
            [{"role": "user", "content": content}], temperature=0, max_tokens=160, enable_thinking=case.thinking
        )
        return reply["choices"][0]["message"]["content"] or ""


def final(answer: str) -> str:
    """Return the answer after the thoughts, if there are any."""
    return answer.split("</think>")[-1].strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "ernie-4.5-vl-tiny", help="checkpoint folder")
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument(
        "--others", type=int, default=100, help="questions of each further mode: two pictures, video, thinking"
    )
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--runtime", action="store_true", help="answer with pyllamaernie too")
    parser.add_argument("--gguf", type=Path, help="GGUF for --runtime (default: the embedded model)")
    parser.add_argument("--json", type=Path, help="write the figures and every wrong or differing answer here")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a model this small only waits for a second one
    answerers: dict[str, Callable[[Case], str]] = {"transformers": Reference(args.model).answer}
    if args.runtime:
        answerers["pyllamaernie"] = Runtime(args.gguf).answer
    counts: dict[str, dict[str, int]] = {}
    misses = []
    start = time.time()
    for case in tqdm(cases(args.pictures, args.others, args.seed), unit="question"):
        said = {name: final(answer(case)) for name, answer in answerers.items()}
        row = counts.setdefault(
            case.sort, {"questions": 0, "compared": 0, "equal": 0} | {name: 0 for name in answerers}
        )
        row["questions"] += 1
        for name, text in said.items():
            row[name] += text == case.answer
        if len(said) == 2:
            row["compared"] += 1
            row["equal"] += len(set(said.values())) == 1
        if set(said.values()) != {case.answer}:
            misses.append({"sort": case.sort, "question": case.question, "answer": case.answer, "said": said})
    single = [counts[sort] for sort in SORTS if sort in counts]
    total = {key: sum(row[key] for row in single) for key in single[0]} if single else {}
    print(
        f"{'':14}{'questions':>10}"
        + "".join(f"{name:>14}" for name in answerers)
        + (f"{'equal':>9}" if args.runtime else "")
    )
    for name, row in [
        *((sort, counts[sort]) for sort in SORTS if sort in counts),
        ("one picture", total),
        *((k, v) for k, v in counts.items() if k not in SORTS),
    ]:
        if not row:
            continue
        line = f"{name:14}{row['questions']:>10}" + "".join(f"{row[a] / row['questions']:>14.1%}" for a in answerers)
        print(line + (f"{row['equal'] / row['compared']:>9.1%}" if row["compared"] else ""))
    print(f"seed {args.seed}, {time.time() - start:.0f} s")
    if args.json:
        args.json.write_text(
            json.dumps({"seed": args.seed, "counts": counts, "one picture": total, "misses": misses}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
