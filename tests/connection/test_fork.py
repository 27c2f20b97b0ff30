"""A forked child is harmless to its parent, whatever it does."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from bokbok_trio import Key, TCPAddress, UnixAddress, open_connection, open_server
from bokbok_trio._fork import close_in_child, close_inherited
from bokbok_trio._sockets import stream_address
from bokbok_trio._stream.secretbox import SecretboxStream
from bokbok_trio._stream.socket import SocketStream, make_fast
from bokbok_trio.testing import FaultyStream
from tests.support.helpers import echo
from tests.support.inside import forked_from_now_on, keys_held
from tests.support.sockets import dial_to, listen_on, tcp_address

KEY = Key(bytes(range(32)))


def in_child(act: Callable[[], object]) -> str:
    """Call a function in a forked child. Return its result, or its exception, as a text."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            told = repr(act())
        except BaseException as exc:
            told = repr(exc)
        os.write(write, told.encode())
        os._exit(0)
    os.close(write)
    with open(read) as told_by_child:
        told = told_by_child.read()
    os.waitpid(child, 0)
    return told


@contextmanager
def living_child() -> Generator[None]:
    """A forked child that does nothing, for as long as the block lasts."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        ours.close()
        theirs.send(b"what runs first in a child has run")
        theirs.recv(1)
        os._exit(0)
    theirs.close()
    ours.recv(100)
    try:
        yield
    finally:
        ours.close()
        os.waitpid(child, 0)


class Resumed:
    def unwrap(self) -> None:
        pass


def run_coroutine(coroutine: Any) -> object:
    """Run a coroutine without an event loop, through its checkpoints, to its end or its first wait."""
    resumed = None
    try:
        while "Checkpoint" in repr(coroutine.send(resumed)):
            resumed = Resumed()
    except StopIteration as exc:
        return exc.value
    return "it waits"


@pytest.fixture(params=["tcp", "unix"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "127.0.0.1:0" if request.param == "tcp" else f"{tmp_path}/sock"


# ---- a child that lives on ----


async def test_it_keeps_no_connection_open(where: str, sealed: bool) -> None:
    keys: dict[str, Any] = {"user": "u", "key": KEY} if sealed else {}
    async with open_server(where, echo, user_key={"u": KEY} if sealed else None) as server:
        async with open_connection(server.addresses[0], **keys) as client:
            await client.request(["x"])
            [other] = server.connections
            with living_child(), trio.fail_after(5):
                await other.aclose()
                await client.wait_closed()


async def test_it_keeps_no_port_and_no_path_taken(where: str) -> None:
    async with open_server(where, echo) as server:
        [address] = server.addresses
        child = living_child()
        child.__enter__()
    try:
        with pytest.raises(OSError, match=r"refused|No such file"):
            await dial_to(address)
        async with open_server(address, echo), open_connection(address) as client:
            assert await client.request(["x"]) == [b"x"]
    finally:
        child.__exit__(None, None, None)


async def test_it_keeps_no_listener_of_the_applications_own() -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = tcp_address(listeners[0])
    async with open_server(listeners, echo):
        child = living_child()
        child.__enter__()
    try:
        with pytest.raises(ConnectionRefusedError):
            await dial_to(address)
    finally:
        child.__exit__(None, None, None)


async def test_it_keeps_no_connection_that_was_being_dialled() -> None:
    [listener] = await listen_on(TCPAddress("127.0.0.1", 0))
    async with listener:
        stream = await dial_to(tcp_address(listener))
        async with await listener.accept() as accepted:
            with living_child(), trio.fail_after(5):
                await stream.aclose()
                assert await accepted.receive_some() == b""


# ---- a child that acts ----


async def test_it_leaves_the_socket_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    [listener] = await listen_on(UnixAddress(path))
    async with open_server([listener], echo):
        assert in_child(lambda: run_coroutine(listener.aclose())) == "None"
        assert path.exists()
        assert "ClosedResourceError" in in_child(lambda: run_coroutine(listener.accept()))
        async with open_connection(path) as client:
            assert await client.request(["x"]) == [b"x"]
    assert not path.exists()


async def test_it_can_use_no_stream() -> None:
    ours, theirs = map(trio.SocketStream, trio.socket.socketpair())
    async with SocketStream(ours) as stream, theirs:
        assert in_child(lambda: stream.send_nowait(b"x")) == "False"
        assert in_child(stream.socket.fileno) == "-1"
        assert in_child(stream.close_nowait) == "True"
        assert "ClosedResourceError" in in_child(lambda: run_coroutine(stream.send_all(b"x")))
        assert "ClosedResourceError" in in_child(lambda: run_coroutine(stream.receive_some()))
        await stream.send_all(b"ours")
        assert await theirs.receive_some() == b"ours"


@pytest.mark.parametrize("over", ["socket", "memory"])
async def test_it_seals_and_opens_nothing(over: str) -> None:
    """Otherwise two plaintexts would be sealed under one nonce."""
    ours: trio.abc.Stream
    theirs: trio.abc.Stream
    if over == "socket":
        ours, theirs = map(trio.SocketStream, trio.socket.socketpair())
    else:
        ours, theirs = trio.testing.memory_stream_pair()
    one, other = bytes(32), bytes(range(32))
    stream = SecretboxStream(make_fast(ours), send_key=one, receive_key=other)
    peer = SecretboxStream(theirs, send_key=other, receive_key=one)
    await peer.send_all(b"for the parent")

    for act in (
        lambda: stream.send_nowait(b"x"),
        lambda: run_coroutine(stream.send_all(b"x")),
        lambda: run_coroutine(stream.send_eof()),
        lambda: run_coroutine(stream.receive_some()),
        lambda: run_coroutine(stream.receive_view()),
    ):
        assert "ClosedResourceError" in in_child(act)
    assert in_child(stream.send_end_nowait) == str(over == "socket"), "nothing is left to be done"
    assert in_child(lambda: run_coroutine(stream.aclose())) == "None"
    assert in_child(lambda: keys_held(stream)) == "(b'', b'')"
    await stream.send_all(b"for the peer")
    assert await peer.receive_some() == b"for the peer"
    assert await stream.receive_some() == b"for the parent"
    await stream.aclose()
    assert await peer.receive_some() == b""
    await peer.aclose()


async def test_its_closing_of_an_abandoned_stream_is_a_checkpoint() -> None:
    ours, _ = trio.testing.memory_stream_pair()
    stream = SecretboxStream(ours, send_key=bytes(32), receive_key=bytes(32))
    stream.abandon()
    with trio.testing.assert_checkpoints():
        await stream.aclose()
    await ours.send_all(b"the transport is as it was")


UNWINDS = """
import os, sys, trio
from bokbok_trio import Key, open_connection
async def main():
    async with open_connection({address!r}, **{keys}) as client:
        for _ in range(3):
            await client.request(["x"])
        child = os.fork()
        if child == 0:
            sys.exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        with trio.fail_after(5):
            print(await client.request(["still"]), flush=True)
        print("open", not client.closed, flush=True)
        os._exit(0)
trio.run(main)
"""
"""It leaves by ``os._exit``, as its Trio run cannot end any more: the child's has ended, and so has disarmed
the descriptor by which the run wakes itself, in the epoll instance that both share."""


async def test_one_that_leaves_a_connections_block_says_nothing_in_its_parents_name(
    where: str, sealed: bool
) -> None:
    keys = 'dict(user="u", key=Key(bytes(range(32))))' if sealed else "{}"
    async with open_server(where, echo, user_key={"u": KEY} if sealed else None) as server:
        program = UNWINDS.format(address=str(server.addresses[0]), keys=keys)
        command = [sys.executable, "-c", program]
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"[b'still']\nopen True\n"


SERVES = """
import os, sys, trio
from bokbok_trio import Key, open_server
async def echo(connection, request):
    return request
async def main():
    async with open_server({where!r}, echo, **{keys}) as server:
        print(server.addresses[0], flush=True)
        while not os.path.exists({go!r}):
            await trio.sleep(0.01)
        child = os.fork()
        if child == 0:
            sys.exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


async def read_line(stream: trio.abc.ReceiveStream) -> str:
    line = b""
    while not line.endswith(b"\n"):
        line += await stream.receive_some(1)
    return line.decode().strip()


async def test_one_that_leaves_a_servers_block_ends_no_connection(
    where: str, sealed: bool, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"user": "u", "key": KEY} if sealed else {}
    go = tmp_path / "go"
    program = SERVES.format(
        where=where, go=str(go), keys='dict(user_key={"u": Key(bytes(range(32)))})' if sealed else "{}"
    )
    process = await trio.lowlevel.open_process([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        address = await read_line(process.stdout)
        with trio.fail_after(30):
            async with open_connection(address, **keys) as client:
                for _ in range(3):
                    await client.request(["x"])
                go.touch()
                assert await read_line(process.stdout) == "7"
                assert await client.request(["still"]) == [b"still"]
            if "/" in address:
                assert os.path.exists(address)
    finally:
        process.kill()
        await process.wait()
        await process.stdout.aclose()


# ---- what is done in a child, seen from inside ----


@pytest.fixture
def fork(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return the function that runs first in a child, for objects made from now on."""
    return forked_from_now_on(monkeypatch)


async def test_all_sockets_are_closed_and_no_file_is_removed(
    fork: Callable[[], None], tmp_path: Path
) -> None:
    [tcp] = await listen_on(TCPAddress("127.0.0.1", 0))
    [unix] = await listen_on(UnixAddress(tmp_path / "sock"))
    dialled = await dial_to(tcp_address(tcp))
    accepted = make_fast(await tcp.accept())
    assert isinstance(accepted, SocketStream)
    sealed = SecretboxStream(accepted, send_key=bytes(32), receive_key=bytes(32))
    before = len(os.listdir("/proc/self/fd"))
    fork()
    fork()
    assert len(os.listdir("/proc/self/fd")) == before - 4
    assert dialled.socket.fileno() == accepted.socket.fileno() == -1
    sealed.close_nowait()
    with pytest.raises(trio.ClosedResourceError, match="the process that this one was forked from"):
        sealed.send_nowait(b"x")
    with pytest.raises(trio.ClosedResourceError):
        await sealed.receive_some()
    for each in (tcp, unix):
        with pytest.raises(trio.ClosedResourceError):
            await each.accept()
    for end in (tcp, unix, dialled, accepted, sealed):
        await end.aclose()
    assert (tmp_path / "sock").is_socket()


async def test_the_socket_below_tls_is_closed() -> None:
    ours, theirs = map(trio.SocketStream, trio.socket.socketpair())
    context = ssl.create_default_context()
    tls = trio.SSLStream(trio.SSLStream(ours, context), context)
    close_in_child(tls)
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    close_in_child(trio.SSLListener(listener, context))
    assert in_child(lambda: (ours.socket.fileno(), listener.socket.fileno())) == "(-1, -1)"
    assert stream_address(ours) is None
    for each in (ours, theirs, listener):
        await each.aclose()


async def test_what_has_no_socket_is_left_alone() -> None:
    stream, _ = trio.testing.memory_stream_pair()
    close_in_child(stream)
    assert make_fast(FaultyStream(stream)) is not None


async def test_closing_an_inherited_socket_again_does_nothing() -> None:
    ours, theirs = trio.socket.socketpair()
    fd = ours.fileno()
    os.close(fd)
    close_inherited(ours)
    close_inherited(ours)
    assert ours.fileno() == -1
    theirs.close()
