from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from bokbok_trio import (
    AddressError,
    AuthenticationError,
    ConnectionRefused,
    HandshakeError,
    Key,
    Settings,
    TCPAddress,
    open_connection,
    open_server,
)
from bokbok_trio._protocol.handshake import ServerHandshake
from bokbok_trio._protocol.limits import Limits
from bokbok_trio._protocol.packets import encode_packet
from bokbok_trio._stream.handshake_io import exchange_hello, receive_packet
from bokbok_trio._stream.socket import make_fast
from bokbok_trio.testing import FaultyStream, MemoryListener, open_connection_pair
from tests.support.helpers import MAGIC, close_in_one_step, echo, packet

KEY = Key(bytes(range(32)))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"user": "u"}, TypeError),
        ({"key": KEY}, TypeError),
        ({"user": "u", "key": bytes(32)}, TypeError),
        ({"user": b"u", "key": KEY}, TypeError),
        ({"user": "", "key": KEY}, ValueError),
        ({"user": "u" * 256, "key": KEY}, ValueError),
        ({"user": "u\n", "key": KEY}, ValueError),
        ({"service": "s"}, ValueError),
        ({"service": "s" * 256, "user": "u", "key": KEY}, ValueError),
        ({"service": b"s", "user": "u", "key": KEY}, TypeError),
        ({"to": 7}, TypeError),
        ({"to": "nonsense"}, AddressError),
        ({"to": ":12345"}, AddressError),
        ({"to": "127.0.0.1:0"}, AddressError),
        ({"to": "192.0.2.1:12345"}, AddressError),
        ({"to": "[2001:db8::1]:12345"}, AddressError),
        ({"settings": None}, TypeError),
    ],
)
async def test_bad_arguments_raise_before_anything_is_dialled(
    arguments: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        async with open_connection(**{"to": "127.0.0.1:1", **arguments}):
            raise AssertionError


async def test_nobody_there_is_an_oserror() -> None:
    for address in ("127.0.0.1:1", "/nonexistent/socket"):
        with pytest.raises(
            OSError, match=r"cannot connect to 127\.0\.0\.1:1: Connection refused|No such file"
        ):
            async with open_connection(address):
                raise AssertionError


async def test_the_stream_is_closed_when_the_handshake_fails() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await theirs.send_all(b"220 mail.example ESMTP\r\n")
    with pytest.raises(HandshakeError, match="not a bokbok peer: the first bytes are b'220 mail'"):
        async with open_connection(ours):
            raise AssertionError
    with pytest.raises(trio.ClosedResourceError):
        await ours.send_all(b"x")


async def test_a_refused_client_is_told_who_was_refused_where_and_what_to_check() -> None:
    async with open_server("127.0.0.1:0", echo, user_key={"alice": KEY}) as server:
        [address] = server.addresses
        for user, key, service in [("alice", Key.generate(), ""), ("bob", KEY, ""), ("alice", KEY, "mail")]:
            with pytest.raises(AuthenticationError) as caught:
                async with open_connection(address, user=user, key=key, service=service):
                    raise AssertionError
            assert str(caught.value) == (
                f"authentication failed for user '{user}' at {address}: "
                "check the user name, the key and the service"
            )


async def test_a_failed_handshake_tells_which_address_answered() -> None:
    async with open_server("127.0.0.1:0", echo, settings=Settings(max_connections=1)) as server:
        [address] = server.addresses
        assert isinstance(address, TCPAddress)
        name = f"localhost:{address.port}"
        async with open_connection(address):
            places: list[tuple[str | TCPAddress, str]] = [
                (address, str(address)),
                (name, rf"{name} \({address}\)"),
            ]
            for to, place in places:
                with pytest.raises(ConnectionRefused, match=f"^{place}: .*max_connections.*\\[busy\\]$"):
                    async with open_connection(to):
                        raise AssertionError
                with pytest.raises(
                    HandshakeError, match=f"^{place}: .*; check whether the server expects a key"
                ):
                    async with open_connection(to, user="u", key=KEY):
                        raise AssertionError
            stream = await trio.open_tcp_stream(address.host, address.port)
            with pytest.raises(HandshakeError, match=f"^{address}: "):
                async with open_connection(stream, user="u", key=KEY):
                    raise AssertionError


async def test_a_stream_that_is_no_socket_has_no_address_to_tell() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await theirs.aclose()
    with pytest.raises(HandshakeError, match=r"^the other end of the stream: the connection broke"):
        async with open_connection(ours):
            raise AssertionError


@pytest.mark.parametrize("timeout", [3, math.inf])
async def test_a_silent_server_costs_the_handshake_timeout(
    timeout: float, autojump_clock: trio.testing.MockClock
) -> None:
    ours, _ = trio.testing.memory_stream_pair()
    with trio.move_on_after(100):
        with pytest.raises(HandshakeError, match="not done within 3 seconds"):
            async with open_connection(ours, settings=Settings(handshake_timeout=timeout)):
                raise AssertionError
    assert trio.current_time() == min(timeout, 100)


async def test_the_stream_is_closed_when_opening_is_cancelled() -> None:
    ours, _ = trio.testing.memory_stream_pair()
    with trio.CancelScope() as scope:
        scope.cancel()
        async with open_connection(ours):
            raise AssertionError
    with pytest.raises(trio.ClosedResourceError):
        await ours.send_all(b"x")


async def test_a_request_of_the_server_that_comes_with_its_acceptance_is_handled(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """In mode plain nothing may be read beyond `accepted`."""
    ours, theirs = trio.testing.memory_stream_pair()
    accepted = packet(b"accepted", b"4096", b"1", b"\0", b"")
    await theirs.send_all(
        MAGIC
        + packet(b"hello", b"server", b"plain", b"")
        + accepted
        + packet(b"req", b"1", b"", b"", b"", body=[b"early"])
    )
    async with open_connection(ours, request_handler=echo):
        received = b""
        while not received.endswith(packet(b"ok", b"1", body=[b"early"])):
            received += await theirs.receive_some()


async def test_a_fake_server_is_found_out() -> None:
    """It has no key, so it relays nothing useful: it can only guess a proof."""
    listener = MemoryListener()
    stream = FaultyStream(listener.connect())
    accept = await listener.accept()
    async with trio.open_nursery() as nursery:

        async def fake() -> None:
            handshake = ServerHandshake(sealed=True, service="", limits=Limits(4096, 1))
            channel = await exchange_hello(make_fast(accept), handshake)
            handshake.receive_open(await receive_packet(channel))
            await channel.send_all(encode_packet(b"accepted", b"4096", b"1", b"\0", bytes(32)))

        nursery.start_soon(fake)
        with pytest.raises(AuthenticationError, match="did not prove"):
            async with open_connection(stream, user="u", key=KEY):
                raise AssertionError


async def test_losing_the_race_with_a_failing_block() -> None:
    """The block fails in the very moment in which the peer goes: the block's error comes out."""
    with pytest.raises(KeyError):
        async with open_connection_pair() as (_, server):
            await close_in_one_step(server)
            raise KeyError


@pytest.mark.parametrize("where", ["127.0.0.1:0", "unix"])
async def test_opening_is_a_checkpoint(where: str, tmp_path: Path) -> None:
    async with open_server(where if ":" in where else f"{tmp_path}/sock", echo) as server:
        connection = open_connection(server.addresses[0])
        with trio.testing.assert_checkpoints():
            await connection.__aenter__()
        await connection.__aexit__(None, None, None)
