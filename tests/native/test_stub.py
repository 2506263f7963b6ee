"""`_core.pyi`, which is written by hand, says of names, parameters and results what the compiled module says of itself.

The module's own signatures are the first lines of its docstrings, which pybind11 writes. They know less than the stub:
a dict's contents, a constructor's keywords behind `**kwargs`, what an `object` is. There the outer type alone counts.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

_core = pytest.importorskip("pyllamaernie._core", reason="the native module is not built")

STUB = Path(__file__).parents[2] / "pyllamaernie" / "_core.pyi"
VAGUE = {"object", "dict", "list", "tuple"}  # a result of which pybind11 does not know more


def plain(annotation: ast.expr | None) -> str:
    """A type as both sides would write it."""
    text = ast.unparse(annotation) if annotation else "None"
    return re.sub(r"\b(?:pyllamaernie\._core|numpy\.typing|numpy|npt|np|typing)\.", "", text)


def signature(function: ast.FunctionDef) -> tuple[list[str], list[str], str]:
    """Positional parameters, keywords (`**` where they are not named), and the result."""
    args = function.args
    keywords = [arg.arg for arg in args.kwonlyargs] or (["**"] if args.kwarg else [])
    return [arg.arg for arg in args.posonlyargs + args.args], keywords, plain(function.returns)


def compiled_signature(name: str, doc: str | None) -> tuple[list[str], list[str], str]:
    line = (doc or "").strip().splitlines()[0]
    line = re.sub(r"^\w*\(", f"def {name}(", line) + ": ..."
    function = ast.parse(line).body[0]
    assert isinstance(function, ast.FunctionDef)
    return signature(function)


def described(body: list[ast.stmt], owner: str = "") -> Iterator[tuple[str, ast.FunctionDef | None]]:
    """Every name of the stub, with its signature if it has one; members as `Class.member`."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield node.name, None
            yield from described(node.body, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield owner + node.name, node
        elif isinstance(node, ast.AnnAssign):
            yield owner + ast.unparse(node.target), None


def compiled() -> Iterator[tuple[str, str | None]]:
    """Every public name of the module, with its docstring if it can be called or is a property."""
    for name, value in vars(_core).items():
        if name.startswith("_") or inspect.ismodule(value):
            continue
        yield name, value.__doc__ if inspect.isroutine(value) else None
        for member, inner in vars(value).items() if inspect.isclass(value) else ():
            if isinstance(inner, property):
                yield f"{name}.{member}", inner.fget.__doc__
            elif member == "__init__" and (inner.__doc__ or "").startswith("__init__("):
                yield f"{name}.{member}", inner.__doc__
            elif not member.startswith("_"):
                yield f"{name}.{member}", inner.__doc__


def difference(name: str, stub: ast.FunctionDef, doc: str | None) -> str | None:
    """What differs between two signatures of one name, None when nothing does."""
    positional, keywords, result = signature(stub)
    theirs, their_keywords, their_result = compiled_signature(name.rpartition(".")[2], doc)
    if "." in name:  # pybind11 calls the object `self`, and of a property arg0
        positional, theirs = positional[1:], theirs[1:]
    if positional != theirs:
        return f"{name}: parameters {positional} in the stub, {theirs} in the module"
    if bool(keywords) != bool(their_keywords) or (their_keywords not in ([], ["**"]) and keywords != their_keywords):
        return f"{name}: keywords {keywords} in the stub, {their_keywords} in the module"
    if their_result in VAGUE:
        result = "object" if their_result == "object" else result.partition("[")[0]
    return None if result == their_result else f"{name}: -> {result} in the stub, {their_result} in the module"


def test_stub_has_the_names_of_the_compiled_module() -> None:
    stub = {name for name, _ in described(ast.parse(STUB.read_text("utf-8")).body)}
    module = {name for name, _ in compiled()}
    assert not stub - module, f"only in the stub: {sorted(stub - module)}"
    assert not module - stub, f"only in the module: {sorted(module - stub)}"


def test_stub_has_the_signatures_of_the_compiled_module() -> None:
    stub = dict(described(ast.parse(STUB.read_text("utf-8")).body))
    signed = [(name, doc) for name, doc in compiled() if doc is not None and stub.get(name) is not None]
    assert len(signed) > 40, "pybind11 writes no signatures any more"
    found = [difference(name, stub[name], doc) for name, doc in signed]
    assert not any(found), "\n".join(line for line in found if line)


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        ("dequantize(type: int, data: object) -> numpy.typing.NDArray[numpy.float32]", "parameters"),
        ("dequantize(type: int, data: object, n_cols: int) -> numpy.typing.NDArray[numpy.uint8]", "-> NDArray"),
        ("dequantize(type: int, data: object, n_cols: int) -> numpy.typing.NDArray[numpy.float32]", None),
    ],
)
def test_difference_is_named(doc: str, expected: str | None) -> None:
    text = "def dequantize(type: int, data: npt.NDArray[np.uint8], n_cols: int) -> npt.NDArray[np.float32]: ..."
    function = ast.parse(text).body[0]
    assert isinstance(function, ast.FunctionDef)
    found = difference("dequantize", function, doc)
    assert (found is None) if expected is None else (found is not None and expected in found)
