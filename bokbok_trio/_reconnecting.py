"""`open_reconnecting`: requests over whatever connection there is, and a new one when it is lost.

Theory
======

A **dialler** task opens one connection at a time and holds it until it is of no more use: it was
lost, it was closed, or it is draining (which a request finds out). Then the dialler goes on with the
next address. Each connection lives in a task of its own: one that is draining finishes the requests
in flight while the next is opened already.

`request` waits until there is a current connection and asks that one. Whether it may ask the next
after a failure is told by the connection, which knows whether the request has left; nothing is
guessed here.

A connection **worked** if it answered anything: a request made through this object, or a ping. Then the next
is dialled at once when it has ended. That it lasted says nothing: a request that kills its server after ten
seconds would be repeated every ten seconds.

A request that may run twice may also be the one that kills each server it is sent to. So it is repeated a
bounded number of times, and after a growing pause of its own, in which others use the new connection.

Invariants
==========

- A request that may have run is not sent again, unless the caller said that it may run twice.
- A connection is current only after its open handler has returned.
- Every try that comes to nothing (no connection, or one that did not work) counts, and after as many in a
  row as there are addresses the dialler waits. And it never dials more often than every `MIN_BACKOFF`
  seconds because of connections that worked. So nothing a peer does makes it busy.
- It waits longer where a handshake broke off than where nobody was: the server may have no room, and coming
  back soon is what it can bear least. But a server that was killed, or a link that failed, looks the same. So
  this makes one wait longer, and none after it.
- The dialler fails only before the first connection is open, and then into who opens it.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from itertools import cycle
from typing import Final, Literal, TypeAlias, cast, final

import trio

from ._addresses import Address, AddressLike, as_address, check_dialable
from ._arguments import check_flag, check_handlers, check_key_arguments, check_settings, is_several
from ._client import connect, end_reason
from ._combined import CombinedHandler, split_handler
from ._connection.channel import Channel
from ._connection.connection import Connection
from ._connection.handlers import AddedHandlers
from ._errors import (
    AddressError,
    AuthenticationError,
    ConnectionClosed,
    ConnectionLost,
    ConnectionRefused,
    HandshakeError,
)
from ._keys import Key
from ._protocol.packets import encode_fields
from ._settings import Settings
from ._trio_util import bare_nursery, block, call_user, check_run, current_task_is_under, split_exception
from ._types import ChannelHandler, ConnectionHandler, Context, Fields, RequestHandler

MIN_BACKOFF: Final = 0.1
"""Seconds at least between rounds of tries: a server that restarts is found soon, and one that is
down is not flooded."""

STEADY: Final = 10.0
"""Seconds that a connection must have lasted to count as one that worked, if the peer said nothing on it."""

MAX_BACKOFF: Final = 30.0
"""Seconds at most between rounds of tries: nobody waits much longer than that for a server that is
back after a long time."""

CROWDED_BACKOFF: Final = 2.0
"""Seconds: the least limit of the wait where a server may have no room. Half of a limit is the least wait.
A look-up takes about so long on a server that is crowded because its look-ups are slow."""

REPEAT_PAUSE: Final = 0.2
"""Seconds before a request is repeated for the first time, after it may have cost a connection. It is
`REPEAT_GROWTH` times as long each further time."""

REPEAT_GROWTH: Final = 4
"""See `REPEAT_PAUSE`: with 0.2, 0.8 and 3.2 seconds others have most of the connections' time."""

DEFAULT_REPEATS: Final = 3
"""How often a request is repeated: one server that restarts, and then another, cost it two."""

MAX_NAME: Final = 40
"""Bytes of a request's first field that are shown in a log line."""

MAX_CONNECTIONS: Final = 16
"""Connections of one client at once: the current one, and those before it that have not ended,
because their peer does not close them or their handlers here do not heed their cancellation. More
can only be a mistake or ill will, and the next is not opened before one of them has ended."""

logger = logging.getLogger("bokbok_trio")

_CLOSED: Final = "this side closed the reconnecting connection"


@final
class ReconnectingConnection:
    """The current connection to one of several addresses, made by `open_reconnecting`."""

    def __init__(
        self,
        addresses: Sequence[Address],
        connect: Callable[[Address], Awaitable[Connection]],
        open_handler: ConnectionHandler | None,
        max_repeats: int,
    ) -> None:
        self._home = trio.lowlevel.current_trio_token()
        self._max_repeats = max_repeats
        self._addresses = addresses
        self._connect = connect
        self._open_handler = open_handler
        self._opening: set[trio.lowlevel.Task] = set()  # those that run the open handler
        self._connections: set[Connection] = set()  # all that have not ended
        self._current: Connection | None = None
        self._was_open = False
        self._changed = trio.lowlevel.ParkingLot()  # where all wait for a change of the above
        self._dialling = trio.CancelScope()
        self._holding = trio.CancelScope()  # of the connection that the dialler opened last
        self._closed = False
        self._added_handlers: AddedHandlers = {}

    def __repr__(self) -> str:
        state = "closed" if self._closed else "connected" if self.connection else "not connected"
        return f"<bokbok_trio.ReconnectingConnection to {', '.join(map(str, self._addresses))} {state}>"

    @property
    def connection(self) -> Connection | None:
        """The current connection; None while there is none.

        To close or to drain it is to have it replaced: like a lost one it is followed by the next. To
        be done with all of it, use `ReconnectingConnection.aclose` or leave the block.
        """
        return None if self._current is None or self._current.closed else self._current

    @property
    def closed(self) -> bool:
        """Whether this side is done with it: no request can be made any more."""
        return self._closed

    @trio.lowlevel.enable_ki_protection
    async def request(
        self, fields: Fields, *, idempotent: bool = False, context: Context | None = None
    ) -> list[bytes]:
        """Send a request over the current connection, or the next one, and wait for its answer.

        It waits for as long as there is no connection: put a time limit around it. A request that
        certainly did not run when the connection was lost goes over the next one. Any other fails,
        unless it is idempotent.

        Arguments:
            fields: 0 to 255 of bytes or str (sent as UTF-8), as they are at the time of the call.
            context: as for `Connection.request`.
            idempotent: that it does no harm if it runs more than once. It is then sent again, after a pause
                of 0.2 s at first, when a connection was lost with it in flight; `max_repeats` times at most,
                as it may be what the servers die of.

        Returns:
            The fields of the answer.

        Raises:
            TypeError, ValueError: `fields` is no such list. Nothing was sent.
            MessageTooLarge: it is larger than the two sides of this connection agreed on.
            RemoteError: the other side answered with an error.
            ConnectionLost: the connection was lost, or closed by itself, with the request in flight:
                it may have run. If it is idempotent, this happened once more than `max_repeats`.
            ConnectionClosed: this was closed. The request may have run if it was in flight.
            RuntimeError: called by the open handler, which is to ask the connection it was given:
                no other request is sent before it has returned. Or called from another thread or Trio run.
        """
        check_run(self._home, self)
        frozen = encode_fields(fields)
        tries = _Tries(self, frozen)
        while True:
            await _check_cancelled()
            connection = await self._wait_askable()
            try:
                answer = await connection.request(frozen, context=context)
            except ConnectionLost as exc:
                if exc.may_have_run:
                    if not idempotent:
                        raise
                    tries.note_loss(exc)
            except ConnectionClosed as exc:
                if self._closed:
                    raise
                if exc.may_have_run:
                    if not idempotent:
                        raise ConnectionLost(str(exc)) from exc
                    tries.note_loss(exc)
            else:
                return answer
            self._retire(connection)
            await self._pause(tries.take_pause())

    @block
    async def open_channel(
        self, fields: Fields, *, context: Context | None = None
    ) -> AsyncGenerator[Channel]:
        """Send a request with a channel over the current connection, or the next one.

        It waits for as long as there is no connection. Once open, the channel is that connection's, as
        by `Connection.open_channel`, and is lost with it: what was sent is not sent again.

        Arguments:
            fields: 0 to 255 of bytes or str (sent as UTF-8).
            context: as for `Connection.request`.

        Raises:
            TypeError, ValueError: `fields` is no such list. Nothing was sent.
            MessageTooLarge: it is larger than the two sides of this connection agreed on.
            ConnectionClosed: this was closed.
            RemoteError: as by `Connection.open_channel`.
            RuntimeError: as by `request`.
        """
        check_run(self._home, self)
        frozen = encode_fields(fields)
        await _check_cancelled()
        async with AsyncExitStack() as stack:
            yield await self._enter_channel(stack, frozen, context)

    async def _enter_channel(
        self, stack: AsyncExitStack, fields: Sequence[bytes], context: Context | None
    ) -> Channel:
        """Open a channel over the first connection that takes it. To open one does not wait for the peer."""
        while True:
            connection = await self._wait_askable()
            try:
                return await stack.enter_async_context(connection.open_channel(fields, context=context))
            except (ConnectionLost, ConnectionClosed):  # it drained, or was closed, at this very moment
                if self._closed:
                    raise ConnectionClosed(_CLOSED) from None
                self._retire(connection)

    @trio.lowlevel.enable_ki_protection
    async def aclose(self) -> None:
        """Close it for good, and wait until all transports are closed, for at most a second or so.

        Requests that wait, for an answer or for a connection, fail with `ConnectionClosed`. Otherwise
        this is like `Connection.aclose`, and a handler may call it too. Cancelled, it closes nevertheless.

        Raises:
            RuntimeError: called from another thread or Trio run.
        """
        check_run(self._home, self)
        self._close()
        await trio.lowlevel.checkpoint()
        for connection in list(self._connections):
            await connection.aclose()

    def _close(self) -> None:
        self._closed = True
        self._dialling.cancel()
        for connection in self._connections:
            connection._close(_CLOSED)
        self._changed.unpark_all()

    # ---- the current connection ----

    async def _wait_connection(self) -> Connection:
        while (connection := self.connection) is None:
            if self._closed:
                await trio.lowlevel.checkpoint()
                raise ConnectionClosed(_CLOSED)
            if any(map(current_task_is_under, self._opening)):
                raise RuntimeError("an open handler asks the connection that it was given")
            await self._changed.park()
        return connection

    async def _wait_askable(self) -> Connection:
        """Wait for a connection that takes new requests, for as long as nothing else runs."""
        while True:
            connection = await self._wait_connection()
            if connection._may_ask() and not connection._session.is_draining:
                return connection
            self._retire(connection)

    async def _pause(self, seconds: float) -> None:
        """Wait, unless this is closed. No checkpoint if there is nothing to wait for."""
        if seconds:
            with trio.move_on_after(seconds):
                while not self._closed:
                    await self._changed.park()

    def _retire(self, connection: Connection) -> None:
        """Ask a connection no more, if it is the current one; those who still wait for it may."""
        if connection is self.connection:
            self._current = None
            self._holding.cancel()

    # ---- the dialler ----

    @trio.lowlevel.enable_ki_protection
    async def _run(self, nursery: trio.Nursery) -> None:
        """Open one connection after another until closed; they live in `nursery`."""
        failures = 0  # in a row
        backoff = MIN_BACKOFF
        is_crowded = False  # of this round, a server was there
        addresses = cycle(self._addresses)
        try:
            with self._dialling:
                while True:
                    outcome = await self._try(next(addresses), nursery)
                    if outcome == "worked":
                        failures = 0
                        backoff = MIN_BACKOFF
                        is_crowded = False
                        continue
                    failures += 1
                    is_crowded = is_crowded or outcome == "crowded"
                    if failures % len(self._addresses) == 0:
                        backoff = min(2 * backoff, MAX_BACKOFF)
                        # Of this wait alone: were `backoff` raised, it would double from there, and the next
                        # failure after two handshakes that a link broke would cost eight seconds.
                        longest = max(backoff, CROWDED_BACKOFF) if is_crowded else backoff
                        await trio.sleep(_jitter(longest / 2, longest))
                        is_crowded = False
        finally:
            # Again, for a connection that was opened in the very step of closing; and if this was
            # cancelled from outside, nobody would open the next.
            self._close()

    async def _try(self, address: Address, nursery: trio.Nursery) -> _Outcome:
        """Open a connection and hold it until it is of no more use."""
        while len(self._connections) >= MAX_CONNECTIONS:
            logger.warning("%r: %d connections have not ended; waiting", self, len(self._connections))
            await self._changed.park()
        connection = await self._dial(address)
        if not isinstance(connection, Connection):
            return connection
        opened_at = trio.current_time()
        self._connections.add(connection)
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

    async def _dial(self, address: Address) -> Connection | _Outcome:
        """Open a connection. If that failed, which was reported, return how."""
        try:
            return await self._connect(address)
        except BaseException as exc:
            error, rest = split_exception(exc)
            if error is not None:
                is_expected = isinstance(error, OSError | HandshakeError | AddressError)
                is_usual = isinstance(error, OSError | HandshakeError)
                if not self._was_open and (isinstance(error, AuthenticationError) or not is_usual):
                    raise
                logger.log(
                    logging.INFO if _is_stopping(error) else logging.WARNING,
                    "%r: no connection with %s: %r",
                    *(self, address, error),
                    exc_info=None if is_expected else error,
                )
            if rest is not None:
                raise rest from rest.__cause__
            return _classify(error)

    @trio.lowlevel.enable_ki_protection
    async def _live(self, connection: Connection) -> None:
        """The life of a connection, to the end of its last handler."""
        connection._handlers.added = self._added_handlers
        try:
            await connection._run(self._open)
        finally:
            self._connections.remove(connection)
            self._changed.unpark_all()

    @trio.lowlevel.enable_ki_protection
    async def _open(self, connection: Connection) -> None:
        """Open a connection's requests to everybody, after the open handler."""
        if self._open_handler is not None:
            task = trio.lowlevel.current_task()
            self._opening.add(task)
            try:
                await call_user(self._open_handler, connection)
            finally:
                self._opening.remove(task)
        if not connection.closed:  # else the dialler may hold the next one already
            self._current = connection
            self._was_open = True
            self._changed.unpark_all()


_Outcome: TypeAlias = Literal["worked", "gone", "crowded"]
"""Of a try: a connection on which the peer spoke, or that lasted; nobody was there, or it neither spoke nor
lasted; a server was there, and did not open a connection."""


def _is_stopping(error: BaseException | None) -> bool:
    """Whether it says that the server stops, as each does now and then."""
    return isinstance(error, ConnectionRefused) and error.code == "stopping"


def _classify(error: BaseException | None) -> _Outcome:
    """What came of a try that ended in an error."""
    if _is_stopping(error):
        return "gone"  # soon, and then it may be back soon
    return "crowded" if isinstance(error, HandshakeError) else "gone"


@final
class _Tries:
    """How often a request was in flight on a connection that was lost."""

    __slots__ = ("_client", "_fields", "_losses", "_since", "_to_pause")

    def __init__(self, client: ReconnectingConnection, fields: Sequence[bytes]) -> None:
        self._client = client
        self._fields = fields
        self._losses = 0
        self._since = trio.current_time()
        self._to_pause = False

    def note_loss(self, error: ConnectionLost | ConnectionClosed) -> None:
        """A connection was lost, and the request may be why.

        Raises:
            ConnectionLost: that has happened too often.
        """
        self._losses += 1
        self._to_pause = True
        seconds = trio.current_time() - self._since
        if self._losses > 1:
            name = f"that begins with {self._fields[0][:MAX_NAME]!r}" if self._fields else "without fields"
            logger.warning(
                "%r: a request %s was in flight on %d connections that were lost, within %.1f seconds; "
                "it may be what ends them",
                *(self._client, name, self._losses, seconds),
            )
        if self._losses > self._client._max_repeats:
            times = "once" if self._losses == 1 else f"{self._losses} times in {seconds:.1f} seconds"
            raise ConnectionLost(
                f"the request was sent {times}, and the connection was lost each time; at last: {error}"
            ) from error

    def take_pause(self) -> float:
        """Seconds to wait before the next try."""
        if not self._to_pause:
            return 0
        self._to_pause = False
        longest = min(REPEAT_PAUSE * REPEAT_GROWTH ** (self._losses - 1), MAX_BACKOFF)
        return _jitter(longest / 2, longest)


def _jitter(least: float, longest: float) -> float:
    """Seconds to wait, drawn so that clients that lost a server together do not come back together.

    "Equal jitter" of https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/: with the full
    one, five tries may follow each other within a second, and the sixth then waits for many.
    """
    return random.uniform(least, longest)  # noqa: S311  (nothing secret)


async def _check_cancelled() -> None:
    """Raise `trio.Cancelled` if it is due, also by a deadline that passed and that Trio has not noticed."""
    if trio.current_effective_deadline() <= trio.current_time():
        await trio.lowlevel.checkpoint()


@block
async def open_reconnecting(
    to: AddressLike | Sequence[AddressLike],
    *,
    user: str | None = None,
    key: Key | None = None,
    service: str = "",
    insecure: bool = False,
    request_handler: RequestHandler | CombinedHandler | None = None,
    channel_handler: ChannelHandler | None = None,
    open_handler: ConnectionHandler | None = None,
    close_handler: ConnectionHandler | None = None,
    max_repeats: int = DEFAULT_REPEATS,
    settings: Settings = Settings(),  # noqa: B008  (immutable)
) -> AsyncGenerator[ReconnectingConnection]:
    """Stay connected for as long as a block: whenever the connection is lost, open the next.

    ::

        async with open_reconnecting(["a.example:12345", "b.example:12345"], user="myuser", key=key,
                                     open_handler=subscribe) as client:
            with trio.fail_after(60):
                answer = await client.request(["ping", "12345"], idempotent=True)

    Entering waits until the first connection is open, for as long as it takes: put a time limit
    around it. The addresses are tried in turn, also after a connection was lost: the first try is made at
    once if the peer had asked or answered anything on that one, or if it had lasted for ten seconds. After as
    many tries in a row as there are addresses, a random time passes, from half of a limit to all of it; the
    limit doubles with each round from 0.2 s to 30 s. Where a server had no room, or a handshake failed, it is
    2 s at least that time. ``docs/running.rst`` says how long a request may wait by all that. What failed is
    reported to the ``bokbok_trio`` logger as a warning, and an orderly end (the server stops, or this side
    closed or drained the connection) as information. A name is looked up when it is its turn.

    What the block raises comes out as itself. Leaving it closes everything, and waits for the
    handlers and close handlers.

    Arguments:
        to: an address, as a str or parsed, or a sequence of them. No stream: who should open the
            next?
        user, key, service, insecure, request_handler, channel_handler, settings: as for
            `open_connection`, for each connection.
        open_handler: called with each connection when it is open, before anything else is asked of
            it and before any request on it is handled; so here a client says again what every
            connection must know. What it raises is logged and closes the connection, and the next
            is tried. It is cancelled when the connection is lost.
        close_handler: called once with each connection, after it and all its handlers have ended,
            if the open handler returned. What it raises is logged. The next connection may be open
            by then.
        max_repeats: how often a request that is idempotent is sent again after a connection was lost with it
            in flight; 0 or more. For a request that kills its server takes along what others had in flight.

    Raises:
        TypeError, ValueError, AddressError: as by `open_connection`, or there is no address, or
            `max_repeats` is not a number of times. Where a name stands for another machine, which plain TCP
            must not go to, this is found when it is its turn.
        AuthenticationError: a server refused the user and key, or could not prove that it has it,
            before the first connection was open. Later it is one more failure, as keys may be
            about to change; so are OSError and the other HandshakeErrors, always.
    """
    check_key_arguments(user, key, service)
    on_request, on_channel = split_handler(request_handler, channel_handler)
    check_handlers(
        request_handler=on_request,
        channel_handler=on_channel,
        open_handler=open_handler,
        close_handler=close_handler,
    )
    check_flag("insecure", insecure)
    check_settings(settings)
    addresses = _as_addresses(to)
    if not isinstance(max_repeats, int):
        raise TypeError(f"max_repeats must be an int, not {type(max_repeats).__name__}")
    if max_repeats < 0:
        raise ValueError(f"max_repeats must be at least 0, not {max_repeats}")
    for address in addresses:
        check_dialable(address, insecure=insecure or key is not None)  # a name is looked up in its turn
    client = ReconnectingConnection(
        addresses,
        partial(
            connect,
            user=user,
            key=key,
            service=service,
            insecure=insecure,
            request_handler=on_request,
            channel_handler=on_channel,
            close_handler=close_handler,
            settings=settings,
        ),
        open_handler,
        max_repeats,
    )
    async with bare_nursery() as nursery:
        nursery.start_soon(client._run, nursery)
        try:
            await client._wait_connection()
            yield client
        finally:
            client._close()


def _as_addresses(to: object) -> Sequence[Address]:
    addresses = list(map(as_address, cast("Sequence[object]", to) if is_several(to) else [to]))
    if not addresses:
        raise ValueError("open_reconnecting takes at least one address")
    return addresses
