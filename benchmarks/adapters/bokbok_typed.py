"""An interface of bokbok_trio, plain and sealed: for what is typed, and nothing else."""

from typing import Any, Protocol

import bokbok_trio
from bokbok_trio.interface import consume, expose

from .base import JOB, Connection, Job, Take, Unsupported
from .bokbok import Plain, Sealed

ONLY = "it is there for what is typed"


class Jobs(Protocol):
    async def echo(self, job: Job) -> Job: ...


class JobsEchoed(Jobs):
    async def echo(self, job: Job) -> Job:
        return job


class TypedConnection(Connection):
    def __init__(self, connection: bokbok_trio.Connection) -> None:
        self._jobs = consume(connection, Jobs)

    async def echo(self, data: bytes) -> bytes:
        raise Unsupported(ONLY)

    async def give(self, size: int) -> bytes:
        raise Unsupported(ONLY)

    async def call_back(self, data: bytes) -> bytes:
        raise Unsupported(ONLY)

    async def stream(self, size: int, take: Take) -> None:
        raise Unsupported(ONLY)

    async def echo_job(self) -> Job:
        return await self._jobs.echo(JOB)


class TypedPlain(Plain):
    connection = TypedConnection
    handler: Any = expose(Jobs, JobsEchoed())
    channels: dict[str, Any] = {}  # noqa: RUF012


class TypedSealed(TypedPlain, Sealed):
    pass
