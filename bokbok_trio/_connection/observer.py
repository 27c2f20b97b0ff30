"""`Observer`: tells the instruments of one side what happens on a connection.

A connection has an observer only if it has instruments. The observer keeps the requests in flight: one of
this side until `Calls` forgets it, one of the peer until `Handlers` forgets it. So each request that started
ends once.
"""

from __future__ import annotations

from contextvars import Context as ContextVariables
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, final

import trio

from .._errors import BokbokError, RemoteError, escape
from .._instruments import Instruments
from .._protocol.events import Request
from .._protocol.packets import encode_fields, size_of
from .._protocol.session import Session
from .._types import Context, Fields
from ..instruments import (
    ConnectionEnded,
    ConnectionOpened,
    Direction,
    ItemPassed,
    RequestEnded,
    RequestOutcome,
    RequestStarted,
)
from .ending import refer_up
from .timeouts import is_own_timeout

if TYPE_CHECKING:
    from .._types import Connection

MAX_NAME: Final = 64
"""Bytes of a field that are shown as the name of a request."""

CALL: Final = b"%call"
"""The first field of a typed call; its method follows. (``docs/interfaces.rst`` has this and the next.)"""

BACK: Final = b"%back"
"""The first field of a call of an object that was lent; a number and its method follow."""


@final
class _InFlight:
    """A request that has started and not ended.

    Attributes:
        waits_since: the moment, by Trio's clock, since which it waits; None if it does not wait.
        waited: seconds that it waited before that.
        bytes, items: how many were sent and received.
    """

    __slots__ = ("began", "bytes", "items", "request", "waited", "waits_since")

    def __init__(self, request: RequestStarted, began: float) -> None:
        self.request = request
        self.began = began
        self.waits_since: float | None = None
        self.waited = 0.0
        self.bytes: dict[Direction, int] = {"in": 0, "out": 0}
        self.items: dict[Direction, int] = {"in": 0, "out": 0}
        self.bytes[request.direction] = request.size


@final
class Observer:
    """Reports the events of one connection to its instruments.

    Arguments:
        instruments: get the events.
        connection: the connection.
        session: has the requests of this side.
    """

    __slots__ = ("_began", "_connection", "_in_flight", "_instruments", "_session")

    def __init__(self, instruments: Instruments, connection: Connection, session: Session) -> None:
        self._instruments = instruments
        self._connection = refer_up(connection)
        self._session = session
        self._began = trio.current_time()
        self._in_flight: dict[int, _InFlight] = {}
        session.local.on_slot = self.note_begun

    def tell_opened(self) -> None:
        """Report that the connection can be used."""
        self._instruments.tell(ConnectionOpened(connection=self._connection()))

    def tell_ended(self) -> None:
        """Report that the connection has ended. Nothing is reported after this."""
        self._session.local.on_slot = None
        self._instruments.tell(
            ConnectionEnded(
                connection=self._connection(),
                reason=self._connection().reason or "",
                seconds=trio.current_time() - self._began,
                requests_in=self._session.received,
                requests_out=self._session.made,
            )
        )

    # ---- requests of this side ----

    def ask(
        self,
        fields: Fields,
        deadline: float,
        depth: int,
        context: Context | None,
        *,
        has_channel: bool = False,
    ) -> int:
        """Queue a request of this side, and return its id. The instruments may add to its context.

        Raises:
            TypeError, ValueError, MessageTooLarge: as `Session.request` does. Then nothing was reported.
        """
        session = self._session
        frozen = encode_fields(fields)
        size = session.local.measure(frozen, context)
        id = session.local.next_id
        request = RequestStarted(
            connection=self._connection(),
            id=id,
            direction="out",
            name=_name(frozen),
            has_channel=has_channel,
            depth=depth,
            context=MappingProxyType(dict(context or {})),
            deadline=deadline,
            size=size,
        )
        self._start(request)
        added = self._instruments.add_context(request, lambda longer: session.local.has_room(size, longer))
        queue = session.open_channel if has_channel else session.request
        asked = queue(frozen, deadline, depth, added)
        assert asked == id
        if session.local.is_waiting(id):
            self.note_waiting(id)
        return id

    def tell_answered(self, id: int, outcome: list[bytes] | BokbokError) -> None:
        """Report that a request of this side has its outcome, while its task still waits."""
        if isinstance(outcome, list):
            self._end(id, "ok", size=size_of(outcome))
        elif isinstance(outcome, RemoteError):
            in_flight = self._in_flight[id]
            if is_own_timeout(outcome, in_flight.request.deadline, in_flight.began):
                self._end(id, "timeout")
            else:
                self._end(id, "error", outcome.code)
        else:
            self._end(id, "lost")

    def tell_cancelled(self, id: int) -> None:
        """Report that a request of this side was cancelled."""
        is_late = trio.current_time() >= self._in_flight[id].request.deadline
        self._end(id, "timeout" if is_late else "cancelled")

    # ---- requests of the peer ----

    def tell_received(self, request: Request, deadline: float, context: ContextVariables) -> None:
        """Report that a request of the peer has a handler, which will run in that context."""
        started = RequestStarted(
            connection=self._connection(),
            id=request.id,
            direction="in",
            name=_name(request.fields),
            has_channel=request.has_channel,
            depth=request.depth,
            context=request.context,
            deadline=deadline,
            size=size_of(request.fields),
        )
        context.run(self._start, started)

    def tell_handled(self, id: int, outcome: RequestOutcome, code: str) -> None:
        """Report that the handler of a request of the peer has ended. Its answer is queued."""
        if self._connection().closed:
            outcome = "lost"
        size = self._session.remote.answer_sizes[id] if outcome == "ok" else 0
        self._end(id, outcome, code if outcome == "error" else "", size=size)

    # ---- both ----

    def note_waiting(self, id: int) -> None:
        """Note that a request waits until it may begin."""
        self._in_flight[id].waits_since = trio.current_time()

    def note_begun(self, id: int) -> None:
        """Note that a request waits no more."""
        in_flight = self._in_flight[id]
        assert in_flight.waits_since is not None
        in_flight.waited = trio.current_time() - in_flight.waits_since
        in_flight.waits_since = None

    def tell_item(self, id: int, direction: Direction, size: int) -> None:
        """Report that an item was sent or received."""
        in_flight = self._in_flight.get(id)
        if in_flight is not None:  # else the request ended in the same receive
            in_flight.items[direction] += 1
            in_flight.bytes[direction] += size
            self._instruments.tell(ItemPassed(request=in_flight.request, direction=direction, size=size))

    def _start(self, request: RequestStarted) -> None:
        self._in_flight[request.id] = _InFlight(request, trio.current_time())
        self._instruments.tell(request)

    def _end(self, id: int, outcome: RequestOutcome, code: str = "", *, size: int = 0) -> None:
        in_flight = self._in_flight.pop(id)
        request = in_flight.request
        in_flight.bytes["in" if request.direction == "out" else "out"] += size
        now = trio.current_time()
        since = in_flight.waits_since
        self._instruments.tell(
            RequestEnded(
                request=request,
                outcome=outcome,
                code=code,
                seconds=now - in_flight.began,
                waited=in_flight.waited + (0 if since is None else now - since),
                bytes_in=in_flight.bytes["in"],
                bytes_out=in_flight.bytes["out"],
                items_in=in_flight.items["in"],
                items_out=in_flight.items["out"],
            )
        )


def _name(fields: list[bytes]) -> str:
    """Return a short name for a request, in one line."""
    match fields:
        case [first, method, *_] if first == CALL:
            name = method
        case [first, _, method, *_] if first == BACK:
            name = b".".join(filter(None, (BACK, method)))  # a function that was lent has no name
        case [name, *_]:
            pass
        case _:
            name = b""
    return escape(name[:MAX_NAME].decode(errors="replace"))
