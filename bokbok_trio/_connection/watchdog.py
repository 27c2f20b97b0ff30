"""`Watchdog`: notices a peer that is gone, and does not accuse one that is there.

Silence means that nothing authentic was received. After ``ping_after`` of silence a ping is sent. The peer is
lost

- ``ping_timeout`` after the ping was *written*, if the silence lasts;
- if one send takes as long as both times together: the peer does not read, though it may still send;
- if at least `MUCH` bytes wait for it, and leave more slowly than the least rate, for as long: the peer
  reads so slowly that it holds memory here.

False accusations that this avoids:

- A long upload: pings wait behind other packets, so their time begins when they are written.
- A blocked event loop, a suspended machine, a clock that leaps: a program that wakes late has not yet read
  the data that the peer sent meanwhile. So it reads first. If it is late by more than `LATENESS`, one more
  ``ping_timeout`` is granted, as the network may need time too. It is granted again only if the program slept
  through it: a program that blocks again and again must lose a dead peer some time.

The pings follow websockets' keepalive; the other rules come from its issues.

Alarms
======

A `Watchdog` has no task. `Watchdog.alarm` returns when it must be called next, and one task of each Trio run
calls it, for all connections of the run. Between alarms an event only records a time. That is safe
if an alarm that was set at a time s never fires after a deadline that is created later than s:

- A send that begins at t >= s is stuck at t + ping_after + ping_timeout, later than any alarm of s.
- If the peer has been heard since the last ping, or there was no ping, the alarm is at most s + ping_after,
  when a ping is due. Something heard at t >= s puts this off to t + ping_after; and no answer is due before
  the ping.
- If not, the alarm is at most s + min(ping_after, ping_timeout). If the ping is written at t >= s, its time
  ends at t + ping_timeout; if something is heard, the next ping is due at t + ping_after.

Only the time that is granted after a late alarm may put off a ping, by less than ``ping_timeout``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import suppress
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Final, final

import trio

LATENESS: Final = 1.0
"""Seconds by which an alarm may be late. If it is later, the peer is not blamed for its silence."""

MUCH: Final = 2**20
"""Bytes of answers and items that may wait for a peer however slowly it reads."""

SPARE_ALARMS: Final = 64
"""Alarms of stopped watchdogs that are kept, besides as many as there are running watchdogs. With fewer, each
connection that is closed would cost a search through all alarms."""

logger = logging.getLogger("bokbok_trio")


@final
class Watchdog:
    """Watches one connection.

    Arguments:
        ping_after, ping_timeout: seconds; see `Settings`.
        ping: queues a ping and wakes the sender.
        fail: called once, with the reason why the connection is lost. The watchdog has stopped by then.
        least_rate: bytes a second; see `Settings`.
        count_waiting: counts the bytes of answers and items that wait to be sent.

    Attributes:
        sent: bytes that were written.

    Exceptions of `ping` and `fail` are logged.
    """

    __slots__ = (
        "_alarm_at",
        "_alarm_clock",
        "_answer_due",
        "_asked_after",
        "_count_waiting",
        "_fail",
        "_forgiven_until",
        "_heard_at",
        "_least_rate",
        "_measured",
        "_ping",
        "_ping_after",
        "_ping_timeout",
        "_ping_waits",
        "_send_began",
        "sent",
    )

    def __init__(
        self,
        ping_after: float,
        ping_timeout: float,
        *,
        ping: Callable[[], object],
        fail: Callable[[str], object],
        least_rate: float = 0.0,
        count_waiting: Callable[[], int] = int,
    ) -> None:
        self.sent = 0
        self._least_rate = least_rate
        self._count_waiting = count_waiting
        # When the measurement of the rate began, `sent` then, and how many bytes were waiting.
        self._measured: tuple[float, int, int] | None = None
        self._alarm_at = math.inf  # as last returned
        self._ping_after = ping_after
        self._ping_timeout = ping_timeout
        self._ping = ping
        self._fail: Callable[[str], object] | None = fail  # None: it has stopped
        self._alarm_clock: _AlarmClock | None = None
        self._heard_at = trio.current_time()
        self._send_began: float | None = None
        self._asked_after: float | None = None  # equal to `_heard_at`: not heard since a ping went out
        self._ping_waits = False  # whether a ping is queued and not written
        self._answer_due = math.inf  # counts if a ping is out
        self._forgiven_until = -math.inf  # the end of the time that was granted

    def heard(self) -> None:
        """Note that something authentic was received."""
        self._heard_at = trio.current_time()

    def send_begins(self, now: float) -> None:
        """Note that a send is under way from now on."""
        self._send_began = now

    def send_ended(self, *, ping_departed: bool) -> None:
        """Note that the send has ended. `ping_departed`: no ping is queued any more."""
        self._send_began = None
        if ping_departed and self._ping_waits:
            self._ping_waits = False
            self._answer_due = trio.current_time() + self._ping_timeout

    def start(self) -> None:
        """Watch from now on, until `stop`. Do nothing if `stop` was called before, or a time is infinite."""
        if self._fail is not None and not math.isinf(self._ping_after + self._ping_timeout):
            self._alarm_clock = _find_alarm_clock()
            self._alarm_clock.add(self, self._heard_at + self._ping_after)

    def stop(self) -> None:
        """Watch no more, and forget `ping` and `fail`."""
        self._fail = None
        self._ping = _do_nothing
        self._count_waiting = int
        clock, self._alarm_clock = self._alarm_clock, None
        if clock is not None:
            clock.note_stopped()

    @property
    def has_stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._fail is None

    def alarm(self, now: float) -> float | None:
        """Check the peer at the time `now`.

        Returns:
            The latest moment at which to call this again; None: never.
        """
        if self._fail is None:
            return None
        if now > self._alarm_at + LATENESS:
            self._measured = None
        elif self._is_too_slow(now):
            self._give_up(
                self._fail,
                f"the peer reads too slowly: {self._count_waiting()} bytes wait for it, and at least "
                f"{self._least_rate:g} a second must leave then",
            )
            return None
        at = self._look(now, self._fail)
        if at is not None and self._measured is not None:
            at = min(at, self._measured[0] + self._ping_after + self._ping_timeout)
        self._alarm_at = math.inf if at is None else at
        return at

    def _is_too_slow(self, now: float) -> bool:
        """Whether much waits, and too little has been sent since that was first seen."""
        waiting = self._count_waiting()
        if waiting < MUCH:
            self._measured = None
        elif self._measured is None:
            self._measured = now, self.sent, waiting
        elif now - self._measured[0] >= self._ping_after + self._ping_timeout:
            since, sent_then, waiting_then = self._measured
            self._measured = now, self.sent, waiting
            sent = self.sent - sent_then
            # If all bytes that waited have left, this is a new burst.
            return sent < waiting_then and sent < self._least_rate * (now - since)
        return False

    def _look(self, now: float, fail: Callable[[str], object]) -> float | None:
        """Do the work of `alarm`, without the rate."""
        patience = self._ping_after + self._ping_timeout
        stuck_at = math.inf if self._send_began is None else self._send_began + patience
        is_asked = self._asked_after == self._heard_at
        silent_at = self._answer_due if is_asked else self._heard_at + self._ping_after
        due = min(stuck_at, silent_at)
        if now < due:
            return min(due, self._next_look(now)) if is_asked else due
        if now > due + LATENESS and (due >= self._forgiven_until or self._has_slept_through_grace(now)):
            self._forgiven_until = now + self._ping_timeout
            return self._forgiven_until
        if now >= stuck_at or is_asked:
            what = "not read" if now >= stuck_at else "not been heard of"
            self._give_up(fail, f"the peer has {what} for {patience:g} seconds")
            return None
        self._ask(now + patience + self._ping_timeout)
        return None if self.has_stopped else min(stuck_at, self._next_look(now))

    def _has_slept_through_grace(self, now: float) -> bool:
        """Whether the program slept through the granted time, and as much again."""
        return now > self._forgiven_until + max(LATENESS, self._ping_timeout)

    def _next_look(self, now: float) -> float:
        """Return when to look again while a ping is out."""
        return now + min(self._ping_after, self._ping_timeout)

    def _ask(self, answer_due: float) -> None:
        """Send a ping. If it is never written, its answer is due at `answer_due`."""
        self._asked_after = self._heard_at
        self._answer_due = answer_due
        if self._ping_waits:
            return  # a ping is queued already, since an earlier silence
        self._ping_waits = True
        try:
            self._ping()
        except BaseException:  # it would crash the program from the task of `_AlarmClock`
            self._ping_waits = False
            logger.exception("a ping could not be queued")

    def _give_up(self, fail: Callable[[str], object], reason: str) -> None:
        self.stop()
        try:
            fail(reason)
        except BaseException:  # as above
            logger.exception("a connection could not be ended, though %s", reason)


def _do_nothing() -> None:
    """Replace a callback, so that it can be freed."""


@final
class _AlarmClock:
    """The alarms of a Trio run, and the task that serves them.

    The task sleeps in a scope whose deadline is the earliest alarm. The deadline is moved without waking it.

    The heap holds an alarm for each watchdog that was started and has not stopped, except those being served.
    It also holds alarms of stopped watchdogs: at most as many, and `SPARE_ALARMS` more.
    """

    __slots__ = ("_heap", "_numbers", "_scope", "_watching")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Watchdog]] = []
        self._numbers = count()  # so that no two alarms are equal: watchdogs cannot be compared
        self._watching = 0
        self._scope = trio.CancelScope()

    def add(self, watchdog: Watchdog, at: float) -> None:
        """Add a watchdog, with its first alarm."""
        self._watching += 1
        self._push(at, watchdog)
        self._scope.deadline = min(self._scope.deadline, at)

    def note_stopped(self) -> None:
        """Note that a watchdog that was added has stopped."""
        self._watching -= 1
        if not self._watching or len(self._heap) > 2 * self._watching + SPARE_ALARMS:
            self._heap = [alarm for alarm in self._heap if not alarm[2].has_stopped]
            heapify(self._heap)
            self._set_deadline()

    async def run(self) -> None:
        """Serve the alarms, until cancelled at the end of the run."""
        while True:
            with self._scope:
                await trio.sleep_forever()
            self._scope = trio.CancelScope()
            await trio.lowlevel.checkpoint()  # readers that wake with this task read first
            self._serve(trio.current_time())
            self._set_deadline()

    def _serve(self, now: float) -> None:
        # First collect the due watchdogs, then call them: they may stop others and start new ones, and set
        # alarms to this very moment.
        due: list[Watchdog] = []
        while self._heap and self._heap[0][0] <= now:
            due.append(heappop(self._heap)[2])
        for watchdog in due:
            at = watchdog.alarm(now)
            if at is not None:
                self._push(at, watchdog)

    def _push(self, at: float, watchdog: Watchdog) -> None:
        heappush(self._heap, (at, next(self._numbers), watchdog))

    def _set_deadline(self) -> None:
        self._scope.deadline = self._heap[0][0] if self._heap else math.inf


_alarm_clock: trio.lowlevel.RunVar[_AlarmClock | None] = trio.lowlevel.RunVar(
    "bokbok_trio watchdogs", default=None
)


def _find_alarm_clock() -> _AlarmClock:
    """Return the alarms of this run."""
    clock = _alarm_clock.get()
    if clock is None:
        clock = _AlarmClock()
        # This raises after the end of the run's main task. Connections of that time are not watched; a task
        # that had been started before would be cancelled by now.
        with suppress(RuntimeError):
            trio.lowlevel.spawn_system_task(clock.run, name="bokbok_trio watchdogs")
        _alarm_clock.set(clock)
    return clock
