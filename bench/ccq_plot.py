"""Draws the pictures of docs/ccq.md: `python bench/ccq_plot.py`, after `python bench/ccq_error.py --write`.

`ccq-error.svg`: error against bits per weight, from the table on that page, with matplotlib (the extra `plot`).
`ccq-trellis.svg`: the shift register and the trellis, written here. Same input, same bytes.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

from paths import ROOT

import page

PAGE = ROOT / "docs" / "ccq.md"
COLUMNS = {"Gaussian": 2, "Student-t 5": 5}  # of the table
KT = {"IQ2_KT": (2.133, 0.0866, 0.1099), "IQ3_KT": (3.133, 0.0237, 0.0312)}  # ik_llama.cpp 8337e4cd3, same sources
OURS, STOCK, OTHER, LIMIT = "#b3261e", "#37597d", "#7a7a7a", "#222222"


def table_rows() -> list[tuple[str, float, dict[str, float]]]:
    """Name, bits per weight and errors of each type in the page's table."""
    rows = []
    for line in page.body(PAGE, "errors").strip().splitlines()[2:]:
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        rows.append((cells[0], float(cells[1]), {name: float(cells[i]) for name, i in COLUMNS.items()}))
    return rows


def draw_errors(path: Path) -> None:
    import matplotlib
    import numpy as np

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "ccq", "svg.fonttype": "none", "font.size": 9})
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    rate = np.linspace(1.6, 3.3, 35)
    for ax, source in zip(axes, COLUMNS, strict=True):
        points = [(name, bpw, errors[source]) for name, bpw, errors in table_rows()]
        points += [(name, values[0], values[1 + list(COLUMNS).index(source)]) for name, values in KT.items()]
        for prefix, colour, label in (("CCQ", OURS, "CCQ"), ("", STOCK, "llama.cpp"), ("KT", OTHER, "ik_llama.cpp")):
            chosen = [p for p in points if ("CCQ" in p[0], "_KT" in p[0]) == (prefix == "CCQ", prefix == "KT")]
            line = "-" if prefix == "CCQ" else ""
            ax.plot([p[1] for p in chosen], [p[2] for p in chosen], "o" + line, color=colour, ms=4, lw=1, label=label)
            for name, bpw, error in chosen:
                ax.annotate(name, (bpw, error), (4, 3), textcoords="offset points", fontsize=7, color=colour)
        if source == "Gaussian":
            ax.plot(rate, 2.0 ** (-2 * rate), "--", color=LIMIT, lw=1, label="no code can do better")
        ax.set_yscale("log")
        ax.set_yticks([0.02, 0.03, 0.05, 0.1, 0.2], ["0.02", "0.03", "0.05", "0.1", "0.2"])
        ax.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        ax.set(title=source, xlabel="bits per weight", xlim=(1.6, 3.45))
        ax.grid(True, which="both", lw=0.3)
    axes[0].set_ylabel("relative squared error")
    axes[0].legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


class Svg:
    """Lines, boxes and words of a picture."""

    def __init__(self, width: int, height: int) -> None:
        self.lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        ]

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str = LIMIT, width: float = 1) -> None:
        self.lines.append(f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="{colour}" stroke-width="{width:g}"/>')

    def box(self, x: float, y: float, w: float, h: float, text: str, fill: str = "#eef2f7") -> None:
        self.lines.append(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}" stroke="{LIMIT}"/>')
        self.text(x + w / 2, y + h / 2 + 4, text)

    def dot(self, x: float, y: float, colour: str = LIMIT, r: float = 4) -> None:
        self.lines.append(f'<circle cx="{x:g}" cy="{y:g}" r="{r:g}" fill="{colour}"/>')

    def text(self, x: float, y: float, text: str, size: int = 12, anchor: str = "middle", colour: str = LIMIT) -> None:
        text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        self.lines.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{text}</text>'
        )

    def save(self, path: Path) -> None:
        path.write_text("\n".join([*self.lines, "</svg>"]) + "\n", encoding="utf-8")


def draw_trellis(path: Path) -> None:
    svg = Svg(760, 560)
    svg.text(20, 24, "One step: a byte and the next one are a window of 16 bits, which four planes read", 14, "start")
    for i, name in enumerate(("qs[62]", "qs[63]", "qs[0]", "qs[1]")):
        svg.box(40 + 130 * i, 44, 130, 30, name)
    svg.text(585, 64, "... and round", anchor="start")
    for i, colour in ((0, STOCK), (1, OURS)):
        x, y = 40 + 130 * i, 88 + 20 * i
        svg.line(x + 4, y, x + 256, y, colour, 2)
        svg.text(x + 130, y + 14, f"window of step {62 + i}: weights {62 + i}, {126 + i}, {190 + i}, {254 + i}", 11)
        svg.text(x - 4, y + 4, "low", 10, "end", colour)
    svg.box(40, 150, 110, 34, "window")
    svg.text(165, 172, "→")
    svg.box(180, 150, 190, 34, "x K[p] + e x M[p], 16 bits")
    svg.text(385, 172, "→")
    svg.box(400, 150, 90, 34, "top 8 bits: h")
    svg.text(505, 172, "→")
    svg.box(520, 150, 200, 34, "T1[h >> 4] + T2[h & 15]", "#f7eeee")
    svg.text(380, 204, "for each plane p = 0..3: weights b, 64 + b, 128 + b, 192 + b; then times scale and level")

    svg.text(20, 250, "All 64 steps: a path through 256 states that ends where it begins", 14, "start")
    columns = [90, 240, 390, 540, 690]
    states, y_of = ["0", "1", "2", "254", "255"], [300, 340, 380, 450, 490]
    for left, right in pairwise(columns):
        for a in y_of:
            for b in y_of:
                svg.line(left, a, right, b, "#c9d3df", 0.7)
    chosen = [340, 490, 300, 450, 340]
    for i in range(4):
        svg.line(columns[i], chosen[i], columns[i + 1], chosen[i + 1], OURS, 3)
    for i, x in enumerate(columns):
        for y in y_of:
            svg.dot(x, y, OURS if chosen[i] == y else LIMIT, 5 if chosen[i] == y else 3.5)
        svg.text(x, 420, "⋮", 16)
        svg.text(x, 278, ("qs[0]", "qs[1]", "qs[2]", "qs[63]", "qs[0] again")[i])
    svg.text(465, 526, "(61 steps, drawn as one)", 11)
    for name, y in zip(states, y_of, strict=True):
        svg.text(columns[0] - 14, y + 4, name, 11, "end")
    svg.text(165, 526, "256 branches leave a state, one for each", 11)
    svg.text(165, 540, "next byte (times 2, 4, 8 for e); each gives", 11)
    svg.text(165, 554, "four weights", 11)
    svg.save(path)


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    draw_errors(PAGE.with_name("ccq-error.svg"))
    draw_trellis(PAGE.with_name("ccq-trellis.svg"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
