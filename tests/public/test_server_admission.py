"""Servers: admitted, refused and counted clients."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from bokbok_trio import (
    AddressError,
    AuthenticationError,
    Connection,
    ConnectionRefused,
    HandshakeError,
    Key,
    PeerCredentials,
    ServerStatistics,
    Settings,
    open_connection,
    open_reconnecting,
    open_server,
    serve,
)
from bokbok_trio.testing import MemoryListener

from ..support.clients import GivenListener, client_of, client_over_socket
from ..support.helpers import busy_handler, echo, settle

KEY = Key(bytes(range(32)))

THIS_PROCESS = PeerCredentials(pid=os.getpid(), uid=os.geteuid(), gid=os.getegid())


class Oops(Exception):
    pass


def uid_of(credentials: PeerCredentials) -> str:
    return str(credentials.uid)


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


async def test_peer_user_names_the_peer_before_the_open_handler() -> None:
    story: list[object] = []
    listener = GivenListener()

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
    listener = GivenListener()

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

    listener = GivenListener()
    async with open_server([listener], echo):
        listener.give(OddStream())
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

    listener = GivenListener()
    async with open_server([listener], echo, open_handler=wait_for_ever) as server:
        ours, theirs = trio.testing.memory_stream_pair()
        listener.give(Shielded(theirs))
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
