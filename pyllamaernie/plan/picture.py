"""The pictures of a plan's report. matplotlib is optional and used only here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from pyllamaernie.plan.model_plan import ModelPlan
from pyllamaernie.plan.planner import Planner
from pyllamaernie.plan.table import by_role
from pyllamaernie.quant.native import TYPES

# told apart with any colour vision, and by their shape
OURS, STOCK, SINGLE, BY_HAND = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
LABELS = {"stock ": "stock presets", "all ": "one type for all", "experts ": "one type for experts, one for the rest"}


def draw_all(plan: ModelPlan, planner: Planner, curve: Sequence[tuple[int, float]], stem: Path) -> dict[str, Path]:
    """Write STEM.sizes.svg, STEM.bits.svg and, where plans were run, STEM.predicted.svg. Title -> file."""
    out = {"Size against KL": stem.with_name(f"{stem.name}.sizes.svg")}
    with matplotlib.rc_context({"svg.hashsalt": "pyllamaernie"}):  # the same plan gives the same bytes
        _save(_sizes(plan, curve), out["Size against KL"])
        out["Bits by layer and role"] = stem.with_name(f"{stem.name}.bits.svg")
        _save(_bits(plan, planner), out["Bits by layer and role"])
        if plan.runs:
            out["Predicted against measured"] = stem.with_name(f"{stem.name}.predicted.svg")
            _save(_predicted(plan), out["Predicted against measured"])
    return out


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})


def _sizes(plan: ModelPlan, curve: Sequence[tuple[int, float]]) -> Figure:
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    unit, scale = ("GiB", 1 << 30) if plan.size_bytes >= 1 << 30 else ("MiB", 1 << 20)
    axes.plot([s / scale for s, _ in curve], [kl for _, kl in curve], color=OURS, label="plans, expected")
    if plan.kl_measured is not None:
        axes.plot(plan.size_bytes / scale, plan.kl_measured, "D", color=OURS, label="this plan, measured")
    for kind, colour, shape in (("stock ", STOCK, "o"), ("all ", SINGLE, "s"), ("experts ", BY_HAND, "^")):
        points = [b for b in plan.baselines if b.name.startswith(kind)]
        label = f"{LABELS[kind]}, measured"
        if points:
            axes.plot([b.size_bytes / scale for b in points], [b.kl for b in points], shape, color=colour, label=label)
        for b in points:
            axes.annotate(
                b.name.removeprefix(kind),
                (b.size_bytes / scale, b.kl),
                xytext=(6, 4),
                textcoords="offset points",
                fontsize="small",
            )
    if all(kl > 0 for _, kl in curve):
        axes.set_yscale("log")
    axes.set_xlabel(f"size of the file ({unit})")
    axes.set_ylabel("mean KL to the exact model (nats)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def _bits(plan: ModelPlan, planner: Planner) -> Figure:
    """A row for each role, a column for each layer; tensors outside of the layers stand in front."""
    roles = by_role(planner.items)
    n_layer = 1 + max((i.layer for i in planner.items if i.layer is not None), default=0)
    grid = np.full((len(roles), n_layer + 1), np.nan)
    for row, items in enumerate(roles.values()):
        for item in items:
            grid[row, 0 if item.layer is None else item.layer + 1] = TYPES[plan.types[item.names[0]]].bpw
    figure = Figure(figsize=(max(6.0, 2.5 + 0.32 * n_layer), 1.2 + 0.3 * len(roles)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=1, vmax=9)
    axes.set_yticks(range(len(roles)), list(roles), fontsize="small")
    step = max(1, n_layer // 16)
    axes.set_xticks([0, *range(1, n_layer + 1, step)], ["-", *range(0, n_layer, step)], fontsize="small")
    axes.set_xlabel("layer")
    if n_layer <= 32:
        for row, column in np.argwhere(~np.isnan(grid)):
            bits = grid[row, column]
            axes.text(column, row, f"{bits:.1f}", ha="center", va="center", fontsize=6, color="w" if bits < 6 else "k")
    figure.colorbar(image, ax=axes, label="bits per weight")
    return figure


def _predicted(plan: ModelPlan) -> Figure:
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    predicted, measured = (np.array(x) for x in zip(*plan.runs, strict=True))
    ends = [min(predicted.min(), measured.min()) / 1.2, max(predicted.max(), measured.max()) * 1.2]
    axes.loglog(predicted, measured, "o", color=OURS, alpha=0.7)
    axes.loglog(ends, ends, color="0.6", linestyle="--", linewidth=1)
    axes.set_xlabel("predicted KL (nats)")
    axes.set_ylabel("measured KL (nats)")
    axes.grid(alpha=0.3, which="both")
    return figure
