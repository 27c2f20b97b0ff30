"""`Reader`: receives, and has done what arrives; a handler runs in the task that read its request.

Theory
======

Of a connection's tasks one reads at any time. It calls the handler of a request by itself, as far as
that goes without waiting for anything. Many a handler answers like that, and then no task was started
and none was woken for it. Where a handler does wait, the task is that handler's from then on, and
another reads in its place, which gives the rest of what was received a task each. Once its handler has
ended, a task waits for its turn to read again, if no other does. So each request that waits has a task of
its own, and nothing that one waits for keeps the connection from reading. This is the Leader/Followers
pattern (Schmidt et al., PLoP 2000), in which events are handled by the thread that received them.

One request after another takes 10 us less of 85, for both ends, where no task is started for it. Where
its handler waits, a task that waits for its turn saves 13 us of 92 beside a new one each time.

Likewise the cancel scope that a task reads in becomes that of a handler that waits, and serves again
afterwards if it was not cancelled: of 67 us this saves 8, and 11 of 80 where the handler waits.

What is queued while what was received is worked on leaves at its end, in one batch, or earlier where
it gets long: then the peer can begin with it.
"""

from __future__ import annotations

import contextvars
import logging
import math
from collections.abc import Callable, Coroutine, Generator, Iterator
from types import coroutine
from typing import TYPE_CHECKING, Any, Final, final

import trio

from ._errors import ProtocolError
from ._events import Event, Request
from ._handling import Handlers, HandlerScope
from ._nursery import keep
from ._sender import Sender
from ._session import Session
from ._watchdog import Watchdog

if TYPE_CHECKING:
    from ._connection import Connection

MAX_CALLS: Final = 200
"""Handlers called in one scope, about. Those that handlers leave open within it are found when it is left,
and so do not pile up."""

logger = logging.getLogger("bokbok_trio")


@final
class Reader:
    """Reads for one connection.

    Arguments:
        connection: for the log.
        session: what is received goes into it.
        sender: has the stream.
        watchdog: is told of what is received.
        handlers: get the requests.
        on_event: gets all other events.
        lose: is told why the connection is lost.
    """

    __slots__ = (
        "_connection",
        "_count",
        "_events",
        "_handlers",
        "_lose",
        "_next",
        "_nursery",
        "_on_event",
        "_reason",
        "_scope",
        "_sender",
        "_session",
        "_stopped",
        "_until",
        "_watchdog",
    )

    def __init__(
        self,
        connection: Connection,
        session: Session,
        sender: Sender,
        watchdog: Watchdog,
        handlers: Handlers,
        *,
        on_event: Callable[[Event], object],
        lose: Callable[[str], object],
    ) -> None:
        self._connection = connection
        self._session = session
        self._sender = sender
        self._watchdog = watchdog
        self._handlers = handlers
        self._on_event = on_event
        self._lose = lose
        self._nursery: trio.Nursery | None = None
        self._scope: HandlerScope | None = None  # of the task that reads
        self._next: tuple[trio.lowlevel.Task, HandlerScope] | None = None  # waits for its turn
        self._until = math.inf
        self._reason = ""  # why it is lost, when the task that reads ends
        self._stopped = False
        self._events: Iterator[Event] = iter(())  # what is left of what was received last
        self._count = 0  # of those that it had

    def start(self, nursery: trio.Nursery) -> None:
        """Read, in tasks of a nursery."""
        self._nursery = nursery
        self._start_task()

    def _start_task(self) -> None:
        """Let the task read that waits for its turn, or a new one."""
        if self._next is not None:
            (task, self._scope), self._next = self._next, None
            if self._until < math.inf:
                self._scope.cancel_scope.deadline = self._until
            trio.lowlevel.reschedule(task)
            return
        assert self._nursery is not None
        self._scope = HandlerScope(self._handlers, self._until)
        self._nursery.start_soon(self._run, self._scope)

    def stop(self) -> None:
        """Read no more, and do nothing more of what was received."""
        self._stopped = True
        self._events = iter(())
        if self._scope is not None:
            self._scope.cancel_scope.cancel()
        if self._next is not None:
            self._next[1].cancel_scope.cancel()

    def stop_at(self, moment: float, reason: str) -> None:
        """Read until then, by Trio's clock; then the connection is lost, for that reason."""
        self._until = moment
        self._reason = reason
        assert self._scope is not None
        self._scope.cancel_scope.deadline = moment

    async def _run(self, scope: HandlerScope) -> None:
        """Be the task that reads; and once a handler called here waits, that handler's; and so in turn."""
        task = trio.lowlevel.current_task()
        try:
            while True:
                with scope:
                    if self._scope is not scope:
                        await self._wait_for_turn(task, scope)
                    await self._read(task, scope)
                if self._scope is scope and scope.cancel_scope.cancelled_caught:
                    self._lose(self._reason)
                if self._stopped or task.child_nurseries:
                    return
                if self._scope is scope:
                    scope = self._scope = HandlerScope(self._handlers, self._until)
                elif self._next is None:
                    scope = HandlerScope(self._handlers)
                else:
                    return
        except ProtocolError as exc:
            self._lose(f"the peer broke the protocol: {exc}")
            logger.warning("%r: the peer broke the protocol: %s", self._connection, exc)
        except BaseException as exc:  # noqa: BLE001  (what is not kept is raised on)
            keep(exc, lambda error: self._lose(f"receiving failed: {error}"))

    async def _read(self, task: trio.lowlevel.Task, scope: HandlerScope) -> None:
        """Read in turns, and have done what comes, for as long as there is more, and this scope serves."""
        alone = trio.current_effective_deadline()
        calls = 0
        self._hand_out()
        while True:
            request = self._do_events()
            if request is not None:
                calls += 1
                call = self._handlers.accept(request, scope)
                has_waited = call is not None and await _watch(call, self._step_aside)
                if task.child_nurseries:  # which the handler left open, and this task must end for it
                    if not has_waited:
                        self._step_aside()
                    return
                if request.timeout < math.inf:
                    scope.cancel_scope.deadline = math.inf if has_waited else self._until
                del request, call  # or they would be kept for as long as this waits
                if has_waited:
                    # It may be cancelled too late for the handler, or that left a scope with a deadline open.
                    is_spoilt = calls >= MAX_CALLS or trio.current_effective_deadline() != alone
                    if is_spoilt or self._next is not None or self._stopped:
                        return
                    await self._wait_for_turn(task, scope)
                    self._hand_out()
                continue
            self._sender.end_batch(self._count)
            if calls >= MAX_CALLS:
                return
            data = await self._sender.wire.receive()
            if not data or self._stopped:
                cut = self._session.is_mid_packet
                self._lose("the peer cut a packet short" if cut else "the peer closed the connection")
                return
            self._watchdog.heard()
            self._sender.begin_batch()
            self._count = 0
            self._events = self._session.receive(data)
            del data  # or a handler's task would keep it for as long as that waits

    async def _wait_for_turn(self, task: trio.lowlevel.Task, scope: HandlerScope) -> None:
        """Wait until the task that reads now steps aside."""

        def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
            self._next = None
            return trio.lowlevel.Abort.SUCCEEDED

        self._next = (task, scope)
        await trio.lowlevel.wait_task_rescheduled(abort)

    def _do_events(self) -> Request | None:
        for event in self._events:
            self._count += 1
            if type(event) is Request:
                return event
            self._on_event(event)
        return None

    def _step_aside(self) -> None:
        """A handler called here waits: let another task read.

        Nothing may be done here that could wake this task, as the event loop does not know yet that it
        waits. So the rest of what was received is left to that other task.
        """
        if not self._stopped:
            self._session.keep()
            self._sender.end_batch(self._count, wake_writers=False)
            self._start_task()

    def _hand_out(self) -> None:
        """Start a task for each request that the task before this one left.

        Called here, each of them that waits would be a turn of the event loop later than the one before.
        """
        assert self._nursery is not None
        told = self._count
        while (request := self._do_events()) is not None:
            scope = HandlerScope(self._handlers)
            call = self._handlers.accept(request, scope)
            if call is not None:
                self._nursery.start_soon(_run_in, scope, call)
        if self._count == told:
            self._count = 0  # nothing was left, and the sender is not to be told of the same twice


async def _run_in(scope: HandlerScope, call: Coroutine[Any, Any, None]) -> None:
    with scope:
        await call


@coroutine
def _watch(work: Coroutine[Any, Any, None], on_wait: Callable[[], object]) -> Generator[Any, Any, bool]:
    """Await some work, and call a function when it waits for the first time. Returns whether it did.

    The work has context variables of its own, as a task has.
    """
    run = contextvars.copy_context().run
    step: Callable[[Any], Any] = work.send
    value: Any = None
    has_waited = False
    while True:
        try:
            message = run(step, value)
        except StopIteration:
            return has_waited
        finally:
            del value  # or what it waited for last would be kept for as long as it waits next
        if not has_waited:
            has_waited = True
            on_wait()
        try:
            step, value = work.send, (yield message)
        except BaseException as exc:  # noqa: BLE001  (it is for the work)
            step, value = work.throw, exc
