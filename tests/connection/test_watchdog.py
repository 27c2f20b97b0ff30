from __future__ import annotations

import contextlib
import gc
import math
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Iterator

import pytest
import trio
import trio.testing
from hypothesis import example, given, settings, strategies as st

from bokbok_trio import ConnectionLost, Settings
from bokbok_trio._connection.watchdog import LATENESS, SPARE_ALARMS, Watchdog, _alarm_clock, _AlarmClock
from bokbok_trio.testing import FaultyStream, open_connection_pair
from tests.support.helpers import busy_handler, packet, raw_peer, settle

PATIENCE = 40  # the defaults: 20 s of silence, 20 s more


async def test_a_silent_peer_that_lives_is_pinged_and_kept(autojump_clock: trio.testing.MockClock) -> None:
    async with open_connection_pair(server_handler=busy_handler) as (client, server):
        await trio.sleep(1000)
        assert not client.closed
        assert not server.closed
        assert await client.request(["ping", "1"]) == [b"pong", b"1"]


async def test_the_pings_are_as_few_as_they_must_be(autojump_clock: trio.testing.MockClock) -> None:
    async with raw_peer() as (connection, peer), trio.open_nursery() as nursery:
        pings: list[float] = []

        async def answer() -> None:
            while True:
                assert await peer.receive() == [b"ping"]
                pings.append(trio.current_time())
                await peer.send(b"pong")

        nursery.start_soon(answer)
        await trio.sleep(105)
        assert pings == [20, 40, 60, 80, 100]
        assert not connection.closed
        nursery.cancel_scope.cancel()


async def test_a_peer_that_falls_silent_is_lost_in_time(autojump_clock: trio.testing.MockClock) -> None:
    async with raw_peer() as (connection, peer):
        await trio.sleep(15)
        await peer.send(b"ping")
        assert await peer.receive() == [b"pong"]
        with pytest.raises(ConnectionLost, match="has not been heard of for 40 seconds") as caught:
            await connection.request([])
        assert trio.current_time() == 15 + PATIENCE
        assert caught.value.may_have_run


async def test_any_packet_is_a_sign_of_life(autojump_clock: trio.testing.MockClock) -> None:
    async with raw_peer() as (connection, peer):
        for _ in range(10):
            await trio.sleep(39)
            await peer.stream.send_all(packet(b"cancel", b"1"))
        await settle()
        assert not connection.closed
        await connection.wait_closed()
        assert trio.current_time() == 390 + PATIENCE


@pytest.mark.parametrize("setting", ["ping_after", "ping_timeout"])
async def test_pings_can_be_turned_off(setting: str, autojump_clock: trio.testing.MockClock) -> None:
    async with raw_peer(settings=Settings(**{setting: math.inf})) as (connection, _):  # type: ignore[arg-type]
        await trio.sleep(10**6)
        assert not connection.closed
        assert _alarm_clock.get() is None
        assert not system_tasks()


async def test_a_send_that_gets_stuck_is_a_loss_though_the_peer_goes_on_sending(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """It sends, and never reads."""
    streams: list[FaultyStream] = []

    def wrap(stream: trio.abc.HalfCloseableStream) -> trio.abc.Stream:
        streams.append(FaultyStream(stream))
        return streams[0]

    patient = Settings(ping_after=math.inf)  # it hears nothing of us meanwhile
    async with open_connection_pair(server_handler=busy_handler, wrap=wrap, server_settings=patient) as (
        client,
        server,
    ):
        await trio.sleep(7)
        streams[0].sending.stall()

        async def go_on() -> None:
            while True:
                await trio.sleep(1)
                with trio.move_on_after(0.5):
                    await server.request(["ping", "x"])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(go_on)
            with pytest.raises(ConnectionLost, match="has not read for 40 seconds"):
                await client.request(["ping", "x"])
            nursery.cancel_scope.cancel()
        assert trio.current_time() == 7 + PATIENCE


class SlowStream(trio.abc.Stream):
    """A link that takes a second for every so many bytes, each way."""

    def __init__(self, transport: trio.abc.Stream, rate: float) -> None:
        self.transport = transport
        self.rate = rate

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.sleep(len(data) / self.rate)
        await self.transport.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        raise AssertionError

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self.transport.receive_some(max_bytes)
        await trio.sleep(len(data) / self.rate)
        return data

    async def aclose(self) -> None:
        await self.transport.aclose()


async def test_a_long_upload_is_no_silence(autojump_clock: trio.testing.MockClock) -> None:
    """4 MB at 4 kB/s: each batch takes 16 s, and a ping waits behind it."""
    async with open_connection_pair(
        server_handler=busy_handler, wrap=lambda stream: SlowStream(stream, 4000)
    ) as (client, _):
        await client.request(["ping", b"x" * 4 * 10**6])
        assert trio.current_time() > 1000


async def test_a_blocked_loop_is_not_the_peers_fault(autojump_clock: trio.testing.MockClock) -> None:
    """What the peer sent while the loop was blocked has not been read yet."""
    async with raw_peer() as (connection, peer):
        await trio.sleep(20)
        assert await peer.receive() == [b"ping"]
        autojump_clock.jump(1000)
        await trio.sleep(15)
        assert not connection.closed
        await peer.send(b"pong")
        await settle()
        await trio.sleep(PATIENCE - 1)
        assert not connection.closed
        await trio.sleep(PATIENCE)
        assert connection.closed


async def test_a_late_watchdog_still_loses_a_peer_that_is_gone(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with raw_peer() as (connection, _):
        await trio.sleep(25)
        autojump_clock.jump(1000)
        await connection.wait_closed()
        assert trio.current_time() == 1025 + 20


async def test_a_machine_suspended_during_a_send_gets_its_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    streams: list[FaultyStream] = []

    def wrap(stream: trio.abc.HalfCloseableStream) -> trio.abc.Stream:
        streams.append(FaultyStream(stream))
        return streams[0]

    async with open_connection_pair(server_handler=busy_handler, wrap=wrap) as (client, _):
        streams[0].sending.stall()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.request, ["ping", "x"])
            await trio.sleep(30)
            autojump_clock.jump(1000)
            await trio.sleep(10)
            assert not client.closed
            streams[0].sending.resume()


# ---- the watchdog alone ----


class Diary:
    """What a watchdog did, and when."""

    def __init__(self) -> None:
        self.events: list[tuple[float, str]] = []

    def ping(self) -> None:
        self.events.append((trio.current_time(), "ping"))

    def lose(self, reason: str) -> None:
        self.events.append((trio.current_time(), reason))

    def watchdog(self, ping_after: float = 20, ping_timeout: float = 20) -> Watchdog:
        return Watchdog(ping_after, ping_timeout, ping=self.ping, fail=self.lose)


class Model:
    """What a watchdog is to do, if it looks at all times when the loop is not blocked."""

    def __init__(self, ping_after: int, ping_timeout: int) -> None:
        self.ping_after = ping_after
        self.ping_timeout = ping_timeout
        self.patience = ping_after + ping_timeout
        self.events: list[tuple[float, str]] = []
        self.lost = False
        self.heard_at = 0.0
        self.send_began = math.inf
        self.answer_due = math.inf
        self.waits_for_answer = False
        self.ping_is_queued = False
        self.grace_ends = -math.inf

    def heard(self, now: float) -> None:
        self.heard_at = now
        self.waits_for_answer = False

    def send_ended(self, now: float, *, ping_departed: bool) -> None:
        self.send_began = math.inf
        if self.ping_is_queued and ping_departed:
            self.ping_is_queued = False
            self.answer_due = now + self.ping_timeout

    def look(self, now: float) -> None:
        if self.lost or now < self.grace_ends:
            return
        stuck_at = self.send_began + self.patience
        silent_at = self.answer_due if self.waits_for_answer else self.heard_at + self.ping_after
        due = min(stuck_at, silent_at)
        slept_through = now > self.grace_ends + max(LATENESS, self.ping_timeout)
        if due < now - LATENESS and (due >= self.grace_ends or slept_through):
            self.grace_ends = now + self.ping_timeout
        elif stuck_at <= now:
            self.lose(now, "not read")
        elif silent_at <= now and self.waits_for_answer:
            self.lose(now, "not been heard of")
        elif silent_at <= now:
            self.waits_for_answer = True
            self.answer_due = now + self.patience + self.ping_timeout
            if not self.ping_is_queued:
                self.ping_is_queued = True
                self.events.append((now, "ping"))

    def lose(self, now: float, what: str) -> None:
        self.lost = True
        self.events.append((now, f"the peer has {what} for {self.patience} seconds"))


STORIES = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.integers(1, 12)),
        st.tuples(st.just("block"), st.integers(1, 30)),
        st.tuples(st.sampled_from(["hear", "begin", "end", "end, but of the ping"]), st.just(0)),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 8), st.integers(1, 8), STORIES)
@example(2, 8, [("wait", 2), ("end", 0), ("wait", 1), ("hear", 0), ("wait", 9)])  # the next ping is at 5
@example(8, 2, [("wait", 7), ("begin", 0), ("wait", 7), ("end", 0), ("wait", 9)])  # lost at 16
@example(2, 8, [("wait", 2), ("begin", 0), ("wait", 1), ("hear", 0), ("wait", 9)])  # not two pings
@example(8, 8, [("begin", 0), ("wait", 5), ("hear", 0), ("wait", 12)])  # stuck at 16, before 13 + 8
@example(3, 3, [("begin", 0), ("wait", 4), ("block", 30), ("wait", 9)])
@example(3, 3, [("block", 9), ("end", 0), ("block", 30), ("wait", 9)])
@example(3, 3, [("block", 9), ("hear", 0), ("block", 30), ("wait", 9)])  # due as the grace ends
def test_it_does_all_in_time_though_it_seldom_looks(
    ping_after: int, ping_timeout: int, story: list[tuple[str, int]]
) -> None:
    clock = trio.testing.MockClock()

    async def main() -> None:
        diary = Diary()
        watchdog = diary.watchdog(ping_after, ping_timeout)
        model = Model(ping_after, ping_timeout)
        wake_at: float | None = ping_after
        for what, seconds in story:
            for step in [1] * seconds if what == "wait" else [seconds]:
                clock.jump(step)
                now = trio.current_time()
                if wake_at is not None and wake_at <= now:
                    wake_at = watchdog.alarm(now)
                    assert wake_at is None or wake_at > now
                model.look(now)
                assert diary.events == model.events
            if what == "hear":
                watchdog.heard()
                model.heard(now)
            elif what == "begin":
                watchdog.send_begins(now)
                model.send_began = now
            elif what.startswith("end"):
                watchdog.send_ended(ping_departed=what == "end")
                model.send_ended(now, ping_departed=what == "end")
        assert watchdog.has_stopped == model.lost

    trio.run(main, clock=clock)


async def test_a_ping_has_its_time_from_when_it_is_written(autojump_clock: trio.testing.MockClock) -> None:
    diary = Diary()
    watchdog = diary.watchdog()
    watchdog.start()
    await trio.sleep(10)
    watchdog.send_begins(trio.current_time())
    await trio.sleep(25)
    watchdog.send_ended(ping_departed=False)  # a batch that was taken before
    watchdog.send_begins(trio.current_time())
    await trio.sleep(30)
    watchdog.send_ended(ping_departed=True)
    await trio.sleep(1000)
    assert diary.events == [(20, "ping"), (85, "the peer has not been heard of for 40 seconds")]


async def test_a_ping_that_never_leaves_is_no_excuse(autojump_clock: trio.testing.MockClock) -> None:
    diary = Diary()
    diary.watchdog().start()
    await trio.sleep(1000)
    assert diary.events == [(20, "ping"), (80, "the peer has not been heard of for 40 seconds")]


async def test_a_ping_that_waits_serves_a_later_silence_too(autojump_clock: trio.testing.MockClock) -> None:
    diary = Diary()
    watchdog = diary.watchdog()
    watchdog.start()
    await trio.sleep(22)
    watchdog.heard()
    await trio.sleep(23)
    watchdog.send_ended(ping_departed=True)
    await trio.sleep(1000)
    assert diary.events == [(20, "ping"), (65, "the peer has not been heard of for 40 seconds")]


@pytest.mark.parametrize("late", [0.75, 1.25])
async def test_only_what_is_late_is_granted_more_time(
    late: float, autojump_clock: trio.testing.MockClock
) -> None:
    diary = Diary()
    watchdog = diary.watchdog()
    watchdog.start()
    await trio.sleep(20)
    await settle()
    watchdog.send_ended(ping_departed=True)
    autojump_clock.jump(20 + late)
    await trio.sleep(1000)
    lost_at = 40 + late + (20 if late > LATENESS else 0)
    assert diary.events[1:] == [(lost_at, "the peer has not been heard of for 40 seconds")]


async def test_what_is_late_twice_is_granted_more_time_once(autojump_clock: trio.testing.MockClock) -> None:
    diary = Diary()
    watchdog = diary.watchdog()
    watchdog.start()
    watchdog.send_begins(0)
    autojump_clock.jump(100)
    await trio.sleep(5)
    assert not diary.events
    autojump_clock.jump(25)
    await settle()
    assert diary.events == [(130, "the peer has not read for 40 seconds")]


async def test_a_grace_that_was_slept_through_is_granted_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A suspended machine may wake for some seconds only, and sleep on."""
    diary = Diary()
    watchdog = diary.watchdog()
    watchdog.start()
    await trio.sleep(20)
    await settle()
    watchdog.send_ended(ping_departed=True)
    for _ in range(3):
        autojump_clock.jump(3600)
        await trio.sleep(5)
    assert diary.events == [(20, "ping")]
    await trio.sleep(100)
    woke = 20 + 3 * 3600 + 2 * 5
    assert diary.events[1:] == [(woke + 20, "the peer has not been heard of for 40 seconds")]


async def test_what_has_arrived_is_read_before_a_peer_is_called_silent(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A second of lateness is granted nothing, and need not: who wakes late reads first."""
    async with raw_peer() as (connection, peer):
        for _ in range(20):
            assert await peer.receive() == [b"ping"]
            await peer.send(b"pong")  # nothing else runs from here to the leap
            autojump_clock.jump(20 + LATENESS / 2)
            await settle()
            assert not connection.closed


async def test_a_watchdog_stopped_before_does_not_start(autojump_clock: trio.testing.MockClock) -> None:
    diary = Diary()
    watchdog = diary.watchdog()
    watchdog.stop()
    watchdog.stop()
    watchdog.start()
    assert _alarm_clock.get() is None
    assert watchdog.alarm(1000) is None
    assert not diary.events


# ---- the task that serves them all ----


def system_tasks() -> list[trio.lowlevel.Task]:
    """Those of the watchdogs."""
    root = trio.lowlevel.current_root_task()
    assert root is not None
    return [
        task
        for nursery in root.child_nurseries
        for task in nursery.child_tasks
        if task.name == "bokbok_trio watchdogs"
    ]


def clock() -> _AlarmClock:
    found = _alarm_clock.get()
    assert found is not None
    return found


async def test_connections_share_a_task(autojump_clock: trio.testing.MockClock) -> None:
    async with contextlib.AsyncExitStack() as stack:
        connections = []
        for number in range(10):
            settings = Settings(ping_after=20 - number)
            connections.append((await stack.enter_async_context(raw_peer(settings=settings)))[0])
            # Each is due before all that were there before, after the task went to sleep.
            await settle()
        assert len(system_tasks()) == 1
        for number in reversed(range(10)):
            await connections[number].wait_closed()
            assert trio.current_time() == 40 - number
        assert len(system_tasks()) == 1


async def test_nothing_is_done_when_all_have_stopped(autojump_clock: trio.testing.MockClock) -> None:
    async with open_connection_pair():
        await settle()
        assert len(clock()._heap) == 2
        assert trio.lowlevel.current_statistics().seconds_to_next_deadline <= 20
    assert not clock()._heap
    assert trio.lowlevel.current_statistics().seconds_to_next_deadline == math.inf


async def test_many_that_come_and_go_leave_few_alarms(autojump_clock: trio.testing.MockClock) -> None:
    diary = Diary()
    staying = [diary.watchdog(20 - number) for number in range(10)]
    for watchdog in staying:
        watchdog.start()
    for wave in (1, 10, 100, 1000):
        for _ in range(1000 // wave):
            passing = [diary.watchdog(10) for _ in range(wave)]
            for watchdog in passing:
                watchdog.start()
            assert len(clock()._heap) <= 2 * (10 + wave) + SPARE_ALARMS
            for watchdog in passing:
                watchdog.stop()
            assert 10 <= len(clock()._heap) <= 2 * 10 + SPARE_ALARMS
    await trio.sleep(20.5)
    assert diary.events == [(11 + number, "ping") for number in range(10)]
    assert len(clock()._heap) == 10


async def test_one_that_has_stopped_keeps_nothing_alive(autojump_clock: trio.testing.MockClock) -> None:
    staying = Diary().watchdog()
    staying.start()
    diary = Diary()
    watchdog = diary.watchdog()
    watchdog.start()
    gone = weakref.ref(diary)
    del diary
    assert gone() is not None
    watchdog.stop()
    assert gone() is None
    assert len(clock()._heap) == 2


async def test_a_closed_connection_is_not_kept_alive(autojump_clock: trio.testing.MockClock) -> None:
    staying = Diary().watchdog()
    staying.start()
    async with open_connection_pair() as connections:
        await settle()
        gone = [weakref.ref(connection) for connection in connections]
    del connections
    await settle()
    gc.collect()
    assert [connection() for connection in gone] == [None, None]
    assert len(clock()._heap) == 3


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
async def test_a_callback_that_fails_does_no_harm(
    error: type[BaseException], autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise error("oops")

    diary = Diary()
    Watchdog(10, 10, ping=fail, fail=diary.lose).start()
    Watchdog(20, 5, ping=diary.ping, fail=fail).start()
    diary.watchdog(20, 20).start()
    await trio.sleep(1000)
    assert diary.events == [
        (20, "ping"),
        (20, "ping"),
        (40, "the peer has not been heard of for 20 seconds"),
        (80, "the peer has not been heard of for 40 seconds"),
    ]
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        ("bokbok_trio", "a ping could not be queued"),
        (
            "bokbok_trio",
            "a connection could not be ended, though the peer has not been heard of for 25 seconds",
        ),
    ]
    assert all(record.exc_info is not None and record.exc_info[0] is error for record in caplog.records)
    assert not clock()._heap


async def test_a_callback_may_stop_others_and_start_new_ones(autojump_clock: trio.testing.MockClock) -> None:
    diary = Diary()
    watchdogs: list[Watchdog] = []

    def replace_all() -> None:
        diary.ping()
        for watchdog in watchdogs:
            watchdog.stop()
        diary.watchdog(5).start()

    watchdogs += [Watchdog(20, 20, ping=replace_all, fail=diary.lose) for _ in range(100)]
    for watchdog in watchdogs:
        watchdog.start()
    await trio.sleep(26)
    assert diary.events == [(20, "ping"), (25, "ping")]
    assert len(clock()._heap) == 1


async def test_times_too_short_to_matter_do_not_block_the_loop(
    autojump_clock: trio.testing.MockClock,
) -> None:
    watchdog = Diary().watchdog(1e-300, 1e-300)
    autojump_clock.jump(1000)
    watchdog.heard()
    watchdog.start()
    for _ in range(10):
        await trio.lowlevel.checkpoint()
    watchdog.stop()


def watch_once() -> None:
    """In a Trio run of its own, a watchdog pings and loses in time."""

    async def main() -> list[tuple[float, str]]:
        assert _alarm_clock.get() is None
        diary = Diary()
        diary.watchdog().start()
        diary.watchdog(1000).start()  # does not keep the run from ending
        await trio.sleep(100)
        assert len(system_tasks()) == 1
        return diary.events

    clock = trio.testing.MockClock(autojump_threshold=0)
    events = trio.run(main, clock=clock)
    assert events == [(20, "ping"), (80, "the peer has not been heard of for 40 seconds")]


def test_each_run_has_a_task_of_its_own() -> None:
    watch_once()
    watch_once()


def test_runs_in_several_threads_do_not_meet() -> None:
    done: list[int] = []

    def run(number: int) -> None:
        watch_once()
        done.append(number)

    threads = [threading.Thread(target=run, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 1, 2, 3]


@pytest.mark.parametrize("before", [False, True])
def test_where_a_run_is_past_its_main_task_nobody_watches(before: bool) -> None:
    """And no harm comes of trying."""
    generators: list[AsyncGenerator[None]] = []
    done: list[str] = []

    async def generate() -> AsyncGenerator[None]:
        try:
            yield
        finally:
            watchdog = Diary().watchdog()
            watchdog.start()
            watchdog.stop()
            Diary().watchdog().start()
            done.append("started")

    async def main() -> None:
        if before:
            Diary().watchdog().start()
        generators.append(generate())
        await anext(generators[0])

    trio.run(main)
    assert done == ["started"]


# ---- a real link that goes dead ----

# Of this process only, so that two runs at once do not meet.
MARK = os.getpid()
NETWORK = f"bokbok-{MARK}"
CABLE = f"bok{MARK}"
SUBNET = f"10.77.{MARK % 256}"

PEER = """
import trio, sys
from bokbok_trio import Settings, open_server
async def handler(connection, request):
    return request
async def note(connection):
    print("closed", trio.current_time() - opened, flush=True)
async def main():
    global opened
    settings = Settings(ping_after=0.5, ping_timeout=0.5)
    async with open_server(sys.argv[1], handler, insecure=True, close_handler=note, settings=settings):
        print("listening", flush=True)
        opened = trio.current_time()
        await trio.sleep_forever()
trio.run(main)
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def dead_end() -> Iterator[None]:
    """A network namespace at the other end of a virtual cable."""
    try:
        ip("netns", "add", NETWORK)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces need root and iproute2")
    try:
        ip("link", "add", CABLE, "type", "veth", "peer", "name", "far", "netns", NETWORK)
        ip("address", "add", f"{SUBNET}.1/24", "dev", CABLE)
        ip("link", "set", CABLE, "up")
        ip("-n", NETWORK, "address", "add", f"{SUBNET}.2/24", "dev", "far")
        ip("-n", NETWORK, "link", "set", "far", "up")
        yield
    finally:
        ip("netns", "delete", NETWORK)


async def test_a_link_that_goes_dead_is_noticed_by_both_sides_in_time(dead_end: None) -> None:
    from bokbok_trio import open_connection  # noqa: PLC0415

    address = f"{SUBNET}.2:7777"
    command = ["ip", "netns", "exec", NETWORK, sys.executable, "-c", PEER, address]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "listening\n"
            settings = Settings(ping_after=0.5, ping_timeout=0.5)
            async with open_connection(address, insecure=True, settings=settings) as connection:
                assert await connection.request(["x"]) == [b"x"]
                await trio.sleep(1.2)
                assert not connection.closed
                ip("-n", NETWORK, "link", "set", "far", "down")
                died = time.monotonic()
                await connection.wait_closed()
                assert time.monotonic() - died < 1.5
                line = await trio.to_thread.run_sync(process.stdout.readline)
                assert line.startswith("closed ")
                assert time.monotonic() - died < 2
        finally:
            process.kill()
