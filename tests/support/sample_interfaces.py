"""Interfaces and types for tests of inspection."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from types import GenericAlias
from typing import Any, Protocol, TypeVar

from trio.abc import ReceiveChannel

T = TypeVar("T")


@dataclass
class Stat:
    size: int


@dataclass
class NoSuchFile(Exception):
    path: str


class Listener(Protocol):
    async def heard(self, text: str) -> None: ...


class Plain:
    def __init__(self) -> None:
        self.count = 0

    async def add(self, number: int) -> int:
        return number


class Store(Protocol[T]):
    async def get(self, key: str) -> T: ...
    async def put(self, key: str, value: T) -> None: ...
    def follow(self) -> AbstractAsyncContextManager[ReceiveChannel[T]]: ...
    async def each(self, visit: Callable[[T], Awaitable[None]]) -> None: ...


class TypeAliasType:
    """Make the object that ``type NAME[T] = ...`` makes, which is new in Python 3.12."""

    def __init__(self, name: str, value: Callable[[], Any], parameters: tuple[Any, ...] = ()) -> None:
        self.__name__ = name
        self.__type_params__ = self.__parameters__ = parameters
        self._value = value

    @property
    def __value__(self) -> Any:
        return self._value()

    def __call__(self) -> None:
        """Be callable, so that `typing` takes this object for a type."""

    def __getitem__(self, types: Any) -> Any:
        return GenericAlias(self, types)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return self.__name__


@dataclass
class Computed(Exception):
    path: str
    name: Plain = field(init=False)
