"""To see what goes on: an `Instrument` is told of handshakes, connections, requests and items.

::

    class Slowest(Instrument):
        seconds = 0.0

        def request_ended(self, event):
            self.seconds = max(self.seconds, event.seconds)

    settings = Settings(instruments=[Slowest()])

Either side takes some, in its `Settings`. `LogInstrument` writes to the log; ``bokbok_trio.opentelemetry``
has one that traces. ``docs/watching.rst`` has more, and what it costs. An event is equal to itself alone, so
one that starts something can be the key of what is known of that.
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
"""``"in"``: from the peer; ``"out"``: from this side."""

HandshakeOutcome: TypeAlias = Literal["ok", "refused", "authentication", "failed", "cancelled"]
"""``"refused"``: the server had no room, or is stopping. ``"failed"``: all else that goes wrong."""

RequestOutcome: TypeAlias = Literal["ok", "error", "cancelled", "timeout", "lost"]
"""How a request ended.

``"error"``: it was answered with an error, whose code is beside it. ``"cancelled"``: nobody wants the answer
any more. ``"timeout"``: the same, as its deadline has passed. ``"lost"``: the connection ended before the
answer, or the peer, which is stopping, did not take it.
"""


@final
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HandshakeStarted:
    """A stream is open, and its handshake begins.

    Attributes:
        side: this one's.
        address: the peer's, as far as it is known.
    """

    side: Side
    address: Address | None


@final
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HandshakeEnded:
    """A handshake has ended, well or not.

    Attributes:
        handshake: how it began.
        outcome: how it ended.
        code: of a refusal, ``"busy"`` or ``"stopping"``; else empty.
        error: what went wrong, in words; else empty.
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
    """A connection is open. Nothing was asked on it, and its open handler has not begun."""

    connection: Connection


@final
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ConnectionEnded:
    """A connection is over, and its handlers and close handler have ended.

    Attributes:
        connection: the one that was opened.
        reason: why, in words; see `Connection.reason`.
        seconds: how long it lasted.
        requests_in: how many the peer made, with those that were refused here.
        requests_out: how many this side made.
    """

    connection: Connection
    reason: str
    seconds: float
    requests_in: int
    requests_out: int


@final
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RequestStarted:
    """A request was made by this side, or came from the peer and has a handler.

    Attributes:
        connection: the one it is made on.
        id: its number there. The two sides of a connection never use the same.
        direction: ``"out"`` where this side asks, ``"in"`` where it is asked.
        name: what is asked for: the method of a typed call, as in ``"Files.stat"``, with ``%back.`` before
            that of a callback; else the first field, 64 bytes at most. What the peer asks for, it may make
            up.
        has_channel: whether it is a channel, which lasts until its block is left or its answer came.
        depth: how many requests it is made inside of.
        context: what its asker sends along.
        deadline: until when its asker wants the answer, by Trio's clock; `math.inf` if it did not say.
        size: bytes of its fields, encoded.
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
    """A request was answered, or will not be.

    Attributes:
        request: how it started.
        outcome: how it ended.
        code: of the error that it was answered with; else empty.
        seconds: how long it took, with the time it waited.
        waited: seconds of that in which it was not begun: one of this side's had no slot; the open handler
            had not returned, or the peer had not read the answers before, for one of the peer's.
        bytes_in: of the fields that came with it, encoded: of the request or the answer, and of items. Those
            of errors do not count.
        bytes_out: of those that went.
        items_in: how many items came.
        items_out: how many items went.
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
    """An item of a channel came, or was queued to go.

    Attributes:
        request: of the channel.
        direction: ``"in"`` where it came, ``"out"`` where this side sent it.
        size: bytes of its fields, encoded.
    """

    request: RequestStarted
    direction: Direction
    size: int


class Instrument:
    """Is told what goes on: override what you want to know of. The methods of this class do nothing.

    They are called in the task that does the thing, and everything waits until they return: so they must not
    block. Events of one connection come in order: it is opened, requests start and end, it ends; what started
    ends once. Requests that are refused without a handler (this side is draining, has no handler, or no room
    for their bytes) are no events here.

    Where a method raises, that is logged once, and none of this instrument's methods is called any more for
    the `Settings` it was given in; nothing else happens.
    """

    def handshake_started(self, event: HandshakeStarted) -> None:
        """A stream is open, and its handshake begins."""

    def handshake_ended(self, event: HandshakeEnded) -> None:
        """A handshake has ended, well or not."""

    def connection_opened(self, event: ConnectionOpened) -> None:
        """A connection is open."""

    def connection_ended(self, event: ConnectionEnded) -> None:
        """A connection is over, with all that ran on it."""

    def request_started(self, event: RequestStarted) -> None:
        """A request starts.

        Of a request of the peer's, this runs in the context of its handler: a context variable that is set
        here has that value in the handler and in the tasks it starts, and nowhere else. `current_request`
        works.
        """

    def context_for(self, event: RequestStarted) -> Mapping[str, bytes | str]:  # noqa: ARG002
        """Return names and values to travel beside a request of this side, as ``context=`` does.

        It is called right after `request_started`. A name that the application sends along keeps the
        application's value, and what does not fit beside that is left out, from the first such name on: 32
        names and 8 KiB of a context, and the agreed size of a message.
        """
        return {}

    def request_ended(self, event: RequestEnded) -> None:
        """A request was answered, or will not be."""

    def item_passed(self, event: ItemPassed) -> None:
        """An item of a channel came or went."""


@final
class LogInstrument(Instrument):
    """Logs requests: to the logger ``bokbok_trio.requests``, one line for each when it has ended.

    These lines have the level DEBUG, so a program that did not ask for them sees none; those of slow requests
    have WARNING. Each connection has a number here, and a DEBUG line says which that is.

    Arguments:
        slow: seconds from which on a request is slow; `math.inf` for no such thing. A channel is not slow,
            as many are open for as long as their program runs.

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
        """Give it a number."""
        connection = event.connection
        number = self._numbers[connection] = next(self._counter)
        self._logger.debug(
            "connection %d is opened: a %s's, with %s, user %r",
            *(number, connection.side, connection.address, connection.user),
        )

    def connection_ended(self, event: ConnectionEnded) -> None:
        """Forget its number. A server has a line of its own about it."""
        number = self._numbers.pop(event.connection)
        if event.connection.side == "client":
            self._logger.debug(
                "connection %d has ended after %.1f seconds, with %d requests received and %d made: %s",
                *(number, event.seconds, event.requests_in, event.requests_out, event.reason),
            )

    def request_ended(self, event: RequestEnded) -> None:
        """Log it."""
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
