"""`Closing`: says over the stream that nothing follows, and waits until the peer has said so too.

To close a socket while something is on its way may reset it, and destroy what the peer has not read yet. So
the side that closes says its end, goes on receiving, and drops everything, until the peer's end comes.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Final, final

import trio

from .._protocol.session import Session
from .._stream.fast import FastStream
from .._trio_util import LazyEvent
from .ending import Ending
from .reader import STREAM_ERRORS

CLOSE_TIMEOUT: Final = 1.0
"""Seconds that a send under way and the end may take when a connection is closed, and that a connection which
can no longer send goes on receiving."""


@final
class Closing:
    """The orderly end of a connection's stream.

    Arguments:
        stream: written to by the sender task, which holds the send lock and never gives it back.
        peer_ended: set when nothing more is received.
    """

    __slots__ = ("_ending", "_is_hastened", "_linger", "_peer_ended", "_session", "_stream")

    def __init__(self, stream: FastStream, session: Session, peer_ended: LazyEvent, ending: Ending) -> None:
        self._stream = stream
        self._session = session
        self._peer_ended = peer_ended
        self._ending = ending
        self._linger: trio.CancelScope | None = None  # while this waits for the peer's end
        self._is_hastened = False

    def hasten(self) -> None:
        """Wait no longer than `CLOSE_TIMEOUT` from now on, where this waits."""
        if self._linger is not None:
            self._is_hastened = True
            self._linger.deadline = min(self._linger.deadline, trio.current_time() + CLOSE_TIMEOUT)

    async def say_end(self) -> None:
        """Say to the peer that nothing follows, and wait until it has said so too, a second at most.

        What a drained connection has sent may still be on its way: as long as the peer acknowledges some of
        it, another second is granted. On a stream that cannot say the end, such as TLS, it goes on receiving
        for that second, for what the peer still sends.
        """
        until = self._ending.until
        if trio.current_time() >= until:
            self._stream.send_end_nowait()
            return
        with suppress(*STREAM_ERRORS), trio.CancelScope(deadline=until) as self._linger:
            if not await self._stream.send_end() and not self._session.is_draining:
                return  # the peer would not learn of it, so there is nothing to wait for
            unacknowledged = math.inf
            while not self._peer_ended.is_set():
                with trio.move_on_after(CLOSE_TIMEOUT / 2):
                    await self._peer_ended.wait()
                remaining = self._stream.count_unacknowledged()
                if self._session.is_draining and not self._is_hastened and 0 < remaining < unacknowledged:
                    unacknowledged = remaining
                    self._linger.deadline = trio.current_time() + CLOSE_TIMEOUT
