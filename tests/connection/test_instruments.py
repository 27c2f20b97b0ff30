"""The events of instruments: all that starts ends once, and an instrument that fails gets no more."""

from __future__ import annotations

import gc
import logging
import math
import random
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from bokbok_trio import (
    Channel,
    Connection,
    ConnectionClosed,
    ConnectionLost,
    ConnectionRefused,
    HandshakeError,
    Key,
    RemoteError,
    RequestError,
    Settings,
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
from tests.support.handlers import tell_context
from tests.support.inside import break_transport
from tests.support.recorder import recorded_pair

from ..support.helpers import echo, settle
from ..support.pairs import open_pair, over_all_ways, settle as settle_sockets
from ..support.recorder import Recorder

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


# ---- instruments that fail ----


class Oops(BaseException):
    """An exception that nobody expects."""


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
    assert Settings().instruments == ()


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
                    partial(nursery.start_soon, break_transport, client),
                    partial(nursery.start_soon, break_transport, server),
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
