"""`Ending`: how a connection ends, once, and who waits for that."""

from __future__ import annotations

import math
from typing import final

from .._errors import BokbokError, ConnectionClosed, ConnectionLost
from .._trio_util import LazyEvent


@final
class Ending:
    """A connection is open; then it is over; then its stream is closed; then all its tasks have ended.

    All parts of the connection hold this one, and ask it.

    Attributes:
        is_over: whether it is over: nothing can be asked any more, and nothing is handled.
        is_local: whether this side closed it; else it was lost.
        reason: why it is over, in words; None while it is open.
        until: the moment, by Trio's clock, until which it may send what is queued, and say that it ends.
        over, stream_closed, ended: events, set as it goes on.
    """

    __slots__ = ("_cause", "ended", "is_local", "is_over", "over", "reason", "stream_closed", "until")

    def __init__(self) -> None:
        self.is_over = False
        self.is_local = False
        self.reason: str | None = None
        self._cause: BaseException | None = None
        self.until = math.inf
        self.over = LazyEvent()
        self.stream_closed = LazyEvent()
        self.ended = LazyEvent()

    def begin(self, reason: str, *, is_local: bool, until: float, cause: BaseException | None = None) -> bool:
        """It is over. Return whether that is new: the first reason stays.

        Arguments:
            cause: the error that it was lost by.
        """
        if self.is_over:
            return False
        self.is_over = True
        self.is_local = is_local
        self.reason = reason
        self._cause = cause
        self.until = until
        self.over.set()
        return True

    def make_error(self, *, may_have_run: bool) -> BokbokError:
        """Make what a waiter sees, given whether its request may have run."""
        assert self.reason is not None
        if self.is_local:
            return ConnectionClosed(self.reason, may_have_run)
        error = ConnectionLost(self.reason, may_have_run)
        error.__cause__ = self._cause
        return error
