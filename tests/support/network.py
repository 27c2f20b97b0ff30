"""A network in memory for reconnecting clients. A test can cut it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import trio
import trio.testing

from bokbok_trio import Channel, Connection, RequestHandler, open_server
from bokbok_trio._addresses import Address
from bokbok_trio.testing import FaultyStream, MemoryListener

from .helpers import busy_handler, settle

A, B, C = (f"127.0.0.1:{port}" for port in (1, 2, 3))


class Network:
    """Listeners in memory, which clients find by their addresses.

    Attributes:
        dialled: the time and the address of each try.
        streams: the clients' ends of the connections that were made.
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
        """Run a server at an address for as long as a block."""
        async with open_server([self.listen(address)], handler, **kwargs) as server:
            try:
                yield server
            finally:
                del self.listeners[address]
                server.stop(grace=0)

    async def cut(self, index: int = -1) -> None:
        """Cut a connection, by default the newest: nothing arrives from now on."""
        await self.streams[index].cut()


async def drop(server: Any) -> None:
    """Make the server close all its connections, and go on."""
    for connection in server.connections:
        await connection.aclose()
    await settle()


async def count_items(connection: Connection, request: list[bytes], channel: Channel) -> list[str]:
    return [str(len([item async for item in channel]))]
