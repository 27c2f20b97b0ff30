"""Streams of arguments: pulled, slowed, cut short, failing."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from bokbok_trio import RemoteError

from ..support.helpers import settle
from ..support.logs import Line, NoSuchLog, Source, check_usable, count, encode, open_logs


class Bare:
    """An iterator that cannot be closed."""

    def __init__(self) -> None:
        self._number = 0

    def __aiter__(self) -> AsyncIterator[Line]:
        return self

    async def __anext__(self) -> Line:
        self._number += 1
        if self._number > 3:
            raise StopAsyncIteration
        return Line(self._number)


async def test_a_stream_is_pulled_and_its_iterator_closed() -> None:
    async with open_logs() as (logs, implementation, client):
        source = Source(5)
        assert await logs.upload("", source) == 5
        assert [line.number for line in implementation.received] == [1, 2, 3, 4, 5]
        assert source.closed == 1
        implementation.received.clear()
        assert await logs.upload("", lines=count(2)) == 2
        implementation.received.clear()
        assert await logs.upload("", Bare()) == 3
        await check_usable(logs, client)


async def test_a_memory_channel_is_a_stream_too() -> None:
    async with open_logs() as (logs, _implementation, _):
        send, receive = trio.open_memory_channel[Line](3)
        await send.send(Line(1))
        await send.aclose()
        assert await logs.upload("", receive) == 1
        with pytest.raises(trio.ClosedResourceError):
            await receive.receive()


@pytest.mark.parametrize("name", ["ignore", "one", "close"])
async def test_a_method_need_not_read_all(name: str) -> None:
    async with open_logs() as (logs, _, client):
        source = Source(10**6)
        assert await logs.upload(name, source) in {-1, 0, 1}
        assert source.closed == 1
        assert source.yielded < 2000
        await check_usable(logs, client)


async def test_a_slow_method_slows_the_stream(autojump_clock: MockClock) -> None:
    async with open_logs() as (logs, _, _):
        source = Source(2000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(logs.upload, "slow", source)
            await settle()
            assert 100 < source.yielded < 1000
            await trio.sleep(5)
            assert source.yielded < 1000
        assert source.yielded == 2000


@pytest.mark.parametrize(("name", "error"), [("missing", NoSuchLog), ("failing", RemoteError)])
async def test_a_failing_method_ends_the_stream(name: str, error: type[Exception]) -> None:
    async with open_logs() as (logs, _, client):
        source = Source(10**6)
        with pytest.raises(error):
            await logs.upload(name, source)
        assert source.closed == 1
        await check_usable(logs, client)


async def test_what_a_stream_raises_comes_out_of_the_call_and_cancels_the_method() -> None:
    async with open_logs() as (logs, implementation, client):
        source = Source(3, fails=True)
        with pytest.raises(KeyError, match="no more"):
            await logs.upload("", source)
        assert source.closed == 1
        await implementation.ended.wait()
        assert implementation.outcome == "Cancelled"
        await check_usable(logs, client)


async def test_what_closing_a_stream_raises_comes_out_too() -> None:
    class Sticky(Source):
        async def aclose(self) -> None:
            raise OSError("cannot close")

    async with open_logs() as (logs, _, client):
        with pytest.raises(OSError, match="cannot close"):
            await logs.upload("", Sticky(3))
        await check_usable(logs, client)


@pytest.mark.parametrize("wrong", [[Line(1)], 3, None])
async def test_what_is_no_stream_is_a_type_error(wrong: Any) -> None:
    async with open_logs() as (logs, _, client):
        with pytest.raises(TypeError, match="async"):
            await logs.upload("", wrong)
        await check_usable(logs, client)


async def test_an_item_that_cannot_be_one_is_told_here() -> None:
    async def wrong() -> AsyncGenerator[Any]:
        yield Line(1)
        yield "x"

    async with open_logs() as (logs, implementation, client):
        with pytest.raises(
            TypeError, match=r"Logs.upload was sent a value that its interface does not allow: .*got str"
        ):
            await logs.upload("", wrong())
        await implementation.ended.wait()
        await check_usable(logs, client)


@pytest.mark.parametrize("item", [[b"\xc1"], [], [encode({"number": "x"})], [encode({"number": 1}), b""]])
async def test_an_item_that_cannot_be_one_is_a_bad_argument_there(item: list[bytes]) -> None:
    async with open_logs() as (_, implementation, client):
        with pytest.raises(
            RemoteError, match=r"Logs.upload was sent a value that its interface does not allow"
        ) as caught:
            async with client.open_channel(["%call", "Logs.upload", encode({"name": ""})]) as channel:
                await channel.send(item)
                await channel.answer()
        assert caught.value.code == "bad-arguments"
        assert implementation.received == []


async def test_a_cancelled_call_closes_the_stream_and_cancels_the_method(
    autojump_clock: MockClock,
) -> None:
    async with open_logs() as (logs, implementation, client):
        source = Source(10**6, pause=0.1)
        with trio.move_on_after(1) as scope:
            await logs.upload("", source)
        assert scope.cancelled_caught
        assert source.closed == 1
        await implementation.ended.wait()
        assert implementation.outcome == "Cancelled"
        await check_usable(logs, client)


async def test_a_generator_that_waits_is_cancelled_with_the_call() -> None:
    outcome = ""

    async def waiting() -> AsyncGenerator[Line]:
        nonlocal outcome
        try:
            yield Line(1)
            await trio.sleep_forever()
        except trio.Cancelled:
            outcome = "cancelled"
            raise

    async with open_logs() as (logs, _, client):
        assert await logs.upload("one", waiting()) == 1
        assert outcome == "cancelled"
        await check_usable(logs, client)


async def test_a_stream_has_ended_for_a_method_that_has() -> None:
    async with open_logs() as (logs, implementation, _):
        assert await logs.upload("one", count(10)) == 1
        with pytest.raises(trio.ClosedResourceError):
            await implementation.kept.receive()


async def test_a_keyboard_interrupt_in_a_stream_comes_out() -> None:
    async def interrupted() -> AsyncGenerator[Line]:
        yield Line(1)
        raise KeyboardInterrupt

    async with open_logs() as (logs, _, _):
        with pytest.raises(KeyboardInterrupt):
            await logs.upload("", interrupted())


async def test_two_failures_at_once_come_as_a_group() -> None:
    class Exiting(BaseException):
        pass

    async def failing() -> AsyncGenerator[Line]:
        try:
            yield Line(1)
            await trio.sleep_forever()
        finally:
            raise Exiting

    async with open_logs() as (logs, _, _):
        with pytest.raises(BaseExceptionGroup) as caught:
            await logs.upload("failing", failing())
        assert {type(each) for each in caught.value.exceptions} == {RemoteError, Exiting}
