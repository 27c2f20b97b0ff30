"""Helpers for tests of the command line: a server in a thread, and commands in this process."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import AsyncIterable, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest
import trio
from trio.abc import ReceiveChannel

from bokbok_trio import Channel, Connection, RequestError, current_request, open_server
from bokbok_trio._cli import main
from bokbok_trio.interface import expose, idempotent, raises


@dataclass
class NoSuchFile(Exception):
    path: str


@dataclass
class Stat:
    size: int
    owner: str | None = None
    digest: bytes = b""


class Files(Protocol):
    """A file store."""

    @idempotent
    @raises(NoSuchFile)
    async def stat(self, path: str, *, follow: bool = True) -> Stat:
        """Look at a file.

        Not at what it links to.
        """
        ...

    async def upload(self, name: str, chunks: AsyncIterable[bytes]) -> int: ...
    async def total(self, numbers: AsyncIterable[int]) -> int: ...
    async def joined(self, words: AsyncIterable[str]) -> str: ...
    async def read(self, path: str) -> bytes: ...
    async def echo(
        self,
        *,
        text: str = "",
        data: bytes = b"",
        number: int = 0,
        ratio: float = 0.0,
        mode: Literal["r", "w"] = "r",
        level: int | None = None,
        stat: Stat | None = None,
        tags: list[str] | None = None,
        pair: tuple[int, bytes] = (0, b""),
        blobs: dict[str, bytes] | None = None,
        either: int | str = 0,
        anything: Any = None,
    ) -> dict[str, Any]: ...

    async def time_left(self) -> float | None: ...
    def times_left(self) -> AbstractAsyncContextManager[ReceiveChannel[float | None]]: ...

    @raises(NoSuchFile)
    def lines(self, path: str, *, count: int = 3) -> AbstractAsyncContextManager[ReceiveChannel[str]]: ...
    def doubled(self, numbers: AsyncIterable[int]) -> AbstractAsyncContextManager[ReceiveChannel[int]]: ...
    async def copy(self, source: str, *, progress: Callable[[float], Awaitable[None]]) -> None: ...


class Bare(Protocol):
    async def clear(self) -> None: ...


class BareInMemory:
    async def clear(self) -> None:
        pass


class FilesInMemory:
    async def stat(self, path: str, *, follow: bool = True) -> Stat:
        if path == "/gone":
            raise NoSuchFile(path)
        return Stat(len(path), "root" if follow else None, b"\xff\x00")

    async def upload(self, name: str, chunks: AsyncIterable[bytes]) -> int:
        return sum([len(chunk) async for chunk in chunks])

    async def total(self, numbers: AsyncIterable[int]) -> int:
        return sum([number async for number in numbers])

    async def joined(self, words: AsyncIterable[str]) -> str:
        return ",".join([word async for word in words])

    async def read(self, path: str) -> bytes:
        return b"\x00content\n"

    async def echo(self, **values: Any) -> dict[str, Any]:
        return {name: repr(value) for name, value in values.items()}

    async def time_left(self) -> float | None:
        left = current_request().deadline - trio.current_time()
        return left if math.isfinite(left) else None

    async def times_left(self) -> Any:
        yield await self.time_left()

    async def lines(self, path: str, *, count: int = 3) -> Any:
        if path == "/gone":
            raise NoSuchFile(path)
        for n in range(count):
            yield f"{path}:{n}"
        if path == "/slow":
            await trio.sleep(0.2)
        if path == "/breaks":
            raise RequestError("it broke", code="broken")
        if path == "/endless":
            await trio.sleep_forever()

    async def doubled(self, numbers: AsyncIterable[int]) -> Any:
        async for number in numbers:
            yield number * 2

    async def copy(self, source: str, *, progress: Callable[[float], Awaitable[None]]) -> None:
        raise AssertionError


async def handler(connection: Connection, request: list[bytes]) -> list[bytes | str] | None:
    match request:
        case [b"who"]:
            return [connection.user or "nobody"]
        case [b"no", code]:
            raise RequestError("it says no\nforged: line", code=code.decode(), details=b"why")
        case [b"sleep"]:
            await trio.sleep_forever()
        case [b"close"]:
            await connection.aclose()
        case _:
            return list(request)
    raise AssertionError


async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
    for n in range(3):
        await channel.send([b"%d" % n, b"\xff"])
    if request == [b"no"]:
        raise RequestError("it broke", code="broken")
    if request == [b"close"]:
        await connection.aclose()
    if request == [b"endless"]:
        await trio.sleep_forever()
    return [b"done"]


class PlainHandlers:
    """Both kinds of handler, for requests that are not calls of an interface."""

    handle_request = staticmethod(handler)
    handle_channel = staticmethod(channel_handler)


def make_handler(*, listed: bool = True) -> Any:
    bare = expose(Bare, BareInMemory(), listed=listed)
    return expose(Files, FilesInMemory(), listed=listed) | bare | PlainHandlers()


@contextmanager
def serving(on: str, served: Any, **options: Any) -> Iterator[str]:
    """Run a server in a thread with a Trio run of its own, and yield its address."""
    ready = threading.Event()
    found: list[Any] = []

    async def run() -> None:
        try:
            async with open_server(on, served, **options) as server:
                found.extend([server.addresses[0], server, trio.lowlevel.current_trio_token()])
                ready.set()
                await server.wait_stopped()
        finally:
            ready.set()

    thread = threading.Thread(target=trio.run, args=[run])
    thread.start()
    ready.wait()
    address, server, token = found
    try:
        yield str(address)
    finally:
        token.run_sync_soon(server.stop, 0)
        thread.join()


@dataclass
class Ran:
    """The result of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The output, decoded from JSON."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line on its standard error, without the name of the command."""
        assert self.err.startswith("bokbok: ")
        assert self.err.count("\n") == 1
        assert self.err.endswith("\n")
        return self.err.removeprefix("bokbok: ").removesuffix("\n")


Run = Callable[..., Ran]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a command in this process."""
    for name in ("BOKBOK_KEY_FILE", "BOKBOK_USER", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def run(*args: object, stdin: bytes | None = None) -> Ran:
        capfd.readouterr()
        with feeding(stdin):
            code = main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        return Ran(code, out, err)

    return run


@contextmanager
def replaced(fd: int, other: int) -> Iterator[None]:
    """Replace the file behind a descriptor by another one during a block."""
    kept = os.dup(fd)
    os.dup2(other, fd)
    try:
        yield
    finally:
        os.dup2(kept, fd)
        os.close(kept)


@contextmanager
def feeding(data: bytes | None) -> Iterator[None]:
    """Put some bytes on the standard input during a block."""
    if data is None:
        yield
        return
    reader, writer = os.pipe()
    with open(writer, "wb") as file:
        file.write(data)
    with replaced(0, reader):
        os.close(reader)
        yield


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a server that lists its interfaces, and return its address. The system names its users to it."""
    path = Path(tmp_path_factory.mktemp("cli")) / "sock"
    with serving(str(path), make_handler(), peer_user=lambda _: "tester") as found:
        yield found
