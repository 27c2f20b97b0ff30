"""The events of the ends of requests, with the times that the requests waited."""

from __future__ import annotations

import math
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from bokbok_trio import (
    Channel,
    Connection,
    ConnectionClosed,
    ConnectionLost,
    MessageTooLarge,
    RemoteError,
    RequestError,
    open_connection,
    open_server,
)
from bokbok_trio.instruments import ConnectionEnded, ItemPassed, RequestStarted
from bokbok_trio.testing import MemoryListener, open_memory_server
from tests.support.handlers import cancelled_in_its_handler, sleep_forever
from tests.support.recorder import recorded_pair

from ..support.helpers import echo, packet, raw_peer, settle
from ..support.recorder import Recorder

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

    async with recorded_pair(handler) as (client, server, ours, theirs):
        async with cancelled_in_its_handler(server):
            await client.request(["a"])
        await client.aclose()
        await settle()
        assert not theirs.ended
        assert not theirs.of(ConnectionEnded)
        may_end.set()
    assert ours.outcomes == ["cancelled"]
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
