"""An interface of plain calls, and an implementation of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol, TypeVar

import msgspec
import pytest
import trio

from bokbok_trio import Connection, RemoteError, RequestError
from bokbok_trio.interface import consume, expose, raises
from bokbok_trio.testing import open_connection_pair

encode = msgspec.msgpack.encode

T = TypeVar("T")


@dataclass
class Job:
    name: str
    priority: Annotated[int, msgspec.Meta(ge=0)] = 0
    steps: list[Job] = field(default_factory=list)


@dataclass
class NoSuchJob(Exception):
    name: str
    tried: int = 1


@dataclass(eq=False)
class QueueFull(Exception):
    limit: int
    retry_after: float | None = field(default=None, kw_only=True)

    def __str__(self) -> str:
        return f"{self.limit} jobs wait"


@dataclass
class Specific(NoSuchJob):
    more: bytes = b""


class Jobs(Protocol):
    """A queue."""

    async def add(self, job: Job, *, urgent: bool = False, note: str | None = None) -> int: ...
    async def total(self, a: int, b: int = 2, c: int = 3) -> int: ...
    @raises(NoSuchJob, QueueFull)
    async def find(self, name: str) -> Job: ...
    async def fail(self, how: str) -> int: ...
    async def wrong(self, value: Any) -> Job: ...
    async def anything(self, value: Any = None) -> Any: ...
    async def sleep(self) -> None: ...


class Queue(Jobs):
    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.seen: list[object] = []
        self.ended = trio.Event()

    async def add(self, job: Job, *, urgent: bool = False, note: str | None = "the implementation's") -> int:
        self.seen += [job, urgent, note]
        self.jobs.append(job)
        return len(self.jobs)

    async def total(self, a: int, b: int = 20, c: int = 30) -> int:
        await trio.lowlevel.checkpoint()
        return a + b + c

    async def find(self, name: str) -> Job:
        match name:
            case "full":
                raise QueueFull(7, retry_after=0.5)
            case "specific":
                raise Specific(name, 3, b"not sent")
            case "group":
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(trio.sleep_forever)
                    nursery.start_soon(self.find, "full")
            case "late":
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.end_late)
                    await trio.sleep_forever()
            case "groups":
                raise ExceptionGroup("both", [NoSuchJob("a"), QueueFull(1)])
            case "long":
                raise NoSuchJob("x" * 2**14)
            case "unencodable":
                raise NoSuchJob(name, 2**70)
            case "odd":
                raise NoSuchJob(name, "many")  # type: ignore[arg-type]
            case "bare":
                raise RequestError("not with fields", code="%NoSuchJob")
        raise NoSuchJob(name)

    async def end_late(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise QueueFull(3)

    async def fail(self, how: str) -> int:
        if how == "request":
            raise RequestError("not today", code="closed-today", details=b"more")
        raise NoSuchJob(how)

    async def wrong(self, value: Any) -> Job:
        return value  # type: ignore[no-any-return]

    async def anything(self, value: Any = None) -> Any:
        return value

    async def sleep(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self.ended.set()

    async def secret(self) -> int:
        raise AssertionError

    async def _private(self) -> int:
        raise AssertionError


@asynccontextmanager
async def open_jobs(**settings: Any) -> AsyncGenerator[tuple[Jobs, Queue, Connection]]:
    """A stand-in, its implementation, and the connection."""
    queue = Queue()
    async with open_connection_pair(server_handler=expose(Jobs, queue), **settings) as (client, _):
        yield consume(client, Jobs), queue, client


async def code_of(connection: Connection, *fields: bytes) -> str:
    """Return the code of the error that answers a request made by hand."""
    with pytest.raises(RemoteError) as caught:
        await connection.request(fields)
    return caught.value.code
