"""An interface whose methods stream, and an implementation of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import pytest
import trio
from trio.abc import ReceiveChannel

from bokbok_trio import Connection, RequestError
from bokbok_trio.interface import consume, expose, raises
from bokbok_trio.testing import open_connection_pair

from .helpers import settle

encode = msgspec.msgpack.encode


@dataclass
class Line:
    number: int
    text: str = ""


@dataclass
class NoSuchLog(Exception):
    name: str


class Logs(Protocol):
    @raises(NoSuchLog)
    def follow(self, name: str, start: int = 0) -> AbstractAsyncContextManager[ReceiveChannel[Line]]: ...
    @raises(NoSuchLog)
    async def upload(self, name: str, lines: AsyncIterable[Line]) -> int: ...
    @raises(NoSuchLog)
    def number(
        self, lines: AsyncIterable[str], mode: str = ""
    ) -> AbstractAsyncContextManager[ReceiveChannel[Line]]: ...
    async def plain(self) -> int: ...


class Implementation:
    """A log whose name says how it behaves."""

    def __init__(self) -> None:
        self.sent = 0
        self.received: list[Line] = []
        self.ended = trio.Event()
        self.outcome = ""
        self.kept: Any = None

    async def follow(self, name: str, start: int = 0) -> AsyncGenerator[Line]:  # noqa: PLR0912
        try:
            match name:
                case "none":
                    return
                case "missing":
                    raise NoSuchLog(name)
                case "endless":
                    while True:
                        yield Line(self.sent, "x" * 1000)
                        self.sent += 1
                case "stuck":
                    await trio.sleep_forever()
                case "wrong":
                    yield Line(1)
                    yield {"number": "x"}  # type: ignore[misc]
                case "timeout":
                    with trio.move_on_after(5):
                        for number in range(3):
                            yield Line(number)
                            await trio.sleep(2)
                    yield Line(99)
                    return
                case "nursery":
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self.crash)
                        while True:
                            yield Line(0, "x" * 10000)
                case "big":
                    yield Line(1, "x" * 2**13)
            for number in range(start, start + 3):
                yield Line(number)
            match name:
                case "failing":
                    raise ValueError("no more")
                case "declared":
                    raise NoSuchLog(name)
                case "request":
                    raise RequestError("gone", code="gone")
        except BaseException as exc:
            self.outcome = type(exc).__name__
            raise
        finally:
            self.ended.set()

    async def crash(self) -> None:
        await trio.sleep(1)
        raise NoSuchLog("crashed")

    async def upload(self, name: str, lines: AsyncIterable[Line]) -> int:
        self.kept = lines
        try:
            match name:
                case "ignore":
                    return -1
                case "missing":
                    raise NoSuchLog(name)
                case "one":
                    async for line in lines:
                        self.received.append(line)
                        return 1
                case "slow":
                    await trio.sleep(10)
                case "close":
                    channel: Any = lines
                    await channel.aclose()
                    with pytest.raises(trio.ClosedResourceError):
                        await channel.receive()
                    return 0
            async for line in lines:
                self.received.append(line)
                if name == "failing":
                    raise ValueError("cannot take it")
            return len(self.received)
        except BaseException as exc:
            self.outcome = type(exc).__name__
            raise
        finally:
            self.ended.set()

    async def number(self, lines: AsyncIterable[str], mode: str = "") -> AsyncGenerator[Line]:
        try:
            if mode == "close":
                channel: Any = lines
                async with trio.open_nursery() as nursery:

                    @nursery.start_soon
                    async def receive() -> None:
                        with pytest.raises(trio.ClosedResourceError):
                            await channel.receive()

                    await trio.sleep(1)
                    await channel.aclose()
                with pytest.raises(trio.ClosedResourceError):
                    await channel.receive()
                yield Line(7)
                return
            number = 0
            async for line in lines:
                yield Line(number, line)
                number += 1
        except BaseException as exc:
            self.outcome = type(exc).__name__
            raise
        finally:
            self.ended.set()

    async def plain(self) -> int:
        return 1


@asynccontextmanager
async def open_logs(**settings: Any) -> AsyncGenerator[tuple[Logs, Implementation, Connection]]:
    logs: Any = Implementation()
    async with open_connection_pair(server_handler=expose(Logs, logs), **settings) as (client, _):
        yield consume(client, Logs), logs, client


async def count(up_to: int, pause: float = 0) -> AsyncGenerator[Line]:
    for number in range(up_to):
        yield Line(number)
        await trio.sleep(pause)


async def texts(up_to: int) -> AsyncGenerator[str]:
    for number in range(up_to):
        yield f"{number:1000}"


async def check_usable(logs: Logs, connection: Connection) -> None:
    """Check that everything a call took was released."""
    await settle()
    assert await logs.plain() == 1
    await settle()
    statistics = connection.statistics()
    assert (statistics.used_slots, statistics.handlers_running) == (0, 0)


class Source:
    """An async iterable that records the end of its iterator."""

    def __init__(self, up_to: int, *, fails: bool = False, pause: float = 0) -> None:
        self.yielded = 0
        self.closed = 0
        self._up_to = up_to
        self._fails = fails
        self._pause = pause

    def __aiter__(self) -> Source:
        return self

    async def __anext__(self) -> Line:
        await trio.sleep(self._pause)
        if self.yielded == self._up_to:
            if self._fails:
                raise KeyError("no more")
            raise StopAsyncIteration
        self.yielded += 1
        return Line(self.yielded, "x" * 1000)

    async def aclose(self) -> None:
        self.closed += 1
