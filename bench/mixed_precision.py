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
import json
import math
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from pyllamaernie import programs  # noqa: E402
from pyllamaernie.compare import compare  # noqa: E402
from pyllamaernie.imatrix import compute_imatrix  # noqa: E402
from pyllamaernie.quant.importance import read_importance  # noqa: E402
from pyllamaernie.quant.plan import ModelPlan, Planner  # noqa: E402
from pyllamaernie.quant.source import gguf_source  # noqa: E402
from pyllamaernie.quant.writer import write_quantized  # noqa: E402

PRESETS = ("IQ1_M", "IQ2_XXS", "IQ2_M", "Q2_K", "IQ3_XXS", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M")
BARS = ((3.2, 0.70), (5.0, 0.80), (math.inf, 0.95))
N_CALIBRATION = 120  # chunks of 512 tokens
PAGE = ROOT / "docs" / "quantize.md"
MARKS = ("<!-- equal bytes: begin -->", "<!-- equal bytes: end -->")


def bar_of(bpw: float) -> float:
    return next(bar for limit, bar in BARS if bpw <= limit)


def make_files(folder: Path, work: Path, presets: list[str], options: dict) -> dict[str, tuple[Path, Path, ModelPlan]]:
    """For each preset the stock file, ours and the plan; what exists is not made again."""
    model, imatrix = folder / "text-moe-f16.gguf", work / "imatrix.gguf"
    threads = options["n_threads"]
    if not imatrix.exists():
        compute_imatrix(
            model, folder / "calibration.txt", imatrix, n_chunks=N_CALIBRATION, n_threads=threads, progress=True
        )
    out = {}
    planner = None
    for preset in presets:
        stock, ours, path = (
            work / f"stock-{preset}.gguf",
            work / f"ours-{preset}.gguf",
            work / f"ours-{preset}.plan.json",
        )
        if not stock.exists():
            fresh = stock.with_suffix(".new")
            programs.run("llama-quantize", ["--imatrix", imatrix, model, fresh, preset, threads], capture=True)
            fresh.rename(stock)
        if not path.exists():
            planner = planner or Planner(
                model, importance=imatrix, text=folder / "selection.txt", cache=work, progress=True, **options
            )
            plan = planner.plan(stock.stat().st_size)
            path.write_text(plan.to_json(), encoding="utf-8")
        plan = ModelPlan.from_json(path.read_text(encoding="utf-8"))
        if not ours.exists():
            importance = read_importance(imatrix)
            write_quantized(gguf_source(model), plan.types, ours, importance=importance, n_threads=threads)
        if ours.stat().st_size > stock.stat().st_size:
            raise SystemExit(f"{ours} has {ours.stat().st_size} bytes, more than the {stock.stat().st_size} of {stock}")
        print(f"{preset}: planned ({plan.source}), KL {plan.kl_measured:.4g} on the selection text", flush=True)
        out[preset] = stock, ours, plan
    if planner is not None:
        planner.close()
    return out


def print_priors(plan: ModelPlan) -> None:
    """Medians of the probed curves by role, over those of the routed gate and up projections, for plan_table.PRIORS."""
    by_role: dict[str, list[float]] = {}
    for label, curve in plan.curves.items():
        by_role.setdefault(label.split(",")[0], []).append(curve.loss(0.01) / 0.01)
    unit = statistics.median(by_role["ffn_gate_exps"])
    for role, values in sorted(by_role.items()):
        print(f'    "{role}": {statistics.median(values) / unit:.2g},')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder that bench/text_moe.py made (default: its cache)")
    parser.add_argument("--work", type=Path, help="where files and plans are kept (default: beside the model)")
    parser.add_argument("--presets", default=",".join(PRESETS), help="only these, such as IQ2_M,Q4_K_M")
    parser.add_argument("--chunks", type=int, default=96, help="of 512 tokens of the test text")
    parser.add_argument("--probe", default="groups", choices=("none", "groups", "each"))
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--stock-types", action="store_true", help="plan without the CCQ types, for any llama.cpp")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--priors", metavar="PLAN", type=Path, help="only print what this plan's probes say by role")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--write", action="store_true", help="put the table into docs/quantize.md")
    args = parser.parse_args()
    if args.priors is not None:
        print_priors(ModelPlan.from_json(args.priors.read_text(encoding="utf-8")))
        return 0
    if args.model is None:
        from text_moe import cached

        args.model = cached()
    work = args.work or args.model / "mixed-precision"
    work.mkdir(exist_ok=True)
    options = {"probe": args.probe, "n_trials": args.trials, "n_threads": args.threads}
    if args.stock_types:
        from pyllamaernie.quant.measure import DOMINATED
        from pyllamaernie.quant.native import TYPES

        options["types"] = [t for t in TYPES if t not in DOMINATED and not t.startswith("CCQ") and t != "F32"]
    presets = args.presets.split(",")
    files = make_files(args.model, work, presets, options)
    paths = [args.model / "text-moe-f16.gguf", *(path for row in files.values() for path in row[:2])]
    found = compare(
        paths,
        args.model / "test.txt",
        n_chunks=args.chunks,
        n_threads=args.threads,
        speed_runs=0,
        progress=True,
    )
    lines = [
        "| preset | bpw | bytes | unused | its KL | our KL | ratio [95 %] | bar | plan is | first plan: predicted "
        "| measured | best plan, selection text |",
        "|---" * 12 + "|",
    ]
    n_met = 0
    for i, (preset, (stock, ours, plan)) in enumerate(files.items()):
        a, b = 2 * i + 2, 2 * i + 1
        ratio, interval = found.kl_ratio(a, b)
        theirs, mine = found.models[b], found.models[a]
        bar = bar_of(theirs.bpw)
        first = plan.runs[0] if plan.runs else (math.nan, math.nan)
        is_met = interval is not None and interval[1] <= bar
        n_met += is_met
        size = stock.stat().st_size
        unused = 1 - ours.stat().st_size / size
        assert theirs.text is not None and mine.text is not None and interval is not None
        lines.append(
            f"| {preset} | {theirs.bpw:.3f} | {size} | {unused:.3%} | {theirs.text.mean:.5f} | {mine.text.mean:.5f} | "
            f"{ratio:.3f} [{interval[0]:.3f}, {interval[1]:.3f}] | {bar:.2f} {'met' if is_met else 'missed'} | "
            f"{plan.source} | {first[0]:.4f} | {first[1]:.4f} | {plan.kl_measured or math.nan:.4f} |"
        )
    print("\n".join(lines))
    print(f"{n_met} of {len(files)} bars met; {found.n_chunks} chunks of {found.n_ctx} tokens of the test text")
    if args.json is not None:
        args.json.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    if args.write:
        text = PAGE.read_text(encoding="utf-8")
        before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
        PAGE.write_text(before + MARKS[0] + "\n" + "\n".join(lines) + "\n" + MARKS[1] + after, encoding="utf-8")
    return 0 if n_met == len(files) else 1


if __name__ == "__main__":
    raise SystemExit(main())
