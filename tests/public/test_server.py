"""Servers: listeners, arguments, and what ends one."""

from __future__ import annotations

import errno
import functools
import os
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest
import trio
import trio.testing

from bokbok_trio import (
    Address,
    AddressError,
    Key,
    PeerCredentials,
    Server,
    TCPAddress,
    UnixAddress,
    open_connection,
    open_reconnecting,
    open_server,
    serve,
)
from bokbok_trio.testing import MemoryListener

from ..support.clients import client_of
from ..support.helpers import echo, settle

KEY = Key(bytes(range(32)))


async def test_serve_in_a_nursery_gives_the_server_and_ends_when_stopped() -> None:
    listener = MemoryListener()
    async with trio.open_nursery() as nursery:
        server = await nursery.start(partial(serve, [listener], echo))
        assert isinstance(server, Server)
        async with client_of(listener) as client:
            assert await client.request(["x"]) == [b"x"]
            assert [connection.side for connection in server.connections] == ["server"]
            assert next(iter(server.connections)).server is server
        server.stop()
        await server.wait_stopped()
        assert server.connections == frozenset()
        with pytest.raises(trio.BrokenResourceError):
            listener.connect()


async def test_serve_without_a_nursery_start_serves_too() -> None:
    listener = MemoryListener()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, [listener], echo)
        async with client_of(listener) as client:
            assert await client.request(["x"]) == [b"x"]
        nursery.cancel_scope.cancel()


async def test_many_listeners() -> None:
    listeners = [MemoryListener(), MemoryListener()]
    async with open_server(listeners, echo) as server:
        assert server.addresses == ()
        assert repr(server) == "<bokbok_trio.Server on listeners>"
        for listener in listeners:
            async with client_of(listener) as client:
                assert await client.request(["x"]) == [b"x"]


class Oops(Exception):
    pass


@pytest.mark.parametrize("error", [Oops(), ExceptionGroup("mine", [Oops()]), SystemExit()])
async def test_what_the_block_raises_comes_out_as_itself(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        async with open_server([MemoryListener()], echo):
            raise error
    assert caught.value is error


async def test_an_error_at_the_start_comes_out_bare() -> None:
    with pytest.raises(AddressError):
        async with open_server("nonsense", echo):
            raise AssertionError
    async with trio.open_nursery() as nursery:
        with pytest.raises(AddressError):
            await nursery.start(serve, "nonsense", echo)


class BrokenListener(trio.abc.Listener[trio.abc.Stream]):
    def __init__(self, error: OSError) -> None:
        self.error = error
        self.accepted = 0

    async def accept(self) -> trio.abc.Stream:
        self.accepted += 1
        if self.accepted > 2 and self.error.errno == errno.EMFILE:
            await trio.sleep_forever()
        raise self.error

    async def aclose(self) -> None: ...


async def test_a_listener_that_fails_ends_the_server_with_its_error_bare() -> None:
    good, bad = MemoryListener(), BrokenListener(OSError(errno.EBADF, "bad"))
    with pytest.raises(OSError, match="bad"):
        await serve([good, bad], echo)
    with pytest.raises(trio.BrokenResourceError):
        good.connect()


async def test_listeners_that_fail_together_come_out_together() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        await serve([BrokenListener(OSError(errno.EBADF, str(n))) for n in range(2)], echo)
    assert len(caught.value.exceptions) == 2


@pytest.mark.parametrize("body_fails", [False, True])
async def test_a_failing_listener_comes_out_of_the_block_bare_unless_the_block_fails_too(
    body_fails: bool,
) -> None:
    with pytest.raises(Oops if body_fails else OSError) as caught:
        async with open_server([BrokenListener(OSError(errno.EBADF, "bad"))], echo):
            try:
                await trio.sleep_forever()
            finally:
                if body_fails:
                    raise Oops
    assert type(caught.value) in (Oops, OSError)


class FailingSocket:
    """The socket of a listener. Its first calls fail."""

    def __init__(self, sock: trio.socket.SocketType, errors: list[int]) -> None:
        self.sock = sock
        self.errors = errors

    async def accept(self) -> tuple[trio.socket.SocketType, object]:
        if self.errors:
            await trio.lowlevel.checkpoint()
            code = self.errors.pop(0)
            raise OSError(code, os.strerror(code))
        return await self.sock.accept()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)


@pytest.mark.parametrize("errors", [[errno.ECONNABORTED, errno.EPROTO], [errno.EMFILE, errno.ENOBUFS]])
async def test_errors_of_single_connections_and_a_lack_of_anything_are_survived(errors: list[int]) -> None:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    listener.socket = FailingSocket(listener.socket, list(errors))  # type: ignore[assignment]
    async with open_server([listener], echo) as server, open_connection(server.addresses[0]) as client:
        assert await client.request(["x"]) == [b"x"]


async def test_another_error_of_a_listeners_socket_ends_the_server() -> None:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    listener.socket = FailingSocket(listener.socket, [errno.EINVAL])  # type: ignore[assignment]
    with pytest.raises(OSError, match="Invalid argument"):
        await serve([listener], echo)
    assert listener.socket.fileno() == -1


async def test_stopping_and_waiting_from_another_run_are_refused() -> None:
    async with open_server([MemoryListener()], echo) as server:

        async def misuse() -> None:
            with pytest.raises(RuntimeError, match="another Trio run"):
                server.stop()
            with pytest.raises(RuntimeError, match="another Trio run"):
                await server.wait_stopped()

        await trio.to_thread.run_sync(trio.run, misuse)
        with pytest.raises(RuntimeError, match="another Trio run"):
            await trio.to_thread.run_sync(server.stop)


async def test_a_lack_of_file_descriptors_is_survived(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    listener = BrokenListener(OSError(errno.EMFILE, "too many"))
    async with open_server([listener], echo):
        await trio.sleep(10)
        assert listener.accepted == 3
    assert "EMFILE" in caplog.text


def uid_of(credentials: PeerCredentials) -> str:
    return str(credentials.uid)


async def async_uid_of(credentials: PeerCredentials) -> str:
    raise AssertionError


def sync_look_up(user: str) -> Key:
    raise AssertionError


class AsyncCall:
    async def __call__(self, *args: object) -> list[bytes]:
        return await echo(*args)  # type: ignore[arg-type]


class SyncCall:
    def __call__(self, *args: object) -> list[bytes]:
        raise AssertionError


class Methods:
    async def handle(self, *args: object) -> list[bytes]:
        return await echo(*args)  # type: ignore[arg-type]

    def handle_sync(self, *args: object) -> list[bytes]:
        raise AssertionError


@functools.wraps(echo)
def wraps_echo(*args: Any) -> Awaitable[list[bytes]]:
    return echo(*args)


def not_async(*args: object) -> list[bytes]:
    raise AssertionError


async def yields(*args: object) -> AsyncGenerator[bytes]:
    yield b""


@pytest.mark.parametrize("name", ["request_handler", "channel_handler", "open_handler", "close_handler"])
@pytest.mark.parametrize(
    "handler",
    [
        *(not_async, lambda *_: [], partial(not_async), partial(partial(not_async), 1), SyncCall(), SyncCall),
        *(Methods().handle_sync, yields, print, Mock(), 7, "echo", [echo], AsyncCall),
    ],
)
async def test_a_handler_that_is_not_async_is_refused_at_once(name: str, handler: Any) -> None:
    opening: list[Callable[..., Any]] = [open_server, open_connection, open_reconnecting]
    for open_it in opening[name == "open_handler" :]:
        if open_it is open_connection and name == "open_handler":
            continue
        with pytest.raises(
            TypeError, match=f"{name} must be an async function, .* define it with 'async def'"
        ):
            async with open_it("127.0.0.1:1", **{name: handler}):
                raise AssertionError


@pytest.mark.parametrize(
    "handler",
    [
        *(echo, partial(echo), partial(partial(echo)), AsyncCall(), partial(AsyncCall()), Methods().handle),
        *(wraps_echo, AsyncMock(return_value=[b"x"]), partial(Methods().handle)),
    ],
)
async def test_what_an_async_handler_may_be(handler: Any) -> None:
    listener = MemoryListener()
    async with open_server([listener], handler), client_of(listener) as client:
        assert await client.request(["x"]) == [b"x"]


async def test_a_callable_that_is_not_written_in_python_may_be_a_handler() -> None:
    """Nobody can tell: this stands for what Cython makes."""
    handler: Any = weakref.proxy(echo)
    async with open_server([MemoryListener()], handler):
        pass


class LazyKeys(Mapping[str, Key]):
    """Keys that are looked up when they are asked for, and cannot be counted."""

    def __getitem__(self, user: str) -> Key:
        return {"u": KEY}[user]

    def __iter__(self) -> Iterator[str]:
        raise AssertionError

    def __len__(self) -> int:
        raise AssertionError


@pytest.mark.parametrize(
    "user_key", [{"u": KEY}, {"u": (KEY,)}, LazyKeys(), partial(AsyncMock(return_value=KEY))]
)
async def test_what_user_key_may_be(user_key: Any) -> None:
    listener = MemoryListener()
    async with open_server([listener], echo, user_key=user_key):
        async with client_of(listener, user="u", key=KEY) as client:
            assert await client.request(["x"]) == [b"x"]


@pytest.mark.parametrize("failing", [False, True])
async def test_names_are_wanted_at_each_of_several_addresses(failing: bool, tmp_path: Path) -> None:
    on = [f"{tmp_path}/one", f"{tmp_path}/other"] + (["127.0.0.1:0"] if failing else [])
    if failing:
        with pytest.raises(AddressError, match="needs a UNIX socket"):
            async with open_server(on, echo, peer_user=uid_of):
                raise AssertionError
    else:
        async with open_server(on, echo, peer_user=uid_of) as server:
            for address in server.addresses:
                async with open_connection(address):
                    assert [connection.user for connection in server.connections] == [str(os.geteuid())]
                await settle()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("failing", [False, True])
async def test_several_addresses_or_none(failing: bool, tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    on: list[str | Address] = ["127.0.0.1:0", UnixAddress(path), "127.0.0.1:0"]
    on += ["/nowhere/sock"] if failing else []
    if failing:
        with pytest.raises(OSError, match="No such file"):
            async with open_server(on, echo):
                raise AssertionError
    else:
        async with open_server(on, echo) as server:
            assert len(server.addresses) == 3
            for address in server.addresses:
                async with open_connection(address) as client:
                    assert await client.request(["x"]) == [b"x"]
    assert not os.path.exists(path)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"on": 7}, TypeError),
        ({"on": []}, TypeError),
        ({"on": [7]}, TypeError),
        ({"on": "nonsense"}, AddressError),
        ({"on": "0.0.0.0:0"}, AddressError),
        ({"on": ":0"}, AddressError),
        ({"on": "127.0.0.1:0", "user_key": 7}, TypeError),
        ({"on": "127.0.0.1:0", "service": "x"}, ValueError),
        ({"on": "127.0.0.1:0", "service": "x" * 256, "user_key": {}}, ValueError),
        ({"on": "127.0.0.1:0", "service": 7, "user_key": {}}, TypeError),
        ({"on": "127.0.0.1:0", "peer_user": uid_of}, AddressError),
        ({"on": TCPAddress("0.0.0.0", 0), "peer_user": uid_of, "insecure": True}, AddressError),
        ({"on": "/nowhere/app.sock", "peer_user": uid_of, "user_key": {}}, TypeError),
        ({"on": "/nowhere/app.sock", "peer_user": {}}, TypeError),
        ({"on": "/nowhere/app.sock", "peer_user": async_uid_of}, TypeError),
        ({"on": "/nowhere/app.sock", "peer_user": partial(async_uid_of)}, TypeError),
        ({"on": "/nowhere/app.sock", "peer_user": AsyncCall()}, TypeError),
        ({"on": "127.0.0.1:0", "user_key": sync_look_up}, TypeError),
        ({"on": "127.0.0.1:0", "user_key": lambda _: KEY}, TypeError),
        ({"on": "127.0.0.1:0", "user_key": {"u": bytes(32)}}, TypeError),
        ({"on": "127.0.0.1:0", "user_key": {"u": "passphrase"}}, TypeError),
        ({"on": "127.0.0.1:0", "user_key": {"u": [KEY, bytes(32)]}}, TypeError),
        ({"on": "127.0.0.1:0", "user_key": {"u": []}}, TypeError),
        ({"on": "127.0.0.1:0", "user_key": {"u": None}}, TypeError),
        ({"on": "127.0.0.1:0", "user_key": {b"u": KEY}}, TypeError),
        ({"on": "127.0.0.1:0", "settings": None}, TypeError),
        ({"on": "127.0.0.1:0", "settings": {}}, TypeError),
        ({"on": MemoryListener()}, TypeError),
        ({"on": b"127.0.0.1:0"}, TypeError),
        ({"on": ["127.0.0.1:0", "nonsense"]}, AddressError),
        ({"on": ["127.0.0.1:0"], "peer_user": uid_of}, AddressError),
    ],
)
async def test_bad_arguments(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error), trio.fail_after(5):
        await serve(request_handler=echo, **arguments)


async def test_addresses_are_real() -> None:
    async with open_server("127.0.0.1:0", echo) as server:
        [address] = server.addresses
        assert isinstance(address, TCPAddress)
        assert address.host == "127.0.0.1"
        assert address.port > 0
        assert repr(server) == f"<bokbok_trio.Server on 127.0.0.1:{address.port}>"
