"""What the Python sources of the package import from one another, read with `ast`: nothing is executed.

`python tests/support/imports.py [FOLDER]` prints the figures by which the house is judged, for any version of it.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "pyllamaernie"
COMPILED = f"{PACKAGE}._core"


@dataclass(frozen=True)
class Import:
    """One import of a module of ours, or with `name` of something in it."""

    importer: str
    imported: str
    name: str | None
    line: int

    @property
    def is_private(self) -> bool:
        return bool(self.name) and self.name.startswith("_") and not self.name.startswith("__")


@functools.cache
def modules(root: Path = ROOT) -> Mapping[str, Path]:
    """Dotted name -> file; a folder's name stands for its `__init__.py`."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room(module: str) -> str:
    """The folder of a module below the package, or the module itself where it lies in the root."""
    return module.split(".")[1] if "." in module else PACKAGE


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports_of(module: str, root: Path = ROOT) -> Iterator[Import]:
    """Every import of ours in a module, those inside functions and for type checkers too."""
    known, path = modules(root), modules(root)[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in known or alias.name == COMPILED:
                    yield Import(module, alias.name, None, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
            if base.split(".")[0] != PACKAGE:
                continue
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                if whole in known or whole == COMPILED:
                    yield Import(module, whole, None, node.lineno)
                elif base in known:
                    yield Import(module, base, alias.name, node.lineno)


def graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Which modules each module imports; the public names that the package loads when they are used do not count."""
    arrows = {m: {i.imported for i in imports_of(m, root)} - {COMPILED, m} for m in modules(root)}
    arrows[PACKAGE] = set()
    return arrows


def cycles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of more than one node that reach one another, sorted."""

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for other in arrows.get(todo.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    todo.append(other)
        return seen

    reach = {node: reached(node) for node in arrows}
    groups = {frozenset(b for b in reach[a] if a in reach[b]) for a in arrows if a in reach[a]}
    return sorted(sorted(group) for group in groups)


def levels(arrows: Mapping[str, set[str]]) -> int:
    """Modules on the longest chain of imports; a cycle counts once."""
    depth: dict[str, int] = {}

    def level(node: str, above: frozenset[str]) -> int:
        if node not in depth:
            below = [level(other, above | {node}) for other in arrows.get(node, ()) if other not in above | {node}]
            depth[node] = 1 + max(below, default=0)
        return depth[node]

    return max(level(node, frozenset()) for node in sorted(arrows))


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and number of lines of every function of a file."""
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def main() -> None:
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT
    files = [p for folder in (PACKAGE, "tests", "bench", "models", "examples") for p in (root / folder).rglob("*.py")]
    arrows = graph(root)
    longest = max(files, key=lambda p: len(p.read_text(encoding="utf-8").splitlines()))
    of_package = max(modules(root).values(), key=lambda p: len(p.read_text(encoding="utf-8").splitlines()))
    long_ones = [(name, n, path) for path in files for name, n in functions(path) if n > 60]
    print(f"modules in the package's root: {len(list((root / PACKAGE).glob('*.py')))} of {len(modules(root))}")
    for path, of in ((of_package, "of the package"), (longest, "of all")):
        print(
            f"longest file {of}: {path.relative_to(root)}, {len(path.read_text(encoding='utf-8').splitlines())} lines"
        )
    print(f"functions above 60 lines: {len(long_ones)}")
    for name, n, path in long_ones:
        print(f"    {path.relative_to(root)}: {name}, {n}")
    print(f"levels of imports: {levels(arrows)}")
    print(f"cycles: {len(cycles(arrows))}", *cycles(arrows), sep="\n    ")


if __name__ == "__main__":
    main()
