"""The watchdog alone, compared with a model."""

from __future__ import annotations

import math

import pytest
import trio
import trio.testing
from hypothesis import example, given, settings, strategies as st

from bokbok_trio._connection.watchdog import LATENESS
from tests.support.helpers import raw_peer, settle
from tests.support.watchdogs import Diary, system_tasks


class Model:
    """A watchdog that looks at all times when the event loop is not blocked."""

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
    assert not system_tasks()
    assert watchdog.alarm(1000) is None
    assert not diary.events
