"""How the error of a handler reaches its asker, and what both sides keep of it."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager, suppress

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from bokbok_trio import Channel, Connection, RemoteError, RequestError, RequestHandler, Settings
from bokbok_trio.testing import open_connection_pair
from tests.support.pairs import open_pair, over_all_ways, settle

NOT_FOUND = ("no such thing", "not-found", b"\x00details\xff")


async def raise_soon(error: BaseException) -> None:
    await trio.lowlevel.checkpoint()
    raise error


async def raise_now(error: BaseException) -> None:
    """Raise without a checkpoint, so that two tasks of a nursery both raise."""
    raise error


async def plainly() -> None:
    raise RequestError(*NOT_FOUND)


async def in_a_nursery() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(raise_soon, RequestError(*NOT_FOUND))


async def in_the_body_of_a_nursery() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)
        raise RequestError(*NOT_FOUND)


async def in_nested_nurseries() -> None:
    async with trio.open_nursery() as outer:
        outer.start_soon(trio.sleep_forever)
        async with trio.open_nursery() as middle:
            middle.start_soon(in_a_nursery)
            await trio.sleep_forever()


async def in_a_group_by_hand() -> None:
    raise ExceptionGroup("by hand", [ExceptionGroup("nested", [RequestError(*NOT_FOUND)])])


async def beside_cancellations() -> None:
    cancelled: list[trio.Cancelled] = []
    with trio.CancelScope() as scope:
        scope.cancel()
        try:
            await trio.lowlevel.checkpoint()
        except trio.Cancelled as exc:
            cancelled.append(exc)
            raise
    raise BaseExceptionGroup("both", [*cancelled, ExceptionGroup("nested", [RequestError(*NOT_FOUND)])])


async def while_cleaning_up() -> None:
    async with trio.open_nursery() as nursery:

        async def clean_up() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise RequestError(*NOT_FOUND)

        nursery.start_soon(clean_up)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


FROM_NURSERIES = [
    plainly,
    in_a_nursery,
    in_the_body_of_a_nursery,
    in_nested_nurseries,
    in_a_group_by_hand,
    beside_cancellations,
    while_cleaning_up,
]


def handler_of(work: Callable[[], Awaitable[object]]) -> RequestHandler:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        await work()

    return handler


async def ask(connection: Connection, *, by_channel: bool) -> list[bytes]:
    if not by_channel:
        return await connection.request([])
    async with connection.open_channel([]) as channel:
        return await channel.answer()


@contextmanager
def both_handlers(
    work: Callable[[], Awaitable[object]],
) -> Generator[tuple[RequestHandler, Callable[[Connection, list[bytes], Channel], Awaitable[None]]]]:
    """A request handler and a channel handler that do the same."""

    async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> None:
        await work()

    yield handler_of(work), channel_handler


@over_all_ways
@pytest.mark.parametrize("work", FROM_NURSERIES)
@pytest.mark.parametrize("by_channel", [False, True])
async def test_a_request_error_out_of_nurseries_is_the_answer(
    way: str, work: Callable[[], Awaitable[None]], by_channel: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with both_handlers(work) as (handler, channel_handler):
        async with open_pair(way, None, handler, server_channel_handler=channel_handler) as (client, _):
            with trio.fail_after(5), pytest.raises(RemoteError) as caught:
                await ask(client, by_channel=by_channel)
    assert (caught.value.message, caught.value.code, caught.value.details) == NOT_FOUND
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("by_channel", [False, True])
async def test_two_request_errors_at_once_are_no_answer(
    by_channel: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(raise_now, RequestError("one", "first"))
            nursery.start_soon(raise_now, RequestError("two", "second"))

    with both_handlers(work) as (handler, channel_handler):
        async with open_pair("tcp plain", None, handler, server_channel_handler=channel_handler) as (
            client,
            _,
        ):
            with trio.fail_after(5), pytest.raises(RemoteError) as caught:
                await ask(client, by_channel=by_channel)
    assert caught.value.code == "handler-error"
    assert "ERROR" in {record.levelname for record in caplog.records}


async def test_a_request_error_beside_another_error_is_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(raise_now, RequestError("one", "first"))
            nursery.start_soon(raise_now, ValueError("a defect"))

    async with open_pair("tcp plain", None, handler_of(work)) as (client, _):
        with trio.fail_after(5), pytest.raises(RemoteError) as caught:
            await client.request([])
    assert caught.value.code == "handler-error"
    assert "a defect" in caplog.text


async def test_describe_error_gets_the_only_error_of_a_group() -> None:
    described: list[BaseException] = []

    def describe(error: BaseException) -> str:
        described.append(error)
        return "described"

    async def work() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(raise_soon, KeyError("lonely"))

    async with open_pair(
        "tcp plain", None, handler_of(work), server_settings=Settings(describe_error=describe)
    ) as (client, _):
        with pytest.raises(RemoteError, match="described"):
            await client.request([])
    assert [type(error) for error in described] == [KeyError]


# ---- a handler's own "timeout" ----


@over_all_ways
@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("deadline", [30, 5, 3600, None])
async def test_a_handlers_own_timeout_arrives_at_once(
    way: str, by_channel: bool, deadline: float | None
) -> None:
    async def work() -> None:
        raise RequestError("the database took too long", "timeout", b"db")

    with both_handlers(work) as (handler, channel_handler):
        async with open_pair(way, None, handler, server_channel_handler=channel_handler) as (client, _):
            begin = trio.current_time()
            with trio.CancelScope() as scope:
                if deadline is not None:
                    scope.deadline = begin + deadline
                with pytest.raises(RemoteError) as caught:
                    await ask(client, by_channel=by_channel)
            assert trio.current_time() - begin < 1
    assert (caught.value.code, caught.value.details) == ("timeout", b"db")


@pytest.mark.parametrize("by_channel", [False, True])
async def test_a_timeout_near_our_own_deadline_is_our_own(
    by_channel: bool, autojump_clock: MockClock
) -> None:
    async def work() -> None:
        await trio.sleep(9.97)
        raise RequestError("too long", "timeout")

    with both_handlers(work) as (handler, channel_handler):
        async with open_connection_pair(None, handler, server_channel_handler=channel_handler) as (client, _):
            with trio.move_on_after(10) as scope:
                await ask(client, by_channel=by_channel)
            assert scope.cancelled_caught
            assert trio.current_time() == pytest.approx(10)


@pytest.mark.parametrize("method", ["send", "receive", "iterate", "answer"])
@pytest.mark.parametrize("is_near", [False, True])
async def test_each_method_of_a_channel_shows_a_timeout_alike(
    method: str, is_near: bool, autojump_clock: MockClock
) -> None:
    async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> None:
        await trio.sleep(9.97 if is_near else 1)
        raise RequestError("too long", "timeout")

    async def act(channel: Channel) -> None:
        match method:
            case "send":
                while True:
                    await channel.send([bytes(100_000)])
            case "receive":
                await channel.receive()
            case "iterate":
                async for _ in channel:
                    pass
            case _:
                await channel.answer()

    async with open_connection_pair(server_channel_handler=channel_handler) as (client, _):
        with trio.move_on_after(10) as scope:
            async with client.open_channel([]) as channel:
                with pytest.raises((RemoteError, trio.BrokenResourceError)) as caught:
                    await act(channel)
                error = caught.value if method == "answer" else caught.value.__cause__
                assert isinstance(error, RemoteError)
                assert error.code == "timeout"
        assert scope.cancelled_caught is is_near
        assert trio.current_time() == pytest.approx(10 if is_near else 1)


@pytest.mark.parametrize("hops", [1, 2, 3])
@pytest.mark.parametrize("deadline", [30, None])
async def test_a_timeout_over_several_hops(hops: int, deadline: float | None) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        n = int(request[0])
        if n == 0:
            raise RequestError("too long", "timeout", b"x")
        try:
            return await connection.request([str(n - 1)])
        except RemoteError as exc:
            raise RequestError(exc.message, code=exc.code, details=exc.details) from exc

    async with open_pair("tcp sealed", handler, handler) as (client, _):
        begin = trio.current_time()
        with trio.CancelScope() as scope, pytest.raises(RemoteError) as caught:
            if deadline is not None:
                scope.deadline = begin + deadline
            await client.request([str(hops)])
        assert trio.current_time() - begin < 1
    assert (caught.value.message, caught.value.code, caught.value.details) == ("too long", "timeout", b"x")


# ---- what is no Exception ----


class Panic(BaseException):
    """An exception like those of extensions in other languages."""


@over_all_ways
@pytest.mark.parametrize(
    "make",
    [
        Panic,
        asyncio.CancelledError,
        GeneratorExit,
        lambda: BaseExceptionGroup("several", [Panic("panic"), ValueError()]),
        lambda: StopAsyncIteration("x"),
        lambda: MemoryError("x"),
    ],
)
@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("by_channel", [False, True])
async def test_what_is_no_exit_ends_one_handler_only(
    way: str, make: Callable[[], BaseException], waits: bool, by_channel: bool
) -> None:
    async def work() -> None:
        if waits:
            await trio.lowlevel.checkpoint()
        raise make()

    async def sleep(connection: Connection, request: list[bytes]) -> list[bytes]:
        if request:
            await trio.sleep(0.01)
            return request
        await work()
        raise AssertionError("not reached")

    async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> None:
        await work()

    async with open_pair(way, None, sleep, server_channel_handler=channel_handler) as (client, server):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.request, ["other"])
            await trio.testing.wait_all_tasks_blocked(0.001)
            for _ in range(2):
                with trio.fail_after(5), pytest.raises(RemoteError) as caught:
                    await ask(client, by_channel=by_channel)
                assert caught.value.code == "handler-error"
        assert not server.closed
        assert await client.request(["x"]) == [b"x"]


# ---- what is kept ----


MADE_ONCE = RequestError("made once")
MADE_ONCE_TOO = ValueError("made once")


@pytest.mark.parametrize("error", [MADE_ONCE, MADE_ONCE_TOO], ids=["RequestError", "ValueError"])
@pytest.mark.parametrize("by_group", [False, True])
async def test_an_error_that_is_made_once_gathers_no_tracebacks(error: Exception, by_group: bool) -> None:
    async def work() -> None:
        if by_group:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(raise_soon, error)
        await raise_soon(error)

    def length() -> int:
        count, traceback = 0, error.__traceback__
        while traceback is not None:
            count, traceback = count + 1, traceback.tb_next
        return count

    async with open_pair("tcp plain", None, handler_of(work)) as (client, server):
        for _ in range(10):
            with pytest.raises(RemoteError):
                await client.request([])
        await settle(client, server)
        assert length() == 0
        assert error.__context__ is None


@over_all_ways
@pytest.mark.parametrize("by_channel", [False, True])
async def test_errors_and_cancellations_leave_no_cycles(
    way: str, by_channel: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, logger="bokbok_trio")  # a log record that is kept keeps frames

    async def handle(request: list[bytes]) -> list[bytes]:
        match request[0]:
            case b"error":
                raise ValueError("oops")
            case b"request error":
                await trio.lowlevel.checkpoint()
                raise RequestError("no")
            case b"sleep":
                await trio.sleep_forever()
        return request

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        return await handle(request)

    async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
        return await handle(request)

    async def once(client: Connection, what: str, turns: int) -> None:
        """Make a request, and cancel it after so many turns of the event loop."""

        async def cancel() -> None:
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            scope.cancel()

        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cancel)
                with suppress(RemoteError):
                    if by_channel:
                        async with client.open_channel([what]) as channel:
                            await channel.answer()
                    else:
                        await client.request([what])

    async def all_ways(client: Connection, server: Connection) -> None:
        for turns in range(12):
            for what in ("error", "request error", "sleep", "fine"):
                await once(client, what, turns)
        await settle(client, server)

    async with open_pair(way, None, handler, server_channel_handler=channel_handler) as (client, server):
        await all_ways(client, server)
        gc.collect()
        gc.disable()
        try:
            await all_ways(client, server)
            assert gc.collect() == 0
        finally:
            gc.enable()


# ---- details ----


@over_all_ways
@pytest.mark.parametrize("details", [b"", b"\x00", bytes(range(256)) * 64])
@pytest.mark.parametrize("by_channel", [False, True])
async def test_details_arrive(way: str, details: bytes, by_channel: bool) -> None:
    async def work() -> None:
        raise RequestError("with details", "some-code", details)

    with both_handlers(work) as (handler, channel_handler):
        async with open_pair(way, None, handler, server_channel_handler=channel_handler) as (client, _):
            with pytest.raises(RemoteError) as caught:
                await ask(client, by_channel=by_channel)
    assert caught.value.details == details


async def test_details_that_do_not_fit_the_agreed_size_are_left_out_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work() -> None:
        raise RequestError("m" * 3000, "some-code", bytes(2**14))

    small = Settings(max_message_size=4096)
    async with open_pair("tcp plain", None, handler_of(work), client_settings=small) as (client, _):
        with pytest.raises(RemoteError) as caught:
            await client.request([])
    assert (caught.value.code, caught.value.details) == ("some-code", b"")
    assert caught.value.message == "m" * 2048
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "16384" in record.message


@pytest.mark.parametrize("details", [bytes(2**14 + 1), "text", None, bytearray(3)])
def test_details_that_cannot_be_sent_are_refused(details: object) -> None:
    with pytest.raises((TypeError, ValueError), match="details"):
        RequestError("m", "c", details)  # type: ignore[arg-type]


# ---- what a peer says is shown in one line ----


@over_all_ways
@pytest.mark.parametrize("by_channel", [False, True])
async def test_control_characters_of_a_peer_are_escaped(
    way: str, by_channel: bool, caplog: pytest.LogCaptureFixture
) -> None:
    evil = "a\nb\rc\x1b[31md\x00e\u202ef\u2028g\x7fh\u009b"

    async def work() -> None:
        raise RequestError(evil, "c\nd")

    with both_handlers(work) as (handler, channel_handler):
        async with open_pair(way, None, handler, server_channel_handler=channel_handler) as (client, _):
            with pytest.raises(RemoteError) as caught:
                await ask(client, by_channel=by_channel)
            assert caught.value.message == evil
            assert str(caught.value).isprintable()
            assert str(caught.value).startswith("a\\nb\\r")
            if by_channel:
                async with client.open_channel([]) as channel:
                    with pytest.raises(trio.BrokenResourceError) as broken:
                        await channel.receive()
                    assert str(broken.value).isprintable()
    assert all(record.message.isprintable() for record in caplog.records)
