"""What fuzzing begins with: traffic of real connections, made anew each time, as scripts of the targets."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import trio
import trio.testing

from bokbok_trio import Channel, Connection, RemoteError, RequestError
from bokbok_trio.testing import open_connection_pair
from tests.support import second_implementation as second

from .handshake import make_second
from .session import ACT, BEGIN, FORMS, RAW, RECEIVE

MAGIC: Final = b"bokbok1\n"
VECTORS: Final[dict[str, Any]] = json.loads(Path("tests/support/vectors.json").read_bytes())


class Recorder(trio.abc.HalfCloseableStream):
    """A stream that notes what crosses it."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        assert isinstance(stream, trio.abc.HalfCloseableStream)
        self.stream = stream
        self.sent: list[bytes] = []
        self.received: list[bytes] = []

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.sent.append(bytes(data))
        await self.stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        data = bytes(await self.stream.receive_some(max_bytes))
        self.received.append(data)
        return data

    async def send_eof(self) -> None:
        await self.stream.send_eof()

    async def aclose(self) -> None:
        await self.stream.aclose()


async def handle(connection: Connection, request: list[bytes]) -> list[bytes]:
    match request:
        case [b"fail"]:
            raise RequestError("as asked", code="code", details=b"details")
        case [b"sleep"]:
            await trio.sleep(math.inf)
            raise AssertionError
        case [b"back", *rest]:
            return await connection.request(rest)
        case _:
            return request


async def handle_channel(_connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
    async for item in channel:
        await channel.send(item)
    return request


async def talk(connection: Connection) -> None:
    """One of everything that an application does."""
    await connection.request(["ping", "12345"], context={"trace-id": "4bf92f35"})
    await connection.request([b"x" * 300] * 3)
    await connection.request(["back", "ping"])
    await connection.request([bytes(70_000)])
    with trio.move_on_after(1):
        await connection.request(["sleep"])
    with suppress(RemoteError):
        await connection.request(["fail"])
    async with connection.open_channel(["log"]) as channel:
        for size in (0, 10, 1000):
            await channel.send([bytes(size)])
            await channel.receive()
        await channel.end()
        await channel.answer()
    await connection.ping()
    connection.drain()
    await connection.wait_closed()


def record_traffic() -> Recorder:
    """All of a plain connection, at the client."""
    recorders: list[Recorder] = []

    def wrap(stream: trio.abc.Stream) -> Recorder:
        recorders.append(Recorder(stream))
        return recorders[-1]

    async def main() -> None:
        async with open_connection_pair(
            handle,
            handle,
            sealed=False,
            client_channel_handler=handle_channel,
            server_channel_handler=handle_channel,
            wrap=wrap,
        ) as (client, _):
            await talk(client)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return recorders[0]


def cut_into_packets(stream: bytes) -> list[bytes]:
    packets: list[bytes] = []
    while stream:
        end = 4 + int.from_bytes(stream[:4], "big")
        packets.append(stream[:end])
        stream = stream[end:]
    return packets


def seeds_for_packets(streams: list[bytes]) -> Iterator[bytes]:
    for stream in streams:
        for size in (0, 1, 100):
            yield bytes((0, size)) + stream[:4000]
    for operation in range(4):
        for kind in range(5):
            yield bytes((128, 0, operation, 2, kind, 4)) + b"4096" + bytes((kind, 2, 1, 97, 1, 98))
    for vector in (*VECTORS["packets"]["good"], *VECTORS["connection"]["good"]):
        yield bytes(2) + bytes.fromhex(vector["packet"])


def seeds_for_records(streams: list[bytes]) -> Iterator[bytes]:
    for stream in streams:
        script = b""
        for packet in cut_into_packets(stream)[:30]:
            text = packet[:255]
            script += bytes((0, len(text))) + text
        for header in (bytes(3), bytes((0, 0, 7)), bytes((1, 5, 0)), bytes((2, 0, 1))):
            yield header + script + bytes(2)
    for operation in range(10):
        yield bytes(3) + b"\0\1a\0\2bc\0\0" + bytes((operation, 0, 5, 0)) + b"\0\1d"


def seeds_for_handshake() -> Iterator[bytes]:
    for sealed in (True, False):
        client, server = (
            make_second("client", sealed=sealed),
            make_second("server", sealed=sealed),
        )
        client.take_hello(server.own_hello)
        server.take_hello(client.own_hello)
        opening = client.open(bytes(32))
        messages = (server.own_hello, client.own_hello, opening, server.take_open(opening))
        for kind, message in enumerate(messages):
            start = bytes((2 * kind + (not sealed),))
            for operation in range(4):
                yield start + bytes((operation,)) + message
                yield start + bytes((operation,))
                options = second.flat({b"room": b"65536", b"grease.0a1b": b"x"})
                for field in range(5):
                    yield start + bytes((operation, field, 4, 4)) + b"4096"
                    yield start + bytes((operation, field, 4, len(options))) + options
                    yield start + bytes((operation, field, 2, 4, 1, 97, 1, 49, 1, 98, 1, 50))


def seeds_for_session(streams: list[bytes]) -> Iterator[bytes]:
    for stream in streams:
        packets = [packet for packet in cut_into_packets(stream)[1:] if len(packet) < 1000]
        raw = [bytes((RAW,)) + len(packet).to_bytes(2, "big") + packet for packet in packets]
        yield b"".join(raw)
        yield b"".join(each + bytes((ACT + 2, 0, 1, 1)) for each in raw)
    for kind in range(len(FORMS)):
        for action in range(12):
            yield bytes((ACT + action, 0, 1, 1, kind, 0, 0, 0, 0, 0, 0, RECEIVE, 0, ACT + action, 0, 0, 1))
    # Our channel, with items both ways; and one of the peer's.
    yield bytes(
        (ACT, 0, 0, 1, 6, 1, 4, 6, 1, 1, 7, 1, 1, RECEIVE, 0, ACT + 6, 0, 1, 1, ACT + 8, 0, 0, 1, 8, 1)
    )
    yield bytes(
        (1, 0, 0, 0, 0, 4, 0, RECEIVE, 0, 5, 0, 0, ACT + 6, 0, 1, 1, ACT + 7, 0, 0, 1, ACT + 2, 0, 0, 1)
    )
    # An item that uses up the credit of a channel of the peer's; more is granted, and the next one comes.
    grant = bytes((ACT + 8, 0, 0, 1))
    yield bytes((1, 0, 0, 0, 0, 4, 0, RECEIVE, 0, 6, 0, 3, RECEIVE, 0)) + grant + bytes((6, 0, 1, RECEIVE, 0))
    # Pieces of several packets at once; and pieces that are whole, and voided.
    yield bytes((BEGIN, BEGIN, BEGIN, RECEIVE, 0))
    yield bytes((len(FORMS), 0, 0, 0, 0, 3, 0, 0, 200, 9, RECEIVE, 0, 9, 0, RECEIVE, 0))


def make_seeds() -> dict[str, list[bytes]]:
    """Seeds for each target."""
    recorder = record_traffic()
    hello = len(MAGIC) + 4 + 33
    streams = [b"".join(recorder.sent)[hello:], b"".join(recorder.received)[hello:]]
    return {
        "packets": list(seeds_for_packets(streams)),
        "records": list(seeds_for_records(streams)),
        "handshake": list(seeds_for_handshake()),
        "session": list(seeds_for_session(streams)),
    }
