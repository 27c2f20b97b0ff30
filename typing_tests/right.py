"""Right code: every checker must take all of it, and know every type that it asserts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import partial
from typing import Any, assert_type

import trio
from files import Files, Line, NoSuchFile, Screen, Stat, Store
from trio.abc import ReceiveChannel

from bokbok_trio import (
    CombinedHandler,
    Connection,
    ReconnectingConnection,
    current_request,
    open_connection,
    open_reconnecting,
    open_server,
    serve,
)
from bokbok_trio.blocking import Stream, connect
from bokbok_trio.interface import (
    Call,
    Exposed,
    InterfaceInfo,
    Middleware,
    Proceed,
    consume,
    expose,
    list_interfaces,
    with_options,
)
from bokbok_trio.testing import consume_local, open_connection_pair

# ---- an implementation, that inherits ----


class FilesOnDisk(Files):
    def __init__(self, root: str) -> None:
        self.root = root

    async def stat(self, path: str, *, follow: bool = True) -> Stat:
        if not path:
            raise NoSuchFile(path)
        return Stat(3, current_request().user)

    async def upload(self, name: str, chunks: AsyncIterable[bytes]) -> int:
        size = 0
        async for chunk in chunks:
            assert_type(chunk, bytes)
            size += len(chunk)
        return size

    @trio.as_safe_channel
    async def follow(self, path: str) -> AsyncGenerator[Line]:
        yield Line(1, path)

    @trio.as_safe_channel
    async def grep(self, pattern: str, lines: AsyncIterable[str]) -> AsyncGenerator[Line]:
        async for line in lines:
            assert_type(line, str)
            yield Line(1, line)

    async def copy(self, source: str, target: str, *, progress: Callable[[float], Awaitable[None]]) -> None:
        await progress(0.5)

    async def draw(self, path: str, screen: Screen) -> int:
        assert_type(await screen.show(Line(1, path)), bool)
        return 1


# ---- and one that does not ----


class StatOnly:
    async def swap(self, value: Stat) -> Stat:
        return replace(value, size=0)


class OldStyle(ABC):
    @abstractmethod
    async def double(self, number: int) -> int: ...


class Doubler(OldStyle):
    async def double(self, number: int) -> int:
        return 2 * number


class Terminal:
    async def show(self, line: Line) -> bool:
        return bool(line.text)


async def timing(call: Call, proceed: Proceed) -> Any:
    assert_type(call.method, str)
    assert_type(call.arguments, Mapping[str, Any])
    return await proceed(replace(call, context={**call.context, "trace": "1"}))


async def plain(connection: Connection, request: list[bytes]) -> list[bytes]:
    return request


async def serving() -> None:
    exposed = expose(Files, FilesOnDisk("/srv"), middleware=[timing], listed=True, name="Files")
    assert_type(exposed, Exposed)
    handler: CombinedHandler = exposed
    many = exposed | expose(Store[Stat], StatOnly()) | expose(OldStyle, Doubler()) | plain
    assert_type(many, Exposed)
    async with open_server("localhost:0", many) as server:
        await server.wait_stopped()
    async with open_server("localhost:0", exposed | handler):
        pass
    await serve("localhost:0", exposed)
    async with open_reconnecting(["localhost:1"], request_handler=exposed) as client:
        assert_type(consume(client, Files), Files)


async def send() -> AsyncGenerator[bytes]:
    yield b""


async def note(done: float) -> None:
    pass


async def calling(connection: Connection, reconnecting: ReconnectingConnection) -> None:
    files = consume(connection, Files)
    assert_type(files, Files)
    stat = await files.stat("/etc/hosts", follow=False)
    assert_type(stat, Stat)
    assert_type(stat.size, int)
    assert_type(await files.upload("a", send()), int)
    async with files.follow("/var/log") as lines:
        assert_type(lines, ReceiveChannel[Line])
        async for line in lines:
            assert_type(line, Line)
        assert_type(await lines.receive(), Line)
    assert_type(files.follow("/var/log"), AbstractAsyncContextManager[ReceiveChannel[Line]])
    await files.copy("a", "b", progress=note)
    await files.copy("a", "b", progress=lambda done: note(done / 2))
    assert_type(await files.draw("a", Terminal()), int)
    assert_type(consume(reconnecting, Files, middleware=[timing], name="F"), Files)

    store = consume(connection, Store[Stat])
    assert_type(await store.swap(Stat(1)), Stat)
    assert_type(await consume(connection, OldStyle).double(2), int)

    again = with_options(files, context={"a": "b", "c": b"d"}, idempotent=True)
    assert_type(again, Files)
    assert_type(await list_interfaces(connection), list[InterfaceInfo])
    try:
        await files.stat("")
    except NoSuchFile as error:
        assert_type(error.path, str)


async def testing() -> None:
    async with consume_local(Files, FilesOnDisk("/srv"), middleware=[timing]) as files:
        assert_type(files, Files)
        assert_type(await files.stat("/a"), Stat)
    async with open_connection_pair(expose(OldStyle, Doubler()), expose(Files, FilesOnDisk("/"))) as pair:
        assert_type(pair, tuple[Connection, Connection])
    async with open_connection("localhost:1", request_handler=expose(OldStyle, Doubler())):
        pass


# ---- in scripts ----


def blocking() -> None:
    with connect("localhost:1", request_handler=expose(OldStyle, Doubler())) as c:
        files = c.consume(Files, middleware=[timing], name="F")
        assert_type(files, Files)
        assert_type(c.call(files.stat, "/etc/hosts", timeout=5), Stat)
        assert_type(c.call(partial(files.stat, "/etc/hosts", follow=False)), Stat)
        assert_type(c.call(lambda: files.stat("/etc/hosts", follow=False), timeout=5), Stat)
        assert_type(c.call(files.upload, "a", send()), int)
        c.call(partial(files.copy, "a", "b", progress=note))
        assert_type(c.submit(files.stat, "/etc/hosts").result(), Stat)
        assert_type(c.call(c.consume(Store[Stat]).swap, Stat(1)), Stat)
        with c.open_stream(files.follow("/var/log"), timeout=5) as lines:
            assert_type(lines, Stream[Line])
            assert_type(lines.receive(timeout=1), Line)
            for line in lines:
                assert_type(line, Line)
        with c.open_channel(["tail"]) as channel:
            assert_type(channel.receive(), list[bytes])
            assert_type(list(channel), list[list[bytes]])


every_kind: list[Middleware] = [timing]
