"""What `compare` found: figures per file, as a table for people, as JSON, and as a plot. Nothing is measured here."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyllamaernie.compare.divergence import N_CHUNKS_MIN, Divergence, ratio_interval
from pyllamaernie.errors import InputError, UnsupportedInputError
from pyllamaernie.files import size_text

N_ANSWER = 32  # the reference's answer about a picture is followed for this many tokens

PLOT_SUFFIXES = (".png", ".svg", ".pdf")

_KL = ["mean KL", "median", "p99", "p99.9", "max", "same top"]


@dataclass(frozen=True)
class Compared:
    """One file. `text` and `pictures` are its divergence from the first file, None where nothing of that kind ran.

    `size_bytes` and `bpw` (bits per weight) are of the language model, all parts of a split one, without its projector.
    `perplexity` is of the text, with its standard error. `same_answers`: share of the pictures about which the file
    gives the reference's answer, token for token. `prefill_tps`, `decode_tps`: tokens per second, None if not timed.
    """

    path: str
    size_bytes: int
    bpw: float
    perplexity: float | None
    perplexity_error: float | None
    text: Divergence | None
    pictures: Divergence | None
    same_answers: float | None
    prefill_tps: float | None
    decode_tps: float | None


@dataclass(frozen=True)
class ComparisonTable:
    """What `compare` found; the first file is the reference."""

    models: tuple[Compared, ...]
    n_ctx: int
    n_chunks: int
    n_pictures: int

    def kl_ratio(self, a: int, b: int, *, pictures: bool = False) -> tuple[float, tuple[float, float] | None]:
        """Mean KL of file `a` over that of file `b` and its paired 95 % interval (None for too few chunks).

        Raises: InputError when `b` does not differ from the reference or nothing of that kind ran.
        """
        first, second = ((m.pictures if pictures else m.text) for m in (self.models[a], self.models[b]))
        if first is None or second is None or second.mean == 0:
            raise InputError(
                f"no ratio to {self.models[b].path}: its KL is {0 if second and not second.mean else 'not measured'}"
            )
        return ratio_interval(first, second)

    def labels(self) -> list[str]:
        """File names, or whole paths where two files have the same name."""
        names = [Path(m.path).name for m in self.models]
        return [m.path if names.count(name) > 1 else name for m, name in zip(self.models, names, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        return {"format": 1, "kl_unit": "nats", **asdict(self)}

    def to_json(self) -> str:
        return json.dumps(_finite(self.to_dict()), indent=1) + "\n"

    def to_markdown(self) -> str:
        """One table of sizes, text and speed, one of pictures if there were any, and what the figures mean."""
        labels = self.labels()
        head = ["file", "size", "bpw", *(["perplexity", *_KL] if self.n_chunks else []), "prefill t/s", "decode t/s"]
        parts = [_markdown(head, [self._main_row(i, label) for i, label in enumerate(labels)])]
        if self.n_pictures:
            rows = []
            for i, (label, m) in enumerate(zip(labels, self.models, strict=True)):
                assert m.pictures is not None and m.same_answers is not None
                rows.append([label, *_kl_cells(m.pictures, i == 0), f"{m.same_answers:.1%}" if i else "-"])
            parts.append(_markdown(["file, on pictures", *_KL, "same answers"], rows))
        return "\n".join([*parts, *self._notes()])

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Size against mean KL as PNG, SVG or PDF, by the ending of the name.

        Raises: UnsupportedInputError without matplotlib, InputError for another ending.
        """
        check_plot(path)
        from pyllamaernie.compare.picture import draw

        text = [m.text for m in self.models]
        draw(Path(path), self.labels(), [m.size_bytes for m in self.models], text, [m.pictures for m in self.models])

    def _main_row(self, i: int, label: str) -> list[str]:
        m = self.models[i]
        cells = [label, size_text(m.size_bytes), f"{m.bpw:.3f}"]
        if m.text is not None and m.perplexity is not None:
            form = ".4f" if m.perplexity < 1e4 else ".4g"
            cells += [f"{m.perplexity:{form}} ± {m.perplexity_error:{form}}", *_kl_cells(m.text, i == 0)]
        return [*cells, *("-" if x is None else f"{x:.1f}" for x in (m.prefill_tps, m.decode_tps))]

    def _notes(self) -> list[str]:
        first = self.models[0]
        lines = ["KL in nats to the first file, 95 % interval in brackets from resampling whole chunks or pictures."]
        if first.text:
            lines.append(
                f"Text: {self.n_chunks} chunks of {self.n_ctx} tokens, {first.text.n_rows} rows: "
                "the second half of each chunk."
            )
        if first.pictures:
            lines.append(
                f"Pictures: {self.n_pictures}, {first.pictures.n_rows} rows: those behind the picture, "
                f"then the first file's own answer (at most {N_ANSWER} tokens)."
            )
        shown = [d for d in (first.text, first.pictures) if d]
        if any(d.interval is None for d in shown):
            lines.append(f"No interval below {N_CHUNKS_MIN} chunks or pictures.")
        if any(d.n_rows < 1000 for d in shown):
            lines.append("Fewer than 1000 rows: p99.9 is little more than the largest value.")
        return lines


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [head, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    aligned = [
        [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))] for row in cells
    ]
    lines = ["| " + " | ".join(row) + " |" for row in aligned]
    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:], ""])


def _kl_cells(d: Divergence, is_reference: bool) -> list[str]:
    if is_reference:
        return ["reference", *["-"] * 5]
    interval = "" if d.interval is None else f" [{d.interval[0]:.4g}, {d.interval[1]:.4g}]"
    return [f"{d.mean:.4g}{interval}", *(f"{x:.4g}" for x in (d.median, d.p99, d.p999, d.max)), f"{d.same_top:.2%}"]


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_plot(path: str | os.PathLike[str]) -> None:
    """Raise unless a plot can be written under this name.

    Raises: InputError for another ending, UnsupportedInputError without matplotlib.
    """
    if Path(path).suffix.lower() not in PLOT_SUFFIXES:
        raise InputError(f"{path}: a plot ends in {', '.join(PLOT_SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedInputError("a plot needs matplotlib: pip install 'pyllamaernie[plot]'")
