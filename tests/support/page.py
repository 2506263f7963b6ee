"""The part of a document that a program writes: what lies between `<!-- NAME: begin -->` and `<!-- NAME: end -->`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


def line(cells: Iterable[object]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def parts(page: Path, name: str) -> tuple[str, str, str]:
    """The text up to the first marker, between both, and from the second one on.

    Raises: ValueError where the page does not have each marker once, in that order.
    """
    text = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, found_begin, rest = text.partition(begin)
    body, found_end, after = rest.partition(end)
    if not found_begin or not found_end or text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{page}: expected {begin.strip()} and then {end}, each once")
    return before + begin, body, end + after


def body(page: Path, name: str) -> str:
    """What stands between the markers."""
    return parts(page, name)[1]


def write(page: Path, name: str, lines: Sequence[str]) -> None:
    """Puts the lines between the markers; what else is on the page stays."""
    before, _, after = parts(page, name)
    page.write_text(before + "\n".join(lines).rstrip("\n") + "\n" + after, encoding="utf-8")
