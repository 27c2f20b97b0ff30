"""zerorpc, over ZeroMQ and gevent, with its heartbeats. ZeroMQ sets TCP_NODELAY."""

import socket
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, closing

import gevent
import zerorpc

from .base import HOST, Announce, BlockingAdapter, BlockingConnection, Connection, Service, Task


class Bench(Service):
    stream = zerorpc.stream(Service.stream)


class Zerorpc(BlockingAdapter):
    """Gives each task a greenlet."""

    async def gather(self, tasks: Sequence[Task]) -> None:
        gevent.joinall([gevent.spawn(self.run, task) for task in tasks], raise_error=True)

    async def sleep(self, seconds: float) -> None:
        gevent.sleep(seconds)

    async def serve(self, announce: Announce) -> None:
        with socket.create_server((HOST, 0)) as free:
            address = f"tcp://{HOST}:{free.getsockname()[1]}"
        server = zerorpc.Server(Bench())
        server.bind(address)
        announce(address)
        server.run()

    @asynccontextmanager
    async def connect(self, address: str) -> AsyncGenerator[Connection]:
        with closing(zerorpc.Client(address)) as client:
            yield BlockingConnection(client)
