from __future__ import annotations

import gc
import math
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings, strategies as st

from bokbok_trio import (
    Channel,
    Connection,
    ConnectionClosed,
    ConnectionLost,
    RemoteError,
    RequestError,
    RequestHandler,
    Server,
    Settings,
    open_connection,
    open_server,
)
from bokbok_trio._connection.ending import CLOSE_TIMEOUT
from bokbok_trio._connection.handlers import LEFT_OPEN
from bokbok_trio._protocol.coalescing import EARLY_FLUSH_PACKETS, INTERACTIVE_RECEIVES
from bokbok_trio._protocol.packets import LARGE, LARGE_BATCH, MAX_AT_ONCE
from bokbok_trio._stream.socket import RECEIVE_SIZE, SocketStream, _scratch
from bokbok_trio.testing import FaultyStream, MemoryListener, open_connection_pair
from tests.support.helpers import (
    RawPeer,
    WholeStream,
    cancel,
    echo,
    open_peer,
    outcomes,
    packet,
    receive_but_credit,
    req,
    settle,
)
from tests.support.inside import check_idle
from tests.support.strategies import chunked

in_memory_and_over_sockets = pytest.mark.parametrize("over_sockets", [False, True])


async def never_waits(connection: Connection, request: list[bytes]) -> list[bytes]:
    return request


class Foreign:
    """What an object of another event loop does when it is awaited."""

    def __await__(self) -> Generator[str, Any, Any]:
        return (yield "are you there, asyncio?")


# ---- which task does what ----


@in_memory_and_over_sockets
async def test_handlers_that_wait_for_nothing_run_in_the_task_that_reads_in_the_order_they_came(
    over_sockets: bool,
) -> None:
    ran: list[tuple[bytes, trio.lowlevel.Task]] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        ran.append((request[0], trio.lowlevel.current_task()))
        if request[0] == b"2":
            raise RequestError("no")

    settings = Settings(max_requests=100)
    async with open_peer(handler, settings, over_sockets=over_sockets) as (connection, peer):
        await peer.stream.send_all(b"".join(req(1 + 2 * n, b"%d" % n) for n in range(50)))
        assert await outcomes(peer, 50) == {
            1 + 2 * n: b"request-error" if n == 2 else b"ok" for n in range(50)
        }
        await peer.stream.send_all(req(1, b"50"))
        await peer.receive()
        assert [field for field, _ in ran] == [b"%d" % n for n in range(51)]
        assert len({task for _, task in ran}) == 1
        await settle()
        await settle()
        check_idle(connection)


@in_memory_and_over_sockets
async def test_a_handler_that_waits_keeps_its_task_and_another_reads_on(
    over_sockets: bool, autojump_clock: trio.testing.MockClock
) -> None:
    tasks: dict[bytes, list[trio.lowlevel.Task]] = {}

    async def handler(connection: Connection, request: list[bytes]) -> None:
        [name] = request
        tasks[name] = [trio.lowlevel.current_task()]
        if name != b"now":
            await trio.sleep(1)
            tasks[name].append(trio.lowlevel.current_task())
            await trio.sleep(1)
            tasks[name].append(trio.lowlevel.current_task())

    async with open_peer(handler, over_sockets=over_sockets) as (connection, peer):
        await peer.stream.send_all(req(1, b"a") + req(3, b"now") + req(5, b"b"))
        assert await peer.receive() == packet_fields(b"ok", b"3")
        assert connection.statistics().handlers_running == 2
        await peer.stream.send_all(req(7, b"c"))
        assert await outcomes(peer, 3) == {1: b"ok", 5: b"ok", 7: b"ok"}
        assert trio.current_time() == 2
        assert all(len(set(each)) == 1 for each in tasks.values())
        assert len({each[0] for each in tasks.values()}) == 4
        await settle()
        check_idle(connection)


async def test_two_tasks_take_turns_where_each_handler_waits() -> None:
    tasks: list[trio.lowlevel.Task] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        tasks.append(trio.lowlevel.current_task())
        await trio.lowlevel.checkpoint()

    async with open_peer(handler) as (connection, peer):
        for n in range(6):
            await peer.stream.send_all(req(1 + 2 * n))
            assert (await peer.receive())[0] == b"ok"
            await settle()
        assert tasks == tasks[:2] * 3
        assert tasks[0] is not tasks[1]
        await settle()
        check_idle(connection)


async def test_of_the_tasks_whose_handlers_have_ended_one_waits_for_its_turn() -> None:
    may_end = trio.Event()

    async def handler(connection: Connection, request: list[bytes]) -> None:
        await may_end.wait()

    async with open_peer(handler, Settings(max_requests=9)) as (connection, peer):
        for n in range(5):  # each in a receive of its own, so that each is called by who reads
            await peer.stream.send_all(req(1 + 2 * n))
            await settle()
        reader = connection._reader
        assert reader._nursery is not None
        assert len(reader._nursery.child_tasks) == 6
        may_end.set()
        await outcomes(peer, 5)
        await settle()
        assert reader._turn.follower is not None
        await settle()
        check_idle(connection)
        await peer.stream.aclose()
        await settle()
        assert reader._turn.follower is None
        assert not reader._nursery.child_tasks


def packet_fields(*fields: bytes) -> list[bytes]:
    """An answer without fields, as it arrives."""
    return [*fields, b"\0"]


async def test_one_task_reads_through_a_mixture_of_handlers() -> None:
    most = 0

    async def handler(connection: Connection, request: list[bytes]) -> None:
        nonlocal most
        nursery = connection._reader._nursery
        assert nursery is not None
        most = max(most, len(nursery.child_tasks))
        assert connection.statistics().handlers_running >= 1  # one called by the task that reads counts
        for _ in range(int(request[0])):
            await trio.lowlevel.checkpoint()

    async with open_peer(handler, Settings(max_requests=6)) as (connection, peer):
        for turn in range(20):
            waits = [(turn * n) % 4 for n in range(6)]
            await peer.stream.send_all(b"".join(req(1 + 2 * n, b"%d" % w) for n, w in enumerate(waits)))
            assert set((await outcomes(peer, 6)).values()) == {b"ok"}
        await settle()
        await settle()
        check_idle(connection)
    assert most <= 7


async def test_requests_wait_for_the_open_handler_and_all_are_handled_then(
    autojump_clock: trio.testing.MockClock,
) -> None:
    started: list[float] = []

    async def open_handler(connection: Connection) -> None:
        await trio.sleep(1)

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        started.append(trio.current_time())
        return request

    listener = MemoryListener()
    async with (
        open_server([listener], handler, open_handler=open_handler),
        open_connection(listener.connect()) as client,
        trio.open_nursery() as nursery,
    ):
        for _ in range(10):
            nursery.start_soon(client.request, ["x"])
    assert started == [1] * 10


async def test_where_there_is_no_handler_what_comes_is_answered_before_and_after_one_that_waits() -> None:
    gate = trio.Event()

    async def handler(connection: Connection, request: list[bytes]) -> None:
        await gate.wait()

    chan = (
        packet(b"chan", b"1", b"", b"", b"", b"0", body=[]),
        packet(b"chan", b"5", b"", b"", b"", b"0", body=[]),
    )
    async with open_peer(handler) as (connection, peer):
        await peer.stream.send_all(chan[0] + req(3) + chan[1])
        assert await outcomes(peer, 2) == {1: b"no-channel", 5: b"no-channel"}
        gate.set()
        assert await outcomes(peer, 1) == {3: b"ok"}
        await settle()
        await settle()
        check_idle(connection)


# ---- what a handler may count on ----

variable: ContextVar[str] = ContextVar("variable", default="unset")


async def test_context_variables_are_each_handlers_own() -> None:
    seen: list[str] = []

    async def look() -> None:
        seen.append(variable.get())

    async def handler(connection: Connection, request: list[bytes]) -> None:
        seen.append(variable.get())
        token = variable.set(request[0].decode())
        if request[0] != b"now":
            await trio.lowlevel.checkpoint()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(look)
            await trio.to_thread.run_sync(lambda: seen.append(variable.get()))
            seen.append(variable.get())
            variable.reset(token)
            seen.append(variable.get())

    async with open_peer(handler) as (_, peer):
        await peer.stream.send_all(req(1, b"now") + req(3, b"later") + req(5, b"now"))
        await outcomes(peer, 3)
        await peer.stream.send_all(req(7, b"now"))
        await peer.receive()
        # A handler sees none of the others': not those of the task that reads either.
        assert sorted(seen) == ["later"] * 3 + ["unset"] * 5
    assert variable.get() == "unset"


async def test_the_deadline_of_a_request_is_that_of_a_handler_called_by_the_task_that_reads(
    autojump_clock: trio.testing.MockClock,
) -> None:
    deadlines: list[float] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        deadlines.append(trio.current_effective_deadline())
        if request:
            await trio.sleep_forever()

    async with open_peer(handler) as (connection, peer):
        # The second has none left, but asks for nothing that takes time.
        await peer.stream.send_all(req(1, timeout=b"2000000") + req(3, timeout=b"0") + req(5))
        assert await outcomes(peer, 3) == {1: b"ok", 3: b"ok", 5: b"ok"}
        assert deadlines == [2, 0, math.inf]
        await peer.stream.send_all(req(1, b"x", timeout=b"2000000") + req(3, b"x", timeout=b"0") + req(5))
        assert await outcomes(peer, 3) == {1: b"timeout", 3: b"timeout", 5: b"ok"}
        assert trio.current_time() == 2
        await settle()
        check_idle(connection)


async def test_a_handler_called_by_the_task_that_reads_cannot_wait_until_the_connection_has_ended() -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        await connection.wait_closed()

    async with open_connection_pair(server_handler=handler) as (client, _):
        with pytest.raises(RemoteError, match="RuntimeError: a task of the connection"):
            await client.request([])


async def test_handlers_call_back_and_are_called_back_hundreds_at_once(sealed: bool) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        [left] = request
        return [b"done"] if left == b"0" else await connection.request([b"%d" % (int(left) - 1)])

    answers: list[list[bytes]] = []

    async def ask(connection: Connection, depth: int) -> None:
        answers.append(await connection.request([str(depth)]))

    many = Settings(max_requests=2000)
    async with open_connection_pair(
        handler, handler, sealed=sealed, client_settings=many, server_settings=many
    ) as pair:
        async with trio.open_nursery() as nursery:
            for n in range(300):
                nursery.start_soon(ask, pair[n % 2], n % 7)
        for connection in pair:
            await settle()
            await settle()
            check_idle(connection)
    assert answers == [[b"done"]] * 300


async def test_a_handler_is_handed_an_answer_that_came_together_with_its_request() -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        return await connection.request(request)

    async with open_peer(handler) as (connection, peer), trio.open_nursery() as nursery:
        nursery.start_soon(connection.request, [])
        await peer.receive()
        # The handler asks, and waits; behind its request there is an answer to another one.
        await peer.stream.send_all(req(1, b"x") + packet(b"ok", b"0", body=[]) + req(3, b"y"))
        asked = sorted([await peer.receive(), await peer.receive()])
        assert [fields[:2] for fields in asked] == [[b"req", b"2"], [b"req", b"4"]]
        await peer.stream.send_all(packet(b"ok", b"4", body=[]) + packet(b"ok", b"2", body=[]))
        assert await outcomes(peer, 2) == {1: b"ok", 3: b"ok"}
        await settle()
        check_idle(connection)


@pytest.mark.filterwarnings("ignore:Async generator .* was garbage collected:ResourceWarning")
@pytest.mark.parametrize("has_scope", [False, True])
async def test_an_async_generator_left_early_by_a_handler_harms_no_other(has_scope: bool) -> None:
    async def count() -> AsyncGenerator[bytes]:
        with trio.CancelScope() if has_scope else nullcontext():
            yield b"0"
            yield b"1"

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        if request:
            return request
        async for number in count():
            return [number]
        raise AssertionError

    async with open_peer(handler, Settings(max_requests=4)) as (connection, peer):
        await peer.stream.send_all(req(1) + req(3, b"x") + req(5) + req(7, b"x"))
        left = b"handler-error" if has_scope else b"ok"
        assert await outcomes(peer, 4) == {1: left, 3: b"ok", 5: left, 7: b"ok"}
        gc.collect()
        await settle()
        await peer.stream.send_all(req(1))
        assert await outcomes(peer, 1) == {1: left}
        await settle()
        check_idle(connection)


# ---- cancelling ----


@in_memory_and_over_sockets
async def test_a_cancel_in_the_same_receive_as_its_request(
    over_sockets: bool, autojump_clock: trio.testing.MockClock
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        if request:
            await trio.sleep(100)

    settings = Settings(max_requests=4)
    async with open_peer(handler, settings, over_sockets=over_sockets) as (connection, peer):
        # One has answered before; one waits; of two nobody has heard when they are cancelled.
        batch = req(1) + cancel(1) + req(3, b"x") + cancel(3) + req(5, b"x") + cancel(5) + req(7) + cancel(7)
        await peer.stream.send_all(batch)
        assert await outcomes(peer, 4) == {1: b"ok", 3: b"cancelled", 5: b"cancelled", 7: b"ok"}
        await settle()
        assert trio.current_time() == 0
        await settle()
        check_idle(connection)


async def test_the_cancelling_of_a_handler_leaves_alone_who_reads(
    autojump_clock: trio.testing.MockClock,
) -> None:
    seen: list[str] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            seen.append("cancelled")
            with trio.CancelScope(shield=True):
                await trio.sleep(1)
            raise

    async with open_peer(handler) as (connection, peer):
        await peer.stream.send_all(req(1))
        await settle()
        await peer.stream.send_all(cancel(1) + req(3))
        await settle()
        await peer.stream.send_all(cancel(3))
        assert await outcomes(peer, 2) == {1: b"cancelled", 3: b"cancelled"}
        await settle()
        check_idle(connection)
    assert seen == ["cancelled"] * 2


@pytest.mark.parametrize("steps", range(12))
async def test_a_cancellation_from_outside_at_any_step_ends_all(
    steps: int, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    running = 0

    async def handler(connection: Connection, request: list[bytes]) -> None:
        nonlocal running
        running += 1
        try:
            if request:
                await trio.sleep(100)
        finally:
            running -= 1

    with trio.CancelScope() as outer:
        async with open_peer(handler) as (connection, peer):
            await peer.stream.send_all(req(1) + req(3, b"x") + req(5, b"x"))
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            outer.cancel()
            await trio.lowlevel.checkpoint()
    assert (outer.cancelled_caught, running, trio.current_time()) == (True, 0, 0)
    assert len(connection._handlers) == 0
    assert caplog.records == []


# ---- the end, in the middle of what was received ----


async def wait_and_do(something: Callable[[], object]) -> None:
    """Wait, and have something done before any other task has its turn."""

    def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
        something()
        return trio.lowlevel.Abort.SUCCEEDED

    with trio.CancelScope() as scope:
        scope.cancel()
        await trio.lowlevel.wait_task_rescheduled(abort)


async def test_what_is_left_of_a_batch_when_the_connection_is_closed_is_not_handled(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    started: list[bytes] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        started.extend(request)
        await wait_and_do(lambda: connection._close("in between"))
        await trio.sleep(100)

    async with open_peer(handler) as (connection, peer), trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(ConnectionClosed, match="in between"):
                await connection.request([])

        nursery.start_soon(ask)
        assert (await peer.receive())[0] == b"req"
        await peer.stream.send_all(req(1, b"1") + req(3, b"3") + packet(b"ok", b"0", body=[]) + req(5, b"5"))
        await settle()
        assert started == [b"1"]
    assert trio.current_time() == 0  # so nobody was waited for
    assert caplog.records == []  # and no answer was taken for one that is not awaited


async def test_what_arrives_when_the_connection_is_over_is_not_handled(
    autojump_clock: trio.testing.MockClock,
) -> None:
    handled: list[list[bytes]] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        handled.append(request)

    async with open_peer(handler) as (connection, _):
        # The task that reads is woken by these bytes, and before it runs the connection is closed.
        connection._stream._stream.receive_stream.put_data(req(1))  # type: ignore[attr-defined]
        connection._close("too late")
        await connection.wait_closed()
    assert handled == []


async def test_a_connection_that_is_closed_before_it_reads_ends_and_handles_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    handled: list[list[bytes]] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        handled.append(request)

    ours, theirs = trio.testing.memory_stream_pair()
    peer = RawPeer(theirs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.shake_hands)
        async with open_connection(ours, request_handler=handler) as connection:
            connection._close("before its tasks have had a turn")
        await connection.wait_closed()
        assert await theirs.receive_some() == b""
    assert handled == []


async def test_a_goodbye_waits_a_second_for_a_peer_that_does_not_read(
    autojump_clock: trio.testing.MockClock,
) -> None:
    streams: list[FaultyStream] = []

    def wrap(stream: trio.abc.HalfCloseableStream) -> trio.abc.Stream:
        streams.append(FaultyStream(stream))
        return streams[0]

    async with open_connection_pair(never_waits, wrap=wrap) as (client, _):
        await settle()
        streams[0].sending.stall()
        client._close("nobody reads this")
        await settle()
        assert trio.current_time() == 0
        await client.wait_closed()
        assert trio.current_time() == CLOSE_TIMEOUT


async def close_without_waiting(connection: Connection) -> None:
    connection._close("a handler closed it")


@pytest.mark.parametrize("close", [Connection.aclose, close_without_waiting])
@pytest.mark.parametrize("waits", [False, True])
@in_memory_and_over_sockets
async def test_a_handler_closes_the_connection_and_the_rest_of_the_batch_is_not_handled(
    close: Callable[[Connection], Awaitable[None]],
    waits: bool,
    over_sockets: bool,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    handled: list[bytes] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        handled.extend(request)
        if request == [b"close"]:
            if waits:
                await trio.sleep(1)
            await close(connection)
        elif request == [b"sleep"]:
            await trio.sleep(100)

    async with open_peer(handler, over_sockets=over_sockets) as (connection, peer):
        await peer.stream.send_all(req(1, b"now") + req(3, b"close") + req(5, b"sleep"))
        assert await outcomes(peer, 1) == {1: b"ok"}  # it was there before, and leaves
        assert await peer.stream.receive_some() == b""
        await peer.stream.aclose()
        assert handled == [b"now", b"close"] + ([b"sleep"] if waits else [])
        await connection.wait_closed()
        assert trio.current_time() == waits
    assert caplog.records == []


@in_memory_and_over_sockets
async def test_a_handler_drains_the_connection_and_the_rest_of_the_batch_is_answered_unrun(
    over_sockets: bool, autojump_clock: trio.testing.MockClock
) -> None:
    handled: list[bytes] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        handled.extend(request)
        if request == [b"drain"]:
            connection.drain()
            await trio.sleep(1)

    settings = Settings(max_requests=5)
    async with open_peer(handler, settings, over_sockets=over_sockets) as (connection, peer):
        await peer.stream.send_all(req(1, b"now") + req(3, b"drain") + req(5, b"late"))
        assert await peer.receive() == [b"bye"]
        assert await outcomes(peer, 2) == {1: b"ok", 5: b"closing"}
        await peer.stream.send_all(packet(b"bye-ok"))
        assert await outcomes(peer, 1) == {3: b"ok"}
        assert await peer.stream.receive_some() == b""
        await peer.stream.aclose()
        await connection.wait_closed()
    assert handled == [b"now", b"drain"]
    assert trio.current_time() == 1


@pytest.mark.parametrize("first", [b"now", b"later"])
@in_memory_and_over_sockets
async def test_a_connection_that_drains_closes_when_the_last_of_a_batch_has_ended(
    first: bytes, over_sockets: bool, autojump_clock: trio.testing.MockClock
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        connection.drain()
        if request == [b"later"]:
            await trio.lowlevel.checkpoint()

    async with open_peer(handler, over_sockets=over_sockets) as (connection, peer):
        await peer.stream.send_all(req(1, first))
        assert sorted([(await peer.receive())[0], (await peer.receive())[0]]) == [b"bye", b"ok"]
        await peer.stream.send_all(packet(b"bye-ok"))
        assert await peer.stream.receive_some() == b""
        await peer.stream.aclose()
        await connection.wait_closed()
    assert trio.current_time() == 0


@pytest.mark.parametrize("waits", [False, True])
async def test_a_handler_stops_its_server(waits: bool, autojump_clock: trio.testing.MockClock) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        server = connection.server
        assert isinstance(server, Server)
        if waits:
            await trio.sleep(1)
        server.stop(grace=0)
        return request

    listener = MemoryListener()
    async with open_server([listener], handler) as server:
        async with open_connection(listener.connect()) as client:
            try:
                assert await client.request(["last"]) == [b"last"]
            except ConnectionLost:
                assert waits  # its grace was over before the answer could leave
            await server.wait_stopped()
            assert trio.current_time() == waits


async def test_the_peer_is_gone_in_the_middle_of_a_packet_after_requests(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ended: list[bytes] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        try:
            if request == [b"wait"]:
                await trio.sleep_forever()
        finally:
            ended.extend(request)

    async with open_peer(handler) as (connection, peer):
        await peer.stream.send_all(req(1, b"now") + req(3, b"wait") + req(5, b"wait") + req(7)[:9])
        await peer.stream.aclose()
        await connection.wait_closed()
        with pytest.raises(ConnectionLost, match="cut a packet short"):
            await connection.request([])
    assert ended == [b"now", b"wait", b"wait"]
    assert caplog.records == []


@pytest.mark.parametrize("first", [b"now", b"wait"])
@in_memory_and_over_sockets
async def test_what_came_before_a_packet_that_is_none_is_handled_and_then_it_ends(
    first: bytes, over_sockets: bool, caplog: pytest.LogCaptureFixture
) -> None:
    handled: list[bytes] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        handled.extend(request)
        if request == [b"wait"]:
            await trio.sleep_forever()

    async with open_peer(handler, over_sockets=over_sockets) as (connection, peer):
        await peer.stream.send_all(req(1, first) + req(3, b"now") + packet(b"nonsense") + req(5, b"never"))
        while (await peer.receive())[0] != b"abort":
            pass
        await peer.stream.aclose()
        await connection.wait_closed()
        with pytest.raises(ConnectionLost, match="the peer broke the protocol: unknown packet"):
            await connection.request([])
    assert handled == [first, b"now"]
    assert [record.message.count("broke the protocol") for record in caplog.records] == [1]


async def test_what_the_stream_raises_ends_the_connection() -> None:
    streams: list[FaultyStream] = []

    def wrap(stream: trio.abc.HalfCloseableStream) -> trio.abc.Stream:
        streams.append(FaultyStream(stream))
        return streams[0]

    async with open_connection_pair(never_waits, never_waits, sealed=False, wrap=wrap) as (client, server):
        assert await client.request(["x"]) == [b"x"]
        await streams[0].cut()
        with pytest.raises(ConnectionLost):
            await server.request([])
        with pytest.raises(ConnectionLost, match="receiving failed: this stream was cut"):
            await client.request([])


class Deaf(WholeStream):
    """A stream that can send no more when it is told so, and goes on receiving."""

    broken = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self.broken:
            raise trio.BrokenResourceError("nobody reads")
        await super().send_all(data)


@pytest.mark.parametrize(
    "meanwhile", [[], [b"now"], [b"brief"], [b"long"], [b"now", b"long", b"brief", b"now"]]
)
async def test_when_sending_is_broken_requests_are_handled_for_a_moment_whichever_task_reads(
    meanwhile: list[bytes], autojump_clock: trio.testing.MockClock
) -> None:
    ended: list[tuple[bytes, float]] = []
    lasts = {b"now": 0.0, b"brief": CLOSE_TIMEOUT / 4, b"long": math.inf}

    async def handler(connection: Connection, request: list[bytes]) -> None:
        try:
            if request != [b"now"]:
                await trio.sleep(lasts[request[0]])
        finally:
            ended.append((request[0], trio.current_time()))

    deaf: list[Deaf] = []

    def wrap(stream: trio.abc.HalfCloseableStream) -> trio.abc.Stream:
        deaf.append(Deaf(stream))
        return deaf[0]

    async def ask(connection: Connection, name: bytes) -> None:
        with pytest.raises(ConnectionLost):
            await connection.request([name])

    async with open_connection_pair(handler, sealed=False, wrap=wrap) as (client, server):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, server, b"long")
            await settle()
            deaf[0].broken = True
            nursery.start_soon(ask, client, b"lost")
            await trio.sleep(CLOSE_TIMEOUT / 2)
            for name in meanwhile:
                nursery.start_soon(ask, server, name)
                await settle()
        await client.wait_closed()
        assert trio.current_time() == CLOSE_TIMEOUT
        with pytest.raises(ConnectionLost, match="sending failed: nobody reads"):
            await client.request([])
    expected = [(b"long", CLOSE_TIMEOUT)]
    expected += [(name, min(CLOSE_TIMEOUT, CLOSE_TIMEOUT / 2 + lasts[name])) for name in meanwhile]
    assert sorted(ended) == sorted(expected)


# ---- handlers that fail ----


@pytest.mark.parametrize("waits_before", [False, True])
@pytest.mark.parametrize(
    "error", [RequestError("no"), ValueError("no"), ExceptionGroup("", [ValueError("no")]), StopIteration(1)]
)
async def test_a_failing_handler_is_one_error_wherever_it_runs(waits_before: bool, error: Exception) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        if request:
            if waits_before:
                await trio.lowlevel.checkpoint()
            raise error

    async with open_peer(handler) as (connection, peer):
        await peer.stream.send_all(req(1) + req(3, b"x") + req(5, b"x"))
        code = b"request-error" if isinstance(error, RequestError) else b"handler-error"
        assert await outcomes(peer, 3) == {1: b"ok", 3: code, 5: code}
        await settle()
        await settle()
        check_idle(connection)


@pytest.mark.parametrize("waits_before", [False, True])
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
async def test_what_ends_the_program_comes_out_wherever_the_handler_runs(
    waits_before: bool, position: int, error: type[BaseException]
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        if request == [b"wait"]:
            await trio.sleep_forever()
        if waits_before:
            await trio.lowlevel.checkpoint()
        raise error

    with pytest.raises(BaseExceptionGroup) as caught:
        async with open_peer(handler) as (_, peer):
            await peer.stream.send_all(req(1, b"wait") * position + req(3))
            await trio.sleep_forever()
    assert caught.group_contains(error)
    assert not caught.group_contains(Exception)


async def test_a_cancelled_kept_from_earlier_is_a_failure_wherever_it_is_raised() -> None:
    stale: list[trio.Cancelled] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        if not stale:
            with trio.CancelScope() as scope:
                scope.cancel()
                try:
                    await trio.sleep_forever()
                except trio.Cancelled as exc:
                    stale.append(exc)
                    raise
        raise stale[0]

    async with open_peer(handler) as (connection, peer):
        await peer.stream.send_all(req(1) + req(3))
        assert await outcomes(peer, 2) == {1: b"handler-error", 3: b"handler-error"}
        await peer.stream.send_all(req(5))
        assert await outcomes(peer, 1) == {5: b"handler-error"}
        await settle()
        await settle()
        check_idle(connection)


def count_left_open(caplog: pytest.LogCaptureFixture) -> int:
    return sum(str(record.exc_info and record.exc_info[1]) == LEFT_OPEN for record in caplog.records)


async def leave_open(deadline: float = math.inf, *, is_cancelled: bool = False) -> None:
    """Enter a scope, and never leave it."""
    scope = trio.CancelScope(deadline=deadline)
    scope.__enter__()
    if is_cancelled:
        scope.cancel()


@pytest.mark.parametrize(
    "leave", [leave_open, partial(leave_open, 5), partial(leave_open, is_cancelled=True)]
)
async def test_a_handler_that_waits_and_leaves_a_scope_open_harms_no_other(
    leave: Callable[[], Awaitable[None]],
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    """As does leaving an async generator that yields inside of a scope."""

    async def handler(connection: Connection, request: list[bytes]) -> None:
        if request != [b"now"]:
            await trio.lowlevel.checkpoint()
        assert trio.current_effective_deadline() == math.inf
        if request == [b"bad"]:
            await leave()

    async with open_peer(handler, Settings(max_requests=5)) as (connection, peer):
        for _ in range(3):
            await peer.stream.send_all(
                req(1, b"bad") + req(3, b"bad") + req(5, b"now") + req(7, b"wait") + req(9, b"bad")
            )
            bad = b"handler-error"
            assert await outcomes(peer, 5) == {1: bad, 3: bad, 5: b"ok", 7: b"ok", 9: bad}
            await trio.sleep(10)
            await settle()
            check_idle(connection)
    assert count_left_open(caplog) == 9


async def test_the_deadline_of_a_scope_left_open_by_a_handler_that_has_waited_is_no_others(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        await trio.sleep(1)
        if request:
            await leave_open(trio.current_time() + 2)

    async with open_peer(handler) as (connection, peer):
        for n in range(6):  # two tasks take turns
            await peer.stream.send_all(req(1 + 2 * n, *[b"bad"] * (n < 2)))
            assert await outcomes(peer, 1) == {1 + 2 * n: b"handler-error" if n < 2 else b"ok"}
            await settle()
        await settle()
        check_idle(connection)


@pytest.mark.parametrize("is_cancelled", [False, True])
@in_memory_and_over_sockets
async def test_a_scope_left_open_by_a_handler_that_waits_for_nothing_harms_no_other(
    over_sockets: bool, is_cancelled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        if request == [b"bad"]:
            await leave_open(is_cancelled=is_cancelled)
        elif request == [b"wait"]:
            await trio.lowlevel.checkpoint()

    async with open_peer(handler, Settings(max_requests=4), over_sockets=over_sockets) as (connection, peer):
        await peer.stream.send_all(req(1, b"bad") + req(3) + req(5, b"wait") + req(7, b"bad"))
        bad = b"handler-error"
        assert await outcomes(peer, 4) == {1: bad, 3: b"ok", 5: b"ok", 7: bad}
        await settle()
        await peer.stream.send_all(req(1) + req(3, b"wait"))
        assert await outcomes(peer, 2) == {1: b"ok", 3: b"ok"}
        await settle()
        await settle()
        check_idle(connection)
    assert count_left_open(caplog) == 2


async def test_a_shield_left_open_by_a_handler_that_has_waited_does_not_keep_its_task(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        await trio.lowlevel.checkpoint()
        trio.CancelScope(shield=True).__enter__()

    async with open_peer(handler) as (connection, peer):
        await peer.stream.send_all(req(1))
        await outcomes(peer, 1)
        await settle()
        await connection.aclose()
        with trio.fail_after(1):
            await connection.wait_closed()


async def test_a_breach_is_noticed_though_a_scope_was_left_open(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        await leave_open()

    async with open_peer(handler) as (connection, peer):
        await peer.stream.send_all(req(1))
        await outcomes(peer, 1)
        await peer.send(b"nonsense")
        assert (await peer.receive())[0] == b"abort"
        await peer.stream.aclose()
        await connection.wait_closed()
    assert "the peer broke the protocol" in caplog.text
    assert count_left_open(caplog) == 1


@pytest.mark.parametrize("waits_before", [False, True])
@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_a_handler_that_leaves_a_nursery_open_fails_alone(
    waits_before: bool,
    is_cancelled: bool,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    left: list[object] = []
    has_child_ended = trio.Event()

    async def child() -> None:
        try:
            await trio.sleep_forever()
        finally:
            has_child_ended.set()

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        if not request:
            return []
        if waits_before:
            await trio.lowlevel.checkpoint()
        left.append(trio.open_nursery())
        nursery = await left[-1].__aenter__()  # type: ignore[attr-defined]
        nursery.start_soon(child)
        if is_cancelled:
            await trio.sleep_forever()
        return request

    async with open_connection_pair(server_handler=handler) as (client, server):
        for _ in range(2):
            if is_cancelled:
                with trio.move_on_after(0.01):
                    await client.request(["leave it"])
            else:
                with pytest.raises(RemoteError, match="left a cancel scope or a nursery open"):
                    await client.request(["leave it"])
            await has_child_ended.wait()
            assert await client.request([]) == []
        assert not server.closed
    # Newer Trio raises an error where the task ends, and it goes no further.
    assert ("a task of the connection ended badly" in caplog.text) is not trio.__version__.startswith("0.27.")


async def test_a_handler_that_awaits_something_foreign_is_told_and_may_go_on() -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        if request == [b"fail"]:
            await Foreign()
        elif request == [b"go on"]:
            with pytest.raises(TypeError, match="unrecognized yield message"):
                await Foreign()
            await trio.lowlevel.checkpoint()
            with pytest.raises(TypeError, match="unrecognized yield message"):
                await Foreign()
        return request

    async with open_peer(handler) as (connection, peer):
        await peer.stream.send_all(req(1, b"fail") + req(3, b"go on") + req(5, b"fail"))
        assert await outcomes(peer, 3) == {1: b"handler-error", 3: b"ok", 5: b"handler-error"}
        await peer.stream.send_all(req(1, b"go on"))
        assert await outcomes(peer, 1) == {1: b"ok"}
        await settle()
        await settle()
        check_idle(connection)


# ---- channels ----


@pytest.mark.parametrize("waits_before", [False, True])
@in_memory_and_over_sockets
async def test_items_that_come_together_are_received(waits_before: bool, over_sockets: bool) -> None:
    async def handler(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
        if waits_before:
            await trio.lowlevel.checkpoint()
        return [b"".join([field async for [field] in channel])]

    async with open_peer(channel_handler=handler, over_sockets=over_sockets) as (connection, peer):
        items = [packet(b"item", b"1", body=[field]) for field in (b"a", b"b", b"c")]
        await peer.send(b"chan", b"1", b"", b"", b"", b"0", body=[])
        assert (await peer.receive())[0] == b"credit"
        await peer.stream.send_all(b"".join(items) + packet(b"end", b"1"))
        assert await receive_but_credit(peer) == [b"ok", b"1", b"\x01\0\0\0\x03abc"]
        await settle()
        await settle()
        check_idle(connection)
        assert len(connection._channels) == len(connection._session.flow_control) == 0


@in_memory_and_over_sockets
async def test_items_for_a_channel_that_was_answered_at_once_are_dropped(
    over_sockets: bool,
) -> None:
    async def handler(connection: Connection, request: list[bytes], channel: Channel) -> None:
        """Answer."""

    async with open_peer(channel_handler=handler, over_sockets=over_sockets) as (connection, peer):
        chan = packet(b"chan", b"1", b"", b"", b"", b"0", body=[])
        item = packet(b"item", b"1", body=[b"a"])
        await peer.stream.send_all(chan + packet(b"end", b"1") + cancel(1))
        assert await outcomes(peer, 1) == {1: b"ok"}
        await peer.stream.send_all(item)
        await settle()
        await settle()
        check_idle(connection)
        assert len(connection._channels) == len(connection._session.flow_control) == 0


@in_memory_and_over_sockets
async def test_credit_that_comes_together_with_its_channel_wakes_the_handler_that_waits_for_it(
    over_sockets: bool,
) -> None:
    async def handler(connection: Connection, request: list[bytes], channel: Channel) -> None:
        await channel.send([b"x"])

    async with open_peer(channel_handler=handler, over_sockets=over_sockets) as (connection, peer):
        await peer.stream.send_all(
            packet(b"chan", b"1", b"", b"", b"", b"0", body=[]) + packet(b"credit", b"1", b"100")
        )
        assert (await receive_but_credit(peer))[:2] == [b"item", b"1"]
        assert await outcomes(peer, 1) == {1: b"ok"}
        await settle()
        await settle()
        check_idle(connection)


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_room_that_the_first_wait_of_a_handler_makes_wakes_it_only_when_it_waits(
    is_cancelled: bool,
) -> None:
    """What is queued leaves where the handler waits, and it may wait for just that."""
    filled = 0

    async def handler(connection: Connection, request: list[bytes]) -> None:
        nonlocal filled
        while connection._session.flow_control.may_send(0):
            queue = channel.send([bytes(2**12)])
            queue.send(None)  # as if another task had done it in this moment
            queue.close()
            filled += 1
        await channel.send([b"last"])

    async with open_peer(handler, over_sockets=True) as (connection, peer):
        async with connection.open_channel([]) as channel:
            assert (await peer.receive())[0] == b"chan"
            await peer.send(b"credit", b"0", b"%d" % 2**20)
            await settle()
            await peer.stream.send_all(req(1) + cancel(1) * is_cancelled)
            kinds = [(await peer.receive())[0]]
            while kinds[-1] not in (b"ok", b"err"):
                kinds.append((await peer.receive())[0])
            assert kinds == [b"item"] * filled + ([b"err"] if is_cancelled else [b"item", b"ok"])
            await peer.send(b"ok", b"0", body=[])
            with pytest.raises(trio.EndOfChannel):
                await channel.receive()
        await settle()
        await settle()
        check_idle(connection)


# ---- what is sent, and when ----


async def test_whatever_is_received_says_that_the_peer_is_there_whichever_task_reads(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_peer(echo, Settings(ping_after=1, ping_timeout=1)) as (_, peer):
        for n in range(10):
            await trio.sleep(0.5)
            await peer.stream.send_all(req(1 + 2 * n))
            assert (await peer.receive())[0] == b"ok"
        assert await peer.receive() == [b"ping"]
        assert trio.current_time() == 6


def count_sends(monkeypatch: pytest.MonkeyPatch, connection: Connection) -> list[int]:
    """How many bytes leave at once; to be called where sockets are used."""
    sizes: list[int] = []
    ours = connection._stream
    send_now = SocketStream.send_nowait

    def spy(stream: SocketStream, data: bytes) -> int:
        if stream is ours:
            sizes.append(len(data))
        return send_now(stream, data)

    monkeypatch.setattr(SocketStream, "send_nowait", spy)
    return sizes


async def test_the_answers_to_what_came_together_leave_together(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(max_requests=1000)
    async with open_peer(never_waits, settings, over_sockets=True) as (connection, peer):
        await settle()
        sizes = count_sends(monkeypatch, connection)
        await peer.stream.send_all(b"".join(req(1 + 2 * n) for n in range(EARLY_FLUSH_PACKETS - 1)))
        await outcomes(peer, EARLY_FLUSH_PACKETS - 1)
        assert len(sizes) == 1
        await peer.stream.send_all(b"".join(req(1 + 2 * n) for n in range(2 * EARLY_FLUSH_PACKETS + 1)))
        await outcomes(peer, 2 * EARLY_FLUSH_PACKETS + 1)
        assert len(sizes) == 4  # the first ones of many leave before the last ones are looked at


async def test_what_was_answered_before_a_handler_waits_leaves_then() -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        if request:
            await trio.sleep_forever()

    async with open_peer(handler, over_sockets=True) as (connection, peer):
        await settle()
        await peer.stream.send_all(packet(b"ping") + req(1) + req(3, b"x"))
        assert await peer.receive() == [b"pong"]
        assert await outcomes(peer, 1) == {1: b"ok"}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.request, ["x"])  # and so does everything after that
            assert (await peer.receive())[:2] == [b"req", b"0"]
            await peer.send(b"ok", b"0", body=[])


@pytest.mark.parametrize("handler", [never_waits, echo])
async def test_a_request_is_written_at_once_only_after_a_few_receives_of_one_packet(
    handler: RequestHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So does each request of the peer count once, whether its handler waits or not."""
    async with open_peer(handler, over_sockets=True) as (connection, peer):
        sizes = count_sends(monkeypatch, connection)

        async def is_written_at_once() -> bool:
            """Ask something. The peer's answer is a receive of one packet."""
            sizes.clear()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.request, ["x"])
                await settle()
                is_at_once = bool(sizes)
                await peer.send(b"ok", (await peer.receive())[1], body=[])
            await settle()
            return is_at_once

        assert await is_written_at_once()
        for _ in range(2):
            await peer.stream.send_all(req(1) + req(3))
            await outcomes(peer, 2)
            for n in range(INTERACTIVE_RECEIVES - 1):
                await peer.stream.send_all(req(5 + 2 * n))
                await peer.receive()
                await settle()
            assert not await is_written_at_once()
            assert await is_written_at_once()


@in_memory_and_over_sockets
async def test_a_flood_of_requests_leaves_other_tasks_their_turns(over_sockets: bool) -> None:
    since_turn = most = handled = 0

    async def handler(connection: Connection, request: list[bytes]) -> None:
        nonlocal since_turn, most, handled
        handled += 1
        since_turn += 1
        most = max(most, since_turn)

    async def take_turns() -> None:
        nonlocal since_turn
        while True:
            since_turn = 0
            await trio.lowlevel.checkpoint()

    flood = b"".join(req(1 + 2 * n) for n in range(20_000))
    settings = Settings(max_requests=20_000)
    async with open_peer(handler, settings, over_sockets=over_sockets) as (connection, peer):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take_turns)
            nursery.start_soon(peer.stream.send_all, flood)
            await outcomes(peer, 20_000)
            nursery.cancel_scope.cancel()
        await settle()
        await settle()
        check_idle(connection)
    assert handled == 20_000
    # In each turn of the event loop what is decoded at once; its order may change between two turns.
    assert most <= 2 * (MAX_AT_ONCE + 1)


# ---- what is held of what was received ----


async def test_what_is_left_of_a_batch_outlasts_the_buffer_that_it_was_received_in() -> None:
    fields = [bytes([n]) * (2 * LARGE) for n in range(10)]
    seen: list[bytes] = []

    def receive_something_else() -> None:
        _scratch.view[:] = bytes([255]) * RECEIVE_SIZE

    async def handler(connection: Connection, request: list[bytes]) -> None:
        if request == [b"wait"]:
            await wait_and_do(receive_something_else)
        else:
            seen.extend(request)

    async with open_peer(handler, Settings(max_requests=11), over_sockets=True) as (connection, peer):
        batch = req(1, b"wait") + b"".join(req(3 + 2 * n, field) for n, field in enumerate(fields))
        assert LARGE_BATCH < len(batch) < RECEIVE_SIZE
        await peer.stream.send_all(batch)
        assert set((await outcomes(peer, 11)).values()) == {b"ok"}
        assert sorted(seen) == fields
        await settle()
        await settle()
        check_idle(connection)


class Data(bytearray):
    """What was received; unlike a bytearray it can be looked for."""


class Traced(Deaf):
    """A stream that looks for what it has returned."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        super().__init__(stream)
        self.returned: list[weakref.ref[Data]] = []

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = Data(await super().receive_some(max_bytes))
        self.returned.append(weakref.ref(data))
        return data


async def test_a_handler_that_waits_does_not_keep_all_that_came_with_its_request() -> None:
    traced: list[Traced] = []

    def wrap(stream: trio.abc.HalfCloseableStream) -> trio.abc.Stream:
        traced.append(Traced(stream))
        return traced[0]

    async def handler(connection: Connection, request: list[bytes]) -> None:
        await trio.sleep_forever()

    async with open_connection_pair(handler, sealed=False, wrap=wrap) as (_, server):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(server.request, [bytes(LARGE_BATCH)])
                await settle()
            assert len(traced[0].returned) >= 3
            assert [data() for data in traced[0].returned if data() is not None] == []
            nursery.cancel_scope.cancel()


async def test_a_handler_that_waits_again_does_not_keep_what_it_waited_for() -> None:
    class Big:
        """Something."""

    send, receive = trio.open_memory_channel[Big](0)

    async def handler(connection: Connection, request: list[bytes]) -> None:
        await receive.receive()
        await trio.sleep_forever()

    async with open_connection_pair(server_handler=handler) as (client, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.request, [])
            await settle()
            big = Big()
            there = weakref.ref(big)
            await send.send(big)
            del big
            await settle()
            assert there() is None
            nursery.cancel_scope.cancel()


# ---- all of it at once ----

BEHAVIOURS = {
    "return": b"ok",
    "raise": b"no",
    "leave a scope open": b"handler-error",
    "ask": b"ok",
    "wait": b"ok",
    "wait and raise": b"no",
    "wait for what is foreign": b"handler-error",
}
"""What a handler may do, and how that is answered unless it is cancelled."""

INLINE = {"return", "raise"}
"""What of it waits for nothing."""

UNTIL_CANCELLED = {"ask", "wait", "wait and raise"}
"""What of it lasts until all the requests have come."""


@pytest.mark.parametrize("over_sockets", [False, True])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_every_request_is_answered_once_and_rightly_however_it_comes(
    over_sockets: bool, data: st.DataObject
) -> None:
    asked = data.draw(st.lists(st.sampled_from(list(BEHAVIOURS)), min_size=1, max_size=12), label="asked")
    cancelled = data.draw(st.sets(st.integers(0, len(asked) - 1), max_size=4), label="cancelled")
    pings = data.draw(st.sets(st.integers(0, len(asked) - 1), max_size=3), label="pings")
    delay = data.draw(st.integers(0, 3), label="requests between one and its cancelling")
    packets: list[bytes] = []
    for n, behaviour in enumerate(asked):
        packets.append(req(1 + 2 * n, b"%d" % n, behaviour.encode()))
        packets += [packet(b"ping")] * (n in pings) + [cancel(1 + 2 * (n - delay))] * (n - delay in cancelled)
    chunks = data.draw(chunked(b"".join(packets)), label="chunks")
    pauses = data.draw(st.lists(st.booleans(), min_size=len(chunks), max_size=len(chunks)), label="pauses")
    cancelled = {n for n in cancelled if n + delay < len(asked)}
    trio.run(check_requests, asked, cancelled, list(zip(chunks, pauses, strict=True)), over_sockets)


class Asked:
    """What the requests do, and what became of them."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.gate = trio.Event()  # what waits, waits for it
        self.answers: dict[int, bytes] = {}
        self.callbacks: list[tuple[bytes, bytes]] = []

    async def handle(self, connection: Connection, request: list[bytes]) -> list[bytes]:
        number, behaviour = request
        self.started.append(int(number))
        match behaviour.decode():
            case "raise":
                raise RequestError("no", code="no")
            case "leave a scope open":
                trio.CancelScope().__enter__()
            case "ask":
                return await connection.request([number])
            case "wait":
                await self.gate.wait()
            case "wait and raise":
                await self.gate.wait()
                raise RequestError("no", code="no")
            case "wait for what is foreign":
                await Foreign()
        return [number]

    async def hear(self, peer: RawPeer) -> None:
        """Note what the peer is sent."""
        while True:
            kind, *rest = await peer.receive()
            if kind == b"req":
                self.callbacks.append((rest[0], rest[4]))
            elif kind in (b"ok", b"err"):
                id = int(rest[0])
                assert id not in self.answers, "answered twice"
                self.answers[id] = kind if kind == b"ok" else rest[1]
                assert kind == b"err" or rest[1].endswith(b"%d" % (id // 2))


async def check_requests(
    asked: list[str], cancelled: set[int], chunks: list[tuple[bytes, bool]], over_sockets: bool
) -> None:
    was = Asked()
    options = {"max_requests": 20, "over_sockets": over_sockets}
    async with open_peer(was.handle, Settings(max_requests=len(asked)), **options) as (connection, peer):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(was.hear, peer)
            for chunk, pause in chunks:
                await peer.stream.send_all(chunk)
                if pause:
                    await settle()
            await settle()
            was.gate.set()
            for id, body in was.callbacks:
                await peer.send(b"ok", id, body=[body[5:]])
            await settle()
            nursery.cancel_scope.cancel()
        await settle()
        check_idle(connection)
        assert connection._session.asked == 0
    expected = {1 + 2 * n: BEHAVIOURS[behaviour] for n, behaviour in enumerate(asked)}
    expected |= {1 + 2 * n: b"cancelled" for n in cancelled if asked[n] in UNTIL_CANCELLED}
    assert was.answers == expected
    assert sorted(was.started) == list(range(len(asked)))
    # As they came, as long as none waits; the order of tasks that are started is up to Trio.
    first = next((n for n, behaviour in enumerate(asked) if behaviour not in INLINE), len(asked) - 1)
    assert was.started[: first + 1] == list(range(first + 1))
