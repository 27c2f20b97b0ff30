"""Draining one connection, and the error that an asker gets at every step of a request's life."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from bokbok_trio import Connection, ConnectionClosed, ConnectionLost, RemoteError, Settings, open_connection
from bokbok_trio.testing import FaultyStream, open_connection_pair
from tests.support.helpers import busy_handler, echo, raw_peer, settle
from tests.support.inside import break_transport


async def test_an_idle_connection_drains_at_once(sealed: bool, autojump_clock: MockClock) -> None:
    async with open_connection_pair(echo, echo, sealed=sealed) as (client, server):
        client.drain()
        client.drain()
        await client.wait_closed()
        await server.wait_closed()
        assert trio.current_time() == 0
        with pytest.raises(ConnectionClosed, match="drained"):
            await client.request([])
        with pytest.raises(ConnectionLost, match="the peer closed the connection"):
            await server.request([])
        client.drain()


async def test_what_is_in_flight_both_ways_finishes_with_its_callbacks(autojump_clock: MockClock) -> None:
    answers: list[list[bytes]] = []

    async def slowly(connection: Connection, request: list[bytes]) -> list[bytes]:
        await trio.sleep(5)
        if request == [b"call back"]:
            return await connection.request(["called back"])
        return request

    async def ask(connection: Connection, text: str) -> None:
        answers.append(await connection.request([text]))

    async with open_connection_pair(slowly, slowly) as (client, server):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, client, "call back")
            nursery.start_soon(ask, server, "asked by who drains")
            await settle()
            server.drain()
            await settle()
            with pytest.raises(ConnectionLost, match="takes no new request") as caught:
                await client.request(["late"])
            assert not caught.value.may_have_run
            assert await server.request(["drains, and asks"]) == [b"drains, and asks"]
        await client.wait_closed()
        assert trio.current_time() == 10
    assert sorted(answers) == [[b"asked by who drains"], [b"called back"]]


async def test_both_sides_drain_at_once(autojump_clock: MockClock) -> None:
    answers: list[list[bytes]] = []

    async def ask(connection: Connection) -> None:
        answers.append(await connection.request(["sleep", "5"]))

    async with open_connection_pair(busy_handler, busy_handler) as pair:
        async with trio.open_nursery() as nursery:
            for connection in pair:
                nursery.start_soon(ask, connection)
            await settle()
            for connection in pair:
                connection.drain()
            await settle()
            for connection in pair:
                with pytest.raises(ConnectionLost, match="takes no new request"):
                    await connection.request([])
        assert answers == [[b"slept"]] * 2
        for connection in pair:
            await connection.wait_closed()
        assert trio.current_time() == 5


async def test_requests_that_wait_for_a_slot_are_told_that_they_did_not_run(
    autojump_clock: MockClock,
) -> None:
    one = Settings(max_requests=1)
    caught: list[ConnectionLost] = []
    answers: list[list[bytes]] = []

    async def ask(connection: Connection) -> None:
        try:
            answers.append(await connection.request(["sleep", "5"]))
        except ConnectionLost as exc:
            caught.append(exc)

    async with open_connection_pair(server_handler=busy_handler, server_settings=one) as (client, server):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask, client)
            await settle()
            server.drain()
            await settle()
            assert [exc.may_have_run for exc in caught] == [False, False]
    assert answers == [[b"slept"]]


async def test_a_request_that_crosses_the_bye_is_answered_unrun(autojump_clock: MockClock) -> None:
    handled: list[list[bytes]] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        await trio.lowlevel.checkpoint()
        handled.append(request)

    async with raw_peer(handler) as (connection, peer):
        connection.drain()
        assert await peer.receive() == [b"bye"]
        await peer.send(b"req", b"1", b"", b"", b"", body=[b"crossed"])
        assert (await peer.receive())[:3] == [b"err", b"1", b"closing"]
        assert not connection.closed
        await peer.send(b"bye-ok")
        await connection.wait_closed()
    assert handled == []


async def test_draining_waits_for_the_open_handler_of_a_server(autojump_clock: MockClock) -> None:
    from bokbok_trio import open_server  # noqa: PLC0415
    from bokbok_trio.testing import MemoryListener  # noqa: PLC0415

    async def on_open(connection: Connection) -> None:
        connection.drain()
        await trio.sleep(3)
        assert await connection.request(["still here?"]) == [b"still here?"]

    listener = MemoryListener()
    async with (
        open_server([listener], echo, open_handler=on_open),
        open_connection(listener.connect(), request_handler=echo) as client,
    ):
        await client.wait_closed()
        assert trio.current_time() == 3


async def test_a_handler_may_drain_its_own_connection(autojump_clock: MockClock) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[str]:
        connection.drain()
        await trio.sleep(1)
        return ["my last answer"]

    async with open_connection_pair(server_handler=handler) as (client, server):
        assert await client.request([]) == [b"my last answer"]
        await server.wait_closed()


# ---- may_have_run, at every step of a request's life ----


@pytest.mark.parametrize("big", [False, True], ids=["small", "big"])
@pytest.mark.parametrize("how", ["lose", "drain", "stop reading"])
async def test_no_request_is_lost_without_a_true_word_of_whether_it_ran(
    big: bool, how: str, autojump_clock: MockClock
) -> None:
    """The server's side is cut, drained or stalled after so many steps of the scheduler.

    The handler notes what it saw; an asker that was told "not run" must not be in its notes.
    """
    told = {"answered": 0, "may have run": 0, "not run": 0}
    for steps in range(40):
        seen: set[bytes] = set()
        outcomes: dict[bytes, str] = {}
        streams: list[FaultyStream] = []

        def wrap(
            stream: trio.abc.HalfCloseableStream, streams: list[FaultyStream] = streams
        ) -> trio.abc.Stream:
            streams.append(FaultyStream(stream))
            return streams[0]

        async def handler(
            connection: Connection, request: list[bytes], seen: set[bytes] = seen
        ) -> list[bytes]:
            seen.add(request[0])
            await trio.lowlevel.checkpoint()
            return request[:1]

        async with open_connection_pair(
            server_handler=handler, server_settings=Settings(max_requests=2), wrap=wrap
        ) as (client, server):

            async def ask(
                name: bytes, client: Connection = client, outcomes: dict[bytes, str] = outcomes
            ) -> None:
                try:
                    assert await client.request([name, bytes(200_000 if big else 1)]) == [name]
                    outcomes[name] = "answered"
                except ConnectionLost as exc:
                    outcomes[name] = "may have run" if exc.may_have_run else "not run"

            async with trio.open_nursery() as nursery:
                for n in range(4):
                    nursery.start_soon(ask, b"%d" % n)
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                if how == "lose":
                    await break_transport(server)
                elif how == "drain":
                    server.drain()
                else:
                    streams[0].sending.stall()
        assert len(outcomes) == 4
        for name, outcome in outcomes.items():
            told[outcome] += 1
            assert outcome != "not run" or name not in seen
            assert outcome != "answered" or name in seen
            assert how != "drain" or outcome != "may have run", "draining loses nothing that runs"
    assert told["answered"] > 0
    assert told["not run"] > 0


async def test_a_remote_error_is_no_loss() -> None:
    async with open_connection_pair(server_handler=busy_handler) as (client, _):
        with pytest.raises(RemoteError):
            await client.request(["what?"])
        assert not client.closed
