"""Clients of a server whose listener is at hand."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import trio
import trio.testing

from bokbok_trio import Connection, open_connection
from bokbok_trio.testing import MemoryListener


@asynccontextmanager
async def client_of(listener: MemoryListener, **kwargs: Any) -> AsyncGenerator[Connection]:
    async with open_connection(listener.connect(), **kwargs) as connection:
        yield connection


@asynccontextmanager
async def client_over_socket(listener: MemoryListener) -> AsyncGenerator[Connection]:
    """A client over a UNIX socket, as the listener would accept it."""
    ours, theirs = map(trio.SocketStream, trio.socket.socketpair())
    listener._send.send_nowait(theirs)
    async with open_connection(ours) as connection:
        yield connection
