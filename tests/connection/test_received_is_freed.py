"""Received bytes are freed while handlers wait, and all of a connection when it is lost."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import trio
from trio.testing import MockClock

from bokbok_trio import Connection, ConnectionLost, Settings
from bokbok_trio._protocol.packets import LARGE, LARGE_BATCH
from bokbok_trio._stream.socket import RECEIVE_SIZE
from bokbok_trio.testing import open_connection_pair
from tests.support.handlers import wait_and_do
from tests.support.helpers import open_peer, outcomes, packet, req, settle
from tests.support.inside import check_idle, receive_something_else
from tests.support.streams import Deaf


async def test_what_is_left_of_a_batch_outlasts_the_buffer_that_it_was_received_in() -> None:
    fields = [bytes([n]) * (2 * LARGE) for n in range(10)]
    seen: list[bytes] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        if request == [b"wait"]:
            await wait_and_do(receive_something_else)
        else:
            seen.extend(request)

    async with open_peer(handler, Settings(max_requests=11), over_sockets=True) as (connection, peer):
        batch = req(1, b"wait") + b"".join(req(3 + 2 * n, field) for n, field in enumerate(fields))
        assert LARGE_BATCH < len(batch) < RECEIVE_SIZE
        await peer.stream.send_all(batch)
        assert set((await outcomes(peer, 11)).values()) == {b"ok"}
        assert sorted(seen) == fields
        await settle()
        await settle()
        check_idle(connection)


class Data(bytearray):
    """Received bytes. Unlike a bytearray, they can be found by the garbage collector."""


class Traced(Deaf):
    """A stream that looks for the data that it has returned."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        super().__init__(stream)
        self.returned: list[weakref.ref[Data]] = []

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = Data(await super().receive_some(max_bytes))
        self.returned.append(weakref.ref(data))
        return data


async def test_a_handler_that_waits_does_not_keep_all_that_came_with_its_request() -> None:
    traced: list[Traced] = []

    def wrap(stream: trio.abc.HalfCloseableStream) -> trio.abc.Stream:
        traced.append(Traced(stream))
        return traced[0]

    async def handler(connection: Connection, request: list[bytes]) -> None:
        await trio.sleep_forever()

    async with open_connection_pair(handler, sealed=False, wrap=wrap) as (_, server):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(server.request, [bytes(LARGE_BATCH)])
                await settle()
            assert len(traced[0].returned) >= 3
            assert [data() for data in traced[0].returned if data() is not None] == []
            nursery.cancel_scope.cancel()


async def test_a_handler_that_waits_again_does_not_keep_what_it_waited_for() -> None:
    class Big:
        """A big object."""

    send, receive = trio.open_memory_channel[Big](0)

    async def handler(connection: Connection, request: list[bytes]) -> None:
        await receive.receive()
        await trio.sleep_forever()

    async with open_connection_pair(server_handler=handler) as (client, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.request, [])
            await settle()
            big = Big()
            there = weakref.ref(big)
            await send.send(big)
            del big
            await settle()
            assert there() is None
            nursery.cancel_scope.cancel()


class Breaking(Deaf):
    """A stream that receives something else, or raises, when it is told so."""

    received: bytes | Exception | None = None

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await super().receive_some(max_bytes)
        if isinstance(self.received, Exception):
            try:
                raise OSError("reset")
            except OSError as exc:
                raise self.received from exc
        return data if self.received is None else self.received


@pytest.mark.parametrize("fault", ["receiving", "a bad packet", "sending"])
async def test_a_lost_connection_frees_at_once_all_that_it_held(
    fault: str, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    streams: list[weakref.ref[Breaking]] = []

    def wrap(stream: trio.abc.HalfCloseableStream) -> trio.abc.Stream:
        breaking = Breaking(stream)
        streams.append(weakref.ref(breaking))
        return breaking

    async def handler(connection: Connection, request: list[bytes]) -> None:
        stream = streams[0]()
        assert stream is not None
        if fault == "sending":
            stream.broken = True
        else:
            stream.received = packet(b"bad") if fault == "a bad packet" else trio.BrokenResourceError()

    caplog.set_level(logging.CRITICAL, logger="bokbok_trio")  # records would hold the connection
    gc.collect()
    gc.disable()
    try:
        async with open_connection_pair(server_handler=handler, sealed=False, wrap=wrap) as (client, _):
            with pytest.raises(ConnectionLost):
                while True:
                    await client.request([])
            await client.wait_closed()
        del client
        await settle()
        assert streams[0]() is None
    finally:
        gc.enable()
