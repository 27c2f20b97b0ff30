"""Clients of a server whose listener the test controls."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import trio
import trio.testing

from bokbok_trio import Connection, open_connection
from bokbok_trio.testing import MemoryListener


class GivenListener(trio.abc.Listener[trio.abc.Stream]):
    """A listener that accepts what a test gives it."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[trio.abc.Stream](math.inf)
        self.give = self._send.send_nowait

    def connect(self) -> trio.abc.HalfCloseableStream:
        """Do as `MemoryListener.connect` does."""
        ours, theirs = trio.testing.memory_stream_pair()
        self.give(theirs)
        return ours

    async def accept(self) -> trio.abc.Stream:
        return await self._receive.receive()

    async def aclose(self) -> None:
        await self._receive.aclose()


@asynccontextmanager
async def client_of(listener: MemoryListener | GivenListener, **kwargs: Any) -> AsyncGenerator[Connection]:
    async with open_connection(listener.connect(), **kwargs) as connection:
        yield connection


@asynccontextmanager
async def client_over_socket(listener: GivenListener) -> AsyncGenerator[Connection]:
    """Make a client over a UNIX socket, as the listener would accept it."""
    ours, theirs = map(trio.SocketStream, trio.socket.socketpair())
    listener.give(theirs)
    async with open_connection(ours) as connection:
        yield connection
