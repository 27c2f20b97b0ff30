"""Reconnecting connections: their arguments, and the first connection."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from bokbok_trio import (
    AddressError,
    AuthenticationError,
    Connection,
    Key,
    MessageTooLarge,
    Settings,
    TCPAddress,
    open_reconnecting,
)
from bokbok_trio._addresses import Address

from ..support.network import A, B, Network, drop

KEY = Key(bytes(range(32)))


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
