"""A call that is made under a cancelled scope, or after its deadline, reaches no handler."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import trio
import trio.lowlevel
import trio.testing

from bokbok_trio import Channel, Connection, ConnectionLost
from tests.support.handlers import cancelled_in_its_handler
from tests.support.inside import items_held
from tests.support.pairs import open_pair, over_all_ways, settle


@contextmanager
def cancelled() -> Generator[trio.CancelScope]:
    """A scope that is cancelled already."""
    with trio.CancelScope() as scope:
        scope.cancel()
        yield scope


@contextmanager
def cancelled_outside() -> Generator[trio.CancelScope]:
    """A scope that is cancelled, around two that are not."""
    with trio.CancelScope() as scope, trio.CancelScope(), trio.move_on_after(100):
        scope.cancel()
        yield scope


@contextmanager
def late() -> Generator[trio.CancelScope]:
    """A deadline that has passed before the scope is entered."""
    with trio.CancelScope(deadline=trio.current_time() - 1) as scope:
        yield scope


@contextmanager
def late_by_computing() -> Generator[trio.CancelScope]:
    """A deadline that passes while the task computes, so that Trio has not noticed."""
    with trio.move_on_after(0.002) as scope:
        time.sleep(0.004)
        yield scope


@contextmanager
def just_now() -> Generator[trio.CancelScope]:
    """A deadline of no time at all."""
    with trio.move_on_after(0) as scope:
        yield scope


over_all_scopes = pytest.mark.parametrize(
    "scope",
    [cancelled, cancelled_outside, late, late_by_computing, just_now],
    ids=lambda scope: scope.__name__,
)


class Recorder:
    """Handlers of both kinds that record their requests."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    async def handle(self, connection: Connection, request: list[bytes]) -> list[bytes]:
        self.seen += request
        return request

    async def handle_channel(
        self, connection: Connection, request: list[bytes], channel: Channel
    ) -> list[bytes]:
        self.seen += request
        async for item in channel:
            self.seen += item
        self.seen.append(b"end")
        return [b"answer"]


async def request(connection: Connection) -> None:
    await connection.request([b"cancelled"])


async def large_request(connection: Connection) -> None:
    await connection.request([b"cancelled", bytes(200_000)])


async def request_with_context(connection: Connection) -> None:
    await connection.request([b"cancelled"], context={"trace": "1"})


async def open_channel(connection: Connection) -> None:
    async with connection.open_channel([b"cancelled"]):
        pytest.fail("the block ran")


CALLS = [request, large_request, request_with_context, open_channel]


@over_all_ways
@over_all_scopes
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("from_server", [False, True])
async def test_a_request_that_is_cancelled_before_reaches_nobody(
    way: str,
    scope: Callable[[], Any],
    call: Callable[[Connection], Awaitable[None]],
    from_server: bool,
) -> None:
    over_there = Recorder()
    handlers: dict[str, Any] = {
        "client_handler" if from_server else "server_handler": over_there.handle,
        f"{'client' if from_server else 'server'}_channel_handler": over_there.handle_channel,
    }
    async with open_pair(way, **handlers) as pair:
        asker, other = reversed(pair) if from_server else pair
        for _ in range(3):
            assert await asker.request([b"warm"]) == [b"warm"]
            with scope() as the_scope:
                await call(asker)
                pytest.fail("the call returned")
            assert the_scope.cancelled_caught or the_scope.cancel_called
        await settle(asker, other)
        assert over_there.seen == [b"warm"] * 3
        statistics = asker.statistics()
        assert (statistics.used_slots, statistics.requests_waiting) == (0, 0)


@over_all_ways
@pytest.mark.parametrize("busy", [False, True])
async def test_among_busy_askers_too(way: str, busy: bool) -> None:
    over_there = Recorder()
    async with open_pair(way, None, over_there.handle) as (client, server), trio.open_nursery() as nursery:

        async def ask() -> None:
            while True:
                await client.request([b"warm"])

        for _ in range(5 if busy else 0):
            nursery.start_soon(ask)
        for scope in (cancelled, late, just_now, late_by_computing) * 15:
            with scope():
                await client.request([b"cancelled"])
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
            await settle(client, server)
    assert b"cancelled" not in over_there.seen


@over_all_ways
@over_all_scopes
@pytest.mark.parametrize("act", ["send", "send large", "receive", "end", "answer"])
async def test_what_a_channel_is_told_too_late_does_not_happen(
    way: str, scope: Callable[[], Any], act: str
) -> None:
    over_there = Recorder()
    async with open_pair(way, None, server_channel_handler=over_there.handle_channel) as (client, server):
        async with client.open_channel([b"open"]) as channel:
            await channel.send([b"item"])
            await settle(client, server)
            with scope() as the_scope:
                match act:
                    case "send":
                        await channel.send([b"cancelled"])
                    case "send large":
                        await channel.send([b"cancelled", bytes(100_000)])
                    case "receive":
                        await channel.receive()
                    case "end":
                        await channel.end()
                    case _:
                        await channel.answer()
                pytest.fail("the call returned")
            assert the_scope.cancelled_caught
            await settle(client, server)
            assert over_there.seen == [b"open", b"item"]
            await channel.send([b"last"])
            await channel.end()
            with trio.fail_after(5):
                assert await channel.answer() == [b"answer"]
    assert over_there.seen == [b"open", b"item", b"last", b"end"]


@over_all_ways
@over_all_scopes
async def test_a_handler_whose_channel_is_cancelled_before_takes_and_sends_nothing(
    way: str, scope: Callable[[], Any]
) -> None:
    async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> None:
        await channel.send([b"first"])
        while not items_held(channel):
            await trio.sleep(0.001)
        with scope():
            await channel.send([b"cancelled"])
        with scope():
            await channel.receive()
            pytest.fail("it received")
        assert await channel.receive() == [b"for the handler"]
        await channel.send([b"second"])

    async with open_pair(way, server_channel_handler=channel_handler) as (client, _):
        async with client.open_channel([]) as channel:
            await channel.send([b"for the handler"])
            with trio.fail_after(5):
                assert [item async for item in channel] == [[b"first"], [b"second"]]
                assert await channel.answer() == []


@over_all_ways
@over_all_scopes
async def test_a_ping_that_is_cancelled_before_is_none(way: str, scope: Callable[[], Any]) -> None:
    async with open_pair(way) as (client, _):
        with scope() as the_scope:
            await client.ping()
        assert the_scope.cancelled_caught
        assert client.statistics().packets_queued == 0
        with trio.fail_after(5):
            assert await client.ping() >= 0


@over_all_ways
@pytest.mark.parametrize("shielded", [False, True])
@pytest.mark.parametrize("call", CALLS[:2])
async def test_a_call_to_clean_up_in_a_cancelled_handler_runs_only_where_it_is_shielded(
    way: str, shielded: bool, call: Callable[[Connection], Awaitable[None]]
) -> None:
    back_here = Recorder()

    async def handler(connection: Connection, request: list[bytes]) -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=shielded, deadline=trio.current_time() + 5):
                await call(connection)

    async with open_pair(way, back_here.handle, handler) as (client, server):
        async with cancelled_in_its_handler(server) as scope:
            await client.request([])
        assert scope.cancelled_caught
        with trio.fail_after(5):
            while client.statistics().requests_cancelled:
                await trio.sleep(0.001)
        await settle(client, server)
        assert back_here.seen[:1] == ([b"cancelled"] if shielded else [])


@over_all_ways
async def test_an_await_in_finally_of_an_asker_that_is_cancelled_asks_nothing(way: str) -> None:
    over_there = Recorder()
    async with open_pair(way, None, over_there.handle) as (client, server):
        with trio.move_on_after(0.01):
            try:
                await trio.sleep_forever()
            finally:
                try:
                    await client.request([b"cancelled"])
                finally:
                    async with client.open_channel([b"cancelled"]):
                        pytest.fail("the block ran")
        await settle(client, server)
    assert over_there.seen == []


@over_all_ways
async def test_a_closed_connection_says_so_only_to_those_who_are_not_cancelled(way: str) -> None:
    async with open_pair(way) as (client, server):
        await server.aclose()
        await client.wait_closed()
        for call in CALLS:
            with cancelled() as scope:
                await call(client)
            assert scope.cancelled_caught
            with pytest.raises(ConnectionLost) as caught:
                await call(client)
            assert not caught.value.may_have_run
