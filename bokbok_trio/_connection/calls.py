"""`Calls`: the requests of this side that are in flight, and the tasks that wait for their answers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, final

import trio

from .._errors import BokbokError, ConnectionLost, RemoteError, escape
from .._protocol.events import Failure
from .._protocol.session import Session
from .._types import Context, Fields
from .ending import Ending
from .timeouts import is_own_timeout
from .waiting import Waiter

if TYPE_CHECKING:
    from .._types import Connection
    from .observer import Observer

SLOT_PATIENCE: Final = 1.0
"""Seconds that a request waits for a slot before the log says so, once for each connection."""

logger = logging.getLogger("bokbok_trio")


@final
class Call(Waiter[list[bytes]]):
    """A request of this side, until its answer comes or nobody wants that any more.

    Attributes:
        id: of the request.
        embargo: the moment, by Trio's clock, before which nobody may see the outcome: it is the peer's
            ``timeout``, and our own deadline has not quite passed. None: it may be seen at once.
        on_settled: called once there is an outcome.
    """

    __slots__ = ("_asked_at", "_deadline", "embargo", "id", "on_settled")

    def __init__(self, id: int, deadline: float, asked_at: float) -> None:
        super().__init__()
        self.id = id
        self._deadline = deadline
        self._asked_at = asked_at
        self.embargo: float | None = None
        self.on_settled: Callable[[], object] | None = None

    def settle(self, outcome: list[bytes] | BokbokError) -> None:
        """Let whoever waits go on with the outcome."""
        self.outcome = outcome
        if not isinstance(outcome, list) and is_own_timeout(outcome, self._deadline, self._asked_at):
            self.embargo = self._deadline
        if self.on_settled is not None:
            self.on_settled()
        self._wake()

    async def wait(self) -> list[bytes]:
        """Wait for the outcome, for one task, once. Return the fields, or raise the error."""
        await self.settled()
        if self.embargo is not None:
            await trio.sleep_until(self.embargo)
        return self.take()


@final
class Calls:
    """The requests of this side that are in flight.

    Arguments:
        session: it has their packets and slots.
        packet_queued: called where a packet was queued.
        observer: is told of them; None where nobody is.
    """

    __slots__ = ("_calls", "_has_warned", "_observer", "_packet_queued", "_session", "_slot_watch")

    def __init__(
        self, session: Session, packet_queued: Callable[[], object], observer: Observer | None
    ) -> None:
        self._session = session
        self._packet_queued = packet_queued
        self._observer = observer
        self._calls: dict[int, Call] = {}
        self._slot_watch: trio.CancelScope | None = None  # while a task watches those that wait for slots
        self._has_warned = False

    def ask(
        self,
        fields: Fields,
        deadline: float,
        *,
        depth: int,
        context: Context | None,
        has_channel: bool = False,
    ) -> Call:
        """Queue a request.

        Raises:
            TypeError, ValueError, MessageTooLarge: as `Session.request` does.
        """
        local = self._session.local
        queue = local.open_channel if has_channel else local.request
        if self._observer is None:
            id = queue(fields, deadline, depth=depth, context=context)
        else:
            id = self._observer.ask(
                queue, fields, deadline, depth=depth, context=context, has_channel=has_channel
            )
        asked_at = trio.current_time() if deadline < math.inf else 0.0
        call = self._calls[id] = Call(id, deadline, asked_at)
        return call

    def settle(self, id: int, outcome: list[bytes] | BokbokError) -> None:
        """Give a request its outcome, if anybody still wants it."""
        call = self._calls.pop(id, None)
        if call is not None:
            if self._observer is not None:
                self._observer.tell_answered(id, outcome)
            call.settle(outcome)

    def cancel(self, call: Call) -> None:
        """Nobody wants the outcome any more, if there is none yet."""
        if self._calls.pop(call.id, None) is not None:
            call.on_settled = None
            if self._observer is not None:
                self._observer.tell_cancelled(call.id)
            self._session.cancel(call.id)
            self._packet_queued()

    def fail_all(self, ending: Ending) -> None:
        """The connection is over."""
        if self._slot_watch is not None:
            self._slot_watch.cancel()
        for id in list(self._calls):
            self.settle(id, ending.make_error(may_have_run=not self._session.is_unsent(id)))

    def forget(self) -> None:
        """There will be no more of them: forget whom to wake and to tell."""
        del self._packet_queued, self._observer

    # ---- slots ----

    def watch_slots(self, nursery: trio.Nursery, connection: Connection) -> None:
        """See to it that the log says, once, that requests wait for slots for long."""
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
                        "%r: a request has waited for a slot for over %g s: the peer takes %d of a kind at "
                        "once (its max_requests), %d wait, and of those with a slot %d were cancelled",
                        connection,
                        SLOT_PATIENCE,
                        statistics.total_slots,
                        statistics.requests_waiting,
                        statistics.requests_cancelled,
                    )
                    break
        self._slot_watch = None


def as_error(failure: Failure) -> BokbokError:
    """What the asker of a request that failed sees."""
    if failure.code == "closing":
        return ConnectionLost(escape(failure.message), may_have_run=False)
    return RemoteError(failure.message, failure.code, failure.details)
