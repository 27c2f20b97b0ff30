"""`Dialler`: opens one connection after another to one of several addresses, and knows the current one.

One task dials. It opens a connection and holds it until the connection is lost, closed or draining (which a
request notices). Then it dials the next address; ``_backoff.py`` says how long it waits before. Each
connection runs in a task of its own, so one that drains finishes its requests in flight while the next is
open already.

Invariants
==========

- A connection is current only after its open handler has returned.
- The task dials at most once every `MIN_BACKOFF` seconds after connections that worked, and `Backoff` bounds
  all other tries. So nothing that a peer does makes it busy.
- The task fails only before the first connection is open, and then into the task that opens the client.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from itertools import cycle
from typing import Final, final

import trio

from ._addresses import Address
from ._backoff import MIN_BACKOFF, STEADY, Backoff, Outcome, classify, is_stopping
from ._client import end_reason
from ._connection.connection import Connection
from ._connection.handlers import AddedHandlers
from ._errors import AddressError, AuthenticationError, ConnectionClosed, HandshakeError
from ._trio_util import call_user, current_task_is_under, split_exception
from ._types import ConnectionHandler

MAX_CONNECTIONS: Final = 16
"""Connections of one client at once: the current one, and earlier ones that have not ended, because their
peer does not close them or their handlers here do not heed their cancellation. More can only come of a
mistake or of ill will. The next connection is not opened before one of them has ended."""

CLOSED: Final = "this side closed the reconnecting connection"

logger = logging.getLogger("bokbok_trio")


@final
class Dialler:
    """The connections of a client that reconnects, and the task that opens them.

    Arguments:
        addresses: are tried in turn.
        connect: dials an address and shakes hands.
        open_handler: the user's, for each connection.

    Attributes:
        connections: all connections that have not ended.
        is_closed: whether the client was closed.
        added_handlers: the handlers that `add_handler` added to the client, for all connections.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        connect: Callable[[Address], Awaitable[Connection]],
        open_handler: ConnectionHandler | None,
    ) -> None:
        self._addresses = addresses
        self._connect = connect
        self._open_handler = open_handler
        self.connections: set[Connection] = set()
        self.is_closed = False
        self.added_handlers: AddedHandlers = {}
        self._current: Connection | None = None
        self._was_open = False
        self._opening: set[trio.lowlevel.Task] = set()  # the tasks that run the open handler
        self._changed = trio.lowlevel.ParkingLot()  # every change of the above wakes all
        self._dialling = trio.CancelScope()
        self._holding = trio.CancelScope()  # the wait for the end of the connection that was opened last

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else "connected" if self.current else "not connected"
        return f"<bokbok_trio.ReconnectingConnection to {', '.join(map(str, self._addresses))} {state}>"

    # ---- for the client ----

    @property
    def current(self) -> Connection | None:
        """The current connection, if there is one that is not closed."""
        return None if self._current is None or self._current.closed else self._current

    async def wait_current(self) -> Connection:
        """Wait until there is a current connection. If there is one, this is no checkpoint.

        Raises:
            ConnectionClosed: the client was closed.
            RuntimeError: the open handler called this; it would wait for itself.
        """
        while (connection := self.current) is None:
            if self.is_closed:
                await trio.lowlevel.checkpoint()
                raise ConnectionClosed(CLOSED)
            if any(map(current_task_is_under, self._opening)):
                raise RuntimeError("an open handler must send requests over the connection that it was given")
            await self._changed.park()
        return connection

    async def wait_askable(self) -> Connection:
        """Wait for a connection that takes new requests. It takes one as long as no other task runs."""
        while True:
            connection = await self.wait_current()
            if connection._may_ask() and not connection._session.is_draining:
                return connection
            self.retire(connection)

    async def pause(self, seconds: float) -> None:
        """Wait, but not longer than until the client is closed. No checkpoint for 0 seconds."""
        if seconds:
            with trio.move_on_after(seconds):
                while not self.is_closed:
                    await self._changed.park()

    def retire(self, connection: Connection) -> None:
        """Send no more requests over a connection. Those in flight go on."""
        if connection is self.current:
            self._current = None
            self._holding.cancel()

    def close(self) -> None:
        """Close all connections, and dial no more."""
        self.is_closed = True
        self._dialling.cancel()
        for connection in self.connections:
            connection._close(CLOSED)
        self._changed.unpark_all()

    # ---- the task that dials ----

    @trio.lowlevel.enable_ki_protection
    async def run(self, nursery: trio.Nursery) -> None:
        """Open one connection after another until closed. Their tasks run in `nursery`."""
        backoff = Backoff(len(self._addresses))
        addresses = cycle(self._addresses)
        try:
            with self._dialling:
                while True:
                    outcome = await self._try(next(addresses), nursery)
                    if pause := backoff.next_pause(outcome):
                        await trio.sleep(pause)
        finally:
            # Close again: a connection may have been opened in the very step of closing. And after a
            # cancellation from outside no task would open the next one.
            self.close()

    async def _try(self, address: Address, nursery: trio.Nursery) -> Outcome:
        """Open a connection, and hold it as long as it is of use."""
        while len(self.connections) >= MAX_CONNECTIONS:
            logger.warning("%r: %d connections have not ended; waiting", self, len(self.connections))
            await self._changed.park()
        connection = await self._dial(address)
        if not isinstance(connection, Connection):
            return connection
        opened_at = trio.current_time()
        self.connections.add(connection)
        nursery.start_soon(self._live, connection)
        with trio.CancelScope() as self._holding:
            await connection._ending.stream_closed.wait()
        level = logging.INFO if connection._is_ended_on_purpose else logging.WARNING
        logger.log(level, "%r: done with the connection with %s: %s", self, address, end_reason(connection))
        lasted = trio.current_time() - opened_at
        if not connection._session.has_spoken and lasted < STEADY:
            return "gone"
        await trio.sleep_until(opened_at + MIN_BACKOFF)
        return "worked"

    async def _dial(self, address: Address) -> Connection | Outcome:
        """Open a connection. If that fails, log it and return the outcome."""
        try:
            return await self._connect(address)
        except BaseException as exc:  # noqa: BLE001  (what is not logged is raised on)
            error, rest = split_exception(exc)
            try:
                if error is not None:
                    is_expected = isinstance(error, OSError | HandshakeError | AddressError)
                    is_usual = isinstance(error, OSError | HandshakeError)
                    if not self._was_open and (isinstance(error, AuthenticationError) or not is_usual):
                        raise
                    logger.log(
                        logging.INFO if is_stopping(error) else logging.WARNING,
                        "%r: no connection with %s: %r",
                        *(self, address, error),
                        exc_info=None if is_expected else error,
                    )
                if rest is not None:
                    raise rest from rest.__cause__
                return classify(error)
            finally:
                del error, rest  # the traceback refers to this frame, and both would keep each other alive

    # ---- the task of each connection ----

    @trio.lowlevel.enable_ki_protection
    async def _live(self, connection: Connection) -> None:
        """Run a connection, to the end of its last handler."""
        connection._handlers.added = self.added_handlers
        try:
            await connection._run(self._open)
        finally:
            self.connections.remove(connection)
            self._changed.unpark_all()

    @trio.lowlevel.enable_ki_protection
    async def _open(self, connection: Connection) -> None:
        """Run the open handler, then make the connection the current one."""
        if self._open_handler is not None:
            task = trio.lowlevel.current_task()
            self._opening.add(task)
            try:
                await call_user(self._open_handler, connection)
            finally:
                self._opening.remove(task)
        if not connection.closed:  # otherwise the task that dials may hold the next one already
            self._current = connection
            self._was_open = True
            self._changed.unpark_all()
