"""Both ends of a connection over a real socket, plain or sealed, TCP or UNIX."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
import trio
import trio.testing

from bokbok_trio import (
    ChannelHandler,
    Connection,
    ConnectionHandler,
    Key,
    RequestHandler,
    Settings,
    open_connection,
    open_server,
)

WAYS: Final = ("tcp plain", "tcp sealed", "unix plain", "unix sealed")

over_all_ways = pytest.mark.parametrize("way", WAYS)


@asynccontextmanager
async def open_pair(
    way: str,
    client_handler: RequestHandler | None = None,
    server_handler: RequestHandler | None = None,
    *,
    client_channel_handler: ChannelHandler | None = None,
    server_channel_handler: ChannelHandler | None = None,
    client_close_handler: ConnectionHandler | None = None,
    server_close_handler: ConnectionHandler | None = None,
    client_settings: Settings = Settings(),  # noqa: B008
    server_settings: Settings = Settings(),  # noqa: B008
    wrap: Callable[[trio.SocketStream], trio.abc.Stream] | None = None,
) -> AsyncGenerator[tuple[Connection, Connection]]:
    """Open a pair of connections as `bokbok_trio.testing.open_connection_pair` does, but over sockets.

    Arguments:
        way: one of `WAYS`.
        wrap: a function that puts a stream around the client's stream.
    """
    key = Key.generate()
    kind, mode = way.split()
    secrets: dict[str, Any] = {"user": "u", "key": key} if mode == "sealed" else {}
    accepted: list[Connection] = []
    has_accepted = trio.Event()

    async def open_handler(connection: Connection) -> None:
        await trio.lowlevel.checkpoint()
        accepted.append(connection)
        has_accepted.set()

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/socket"
        async with open_server(
            path if kind == "unix" else "127.0.0.1:0",
            server_handler,
            channel_handler=server_channel_handler,
            user_key={"u": key} if secrets else None,
            open_handler=open_handler,
            close_handler=server_close_handler,
            settings=server_settings,
        ) as server:
            to: Any = server.addresses[0]
            if wrap is not None:
                if kind == "unix":
                    stream = await trio.open_unix_socket(path)
                else:
                    stream = await trio.open_tcp_stream("127.0.0.1", to.port)
                to = wrap(stream)
            async with open_connection(
                to,
                request_handler=client_handler,
                channel_handler=client_channel_handler,
                close_handler=client_close_handler,
                settings=client_settings,
                insecure=wrap is not None,  # the library cannot know where another stream leads
                **secrets,
            ) as client:
                await has_accepted.wait()
                yield client, accepted[0]


async def settle(connection: Connection, other: Connection | None = None) -> None:
    """Wait until all packets sent so far have arrived, in both directions, and all handlers wait."""
    for each in (connection, other, connection):
        if each is not None:
            await each.ping()
    await trio.testing.wait_all_tasks_blocked(0.01)
