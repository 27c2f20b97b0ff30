"""A task that makes one request after another reads by itself: the turn to read is lent to it."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from bokbok_trio import (
    BokbokError,
    Connection,
    ConnectionClosed,
    ConnectionLost,
    Key,
    RemoteError,
    RequestHandler,
    Settings,
    open_connection,
    open_server,
)
from bokbok_trio._connection import CLOSE_TIMEOUT
from bokbok_trio._direct_stream import RECEIVE_SIZE, _scratch
from bokbok_trio._events import Event
from bokbok_trio._packets import LARGE_BATCH
from bokbok_trio._reader import LONE_ANSWERS, MAX_LEADERS
from tests.helpers import RawPeer, cancel, check_idle, echo, open_peer, outcomes, packet, req, settle


async def never_waits(connection: Connection, request: list[bytes]) -> list[bytes]:
    return request


class Asker:
    """A task that makes some requests, one after another."""

    def __init__(self, connection: Connection, field: bytes = b"x") -> None:
        self.connection = connection
        self.field = field
        self.scope = trio.CancelScope()
        self.task: trio.lowlevel.Task | None = None
        self.answers: list[list[bytes]] = []
        self.error: BokbokError | None = None
        self.ended = trio.Event()

    async def ask(self, count: int) -> None:
        self.task = trio.lowlevel.current_task()
        try:
            with self.scope:
                for _ in range(count):
                    self.answers.append(await self.connection.request([self.field]))
        except BokbokError as exc:
            self.error = exc
        finally:
            self.ended.set()

    @property
    def reads(self) -> bool:
        leader = self.connection._reader._leader
        return leader is not None and leader.task is self.task


async def answer(peer: RawPeer, *others: bytes) -> bytes:
    """Answer the next request, with other packets along with that, and return its id."""
    kind, id, *_ = await peer.receive()
    assert kind == b"req"
    await peer.stream.send_all(packet(b"ok", id, body=[b"x"]) + b"".join(others))
    return id


async def answer_alone(peer: RawPeer, count: int = LONE_ANSWERS) -> None:
    """Answer so many requests, each after the last was taken in."""
    for _ in range(count):
        await answer(peer)
        await settle()


@asynccontextmanager
async def open_led(
    request_handler: RequestHandler,
    settings: Settings = Settings(),  # noqa: B008
    **options: Any,
) -> AsyncGenerator[tuple[Connection, RawPeer, Asker, bytes]]:
    """A connection with an asker that reads, and the id of its last request, which is to be answered."""
    async with open_peer(request_handler, settings, over_sockets=True, **options) as (connection, peer):
        async with trio.open_nursery() as nursery:
            asker = Asker(connection)
            nursery.start_soon(asker.ask, LONE_ANSWERS + 1)
            await answer_alone(peer)
            kind, id, *_ = await peer.receive()
            assert kind == b"req"
            await settle()
            assert asker.reads
            yield connection, peer, asker, id
        await settle()
        if not connection.closed:
            check_idle(connection)


async def check_that_all_goes_on(connection: Connection, peer: RawPeer) -> None:
    """Both sides' requests are answered."""
    await peer.stream.send_all(req(101, b"y"))
    assert await outcomes(peer, 1) == {101: b"ok"}
    async with trio.open_nursery() as nursery:
        for count in (1, LONE_ANSWERS + 3):
            asker = Asker(connection)
            nursery.start_soon(asker.ask, count)
            await answer_alone(peer, count)
            assert asker.answers == [[b"x"]] * count
    await peer.stream.send_all(req(103, b"y") + req(105, b"y"))
    assert await outcomes(peer, 2) == {103: b"ok", 105: b"ok"}


async def test_an_asker_reads_once_a_few_answers_came_one_at_a_time() -> None:
    async with open_peer(never_waits, over_sockets=True) as (connection, peer):
        async with trio.open_nursery() as nursery:
            asker = Asker(connection)
            nursery.start_soon(asker.ask, LONE_ANSWERS + 10)
            for n in range(LONE_ANSWERS + 10):
                await settle()
                assert asker.reads == (n >= LONE_ANSWERS)
                await answer(peer)
        assert asker.answers == [[b"x"]] * (LONE_ANSWERS + 10)
        await settle()
        assert connection._reader._leader is None
        async with trio.open_nursery() as nursery:  # the next one need not wait for as many answers
            asker = Asker(connection)
            nursery.start_soon(asker.ask, 2)
            await answer_alone(peer, 1)
            assert asker.reads
            await answer(peer)
        await check_that_all_goes_on(connection, peer)
        check_idle(connection)


async def test_an_asker_reads_from_a_real_side_plain_or_sealed(sealed: bool, tmp_path: Path) -> None:
    key = Key.generate()
    user, key_of, keys = ("user", key, {"user": key}) if sealed else (None, None, None)
    path = str(tmp_path / "socket")
    async with (
        open_server(path, echo, user_key=keys),
        open_connection(path, user=user, key=key_of) as connection,
    ):
        turns = 0
        async with trio.open_nursery() as nursery:
            asker = Asker(connection)
            nursery.start_soon(asker.ask, 100)
            while not asker.ended.is_set():
                turns += asker.reads
                await trio.lowlevel.checkpoint()
        assert asker.answers == [[b"x"]] * 100
        assert turns > 100


async def test_only_so_many_askers_of_an_event_loop_read_at_once() -> None:
    async with AsyncExitStack() as stack:
        pairs = [
            await stack.enter_async_context(open_peer(never_waits, over_sockets=True))
            for _ in range(MAX_LEADERS + 3)
        ]
        async with trio.open_nursery() as nursery:
            askers = [Asker(connection) for connection, _ in pairs]
            for asker in askers:
                nursery.start_soon(asker.ask, 3 * LONE_ANSWERS)
            for n in range(3 * LONE_ANSWERS):
                for _, peer in pairs:
                    await answer_alone(peer, 1)
                if LONE_ANSWERS <= n < 3 * LONE_ANSWERS - 1:
                    assert sum(asker.reads for asker in askers) == MAX_LEADERS
            assert all(asker.ended.is_set() for asker in askers)
        await settle()
        for connection, peer in pairs:
            await check_that_all_goes_on(connection, peer)
            check_idle(connection)


async def test_nothing_is_lent_over_a_stream_that_cannot_be_told_to_receive_no_more() -> None:
    async with open_peer() as (connection, peer), trio.open_nursery() as nursery:
        asker = Asker(connection)
        nursery.start_soon(asker.ask, LONE_ANSWERS + 10)
        for _ in range(LONE_ANSWERS + 10):
            await answer(peer)
            await settle()
            assert not asker.reads


async def test_nothing_is_lent_where_something_else_comes_along_with_answers() -> None:
    async with open_peer(never_waits, over_sockets=True) as (connection, peer):
        async with trio.open_nursery() as nursery:
            asker = Asker(connection)
            nursery.start_soon(asker.ask, 3 * LONE_ANSWERS)
            for n in range(3 * LONE_ANSWERS):
                await answer(peer, *[req(1)] * (n % LONE_ANSWERS == 0))
                if n % LONE_ANSWERS == 0:
                    await outcomes(peer, 1)
                await settle()
                assert not asker.reads
        await check_that_all_goes_on(connection, peer)


async def test_a_turn_that_was_lent_is_given_back_by_an_asker_that_asks_no_more() -> None:
    async with open_peer(never_waits, over_sockets=True) as (connection, peer):
        async with trio.open_nursery() as nursery:
            asker = Asker(connection)
            nursery.start_soon(asker.ask, LONE_ANSWERS)
            await answer_alone(peer)
            assert asker.ended.is_set()
        assert connection._reader._leader is None
        check_idle(connection)
        await check_that_all_goes_on(connection, peer)


@pytest.mark.parametrize("handler", [never_waits, echo])
@pytest.mark.parametrize("comes_along", [False, True])
async def test_a_request_is_left_to_the_task_that_lent_its_turn(
    handler: RequestHandler, comes_along: bool
) -> None:
    tasks: list[trio.lowlevel.Task] = []

    async def note(connection: Connection, request: list[bytes]) -> Any:
        tasks.append(trio.lowlevel.current_task())
        assert request == [bytes(LARGE_BATCH)]
        return await handler(connection, request)

    async def receive_something_else() -> None:
        while True:
            _scratch.view[:] = bytes([255]) * RECEIVE_SIZE
            await trio.lowlevel.checkpoint()

    async with open_led(note, Settings(max_requests=3)) as (_, peer, asker, id):
        ok = packet(b"ok", id, body=[b"z"])
        batch = req(1, bytes(LARGE_BATCH)) + ok * comes_along + req(3, bytes(LARGE_BATCH))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive_something_else)
            await peer.stream.send_all(batch)
            assert await outcomes(peer, 2) == {1: b"ok", 3: b"ok"}
            nursery.cancel_scope.cancel()
        await settle()
        assert asker.ended.is_set() == comes_along
        if not comes_along:
            await peer.stream.send_all(ok)
        await asker.ended.wait()
        assert asker.answers[-1] == [b"z"]
        assert asker.task not in tasks


async def test_a_request_that_is_alone_counts_once_where_an_asker_has_read_it() -> None:
    async with open_led(never_waits) as (connection, peer, _, id):
        connection._sender._lone_streak = 0
        await peer.stream.send_all(req(1))
        assert await outcomes(peer, 1) == {1: b"ok"}
        assert connection._sender._lone_streak == 1
        await peer.stream.send_all(packet(b"ok", id, body=[b"x"]) + req(3))
        assert await outcomes(peer, 1) == {3: b"ok"}
        assert connection._sender._lone_streak == 0


async def test_an_asker_that_reads_hands_other_askers_their_answers() -> None:
    async with open_led(never_waits) as (connection, peer, asker, id):
        async with trio.open_nursery() as nursery:
            other = Asker(connection)
            nursery.start_soon(other.ask, 10)
            for _ in range(10):
                await answer(peer, packet(b"ping"))
                assert await peer.receive() == [b"pong"]
                assert asker.reads
        assert len(other.answers) == 10
        await peer.stream.send_all(packet(b"ok", id, body=[b"z"]))
        await asker.ended.wait()
        assert asker.answers[-1] == [b"z"]
        await check_that_all_goes_on(connection, peer)


async def test_an_asker_that_reads_may_be_cancelled() -> None:
    async with open_led(never_waits) as (connection, peer, asker, id):
        asker.scope.cancel()
        await asker.ended.wait()
        assert asker.scope.cancelled_caught
        assert await peer.receive() == [b"cancel", id]
        await check_that_all_goes_on(connection, peer)
        await peer.send(b"err", id, b"cancelled", b"")
        await check_that_all_goes_on(connection, peer)


async def test_the_deadline_of_an_asker_that_reads(autojump_clock: trio.testing.MockClock) -> None:
    async with open_led(never_waits) as (connection, peer, asker, id):
        asker.scope.deadline = trio.current_time() + 5
        await asker.ended.wait()
        assert trio.current_time() == 5
        assert await peer.receive() == [b"cancel", id]
        await peer.send(b"err", id, b"cancelled", b"")
        await check_that_all_goes_on(connection, peer)


async def test_an_asker_that_reads_is_refused_by_an_error() -> None:
    async with open_led(never_waits) as (connection, peer, asker, id):
        await peer.send(b"err", id, b"no", b"because")
        await asker.ended.wait()
        assert isinstance(asker.error, RemoteError)
        assert asker.error.code == "no"
        await check_that_all_goes_on(connection, peer)


async def test_an_asker_that_waits_for_a_slot_while_it_reads_is_told_that_the_peer_drains() -> None:
    async with open_led(never_waits, max_requests=2) as (connection, peer, asker, id):
        async with trio.open_nursery() as nursery:
            others = [Asker(connection) for _ in range(3)]
            for other in others:
                nursery.start_soon(other.ask, 1)
            await settle()
            await peer.stream.send_all(packet(b"ok", id, body=[b"x"]) + packet(b"bye"))
            await asker.ended.wait()
            sent = [await peer.receive() for _ in range(2)]
            assert [kind for kind, *_ in sent] == [b"req", b"req"]
            assert await peer.receive() == [b"bye-ok"]
            for _, number, *_ in sent:
                await peer.send(b"ok", number, body=[b"x"])
        refused = [other.error for other in others if other.error is not None]
        assert [error.may_have_run for error in refused if isinstance(error, ConnectionLost)] == [False]


# ---- the end, while an asker reads ----


async def close_peer(connection: Connection, peer: RawPeer) -> None:
    await peer.stream.aclose()


async def cut_packet(connection: Connection, peer: RawPeer) -> None:
    await peer.stream.send_all(packet(b"ping")[:-1])
    await peer.stream.aclose()


async def break_protocol(connection: Connection, peer: RawPeer) -> None:
    await peer.send(b"nonsense")


async def close(connection: Connection, peer: RawPeer) -> None:
    await connection.aclose()


async def close_when_something_has_come(connection: Connection, peer: RawPeer) -> None:
    await peer.send(b"ping")
    connection._close("at once")


async def be_silent(connection: Connection, peer: RawPeer) -> None:
    """Until the watchdog barks."""


@pytest.mark.parametrize(
    ("end", "error", "message"),
    [
        (close_peer, ConnectionLost, "the peer closed the connection"),
        (cut_packet, ConnectionLost, "the peer cut a packet short"),
        (break_protocol, ConnectionLost, "the peer broke the protocol"),
        (close, ConnectionClosed, "this side closed the connection"),
        (close_when_something_has_come, ConnectionClosed, "at once"),
        (be_silent, ConnectionLost, "has not been heard of"),
    ],
)
async def test_the_end_reaches_an_asker_that_reads(
    end: Callable[[Connection, RawPeer], Awaitable[None]],
    error: type[BokbokError],
    message: str,
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_led(echo) as (connection, peer, asker, _):
        async with trio.open_nursery() as nursery:
            other = Asker(connection)  # one that does not read
            nursery.start_soon(other.ask, 1)
            assert (await peer.receive())[0] == b"req"
            await end(connection, peer)
            await asker.ended.wait()
        for each in (asker, other):
            assert isinstance(each.error, error)
            assert message in str(each.error)
        await connection.wait_closed()
        assert connection._session.asked == 0


async def test_the_end_reaches_an_asker_that_reads_at_once_though_the_goodbye_waits(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_led(echo) as (connection, _, asker, _):
        async with trio.open_nursery() as nursery:
            other = Asker(connection, bytes(2**19))  # which the peer does not read
            nursery.start_soon(other.ask, 1)
            await settle()
            assert connection._sender._is_busy
            connection._close("now")
            await asker.ended.wait()
            assert trio.current_time() == 0
        assert isinstance(asker.error, ConnectionClosed)
        await connection.wait_closed()
        assert trio.current_time() == CLOSE_TIMEOUT


async def test_a_reset_reaches_an_asker_that_reads() -> None:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener, trio.open_nursery() as nursery:
        ours = await trio.open_tcp_stream(*listener.socket.getsockname())
        theirs = await listener.accept()
        peer = RawPeer(theirs)
        nursery.start_soon(peer.shake_hands)
        async with open_connection(ours) as connection:
            asker = Asker(connection)
            nursery.start_soon(asker.ask, LONE_ANSWERS + 1)
            await answer_alone(peer)
            await peer.receive()
            await settle()
            assert asker.reads
            theirs.socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, struct.pack("ii", 1, 0))
            await theirs.aclose()
            await asker.ended.wait()
            assert isinstance(asker.error, ConnectionLost)
            assert asker.error.reason.startswith("receiving failed")
            await connection.wait_closed()


async def test_the_end_of_the_block_reaches_an_asker_that_reads() -> None:
    """And nothing waits for the peer."""
    ours, theirs = map(trio.SocketStream, trio.socket.socketpair())
    async with theirs, trio.open_nursery() as nursery:
        peer = RawPeer(theirs)
        nursery.start_soon(peer.shake_hands)
        async with open_connection(ours) as connection:
            asker = Asker(connection)
            nursery.start_soon(asker.ask, LONE_ANSWERS + 1)
            await answer_alone(peer)
            await settle()
            assert asker.reads
        await asker.ended.wait()
        assert isinstance(asker.error, ConnectionClosed)


async def test_where_sending_fails_what_an_asker_reads_is_good_for_a_moment(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_led(echo) as (connection, peer, asker, _):
        async with trio.open_nursery() as nursery:
            other = Asker(connection)
            nursery.start_soon(other.ask, 1)
            _, other_id, *_ = await peer.receive()
            connection._reader.stop_at(trio.current_time() + CLOSE_TIMEOUT, "sending failed: in a test")
            await trio.sleep(CLOSE_TIMEOUT / 2)
            await peer.send(b"ok", other_id, body=[b"x"])
            await other.ended.wait()
            assert asker.reads
        await asker.ended.wait()
        assert other.answers == [[b"x"]]
        assert isinstance(asker.error, ConnectionLost)
        assert asker.error.reason == "sending failed: in a test"
        assert trio.current_time() == CLOSE_TIMEOUT


async def test_an_asker_outside_of_a_connection_that_is_cancelled_is_told() -> None:
    """Though the connection may have ended wholly before the asker runs."""
    for _ in range(20):
        ours, theirs = map(trio.SocketStream, trio.socket.socketpair())
        async with theirs, trio.open_nursery() as nursery:
            peer = RawPeer(theirs)
            nursery.start_soon(peer.shake_hands)
            with trio.CancelScope() as scope:
                async with open_connection(ours, request_handler=echo) as connection:
                    asker = Asker(connection)
                    nursery.start_soon(asker.ask, 1)
                    await settle()
                    scope.cancel()
                    await trio.sleep_forever()
            await asker.ended.wait()
            assert isinstance(asker.error, ConnectionClosed)


# ---- what an asker leaves ----


async def answer_all(peer: RawPeer, count: int, along: dict[int, bytes]) -> dict[int, bytes]:
    """Answer so many requests, some with other packets along. Return how the peer's were answered."""
    answered: dict[int, bytes] = {}
    asked = 0
    while asked < count:
        kind, *rest = await peer.receive()
        if kind == b"req":
            await settle()
            id = rest[0]
            await peer.stream.send_all(packet(b"ok", id, body=[b"x"]) + along.get(asked, b""))
            asked += 1
        elif kind != b"pong":
            answered[int(rest[0])] = kind
    return answered


@pytest.mark.parametrize("handler", [never_waits, echo])
async def test_nothing_that_an_asker_leaves_is_lost_when_it_asks_again_at_once(
    handler: RequestHandler,
) -> None:
    count = LONE_ANSWERS + 9
    along = {LONE_ANSWERS + 1: req(1), LONE_ANSWERS + 3: req(3) + packet(b"ping"), LONE_ANSWERS + 4: req(5)}
    for _ in range(10):  # so that each task is the first to run at times
        async with open_peer(handler, over_sockets=True) as (connection, peer):
            async with trio.open_nursery() as nursery:
                asker = Asker(connection)
                nursery.start_soon(asker.ask, count)
                answered = await answer_all(peer, count, along)
            assert answered == {1: b"ok", 3: b"ok", 5: b"ok"}
            await check_that_all_goes_on(connection, peer)
            check_idle(connection)


async def test_a_breach_that_an_asker_leaves_is_not_lost_when_it_asks_again_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for _ in range(10):
        async with open_peer(echo, over_sockets=True) as (connection, peer):
            async with trio.open_nursery() as nursery:
                asker = Asker(connection)
                nursery.start_soon(asker.ask, LONE_ANSWERS + 9)
                await answer_alone(peer)
                await answer(peer, packet(b"nonsense"))
                await connection.wait_closed()
            assert isinstance(asker.error, ConnectionLost)
            assert "broke the protocol" in asker.error.reason
    assert caplog.text.count("broke the protocol") == 10


# ---- other tasks that wait for their turn ----


class Gate:
    """A handler that waits until it is opened."""

    def __init__(self) -> None:
        self.opened = trio.Event()

    async def handle(self, connection: Connection, request: list[bytes]) -> list[bytes]:
        if request == [b"gate"]:
            await self.opened.wait()
        return request


async def test_a_task_that_waits_for_its_turn_takes_the_place_of_one_that_lends_it() -> None:
    gate = Gate()
    async with open_peer(gate.handle, over_sockets=True) as (connection, peer):
        await peer.stream.send_all(req(1, b"gate"))
        await settle()
        gate.opened.set()
        assert await outcomes(peer, 1) == {1: b"ok"}
        await settle()
        assert connection._reader._next is not None
        async with trio.open_nursery() as nursery:
            asker = Asker(connection)
            nursery.start_soon(asker.ask, LONE_ANSWERS + 2)
            await answer_alone(peer, LONE_ANSWERS + 1)
            assert asker.reads
            assert connection._reader._nursery is not None
            assert len(connection._reader._nursery.child_tasks) == 1
            await answer(peer)
        await check_that_all_goes_on(connection, peer)
        check_idle(connection)


@pytest.mark.parametrize("is_answered", [False, True])
async def test_a_handler_that_ends_while_an_asker_reads(is_answered: bool) -> None:
    gate = Gate()
    async with open_peer(gate.handle, over_sockets=True) as (connection, peer):
        await peer.stream.send_all(req(1, b"gate"))
        async with trio.open_nursery() as nursery:
            asker = Asker(connection)
            nursery.start_soon(asker.ask, LONE_ANSWERS + 1)
            await answer_alone(peer)
            _, id, *_ = await peer.receive()
            assert asker.reads
            if is_answered:
                await peer.send(b"ok", id, body=[b"x"])
            gate.opened.set()
            assert await outcomes(peer, 1) == {1: b"ok"}
            await settle()
            if not is_answered:
                await peer.send(b"ok", id, body=[b"x"])
        await check_that_all_goes_on(connection, peer)
        check_idle(connection)


async def test_a_task_that_comes_to_wait_before_the_one_that_has_its_turn_back_has_run() -> None:
    """Whichever runs first, one of the two ends, and the other reads or waits."""
    gate = Gate()
    for _ in range(20):
        async with open_peer(gate.handle, over_sockets=True) as (connection, peer):
            gate.opened = trio.Event()
            await peer.stream.send_all(req(1, b"gate"))

            async def ask(connection: Connection) -> None:
                for n in range(LONE_ANSWERS + 4):
                    await connection.request(["x"])
                    if n == LONE_ANSWERS + 1:
                        gate.opened.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, connection)
                kinds: list[bytes] = []
                while len(kinds) < LONE_ANSWERS + 5:
                    kind, id, *_ = await peer.receive()
                    kinds.append(kind)
                    if kind == b"req":
                        await settle()
                        await peer.send(b"ok", id, body=[b"x"])
            assert sorted(kinds) == [b"ok"] + [b"req"] * (LONE_ANSWERS + 4)
            await check_that_all_goes_on(connection, peer)
            check_idle(connection)


async def test_a_task_that_comes_to_wait_while_one_is_about_to_read_is_not_told_to_read_too() -> None:
    gate = Gate()
    for _ in range(20):  # so that each is the first to run at times
        async with open_peer(gate.handle, over_sockets=True) as (connection, peer):
            await peer.stream.send_all(req(1, b"gate"))
            async with trio.open_nursery() as nursery:
                asker = Asker(connection)
                nursery.start_soon(asker.ask, LONE_ANSWERS + 1)
                await answer_alone(peer)
                _, id, *_ = await peer.receive()
                other = Asker(connection)
                nursery.start_soon(other.ask, 1)
                _, other_id, *_ = await peer.receive()
                assert asker.reads
                oks = [packet(b"ok", each, body=[b"x"]) for each in (other_id, id)]
                await peer.stream.send_all(cancel(1) + b"".join(oks))
            assert await outcomes(peer, 1) == {1: b"cancelled"}
            await check_that_all_goes_on(connection, peer)
            await settle()
            check_idle(connection)


async def test_a_task_that_waits_in_a_new_scope_ends_where_another_has_taken_its_place() -> None:
    gate = Gate()
    for _ in range(20):
        gate.opened = trio.Event()
        async with open_peer(gate.handle, over_sockets=True) as (connection, peer):
            # Of two handlers that wait one is cancelled, so that its task waits for its turn in a new scope.
            await peer.stream.send_all(req(1, b"gate"))
            await settle()
            await peer.stream.send_all(req(3, b"gate"))
            await settle()
            await peer.stream.send_all(cancel(3))
            assert await outcomes(peer, 1) == {3: b"cancelled"}

            async def ask(connection: Connection) -> None:
                for n in range(LONE_ANSWERS + 1):
                    await connection.request(["x"])
                    if n == LONE_ANSWERS - 1:
                        gate.opened.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, connection)
                answered = await answer_all(peer, LONE_ANSWERS + 1, {})
            assert answered or await outcomes(peer, 1) == {1: b"ok"}
            await check_that_all_goes_on(connection, peer)
            await settle()
            check_idle(connection)


@pytest.mark.parametrize("seconds", [math.inf, CLOSE_TIMEOUT])
async def test_handlers_that_end_when_the_turn_was_given_back_take_nothing_of_who_has_it(
    seconds: float, autojump_clock: trio.testing.MockClock
) -> None:
    gate = Gate()
    for _ in range(20):
        gate.opened = trio.Event()
        start = trio.current_time()
        async with open_peer(gate.handle, over_sockets=True) as (connection, peer):
            for id in (1, 3):
                await peer.stream.send_all(req(id, b"gate"))
                await settle()

            async def ask(connection: Connection) -> None:
                for _ in range(LONE_ANSWERS):
                    await connection.request(["x"])
                gate.opened.set()

            if seconds < math.inf:
                connection._reader.stop_at(start + seconds, "in a test")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, connection)
                await answer_all(peer, LONE_ANSWERS, {})
            await settle()
            reader = connection._reader
            assert reader._next is not None
            assert reader._scope is not reader._next[1]
            if seconds < math.inf:
                await connection.wait_closed()
                assert trio.current_time() == start + seconds


@pytest.mark.parametrize("has_deadline", [False, True])
async def test_a_task_that_gets_the_turn_of_another_reads_until_the_same_moment(
    has_deadline: bool, autojump_clock: trio.testing.MockClock
) -> None:
    gate = Gate()
    async with open_peer(gate.handle, over_sockets=True) as (connection, peer):
        await peer.stream.send_all(req(1, b"gate"))
        await settle()
        gate.opened.set()
        assert await outcomes(peer, 1) == {1: b"ok"}
        async with trio.open_nursery() as nursery:
            asker = Asker(connection)
            nursery.start_soon(asker.ask, LONE_ANSWERS + 1)
            if has_deadline:
                connection._reader.stop_at(trio.current_time() + 5, "in a test")
            await answer_alone(peer)
            assert asker.reads
            if not has_deadline:
                connection._reader.stop_at(trio.current_time() + 5, "in a test")
        assert trio.current_time() == 5
        assert isinstance(asker.error, ConnectionLost)


@pytest.mark.parametrize("reads", [False, True])
async def test_a_scope_left_open_that_cancels_the_task_which_has_lent_its_turn(
    reads: bool, caplog: pytest.LogCaptureFixture
) -> None:
    scopes: list[trio.CancelScope] = []

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        if request == [b"leave open"]:
            scopes.append(trio.CancelScope())
            scopes[0].__enter__()
        return request

    async with open_peer(handler, over_sockets=True) as (connection, peer):
        await peer.stream.send_all(req(1, b"leave open"))
        await outcomes(peer, 1)
        async with trio.open_nursery() as nursery:
            asker = Asker(connection)
            nursery.start_soon(asker.ask, LONE_ANSWERS + reads)
            await answer_alone(peer, LONE_ANSWERS - 1)
            if reads:
                await answer(peer)
                await settle()
                assert asker.reads
                scopes[0].cancel()
                await settle()
                assert asker.reads
            else:
                reader = connection._reader
                on_event = reader._on_event

                def cancel_too(event: Event) -> bool:
                    scopes[0].cancel()
                    return on_event(event)

                reader._on_event = cancel_too  # so that it is cancelled before the asker has run
            await answer(peer)
        assert len(asker.answers) == LONE_ANSWERS + reads
        await settle()
        check_idle(connection)
        await check_that_all_goes_on(connection, peer)
        check_idle(connection)
    assert "left a cancel scope open" in caplog.text


# ---- handlers that ask ----


class AskBack:
    """A handler that asks the peer what it was asked, and may do more before and after that."""

    def __init__(self) -> None:
        self.tasks: list[trio.lowlevel.Task] = []
        self.seconds = 0.0  # to wait for after that
        self.error: BaseException | None = None

    async def handle(self, connection: Connection, request: list[bytes]) -> list[bytes]:
        self.tasks.append(trio.lowlevel.current_task())
        if request == [b"now"]:
            return request
        try:
            answer = await connection.request(request)
        except BaseException as exc:
            self.error = exc
            raise
        if self.seconds:
            await trio.sleep(self.seconds)
        self.tasks.append(trio.lowlevel.current_task())
        return answer

    def reads(self, connection: Connection) -> bool:
        leader = connection._reader._leader
        return leader is not None and leader.task is self.tasks[0]


@asynccontextmanager
async def open_asked_back(
    over_sockets: bool, timeout: bytes = b""
) -> AsyncGenerator[tuple[Connection, RawPeer, AskBack, bytes]]:
    """A connection with a handler, of request 1, that reads; and the id of what it asked."""
    handler = AskBack()
    async with open_peer(handler.handle, over_sockets=over_sockets) as (connection, peer):
        await peer.stream.send_all(req(1, b"x", timeout=timeout))
        kind, id, _, body = await peer.receive()
        assert (kind, body[5:]) == (b"req", b"x")
        assert handler.reads(connection)
        yield connection, peer, handler, id
        await settle()
        if not connection.closed:
            await check_that_all_goes_on_with(handler, connection, peer)
            await settle()
            check_idle(connection)


async def check_that_all_goes_on_with(handler: AskBack, connection: Connection, peer: RawPeer) -> None:
    handler.seconds = 0
    for n in range(3):
        await peer.stream.send_all(req(101 + 2 * n, b"y"))
        await answer(peer)
        assert await outcomes(peer, 1) == {101 + 2 * n: b"ok"}
    await peer.stream.send_all(req(111, b"now"))
    assert await outcomes(peer, 1) == {111: b"ok"}


in_memory_and_over_sockets = pytest.mark.parametrize("over_sockets", [False, True])


@in_memory_and_over_sockets
async def test_a_handler_that_asks_the_peer_reads_and_no_other_task_is_needed(over_sockets: bool) -> None:
    async with open_asked_back(over_sockets) as (connection, peer, handler, id):
        assert connection._reader._nursery is not None
        assert len(connection._reader._nursery.child_tasks) == 1
        await peer.send(b"ok", id, body=[b"x"])
        assert await outcomes(peer, 1) == {1: b"ok"}
        for n in range(10):
            await peer.stream.send_all(req(3 + 2 * n, b"y"))
            await answer(peer)
            assert await outcomes(peer, 1) == {3 + 2 * n: b"ok"}
        assert len(connection._reader._nursery.child_tasks) == 1
        assert handler.tasks == [handler.tasks[0]] * 22


@in_memory_and_over_sockets
async def test_a_handler_that_asks_again_reads_again(over_sockets: bool) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        for n in range(3):
            assert await connection.request([b"%d" % n]) == [b"x"]

    async with open_peer(handler, over_sockets=over_sockets) as (connection, peer):
        await peer.stream.send_all(req(1))
        for _ in range(3):
            await settle()
            assert connection._reader._leader is not None
            await answer(peer)
        assert await outcomes(peer, 1) == {1: b"ok"}
        await settle()
        check_idle(connection)


@in_memory_and_over_sockets
async def test_what_came_with_a_request_is_left_to_another_task_when_its_handler_asks(
    over_sockets: bool,
) -> None:
    handler = AskBack()
    async with open_peer(handler.handle, over_sockets=over_sockets) as (connection, peer):
        await peer.stream.send_all(req(1, b"x") + packet(b"ping") + req(3, b"now"))
        assert await peer.receive() == [b"pong"]
        kind, id, *_ = await peer.receive()
        assert kind == b"req"
        assert await outcomes(peer, 1) == {3: b"ok"}
        assert not handler.reads(connection)
        await peer.send(b"ok", id, body=[b"x"])
        assert await outcomes(peer, 1) == {1: b"ok"}
        await check_that_all_goes_on_with(handler, connection, peer)


@in_memory_and_over_sockets
async def test_a_request_that_comes_while_a_handler_reads_is_handled(over_sockets: bool) -> None:
    async with open_asked_back(over_sockets) as (connection, peer, handler, id):
        await peer.stream.send_all(req(3, b"now"))
        assert await outcomes(peer, 1) == {3: b"ok"}
        assert not handler.reads(connection)
        assert handler.tasks[1] is not handler.tasks[0]
        await peer.send(b"ok", id, body=[b"x"])
        assert await outcomes(peer, 1) == {1: b"ok"}


@in_memory_and_over_sockets
async def test_a_handler_that_has_read_steps_aside_when_it_waits_for_something_else(
    over_sockets: bool, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_asked_back(over_sockets) as (_, peer, handler, id):
        handler.seconds = 10
        await peer.send(b"ok", id, body=[b"x"])
        await peer.stream.send_all(req(3, b"now"))
        assert await outcomes(peer, 1) == {3: b"ok"}
        assert trio.current_time() == 0
        assert await outcomes(peer, 1) == {1: b"ok"}
        assert trio.current_time() == 10


@in_memory_and_over_sockets
async def test_a_handler_that_reads_may_be_cancelled_by_the_peer(over_sockets: bool) -> None:
    async with open_asked_back(over_sockets) as (_, peer, handler, id):
        await peer.stream.send_all(cancel(1))
        assert await peer.receive() == [b"cancel", id]
        assert await outcomes(peer, 1) == {1: b"cancelled"}
        assert isinstance(handler.error, trio.Cancelled)
        await peer.send(b"err", id, b"cancelled", b"")


@in_memory_and_over_sockets
async def test_a_handler_that_reads_may_be_cancelled_too_late(over_sockets: bool) -> None:
    async with open_asked_back(over_sockets) as (_, peer, _, id):
        await peer.stream.send_all(cancel(1) + packet(b"ok", id, body=[b"x"]))
        assert await outcomes(peer, 1) == {1: b"ok"}


@in_memory_and_over_sockets
async def test_a_handler_that_reads_and_is_cancelled_too_late_harms_no_other(over_sockets: bool) -> None:
    async with open_asked_back(over_sockets) as (_, peer, handler, id):
        ok = packet(b"ok", id, body=[b"x"])
        await peer.stream.send_all(ok + cancel(1) + req(3, b"y"))
        assert (await peer.receive())[:2] == [b"ok", b"1"]
        await answer(peer)
        assert await outcomes(peer, 1) == {3: b"ok"}
        assert handler.error is None


@in_memory_and_over_sockets
async def test_the_deadline_of_a_handler_that_reads(
    over_sockets: bool, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_asked_back(over_sockets, b"5000000") as (_, peer, handler, id):
        assert await peer.receive() == [b"cancel", id]
        assert trio.current_time() == 5
        assert await outcomes(peer, 1) == {1: b"timeout"}
        assert isinstance(handler.error, trio.Cancelled)
        await peer.send(b"err", id, b"cancelled", b"")


@in_memory_and_over_sockets
@pytest.mark.parametrize("end", [close_peer, cut_packet, break_protocol, close, be_silent])
async def test_the_end_reaches_a_handler_that_reads(
    end: Callable[[Connection, RawPeer], Awaitable[None]],
    over_sockets: bool,
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_asked_back(over_sockets) as (connection, peer, handler, _):
        await end(connection, peer)
        await connection.wait_closed()
        assert isinstance(handler.error, trio.Cancelled | ConnectionLost | ConnectionClosed)
        assert connection.statistics().handlers_running == 0


async def test_a_handler_that_reads_is_cancelled_at_the_end_also_when_something_has_come() -> None:
    errors: list[BaseException | None] = []
    for _ in range(20):  # so that its task is at times the last to run
        async with open_asked_back(over_sockets=True) as (connection, peer, handler, id):
            os.write(peer.stream.socket.fileno(), packet(b"ok", id, body=[b"x"]))  # type: ignore[attr-defined]
            await trio.lowlevel.checkpoint()
            connection._close("now")
            await connection.wait_closed()
            errors.append(handler.error)
    assert {type(error) for error in errors} == {type(None), trio.Cancelled}


@in_memory_and_over_sockets
@pytest.mark.parametrize(("timeout", "ends"), [(b"60000000", CLOSE_TIMEOUT), (b"500000", 0.5)])
async def test_where_sending_fails_a_handler_reads_on_for_a_moment(
    over_sockets: bool, timeout: bytes, ends: float, autojump_clock: trio.testing.MockClock
) -> None:
    async with open_asked_back(over_sockets, timeout) as (connection, _, handler, _):
        connection._reader.stop_at(trio.current_time() + CLOSE_TIMEOUT, "sending failed: in a test")
        while handler.error is None:
            await trio.sleep(0.1)
        assert trio.current_time() == pytest.approx(ends, abs=0.11)
        assert isinstance(handler.error, trio.Cancelled)
        await connection.wait_closed()
        assert trio.current_time() == pytest.approx(CLOSE_TIMEOUT, abs=0.11)
        with pytest.raises(ConnectionLost):
            await connection.request([])
