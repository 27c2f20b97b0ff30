"""`Pings`: the tasks that wait for the peer's sign of life."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import trio

from .._errors import BokbokError
from .waiting import Waiter


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
        self._now: list[Waiter[float]] = []  # for the ping that is out
        self._next: list[Waiter[float]] = []  # for the one after it
        self._began_at = 0.0
        self.is_out = False

    async def ask(self, send_ping: Callable[[], object]) -> float:
        """Wait for the answer to a ping that leaves from now on. Return the round trip in seconds.

        Arguments:
            send_ping: sends one, and calls `start_round`; called unless one is out.

        Raises:
            ConnectionClosed, ConnectionLost: the connection is over.
        """
        asker: Waiter[float] = Waiter()
        self._next.append(asker)
        if not self.is_out:
            send_ping()
        try:
            await asker.settled()
            return asker.take()
        finally:
            for askers in (self._now, self._next):
                if asker in askers:
                    askers.remove(asker)

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
            for asker in answered:
                asker.settle(trio.current_time() - self._began_at)
        return bool(self._next)

    def end(self, make_error: Callable[[], BokbokError]) -> None:
        """The connection is over; `make_error` makes what each task sees."""
        for asker in (*self._now, *self._next):
            asker.settle(make_error())
