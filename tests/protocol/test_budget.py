"""The budget: which requests wait or are refused, and that none waits for ever."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
from hypothesis import given, settings as hypothesis_settings, strategies as st
from trio.testing import MockClock, memory_stream_pair

from bokbok_trio import (
    Channel,
    Connection,
    ConnectionRefused,
    Key,
    RemoteError,
    Settings,
    open_connection,
    open_server,
)
from bokbok_trio._admission import fit_descriptors
from bokbok_trio._errors import HandshakeError
from bokbok_trio._protocol.budget import COUNTED, MIN_WINDOW, Budget, Room
from bokbok_trio._protocol.events import Answer, Failure, Request
from bokbok_trio._protocol.flow_control import WINDOW
from bokbok_trio._protocol.options import decode_options, encode_options, find_room
from bokbok_trio._protocol.outbox import MIN_BATCH_SIZE
from bokbok_trio._protocol.session import Session
from bokbok_trio._protocol.slots import MAX_DEPTH
from bokbok_trio.testing import open_connection_pair
from tests.support.inside import session_of

from ..support.helpers import RawPeer, echo, open_peer, outcomes, packet, req, settle

MIB = 2**20

SMALL = Settings(max_message_size=2**18, budget=4 * MIB)


# ---- how much of the peer's room ours take up ----


def test_each_depth_and_kind_has_its_share() -> None:
    room = Room(8 * MIB)
    assert room.has(0, 8 * MIB), "one may always go"
    room.add(1, 0, 2 * MIB)
    assert room.has(0, MIB)
    assert not room.has(0, MIB + 1)
    assert room.has(0, COUNTED - 1), "small ones do not count"
    for other in (1, 2, 3, 2 * MAX_DEPTH):
        assert room.has(other, 8 * MIB)
    room.add(3, 1, MIB)
    assert not room.has(1, COUNTED)
    room.remove(1)
    assert room.has(0, 8 * MIB)
    room.clear()
    assert room.has(1, 8 * MIB)


def test_where_the_peer_has_not_told_there_is_no_bound() -> None:
    room = Room(None)
    room.add(1, 0, 2**40)
    assert room.has(0, 2**40)


def test_the_option() -> None:
    options = decode_options(encode_options({"room": b"12345"}, bytes))
    assert find_room(options) == 12345
    assert find_room({}) is None
    with pytest.raises(HandshakeError, match="invalid option 'room': invalid number"):
        decode_options(encode_options({"room": b"+5"}, bytes))


# ---- two engines ----


def make_engines(budget: int, slots: int) -> tuple[Session, Session]:
    room = Budget.share_out(budget).requests
    client, server = (
        Session(
            side,
            max_message_size=4 * MIB,
            max_requests=slots,
            slots=slots,
            budget=Budget.share_out(budget),
            peer_room=room,
        )
        for side in ("client", "server")
    )
    return client, server


def move(source: Session, target: Session) -> list[object]:
    """Let one engine receive all that the other has queued."""
    events: list[object] = []
    while source.has_queued:
        events += target.receive(source.take(0.0))
        while target.has_undecoded:
            events += target.receive(b"")
    assert target.error is None
    return events


def test_requests_wait_until_there_is_room_and_in_order() -> None:
    client, server = make_engines(budget=2 * MIB, slots=10)
    ids = [client.request([bytes(size)]) for size in (200_000, 150_000, 150_000, 10)]
    assert [client.local.is_waiting(id) for id in ids] == [False, False, True, True], "480 KiB are theirs"
    assert [event.id for event in move(client, server) if isinstance(event, Request)] == ids[:2]
    server.answer(ids[1], [])
    move(server, client)
    assert not client.waiting
    assert {event.id for event in move(client, server) if isinstance(event, Request)} == set(ids[2:])


def test_a_big_one_that_is_cancelled_lets_those_behind_it_go() -> None:
    client, _ = make_engines(budget=2 * MIB, slots=10)
    client.request([bytes(300_000)])
    big, small = client.request([bytes(300_000)]), client.request([b"small"])
    assert client.local.is_waiting(small)
    client.cancel(big)
    assert not client.local.is_waiting(small)


def test_those_that_wait_for_room_do_not_go_when_the_peer_drains() -> None:
    client, server = make_engines(budget=2 * MIB, slots=10)
    client.request([bytes(300_000)])
    waiting = [client.request([bytes(300_000)]), client.request([b"small"])]
    server.drain()
    [bye] = move(server, client)
    assert bye.ids == waiting  # type: ignore[attr-defined]
    assert not client.waiting


def test_what_is_sent_beyond_the_room_is_answered_and_does_not_run() -> None:
    _, server = make_engines(budget=2 * MIB, slots=10)
    client = Session("client", max_message_size=4 * MIB, max_requests=10, slots=10)
    ids = [client.request([bytes(400_000)]) for _ in range(4)]
    channel = client.open_channel([bytes(400_000)])
    ran = [event.id for event in move(client, server) if isinstance(event, Request)]
    assert ran == ids[:3]
    refused = [event for event in move(server, client) if isinstance(event, Failure)]
    assert {each.id for each in refused} == {ids[3], channel}
    assert {each.code for each in refused} == {"busy"}
    assert "not run: of 1310720 bytes of requests" in refused[0].message
    server.answer(ids[0], [])
    move(server, client)
    again = client.request([bytes(400_000)])
    assert [event.id for event in move(client, server) if isinstance(event, Request)] == [again]


def test_the_bytes_of_answers_count_until_they_have_left() -> None:
    client, server = make_engines(budget=MIB, slots=10)
    ids = [client.request([]) for _ in range(2)]
    move(client, server)
    for id in ids:
        assert server.has_room_for_answers
        server.answer(id, [bytes(100_000)])
    assert not server.has_room_for_answers
    assert server.waiting_bytes > 2 * 100_000
    move(server, client)
    assert server.waiting_bytes == 0
    assert server.has_room_for_answers


def test_windows_become_smaller_where_there_are_many_channels() -> None:
    client, server = make_engines(budget=32 * MIB, slots=1000)
    ids = [client.open_channel([]) for _ in range(900)]
    windows = [client.flow_control.credits[id].receive_credit for id in ids]
    assert windows[0] == WINDOW
    assert sorted(windows, reverse=True) == windows
    assert windows[-1] == MIN_WINDOW
    assert sum(windows) < 8 * MIB + 900 * MIN_WINDOW
    for id in ids:
        client.cancel(id)
    again = client.open_channel([])
    assert client.flow_control.credits[again].window == WINDOW
    move(client, server)
    server.flow_control.accept(again)
    assert server.flow_control.credits[again].window == WINDOW


PLANS = st.lists(
    st.tuples(
        st.sampled_from([0, 1]),  # whose
        st.integers(1, 4),  # how deep the chain goes
        st.sampled_from([0, 5_000, 30_000, 100_000]),  # bytes of each request
    ),
    min_size=1,
    max_size=30,
)


@given(plan=PLANS, slots=st.integers(1, 4), budget=st.sampled_from([MIB, 4 * MIB]))
@hypothesis_settings(max_examples=60, deadline=None)
def test_no_chains_of_requests_stall_and_none_is_refused(
    plan: list[tuple[int, int, int]], slots: int, budget: int
) -> None:
    """Each request is answered only when the one that its handler makes back, one deeper, was."""
    engines = make_engines(budget, slots)
    parents: list[dict[int, int | None]] = [{}, {}]  # by id of a request: that of the one it was made in
    left: list[dict[int, tuple[int, int]]] = [{}, {}]
    done = 0
    for side, depth, size in plan:
        id = engines[side].request([bytes(size)])
        parents[side][id] = None
        left[side][id] = depth - 1, size
    while done < len(plan):
        before = done
        is_moving = False
        for side in (0, 1):
            me, other = engines[side], engines[1 - side]
            for event in move(other, me):
                is_moving = True
                if isinstance(event, Request):
                    depth, size = left[1 - side].pop(event.id)
                    if depth:
                        id = me.request([bytes(size)], depth=event.depth + 1)
                        parents[side][id] = event.id
                        left[side][id] = depth - 1, size
                    else:
                        me.answer(event.id, [])
                else:
                    assert isinstance(event, Answer), "it was refused"
                    parent = parents[side].pop(event.id)
                    if parent is None:
                        done += 1
                    else:
                        me.answer(parent, [])
        assert is_moving or done > before, "all of them wait"


# ---- two connections ----


async def test_many_big_requests_and_answers_at_once_all_succeed() -> None:
    async with open_connection_pair(
        server_handler=echo, server_settings=Settings(max_message_size=MIB), sealed=False
    ) as (connection, _):
        sizes = [n * 20_000 for n in range(50)]
        async with trio.open_nursery() as nursery:

            async def ask(size: int) -> None:
                assert await connection.request([bytes(size)]) == [bytes(size)]

            for size in sizes:
                nursery.start_soon(ask, size)


@pytest.mark.parametrize("waits", [False, True])
async def test_a_peer_that_sends_too_much_is_refused_and_may_ask_again(waits: bool) -> None:
    gate = trio.Event()
    running = most = 0

    async def handler(connection: Connection, request: list[bytes]) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if waits:
            await gate.wait()
        running -= 1

    async with open_peer(handler, SMALL) as (_, peer):
        body = [bytes(60_000)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.stream.send_all, b"".join(req(1 + 2 * n, *body) for n in range(100)))
            await settle()
            gate.set()
            answers = await outcomes(peer, 100)
        refused = sum(outcome == b"busy" for outcome in answers.values())
        if waits:
            assert most == 4 * MIB * 5 // 8 // 60_005
            assert refused == 100 - most
        else:
            assert refused == 0


@pytest.mark.parametrize("waits", [False, True])
async def test_handlers_wait_before_they_begin_while_answers_are_not_read(waits: bool) -> None:
    begun = 0

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        nonlocal begun
        begun += 1
        if waits:
            await trio.lowlevel.checkpoint()
        return [bytes(100_000)]

    async with open_peer(handler, SMALL, over_sockets=True) as (connection, peer):
        await peer.stream.send_all(b"".join(req(1 + 2 * n) for n in range(60)))
        for _ in range(20):
            await settle()
        if not waits:
            most = 4 * MIB * 3 // 16 // 100_000
            assert most <= begun <= most + 6, "the system takes some"
        # A nested request is not held up.
        await peer.stream.send_all(packet(b"req", b"9001", b"", b"1", b"", body=[]))
        await settle()
        got = begun
        answers = 0
        while answers < 61:
            fields = await peer.receive()
            if fields[0] == b"part" and fields[2] == b"0":
                answers += 1
        assert begun == 61
        assert got < 61 or waits
        assert session_of(connection).waiting_bytes == 0


async def test_one_that_waits_to_begin_may_be_cancelled() -> None:
    begun: list[bytes] = []

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        begun.append(request[0])
        return [bytes(200_000)]

    async with open_peer(handler, SMALL, over_sockets=True) as (_, peer):
        await peer.stream.send_all(b"".join(req(1 + 2 * n, b"%d" % n) for n in range(12)))
        await settle()
        held_back = 11
        assert b"%d" % held_back not in begun
        await peer.stream.send_all(packet(b"cancel", b"%d" % (1 + 2 * held_back)))
        kinds: list[bytes] = []
        while kinds.count(b"end") < 12:
            fields = await peer.receive()
            if fields[0] == b"err":
                assert fields[1:3] == [b"%d" % (1 + 2 * held_back), b"cancelled"]
                kinds.append(b"end")
            elif fields[0] == b"part" and fields[2] == b"0":
                kinds.append(b"end")
        assert sorted(begun, key=int) == [b"%d" % n for n in range(11)]


async def test_a_channel_whose_items_do_not_fit_breaks_and_others_go_on() -> None:
    gate = trio.Event()

    async def hoard(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
        await gate.wait()
        count = 0
        async for _ in channel:
            count += 1
        return [b"%d" % count]

    async with open_connection_pair(server_channel_handler=hoard, server_settings=SMALL) as (connection, _):
        broken = fine = 0

        async def send_one(n: int) -> None:
            nonlocal broken, fine
            try:
                async with connection.open_channel([b"%d" % n]) as channel:
                    await channel.send([bytes(240_000)])
                    await channel.end()
                    assert await channel.answer() == [b"1"]
                    fine += 1
            except RemoteError as exc:
                broken += "raise Settings.budget" in exc.message

        async with trio.open_nursery() as nursery:
            for n in range(30):
                nursery.start_soon(send_one, n)
            await trio.testing.wait_all_tasks_blocked()
            gate.set()
        assert fine == 4 * MIB // 240_005
        assert fine + broken == 30
        broken = fine = 0
        await send_one(99)
        assert fine == 1, "what was held is free"


@pytest.mark.parametrize(("channels", "size"), [(100, 8_000), (100, 65_000), (20, 1_000_000), (5, 4_000_000)])
async def test_items_of_channels_that_pause_fit_the_default_budget(channels: int, size: int) -> None:
    gate = trio.Event()

    async def hoard(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
        await gate.wait()
        return [b"%d" % sum([len(item[0]) async for item in channel])]

    async with open_connection_pair(server_channel_handler=hoard) as (connection, _):

        async def send(count: int) -> None:
            async with connection.open_channel([]) as channel:
                for _ in range(count):
                    await channel.send([bytes(size)])
                await channel.end()
                assert await channel.answer() == [b"%d" % (count * size)]

        async with trio.open_nursery() as nursery:
            for _ in range(channels):
                nursery.start_soon(send, max(2, 100_000 // size))
            await trio.testing.wait_all_tasks_blocked()
            gate.set()


async def test_a_channel_that_is_closed_gives_up_what_it_held() -> None:
    async def flood(connection: Connection, request: list[bytes], channel: Channel) -> None:
        for _ in range(4):
            await channel.send([bytes(50_000)])
        await trio.sleep_forever()

    async with open_connection_pair(server_channel_handler=flood) as (connection, _):
        for _ in range(3):
            async with connection.open_channel([]):
                await trio.testing.wait_all_tasks_blocked()
                assert session_of(connection).flow_control.held == 4 * 50_005
            assert session_of(connection).flow_control.held == 0


# ---- a peer that reads slowly ----


@asynccontextmanager
async def reading_slowly(rate: float, least_rate: float) -> AsyncGenerator[Connection]:
    """A connection whose peer has asked for 2.7 MB, and reads so many bytes a second."""

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        return [bytes(900_000)]

    settings = Settings(ping_after=5, ping_timeout=5, least_rate=least_rate)
    ours, theirs = memory_stream_pair()
    peer = RawPeer(theirs)

    async def chatter() -> None:
        """Not be silent."""
        while True:
            await trio.sleep(1)
            await peer.send(b"pong")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.shake_hands)
        async with open_connection(ours, request_handler=handler, settings=settings) as connection:
            await settle()
            ours.send_stream.send_all_hook = partial(trio.sleep, MIN_BATCH_SIZE / rate)
            await peer.stream.send_all(req(1) + req(3) + req(5))
            nursery.start_soon(chatter)
            yield connection
            await trio.aclose_forcefully(theirs)
        nursery.cancel_scope.cancel()


async def test_a_peer_that_reads_too_slowly_is_lost(autojump_clock: MockClock) -> None:
    async with reading_slowly(rate=2**13, least_rate=2**14) as connection:
        began = trio.current_time()
        with trio.move_on_after(100):
            await connection.wait_closed()
        assert 10 <= trio.current_time() - began <= 40
        assert connection.reason is not None
        assert re.match(r"the peer reads too slowly: \d+ bytes wait for it", connection.reason)


@pytest.mark.parametrize(("rate", "least_rate"), [(2**15, 2**14), (2**13, 0)])
async def test_one_that_is_fast_enough_or_may_be_slow_is_not_lost(
    rate: int, least_rate: int, autojump_clock: MockClock
) -> None:
    async with reading_slowly(rate, least_rate) as connection:
        await trio.sleep(2_700_000 / rate)
        assert not connection.closed


# ---- how many connections ----


async def test_a_user_may_have_so_many_connections(caplog: pytest.LogCaptureFixture) -> None:
    keys = {"alice": Key.generate(), "bob": Key.generate()}
    settings = Settings(max_connections_per_user=2)
    async with open_server("127.0.0.1:0", echo, user_key=keys, settings=settings) as server:
        to = server.addresses[0]
        dial: dict[str, Callable[[], object]] = {
            user: partial(open_connection, to, user=user, key=key) for user, key in keys.items()
        }
        async with dial["alice"](), dial["alice"](), dial["bob"]():  # type: ignore[attr-defined]
            with pytest.raises(
                ConnectionRefused, match="this user has 2 connections, as many as it may"
            ) as caught:
                async with dial["alice"]():  # type: ignore[attr-defined]
                    pytest.fail("it was let in")
            assert caught.value.code == "busy"
        while server.statistics().connections:
            await trio.sleep(0.01)
        async with dial["alice"](), dial["alice"]():  # type: ignore[attr-defined]
            pass
    assert "user 'alice' has 2 connections already" in caplog.text


async def test_a_server_takes_no_more_connections_than_there_may_be_open_files(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    resource = pytest.importorskip("resource")
    caplog.set_level(logging.INFO, "bokbok_trio")

    for files, expected in ((1024, 640), (100, 5), (60, 1), (10**6, 1000), (resource.RLIM_INFINITY, 1000)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, files=files: (files, files))
        caplog.clear()
        async with open_server("127.0.0.1:0", echo) as server:
            assert server.statistics().max_connections == expected
        assert (f"takes {expected} connections at once, and not 1000" in caplog.text) == (expected < 1000)


def test_where_the_system_does_not_tell_there_may_be_as_many_as_the_settings_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert fit_descriptors(Settings()) == (1000, 512, 512)
