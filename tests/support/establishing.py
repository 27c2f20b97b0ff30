"""Runs the handshakes of both sides, over transports that misbehave on demand."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, final

import pytest
import trio
from trio.testing import memory_stream_pair

from bokbok_trio import HandshakeError, Key, Settings
from bokbok_trio._places import Places
from bokbok_trio._protocol.handshake import ClientHandshake, ServerHandshake
from bokbok_trio._protocol.limits import Limits
from bokbok_trio._stream.establish import Established, establish_as_client, establish_as_server
from bokbok_trio._stream.records import MAX_PLAINTEXT_SIZE
from bokbok_trio._stream.secretbox import SecretboxStream
from tests.support.handshakes import open_as

Mode = Literal["sealed", "plain"]
Side = Literal["client", "server"]

K = Key(bytes(range(32)))
OTHER = Key(bytes(range(100, 132)))
LIMITS = Limits(65536, 10)
TIMEOUT = 7.0
STRANGER_SIZE = 16 * 2**10

in_both_modes = pytest.mark.parametrize("mode", ["sealed", "plain"])
on_both_sides = pytest.mark.parametrize("side", ["client", "server"])


@final
class Wire(trio.abc.Stream):
    """One end of a transport. It records all bytes, and misbehaves on demand.

    At most `most` bytes are received at once. After `cut` sent bytes the stream ends. The call `stall_at`
    (counted from 0, sends and receives together) waits for ever, and the call `break_at` fails. The bit
    `alter` of the sent bytes, counted from the first, is changed.
    """

    def __init__(
        self,
        transport: trio.abc.HalfCloseableStream,
        *,
        most: int | None = None,
        cut: float = math.inf,
        stall_at: int | None = None,
        break_at: int | None = None,
        alter: int | None = None,
    ) -> None:
        self.transport = transport
        self.most = most
        self.cut = cut
        self.stall_at = stall_at
        self.break_at = break_at
        self.alter = alter
        self.calls = 0
        self.sent: list[bytes] = []
        self.asked: list[int | None] = []
        self.received: list[bytes] = []

    async def _count(self) -> None:
        call, self.calls = self.calls, self.calls + 1
        if call == self.stall_at:
            await trio.sleep_forever()
        if call == self.break_at:
            raise trio.BrokenResourceError("told to break")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._count()
        start = sum(map(len, self.sent))
        data = bytearray(data)
        if self.alter is not None and start <= self.alter // 8 < start + len(data):
            data[self.alter // 8 - start] ^= 1 << self.alter % 8
        self.sent.append(bytes(data))
        left = self.cut - start
        if left >= len(data):
            await self.transport.send_all(data)
        elif left >= 0:
            await self.transport.send_all(data[: int(left)])
            await self.transport.send_eof()

    async def wait_send_all_might_not_block(self) -> None:
        raise NotImplementedError

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await self._count()
        self.asked.append(max_bytes)
        assert max_bytes is not None
        data = bytes(await self.transport.receive_some(min(max_bytes, self.most or max_bytes)))
        self.received.append(data)
        return data

    async def aclose(self) -> None:
        await self.transport.aclose()


def make_wires(
    client: dict[str, Any] | None = None, server: dict[str, Any] | None = None
) -> tuple[Wire, Wire]:
    left, right = memory_stream_pair()
    return Wire(left, **client or {}), Wire(right, **server or {})


def as_client(
    wire: trio.abc.Stream, mode: Mode = "sealed", **options: Any
) -> Coroutine[Any, Any, Established]:
    who = {"user": "myuser", "key": K} if mode == "sealed" else {"user": None, "key": None}
    return establish_as_client(wire, **{**who, "service": "", "settings": Settings(), **options})


def log_failure(kind: str, message: str, *args: object, error: BaseException | None) -> None:
    logging.getLogger("bokbok_trio").error(message, *args, exc_info=error)


def as_server(
    wire: trio.abc.Stream, mode: Mode = "sealed", **options: Any
) -> Coroutine[Any, Any, Established]:
    user_key = {"myuser": K} if mode == "sealed" else None
    place = Places(1, 1).take(None)
    others = {
        "service": "",
        "settings": Settings(),
        "admit": lambda _: None,
        "place": place,
        "log": log_failure,
    }
    return establish_as_server(wire, **{"user_key": user_key, "log": log_failure, **others, **options})


def as_side(
    side: Side, wire: trio.abc.Stream, mode: Mode, **options: Any
) -> Coroutine[Any, Any, Established]:
    return (as_client if side == "client" else as_server)(wire, mode, **options)


@dataclass
class Ending:
    """The result of a side's handshake, and the time it took."""

    result: Established | HandshakeError
    seconds: float

    @property
    def opened(self) -> Established:
        assert isinstance(self.result, Established)
        return self.result

    @property
    def error(self) -> HandshakeError:
        assert isinstance(self.result, HandshakeError)
        return self.result


async def end_of(wire: trio.abc.Stream, opening: Awaitable[Established]) -> Ending:
    """Run a side's handshake as its callers do: if it fails, close the stream."""
    start = trio.current_time()
    try:
        result: Established | HandshakeError = await opening
    except HandshakeError as exc:
        result = exc
    seconds = trio.current_time() - start
    if isinstance(result, HandshakeError):
        await trio.aclose_forcefully(wire)
    return Ending(result, seconds)


async def meet(
    wires: tuple[trio.abc.Stream, trio.abc.Stream],
    mode: Mode = "sealed",
    *,
    client: dict[str, Any] | None = None,
    server: dict[str, Any] | None = None,
) -> tuple[Ending, Ending]:
    """Run the handshakes of both sides to the end."""
    endings: dict[Side, Ending] = {}

    async def play(side: Side, wire: trio.abc.Stream, options: dict[str, Any]) -> None:
        endings[side] = await end_of(wire, as_side(side, wire, mode, **options))

    with trio.fail_after(1000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(play, "client", wires[0], client or {})
            nursery.start_soon(play, "server", wires[1], server or {})
    return endings["client"], endings["server"]


async def receive_exactly(stream: trio.abc.Stream, size: int) -> bytes:
    received = b""
    while len(received) < size:
        data = await stream.receive_some(size - len(received))
        assert data
        received += data
    return received


def make_hello(side: Side, mode: Mode) -> bytes:
    """Make the hello that this side receives."""
    if side == "client":
        return ServerHandshake(sealed=mode == "sealed", service="", limits=LIMITS).hello
    user, key = ("myuser", K) if mode == "sealed" else (None, None)
    return ClientHandshake(user=user, key=key, service="", limits=LIMITS).hello


def over(wire: trio.abc.Stream, handshake: ClientHandshake | ServerHandshake) -> SecretboxStream:
    keys = handshake.channel_keys().for_side(handshake.side)
    return SecretboxStream(wire, send_key=keys["send_key"], receive_key=keys["receive_key"])


async def enter_as_client(wire: Wire, name: bytes = b"myuser") -> tuple[SecretboxStream, bytes]:
    """Enter the anonymous channel. Return the stream, and the `open` to send."""
    handshake = ClientHandshake(user="myuser", key=K, service="", limits=LIMITS)
    await wire.send_all(handshake.hello)
    hello = await receive_exactly(wire, handshake.hello_size)
    handshake.receive_hello(hello)
    return over(wire, handshake), open_as(name, handshake, hello)


async def enter_as_server(wire: Wire) -> tuple[SecretboxStream, bytes]:
    """Enter the anonymous channel and receive `open`. Return the stream, and the `accepted` to send."""
    handshake = ServerHandshake(sealed=True, service="", limits=LIMITS)
    handshake.receive_hello(await receive_exactly(wire, handshake.hello_size))
    await wire.send_all(handshake.hello)
    stream = over(wire, handshake)
    handshake.receive_open(await stream.receive_some())
    return stream, handshake.accept([K])


async def check_both_ways(client: Established, server: Established) -> None:
    sent = bytes(range(256)) * (MAX_PLAINTEXT_SIZE // 256 + 1)
    for sender, receiver in ((client, server), (server, client)):
        await sender.stream.send_all(sent)
        assert await receive_exactly(receiver.stream, len(sent)) == sent


def never_admit(_: str | None) -> None:
    raise AssertionError("an unauthenticated client was to be admitted")


@asynccontextmanager
async def open_sockets() -> AsyncGenerator[tuple[trio.SocketStream, trio.SocketStream]]:
    ours, theirs = map(trio.SocketStream, trio.socket.socketpair())
    async with ours, theirs:
        yield ours, theirs
