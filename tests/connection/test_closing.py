"""The end of a connection: everything that was sent before arrives, and nobody waits for long."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from bokbok_trio import (
    Channel,
    Connection,
    ConnectionClosed,
    ConnectionLost,
    Key,
    Settings,
    open_connection,
    open_server,
)
from bokbok_trio.testing import FaultyStream, open_connection_pair
from tests.support.inside import send_raw
from tests.support.pairs import open_pair, over_all_ways, settle

SIZES = [0, 60_000, 140_000, 300_000]
"""Bytes: of one packet, of pieces, of more than the buffers of a socket take."""


class SlowReader(trio.abc.Stream):
    """A stream that reads little at a time, with pauses, while its kernel buffers little.

    Arguments:
        stream: the stream below.
        most: bytes of one read.
        pause: seconds before each.
    """

    def __init__(self, stream: trio.SocketStream, *, most: int = 8192, pause: float = 0.001) -> None:
        self.stream = stream
        self.most = most
        self.pause = pause
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        await trio.sleep(self.pause)
        return await self.stream.receive_some(min(self.most, max_bytes or self.most))

    async def aclose(self) -> None:
        await self.stream.aclose()


# ---- what was sent before arrives ----


@over_all_ways
@pytest.mark.parametrize("total", [270_000, 290_000])
@pytest.mark.parametrize("end", ["drain", "stop", "drain by the reader"])
async def test_items_and_answer_of_a_handler_arrive_though_the_connection_drains(
    way: str, total: int, end: str
) -> None:
    count = total // 1000

    async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
        if end == "drain":
            connection.drain()
        elif end == "stop":
            assert connection.server is not None
            connection.server.stop()
        for i in range(count):
            await channel.send([b"%d" % i, bytes(1000)])
        return [b"done"]

    async with open_pair(way, server_channel_handler=channel_handler, wrap=SlowReader) as (client, server):
        async with client.open_channel([]) as channel:
            if end == "drain by the reader":
                client.drain()
            with trio.fail_after(15):
                got = [int(item[0]) async for item in channel]
                assert got == list(range(count))
                assert await channel.answer() == [b"done"]
        with trio.fail_after(5):
            await server.wait_closed()
        assert not server.reason or "reset" not in server.reason


@over_all_ways
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("end", ["drain", "stop"])
async def test_an_answer_of_any_size_arrives_though_the_connection_drains(
    way: str, size: int, end: str
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        if end == "drain":
            connection.drain()
        else:
            assert connection.server is not None
            connection.server.stop()
        await trio.sleep(0.001)
        return [bytes(size)]

    async with open_pair(way, None, handler, wrap=SlowReader) as (client, _):
        with trio.fail_after(15):
            assert await client.request([]) == [bytes(size)]


@over_all_ways
@pytest.mark.parametrize("count", [1, 60, 150])
async def test_items_that_were_sent_before_aclose_arrive(way: str, count: int) -> None:
    """As far as a second suffices, which it does here."""
    reached: list[None] = []

    async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> None:
        for i in range(count):
            await channel.send([b"%d" % i, bytes(1000)])
        reached.append(None)
        await connection.aclose()

    async with open_pair(
        way,
        server_channel_handler=channel_handler,
        wrap=SlowReader,
    ) as (client, _):
        got: list[int] = []
        async with client.open_channel([]) as channel:
            with trio.fail_after(10), pytest.raises(ConnectionLost):
                while True:
                    got.append(int((await channel.receive())[0]))
        assert reached
        assert got == list(range(count))
        assert client.reason is not None
        assert "closed" in client.reason


@over_all_ways
@pytest.mark.parametrize("size", SIZES[:3])
async def test_answers_that_were_given_before_a_stop_without_grace_arrive(way: str, size: int) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        assert connection.server is not None
        connection.server.stop(grace=0)
        return [bytes(size)]

    async with open_pair(way, None, handler, wrap=SlowReader) as (
        client,
        _,
    ):
        with trio.fail_after(10):
            assert await client.request([]) == [bytes(size)]


@over_all_ways
async def test_what_is_late_from_the_peer_does_not_destroy_what_was_sent(way: str) -> None:
    """The peer goes on sending requests and items to a side that has drained: no reset."""

    async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
        connection.drain()
        await channel.send([bytes(200_000)])
        return [bytes(60_000)]

    async with open_pair(way, server_channel_handler=channel_handler, wrap=SlowReader) as (client, _):

        async def chatter() -> None:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                while True:
                    await channel.send([bytes(100)])
                    await trio.sleep(0.0005)

        async with client.open_channel([]) as channel, trio.open_nursery() as nursery:
            nursery.start_soon(chatter)
            with trio.fail_after(10):
                assert [item async for item in channel] == [[bytes(200_000)]]
                assert await channel.answer() == [bytes(60_000)]


@over_all_ways
async def test_a_peer_that_broke_the_protocol_is_told_so(way: str) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        await trio.sleep_forever()

    async with open_pair(way, None, handler) as (client, server):
        # Bytes that are no packet: a length that is far over the limit.
        await send_raw(client, b"\xff\xff\xff\xff")
        with trio.fail_after(5):
            await client.wait_closed()
            await server.wait_closed()
        assert server.reason is not None
        assert "protocol" in server.reason
        assert client.reason is not None
        assert "this side broke the protocol" in client.reason


# ---- draining ----


@over_all_ways
@pytest.mark.parametrize("who", ["asker", "answerer", "both"])
async def test_callbacks_of_a_call_in_flight_go_on_while_a_side_drains(way: str, who: str) -> None:
    sides: list[Connection] = []

    def drain() -> None:
        if who in ("asker", "both"):
            sides[0].drain()
        if who in ("answerer", "both"):
            sides[1].drain()

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        n = int(request[0])
        if n == 4:
            drain()
            await trio.sleep(0.02)
        if n:
            await connection.request([str(n - 1)])
            async with connection.open_channel([str(n - 1)]) as channel:
                await channel.answer()
        return request

    async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
        return request

    async with open_pair(
        way,
        handler,
        handler,
        client_channel_handler=channel_handler,
        server_channel_handler=channel_handler,
    ) as pair:
        sides += pair
        with trio.fail_after(5):
            assert await pair[0].request(["5"]) == [b"5"]
            for side in pair:
                await side.wait_closed()
        for side in pair:
            with pytest.raises((ConnectionLost, ConnectionClosed)):
                await side.request(["0"])


@over_all_ways
async def test_both_sides_drain_at_once(way: str) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        await trio.sleep(0.02)
        return request

    async with open_pair(way, handler, handler) as (client, server):
        answers: list[list[bytes]] = []

        async def ask(connection: Connection) -> None:
            answers.append(await connection.request([connection.side]))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask, client)
                nursery.start_soon(ask, server)
            await settle(client)
            client.drain()
            server.drain()
            with trio.fail_after(5):
                await client.wait_closed()
                await server.wait_closed()
        assert sorted(answers) == [[b"client"]] * 5 + [[b"server"]] * 5


@over_all_ways
async def test_a_drained_side_refuses_new_requests_as_not_run(way: str) -> None:
    ran: list[bytes] = []
    may_end = trio.Event()

    async def handler(connection: Connection, request: list[bytes]) -> None:
        ran.extend(request)
        await may_end.wait()

    async with open_pair(way, None, handler) as (client, server), trio.open_nursery() as nursery:
        nursery.start_soon(client.request, ["first"])
        await settle(client, server)
        server.drain()
        for _ in range(2):  # it crosses the `bye`; and it comes after it
            with trio.fail_after(5), pytest.raises(ConnectionLost) as caught:
                await client.request(["new"])
            assert not caught.value.may_have_run
            await settle(client, server)
        may_end.set()
    assert ran == [b"first"]


@over_all_ways
@pytest.mark.parametrize("how", ["drain", "drain by the peer", "stop", "aclose by the peer"])
async def test_a_streaming_handler_can_wait_for_draining(way: str, how: str) -> None:
    ended: list[str] = []

    async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
        event = connection.draining
        assert connection.draining is event
        assert not event.is_set()
        try:
            async with trio.open_nursery() as nursery:

                async def wait() -> None:
                    await event.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(wait)
                while True:
                    await channel.send([b"tick"])
                    await trio.sleep(0.001)
        finally:
            ended.append("ended")
        return [b"in order"]

    async with open_pair(way, server_channel_handler=channel_handler) as (client, server):
        async with client.open_channel([]) as channel:
            await channel.receive()
            match how:
                case "drain":
                    server.drain()
                case "drain by the peer":
                    client.drain()
                case "stop":
                    assert server.server is not None
                    server.server.stop()
                case _:
                    await client.aclose()
            if how != "aclose by the peer":
                with trio.fail_after(3):
                    async for _ in channel:
                        pass
                    assert await channel.answer() == [b"in order"]
        with trio.fail_after(3):
            await server.wait_closed()
            await client.wait_closed()
    assert ended == ["ended"]


async def test_draining_is_set_where_it_is_asked_for_late() -> None:
    async with open_pair("tcp plain") as (client, server):
        client.drain()
        assert client.draining.is_set()
        with trio.fail_after(3):
            await server.draining.wait()
            await server.wait_closed()
        assert server.draining.is_set()


# ---- how long it takes ----


@pytest.mark.parametrize("sealed", [False, True])
async def test_a_peer_that_never_says_its_end_is_let_go_after_a_second(
    sealed: bool, autojump_clock: MockClock
) -> None:
    streams: list[FaultyStream] = []

    def wrap(stream: trio.abc.HalfCloseableStream) -> trio.abc.Stream:
        streams.append(FaultyStream(stream))
        return streams[0]

    async with open_connection_pair(sealed=sealed, wrap=wrap) as (_, server):
        streams[0].sending.stall()  # nothing of the client arrives any more, its end neither
        begin = trio.current_time()
        await server.aclose()
        assert trio.current_time() - begin <= 2.5


@over_all_ways
@pytest.mark.parametrize("how", ["aclose", "drain"])
async def test_a_real_peer_that_never_says_its_end_is_let_go_too(way: str, how: str) -> None:
    class Mute(SlowReader):
        """It stops reading, and says nothing more."""

        is_mute = False

        async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
            data = await self.stream.receive_some(max_bytes)
            if self.is_mute:
                await trio.sleep_forever()
            return data

        async def send_all(self, data: bytes | bytearray | memoryview) -> None:
            if self.is_mute:
                await trio.sleep_forever()
            await self.stream.send_all(data)

    streams: list[Mute] = []

    def wrap(stream: trio.SocketStream) -> trio.abc.Stream:
        streams.append(Mute(stream))
        return streams[0]

    async with open_pair(way, wrap=wrap) as (_, server):
        await settle(server)
        if how == "drain":
            server.drain()
            await trio.sleep(0.02)
        streams[0].is_mute = True
        with trio.fail_after(4):
            begin = trio.current_time()
            await server.aclose()
        assert trio.current_time() - begin < 2.5


@over_all_ways
async def test_an_ordinary_end_takes_no_time(way: str) -> None:
    async with trio.open_nursery():
        begin = trio.current_time()
        async with open_pair(way) as (client, server):
            await client.aclose()
            await client.wait_closed()
            await server.wait_closed()
        assert trio.current_time() - begin < 0.9


@over_all_ways
@pytest.mark.parametrize("first", ["client", "server"])
async def test_both_know_why_it_ended(way: str, first: str) -> None:
    reasons: dict[str, str | None] = {}

    async def note(connection: Connection) -> None:
        reasons[connection.side] = connection.reason
        await trio.lowlevel.checkpoint()

    async with open_pair(way, client_close_handler=note, server_close_handler=note) as (client, server):
        assert client.reason is None
        assert server.reason is None
        await (client if first == "client" else server).aclose()
        with trio.fail_after(3):
            await client.wait_closed()
            await server.wait_closed()
        assert reasons == {"client": client.reason, "server": server.reason}
    second = "server" if first == "client" else "client"
    assert reasons[first] == "this side closed the connection"
    assert (reasons[second] or "").startswith("the peer closed the connection")


@over_all_ways
async def test_both_close_at_once(way: str) -> None:
    async with open_pair(way) as (client, server):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.aclose)
            nursery.start_soon(server.aclose)
            with trio.fail_after(0.9):
                await client.wait_closed()
                await server.wait_closed()
        assert client.closed
        assert server.closed


@over_all_ways
async def test_ends_in_the_midst_of_traffic(way: str) -> None:
    """Each request gets its answer or one of our errors, whoever closes and whenever."""

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        await trio.sleep(0.001)
        return request

    ends: list[Callable[[trio.Nursery, Connection, Connection], object]] = [
        lambda nursery, client, server: client.drain(),
        lambda nursery, client, server: server.drain(),
        lambda nursery, client, server: nursery.start_soon(client.aclose),
        lambda nursery, client, server: nursery.start_soon(server.aclose),
    ]
    for i in range(12):
        async with open_pair(way, handler, handler) as (client, server):

            async def ask(connection: Connection, size: int) -> None:
                with suppress(ConnectionLost, ConnectionClosed):
                    while True:
                        assert await connection.request([bytes(size)]) == [bytes(size)]

            with trio.fail_after(5):
                async with trio.open_nursery() as nursery:
                    for size in (1, 1000, 100_000):
                        nursery.start_soon(ask, client, size)
                        nursery.start_soon(ask, server, size)
                    await trio.sleep(0.0007 * i)
                    ends[i % 4](nursery, client, server)
                await client.wait_closed()
                await server.wait_closed()


async def test_a_refusal_arrives_over_a_real_socket() -> None:
    from bokbok_trio import ConnectionRefused  # noqa: PLC0415

    key = Key.generate()
    async with open_server(
        "127.0.0.1:0", user_key={"u": key}, settings=Settings(max_connections=1)
    ) as server:
        to = server.addresses[0]
        async with open_connection(to, user="u", key=key):
            for _ in range(10):
                with trio.fail_after(3), pytest.raises(ConnectionRefused) as caught:
                    async with open_connection(to, user="u", key=key):
                        pass
                assert caught.value.code == "busy"
