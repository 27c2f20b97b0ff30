"""Notice a peer that is gone, and do not accuse one that is there.

Silence means that nothing authentic was received. After ``ping_after`` of it a ping is sent;
``ping_timeout`` after the ping was *written* the peer is lost. It is lost too when one send takes as
long as both together: it does not read, though it may go on to send.

False accusations that this avoids:

- a long upload: its pings wait behind what is being sent, so their time begins when they are written;
- a blocked event loop, a suspended machine: whoever wakes late has not yet read what the peer sent
  meanwhile, so one more ``ping_timeout`` is granted.

The pings follow websockets' keepalive; the rest is learned from its issues.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, final

import trio

LATENESS: Final = 1.0
"""Seconds by which the watchdog may wake late before it thinks that it was not the peer's fault."""


@final
class Watchdog:
    """Watches one connection, in a task of its own.

    Arguments:
        ping_after, ping_timeout: seconds; see `Settings`.
        ping: queues a ping and wakes the sender.
        lose: is told why the connection is lost.
    """

    def __init__(
        self,
        ping_after: float,
        ping_timeout: float,
        *,
        ping: Callable[[], object],
        lose: Callable[[str], object],
    ) -> None:
        self._ping_after = ping_after
        self._ping_timeout = ping_timeout
        self._patience = ping_after + ping_timeout
        self._ping = ping
        self._lose = lose
        self._heard_at = trio.current_time()
        self._send_began: float | None = None
        self._ping_written = trio.Event()
        self._scope = trio.CancelScope()

    def heard(self) -> None:
        """Something authentic was received."""
        self._heard_at = trio.current_time()

    def send_begins(self, now: float) -> None:
        """A send is under way from now on."""
        self._send_began = now

    def send_ended(self, *, ping_left: bool) -> None:
        """It was written; `ping_left`: no ping is queued any more."""
        self._send_began = None
        if ping_left:
            self._ping_written.set()

    def stop(self) -> None:
        """Watch no more."""
        self._scope.cancel()

    async def run(self) -> None:
        """Watch, until stopped."""
        if math.isinf(self._patience):
            return
        with self._scope:
            while True:
                heard_at = self._heard_at
                await self._sleep_until(heard_at + self._ping_after)
                if self._heard_at > heard_at:
                    continue
                self._ping_written = trio.Event()
                self._ping()
                await self._sleep_until(trio.current_time() + self._patience, self._ping_written)
                await self._sleep_until(trio.current_time() + self._ping_timeout)
                if self._heard_at == heard_at:
                    self._lose(f"the peer has not been heard of for {self._patience:g} seconds")

    async def _sleep_until(self, moment: float, event: trio.Event | None = None) -> None:
        """Sleep until a moment, or an event; and lose the peer if a send gets stuck meanwhile."""
        if event is None:
            event = trio.Event()  # that never comes
        while True:
            began = self._send_began
            wake_at = moment if began is None else min(moment, began + self._patience)
            with trio.move_on_at(wake_at):
                await event.wait()
                return
            if trio.current_time() > wake_at + LATENESS:
                await trio.sleep(self._ping_timeout)
            now = trio.current_time()
            if began is not None and self._send_began == began and now >= began + self._patience:
                self._lose(f"the peer has not read for {self._patience:g} seconds")
            if now >= moment:
                return
