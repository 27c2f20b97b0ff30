"""Big packets wait here, and not in the system."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from bokbok_trio import Connection, ConnectionLost, Key, Settings, open_connection, open_server
from bokbok_trio._protocol.outbox import MAX_BATCH_SIZE, MIN_BATCH_SIZE
from bokbok_trio._stream.fast import Load, PlainStream
from bokbok_trio._stream.pacing import (
    LEAST_BOUND,
    MAX_WAIT,
    PAUSE,
    QUEUE_TIME,
    Pacer,
)
from bokbok_trio._stream.socket import SocketStream, make_fast
from bokbok_trio.testing import FaultyStream, open_connection_pair
from tests.support.helpers import echo

MIB = 2**20
SPAN = QUEUE_TIME + 0.001
"""Seconds after which a rate is known, on a way of no length."""


class Link:
    """The load of a link, which a test sets."""

    def __init__(self) -> None:
        self.now = 0.0
        self.load = Load(0, 0, 0, 0.0, 0.0)
        self.pacer = Pacer(lambda: self.load)

    def room(
        self,
        queued: int,
        *,
        after: float = 0.0,
        acknowledged: float = 0.0,
        unsent: int = 0,
        late: float = 0.0,
        way: float = 0.0,
    ) -> int:
        self.now += after
        total = self.load.acknowledged + int(acknowledged)
        self.load = Load(queued, unsent, total, way + late, way)
        return self.pacer.room(self.now)

    def know_rate(self, rate: float, way: float = 0.0) -> None:
        for _ in range(2):
            self.room(MIB, after=SPAN + way, acknowledged=rate * (SPAN + way), way=way)


# ---- what the numbers mean ----


def test_no_load_is_no_bound() -> None:
    assert Pacer(lambda: None).room(0) == MAX_BATCH_SIZE


def test_what_is_nearly_drained_takes_a_whole_batch() -> None:
    assert Link().room(MIN_BATCH_SIZE - 1, unsent=MIN_BATCH_SIZE - 1, late=9) == MAX_BATCH_SIZE


@pytest.mark.parametrize(
    ("unsent", "late", "room"),
    [
        (0, 0.0, MIN_BATCH_SIZE),
        (MIN_BATCH_SIZE, QUEUE_TIME / 2, MIN_BATCH_SIZE),
        (MIN_BATCH_SIZE + 1, 0.0, 0),
        (0, QUEUE_TIME / 2 + 0.001, 0),
    ],
)
def test_over_the_bound_a_piece_waits_only_for_a_queue(unsent: int, late: float, room: int) -> None:
    assert Link().room(LEAST_BOUND + 1, unsent=unsent, late=late) == room


def test_up_to_the_bound_a_piece_fills_it() -> None:
    link = Link()
    assert link.room(LEAST_BOUND, unsent=LEAST_BOUND, late=1) == MIN_BATCH_SIZE
    assert link.room(MIN_BATCH_SIZE, unsent=LEAST_BOUND, late=1) == LEAST_BOUND - MIN_BATCH_SIZE


def test_the_bound_is_what_drains_in_twice_the_way_and_the_time_of_the_queue() -> None:
    link = Link()
    link.know_rate(1e7, way=0.1)
    bound = int(1e7 * (0.2 + QUEUE_TIME))
    assert link.room(bound + 100, late=1, way=0.1) == 0
    assert link.room(bound - 100, late=1, way=0.1) == MIN_BATCH_SIZE
    assert link.room(MIB, late=1, way=0.1) == pytest.approx(bound - MIB, abs=100)


def test_the_bound_follows_a_link_that_becomes_slower() -> None:
    link = Link()
    link.know_rate(1e7)
    assert link.room(200_000, late=1) > 0
    assert link.room(200_000, late=1, after=SPAN, acknowledged=1e6 * SPAN) == 0


def test_a_rate_is_of_a_whole_span() -> None:
    link = Link()
    link.know_rate(1e7)
    assert link.room(200_000, late=1, after=SPAN / 2, acknowledged=0) > 0
    assert link.room(200_000, late=1, after=SPAN / 2, acknowledged=0) == 0


def test_idleness_and_the_round_trip_after_it_do_not_lower_the_rate() -> None:
    link = Link()
    link.know_rate(1e7)
    link.room(0, after=10.0)
    assert link.room(200_000, late=1, after=SPAN, acknowledged=10) > 0
    assert link.room(200_000, late=1, after=SPAN, acknowledged=10) == 0, "but what comes then does"


def test_idleness_in_the_midst_of_a_span_does_not_lower_the_rate() -> None:
    link = Link()
    link.know_rate(1e7)
    link.room(0, after=SPAN / 2)
    assert link.room(200_000, late=1, after=SPAN / 2, acknowledged=10) > 0


def test_a_fast_link_shows_between_idleness_too() -> None:
    link = Link()
    for _ in range(2):
        link.room(0, after=SPAN, acknowledged=1e7 * SPAN)
    assert link.room(200_000, late=1) > 0


def test_a_piece_does_not_wait_for_ever() -> None:
    link = Link()
    link.room(0)
    assert link.room(MIB, after=MAX_WAIT - 0.01, late=1) == 0
    assert link.room(MIB, after=0.02, late=1) == MIN_BATCH_SIZE
    assert link.room(MIB, after=0.02, late=1) == 0, "and each waits anew"


# ---- what the system says ----


async def test_the_load_of_a_tcp_socket() -> None:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port: int = listener.socket.getsockname()[1]
    async with listener, await trio.open_tcp_stream("127.0.0.1", port) as ours:
        async with await listener.accept() as theirs:
            await ours.send_all(bytes(50_000))
            received = 0
            while received < 50_000:
                received += len(await theirs.receive_some())
            load = SocketStream(ours).load()
            assert load is not None
            assert load.queued == load.unsent == 0
            assert load.acknowledged in (50_000, 50_001), "some systems count the opening"
            assert 0 < load.least_round_trip <= load.round_trip < 10
            with trio.move_on_after(0.1):
                await ours.send_all(bytes(64 * MIB))  # it is not read
            direct = SocketStream(ours)
            load = make_fast(direct).load()
            assert load is not None
            assert load.queued >= load.unsent > 0
            assert load.acknowledged + load.queued >= 50_000 + load.unsent
    assert make_fast(direct).load() is None, "it is closed"


async def test_other_streams_have_no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = socket.socketpair()
    with other:
        async with trio.SocketStream(trio.socket.from_stdlib_socket(one)) as stream:
            assert SocketStream(stream).load() is None
            assert make_fast(stream).load() is None
    memory, _ = trio.testing.memory_stream_pair()
    assert make_fast(memory).load() is None
    tcp = SocketStream(trio.SocketStream(trio.socket.socket()))
    assert make_fast(tcp).load() is not None
    with monkeypatch.context() as patch:
        patch.setattr(tcp.socket, "getsockopt", lambda *_: bytes(100))
        assert make_fast(tcp).load() is None, "an older system"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        assert make_fast(tcp).load() is None
    tcp.socket.close()


async def test_whether_a_socket_has_drained() -> None:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port: int = listener.socket.getsockname()[1]
    async with listener, await trio.open_tcp_stream("127.0.0.1", port) as ours:
        async with await listener.accept():
            assert SocketStream(ours).is_drained()
            with trio.move_on_after(0.1):
                await ours.send_all(bytes(64 * MIB))  # it is not read
            direct = SocketStream(ours)
            assert not make_fast(direct).is_drained()
    assert not make_fast(direct).is_drained(), "it is closed"
    one, other = map(trio.SocketStream, trio.socket.socketpair())
    async with one, other:
        assert not SocketStream(one).is_drained(), "it is not told of other sockets"


def test_what_has_drained_is_not_asked_for_its_load_each_time() -> None:
    asked: list[float] = []

    def load() -> Load:
        asked.append(now)
        return Load(0, 0, 0, 0.0, 0.0)

    pacer = Pacer(load, lambda: True)
    for now in (1.0, 1.0 + SPAN / 2, 1.0 + SPAN, 1.0 + SPAN * 1.5):
        assert pacer.room(now) == MAX_BATCH_SIZE
    assert asked == [1.0, 1.0 + SPAN]


# ---- the sender ----


async def answer_by_size(connection: Connection, request: list[bytes]) -> list[bytes]:
    await trio.lowlevel.checkpoint()
    return [bytes(int(request[0]))]


def say_load(monkeypatch: pytest.MonkeyPatch, load: Callable[[], Load | None]) -> None:
    """Have all streams of connections that are opened from now on, and that are no sockets, tell this."""
    monkeypatch.setattr(PlainStream, "load", lambda _: load())


async def test_while_a_big_packet_waits_small_ones_go(
    sealed: bool, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = Load(MIB, MIB, 0, 0.0, 0.0)
    began = trio.current_time()
    finished: list[float] = []
    say_load(monkeypatch, lambda: stuck if trio.current_time() < began + MAX_WAIT / 2 else None)
    async with open_connection_pair(server_handler=answer_by_size, sealed=sealed) as (client, server):

        async def fetch() -> None:
            assert await client.request(["300000"]) == [bytes(300_000)]
            finished.append(trio.current_time())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch)
            for _ in range(10):
                before = trio.current_time()
                await client.request(["10"])
                assert trio.current_time() == before
                await trio.sleep(MAX_WAIT / 30)
            assert not finished
            assert server.statistics().packets_queued == 1
    assert began + MAX_WAIT / 2 <= finished[0] <= began + MAX_WAIT / 2 + PAUSE * 1.01


async def test_a_peer_that_does_not_read_is_noticed_though_pieces_wait(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    say_load(monkeypatch, lambda: Load(MIB, MIB, 0, 0.0, 0.0))
    settings = Settings(ping_after=3, ping_timeout=2)
    streams: list[FaultyStream] = []

    def wrap(stream: trio.abc.HalfCloseableStream) -> trio.abc.Stream:
        streams.append(FaultyStream(stream))
        return streams[0]

    async with open_connection_pair(echo, echo, client_settings=settings, wrap=wrap) as (client, server):
        streams[0].sending.stall()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(talk, server)
            began = trio.current_time()
            with pytest.raises(ConnectionLost, match="has not read for 5 seconds"):
                await client.request([bytes(300_000)])
            assert trio.current_time() == pytest.approx(began + 5, abs=MAX_WAIT + 0.1)
            nursery.cancel_scope.cancel()


async def talk(connection: Connection) -> None:
    """Let the other side hear something again and again, whatever comes of it."""
    async with trio.open_nursery() as nursery:
        while True:
            nursery.start_soon(ask, connection)
            await trio.sleep(1)


async def ask(connection: Connection) -> None:
    with pytest.raises(ConnectionLost):
        await connection.request(["x"])


async def test_closing_does_not_wait_for_the_queue_to_drain(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    say_load(monkeypatch, lambda: Load(MIB, MIB, 0, 0.0, 0.0))
    async with open_connection_pair(server_handler=answer_by_size) as (client, server):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_for, client, "300000")
            await trio.testing.wait_all_tasks_blocked()
            await trio.sleep(PAUSE)
            assert server.statistics().packets_queued == 1
            began = trio.current_time()
            await server.aclose()
            assert trio.current_time() < began + PAUSE


async def ask_for(connection: Connection, size: str) -> None:
    assert len((await connection.request([size]))[0]) == int(size)


async def test_a_connection_over_tcp_asks_its_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    key = Key.generate()
    told: list[Load | None] = []
    load = SocketStream.load

    def spy(stream: SocketStream) -> Load | None:
        told.append(load(stream))
        return told[-1]

    monkeypatch.setattr(SocketStream, "load", spy)
    async with open_server("127.0.0.1:0", answer_by_size, user_key={"u": key}) as server:
        async with open_connection(str(server.addresses[0]), user="u", key=key) as connection:
            assert len((await connection.request(["1000000"]))[0]) == 1_000_000
            assert told
            assert None not in told
