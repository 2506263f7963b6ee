"""The picture of a comparison: size of each file against its mean KL. matplotlib is optional and used only here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyllamaernie.compare.divergence import Divergence

TEXT, PICTURES = "#0072b2", "#d55e00"  # told apart with any colour vision, and by their shape


def draw(
    path: Path,
    labels: Sequence[str],
    sizes_bytes: Sequence[int],
    text: Sequence[Divergence | None],
    pictures: Sequence[Divergence | None],
) -> None:
    """Write one figure, in the format that the ending of the path names.

    One entry for each file, the reference first; None where nothing of that kind ran.
    """
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    unit, scale = ("GiB", 1 << 30) if sizes_bytes[0] >= 1 << 30 else ("MiB", 1 << 20)
    sizes = [n_bytes / scale for n_bytes in sizes_bytes]
    _points(axes, sizes, text, "text", TEXT, "o")
    _points(axes, sizes, pictures, "pictures", PICTURES, "s")
    for i in range(1, len(labels)):
        top = max(d.mean for d in (text[i], pictures[i]) if d is not None)
        if top == 0:  # has no place on a logarithmic axis
            axes.axvline(sizes[i], color="0.8", linestyle=":", linewidth=1, label=f"KL 0: {labels[i]}")
            continue
        axes.set_yscale("log")
        axes.annotate(
            labels[i], (sizes[i], top), xytext=(8, 0), textcoords="offset points", va="center", fontsize="small"
        )
    axes.axvline(sizes[0], color="0.6", linestyle="--", linewidth=1, label=f"reference: {labels[0]}")
    axes.set_xlabel(f"size ({unit})")
    axes.set_ylabel("mean KL to the reference (nats)")
    axes.margins(0.15, 0.15)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=150)


def _points(
    axes: Axes, sizes: Sequence[float], found: Sequence[Divergence | None], name: str, colour: str, shape: str
) -> None:
    """The points of one kind of data with their intervals; the reference and files equal to it are not among them."""
    kept = [(size, d) for size, d in list(zip(sizes, found, strict=True))[1:] if d is not None and d.mean > 0]
    if not kept:
        return
    means = [d.mean for _, d in kept]
    ends = [d.interval or (d.mean, d.mean) for _, d in kept]
    # a percentile interval of few chunks may miss the mean
    below = [max(mean - low, 0.0) for mean, (low, _) in zip(means, ends, strict=True)]
    above = [max(high - mean, 0.0) for mean, (_, high) in zip(means, ends, strict=True)]
    label = f"{name}, 95 % interval" if all(d.interval for _, d in kept) else name
    axes.errorbar(
        [size for size, _ in kept], means, yerr=[below, above], fmt=shape, color=colour, capsize=3, label=label
    )
