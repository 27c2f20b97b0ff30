"""The second implementation on a stream, connected with the package."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from bokbok_trio import (
    ChannelHandler,
    Connection,
    Key,
    RequestHandler,
    Settings,
    open_connection,
    open_server,
)
from bokbok_trio.testing import MemoryListener

from ..support import second_implementation as second
from ..support.helpers import echo


class Peer:
    """The second implementation on a stream, with a handshake and packets one after the other."""

    def __init__(self, stream: trio.abc.Stream, side: second.Client | second.Server) -> None:
        self.stream = stream
        self.side = side
        self.sealed = bool(side.ephemeral)
        self.plaintext = b""
        self.seen: list[bytes] = []
        self.open = second.Open(side.me, 4096, 1)

    async def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = await self.stream.receive_some(size - len(data))
            assert more, "the end of the stream"
            data += more
        return data

    async def read_record(self) -> bytes:
        header = await self.read(2)
        return self.opener.open(header + await self.read(int.from_bytes(header, "big")))

    async def send(self, packet: bytes) -> None:
        if not self.sealed:
            await self.stream.send_all(packet)
            return
        for start in range(0, len(packet) or 1, 65_519):
            await self.stream.send_all(self.sealer.seal(packet[start : start + 65_519]))

    async def receive(self) -> bytes:
        """Receive one packet, with its length."""

        async def read(size: int) -> bytes:
            if not self.sealed:
                return await self.read(size)
            while len(self.plaintext) < size:
                self.plaintext += await self.read_record()
            data, self.plaintext = self.plaintext[:size], self.plaintext[size:]
            return data

        length = await read(4)
        return length + await read(int.from_bytes(length, "big"))

    def use_keys(self, keys: bytes) -> None:
        if self.sealed:
            own, other = (keys[:32], keys[32:]) if self.side.me == 0 else (keys[32:], keys[:32])
            self.sealer, self.opener = second.Records(own), second.Records(other)

    async def shake_hands(self) -> None:
        side = self.side
        if isinstance(side, second.Client):
            await self.stream.send_all(side.own_hello)
        side.take_hello(await self.read(len(side.own_hello)))
        self.use_keys(side.hs)
        if isinstance(side, second.Client):
            await self.send(side.open(bytes(range(32))))
            side.take_reply(await self.receive())
        else:
            await self.stream.send_all(side.own_hello)
            await self.send(side.take_open(await self.receive()))
        self.use_keys(side.fk)
        sizes = int(side.own_limits[0]), side.peer_limits[0]
        self.open = second.Open(side.me, min(sizes), int(side.own_limits[1]))

    async def put(self, *fields: bytes) -> None:
        """Send a packet, in pieces if it must be."""
        for packet in self.open.put(list(fields)):
            await self.send(packet)

    async def take(self) -> list[bytes]:
        """Receive the next request or answer. Respond to all other packets meanwhile."""
        while True:
            packet = await self.receive()
            self.seen.append(second.unpack_body(packet[4:])[0])
            fields = self.open.take(packet)
            await self.reply()
            if fields is not None:
                return fields

    async def reply(self) -> None:
        replies, self.open.replies = self.open.replies, []
        for packet in replies:
            await self.send(packet)

    async def take_word(self, *fields: bytes) -> None:
        """Take a packet that is not for the user."""
        packet = await self.receive()
        assert second.unpack(packet) == list(fields)
        assert self.open.take(packet) is None
        await self.reply()

    async def talk(self, timeout: bytes) -> None:
        """Make a request, answer the one that its handler makes, and return the answer."""
        own, other = self.ids
        await self.put(b"req", own, b"60000000", b"", b"", second.body([b"double", b"ab"]))
        assert await self.take() == [b"req", other, timeout, b"1", b"", second.body([b"again?", b"ab"])]
        await self.put(b"ok", other, second.body([b"yes"]))
        assert await self.take() == [b"ok", own, second.body([b"abab", b"yes"])]

    async def take_nothing(self) -> None:
        """Check that the other side waits for this one."""
        with trio.move_on_after(1) as scope:
            await self.take()
        assert scope.cancelled_caught

    @property
    def ids(self) -> tuple[bytes, bytes]:
        """Return the ids of the first requests of both sides."""
        return (b"0", b"1") if self.side.me == 0 else (b"1", b"0")

    async def expect_end(self) -> None:
        if self.sealed:
            assert await self.read_record() == b""
        assert await self.stream.receive_some() == b""

    async def end(self) -> None:
        if self.sealed:
            await self.send(b"")
        await self.stream.aclose()


async def double(connection: Connection, request: list[bytes]) -> list[bytes]:
    tag, text = request
    assert tag == b"double"
    [answer] = await connection.request([b"again?", text])
    return [text * 2, answer]


SECRET = bytes(range(100, 132))
KEY = Key(bytes(range(200, 232)))


@asynccontextmanager
async def connected(
    role: str,
    handler: RequestHandler = echo,
    *,
    channel_handler: ChannelHandler | None = None,
    settings: Settings = Settings(max_message_size=2**20),  # noqa: B008
) -> AsyncGenerator[tuple[Connection, Peer]]:
    """Connect the package with the second implementation in a role, in mode sealed."""
    limits = (2**20, 5)
    accepted = []

    async def on_open(connection: Connection) -> None:
        accepted.append(connection)
        await trio.lowlevel.checkpoint()

    if role == "client":
        listener = MemoryListener()
        async with open_server(
            [listener],
            handler,
            channel_handler=channel_handler,
            user_key={"zo": KEY},
            open_handler=on_open,
            settings=settings,
        ):
            peer = Peer(listener.connect(), second.Client(b"zo", KEY.raw, b"", limits, SECRET))
            await peer.shake_hands()
            await trio.testing.wait_all_tasks_blocked()
            yield accepted[0], peer
        return
    ours, theirs = trio.testing.memory_stream_pair()
    peer = Peer(theirs, second.Server({b"zo": KEY.raw}, b"", limits, SECRET))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.shake_hands)
        async with open_connection(
            ours,
            user="zo",
            key=KEY,
            request_handler=handler,
            channel_handler=channel_handler,
            settings=settings,
        ) as connection:
            yield connection, peer


both_roles = pytest.mark.parametrize("role", ["client", "server"])
