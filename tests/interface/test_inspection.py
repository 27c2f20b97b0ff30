"""Inspection: everything that an interface may have."""

from __future__ import annotations

import abc
import sys
import typing
from abc import ABC
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Annotated, Any, Generic, Protocol, TypeVar

import pytest
from trio.abc import ReceiveChannel

from bokbok_trio.interface import idempotent, raises
from bokbok_trio.interface._inspection import inspect_interface
from bokbok_trio.interface._spec import NO_STREAM

if TYPE_CHECKING:
    pass
from ..support.sample_interfaces import Computed, Listener, NoSuchFile, Plain, Stat, Store, TypeAliasType

T = TypeVar("T")
U = TypeVar("U")

Stream = AbstractAsyncContextManager[ReceiveChannel[int]]


class Everything(Protocol):
    """All that is right."""

    async def value(self, a: int, b: str = "", *, c: Stat | None = None) -> list[Stat]:
        """With defaults."""
        ...

    async def nothing(self) -> None: ...
    async def upload(self, chunks: AsyncIterable[bytes], name: str) -> int: ...
    async def upload_2(self, chunks: AsyncIterator[Annotated[int, "x"]]) -> int: ...
    async def upload_3(self, chunks: ReceiveChannel[Stat]) -> int: ...
    def follow(self, path: str) -> AbstractAsyncContextManager[ReceiveChannel[Stat]]: ...
    def follow_2(self) -> typing.AsyncContextManager[ReceiveChannel[None]]: ...
    def both(self, chunks: AsyncIterable[str]) -> Stream: ...
    async def call(self, a: Callable[[float, str], Awaitable[Stat]]) -> None: ...
    async def call_2(self, a: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None: ...
    async def lend(self, a: Listener, b: Annotated[Listener | None, "y"]) -> None: ...

    async def _private(self, *whatever: object) -> object: ...
    def __len__(self) -> int: ...


def test_all_that_is_right_is_understood() -> None:
    interface = inspect_interface(Everything)
    assert (interface.name, interface.doc) == ("Everything", "All that is right.")
    found = interface.methods
    assert list(found) == [
        *("value", "nothing", "upload", "upload_2", "upload_3", "follow", "follow_2", "both"),
        *("call", "call_2", "lend"),
    ]
    value = found["value"]
    assert (value.path, value.doc, value.result) == ("Everything.value", "With defaults.", list[Stat])
    assert [(each.name, each.type, each.has_default) for each in value.parameters] == [
        ("a", int, False),
        ("b", str, True),
        ("c", Stat | None, True),
    ]
    assert not value.needs_channel
    assert found["nothing"].result is type(None)
    for name, items in {
        "upload": bytes,
        "upload_2": Annotated[int, "x"],
        "upload_3": Stat,
        "both": str,
    }.items():
        stream = found[name].stream
        assert stream is not None
        assert stream.items == items
        assert found[name].needs_channel
    for name, items in {"follow": Stat, "follow_2": None, "both": int, "upload": NO_STREAM}.items():
        assert found[name].items in [items, type(items)]
    for name in ("call", "call_2", "lend"):
        assert all(each.reference for each in found[name].parameters)
        assert found[name].references == found[name].parameters
        assert not found[name].needs_channel
    assert [each.may_be_none for each in found["lend"].parameters] == [False, True]
    callback = found["call"].references[0].reference
    assert callback is not None
    [method] = callback.methods.values()
    assert ([each.type for each in method.parameters], method.result) == ([float, str], Stat)


class OldStore(ABC):
    @abc.abstractmethod
    async def get(self, key: str) -> bytes: ...

    async def size(self) -> int:
        return 0


@pytest.mark.parametrize(("interface", "names"), [(OldStore, ["get", "size"]), (Plain, ["add"])])
def test_other_classes_than_protocols_do_as_well(interface: type, names: list[str]) -> None:
    assert list(inspect_interface(interface).methods) == names


class Pairs(Store[list[U]], Protocol[T, U]):  # type: ignore[misc]
    async def swap(self, pair: tuple[T, U]) -> dict[str, U]: ...


class StatStore(Pairs[int, Stat], Protocol):
    async def get(self, key: str, default: Stat | None = None) -> list[Stat]: ...


class Mixed(Plain, Generic[T]):
    async def mix(self, value: T) -> T:
        return value


@pytest.mark.parametrize("form", [Pairs[int, Stat], StatStore])
def test_interfaces_inherit_and_are_generic_over_concrete_types(form: Any) -> None:
    found = inspect_interface(form).methods
    assert set(found) == {"get", "put", "follow", "each", "swap"}
    assert found["get"].result == list[Stat]
    assert found["put"].parameters[1].type == list[Stat]
    assert found["follow"].items == list[Stat]
    assert found["swap"].parameters[0].type == tuple[int, Stat]
    assert found["swap"].result == dict[str, Stat]
    visit = found["each"].references[0].reference
    assert visit is not None
    assert visit.methods["__call__"].parameters[0].type == list[Stat]
    assert len(found["get"].parameters) == (2 if form is StatStore else 1)


def test_a_type_may_be_given_to_a_plain_class() -> None:
    found = inspect_interface(Mixed[int]).methods
    assert found["mix"].result is int
    assert found["add"].result is int


class Node(Protocol):
    async def visit(self, other: Node, then: Callable[[int], Awaitable[None]]) -> None: ...


def test_an_interface_may_refer_to_itself() -> None:
    interface = inspect_interface(Node)
    assert interface.methods["visit"].references[0].reference is interface


NOTE: Any = TypeAliasType("Note", lambda: Callable[[T], DONE[U]], (U, T))

DONE: Any = TypeAliasType("Done", lambda: Awaitable[T], (T,))  # type: ignore[valid-type]

ITEMS: Any = TypeAliasType("Items", lambda: ReceiveChannel[int])

MAYBE: Any = TypeAliasType("Maybe", lambda: Annotated[NOTE[str, int], "x"] | None)


def test_names_of_types_mean_what_they_stand_for() -> None:
    class Named(Protocol):
        async def upload(self, a: ITEMS) -> None: ...
        def follow(self) -> AbstractAsyncContextManager[ITEMS]: ...
        async def call(self, a: NOTE[str, int], b: MAYBE = None) -> None: ...

    found = inspect_interface(Named).methods
    stream = found["upload"].stream
    assert stream is not None
    assert stream.items is found["follow"].items is int
    assert [each.may_be_none for each in found["call"].references] == [False, True]
    for each in found["call"].references:
        assert each.reference is not None
        [method] = each.reference.methods.values()
        assert ([each.type for each in method.parameters], method.result) == ([int], str)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the statement is new in Python 3.12")
def test_the_type_statement_makes_such_names() -> None:
    names: dict[str, Any] = {"__name__": __name__, **globals()}
    exec(
        """
type Note[U, T] = Callable[[T], Awaitable[U]]
type Sizes = list[int]

class Named(Protocol):
    async def call(self, a: Note[str, int] | None, b: Sizes) -> Sizes: ...
""",
        names,
    )
    [note, sizes] = inspect_interface(names["Named"]).methods["call"].parameters
    assert note.reference is not None
    assert note.may_be_none
    assert note.reference.methods["__call__"].parameters[0].type is int
    assert sizes.type is names["Sizes"]


def test_marks_are_seen() -> None:
    class Files(Protocol):
        @idempotent
        @raises(NoSuchFile, Computed)
        async def stat(self, path: str) -> int: ...

    stat = inspect_interface(Files, "Other").methods["stat"]
    assert stat.is_idempotent
    assert stat.errors == {"NoSuchFile": NoSuchFile, "Computed": Computed}
    assert stat.path == "Other.stat"
