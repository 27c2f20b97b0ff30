"""`Pings`: the tasks that wait for the peer's sign of life."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar, final

import trio

from .._errors import BokbokError

_Outcome = TypeVar("_Outcome")


@final
class Waiter(Generic[_Outcome]):
    """A task that waits, and what it is woken with.

    Attributes:
        outcome: what that was; None before.
    """

    __slots__ = ("_sleeper", "outcome")

    def __init__(self) -> None:
        self.outcome: _Outcome | None = None
        self._sleeper: trio.lowlevel.Task | None = None

    def _wake(self, outcome: _Outcome) -> None:
        """Let the task go on with that; where it does not wait any more, nothing happens."""
        self.outcome = outcome
        sleeper, self._sleeper = self._sleeper, None
        if sleeper is not None:
            trio.lowlevel.reschedule(sleeper)

    def wait(self) -> Awaitable[object]:
        """Return what to await until woken; then there is an `outcome`."""
        if self.outcome is not None:
            return trio.lowlevel.checkpoint()  # noqa: ASYNC105  (the caller awaits it)
        self._sleeper = trio.lowlevel.current_task()
        return trio.lowlevel.wait_task_rescheduled(self._abort)  # noqa: ASYNC105  (as above)

    def _abort(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._sleeper = None
        return trio.lowlevel.Abort.SUCCEEDED


@final
class Pings:
    """The tasks that wait for a pong.

    Pongs have no ids, and a peer may answer several pings by one, so one is out at a time. (The watchdog's go
    nevertheless, after long silence; then a figure may come out too small.)

    Attributes:
        is_out: whether a ping is out.
    """

    __slots__ = ("_began_at", "_next", "_now", "is_out")

    def __init__(self) -> None:
        self._now: list[Waiter[float | BokbokError]] = []  # for the ping that is out
        self._next: list[Waiter[float | BokbokError]] = []  # for the one after it
        self._began_at = 0.0
        self.is_out = False

    def add(self) -> Waiter[float | BokbokError]:
        """Wait for the answer to a ping that is still to be sent."""
        waiter: Waiter[float | BokbokError] = Waiter()
        self._next.append(waiter)
        return waiter

    def remove(self, waiter: Waiter[float | BokbokError]) -> None:
        """Wait no more."""
        for waiters in (self._now, self._next):
            if waiter in waiters:
                waiters.remove(waiter)

    def start_round(self) -> None:
        """A ping is queued."""
        self.is_out = True
        self._began_at = trio.current_time()
        self._now, self._next = self._next, []

    def on_pong(self) -> bool:
        """A pong has come. Returns whether another ping is wanted."""
        if self.is_out:
            self.is_out = False
            answered, self._now = self._now, []  # or an end that follows would take their answer away
            for waiter in answered:
                waiter._wake(trio.current_time() - self._began_at)
        return bool(self._next)

    def end(self, make_error: Callable[[], BokbokError]) -> None:
        """The connection is over; `make_error` makes what each task sees."""
        for waiter in (*self._now, *self._next):
            waiter._wake(make_error())
