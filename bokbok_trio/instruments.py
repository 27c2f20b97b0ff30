"""An `Instrument` gets the events of handshakes, connections, requests and items.

::

    class Slowest(Instrument):
        seconds = 0.0

        def request_ended(self, event):
            self.seconds = max(self.seconds, event.seconds)

    settings = Settings(instruments=[Slowest()])

Each side takes instruments in its `Settings`. `LogInstrument` writes to the log, and
``bokbok_trio.opentelemetry`` has one for traces. ``docs/watching.rst`` has more, and the cost. An event
equals only itself, so an instrument can keep data about a request in a dict, under the event of its start.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, final

if TYPE_CHECKING:
    from ._addresses import Address
    from ._types import Connection, Side

__all__ = [
    "ConnectionEnded",
    "ConnectionOpened",
    "Direction",
    "HandshakeEnded",
    "HandshakeOutcome",
    "HandshakeStarted",
    "Instrument",
    "ItemPassed",
    "LogInstrument",
    "RequestEnded",
    "RequestOutcome",
    "RequestStarted",
]

Direction: TypeAlias = Literal["in", "out"]
"""``"in"``: the peer sent it. ``"out"``: this side sent it."""

HandshakeOutcome: TypeAlias = Literal["ok", "refused", "authentication", "failed", "cancelled"]
"""``"refused"``: the server had no room, or is stopping. ``"authentication"``: an `AuthenticationError`.
``"failed"``: any other error."""

RequestOutcome: TypeAlias = Literal["ok", "error", "cancelled", "timeout", "lost"]
"""How a request ended.

``"error"``: the answer was an error, and the event has its code. ``"cancelled"``: its asker does not want the
answer any more. ``"timeout"``: its deadline has passed. ``"lost"``: the connection ended before the answer,
or the peer was stopping and did not take the request.
"""


@final
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HandshakeStarted:
    """A stream is open, and its handshake begins.

    Attributes:
        side: this side.
        address: the address of the peer; None if it is unknown.
    """

    side: Side
    address: Address | None


@final
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HandshakeEnded:
    """A handshake has ended, with a connection or without.

    Attributes:
        handshake: the event of its start.
        outcome: how it ended.
        code: the code of a refusal, ``"busy"`` or ``"stopping"``; otherwise empty.
        error: the error, for people; otherwise empty.
        seconds: how long it took.
    """

    handshake: HandshakeStarted
    outcome: HandshakeOutcome
    code: str
    error: str
    seconds: float


@final
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ConnectionOpened:
    """A connection is open. No request was made on it, and its open handler has not begun."""

    connection: Connection


@final
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ConnectionEnded:
    """A connection has ended, with its handlers and its close handler.

    Attributes:
        connection: the connection.
        reason: why it ended, for people; see `Connection.reason`.
        seconds: how long it lasted.
        requests_in: requests that the peer made, including those that this side refused.
        requests_out: requests that this side made.
    """

    connection: Connection
    reason: str
    seconds: float
    requests_in: int
    requests_out: int


@final
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RequestStarted:
    """This side made a request, or a request of the peer arrived and has a handler.

    Attributes:
        connection: the connection of the request.
        id: its number on that connection. The two sides never use the same number.
        direction: ``"out"`` for a request of this side, ``"in"`` for one of the peer.
        name: the method of a typed call, such as ``"Files.stat"``, or ``"%back."`` and the method for a
            callback; otherwise the first field, at most 64 bytes of it. The peer chooses the name of its
            requests, so it may be anything.
        has_channel: whether it has a channel, which lasts until its block is left or its answer has arrived.
        depth: the number of requests that it is nested in.
        context: the context that its asker sent along.
        deadline: the moment, by Trio's clock, until which its asker wants the answer; `math.inf` for no
            deadline.
        size: bytes of its encoded fields.
    """

    connection: Connection
    id: int
    direction: Direction
    name: str
    has_channel: bool
    depth: int
    context: Mapping[str, bytes | str]
    deadline: float
    size: int


@final
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RequestEnded:
    """A request was answered, or never will be.

    Attributes:
        request: the event of its start.
        outcome: how it ended.
        code: the code of the error that was its answer; otherwise empty.
        seconds: how long it took, including `waited`.
        waited: seconds before it began. A request of this side waited for a slot. A request of the peer
            waited for the open handler, or until the peer had read earlier answers.
        bytes_in: encoded bytes of received fields: of the request or the answer, and of items. Errors do not
            count.
        bytes_out: encoded bytes of sent fields, likewise.
        items_in: received items.
        items_out: sent items.
    """

    request: RequestStarted
    outcome: RequestOutcome
    code: str
    seconds: float
    waited: float
    bytes_in: int
    bytes_out: int
    items_in: int
    items_out: int


@final
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ItemPassed:
    """An item of a channel arrived, or was queued to be sent.

    Attributes:
        request: the event of the start of the channel's request.
        direction: ``"in"`` for an item of the peer, ``"out"`` for one of this side.
        size: bytes of its encoded fields.
    """

    request: RequestStarted
    direction: Direction
    size: int


class Instrument:
    """The base class of instruments. Its methods do nothing: override those of the events that you want.

    The methods are called in the task where the event happens, and everything waits until they return: they
    must not block. The events of one connection are in order: it opens, requests start and end, it ends.
    Everything that started ends once. A request that is refused without a handler (this side is draining, has
    no handler, or has no room for its bytes) causes no event.

    If a method raises, the error is logged once, and no method of this instrument is called again for the
    `Settings` that have it. Nothing else happens.
    """

    def handshake_started(self, event: HandshakeStarted) -> None:
        """A stream is open, and its handshake begins."""

    def handshake_ended(self, event: HandshakeEnded) -> None:
        """A handshake has ended, with a connection or without."""

    def connection_opened(self, event: ConnectionOpened) -> None:
        """A connection is open."""

    def connection_ended(self, event: ConnectionEnded) -> None:
        """A connection has ended, with all that ran on it."""

    def request_started(self, event: RequestStarted) -> None:
        """A request starts.

        For a request of the peer, this runs in the context of the handler: a context variable that is set
        here has its value in the handler and in the tasks that the handler starts, and nowhere else.
        `current_request` works here too.
        """

    def context_for(self, event: RequestStarted) -> Mapping[str, bytes | str]:  # noqa: ARG002
        """Return names and values to send with a request of this side, as those of ``context=``.

        It is called right after `request_started`. A name that the application uses keeps the application's
        value. A context has at most 32 names and 8 KiB, and must fit the agreed size of a message: the first
        name that does not fit is left out, with all later ones.
        """
        return {}

    def request_ended(self, event: RequestEnded) -> None:
        """A request was answered, or never will be."""

    def item_passed(self, event: ItemPassed) -> None:
        """An item of a channel arrived, or was queued to be sent."""


@final
class LogInstrument(Instrument):
    """Logs each request when it has ended, with one line of the logger ``bokbok_trio.requests``.

    These lines have the level DEBUG, which programs show only if they ask for it; those of slow requests have
    WARNING. The lines number the connections, and a DEBUG line tells which connection has which number.

    Arguments:
        slow: seconds after which a request is slow, 0 or more; `math.inf` for never. A channel is never slow,
            because many are open as long as their program runs.

    Raises:
        TypeError, ValueError: `slow` is not a number of seconds, or negative.
    """

    def __init__(self, *, slow: float = math.inf) -> None:
        if not isinstance(slow, int | float):
            raise TypeError(f"slow must be a number of seconds, not {type(slow).__name__}")
        if math.isnan(slow) or slow < 0:
            raise ValueError(f"slow must be at least 0 seconds, not {slow}")
        self._slow = slow
        self._logger = logging.getLogger("bokbok_trio.requests")
        self._counter = itertools.count(1)
        self._numbers: dict[Connection, int] = {}

    def connection_opened(self, event: ConnectionOpened) -> None:
        """Give the connection a number, and log it."""
        connection = event.connection
        number = self._numbers[connection] = next(self._counter)
        self._logger.debug(
            "connection %d is open: this side is the %s, the peer is %s, user %r",
            *(number, connection.side, connection.address, connection.user),
        )

    def connection_ended(self, event: ConnectionEnded) -> None:
        """Forget the number of the connection, and log its end. On a server, the server logs it."""
        number = self._numbers.pop(event.connection)
        if event.connection.side == "client":
            self._logger.debug(
                "connection %d has ended after %.1f seconds, with %d requests received and %d made: %s",
                *(number, event.seconds, event.requests_in, event.requests_out, event.reason),
            )

    def request_ended(self, event: RequestEnded) -> None:
        """Log the request."""
        request = event.request
        is_slow = event.seconds >= self._slow and not request.has_channel
        level = logging.WARNING if is_slow else logging.DEBUG
        if self._logger.isEnabledFor(level):
            self._logger.log(
                level,
                "connection %d: %s%s %d %s %r: %s after %.3f s (waited %.3f), %d bytes in, %d out",
                self._numbers[request.connection],
                "slow " if is_slow else "",
                "channel" if request.has_channel else "request",
                request.id,
                request.direction,
                request.name,
                f"error {event.code!r}" if event.outcome == "error" else event.outcome,
                event.seconds,
                event.waited,
                event.bytes_in,
                event.bytes_out,
            )
