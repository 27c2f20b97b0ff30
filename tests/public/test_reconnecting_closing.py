"""Reconnecting connections: closing from this side."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import trio
import trio.testing

from bokbok_trio import (
    Connection,
    ConnectionClosed,
    ConnectionLost,
    Key,
    ReconnectingConnection,
    open_reconnecting,
)
from bokbok_trio._addresses import Address
from bokbok_trio._client import connect

from ..support.helpers import close_in_one_step, settle
from ..support.network import A, Network, count_items, drop

KEY = Key(bytes(range(32)))


class Oops(Exception):
    pass


class Held:
    """Something."""


@contextmanager
def counting_references_only() -> Generator[None]:
    """Let the garbage collector free nothing."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def closed_by_aclose(client: ReconnectingConnection, leave: Callable[[], object]) -> None:
    await client.aclose()


async def closed_by_leaving(client: ReconnectingConnection, leave: Callable[[], object]) -> None:
    leave()
    await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("close", [closed_by_aclose, closed_by_leaving])
@pytest.mark.parametrize("connected", [True, False])
async def test_closing_fails_every_waiter_at_once(
    network: Network,
    connected: bool,
    close: Callable[[ReconnectingConnection, Callable[[], object]], Awaitable[None]],
    autojump_clock: trio.testing.MockClock,
) -> None:
    failed: list[ConnectionClosed] = []
    leave = trio.Event()
    async with trio.open_nursery() as nursery, network.server() as server:

        async def stay(*, task_status: trio.TaskStatus[ReconnectingConnection]) -> None:
            async with open_reconnecting(A) as client:
                task_status.started(client)
                await leave.wait()

        async def ask(idempotent: bool) -> None:
            with pytest.raises(ConnectionClosed) as caught:
                await client.request(["sleep", "inf"], idempotent=idempotent)
            failed.append(caught.value)

        client = await nursery.start(stay)
        if not connected:
            del network.listeners[A]
            await drop(server)
            network.listen()
        nursery.start_soon(ask, False)
        nursery.start_soon(ask, True)
        await settle()
        assert not failed
        await close(client, leave.set)
        await settle()
        assert len(failed) == 2
        assert trio.current_time() < 1
        assert client.closed
        assert client.connection is None
        with pytest.raises(ConnectionClosed):
            await client.request([])
        with trio.testing.assert_checkpoints():
            await client.aclose()
        leave.set()


async def test_aclose_waits_for_the_transport_and_the_block_for_the_handlers(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    story: list[str] = []

    async def on_close(connection: Connection) -> None:
        await trio.sleep(1)
        story.append("close handler")

    async with network.server(user_key={"u": KEY}) as server:
        async with open_reconnecting(A, user="u", key=KEY, close_handler=on_close) as client:
            assert client.connection
            network.streams[-1].sending.stall()
            started = trio.current_time()
            await client.aclose()
            with pytest.raises(trio.ClosedResourceError):
                await network.streams[-1].send_all(b"")
            assert 0 < trio.current_time() - started <= 1
            assert story == []
        assert story == ["close handler"]
        await settle()
        assert server.connections == frozenset()
    assert len(network.dialled) == 1


async def test_a_cancelled_aclose_returns_at_once_and_closes_nevertheless(network: Network) -> None:
    async with network.server(), open_reconnecting(A) as client:
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.aclose()
        assert scope.cancelled_caught
        assert client.closed


@pytest.mark.parametrize("crashes", [False, True])
async def test_a_dialling_that_hangs_ends_with_the_block(
    network: Network,
    crashes: bool,
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def hang(address: Address, **_: Any) -> trio.abc.Stream:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await trio.sleep_forever()
            finally:
                if crashes:
                    raise Oops("while it was cancelled")
        raise AssertionError

    async with network.server() as server, open_reconnecting(A):
        monkeypatch.setattr("bokbok_trio._client.dial", hang)
        await drop(server)
        await trio.sleep(5)
    assert trio.current_time() == 5
    assert ("while it was cancelled" in caplog.text) is crashes


async def test_a_connection_that_is_opened_too_late_is_closed(
    network: Network, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes back from its handshake in the very step in which this side closes."""
    opened: list[Connection] = []

    async def connect_and_close(*args: Any, **options: Any) -> Connection:
        opened.append(await connect(*args, **options))
        if len(opened) == 2:
            await close_in_one_step(client)
        return opened[-1]

    async def open_handler(connection: Connection) -> None:
        if len(opened) == 2:
            await trio.sleep_forever()

    monkeypatch.setattr("bokbok_trio._reconnecting.connect", connect_and_close)
    with trio.fail_after(5):
        async with network.server() as server, open_reconnecting(A, open_handler=open_handler) as client:
            await drop(server)
            with pytest.raises(ConnectionClosed):
                await client.request(["ping", "x"])
            await opened[1].wait_closed()
    assert len(network.dialled) == 2


async def test_a_connection_that_is_over_before_its_task_begins_runs_no_open_handler(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Connection] = []
    handled: list[Connection] = []

    async def connect_and_close(*args: Any, **options: Any) -> Connection:
        opened.append(await connect(*args, **options))
        if len(opened) == 1:
            await close_in_one_step(opened[0])
        return opened[-1]

    async def open_handler(connection: Connection) -> None:
        handled.append(connection)

    monkeypatch.setattr("bokbok_trio._reconnecting.connect", connect_and_close)
    async with network.server(), open_reconnecting(A, open_handler=open_handler) as client:
        assert await client.request(["ping", "x"]) == [b"pong", b"x"]
    assert handled == opened[1:]


async def test_dialling_that_is_cancelled_is_no_cyclic_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[Held]] = []

    async def hang(*args: Any, **options: Any) -> Connection:
        something = Held()
        held.append(weakref.ref(something))
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr("bokbok_trio._reconnecting.connect", hang)
    with counting_references_only():
        with trio.move_on_after(0.01):
            async with open_reconnecting(A):
                raise AssertionError
        assert [each() for each in held] == [None]


async def test_a_channel_that_is_cancelled_while_it_is_left_is_no_cyclic_garbage(network: Network) -> None:
    async with network.server(None, channel_handler=count_items), open_reconnecting(A) as client:
        with counting_references_only():
            with trio.CancelScope() as scope:
                async with client.open_channel([]) as channel:
                    scope.cancel()
            assert scope.cancelled_caught
            held = weakref.ref(channel)
            del channel
            await settle()
            assert held() is None


@pytest.mark.parametrize("idempotent", [False, True])
async def test_a_connection_closed_by_this_side_is_replaced(
    network: Network,
    idempotent: bool,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with network.server(), open_reconnecting(A) as client:
        first = client.connection
        assert first is not None
        ended: list[str] = []

        async def ask() -> None:
            if idempotent:
                assert await client.request(["sleep", "7"], idempotent=True) == [b"slept"]
            else:
                with pytest.raises(ConnectionLost, match="this side closed") as caught:
                    await client.request(["sleep", "7"])
                assert caught.value.may_have_run
                assert isinstance(caught.value.__cause__, ConnectionClosed)
            ended.append("ended")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await settle()
            await first.aclose()
            assert client.connection is None
            assert await client.request(["ping", "x"]) == [b"pong", b"x"]
            assert client.connection is not first
            assert ended == ([] if idempotent else ["ended"])
    assert "done with the connection with 127.0.0.1:1: this side closed the connection" in caplog.text


@pytest.mark.parametrize("connected", [True, False])
@pytest.mark.parametrize("error", [Oops(), ExceptionGroup("mine", [Oops()]), KeyboardInterrupt()])
async def test_what_the_block_raises_comes_out_as_itself(
    network: Network, error: BaseException, connected: bool
) -> None:
    with pytest.raises(type(error)) as caught:
        async with network.server() as server, open_reconnecting(A) as client:
            if not connected:
                await drop(server)
                assert client.connection is None
            raise error
    assert caught.value is error


async def test_a_block_that_is_cancelled_has_no_next_connection(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with network.server() as server:
        with trio.CancelScope() as scope:
            async with open_reconnecting(A) as client:
                await drop(server)
                scope.cancel()
                with trio.move_on_after(5, shield=True):
                    with pytest.raises(ConnectionClosed):
                        await client.request([])
                assert trio.current_time() < 5
                await trio.sleep_forever()
        assert scope.cancelled_caught
