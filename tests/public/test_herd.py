"""Many clients at once, and strangers among them."""

from __future__ import annotations

import math
import re
import socket
from contextlib import suppress
from itertools import pairwise

import pytest
import trio
import trio.testing

from bokbok_trio import (
    Connection,
    ConnectionRefused,
    HandshakeError,
    Key,
    Settings,
    TCPAddress,
    open_connection,
    open_reconnecting,
    open_server,
)
from bokbok_trio._addresses import Address
from bokbok_trio._protocol.handshake import ClientHandshake
from bokbok_trio._protocol.limits import Limits
from bokbok_trio._stream.establish import MAX_WAIT_SHARE
from bokbok_trio.testing import MemoryListener
from tests.support.clients import GivenListener
from tests.support.helpers import echo, settle

KEY = Key(bytes(range(32)))


def make_opening() -> bytes:
    """All that a plain client sends before it is told something."""
    handshake = ClientHandshake(user=None, key=None, service="", limits=Limits(4096, 1))
    return handshake.hello + handshake.open()


class LookUp:
    """A look-up that takes its time, and counts."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.users: list[str] = []
        self.at_once = 0
        self.most_at_once = 0

    async def __call__(self, user: str) -> Key:
        self.users.append(user)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await trio.sleep(self.seconds)
        finally:
            self.at_once -= 1
        return KEY


async def test_a_herd_gets_in_in_about_the_time_of_its_look_ups(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 clients, a look-up of 2 s, 8 at once, and places for 40: the ideal is 75 s."""
    listener = MemoryListener()
    look_up = LookUp(2)

    async def dial(address: Address, **_: object) -> trio.abc.Stream:
        await trio.sleep(0.001)
        return listener.connect()

    monkeypatch.setattr("bokbok_trio._client.dial", dial)
    inside: list[float] = []

    async def come(number: int) -> None:
        async with open_reconnecting("127.0.0.1:1", user=f"user{number}", key=KEY):
            inside.append(trio.current_time())
            await all_inside.wait()

    all_inside = trio.Event()
    settings = Settings(max_handshakes=40, max_lookups=8)
    async with open_server([listener], echo, user_key=look_up, settings=settings):
        async with trio.open_nursery() as nursery:
            for number in range(300):
                nursery.start_soon(come, number)
            while len(inside) < 300:
                await trio.sleep(1)
                assert trio.current_time() < 2 * 75
            all_inside.set()
    assert look_up.most_at_once == 8
    assert len(look_up.users) < 310


async def test_clients_that_wait_too_long_for_their_look_up_are_told_that_the_server_is_busy(
    autojump_clock: trio.testing.MockClock,
) -> None:
    listener = MemoryListener()
    outcomes: list[tuple[float, str]] = []

    async def come(number: int) -> None:
        try:
            async with open_connection(listener.connect(), user=f"user{number}", key=KEY):
                outcomes.append((trio.current_time(), "in"))
        except ConnectionRefused as exc:
            outcomes.append((trio.current_time(), exc.code))

    settings = Settings(max_lookups=1, handshake_timeout=10)
    async with open_server([listener], echo, user_key=LookUp(3), settings=settings):
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(come, number)
                await settle()
    late = 10 * MAX_WAIT_SHARE
    assert outcomes == [(3, "in"), (late, "busy"), (late, "busy"), (6, "in")]


async def test_look_ups_take_place_in_the_order_of_the_clients(
    autojump_clock: trio.testing.MockClock,
) -> None:
    listener = MemoryListener()
    look_up = LookUp(0.1)

    async def come(number: int) -> None:
        async with open_connection(listener.connect(), user=f"user{number}", key=KEY):
            pass

    async with open_server([listener], echo, user_key=look_up, settings=Settings(max_lookups=1)):
        async with trio.open_nursery() as nursery:
            for number in range(9):
                nursery.start_soon(come, number)
                await settle()
    assert look_up.users == [f"user{number}" for number in range(9)]


async def test_a_client_that_has_left_is_not_looked_up() -> None:
    look_up = LookUp(0.1)

    async def come(user: str) -> None:
        async with open_connection(server.addresses[0], user=user, key=KEY):
            pass

    async with open_server("127.0.0.1:0", echo, user_key=look_up, settings=Settings(max_lookups=1)) as server:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(come, "first")
            while not look_up.users:
                await trio.sleep(0.001)
            with trio.move_on_after(0.02):
                await come("impatient")
            nursery.start_soon(come, "last")
    assert look_up.users == ["first", "last"]


async def test_a_newcomer_displaces_nobody_whose_user_is_looked_up(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    listener = MemoryListener()
    inside: list[float] = []

    async def come() -> None:
        async with open_connection(listener.connect(), user="u", key=KEY):
            inside.append(trio.current_time())

    settings = Settings(max_handshakes=2)
    async with open_server([listener], echo, user_key=LookUp(2), settings=settings) as server:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(come)
            nursery.start_soon(come)
            await settle()
            with pytest.raises(HandshakeError, match=r"closed the connection|broke"):
                async with open_connection(listener.connect(), user="u", key=KEY):
                    raise AssertionError
            assert trio.current_time() == 0
            assert server.statistics().handshakes == 2
    assert inside == [2, 2]
    assert "there was no place for its handshake" in caplog.text


async def test_one_handshake_too_many_closes_a_silent_one(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    listener = MemoryListener()
    async with open_server([listener], echo, settings=Settings(max_handshakes=2)) as server:
        strangers = [listener.connect() for _ in range(4)]
        await settle()
        assert server.statistics().handshakes == 2
        async with open_connection(listener.connect()) as client:
            assert await client.request(["x"]) == [b"x"]
        closed = 0
        for stranger in strangers:
            with trio.move_on_after(1):
                assert await stranger.receive_some() == b""
                closed += 1
        assert closed == 3
    assert "no connection with None: the handshake was ended to make room for others" in caplog.text


async def test_displaced_streams_that_do_not_end_are_bounded_too(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The application's own streams may take their time."""

    class Stubborn(trio.abc.Stream):
        async def send_all(self, data: object) -> None: ...
        async def wait_send_all_might_not_block(self) -> None: ...
        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 50):
                await trio.sleep_forever()
            return b""

        async def aclose(self) -> None:
            await trio.lowlevel.checkpoint()

    listener = GivenListener()
    settings = Settings(max_handshakes=2, handshake_timeout=math.inf)
    async with open_server([listener], echo, settings=settings) as server:
        for _ in range(100):
            listener.give(Stubborn())
        await settle()
        assert server.statistics().handshakes == 4
        await trio.sleep(51)
        assert server.statistics().handshakes == 0


async def test_a_flood_of_silent_strangers_does_not_lock_out_a_client_that_is_200_ms_away() -> None:
    """All places are held by strangers, and 500 more a second come while the client's bytes travel."""
    strangers: list[socket.socket] = []
    address: TCPAddress

    def come() -> None:
        stranger = socket.socket()
        stranger.setblocking(False)
        stranger.connect_ex((address.host, address.port))
        strangers.append(stranger)

    async def flood() -> None:
        while True:
            come()
            await trio.sleep(0.002)

    async def pass_on_slowly(client: trio.SocketStream) -> None:
        """A way to the server that takes 100 ms each way. The connection is there before the bytes."""

        async def carry(source: trio.SocketStream, target: trio.SocketStream) -> None:
            with suppress(trio.BrokenResourceError):
                async for data in source:
                    await trio.sleep(0.1)
                    await target.send_all(data)
                await target.send_eof()

        server = await trio.open_tcp_stream(address.host, address.port)
        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(carry, client, server)
            nursery.start_soon(carry, server, client)

    async with open_server("127.0.0.1:0", echo, user_key={"u": KEY}) as server:
        [found] = server.addresses
        assert isinstance(found, TCPAddress)
        address = found
        try:
            for _ in range(600):
                come()
            while server.statistics().handshakes < Settings().max_handshakes:
                await trio.sleep(0.001)
            [slow] = await trio.open_tcp_listeners(0, host="127.0.0.1")
            host, port = slow.socket.getsockname()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(flood)
                nursery.start_soon(trio.serve_listeners, pass_on_slowly, [slow])
                for attempts_left in reversed(range(5)):  # one in ten attempts is displaced
                    try:
                        async with open_connection(f"{host}:{port}", user="u", key=KEY) as client:
                            assert await client.request(["x"]) == [b"x"]
                            break
                    except HandshakeError:
                        assert attempts_left
                nursery.cancel_scope.cancel()
        finally:
            for stranger in strangers:
                stranger.close()


async def test_a_flood_is_a_line_a_second_in_the_log_with_a_count(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    listener = MemoryListener()

    async def stranger() -> None:
        stream = listener.connect()
        await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
        with suppress(trio.BrokenResourceError):
            await stream.receive_some()
        await stream.aclose()

    async with open_server([listener], echo):
        for _ in range(3):
            for _ in range(100):
                await stranger()
            await trio.sleep(1)
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert all("GET / HT" in line for line in lines)
    assert "more" not in lines[0]
    assert 3 <= len(lines) <= 5
    told = [int(number) for line in lines for number in re.findall(r"(\d+) more like", line)]
    assert len(lines) - sum(line[0].isdigit() for line in lines) + sum(told) == 300


async def test_a_flood_of_one_kind_does_not_hide_another(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    listener = MemoryListener()
    async with open_server([listener], echo, settings=Settings(max_handshakes=1)):
        for _ in range(10):
            listener.connect()
        await settle()
        stranger = listener.connect()
        await stranger.send_all(b"GET / HTTP/1.1\r\n\r\n")
        await settle()
        await stranger.aclose()
    assert "to make room" in caplog.text
    assert "GET / HT" in caplog.text


async def test_health_checks_are_no_warnings(caplog: pytest.LogCaptureFixture) -> None:
    """They connect and close, or reset, and send nothing. Who it was is known nevertheless."""
    async with open_server("127.0.0.1:0", echo) as server:
        address = server.addresses[0]
        assert isinstance(address, TCPAddress)
        names: list[str] = []
        for reset in (False, True):
            check = socket.create_connection((address.host, address.port))
            names.append(f"127.0.0.1:{check.getsockname()[1]}")
            if reset:
                check.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            check.close()
        while caplog.text.count("no connection") < 2:
            await trio.sleep(0.001)
    assert {record.levelname for record in caplog.records} == {"DEBUG"}
    for name in names:
        assert f"no connection with {name}: the client left before it had sent anything" in caplog.text


# ---- clients of a server that has no room ----


async def hold(connection: Connection) -> None:
    await trio.sleep_forever()


@pytest.mark.parametrize("gone", [False, True])
async def test_a_client_of_a_busy_server_waits_longer_than_one_whose_server_is_gone(
    gone: bool, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = MemoryListener()
    dialled: list[float] = []

    async def dial(address: Address, **_: object) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        dialled.append(trio.current_time())
        if gone:
            raise OSError("nobody is there")
        return listener.connect()

    monkeypatch.setattr("bokbok_trio._client.dial", dial)
    async with open_server([listener], echo, settings=Settings(max_connections=1)):
        async with open_connection(listener.connect()):
            with trio.move_on_after(100):
                async with open_reconnecting("127.0.0.1:1"):
                    raise AssertionError
    waits = [later - sooner for sooner, later in pairwise(dialled)]
    if gone:
        assert waits[0] <= 0.2
    else:
        assert all(1 <= wait <= 2 for wait in waits[:3])
    assert max(waits) <= 30


async def test_a_server_that_stops_is_soon_back_so_its_clients_are_too(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = MemoryListener()
    dialled: list[float] = []

    async def dial(address: Address, **_: object) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        dialled.append(trio.current_time())
        if len(dialled) > 1:
            raise OSError("nobody is there")
        return listener.connect()

    async def come() -> None:
        async with open_reconnecting("127.0.0.1:1", user="u", key=KEY):
            raise AssertionError

    async def handler(connection: Connection, request: list[bytes]) -> None:
        await trio.sleep(100)

    monkeypatch.setattr("bokbok_trio._client.dial", dial)
    async with trio.open_nursery() as nursery:
        async with open_server([listener], handler, user_key=LookUp(1)) as server:
            async with open_connection(listener.connect(), user="u", key=KEY) as busy:
                nursery.start_soon(come)
                nursery.start_soon(busy.request, [])
                await trio.sleep(0.5)
                server.stop(grace=60)
                await trio.sleep(2)
                nursery.cancel_scope.cancel()
    assert dialled[0] == 1
    assert dialled[1] - 2 <= 0.2


# ---- refusals ----


@pytest.mark.parametrize("where", ["tcp", "unix"])
async def test_a_refusal_arrives_though_more_was_sent_than_the_server_read(
    where: str, tmp_path: object
) -> None:
    """A plain client sends its `open` along, which a keyed server never reads: that must be no reset."""
    address = "127.0.0.1:0" if where == "tcp" else f"{tmp_path}/sock"
    async with open_server(address, echo, user_key={"u": KEY}) as server:
        for _ in range(20):
            with pytest.raises(HandshakeError, match="closed the connection during the handshake"):
                async with open_connection(server.addresses[0]):
                    raise AssertionError


async def test_who_is_refused_is_told_before_the_connection_is_closed() -> None:
    """The client has sent something after its `open`, which would make a close a reset."""
    async with open_server("127.0.0.1:0", echo, settings=Settings(max_connections=1)) as server:
        async with open_connection(server.addresses[0]):
            for _ in range(20):
                name = server.addresses[0]
                assert isinstance(name, TCPAddress)
                stream = await trio.open_tcp_stream(name.host, name.port)
                await stream.send_all(make_opening() + b"more" * 100)
                received = b""
                async for data in stream:
                    received += data
                assert b"refused" in received
                assert b"busy" in received
                await stream.aclose()


async def test_a_refused_client_lingers_without_a_place_and_for_a_second_at_most(
    autojump_clock: trio.testing.MockClock,
) -> None:
    listener = MemoryListener()
    settings = Settings(max_connections=1, max_handshakes=1)
    async with open_server([listener], echo, settings=settings) as server:
        async with open_connection(listener.connect()):
            strangers = []
            for _ in range(2):
                stranger = listener.connect()
                strangers.append(stranger)
                await stranger.send_all(make_opening())
                await settle()
                assert server.statistics().handshakes == 0
            # The first lingers; for the second there is no room to, as there was but one place.
            with pytest.raises(trio.BrokenResourceError):
                await strangers[1].send_all(b"x")
            await strangers[0].send_all(b"x")
            await trio.sleep(1.5)
            with pytest.raises(trio.BrokenResourceError):
                await strangers[0].send_all(b"x")


async def test_what_a_refused_client_goes_on_to_send_is_bounded(
    autojump_clock: trio.testing.MockClock,
) -> None:
    listener = MemoryListener()
    async with open_server([listener], echo):
        stranger = listener.connect()
        with pytest.raises(trio.BrokenResourceError):
            for _ in range(200):
                await stranger.send_all(b"GET " * 256)
                await settle()
    assert trio.current_time() == 0


async def test_a_stream_that_breaks_while_it_lingers_is_closed(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    listener = MemoryListener()
    async with open_server([listener], echo):
        stranger = listener.connect()
        await stranger.send_all(b"GET / HTTP/1.1\r\n\r\n")
        await settle()
        await stranger.aclose()
        await settle()
    assert {record.levelname for record in caplog.records} == {"WARNING"}
