"""The task that serves all watchdogs of a run."""

from __future__ import annotations

import contextlib
import gc
import math
import threading
import weakref
from collections.abc import AsyncGenerator

import pytest
import trio
import trio.testing

from bokbok_trio import Settings
from bokbok_trio._connection.watchdog import SPARE_ALARMS, Watchdog
from bokbok_trio.testing import open_connection_pair
from tests.support.helpers import raw_peer, settle
from tests.support.inside import count_alarms
from tests.support.watchdogs import Diary, system_tasks


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
        assert count_alarms() == 2
        assert trio.lowlevel.current_statistics().seconds_to_next_deadline <= 20
    assert count_alarms() == 0
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
            assert count_alarms() <= 2 * (10 + wave) + SPARE_ALARMS
            for watchdog in passing:
                watchdog.stop()
            assert 10 <= count_alarms() <= 2 * 10 + SPARE_ALARMS
    await trio.sleep(20.5)
    assert diary.events == [(11 + number, "ping") for number in range(10)]
    assert count_alarms() == 10


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
    assert count_alarms() == 2


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
    assert count_alarms() == 3


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
    assert count_alarms() == 0


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
    assert count_alarms() == 1


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
        assert not system_tasks()
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
