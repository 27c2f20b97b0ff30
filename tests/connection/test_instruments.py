"""What instruments are told, that each thing that starts ends once, and that none of them harms anything."""

from __future__ import annotations

import gc
import logging
import math
import random
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from bokbok_trio import (
    Channel,
    CombinedHandler,
    Connection,
    ConnectionClosed,
    ConnectionLost,
    ConnectionRefused,
    HandshakeError,
    Key,
    MessageTooLarge,
    RemoteError,
    RequestError,
    RequestHandler,
    Settings,
    current_request,
    open_connection,
    open_reconnecting,
    open_server,
)
from bokbok_trio._connection.observer import BACK, CALL
from bokbok_trio.instruments import (
    ConnectionEnded,
    ConnectionOpened,
    HandshakeEnded,
    HandshakeStarted,
    Instrument,
    ItemPassed,
    RequestEnded,
    RequestStarted,
)
from bokbok_trio.interface import consume, expose
from bokbok_trio.interface._exposing import CALL as REAL_CALL
from bokbok_trio.interface._serving import BACK as REAL_BACK
from bokbok_trio.testing import MemoryListener, open_connection_pair, open_memory_server

from ..support.helpers import echo, packet, raw_peer, settle
from ..support.pairs import open_pair, over_all_ways, settle as settle_sockets
from ..support.recorder import Recorder


@asynccontextmanager
async def recorded_pair(
    server_handler: RequestHandler | CombinedHandler | None = None, **more: Any
) -> AsyncGenerator[tuple[Connection, Connection, Recorder, Recorder]]:
    """Both ends of a connection, and what their instruments were told; checked at the end."""
    ours, theirs = Recorder(), Recorder()
    more.setdefault("client_settings", ours.settings())
    more.setdefault("server_settings", theirs.settings())
    async with open_connection_pair(server_handler=server_handler, **more) as (client, server):
        yield client, server, ours, theirs
    for each in (ours, theirs):
        each.check()


# ---- what is told ----


async def test_all_of_a_connection_is_told_in_order_on_both_sides(sealed: bool) -> None:
    async with recorded_pair(echo, sealed=sealed) as (client, server, ours, theirs):
        await client.request(["ping", "12345"])
    kinds = [
        HandshakeStarted,
        HandshakeEnded,
        ConnectionOpened,
        RequestStarted,
        RequestEnded,
        ConnectionEnded,
    ]
    for recorder, connection, direction in ((ours, client, "out"), (theirs, server, "in")):
        assert list(map(type, recorder.events)) == kinds
        handshake, shaken, opened, started, answered, ended = recorder.events
        assert handshake.side == connection.side
        assert (shaken.handshake, shaken.outcome, shaken.code, shaken.error) == (handshake, "ok", "", "")
        assert opened.connection is ended.connection is started.connection is connection
        assert (started.id, started.direction, started.name) == (0, direction, "ping")
        assert (started.has_channel, started.depth, started.size) == (False, 0, 1 + 4 + 4 + 4 + 5)
        assert started.context == {}
        assert started.deadline == math.inf
        assert answered.request is started
        assert (answered.outcome, answered.code, answered.waited) == ("ok", "", 0)
        assert (answered.bytes_in, answered.bytes_out) == (18, 18)
        assert ended.reason == connection.reason
        assert (ended.requests_in, ended.requests_out) == ((0, 1) if direction == "out" else (1, 0))


@over_all_ways
async def test_all_of_it_is_told_over_sockets(way: str) -> None:
    ours, theirs = Recorder(), Recorder()

    async def both(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
        await channel.send(await channel.receive())
        return await connection.request(request)

    async with open_pair(
        way,
        echo,
        server_channel_handler=both,
        client_settings=ours.settings(),
        server_settings=theirs.settings(),
    ) as (client, server):
        async with client.open_channel(["a"]) as channel:
            await channel.send(["item"])
            await channel.receive()
            await channel.answer()
        with trio.move_on_after(0):
            await client.request(["never"])
        await settle_sockets(client, server)
    for each in (ours, theirs):
        each.check()
        assert each.outcomes == ["ok", "ok"]
        assert len(each.of(ItemPassed)) == 2
        assert each.of(HandshakeStarted)[0].address is not None or way.startswith("unix")
    assert {event.request.direction for event in ours.ended} == {"in", "out"}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ([], ""),
        (["stat", "x"], "stat"),
        ([b"\xff\n\x1b[1m"], "\ufffd\\n\\x1b[1m"),
        (["x" * 100_000], "x" * 64),
        (["é"], "é"),
        ([b"%call"], "%call"),
        ([b"%call", "Files.stat", "{}"], "Files.stat"),
        ([b"%call", "x" * 100], "x" * 64),
        ([b"%back", "1", "update", "{}"], "%back.update"),
        ([b"%back", "1", "", "{}"], "%back"),
        ([b"%back", "1"], "%back"),
    ],
)
async def test_the_name_of_a_request_is_short_and_in_one_line(fields: list[bytes | str], name: str) -> None:
    async with recorded_pair(echo) as (client, _, ours, theirs):
        await client.request(fields)
    for recorder in (ours, theirs):
        [started] = recorder.of(RequestStarted)
        assert started.name == name


class Progress(Protocol):
    async def update(self, done: int) -> None: ...


class Jobs(Protocol):
    async def run(self, progress: Progress) -> int: ...


async def test_typed_calls_have_the_names_of_their_methods() -> None:
    assert (CALL, BACK) == (REAL_CALL, REAL_BACK)

    class Mine:
        async def run(self, progress: Progress) -> int:
            await progress.update(50)
            return 1

        async def update(self, done: int) -> None:
            await trio.lowlevel.checkpoint()

    async with recorded_pair(expose(Jobs, Mine())) as (client, _, ours, theirs):
        await consume(client, Jobs).run(Mine())
    for recorder in (ours, theirs):
        assert [event.name for event in recorder.of(RequestStarted)] == ["Jobs.run", "%back.update"]
        assert [event.depth for event in recorder.of(RequestStarted)] == [0, 1]


async def test_callbacks_are_told_within_their_request() -> None:
    async def back(connection: Connection, request: list[bytes]) -> list[bytes]:
        return await connection.request(request[1:]) if request[1:] else request

    async with recorded_pair(back, client_handler=back) as (client, _, ours, theirs):
        await client.request(["a", "b", "c", "d"])
    started = [(event.name, event.direction, event.depth) for event in ours.of(RequestStarted)]
    assert started == [("a", "out", 0), ("b", "in", 1), ("c", "out", 2), ("d", "in", 3)]
    assert [event.request.name for event in ours.ended] == ["d", "c", "b", "a"]
    assert len(theirs.ended) == 4


async def test_items_are_told_with_their_sizes_and_their_sum() -> None:
    async def handler(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
        async for item in channel:
            await channel.send([*item, b"!"])
        return [b"done"]

    async with (
        recorded_pair(server_channel_handler=handler) as (client, _, ours, theirs),
        client.open_channel(["shout"]) as channel,
    ):
        for item in (b"a", b"bcd"):
            await channel.send([item])
            await channel.receive()
        await channel.end()
        await channel.answer()
    for recorder, there, back in ((ours, "out", "in"), (theirs, "in", "out")):
        [ended] = recorder.ended
        assert ended.request.has_channel
        assert [(event.request, event.direction, event.size) for event in recorder.of(ItemPassed)] == [
            (ended.request, there, 6),
            (ended.request, back, 11),
            (ended.request, there, 8),
            (ended.request, back, 13),
        ]
        assert (ended.items_in, ended.items_out) == (2, 2)
        assert (ended.bytes_out, ended.bytes_in)[:: 1 if recorder is ours else -1] == (10 + 14, 9 + 24)


# ---- how requests end ----


@pytest.mark.parametrize(
    ("handler_error", "code"),
    [
        (RequestError("no", code="mine"), "mine"),
        (RequestError("no", code="timeout"), "timeout"),
        (ValueError("no"), "handler-error"),
    ],
)
async def test_an_error_has_its_code(handler_error: Exception, code: str, autojump_clock: MockClock) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        await trio.sleep(2)
        raise handler_error

    async with recorded_pair(handler) as (client, _, ours, theirs):
        with pytest.raises(RemoteError):
            await client.request(["a"])
    for recorder in (ours, theirs):
        assert recorder.outcomes == [f"error {code}"]
        assert recorder.ended[0].seconds == 2
    assert theirs.ended[0].bytes_out == ours.ended[0].bytes_in == 0


@pytest.mark.parametrize(
    ("answer", "code"), [([bytes(5000)], "too-large"), (5, "handler-error"), (["\ud800"], "handler-error")]
)
async def test_an_answer_that_cannot_be_sent_is_an_error(answer: Any, code: str) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> Any:
        await trio.lowlevel.checkpoint()
        return answer

    ours = Recorder()
    async with recorded_pair(handler, client_settings=ours.settings(max_message_size=4096)) as (
        client,
        _,
        _,
        theirs,
    ):
        with pytest.raises(RemoteError):
            await client.request(["a"])
    assert ours.outcomes == theirs.outcomes == [f"error {code}"]


async def sleep_forever(connection: Connection, request: list[bytes], *channel: Channel) -> None:
    await trio.sleep_forever()


@pytest.mark.parametrize("outcome", ["cancelled", "timeout"])
@pytest.mark.parametrize("has_channel", [False, True])
async def test_cancelled_and_late_requests_are_told_apart(
    has_channel: bool, outcome: str, autojump_clock: MockClock
) -> None:
    async with recorded_pair(sleep_forever, server_channel_handler=sleep_forever) as (
        client,
        server,
        ours,
        theirs,
    ):
        with trio.CancelScope() as scope:
            if outcome == "timeout":
                scope.deadline = trio.current_time() + 3
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def ask() -> None:
                    if has_channel:
                        async with client.open_channel(["a"]):
                            await trio.sleep_forever()
                    else:
                        await client.request(["a"])

                await trio.sleep(1)
                if outcome == "cancelled":
                    scope.cancel()
        await client.ping()
        await server.ping()
        await settle()
        assert ours.outcomes == theirs.outcomes == [outcome]
        assert ours.ended[0].seconds == (3 if outcome == "timeout" else 1)
        started = ours.ended[0].request
        assert (started.deadline < math.inf) == (outcome == "timeout")
        assert theirs.ended[0].request.deadline == pytest.approx(started.deadline)


async def test_a_deadline_that_passes_over_there_first_is_a_timeout(autojump_clock: MockClock) -> None:
    ours = Recorder()
    async with raw_peer(settings=ours.settings()) as (connection, peer), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def ask() -> None:
            with trio.move_on_after(10):
                await connection.request(["a"])

        await peer.receive()
        await trio.sleep(9.97)
        await peer.send(b"err", b"0", b"timeout", b"late", b"")
    assert ours.outcomes == ["timeout"]


@pytest.mark.parametrize("has_channel", [False, True])
@pytest.mark.parametrize("who", ["client", "server"])
async def test_what_is_in_flight_when_the_connection_ends_is_lost(who: str, has_channel: bool) -> None:
    async with recorded_pair(sleep_forever, server_channel_handler=sleep_forever) as (
        client,
        server,
        ours,
        theirs,
    ):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def ask() -> None:
                with pytest.raises((ConnectionLost, ConnectionClosed)):
                    if has_channel:
                        async with client.open_channel(["a"]) as channel:
                            await channel.receive()
                    else:
                        await client.request(["a"])

            await settle()
            await (client if who == "client" else server).aclose()
        await settle()
        assert ours.outcomes == theirs.outcomes == ["lost"]


async def test_a_handler_that_answers_when_all_is_over_has_lost_its_request() -> None:
    may_end = trio.Event()

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        with trio.CancelScope(shield=True):
            await may_end.wait()
        return request

    async with recorded_pair(handler) as (client, _, ours, theirs):
        with trio.move_on_after(0.01):
            await client.request(["a"])
        await client.aclose()
        await settle()
        assert not theirs.ended
        assert not theirs.of(ConnectionEnded)
        may_end.set()
    assert ours.outcomes == ["timeout"]
    assert theirs.outcomes == ["lost"]


async def test_a_server_that_is_cancelled_has_lost_its_requests() -> None:
    theirs = Recorder()
    listener = MemoryListener()
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(_serve, [listener], sleep_forever, settings=theirs.settings()))
        async with open_connection(listener.connect()) as client:
            nursery.start_soon(_ask_in_vain, client)
            await settle()
            nursery.cancel_scope.cancel()
    theirs.check()
    assert theirs.outcomes == ["lost"]


async def _serve(*args: Any, task_status: trio.TaskStatus[Any], **kwargs: Any) -> None:
    async with open_server(*args, **kwargs) as server:
        task_status.started(server)
        await trio.sleep_forever()


async def _ask_in_vain(client: Connection) -> None:
    with suppress(ConnectionLost):
        await client.request(["a"])


async def test_a_request_that_crosses_a_bye_is_lost_there_and_nothing_here() -> None:
    async with recorded_pair(sleep_forever) as (client, server, ours, theirs):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def drain() -> None:
                server.drain()
                await trio.lowlevel.checkpoint()

            with pytest.raises(ConnectionLost) as caught:
                await client.request(["a"])
        assert not caught.value.may_have_run
        assert set(ours.outcomes) <= {"lost"}
        assert not theirs.ended


async def test_a_request_without_a_handler_is_an_error_for_its_asker_alone() -> None:
    async with recorded_pair() as (client, _, ours, theirs):
        with pytest.raises(RemoteError):
            await client.request(["a"])
    assert ours.outcomes == ["error no-handler"]
    assert not theirs.of(RequestStarted)
    assert theirs.of(ConnectionEnded)[0].requests_in == 1


@pytest.mark.parametrize(
    ("fields", "context", "error"),
    [
        (5, None, TypeError),
        ([5], None, TypeError),
        (["a"], {"A": "b"}, ValueError),
        (["a"], {"a": 5}, TypeError),
        ([bytes(5000)], None, MessageTooLarge),
        ([bytes(3900)], {"a": bytes(200)}, MessageTooLarge),
    ],
)
async def test_what_cannot_be_sent_is_not_told(fields: Any, context: Any, error: type[Exception]) -> None:
    ours = Recorder()
    async with recorded_pair(echo, client_settings=ours.settings(max_message_size=4096)) as (client, *_):
        for _ in range(2):
            with pytest.raises(error):
                await client.request(fields, context=context)
            with pytest.raises(error):
                async with client.open_channel(fields, context=context):
                    raise AssertionError
        await client.request(["a"])
    assert ours.outcomes == ["ok"]


async def test_a_handler_that_leaves_a_scope_open_fails_once() -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        trio.CancelScope().__enter__()
        if request == [b"wait"]:
            await trio.lowlevel.checkpoint()
        return request

    async with recorded_pair(handler) as (client, _, ours, theirs):
        for request in (["wait"], ["go"]):
            with pytest.raises(RemoteError):
                await client.request(request)
    assert ours.outcomes == theirs.outcomes == 2 * ["error handler-error"]


# ---- waiting ----


async def test_a_request_waits_for_its_slot(autojump_clock: MockClock) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        await trio.sleep(4)
        return request

    theirs = Recorder()
    async with recorded_pair(handler, server_settings=theirs.settings(max_requests=1)) as (
        client,
        _,
        ours,
        _,
    ):
        async with trio.open_nursery() as nursery:
            for name in ("first", "second"):
                nursery.start_soon(client.request, [name])
                await settle()
            with trio.move_on_after(3):
                await client.request(["gives up"])
    assert [(event.request.name, event.outcome, event.seconds, event.waited) for event in ours.ended] == [
        ("gives up", "timeout", 3, 3),
        ("first", "ok", 4, 0),
        ("second", "ok", 8, 4),
    ]
    assert [event.waited for event in theirs.ended] == [0, 0]


async def test_a_request_waits_for_the_open_handler(autojump_clock: MockClock) -> None:
    async def open_handler(connection: Connection) -> None:
        await trio.sleep(5)

    async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> None:
        await trio.sleep(1)

    theirs = Recorder()
    async with (
        open_memory_server(
            echo, channel_handler=channel_handler, open_handler=open_handler, settings=theirs.settings()
        ) as server,
        server.connect() as client,
        trio.open_nursery() as nursery,
    ):

        @nursery.start_soon
        async def give_up() -> None:
            with trio.move_on_after(2):
                await client.request(["gives up"])

        async with client.open_channel(["channel"]) as channel:
            await channel.answer()
    theirs.check()
    assert [(event.request.name, event.outcome, event.seconds, event.waited) for event in theirs.ended] == [
        ("gives up", "timeout", 2, 2),
        ("channel", "ok", 6, 5),
    ]


async def test_an_item_that_comes_when_its_channel_was_left_is_not_told() -> None:
    """It is decoded together with a request whose handler closes the channel."""
    ours = Recorder()
    opened: list[Channel] = []

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        await opened[0].aclose()
        return request

    async with raw_peer(request_handler=handler, settings=ours.settings()) as (connection, peer):
        async with connection.open_channel(["a"]) as channel:
            opened.append(channel)
            await peer.receive()
            together = packet(b"item", b"0", body=[b"x"])
            together += packet(b"req", b"1", b"", b"", b"", body=[])
            together += packet(b"item", b"0", body=[b"y"])
            await peer.stream.send_all(together)
            assert (await peer.receive())[0] in (b"cancel", b"ok")
    assert [event.outcome for event in ours.ended] == ["cancelled", "ok"]
    assert [event.size for event in ours.of(ItemPassed)] == [6]


# ---- handshakes ----


async def test_a_refused_handshake_has_its_code() -> None:
    ours, theirs = Recorder(), Recorder()
    async with open_memory_server(echo, settings=theirs.settings(max_connections=1)) as server:
        async with server.connect(settings=ours.settings()):
            with pytest.raises(ConnectionRefused):
                async with server.connect(settings=ours.settings()):
                    raise AssertionError
    for recorder in (ours, theirs):
        recorder.check()
        assert [(each.outcome, each.code) for each in recorder.of(HandshakeEnded)] == [
            ("ok", ""),
            ("refused", "busy"),
        ]
    assert "max_connections" in ours.of(HandshakeEnded)[1].error
    assert len(ours.of(ConnectionOpened)) == len(theirs.of(ConnectionOpened)) == 1


async def test_a_wrong_key_and_nonsense_and_leaving_are_told(autojump_clock: MockClock) -> None:
    ours, theirs = Recorder(), Recorder()
    listener = MemoryListener()
    keys = {"u": Key.generate()}
    async with open_server([listener], echo, user_key=keys, settings=theirs.settings()):
        with pytest.raises(HandshakeError):
            async with open_connection(
                listener.connect(), user="u", key=Key.generate(), settings=ours.settings()
            ):
                raise AssertionError
        with trio.move_on_after(1), pytest.raises(trio.Cancelled):
            async with open_connection(
                trio.testing.memory_stream_pair()[0], user="u", key=keys["u"], settings=ours.settings()
            ):
                raise AssertionError
        stream = listener.connect()
        await stream.send_all(b"GET / HTTP/1.1\r\n\r\n" * 10)
        await settle()
    for recorder in (ours, theirs):
        recorder.check()
    assert [each.outcome for each in ours.of(HandshakeEnded)] == ["authentication", "cancelled"]
    assert ours.of(HandshakeEnded)[1].seconds == 1
    assert [each.outcome for each in theirs.of(HandshakeEnded)] == ["authentication", "failed"]


async def test_a_handshake_without_a_place_is_told(autojump_clock: MockClock) -> None:
    theirs = Recorder()
    listener = MemoryListener()
    key = Key.generate()

    async def look_up(user: str) -> Key:
        await trio.sleep(1)
        return key

    async def connect() -> None:
        async with open_connection(listener.connect(), user="u", key=key):
            pass

    settings = theirs.settings(max_handshakes=1)
    async with (
        open_server([listener], echo, user_key=look_up, settings=settings),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(connect)
        await settle()
        with pytest.raises(HandshakeError):
            await connect()
    theirs.check()
    assert [(each.outcome, each.error, each.seconds) for each in theirs.of(HandshakeEnded)] == [
        ("failed", "there was no place for its handshake", 0),
        ("ok", "", 1),
    ]


async def test_each_connection_of_a_reconnecting_one_is_told() -> None:
    ours = Recorder()
    async with (
        open_server("127.0.0.1:0", echo) as server,
        open_reconnecting(server.addresses[0], settings=ours.settings()) as client,
    ):
        for _ in range(2):
            assert client.connection is not None or await client.request(["wait"])
            await client.request(["a"])
            [connection] = server.connections
            await connection.aclose()
            await trio.sleep(0.01)
    ours.check()
    assert len(ours.of(ConnectionOpened)) >= 2
    assert set(ours.outcomes) == {"ok"}


# ---- what travels beside a request ----


class Adding(Recorder):
    """Adds to the context of requests."""

    def __init__(self, added: Any) -> None:
        super().__init__()
        self.added = added

    def context_for(self, event: RequestStarted) -> Mapping[str, bytes | str]:
        assert self.events[-1] is event
        added: Mapping[str, bytes | str] = self.added
        return added


async def tell_context(connection: Connection, request: list[bytes]) -> list[bytes | str]:
    await trio.lowlevel.checkpoint()
    return [f"{name}={value.decode()[:5]}" for name, value in current_request().context.items()]


async def test_instruments_add_to_the_context_and_read_it() -> None:
    first, second = Adding({"trace": "1", "mine": "x"}), Adding({"trace": "2", "more": b"3"})
    async with recorded_pair(tell_context, client_settings=Settings(instruments=[first, second])) as (
        client,
        _,
        _,
        theirs,
    ):
        assert await client.request([]) == [b"trace=1", b"mine=x", b"more=3"]
        mine = {"mine": "mine"}
        assert await client.request([], context=mine) == [b"mine=mine", b"trace=1", b"more=3"]
        assert mine == {"mine": "mine"}
        async with client.open_channel([]) as channel:
            with pytest.raises(RemoteError):
                await channel.answer()
    assert [event.context for event in first.of(RequestStarted)] == [{}, {"mine": "mine"}, {}]
    assert theirs.of(RequestStarted)[0].context == {"trace": b"1", "mine": b"x", "more": b"3"}
    first.check()


async def test_what_is_told_of_a_context_does_not_change() -> None:
    async with recorded_pair(echo) as (client, _, ours, _):
        context: dict[str, bytes | str] = {"a": "1"}
        await client.request([], context=context)
        context["a"] = "2"
        [started] = ours.of(RequestStarted)
        assert started.context == {"a": "1"}
        with pytest.raises(TypeError):
            started.context["a"] = "3"
        with pytest.raises(AttributeError):
            started.name = "b"


@pytest.mark.parametrize(
    ("added", "size", "context"),
    [
        ({f"n{number}": "" for number in range(40)}, 1, [f"n{number}=" for number in range(32)]),
        ({"a": "1", "b": bytes(9000), "c": "2"}, 1, ["a=1"]),
        ({"a": "1", "b": bytes(300), "c": "2"}, 3800, ["a=1"]),
        ({"a": "1"}, 4096 - 128 - 5, []),
    ],
)
async def test_what_does_not_fit_is_left_out(
    added: Mapping[str, bytes | str], size: int, context: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(instruments=[Adding(added)], max_message_size=4096)
    if size == 1:
        settings = Settings(instruments=[Adding(added)])
    async with recorded_pair(tell_context, client_settings=settings) as (client, *_):
        for _ in range(2):
            assert await client.request([bytes(size - 1)]) == [each.encode() for each in context]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("added", [None, 5, {"A": "b"}, {"a": 5}, {5: "b"}, {"": "b"}])
async def test_a_context_that_is_none_harms_nothing(added: Any, caplog: pytest.LogCaptureFixture) -> None:
    bad, good = Adding(added), Adding({"good": "1"})
    async with recorded_pair(tell_context, client_settings=Settings(instruments=[bad, good])) as (
        client,
        *_,
    ):
        for _ in range(3):
            assert await client.request([]) == [b"good=1"]
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "Adding.context_for failed, and this instrument is not called any more" in record.message
    assert len(bad.of(RequestStarted)) == 1
    good.check()


# ---- context variables ----

LABEL: ContextVar[str] = ContextVar("label", default="nothing")


class Labelling(Instrument):
    """Sets a context variable for each request of the peer's."""

    def request_started(self, event: RequestStarted) -> None:
        if event.direction == "in":
            assert LABEL.get() == "nothing"
            assert current_request().id == event.id
            LABEL.set(event.name)


@pytest.mark.parametrize("waits", [False, True])
async def test_a_context_variable_is_the_handlers_and_nobody_elses(waits: bool) -> None:
    seen: list[str] = []

    async def look() -> None:
        seen.append(LABEL.get())
        if waits:
            await trio.testing.wait_all_tasks_blocked()
            seen.append(LABEL.get())

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes | str]:
        await look()
        if request[0].startswith(b"task"):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(look)
        return [LABEL.get(), *(await connection.request(request) if request[1:] else [])]

    settings = Settings(instruments=[Labelling()])
    async with (
        open_connection_pair(handler, handler, client_settings=settings, server_settings=settings) as (
            client,
            _,
        ),
        trio.open_nursery() as nursery,
    ):

        async def ask(name: str) -> None:
            for _ in range(5):
                request = [name] if name == "a" else [name, "back"]
                if name == "task b":
                    request = [name]
                assert await client.request(request) == [name.encode()] * len(request)
                assert LABEL.get() == "nothing"

        for name in ("a", "task b"):
            nursery.start_soon(ask, name)
    assert set(seen) == {"a", "task b"}


async def test_many_requests_of_one_receive_have_contexts_of_their_own() -> None:
    """All but the first begin in tasks of their own, as that one waits."""

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes | str]:
        await trio.lowlevel.checkpoint()
        return [LABEL.get()]

    settings = Settings(instruments=[Labelling()])
    async with (
        open_connection_pair(server_handler=handler, server_settings=settings) as (client, _),
        trio.open_nursery() as nursery,
    ):

        async def ask(name: str) -> None:
            assert await client.request([name]) == [name.encode()]

        for number in range(40):
            nursery.start_soon(ask, f"r{number}")


# ---- instruments that fail ----


class Oops(BaseException):
    """No exception that anybody expects."""


METHODS = [name for name in vars(Instrument) if not name.startswith("_")]


@pytest.mark.parametrize("error", [ValueError, Oops, SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("method", METHODS)
async def test_an_instrument_that_fails_is_logged_once_and_harms_nothing(
    method: str, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[object] = []

    def fail(_self: object, event: object) -> None:
        calls.append(event)
        raise error("my own fault")

    failing = type("Failing", (Instrument,), {method: fail})()
    good = Recorder()
    settings = Settings(instruments=[failing, good])

    async def upper(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
        async for [item] in channel:
            await channel.send([item.upper()])
        return await connection.request(["back"])

    async with open_memory_server(echo, channel_handler=upper) as server:
        for _ in range(2):
            async with server.connect(request_handler=echo, settings=settings) as client:
                assert await client.request(["a"]) == [b"a"]
                async with client.open_channel(["b"]) as channel:
                    for _ in range(2):
                        await channel.send(["x"])
                        assert await channel.receive() == [b"X"]
                    await channel.end()
                    assert await channel.answer() == [b"back"]
    good.check()
    assert good.outcomes == ["ok", "ok", "ok"] * 2
    assert len(calls) == 1
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.message == f"Failing.{method} failed, and this instrument is not called any more"
    assert record.exc_info is not None
    assert record.exc_info[0] is error


async def test_the_methods_to_override_do_nothing_and_may_be_called() -> None:
    class Polite(Recorder):
        def request_started(self, event: RequestStarted) -> None:
            super().request_started(event)
            Instrument.request_started(self, event)

        def context_for(self, event: RequestStarted) -> Mapping[str, bytes | str]:
            return {**super().context_for(event), "a": "1"}

    settings = Settings(instruments=[Polite()])
    async with open_connection_pair(server_handler=tell_context, client_settings=settings) as (client, _):
        assert await client.request([]) == [b"a=1"]


async def test_only_what_is_overridden_is_called() -> None:
    class Half(Instrument):
        def __init__(self) -> None:
            self.names: list[str] = []
            self.request_ended = self.note  # type: ignore[method-assign]

        def note(self, event: RequestEnded) -> None:
            self.names.append(event.request.name)

    half = Half()
    async with open_connection_pair(server_handler=echo, client_settings=Settings(instruments=[half])) as (
        client,
        _,
    ):
        await client.request(["a"])
    assert half.names == ["a"]


@pytest.mark.parametrize(
    ("instruments", "text"),
    [
        (Recorder(), "a list of instruments, not Recorder"),
        (None, "a list of instruments, not NoneType"),
        ([Recorder], r"not <class .*Recorder'>: make an object of it"),
        (["log"], "not 'log'$"),
    ],
)
def test_what_is_no_instrument_is_refused(instruments: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        Settings(instruments=instruments)


def test_the_instruments_of_settings_cannot_change() -> None:
    instruments: list[Instrument] = [Recorder()]
    settings = Settings(instruments=instruments)
    instruments.clear()
    assert len(settings.instruments) == 1
    assert settings == Settings(instruments=settings.instruments)
    assert Settings()._instruments is None


async def test_a_connection_that_is_watched_is_freed_at_once() -> None:
    class Keeping(Instrument):
        def __init__(self) -> None:
            self.opened: list[weakref.ref[Connection]] = []

        def connection_opened(self, event: ConnectionOpened) -> None:
            self.opened.append(weakref.ref(event.connection))

    keeping = Keeping()
    settings = Settings(instruments=[keeping])
    listener = MemoryListener()
    gc.disable()
    try:
        async with open_server([listener], echo, settings=settings):
            async with open_connection(listener.connect(), settings=settings) as client:
                await client.request(["a"])
            del client
            await settle()
            assert [each() for each in keeping.opened] == [None, None]
    finally:
        gc.enable()


# ---- at random ----


@pytest.mark.parametrize("seed", range(12))
async def test_whatever_happens_each_request_that_starts_ends_once(
    seed: int, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests, nested callbacks, channels, errors, cancellations, deadlines, and at last an end."""
    caplog.set_level(logging.CRITICAL, logger="bokbok_trio")
    chance = random.Random(seed)

    async def act(connection: Connection, depth: int) -> None:
        if depth > 4:
            return
        with trio.CancelScope() as scope:
            match chance.randrange(5):
                case 0:
                    scope.deadline = trio.current_time() + chance.random()
                case 1:
                    scope.cancel()
                case _:
                    pass
            await trio.sleep(chance.choice([0, 0, 0.1, 1]))
            with suppress(RemoteError, ConnectionLost, ConnectionClosed, trio.BrokenResourceError):
                if chance.random() < 0.6:
                    await connection.request([b"%d" % depth, bytes(chance.choice([0, 0, 90_000]))])
                else:
                    async with connection.open_channel([b"%d" % depth]) as channel:
                        for _ in range(chance.randrange(4)):
                            await channel.send([bytes(chance.choice([1, 300, 70_000]))])
                        if chance.random() < 0.5:
                            await channel.end()
                            await channel.answer()

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        match chance.randrange(6):
            case 0:
                raise RequestError("no", code="no")
            case 1:
                raise ValueError("no")
            case 2:
                await trio.sleep(chance.random())
            case 3:
                await act(connection, int(request[0]) + 1)
            case _:
                pass
        return request

    async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
        with suppress(trio.BrokenResourceError):
            async for item in channel:
                if chance.random() < 0.5:
                    await channel.send(item)
        return await handler(connection, request)

    ours, theirs = Recorder(), Recorder()
    bounds: Mapping[str, Any] = {"max_requests": chance.choice([1, 3, 100])}
    async with open_connection_pair(
        handler,
        handler,
        client_channel_handler=channel_handler,
        server_channel_handler=channel_handler,
        client_settings=ours.settings(**bounds),
        server_settings=theirs.settings(**bounds),
    ) as (client, server):
        with trio.move_on_after(5):
            async with trio.open_nursery() as nursery:
                ends: list[Callable[[], object]] = [
                    client.drain,
                    server.drain,
                    partial(client._ending.fail, "by chance"),
                    partial(server._ending.fail, "by chance"),
                    partial(nursery.start_soon, client.aclose),
                    partial(nursery.start_soon, server.aclose),
                ]
                for _ in range(40):
                    nursery.start_soon(act, chance.choice([client, server]), 0)
                await trio.sleep(chance.random() * 2)
                chance.choice(ends)()
    for recorder in (ours, theirs):
        recorder.check()
        assert len(recorder.of(RequestStarted)) == len(recorder.ended) > 10
