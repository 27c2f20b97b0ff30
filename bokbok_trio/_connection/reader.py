"""`Reader`: receives, decodes, dispatches; a handler begins in the task that read its request.

One task reads; `ReadTurn` says which. It decodes what a receive brought, then dispatches the events one
after another, and begins the handler of each request by itself (see `eager`). Where a receive brought very
many packets, it does so with some of them after others, and between these other tasks have their turn: so
whoever sends a stream of tiny packets holds up nobody else. Many a handler
answers without waiting for anything, and then no task was started and none was woken for it. Where a
handler waits, another task goes on reading: it starts a task for each request that is left of the last
receive, and dispatches the other events.

Nothing cancels a receive but the end of the connection. When this side has said that it is done, the reader
goes on receiving, and drops everything, until the peer has said so too.

What handlers queue while events are dispatched leaves at the end of them, in one batch, or earlier where it
gets long: then the peer can begin with it.

Each task that reads has a cancel scope, which its handlers share until one of them waits. A handler that
leaves a scope or a nursery of its own open spoils the task that it ran in: the task ends, or, as Trio would
crash the nursery around it, sleeps until the connection ends.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from contextvars import Context
from functools import partial
from typing import Final, final

import trio

from .._errors import ProtocolError
from .._protocol.events import Event, Request
from .._protocol.packets import Buffer
from .._protocol.session import Session
from .._trio_util import LazyEvent, describe_error, keep
from .eager import start_eagerly
from .handlers import Handlers, HandlerScope
from .read_turn import ReadTurn
from .sender import Sender
from .watchdog import Watchdog

STREAM_ERRORS: Final = (trio.BrokenResourceError, trio.ClosedResourceError, OSError)
"""How a stream says that it is broken. Anything else that it raises is a defect, ours or its own."""

_NAME: Final = "bokbok_trio reader"

logger = logging.getLogger("bokbok_trio")


@final
class Reader:
    """Reads for one connection.

    Arguments:
        receive: receives from the stream what is there; good until the next checkpoint.
        session: decodes it.
        sender: is told when events are dispatched, and when all of them are.
        watchdog: is told when something was received.
        handlers: get the requests.
        on_event: gets all other events.
        on_protocol_error: is told how the peer broke the protocol.
        lose: is told why the connection is lost, and by which error.

    Attributes:
        ended: set when nothing more is received.
    """

    __slots__ = (
        "_count",
        "_events",
        "_handlers",
        "_is_discarding",
        "_lose",
        "_nursery",
        "_on_event",
        "_on_protocol_error",
        "_receive",
        "_scope",
        "_sender",
        "_session",
        "_spoiled",
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
        on_event: Callable[[Event], object],
        on_protocol_error: Callable[[ProtocolError], object],
        lose: Callable[[str, BaseException | None], object],
    ) -> None:
        self._receive = receive
        self._session = session
        self._sender = sender
        self._watchdog = watchdog
        self._handlers = handlers
        self._on_event = on_event
        self._on_protocol_error = on_protocol_error
        self._lose = lose
        self._nursery: trio.Nursery | None = None
        self._turn: ReadTurn[trio.lowlevel.Task] = ReadTurn()
        self._scope: HandlerScope | None = None  # of the task that reads
        self._spoiled: list[trio.lowlevel.Task] = []  # tasks that sleep until the end
        self._events: list[Event] = []  # decoded, and not dispatched; the next one is the last
        self._count = 0  # of the events of the last receive
        self._is_discarding = False
        self.ended = LazyEvent()

    def start(self, nursery: trio.Nursery) -> None:
        """Read, in tasks of a nursery."""
        self._nursery = nursery
        self._start_task()

    def _start_task(self) -> None:
        assert self._nursery is not None
        # The task's context is a copy of the one that it is started in.
        self._handlers.new_context().run(partial(self._nursery.start_soon, self.run, name=_NAME))

    def discard(self) -> None:
        """Dispatch nothing more; go on receiving, and drop everything, until the peer's end."""
        self._is_discarding = True
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
        """Be the task that reads; then that of a handler that waits; then the follower; and so on."""
        task = trio.lowlevel.current_task()
        self._turn.begin(task)
        try:
            while await self._take_turn(task):
                scope = HandlerScope(self._handlers)
                with scope:
                    await self._read(task, scope)
                if scope.is_spoiled or task.child_nurseries:
                    break
        except BaseException as exc:  # noqa: BLE001  (what is not kept is raised on)
            keep(exc, self._on_defect)
        finally:
            self._turn.leave(task)
            if self._turn.reader is task:
                self.ended.set()
        if task.child_nurseries:
            await self._sleep_until_end(task)

    def _on_defect(self, error: BaseException) -> None:
        logger.error("a defect of bokbok_trio ends a connection", exc_info=error)
        self._lose(f"internal error: {describe_error(error)}", error)

    async def _take_turn(self, task: trio.lowlevel.Task) -> bool:
        """Wait for the turn to read. False: the task ends, as another waits already, or all is over."""

        def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
            self._turn.leave(task)
            return trio.lowlevel.Abort.SUCCEEDED

        if self._turn.reader is not task:
            if self.ended.is_set() or not self._turn.follow(task):
                return False
            task.context = self._handlers.new_context()  # it was a handler's, as was the name
            task.name = _NAME
            await trio.lowlevel.wait_task_rescheduled(abort)
        return not self.ended.is_set()

    async def _read(self, task: trio.lowlevel.Task, scope: HandlerScope) -> None:
        """Dispatch and receive in turn, while the task has the turn to read and its scope is good."""
        self._scope = scope
        self._start_tasks_for_rest()
        while not self.ended.is_set():
            request = self._dispatch()
            if request is None:
                self._end_batch()
                await self._receive_more()
                continue
            call = self._handlers.accept(request, scope)
            if call is None:
                continue
            has_deadline = request.timeout < math.inf
            work, context = call
            has_waited = await start_eagerly(work, context, partial(self._hand_over, task, context))
            del request, call, work, context  # or they would be kept while this receives
            # Most handlers wait for nothing, and leave nothing to be done.
            if (has_waited or has_deadline or scope.is_spoiled or self._is_discarding) and (
                not await self._go_on(task, scope, has_waited=has_waited)
            ):
                return

    async def _go_on(self, task: trio.lowlevel.Task, scope: HandlerScope, *, has_waited: bool) -> bool:
        """A handler has ended: wait for the turn, if it has waited. Returns whether to read in that scope."""
        if scope.is_spoiled:
            if self._turn.reader is task:
                self._promote()
            return False
        scope.cancel_scope.deadline = math.inf
        if scope.cancel_scope.cancel_called:
            return False
        if has_waited:
            if not await self._take_turn(task):
                return False
            self._scope = scope
            self._start_tasks_for_rest()
        return True

    def _end_batch(self) -> None:
        """Everything that was received is dispatched."""
        if self._session.error is not None and not self._is_discarding:
            self._on_protocol_error(self._session.error)
        self._sender.end_batch(self._count)
        self._count = 0

    def _dispatch(self) -> Request | None:
        """Dispatch the events up to the next request, and return that."""
        events = self._events
        while events:
            event = events.pop()
            if type(event) is Request:
                return event
            self._on_event(event)
        return None

    def _start_tasks_for_rest(self) -> None:
        """Dispatch what the task before this one left, with a task for each request.

        Begun here, each of them that waits would be a turn of the event loop later than the one before.
        """
        assert self._nursery is not None
        while (request := self._dispatch()) is not None:
            self._handlers.start_task(self._nursery, request, self._sleep_until_end)

    async def _receive_more(self) -> None:
        if self._session.has_undecoded and not self._is_discarding:
            await trio.lowlevel.checkpoint()  # other connections have their turn
            self._decode(b"")
            return
        try:
            data = await self._receive()
        except Exception as exc:
            if not isinstance(exc, STREAM_ERRORS) and not self._is_discarding:
                logger.error("a stream raised an error that streams do not raise", exc_info=exc)
            self.ended.set()
            self._lose(f"receiving failed: {describe_error(exc)}", exc)
            return
        if not data:
            self.ended.set()
            text = "the peer closed the connection"
            if self._session.is_mid_packet:
                text = "the peer cut a packet short"
            elif self._session.peer_drains:
                text += ", which it was draining, as a server does that stops"
            self._lose(text, None)
        else:
            self._watchdog.heard()
            self._decode(data)

    def _decode(self, data: Buffer | bytearray) -> None:
        if not self._is_discarding:
            self._sender.begin_batch()
            events = self._session.receive(data)
            self._count = len(events)
            events.reverse()
            self._events = events  # all of those before are dispatched

    # ---- where a handler waits ----

    def _hand_over(self, task: trio.lowlevel.Task, context: Context) -> None:
        """A handler begun here waits: the task is the handler's, and another reads.

        The event loop does not know yet that this task waits, so nothing may wake it. Hence the other task
        dispatches the events that are left.
        """
        task.context = context
        task.name = self._handlers.name_task(context)
        self._promote()

    def _promote(self) -> None:
        """Let the follower read, or a new task where there is none."""
        follower = self._turn.hand_over()
        if follower is not None:
            trio.lowlevel.reschedule(follower)
        else:
            self._start_task()

    async def _sleep_until_end(self, task: trio.lowlevel.Task) -> None:
        """Let a task that a handler left a nursery open in end with the connection.

        Trio crashes the nursery around a task that ends like this, which is the connection's.
        """
        for nursery in task.child_nurseries:
            nursery.cancel_scope.cancel()
        if not self.ended.is_set():
            self._spoiled.append(task)
            await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
