"""Wrong code: every checker must refuse each line that says so, and no other."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from functools import partial
from typing import Any

import trio
from files import Files, Line, Stat, Store
from trio.abc import ReceiveChannel

from bokbok_trio import Connection, open_connection, open_server
from bokbok_trio.blocking import connect
from bokbok_trio.interface import consume, expose, raises, with_options
from bokbok_trio.testing import consume_local

OfText = Callable[[str], Awaitable[None]]


class Unlike(Files):
    """Each method differs from the interface, and is refused where it stands."""

    async def stat(self, path: int, *, follow: bool = True) -> Stat:  # wrong: an argument
        return Stat(path)

    async def upload(self, name: str, chunks: AsyncIterable[bytes]) -> str:  # wrong: a result
        return name

    @trio.as_safe_channel
    async def follow(self, path: str) -> AsyncGenerator[str]:  # wrong: an item (not seen by ty)
        yield path

    async def grep(self, pattern: str, lines: AsyncIterable[str]) -> list[Line]:  # wrong: no stream
        return []

    async def copy(self, source: str, target: str, *, progress: OfText) -> None:  # wrong: a callback
        await progress("half")


class Misnamed(Files):
    async def stat(self, file: str, *, follow: bool = True) -> Stat:  # wrong: a name (not seen by mypy)
        return Stat(1)


class Incomplete(Files):
    async def draw(self, path: str, screen: Any) -> int:
        return 1


class Odd:
    async def show(self, line: str) -> bool:
        return True


async def text() -> AsyncGenerator[str]:
    yield ""


async def percent(done: str) -> None:
    pass


def not_async(done: float) -> None:
    pass


async def calling(connection: Connection) -> None:
    files = consume(connection, Files)
    await files.stat(1)  # wrong
    await files.stat("a", False)  # wrong
    await files.stat("a", follow="no")  # wrong
    await files.stat("a", unknown=1)  # wrong
    await files.stat()  # wrong
    await files.remove("a")  # wrong
    (await files.stat("a")).name  # wrong
    size: str = (await files.stat("a")).size  # wrong
    await files.upload("a", text())  # wrong
    await files.upload("a", [b""])  # wrong
    async with files.follow("a") as lines:
        item: str = await lines.receive()  # wrong
        channel: ReceiveChannel[int] = lines  # wrong
    async for line in files.follow("a"):  # wrong
        pass
    await files.follow("a")  # wrong
    async with files.grep("a", lines=[""]):  # wrong
        pass
    await files.copy("a", "b", progress=percent)  # wrong
    await files.copy("a", "b", progress=not_async)  # wrong
    await files.copy("a", "b")  # wrong
    await files.draw("a", Odd())  # wrong
    await consume(connection, Store[Stat]).swap("a")  # wrong
    with_options(files, context={"a": 1})  # wrong
    with_options(files, deadline=3)  # wrong
    consume("localhost:1", Files)  # wrong
    consume(connection, Files, middleware=["log"])  # wrong
    print(size, item, channel)


async def serving() -> None:
    expose(Files, Incomplete())  # wrong: an abstract class
    async with open_server("localhost:0", Files):  # wrong
        pass
    async with open_connection("localhost:1", request_handler=3):  # wrong
        pass
    async with consume_local(Files, Odd()) as files:
        await files.show("a")  # wrong


def blocking() -> None:
    with connect("localhost:1") as c:
        files = c.consume(Files)
        c.call(files.stat, 1)  # wrong (not seen by ty)
        c.call(partial(files.stat, 1, follow=False))  # wrong
        c.call(lambda: files.stat("a", follow="no"))  # wrong
        c.call(files.remove, "a")  # wrong
        name: str = c.call(files.stat, "a")  # wrong
        c.call(files.follow, "a")  # wrong
        with c.open_stream(files.stat("a")):  # wrong
            pass
        with c.open_stream(files.follow("a")) as lines:
            item: str = lines.receive()  # wrong
        print(name, item)


class Decorated:
    @raises("NoSuchFile")  # wrong
    async def stat(self) -> None: ...
