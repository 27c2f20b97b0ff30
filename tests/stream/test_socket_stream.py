from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

import bokbok_trio._stream.socket
from bokbok_trio._stream.fast import PlainStream
from bokbok_trio._stream.socket import RECEIVE_SIZE, SocketStream, make_fast


def pair() -> tuple[SocketStream, SocketStream]:
    ours, theirs = trio.socket.socketpair()
    return SocketStream(trio.SocketStream(ours)), SocketStream(trio.SocketStream(theirs))


async def make_pair() -> tuple[SocketStream, SocketStream]:
    return pair()


async def make_clogged_pair() -> tuple[SocketStream, SocketStream]:
    ours, theirs = pair()
    for stream in (ours, theirs):
        while stream.send_nowait(bytes(2**16)):
            pass
    return ours, theirs


async def test_it_is_a_stream() -> None:
    """A socket that is full takes what it can, so only one direction can be clogged at a time."""
    await trio.testing.check_two_way_stream(make_pair, make_clogged_pair)


async def test_what_the_socket_takes_leaves_at_once_and_the_rest_first() -> None:
    ours, theirs = pair()
    async with ours, theirs, trio.open_nursery() as nursery:
        assert ours.send_nowait(b"hello")
        assert await theirs.receive_some() == b"hello"
        sent = 0
        while ours.send_nowait(bytes(10**6)):
            sent += 10**6
        assert ours.has_rest
        assert not ours.can_send_nowait
        assert not ours.send_nowait(b"more"), "it is kept too"
        nursery.start_soon(ours.send_all, b"last")
        received = bytearray()
        while len(received) < sent + 10**6 + 8:
            received += await theirs.receive_view()
        assert received.endswith(b"\0morelast")
    assert not ours.has_rest


async def test_a_broken_socket_takes_nothing_and_tells_who_waits() -> None:
    ours, theirs = pair()
    async with ours:
        await theirs.aclose()
        assert not ours.send_nowait(b"x")
        with pytest.raises(trio.BrokenResourceError):
            await ours.send_all(b"")
    assert not ours.send_nowait(b"x")
    assert ours.receive_nowait(1) == b""
    assert ours.has_hung_up()
    with pytest.raises(trio.ClosedResourceError):
        await ours.receive_some()


async def test_what_is_there_is_received_without_waiting() -> None:
    ours, theirs = pair()
    async with ours:
        assert ours.receive_nowait(3) == b""
        await theirs.send_all(b"four")
        assert ours.receive_nowait(3) == b"fou"
        assert not ours.has_hung_up()
        await theirs.aclose()
        assert ours.has_hung_up()
        assert ours.receive_nowait(3) == b"r"


async def test_a_reset_breaks_receiving() -> None:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        client = await trio.open_tcp_stream(*listener.socket.getsockname())
        accepted = await listener.accept()
        stream = make_fast(accepted)
        async with stream:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            await client.aclose()
            with pytest.raises(trio.BrokenResourceError, match="Connection reset"):
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
        view = await theirs.receive_view()
        assert bytes(view) == b"first"
        await ours.send_all(b"later")
        copy = await theirs.receive_some(RECEIVE_SIZE)
        assert copy == bytes(view) == b"later"


def test_any_other_stream_waits_for_everything() -> None:
    stream, _ = trio.testing.memory_stream_pair()
    fast = make_fast(stream)
    assert isinstance(fast, PlainStream)
    assert not fast.can_send_nowait
    with pytest.raises(AssertionError):
        fast.send_nowait(b"x")
    assert make_fast(fast) is fast


async def test_elsewhere_no_stream_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    ours, theirs = trio.socket.socketpair()
    stream = make_fast(trio.SocketStream(ours))
    assert isinstance(stream, PlainStream)
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
        ours.close_nowait()
        ours.close_nowait()
        assert await theirs.receive_some() == b""
        assert ours.send_nowait(b"x") == 0
        with pytest.raises(trio.ClosedResourceError):
            await ours.send_all(b"x")
        await ours.aclose()


# ---- sending ----


@pytest.mark.parametrize("how", ["send_nowait", "send_all"])
def test_a_peer_that_is_gone_is_no_signal(how: str) -> None:
    """With SIGPIPE at its default, which many programs of a pipeline want, the process would end."""
    program = f"""
import signal, trio
from bokbok_trio._stream.socket import SocketStream
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
async def main():
    ours, theirs = trio.socket.socketpair()
    stream = SocketStream(trio.SocketStream(ours))
    theirs.close()
    if {how!r} == "send_nowait":
        print(stream.send_nowait(b"x"))
    else:
        try:
            await stream.send_all(b"x")
        except trio.BrokenResourceError as exc:
            print(exc)
trio.run(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == {"send_nowait": "False\n", "send_all": "[Errno 32] Broken pipe\n"}[how]


async def test_macos_has_an_option_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(bokbok_trio._stream.socket, "SO_NOSIGPIPE", socket.SO_KEEPALIVE)
        patch.setattr(sys, "platform", "darwin")
        ours, theirs = pair()
        assert ours.send_nowait(b"x")
        assert ours.count_unacknowledged() == 0, "nobody tells"
    async with ours, theirs:
        assert (ours.count_unacknowledged() > 0) is (sys.platform == "linux")
        assert ours.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


async def test_a_default_timeout_of_sockets_makes_nothing_wait() -> None:
    socket.setdefaulttimeout(5)
    try:
        ours, theirs = pair()
    finally:
        socket.setdefaulttimeout(None)
    async with ours, theirs:
        began = time.monotonic()
        while ours.send_nowait(bytes(2**16)):
            pass
        assert time.monotonic() - began < 4


async def test_one_task_sends_at_a_time() -> None:
    ours, theirs = await make_clogged_pair()
    async with theirs, ours, trio.open_nursery() as nursery:
        nursery.start_soon(ours.wait_send_all_might_not_block)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await ours.send_all(b"x")
        nursery.cancel_scope.cancel()


async def test_what_was_sent_arrives_before_the_end() -> None:
    ours, theirs = pair()
    async with ours, theirs:
        await ours.send_all(b"last")
        ours.send_end_nowait()
        ours.send_end_nowait()
        assert await theirs.receive_some() == b"last"
        assert await theirs.receive_some() == b""
        assert not ours.send_nowait(b"x")
        with pytest.raises(trio.ClosedResourceError, match="shut down"):
            await ours.send_all(b"x")
        await theirs.send_all(b"the other way goes on")
        assert await ours.receive_some() == b"the other way goes on"
    ours.send_end_nowait()


async def test_a_send_that_waits_when_the_stream_breaks() -> None:
    ours, theirs = await make_clogged_pair()
    async with ours, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            with pytest.raises(trio.BrokenResourceError, match=r"Broken pipe|Connection reset"):
                await ours.send_all(b"x")

        await trio.testing.wait_all_tasks_blocked()
        theirs.close_nowait()


async def test_what_the_peer_has_not_acknowledged_is_counted() -> None:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    client = await trio.open_tcp_stream(*listener.socket.getsockname())
    async with listener, SocketStream(client) as ours, await listener.accept() as theirs:
        assert ours.count_unacknowledged() == 0
        sent = 2**16
        while ours.send_nowait(bytes(2**16)):
            sent += 2**16
        assert 0 < ours.count_unacknowledged() < sent
        with trio.fail_after(5):
            while ours.count_unacknowledged():
                with trio.move_on_after(0.01):
                    await theirs.receive_some()
        assert ours.load() is not None
    assert ours.count_unacknowledged() == 0, "it is closed"
    assert ours.load() is None


# ---- a socket that somebody else closes ----


async def test_a_closed_stream_is_none() -> None:
    ours, theirs = trio.socket.socketpair()
    stream = trio.SocketStream(ours)
    await stream.aclose()
    with pytest.raises(trio.ClosedResourceError):
        SocketStream(stream)
    theirs.close()


@pytest.mark.parametrize("how", ["stream", "socket"])
async def test_nothing_goes_into_a_file_that_has_the_number_of_a_socket_that_was_closed(
    how: str, tmp_path: Path
) -> None:
    """And nothing comes from it: the application has closed the stream that it had given away."""
    ours, theirs = trio.socket.socketpair()
    inner = trio.SocketStream(ours)
    stream = SocketStream(inner)
    number = ours.fileno()
    if how == "stream":
        await inner.aclose()
    else:
        ours.close()
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    os.write(other, b"other's")
    os.lseek(other, 0, os.SEEK_SET)
    if other != number:
        os.dup2(other, number)
    assert not stream.send_nowait(b"x")
    for use in (stream.send_all(b"x"), stream.wait_send_all_might_not_block(), stream.receive_some()):
        with pytest.raises(trio.ClosedResourceError):
            await use
    assert stream.count_unacknowledged() == 0
    await stream.aclose()
    stream.close_nowait()
    assert os.read(number, 10) == b"other's", "it is open, and as it was"
    for fd in {number, other}:
        os.close(fd)
    theirs.close()


async def test_a_socket_that_is_closed_when_its_receiver_was_woken_already(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = pair()

    async def wait_readable(fd: int) -> None:
        await trio.lowlevel.checkpoint()
        ours.socket.close()

    await theirs.send_all(b"x")
    monkeypatch.setattr(trio.lowlevel, "wait_readable", wait_readable)
    with pytest.raises(trio.ClosedResourceError):
        await ours.receive_some()
    await theirs.aclose()


async def test_a_socket_that_is_closed_in_the_step_of_a_send(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair()

    async def wait_writable() -> None:
        ours.socket.close()
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(ours.socket, "wait_writable", wait_writable)
    with pytest.raises(trio.ClosedResourceError):
        await ours.wait_send_all_might_not_block()
    await theirs.aclose()


async def test_a_stream_that_is_dropped_closes_nothing() -> None:
    """Its socket is Trio's, also where both are garbage of one cycle."""
    ours, theirs = trio.socket.socketpair()
    inner = trio.SocketStream(ours)
    for in_cycle in (False, True):
        kept: list[object] = [SocketStream(inner)]
        if in_cycle:
            kept.append(kept)
        del kept
        gc.collect()
    async with inner, trio.SocketStream(theirs) as other:
        await inner.send_all(b"x")
        assert await other.receive_some() == b"x"
