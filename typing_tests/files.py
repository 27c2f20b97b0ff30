"""The interface that the other files use, rightly and wrongly."""

from __future__ import annotations

from collections.abc import AsyncIterable, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from trio.abc import ReceiveChannel

from bokbok_trio.interface import idempotent, raises

T = TypeVar("T")


@dataclass
class NoSuchFile(Exception):
    path: str


@dataclass
class Stat:
    size: int
    owner: str | None = None


@dataclass
class Line:
    number: int
    text: str


class Screen(Protocol):
    async def show(self, line: Line) -> bool: ...


class Files(Protocol):
    """A file store."""

    @idempotent
    @raises(NoSuchFile)
    async def stat(self, path: str, *, follow: bool = True) -> Stat: ...
    async def upload(self, name: str, chunks: AsyncIterable[bytes]) -> int: ...
    def follow(self, path: str) -> AbstractAsyncContextManager[ReceiveChannel[Line]]: ...
    def grep(
        self, pattern: str, lines: AsyncIterable[str]
    ) -> AbstractAsyncContextManager[ReceiveChannel[Line]]: ...
    async def copy(
        self, source: str, target: str, *, progress: Callable[[float], Awaitable[None]]
    ) -> None: ...
    async def draw(self, path: str, screen: Screen) -> int: ...


class Store(Protocol[T]):
    async def swap(self, value: T) -> T: ...
