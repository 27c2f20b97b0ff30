"""Callbacks nested in callbacks never deadlock, at any load and depth, in any direction."""

from __future__ import annotations

import ast
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from itertools import count

import pytest
import trio
import trio.testing
from hypothesis import given, settings, strategies as st
from trio.testing import MockClock

from bokbok_trio import (
    Channel,
    Connection,
    RemoteError,
    Settings,
    current_request,
    open_connection,
    open_server,
)
from bokbok_trio.testing import open_connection_pair
from tests.support.pairs import open_pair, over_all_ways, settle

MAX_DEPTH = 15
"""Requests that one may be nested in, says the protocol."""


async def down(connection: Connection, request: list[bytes]) -> list[bytes]:
    """Count down, by a request to the other side for each step."""
    n = int(request[0])
    if n:
        await connection.request([str(n - 1)])
    return request


async def down_with_a_wait(connection: Connection, request: list[bytes]) -> list[bytes]:
    await trio.lowlevel.checkpoint()
    return await down(connection, request)


async def down_channels(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
    """Do as `down` does, by channels, with an item each way in each."""
    assert await channel.receive() == request
    n = int(request[0])
    if n:
        await ask_by_channel(connection, n - 1)
    await channel.send(request)
    return request


async def ask_by_channel(connection: Connection, n: int) -> None:
    async with connection.open_channel([str(n)]) as channel:
        await channel.send([str(n)])
        assert await channel.receive() == [b"%d" % n]
        assert await channel.answer() == [b"%d" % n]


@over_all_ways
@pytest.mark.parametrize("depth", [1, 2, 5, MAX_DEPTH])
@pytest.mark.parametrize("max_requests", [1, 3])
async def test_chains_at_full_load_both_ways(way: str, depth: int, max_requests: int) -> None:
    bounds = Settings(max_requests=max_requests)
    async with open_pair(way, down, down_with_a_wait, client_settings=bounds, server_settings=bounds) as (
        client,
        server,
    ):
        with trio.fail_after(15):
            async with trio.open_nursery() as nursery:
                for _ in range(8 * max_requests):
                    nursery.start_soon(client.request, [str(depth)])
                    nursery.start_soon(server.request, [str(depth)])
        await settle(client, server)
        for side in (client, server):
            assert (side.statistics().used_slots, side.statistics().handlers_running) == (0, 0)


async def test_a_hundred_callers_at_the_default_settings() -> None:
    async with open_pair("tcp plain", down, down) as (client, server):
        with trio.fail_after(15):
            async with trio.open_nursery() as nursery:
                for i in range(150):
                    nursery.start_soon(client.request, [str(i % 4)])
                    nursery.start_soon(server.request, [str(i % 3)])


@pytest.mark.parametrize("depth", range(MAX_DEPTH + 1))
async def test_a_chain_of_every_depth(depth: int, autojump_clock: MockClock) -> None:
    bounds = Settings(max_requests=1)
    async with open_connection_pair(
        down, down_with_a_wait, client_settings=bounds, server_settings=bounds
    ) as (client, server):
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(client.request, [str(depth)])
                    nursery.start_soon(server.request, [str(depth)])


@over_all_ways
@pytest.mark.parametrize("depth", [1, 4, MAX_DEPTH])
async def test_chains_of_channels_at_full_load_both_ways(way: str, depth: int) -> None:
    bounds = Settings(max_requests=2)
    async with open_pair(
        way,
        client_channel_handler=down_channels,
        server_channel_handler=down_channels,
        client_settings=bounds,
        server_settings=bounds,
    ) as (client, server):
        with trio.fail_after(15):
            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(ask_by_channel, client, depth)
                    nursery.start_soon(ask_by_channel, server, depth)


async def test_chains_of_requests_and_channels_in_turn() -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        n = int(request[0])
        if n:
            await ask_by_channel(connection, n - 1)
        return request

    async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
        await channel.receive()
        await down(connection, request)
        await channel.send(request)
        return request

    bounds = Settings(max_requests=1)
    async with open_pair(
        "tcp sealed",
        handler,
        handler,
        client_channel_handler=channel_handler,
        server_channel_handler=channel_handler,
        client_settings=bounds,
        server_settings=bounds,
    ) as (client, server):
        with trio.fail_after(15):
            async with trio.open_nursery() as nursery:
                for _ in range(10):
                    nursery.start_soon(client.request, [b"%d" % MAX_DEPTH])
                    nursery.start_soon(ask_by_channel, server, MAX_DEPTH)


@over_all_ways
@pytest.mark.parametrize("by_channel", [False, True])
async def test_the_level_after_the_deepest_is_refused_before_it_is_sent(way: str, by_channel: bool) -> None:
    depths: list[int] = []
    refusals: list[BaseException] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        depths.append(current_request().depth)
        packets = connection.statistics().packets_queued
        try:
            if by_channel:
                async with connection.open_channel([]) as channel:
                    await channel.answer()
            else:
                await connection.request([])
        except RecursionError as exc:
            refusals.append(exc)
            assert connection.statistics().packets_queued == packets
            raise

    async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> None:
        await handler(connection, request)

    async with open_pair(
        way,
        handler,
        handler,
        client_channel_handler=channel_handler,
        server_channel_handler=channel_handler,
    ) as (client, _):
        with trio.fail_after(5), pytest.raises(RemoteError, match="Error: ") as caught:
            await client.request([])
        assert caught.value.code == "handler-error"
        assert depths == list(range(MAX_DEPTH + 1))
        assert len(refusals) == 1
        assert "15" in str(refusals[0])
        with trio.fail_after(5):
            assert await client.ping() >= 0


async def test_the_depth_is_counted_in_tasks_that_a_handler_starts_and_from_none_outside() -> None:
    depths: list[int] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        depths.append(current_request().depth)
        if request == [b"ask"]:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.request, [])
            ask = partial(connection.request, ["from a thread"])
            await trio.to_thread.run_sync(lambda: trio.from_thread.run(ask))

    async with open_pair("tcp plain", handler, handler) as (client, server):
        await client.request(["ask"])
        await client.request([])
        await server.request([])
    assert depths == [0, 1, 1, 0, 0]


@asynccontextmanager
async def circle(size: int, settings: Settings) -> AsyncGenerator[list[Connection]]:
    """Servers each of which asks the next one over a connection of its own, in a circle.

    Yields a connection to each of them. A request is a number: how many are still to be asked.
    """
    onward: list[Connection] = []

    async with AsyncExitStack() as stack:
        addresses = []
        for place in range(size):

            async def handler(
                connection: Connection, request: list[bytes], place: int = place
            ) -> list[bytes]:
                n = int(request[0])
                if n:
                    await onward[place].request([str(n - 1)])
                return request

            server = await stack.enter_async_context(open_server("127.0.0.1:0", handler, settings=settings))
            addresses.append(server.addresses[0])
        for place in range(size):
            to = addresses[(place + 1) % size]
            onward.append(await stack.enter_async_context(open_connection(to, settings=settings)))
        yield onward


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("max_requests", [1, 2, 10])
async def test_circles_of_connections(size: int, max_requests: int) -> None:
    async with circle(size, Settings(max_requests=max_requests)) as connections:
        with trio.fail_after(15):
            async with trio.open_nursery() as nursery:
                for depth in range(MAX_DEPTH + 1):
                    for connection in connections:
                        nursery.start_soon(connection.request, [str(depth)])


@over_all_ways
async def test_a_hundred_subscriptions_do_not_hold_up_a_request(
    way: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def subscribe(connection: Connection, request: list[bytes], channel: Channel) -> None:
        await channel.send([b"hello"])
        await trio.sleep_forever()

    async def both(
        connection: Connection, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        async with connection.open_channel([]) as channel:
            await channel.receive()
            task_status.started()
            await trio.sleep_forever()

    async with open_pair(way, None, down, server_channel_handler=subscribe) as (client, server):
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                await nursery.start(both, client)
            assert server.statistics().handlers_running == 100
            for _ in range(10):
                with trio.fail_after(5):
                    assert await client.request(["0"]) == [b"0"]
            nursery.cancel_scope.cancel()
    assert "slot" not in caplog.text


async def test_a_hundred_requests_do_not_hold_up_a_subscription() -> None:
    async def sleep(connection: Connection, request: list[bytes]) -> None:
        await trio.sleep_forever()

    async def answer(connection: Connection, request: list[bytes], channel: Channel) -> None:
        pass

    async with open_pair("tcp plain", None, sleep, server_channel_handler=answer) as (client, server):
        async with trio.open_nursery() as nursery:
            for _ in range(110):
                nursery.start_soon(client.request, [])
            await settle(client, server)
            with trio.fail_after(5):
                async with client.open_channel([]) as channel:
                    assert await channel.answer() == []
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("by_channel", [False, True])
async def test_the_log_says_once_that_requests_wait_for_slots(
    by_channel: bool, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        await trio.sleep(5)

    async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> None:
        await trio.sleep(5)

    async def ask(connection: Connection) -> None:
        if by_channel:
            async with connection.open_channel([]) as channel:
                await channel.answer()
        else:
            await connection.request([])

    async with open_connection_pair(
        None, handler, server_channel_handler=channel_handler, server_settings=Settings(max_requests=2)
    ) as (client, _):
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(ask, client)
        assert "slot" not in caplog.text
        for _ in range(3):
            async with trio.open_nursery() as nursery:
                for _ in range(6):
                    nursery.start_soon(ask, client)
    warnings = [record for record in caplog.records if "slot" in record.message]
    assert [record.levelname for record in warnings] == ["WARNING"]
    assert "max_requests" in warnings[0].message


async def test_a_short_wait_for_a_slot_is_not_worth_a_word(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        await trio.sleep(0.4)

    async with open_connection_pair(None, handler, server_settings=Settings(max_requests=1)) as (client, _):
        for _ in range(5):
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(client.request, [])
    assert "slot" not in caplog.text


# ---- anything at all, on time that is made ----

plans = st.recursive(st.just(()), lambda inner: st.tuples(inner) | st.tuples(inner, inner), max_leaves=8)
"""What a handler asks, one after another, and the handlers of that in turn."""


@st.composite
def callers(draw: st.DrawFn) -> list[tuple[int, int, object, bool, float | None]]:
    """Draw requests: the asker, the connection, the kind, and the time of the cancellation."""
    caller = st.tuples(
        st.integers(0, 1),
        st.integers(0, 2),
        plans,
        st.booleans(),
        st.none() | st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    )
    return draw(st.lists(caller, min_size=1, max_size=12))


@given(callers(), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_no_plan_of_nested_calls_over_three_connections_stalls(
    calls: list[tuple[int, int, object, bool, float | None]], max_requests: int
) -> None:
    ticket = count()
    sides: list[Connection] = []
    answered: list[int] = []

    async def carry_out(text: bytes) -> None:
        for inner in ast.literal_eval(text.decode()):
            # Any connection will do for the next level, here, there, or another one.
            await ask(sides[next(ticket) % len(sides)], inner, by_channel=next(ticket) % 3 == 0)
        await trio.sleep(0.25 * (next(ticket) % 2))

    async def ask(connection: Connection, plan: object, *, by_channel: bool) -> None:
        if by_channel:
            async with connection.open_channel([repr(plan)]) as channel:
                await channel.answer()
        else:
            await connection.request([repr(plan)])

    async def handler(connection: Connection, request: list[bytes]) -> None:
        await carry_out(request[0])

    async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> None:
        await carry_out(request[0])

    async def call(side: int, pair: int, plan: object, by_channel: bool, patience: float | None) -> None:
        with trio.CancelScope() as scope:
            if patience is not None:
                scope.deadline = trio.current_time() + patience
            await ask(sides[2 * pair + side], plan, by_channel=by_channel)
        answered.append(1)

    async def main() -> None:
        bounds = Settings(max_requests=max_requests)
        async with AsyncExitStack() as stack:
            for _ in range(3):
                sides.extend(
                    await stack.enter_async_context(
                        open_connection_pair(
                            handler,
                            handler,
                            client_channel_handler=channel_handler,
                            server_channel_handler=channel_handler,
                            client_settings=bounds,
                            server_settings=bounds,
                            sealed=False,
                        )
                    )
                )
            with trio.fail_after(1000):
                async with trio.open_nursery() as nursery:
                    for one in calls:
                        nursery.start_soon(call, *one)
            await trio.testing.wait_all_tasks_blocked()
            for side in sides:
                with trio.fail_after(1000):
                    await side.request(["()"])
                statistics = side.statistics()
                assert (statistics.used_slots, statistics.requests_waiting) == (0, 0)
            sides.clear()

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert len(answered) == len(calls)
