"""Twisted AMP, with the default reactor."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred, ensureDeferred, gatherResults
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP4ServerEndpoint, connectProtocol
from twisted.internet.protocol import Factory
from twisted.internet.task import deferLater, react
from twisted.protocols.amp import AMP, MAX_VALUE_LENGTH, Command, String

from .base import HOST, Adapter, Announce, Connection, Task, Unsupported

reactor: Any = _reactor

TOO_LARGE = f"a value is at most {MAX_VALUE_LENGTH:,} bytes"


class Echo(Command):
    arguments = response = [(b"data", String())]  # noqa: RUF012  (as AMP wants them)


class CallBack(Echo):
    pass


class Bench(AMP):
    """Either side."""

    def connectionMade(self) -> None:  # noqa: N802  (Twisted's style)
        super().connectionMade()
        self.transport.setTcpNoDelay(True)

    @Echo.responder
    def echo(self, data: bytes) -> dict[str, bytes]:
        return {"data": data}

    @CallBack.responder
    def call_back(self, data: bytes) -> Any:
        return self.callRemote(Echo, data=data)


class AMPConnection(Connection):
    def __init__(self, protocol: Any) -> None:
        self._protocol = protocol

    async def echo(self, data: bytes) -> bytes:
        if len(data) > MAX_VALUE_LENGTH:
            raise Unsupported(TOO_LARGE)
        return (await self._protocol.callRemote(Echo, data=data))["data"]

    async def give(self, size: int) -> bytes:
        raise Unsupported(TOO_LARGE)

    async def call_back(self, data: bytes) -> bytes:
        return (await self._protocol.callRemote(CallBack, data=data))["data"]


class TwistedAMP(Adapter):
    def run(self, main: Task) -> None:
        react(lambda _: ensureDeferred(main()))

    async def gather(self, tasks: Sequence[Task]) -> None:
        running = [ensureDeferred(task()) for task in tasks]
        await gatherResults(running, consumeErrors=True).addErrback(lambda first: first.value.subFailure)

    async def sleep(self, seconds: float) -> None:
        await deferLater(reactor, seconds)

    async def serve(self, announce: Announce) -> None:
        port = await TCP4ServerEndpoint(reactor, 0, interface=HOST).listen(Factory.forProtocol(Bench))
        announce(str(port.getHost().port))
        await Deferred()

    @asynccontextmanager
    async def connect(self, address: str) -> AsyncGenerator[Connection]:
        protocol = await connectProtocol(TCP4ClientEndpoint(reactor, HOST, int(address)), Bench())
        try:
            yield AMPConnection(protocol)
        finally:
            protocol.transport.loseConnection()
