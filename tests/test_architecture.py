"""`docs/architecture.md` against the sources: who imports whom, where things are, how long they may be."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import imports
import pytest

ROOT = imports.ROOT
PAGE = ROOT / "docs" / "architecture.md"
MODULES = imports.modules()
ROOT_MODULES = {m.split(".")[1] for m, p in MODULES.items() if m.count(".") == 1 and p.name != "__init__.py"}
N_LINES_FILE, N_LINES_FUNCTION = 450, 60
COMMANDS = ("pyllamaernie.__main__", "pyllamaernie.media.__main__")  # programs, not libraries


def table(first: str) -> list[list[str]]:
    """The rows below a heading whose first cell is `first`."""
    lines = iter(PAGE.read_text(encoding="utf-8").splitlines())
    for line in lines:
        if line.startswith(f"| {first} |"):
            break
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert rows
    return rows


def allowed() -> dict[str, set[str]]:
    """Room -> the rooms and root modules that it may import."""
    rows = {row[0].strip("`"): row[1:3] for row in table("room")}
    everything = set(rows) | ROOT_MODULES | {"_core"}
    return {
        room: everything if "every" in rooms else {*re.findall(r"`(\w+)`", rooms), *root.split()}
        for room, (rooms, root) in rows.items()
    }


ALLOWED = allowed()


def is_package(module: str) -> bool:
    return module.count(".") > 1 or MODULES[module].name == "__init__.py"


def library() -> Iterator[tuple[str, Path]]:
    for module, path in MODULES.items():
        if imports.room(module) != "cli" and module not in COMMANDS:
            yield module, path


def test_the_table_names_every_room_and_no_other() -> None:
    rooms = {imports.room(m) for m in MODULES if is_package(m)} - {imports.PACKAGE}
    assert set(ALLOWED) == rooms
    assert len(list((ROOT / imports.PACKAGE).glob("*.py"))) <= 8


def test_the_table_itself_has_no_cycle_and_nothing_imports_cli() -> None:
    assert imports.cycles({room: names - {room} for room, names in ALLOWED.items()}) == []
    assert not any("cli" in names for room, names in ALLOWED.items() if room != "cli")


def test_every_arrow_is_in_the_table() -> None:
    wrong = []
    for module in MODULES:
        here = imports.room(module)
        if module in (imports.PACKAGE, "pyllamaernie.__main__"):
            continue  # the public names, each loaded when used; and the command
        may = ALLOWED.get(here, {"errors", "machine", "_core"}) | {here}
        for found in imports.imports_of(module):
            there = imports.room(found.imported)
            if there not in may and found.imported != imports.PACKAGE:
                wrong.append(f"{module}:{found.line} imports {found.imported}; {here} may import {sorted(may)}")
    assert not wrong, "\n".join(wrong)


def test_the_table_promises_no_arrow_that_nobody_needs() -> None:
    used: dict[str, set[str]] = {room: set() for room in ALLOWED}
    for module in MODULES:
        for found in imports.imports_of(module):
            used.get(imports.room(module), set()).add(imports.room(found.imported))
    unused = {room: sorted(names - used[room] - {room}) for room, names in ALLOWED.items() if room != "cli"}
    assert not any(unused.values()), unused


def test_no_module_reaches_itself() -> None:
    assert imports.cycles(imports.graph()) == []


def test_no_private_name_crosses_rooms() -> None:
    wrong = [
        f"{module}:{found.line} imports {found.name} of {found.imported}"
        for module in MODULES
        for found in imports.imports_of(module)
        if found.is_private and imports.room(found.imported) != imports.room(module)
    ]
    for module, path in MODULES.items():
        others = {
            found.imported.rpartition(".")[2]
            for found in imports.imports_of(module)
            if found.name is None and imports.room(found.imported) != imports.room(module)
        }
        for node in ast.walk(imports.tree(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in others:
                if node.attr.startswith("_") and not node.attr.startswith("__"):
                    wrong.append(f"{module}:{node.lineno} uses {node.value.id}.{node.attr}")
    assert not wrong, "\n".join(wrong)


def test_a_library_module_parses_no_arguments_and_prints_nothing() -> None:
    wrong = []
    for module, path in library():
        for node in ast.walk(imports.tree(path)):
            if isinstance(node, ast.Import) and any(alias.name == "argparse" for alias in node.names):
                wrong.append(f"{module}:{node.lineno} imports argparse")
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                wrong.append(f"{module}:{node.lineno} prints")
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("sys.exit", "sys.stdout.write"):
                wrong.append(f"{module}:{node.lineno} calls {ast.unparse(node.func)}")
    assert not wrong, "\n".join(wrong)


def outside_imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(imports.tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.split(".")[0], node.lineno


def test_one_module_imports_the_gguf_package() -> None:
    found = {module for module, path in MODULES.items() for name, _ in outside_imports(path) if name == "gguf"}
    assert found == {"pyllamaernie.gguf.file"}


def test_what_cmake_runs_needs_the_standard_library_only() -> None:
    arrows = imports.graph()
    todo, seen = ["pyllamaernie.__main__", "pyllamaernie.cli.patch"], {imports.PACKAGE}
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo += arrows[module]
    wrong = [
        f"{module}:{line} imports {name}"
        for module in sorted(seen)
        for name, line in outside_imports(MODULES[module])
        if name != imports.PACKAGE and name not in sys.stdlib_module_names
    ]
    assert not wrong and "pyllamaernie.patching.source" in seen, wrong


def python_files() -> list[Path]:
    folders = (imports.PACKAGE, "tests", "bench", "models", "examples")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_no_file_and_no_function_is_too_long() -> None:
    wrong = []
    for path in python_files():
        name, n_lines = path.relative_to(ROOT), len(path.read_text(encoding="utf-8").splitlines())
        if n_lines > N_LINES_FILE:
            wrong.append(f"{name}: {n_lines} lines")
        wrong += [f"{name}: {function}, {n} lines" for function, n in imports.functions(path) if n > N_LINES_FUNCTION]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("row", table("to change"), ids=lambda row: row[0])
def test_things_are_where_the_page_says(row: list[str]) -> None:
    _, file, name, words = (cell.strip("`") for cell in row)
    path = ROOT / file
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        assert name in text and words in text
        return
    parts = [
        ast.get_source_segment(text, node) or ""
        for node in imports.tree(path).body
        if getattr(node, "name", None) == name
        or any(getattr(t, "id", None) == name for t in getattr(node, "targets", [getattr(node, "target", None)]))
    ]
    assert len(parts) == 1, f"{file} defines {name} {len(parts)} times"
    assert words in parts[0]


def test_every_file_and_module_that_the_page_names_exists() -> None:
    text = PAGE.read_text(encoding="utf-8")
    names = re.findall(r"`((?:[a-z_]+/)+[\w.-]+\.\w+)`", text)
    names = [name for name in names if not re.search(r"[A-Z]{3}", name)]  # FAMILY and the like stand for any
    assert len(names) > 20
    missing = [n for n in names if not (ROOT / n).exists() and not (ROOT / imports.PACKAGE / n).exists()]
    assert not missing, missing
