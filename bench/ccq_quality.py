"""Quality at equal bytes: `python bench/ccq_quality.py [--model pictures|text|both] [--types CCQ2,IQ2_XS] [--write]`.

Every matrix of the layers but the routers in one type, embeddings and output as they were, the same importance matrix
for all types; mean KL to the F16 file. *pictures*: the embedded model, importance from pictures of the shapes world, KL
and exact answers on others that the F16 file answers right. *text*: the trained text MoE (bench/text_moe.py), whose
calibration and test texts have no document in common. Finished files are kept. Bars: CCQ2 keeps 85 % of the exact
answers and more than IQ2_XXS; its KL on text is below IQ2_XS's. Needs the package; torch where no text MoE is cached.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from paths import ROOT

import page
import shapes_world as world
from text_moe import CACHE, cached
from tqdm import tqdm

from pyllamaernie import Llama
from pyllamaernie.compare.comparison import compare
from pyllamaernie.compare.table import Compared, ComparisonTable
from pyllamaernie.convert import convert
from pyllamaernie.quant.imatrix import compute_imatrix
from pyllamaernie.quant.importance import read_importance
from pyllamaernie.quant.source import gguf_source
from pyllamaernie.quant.writer import write_quantized

TYPES = ("IQ2_XXS", "CCQ2", "IQ2_XS", "CCQ2_25", "IQ2_S", "CCQ2_5", "Q2_K", "CCQ2_75", "IQ3_XXS")
SORTS = ("what", "many", "colour", "where", "there")
SEED_IMPORTANCE, SEED_TEST = 4_000_000_000, 5_000_000_000  # far from any that training used
N_IMPORTANCE, N_CALIBRATION = 150, 60  # pictures, chunks
KEPT_LEAST = 0.85
PAGE = ROOT / "docs" / "ccq.md"


def questions(n: int, seed: int) -> list[tuple[object, str, str]]:
    """(picture, question, true answer) of `n` fresh scenes, the five sorts of question evenly."""
    rng, out = random.Random(seed), []
    while len(out) < n:
        scene = world.random_scene(rng)
        asked = world.ask(scene, SORTS[len(out) % len(SORTS)], rng)
        if asked:
            out.append((world.draw_scene(scene), *asked))
    return out


def answered_right(model: Path, asked: list[tuple[object, str, str]]) -> list[tuple[object, str]]:
    """The pictures and questions that the model answers in exactly the true words."""
    right = []
    with Llama(str(model)) as llama:
        for picture, question, answer in tqdm(asked, desc="F16 answers", unit="picture"):
            content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
            reply = llama.create_chat_completion(
                [{"role": "user", "content": content}], temperature=0, max_tokens=40, enable_thinking=False
            )
            if (reply["choices"][0]["message"]["content"] or "").strip() == answer:
                right.append((picture, question))
    return right


def make_files(model: Path, imatrix: Path, types: list[str], work: Path) -> list[Path]:
    """The model in each type; what exists is not made again."""
    source, importance = gguf_source(model), read_importance(imatrix)
    chosen = [w for w in source.weights if w.name.startswith("blk.") and len(w.shape) > 1 and w.n_rows > 1]
    chosen = [w.name for w in chosen if "_inp" not in w.name and "exp_probs" not in w.name and w.n_cols % 256 == 0]
    out = []
    for name in types:
        path = work / f"{model.stem}-{name}.gguf"
        if not path.exists():
            print(f"writing {path.name}", flush=True)
            write_quantized(source, dict.fromkeys(chosen, name), path, importance=importance, n_threads=1)
        out.append(path)
    return out


def picture_table(work: Path, types: list[str], n: int) -> tuple[list[Path], ComparisonTable, int]:
    model, imatrix = work / "ernie-4.5-vl-tiny.gguf", work / "ernie-4.5-vl-tiny.imatrix.gguf"
    if not model.exists():
        convert(ROOT / "models" / "ernie-4.5-vl-tiny", model, type="f16")
    mmproj = next(path for path in sorted(work.glob("mmproj*ernie-4.5-vl-tiny*.gguf")))
    if not imatrix.exists():
        asked = [(picture, question) for picture, question, _ in questions(N_IMPORTANCE, SEED_IMPORTANCE)]
        compute_imatrix(model, None, imatrix, pictures=asked, mmproj=mmproj, n_threads=1, progress=True)
    paths = make_files(model, imatrix, types, work)
    right = answered_right(model, questions(n, SEED_TEST))
    found = compare([model, *paths], None, images=right, mmproj=mmproj, n_threads=1, speed_runs=0, progress=True)
    return paths, found, n


def text_table(folder: Path, work: Path, types: list[str], n_chunks: int) -> tuple[list[Path], ComparisonTable, int]:
    model, imatrix = folder / "text-moe-f16.gguf", work / "text-moe.imatrix.gguf"
    if not imatrix.exists():
        text = folder / "calibration.txt"
        compute_imatrix(model, text, imatrix, n_chunks=N_CALIBRATION, n_threads=1, progress=True)
    paths = make_files(model, imatrix, types, work)
    found = compare([model, *paths], folder / "test.txt", n_chunks=n_chunks, n_threads=1, speed_runs=0, progress=True)
    return paths, found, n_chunks


def lines_of(found: ComparisonTable, types: list[str], pictures: bool) -> list[str]:
    last = "exact answers kept" if pictures else "perplexity"
    lines = [f"| type | bytes of the file | bpw of the file | mean KL [95 %] | same top | {last} |", "|---" * 6 + "|"]
    for name, row in zip(["F16", *types], found.models, strict=True):
        kl = row.pictures if pictures else row.text
        assert kl is not None
        inner = "" if kl.interval is None else f" [{kl.interval[0]:.4f}, {kl.interval[1]:.4f}]"
        end = f"{row.same_answers:.1%}" if pictures else f"{row.perplexity:.3f}"
        shown = f"**{name}**" if "CCQ" in name else name
        cells = [shown, row.size_bytes, f"{row.bpw:.3f}", f"{kl.mean:.4f}{inner}", f"{kl.same_top:.1%}", end]
        lines.append(page.line(cells))
    return lines


def bars(found: ComparisonTable, types: list[str], pictures: bool) -> list[str]:
    """Which bars are met, as far as the types for them were run."""
    of: dict[str, tuple[int, Compared]] = {name: (i + 1, found.models[i + 1]) for i, name in enumerate(types)}
    out = []
    if pictures and "CCQ2" in of:
        kept = of["CCQ2"][1].same_answers or 0.0
        is_met = kept >= KEPT_LEAST
        out.append(f"CCQ2 keeps {kept:.1%} of the exact answers, bar {KEPT_LEAST:.0%}: {'met' if is_met else 'MISSED'}")
        if "IQ2_XXS" in of:
            other = of["IQ2_XXS"][1].same_answers or 0.0
            out.append(f"more than IQ2_XXS, which keeps {other:.1%}: {'met' if kept > other else 'MISSED'}")
    for other in ("IQ2_XXS", "IQ2_XS", "IQ2_S"):
        if "CCQ2" in of and other in of:
            ratio, interval = found.kl_ratio(of["CCQ2"][0], of[other][0], pictures=pictures)
            inner = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
            verdict = "" if other == "IQ2_S" else ": met" if ratio < 1 else ": MISSED"
            out.append(f"KL of CCQ2 over that of {other}: {ratio:.2f}{inner}{verdict}")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("pictures", "text", "both"), default="both")
    parser.add_argument("--text-moe", type=Path, help="folder that bench/text_moe.py made (default: its cache)")
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--pictures", type=int, default=200, help="fresh pictures; those answered right count")
    parser.add_argument("--chunks", type=int, default=48, help="of 512 tokens of the test text")
    parser.add_argument("--work", type=Path, default=CACHE / "ccq-quality", help="where files are kept")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/ccq.md")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    types = args.types.upper().split(",")
    shown: list[str] = []
    if args.model in ("pictures", "both"):
        _, found, n = picture_table(args.work, types, args.pictures)
        shown += [f"The embedded model, {n} fresh pictures, {found.n_pictures} of them answered right in F16:", ""]
        shown += [*lines_of(found, types, True), ""]
        print("\n".join([*shown, *bars(found, types, True)]), flush=True)
    if args.model in ("text", "both"):
        _, found, n = text_table(args.text_moe or cached(), args.work, types, args.chunks)
        part = [f"The text MoE, {n} chunks of 512 tokens of unseen text:", "", *lines_of(found, types, False), ""]
        print("\n".join([*part, *bars(found, types, False)]), flush=True)
        shown += part
    if args.write:
        page.write(PAGE, "quality", shown)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
