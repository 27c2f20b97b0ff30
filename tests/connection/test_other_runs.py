"""A connection belongs to the Trio run that made it: from anywhere else, each method refuses at once."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

from bokbok_trio import Channel, Connection, open_connection, open_server
from tests.support.pairs import WAYS, open_pair, settle


async def echo(connection: Connection, request: list[bytes]) -> list[bytes]:
    await trio.lowlevel.checkpoint()
    return request


async def echo_items(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
    async for item in channel:
        await channel.send(item)
    return [b"done"]


class Both:
    """A connection, and a channel of it."""

    def __init__(self, connection: Connection, channel: Channel) -> None:
        self.connection = connection
        self.channel = channel


async def enter_channel(both: Both) -> None:
    async with both.connection.open_channel([]):
        pass


async def iterate(both: Both) -> None:
    async for _ in both.channel:
        pass


async def enter_and_leave(both: Both) -> None:
    async with both.channel:
        pass


ACTIONS: dict[str, Callable[[Both], object]] = {
    "Connection.request": lambda both: both.connection.request([]),
    "Connection.open_channel": enter_channel,
    "Connection.ping": lambda both: both.connection.ping(),
    "Connection.aclose": lambda both: both.connection.aclose(),
    "Connection.drain": lambda both: both.connection.drain(),
    "Connection.wait_closed": lambda both: both.connection.wait_closed(),
    "Channel.send": lambda both: both.channel.send([]),
    "Channel.receive": lambda both: both.channel.receive(),
    "Channel.__anext__": iterate,
    "Channel.end": lambda both: both.channel.end(),
    "Channel.answer": lambda both: both.channel.answer(),
    "Channel.aclose": lambda both: both.channel.aclose(),
    "Channel.__aexit__": enter_and_leave,
}

HARMLESS = {"Connection.statistics"}
"""Methods that change nothing."""


def test_no_method_is_forgotten() -> None:
    methods = {
        f"{cls.__name__}.{name}"
        for cls in (Connection, Channel)
        for name, value in vars(cls).items()
        if inspect.isfunction(value) or hasattr(value, "__wrapped__")
        if not name.startswith("_")
    }
    assert methods - HARMLESS <= set(ACTIONS)


async def in_another_run(act: Callable[[], object]) -> object:
    """Call a method in a Trio run of another thread."""

    async def main() -> object:
        result = act()
        return await result if isinstance(result, Awaitable) else result

    return await trio.to_thread.run_sync(trio.run, main)


async def in_a_thread(act: Callable[[], object]) -> object:
    """Call a method in a thread without a Trio run. Run a coroutine by hand, as far as it goes."""

    def run() -> object:
        result = act()
        if not inspect.iscoroutine(result):
            return result
        try:
            result.send(None)
        except StopIteration as exc:
            return exc.value
        pytest.fail("it waits")

    outcome: list[object] = []

    def catch() -> None:
        try:
            outcome.append(run())
        except BaseException as exc:
            outcome.append(exc)

    thread = threading.Thread(target=catch)  # that Trio knows nothing of
    thread.start()
    await trio.to_thread.run_sync(thread.join)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


async def in_a_worker_thread(act: Callable[[], object]) -> object:
    """Call a method in a worker thread of Trio."""

    def run() -> object:
        result = act()
        return result.send(None) if inspect.iscoroutine(result) else result

    return await trio.to_thread.run_sync(run)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", [in_another_run, in_a_thread, in_a_worker_thread])
@pytest.mark.parametrize("what", ACTIONS)
async def test_elsewhere_each_method_refuses_at_once_and_the_connection_goes_on(
    way: str, where: Callable[[Callable[[], object]], Awaitable[object]], what: str
) -> None:
    async with open_pair(way, None, echo, server_channel_handler=echo_items) as (client, server):
        async with client.open_channel([]) as channel:
            await channel.send([b"waits to be received"])
            await settle(client, server)
            before = client.statistics()
            with trio.fail_after(5), pytest.raises(RuntimeError, match="another Trio run"):
                await where(lambda: ACTIONS[what](Both(client, channel)))
            assert client.statistics() == before
            assert not client.closed
            with trio.fail_after(5):
                assert await client.request(["x"]) == [b"x"]
                assert await client.ping() < math.inf
                assert await channel.receive() == [b"waits to be received"]
                await channel.send([b"more"])
                assert await channel.receive() == [b"more"]
                await channel.end()
                assert await channel.answer() == [b"done"]
        client.drain()
        with trio.fail_after(5):
            await client.wait_closed()


@pytest.mark.parametrize("what", ["Connection.request", "Connection.drain", "Channel.send", "Channel.end"])
async def test_on_the_side_of_a_handler_too(what: str) -> None:
    refusals: list[BaseException] = []

    async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
        try:
            await in_another_run(lambda: ACTIONS[what](Both(connection, channel)))
        except RuntimeError as exc:
            refusals.append(exc)
        return [b"done"]

    async with open_pair("tcp sealed", server_channel_handler=channel_handler) as (client, _):
        async with client.open_channel([]) as channel:
            with trio.fail_after(5):
                assert [item async for item in channel] == []
                assert await channel.answer() == [b"done"]
        assert "another Trio run" in str(refusals[0])


@pytest.mark.parametrize("what", ACTIONS)
def test_in_a_later_run_of_the_same_thread(what: str) -> None:
    kept: list[Any] = []

    async def first() -> None:
        async with (
            open_server("127.0.0.1:0", echo, channel_handler=echo_items) as server,
            open_connection(server.addresses[0]) as client,
            client.open_channel([]) as channel,
        ):
            kept.append(Both(client, channel))

    async def second() -> None:
        with trio.fail_after(5), pytest.raises(RuntimeError, match="another Trio run"):
            result = ACTIONS[what](kept[0])
            if isinstance(result, Awaitable):
                await result

    trio.run(first)
    trio.run(second)


async def test_from_thread_run_is_the_way() -> None:
    async with open_pair("tcp plain", None, echo) as (client, _):

        async def ask() -> list[bytes]:
            return await client.request(["x"])

        assert await trio.to_thread.run_sync(lambda: trio.from_thread.run(ask)) == [b"x"]
        await trio.to_thread.run_sync(lambda: trio.from_thread.run_sync(client.drain))
        with trio.fail_after(5):
            await client.wait_closed()
