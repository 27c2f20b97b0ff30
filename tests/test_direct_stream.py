from __future__ import annotations

import socket
from functools import partial

import pytest
import trio
import trio.testing

from bokbok_trio._direct_stream import RECEIVE_SIZE, DirectStream, make_direct


def pair() -> tuple[DirectStream, DirectStream]:
    ours, theirs = trio.socket.socketpair()
    return DirectStream(trio.SocketStream(ours)), DirectStream(trio.SocketStream(theirs))


async def make_pair() -> tuple[DirectStream, DirectStream]:
    return pair()


async def make_clogged_pair() -> tuple[DirectStream, DirectStream]:
    ours, theirs = pair()
    for stream in (ours, theirs):
        while stream.send_now(bytes(2**16)):
            pass
    return ours, theirs


async def test_it_is_a_stream() -> None:
    """A socket that is full takes what it can, so only one direction can be clogged at a time."""
    await trio.testing.check_two_way_stream(make_pair, make_clogged_pair)


async def test_what_the_socket_takes_leaves_at_once() -> None:
    ours, theirs = pair()
    async with ours, theirs:
        assert ours.send_now(b"hello") == 5
        assert await theirs.receive_some() == b"hello"
        sent = 0
        while taken := ours.send_now(bytes(10**6)):
            sent += taken
        assert sent % 10**6, "only a part of the last was taken"
        received = 0
        while received < sent:
            received += len(await theirs.receive_view())
        assert received == sent


async def test_a_broken_socket_takes_nothing_and_tells_who_waits() -> None:
    ours, theirs = pair()
    async with ours:
        await theirs.aclose()
        assert ours.send_now(b"x") == 0
        with pytest.raises(trio.BrokenResourceError):
            await ours.send_all(b"x")
    assert ours.send_now(b"x") == 0
    with pytest.raises(trio.ClosedResourceError):
        await ours.receive_some()


async def test_a_reset_breaks_receiving() -> None:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        client = await trio.open_tcp_stream(*listener.socket.getsockname())
        accepted = await listener.accept()
        stream = make_direct(accepted)
        async with stream:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            await client.aclose()
            with pytest.raises(trio.BrokenResourceError, match="receiving failed"):
                await stream.receive_some()


async def test_a_wake_for_nothing_is_waited_out(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair()
    real_wait = trio.lowlevel.wait_readable
    waits = 0

    async def wait(fd: int) -> None:
        nonlocal waits
        waits += 1
        if waits > 1:
            await real_wait(fd)

    monkeypatch.setattr(trio.lowlevel, "wait_readable", wait)
    async with ours, theirs, trio.open_nursery() as nursery:
        nursery.start_soon(partial(trio.testing.wait_all_tasks_blocked))

        @nursery.start_soon
        async def receive() -> None:
            assert await ours.receive_some() == b"late"

        await trio.testing.wait_all_tasks_blocked()
        assert waits == 2
        await theirs.send_all(b"late")


async def test_a_view_is_of_what_all_streams_of_the_thread_share() -> None:
    ours, theirs = pair()
    async with ours, theirs:
        await ours.send_all(b"first")
        view = await theirs.receive_view(5)
        assert bytes(view) == b"first"
        await ours.send_all(b"later")
        copy = await theirs.receive_some(RECEIVE_SIZE)
        assert copy == bytes(view) == b"later"


def test_only_a_sockets_stream_is_made_direct() -> None:
    stream, _ = trio.testing.memory_stream_pair()
    assert make_direct(stream) is stream


async def test_elsewhere_no_stream_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    ours, theirs = trio.socket.socketpair()
    stream = trio.SocketStream(ours)
    assert make_direct(stream) is stream
    theirs.close()
    await stream.aclose()


async def test_it_closes_at_once_under_whoever_waits() -> None:
    ours, theirs = pair()
    async with theirs, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def receive() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await ours.receive_some()

        await trio.testing.wait_all_tasks_blocked()
        ours.close_now()
        ours.close_now()
        assert await theirs.receive_some() == b""
        assert ours.send_now(b"x") == 0
        with pytest.raises(trio.ClosedResourceError):
            await ours.send_all(b"x")
        await ours.aclose()
