from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from bokbok_trio import Connection, ConnectionLost, open_connection, open_server
from bokbok_trio.testing import (
    FaultyStream,
    MemoryListener,
    open_connection_pair,
    open_memory_server,
)
from tests.support.helpers import WholeStream, busy_handler, echo, settle

# ---- pairs and servers ----


async def test_a_pair_is_open_both_ways_in_no_time(
    sealed: bool, autojump_clock: trio.testing.MockClock
) -> None:
    async def on_close(connection: Connection) -> None:
        connection.data = "closed"

    async with open_connection_pair(
        echo, echo, sealed=sealed, client_close_handler=on_close, server_close_handler=on_close
    ) as (client, server):
        assert client.encrypted is sealed
        assert client.user == server.user == ("user" if sealed else None)
        assert await client.request(["a"]) == [b"a"]
        assert await server.request(["b"]) == [b"b"]
    assert (client.data, server.data) == ("closed", "closed")
    assert trio.current_time() == 0


async def test_the_user_of_a_pair_is_chosen() -> None:
    async with open_connection_pair(server_handler=echo, user="søren") as (client, server):
        assert client.user == server.user == "søren"


async def who_am_i(connection: Connection, request: list[bytes]) -> list[str]:
    await trio.lowlevel.checkpoint()
    return [str(connection.user)]


async def test_many_users_connect_to_one_server() -> None:
    opened: list[str | None] = []

    async def on_open(connection: Connection) -> None:
        opened.append(connection.user)

    async with (
        open_memory_server(who_am_i, users=["alice", "bob"], open_handler=on_open) as server,
        server.connect() as first,
        server.connect("bob", request_handler=echo) as bob,
        server.connect("bob") as again,
    ):
        assert await first.request([]) == [b"alice"], "by default the first"
        assert await bob.request([]) == await again.request([]) == [b"bob"]
        assert sorted(map(str, opened)) == ["alice", "bob", "bob"]
        assert len(server.server.connections) == 3
        assert list(server.keys) == ["alice", "bob"]
        with pytest.raises(ValueError, match="no user 'eve'"):
            server.connect("eve")


async def test_a_server_in_memory_may_be_plain() -> None:
    async with open_memory_server(who_am_i, users=None) as server, server.connect() as client:
        assert await client.request([]) == [b"None"]
        assert server.keys == {}
        with pytest.raises(ValueError, match="no user 'alice'"):
            server.connect("alice")


@pytest.mark.parametrize(
    ("users", "error", "match"),
    [
        ("alice", TypeError, "users must be a list of names, or None for a plain server, not 'alice'"),
        (b"alice", TypeError, "users must be a list of names"),
        ([], ValueError, "users must not be empty; pass None for a plain server"),
    ],
)
async def test_users_that_are_no_list_of_names_are_refused(
    users: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        async with open_memory_server(users=users):
            raise AssertionError


async def test_a_memory_listener_serves_many_and_then_none() -> None:
    listener = MemoryListener()
    async with open_server([listener], echo):
        for _ in range(3):
            async with open_connection(listener.connect()) as client:
                assert await client.request(["x"]) == [b"x"]
    with pytest.raises(trio.BrokenResourceError):
        listener.connect()


async def test_who_was_not_accepted_is_told_when_the_listener_closes() -> None:
    listener = MemoryListener()
    streams = [listener.connect() for _ in range(3)]
    await listener.aclose()
    await listener.aclose()
    for stream in streams:
        assert await stream.receive_some() == b""


# ---- a faulty stream ----


def make_faulty() -> tuple[FaultyStream, trio.abc.HalfCloseableStream]:
    ours, theirs = trio.testing.memory_stream_pair()
    return FaultyStream(ours), theirs


async def make_two_faulty() -> tuple[FaultyStream, FaultyStream]:
    ours, theirs = trio.testing.memory_stream_pair()
    return FaultyStream(ours), FaultyStream(theirs)


async def make_two_that_are_slow() -> tuple[FaultyStream, FaultyStream]:
    streams = await make_two_faulty()
    for stream in streams:
        for faults in (stream.sending, stream.receiving):
            faults.delay = 0.0001
            faults.rate = 1e9
            faults.most = 1000
    return streams


async def make_two_that_clog() -> tuple[FaultyStream, FaultyStream]:
    ours, theirs = trio.testing.lockstep_stream_pair()
    return FaultyStream(ours), FaultyStream(theirs)


@pytest.mark.parametrize("make", [make_two_faulty, make_two_that_are_slow])
async def test_a_faulty_stream_is_a_stream(
    make: Callable[[], object], autojump_clock: trio.testing.MockClock
) -> None:
    await trio.testing.check_half_closeable_stream(make, make_two_that_clog)  # type: ignore[arg-type]


def test_it_goes_around_what_can_be_half_closed() -> None:
    ours, _ = trio.testing.memory_stream_pair()
    with pytest.raises(TypeError, match="HalfCloseableStream, not WholeStream"):
        FaultyStream(WholeStream(ours))  # type: ignore[arg-type]


async def test_one_byte_at_a_time() -> None:
    stream, peer = make_faulty()
    stream.receiving.most = 1
    await peer.send_all(b"abc")
    assert [await stream.receive_some() for _ in range(3)] == [b"a", b"b", b"c"]
    await peer.send_all(b"de")
    stream.receiving.most = None
    assert [await stream.receive_some(1), await stream.receive_some(7)] == [b"d", b"e"]
    stream.sending.most = 1
    stream.sending.alter = lambda piece: b"<" + piece + b">"
    await stream.send_all(b"fgh")
    assert await peer.receive_some() == b"<f><g><h>"


async def test_what_grows_on_the_way_is_received_bit_by_bit() -> None:
    stream, peer = make_faulty()
    stream.receiving.alter = lambda piece: piece * 3
    await peer.send_all(b"ab")
    assert [await stream.receive_some(2) for _ in range(3)] == [b"ab"] * 3


@pytest.mark.parametrize("way", ["sending", "receiving"])
async def test_bytes_are_dropped_and_corrupted_where_it_was_said(way: str) -> None:
    stream, peer = make_faulty()
    faults, ends = (
        (stream.sending, (stream, peer)) if way == "sending" else (stream.receiving, (peer, stream))
    )
    faults.most = 2
    faults.drop(3, after=1)
    faults.drop()
    faults.corrupt(after=5)
    await ends[0].send_all(b"012345678")
    received = b""
    while len(received) < 5:
        received += await ends[1].receive_some()
    assert received == b"44678"
    assert faults.passed == 9
    faults.corrupt(2)
    await ends[0].send_all(b"0123")
    received = b""
    while len(received) < 4:
        received += await ends[1].receive_some()
    assert received == b"1023"
    faults.alter = bytes.lower
    await ends[0].send_all(b"AB")
    assert await ends[1].receive_some() == b"ab"
    assert repr(faults) == f"<bokbok_trio.testing.Faults of {way} after 15 bytes>"


async def test_delay_and_rate(autojump_clock: trio.testing.MockClock) -> None:
    stream, peer = make_faulty()
    stream.sending.delay = 2
    await stream.send_all(b"x" * 1000)
    assert trio.current_time() == 2
    await peer.send_all(b"y" * 1000)
    await stream.receive_some()
    assert trio.current_time() == 2, "each direction by itself"
    stream.sending.delay = 0
    stream.receiving.rate = 100
    await peer.send_all(b"y" * 1000)
    sizes: list[int] = []
    while sum(sizes) < 1000:
        sizes.append(len(await stream.receive_some()))
    assert trio.current_time() == pytest.approx(12)
    assert set(sizes) == {10}
    stream.sending.rate = 3
    await stream.send_all(b"xyz")
    assert trio.current_time() == pytest.approx(13)


async def test_a_cancelled_receive_loses_nothing(autojump_clock: trio.testing.MockClock) -> None:
    stream, peer = make_faulty()
    stream.receiving.delay = 10
    await peer.send_all(b"abc")
    with trio.move_on_after(5) as scope:
        await stream.receive_some()
    assert scope.cancelled_caught
    assert [await stream.receive_some(2), await stream.receive_some()] == [b"ab", b"c"]


async def test_a_stalled_direction_goes_on_when_it_is_resumed() -> None:
    stream, peer = make_faulty()
    seen: list[object] = []

    async def send() -> None:
        await stream.send_all(b"one")
        await stream.wait_send_all_might_not_block()
        await stream.send_eof()
        seen.append("sent")

    async def receive() -> None:
        seen.append(await stream.receive_some())

    async with trio.open_nursery() as nursery:
        stream.sending.stall()
        stream.receiving.stall()
        stream.receiving.stall()
        nursery.start_soon(send)
        nursery.start_soon(receive)
        await peer.send_all(b"two")
        await settle()
        assert seen == []
        stream.receiving.resume()
        await settle()
        assert seen == [b"two"]
        stream.sending.resume()
    assert seen == [b"two", "sent"]
    assert await peer.receive_some() == b"one"
    assert await peer.receive_some() == b""


async def test_a_stall_also_holds_what_is_being_held_up(autojump_clock: trio.testing.MockClock) -> None:
    stream, peer = make_faulty()
    stream.sending.delay = 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, b"x")
        await settle()
        stream.sending.stall()
        with trio.move_on_after(10) as scope:
            await peer.receive_some()
        assert scope.cancelled_caught
        stream.sending.resume()
    assert await peer.receive_some() == b"x"


@pytest.mark.parametrize(
    ("end", "error"),
    [(FaultyStream.cut, trio.BrokenResourceError), (FaultyStream.aclose, trio.ClosedResourceError)],
)
async def test_cutting_and_closing_wake_who_uses_it(
    end: Callable[[FaultyStream], object], error: type[Exception]
) -> None:
    stream, peer = make_faulty()

    async def fail(function: Callable[..., object], *args: object) -> None:
        with pytest.raises(error):
            await function(*args)  # type: ignore[misc]

    stream.sending.stall()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail, stream.send_all, b"x")
        nursery.start_soon(fail, stream.receive_some)
        await settle()
        with pytest.raises(trio.BusyResourceError, match="another task is sending on this stream"):
            await stream.send_eof()
        await end(stream)  # type: ignore[misc]
    assert await peer.receive_some() == b""
    await fail(stream.send_all, b"x")
    await fail(stream.receive_some)
    await stream.cut()
    await stream.aclose()
    await stream.cut()
    with pytest.raises(trio.ClosedResourceError):
        await stream.receive_some()


async def test_it_is_cut_after_so_many_bytes_sent() -> None:
    stream, peer = make_faulty()
    stream.sending.cut(after=5)
    await stream.send_all(b"abc")
    with pytest.raises(trio.BrokenResourceError, match="this stream was cut"):
        await stream.send_all(b"defgh")
    assert await peer.receive_some() + await peer.receive_some() == b"abcde"
    assert await peer.receive_some() == b""


async def test_it_is_cut_after_so_many_bytes_received() -> None:
    stream, peer = make_faulty()
    stream.receiving.cut(after=5)
    await peer.send_all(b"abcdefgh")
    assert await stream.receive_some() == b"abcde"
    with pytest.raises(trio.BrokenResourceError, match="this stream was cut"):
        await stream.receive_some()
    with pytest.raises(trio.BrokenResourceError):
        await peer.send_all(b"x")
    stream, peer = make_faulty()
    await peer.send_all(b"x")
    stream.receiving.cut(after=0)
    with pytest.raises(trio.BrokenResourceError, match="this stream was cut"):
        await stream.receive_some()


@pytest.mark.parametrize("value", [0, -1, float("nan")])
async def test_what_cannot_be_done_is_refused_where_it_is_said(value: float) -> None:
    stream, _ = make_faulty()
    with pytest.raises(ValueError, match="rate must be over 0"):
        stream.sending.rate = value
    with pytest.raises(ValueError, match="most must be over 0"):
        stream.sending.most = value  # type: ignore[assignment]
    if value:
        with pytest.raises(ValueError, match="delay must be"):
            stream.sending.delay = value
    with pytest.raises(ValueError, match="from 0, not -1"):
        stream.sending.drop(after=-1)
    with pytest.raises(ValueError, match="from 0, not -1"):
        stream.sending.corrupt(-1)
    with pytest.raises(ValueError, match="at least 1, not -1"):
        await stream.receive_some(-1)


def test_a_fault_of_the_wrong_kind_or_with_a_wrong_name_is_refused_where_it_is_written() -> None:
    stream, _ = make_faulty()
    for name in ("rate", "most", "delay"):
        with pytest.raises(TypeError, match=f"{name} must be a number, not str"):
            setattr(stream.sending, name, "1")
    with pytest.raises(TypeError, match="delay must be a number, not NoneType"):
        stream.sending.delay = None  # type: ignore[assignment]
    stream.sending.most = None
    with pytest.raises(AttributeError, match="dealy"):
        stream.sending.dealy = 1
    with pytest.raises(AttributeError, match="delay"):
        stream.delay = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("altered", [None, "text", 7])
async def test_who_alters_bytes_into_something_else_is_told(altered: Any) -> None:
    stream, peer = make_faulty()
    await peer.send_all(b"x")
    stream.sending.alter = stream.receiving.alter = lambda _: altered
    with pytest.raises(TypeError, match=f"alter must return bytes, not {type(altered).__name__}"):
        await stream.send_all(b"x")
    with pytest.raises(TypeError, match=f"alter must return bytes, not {type(altered).__name__}"):
        await stream.receive_some()
    stream.receiving.alter = bytearray  # type: ignore[assignment]
    assert await stream.receive_some() == b"x"


# ---- and a connection over one ----


async def test_a_connection_works_one_byte_at_a_time(sealed: bool) -> None:
    def wrap(transport: trio.abc.HalfCloseableStream) -> FaultyStream:
        stream = FaultyStream(transport)
        stream.sending.most = stream.receiving.most = 1
        return stream

    async with open_connection_pair(server_handler=echo, sealed=sealed, wrap=wrap) as (client, _):
        assert await client.request(["x" * 100]) == [b"x" * 100]


async def test_a_request_is_cut_in_the_middle(sealed: bool, autojump_clock: trio.testing.MockClock) -> None:
    streams: list[FaultyStream] = []

    def wrap(transport: trio.abc.HalfCloseableStream) -> FaultyStream:
        streams.append(FaultyStream(transport))
        return streams[0]

    async with open_connection_pair(server_handler=echo, sealed=sealed, wrap=wrap) as (client, server):
        streams[0].sending.cut(after=50)
        with pytest.raises(ConnectionLost, match="this stream was cut"):
            await client.request(["x" * 100])
        await server.wait_closed()


async def test_a_changed_byte_is_noticed_where_it_is_sealed(autojump_clock: trio.testing.MockClock) -> None:
    streams: list[FaultyStream] = []

    def wrap(transport: trio.abc.HalfCloseableStream) -> FaultyStream:
        streams.append(FaultyStream(transport))
        return streams[0]

    async with open_connection_pair(server_handler=busy_handler, wrap=wrap) as (client, _):
        streams[0].receiving.corrupt()
        with pytest.raises(ConnectionLost):
            await client.request(["ping", "1"])
