"""RPyC, blocking, its ThreadedServer; several calls at once on one connection by `rpyc.async_`.

Its compression is off, in the way the maintainers give in issue 438: random bytes cannot become fewer.
"""

import socket
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace, coroutine
from typing import Any, TypeAlias

import rpyc
from rpyc.core.stream import SocketStream
from rpyc.utils.server import ThreadedServer

from .base import (
    HOST,
    JOB,
    Adapter,
    Announce,
    BlockingAdapter,
    BlockingConnection,
    Connection,
    Job,
    Service,
    Task,
)

Values: TypeAlias = tuple[str, int, tuple[str, ...], float, str | None]


def as_values(job: Job) -> Values:
    """What travels by value: an object would stay where it is, and each of its attributes be a call."""
    return job.name, job.priority, tuple(job.tags), job.done, job.owner


def as_job(values: Values) -> Job:
    name, priority, tags, done, owner = values
    return Job(name, priority, list(tags), done, owner)


class Bench(rpyc.Service):
    exposed_echo, exposed_give, exposed_stream = Service.echo, Service.give, Service.stream

    def exposed_echo_job(self, values: Values) -> Values:
        return as_values(as_job(values))

    def exposed_call_back(self, function: Callable[[bytes], bytes], data: bytes) -> bytes:
        return function(data)

    def on_connect(self, conn: Any) -> None:
        conn._channel.compress = False


class RpycConnection(BlockingConnection):
    """Looks the remote methods up once: that is a call of its own."""

    def __init__(self, root: Any) -> None:
        super().__init__(SimpleNamespace(echo=root.echo, give=root.give, stream=root.stream))
        self._call_back = root.call_back
        self._echo_job, self._async_echo_job = root.echo_job, rpyc.async_(root.echo_job)
        self._async_echo, self._async_give = rpyc.async_(root.echo), rpyc.async_(root.give)
        self._shared = False

    async def echo(self, data: bytes) -> bytes:
        return await wait(self._async_echo(data)) if self._shared else self.remote.echo(data)

    async def give(self, size: int) -> bytes:
        return await wait(self._async_give(size)) if self._shared else self.remote.give(size)

    async def echo_job(self) -> Job:
        values = as_values(JOB)
        return as_job(await wait(self._async_echo_job(values)) if self._shared else self._echo_job(values))

    async def call_back(self, data: bytes) -> bytes:
        return self._call_back(lambda data: data, data)

    async def gather(self, adapter: Adapter, tasks: Sequence[Task]) -> None:
        """Let each make its call, then the first wait for its answer, and so on: one thread, many calls."""
        self._shared = True
        running = deque(task() for task in tasks)
        while running:
            task = running.popleft()
            with suppress(StopIteration):
                task.send(None)
                running.append(task)
        self._shared = False


@coroutine
def wait(result: Any) -> Generator[None, None, Any]:
    """Let the other tasks make their calls, and then wait for this one."""
    yield
    return result.value


def set_nodelay(sock: socket.socket) -> tuple[socket.socket, None]:
    """Be an authenticator that does what the server has no argument for."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock, None


class Rpyc(BlockingAdapter):
    async def serve(self, announce: Announce) -> None:
        server = ThreadedServer(Bench, hostname=HOST, port=0, authenticator=set_nodelay)
        server.listener.listen(server.backlog)  # as `start` does, but that does not say when
        announce(str(server.port))
        server.start()

    @asynccontextmanager
    async def connect(self, address: str) -> AsyncGenerator[Connection]:
        connection = rpyc.connect_stream(SocketStream.connect(HOST, int(address), nodelay=True))
        connection._channel.compress = False
        with connection:
            yield RpycConnection(connection.root)
