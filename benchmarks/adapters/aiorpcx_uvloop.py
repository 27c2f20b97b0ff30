"""aiorpcX over uvloop, which sets TCP_NODELAY. It speaks JSON, so bytes travel as base64."""

import asyncio
from base64 import b64decode, b64encode
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import aiorpcx
import uvloop

from .base import HOST, JOB, Announce, AsyncioAdapter, Connection, Job, Task


class Session(aiorpcx.RPCSession):
    """Either side, with its throttling and its limit of a message's size turned off."""

    cost_hard_limit = 0
    initial_concurrent = 1000

    def default_framer(self) -> aiorpcx.NewlineFramer:
        return aiorpcx.NewlineFramer(max_size=0)

    async def handle_request(self, request: Any) -> Any:
        return await aiorpcx.handler_invocation(getattr(self, f"on_{request.method}"), request)()

    async def on_echo(self, data: str) -> str:
        return encode(b64decode(data))

    async def on_echo_job(self, values: dict[str, Any]) -> dict[str, Any]:
        return vars(Job(**values))

    async def on_give(self, size: int) -> str:
        return encode(bytes(size))

    async def on_call_back(self, data: str) -> str:
        return await self.send_request("echo", [data])


def encode(data: bytes) -> str:
    return b64encode(data).decode()


class AiorpcXConnection(Connection):
    def __init__(self, session: Session) -> None:
        self._session = session

    async def echo(self, data: bytes) -> bytes:
        return b64decode(await self._session.send_request("echo", [encode(data)]))

    async def echo_job(self) -> Job:
        return Job(**await self._session.send_request("echo_job", [vars(JOB)]))

    async def give(self, size: int) -> bytes:
        return b64decode(await self._session.send_request("give", [size]))

    async def call_back(self, data: bytes) -> bytes:
        return b64decode(await self._session.send_request("call_back", [encode(data)]))


class AiorpcX(AsyncioAdapter):
    def run(self, main: Task) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())

    async def serve(self, announce: Announce) -> None:
        server = await aiorpcx.serve_rs(Session, HOST, 0)
        announce(str(server.sockets[0].getsockname()[1]))
        await server.serve_forever()

    @asynccontextmanager
    async def connect(self, address: str) -> AsyncGenerator[Connection]:
        async with aiorpcx.connect_rs(HOST, int(address), session_factory=Session) as session:
            yield AiorpcXConnection(session)
