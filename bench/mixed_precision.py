"""Planned files against stock presets of the same size: `python bench/mixed_precision.py [--write]`.

For each preset: the trained text MoE (bench/text_moe.py) by llama-quantize, and by our plan for exactly that many
bytes, with the same importance matrix. The plan sees the calibration and the selection text; both files are then run
once on the test text, and the mean KL to the F16 model of one over that of the other is printed with its 95 % interval
(whole chunks drawn anew, the same for both). Bars: 0.70 up to 3.2 bits per weight, 0.80 up to 5, 0.95 above. Finished
files and plans are kept, so the bench goes on where it was stopped. Needs the package, and torch where no model is
cached.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paths import ROOT

import page
import text_moe

from pyllamaernie import programs
from pyllamaernie.compare.comparison import compare
from pyllamaernie.plan.measure import DOMINATED, SLOW_TYPES
from pyllamaernie.plan.planner import ModelPlan, Planner
from pyllamaernie.quant.imatrix import compute_imatrix
from pyllamaernie.quant.importance import read_importance
from pyllamaernie.quant.native import TYPES
from pyllamaernie.quant.source import gguf_source
from pyllamaernie.quant.writer import write_quantized

PRESETS = ("IQ1_M", "IQ2_XXS", "IQ2_M", "Q2_K", "IQ3_XXS", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M")
BARS = ((3.2, 0.70), (5.0, 0.80), (math.inf, 0.95))
N_CALIBRATION = 120  # chunks of 512 tokens
PAGE = ROOT / "docs" / "quantize.md"
HEAD = (
    "preset", "bpw", "bytes", "unused", "its KL", "our KL", "ratio [95 %]", "bar", "plan is",
    "on the selection text: first plan, predicted", "measured", "best plan",
)  # fmt: skip


def bar_of(bpw: float) -> float:
    return next(bar for limit, bar in BARS if bpw <= limit)


def make_files(
    folder: Path, work: Path, preset: str, n_threads: int, planner: Callable[[], Planner]
) -> tuple[Path, Path, ModelPlan]:
    """The stock file, ours and the plan; what exists is not made again."""
    model, imatrix = folder / "text-moe-f16.gguf", work / "imatrix.gguf"
    stock, ours = work / f"stock-{preset}.gguf", work / f"ours-{preset}.gguf"
    path = work / f"ours-{preset}.plan.json"
    if not stock.exists():
        fresh = stock.with_suffix(".new")
        programs.run("llama-quantize", ["--imatrix", imatrix, model, fresh, preset, n_threads], capture=True)
        fresh.rename(stock)
    if not path.exists():
        path.write_text(planner().plan(stock.stat().st_size).to_json(), encoding="utf-8")
    plan = ModelPlan.from_json(path.read_text(encoding="utf-8"))
    if not ours.exists():
        importance = read_importance(imatrix)
        write_quantized(gguf_source(model), plan.types, ours, importance=importance, n_threads=n_threads)
    if ours.stat().st_size > stock.stat().st_size:
        raise SystemExit(f"{ours} has {ours.stat().st_size} bytes, more than the {stock.stat().st_size} of {stock}")
    return stock, ours, plan


def figures(folder: Path, stock: Path, ours: Path, plan: ModelPlan, n_chunks: int, n_threads: int) -> dict[str, Any]:
    """KL of both files on the test text and the ratio, for one preset."""
    options = {"n_chunks": n_chunks, "n_threads": n_threads, "speed_runs": 0, "progress": True}
    found = compare([folder / "text-moe-f16.gguf", stock, ours], folder / "test.txt", **options)
    ratio, interval = found.kl_ratio(2, 1)
    assert interval is not None
    first = plan.runs[0] if plan.runs else (None, None)
    return {
        "n_chunks": found.n_chunks,
        "stock": asdict(found.models[1]),
        "ours": asdict(found.models[2]),
        "ratio": ratio,
        "interval": interval,
        "plan": plan.source,
        "first_predicted": first[0],
        "first_measured": first[1],
        "best_measured": plan.kl_measured,
    }


def row(preset: str, r: dict[str, Any]) -> tuple[str, bool]:
    """A line of the table, and whether the bar is met."""
    theirs, mine = r["stock"], r["ours"]
    bar, (low, high) = bar_of(theirs["bpw"]), r["interval"]
    is_met = high <= bar
    unused = 1 - mine["size_bytes"] / theirs["size_bytes"]
    selection = (r[k] for k in ("first_predicted", "first_measured", "best_measured"))
    cells = [
        preset, f"{theirs['bpw']:.3f}", theirs["size_bytes"], f"{unused:.3%}",
        f"{theirs['text']['mean']:.5f}", f"{mine['text']['mean']:.5f}",
        f"**{r['ratio']:.3f}** [{low:.3f}, {high:.3f}]", f"{bar:.2f} {'met' if is_met else 'missed'}", r["plan"],
        *("-" if kl is None else f"{kl:.4f}" for kl in selection),
    ]  # fmt: skip
    return page.line(cells), is_met


def print_priors(plan: ModelPlan) -> None:
    """Medians of the probed curves by role, over those of the routed gates, for PRIORS of plan/table.py."""
    by_role: dict[str, list[float]] = {}
    for label, curve in plan.curves.items():
        by_role.setdefault(label.split(",")[0], []).append(curve.loss(0.01) / 0.01)
    unit = statistics.median(by_role["ffn_gate_exps"])
    for role, values in sorted(by_role.items()):
        print(f'    "{role}": {statistics.median(values) / unit:.2g},')


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder that bench/text_moe.py made (default: its cache)")
    parser.add_argument("--work", type=Path, help="where files and plans are kept (default: beside the model)")
    parser.add_argument("--presets", default=",".join(PRESETS), help="only these, such as IQ2_M,Q4_K_M")
    parser.add_argument("--chunks", type=int, default=64, help="of 512 tokens of the test text")
    parser.add_argument("--probe", default="groups", choices=("none", "groups", "each"))
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--stock-types", action="store_true", help="plan without the CCQ types, for any llama.cpp")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--priors", metavar="PLAN", type=Path, help="only print what this plan's probes say by role")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--write", action="store_true", help="put the table into docs/quantize.md")
    return parser.parse_args()


def measured(folder: Path, work: Path, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The figures of each preset, printed as they come; those of an earlier run are read from `work`."""
    model, imatrix = folder / "text-moe-f16.gguf", work / "imatrix.gguf"
    if not imatrix.exists():
        text = folder / "calibration.txt"
        compute_imatrix(model, text, imatrix, n_chunks=N_CALIBRATION, n_threads=args.threads, progress=True)
    unwanted = {*DOMINATED, "F32", *(SLOW_TYPES if args.stock_types else ())}
    options = {"probe": args.probe, "n_trials": args.trials, "n_threads": args.threads}
    options["types"] = [t for t in TYPES if t not in unwanted]
    results = {}
    with ExitStack() as stack:

        @functools.cache
        def planner() -> Planner:
            text = folder / "selection.txt"
            return stack.enter_context(
                Planner(model, importance=imatrix, text=text, cache=work, progress=True, **options)
            )

        for preset in args.presets.split(","):
            path = work / f"{preset}.json"
            if not path.exists():
                files = make_files(folder, work, preset, args.threads, planner)
                found = figures(folder, *files, args.chunks, args.threads)
                path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            results[preset] = json.loads(path.read_text(encoding="utf-8"))
            print(row(preset, results[preset])[0], flush=True)
    return results


def main() -> int:
    args = arguments()
    if args.priors is not None:
        print_priors(ModelPlan.from_json(args.priors.read_text(encoding="utf-8")))
        return 0
    folder = args.model or text_moe.cached()
    work = args.work or folder / "mixed-precision"
    work.mkdir(exist_ok=True)
    results = measured(folder, work, args)
    rows = [row(preset, figures_of) for preset, figures_of in results.items()]
    lines = [page.line(HEAD), "|---" * len(HEAD) + "|", *(line for line, _ in rows)]
    print("\n".join(lines))
    n_chunks, n_met = sorted({r["n_chunks"] for r in results.values()}), sum(is_met for _, is_met in rows)
    print(f"{n_met} of {len(rows)} bars met; chunks of the test text: {n_chunks}")
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if args.write:
        page.write(PAGE, "equal bytes", lines)
    return 0 if n_met == len(rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
