"""pycapnp, Cap'n Proto's C++ library under asyncio, which sets TCP_NODELAY."""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import capnp

from .base import HOST, Announce, AsyncioAdapter, Connection, Task

Bench: Any = capnp.load(os.path.join(os.path.dirname(__file__), "bench.capnp")).Bench


class Server(Bench.Server):  # type: ignore[misc]
    """Answers either side."""

    async def echo(self, data: bytes, **_: Any) -> bytes:
        return data

    async def give(self, size: int, **_: Any) -> bytes:
        return bytes(size)

    async def callBack(self, caller: Any, data: bytes, **_: Any) -> bytes:  # noqa: N802  (Cap'n Proto's style)
        return (await caller.echo(data)).data


class PycapnpConnection(Connection):
    def __init__(self, bench: Any) -> None:
        self._bench = bench
        self._mine = Bench._new_client(Server())

    async def echo(self, data: bytes) -> bytes:
        return (await self._bench.echo(data)).data

    async def give(self, size: int) -> bytes:
        return (await self._bench.give(size)).data

    async def call_back(self, data: bytes) -> bytes:
        return (await self._bench.callBack(self._mine, data)).data


async def answer(stream: Any) -> None:
    """Serve one connection."""
    await capnp.TwoPartyServer(stream, bootstrap=Server()).on_disconnect()


class Pycapnp(AsyncioAdapter):
    def run(self, main: Task) -> None:
        asyncio.run(capnp.run(main()))

    async def serve(self, announce: Announce) -> None:
        server = await capnp.AsyncIoStream.create_server(answer, HOST, 0)
        announce(str(server.sockets[0].getsockname()[1]))
        await server.serve_forever()

    @asynccontextmanager
    async def connect(self, address: str) -> AsyncGenerator[Connection]:
        stream = await capnp.AsyncIoStream.create_connection(HOST, int(address))
        client = capnp.TwoPartyClient(stream)
        try:
            yield PycapnpConnection(client.bootstrap().cast_as(Bench))
        finally:
            client.close()
            stream.close()
