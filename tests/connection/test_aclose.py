"""Closing a connection from this side, by aclose and by leaving its block."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from bokbok_trio import Connection, ConnectionClosed, ConnectionLost, RemoteError, Settings
from bokbok_trio._connection.ending import CLOSE_TIMEOUT
from bokbok_trio.testing import FaultyStream, open_connection_pair
from tests.support.connections import (
    faulty,
    ignore_any_loss,
    ignore_loss,
    start_waiting,
)
from tests.support.helpers import busy_handler, close_in_one_step, echo, settle
from tests.support.streams import OddStream


async def test_closing_fails_every_waiter_on_both_sides_at_once(sealed: bool) -> None:
    ours: list[BaseException] = []
    theirs: list[BaseException] = []
    slots = Settings(max_requests=2)
    async with open_connection_pair(
        busy_handler, busy_handler, sealed=sealed, client_settings=slots, server_settings=slots
    ) as (client, server):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                await start_waiting(nursery, client, ours)
                await start_waiting(nursery, server, theirs)
            await client.aclose()
            await settle()
            assert [type(exc) for exc in ours] == [ConnectionClosed] * 3
            assert [type(exc) for exc in theirs] == [ConnectionLost] * 3
        lost = [exc for exc in theirs if isinstance(exc, ConnectionLost)]
        assert sorted(exc.may_have_run for exc in lost) == [False, True, True]
        assert all(exc.reason.startswith("the peer closed the connection") for exc in lost)
        assert client.closed
        assert server.closed
        await client.wait_closed()
        await server.wait_closed()
        for connection, error in ((client, ConnectionClosed), (server, ConnectionLost)):
            with pytest.raises(error) as caught:
                await connection.request([])
            assert getattr(caught.value, "may_have_run", False) is False


async def test_leaving_the_block_closes_and_waits_for_handlers_and_close_handler() -> None:
    story: list[str] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        try:
            await trio.sleep_forever()
        finally:
            story.append("handler ended")

    async def on_close(connection: Connection) -> None:
        await trio.lowlevel.checkpoint()
        story.append(f"closed {connection.closed}")

    async with trio.open_nursery() as nursery:
        async with open_connection_pair(handler, client_close_handler=on_close) as (client, server):
            nursery.start_soon(ignore_loss, server)
            await settle()
        assert story == ["handler ended", "closed True"]
        assert client.closed


async def test_aclose_from_a_handler_ends_the_handler_and_the_connection(sealed: bool) -> None:
    story: list[str] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        try:
            await connection.aclose()
        except trio.Cancelled:
            story.append("cancelled")
            raise

    async with open_connection_pair(server_handler=handler, sealed=sealed) as (client, server):
        with pytest.raises(ConnectionLost, match="the peer closed the connection"):
            await client.request([])
        await server.wait_closed()
    assert story == ["cancelled"]


async def test_aclose_waits_for_no_handler_but_wait_closed_does(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 100):
            await trio.sleep(50)

    async with open_connection_pair(server_handler=handler) as (client, server):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ignore_loss, client)
            await settle()
            await server.aclose()
        assert trio.current_time() == 0
        await server.wait_closed()
        assert trio.current_time() == 50
        await server.aclose()


async def test_a_late_answer_is_dropped() -> None:
    release = trio.Event()

    async def handler(connection: Connection, request: list[bytes]) -> list[str]:
        with trio.CancelScope(shield=True):
            await release.wait()
        return ["late"]

    async with open_connection_pair(server_handler=handler) as (client, server):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ignore_loss, client)
            await settle()
            await server.aclose()
        release.set()
        await server.wait_closed()


async def test_closing_takes_a_second_at_most_when_the_peer_does_not_read(
    sealed: bool, autojump_clock: trio.testing.MockClock
) -> None:
    streams: list[FaultyStream] = []
    async with open_connection_pair(server_handler=echo, sealed=sealed, wrap=faulty(streams)) as (client, _):
        streams[0].sending.stall()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ignore_loss, client)
            await settle()
            await client.aclose()
        assert trio.current_time() == (CLOSE_TIMEOUT)
        await client.wait_closed()
        assert trio.current_time() == (CLOSE_TIMEOUT)


async def test_a_cancelled_aclose_returns_at_once_and_closes_nevertheless(
    autojump_clock: trio.testing.MockClock,
) -> None:
    streams: list[FaultyStream] = []
    async with open_connection_pair(server_handler=echo, wrap=faulty(streams)) as (client, server):
        streams[0].sending.stall()
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.aclose()
        assert scope.cancelled_caught
        assert client.closed
        assert trio.current_time() == 0
        await client.wait_closed()
        await server.wait_closed()


async def test_aclose_returns_though_the_connection_was_cancelled_from_outside() -> None:
    """From another task, and, shielded, from the close handler."""
    story: list[str] = []

    async def on_close(connection: Connection) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
            await connection.aclose()
            story.append("close handler")

    with trio.CancelScope() as scope:
        async with open_connection_pair(client_close_handler=on_close) as (client, _):
            scope.cancel()
    await client.aclose()
    assert story == ["close handler"]


@pytest.mark.parametrize("odd", ["send", "receive", "close"])
@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_stream_that_raises_while_closing_leaks_nothing(
    odd: str, cancelled: bool, sealed: bool
) -> None:
    streams: list[OddStream] = []

    def wrap(stream: trio.abc.HalfCloseableStream) -> trio.abc.Stream:
        streams.append(OddStream(stream))
        return streams[0]

    with trio.CancelScope() as scope:
        with pytest.raises(KeyError, match="mine"):
            async with open_connection_pair(sealed=sealed, wrap=wrap) as (client, _):
                await settle()
                streams[0].odd.add(odd)
                if cancelled:
                    scope.cancel()
                raise KeyError("mine")
    await client.aclose()
    await client.wait_closed()


async def test_an_answer_that_was_queued_leaves_before_the_end(sealed: bool) -> None:
    """The handler has ended, and the connection is closed before its answer has left."""
    streams: list[FaultyStream] = []
    answers: list[list[bytes]] = []
    async with open_connection_pair(echo, sealed=sealed, wrap=faulty(streams)) as (client, server):

        async def ask(text: str) -> None:
            answers.append(await server.request([text]))

        streams[0].sending.stall()
        async with trio.open_nursery() as nursery:
            for text in ("is being sent", "is queued"):
                nursery.start_soon(ask, text)
                await settle()
            assert client.statistics().handlers_running == 0
            assert client.statistics().packets_queued == 1
            await close_in_one_step(client)
            streams[0].sending.resume()
        assert answers == [[b"is being sent"], [b"is queued"]]


async def test_what_ends_the_program_is_not_lost_to_a_cancelled_close_handler() -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise KeyboardInterrupt

    async def on_close(connection: Connection) -> None:
        await trio.sleep_forever()

    with trio.CancelScope() as scope, pytest.raises(KeyboardInterrupt):
        async with open_connection_pair(handler, client_close_handler=on_close) as (_, server):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ignore_any_loss, server)
                await settle()
                scope.cancel()


async def test_a_transport_that_breaks_while_closing_does_no_harm() -> None:
    streams: list[FaultyStream] = []
    async with open_connection_pair(server_handler=echo, wrap=faulty(streams)) as (client, _):
        streams[0].sending.stall()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ignore_loss, client)
            await settle()
            nursery.start_soon(client.aclose)
            await settle()
            await streams[0].cut()
            streams[0].sending.resume()
        await client.wait_closed()


async def test_the_end_is_authenticated_when_sealed() -> None:
    """A peer that closes says so with an end record; one that vanishes does not."""
    streams: list[FaultyStream] = []
    async with open_connection_pair(wrap=faulty(streams)) as (client, server):
        streams[0].receiving.drop(1000)
        await server.aclose()
        await client.wait_closed()
        with pytest.raises(ConnectionLost, match="cut short"):
            await client.request([])


async def test_wait_closed_from_a_task_of_its_own_is_an_error() -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[str]:
        if request == [b"nested"]:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.wait_closed)
        await connection.wait_closed()
        raise AssertionError

    async with open_connection_pair(server_handler=handler) as (client, _):
        with pytest.raises(RemoteError, match="RuntimeError"):
            await client.request([])
        with pytest.raises(RemoteError, match="RuntimeError"):
            await client.request(["nested"])


async def test_a_handler_may_wait_for_another_connection_to_close() -> None:
    async with open_connection_pair(busy_handler) as (other, _):

        async def handler(connection: Connection, request: list[bytes]) -> list[str]:
            await other.wait_closed()
            return ["closed"]

        async with open_connection_pair(server_handler=handler) as (client, _):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.request, [])
                await settle()
                await other.aclose()


async def test_when_the_block_is_cancelled_all_ends_and_waiters_elsewhere_are_told() -> None:
    caught: list[BaseException] = []
    story: list[str] = []

    async def on_close(connection: Connection) -> None:
        story.append("close handler")
        await trio.lowlevel.checkpoint()
        raise AssertionError("it is cancelled, like the block")

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with open_connection_pair(server_handler=busy_handler, client_close_handler=on_close) as (
                client,
                _,
            ):
                await start_waiting(nursery, client, caught)
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught
    assert [type(exc) for exc in caught] == [ConnectionClosed]
    assert story == ["close handler"]


class Oops(Exception):
    pass


@pytest.mark.parametrize(
    "error", [Oops(), ExceptionGroup("mine", [Oops()]), KeyboardInterrupt(), StopAsyncIteration()]
)
async def test_what_the_block_raises_comes_out_as_itself(error: BaseException) -> None:
    story: list[str] = []

    async def on_close(connection: Connection) -> None:
        await trio.lowlevel.checkpoint()
        story.append("closed")

    with pytest.raises(type(error)) as caught:
        async with open_connection_pair(client_close_handler=on_close, server_close_handler=on_close):
            raise error
    assert caught.value is error
    assert story == ["closed", "closed"]
