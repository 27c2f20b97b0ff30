"""`expose` reports everything that an implementation lacks, at once."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol, TypeVar

import pytest
import trio
from trio.abc import ReceiveChannel

from bokbok_trio.interface import expose
from tests.support.helpers import needs_safe_channel

F = TypeVar("F", bound=Callable[..., Any])


class Files(Protocol):
    async def stat(self, path: str, *, follow: bool = True) -> int:
        """Documented, and nothing else."""
        ...

    async def upload(self, chunks: AsyncIterable[bytes]) -> int: ...
    def follow(self, path: str) -> AbstractAsyncContextManager[ReceiveChannel[int]]: ...


class Good:
    async def stat(self, path: str, *, follow: bool = True) -> int:
        return 0

    async def upload(self, chunks: AsyncIterable[bytes]) -> int:
        return 0

    @asynccontextmanager
    async def follow(self, path: str) -> AsyncGenerator[ReceiveChannel[int]]:
        send, receive = trio.open_memory_channel[int](0)
        async with send, receive:
            yield receive


def traced(function: F) -> F:
    """As decorators are written, not async themselves."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper  # type: ignore[return-value]


class Traced(Good):
    @traced
    async def stat(self, path: str, *, follow: bool = True) -> int:
        return 1


class Wider(Good):
    async def stat(
        self, path: str = "/", follow: bool = False, more: int = 0, *rest: int, **others: int
    ) -> int:
        return more

    async def upload(self, **anything: Any) -> int:  # type: ignore[override]
        return 0

    async def follow(self, *, path: str) -> AsyncGenerator[int]:  # type: ignore[override]
        yield 1


class Called:
    """Its methods are objects that can be called."""

    def __init__(self) -> None:
        self.stat = functools.partial(Traced().stat)
        self.upload = CallMe()
        self.follow = Good().follow


class CallMe:
    async def __call__(self, chunks: AsyncIterable[bytes]) -> int:
        return 0


class Explicit(Files):
    async def stat(self, path: str, *, follow: bool = True) -> int:
        return 2

    async def upload(self, chunks: AsyncIterable[bytes]) -> int:
        return 0

    def follow(self, path: str) -> AbstractAsyncContextManager[ReceiveChannel[int]]:
        return Good().follow(path)


@pytest.mark.parametrize("implementation", [Good(), Traced(), Wider(), Called(), Explicit()])
def test_what_fits_is_taken(implementation: Any) -> None:
    expose(Files, implementation)


@needs_safe_channel
def test_a_safe_channel_fits() -> None:
    class Safe(Good):
        @trio.as_safe_channel
        async def follow(self, path: str) -> AsyncGenerator[int]:  # type: ignore[override]
            yield 1

    expose(Files, Safe())


def sync_stat(self: object, path: str, *, follow: bool = True) -> int:
    return 0


async def async_follow(self: object, path: str) -> int:
    return 0


async def generating_stat(self: object, path: str, *, follow: bool = True) -> AsyncGenerator[int]:
    yield 1


async def positional_stat(self: object, path: str, /, *, follow: bool = True) -> int:
    return 0


async def other_name_stat(self: object, file: str, *, follow: bool = True) -> int:
    return 0


async def no_default_stat(self: object, path: str, *, follow: bool) -> int:
    return 0


async def needy_stat(self: object, path: str, user: str, *, follow: bool = True) -> int:
    return 0


async def short_stat(self: object, *path: str, follow: bool = True) -> int:
    return 0


@pytest.mark.parametrize(
    ("name", "value", "offences"),
    [
        ("stat", None, ["it is missing"]),
        ("stat", 3, ["it is 3, not a method"]),
        ("stat", sync_stat, ["it is not async; write 'async def'"]),
        ("stat", traced(sync_stat), ["it is not async; write 'async def'"]),
        (
            "stat",
            generating_stat,
            ["it is an async generator, and does not stream; write return in place of yield"],
        ),
        (
            "stat",
            positional_stat,
            ["it takes path by position only, and is called by name; take the '/' away"],
        ),
        (
            "stat",
            other_name_stat,
            [
                "it does not take path; add it",
                "it needs file, which the interface does not have; give it a default",
            ],
        ),
        ("stat", no_default_stat, ["its follow may be left out in the interface; give it a default"]),
        ("stat", needy_stat, ["it needs user, which the interface does not have; give it a default"]),
        ("stat", short_stat, ["it does not take path; add it"]),
        ("follow", async_follow, ["it streams, and is async without yield; write an async generator"]),
    ],
)
def test_what_does_not_fit_is_told(name: str, value: object, offences: list[str]) -> None:
    implementation = type("Bad", (Good,), {name: value})()
    with pytest.raises(TypeError) as caught:
        expose(Files, implementation)
    first, *lines = str(caught.value).split("\n  ")
    assert first == "Bad does not implement Files"
    assert lines == [f"{name}: {each}" for each in offences]


def test_all_is_told_at_once() -> None:
    with pytest.raises(TypeError) as caught:
        expose(Files, object())
    assert str(caught.value).splitlines() == [
        "object does not implement Files",
        *(f"  {name}: it is missing" for name in ("stat", "upload", "follow")),
    ]


class Half(Files):
    async def upload(self, chunks: AsyncIterable[bytes]) -> int:
        return 0


def test_methods_that_are_inherited_from_the_protocol_are_missing() -> None:
    half: Any = Half
    with pytest.raises(TypeError) as caught:
        expose(Files, half())
    assert str(caught.value).split("\n  ")[1:] == [
        "stat: it is missing: the one of the Protocol does nothing",
        "follow: it is missing: the one of the Protocol does nothing",
    ]


class WithDefault(Protocol):
    async def size(self) -> int:
        return 7


class Empty(WithDefault):
    pass


def test_a_protocol_may_have_a_method_that_does_something() -> None:
    expose(WithDefault, Empty())


class Concrete:
    async def nothing(self) -> None: ...


def test_a_class_may_be_its_own_interface() -> None:
    expose(Concrete, Concrete())


def test_a_class_for_an_object_is_refused() -> None:
    wrong: Any = Good
    with pytest.raises(TypeError, match="Good is a class, and Files is served by an object"):
        expose(Files, wrong)


class Counter(Protocol):
    async def count(self, number: int) -> int: ...


class Odd:
    """It can be called, and nobody knows how."""

    __signature__ = "odd"

    async def __call__(self, number: int) -> int:
        return number


class Native:
    count = max


class Unknown:
    """A class can be called too, and may be async."""

    count = type("Awaitable", (), {"__init__": lambda self, number: None})


class Counting:
    def __init__(self) -> None:
        self.count = Odd()


def test_what_cannot_be_judged_is_taken() -> None:
    for implementation in (Counting(), Unknown()):
        taken: Any = implementation
        expose(Counter, taken)
    native: Any = Native()
    with pytest.raises(TypeError, match="count: it is not async"):
        expose(Counter, native)
