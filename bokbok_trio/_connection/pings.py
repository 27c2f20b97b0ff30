"""`Pings`: the tasks that wait for a pong."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import trio

from .._errors import BokbokError
from .._protocol.events import Pong
from .._protocol.session import Session
from .waiting import Waiter


@final
class Pings:
    """The tasks that wait for a pong.

    Pongs have no ids, and a peer may answer several pings by one pong, so one ping is in flight at a time.
    (The watchdog sends another one after long silence. Then the measured round trip may be too short.)

    Arguments:
        session: queues the pings.
        packet_queued: `Sender.packet_queued`.
    """

    __slots__ = ("_began_at", "_is_out", "_next", "_now", "_packet_queued", "_session")

    def __init__(self, session: Session, packet_queued: Callable[[], object]) -> None:
        self._session = session
        self._packet_queued = packet_queued
        self._now: list[Waiter[float]] = []  # for the ping in flight
        self._next: list[Waiter[float]] = []  # for the one after it
        self._began_at = 0.0
        self._is_out = False  # whether a ping is in flight

    async def ask(self) -> float:
        """Wait for the answer to a ping that is sent after this call. Return the round trip in seconds.

        Raises:
            ConnectionClosed, ConnectionLost: the connection is over.
        """
        asker: Waiter[float] = Waiter()
        self._next.append(asker)
        if not self._is_out:
            self.send()
        try:
            await asker.settled()
            return asker.take()
        finally:
            for askers in (self._now, self._next):
                if asker in askers:
                    askers.remove(asker)

    def send(self) -> None:
        """Queue a ping. The watchdog calls this even if the peer has not answered the ping in flight."""
        if not self._is_out:
            self._is_out = True
            self._began_at = trio.current_time()
            self._now, self._next = self._next, []
        self._session.ping()
        self._packet_queued()

    def on_pong(self, _pong: Pong) -> None:
        """Wake the tasks that wait for this pong. If others wait for the next one, send a ping for them."""
        if self._is_out:
            self._is_out = False
            answered, self._now = self._now, []  # so that `end` cannot take their answer away
            for asker in answered:
                asker.settle(trio.current_time() - self._began_at)
        if self._next:
            self.send()

    def end(self, make_error: Callable[[], BokbokError]) -> None:
        """Fail all tasks, because the connection is over. `make_error` makes the error of each."""
        for asker in (*self._now, *self._next):
            asker.settle(make_error())
