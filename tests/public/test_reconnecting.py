from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from bokbok_trio import (
    AddressError,
    AuthenticationError,
    Channel,
    Connection,
    ConnectionClosed,
    ConnectionLost,
    Key,
    MessageTooLarge,
    ReconnectingConnection,
    RemoteError,
    RequestHandler,
    Settings,
    TCPAddress,
    UnixAddress,
    open_reconnecting,
    open_server,
    serve,
)
from bokbok_trio._addresses import Address
from bokbok_trio._backoff import MAX_BACKOFF, MIN_BACKOFF, jitter
from bokbok_trio._dialler import MAX_CONNECTIONS
from bokbok_trio.testing import FaultyStream, MemoryListener
from tests.support.helpers import RawPeer, busy_handler, echo, settle

KEY = Key(bytes(range(32)))

A, B, C = (f"127.0.0.1:{port}" for port in (1, 2, 3))


class Network:
    """What dialling finds: listeners in memory, by their address, while they are there.

    Attributes:
        dialled: the time of each try, and to where.
        streams: the clients' ends of the connections made.
    """

    def __init__(self) -> None:
        self.listeners: dict[str, MemoryListener] = {}
        self.dialled: list[tuple[float, str]] = []
        self.streams: list[FaultyStream] = []

    async def dial(self, address: Address, **_: Any) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        self.dialled.append((round(trio.current_time(), 6), str(address)))
        if str(address) not in self.listeners:
            raise ConnectionRefusedError(f"nobody is at {address}")
        stream = FaultyStream(self.listeners[str(address)].connect())
        self.streams.append(stream)
        return stream

    @property
    def times(self) -> list[float]:
        return [time for time, _ in self.dialled]

    @property
    def where(self) -> list[str]:
        return [address for _, address in self.dialled]

    def listen(self, address: str = A) -> MemoryListener:
        self.listeners[address] = MemoryListener()
        return self.listeners[address]

    @asynccontextmanager
    async def server(
        self, handler: RequestHandler | None = busy_handler, address: str = A, **kwargs: Any
    ) -> AsyncGenerator[Any]:
        """A server at an address. Without its block nobody is there."""
        async with open_server([self.listen(address)], handler, **kwargs) as server:
            try:
                yield server
            finally:
                del self.listeners[address]
                server.stop(grace=0)

    async def cut(self, index: int = -1) -> None:
        """Cut a connection, by default the newest: nothing arrives from now on."""
        await self.streams[index].cut()


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    network = Network()
    monkeypatch.setattr("bokbok_trio._client.dial", network.dial)
    # The longest waits there are, so that times can be told.
    monkeypatch.setattr("bokbok_trio._backoff.jitter", lambda _least, longest: longest)
    return network


async def drop(server: Any) -> None:
    """Let the server close all its connections, and go on."""
    for connection in server.connections:
        await connection.aclose()
    await settle()


class Oops(Exception):
    pass


# ---- arguments ----


@pytest.mark.parametrize(
    ("to", "arguments", "error"),
    [
        (A, {"user": "u"}, TypeError),
        (A, {"user": "u\n", "key": KEY}, ValueError),
        (A, {"service": "s"}, ValueError),
        (7, {}, TypeError),
        ([A, 7], {}, TypeError),
        (b"127.0.0.1:1", {}, TypeError),
        ([], {}, ValueError),
        ("nonsense", {}, AddressError),
        ([A, "nonsense"], {}, AddressError),
        ([A, ":12345"], {"user": "u", "key": KEY}, AddressError),
        ([A, "127.0.0.1:0"], {}, AddressError),
        ([A, "192.0.2.1:12345"], {}, AddressError),
        (A, {"max_repeats": -1}, ValueError),
        (A, {"max_repeats": 1.5}, TypeError),
    ],
)
async def test_bad_arguments_raise_before_anything_is_dialled(
    network: Network, to: Any, arguments: dict[str, Any], error: type[Exception]
) -> None:
    async with network.server(user_key={"u": KEY} if "user" in arguments else None):
        with pytest.raises(error):
            async with open_reconnecting(to, **arguments):
                raise AssertionError
    assert network.dialled == []


async def test_a_stream_cannot_be_reconnected() -> None:
    ours, _ = trio.testing.memory_stream_pair()
    with pytest.raises(TypeError, match="pass an address as"):
        async with open_reconnecting(ours):  # type: ignore[arg-type]
            raise AssertionError


async def test_names_are_looked_up_in_their_turn(
    network: Network, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """One that hangs does not hold up an address that is alive."""

    async def getaddrinfo(*args: Any, **kwargs: Any) -> Any:
        await trio.sleep_forever()

    monkeypatch.setattr("trio.socket.getaddrinfo", getaddrinfo)
    async with network.server():
        async with open_reconnecting([A, "hangs.example:1"]) as client:
            assert client.connection
    assert trio.current_time() == 0


@pytest.mark.parametrize(
    "to", [A, TCPAddress("127.0.0.1", 1), [A], (TCPAddress("127.0.0.1", 1),)], ids=["str", "parsed", "", ""]
)
async def test_an_address_or_several(network: Network, to: Any) -> None:
    async with network.server(), open_reconnecting(to) as client:
        assert await client.request(["ping", "x"]) == [b"pong", b"x"]
    assert network.where == [A]


async def test_with_a_key_plain_tcp_to_elsewhere_is_no_question(network: Network) -> None:
    async with network.server(user_key={"u": KEY}, address="192.0.2.1:1"):
        async with open_reconnecting("192.0.2.1:1", user="u", key=KEY) as client:
            assert client.connection


# ---- the first opening ----


async def test_requests_go_over_the_connection_that_there_is(
    network: Network, sealed: bool, autojump_clock: trio.testing.MockClock
) -> None:
    keys: dict[str, Any] = {"user": "u", "key": KEY, "service": "s"} if sealed else {}
    served: dict[str, Any] = {"user_key": {"u": KEY}, "service": "s"} if sealed else {}
    async with network.server(**served) as server:
        async with open_reconnecting(A, settings=Settings(max_message_size=5000), **keys) as client:
            first = client.connection
            assert first is not None
            assert first.user == keys.get("user")
            assert await client.request(["ping", "1"]) == [b"pong", b"1"]
            assert not client.closed
            await drop(server)
            assert await client.request(["ping", "2"]) == [b"pong", b"2"]
            assert client.connection is not first
            with pytest.raises(MessageTooLarge):
                await client.request([bytes(5000)])
        assert client.closed
        assert client.connection is None


async def test_the_first_connection_is_waited_for(
    network: Network, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with trio.open_nursery() as nursery:

        async def serve_later(*, task_status: trio.TaskStatus[None]) -> None:
            task_status.started()
            await trio.sleep(1)
            async with network.server():
                await trio.sleep_forever()

        await nursery.start(serve_later)
        async with open_reconnecting(A) as client:
            assert client.connection
        assert network.times == [0, 0.2, 0.6, 1.4]
        nursery.cancel_scope.cancel()
    assert caplog.text.count("no connection with 127.0.0.1:1: ConnectionRefusedError") == 3
    assert {record.levelname for record in caplog.records} == {"WARNING", "INFO"}


async def test_waiting_for_the_first_connection_can_be_cancelled(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    with trio.move_on_after(100) as scope:
        async with open_reconnecting([A, B]):
            raise AssertionError
    assert scope.cancelled_caught
    assert trio.current_time() == 100


async def test_a_refused_key_is_raised_at_first_and_reported_later(
    network: Network, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {"u": Key.generate()}
    async with network.server(user_key=keys, address=B) as server:
        with pytest.raises(AuthenticationError) as caught:
            async with open_reconnecting([A, B], user="u", key=KEY):
                raise AssertionError
        assert caught.value.__cause__ is None
        keys["u"] = KEY
        async with open_reconnecting([A, B], user="u", key=KEY) as client:
            keys["u"] = Key.generate()
            caplog.clear()
            await drop(server)
            await trio.sleep(2)
            assert client.connection is None
            assert "no connection with 127.0.0.1:2: AuthenticationError" in caplog.text
            keys["u"] = KEY
            assert await client.request(["ping", "x"]) == [b"pong", b"x"]


async def test_a_refused_key_is_raised_until_a_connection_is_open(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    keys = {"u": KEY}

    async def fail(connection: Connection) -> None:
        await trio.lowlevel.checkpoint()
        keys["u"] = Key.generate()
        raise Oops

    async with network.server(user_key=keys):
        with pytest.raises(AuthenticationError):
            async with open_reconnecting(A, user="u", key=KEY, open_handler=fail):
                raise AssertionError


async def test_no_room_and_no_peer_are_tried_again(
    network: Network, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    listener = network.listen(B)
    async with network.server(settings=Settings(max_connections=1)), trio.open_nursery() as nursery:

        async def talk_nonsense() -> None:
            while True:
                await (await listener.accept()).send_all(b"220 mail.example ESMTP\r\n")

        nursery.start_soon(talk_nonsense)
        async with open_reconnecting([A, B]) as first:
            with trio.move_on_after(1):
                async with open_reconnecting([A, B]):
                    raise AssertionError
            assert "no connection with 127.0.0.1:1: ConnectionRefused(" in caplog.text
            assert "no connection with 127.0.0.1:2: HandshakeError(" in caplog.text
            assert await first.request(["ping", "x"]) == [b"pong", b"x"]
        async with open_reconnecting([B, A]) as second:
            assert second.connection
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("error", [Oops, AddressError])
async def test_another_failure_is_raised_at_first_and_reported_later(
    network: Network,
    error: type[Exception],
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail(address: Address, **_: Any) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        raise error("cannot be dialled")

    async with network.server() as server:
        async with open_reconnecting(A) as client:
            with monkeypatch.context() as patch:
                patch.setattr("bokbok_trio._client.dial", fail)
                with pytest.raises(error):
                    async with open_reconnecting(A):
                        raise AssertionError
                await drop(server)
                await trio.sleep(1)
                assert "cannot be dialled" in caplog.text
            assert await client.request(["ping", "x"]) == [b"pong", b"x"]


# ---- when it tries where ----


def test_waits_are_random_between_the_least_and_the_limit() -> None:
    for longest in (2 * MIN_BACKOFF, 1.0, MAX_BACKOFF):
        waits = [jitter(MIN_BACKOFF, longest) for _ in range(1000)]
        assert MIN_BACKOFF <= min(waits) < MIN_BACKOFF + longest / 10
        assert longest * 0.9 < max(waits) <= longest


async def test_waits_double_to_a_limit_and_never_overflow(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    with trio.move_on_after(40_000):
        async with open_reconnecting(A):
            raise AssertionError
    gaps = [round(later - sooner, 6) for sooner, later in zip(network.times, network.times[1:], strict=False)]
    assert gaps[:9] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30]
    assert set(gaps[9:]) == {MAX_BACKOFF}
    assert len(gaps) > 1100  # 2.0 ** 1100 is too much for a float


async def test_a_handshake_that_broke_off_makes_one_wait_longer_and_none_after_it(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    """By a bad link, or as the server was killed: then it is back sooner than one that has no room."""
    listener = network.listen()

    async def break_off() -> None:
        for _ in range(2):
            await trio.aclose_forcefully(await listener.accept())
        del network.listeners[A]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(break_off)
        with trio.move_on_after(7):
            async with open_reconnecting(A):
                raise AssertionError
    assert network.times == [0, 2, 4, 4.8, 6.4]


async def test_several_addresses_are_tried_in_turn_and_then_waited_for(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    with trio.move_on_after(1):
        async with open_reconnecting([A, B, C]):
            raise AssertionError
    assert network.where == [A, B, C] * 3
    assert network.times == [0] * 3 + [0.2] * 3 + [0.6] * 3


async def test_a_connection_that_answered_is_followed_at_once_by_the_next_address(
    network: Network, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with network.server(address=A) as a, network.server(address=B):
        async with open_reconnecting([A, B, C]) as client:
            await client.request(["ping", "x"])
            await trio.sleep(1)
            await drop(a)
            assert network.dialled == [(0, A), (1, B)]
            assert client.connection
            assert "done with the connection with 127.0.0.1:1: the peer closed" in caplog.text
            with pytest.raises(RemoteError):
                await client.request(["what?"])
            await trio.sleep(1)
            await network.cut()
            await client.request(["ping", "x"], idempotent=True)
            assert network.dialled[2:] == [(2, C), (2, A)]


async def test_a_connection_that_answered_begins_a_new_round(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with network.server(address=B) as server, open_reconnecting([A, B]) as client:
        await client.request(["ping", "x"])
        await trio.sleep(1)
        await drop(server)
        assert network.dialled == [(0, A), (0, B), (1, A), (1, B)]
        assert client.connection


async def test_a_connection_that_answered_or_lasted_resets_the_waits(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with network.server() as server, open_reconnecting(A) as client:
        for lasts, answers, wait in [
            *((1, False, 0.2), (1, False, 0.4), (9, False, 0.8), (1, True, 0)),
            *((1, False, 0.2), (1, False, 0.4), (0.02, True, 0.09), (10, False, 0)),
        ]:
            opened = trio.current_time()
            if answers:
                await client.request(["ping", "x"])
            await trio.sleep(lasts)
            await drop(server)
            await trio.sleep(wait)
            await settle()
            assert network.times[-1] == pytest.approx(opened + lasts + wait, abs=0.011)
        assert len(network.times) == 9


@pytest.mark.parametrize("what", ["request", "item"])
async def test_one_whose_peer_only_asks_or_sends_items_has_worked(
    network: Network, what: str, autojump_clock: trio.testing.MockClock
) -> None:
    """A client that serves, or that reads one long stream, makes no request that is answered."""

    async def stream(connection: Connection, request: list[bytes], channel: Channel) -> None:
        await channel.send(["news"])
        await trio.sleep_forever()

    async with (
        network.server(channel_handler=stream) as server,
        open_reconnecting(A, request_handler=echo) as client,
    ):
        for _ in range(10):
            dialled = network.times[-1]
            with suppress(ConnectionLost):
                async with client.open_channel(["follow"]) as channel:
                    if what == "item":
                        assert await channel.receive() == [b"news"]
                    else:
                        for connection in server.connections:
                            await connection.request(["back", "1"])
                    await trio.sleep(1)
                    await drop(server)
                    await settle()
            await settle()
            assert network.times[-1] == pytest.approx(dialled + 1, abs=0.011)


async def test_an_answered_ping_is_an_answer(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with network.server() as server, open_reconnecting(A, settings=Settings(ping_after=5)):
        await trio.sleep(7)
        await drop(server)
        assert network.times == [0, 7]


@pytest.mark.parametrize("answered", [True, False])
async def test_an_answered_channel_is_an_answer(
    network: Network, answered: bool, autojump_clock: trio.testing.MockClock
) -> None:
    async with network.server(channel_handler=count_items) as server, open_reconnecting(A) as client:
        async with client.open_channel(["count"]) as channel:
            if answered:
                await channel.end()
                await channel.answer()
        await trio.sleep(1)
        await drop(server)
        await trio.sleep(0.1)
        assert network.times == ([0, 1] if answered else [0])


async def test_a_peer_that_accepts_and_drops_is_not_dialled_in_a_loop(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    listener = network.listen()

    async def accept_and_drop() -> None:
        while True:
            peer = RawPeer(await listener.accept())
            await peer.shake_hands()
            await peer.stream.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept_and_drop)
        async with open_reconnecting([A, B]):
            await trio.sleep(100)
        nursery.cancel_scope.cancel()
    assert network.where[:6] == [A, B, A, B, A, B]
    assert network.times[::2] == pytest.approx([0, 0.2, 0.6, 1.4, 3, 6.2, 12.6, 25.4, 51, 81])


# ---- requests, and the loss of the connection ----


async def test_requests_wait_for_the_next_connection_under_their_own_deadlines(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    ran: list[bytes] = []

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        ran.extend(request)
        return await echo(connection, request)

    answers: list[list[bytes]] = []
    async with network.server(handler) as server, open_reconnecting(A) as client:
        async with trio.open_nursery() as nursery:
            listener = network.listeners.pop(A)
            await drop(server)
            assert client.connection is None

            async def ask(text: str) -> None:
                answers.append(await client.request([text]))

            nursery.start_soon(ask, "patient")
            with trio.move_on_after(1) as scope:
                await ask("impatient")
            assert scope.cancelled_caught
            assert trio.current_time() == 1
            assert len(client._dialler._changed) == 1
            network.listeners[A] = listener
        assert trio.current_time() == pytest.approx(1.4)
        assert answers == [[b"patient"]]
        assert ran == [b"patient"]
        assert len(client._dialler._changed) == 0


async def test_a_request_that_may_have_run_is_sent_again_only_if_idempotent(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    ran: list[bytes] = []

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        ran.append(request[0])
        if len(ran) <= 2:
            await trio.sleep_forever()
        return await echo(connection, request)

    caught: list[ConnectionLost] = []
    answers: list[list[bytes]] = []
    async with network.server(handler) as server, open_reconnecting(A) as client:

        async def ask(text: str, **kwargs: Any) -> None:
            try:
                answers.append(await client.request([text], **kwargs))
            except ConnectionLost as exc:
                caught.append(exc)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "once")
            nursery.start_soon(partial(ask, "any", idempotent=True))
            await settle()
            assert sorted(ran) == [b"any", b"once"]
            await drop(server)
    assert [exc.may_have_run for exc in caught] == [True]
    assert answers == [[b"any"]]
    assert ran[2:] == [b"any"]


async def test_a_request_that_certainly_did_not_run_is_sent_over_the_next_connection(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    """One is being handled, one waits for a slot: that one is not lost."""
    async with network.server(settings=Settings(max_requests=1)), open_reconnecting(A) as client:
        async with trio.open_nursery() as nursery:

            async def ask_for_long() -> None:
                with pytest.raises(ConnectionLost) as caught:
                    await client.request(["sleep", "inf"])
                assert caught.value.may_have_run

            nursery.start_soon(ask_for_long)
            await settle()
            nursery.start_soon(client.request, ["ping", "x"])
            await settle()
            await network.cut()
            nursery.start_soon(client.request, ["ping", "y"])


async def kill_on_request(connection: Connection, request: list[bytes]) -> list[bytes]:
    """A handler that some requests kill: the connection, as a server that crashes would."""
    await trio.lowlevel.checkpoint()
    if request[0] == b"poison":
        connection._close("crashed")
        await trio.sleep_forever()
    return request


@pytest.mark.parametrize("max_repeats", [0, 1, 3])
async def test_a_request_that_kills_its_servers_is_repeated_a_bounded_number_of_times(
    max_repeats: int,
    network: Network,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    killed: list[float] = []

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        killed.append(trio.current_time())
        return await kill_on_request(connection, request)

    async with network.server(handler), open_reconnecting(A, max_repeats=max_repeats) as client:
        with pytest.raises(ConnectionLost) as caught:
            await client.request([b"poison" + b"" * 100, "x"], idempotent=True)
    assert len(killed) == 1 + max_repeats
    assert caught.value.may_have_run
    assert isinstance(caught.value.__cause__, ConnectionLost)
    if max_repeats == 0:
        assert str(caught.value).startswith(
            "the request was sent once, and the connection was lost each time"
        )
        assert "was in flight" not in caplog.text
        return
    seconds = killed[-1] - killed[0]
    assert f"the request was sent {1 + max_repeats} times in {seconds:.1f} seconds" in str(caught.value)
    assert caplog.text.count("a request that begins with b'poison' was in flight on") == max_repeats
    gaps = [later - sooner for sooner, later in pairwise(killed)]
    assert gaps == sorted(gaps)
    assert gaps[-1] >= 0.2 * 4 ** (max_repeats - 1)


async def test_others_use_the_connection_between_the_repeats(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    answered = 0
    async with network.server(kill_on_request), open_reconnecting(A) as client:

        async def ask_on() -> None:
            nonlocal answered
            while True:
                with suppress(ConnectionLost):
                    await client.request(["other"])
                    answered += 1
                await trio.sleep(0.01)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_on)
            with pytest.raises(ConnectionLost):
                await client.request(["poison"], idempotent=True)
            nursery.cancel_scope.cancel()
    assert answered > 100


async def test_a_pause_between_repeats_ends_when_this_side_closes(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with (
        network.server(kill_on_request),
        open_reconnecting(A) as client,
        trio.open_nursery() as nursery,
    ):

        async def ask() -> None:
            with pytest.raises(ConnectionClosed):
                await client.request(["poison"], idempotent=True)

        nursery.start_soon(ask)
        await trio.sleep(0.7)  # in the second pause, of 0.8 s
        await client.aclose()
        await settle()
        assert nursery.child_tasks == frozenset()


@pytest.mark.parametrize(
    ("fields", "name"),
    [([], "without fields"), (["x" * 100], "that begins with b'" + "x" * 40 + "'"), ([b"\n"], r"b'\n'")],
)
async def test_the_request_is_named_in_the_log_in_short(
    network: Network,
    fields: list[Any],
    name: str,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        await kill_on_request(connection, [b"poison"])

    async with network.server(handler), open_reconnecting(A, max_repeats=1) as client:
        with pytest.raises(ConnectionLost):
            await client.request(fields, idempotent=True)
    assert f"{name} was in flight on 2 connections" in caplog.text


@pytest.mark.parametrize("how", ["cancelled", "deadline"])
@pytest.mark.parametrize("what", ["request", "channel"])
async def test_a_call_that_is_cancelled_before_it_begins_sends_nothing(how: str, what: str) -> None:
    ran: list[object] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        await trio.lowlevel.checkpoint()
        ran.append(request)

    async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> None:
        await handler(connection, request)

    async with open_server("127.0.0.1:0", handler, channel_handler=channel_handler) as server:
        async with open_reconnecting(server.addresses[0]) as client:
            for _ in range(5):
                with trio.CancelScope() as scope:
                    if how == "cancelled":
                        scope.cancel()
                    else:  # it has passed, and Trio has not noticed yet
                        scope.deadline = trio.current_time()
                    if what == "request":
                        await client.request(["x"])
                    else:
                        async with client.open_channel(["x"]):
                            raise AssertionError
                assert scope.cancelled_caught
            await client.request(["last"])
    assert ran == [[b"last"]]


async def test_calls_from_another_run_are_refused() -> None:
    async with open_server("127.0.0.1:0", echo) as server, open_reconnecting(server.addresses[0]) as client:

        async def misuse() -> None:
            with pytest.raises(RuntimeError, match="another Trio run"):
                await client.request(["x"])
            with pytest.raises(RuntimeError, match="another Trio run"):
                async with client.open_channel(["x"]):
                    raise AssertionError
            with pytest.raises(RuntimeError, match="another Trio run"):
                await client.aclose()

        await trio.to_thread.run_sync(trio.run, misuse)
        assert await client.request(["x"]) == [b"x"]


@pytest.mark.parametrize("idempotent", [False, True])
async def test_a_connection_cut_at_any_step_neither_loses_nor_repeats_a_request(
    network: Network, sealed: bool, idempotent: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """Cut after so many steps of the scheduler, from 0 until it would be done; with one slot of two."""
    keys: dict[str, Any] = {"user": "u", "key": KEY} if sealed else {}
    ran: list[bytes] = []
    outcomes: dict[bytes, object] = {}
    lost = answered = repeated = 0

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        ran.extend(request)
        return await echo(connection, request)

    async def ask(client: ReconnectingConnection, name: bytes) -> None:
        try:
            outcomes[name] = await client.request([name], idempotent=idempotent)
        except ConnectionLost as exc:
            outcomes[name] = exc

    settings = Settings(max_requests=2)
    async with network.server(handler, user_key={"u": KEY} if sealed else None, settings=settings):
        for steps in range(25):
            async with open_reconnecting(A, **keys) as client:
                ran.clear()
                outcomes.clear()
                async with trio.open_nursery() as nursery:
                    for name in (b"1", b"2", b"3"):
                        nursery.start_soon(ask, client, name)
                    for _ in range(steps):
                        await trio.lowlevel.checkpoint()
                    await network.cut()
                    nursery.start_soon(ask, client, b"4")
            assert sorted(outcomes) == [b"1", b"2", b"3", b"4"]
            for name, outcome in outcomes.items():
                if isinstance(outcome, ConnectionLost):
                    assert not idempotent
                    assert outcome.may_have_run
                    assert ran.count(name) <= 1
                    lost += 1
                else:
                    assert outcome == [name]
                    assert ran.count(name) in ({1, 2} if idempotent else {1})
                    repeated += ran.count(name) == 2
                    answered += 1
    assert answered
    assert bool(lost) is not idempotent
    assert bool(repeated) is idempotent


@pytest.mark.parametrize("connected", [False, True])
async def test_a_request_cancelled_at_any_step_disturbs_nobody(
    network: Network, connected: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """Cancelled after so many steps, from when there is no connection, or from when the next comes."""
    ran: list[bytes] = []

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        ran.extend(request)
        return await echo(connection, request)

    cancelled = 0
    rounds = 80 if connected else 5
    async with network.server(handler) as server:
        for steps in range(rounds):
            async with open_reconnecting(A) as client:
                await drop(server)
                assert client.connection is None
                ran.clear()
                async with trio.open_nursery() as nursery:
                    scope = trio.CancelScope()

                    async def mine(scope: trio.CancelScope, client: ReconnectingConnection) -> None:
                        with scope:
                            await client.request([b"mine"])

                    async def other(client: ReconnectingConnection) -> None:
                        assert await client.request([b"other"]) == [b"other"]

                    nursery.start_soon(mine, scope, client)
                    nursery.start_soon(other, client)
                    if connected:
                        await trio.sleep(0.2)
                    for _ in range(steps):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()
                cancelled += scope.cancelled_caught
                assert ran.count(b"other") == 1
                assert ran.count(b"mine") <= 1
                assert len(client._dialler._changed) == 0
                assert client.connection
                assert client.connection._calls._calls == {}
    assert (0 < cancelled < rounds) if connected else (cancelled == rounds)


async def test_errors_of_a_request_come_out_at_once(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with network.server():
        async with open_reconnecting(A) as client:
            with pytest.raises(RemoteError, match="unknown request"):
                await client.request(["what?"], idempotent=True)
            with pytest.raises(MessageTooLarge):
                await client.request([bytes(2**23)], idempotent=True)
            await network.cut()
            await settle()
            assert client.connection is None
            started = trio.current_time()
            for fields, error in [("text", TypeError), ([7], TypeError), (["\ud800"], ValueError)]:
                with pytest.raises(error):
                    await client.request(fields)  # type: ignore[arg-type]
            assert trio.current_time() == started


async def test_fields_are_sent_as_they_were_when_it_was_asked(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with network.server(echo) as server, open_reconnecting(A) as client:
        await drop(server)
        fields = [bytearray(b"before")]
        answers: list[list[bytes]] = []

        async def ask() -> None:
            answers.append(await client.request(fields))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await settle()
            fields[0][:] = b"after."
            fields.append(bytearray(b"more"))
    assert answers == [[b"before"]]


# ---- a peer that takes no more requests ----


async def test_while_the_old_connection_drains_the_next_is_used_already(
    network: Network, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[list[bytes]] = []
    slots = Settings(max_requests=3)
    async with network.server(address=A, settings=slots) as a, network.server(address=B):
        async with open_reconnecting([A, B]) as client:

            async def ask(*fields: str) -> None:
                answers.append(await client.request(fields))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, "sleep", "5")
                nursery.start_soon(ask, "sleep", "3")
                await trio.sleep(1)
                first = client.connection
                assert first is not None
                a.stop(grace=60)
                assert await client.request(["ping", "x"]) == [b"pong", b"x"]
                assert client.connection is not first
                assert not first.closed
                assert trio.current_time() == 1
                second = client.connection
            assert answers == [[b"slept"]] * 2
            assert client.connection is second
            assert network.where == [A, B]
            assert trio.current_time() == 5
            await settle()
            assert first.closed
            assert client._dialler.connections == {client.connection}
    assert "done with the connection with 127.0.0.1:1: it is draining" in caplog.text


async def test_a_connection_that_this_side_drains_is_asked_no_more(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    """If it were, it might never be done."""
    answers: list[list[bytes]] = []
    async with network.server(), open_reconnecting(A) as client:

        async def ask_for_long() -> None:
            answers.append(await client.request(["sleep", "50"]))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_for_long)
            assert await client.request(["ping", "x"]) == [b"pong", b"x"]
            await trio.sleep(10)
            first = client.connection
            assert first is not None
            first.drain()
            assert await client.request(["ping", "x"]) == [b"pong", b"x"]
            assert client.connection not in {first, None}
            assert network.times == [0, 10]
            await first.wait_closed()
            assert trio.current_time() == 50
        assert answers == [[b"slept"]]
        second = client.connection
        assert second is not None
        second.drain()
        await second.wait_closed()
        await settle()
        assert client.connection not in {second, None}, "nobody has to ask for it"


async def test_who_hears_late_that_a_connection_drains_does_not_end_the_next(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    listener = network.listen(A)

    async def serve_slowly() -> None:
        peer = RawPeer(await listener.accept())
        await peer.shake_hands()
        for _ in range(2):
            [_, id, *_] = await peer.receive()
            await trio.sleep(1)
            await peer.send(b"err", id, b"closing", b"not now", b"")

    async with trio.open_nursery() as nursery, network.server(address=B) as b:
        nursery.start_soon(serve_slowly)
        async with open_reconnecting([A, B]) as client:
            async with trio.open_nursery() as askers:
                askers.start_soon(client.request, ["ping", "1"])
                askers.start_soon(client.request, ["ping", "2"])
                await trio.sleep(1.5)
                [connection] = b.connections
            assert trio.current_time() == 2
            assert [connection] == list(b.connections)
            assert network.where == [A, B]


async def closing_peer(listener: MemoryListener) -> None:
    """A peer that answers every request as not run, and never closes."""

    async def serve(stream: trio.abc.Stream) -> None:
        peer = RawPeer(stream)
        await peer.shake_hands()
        with suppress(AssertionError):  # until it is cut
            while True:
                [_, id, *_] = await peer.receive()
                await peer.send(b"err", id, b"closing", b"not now", b"")

    async with trio.open_nursery() as nursery:
        while True:
            nursery.start_soon(serve, await listener.accept())


async def count_items(connection: Connection, request: list[bytes], channel: Channel) -> list[str]:
    return [str(len([item async for item in channel]))]


async def test_a_channel_goes_over_the_connection_that_there_is_or_the_next(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with network.server(channel_handler=count_items) as server, open_reconnecting(A) as client:
        first = client.connection
        for _ in range(2):  # the second has to wait
            async with client.open_channel(["count"]) as channel:
                await channel.send(["item"])
                await channel.end()
                assert await channel.answer() == [b"1"]
            for connection in server.connections:
                connection.drain()
            await settle()
        async with client.open_channel(["count"]) as channel:
            assert client.connection is not first
            await drop(server)
            with pytest.raises(ConnectionLost):
                await channel.receive()
    with pytest.raises(ConnectionClosed):
        async with client.open_channel(["count"]):
            raise AssertionError


async def test_a_channel_is_opened_on_no_connection_that_this_side_drains(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with network.server(channel_handler=count_items), open_reconnecting(A) as client:
        first = client.connection
        assert first is not None
        first.drain()
        async with client.open_channel(["count"]) as channel:
            assert client.connection not in {first, None}
            await channel.end()
            assert await channel.answer() == [b"0"]


async def test_a_channels_first_fields_are_checked_before_it_waits(network: Network) -> None:
    async with network.server(), open_reconnecting(A) as client:
        with pytest.raises(TypeError):
            async with client.open_channel("count"):  # type: ignore[arg-type]
                raise AssertionError


async def test_a_client_may_handle_the_channels_of_the_other_side(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with network.server() as server, open_reconnecting(A, channel_handler=count_items):
        (connection,) = server.connections
        async with connection.open_channel(["count"]) as channel:
            await channel.end()
            assert await channel.answer() == [b"0"]


async def test_connections_that_do_not_end_are_bounded(
    network: Network, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(closing_peer, network.listen())
        async with open_reconnecting(A, settings=Settings(ping_after=math.inf)) as client:
            with trio.move_on_after(10_000):
                await client.request(["x"])
            assert len(network.dialled) == len(client._dialler.connections) == MAX_CONNECTIONS
            assert network.times[:4] == [0, 0.2, 0.6, 1.4]
            assert caplog.text.count("16 connections have not ended; waiting") == 1
            await network.cut(3)
            await trio.sleep(60)
            assert len(network.dialled) == MAX_CONNECTIONS + 1
        nursery.cancel_scope.cancel()


# ---- handlers ----


async def test_handlers_of_the_other_sides_requests_work_on_each_connection(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    seen: list[Connection] = []

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        seen.append(connection)
        return await echo(connection, request)

    async with network.server() as server, open_reconnecting(A, request_handler=handler) as client:
        for count in range(1, 4):
            assert await client.request(["back", str(count)]) == [str(count).encode()]
            assert len(seen) == count
            assert seen[-1] is client.connection
            await drop(server)
    assert len(set(seen)) == 3


async def test_a_handler_may_ask_the_reconnecting_connection_and_close_it(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    story: list[str] = []
    clients: list[ReconnectingConnection] = []

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        [client] = clients
        if request == [b"close"]:
            try:
                await client.aclose()
            finally:
                story.append("handler ended")
        return await client.request(["ping", *request])

    async with network.server(), open_reconnecting(A, request_handler=handler) as client:
        clients.append(client)
        assert await client.request(["back", "x"]) == [b"pong", b"x"]
        with pytest.raises(ConnectionClosed):
            await client.request(["back", "close"])
        assert client.closed
        await settle()
        assert story == ["handler ended"]


async def test_the_open_handler_comes_first_and_the_close_handler_last(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    story: list[str] = []

    async def server_handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        story.append(f"server: {request[0].decode()}")
        return await echo(connection, request)

    async def ask_back(connection: Connection) -> None:
        async def ask() -> None:
            await connection.request(["to the client"])

        nursery.start_soon(ask)
        await trio.lowlevel.checkpoint()

    async def on_request(connection: Connection, request: list[bytes]) -> list[bytes]:
        story.append("client: request")
        return request

    async def on_open(connection: Connection) -> None:
        opened.append(connection)
        story.append("open")
        await connection.request(["subscribe"])
        await trio.sleep(1)
        story.append("opened")

    async def on_close(connection: Connection) -> None:
        assert connection.closed
        closed.append(connection)
        await trio.lowlevel.checkpoint()
        story.append("close")

    opened: list[Connection] = []
    closed: list[Connection] = []
    async with trio.open_nursery() as nursery:
        async with network.server(server_handler, open_handler=ask_back) as server:
            async with open_reconnecting(
                A, request_handler=on_request, open_handler=on_open, close_handler=on_close
            ) as client:
                assert client.connection is opened[0]
                await settle()
                expected = ["open", "server: subscribe", "opened", "client: request"]
                assert story == expected
                await drop(server)
                story.append("lost")
                assert client.connection is None
                await client.request(["mine"])
                assert client.connection is opened[1]
                assert sorted(story[4:-2]) == sorted(["close", "lost", *expected[:3]])
                assert sorted(story[-2:]) == ["client: request", "server: mine"]
                assert story.index("close") == 4
            assert story[-1] == "close"
    assert opened == closed
    assert len(opened) == 2


async def test_an_open_handler_that_fails_closes_its_connection_and_the_next_is_tried(
    network: Network, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    opened: list[Connection] = []

    async def on_open(connection: Connection) -> None:
        opened.append(connection)
        await trio.lowlevel.checkpoint()
        if len(opened) in {1, 2, 4}:
            raise Oops

    async def on_close(connection: Connection) -> None:
        await trio.lowlevel.checkpoint()
        closed.append(connection)
        raise Oops

    closed: list[Connection] = []
    async with network.server() as server:
        async with open_reconnecting(A, open_handler=on_open, close_handler=on_close) as client:
            assert client.connection is opened[2]
            assert network.times == [0, 0.2, 0.6]
            await drop(server)
            assert await client.request(["ping", "x"]) == [b"pong", b"x"]
            assert client.connection is opened[4]
    assert closed == [opened[2], opened[4]]
    assert caplog.text.count("the open handler failed\nTraceback") == 3
    assert caplog.text.count("the close handler failed\nTraceback") == 2


async def test_an_open_handler_is_cancelled_when_its_connection_is_lost(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    story: list[str] = []

    async def on_open(connection: Connection) -> None:
        if len(network.dialled) == 1:
            try:
                await trio.sleep_forever()
            finally:
                story.append("cancelled")

    async with trio.open_nursery() as nursery:

        async def lose() -> None:
            await trio.sleep(3)
            await network.cut()

        nursery.start_soon(lose)
        async with network.server(), open_reconnecting(A, open_handler=on_open) as client:
            assert client.connection
            assert story == ["cancelled"]


async def test_an_open_handler_that_returns_late_does_not_bring_back_its_connection(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    returned: list[Connection] = []

    async def on_open(connection: Connection) -> None:
        if len(network.dialled) == 2:
            with trio.move_on_after(5, shield=True):
                await trio.sleep_forever()
        returned.append(connection)

    async with network.server() as server, open_reconnecting(A, open_handler=on_open) as client:
        await drop(server)
        await trio.sleep(0.3)
        await drop(server)
        await client.request(["ping", "x"])
        current = client.connection
        assert returned[1:] == [current]
        await trio.sleep(10)
        assert len(returned) == 3
        assert client.connection is current is not None
        assert len(network.dialled) == 3


@pytest.mark.parametrize("nested", [False, True])
async def test_an_open_handler_that_asks_the_client_is_told_so(
    network: Network, nested: bool, autojump_clock: trio.testing.MockClock
) -> None:
    clients: list[ReconnectingConnection] = []
    caught: list[RuntimeError] = []

    async def ask() -> None:
        with pytest.raises(RuntimeError, match="the connection that it was given") as info:
            await clients[0].request([])
        caught.append(info.value)

    async def on_open(connection: Connection) -> None:
        await trio.lowlevel.checkpoint()
        if clients and nested:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
        elif clients:
            await ask()

    async with network.server() as server, open_reconnecting(A, open_handler=on_open) as client:
        clients.append(client)
        await drop(server)
        assert await client.request(["ping", "x"]) == [b"pong", b"x"]
    assert len(caught) == 1


async def test_a_close_handler_may_ask_the_next_connection(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    clients: list[ReconnectingConnection] = []
    outcomes: list[object] = []

    async def on_close(connection: Connection) -> None:
        try:
            outcomes.append(await clients[0].request(["ping", "again"]))
        except ConnectionClosed:
            outcomes.append("closed")

    async def on_open(connection: Connection) -> None:
        await trio.lowlevel.checkpoint()

    async with (
        network.server() as server,
        open_reconnecting(A, open_handler=on_open, close_handler=on_close) as client,
    ):
        clients.append(client)
        await drop(server)
        await trio.sleep(1)
        assert outcomes == [[b"pong", b"again"]]
    assert outcomes[1:] == ["closed"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["request_handler", "open_handler", "close_handler"])
async def test_what_ends_the_program_comes_out_bare(
    network: Network, where: str, error: type[BaseException], autojump_clock: trio.testing.MockClock
) -> None:
    async def handler(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise error

    handlers: dict[str, Any] = {where: handler}
    with pytest.raises(error) as caught:
        async with network.server() as server, open_reconnecting(A, **handlers) as client:
            if where == "request_handler":
                await client.request(["back"])
            await drop(server)
            await trio.sleep_forever()
    assert type(caught.value) is error


# ---- closing from this side ----


async def closed_by_aclose(client: ReconnectingConnection, leave: Callable[[], object]) -> None:
    await client.aclose()


async def closed_by_leaving(client: ReconnectingConnection, leave: Callable[[], object]) -> None:
    leave()
    await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("close", [closed_by_aclose, closed_by_leaving])
@pytest.mark.parametrize("connected", [True, False])
async def test_closing_fails_every_waiter_at_once(
    network: Network,
    connected: bool,
    close: Callable[[ReconnectingConnection, Callable[[], object]], Awaitable[None]],
    autojump_clock: trio.testing.MockClock,
) -> None:
    failed: list[ConnectionClosed] = []
    leave = trio.Event()
    async with trio.open_nursery() as nursery, network.server() as server:

        async def stay(*, task_status: trio.TaskStatus[ReconnectingConnection]) -> None:
            async with open_reconnecting(A) as client:
                task_status.started(client)
                await leave.wait()

        async def ask(idempotent: bool) -> None:
            with pytest.raises(ConnectionClosed) as caught:
                await client.request(["sleep", "inf"], idempotent=idempotent)
            failed.append(caught.value)

        client = await nursery.start(stay)
        if not connected:
            del network.listeners[A]
            await drop(server)
            network.listen()
        nursery.start_soon(ask, False)
        nursery.start_soon(ask, True)
        await settle()
        assert not failed
        await close(client, leave.set)
        await settle()
        assert len(failed) == 2
        assert trio.current_time() < 1
        assert client.closed
        assert client.connection is None
        with pytest.raises(ConnectionClosed):
            await client.request([])
        with trio.testing.assert_checkpoints():
            await client.aclose()
        leave.set()


async def test_aclose_waits_for_the_transport_and_the_block_for_the_handlers(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    story: list[str] = []

    async def on_close(connection: Connection) -> None:
        await trio.sleep(1)
        story.append("close handler")

    async with network.server(user_key={"u": KEY}) as server:
        async with open_reconnecting(A, user="u", key=KEY, close_handler=on_close) as client:
            assert client.connection
            network.streams[-1].sending.stall()
            stream_closed = client.connection._ending.stream_closed
            started = trio.current_time()
            await client.aclose()
            assert stream_closed.has_happened
            assert 0 < trio.current_time() - started <= 1
            assert story == []
        assert story == ["close handler"]
        await settle()
        assert server.connections == frozenset()
    assert len(network.dialled) == 1


async def test_a_cancelled_aclose_returns_at_once_and_closes_nevertheless(network: Network) -> None:
    async with network.server(), open_reconnecting(A) as client:
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.aclose()
        assert scope.cancelled_caught
        assert client.closed


@pytest.mark.parametrize("crashes", [False, True])
async def test_a_dialling_that_hangs_ends_with_the_block(
    network: Network,
    crashes: bool,
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def hang(address: Address, **_: Any) -> trio.abc.Stream:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await trio.sleep_forever()
            finally:
                if crashes:
                    raise Oops("while it was cancelled")
        raise AssertionError

    async with network.server() as server, open_reconnecting(A):
        monkeypatch.setattr("bokbok_trio._client.dial", hang)
        await drop(server)
        await trio.sleep(5)
    assert trio.current_time() == 5
    assert ("while it was cancelled" in caplog.text) is crashes


async def test_a_connection_that_is_opened_too_late_is_closed(
    network: Network, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes back from its handshake in the very step in which this side closes."""
    async with network.server() as server, open_reconnecting(A) as client:
        opened: list[Connection] = []
        connect = client._dialler._connect

        async def connect_and_close(address: Address) -> Connection:
            opened.append(await connect(address))
            client._dialler.close()
            return opened[0]

        client._dialler._connect = connect_and_close
        await drop(server)
        with pytest.raises(ConnectionClosed):
            await client.request(["ping", "x"])
        await opened[0].wait_closed()
    assert len(network.dialled) == 2


@pytest.mark.parametrize("idempotent", [False, True])
async def test_a_connection_closed_by_this_side_is_replaced(
    network: Network,
    idempotent: bool,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with network.server(), open_reconnecting(A) as client:
        first = client.connection
        assert first is not None
        ended: list[str] = []

        async def ask() -> None:
            if idempotent:
                assert await client.request(["sleep", "7"], idempotent=True) == [b"slept"]
            else:
                with pytest.raises(ConnectionLost, match="this side closed") as caught:
                    await client.request(["sleep", "7"])
                assert caught.value.may_have_run
                assert isinstance(caught.value.__cause__, ConnectionClosed)
            ended.append("ended")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await settle()
            await first.aclose()
            assert client.connection is None
            assert await client.request(["ping", "x"]) == [b"pong", b"x"]
            assert client.connection is not first
            assert ended == ([] if idempotent else ["ended"])
    assert "done with the connection with 127.0.0.1:1: this side closed the connection" in caplog.text


@pytest.mark.parametrize("connected", [True, False])
@pytest.mark.parametrize("error", [Oops(), ExceptionGroup("mine", [Oops()]), KeyboardInterrupt()])
async def test_what_the_block_raises_comes_out_as_itself(
    network: Network, error: BaseException, connected: bool
) -> None:
    with pytest.raises(type(error)) as caught:
        async with network.server() as server, open_reconnecting(A) as client:
            if not connected:
                await drop(server)
                assert client.connection is None
            raise error
    assert caught.value is error


async def test_a_block_that_is_cancelled_has_no_next_connection(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with network.server() as server:
        with trio.CancelScope() as scope:
            async with open_reconnecting(A) as client:
                await drop(server)
                scope.cancel()
                with trio.move_on_after(5, shield=True):
                    with pytest.raises(ConnectionClosed):
                        await client.request([])
                assert trio.current_time() < 5
                await trio.sleep_forever()
        assert scope.cancelled_caught


async def test_what_it_tells_of_itself(network: Network) -> None:
    async with network.server() as server:
        async with open_reconnecting([A, B, "/run/x"], user=None) as client:
            name = "<bokbok_trio.ReconnectingConnection to 127.0.0.1:1, 127.0.0.1:2, /run/x"
            assert repr(client) == f"{name} connected>"
            await drop(server)
            assert repr(client) == f"{name} not connected>"
        assert repr(client) == f"{name} closed>"
    async with network.server(user_key={"u": KEY}):
        async with open_reconnecting(A, user="u", key=KEY) as client:
            assert KEY.raw.hex() not in repr(vars(client))
            assert repr(KEY.raw) not in repr(vars(client))


# ---- on real sockets ----


async def test_a_server_that_restarts_is_found_again(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    answers: list[list[bytes]] = []
    async with trio.open_nursery() as nursery:
        server = await nursery.start(serve, path, busy_handler)
        with trio.fail_after(30):
            async with open_reconnecting(path) as client:
                assert client.connection
                assert client.connection.address == UnixAddress(path)
                assert await client.request(["ping", "1"]) == [b"pong", b"1"]
                server.stop(grace=0)
                await server.wait_stopped()
                while client.connection is not None:
                    await trio.lowlevel.checkpoint()

                async def ask() -> None:
                    answers.append(await client.request(["ping", "2"]))

                async with trio.open_nursery() as askers:
                    askers.start_soon(ask)
                    await settle()
                    server = await nursery.start(serve, path, busy_handler)
                    assert await client.request(["ping", "3"]) == [b"pong", b"3"]
        server.stop()
    assert answers == [[b"pong", b"2"]]


async def test_the_second_of_two_servers_is_found(caplog: pytest.LogCaptureFixture) -> None:
    async with open_server("127.0.0.1:0", busy_handler, user_key={"u": KEY}) as server:
        with trio.fail_after(30):
            async with open_reconnecting(
                ["/nonexistent/socket", server.addresses[0]], user="u", key=KEY
            ) as client:
                assert await client.request(["ping", "x"]) == [b"pong", b"x"]
    assert "no connection with /nonexistent/socket: FileNotFoundError" in caplog.text
