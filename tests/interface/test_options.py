"""Calls that are repeated, over connections that are lost."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

import pytest
import trio

from bokbok_trio import (
    ConnectionLost,
    Server,
    current_request,
    open_connection,
    open_reconnecting,
    open_server,
)
from bokbok_trio.interface import Call, Proceed, consume, expose, idempotent, with_options


class Counter(Protocol):
    @idempotent
    async def read(self) -> int: ...
    async def add(self, number: int = 1) -> int: ...
    @idempotent
    async def visit(self, visitor: Callable[[int], Awaitable[int]]) -> int: ...
    async def load(self, numbers: AsyncIterable[int]) -> int: ...


class Fragile(Counter):
    """A server that loses its connection a given number of times before it answers."""

    def __init__(self) -> None:
        self.losses = 0
        self.calls: list[str] = []

    async def _lose(self, name: str) -> None:
        self.calls.append(name)
        if self.losses:
            self.losses -= 1
            await current_request().connection.aclose()
            await trio.sleep_forever()

    async def read(self) -> int:
        await self._lose("read")
        return 7

    async def add(self, number: int = 1) -> int:
        await self._lose("add")
        return number

    async def visit(self, visitor: Callable[[int], Awaitable[int]]) -> int:
        found = await visitor(len(self.calls))
        await self._lose("visit")
        return found

    async def load(self, numbers: AsyncIterable[int]) -> int:
        await self._lose("load")
        return sum([number async for number in numbers])


@asynccontextmanager
async def open_fragile(**options: Any) -> AsyncGenerator[tuple[Counter, Fragile, Server]]:
    fragile = Fragile()
    async with (
        open_server("127.0.0.1:0", expose(Counter, fragile)) as server,
        open_reconnecting(server.addresses, **options) as client,
    ):
        yield consume(client, Counter), fragile, server


async def test_what_is_idempotent_is_repeated_and_what_is_not_is_told() -> None:
    async with open_fragile() as (counter, fragile, _):
        fragile.losses = 1
        assert await counter.read() == 7
        assert fragile.calls == ["read", "read"]
        fragile.losses = 1
        with pytest.raises(ConnectionLost) as caught:
            await counter.add()
        assert caught.value.may_have_run
        assert fragile.calls[2:] == ["add"]
        assert await counter.add(3) == 3


async def test_a_stand_in_may_be_told_that_all_its_calls_are() -> None:
    async with open_fragile() as (counter, fragile, _):
        fragile.losses = 1
        assert await with_options(counter, idempotent=True).add(2) == 2
        assert fragile.calls == ["add", "add"]
        fragile.losses = 1
        again = with_options(with_options(counter, idempotent=True), idempotent=False)
        with pytest.raises(ConnectionLost):
            await again.add(2)
        fragile.losses = 1
        assert await again.read() == 7  # which its mark says


async def test_the_clients_settings_say_how_often() -> None:
    async with open_fragile(max_repeats=0) as (counter, fragile, _):
        fragile.losses = 1
        with pytest.raises(ConnectionLost, match="the request was sent once"):
            await counter.read()
        assert fragile.calls == ["read"]


async def test_a_repeated_call_lends_again() -> None:
    async def visitor(number: int) -> int:
        return 10 * number

    async with open_fragile() as (counter, fragile, _):
        fragile.losses = 1
        assert await counter.visit(visitor) == 10
        assert fragile.calls == ["visit", "visit"]


async def test_streams_are_never_repeated() -> None:
    async def numbers() -> AsyncGenerator[int]:
        yield 1

    async with open_fragile() as (counter, fragile, _):
        fragile.losses = 1
        with pytest.raises(ConnectionLost):
            await with_options(counter, idempotent=True).load(numbers())
        assert fragile.calls == ["load"]
        assert await counter.load(numbers()) == 1


async def test_middleware_sees_a_repeated_call_once() -> None:
    seen: list[str] = []

    async def look(call: Call, proceed: Proceed) -> Any:
        seen.append(call.method)
        return await proceed(call)

    fragile = Fragile()
    async with (
        open_server("127.0.0.1:0", expose(Counter, fragile)) as server,
        open_reconnecting(server.addresses) as client,
    ):
        fragile.losses = 1
        assert await consume(client, Counter, middleware=[look]).read() == 7
    assert seen == ["read"]
    assert fragile.calls == ["read", "read"]


async def test_over_a_plain_connection_nothing_is_repeated() -> None:
    fragile = Fragile()
    async with (
        open_server("127.0.0.1:0", expose(Counter, fragile)) as server,
        open_connection(server.addresses[0]) as client,
    ):
        counter = with_options(consume(client, Counter), idempotent=True)
        assert await counter.read() == 7
        assert await counter.add(2) == 2
        fragile.losses = 1
        with pytest.raises(ConnectionLost):
            await counter.read()
        assert fragile.calls == ["read", "add", "read"]


async def test_a_reconnecting_client_serves_too() -> None:
    fragile = Fragile()
    found: list[int] = []

    async with (
        open_server("127.0.0.1:0") as server,
        open_reconnecting(server.addresses, request_handler=expose(Counter, fragile)),
    ):
        [connection] = server.connections
        counter = consume(connection, Counter)
        found += [await counter.read(), await counter.load(numbers_up_to(4))]
    assert found == [7, 6]


async def numbers_up_to(count: int) -> AsyncGenerator[int]:
    for number in range(count):
        yield number
