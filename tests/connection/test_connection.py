from __future__ import annotations

import dataclasses
import gc
import logging
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

import bokbok_trio
from bokbok_trio import (
    Connection,
    ConnectionClosed,
    ConnectionLost,
    ConnectionStatistics,
    MessageTooLarge,
    RemoteError,
    Settings,
    open_connection,
    open_server,
)
from bokbok_trio._connection.ending import CLOSE_TIMEOUT
from bokbok_trio._connection.handlers import Handlers
from bokbok_trio._protocol.coalescing import EARLY_FLUSH_PACKETS
from bokbok_trio._protocol.queued_packet import HEAD_ROOM
from bokbok_trio._stream.socket import SocketStream
from bokbok_trio.testing import FaultyStream, MemoryListener, open_connection_pair
from tests.support.helpers import busy_handler, echo, packet, raw_peer, settle
from tests.support.inside import take_few


def faulty(into: list[FaultyStream]) -> Callable[[trio.abc.HalfCloseableStream], trio.abc.Stream]:
    """For `open_connection_pair(wrap=...)`."""

    def wrap(stream: trio.abc.HalfCloseableStream) -> trio.abc.Stream:
        into.append(FaultyStream(stream))
        return into[-1]

    return wrap


# ---- requests ----


async def test_requests_go_both_ways(sealed: bool) -> None:
    async with open_connection_pair(busy_handler, busy_handler, sealed=sealed) as (client, server):
        assert await client.request(["ping", "1"]) == [b"pong", b"1"]
        assert await server.request((b"ping", bytearray(b"2"))) == [b"pong", b"2"]


async def test_a_handler_calls_back_and_is_called_back(sealed: bool) -> None:
    async with open_connection_pair(busy_handler, busy_handler, sealed=sealed) as (client, _):
        assert await client.request(["back", "back", "back", "ping", "x"]) == [b"pong", b"x"]


async def test_a_handler_answers_while_its_background_callbacks_go_on(
    autojump_clock: trio.testing.MockClock,
) -> None:
    heard: list[list[bytes]] = []

    async def hear(connection: Connection, request: list[bytes]) -> None:
        await trio.lowlevel.checkpoint()
        heard.append(request)

    async def call_back(connection: Connection) -> None:
        for n in range(4):
            await trio.sleep(1)
            await connection.request(["called back", str(n)])

    async with trio.open_nursery() as nursery:

        async def handler(connection: Connection, request: list[bytes]) -> list[str]:
            await trio.lowlevel.checkpoint()
            nursery.start_soon(call_back, connection)
            return ["later"]

        async with open_connection_pair(hear, handler) as (client, _):
            assert await client.request(["asynch"]) == [b"later"]
            assert heard == []
            await trio.sleep(4.5)
    assert heard == [[b"called back", b"%d" % n] for n in range(4)]


async def test_many_requests_at_once_both_ways_with_few_slots(sealed: bool) -> None:
    few = Settings(max_requests=3)
    done: list[bytes] = []

    async def ask(connection: Connection, n: int) -> None:
        # Each asks back: with all slots of both sides taken, answers must still get through.
        [_, text] = await connection.request(["ping", str(n)])
        done.append(text)

    async with (
        open_connection_pair(
            busy_handler, busy_handler, sealed=sealed, client_settings=few, server_settings=few
        ) as pair,
        trio.open_nursery() as nursery,
    ):
        for n in range(100):
            nursery.start_soon(ask, pair[n % 2], n)
    assert sorted(done, key=int) == [b"%d" % n for n in range(100)]


async def test_fields_are_bytes_or_str_and_an_answer_may_be_none() -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[str | bytes] | None:
        await trio.lowlevel.checkpoint()
        return ["é", b"\xff"] if request else None

    async with open_connection_pair(server_handler=handler) as (client, _):
        assert await client.request(["x"]) == ["é".encode(), b"\xff"]
        assert await client.request([]) == []
        full = [b"x"] * 255
    async with open_connection_pair(server_handler=echo) as (client, _):
        assert await client.request(full) == full


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ("abc", TypeError),
        (b"abc", TypeError),
        (None, TypeError),
        ({"a"}, TypeError),
        (iter(["a"]), TypeError),
        ([1], TypeError),
        ([None], TypeError),
        (["a", ["b"]], TypeError),
        (["a"] * 256, ValueError),
        (["\ud800"], ValueError),
        ([bytes(5000)], MessageTooLarge),
    ],
)
async def test_a_bad_call_raises_and_sends_nothing(fields: Any, error: type[Exception]) -> None:
    small = Settings(max_message_size=4096)
    async with open_connection_pair(server_handler=echo, client_settings=small) as (client, server):
        server_session = server._session
        with pytest.raises(error):
            await client.request(fields)
        assert await client.request(["still"]) == [b"still"]
        for session in (server_session, client._session):
            assert session.local._max_body_size == session.remote._max_body_size == 4096 - HEAD_ROOM


async def test_an_answer_that_is_too_large_is_an_error_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        await trio.lowlevel.checkpoint()
        return [bytes(10000)]

    small = Settings(max_message_size=8192)
    async with open_connection_pair(server_handler=handler, client_settings=small) as (client, _):
        with pytest.raises(RemoteError, match=r"10005 bytes.* 8064") as caught:
            await client.request([])
        assert caught.value.code == "too-large"
    assert "the answer to request 0 is too large" in caplog.text


# ---- handlers that fail ----


async def crash_while_cancelled() -> None:
    async def crash() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise KeyError("crashed")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(crash)
        nursery.start_soon(trio.sleep_forever)
        await settle()
        nursery.cancel_scope.cancel()


async def raise_group() -> None:
    async with trio.open_nursery():
        raise ValueError("in a nursery")


def returning(value: object) -> Callable[[], Awaitable[Any]]:
    async def return_it() -> object:
        await trio.lowlevel.checkpoint()
        return value

    return return_it


def raising(error: BaseException) -> Callable[[], Awaitable[Any]]:
    async def raise_it() -> None:
        await trio.lowlevel.checkpoint()
        raise error

    return raise_it


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


NO_ANSWER = "TypeError: the handler returned what is no answer: "


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        (raising(ValueError("bad")), "ValueError: bad"),
        (raising(trio.TooSlowError()), "TooSlowError: "),
        (raising(MessageTooLarge(2, 1)), "MessageTooLarge: the message takes 2 bytes"),
        (raising(Unprintable()), "Unprintable"),
        (raise_group, "ValueError: in a nursery"),
        (crash_while_cancelled, "KeyError: 'crashed'"),
        (
            returning(7),
            NO_ANSWER + "pass a list of fields such as ['ping'], not int",
        ),
        (
            returning("text"),
            NO_ANSWER + "pass a list of fields such as ['ping'], not str",
        ),
        (
            returning([7]),
            NO_ANSWER + "a field is bytes or str, not int",
        ),
        (
            returning(["x"] * 256),
            "ValueError: the handler returned what is no answer: a packet has at most 255 fields",
        ),
        (lambda: 7, "TypeError: object int can't be used in 'await' expression"),
    ],
)
async def test_a_failing_handler_is_one_error_and_harms_nobody(
    behaviour: Callable[[], Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> Any:
        return (await behaviour()) if request == [b"fail"] else request

    async with open_connection_pair(server_handler=handler) as (client, server):
        with pytest.raises(RemoteError) as caught:
            await client.request(["fail"])
        assert caught.value.message.startswith(message)
        assert caught.value.code == "handler-error"
        assert await client.request(["alive"]) == [b"alive"]
        assert server._session.handling == 0
    failures = [record for record in caplog.records if "the handler of request 0 failed" in record.message]
    assert len(failures) == 1
    assert failures[0].exc_info is not None


async def test_a_request_error_is_the_answer_and_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    async with open_connection_pair(server_handler=busy_handler) as (client, _):
        with pytest.raises(RemoteError, match="unknown request") as caught:
            await client.request(["what?"])
    assert (caught.value.message, caught.value.code) == ("unknown request", "unknown-request")
    assert {record.levelname for record in caplog.records} <= {"DEBUG", "INFO"}


async def test_without_a_handler_the_answer_is_no_handler() -> None:
    async with open_connection_pair() as pair:
        for connection in pair:
            with pytest.raises(RemoteError) as caught:
                await connection.request([])
            assert caught.value.code == "no-handler"


async def test_describe_error_chooses_what_the_peer_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def describe(error: BaseException) -> str:
        if isinstance(error, KeyError):
            raise RuntimeError("cannot describe")
        return f"ref {type(error).__name__[0]}"

    async def handler(connection: Connection, request: list[bytes]) -> None:
        await trio.lowlevel.checkpoint()
        raise KeyError("secret") if request else ValueError("secret")

    discreet = Settings(describe_error=describe)
    async with open_connection_pair(server_handler=handler, server_settings=discreet) as (client, _):
        with pytest.raises(RemoteError, match=r"^ref V"):
            await client.request([])
        with pytest.raises(RemoteError, match=r"^KeyError \[handler-error\]"):
            await client.request(["x"])
    assert "describe_error failed" in caplog.text


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize("nested", [False, True])
async def test_what_ends_the_program_comes_out_bare(
    error: type[BaseException], side: str, nested: bool
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        if nested:
            async with trio.open_nursery():
                raise error
        await trio.lowlevel.checkpoint()
        raise error

    handlers = (handler, None) if side == "client" else (None, handler)
    with pytest.raises(error) as caught:
        async with open_connection_pair(*handlers) as (client, server):
            # The body may be told of the loss, or be cancelled for it; the error wins.
            await (server if side == "client" else client).request([])
            await trio.sleep_forever()
    assert type(caught.value) is error


# ---- cancelling ----


async def test_a_cancelled_request_cancels_the_handler(sealed: bool) -> None:
    seen: list[str] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        try:
            await trio.sleep_forever()
        finally:
            seen.append("cancelled")

    async with open_connection_pair(server_handler=handler, sealed=sealed) as (client, server):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.request, [])
                await settle()
                scope.cancel()
        assert seen == []
        await settle()
        assert seen == ["cancelled"]
        assert server._session.handling == 0
        assert client._session.local.states == {}


async def test_a_handler_may_answer_though_it_was_cancelled() -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        with trio.CancelScope() as inner:
            inner.cancel()
            await trio.sleep_forever()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            return  # it swallows its cancellation  # noqa: TRY203, RUF100

    async with open_connection_pair(server_handler=handler) as (client, server):
        with trio.move_on_after(0):
            await client.request([])
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.request, [])
                await settle()
                scope.cancel()
        await settle()
        assert server._session.handling == 0
        assert client._session.local.states == {}


async def test_a_crash_while_being_cancelled_is_logged_and_answered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def crash() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise KeyError("crashed")

    async def handler(connection: Connection, request: list[bytes]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(crash)

    async with open_connection_pair(server_handler=handler) as (client, server):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.request, [])
                await settle()
                scope.cancel()
        await settle()
        assert server._session.handling == 0
        assert client._session.local.states == {}
    assert "the handler of request 0 failed" in caplog.text


@pytest.mark.parametrize("stalled", [False, True], ids=["", "peer stopped reading"])
@pytest.mark.parametrize("slots", [10, 3], ids=["slots free", "slots taken"])
async def test_a_request_cancelled_at_any_step_comes_back_at_once_and_disturbs_nobody(
    sealed: bool, stalled: bool, slots: int
) -> None:
    """The request is cancelled after so many steps of the scheduler, from 0 until it would be done."""
    streams: list[FaultyStream] = []
    others: list[list[bytes]] = []
    answers = 0
    async with open_connection_pair(
        server_handler=busy_handler,
        sealed=sealed,
        server_settings=Settings(max_requests=slots),
        wrap=faulty(streams),
    ) as (client, server):

        async def other() -> None:
            others.append(await client.request(["ping", "other"]))

        async def cancel(scope: trio.CancelScope, steps: int, ended: list[bool]) -> None:
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            scope.cancel()
            for _ in range(2):
                await trio.lowlevel.checkpoint()
            assert ended, "it did not come back at once"
            streams[0].sending.resume()

        for steps in range(30):
            ended: list[bool] = []
            if stalled:
                streams[0].sending.stall()
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(other)
                await settle() if slots == 3 else None
                with trio.CancelScope() as scope:
                    nursery.start_soon(cancel, scope, steps, ended)
                    assert await client.request(["ping", "mine"]) == [b"pong", b"mine"]
                    answers += 1
                ended.append(scope.cancelled_caught)
            assert others == [[b"pong", b"other"]] * 3
            others.clear()
            assert await client.request(["ping", "after"]) == [b"pong", b"after"]
            await settle()
            assert client._session.local.states == {}
            assert server._session.handling == 0
    assert (answers == 0) if stalled else (0 < answers < 30)


# ---- closing from this side ----


async def start_waiting(nursery: trio.Nursery, connection: Connection, into: list[BaseException]) -> None:
    """Make a request that waits, and collect what it raises."""

    async def wait() -> None:
        try:
            await connection.request(["sleep", "inf"])
        except (ConnectionClosed, ConnectionLost) as exc:
            into.append(exc)

    nursery.start_soon(wait)
    await settle()


async def test_closing_fails_every_waiter_on_both_sides_at_once(sealed: bool) -> None:
    ours: list[BaseException] = []
    theirs: list[BaseException] = []
    slots = Settings(max_requests=2)
    async with open_connection_pair(
        busy_handler, busy_handler, sealed=sealed, client_settings=slots, server_settings=slots
    ) as (client, server):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                await start_waiting(nursery, client, ours)
                await start_waiting(nursery, server, theirs)
            await client.aclose()
            await settle()
            assert [type(exc) for exc in ours] == [ConnectionClosed] * 3
            assert [type(exc) for exc in theirs] == [ConnectionLost] * 3
        lost = [exc for exc in theirs if isinstance(exc, ConnectionLost)]
        assert sorted(exc.may_have_run for exc in lost) == [False, True, True]
        assert all(exc.reason.startswith("the peer closed the connection") for exc in lost)
        assert client.closed
        assert server.closed
        await client.wait_closed()
        await server.wait_closed()
        for connection, error in ((client, ConnectionClosed), (server, ConnectionLost)):
            with pytest.raises(error) as caught:
                await connection.request([])
            assert getattr(caught.value, "may_have_run", False) is False


async def test_leaving_the_block_closes_and_waits_for_handlers_and_close_handler() -> None:
    story: list[str] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        try:
            await trio.sleep_forever()
        finally:
            story.append("handler ended")

    async def on_close(connection: Connection) -> None:
        await trio.lowlevel.checkpoint()
        story.append(f"closed {connection.closed}")

    async with trio.open_nursery() as nursery:
        async with open_connection_pair(handler, client_close_handler=on_close) as (client, server):
            nursery.start_soon(ignore_loss, server)
            await settle()
        assert story == ["handler ended", "closed True"]
        assert client.closed


async def ignore_loss(connection: Connection) -> None:
    with pytest.raises((ConnectionClosed, ConnectionLost)):
        await connection.request([])


async def test_aclose_from_a_handler_ends_the_handler_and_the_connection(sealed: bool) -> None:
    story: list[str] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        try:
            await connection.aclose()
        except trio.Cancelled:
            story.append("cancelled")
            raise

    async with open_connection_pair(server_handler=handler, sealed=sealed) as (client, server):
        with pytest.raises(ConnectionLost, match="the peer closed the connection"):
            await client.request([])
        await server.wait_closed()
    assert story == ["cancelled"]


async def test_aclose_waits_for_no_handler_but_wait_closed_does(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 100):
            await trio.sleep(50)

    async with open_connection_pair(server_handler=handler) as (client, server):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ignore_loss, client)
            await settle()
            await server.aclose()
        assert trio.current_time() == 0
        await server.wait_closed()
        assert trio.current_time() == 50
        await server.aclose()


async def test_a_late_answer_is_dropped() -> None:
    release = trio.Event()

    async def handler(connection: Connection, request: list[bytes]) -> list[str]:
        with trio.CancelScope(shield=True):
            await release.wait()
        return ["late"]

    async with open_connection_pair(server_handler=handler) as (client, server):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ignore_loss, client)
            await settle()
            await server.aclose()
        release.set()
        await server.wait_closed()


async def test_closing_takes_a_second_at_most_when_the_peer_does_not_read(
    sealed: bool, autojump_clock: trio.testing.MockClock
) -> None:
    streams: list[FaultyStream] = []
    async with open_connection_pair(server_handler=echo, sealed=sealed, wrap=faulty(streams)) as (client, _):
        streams[0].sending.stall()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ignore_loss, client)
            await settle()
            await client.aclose()
        assert trio.current_time() == (CLOSE_TIMEOUT)
        await client.wait_closed()
        assert trio.current_time() == (CLOSE_TIMEOUT)


async def test_a_cancelled_aclose_returns_at_once_and_closes_nevertheless(
    autojump_clock: trio.testing.MockClock,
) -> None:
    streams: list[FaultyStream] = []
    async with open_connection_pair(server_handler=echo, wrap=faulty(streams)) as (client, server):
        streams[0].sending.stall()
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.aclose()
        assert scope.cancelled_caught
        assert client.closed
        assert trio.current_time() == 0
        await client.wait_closed()
        await server.wait_closed()


async def test_aclose_returns_though_the_connection_was_cancelled_from_outside() -> None:
    """From another task, and, shielded, from the close handler."""
    story: list[str] = []

    async def on_close(connection: Connection) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
            await connection.aclose()
            story.append("close handler")

    with trio.CancelScope() as scope:
        async with open_connection_pair(client_close_handler=on_close) as (client, _):
            scope.cancel()
    await client.aclose()
    assert story == ["close handler"]


class OddStream(trio.abc.Stream):
    """What it does is right, and then it raises."""

    def __init__(self, transport: trio.abc.Stream) -> None:
        self.transport = transport
        self.odd: set[str] = set()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.transport.send_all(data)
        if "send" in self.odd:
            raise OSError("odd")

    async def wait_send_all_might_not_block(self) -> None:
        raise AssertionError

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        try:
            return await self.transport.receive_some(max_bytes)
        except trio.Cancelled as exc:
            if "receive" in self.odd:
                raise BaseExceptionGroup("odd", [exc, OSError("odd")]) from None
            raise

    async def aclose(self) -> None:
        await self.transport.aclose()
        if "close" in self.odd:
            self.odd.remove("close")
            raise OSError("odd")


@pytest.mark.parametrize("odd", ["send", "receive", "close"])
@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_stream_that_raises_while_closing_leaks_nothing(
    odd: str, cancelled: bool, sealed: bool
) -> None:
    streams: list[OddStream] = []

    def wrap(stream: trio.abc.HalfCloseableStream) -> trio.abc.Stream:
        streams.append(OddStream(stream))
        return streams[0]

    with trio.CancelScope() as scope:
        with pytest.raises(KeyError, match="mine"):
            async with open_connection_pair(sealed=sealed, wrap=wrap) as (client, _):
                await settle()
                streams[0].odd.add(odd)
                if cancelled:
                    scope.cancel()
                raise KeyError("mine")
    await client.aclose()
    await client.wait_closed()


async def test_an_answer_that_was_queued_leaves_before_the_end(
    sealed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handler has ended, and the connection is closed before the sender ran."""
    async with open_connection_pair(server_handler=echo, sealed=sealed) as (client, server):
        answers: list[list[bytes]] = []

        async def ask() -> None:
            answers.append(await client.request(["x"]))

        real_answer = Handlers._answer

        def answer_and_close(handlers: Handlers, id: int, fields: Any) -> None:
            real_answer(handlers, id, fields)
            server._close("at once")

        monkeypatch.setattr(Handlers, "_answer", answer_and_close)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
        assert answers == [[b"x"]]


async def old_cancelled() -> trio.Cancelled:
    with trio.CancelScope() as scope:
        scope.cancel()
        try:
            await trio.sleep_forever()
        except trio.Cancelled as exc:
            return exc
    raise AssertionError


async def test_a_cancelled_kept_from_earlier_is_a_failure_like_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stale = await old_cancelled()

    async def handler(*args: object) -> None:
        await trio.lowlevel.checkpoint()
        raise stale

    async with open_connection_pair(
        handler, handler, client_close_handler=handler, server_close_handler=handler
    ) as pair:
        for connection in pair:
            with pytest.raises(RemoteError, match="Cancelled"):
                await connection.request([])
    assert caplog.text.count("the close handler failed") == 2


async def test_what_ends_the_program_is_not_lost_to_a_cancelled_close_handler() -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise KeyboardInterrupt

    async def on_close(connection: Connection) -> None:
        await trio.sleep_forever()

    with trio.CancelScope() as scope, pytest.raises(KeyboardInterrupt):
        async with open_connection_pair(handler, client_close_handler=on_close) as (_, server):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ignore_any_loss, server)
                await settle()
                scope.cancel()


async def test_a_transport_that_breaks_while_closing_does_no_harm() -> None:
    streams: list[FaultyStream] = []
    async with open_connection_pair(server_handler=echo, wrap=faulty(streams)) as (client, _):
        streams[0].sending.stall()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ignore_loss, client)
            await settle()
            nursery.start_soon(client.aclose)
            await settle()
            await streams[0].cut()
            streams[0].sending.resume()
        await client.wait_closed()


async def test_the_end_is_authenticated_when_sealed() -> None:
    """A peer that closes says so with an end record; one that vanishes does not."""
    streams: list[FaultyStream] = []
    async with open_connection_pair(wrap=faulty(streams)) as (client, server):
        streams[0].receiving.drop(1000)
        await server.aclose()
        await client.wait_closed()
        with pytest.raises(ConnectionLost, match="cut short"):
            await client.request([])


async def test_wait_closed_from_a_task_of_its_own_is_an_error() -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[str]:
        if request == [b"nested"]:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.wait_closed)
        await connection.wait_closed()
        raise AssertionError

    async with open_connection_pair(server_handler=handler) as (client, _):
        with pytest.raises(RemoteError, match="RuntimeError"):
            await client.request([])
        with pytest.raises(RemoteError, match="RuntimeError"):
            await client.request(["nested"])


async def test_a_handler_may_wait_for_another_connection_to_close() -> None:
    async with open_connection_pair(busy_handler) as (other, _):

        async def handler(connection: Connection, request: list[bytes]) -> list[str]:
            await other.wait_closed()
            return ["closed"]

        async with open_connection_pair(server_handler=handler) as (client, _):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.request, [])
                await settle()
                await other.aclose()


async def test_when_the_block_is_cancelled_all_ends_and_waiters_elsewhere_are_told() -> None:
    caught: list[BaseException] = []
    story: list[str] = []

    async def on_close(connection: Connection) -> None:
        story.append("close handler")
        await trio.lowlevel.checkpoint()
        raise AssertionError("it is cancelled, like the block")

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with open_connection_pair(server_handler=busy_handler, client_close_handler=on_close) as (
                client,
                _,
            ):
                await start_waiting(nursery, client, caught)
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught
    assert [type(exc) for exc in caught] == [ConnectionClosed]
    assert story == ["close handler"]


class Oops(Exception):
    pass


@pytest.mark.parametrize(
    "error", [Oops(), ExceptionGroup("mine", [Oops()]), KeyboardInterrupt(), StopAsyncIteration()]
)
async def test_what_the_block_raises_comes_out_as_itself(error: BaseException) -> None:
    story: list[str] = []

    async def on_close(connection: Connection) -> None:
        await trio.lowlevel.checkpoint()
        story.append("closed")

    with pytest.raises(type(error)) as caught:
        async with open_connection_pair(client_close_handler=on_close, server_close_handler=on_close):
            raise error
    assert caught.value is error
    assert story == ["closed", "closed"]


# ---- losing the peer ----


async def test_losing_the_peer_raises_nothing_by_itself(sealed: bool) -> None:
    closed: list[Connection] = []

    async def on_close(connection: Connection) -> None:
        await trio.lowlevel.checkpoint()
        closed.append(connection)

    async with open_connection_pair(sealed=sealed, client_close_handler=on_close) as (client, server):
        await trio.aclose_forcefully(server._stream)
        await client.wait_closed()
        assert closed == [client]
        assert client.closed
    assert closed == [client]


@pytest.mark.parametrize("how", ["sending", "receiving", "oddly"])
async def test_a_broken_transport_fails_the_waiters(
    how: str, sealed: bool, autojump_clock: trio.testing.MockClock
) -> None:
    caught: list[BaseException] = []
    streams: list[FaultyStream] = []
    async with (
        open_connection_pair(server_handler=busy_handler, sealed=sealed, wrap=faulty(streams)) as (
            client,
            server,
        ),
        trio.open_nursery() as nursery,
    ):
        await start_waiting(nursery, client, caught)
        if how == "receiving":
            streams[0].receiving.alter = lambda data: bytes(65) if sealed else b"\xff" * 5
            nursery.start_soon(ignore_any_loss, server)
        elif how == "oddly":
            streams[0].receiving.alter = odd_failure
            nursery.start_soon(ignore_any_loss, server)
        else:
            await streams[0].cut()
            nursery.start_soon(ignore_any_loss, client)
    assert [type(exc) for exc in caught] == [ConnectionLost]


def odd_failure(data: bytes) -> bytes:
    raise OSError("odd")


async def ignore_any_loss(connection: Connection) -> None:
    with pytest.raises((ConnectionClosed, ConnectionLost, RemoteError)):
        await connection.request([])


async def test_answers_that_came_before_sending_broke_are_delivered() -> None:
    """The peer answered and closed; our next send breaks before we have read the answer."""
    async with raw_peer() as (connection, peer):
        answers: list[list[bytes]] = []

        async def ask() -> None:
            answers.append(await connection.request(["first"]))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            assert (await peer.receive())[0] == b"req"
            # All at once: the answer and the end are on their way, and our sending side is broken.
            await peer.send(b"ok", b"0", body=[b"in time"])
            await peer.stream.aclose()
            nursery.start_soon(ignore_loss, connection)
        assert answers == [[b"in time"]]


async def test_when_only_sending_is_broken_the_connection_ends_soon(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with raw_peer() as (connection, _):

        async def break_it() -> None:
            raise trio.BrokenResourceError("cable")

        connection._stream._stream.send_stream.send_all_hook = break_it  # type: ignore[attr-defined]
        with pytest.raises(ConnectionLost, match=r"sending failed.*cable") as caught:
            await connection.request([])
        assert caught.value.may_have_run, "how much of it left is not known"
        assert trio.current_time() == CLOSE_TIMEOUT


async def test_a_request_that_nobody_saw_says_so(autojump_clock: trio.testing.MockClock) -> None:
    async with raw_peer(max_requests=1) as (connection, peer):
        caught: list[BaseException] = []
        async with trio.open_nursery() as nursery:
            await start_waiting(nursery, connection, caught)
            await start_waiting(nursery, connection, caught)  # waits for a slot
            await peer.stream.aclose()
        assert sorted(getattr(exc, "may_have_run", None) or False for exc in caught) == [False, True]


async def test_a_request_answered_as_closing_did_not_run() -> None:
    async with raw_peer() as (connection, peer), trio.open_nursery() as nursery:
        caught: list[BaseException] = []
        await start_waiting(nursery, connection, caught)
        await peer.receive()
        await peer.send(b"err", b"0", b"closing", b"going away", b"")
        await settle()
        [exc] = caught
        assert isinstance(exc, ConnectionLost)
        assert (exc.reason, exc.may_have_run) == ("going away", False)
        assert not connection.closed


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (packet(b"nonsense"), "the peer broke the protocol: unknown packet"),
        (packet(b"ok", b"0", body=[]), "the peer broke the protocol: an answer to 0"),
        (b"\xff\xff\xff\xff", "the peer broke the protocol: a packet of 4294967295 bytes"),
        (b"HTTP/1.1 400 Bad Request", "the peer broke the protocol: a packet of 1213486160 bytes"),
    ],
)
async def test_a_peer_that_lies_ends_its_own_connection_only(
    data: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with raw_peer(echo) as (connection, peer), raw_peer(echo) as (_, other):
        await peer.stream.send_all(data)
        kind, code, text = await peer.receive()
        assert (kind, code) == (b"abort", b"protocol")
        assert text.decode().startswith(reason.removeprefix("the peer broke the protocol: "))
        assert await peer.stream.receive_some() == b""
        await peer.stream.aclose()
        await connection.wait_closed()
        with pytest.raises(ConnectionLost) as caught:
            await connection.request([])
        assert caught.value.reason.startswith(reason)
        assert connection.reason == caught.value.reason
        await other.send(b"req", b"1", b"", b"", b"", body=[b"alive?"])
        assert await other.receive() == [b"ok", b"1", b"\x01\x00\x00\x00\x06alive?"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert reason in caplog.text


async def test_a_packet_cut_short_is_told() -> None:
    async with raw_peer(echo) as (connection, peer):
        await peer.stream.send_all(packet(b"req", b"1", b"", b"", b"", body=[])[:-1])
        await peer.stream.aclose()
        await connection.wait_closed()
        with pytest.raises(ConnectionLost, match="the peer cut a packet short"):
            await connection.request([])


async def test_a_flood_of_requests_and_cancels_is_handled_within_the_slots(
    autojump_clock: trio.testing.MockClock,
) -> None:
    started: list[bytes] = []

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        started.append(request[0])
        await trio.sleep_forever()
        raise AssertionError

    async with raw_peer(handler, Settings(max_requests=5)) as (connection, peer):
        for n in range(1, 11, 2):
            await peer.send(b"req", b"%d" % n, b"", b"", b"", body=[b"%d" % n])
        for n in range(1, 7, 2):
            await peer.send(b"cancel", b"%d" % n)
            await peer.send(b"cancel", b"%d" % n)
        answers = sorted([await peer.receive() for _ in range(3)])
        assert [fields[:3] for fields in answers] == [[b"err", b"%d" % n, b"cancelled"] for n in (1, 3, 5)]
        assert connection._session.handling == 2
        for n in range(11, 19, 2):
            await peer.send(b"req", b"%d" % n, b"", b"", b"", body=[b"x"])
        await connection.wait_closed()
        with pytest.raises(ConnectionLost, match="more than 5 requests of depth 0 in flight"):
            await connection.request([])


async def test_what_arrives_with_the_end_is_not_handled(autojump_clock: trio.testing.MockClock) -> None:
    """A request in the same chunk as what ended the connection must not start a handler."""
    started: list[list[bytes]] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        started.append(request)
        await trio.lowlevel.checkpoint()

    async with raw_peer(handler) as (connection, _):
        await settle()
        # The reader is woken by these bytes, and before it runs the connection is closed.
        connection._stream._stream.receive_stream.put_data(packet(b"req", b"1", b"", b"", b"", body=[]))  # type: ignore[attr-defined]
        connection._close("too late")
        await connection.wait_closed()
    assert started == []


# ---- what it is ----


async def test_what_a_connection_tells_of_itself() -> None:
    async with open_connection_pair() as (client, server):
        assert (client.side, server.side) == ("client", "server")
        assert client.user == server.user == "user"
        assert client.encrypted
        assert server.encrypted
        assert client.address is server.address is None
        assert client.peer_credentials is server.peer_credentials is None
        assert client.server is None
        assert isinstance(server.server, bokbok_trio.Server)
        assert isinstance(client, Connection)
        assert client.data is server.data is None
        client.data = {"mine": 1}
        assert repr(client) == "<bokbok_trio.Connection client None user='user' open>"
    assert repr(client) == "<bokbok_trio.Connection client None user='user' closed>"
    async with open_connection_pair(sealed=False) as (client, server):
        assert client.user is server.user is None
        assert not client.encrypted
        assert not server.encrypted


def numbers(connection: Connection) -> tuple[int, ...]:
    """Of `ConnectionStatistics`, all but the two limits."""
    found = dataclasses.asdict(connection.statistics())
    return tuple(value for name, value in found.items() if name not in {"total_slots", "max_requests"})


async def test_the_statistics_of_a_connection(autojump_clock: trio.testing.MockClock) -> None:
    may_end = trio.Event()

    async def stubborn(connection: Connection, request: list[bytes]) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 100):
            await may_end.wait()

    streams: list[FaultyStream] = []
    async with open_connection_pair(
        server_handler=stubborn,
        client_settings=Settings(max_requests=7),
        server_settings=Settings(max_requests=3),
        sealed=False,
        wrap=faulty(streams),
    ) as (client, server):
        assert client.statistics() == ConnectionStatistics(
            used_slots=0,
            total_slots=3,
            requests_waiting=0,
            requests_cancelled=0,
            handlers_running=0,
            max_requests=7,
            packets_queued=0,
        )
        assert (server.statistics().total_slots, server.statistics().max_requests) == (7, 3)
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as cancelled:
                    cancelled.start_soon(client.request, [])
                    await settle()
                    for _ in range(4):
                        nursery.start_soon(client.request, [])
                    await settle()
                    #                         used, waiting, cancelled, handlers, packets
                    assert numbers(client) == (3, 2, 0, 0, 0)
                    assert numbers(server) == (0, 0, 0, 3, 0)
                    scope.cancel()
            await settle()
            assert numbers(client) == (3, 2, 1, 0, 0)
            assert numbers(server) == (0, 0, 0, 3, 0), "it does not heed its cancellation"
            may_end.set()
            await settle()
        assert numbers(client) == numbers(server) == (0, 0, 0, 0, 0)
        streams[0].sending.stall()
        async with trio.open_nursery() as nursery:
            for _ in range(3):  # a send of its own, which waits, and what comes after it
                nursery.start_soon(client.request, [])
                await settle()
            assert numbers(client) == (3, 0, 0, 0, 2)
            streams[0].sending.resume()
    assert numbers(client) == numbers(server) == (0, 0, 0, 0, 0)


async def test_a_closed_connection_counts_its_handlers_and_no_requests_of_its_own() -> None:
    may_end = trio.Event()
    asked: list[BaseException] = []

    async def stubborn(connection: Connection, request: list[bytes]) -> None:
        with trio.CancelScope(shield=True):
            await may_end.wait()

    async with trio.open_nursery() as nursery:
        async with open_connection_pair(stubborn, stubborn) as (client, server):
            for connection in (client, server):
                await start_waiting(nursery, connection, asked)
            await settle()
            assert numbers(client) == numbers(server) == (1, 0, 0, 1, 0)
            await client.aclose()
            await settle()
            assert numbers(client) == numbers(server) == (0, 0, 0, 1, 0)
            may_end.set()
            await settle()
            assert numbers(client) == numbers(server) == (0, 0, 0, 0, 0)
    assert len(asked) == 2


async def test_a_closed_connection_leaves_no_reference_cycle_to_a_waiter() -> None:
    async with open_connection_pair(server_handler=echo) as (client, _):
        gc.collect()
        gc.disable()
        try:
            for _ in range(10):
                await client.request(["x"])
            assert not [thing for thing in gc.get_objects() if type(thing).__name__ == "_Waiter"]
        finally:
            gc.enable()


async def test_a_request_error_is_the_same_for_every_waiter_but_not_the_same_object() -> None:
    caught: list[BaseException] = []
    async with open_connection_pair(server_handler=busy_handler) as (client, _):
        async with trio.open_nursery() as nursery:
            await start_waiting(nursery, client, caught)
            await start_waiting(nursery, client, caught)
            await client.aclose()
    assert str(caught[0]) == str(caught[1])
    assert caught[0] is not caught[1]


# ---- sending at once ----


async def test_a_lone_request_leaves_before_its_task_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    async with raw_peer(over_sockets=True) as (connection, peer), trio.open_nursery() as nursery:
        await settle()
        nursery.start_soon(connection.request, ["x"])
        sends = 0
        real_send = SocketStream.send_all

        async def count(stream: SocketStream, batch: bytes) -> None:
            nonlocal sends
            sends += 1
            await real_send(stream, batch)

        monkeypatch.setattr(SocketStream, "send_all", count)
        assert await peer.receive() == [b"req", b"0", b"", b"", b"", b"\1\0\0\0\1x"]
        await peer.send(b"ok", b"0", body=[])
        assert sends == 0


async def test_requests_made_together_leave_together(monkeypatch: pytest.MonkeyPatch) -> None:
    async with raw_peer(over_sockets=True) as (connection, peer), trio.open_nursery() as nursery:
        await settle()
        batches: list[bytes] = []
        real_send = SocketStream.send_all

        async def note(stream: SocketStream, batch: bytes) -> None:
            batches.append(batch)
            await real_send(stream, batch)

        monkeypatch.setattr(SocketStream, "send_all", note)
        for _ in range(3):
            nursery.start_soon(connection.request, ["x"])
        ids = {(await peer.receive())[1] for _ in range(3)}
        assert ids == {b"0", b"2", b"4"}
        assert len(batches) == 1, "the first left at once, and the others with each other"
        for id in ids:
            await peer.send(b"ok", id, body=[])


async def test_what_a_socket_does_not_take_at_once_leaves_later_and_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with raw_peer(over_sockets=True) as (connection, peer), trio.open_nursery() as nursery:
        await settle()
        take_few(monkeypatch, 7)
        nursery.start_soon(connection.request, [b"x" * 50_000])
        nursery.start_soon(connection.request, ["small"])
        packets = [await peer.receive(), await peer.receive()]
        assert {len(fields[5]) for fields in packets} == {50_005, 10}
        for fields in packets:
            await peer.send(b"ok", fields[1], body=[])


async def test_a_big_lone_request_leaves_piece_by_piece() -> None:
    async with raw_peer(over_sockets=True) as (connection, peer), trio.open_nursery() as nursery:
        await settle()
        nursery.start_soon(connection.request, [bytes(300_000)])
        size = 0
        while True:
            part, number, left, piece = await peer.receive()
            assert (part, number) == (b"part", b"0")
            size += len(piece)
            if left == b"0":
                break
        assert size > 300_000
        await peer.send(b"ok", b"0", body=[])


async def test_a_request_takes_along_the_items_that_wait_and_their_channel_goes_on() -> None:
    async with raw_peer(over_sockets=True) as (connection, peer):
        async with connection.open_channel([]) as channel, trio.open_nursery() as nursery:
            assert (await peer.receive())[0] == b"chan"
            await peer.send(b"credit", b"0", b"1000000")
            await settle()
            flows = connection._session.flow_control
            count = 0
            while flows.may_send(0):  # and nobody wakes the sender
                flows.send(0, *flows.encode([bytes(10_000)]))
                count += 1
            nursery.start_soon(channel.send, ["waits"])
            await settle()
            nursery.start_soon(connection.request, ["x"])
            found = [(await peer.receive())[0] for _ in range(count + 2)]
            assert sorted(found) == [*[b"item"] * (count + 1), b"req"]
            await peer.send(b"ok", b"2", body=[])


async def test_a_connection_that_has_ended_is_no_cyclic_garbage() -> None:
    ended: list[weakref.ref[Connection]] = []

    async def note(connection: Connection) -> None:
        ended.append(weakref.ref(connection))
        await trio.lowlevel.checkpoint()

    async def use(listener: MemoryListener) -> None:
        async with open_connection(listener.connect(), close_handler=note) as connection:
            assert await connection.request(["x"]) == [b"x"]
            with pytest.raises(RemoteError):
                async with connection.open_channel([]) as channel:
                    await channel.answer()
        assert connection.statistics().handlers_running == 0

    listener = MemoryListener()
    gc.collect()
    gc.disable()
    try:
        async with open_server([listener], echo, close_handler=note):
            await use(listener)
            await settle()
            assert [reference() for reference in ended] == [None, None]
    finally:
        gc.enable()


async def test_what_is_too_much_to_be_written_in_a_row_is_left_to_the_sender(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bokbok_trio._connection.sender.MAX_BATCHES_IN_A_ROW", 1)
    count = 3 * EARLY_FLUSH_PACKETS
    async with raw_peer(over_sockets=True, max_requests=count) as (connection, peer):
        async with trio.open_nursery() as nursery:
            await settle()
            for _ in range(count):
                nursery.start_soon(connection.request, [bytes(10_000)])
            ids = [(await peer.receive())[1] for _ in range(count)]
            assert len(set(ids)) == count
            for id in ids:
                await peer.send(b"ok", id, body=[])
