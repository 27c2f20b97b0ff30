"""Handlers of requests and channels in one object, and those that are added to a connection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio

from bokbok_trio import (
    Channel,
    CombinedHandler,
    Connection,
    RemoteError,
    add_handler,
    find_handler,
    open_connection,
    open_reconnecting,
    open_server,
    serve,
)
from bokbok_trio.testing import MemoryListener, open_connection_pair
from tests.support.helpers import echo, settle


class Both:
    def __init__(self, name: str = "both") -> None:
        self.name = name

    async def handle_request(self, connection: Connection, request: list[bytes]) -> list[bytes | str]:
        await trio.lowlevel.checkpoint()
        return [self.name, *request]

    async def handle_channel(
        self, connection: Connection, request: list[bytes], channel: Channel
    ) -> list[bytes | str]:
        async for item in channel:
            await channel.send([self.name, *item])
        return [self.name, *request]


async def ask_both_ways(
    connection: Connection, *fields: bytes
) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """The answer to a request, an item that came back on a channel, and its answer."""
    answer = await connection.request(fields)
    async with connection.open_channel(fields) as channel:
        await channel.send(["item"])
        item = await channel.receive()
        await channel.end()
        return answer, item, await channel.answer()


def test_what_is_a_combined_handler() -> None:
    assert isinstance(Both(), CombinedHandler)
    assert not isinstance(echo, CombinedHandler)


async def test_a_server_and_a_client_take_one() -> None:
    async with open_connection_pair(Both("client"), Both("server")) as (client, server):
        assert await ask_both_ways(client, b"a") == (
            [b"server", b"a"],
            [b"server", b"item"],
            [b"server", b"a"],
        )
        assert await ask_both_ways(server, b"b") == (
            [b"client", b"b"],
            [b"client", b"item"],
            [b"client", b"b"],
        )


async def test_a_reconnecting_client_takes_one() -> None:
    asked = trio.Event()

    async def ask_back(connection: Connection) -> None:
        assert (await ask_both_ways(connection, b"x"))[0] == [b"both", b"x"]
        asked.set()

    async with (
        open_server("127.0.0.1:0", echo) as server,
        open_reconnecting([server.addresses[0]], request_handler=Both(), open_handler=None),
    ):
        [connection] = server.connections
        await ask_back(connection)
    assert asked.is_set()


@pytest.mark.parametrize("start", [open_connection, open_reconnecting, open_server])
async def test_one_and_a_channel_handler_besides_are_refused(start: Callable[..., Any]) -> None:
    async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> None: ...

    with pytest.raises(TypeError, match="handles channels itself: leave channel_handler out"):
        async with start("127.0.0.1:1", request_handler=Both(), channel_handler=channel_handler):
            raise AssertionError


async def test_serve_refuses_that_too() -> None:
    with pytest.raises(TypeError, match="handles channels itself"):
        await serve([MemoryListener()], Both(), channel_handler=Both().handle_channel)


async def test_one_that_is_not_async_is_refused() -> None:
    class Sync:
        def handle_request(self, connection: Connection, request: list[bytes]) -> None: ...
        def handle_channel(self, connection: Connection, request: list[bytes], channel: Channel) -> None: ...

    wrong: Any = Sync()
    with pytest.raises(TypeError, match="request_handler must be an async function"):
        async with open_server([MemoryListener()], wrong):
            raise AssertionError


# ---- added to a connection ----


@pytest.mark.parametrize("has_own", [False, True])
async def test_an_added_handler_gets_the_requests_with_its_first_field(has_own: bool) -> None:
    async with open_connection_pair(Both("own") if has_own else None) as (client, server):
        add_handler(client, b"%x", Both("added"))
        assert await ask_both_ways(server, b"%x", b"1") == (
            [b"added", b"%x", b"1"],
            [b"added", b"item"],
            [b"added", b"%x", b"1"],
        )
        for fields in ([], [b"%"], [b"%xx"], [b"1", b"%x"]):
            if has_own:
                assert await server.request(fields) == [b"own", *fields]
            else:
                with pytest.raises(RemoteError) as caught:
                    await server.request(fields)
                assert caught.value.code == "no-handler"
                with pytest.raises(RemoteError) as caught:
                    async with server.open_channel(fields) as channel:
                        await channel.answer()
                assert caught.value.code == "no-channel"


async def test_several_may_be_added() -> None:
    async with open_connection_pair() as (client, server):
        add_handler(client, b"a", Both("A"))
        add_handler(client, b"b", Both("B"))
        assert await server.request(["a"]) == [b"A", b"a"]
        assert await server.request(["b"]) == [b"B", b"b"]


async def test_two_with_one_first_field_are_refused() -> None:
    async with open_connection_pair() as (client, server):
        add_handler(client, b"a", Both("first"))
        with pytest.raises(ValueError, match="first field b'a' have a handler already"):
            add_handler(client, b"a", Both("second"))
        assert await server.request(["a"]) == [b"first", b"a"]


async def test_what_was_added_is_found() -> None:
    added = Both()
    async with (
        open_server("127.0.0.1:0", echo) as server,
        open_reconnecting(server.addresses) as client,
    ):
        await client.request(["1"])
        assert client.connection is not None
        assert find_handler(client, b"a") is None
        add_handler(client.connection, b"a", added)
        assert find_handler(client, b"a") is find_handler(client.connection, b"a") is added
        [connection] = server.connections
        assert find_handler(connection, b"a") is None


async def test_only_combined_handlers_can_be_added() -> None:
    async with open_connection_pair() as (client, _):
        wrong: Any = echo
        with pytest.raises(TypeError, match="must have handle_request and handle_channel"):
            add_handler(client, b"a", wrong)
        wrong = "a"
        with pytest.raises(TypeError, match="the first field of requests is bytes, not 'a'"):
            add_handler(client, wrong, Both())


async def test_the_task_of_an_added_handler_is_named_after_it() -> None:
    names: list[str] = []

    class Slow(Both):
        async def handle_request(self, connection: Connection, request: list[bytes]) -> list[bytes | str]:
            await trio.lowlevel.checkpoint()
            names.append(trio.lowlevel.current_task().name)
            return []

    async with open_connection_pair() as (client, server):
        add_handler(client, b"a", Slow())
        await server.request(["a"])
    assert "Slow.handle_request (request" in names[0]


async def test_one_that_is_added_to_a_reconnecting_connection_stays() -> None:
    async with (
        open_server("127.0.0.1:0", echo) as server,
        open_reconnecting(server.addresses) as client,
    ):
        await client.request(["1"])
        add_handler(client, b"a", Both())
        for _ in range(2):
            [connection] = server.connections
            assert await connection.request(["a"]) == [b"both", b"a"]
            await connection.aclose()
            await client.request(["again"])
            await settle()


async def test_a_closed_connection_takes_one_and_nothing_happens() -> None:
    async with open_connection_pair() as (client, _):
        await client.aclose()
    add_handler(client, b"a", Both())
