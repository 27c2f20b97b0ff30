"""`Ending`: how a connection ends, once, and the events of its end."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, cast, final

import trio

from .._errors import BokbokError, ConnectionClosed, ConnectionLost, ProtocolError, escape
from .._protocol.events import Abort
from .._trio_util import LazyEvent, describe_error, forget_tracebacks

if TYPE_CHECKING:
    from .._types import Connection

CLOSE_TIMEOUT: Final = 1.0
"""Seconds that a send under way and the end may take when a connection is closed. A connection that can no
longer send goes on receiving for as long."""

STREAM_ERRORS: Final = (trio.BrokenResourceError, trio.ClosedResourceError, OSError)
"""The errors of a stream that is broken. Any other error is a defect, of ours or of the stream."""

logger = logging.getLogger("bokbok_trio")


def refer_up(connection: Connection) -> Callable[[], Connection]:
    """Return a reference from a part of a connection up to the connection.

    It is weak, so that a connection that has ended is freed at once, and not by the garbage collector. Until
    then the connection's task holds it, so the reference is valid while any task of the connection runs.
    """
    return cast("Callable[[], Connection]", weakref.ref(connection))


@final
class Ending:
    """A connection is open; then it is over; then its stream is closed; then all its tasks have ended.

    All parts of the connection hold this object. They ask it whether the connection is over, and tell it why
    the connection must end.

    Arguments:
        connection: stopped by `Connection._stop` when it is over.

    Attributes:
        is_over: whether it is over: no request is made or handled any more.
        is_local: whether this side closed it; else it was lost.
        reason: why it is over, in words; None while it is open.
        until: the moment, by Trio's clock, until which it may send queued packets, and the end.
        draining: set once either side drains the connection, or it is over.
        over, stream_closed, ended: set when it is over, its stream closed, its tasks ended.
    """

    __slots__ = (
        "_cause",
        "_connection",
        "draining",
        "ended",
        "is_local",
        "is_over",
        "over",
        "reason",
        "stream_closed",
        "until",
    )

    def __init__(self, connection: Connection) -> None:
        self._connection = refer_up(connection)
        self.is_over = False
        self.is_local = False
        self.reason: str | None = None
        self._cause: BaseException | None = None
        self.until = math.inf
        self.draining = LazyEvent()
        self.over = LazyEvent()
        self.stream_closed = LazyEvent()
        self.ended = LazyEvent()

    def close(self, reason: str, *, graceful: bool = True) -> None:
        """End the connection from this side.

        Arguments:
            reason: why, in words.
            graceful: whether to send queued packets, and the end, within `CLOSE_TIMEOUT`.
        """
        self._begin(reason, is_local=True, graceful=graceful)

    def fail(self, reason: str, cause: BaseException | None = None, *, graceful: bool = False) -> None:
        """End the connection because it is lost. The arguments are those of `close`, and the cause."""
        peer = self._connection()._describe_peer()
        text = f"{reason} ({peer})" if peer else reason
        self._begin(text, is_local=False, graceful=graceful, cause=cause)

    def check_stream_error(self, error: BaseException) -> None:
        """Log an error of the stream, unless it is one of those that a broken stream raises."""
        if not isinstance(error, STREAM_ERRORS) and not self.is_over:
            self._log("a stream raised an error that streams do not raise", error)

    def on_defect(self, error: BaseException) -> None:
        """End the connection because this package has a defect."""
        self._log("a defect of bokbok_trio ends the connection", error)
        self.fail(f"internal error: {describe_error(error)}", error)

    def on_protocol_error(self, error: ProtocolError) -> None:
        """End the connection because the peer broke the protocol. The session sends `abort`."""
        logger.warning("%r: the peer broke the protocol: %s", self._connection(), error)
        self.fail(f"the peer broke the protocol: {error}", error, graceful=True)

    def on_abort(self, abort: Abort) -> None:
        """End the connection because the peer says that this side broke the protocol."""
        text = (
            f"the peer says that this side broke the protocol: {escape(abort.message)} [{escape(abort.code)}]"
        )
        logger.warning("%r: %s", self._connection(), text)
        self.fail(text)

    def log_closing(self, error: BaseException) -> None:
        """Log that closing the stream failed."""
        self._log("closing the stream failed", error)

    def _log(self, what: str, error: BaseException) -> None:
        logger.error("%r: %s", self._connection(), what, exc_info=error)

    def _begin(
        self, reason: str, *, is_local: bool, graceful: bool, cause: BaseException | None = None
    ) -> None:
        """End the connection. If it is over already, the first reason stays."""
        if self.is_over:
            return
        self.is_over = True
        self.is_local = is_local
        self.reason = reason
        self._cause = cause
        if cause is not None:
            forget_tracebacks(cause)  # their frames refer to this object: a cycle
        self.until = trio.current_time() + CLOSE_TIMEOUT if graceful else -math.inf
        self.draining.set()
        self.over.set()
        self._connection()._stop()

    def make_error(self, *, may_have_run: bool) -> BokbokError:
        """Make the error that a waiter gets, given whether its request may have run."""
        assert self.reason is not None
        if self.is_local:
            return ConnectionClosed(self.reason, may_have_run)
        error = ConnectionLost(self.reason, may_have_run)
        error.__cause__ = self._cause
        return error
