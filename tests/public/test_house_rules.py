"""Tests reach inside by `tests/support/inside.py` alone, and no file or function is too long to read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import bokbok_trio

PACKAGE = Path(bokbok_trio.__file__).parent
TESTS = Path(__file__).parents[1]
INSIDE = TESTS / "support" / "inside.py"
PRIVATE_MODULES = {path.stem for path in PACKAGE.rglob("_*") if path.suffix in {"", ".py"}}
STANDARD = {"os", "sys"}  # `os._exit` is public
BY_NAME = {"getattr", "setattr", "delattr", "hasattr", "object", "patch"}

MOST_LINES_OF_TESTS = 600
MOST_LINES = 400
MOST_LINES_OF_A_FUNCTION = 60


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_module(node: ast.expr, name: str) -> bool:
    """Whether an attribute is a module of the package, or public in the module that defines it."""
    root = ast.unparse(node).split(".")[0]
    return root in STANDARD or (root == "bokbok_trio" and name in PRIVATE_MODULES)


def own(tree: ast.Module) -> set[ast.AST]:
    """Return every `self` and `cls` in a class: a class may use private names of its own objects."""
    return {
        node
        for found in ast.walk(tree)
        if isinstance(found, ast.ClassDef)
        for node in ast.walk(found)
        if isinstance(node, ast.Name) and node.id in {"self", "cls"}
    }


def touched(tree: ast.Module) -> Iterator[str]:
    """Yield the private names of others that a file touches, with their lines."""
    selves = own(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names = [node.attr] if node.value not in selves and not is_module(node.value, node.attr) else []
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names if alias.name not in PRIVATE_MODULES]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in BY_NAME:
            texts = [each.value for each in node.args[:2] if isinstance(each, ast.Constant)]
            names = [text.split(".")[-1] for text in texts if isinstance(text, str)]
        else:
            continue
        yield from (f"{node.lineno}: {name}" for name in names if is_private(name))


def docstring_lines(node: ast.AST) -> int:
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return 0
    if ast.get_docstring(node) is None:
        return 0
    return (node.body[0].end_lineno or 0) - node.body[0].lineno + 1


def long_parts(source: str, most: int, most_of_a_function: int) -> Iterator[str]:
    """Yield the file if it has more lines than that, and its functions that do; docstrings do not count."""
    tree = ast.parse(source)
    lines = len(source.splitlines()) - sum(map(docstring_lines, ast.walk(tree)))
    if lines > most:
        yield f"{lines} lines"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1 - docstring_lines(node)
            if lines > most_of_a_function:
                yield f"{node.name}: {lines} lines"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("connection._session", ["_session"]),
        ("connection._session.error", ["_session"]),
        ("client.connection._ending._reason = 1", ["_ending", "_reason"]),
        ("from bokbok_trio._portal import Latch, _stop_all", ["_stop_all"]),
        ("from ..support.cli import _make", ["_make"]),
        ("import bokbok_trio._keys as k; k._derive()", ["_derive"]),
        ("bokbok_trio._keys._derive()", ["_derive"]),
        ("monkeypatch.setattr(Session, '_take', fail)", ["_take"]),
        ("patch.setattr('bokbok_trio._portal._stop_all', fail)", ["_stop_all"]),
        ("getattr(connection, '_session')", ["_session"]),
        ("def fail(self: Session): return self._outbox", ["_outbox"]),
        ("class Peer:\n    def send(self): return other._sent", ["_sent"]),
    ],
)
def test_a_private_name_is_found(source: str, names: list[str]) -> None:
    assert sorted(each.split(": ")[1] for each in touched(ast.parse(source))) == names


@pytest.mark.parametrize(
    "source",
    [
        "class Peer:\n    def send(self): self._sent += 1",
        "from bokbok_trio import _keys\nfrom bokbok_trio._cli import _calls",
        "from bokbok_trio._keys import MAX_KEYS",
        "monkeypatch.setattr(bokbok_trio._keys, 'crypto_pwhash_alg', fail)",
        "monkeypatch.setattr('bokbok_trio._client.dial', dial)",
        "os._exit(0)",
        "connection.__aenter__()",
    ],
)
def test_what_is_no_private_name_of_others_is_not(source: str) -> None:
    assert not list(touched(ast.parse(source)))


def test_a_long_file_and_a_long_function_are_found() -> None:
    function = '@cache\ndef f():\n    """Docstring\n\n    of three lines."""\n' + "    x = 1\n" * 9
    source = '"""Docstring."""\n' + function
    assert list(long_parts(source, 11, 10)) == []
    assert list(long_parts(source, 10, 9)) == ["11 lines", "f: 10 lines"]


def test_tests_touch_private_names_inside_alone() -> None:
    found = [
        f"{path.relative_to(TESTS)}:{each}"
        for path in sorted(TESTS.rglob("*.py"))
        if path != INSIDE
        for each in touched(ast.parse(path.read_text()))
    ]
    assert not found


def test_no_file_of_tests_is_too_long() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in TESTS.rglob("*.py")}
    assert not {name: lines for name, lines in lengths.items() if lines > MOST_LINES_OF_TESTS}


def test_no_file_or_function_of_the_package_is_too_long() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}: {each}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for each in long_parts(path.read_text(), MOST_LINES, MOST_LINES_OF_A_FUNCTION)
    ]
    assert not found
