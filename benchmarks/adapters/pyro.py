"""Pyro5, blocking, its threaded server; with marshal, which its documentation advises for bytes."""

import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, closing

import Pyro5
from Pyro5.api import Daemon, Proxy, expose

from .base import (
    HOST,
    Adapter,
    Announce,
    BlockingAdapter,
    BlockingConnection,
    Connection,
    Service,
    Task,
    Unsupported,
)

Pyro5.config.SERIALIZER = "marshal"
Pyro5.config.SOCK_NODELAY = True
Pyro5.config.THREADPOOL_SIZE = 1_100  # the most connections at once: each holds a thread


class Bench(Service):
    """Answers either side; the server makes one for each connection."""

    _caller: Proxy | None = None

    def call_back(self, uri: str, data: bytes) -> bytes:
        self._caller = self._caller or Proxy(uri)
        return self._caller.echo(data)


expose(Service)
expose(Bench)


class PyroConnection(BlockingConnection):
    """To be called back it has a daemon, to which the server connects."""

    _daemon: Daemon | None = None
    _uri = ""

    async def call_back(self, data: bytes) -> bytes:
        if self._daemon is None:
            self._daemon = Daemon(host=HOST)
            self._uri = str(self._daemon.register(Bench))
            threading.Thread(target=self._daemon.requestLoop, daemon=True).start()
        return self.remote.call_back(self._uri, data)

    async def gather(self, adapter: Adapter, tasks: Sequence[Task]) -> None:
        raise Unsupported("a proxy makes one call at a time")

    def close(self) -> None:
        if self._daemon is not None:
            self._daemon.shutdown()


class Pyro(BlockingAdapter):
    async def serve(self, announce: Announce) -> None:
        daemon = Daemon(host=HOST)
        announce(str(daemon.register(Bench)))
        daemon.requestLoop()

    @asynccontextmanager
    async def connect(self, address: str) -> AsyncGenerator[Connection]:
        with Proxy(address) as proxy, closing(PyroConnection(proxy)) as connection:
            yield connection
