"""What a person looks at after planning: one page of Markdown and, where matplotlib is there, three pictures.

Sizes against KL with the stock presets as points, bits by layer and role, predicted against measured KL. Nothing is
measured here; the curve over other sizes is the solver's, from the same losses.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from pyllamaernie.errors import BudgetError
from pyllamaernie.files import size_text, write_text
from pyllamaernie.plan.model_plan import ModelPlan
from pyllamaernie.plan.planner import Planner
from pyllamaernie.plan.table import Item, by_role, item_error

SHARES = (0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.4)  # of the size, for the curve


def write_report(plan: ModelPlan, planner: Planner, path: Path) -> list[Path]:
    """Write the page and the pictures beside it, NAME.sizes.svg and so on; what was written comes back."""
    curve = size_curve(plan, planner)
    stem = path.name.removesuffix(".md").removesuffix(".plan")
    pictures: dict[str, Path] = {}
    if importlib.util.find_spec("matplotlib") is not None:
        from pyllamaernie.plan.picture import draw_all

        pictures = draw_all(plan, planner, curve, path.with_name(stem))
    text = report_text(plan, planner, curve, {name: file.name for name, file in pictures.items()})
    write_text(path, text)
    return [path, *pictures.values()]


def size_curve(plan: ModelPlan, planner: Planner) -> list[tuple[int, float]]:
    """(bytes of the file, expected KL) for sizes around the plan's, from its curves; sizes that cannot be are left out.

    Where the plan was run, the curve is scaled to go through what was measured.
    """
    points = []
    for share in SHARES:
        try:
            solved = planner.solve(plan.curves, int(share * plan.budget_bytes))
        except BudgetError:
            continue
        points.append((solved.size_bytes, solved.loss, share))
    here = next((loss for _, loss, share in points if share == 1.0), None)
    factor = plan.kl_measured / here if plan.kl_measured and here else 1.0
    return [(size, loss * factor) for size, loss, _ in points]


def report_text(plan: ModelPlan, planner: Planner, curve: Sequence[tuple[int, float]], pictures: dict[str, str]) -> str:
    """The page. `pictures`: title -> file name."""
    unit = "nats on the selection data" if plan.kl_measured is not None else "a guess, nothing was run"
    lines = [
        f"# {plan.model} in {size_text(plan.size_bytes)}",
        "",
        f"{plan.size_bytes} bytes of {plan.budget_bytes} allowed ({plan.budget_bytes - plan.size_bytes} unused), "
        f"{plan.bpw:.3f} bits per weight.",
        f"The plan is {'ours' if plan.source == 'solved' else plan.source}. Mean KL: "
        f"{_number(plan.kl_measured)} measured ({unit}).",
        *([_first_run(plan)] if plan.runs else []),
        f"Solver: {'proven optimal for these losses' if plan.solved.optimal else f'within {plan.solved.gap:.3%}'}.",
    ]
    lines += ["", *(f"- {note}" for note in plan.notes)]
    lines += ["", "## Types", "", "| tensors | layers | type | bytes |", "|---|---|---|---|", *_ranges(plan, planner)]
    lines += ["", "## Where the bytes and the loss are", "", *_shares(plan, planner)]
    if plan.baselines:
        lines += ["", "## What anybody could make", "", "| file | bytes | mean KL |", "|---|---|---|"]
        lines += [f"| {b.name} | {b.size_bytes} | {_number(b.kl)} |" for b in plan.baselines]
    lines += ["", "## Other sizes", "", "Expected from the same losses, nothing of it was run.", ""]
    lines += ["| bytes | expected KL |", "|---|---|", *(f"| {size} | {_number(kl)} |" for size, kl in curve)]
    for title, name in pictures.items():
        lines += ["", f"## {title}", "", f"![{title}]({name})"]
    lines += ["", "## Making the file", "", *_commands(plan), ""]
    return "\n".join(lines)


def _first_run(plan: ModelPlan) -> str:
    predicted, measured = plan.runs[0]
    return (
        f"{len(plan.runs)} plans were run; for the first one {_number(predicted)} was predicted and "
        f"{_number(measured)} measured."
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _ranges(plan: ModelPlan, planner: Planner) -> list[str]:
    """One row for neighbouring layers of a role in one type."""
    size = {name: c.size_bytes / len(c.tensors) for c in plan.solved.choices for name in c.tensors}
    rows = []
    for role, items in by_role(planner.items).items():
        ordered = sorted(items, key=lambda i: -1 if i.layer is None else i.layer)
        for type_name, run in itertools.groupby(ordered, key=lambda i: "/".join(_types(plan, i))):
            run_items = list(run)
            first, last = run_items[0].layer, run_items[-1].layer
            layers = "" if first is None else f"{first}" if first == last else f"{first}-{last}"
            n_bytes = sum(size[name] for item in run_items for name in item.names)
            rows.append(
                f"| {role}{' and up' if len(run_items[0].names) > 1 else ''} | {layers} | {type_name} | {n_bytes:.0f} |"
            )
    return rows


def _types(plan: ModelPlan, item: Item) -> list[str]:
    return sorted({plan.types[name] for name in item.names})


def _shares(plan: ModelPlan, planner: Planner) -> list[str]:
    """Bits, share of the bytes and of the expected loss of each role."""
    size = {name: (c.size_bytes, c.n_weights) for c in plan.solved.choices for name in c.tensors[:1]}
    label = {item: group for group, items in planner.groups.items() for item in items}
    rows, total_bytes, total_loss = [], 0, 0.0
    for role, items in by_role(planner.items).items():
        names = [name for item in items for name in item.names]
        n_bytes = sum(size[n][0] for n in names if n in size)
        n_weights = sum(size[n][1] for n in names if n in size)
        loss = math.fsum(
            plan.curves[label[item]].loss(item_error(item, planner.errors, plan.types[item.names[0]]))
            for item in items
            if plan.types[item.names[0]] in planner.errors.errors[item.names[0]]
        )
        rows.append((role, n_bytes, n_weights, loss))
        total_bytes, total_loss = total_bytes + n_bytes, total_loss + loss
    head = ["| role | bits per weight | share of the bytes | share of the expected loss |", "|---|---|---|---|"]
    return head + [
        f"| {role} | {8 * n / max(w, 1):.2f} | {n / total_bytes:.1%} | {loss / total_loss if total_loss else 0:.1%} |"
        for role, n, w, loss in rows
    ]


def _commands(plan: ModelPlan) -> list[str]:
    own = sorted({t for t in plan.types.values() if t.startswith("CCQ")})
    note = f" {', '.join(own)} need this package's llama.cpp." if own else " Any llama.cpp loads the file."
    return [
        "    pyllamaernie quantize MODEL --plan NAME.plan.json --imatrix imatrix.gguf -o NAME.gguf",
        "    pyllamaernie tool llama-quantize --tensor-type-file NAME.recipe.txt --imatrix imatrix.gguf MODEL "
        "NAME.gguf Q8_0",
        "",
        f"Both write the same weights.{note}",
    ]
