"""`current_request` and the context of a request."""

from __future__ import annotations

import contextvars
import math
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings, strategies as st
from trio.testing import MockClock

from bokbok_trio import Channel, Connection, CurrentRequest, current_request
from bokbok_trio.testing import open_connection_pair
from tests.support.pairs import open_pair, over_all_ways


class Witness:
    """Handlers of both kinds that record the current request."""

    def __init__(self) -> None:
        self.seen: list[CurrentRequest] = []

    async def handle(self, connection: Connection, request: list[bytes]) -> list[bytes]:
        self.note()
        await trio.lowlevel.checkpoint()
        self.note()
        return request

    async def handle_channel(self, connection: Connection, request: list[bytes], channel: Channel) -> None:
        await self.handle(connection, request)

    def note(self) -> None:
        self.seen.append(current_request())


async def ask(connection: Connection, by_channel: bool, context: Any = None) -> None:
    if by_channel:
        async with connection.open_channel([], context=context) as channel:
            await channel.answer()
    else:
        await connection.request([], context=context)


# ---- where it is right ----


@over_all_ways
@pytest.mark.parametrize("by_channel", [False, True])
async def test_it_is_right_in_a_handler_all_along(way: str, by_channel: bool) -> None:
    witness = Witness()
    async with open_pair(way, None, witness.handle, server_channel_handler=witness.handle_channel) as (
        client,
        server,
    ):
        await ask(client, by_channel)
        await ask(client, by_channel, {"trace": "1"})
        first, again, second, _ = witness.seen
        assert first is again
        assert first.connection is second.connection is server
        assert first.id != second.id
        assert first.user == second.user == server.user == ("u" if "sealed" in way else None)
        assert first.deadline == math.inf
        assert first.depth == 0
        assert (dict(first.context), dict(second.context)) == ({}, {"trace": b"1"})
        assert str(first.id) in repr(first)


async def test_it_is_right_in_tasks_and_threads_that_a_handler_starts() -> None:
    seen: list[tuple[CurrentRequest, CurrentRequest]] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        mine = current_request()

        async def task() -> None:
            await trio.lowlevel.checkpoint()
            seen.append((mine, current_request()))

        async def from_a_thread() -> CurrentRequest:
            return current_request()

        def thread() -> None:
            seen.append((mine, current_request()))
            seen.append((mine, trio.from_thread.run(from_a_thread)))
            seen.append((mine, trio.from_thread.run_sync(current_request)))

        await trio.to_thread.run_sync(thread)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task)
            nursery.start_soon(task)

    async with open_pair("tcp plain", None, handler) as (client, _), trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(client.request, [])
    assert len(seen) == 50
    assert all(mine is found for mine, found in seen)
    assert len({found.id for _, found in seen}) == 10


async def test_handlers_of_both_sides_at_once_have_their_own(autojump_clock: MockClock) -> None:
    wrong: list[object] = []

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        name = request[0]
        n = int(request[1])
        for _ in range(3):
            if current_request().connection is not connection:
                wrong.append("connection")
            if dict(current_request().context) != {"name": name}:
                wrong.append(dict(current_request().context))
            await trio.sleep(n % 3)
            if n:
                await connection.request([name, str(n - 1)], context={"name": name})
            n = 0
        return []

    async with open_connection_pair(handler, handler) as (client, server):
        async with trio.open_nursery() as nursery:
            for i in range(20):
                for side in (client, server):

                    async def begin(side: Connection = side, name: str = f"{i} {side.side}") -> None:
                        await side.request([name, "5"], context={"name": name})

                    nursery.start_soon(begin)
    assert wrong == []


async def test_elsewhere_there_is_none() -> None:
    outcomes: list[object] = []

    def look() -> None:
        try:
            outcomes.append(current_request())
        except RuntimeError as exc:
            outcomes.append(str(exc))

    async def look_async(connection: Connection) -> None:
        await trio.lowlevel.checkpoint()
        look()

    look()
    thread = threading.Thread(target=look)
    thread.start()
    await trio.to_thread.run_sync(thread.join)
    async with open_pair(
        "tcp plain",
        None,
        Witness().handle,
        client_close_handler=look_async,
        server_close_handler=look_async,
    ) as (client, _):
        look()
        await client.request([])
        look()
        async with client.open_channel([]):
            look()
    assert len(outcomes) == 7
    assert all(isinstance(outcome, str) and "handler" in outcome for outcome in outcomes), outcomes


async def test_a_variable_of_a_handler_is_left_in_no_other() -> None:
    seen: list[object] = []

    async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> None:
        await trio.lowlevel.checkpoint()

    async def handler(connection: Connection, request: list[bytes]) -> None:
        seen.append(dict(contextvars.copy_context().items()).get(marker))
        marker.set("set")
        await trio.lowlevel.checkpoint()

    marker: contextvars.ContextVar[str] = contextvars.ContextVar("marker")
    async with open_pair("tcp plain", None, handler, server_channel_handler=channel_handler) as (client, _):
        for _ in range(5):
            await client.request([])
            await ask(client, by_channel=True)
    assert seen == [None] * 5


@pytest.mark.parametrize("by_channel", [False, True])
async def test_the_deadline_is_the_askers(by_channel: bool, autojump_clock: MockClock) -> None:
    witness = Witness()
    async with open_connection_pair(None, witness.handle, server_channel_handler=witness.handle_channel) as (
        client,
        _,
    ):
        with trio.fail_after(7):
            await ask(client, by_channel)
    assert witness.seen[0].deadline == pytest.approx(trio.current_time() + 7, abs=1e-3)


# ---- the context ----


@over_all_ways
@pytest.mark.parametrize("by_channel", [False, True])
async def test_a_context_arrives_and_cannot_be_changed(way: str, by_channel: bool) -> None:
    witness = Witness()
    given = {"trace.id": b"\x00\xff", "b-3_x": "text \u20ac", "empty": b"", "view": memoryview(b"view")}
    async with open_pair(way, None, witness.handle, server_channel_handler=witness.handle_channel) as (
        client,
        _,
    ):
        await ask(client, by_channel, given)
    assert isinstance(witness.seen[0].context, Mapping)
    context: Any = witness.seen[0].context
    assert dict(context) == {
        "trace.id": b"\x00\xff",
        "b-3_x": "text \u20ac".encode(),
        "empty": b"",
        "view": b"view",
    }
    assert all(type(value) is bytes for value in context.values())
    with pytest.raises(TypeError):
        context["more"] = b""
    with pytest.raises(TypeError):
        del context["empty"]
    with pytest.raises((TypeError, AttributeError)):
        context.clear()


async def test_nothing_forwards_a_context_by_itself() -> None:
    contexts: list[dict[str, bytes]] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        contexts.append(dict(current_request().context))
        if request:
            await connection.request([])
            await connection.request([], context=current_request().context)

    async with open_pair("tcp plain", handler, handler) as (client, _):
        await client.request(["on"], context={"a": "1"})
    assert contexts == [{"a": b"1"}, {}, {"a": b"1"}]


@pytest.mark.parametrize(
    "context",
    [
        {"a" * 64: b"x"},
        {f"name{i}": b"" for i in range(32)},
        {"a": bytes(8192 - 100)},
        {},
        None,
        {"0.9-_z": "x"},
    ],
)
@pytest.mark.parametrize("by_channel", [False, True])
async def test_contexts_that_are_just_within_the_bounds(context: Any, by_channel: bool) -> None:
    witness = Witness()
    async with open_pair(
        "tcp sealed", None, witness.handle, server_channel_handler=witness.handle_channel
    ) as (client, _):
        with trio.fail_after(5):
            await ask(client, by_channel, context)
    assert set(witness.seen[0].context) == set(context or {})


@pytest.mark.parametrize(
    ("context", "error"),
    [
        ({"": b""}, ValueError),
        ({"a" * 65: b""}, ValueError),
        ({"A": b""}, ValueError),
        ({"a b": b""}, ValueError),
        ({"a\n": b""}, ValueError),
        ({"\u00e4": b""}, ValueError),
        ({"a/b": b""}, ValueError),
        ({f"name{i}": b"" for i in range(33)}, ValueError),
        ({"a": bytes(8193)}, ValueError),
        ({"a": bytes(5000), "b": bytes(5000)}, ValueError),
        ({"a": "\ud800"}, ValueError),
        ({1: b""}, TypeError),
        ({b"a": b""}, TypeError),
        ({"a": 1}, TypeError),
        ({"a": None}, TypeError),
        ([("a", b"")], TypeError),
        ("a", TypeError),
        (b"a", TypeError),
        (7, TypeError),
        ([], TypeError),
        ("", TypeError),
        (0, TypeError),
    ],
)
@pytest.mark.parametrize("by_channel", [False, True])
async def test_contexts_that_cannot_be_sent_are_refused_before_anything_is(
    context: Any, error: type[Exception], by_channel: bool
) -> None:
    witness = Witness()
    async with open_pair(
        "tcp plain", None, witness.handle, server_channel_handler=witness.handle_channel
    ) as (client, _):
        for _ in range(2):
            with pytest.raises(error):
                await ask(client, by_channel, context)
        assert client.statistics().used_slots == 0
        with trio.fail_after(5):
            await ask(client, by_channel)
    assert len(witness.seen) == 2


names = st.text("abcdefghijklmnopqrstuvwxyz0123456789.-_", min_size=1, max_size=64)


@given(st.dictionaries(names, st.binary(max_size=100), max_size=32), st.booleans())
@settings(max_examples=50, deadline=None)
def test_any_context_arrives_as_it_was_given(context: dict[str, bytes], by_channel: bool) -> None:
    witness = Witness()

    async def main() -> None:
        async with open_connection_pair(
            None, witness.handle, server_channel_handler=witness.handle_channel, sealed=False
        ) as (client, _):
            await ask(client, by_channel, context)

    trio.run(main)
    assert dict(witness.seen[0].context) == context
