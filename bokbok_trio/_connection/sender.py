"""`Sender`: sends what a session has queued.

Its task alone waits for the stream to take something. So no cancelled task can leave half a packet
behind, and what is queued while one send is under way leaves in the next, together.

While that task sleeps, others may give what is queued to the socket at once, as far as it takes it: that
saves waking the task.

- Packets queued while the reader dispatches what it received leave at the end of that, together.
- A burst is faster when coalesced. So a packet is written at once only if it is the first after an idle
  spell, or answers a run of lone packets; never two in a row.
- Many packets are written before more follow.

Whoever writes holds the `SendLock`, and everything that is sealed is sealed under it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, final

import trio

from .._protocol.outbox import MAX_BATCH_SIZE
from .._protocol.session import Session
from .._stream.fast import FastStream
from .._stream.pacing import PAUSE, Pacer
from .watchdog import Watchdog

LONE_STREAK: Final = 3
"""Batches of one packet that say that ours is probably alone too. With fewer, four callers are split
into groups that each pay for their own wakes."""

BUNCH: Final = 16
"""Packets that leave though more may follow at once, so that the peer begins with them while we go on."""

MAX_AT_ONCE: Final = 4
"""Batches given to the socket in a row before other tasks have their turn."""


@final
class SendLock:
    """Who may write to the stream, and seal for it.

    The sender task holds it while it is awake, for as long as its send takes. Others take it without waiting,
    for one write, while that task sleeps. Closing takes it last, and never gives it back.
    """

    __slots__ = ("is_held",)

    def __init__(self) -> None:
        self.is_held = False

    def try_acquire(self) -> bool:
        """Take it, if nobody holds it. Returns whether it was so."""
        if self.is_held:
            return False
        self.is_held = True
        return True

    def release(self) -> None:
        """Give it back."""
        self.is_held = False


@final
class Sender:
    """Sends for one connection.

    Arguments:
        session: what has packets queued.
        stream: the connection's.
        watchdog: is told of sends.
        wake_writers: called when packets were taken, and so channels may queue items.
        on_idle: called when nothing is queued; it may `stop` this.
        on_defect: is told of a defect that may have lost bytes of the stream.

    Attributes:
        is_in_stream: whether the task is in the stream's code: what it raises then is the stream's.
        lock: held by whoever writes.
        until: the moment, by Trio's clock, at which it is to be over.
    """

    __slots__ = (
        "_is_held",
        "_is_lone",
        "_is_stopping",
        "_lone_streak",
        "_on_defect",
        "_on_idle",
        "_pacer",
        "_pending",
        "_scope",
        "_session",
        "_sleeper",
        "_stream",
        "_wake_writers",
        "_watchdog",
        "is_in_stream",
        "lock",
        "until",
    )

    def __init__(
        self,
        session: Session,
        stream: FastStream,
        watchdog: Watchdog,
        *,
        wake_writers: Callable[[], object],
        on_idle: Callable[[], object],
        on_defect: Callable[[BaseException], object],
    ) -> None:
        self.lock = SendLock()
        self._stream = stream
        self._session = session
        self._pacer = Pacer(stream.load, stream.is_drained)
        self._watchdog = watchdog
        self._wake_writers = wake_writers
        self._on_idle = on_idle
        self._on_defect = on_defect
        self.is_in_stream = False
        self.until = math.inf
        self._scope: trio.CancelScope | None = None  # of the send under way
        self._sleeper: trio.lowlevel.Task | None = None
        self._is_stopping = False
        self._is_held = False
        self._pending = 0  # packets queued since something was last sent, of those that it was told of
        self._lone_streak = LONE_STREAK
        self._is_lone = True  # what is queued next may go at once

    # ---- what others say ----

    def wake(self) -> None:
        """Something was queued."""
        if not self._is_held:
            self._rouse()

    def flush(self) -> None:
        """A packet was queued that may be alone, or one of many."""
        self._pending += 1
        if self._pending >= BUNCH:
            self._send_now()
        elif not self._is_held:
            if self._is_lone:
                self._is_lone = False
                self._send_now()
            else:
                self._rouse()

    def begin_batch(self) -> None:
        """Hold back what is queued from now on, until `end_batch`: a receive is being dispatched."""
        self._is_held = True

    def end_batch(self, count: int) -> None:
        """The last receive, of `count` events, was dispatched: send what that queued."""
        self._is_held = False
        if count == 1:
            self._lone_streak += 1
            self._is_lone = self._lone_streak >= LONE_STREAK
        elif count:
            self._lone_streak = 0
            self._is_lone = False
        session = self._session
        if session.flow_control.writable or session.is_holding_back:
            self._wake_writers()
        if session.has_queued:
            self._send_now()
        elif session.is_draining:
            self._rouse()

    def stop(self, until: float) -> None:
        """End when nothing is queued any more, and at that moment, by Trio's clock, at the latest."""
        self._is_stopping = True
        self.until = until
        if self._scope is not None:
            self._scope.deadline = until
        self._rouse()

    def say_end_now(self) -> None:
        """Send what is queued, and that nothing follows, as far as nothing has to be waited for.

        For the task that sends, when it is cancelled from outside.
        """
        if not self.is_in_stream and self._stream.can_send_nowait:
            batch = self._session.take(trio.current_time())
            if batch:
                self._stream.send_nowait(batch)
            self._stream.send_end_nowait()

    # ---- sending ----

    def _rouse(self) -> None:
        sleeper, self._sleeper = self._sleeper, None
        if sleeper is not None:
            trio.lowlevel.reschedule(sleeper)

    def _send_now(self) -> None:
        """Write what is queued, as far as the socket takes it at once; the rest is left to the task."""
        self._pending = 0
        if self._is_stopping or not self._stream.can_send_nowait or not self.lock.try_acquire():
            self._rouse()
            return
        session = self._session
        is_done = False  # nothing is left, and nobody need be woken
        try:
            for _ in range(MAX_AT_ONCE):
                if session.is_all_encoded:  # mostly, and then the time need not be asked for
                    batch = session.take(0)
                else:
                    now = trio.current_time()
                    batch = session.take(now, self._room(now))
                self._watchdog.sent += len(batch)
                if not batch or not self._stream.send_nowait(batch):
                    break
                self._watchdog.send_ended(ping_left=True)
                if session.flow_control.writable or session.is_holding_back:
                    self._wake_writers()
                if not session.has_queued:
                    is_done = not session.is_draining
                    break
        except BaseException as exc:  # noqa: BLE001  (what was taken is lost, and so is its place in the stream)
            self._on_defect(exc)
            return
        finally:
            self.lock.release()
        if not is_done:
            self._rouse()

    async def run(self) -> None:
        """Send what is queued, as it comes, until stopped. Raises what the stream does.

        The first packet need not wait until this is called: it is written at once, if it is alone. When this
        ends, however it does, its task goes on to hold the lock, for closing.
        """
        self.lock.is_held = True  # nobody holds it across a checkpoint but this task
        while True:
            now = trio.current_time()
            room = self._room(now)
            batch = self._session.take(now, room)
            self._pending = 0
            if batch or self._stream.has_rest:
                if self._session.flow_control.writable or self._session.is_holding_back:
                    self._wake_writers()
                self._watchdog.send_begins(now)
                with trio.CancelScope(deadline=self.until) as self._scope:
                    self.is_in_stream = True
                    await self._stream.send_all(batch)
                    self.is_in_stream = False
                if self._scope.cancelled_caught:
                    return
                self._scope = None
                self._watchdog.sent += len(batch)
                self._session.note_sent(trio.current_time() - now)
                self._watchdog.send_ended(ping_left=not self._session.is_ping_queued)
            elif room == 0:
                with trio.move_on_after(PAUSE):
                    await self._park()
            elif self._is_stopping:
                return
            else:
                self._on_idle()
                if not self._is_stopping:
                    self._is_lone = self._lone_streak >= LONE_STREAK
                    self.lock.release()
                    try:
                        await self._park()
                        # Woken and cancelled at once, it takes nothing: what is taken cannot be sent then.
                        await trio.lowlevel.checkpoint_if_cancelled()
                    finally:
                        self.lock.is_held = True

    async def _park(self) -> None:
        def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
            self._sleeper = None
            return trio.lowlevel.Abort.SUCCEEDED

        self._sleeper = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(abort)

    def _room(self, now: float) -> int:
        """How many bytes of big packets may be sent now; without a bound in the last second."""
        if self._is_stopping or not self._session.has_big:
            return MAX_BATCH_SIZE
        return self._pacer.room(now)
