"""`Sender`: sends what a session has queued.

Its task alone waits for the stream to take something. So no cancelled task can leave half a packet
behind, and what is queued while one send is under way leaves in the next, together.

A packet that is alone, while that task sleeps, is given to the socket at once instead: this saves
waking it, and makes 1.4 times as many requests one after another. What is not alone gains more by
leaving together, so at once goes only the first packet after one that the peer sent alone, as others
before it, or after the task went to sleep; never two in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, final

import trio

from ._opening import Opened
from ._outbox import MAX_BATCH_SIZE
from ._pacing import PAUSE, Pacer, read_load
from ._session import Session
from ._watchdog import Watchdog
from ._wire import Wire

LONE_STREAK: Final = 3
"""Batches of one packet that say that ours is probably alone too. With fewer, four callers are split
into groups that each pay for their own wakes."""


@final
class Sender:
    """Sends for one connection.

    Arguments:
        session: what has packets queued.
        opened: has the stream.
        watchdog: is told of sends.
        wake_writers: called when packets were taken, and so channels may queue items.
        on_idle: called when nothing is queued; it may `stop` this.

    Attributes:
        wire: the stream.
    """

    def __init__(
        self,
        session: Session,
        opened: Opened,
        watchdog: Watchdog,
        *,
        wake_writers: Callable[[], object],
        on_idle: Callable[[], object],
    ) -> None:
        self.wire = Wire(opened.stream, opened.transport)
        self._session = session
        self._pacer = Pacer(partial(read_load, opened.transport))
        self._watchdog = watchdog
        self._wake_writers = wake_writers
        self._on_idle = on_idle
        self._sleeping = trio.lowlevel.ParkingLot()
        self._is_stopping = False
        self._can_flush = False  # it sleeps, and nothing stands in the way of what is queued
        self._lone_streak = LONE_STREAK
        self._is_lone = False  # what is queued next may go at once

    def wake(self) -> None:
        """Something was queued."""
        self._sleeping.unpark()

    def flush(self) -> None:
        """Something was queued that may be alone."""
        if not self._is_lone or not self._can_flush:
            self._sleeping.unpark()
            return
        self._is_lone = False
        now = trio.current_time()
        batch = self._session.take(now, self._room(now))
        if batch and not self.wire.send_now(batch):
            self._can_flush = False
            self._sleeping.unpark()
            return
        self._watchdog.send_ended(ping_left=True)
        self._wake_writers()
        if self._session.has_queued:
            self._sleeping.unpark()

    def heard(self, count: int) -> None:
        """So many packets came together that say something to our user."""
        if count == 1:
            self._lone_streak += 1
            self._is_lone = self._lone_streak >= LONE_STREAK
        elif count:
            self._lone_streak = 0
            self._is_lone = False

    def stop(self) -> None:
        """End when nothing is queued any more."""
        self._is_stopping = True
        self._can_flush = False
        self._sleeping.unpark()

    async def run(self) -> None:
        """Send what is queued, as it comes, until stopped. Raises what the stream does."""
        while True:
            now = trio.current_time()
            room = self._room(now)
            batch = self._session.take(now, room)
            if batch or self.wire.has_rest:
                self._wake_writers()
                self._watchdog.send_begins(now)
                await self.wire.send(batch)
                self._session.note_sent(trio.current_time() - now)
                self._watchdog.send_ended(ping_left=not self._session.is_ping_queued)
            elif room == 0:
                with trio.move_on_after(PAUSE):
                    await self._sleeping.park()
            elif self._is_stopping:
                return
            else:
                self._on_idle()
                if not self._is_stopping:
                    await self._sleep()

    async def _sleep(self) -> None:
        self._is_lone = self._lone_streak >= LONE_STREAK
        self._can_flush = self.wire.can_send_now and not self._session.is_draining
        await self._sleeping.park()
        self._can_flush = False

    def _room(self, now: float) -> int:
        """How many bytes of big packets may be sent now; without a bound in the last second."""
        if self._is_stopping or not self._session.has_big:
            return MAX_BATCH_SIZE
        return self._pacer.room(now)
