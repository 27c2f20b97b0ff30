"""What an adapter gives: a server, connections to it, and how its library runs several tasks at once.

All of it is ``async`` and knows no event loop: scenarios await only what an adapter gives them, which a
blocking library answers without ever suspending.
"""

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias

import trio

HOST = "127.0.0.1"

Announce: TypeAlias = Callable[[str], None]
Task: TypeAlias = Callable[[], Coroutine[Any, Any, None]]
Take: TypeAlias = Callable[[int], Awaitable[bool]]
"""Called with the size of each item of a stream; returns whether to go on."""


@dataclass
class Job:
    """What `Connection.echo_job` sends."""

    name: str
    priority: int
    tags: list[str]
    done: float = 0.0
    owner: str | None = None


JOB = Job("compile", 3, ["fast", "linux"], 0.5, "alice")
JOB_BYTES = (
    b"\x85\xa4name\xa7compile\xa8priority\x03\xa4tags\x92\xa4fast\xa5linux"
    b"\xa4done\xcb\x3f\xe0\x00\x00\x00\x00\x00\x00\xa5owner\xa5alice"
)
"""The same as MessagePack."""


class Unsupported(Exception):  # noqa: N818
    """The library cannot do this; the message says why."""


class Connection:
    """A connection to a server; its methods are the requests that the servers of all adapters answer."""

    async def echo(self, data: bytes) -> bytes:
        """Be answered with the same bytes."""
        raise NotImplementedError

    async def echo_job(self) -> Job | bytes:
        """Be answered with `JOB`, which the server got as a `Job`; or with its bytes, if nothing is typed."""
        raise Unsupported("no adapter has been written for it that sends a dataclass")

    async def give(self, size: int) -> bytes:
        """Be answered with so many bytes."""
        raise NotImplementedError

    async def call_back(self, data: bytes) -> bytes:
        """Be answered with what the server got when it asked this side to echo the bytes."""
        raise Unsupported("its server cannot call the client")

    async def stream(self, size: int, take: Take) -> None:
        """Receive items of so many bytes for as long as `take` wants more."""
        raise Unsupported("it has no streams of items")

    async def gather(self, adapter: "Adapter", tasks: Sequence[Task]) -> None:
        """Run tasks that all call over this one connection."""
        await adapter.gather(tasks)


class Adapter(ABC):
    """How to use a library the way its documentation advises."""

    @abstractmethod
    async def serve(self, announce: Announce) -> None:
        """Serve for ever, and announce an address that `connect` understands."""

    @abstractmethod
    def connect(self, address: str) -> AbstractAsyncContextManager[Connection]:
        """Open a connection, and close it."""

    @abstractmethod
    def run(self, main: Task) -> None:
        """Run an async function in the library's event loop."""

    @abstractmethod
    async def gather(self, tasks: Sequence[Task]) -> None:
        """Run tasks at once, until all have ended."""

    @abstractmethod
    async def sleep(self, seconds: float) -> None:
        """Let the others run."""


class TrioAdapter(Adapter):
    def run(self, main: Task) -> None:
        trio.run(main)

    async def gather(self, tasks: Sequence[Task]) -> None:
        async with trio.open_nursery() as nursery:
            for task in tasks:
                nursery.start_soon(task)

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)


class AsyncioAdapter(Adapter):
    def run(self, main: Task) -> None:
        asyncio.run(main())

    async def gather(self, tasks: Sequence[Task]) -> None:
        async with asyncio.TaskGroup() as group:
            for task in tasks:
                group.create_task(task())

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class BlockingAdapter(Adapter):
    """Gives each task a thread."""

    def run(self, main: Task) -> None:
        with contextlib.suppress(StopIteration):
            main().send(None)
            raise RuntimeError("a blocking library waited for an event loop")

    async def gather(self, tasks: Sequence[Task]) -> None:
        with ThreadPoolExecutor(len(tasks)) as threads:
            list(threads.map(self.run, tasks))

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251  (there is no event loop)


class Service:
    """What a server answers, for the blocking libraries: they expose the methods of an object."""

    def echo(self, data: bytes) -> bytes:
        return data

    def give(self, size: int) -> bytes:
        return bytes(size)

    def echo_job(self, values: dict[str, Any]) -> dict[str, Any]:
        return vars(Job(**values))

    def stream(self, size: int) -> Iterator[bytes]:
        item = bytes(size)
        while True:
            yield item


class BlockingConnection(Connection):
    """Calls the methods of a stand-in for the server's object."""

    def __init__(self, remote: Any) -> None:
        self.remote = remote

    async def echo(self, data: bytes) -> bytes:
        return self.remote.echo(data)

    async def give(self, size: int) -> bytes:
        return self.remote.give(size)

    async def echo_job(self) -> Job:
        return Job(**self.remote.echo_job(vars(JOB)))

    async def stream(self, size: int, take: Take) -> None:
        for item in self.remote.stream(size):
            if not await take(len(item)):
                break
