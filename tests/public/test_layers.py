"""The imports between files: the folders are the rule, and imports go down only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import bokbok_trio

PACKAGE = Path(bokbok_trio.__file__).parent
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text())
    for path in PACKAGE.rglob("*.py")
    if path.parent != PACKAGE / "interface" and path.name != "__init__.py"
}
LOWER = ["_protocol", "_stream", "_connection"]


def ours(name: str, tree: ast.Module) -> Iterator[str]:
    """Yield the names of the package's files that a file imports, even only for type checkers."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            path = [*name.split(".")[: -node.level], *filter(None, [node.module])]
            # `from . import file` and `from .folder import file` name files too.
            inner = {".".join([*path, alias.name]) for alias in node.names}
            yield from inner & set(FILES) or {".".join(path)}


def others(tree: ast.Module) -> Iterator[str]:
    """Yield the packages that a file imports by absolute names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


GRAPH = {name: set(ours(name, tree)) & set(FILES) for name, tree in FILES.items()}
GRAPH["_types"] = {"_keys"}  # the one file that names higher ones, for type checkers only


def reach(name: str) -> set[str]:
    """Return the files that a file imports, directly or indirectly."""
    found: set[str] = set()
    new = {name}
    while new:
        found |= new
        new = {each for one in new for each in GRAPH[one]} - found
    return found - {name}


def test_imports_are_found() -> None:
    source = """
import a.b, c
from d.e import f
from .._keys import Key
from .._protocol import packets
from .eager import g
if TYPE_CHECKING:
    from .._sockets import h
def i():
    import trio
"""
    tree = ast.parse(source)
    assert set(ours("_connection.reader", tree)) == {
        *("_keys", "_protocol.packets", "_connection.eager", "_sockets"),
    }
    assert set(others(tree)) == {"a", "c", "d", "trio"}


def test_no_file_imports_itself_in_a_circle() -> None:
    assert list(TopologicalSorter(GRAPH).static_order())


@pytest.mark.parametrize("folder", LOWER)
def test_imports_go_down_only(folder: str) -> None:
    higher = {*LOWER[LOWER.index(folder) + 1 :], "_client", "_server", "_reconnecting"}
    for name in FILES:
        if name.startswith(folder):
            assert not {file for file in reach(name) if file.split(".")[0] in higher}, name


def test_the_protocol_never_imports_trio() -> None:
    for name, tree in FILES.items():
        if name.startswith("_protocol"):
            io = {"trio", "outcome", "sniffio", "asyncio", "anyio", "socket", "select"}
            assert not set(others(tree)) & io, name


def test_what_is_type_only_in_types_is_that() -> None:
    body = [node for node in FILES["_types"].body if not isinstance(node, ast.If)]
    assert set(ours("_types", ast.Module(body, []))) == GRAPH["_types"]


def test_files_import_files_by_their_names() -> None:
    for name, tree in FILES.items():
        assert "bokbok_trio" not in set(others(tree)), name
