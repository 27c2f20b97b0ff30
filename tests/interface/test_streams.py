"""Streams of arguments and of results: in order, slowed, cut short, failing, on either side."""

from __future__ import annotations

import gc
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import pytest
import trio
from trio.abc import ReceiveChannel
from trio.testing import MockClock

from bokbok_trio import (
    Channel,
    Connection,
    ConnectionClosed,
    ConnectionLost,
    MessageTooLarge,
    ProtocolError,
    RemoteError,
    RequestError,
    Settings,
)
from bokbok_trio.interface import consume, expose, raises
from bokbok_trio.testing import consume_local, open_connection_pair
from tests.support.helpers import needs_safe_channel, settle

encode = msgspec.msgpack.encode


@dataclass
class Line:
    number: int
    text: str = ""


@dataclass
class NoSuchLog(Exception):
    name: str


class Logs(Protocol):
    @raises(NoSuchLog)
    def follow(self, name: str, start: int = 0) -> AbstractAsyncContextManager[ReceiveChannel[Line]]: ...
    @raises(NoSuchLog)
    async def upload(self, name: str, lines: AsyncIterable[Line]) -> int: ...
    @raises(NoSuchLog)
    def number(
        self, lines: AsyncIterable[str], mode: str = ""
    ) -> AbstractAsyncContextManager[ReceiveChannel[Line]]: ...
    async def plain(self) -> int: ...


class Implementation:
    """Each name has one way to behave."""

    def __init__(self) -> None:
        self.sent = 0
        self.received: list[Line] = []
        self.ended = trio.Event()
        self.outcome = ""
        self.kept: Any = None

    async def follow(self, name: str, start: int = 0) -> AsyncGenerator[Line]:  # noqa: PLR0912
        try:
            match name:
                case "none":
                    return
                case "missing":
                    raise NoSuchLog(name)
                case "endless":
                    while True:
                        yield Line(self.sent, "x" * 1000)
                        self.sent += 1
                case "stuck":
                    await trio.sleep_forever()
                case "wrong":
                    yield Line(1)
                    yield {"number": "x"}  # type: ignore[misc]
                case "timeout":
                    with trio.move_on_after(5):
                        for number in range(3):
                            yield Line(number)
                            await trio.sleep(2)
                    yield Line(99)
                    return
                case "nursery":
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self.crash)
                        while True:
                            yield Line(0, "x" * 10000)
                case "big":
                    yield Line(1, "x" * 2**13)
            for number in range(start, start + 3):
                yield Line(number)
            match name:
                case "failing":
                    raise ValueError("no more")
                case "declared":
                    raise NoSuchLog(name)
                case "request":
                    raise RequestError("gone", code="gone")
        except BaseException as exc:
            self.outcome = type(exc).__name__
            raise
        finally:
            self.ended.set()

    async def crash(self) -> None:
        await trio.sleep(1)
        raise NoSuchLog("crashed")

    async def upload(self, name: str, lines: AsyncIterable[Line]) -> int:
        self.kept = lines
        try:
            match name:
                case "ignore":
                    return -1
                case "missing":
                    raise NoSuchLog(name)
                case "one":
                    async for line in lines:
                        self.received.append(line)
                        return 1
                case "slow":
                    await trio.sleep(10)
                case "close":
                    channel: Any = lines
                    await channel.aclose()
                    with pytest.raises(trio.ClosedResourceError):
                        await channel.receive()
                    return 0
            async for line in lines:
                self.received.append(line)
                if name == "failing":
                    raise ValueError("cannot take it")
            return len(self.received)
        except BaseException as exc:
            self.outcome = type(exc).__name__
            raise
        finally:
            self.ended.set()

    async def number(self, lines: AsyncIterable[str], mode: str = "") -> AsyncGenerator[Line]:
        try:
            if mode == "close":
                channel: Any = lines
                async with trio.open_nursery() as nursery:

                    @nursery.start_soon
                    async def receive() -> None:
                        with pytest.raises(trio.ClosedResourceError):
                            await channel.receive()

                    await trio.sleep(1)
                    await channel.aclose()
                with pytest.raises(trio.ClosedResourceError):
                    await channel.receive()
                yield Line(7)
                return
            number = 0
            async for line in lines:
                yield Line(number, line)
                number += 1
        except BaseException as exc:
            self.outcome = type(exc).__name__
            raise
        finally:
            self.ended.set()

    async def plain(self) -> int:
        return 1


@asynccontextmanager
async def open_logs(**settings: Any) -> AsyncGenerator[tuple[Logs, Implementation, Connection]]:
    logs: Any = Implementation()
    async with open_connection_pair(server_handler=expose(Logs, logs), **settings) as (client, _):
        yield consume(client, Logs), logs, client


async def count(up_to: int, pause: float = 0) -> AsyncGenerator[Line]:
    for number in range(up_to):
        yield Line(number)
        await trio.sleep(pause)


async def texts(up_to: int) -> AsyncGenerator[str]:
    for number in range(up_to):
        yield f"{number:1000}"


async def check_usable(logs: Logs, connection: Connection) -> None:
    """All that a call took has been given back."""
    await settle()
    assert await logs.plain() == 1
    await settle()
    statistics = connection.statistics()
    assert (statistics.used_slots, statistics.handlers_running) == (0, 0)


# ---- results ----


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
    """Its block is left by a GeneratorExit, and what the block has to wait for is waited for."""
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
    """Streams by a block."""

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


# ---- arguments ----


class Source:
    """An async iterable that knows what became of its iterator."""

    def __init__(self, up_to: int, *, fails: bool = False, pause: float = 0) -> None:
        self.yielded = 0
        self.closed = 0
        self._up_to = up_to
        self._fails = fails
        self._pause = pause

    def __aiter__(self) -> Source:
        return self

    async def __anext__(self) -> Line:
        await trio.sleep(self._pause)
        if self.yielded == self._up_to:
            if self._fails:
                raise KeyError("no more")
            raise StopAsyncIteration
        self.yielded += 1
        return Line(self.yielded, "x" * 1000)

    async def aclose(self) -> None:
        self.closed += 1


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


# ---- both ----


async def test_a_method_may_stream_both_ways() -> None:
    async with open_logs() as (logs, _, client):
        async with logs.number(texts(100)) as lines:
            assert [line async for line in lines] == [Line(number, f"{number:1000}") for number in range(100)]
        await check_usable(logs, client)


async def test_leaving_the_block_ends_both() -> None:
    async with open_logs() as (logs, implementation, client):
        for up_to in (3, 10**9):  # all was sent, or not
            implementation.ended = trio.Event()
            async with aclosing(texts(up_to)) as source:
                async with logs.number(source) as lines:
                    await lines.receive()
                    await settle()
                await implementation.ended.wait()
        await check_usable(logs, client)


async def test_a_failing_stream_ends_the_block() -> None:
    async def failing() -> AsyncGenerator[str]:
        yield "a"
        raise KeyError("no more")

    async with open_logs() as (logs, _, client):
        with pytest.raises(KeyError, match="no more"):
            async with logs.number(failing()) as lines:
                await lines.receive()
                await trio.sleep_forever()
        await check_usable(logs, client)


async def test_closing_one_stream_leaves_the_other(autojump_clock: MockClock) -> None:
    async with open_logs() as (logs, _implementation, client):
        async with logs.number(texts(0), mode="close") as lines:
            with pytest.raises(RemoteError):
                await lines.receive()  # the caller's stream had ended: there was no time to close it

        async def later() -> AsyncGenerator[str]:
            await trio.sleep(100)
            yield "late"

        async with logs.number(later(), mode="close") as lines:
            assert [line async for line in lines] == [Line(7)]
        await check_usable(logs, client)


async def test_closing_the_results_ends_the_arguments() -> None:
    async with open_logs() as (logs, _, client):
        async with logs.number(texts(10**9)) as lines:
            await lines.receive()
            await lines.aclose()
            await settle()
        await check_usable(logs, client)


# ---- calls and channels that do not fit ----


@pytest.mark.parametrize("name", [b"Logs.follow", b"Logs.upload"])
async def test_a_stream_without_a_channel_is_refused(name: bytes) -> None:
    async with open_logs() as (_, _, client):
        with pytest.raises(RemoteError, match="streams, and takes a channel") as caught:
            await client.request([b"%call", name, encode({"name": ""})])
        assert caught.value.code == "bad-arguments"


async def test_a_channel_without_a_stream_is_refused() -> None:
    async with open_logs() as (_, _, client):
        with pytest.raises(RemoteError, match=r"Logs.plain streams nothing, and takes no channel") as caught:
            async with client.open_channel(["%call", "Logs.plain", b"\x80"]) as channel:
                await channel.answer()
        assert caught.value.code == "bad-arguments"


# ---- the end of the connection ----


@pytest.mark.parametrize("ends_here", [True, False])
async def test_a_stream_breaks_with_its_connection(ends_here: bool) -> None:
    logs: Any = Implementation()
    async with open_connection_pair(server_handler=expose(Logs, logs)) as (client, server):
        async with consume(client, Logs).follow("stuck") as lines:
            await settle()
            await (client if ends_here else server).aclose()
            with pytest.raises(ConnectionClosed if ends_here else ConnectionLost):
                while True:
                    await lines.receive()


async def test_an_upload_breaks_with_its_connection(autojump_clock: MockClock) -> None:
    logs: Any = Implementation()
    async with open_connection_pair(server_handler=expose(Logs, logs)) as (client, server):
        source = Source(10**6, pause=0.1)

        async def close() -> None:
            await trio.sleep(1)
            await server.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(close)
            with pytest.raises(ConnectionLost):
                await consume(client, Logs).upload("", source)
        assert source.closed == 1


@pytest.mark.parametrize(
    "wrong", [[Line(1)], iter([Line(1)]), None, 3], ids=["list", "iterator", "None", "int"]
)
async def test_what_is_no_stream_is_told_before_anything_is_sent(wrong: Any) -> None:
    async with consume_local(Logs, Implementation()) as logs:
        with pytest.raises(
            TypeError, match=r"Logs\.upload: lines is a stream, and .* does not work with 'async for'"
        ):
            await logs.upload("a", wrong)
        with pytest.raises(TypeError, match=r"Logs\.number: lines is a stream"):
            async with logs.number(wrong):
                raise AssertionError
