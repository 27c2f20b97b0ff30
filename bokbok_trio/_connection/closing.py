"""`Closing`: ends the stream of a connection that is over.

A socket that is closed while bytes are on their way may be reset, and a reset destroys data that the peer has
not read yet. So the side that closes sends its end, goes on receiving, and drops everything, until the peer's
end comes.
"""

from __future__ import annotations

import math
from contextlib import suppress
from types import TracebackType
from typing import final

import trio

from .._protocol.session import Session
from .._stream.fast import FastStream
from .._trio_util import describe_error, log_or_reraise, split_exception
from .ending import CLOSE_TIMEOUT, STREAM_ERRORS, Ending
from .reader import Reader
from .sender import Sender


@final
class Closing:
    """A block for the sender task. Leaving it sends the end, and closes the stream.

    An exception of the block is a failure of the stream, or comes from outside and is raised on.

    Arguments:
        stream, session, reader, sender, ending: the connection's.
        is_server: whether a server accepted the connection.
    """

    __slots__ = (
        "_ending",
        "_is_hastened",
        "_is_server",
        "_linger",
        "_reader",
        "_sender",
        "_session",
        "_stream",
    )

    def __init__(
        self,
        stream: FastStream,
        session: Session,
        reader: Reader,
        sender: Sender,
        *,
        ending: Ending,
        is_server: bool,
    ) -> None:
        self._stream = stream
        self._session = session
        self._reader = reader
        self._sender = sender
        self._ending = ending
        self._is_server = is_server
        self._linger: trio.CancelScope | None = None  # while this waits for the peer's end
        self._is_hastened = False

    def hasten(self) -> None:
        """Wait for the peer's end for at most `CLOSE_TIMEOUT` from now on."""
        if self._linger is not None:
            self._is_hastened = True
            self._linger.deadline = min(self._linger.deadline, trio.current_time() + CLOSE_TIMEOUT)

    async def __aenter__(self) -> None:
        """Do nothing, without a checkpoint."""

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        exc: BaseException | None,
        _traceback: TracebackType | None,
    ) -> bool:
        try:
            if exc is None:
                await self._send_end()
            else:
                await self._handle(exc)
        except BaseException as raised:  # noqa: BLE001  (`log_or_reraise` raises it on, if it came from outside)
            log_or_reraise(raised, self._ending.log_closing)
        finally:
            del exc, _traceback  # or this frame and the traceback would keep each other alive
            self._ending.close("the connection was cancelled", graceful=False)
            self._reader.stop()
            await self._close()
        return True

    async def _close(self) -> None:
        try:
            if not self._stream.close_nowait():
                await trio.aclose_forcefully(self._stream)
        except BaseException as exc:  # noqa: BLE001  (as above)
            log_or_reraise(exc, self._ending.log_closing)
        finally:
            self._ending.stream_closed.set()

    async def _handle(self, exc: BaseException) -> None:
        """Handle an exception of the block: sending failed, or was cancelled from outside, or both."""
        error, rest = split_exception(exc)
        if error is not None:
            await self._note_failure(error)
        if rest is not None:
            # Tell the peer, or this would look like a stream that somebody cut.
            if self._is_server:
                self._session.drain()  # tells the peer that the server ends
            self._sender.send_end_now()
            try:
                raise rest from rest.__cause__
            finally:
                del exc, error, rest  # as above

    async def _note_failure(self, error: BaseException) -> None:
        """Sending failed. Answers may have arrived before that, so give the reader time for them."""
        if not self._sender.is_in_stream:
            self._ending.on_defect(error)
            return
        self._ending.check_stream_error(error)
        with trio.move_on_after(CLOSE_TIMEOUT):
            await self._ending.over.wait()
        self._ending.fail(f"sending failed: {describe_error(error)}", error)

    async def _send_end(self) -> None:
        """Tell the peer that nothing follows, and wait for the peer's end, for at most a second.

        Data of a drained connection may still be on its way. As long as the peer acknowledges some of it,
        this waits for another second. On a stream that cannot send the end, such as TLS, it goes on receiving
        for that second, because the peer may still send.
        """
        until = self._ending.until
        if trio.current_time() >= until:
            self._stream.send_end_nowait()
            return
        with suppress(*STREAM_ERRORS), trio.CancelScope(deadline=until) as self._linger:
            if not await self._stream.send_end() and not self._session.is_draining:
                return  # the peer does not learn of it, so there is nothing to wait for
            unacknowledged = math.inf
            while not self._reader.ended.has_happened:
                with trio.move_on_after(CLOSE_TIMEOUT / 2):
                    await self._reader.ended.wait()
                remaining = self._stream.count_unacknowledged()
                if self._session.is_draining and not self._is_hastened and 0 < remaining < unacknowledged:
                    unacknowledged = remaining
                    self._linger.deadline = trio.current_time() + CLOSE_TIMEOUT
