"""`Reader`: receives, decodes, dispatches.

One task reads; `ReadTurn` says which. It receives, decodes everything that came, and then dispatches the
events one after another, through one table with a function for each type of event. Nothing cancels a receive
but the end of the connection. Even after this side has said that it is done, the reader receives, and drops
everything, until the peer has said so too.

**Requests.** The task that reads begins the handler of each request by itself (see `eager`). A handler that
never waits needs no task of its own, and wakes none. When a handler waits, the task becomes the handler's,
and another task reads. That one first dispatches the events that are left, and starts a task for each request
among them.

**Turns.** A receive may bring very many packets. Some are decoded and dispatched, then other tasks have their
turn, then the next ones follow. So a peer that sends a stream of tiny packets holds up nobody else.

**Sending.** Packets that are queued while events are dispatched are held back, and leave together at the end
(see `Coalescing`).

**Scopes.** Each task that reads has a cancel scope, which its handlers share until one of them waits. A
handler that leaves a scope or a nursery of its own open spoils its task: the task ends; or it sleeps until
the connection ends, where Trio would crash the nursery around it.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from contextvars import Context
from functools import partial
from typing import Any, Final, TypeAlias, final

import trio

from .._errors import ProtocolError
from .._protocol.events import Event, Request
from .._protocol.packets import Buffer
from .._protocol.session import Session
from .._trio_util import LazyEvent, describe_error, log_or_reraise
from .eager import start_eagerly
from .ending import Ending
from .handlers import Handlers, HandlerScope
from .read_turn import ReadTurn
from .sender import Sender
from .watchdog import Watchdog

STREAM_ERRORS: Final = (trio.BrokenResourceError, trio.ClosedResourceError, OSError)
"""How a stream says that it is broken. Anything else that it raises is a defect, ours or its own."""

_NAME: Final = "bokbok_trio reader"

DispatchTable: TypeAlias = Mapping[type[Event], Callable[[Any, Any], Request | None]]
"""By the type of an event: what to call with the connection and the event. A request that is returned is the
reader's."""


def leave_to_reader(_connection: object, request: Request) -> Request:
    """Do nothing with a request: the reader begins its handler."""
    return request


@final
class Reader:
    """Reads for one connection.

    Arguments:
        receive: receives what has arrived, as `FastStream.receive_view` does.
        session: decodes it.
        sender: is told when dispatching begins and ends.
        watchdog: is told when something was received.
        handlers: get the requests.
        ending: the connection's. Once it is over, nothing more is dispatched.
        table, owner: what to call with each type of event, and with which connection.
        on_protocol_error: is told how the peer broke the protocol.
        fail: is told why the connection is lost, and by which error.
        on_defect: is told of a defect of this package, which ends the connection.
        log: logs an error, with the name of the connection.

    Attributes:
        ended: set when nothing more is received.
    """

    __slots__ = (
        "_ending",
        "_events",
        "_fail",
        "_handlers",
        "_log",
        "_nursery",
        "_on_defect",
        "_on_protocol_error",
        "_owner",
        "_receive",
        "_scope",
        "_sender",
        "_session",
        "_spoiled",
        "_table",
        "_turn",
        "_watchdog",
        "ended",
    )

    def __init__(
        self,
        receive: Callable[[], Awaitable[Buffer | bytearray]],
        session: Session,
        sender: Sender,
        watchdog: Watchdog,
        handlers: Handlers,
        *,
        ending: Ending,
        table: DispatchTable,
        owner: object,
        on_protocol_error: Callable[[ProtocolError], object],
        fail: Callable[[str, BaseException | None], object],
        on_defect: Callable[[BaseException], object],
        log: Callable[[str, BaseException], object],
    ) -> None:
        self._receive = receive
        self._session = session
        self._sender = sender
        self._watchdog = watchdog
        self._handlers = handlers
        self._ending = ending
        self._table = table
        self._owner = owner
        self._on_protocol_error = on_protocol_error
        self._fail = fail
        self._on_defect = on_defect
        self._log = log
        self._nursery: trio.Nursery | None = None
        self._turn: ReadTurn[trio.lowlevel.Task] = ReadTurn()
        self._scope: HandlerScope | None = None  # of the task that reads
        self._spoiled: list[trio.lowlevel.Task] = []  # tasks that sleep until the end
        self._events: list[Event] = []  # decoded, and not dispatched; the next one is the last
        self.ended = LazyEvent()

    def start(self, nursery: trio.Nursery) -> None:
        """Start the reader task in a nursery, which also gets the tasks of handlers."""
        self._nursery = nursery
        self._start_task()

    def _start_task(self) -> None:
        assert self._nursery is not None
        # The task's context is a copy of the one that it is started in.
        self._handlers.new_context().run(partial(self._nursery.start_soon, self.run, name=_NAME))

    def discard(self) -> None:
        """The connection is over: drop what is not dispatched. What is still received is dropped too."""
        self._events.clear()

    def stop(self) -> None:
        """Receive nothing more."""
        self.discard()
        self.ended.set()
        if self._scope is not None:
            self._scope.cancel_scope.cancel()
        sleepers, self._spoiled = self._spoiled, []
        if self._turn.follower is not None:
            sleepers.append(self._turn.follower)
            self._turn.leave(self._turn.follower)
        for task in sleepers:
            trio.lowlevel.reschedule(task)

    # ---- a task that reads ----

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """Read; become the task of a handler that waits; after that, follow; read again; and so on."""
        task = trio.lowlevel.current_task()
        self._turn.begin(task)
        try:
            while await self._take_turn(task):
                scope = HandlerScope(self._handlers)
                with scope:
                    await self._read(task, scope)
                if scope.is_spoiled or task.child_nurseries:
                    break
        except BaseException as exc:  # noqa: BLE001  (`log_or_reraise` raises it on, where it ends the program)
            log_or_reraise(exc, self._on_defect)
        finally:
            self._turn.leave(task)
            if self._turn.reader is task:
                self.ended.set()
        if task.child_nurseries:
            await self._sleep_until_end(task)

    async def _take_turn(self, task: trio.lowlevel.Task) -> bool:
        """Wait for the turn to read. False: the task must end; another one follows, or nothing more comes."""

        def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
            self._turn.leave(task)
            return trio.lowlevel.Abort.SUCCEEDED

        if self._turn.reader is not task:
            if self.ended.is_set() or not self._turn.follow(task):
                return False
            task.context = self._handlers.new_context()  # both are a handler's still
            task.name = _NAME
            await trio.lowlevel.wait_task_rescheduled(abort)
        return not self.ended.is_set()

    async def _read(self, task: trio.lowlevel.Task, scope: HandlerScope) -> None:
        """Dispatch and receive in turn, while the task has the turn to read and its scope is good."""
        self._scope = scope
        self._dispatch_rest()
        while not self.ended.is_set():
            request = self._dispatch()
            if request is None:
                self._end_dispatch()
                await self._receive_more()
                continue
            call = self._handlers.accept(request, scope)
            if call is None:
                continue
            has_deadline = request.timeout < math.inf
            work, context = call
            has_waited = await start_eagerly(work, context, partial(self._hand_over, task, context))
            del request, call, work, context  # or they would be kept while this receives
            # Most handlers never wait, and leave nothing to do.
            if (has_waited or has_deadline or scope.is_spoiled or self._ending.is_over) and (
                not await self._go_on(task, scope, has_waited=has_waited)
            ):
                return

    async def _go_on(self, task: trio.lowlevel.Task, scope: HandlerScope, *, has_waited: bool) -> bool:
        """A handler has ended: if it waited, wait for the turn. Returns whether to read on in that scope."""
        if scope.is_spoiled:
            if self._turn.reader is task:
                self._promote_follower()
            return False
        scope.cancel_scope.deadline = math.inf
        if scope.cancel_scope.cancel_called:
            return False
        if has_waited:
            if not await self._take_turn(task):
                return False
            self._scope = scope
            self._dispatch_rest()
        return True

    # ---- dispatching ----

    def _dispatch(self) -> Request | None:
        """Dispatch the events up to the next request, and return that."""
        events, table, owner = self._events, self._table, self._owner
        while events:
            event = events.pop()
            request = table[type(event)](owner, event)
            if request is not None:
                return request
        return None

    def _dispatch_rest(self) -> None:
        """Dispatch the events that the task before this one left, with a task for each request.

        If this task began their handlers, each one that waits would delay the next one by a turn of the
        event loop.
        """
        assert self._nursery is not None
        while (request := self._dispatch()) is not None:
            self._handlers.start_task(self._nursery, request, self._sleep_until_end)

    def _end_dispatch(self) -> None:
        """Everything that was decoded is dispatched."""
        if self._session.error is not None and not self._ending.is_over:
            self._on_protocol_error(self._session.error)
        self._sender.uncork()

    # ---- receiving ----

    async def _receive_more(self) -> None:
        if self._session.has_undecoded and not self._ending.is_over:
            await trio.lowlevel.checkpoint()  # other tasks have their turn
            self._decode(b"")
            return
        try:
            data = await self._receive()
        except Exception as exc:  # noqa: BLE001  (whatever a stream raises, it is broken)
            if not isinstance(exc, STREAM_ERRORS) and not self._ending.is_over:
                self._log("a stream raised an error that streams do not raise", exc)
            self.ended.set()
            self._fail(f"receiving failed: {describe_error(exc)}", exc)
            return
        if not data:
            self.ended.set()
            text = "the peer closed the connection"
            if self._session.is_mid_packet:
                text = "the peer cut a packet short"
            elif self._session.peer_drains:
                text += ", which it was draining, as a server does that stops"
            self._fail(text, None)
        else:
            self._watchdog.heard()
            self._decode(data)

    def _decode(self, data: Buffer | bytearray) -> None:
        if not self._ending.is_over:
            events = self._session.receive(data)
            self._sender.cork(len(events))
            events.reverse()
            self._events = events  # all events before these are dispatched

    # ---- where a handler waits ----

    def _hand_over(self, task: trio.lowlevel.Task, context: Context) -> None:
        """A handler that this task began waits: the task is the handler's from now on, and another one reads.

        The event loop does not know yet that this task waits, so nothing may wake it. An event that is
        dispatched may. Hence the other task dispatches the events that are left.
        """
        task.context = context
        task.name = self._handlers.name_task(context)
        self._promote_follower()

    def _promote_follower(self) -> None:
        """Let the follower read, or a new task where there is none."""
        follower = self._turn.hand_over()
        if follower is not None:
            trio.lowlevel.reschedule(follower)
        else:
            self._start_task()

    async def _sleep_until_end(self, task: trio.lowlevel.Task) -> None:
        """Keep a task in which a handler left a nursery open, until the connection ends.

        Trio crashes the nursery around a task that ends like this, and that nursery is the connection's.
        """
        for nursery in task.child_nurseries:
            nursery.cancel_scope.cancel()
        if not self.ended.is_set():
            self._spoiled.append(task)
            await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
