"""bokbok_trio: plain, and sealed with a key."""

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import bokbok_trio
from bokbok_trio import Key, Settings

from .base import HOST, JOB_BYTES, Announce, Connection, Take, TrioAdapter, Unsupported

SETTINGS = Settings(max_message_size=8 * 2**20, max_requests=10_000, max_connections=2_000)
HAS_CHANNELS = hasattr(bokbok_trio.Connection, "open_channel")


async def handler(connection: bokbok_trio.Connection, request: list[bytes]) -> list[bytes]:
    """Answer the requests of either side."""
    match request:
        case [b"echo", data]:
            return [data]
        case [b"give", size]:
            return [bytes(int(size))]
        case [b"call back", data]:
            return await connection.request(["echo", data])
    raise ValueError(request)


async def channel_handler(connection: bokbok_trio.Connection, request: list[bytes], channel: Any) -> None:
    """Send items until cancelled."""
    item = bytes(int(request[0]))
    while True:
        await channel.send([item])


class BokbokConnection(Connection):
    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def echo(self, data: bytes) -> bytes:
        return (await self._connection.request(["echo", data]))[0]

    async def echo_job(self) -> bytes:
        return await self.echo(JOB_BYTES)

    async def give(self, size: int) -> bytes:
        return (await self._connection.request(["give", str(size)]))[0]

    async def call_back(self, data: bytes) -> bytes:
        return (await self._connection.request(["call back", data]))[0]

    async def stream(self, size: int, take: Take) -> None:
        if not HAS_CHANNELS:
            raise Unsupported("this version has no channels")
        async with self._connection.open_channel([str(size)]) as channel:
            while await take(len((await channel.receive())[0])):
                pass


class Plain(TrioAdapter):
    user: str | None = None
    key: Key | None = None
    connection: Callable[[bokbok_trio.Connection], Connection] = BokbokConnection
    handler: Any = staticmethod(handler)
    channels: dict[str, Any] = {"channel_handler": channel_handler} if HAS_CHANNELS else {}

    async def serve(self, announce: Announce) -> None:
        keys = {self.user: self.key} if self.user and self.key else None
        async with bokbok_trio.open_server(
            f"{HOST}:0", self.handler, user_key=keys, settings=SETTINGS, **self.channels
        ) as server:
            announce(str(server.addresses[0]))
            await server.wait_stopped()

    @asynccontextmanager
    async def connect(self, address: str) -> AsyncGenerator[Connection]:
        async with bokbok_trio.open_connection(
            address, user=self.user, key=self.key, request_handler=handler, settings=SETTINGS
        ) as connection:
            yield self.connection(connection)


class Sealed(Plain):
    user = "bench"
    key = Key(bytes(range(32)))
