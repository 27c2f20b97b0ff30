"""Big messages do not delay small ones, and take no more memory than their bounds."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from bokbok_trio import Connection, MessageTooLarge
from bokbok_trio._protocol.pieces import MAX_IN_PIECES
from bokbok_trio.testing import open_connection_pair
from tests.support.connections import check_nothing_in_flight
from tests.support.helpers import packet, raw_peer, settle
from tests.support.inside import held_in_pieces, session_of

MIB = 2**20
LINK = 10_000_000 / 8
"""Bytes per second of a link of 10 Mbit/s."""


class SlowLink(trio.abc.Stream):
    """A link that sends slowly, and buffers nothing."""

    def __init__(self, transport: trio.abc.Stream) -> None:
        self.transport = transport

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.sleep(len(data) / LINK)
        await self.transport.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        raise AssertionError

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self.transport.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self.transport.aclose()


async def answer_by_size(connection: Connection, request: list[bytes]) -> list[bytes]:
    await trio.lowlevel.checkpoint()
    return [bytes(int(request[0]))]


@pytest.mark.parametrize("direction", ["answer", "request"])
async def test_small_requests_pass_a_big_message_on_a_slow_link(
    direction: str, sealed: bool, autojump_clock: MockClock
) -> None:
    big = 4 * MIB - 200
    times: list[float] = []
    took: list[float] = []

    # What the client sends is slow: its requests, or its answers to the server's.
    async with open_connection_pair(answer_by_size, answer_by_size, sealed=sealed, wrap=SlowLink) as (
        client,
        server,
    ):
        asker = server if direction == "answer" else client

        async def transfer() -> None:
            if direction == "answer":
                [answer] = await server.request([str(big)])
                assert len(answer) == big
            else:
                await client.request(["0", bytes(big)])
            took.append(trio.current_time())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(transfer)
            await trio.sleep(0.1)
            while not took:
                began = trio.current_time()
                await asker.request(["16"])
                times.append(trio.current_time() - began)
                await trio.sleep(0.01)
    assert len(times) > 20
    assert sorted(times)[int(len(times) * 0.99)] < 0.150
    assert took[0] < 1.1 * big / LINK, "the small ones hardly slow the big one"


async def test_many_big_messages_both_ways_at_once(sealed: bool) -> None:
    sizes = [0, 1, 65_439, 65_440, 65_441, 65_536, 131_072, 300_000, MIB]
    done: list[int] = []

    async def ask(connection: Connection, size: int) -> None:
        [answer] = await connection.request([str(size), bytes(size)])
        done.append(len(answer))

    async with (
        open_connection_pair(answer_by_size, answer_by_size, sealed=sealed) as pair,
        trio.open_nursery() as nursery,
    ):
        for connection in pair:
            for size in sizes:
                nursery.start_soon(ask, connection, size)
    assert sorted(done) == sorted(sizes * 2)


async def test_a_big_request_cancelled_half_way_is_forgotten_over_there(autojump_clock: MockClock) -> None:
    async with open_connection_pair(server_handler=answer_by_size, wrap=SlowLink) as (client, server):
        began = trio.current_time()
        with trio.move_on_after(1) as scope:
            await client.request(["0", bytes(3 * MIB)])
        assert scope.cancelled_caught
        assert trio.current_time() == pytest.approx(began + 1)
        assert await client.request(["1"]) == [b"\0"]
        await settle()
        assert held_in_pieces(session_of(server)) == 0
        check_nothing_in_flight(client, server)


async def test_what_is_held_of_a_peer_is_bounded(autojump_clock: MockClock) -> None:
    held: list[int] = []
    async with raw_peer(answer_by_size, max_message_size=4 * MIB) as (connection, peer):
        for number in range(MAX_IN_PIECES):
            await peer.send(b"part", b"%d" % number, b"%d" % (4 * MIB - 60_000), bytes(60_000))
            await settle()
            held.append(held_in_pieces(session_of(connection)))
        assert held == [60_000, 120_000, 180_000, 240_000]
        await peer.stream.send_all(packet(b"part", b"9", b"1", b"x"))
        await connection.wait_closed()


async def test_a_message_over_the_limit_is_refused_before_it_is_sent() -> None:
    async with open_connection_pair(server_handler=answer_by_size) as (client, _):
        with pytest.raises(MessageTooLarge):
            await client.request([bytes(4 * MIB)])
        assert await client.request(["1"]) == [b"\0"]
