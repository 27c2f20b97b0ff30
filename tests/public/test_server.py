from __future__ import annotations

import errno
import functools
import os
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
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
    AuthenticationError,
    Connection,
    ConnectionClosed,
    ConnectionLost,
    ConnectionRefused,
    HandshakeError,
    Key,
    PeerCredentials,
    RemoteError,
    Server,
    ServerStatistics,
    Settings,
    TCPAddress,
    UnixAddress,
    open_connection,
    open_reconnecting,
    open_server,
    serve,
)
from bokbok_trio.testing import MemoryListener, open_connection_pair
from tests.support.helpers import busy_handler, echo, settle

KEY = Key(bytes(range(32)))
THIS_PROCESS = PeerCredentials(pid=os.getpid(), uid=os.geteuid(), gid=os.getegid())


@asynccontextmanager
async def client_of(listener: MemoryListener, **kwargs: Any) -> AsyncGenerator[Connection]:
    async with open_connection(listener.connect(), **kwargs) as connection:
        yield connection


# ---- serving ----


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
    """The socket of a listener, that fails first."""

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


# ---- the handlers of a connection ----


async def test_the_open_handler_comes_before_requests_and_may_make_some() -> None:
    story: list[object] = []
    listener = MemoryListener()

    async def on_open(connection: Connection) -> None:
        connection.data = "set"
        story.append(await connection.request(["who?"]))
        await settle()
        story.append("open")

    async def handler(connection: Connection, request: list[bytes]) -> None:
        await trio.lowlevel.checkpoint()
        story.append((connection.data, request))

    async def on_close(connection: Connection) -> None:
        await trio.lowlevel.checkpoint()
        story.append("close")

    async with open_server([listener], handler, open_handler=on_open, close_handler=on_close):
        async with client_of(listener, request_handler=echo) as client:
            await client.request(["early"])
            with trio.CancelScope() as scope:
                scope.cancel()
                await client.request(["cancelled early"])
    assert story == [[b"who?"], "open", ("set", [b"early"]), "close"]


async def test_a_request_cancelled_before_the_open_handler_is_done_is_not_handled() -> None:
    handled: list[list[bytes]] = []
    listener = MemoryListener()
    may_open = trio.Event()

    async def on_open(connection: Connection) -> None:
        await may_open.wait()

    async def handler(connection: Connection, request: list[bytes]) -> None:
        await trio.lowlevel.checkpoint()
        handled.append(request)

    async with open_server([listener], handler, open_handler=on_open):
        async with client_of(listener) as client, trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(cancel_when_settled, scope)
                await client.request(["cancelled"])
            nursery.start_soon(client.request, ["wanted"])
            await settle()
            may_open.set()
    assert handled == [[b"wanted"]]


async def cancel_when_settled(scope: trio.CancelScope) -> None:
    await settle()
    scope.cancel()


async def fail(connection: Connection) -> None:
    await trio.lowlevel.checkpoint()
    raise Oops("on purpose")


async def close_own(connection: Connection) -> None:
    await connection.aclose()


@pytest.mark.parametrize(("on_open", "logs"), [(fail, 1), (close_own, 0)])
async def test_an_open_handler_that_does_not_return_closes_the_connection(
    on_open: Callable[[Connection], Awaitable[object]], logs: int, caplog: pytest.LogCaptureFixture
) -> None:
    closed: list[Connection] = []

    async def on_close(connection: Connection) -> None:
        closed.append(connection)

    listener = MemoryListener()
    async with open_server([listener], echo, open_handler=on_open, close_handler=on_close):
        for _ in range(2):
            async with client_of(listener) as client:
                with pytest.raises(ConnectionLost, match="the peer closed the connection"):
                    await client.request([])
    assert closed == []
    assert caplog.text.count("the open handler failed\nTraceback") == 2 * logs


async def test_an_open_handler_is_cancelled_when_the_peer_goes() -> None:
    story: list[str] = []
    listener = MemoryListener()

    async def on_open(connection: Connection) -> None:
        try:
            await trio.sleep_forever()
        finally:
            story.append("cancelled")

    async with open_server([listener], echo, open_handler=on_open):
        async with client_of(listener):
            await settle()
        await settle()
        assert story == ["cancelled"]


async def test_a_failing_close_handler_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with open_connection_pair(client_close_handler=fail, server_close_handler=fail):
        pass
    assert caplog.text.count("the close handler failed") == 2
    assert caplog.text.count("Oops: on purpose") == 2


@pytest.mark.parametrize("where", ["open", "close", "request", "user_key", "peer_user"])
async def test_what_ends_the_program_ends_the_server_and_comes_out_bare(where: str) -> None:
    async def leave(*args: object) -> Any:
        await trio.lowlevel.checkpoint()
        raise SystemExit(3)

    def leave_at_once(credentials: PeerCredentials) -> str:
        raise SystemExit(3)

    listener = MemoryListener()
    handlers: dict[str, dict[str, Any]] = {
        "open": {"open_handler": leave},
        "close": {"close_handler": leave},
        "request": {},
        "user_key": {"user_key": leave},
        "peer_user": {"peer_user": leave_at_once},
    }

    async def connect() -> None:
        keys: dict[str, Any] = {"user": "user", "key": KEY} if where == "user_key" else {}
        connecting = client_over_socket(listener) if where == "peer_user" else client_of(listener, **keys)
        with pytest.raises((HandshakeError, ConnectionLost)):
            async with connecting as client:
                await client.request([])
                await client.aclose()
                await client.request([]) if where != "close" else None
                raise ConnectionLost("closed as it should")

    with pytest.raises(SystemExit) as caught:
        async with open_server([listener], leave if where == "request" else echo, **handlers[where]):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connect)
            await trio.sleep_forever()
    assert caught.value.code == 3


# ---- who gets in ----


async def lookup(user: str) -> Key | list[Key] | None:
    await trio.lowlevel.checkpoint()
    keys: dict[str, Key | list[Key]] = {"one": KEY, "rotating": [Key(bytes(32)), KEY]}
    return keys.get(user)


@pytest.mark.parametrize("user_key", [lookup, {"one": KEY, "rotating": (Key(bytes(32)), KEY)}])
async def test_users_get_in_with_a_key_of_theirs_only(
    user_key: Any, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    listener = MemoryListener()
    async with open_server([listener], echo, user_key=user_key) as server:
        for user in ("one", "rotating"):
            async with client_of(listener, user=user, key=KEY) as client:
                assert client.user == user
                assert await client.request(["x"]) == [b"x"]
                assert next(iter(server.connections)).user == user
        for user, key in (("one", Key(bytes(32))), ("nobody", KEY)):
            with pytest.raises(AuthenticationError):
                async with client_of(listener, user=user, key=key):
                    raise AssertionError
            assert f"user '{user}' has no key that fits" in caplog.text
            await trio.sleep(1)  # or the next line would be left out


async def test_services_must_agree(autojump_clock: trio.testing.MockClock) -> None:
    listener = MemoryListener()
    async with open_server([listener], echo, user_key={"u": KEY}, service="mail"):
        async with client_of(listener, user="u", key=KEY, service="mail") as client:
            assert await client.request(["x"]) == [b"x"]
        for service in ("", "post", "mailmail"):
            with pytest.raises(AuthenticationError):
                async with client_of(listener, user="u", key=KEY, service=service):
                    raise AssertionError


async def test_the_applications_functions_can_be_interrupted(tmp_path: Path) -> None:
    """The server's own tasks are protected from Ctrl-C, and what they call is not."""
    protected: dict[str, bool] = {}

    async def look_up(user: str) -> Key:
        await trio.lowlevel.checkpoint()
        protected["user_key"] = trio.lowlevel.currently_ki_protected()
        return KEY

    def name(credentials: PeerCredentials) -> str:
        protected["peer_user"] = trio.lowlevel.currently_ki_protected()
        return "me"

    async def on_open(connection: Connection) -> None:
        await trio.lowlevel.checkpoint()
        protected["open_handler"] = trio.lowlevel.currently_ki_protected()

    listener = MemoryListener()
    async with open_server([listener], echo, user_key=look_up):
        async with client_of(listener, user="u", key=KEY):
            pass
    async with open_server(f"{tmp_path}/sock", echo, peer_user=name) as server:
        async with open_reconnecting(server.addresses[0], open_handler=on_open):
            protected["block"] = trio.lowlevel.currently_ki_protected()
    assert protected == dict.fromkeys(["user_key", "peer_user", "open_handler", "block"], False)


# ---- peers with a name ----


@asynccontextmanager
async def client_over_socket(listener: MemoryListener) -> AsyncGenerator[Connection]:
    """A client over a UNIX socket, as the listener would accept it."""
    ours, theirs = map(trio.SocketStream, trio.socket.socketpair())
    listener._send.send_nowait(theirs)
    async with open_connection(ours) as connection:
        yield connection


async def test_peer_user_names_the_peer_before_the_open_handler() -> None:
    story: list[object] = []
    listener = MemoryListener()

    def name(credentials: PeerCredentials) -> str:
        story.append(credentials)
        return "me"

    async def on_open(connection: Connection) -> None:
        await trio.lowlevel.checkpoint()
        story.append((connection.user, connection.peer_credentials, connection.encrypted))

    async with open_server([listener], echo, peer_user=name, open_handler=on_open):
        async with client_over_socket(listener) as client:
            assert await client.request(["x"]) == [b"x"]
            assert client.user is None
            assert client.peer_credentials == THIS_PROCESS
    assert story == [THIS_PROCESS, ("me", THIS_PROCESS, False)]


async def test_whom_peer_user_does_not_name_is_refused_before_all_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Even where there is no room: a stranger is not told so, and does not count."""
    names = iter(["me", None, "me", None])
    opened: list[Connection] = []
    listener = MemoryListener()

    async def on_open(connection: Connection) -> None:
        await trio.lowlevel.checkpoint()
        opened.append(connection)

    async with open_server(
        [listener],
        echo,
        peer_user=lambda _: next(names),
        open_handler=on_open,
        settings=Settings(max_connections=1),
    ) as server:
        async with client_over_socket(listener) as client:
            for error in (AuthenticationError, ConnectionRefused, AuthenticationError):
                with pytest.raises(error):
                    async with client_over_socket(listener):
                        raise AssertionError
            assert await client.request(["x"]) == [b"x"]
            assert [connection.user for connection in opened] == ["me"]
            assert server.statistics().connections == 1
    assert caplog.text.count(f"no connection with None: peer_user has no name for {THIS_PROCESS}") == 2


async def test_a_peer_that_is_no_unix_socket_is_refused_where_names_are_wanted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    listener = MemoryListener()
    async with open_server([listener], echo, peer_user=uid_of):
        with pytest.raises(AuthenticationError, match="the server has no name for this process"):
            async with client_of(listener):
                raise AssertionError
    assert "the system does not tell who the peer is" in caplog.text


async def test_listeners_on_tcp_are_closed_where_names_are_wanted() -> None:
    memory = MemoryListener()
    [tcp] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    message = r"^peer_user needs a UNIX socket, and 127\.0\.0\.1:\d+ is a TCP address$"
    with pytest.raises(AddressError, match=message), trio.fail_after(5):
        await serve([memory, tcp], echo, peer_user=uid_of)
    assert tcp.socket.fileno() == -1
    with pytest.raises(trio.BrokenResourceError):
        memory.connect()


@pytest.mark.parametrize("keyed_server", [True, False])
async def test_nothing_falls_back(keyed_server: bool) -> None:
    listener = MemoryListener()
    client: dict[str, Any] = {} if keyed_server else {"user": "u", "key": KEY}
    async with open_server([listener], echo, user_key={"u": KEY} if keyed_server else None):
        with pytest.raises(HandshakeError):
            async with client_of(listener, **client):
                raise AssertionError


async def test_one_connection_too_many_is_busy_until_another_closes() -> None:
    listener = MemoryListener()
    async with open_server([listener], echo, settings=Settings(max_connections=2)), client_of(listener):
        async with client_of(listener):
            with pytest.raises(ConnectionRefused) as caught:
                async with client_of(listener):
                    raise AssertionError
            assert caught.value.code == "busy"
        await settle()
        async with client_of(listener) as client:
            assert await client.request(["x"]) == [b"x"]


async def test_a_closed_connection_counts_until_its_handlers_have_ended() -> None:
    """Or a client that reconnects could have any number of handlers running."""
    listener = MemoryListener()
    may_end = trio.Event()

    async def linger(connection: Connection) -> None:
        with trio.CancelScope(shield=True):
            await may_end.wait()

    async with open_server(
        [listener], echo, close_handler=linger, settings=Settings(max_connections=1)
    ) as server:
        async with client_of(listener):
            pass
        await settle()
        assert server.connections == frozenset()
        with pytest.raises(
            ConnectionRefused, match=r"as it takes \(see its max_connections\); try again later' \[busy\]$"
        ):
            async with client_of(listener):
                raise AssertionError
        may_end.set()
        await settle()
        async with client_of(listener) as client:
            assert await client.request(["x"]) == [b"x"]


async def test_without_the_key_nobody_is_told_that_the_server_is_full(
    autojump_clock: trio.testing.MockClock,
) -> None:
    listener = MemoryListener()
    async with open_server([listener], echo, user_key={"u": KEY}, settings=Settings(max_connections=1)):
        async with client_of(listener, user="u", key=KEY):
            for key, error in ((Key(bytes(32)), AuthenticationError), (KEY, ConnectionRefused)):
                with pytest.raises(error):
                    async with client_of(listener, user="u", key=key):
                        raise AssertionError


async def test_the_statistics_of_a_server(autojump_clock: trio.testing.MockClock) -> None:
    listener = MemoryListener()
    settings = Settings(max_connections=5, max_handshakes=2)
    numbers = {"max_connections": 5, "max_handshakes": 2}
    async with open_server([listener], busy_handler, settings=settings) as server:

        def check(*, connections: int, handshakes: int, handlers_running: int) -> None:
            assert server.statistics() == ServerStatistics(
                connections=connections, handshakes=handshakes, handlers_running=handlers_running, **numbers
            )

        check(connections=0, handshakes=0, handlers_running=0)
        stranger = listener.connect()
        await settle()
        check(connections=0, handshakes=1, handlers_running=0)
        async with client_of(listener) as one, client_of(listener) as two:
            async with trio.open_nursery() as nursery:
                for client in (one, one, two):
                    nursery.start_soon(client.request, ["sleep", "3"])
                await settle()
                check(connections=2, handshakes=1, handlers_running=3)
            check(connections=2, handshakes=1, handlers_running=0)
        await stranger.aclose()
        await settle()
        check(connections=0, handshakes=0, handlers_running=0)


async def test_a_connection_that_fails_oddly_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    class OddStream(trio.abc.Stream):
        async def send_all(self, data: object) -> None: ...
        async def wait_send_all_might_not_block(self) -> None: ...
        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            await trio.lowlevel.checkpoint()
            raise Oops("odd")

        async def aclose(self) -> None:
            await trio.lowlevel.checkpoint()

    listener = MemoryListener()
    async with open_server([listener], echo):
        listener._send.send_nowait(OddStream())
        async with client_of(listener) as client:
            assert await client.request(["x"]) == [b"x"]
    assert "the connection with None failed" in caplog.text


async def test_who_was_cancelled_too_late_to_notice_is_not_served(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The server stops while a shielded transport sends `accepted`."""

    class Shielded(trio.abc.Stream):
        def __init__(self, transport: trio.abc.Stream) -> None:
            self.transport = transport
            self.sent = 0

        async def send_all(self, data: bytes | bytearray | memoryview) -> None:
            self.sent += 1
            if self.sent == 2:  # hello, accepted
                server.stop(grace=0)
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 2):
                await trio.sleep(1)
                await self.transport.send_all(data)

        async def wait_send_all_might_not_block(self) -> None:
            raise AssertionError

        async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
            return await self.transport.receive_some(max_bytes)

        async def aclose(self) -> None:
            await self.transport.aclose()

    async def wait_for_ever(connection: Connection) -> None:
        await trio.sleep_forever()

    listener = MemoryListener()
    async with open_server([listener], echo, open_handler=wait_for_ever) as server:
        ours, theirs = trio.testing.memory_stream_pair()
        listener._send.send_nowait(Shielded(theirs))
        async with open_connection(ours) as client:
            await client.wait_closed()
        await server.wait_stopped()
        assert trio.current_time() == 2


async def test_closed_connections_are_not_listed(autojump_clock: trio.testing.MockClock) -> None:
    async def linger(connection: Connection) -> None:
        await trio.sleep(5)

    listener = MemoryListener()
    async with open_server([listener], echo, close_handler=linger) as server:
        async with client_of(listener):
            await settle()
            assert len(server.connections) == 1
        await settle()
        assert server.connections == frozenset()


async def test_connections_are_told_of_in_the_log(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    listener = MemoryListener()
    async with open_server([listener], echo, user_key={"alice": KEY}):
        async with client_of(listener, user="alice", key=KEY) as client:
            await client.request([])
            await trio.sleep(2)
        await settle()
    assert "connected with None, user 'alice'" in caplog.text
    text = (
        "the connection with None, user 'alice', has ended after 2.0 seconds, "
        "with 1 requests received and 0 made: the peer closed the connection"
    )
    assert text in caplog.text
    assert {record.levelname for record in caplog.records} == {"INFO"}


# ---- stopping ----


async def test_the_log_says_whom_a_stopping_server_cancels(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    listener = MemoryListener()
    answers: list[object] = []
    async with open_server([listener], busy_handler, user_key={"alice": KEY, "bob": KEY}) as server:
        async with (
            client_of(listener, user="alice", key=KEY) as alice,
            client_of(listener, user="bob", key=KEY),
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(ask, alice, ["sleep", "100"], answers)
            await settle()
            nursery.start_soon(ask, alice, ["sleep", "100"], answers)
            await settle()
            server.stop(grace=2)
            await trio.sleep(1)
            assert "in flight" not in caplog.text
            await server.wait_stopped()
    [line] = [record.getMessage() for record in caplog.records if "in flight" in record.getMessage()]
    assert line.endswith("cancelling 2 requests in flight: 2 of user 'alice' at None (0, 2)")


async def ask(connection: Connection, fields: list[str], into: list[object]) -> None:
    try:
        into.append(await connection.request(fields))
    except (RemoteError, ConnectionLost, ConnectionClosed) as exc:
        into.append(exc)


async def test_stop_lets_what_is_in_flight_finish_and_runs_nothing_new(
    autojump_clock: trio.testing.MockClock,
) -> None:
    listener = MemoryListener()
    answers: list[object] = []
    async with open_server([listener], busy_handler) as server:
        async with client_of(listener, request_handler=echo) as client, client_of(listener) as idle:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, client, ["sleep", "3"], answers)
                await settle()
                server.stop(grace=5)
                await idle.wait_closed()
                assert trio.current_time() == 0
                await ask(client, ["ping", "late"], answers)
                [refused] = answers
                assert isinstance(refused, ConnectionLost)
                assert not refused.may_have_run
                with pytest.raises(trio.BrokenResourceError):
                    listener.connect()
            assert answers[1:] == [[b"slept"]]
            await client.wait_closed()
            await server.wait_stopped()
            assert trio.current_time() == 3


async def test_a_handler_in_flight_may_call_back_while_stopping(
    autojump_clock: trio.testing.MockClock,
) -> None:
    listener = MemoryListener()

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        assert connection.server is not None
        connection.server.stop()
        await trio.sleep(1)
        return await connection.request(["still there?"])

    async with open_server([listener], handler) as server:
        async with client_of(listener, request_handler=echo) as client:
            assert await client.request([]) == [b"still there?"]
        await server.wait_stopped()
        assert trio.current_time() == 1


@pytest.mark.parametrize(("graces", "end"), [((5,), 5), ((0,), 0), ((5, 2), 2), ((2, 5), 2)])
async def test_what_does_not_finish_in_the_grace_is_cancelled(
    graces: tuple[int, ...], end: float, autojump_clock: trio.testing.MockClock
) -> None:
    listener = MemoryListener()
    answers: list[object] = []
    async with open_server([listener], busy_handler) as server:
        async with client_of(listener) as client, trio.open_nursery() as nursery:
            nursery.start_soon(ask, client, ["sleep", "100"], answers)
            await settle()
            for grace in graces:
                server.stop(grace)
            await server.wait_stopped()
            assert trio.current_time() == end
    [lost] = answers
    assert isinstance(lost, ConnectionLost)
    assert lost.reason == "the peer closed the connection, which it was draining, as a server does that stops"


async def test_wait_stopped_from_a_handler_ends_with_the_grace(
    autojump_clock: trio.testing.MockClock,
) -> None:
    listener = MemoryListener()

    async def handler(connection: Connection, request: list[bytes]) -> None:
        assert connection.server is not None
        connection.server.stop(grace=2)
        await connection.server.wait_stopped()

    async with open_server([listener], handler), client_of(listener) as client:
        with pytest.raises(ConnectionLost):
            await client.request([])
        assert trio.current_time() == 2


@pytest.mark.parametrize("grace", [-1, float("nan")])
async def test_a_grace_that_is_none(grace: float) -> None:
    async with open_server([MemoryListener()], echo) as server:
        with pytest.raises(ValueError, match="grace"):
            server.stop(grace)


async def test_stopping_does_not_wait_for_strangers(autojump_clock: trio.testing.MockClock) -> None:
    listener = MemoryListener()
    async with open_server([listener], echo) as server:
        stranger = listener.connect()
        await settle()
        server.stop()
        await server.wait_stopped()
        assert await stranger.receive_some() == b""
    assert trio.current_time() == 0


async def test_whoever_comes_to_the_end_of_the_handshake_while_stopping_is_refused(
    autojump_clock: trio.testing.MockClock,
) -> None:
    listener = MemoryListener()

    async def slow(user: str) -> Key:
        await trio.sleep(1)
        return KEY

    async with open_server([listener], busy_handler, user_key=slow) as server:
        async with client_of(listener, user="u", key=KEY) as client, trio.open_nursery() as nursery:
            nursery.start_soon(client.request, ["sleep", "3"])
            await settle()

            async def connect() -> None:
                with pytest.raises(ConnectionRefused) as caught:
                    async with client_of(listener, user="u", key=KEY):
                        raise AssertionError
                assert caught.value.code == "stopping"

            nursery.start_soon(connect)
            await settle()
            server.stop()


async def test_a_connection_that_opens_as_the_server_stops_is_drained() -> None:
    """It was admitted, and `accepted` is on its way, when stop() is called."""
    listener = MemoryListener()
    async with open_server([listener], echo) as server:
        stream = listener.connect()
        async with trio.open_nursery() as nursery:

            async def stop_when_admitted() -> None:
                while not server._admission.admitted:
                    await trio.lowlevel.checkpoint()
                server.stop()

            nursery.start_soon(stop_when_admitted)
            with pytest.raises((ConnectionLost, HandshakeError)):
                async with open_connection(stream) as client:
                    await client.wait_closed()
                    await client.request([])
        await server.wait_stopped()


async def test_cancelling_serve_ends_all_at_once(autojump_clock: trio.testing.MockClock) -> None:
    listener = MemoryListener()
    answers: list[object] = []
    closed: list[Connection] = []

    async def on_close(connection: Connection) -> None:
        closed.append(connection)

    async with trio.open_nursery() as outer, trio.open_nursery() as nursery:
        server: Server = await nursery.start(partial(serve, [listener], busy_handler, close_handler=on_close))
        async with client_of(listener) as client:
            outer.start_soon(ask, client, ["sleep", "100"], answers)
            await settle()
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await server.wait_stopped()
                assert len(closed) == 1
    assert trio.current_time() == 0
    assert len(answers) == 1


async def test_leaving_the_block_by_an_exception_gives_no_grace(
    autojump_clock: trio.testing.MockClock,
) -> None:
    listener = MemoryListener()
    answers: list[object] = []
    async with trio.open_nursery() as nursery:
        with pytest.raises(Oops):
            async with open_server([listener], busy_handler):
                client = await nursery.start(hold_open, listener)
                nursery.start_soon(ask, client, ["sleep", "100"], answers)
                await settle()
                raise Oops
        assert trio.current_time() == 0
        nursery.cancel_scope.cancel()
    assert len(answers) == 1


async def hold_open(
    listener: MemoryListener, task_status: trio.TaskStatus[Connection] = trio.TASK_STATUS_IGNORED
) -> None:
    async with client_of(listener) as client:
        task_status.started(client)
        await trio.sleep_forever()


async def test_addresses_are_real() -> None:
    async with open_server("127.0.0.1:0", echo) as server:
        [address] = server.addresses
        assert isinstance(address, TCPAddress)
        assert address.host == "127.0.0.1"
        assert address.port > 0
        assert repr(server) == f"<bokbok_trio.Server on 127.0.0.1:{address.port}>"
