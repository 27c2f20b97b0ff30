"""When requests leave: at once, together, or by the sender task."""

from __future__ import annotations

import pytest
import trio

from bokbok_trio._protocol.coalescing import EARLY_FLUSH_PACKETS
from bokbok_trio._stream.socket import SocketStream
from tests.support.helpers import raw_peer, settle
from tests.support.inside import session_of, take_few


async def test_a_lone_request_leaves_before_its_task_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    async with raw_peer(over_sockets=True) as (connection, peer), trio.open_nursery() as nursery:
        await settle()
        nursery.start_soon(connection.request, ["x"])
        sends = 0
        real_send = SocketStream.send_all

        async def count(stream: SocketStream, batch: bytes) -> None:
            nonlocal sends
            sends += 1
            await real_send(stream, batch)

        monkeypatch.setattr(SocketStream, "send_all", count)
        assert await peer.receive() == [b"req", b"0", b"", b"", b"", b"\1\0\0\0\1x"]
        await peer.send(b"ok", b"0", body=[])
        assert sends == 0


async def test_requests_made_together_leave_together(monkeypatch: pytest.MonkeyPatch) -> None:
    async with raw_peer(over_sockets=True) as (connection, peer), trio.open_nursery() as nursery:
        await settle()
        batches: list[bytes] = []
        real_send = SocketStream.send_all

        async def note(stream: SocketStream, batch: bytes) -> None:
            batches.append(batch)
            await real_send(stream, batch)

        monkeypatch.setattr(SocketStream, "send_all", note)
        for _ in range(3):
            nursery.start_soon(connection.request, ["x"])
        ids = {(await peer.receive())[1] for _ in range(3)}
        assert ids == {b"0", b"2", b"4"}
        assert len(batches) == 1, "the first left at once, and the others with each other"
        for id in ids:
            await peer.send(b"ok", id, body=[])


async def test_what_a_socket_does_not_take_at_once_leaves_later_and_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with raw_peer(over_sockets=True) as (connection, peer), trio.open_nursery() as nursery:
        await settle()
        take_few(monkeypatch, 7)
        nursery.start_soon(connection.request, [b"x" * 50_000])
        nursery.start_soon(connection.request, ["small"])
        packets = [await peer.receive(), await peer.receive()]
        assert {len(fields[5]) for fields in packets} == {50_005, 10}
        for fields in packets:
            await peer.send(b"ok", fields[1], body=[])


async def test_a_big_lone_request_leaves_piece_by_piece() -> None:
    async with raw_peer(over_sockets=True) as (connection, peer), trio.open_nursery() as nursery:
        await settle()
        nursery.start_soon(connection.request, [bytes(300_000)])
        size = 0
        while True:
            part, number, left, piece = await peer.receive()
            assert (part, number) == (b"part", b"0")
            size += len(piece)
            if left == b"0":
                break
        assert size > 300_000
        await peer.send(b"ok", b"0", body=[])


async def test_a_request_takes_along_the_items_that_wait_and_their_channel_goes_on() -> None:
    async with raw_peer(over_sockets=True) as (connection, peer):
        async with connection.open_channel([]) as channel, trio.open_nursery() as nursery:
            assert (await peer.receive())[0] == b"chan"
            await peer.send(b"credit", b"0", b"1000000")
            await settle()
            flows = session_of(connection).flow_control
            count = 0
            while flows.may_send(0):  # and nobody wakes the sender
                flows.send(0, *flows.encode([bytes(10_000)]))
                count += 1
            nursery.start_soon(channel.send, ["waits"])
            await settle()
            nursery.start_soon(connection.request, ["x"])
            found = [(await peer.receive())[0] for _ in range(count + 2)]
            assert sorted(found) == [*[b"item"] * (count + 1), b"req"]
            await peer.send(b"ok", b"2", body=[])


async def test_what_is_too_much_to_be_written_in_a_row_is_left_to_the_sender(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bokbok_trio._connection.sender.MAX_BATCHES_IN_A_ROW", 1)
    count = 3 * EARLY_FLUSH_PACKETS
    async with raw_peer(over_sockets=True, max_requests=count) as (connection, peer):
        async with trio.open_nursery() as nursery:
            await settle()
            for _ in range(count):
                nursery.start_soon(connection.request, [bytes(10_000)])
            ids = [(await peer.receive())[1] for _ in range(count)]
            assert len(set(ids)) == count
            for id in ids:
                await peer.send(b"ok", id, body=[])
