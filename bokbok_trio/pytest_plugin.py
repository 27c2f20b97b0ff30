"""Fixtures for pytest-trio: connections and servers in memory that are closed when a test ends.

A project that uses them says so in its top ``conftest.py``; nothing is loaded where none does::

    pytest_plugins = ["bokbok_trio.pytest_plugin"]

The fixtures are functions: called with the arguments of `bokbok_trio.testing.open_connection_pair` and
`bokbok_trio.testing.open_memory_server`, they open what these open, for the rest of the test. Tests that call
`trio.run` themselves, or run under another plugin, enter these as blocks.
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
    """Make a function that enters blocks, each in a task of its own, to be left when this one is."""
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
"""What `bokbok_pair` is: takes the arguments of `bokbok_trio.testing.open_connection_pair`."""

OpenServer: TypeAlias = Callable[..., Awaitable[MemoryServer]]
"""What `bokbok_server` is: takes the arguments of `bokbok_trio.testing.open_memory_server`."""


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
    """Open a server, for the rest of the test, that clients connect to as whoever they like.

    ::

        async def test_users(bokbok_server):
            server = await bokbok_server(handler, users=["alice", "bob"])
            async with server.connect("alice") as alice, server.connect("bob") as bob:
                ...
    """
    async with _held(open_memory_server) as enter:
        yield enter
