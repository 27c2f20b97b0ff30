"""Stand-ins: their appearance, and the interfaces that they can be made of."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, Protocol

import pytest

from bokbok_trio import ConnectionLost, RemoteError
from bokbok_trio.interface import Exposed, expose
from bokbok_trio.testing import consume_local

from ..support.helpers import open_peer
from ..support.job_queue import Job, Jobs, NoSuchJob, Queue, T, open_jobs


async def test_a_stand_in_shows_what_it_is() -> None:
    async with open_jobs() as (jobs, _, _):
        assert repr(jobs).startswith("<stand-in of Jobs over <bokbok_trio.Connection client")
        assert type(jobs).__doc__ == "A queue."
        assert jobs.total.__name__ == "total"
        assert jobs.total.__qualname__ == "Jobs.total"
        assert str(inspect.signature(jobs.total)) == "(a: 'int', b: 'int' = 2, c: 'int' = 3) -> 'int'"
        assert inspect.iscoroutinefunction(jobs.total)
        assert [name for name in dir(jobs) if not name.startswith("_")] == sorted(
            ["add", "total", "find", "fail", "wrong", "anything", "sleep"]
        )


async def test_a_stand_in_can_be_served_on() -> None:
    async with open_jobs() as (jobs, _, _):
        async with consume_local(Jobs, jobs) as passed_on:
            assert await passed_on.total(1, c=1) == 22
            with pytest.raises(RemoteError):
                await passed_on.fail("x")
            with pytest.raises(NoSuchJob):
                await passed_on.find("a")


class OldStyle(ABC):
    @abstractmethod
    async def double(self, number: int) -> int: ...

    async def triple(self, number: int) -> int:
        return 3 * number


class Doubler(OldStyle):
    async def double(self, number: int) -> int:
        return 2 * number


class Store(Protocol[T]):
    async def swap(self, value: T) -> T: ...


class JobStore:
    async def swap(self, value: Job) -> Job:
        assert isinstance(value, Job)
        return Job(value.name + "!")


async def test_other_classes_and_generic_ones_can_be_served_and_called() -> None:
    async with consume_local(OldStyle, Doubler()) as numbers:
        assert (await numbers.double(2), await numbers.triple(2)) == (4, 6)
    async with consume_local(Store[Job], JobStore()) as store:
        assert await store.swap(Job("a")) == Job("a!")


class Temperatures(Protocol):
    async def warmer(self, degrees: Celsius, by: float = 1) -> list[Celsius]: ...


class Celsius:
    def __init__(self, degrees: float) -> None:
        self.degrees = degrees


class Weather:
    async def warmer(self, degrees: Celsius, by: float = 1) -> list[Celsius]:
        return [degrees, Celsius(degrees.degrees + by)]


async def test_hooks_let_other_types_travel() -> None:
    def encode_hook(value: Any) -> Any:
        return value.degrees

    def decode_hook(cls: type, value: Any) -> Any:
        return cls(value)

    async with consume_local(
        Temperatures, Weather(), encode_hook=encode_hook, decode_hook=decode_hook
    ) as weather:
        assert [each.degrees for each in await weather.warmer(Celsius(20), by=0.5)] == [20, 20.5]
    for hooks in ({}, {"encode_hook": encode_hook}, {"decode_hook": decode_hook}):
        with pytest.raises(TypeError, match="Celsius does not travel"):
            expose(Temperatures, Weather(), **hooks)


async def test_what_a_hook_raises_comes_out_of_the_call() -> None:
    def encode_hook(value: Any) -> Any:
        raise KeyError("unknown unit")

    async with consume_local(
        Temperatures, Weather(), encode_hook=encode_hook, decode_hook=lambda _cls, value: value
    ) as weather:
        with pytest.raises(KeyError, match="unknown unit") as caught:
            await weather.warmer(Celsius(1))
        assert caught.value.__notes__ == ["in the argument degrees of Temperatures.warmer"]


async def test_a_lying_peer_breaks_nothing() -> None:
    async with open_peer(expose(Jobs, Queue())) as (_, peer):
        for id, arguments in enumerate([b"\x91" * 10**4, b"\xdd\xff\xff\xff\xff", b"\xc1", b""]):
            body = [b"%call", b"Jobs.anything", arguments]
            await peer.send(b"req", b"%d" % (2 * id + 1), b"", b"", b"", body=body)
            kind, _, code, *_ = await peer.receive()
            assert (kind, code) == (b"err", b"bad-arguments")


def test_exposed_is_what_expose_returns() -> None:
    assert isinstance(expose(Jobs, Queue()), Exposed)


async def test_what_the_block_raises_comes_out_of_consume_local() -> None:
    with pytest.raises(ConnectionLost):
        async with consume_local(Jobs, Queue()):
            raise ConnectionLost("mine")


class This(Protocol):
    async def add(this, self: int, other: int = 1) -> int: ...  # noqa: N805


class Other:
    async def add(this, self: int, other: int = 1) -> int:  # noqa: N805
        return self + other


async def test_a_parameter_may_be_called_self() -> None:
    async with consume_local(This, Other()) as stand_in:
        assert await stand_in.add(1) == 2
        assert await stand_in.add(self=1, other=2) == 3
        assert str(inspect.signature(stand_in.add)) == "(self: 'int', other: 'int' = 1) -> 'int'"
