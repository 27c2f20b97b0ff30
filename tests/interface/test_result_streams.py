"""Streams of results: in order, slowed, cut short, failing."""

from __future__ import annotations

import gc
import weakref
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from bokbok_trio import Channel, Connection, MessageTooLarge, ProtocolError, RemoteError, Settings
from bokbok_trio.interface import consume
from bokbok_trio.testing import consume_local, open_connection_pair

from ..support.helpers import needs_safe_channel, settle
from ..support.logs import (
    Implementation,
    Line,
    Logs,
    NoSuchLog,
    check_usable,
    count,
    encode,
    open_logs,
    texts,
)


async def test_items_come_in_order_and_end() -> None:
    async with open_logs() as (logs, _, client):
        async with logs.follow("", start=5) as lines:
            assert [line async for line in lines] == [Line(5), Line(6), Line(7)]
            with pytest.raises(trio.EndOfChannel):
                await lines.receive()
        async with logs.follow("none") as lines:
            assert [line async for line in lines] == []
        await check_usable(logs, client)


async def test_leaving_the_block_cancels_the_method() -> None:
    async with open_logs() as (logs, implementation, client):
        async with logs.follow("endless") as lines:
            assert (await lines.receive()).number == 0
        await implementation.ended.wait()
        assert implementation.outcome in {"Cancelled", "GeneratorExit"}
        await check_usable(logs, client)
        with pytest.raises(trio.ClosedResourceError):
            await lines.receive()


async def test_a_method_that_is_cancelled_is_no_cyclic_garbage() -> None:
    class Held:
        """Something."""

    held: list[weakref.ref[Held]] = []

    class Holding(Implementation):
        async def follow(self, name: str, start: int = 0) -> AsyncGenerator[Line]:
            something = Held()
            held.append(weakref.ref(something))
            try:
                while True:
                    yield Line(0)
            finally:
                self.ended.set()

    holding = Holding()
    async with consume_local(Logs, holding) as logs:
        gc.collect()
        gc.disable()
        try:
            async with logs.follow("") as lines:
                await lines.receive()
            await holding.ended.wait()
            await settle()
            assert [each() for each in held] == [None]
        finally:
            gc.enable()


async def test_so_does_closing_the_stream() -> None:
    async with open_logs() as (logs, implementation, client):
        async with logs.follow("endless") as lines:
            await settle()
            await lines.aclose()
            await implementation.ended.wait()
            with pytest.raises(trio.ClosedResourceError):
                await lines.receive()
        await check_usable(logs, client)


async def test_what_the_block_raises_comes_out_and_cancels_the_method() -> None:
    async with open_logs() as (logs, implementation, client):
        error = KeyError("mine")
        with pytest.raises(KeyError) as caught:
            async with logs.follow("stuck"):
                await settle()
                raise error
        assert caught.value is error
        await implementation.ended.wait()
        assert implementation.outcome == "Cancelled"
        await check_usable(logs, client)


@pytest.mark.parametrize(
    "error",
    [
        RemoteError("x", "%NoSuchLog", encode({"name": "x"})),
        RemoteError("x", "no-reference"),
        StopAsyncIteration(),
        StopIteration(),
        GeneratorExit(),
        ExceptionGroup("of the block", [ValueError("x")]),
        BaseExceptionGroup("of the block", [KeyboardInterrupt()]),
    ],
)
async def test_an_error_of_the_blocks_own_is_not_taken_for_the_methods(error: BaseException) -> None:
    async with open_logs() as (logs, _, client):
        for block in (logs.follow("stuck"), logs.number(texts(10**9))):
            with pytest.raises(type(error)) as caught:
                async with block:
                    raise error
            if isinstance(error, BaseExceptionGroup):  # which cancel scopes copy
                assert isinstance(caught.value, BaseExceptionGroup)
                assert (caught.value.message, caught.value.exceptions) == (error.message, error.exceptions)
            else:
                assert caught.value is error
            await check_usable(logs, client)


@pytest.mark.parametrize("is_two_way", [False, True])
async def test_a_generator_may_be_closed_with_the_block_open_in_it(is_two_way: bool) -> None:
    """A GeneratorExit leaves its block, which may still wait."""
    source = texts(10**9)

    async def wrap(logs: Logs) -> AsyncGenerator[Line]:
        async with logs.number(source) if is_two_way else logs.follow("endless") as lines:
            async for line in lines:
                yield line

    async with open_logs() as (logs, implementation, client):
        async with aclosing(wrap(logs)) as wrapped:
            assert await anext(wrapped) is not None
        if is_two_way:
            with pytest.raises(StopAsyncIteration):
                await anext(source)
        await implementation.ended.wait()
        await check_usable(logs, client)


async def test_a_cancelled_block_cancels_the_method(autojump_clock: MockClock) -> None:
    async with open_logs() as (logs, implementation, client):
        with trio.move_on_after(1) as scope:
            async with logs.follow("stuck") as lines:
                await lines.receive()
        assert scope.cancelled_caught
        await implementation.ended.wait()
        await check_usable(logs, client)


async def test_a_time_limit_for_each_item_goes_around_receive(autojump_clock: MockClock) -> None:
    async with open_logs() as (logs, _, client):
        async with logs.follow("timeout") as lines:
            assert (await lines.receive()).number == 0
            with trio.move_on_after(1):
                await lines.receive()
            assert (await lines.receive()).number == 1
        await check_usable(logs, client)


async def test_a_slow_reader_slows_the_method(autojump_clock: MockClock) -> None:
    async with open_logs() as (logs, implementation, _):
        async with logs.follow("endless") as lines:
            await settle()
            stopped = implementation.sent
            assert 100 < stopped < 1000  # 256 KiB of them, and one
            await trio.sleep(5)
            assert implementation.sent == stopped
            for _ in range(stopped):
                await lines.receive()
            await settle()
            assert implementation.sent > stopped


@pytest.mark.parametrize(
    ("name", "error", "count"),
    [
        ("failing", RemoteError("ValueError: no more", "handler-error"), 3),
        ("declared", NoSuchLog("declared"), 3),
        ("missing", NoSuchLog("missing"), 0),
        ("request", RemoteError("gone", "gone"), 3),
    ],
)
async def test_errors_come_after_the_items_before_them(name: str, error: Exception, count: int) -> None:
    async with open_logs() as (logs, _, client):
        async with logs.follow(name) as lines:
            await settle()
            for number in range(count):
                assert await lines.receive() == Line(number)
            for _ in range(2):
                with pytest.raises(type(error)) as caught:
                    await lines.receive()
                assert str(caught.value) == str(error) or vars(caught.value) == vars(error)
        with pytest.raises(type(error)):
            async with logs.follow(name) as lines:
                [line async for line in lines]
        await check_usable(logs, client)


async def test_an_error_that_nobody_receives_is_not_raised() -> None:
    async with open_logs() as (logs, _, client):
        async with logs.follow("missing"):
            await settle()
        await check_usable(logs, client)


async def test_wrong_arguments_are_told_at_the_first_item() -> None:
    wrong: Any = 3
    async with open_logs() as (logs, implementation, client):
        async with logs.follow(wrong) as lines:
            with pytest.raises(RemoteError) as caught:
                await lines.receive()
        assert (caught.value.code, caught.value.message) == (
            "bad-arguments",
            "Logs.follow: $.name: expected str, got int",
        )
        assert not implementation.ended.is_set()
        with pytest.raises(TypeError, match="missing a required argument: 'name'"):
            logs.follow()  # type: ignore[call-arg]
        await check_usable(logs, client)


async def test_a_wrong_item_is_a_failure_of_the_implementation(caplog: pytest.LogCaptureFixture) -> None:
    async with open_logs() as (logs, implementation, _):
        async with logs.follow("wrong") as lines:
            assert (await lines.receive()).number == 1
            with pytest.raises(
                RemoteError, match=r"Logs.follow sent a value that its interface does not allow"
            ) as caught:
                await lines.receive()
        assert caught.value.code == "handler-error"
        assert implementation.outcome == "TypeError"  # which the generator could handle
    assert "expected int, got str" in caplog.text


async def test_too_large_items_are_told() -> None:
    async with open_logs(client_settings=Settings(max_message_size=2**12)) as (logs, implementation, _):
        async with logs.follow("big") as lines:
            with pytest.raises(RemoteError, match="MessageTooLarge"):
                await lines.receive()
        assert implementation.outcome == MessageTooLarge.__name__


async def test_scopes_that_a_generator_holds_while_it_yields_are_its_own(
    autojump_clock: MockClock,
) -> None:
    async with open_logs() as (logs, _, client):
        async with logs.follow("timeout") as lines:
            assert [line.number async for line in lines] == [0, 1, 2, 99]
        # Nobody reads: what cancels the sending is the generator's own nursery, and its error the answer.
        async with logs.follow("nursery") as lines:
            await trio.sleep(2)
            with pytest.raises(NoSuchLog) as caught:
                while True:
                    await lines.receive()
        assert caught.value.name == "crashed"
        await check_usable(logs, client)


async def test_a_block_can_be_entered_once() -> None:
    async with open_logs() as (logs, _, _):
        block = logs.follow("")
        async with block:
            pass
        with pytest.raises(
            RuntimeError, match=r"a stream of Logs.follow can be entered once; call the method again"
        ):
            async with block:
                raise AssertionError


async def test_a_block_that_is_never_entered_costs_nothing() -> None:
    async with open_logs() as (logs, _, client):
        logs.follow("endless")
        assert client.statistics().used_slots == 0
        gc.collect()  # no coroutine was left behind


async def test_wrong_items_of_the_peers_are_a_protocol_error() -> None:
    async def lie(connection: Connection, request: list[bytes], channel: Channel) -> None:
        await channel.send([encode({"number": "x"})])
        await channel.send([])
        await channel.send([encode({"number": 1}), b""])
        await channel.send([encode({"number": 1})])

    async with open_connection_pair(server_channel_handler=lie) as (client, _):
        async with consume(client, Logs).follow("") as lines:
            for _ in range(3):
                with pytest.raises(
                    ProtocolError, match=r"Logs.follow sent a value that our interface does not allow"
                ):
                    await lines.receive()
            assert await lines.receive() == Line(1)


class Blocks(Implementation):
    """Streams that are blocks."""

    @asynccontextmanager
    async def follow(self, name: str, start: int = 0) -> AsyncGenerator[Any]:  # type: ignore[override]
        try:
            if name == "generator":
                yield count(3)
            elif name == "failing":
                raise NoSuchLog(name)
            else:
                send, receive = trio.open_memory_channel[Line](0)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.fill, send, name)
                    yield receive
        finally:
            self.ended.set()

    async def fill(self, send: trio.MemorySendChannel[Line], name: str) -> None:
        async with send:
            for number in range(3):
                await send.send(Line(number))
            if name == "crash":
                raise NoSuchLog(name)


@pytest.mark.parametrize("name", ["generator", "channel"])
async def test_a_method_may_return_a_block(name: str) -> None:
    async with consume_local(Logs, Blocks()) as logs:
        async with logs.follow(name) as lines:
            assert [line async for line in lines] == [Line(0), Line(1), Line(2)]


@pytest.mark.parametrize("name", ["failing", "crash"])
async def test_a_block_may_fail(name: str) -> None:
    blocks = Blocks()
    async with consume_local(Logs, blocks) as logs:
        with pytest.raises(NoSuchLog):
            async with logs.follow(name) as lines:
                [line async for line in lines]
        assert blocks.ended.is_set()


async def test_a_method_that_returns_no_stream_is_a_failure() -> None:
    class Odd(Implementation):
        def follow(self, name: str, start: int = 0) -> Any:
            return [Line(1)]

    async with consume_local(Logs, Odd()) as logs:
        async with logs.follow("") as lines:
            with pytest.raises(
                RemoteError, match=r"TypeError: Logs.follow returned list, which is not a stream"
            ):
                await lines.receive()


@needs_safe_channel
async def test_a_safe_channel_streams() -> None:
    class Safe(Implementation):
        @trio.as_safe_channel
        async def follow(self, name: str, start: int = 0) -> AsyncGenerator[Line]:  # type: ignore[override]
            try:
                for number in range(3):
                    yield Line(number)
                if name == "failing":
                    raise NoSuchLog(name)
                if name == "endless":
                    await trio.sleep_forever()
            finally:
                self.ended.set()

    safe = Safe()
    async with consume_local(Logs, safe) as logs:
        async with logs.follow("") as lines:
            assert [line async for line in lines] == [Line(0), Line(1), Line(2)]
        async with logs.follow("failing") as lines:
            with pytest.raises(NoSuchLog):
                [line async for line in lines]
        safe.ended = trio.Event()
        async with logs.follow("endless") as lines:
            await lines.receive()
        await safe.ended.wait()
