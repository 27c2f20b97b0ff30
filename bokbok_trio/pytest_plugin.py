"""Fixtures for pytest-trio: connections and servers in memory, which are closed when a test ends.

To use them, name this module in the top ``conftest.py`` of your project. It is never loaded otherwise::

    pytest_plugins = ["bokbok_trio.pytest_plugin"]

Each fixture is a function with the arguments of `bokbok_trio.testing.open_connection_pair` or
`bokbok_trio.testing.open_memory_server`. It opens the same, for the rest of the test. A test that calls
`trio.run` itself, or runs under another plugin, can enter these two as blocks.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import ParamSpec, TypeAlias, TypeVar

import pytest
import trio

from ._connection.connection import Connection
from .testing import MemoryServer, open_connection_pair, open_memory_server

__all__ = ["OpenPair", "OpenServer", "bokbok_pair", "bokbok_server"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


@asynccontextmanager
async def _held(
    block: Callable[_P, AbstractAsyncContextManager[_T]],
) -> AsyncGenerator[Callable[_P, Awaitable[_T]]]:
    """Return a function that enters blocks, each in a task. They are left when this block is left."""
    is_over = trio.Event()

    async def hold(manager: AbstractAsyncContextManager[_T], *, task_status: trio.TaskStatus[_T]) -> None:
        async with manager as value:
            task_status.started(value)
            await is_over.wait()

    async with trio.open_nursery() as nursery:

        async def enter(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            value: _T = await nursery.start(hold, block(*args, **kwargs))
            return value

        yield enter
        is_over.set()


OpenPair: TypeAlias = Callable[..., Awaitable[tuple[Connection, Connection]]]
"""The type of `bokbok_pair`: a function with the arguments of `bokbok_trio.testing.open_connection_pair`."""

OpenServer: TypeAlias = Callable[..., Awaitable[MemoryServer]]
"""The type of `bokbok_server`: a function with the arguments of `bokbok_trio.testing.open_memory_server`."""


@pytest.fixture
async def bokbok_pair() -> AsyncGenerator[OpenPair]:
    """Open both ends of a connection, for the rest of the test.

    ::

        async def test_ping(bokbok_pair):
            client, server = await bokbok_pair(server_handler=handler, user="alice")
            assert await client.request(["ping", "1"]) == [b"pong", b"1"]
    """
    async with _held(open_connection_pair) as enter:
        yield enter


@pytest.fixture
async def bokbok_server() -> AsyncGenerator[OpenServer]:
    """Open a server for the rest of the test. Clients may connect as any of its users.

    ::

        async def test_users(bokbok_server):
            server = await bokbok_server(handler, users=["alice", "bob"])
            async with server.connect("alice") as alice, server.connect("bob") as bob:
                ...
    """
    async with _held(open_memory_server) as enter:
        yield enter
