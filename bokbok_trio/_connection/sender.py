"""`Sender`: sends the packets that a session has queued, under the `SendLock`.

Two kinds of tasks write to the stream, never at the same time:

- The sender task alone waits for the stream. So no cancelled task can leave half a packet behind, and
  packets that are queued during a send leave together in the next one.
- Any other task may write while the sender task sleeps. It writes as much as the stream takes without
  waiting, which saves waking the sender task.

`Coalescing` decides which of them writes a packet, and when.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import trio

from .._protocol.coalescing import LATER, MAX_BATCHES_IN_A_ROW, NOW, Coalescing
from .._protocol.outbox import MAX_BATCH_SIZE
from .._protocol.session import Session
from .._stream.fast import FastStream
from .._stream.pacing import PAUSE, Pacer
from .ending import Ending, refer_up
from .watchdog import Watchdog

if TYPE_CHECKING:
    from .._types import Connection


@final
class SendLock:
    """The right to write to the stream, and so to seal records for it.

    ================= =======================================================================================
    holder            when
    ================= =======================================================================================
    the sender task   while it is awake, and so for as long as each of its sends takes
    any other task    for one `Sender._write_now`, which never waits, while the sender task sleeps
    closing           from the end of `Sender.run` on, for ever; it runs in the sender task
    ================= =======================================================================================

    Nobody waits for the lock: a task that does not get it leaves the packets to the sender task.

    Attributes:
        is_held: whether a task holds it.
    """

    __slots__ = ("is_held",)

    def __init__(self) -> None:
        self.is_held = False

    def try_acquire(self) -> bool:
        """Acquire the lock, if nobody holds it. Return whether this succeeded."""
        if self.is_held:
            return False
        self.is_held = True
        return True

    def acquire(self) -> None:
        """Acquire the lock, for the sender task. No other task holds it at a checkpoint, so it is free."""
        assert not self.is_held, "two tasks write"
        self.is_held = True

    def release(self) -> None:
        """Release the lock."""
        self.is_held = False


@final
class Sender:
    """Sends for one connection.

    Arguments:
        session: queues the packets.
        stream: the connection's.
        watchdog: is told of sends.
        ending: the connection's. Once it is over, the sender ends when nothing is queued any more.
        lock: held by the task that writes.
        connection: is called when packets have departed, to wake the tasks that wait to queue more, and when
            nothing is queued, to end if it is drained.

    Attributes:
        coalescing: says when packets leave. The reader corks it.
        is_in_stream: whether the sender task is in the stream's code. Then an exception is the stream's.
    """

    __slots__ = (
        "_connection",
        "_ending",
        "_pacer",
        "_scope",
        "_session",
        "_sleeper",
        "_stream",
        "_watchdog",
        "coalescing",
        "is_in_stream",
        "lock",
    )

    def __init__(
        self,
        session: Session,
        stream: FastStream,
        watchdog: Watchdog,
        *,
        ending: Ending,
        lock: SendLock,
        connection: Connection,
    ) -> None:
        self._stream = stream
        self._session = session
        self.coalescing = Coalescing()
        self._pacer = Pacer(stream.load, stream.is_drained)
        self._watchdog = watchdog
        self._ending = ending
        self.lock = lock
        self._connection = refer_up(connection)
        self.is_in_stream = False
        self._scope: trio.CancelScope | None = None  # of the send under way
        self._sleeper: trio.lowlevel.Task | None = None  # the sender task, while it sleeps

    # ---- for other tasks ----

    def packet_queued(self) -> None:
        """Have a queued packet sent, later or with the others of a receive."""
        if self.coalescing.queued() is LATER:
            self.wake_task()

    def interactive_queued(self) -> None:
        """Have a queued request or answer sent, now or later."""
        when = self.coalescing.interactive_queued()
        if when is NOW:
            self._write_now()
        elif when is LATER:
            self.wake_task()

    def uncork(self) -> None:
        """Send the packets that were held back: all events of a receive are dispatched."""
        self.coalescing.uncork()
        session = self._session
        if session.flow_control.writable or session.is_holding_back:
            self._wake_writers()
        if session.has_queued:
            self._write_now()
        elif session.is_draining:
            self.wake_task()  # it may be drained now

    def wake_task(self) -> None:
        """Wake the sender task, if it sleeps."""
        sleeper, self._sleeper = self._sleeper, None
        if sleeper is not None:
            trio.lowlevel.reschedule(sleeper)

    def stop(self) -> None:
        """End as soon as nothing is queued, or at `Ending.until`, because the connection is over."""
        if self._scope is not None:
            self._scope.deadline = self._ending.until
        self.wake_task()

    # ---- writing without waiting ----

    def _write_now(self) -> None:
        """Write queued packets, as much as the stream takes at once. The sender task sends the rest."""
        if self._ending.is_over or not self._stream.can_send_nowait or not self.lock.try_acquire():
            self.wake_task()
            return
        try:
            is_all = self._write_batches()
        except BaseException as exc:  # noqa: BLE001  (the batch is lost, and so is its place in the stream)
            self._ending.on_defect(exc)
            return
        finally:
            self.lock.release()
        if not is_all or self._session.is_draining:
            self.wake_task()

    def _write_batches(self) -> bool:
        """Write a few batches. Return whether everything was written."""
        session = self._session
        for _ in range(MAX_BATCHES_IN_A_ROW):
            if session.is_all_encoded:  # mostly; then `take` needs neither the time nor the room
                batch = session.take(0)
            else:
                now = trio.current_time()
                batch = session.take(now, self._room(now))
            self._watchdog.sent += len(batch)
            if not batch or not self._stream.send_nowait(batch):
                return False
            self._watchdog.send_ended(ping_departed=True)
            has_more = session.has_more
            if session.flow_control.writable or session.is_holding_back:
                self._wake_writers()
                has_more = session.has_queued  # they may have queued items
            if not has_more:
                return True
        return False

    def send_end_now(self) -> None:
        """Write queued packets and the end, as much as the stream takes at once.

        For a sender task that was cancelled from outside.
        """
        if not self.is_in_stream and self._stream.can_send_nowait:
            batch = self._session.take(trio.current_time())
            if batch:
                self._stream.send_nowait(batch)
            self._stream.send_end_nowait()

    # ---- the sender task ----

    def _wake_writers(self) -> None:
        """Let channels queue items and handlers begin, if they waited for packets to leave."""
        self._connection()._wake_writers()

    def _on_idle(self) -> None:
        """Tell the connection that nothing is queued."""
        self._connection()._close_if_drained()

    async def run(self) -> None:
        """Send queued packets until `stop`. Exceptions of the stream are raised here.

        The first packet does not wait until this is called: if it is alone, it is written at once. When this
        ends, even by an exception, its task still holds the lock, for closing.
        """
        self.lock.acquire()
        while True:
            now = trio.current_time()
            room = self._room(now)
            batch = self._session.take(now, room)
            if batch or self._stream.has_rest:
                if not await self._send(batch, now):
                    return
            elif room == 0:
                with trio.move_on_after(PAUSE):
                    await self._park()
            elif self._ending.is_over:
                return
            else:
                self._on_idle()
                if not self._ending.is_over:
                    await self._sleep()

    async def _send(self, batch: bytes, now: float) -> bool:
        """Send a batch, and wait until the stream has taken it. Return whether there was time for it."""
        session = self._session
        if session.flow_control.writable or session.is_holding_back:
            self._wake_writers()
        self._watchdog.send_begins(now)
        with trio.CancelScope(deadline=self._ending.until) as self._scope:
            self.is_in_stream = True
            await self._stream.send_all(batch)
            self.is_in_stream = False
        if self._scope.cancelled_caught:
            return False
        self._scope = None
        self._watchdog.sent += len(batch)
        session.note_sent(trio.current_time() - now)
        self._watchdog.send_ended(ping_departed=not session.is_ping_queued)
        return True

    async def _sleep(self) -> None:
        """Sleep until `wake_task`. Meanwhile the lock is free for others."""
        self.coalescing.idle()
        self.lock.release()
        try:
            await self._park()
            # The task may be woken and cancelled in one turn of the event loop. Then it must not take a
            # batch, which it could not send.
            await trio.lowlevel.checkpoint_if_cancelled()
        finally:
            self.lock.acquire()

    async def _park(self) -> None:
        """Wait until `wake_task`. The lock stays as it is."""

        def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
            self._sleeper = None
            return trio.lowlevel.Abort.SUCCEEDED

        self._sleeper = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(abort)

    def _room(self, now: float) -> int:
        """Return how many bytes of big packets may be sent now. No bound once it is over."""
        if self._ending.is_over or not self._session.has_big:
            return MAX_BATCH_SIZE
        return self._pacer.room(now)
