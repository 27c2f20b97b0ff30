"""Faults that were found by trying to break the library, each as a user meets it."""

from __future__ import annotations

import logging
import socket
from contextlib import suppress
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from bokbok_trio import (
    BokbokError,
    Channel,
    Connection,
    ConnectionClosed,
    ConnectionLost,
    ConnectionRefused,
    HandshakeError,
    Key,
    RemoteError,
    Settings,
    open_connection,
    open_reconnecting,
    open_server,
)
from bokbok_trio._connection.watchdog import MUCH, Watchdog
from bokbok_trio._protocol.events import Request
from bokbok_trio._protocol.session import Session
from bokbok_trio.testing import MemoryListener, open_connection_pair
from tests.support.helpers import echo, packet, settle
from tests.support.inside import close_as_a_channel_opens

KEY = Key.generate()


async def sleep(connection: Connection, request: list[bytes]) -> None:
    await trio.sleep_forever()


# ---- channels ----


async def test_a_handler_that_closes_its_channel_and_goes_on_is_seen_to_at_once(
    autojump_clock: MockClock,
) -> None:
    async def handler(connection: Connection, request: list[bytes], channel: Channel) -> None:
        await channel.send(["one"])
        await trio.sleep(1)
        await channel.aclose()
        await trio.sleep(5)

    async with open_connection_pair(server_channel_handler=handler) as (client, _):
        async with client.open_channel([]) as channel:
            assert [item async for item in channel] == [[b"one"]]
            assert trio.current_time() == 1


async def test_channels_that_are_cancelled_before_their_handlers_begin_leave_nothing() -> None:
    may_begin = trio.Event()

    async def on_open(connection: Connection) -> None:
        await may_begin.wait()

    async def handler(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
        return await channel.receive()

    settings = Settings(max_message_size=2**16, budget=2**20)  # for less than all that is sent
    async with open_server(
        "127.0.0.1:0", channel_handler=handler, open_handler=on_open, settings=settings
    ) as server:
        async with open_connection(server.addresses[0]) as client:
            for _ in range(30):
                async with client.open_channel([]) as channel:
                    await channel.send([bytes(40_000)])
                    await client.ping()
            await client.ping()
            [accepted] = server.connections
            while accepted.statistics().handlers_running:
                await client.ping()
            async with client.open_channel([]) as channel:
                await channel.send([bytes(40_000)])
                await client.ping()
                may_begin.set()
                assert await channel.answer() == [bytes(40_000)]
        server.stop(0)


# ---- handlers ----


async def test_the_open_handler_of_a_connection_that_is_closed_at_once_is_cancelled() -> None:
    began = ended = 0

    async def on_open(connection: Connection) -> None:
        nonlocal began, ended
        began += 1
        try:
            await trio.sleep_forever()
        finally:
            ended += 1

    for steps in range(12):
        async with open_server("127.0.0.1:0", open_handler=on_open) as server, trio.open_nursery() as nursery:

            async def close(steps: int = steps) -> None:
                while not (found := server.connections):
                    await trio.lowlevel.checkpoint()
                for _ in range(steps // 3):
                    await trio.lowlevel.checkpoint()
                [connection] = found
                await connection.aclose()
                with trio.fail_after(5):
                    await connection.wait_closed()

            nursery.start_soon(close)
            with suppress(BokbokError):
                async with open_connection(server.addresses[0]) as client:
                    await client.wait_closed()
    assert began == ended


async def test_a_nursery_left_open_behind_a_handler_that_waits_costs_its_own_request_alone() -> None:
    kept = []

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        if request == [b"open"]:
            manager = trio.open_nursery()
            kept.append(manager)
            await manager.__aenter__()
        else:
            await trio.sleep(0.1)
        return request

    outcomes: list[object] = []
    async with open_server("127.0.0.1:0", handler) as server:
        async with open_connection(server.addresses[0]) as client, trio.open_nursery() as nursery:

            async def ask(text: str) -> None:
                try:
                    outcomes.append(await client.request([text]))
                except RemoteError as exc:
                    outcomes.append(exc.code)

            for text in ("wait", "wait", "open", "wait", "open"):
                nursery.start_soon(ask, text)
        assert outcomes.count("handler-error") == 2
        assert outcomes.count([b"wait"]) == 3


async def test_a_drain_is_not_held_up_by_tasks_that_outlive_their_handlers() -> None:
    async with trio.open_nursery() as background:
        refused = 0

        async def push(connection: Connection) -> None:
            nonlocal refused
            try:
                while True:
                    await connection.request(["event"])
            except ConnectionLost as exc:
                refused += not exc.may_have_run

        async def subscribe(connection: Connection, request: list[bytes]) -> None:
            for _ in range(3):
                background.start_soon(push, connection)

        async with open_server("127.0.0.1:0", subscribe) as server:
            async with open_connection(server.addresses[0], request_handler=echo) as client:
                await client.request([])
                await client.ping()
                client.drain()
                with trio.fail_after(5):
                    await client.wait_closed()
    assert refused == 3


# ---- the stream ----


class Whole(trio.abc.Stream):
    """A stream of a socket that cannot close one direction alone, as TLS cannot; it reads slowly."""

    def __init__(self, stream: trio.SocketStream, pause: float = 0) -> None:
        self.stream = stream
        self.pause = pause
        self.failure: BaseException | None = None

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self.failure is not None:
            await trio.lowlevel.checkpoint()
            raise self.failure
        await self.stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if self.pause:
            await trio.sleep(self.pause)
        return await self.stream.receive_some(min(2048, max_bytes or 2048) if self.pause else max_bytes)

    async def aclose(self) -> None:
        await self.stream.aclose()


class WholeListener(trio.abc.Listener[trio.abc.Stream]):
    def __init__(self, listener: trio.SocketListener) -> None:
        self.listener = listener

    async def accept(self) -> Whole:
        return Whole(await self.listener.accept())

    async def aclose(self) -> None:
        await self.listener.aclose()


@pytest.mark.parametrize("count", [100, 270, 400])
async def test_draining_over_a_stream_that_cannot_half_close_loses_nothing(count: int) -> None:
    async def handler(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
        connection.drain()
        for _ in range(count):
            await channel.send([bytes(1000)])
        return [b"done"]

    [tcp] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = tcp.socket.getsockname()[1]
    async with open_server([WholeListener(tcp)], channel_handler=handler, insecure=True):
        sock = trio.socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        await sock.connect(("127.0.0.1", port))
        async with open_connection(Whole(trio.SocketStream(sock), pause=0.002), insecure=True) as client:
            async with client.open_channel([]) as channel:
                assert len([item async for item in channel]) == count
                assert await channel.answer() == [b"done"]


async def test_both_modes_work_over_a_stream_without_a_buffer(sealed: bool) -> None:
    ours, theirs = trio.testing.lockstep_stream_pair()
    listener = MemoryListener()
    secrets: dict[str, Any] = {"user": "u", "key": KEY} if sealed else {}

    class One(trio.abc.Listener[trio.abc.Stream]):
        is_done = False

        async def accept(self) -> trio.abc.Stream:
            if self.is_done:
                return await listener.accept()
            self.is_done = True
            return theirs

        async def aclose(self) -> None:
            await trio.lowlevel.checkpoint()

    async with open_server([One()], echo, user_key={"u": KEY} if sealed else None):
        with trio.fail_after(5):
            async with open_connection(ours, insecure=True, **secrets) as client:
                assert await client.request(["hi"]) == [b"hi"]


class Panic(BaseException):
    """An exception like those of extensions in Rust."""


@pytest.mark.parametrize("failure", [Panic("no"), ValueError("no")])
async def test_whatever_sending_raises_the_connection_is_lost_by_it(
    failure: BaseException, autojump_clock: MockClock
) -> None:
    listener = MemoryListener()
    async with open_server([listener], echo):
        stream = Whole(listener.connect())  # type: ignore[arg-type]
        async with open_connection(stream, insecure=True) as client:
            stream.failure = failure
            with pytest.raises(ConnectionLost, match="sending failed: ") as caught:
                await client.request([])
            assert caught.value.__cause__ is failure


async def test_a_defect_of_ours_in_sending_is_told_as_one_and_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    listener = MemoryListener()
    async with open_server([listener], echo):
        async with open_connection(listener.connect()) as client:
            take = Session.take
            takers: list[Session] = []  # the client's comes first

            def fail(self: Session, *args: Any) -> bytes:
                takers.append(self)
                if self is takers[0]:
                    raise KeyError(5)
                return take(self, *args)

            monkeypatch.setattr(Session, "take", fail)
            with pytest.raises(ConnectionLost, match="internal error: "):
                await client.request([])
            assert trio.current_time() == 0
            monkeypatch.undo()
    assert "a defect of bokbok_trio ends the connection" in caplog.text
    assert "a stream raised" not in caplog.text


# ---- bounds that hit honest peers ----


def test_uploads_that_are_cancelled_half_way_break_no_rule() -> None:
    client, server = (
        Session(side, max_message_size=2**22, max_requests=100, slots=100) for side in ("client", "server")
    )
    for _ in range(10_500):
        id = client.request([bytes(100_000)])
        server.receive(client.take(0.0, 2**14))
        client.cancel(id)
        server.receive(client.take(0.0))
    assert server.error is None
    id = client.request([])
    assert [event.id for event in server.receive(client.take(0.0)) if isinstance(event, Request)] == [id]


async def test_bursts_that_are_read_at_once_are_no_slow_reading(autojump_clock: MockClock) -> None:
    waiting = 0
    lost: list[str] = []
    watchdog = Watchdog(
        300, 10, ping=lambda: None, fail=lost.append, least_rate=2**14, count_waiting=lambda: waiting
    )
    watchdog.start()
    for _ in range(10):
        await trio.sleep(298)
        watchdog.heard()
        waiting = 4 * MUCH
        await trio.sleep(2)
        watchdog.sent += waiting
        waiting = 0
    assert lost == []
    waiting = 4 * MUCH
    with trio.move_on_after(700):
        while not lost:
            await trio.sleep(1)
            watchdog.heard()
            watchdog.sent += 1000
    assert lost
    watchdog.stop()


# ---- servers ----


async def test_whoever_shakes_hands_with_an_idle_server_that_stops_is_told_so(
    autojump_clock: MockClock,
) -> None:
    async def look_up(user: str) -> Key:
        await trio.sleep(0.3)
        return KEY

    listener = MemoryListener()
    async with open_server([listener], echo, user_key=look_up) as server, trio.open_nursery() as nursery:

        async def be_refused() -> None:
            with pytest.raises(ConnectionRefused) as caught:
                async with open_connection(listener.connect(), user="u", key=KEY):
                    pass
            assert caught.value.code == "stopping"

        nursery.start_soon(be_refused)
        silent = listener.connect()
        await trio.sleep(0.1)
        server.stop(grace=5)
        assert await silent.receive_some() == b"", "who has said nothing is not waited for"
        await server.wait_stopped()
        assert trio.current_time() < 1.5
        await silent.aclose()


async def test_a_grace_is_not_used_up_by_one_who_says_hello_and_no_more(autojump_clock: MockClock) -> None:
    listener = MemoryListener()
    async with open_server([listener], echo, user_key={"u": KEY}) as server:
        stream = listener.connect()
        await stream.send_all(b"bokbok1\n" + packet(b"hello", b"client", b"sealed", bytes(31) + b"\1"))
        await stream.receive_some()
        server.stop(grace=2)
        await server.wait_stopped()
        assert trio.current_time() <= 3.5
        await stream.aclose()


async def test_failing_look_ups_do_not_flood_the_log(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def look_up(user: str) -> Any:
        if user == "rich":
            return [KEY] * 17
        raise ConnectionError("the data base is down")

    listener = MemoryListener()
    async with open_server([listener], echo, user_key=look_up):

        async def come(user: str) -> None:
            with suppress(HandshakeError):
                async with open_connection(listener.connect(), user=user, key=KEY):
                    pass

        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(come, "rich" if number % 2 else f"u{number}")
        await trio.sleep(3)
    lines = [each.getMessage() for each in caplog.records if "looking up" in each.getMessage()]
    assert len(lines) == 2
    assert lines[1].startswith("49 more like: ")
    assert caplog.text.count("Traceback") == 1
    lines = [each.getMessage() for each in caplog.records if "user_key found 17 keys" in each.getMessage()]
    assert len(lines) == 2


async def test_how_many_lines_were_left_out_is_told_soon(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    listener = MemoryListener()
    async with open_server([listener], echo):
        for _ in range(10):
            stream = listener.connect()
            await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
            with suppress(trio.BrokenResourceError):
                await stream.receive_some()
            await stream.aclose()
        await trio.sleep(2.5)
        assert "9 more like: " in caplog.text
        caplog.clear()
        await trio.sleep(100)
        assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


# ---- clients that reconnect ----


async def test_a_channel_goes_over_the_next_connection_where_this_one_drains_at_that_moment() -> None:
    async def handler(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
        return [b"done"]

    async with (
        open_server("127.0.0.1:0", echo, channel_handler=handler) as server,
        open_reconnecting(server.addresses[0]) as client,
    ):
        for turn in range(12):
            await client.request(["x"])

            async def drain(turn: int = turn) -> None:
                for _ in range(turn % 4):
                    await trio.lowlevel.checkpoint()
                for connection in server.connections:
                    connection.drain()

            async def close() -> None:
                if client.connection is not None:
                    await client.connection.aclose()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(drain if turn < 8 else close)
                try:
                    async with client.open_channel([]) as channel:
                        assert await channel.answer() == [b"done"]
                except trio.ClosedResourceError:
                    assert turn >= 8, "it was open, and this side closed its connection"
                except ConnectionLost as exc:
                    assert not exc.may_have_run, "its `chan` crossed the `bye`"  # noqa: PT017
    with pytest.raises(ConnectionClosed):
        async with client.open_channel([]):
            pass


@pytest.mark.parametrize("who", ["connection", "client"])
async def test_a_channel_whose_connection_is_closed_as_it_opens(
    who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def handler(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
        return [b"done"]

    async with (
        open_server("127.0.0.1:0", echo, channel_handler=handler) as server,
        open_reconnecting(server.addresses[0]) as client,
    ):
        await client.request(["x"])
        close_as_a_channel_opens(monkeypatch, client, for_good=who == "client")
        if who == "connection":
            async with client.open_channel([]) as channel:
                assert await channel.answer() == [b"done"]
        else:
            with pytest.raises(ConnectionClosed, match="closed"):
                async with client.open_channel([]):
                    pytest.fail("it is closed")


async def test_a_request_that_waited_for_a_slot_goes_over_the_next_connection() -> None:
    ran: list[bytes] = []
    has_begun = trio.Event()

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        ran.append(request[0])
        if request == [b"first"]:
            has_begun.set()
            await trio.sleep_forever()
        return request

    async with open_server("127.0.0.1:0", handler, settings=Settings(max_requests=1)) as server:
        async with open_reconnecting(server.addresses[0]) as client, trio.open_nursery() as nursery:

            async def ask_first() -> None:
                with pytest.raises(ConnectionLost):
                    await client.request(["first"])

            async def ask_second() -> None:
                assert await client.request(["second"]) == [b"second"]

            nursery.start_soon(ask_first)
            await has_begun.wait()
            nursery.start_soon(ask_second)
            await settle()
            assert client.connection is not None
            await client.connection.aclose()
    assert ran == [b"first", b"second"]


async def test_what_a_closed_connection_says_of_its_requests() -> None:
    async with open_server("127.0.0.1:0", sleep, settings=Settings(max_requests=1)) as server:
        async with open_connection(server.addresses[0]) as client, trio.open_nursery() as nursery:
            told: dict[str, bool] = {}

            async def ask(text: str) -> None:
                try:
                    await client.request([text])
                except ConnectionClosed as exc:
                    told[text] = exc.may_have_run

            nursery.start_soon(ask, "sent")
            await client.ping()
            nursery.start_soon(ask, "waits")
            await settle()
            await client.aclose()
        assert told == {"sent": True, "waits": False}
        server.stop(0)
