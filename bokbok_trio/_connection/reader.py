"""`Reader`: receives, decodes, dispatches.

One task reads; `ReadTurn` says which. It receives, decodes everything that came, and then dispatches the
events one after another, through one table with a function for each type of event. Only the end of the
connection cancels a receive. After this side has sent its end, the reader goes on receiving, and drops
everything, until the peer's end comes.

**Requests.** The task that reads begins the handler of each request itself (see `eager`). A handler that
never waits needs no task of its own, and wakes none. When a handler waits, the task becomes the handler's,
and another task reads. The other task first dispatches the remaining events, and starts a task for each
request among them.

**Long receives.** A receive may bring very many packets. Some are decoded and dispatched, then other tasks
run, then the next packets follow. So a peer that sends a stream of tiny packets delays no other task.

**Sending.** Packets that are queued while events are dispatched are held back, and leave together at the end
(see `Coalescing`).

**Scopes.** Each task that reads has a cancel scope, which its handlers share until one of them waits. A
handler that leaves a scope or a nursery of its own open spoils its task. After a scope the task ends. After a
nursery it sleeps until the connection ends, because Trio would crash the connection's nursery otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from contextvars import Context
from functools import partial
from typing import Any, Final, TypeAlias, cast, final

import trio

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

NAME: Final = "bokbok_trio reader"
"""The name of a task that reads."""

DispatchTable: TypeAlias = Mapping[type[Event], Callable[[Any], None] | None]
"""By the type of an event: the function that is called with it. None: the reader itself handles it."""


@final
class Reader:
    """Reads for one connection.

    Arguments:
        receive: receives, as `FastStream.receive_view` does.
        session: decodes it.
        sender: is told when dispatching begins and ends.
        watchdog: is told when something was received.
        handlers: get the requests.
        ending: the connection's. Once it is over, nothing more is dispatched.
        table: says what to call with each type of event.

    Attributes:
        ended: set when receiving has ended.
    """

    __slots__ = (
        "_ending",
        "_events",
        "_handlers",
        "_nursery",
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
    ) -> None:
        self._receive = receive
        self._session = session
        self._sender = sender
        self._watchdog = watchdog
        self._handlers = handlers
        self._ending = ending
        self._table = table
        self._nursery: trio.Nursery | None = None
        self._turn: ReadTurn[trio.lowlevel.Task] = ReadTurn()
        self._scope: HandlerScope | None = None  # of the task that reads
        self._spoiled: list[trio.lowlevel.Task] = []  # tasks that sleep until the end
        self._events: list[Event] = []  # decoded, and not dispatched; reversed, so the next is the last
        self.ended = LazyEvent()

    def discard(self) -> None:
        """Drop all events, because the connection is over. Data that still comes is dropped too."""
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
    async def run(self, nursery: trio.Nursery) -> None:
        """Read, become the task of a handler that waits, follow, read again, and so on.

        Arguments:
            nursery: the connection's, which also gets the tasks of handlers.
        """
        self._nursery = nursery
        task = trio.lowlevel.current_task()
        task.name = NAME
        self._turn.begin(task)
        try:
            while await self._take_turn(task):
                scope = HandlerScope(self._handlers)
                with scope:
                    await self._read(task, scope)
                if scope.is_spoiled or task.child_nurseries:
                    break
        except BaseException as exc:  # noqa: BLE001  (`log_or_reraise` raises it on, if it ends the program)
            log_or_reraise(exc, self._ending.on_defect)
        finally:
            if self._turn.leave(task):
                self.ended.set()
        if task.child_nurseries:
            await self._sleep_until_end(task)

    async def _take_turn(self, task: trio.lowlevel.Task) -> bool:
        """Wait for the turn to read. False: this task must end; another follows, or receiving has ended."""

        def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
            self._turn.leave(task)
            return trio.lowlevel.Abort.SUCCEEDED

        if self._turn.reader is not task:
            if self.ended.has_happened or not self._turn.follow(task):
                return False
            task.context = self._handlers.new_context()  # context and name are still a handler's
            task.name = NAME
            await trio.lowlevel.wait_task_rescheduled(abort)
        return not self.ended.has_happened

    async def _read(self, task: trio.lowlevel.Task, scope: HandlerScope) -> None:
        """Dispatch and receive while the task has the turn to read, and its scope is not spoiled."""
        self._scope = scope
        self._dispatch_rest()
        while not self.ended.has_happened:
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
        """A handler has ended. If it waited, wait for the turn. Return whether to read on in that scope."""
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
        """Dispatch the events before the next request, and return that request."""
        events, table = self._events, self._table
        while events:
            event = events.pop()
            handle = table[type(event)]
            if handle is None:
                return cast("Request", event)
            handle(event)
        return None

    def _dispatch_rest(self) -> None:
        """Dispatch the events that the task before this one left, with a task for each request.

        If this task began the handlers, each handler that waits would delay the next by a turn of the event
        loop.
        """
        assert self._nursery is not None
        while (request := self._dispatch()) is not None:
            self._handlers.start_task(self._nursery, request, self._sleep_until_end)

    def _end_dispatch(self) -> None:
        """Send what was queued: all decoded events are dispatched."""
        if self._session.error is not None and not self._ending.is_over:
            self._session.abort(str(self._session.error))
            self._ending.on_protocol_error(self._session.error)
        self._sender.uncork()

    # ---- receiving ----

    async def _receive_more(self) -> None:
        if self._session.has_undecoded and not self._ending.is_over:
            await trio.lowlevel.checkpoint()  # let other tasks run
            self._decode(b"")
            return
        try:
            data = await self._receive()
        except BaseException as exc:  # noqa: BLE001  (after any exception of its own, a stream is broken)
            log_or_reraise(exc, self._on_broken)
            return
        if not data:
            self.ended.set()
            text = "the peer closed the connection"
            if self._session.is_mid_packet:
                text = "the peer cut a packet short"
            elif self._session.draining.peer_drains:
                text += ", which it was draining, as a stopping server does"
            self._ending.fail(text)
        else:
            self._watchdog.heard()
            self._decode(data)

    def _on_broken(self, error: BaseException) -> None:
        self.ended.set()
        self._ending.check_stream_error(error)
        self._ending.fail(f"receiving failed: {describe_error(error)}", error)

    def _decode(self, data: Buffer | bytearray) -> None:
        if not self._ending.is_over:
            events = self._session.receive(data)
            self._sender.coalescing.cork(len(events))
            events.reverse()
            self._events = events  # all earlier events are dispatched

    # ---- when a handler waits ----

    def _hand_over(self, task: trio.lowlevel.Task, context: Context) -> None:
        """Give this task to the handler that it began and that waits. Another task reads from now on.

        The event loop does not know yet that this task waits, so nothing may wake it. Dispatching an event
        could wake it. Hence the other task dispatches the remaining events.
        """
        task.context = context
        task.name = self._handlers.name_task(context)
        self._promote_follower()

    def _promote_follower(self) -> None:
        """Let the follower read, or a new task if there is no follower."""
        follower = self._turn.hand_over()
        if follower is not None:
            trio.lowlevel.reschedule(follower)
        else:
            assert self._nursery is not None
            # The task's context is a copy of the one that it is started in.
            self._handlers.new_context().run(self._nursery.start_soon, self.run, self._nursery)

    async def _sleep_until_end(self, task: trio.lowlevel.Task) -> None:
        """Keep a task in which a handler left a nursery open, until the connection ends.

        Trio crashes the nursery around a task that ends like this, and that nursery is the connection's.
        """
        for nursery in task.child_nurseries:
            nursery.cancel_scope.cancel()
        if not self.ended.has_happened:
            self._spoiled.append(task)
            await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
