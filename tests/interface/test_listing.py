"""The listing: which peers see it, and what it says."""

from __future__ import annotations

from collections.abc import AsyncIterable, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import msgspec
import pytest
from trio.abc import ReceiveChannel

from bokbok_trio import Connection, ProtocolError, RemoteError
from bokbok_trio.interface import InterfaceInfo, MethodInfo, expose, idempotent, list_interfaces, raises
from bokbok_trio.testing import open_connection_pair


@dataclass
class Stat:
    size: Annotated[int, msgspec.Meta(ge=0)]
    parent: Stat | None = None


@dataclass
class NoSuchFile(Exception):
    path: str
    tried: int = 1


class Files(Protocol):
    """A file store."""

    @idempotent
    @raises(NoSuchFile)
    async def stat(self, path: str, *, depth: int = 1) -> Stat:
        """Look at a file.

        Not at what it links to.
        """
        ...

    def follow(self, path: str) -> AbstractAsyncContextManager[ReceiveChannel[bytes]]: ...
    async def copy(
        self, rows: AsyncIterable[Stat], progress: Callable[[float], Awaitable[None]]
    ) -> list[int]: ...


class Secret(Protocol):
    """Not to be known."""

    async def secret(self) -> None: ...


class Custom(Protocol):
    async def use(self, value: Plain) -> None: ...


class Plain:
    pass


FILES: Any = type("FilesOnDisk", (), {})()


def served(interface: Any, **options: Any) -> Any:
    """An interface, by something that fits and is never called."""

    class Anything:
        pass

    async def method(self: object, **arguments: Any) -> Any:
        raise AssertionError

    def stream(self: object, **arguments: Any) -> Any:
        raise AssertionError

    for name in ("stat", "copy", "secret", "use"):
        setattr(Anything, name, method)
    Anything.follow = stream  # type: ignore[attr-defined]
    return expose(interface, Anything(), **options)


async def test_a_listing_says_all_that_a_caller_needs() -> None:
    async with open_connection_pair(server_handler=served(Files, listed=True)) as (client, _):
        [files] = await list_interfaces(client)
    assert isinstance(files, InterfaceInfo)
    assert (files.name, files.doc) == ("Files", "A file store.")
    stat, follow, copy = files.methods
    assert isinstance(stat, MethodInfo)
    assert stat.name == "stat"
    assert stat.doc == "Look at a file.\n\nNot at what it links to."
    assert stat.signature == "stat(path: str, *, depth: int = 1) -> Stat"
    assert (stat.is_idempotent, follow.is_idempotent) == (True, False)
    assert resolve(files, stat.arguments) == {
        "title": "Files.stat",
        "type": "object",
        "properties": {"path": {"type": "string"}, "depth": {"type": "integer"}},
        "required": ["path"],
    }
    result = resolve(files, stat.result)
    assert result["properties"]["size"] == {"type": "integer", "minimum": 0}
    assert stat.items_in is stat.items_out is None
    assert set(stat.errors) == {"NoSuchFile"}
    assert resolve(files, stat.errors["NoSuchFile"])["required"] == ["path"]
    assert follow.signature == "follow(path: str) -> AbstractAsyncContextManager[ReceiveChannel[bytes]]"
    assert follow.items_out == {"type": "string", "contentEncoding": "base64"}
    assert follow.result == {"type": "null"}
    assert copy.items_in is not None
    assert resolve(files, copy.items_in) == result
    assert copy.result == {"type": "array", "items": {"type": "integer"}}
    assert resolve(files, copy.arguments)["properties"] == {}
    assert "progress: Callable[[float], Awaitable[None]]" in copy.signature


def resolve(info: InterfaceInfo, schema: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = info.definitions[schema["$ref"].removeprefix("#/$defs/")]
    return found


async def test_only_what_is_to_be_listed_is() -> None:
    exposed = served(Files, listed=True, name="F") | served(Secret)
    async with open_connection_pair(server_handler=exposed) as (client, _):
        assert [each.name for each in await list_interfaces(client)] == ["F"]
    both = served(Files, listed=True) | served(Secret, listed=True)
    async with open_connection_pair(server_handler=both) as (client, _):
        assert [each.name for each in await list_interfaces(client)] == ["Files", "Secret"]


async def code_of_listing(connection: Connection) -> str:
    with pytest.raises(RemoteError) as caught:
        await list_interfaces(connection)
    return caught.value.code


async def test_nothing_is_listed_that_was_not_to_be() -> None:
    async with open_connection_pair(server_handler=served(Files)) as (client, server):
        assert await code_of_listing(client) == "no-method"
        assert await code_of_listing(server) == "no-handler"


async def test_nothing_is_listed_to_somebody_who_was_not_authenticated() -> None:
    listed = served(Files, listed=True)
    async with open_connection_pair(listed, listed, sealed=False) as (client, server):
        assert await code_of_listing(client) == "no-method"
        assert await code_of_listing(server) == "no-method"


async def test_a_client_may_list_to_its_server() -> None:
    async with open_connection_pair(served(Files, listed=True)) as (_, server):
        assert [each.name for each in await list_interfaces(server)] == ["Files"]


@pytest.mark.parametrize("answer", [[], [b"\xc1"], [b"\x91\x80"], [b"\x90", b"\x90"]])
async def test_a_listing_that_is_none_is_a_protocol_error(answer: list[bytes]) -> None:
    async def lie(connection: Connection, request: list[bytes]) -> list[bytes]:
        return answer

    async with open_connection_pair(server_handler=lie) as (client, _):
        with pytest.raises(ProtocolError, match="the answer is not a listing"):
            await list_interfaces(client)


def make_error(module: str) -> type[Exception]:
    @dataclass
    class NotFound(Exception):
        where: str

    NotFound.__module__ = module
    return NotFound


HERE, THERE = make_error("here"), make_error("there")


async def test_what_has_the_same_name_is_listed_nevertheless() -> None:
    class Finder(Protocol):
        @raises(HERE)
        async def stat(self) -> None: ...
        @raises(HERE)
        async def copy(self) -> None: ...
        @raises(THERE)
        async def use(self) -> None: ...

    async with open_connection_pair(server_handler=served(Finder, listed=True)) as (client, _):
        [finder] = await list_interfaces(client)
    assert all(set(each.errors) == {"NotFound"} for each in finder.methods)
    stat, copy, use = (each.errors["NotFound"] for each in finder.methods)
    assert stat == copy != use
    for each in (stat, use):
        assert resolve(finder, each)["properties"] == {"where": {"type": "string"}}


def test_types_that_nothing_tells_apart_are_not_listed() -> None:
    class Finder(Protocol):
        async def stat(self, one: ONE) -> TWIN: ...  # type: ignore[valid-type]

    assert served(Finder)
    with pytest.raises(TypeError, match=r"two types named make_place.<locals>.Place; rename one"):
        served(Finder, listed=True)


def make_place() -> type:
    @dataclass
    class Place:
        where: str

    return Place


ONE, TWIN = make_place(), make_place()


async def test_types_with_hooks_are_listed_by_their_names() -> None:
    exposed = served(Custom, listed=True, encode_hook=repr, decode_hook=lambda cls, _value: cls())
    async with open_connection_pair(server_handler=exposed) as (client, _):
        [custom] = await list_interfaces(client)
    assert resolve(custom, custom.methods[0].arguments)["properties"] == {"value": {"title": "Plain"}}


async def test_a_newer_listing_can_be_read() -> None:
    async def newer(connection: Connection, request: list[bytes]) -> list[bytes]:
        info = {"name": "X", "doc": "", "methods": [], "definitions": {}, "added": [1]}
        return [msgspec.msgpack.encode([info])]

    async with open_connection_pair(server_handler=newer) as (client, _):
        assert await list_interfaces(client) == [InterfaceInfo("X", "", [], {})]
