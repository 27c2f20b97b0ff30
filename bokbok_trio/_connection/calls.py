"""`Calls`: the requests of this side that are in flight, and the tasks that wait for their answers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, final

import trio

from .._errors import BokbokError, ConnectionLost, RemoteError, escape
from .._protocol.events import Answer, Bye, Failure
from .._protocol.session import Session
from .._types import Context, Fields
from .ending import Ending
from .timeouts import is_own_timeout
from .waiting import Waiter

if TYPE_CHECKING:
    from .._types import Connection
    from .observer import Observer

DRAINING_MESSAGE: Final = "the peer takes no new request"
"""The message of the error that a request gets if its peer drains."""

SLOT_PATIENCE: Final = 1.0
"""Seconds that a request waits for a slot before a line is logged, once for each connection."""

logger = logging.getLogger("bokbok_trio")


@final
class Call(Waiter[list[bytes]]):
    """A request of this side, until it has its outcome or is cancelled.

    Attributes:
        id: of the request.
        embargo: the moment, by Trio's clock, before which nobody may see the outcome, because it is the
            peer's ``timeout``, and our own deadline has not quite passed. None: it may be seen at once.
        on_settled: called once there is an outcome.
    """

    __slots__ = ("_asked_at", "_deadline", "embargo", "id", "on_settled")

    def __init__(self, id: int, deadline: float) -> None:
        self.outcome = self._sleeper = None  # without `super().__init__`: one is made for each request
        self.id = id
        self._deadline = deadline
        self._asked_at = trio.current_time() if deadline < math.inf else 0.0
        self.embargo: float | None = None
        self.on_settled: Callable[[], object] | None = None

    def settle(self, outcome: list[bytes] | BokbokError) -> None:
        """Note the outcome, and wake the task that waits for it."""
        self.outcome = outcome
        if not isinstance(outcome, list) and is_own_timeout(outcome, self._deadline, self._asked_at):
            self.embargo = self._deadline
        if self.on_settled is not None:
            self.on_settled()
        self._wake()


@final
class Calls:
    """The requests of this side that are in flight.

    Arguments:
        session: queues their packets, and counts their slots.
        ending: the connection's.
        packet_queued: `Sender.packet_queued`.
        observer: reports them; None if there are no instruments.
    """

    __slots__ = ("_calls", "_ending", "_has_warned", "_observer", "_packet_queued", "_session", "_slot_watch")

    def __init__(
        self,
        session: Session,
        ending: Ending,
        packet_queued: Callable[[], object],
        observer: Observer | None,
    ) -> None:
        self._session = session
        self._ending = ending
        self._packet_queued = packet_queued
        self._observer = observer
        self._calls: dict[int, Call] = {}
        self._slot_watch: trio.CancelScope | None = None  # of the task that warns, while it runs
        self._has_warned = False

    def ask(self, fields: Fields, deadline: float, depth: int, context: Context | None) -> Call:
        """Queue a request.

        Raises:
            TypeError, ValueError, MessageTooLarge: as `Session.request` does.
        """
        if self._observer is None:
            id = self._session.request(fields, deadline, depth, context)
        else:
            id = self._observer.ask(fields, deadline, depth, context)
        call = self._calls[id] = Call(id, deadline)
        return call

    def open_channel(self, fields: Fields, deadline: float, depth: int, context: Context | None) -> Call:
        """Queue a request with a channel. Exceptions are those of `ask`."""
        if self._observer is None:
            id = self._session.open_channel(fields, deadline, depth, context)
        else:
            id = self._observer.ask(fields, deadline, depth, context, has_channel=True)
        call = self._calls[id] = Call(id, deadline)
        return call

    def on_answer(self, answer: Answer) -> None:
        """Give a request its answer, unless it was cancelled."""
        call = self._calls.pop(answer.id, None)
        if call is not None:
            if self._observer is not None:
                self._observer.tell_answered(answer.id, answer.fields)
            call.settle(answer.fields)

    def on_failure(self, failure: Failure) -> None:
        """The peer answered a request with an error."""
        if failure.code == "closing":
            self._fail(failure.id, ConnectionLost(escape(failure.message), may_have_run=False))
        else:
            self._fail(failure.id, RemoteError(failure.message, failure.code, failure.details))

    def on_bye(self, bye: Bye) -> None:
        """The peer drains. It takes no new request, and none of those that wait for a slot."""
        self._ending.draining.set()
        for id in bye.ids:
            self._fail(id, ConnectionLost(DRAINING_MESSAGE, may_have_run=False))

    def _fail(self, id: int, error: BokbokError) -> None:
        """Give a request an error as its outcome, unless it was cancelled."""
        call = self._calls.pop(id, None)
        if call is not None:
            if self._observer is not None:
                self._observer.tell_answered(id, error)
            call.settle(error)

    def cancel(self, call: Call) -> None:
        """Cancel a request, unless it has its outcome already."""
        if self._calls.pop(call.id, None) is not None:
            call.on_settled = None
            if self._observer is not None:
                self._observer.tell_cancelled(call.id)
            self._session.cancel(call.id)
            self._packet_queued()

    def fail_all(self) -> None:
        """Fail all requests, because the connection is over."""
        if self._slot_watch is not None:
            self._slot_watch.cancel()
        for id in list(self._calls):
            self._fail(id, self._ending.make_error(may_have_run=not self._session.is_unsent(id)))

    # ---- slots ----

    def watch_slots(self, nursery: trio.Nursery, connection: Connection) -> None:
        """Start the task that logs a warning when requests wait long for slots. It warns once."""
        if self._slot_watch is None and not self._has_warned:
            self._slot_watch = trio.CancelScope()
            nursery.start_soon(self._warn_of_waiting, connection, self._slot_watch)

    @trio.lowlevel.enable_ki_protection
    async def _warn_of_waiting(self, connection: Connection, scope: trio.CancelScope) -> None:
        with scope:
            while (oldest := self._session.local.oldest_waiting()) is not None:
                await trio.sleep(SLOT_PATIENCE)
                if self._session.local.is_waiting(oldest):
                    self._has_warned = True
                    statistics = connection.statistics()
                    logger.warning(
                        "%r: a request has waited for a slot for over %g s: the peer takes %d of one depth "
                        "at once (its max_requests), %d wait, and %d of those with a slot were cancelled",
                        connection,
                        SLOT_PATIENCE,
                        statistics.total_slots,
                        statistics.requests_waiting,
                        statistics.requests_cancelled,
                    )
                    break
        self._slot_watch = None
