"""An interface that is lent callbacks and objects, and implementations of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import pytest
import trio
from trio.abc import ReceiveChannel

from bokbok_trio import Connection
from bokbok_trio.interface import consume, expose, raises
from bokbok_trio.testing import open_connection_pair

from .helpers import settle

encode = msgspec.msgpack.encode

Note = Callable[[float], Awaitable[int]]


@dataclass
class Refused(Exception):
    why: str


class Screen(Protocol):
    """An object to lend."""

    @raises(Refused)
    async def show(self, text: str, *, loud: bool = False) -> int: ...
    def keys(self, count: int) -> AbstractAsyncContextManager[ReceiveChannel[str]]: ...
    async def paint(self, rows: AsyncIterable[bytes]) -> int: ...
    async def twice(self, then: Callable[[str], Awaitable[str]]) -> str: ...


class Named(Protocol):
    """A callback with names."""

    async def __call__(self, value: int, *, name: str = "x") -> str: ...


class Work(Protocol):
    async def run(self, progress: Note) -> int: ...
    async def use(self, screen: Screen, how: str = "show") -> Any: ...
    async def maybe(self, progress: Note | None = None, screen: Screen | None = None) -> str: ...
    async def named(self, call: Named) -> str: ...
    async def keep(self, progress: Note, screen: Screen) -> None: ...
    async def sleep(self, progress: Note) -> None: ...
    async def bounce(self, depth: int, back: Callable[[int], Awaitable[int]]) -> int: ...
    async def pass_on(self, take: Callable[[Note], Awaitable[int]]) -> int: ...
    def stream(self, progress: Note) -> AbstractAsyncContextManager[ReceiveChannel[int]]: ...
    async def upload(self, chunks: AsyncIterable[bytes], progress: Note) -> int: ...
    async def fail(self, progress: Note) -> None: ...


class Worker:
    def __init__(self) -> None:
        self.kept: list[Any] = []
        self.started = trio.Event()
        self.ended = trio.Event()
        self.error: BaseException | None = None

    async def run(self, progress: Note) -> int:
        return sum([await progress(0.5), await progress(1)])

    async def use(self, screen: Screen, how: str = "show") -> Any:  # noqa: PLR0911
        match how:
            case "refused":
                with pytest.raises(Refused) as caught:
                    await screen.show("no")
                return caught.value.why
            case "keys":
                async with screen.keys(3) as keys:
                    return [key async for key in keys]
            case "first key":
                async with screen.keys(10**6) as keys:
                    return await keys.receive()
            case "paint":
                return await screen.paint(rows())
            case "twice":
                return await screen.twice(exclaim)
            case "raise":
                await screen.show("no")
            case "unknown":
                with pytest.raises(AttributeError):
                    await screen.hide()  # type: ignore[attr-defined]
                return None
        return await screen.show("hello", loud=True)

    async def maybe(self, progress: Note | None = None, screen: Screen | None = None) -> str:
        return f"{progress is not None} {screen is not None}"

    async def named(self, call: Named) -> str:
        return await call(1) + await call(value=2, name="y")

    async def keep(self, progress: Note, screen: Screen) -> None:
        self.kept += [progress, screen]

    async def sleep(self, progress: Note) -> None:
        self.kept.append(progress)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(progress, 1)
                self.started.set()
                await trio.sleep_forever()
        finally:
            self.ended.set()

    async def bounce(self, depth: int, back: Callable[[int], Awaitable[int]]) -> int:
        return depth if depth == 0 else await back(depth - 1)

    async def pass_on(self, take: Callable[[Note], Awaitable[int]]) -> int:
        async def double(value: float) -> int:
            return int(2 * value)

        return await take(double)

    async def stream(self, progress: Note) -> AsyncGenerator[int]:
        for number in range(3):
            yield await progress(number)

    async def upload(self, chunks: AsyncIterable[bytes], progress: Note) -> int:
        return sum([await progress(len(chunk)) async for chunk in chunks])

    async def fail(self, progress: Note) -> None:
        await progress(1)
        raise ValueError("failed")


async def rows() -> AsyncGenerator[bytes]:
    yield b"abc"
    yield b"d"


async def exclaim(text: str) -> str:
    return text + "!"


class Terminal:
    def __init__(self) -> None:
        self.shown: list[object] = []

    async def show(self, text: str, *, loud: bool = False) -> int:
        if text == "no":
            raise Refused("quiet")
        self.shown += [text, loud]
        return len(text)

    async def keys(self, count: int) -> AsyncGenerator[str]:
        for number in range(count):
            yield str(number)

    async def paint(self, rows: AsyncIterable[bytes]) -> int:
        return sum([len(row) async for row in rows])

    async def twice(self, then: Callable[[str], Awaitable[str]]) -> str:
        return await then(await then("a"))

    async def secret(self) -> None:
        raise AssertionError


TERMINAL: Any = Terminal()


async def note(value: float) -> int:
    return int(10 * value)


@asynccontextmanager
async def open_work(client_handler: Any = None) -> AsyncGenerator[tuple[Work, Worker, Connection]]:
    worker: Any = Worker()
    async with open_connection_pair(client_handler, expose(Work, worker)) as (client, _):
        yield consume(client, Work), worker, client


async def check_usable(work: Work, connection: Connection) -> None:
    """Check that everything a call took was released."""
    assert await work.maybe() == "False False"
    await settle()
    statistics = connection.statistics()
    assert (statistics.used_slots, statistics.handlers_running) == (0, 0)


class Half:
    async def show(self, text: str) -> int:
        return 0
