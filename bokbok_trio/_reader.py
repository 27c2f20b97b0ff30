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

A task that makes one request after another reads, too. What the reader would do between an answer and
the next request costs more than all else then: wait for the socket, and leave the asker to the next turn of
the event loop. So once a few answers came one at a time, the task that reads *lends* its turn to the asker
whose answer it has, and that gives it back at once; but if it asks again before the other has come to run, it
keeps the turn, reads, and is answered in its own task. What else arrives is left to the task that lent it.
This saves 9 us of 142 with free cores. A handler called here that asks the peer reads for itself as well,
as its task is the one that reads: 8 us of 128 that a call back takes both ends in one process.

What is queued while what was received is worked on leaves at its end, in one batch, or earlier where
it gets long: then the peer can begin with it.
"""

from __future__ import annotations

import contextvars
import logging
import math
import threading
from collections.abc import Callable, Coroutine, Generator, Iterator
from enum import Enum, auto
from itertools import chain
from types import coroutine
from typing import TYPE_CHECKING, Any, Final, final

import trio

from ._errors import BokbokError, ProtocolError
from ._events import Event, Request
from ._handling import Handlers, HandlerScope
from ._nursery import keep
from ._packets import Received
from ._sender import Sender
from ._session import Session
from ._watchdog import Watchdog

if TYPE_CHECKING:
    from ._connection import Connection

MAX_CALLS: Final = 200
"""Handlers called in one scope, about. Those that handlers leave open within it are found when it is left,
and so do not pile up."""

LONE_ANSWERS: Final = 3
"""Answers that came one at a time, after which the next one's asker is lent the turn to read."""

MAX_LEADERS: Final = 4
"""Askers that read by themselves at once, in one event loop. Where more would, it is busy, and nobody waits
for its next turn: with no such bound, 1,000 connections made a quarter fewer requests in two runs."""


class _Leaders(threading.local):
    """How many there are, of all connections of a thread, and so of an event loop."""

    count = 0


_leaders = _Leaders()

logger = logging.getLogger("bokbok_trio")


@final
class Turn(Enum):
    """To read, and to have done what arrives. It is one task's at any time."""

    HELD = auto()
    """The task that reads has it, or was told to take it, to do first what is left of what was received."""

    LENT = auto()
    """An asker has it, which reads, or is about to give it back. The task that has lent it waits."""

    VACANT = auto()
    """It was given back, and the task that has lent it has not run yet: an asker may take it."""

    DUE = auto()
    """As `VACANT`, but something was received that is left to that task."""


@final
class Reader:
    """Reads for one connection.

    Arguments:
        connection: for the log.
        session: what is received goes into it.
        sender: has the stream.
        watchdog: is told of what is received.
        handlers: get the requests.
        on_event: gets all other events; returns whether it has woken a task that may call `give_back`.
        lose: is told why the connection is lost.
    """

    __slots__ = (
        "_connection",
        "_count",
        "_events",
        "_handlers",
        "_has_woken",
        "_is_calling",
        "_leader",
        "_lend_after",
        "_lone_answers",
        "_lose",
        "_next",
        "_nursery",
        "_on_event",
        "_reason",
        "_scope",
        "_sender",
        "_session",
        "_stopped",
        "_turn",
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
        on_event: Callable[[Event], bool],
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
        self._turn = Turn.HELD
        self._scope: HandlerScope | None = None  # of the task that has the turn, or has lent it
        self._next: tuple[trio.lowlevel.Task, HandlerScope] | None = None  # waits for its turn
        self._leader: Waiter | None = None  # the asker that reads
        self._is_calling = False  # a handler, from the task that reads, at this very moment
        self._until = math.inf
        self._reason = ""  # why it is lost, when the task that reads ends
        self._stopped = False
        self._events: Iterator[Event] = iter(())  # what is left of what was received last
        self._count = 0  # of those that it had
        self._has_woken = False  # the last one of them an asker
        self._lone_answers = 0  # in a row, while nothing was lent
        self._lend_after = LONE_ANSWERS if sender.wire.can_stop_receiving else math.inf

    def start(self, nursery: trio.Nursery) -> None:
        """Read, in tasks of a nursery."""
        self._nursery = nursery
        self._start_task()

    def _start_task(self) -> None:
        """Give the turn to the task that waits for it, or to a new one."""
        if self._next is not None:
            task = self._give_to_next()
            self._next = None
            trio.lowlevel.reschedule(task)
            return
        assert self._nursery is not None
        self._scope = HandlerScope(self._handlers, self._until)
        self._nursery.start_soon(self._run, self._scope)

    def _give_to_next(self) -> trio.lowlevel.Task:
        assert self._next is not None
        task, self._scope = self._next
        if self._until < math.inf:
            self._scope.cancel_scope.deadline = self._until
        return task

    def stop(self) -> None:
        """Read no more, and do nothing more of what was received."""
        self._stopped = True
        self._events = iter(())
        if self._scope is not None:
            self._scope.cancel_scope.cancel()
        if self._next is not None:
            self._next[1].cancel_scope.cancel()
        if self._next is not None:  # behind a shield that a handler left there
            self._start_task()
        if self._leader is not None:
            self._sender.wire.stop_receiving()  # a handler that reads is cancelled

    def stop_at(self, moment: float, reason: str) -> None:
        """Read until then, by Trio's clock; then the connection is lost, for that reason."""
        self._until = moment
        self._reason = reason
        assert self._scope is not None
        within = self._scope.cancel_scope
        within.deadline = min(within.deadline, moment)

    async def _run(self, scope: HandlerScope) -> None:
        """Be the task that reads; and once a handler called here waits, that handler's; and so in turn."""
        task = trio.lowlevel.current_task()
        try:
            while True:
                with scope:
                    if self._scope is scope and self._leader is None:
                        self._turn = Turn.HELD
                    elif not await self._wait_for_turn(task, scope):
                        return
                    await self._read(task, scope)
                if self._scope is scope and trio.current_time() >= self._until:
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
            if request is None:
                self._note_lone_answer()
                self._sender.end_batch(self._count)
                self._count = 0
                if calls >= MAX_CALLS or not await self._receive(task, scope):
                    return
                continue
            calls += 1
            self._is_calling = True
            try:
                call = self._handlers.accept(request, scope)
                has_waited = call is not None and await _watch(call, self._step_aside)
            finally:
                self._is_calling = False
            is_aside = self._scope is not scope
            if task.child_nurseries:  # which the handler left open, and this task must end for it
                if not is_aside:
                    self._step_aside()
                return
            if request.timeout < math.inf:
                scope.cancel_scope.deadline = self._until
            del request, call  # or they would be kept for as long as this waits
            # It may be cancelled too late for the handler, or that left a scope with a deadline open.
            if has_waited and (calls >= MAX_CALLS or trio.current_effective_deadline() != alone):
                return
            if is_aside:
                if self._stopped or not await self._wait_for_turn(task, scope):
                    return
                self._hand_out()

    async def _receive(self, task: trio.lowlevel.Task, scope: HandlerScope) -> bool:
        """Receive more, or lend the turn to do so, and get it back; whether this task is to go on."""
        if self._lone_answers >= self._lend_after and _leaders.count < MAX_LEADERS:
            self._lone_answers = 0
            self._turn = Turn.LENT
            return await self._wait_for_turn(task, scope)
        data = await self._sender.wire.receive()
        if not data or self._stopped:
            cut = self._session.is_mid_packet
            self._lose("the peer cut a packet short" if cut else "the peer closed the connection")
            return False
        self._take_in(data)
        return True

    async def _wait_for_turn(self, task: trio.lowlevel.Task, scope: HandlerScope) -> bool:
        """Wait until whoever reads now steps aside, or gives the turn back; whether this task has it now.

        If not, it is to end: another waits already, and gets the turn also where this one has lent it.
        """

        def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
            self._next = None
            return trio.lowlevel.Abort.SUCCEEDED

        while self._next is None:
            self._next = (task, scope)
            await trio.lowlevel.wait_task_rescheduled(abort)
            if self._stopped:
                return False
            if self._leader is None:
                self._turn = Turn.HELD
                return True
            self._turn = Turn.LENT
        if self._turn is Turn.LENT:
            self._give_to_next()
        return False

    def _take_in(self, data: Received | bytearray) -> None:
        self._watchdog.heard()
        self._sender.begin_batch()
        self._count = 0
        self._has_woken = False
        self._events = self._session.receive(data)

    def _do_events(self) -> Request | None:
        for event in self._events:
            self._count += 1
            if type(event) is Request:
                return event
            self._has_woken = self._on_event(event)
        return None

    def _note_lone_answer(self) -> None:
        if self._count:
            is_lone = self._count == 1 and self._has_woken
            self._lone_answers = self._lone_answers + 1 if is_lone else 0

    def _step_aside(self) -> bool:
        """A handler called here waits: let another task read, unless it does so itself. Returns which.

        Nothing may be done here that could wake this task, as the event loop does not know yet that it
        waits. So the rest of what was received is left to that other task.
        """
        self._is_calling = False
        if self._leader is not None:
            return False
        if not self._stopped:
            self._session.keep()
            self._sender.end_batch(self._count, wake_writers=False)
            self._start_task()
        return True

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

    # ---- for askers ----

    @property
    def may_lead(self) -> bool:
        """Whether who makes a request now may `lead`."""
        is_lent = self._turn is Turn.VACANT and _leaders.count < MAX_LEADERS
        return (is_lent or self._is_calling) and self._leader is None

    def give_back(self) -> None:
        """An asker was woken: if the turn to read was lent to it, let the task that lent it have it back."""
        if self._turn is Turn.LENT and self._leader is None and self._next is not None:
            self._start_task()
            self._turn = Turn.VACANT

    async def lead(self, asker: Waiter) -> None:
        """Read until an asker is answered, or something comes that is not for askers.

        That, and what goes wrong, is left to the task whose turn it is. To be cancelled is the asker's alone.
        """
        is_handler = self._is_calling  # whose turn it is
        is_done = True  # all that was received
        self._leader = asker
        asker.reads = True
        _leaders.count += 1
        try:
            if is_handler:
                is_done = self._finish_batch()
            while is_done and asker.outcome is None:
                data = await self._sender.wire.receive()
                if self._stopped:
                    await trio.lowlevel.checkpoint_if_cancelled()  # which is how a handler is to end
                if not data or self._stopped:
                    break
                self._take_in(data)
                del data
                is_done = self._finish_batch()
        except Exception as exc:  # noqa: BLE001  (it is raised on, elsewhere)
            is_done = False
            if not self._stopped:
                self._events = _raise(exc)
        finally:
            asker.reads = False
            self._leader = None
            _leaders.count -= 1
            if is_handler:
                self._is_calling = True
            else:
                self._lone_answers = LONE_ANSWERS - 1  # so that the next one will do
                self.give_back()
                if not is_done:
                    self._leave()

    def _leave(self) -> None:
        """Leave what was received to the task that was woken."""
        self._turn = Turn.DUE
        self._session.keep()
        self._sender.end_batch(self._count)

    def _finish_batch(self) -> bool:
        """Do the rest of what was received, up to a request; whether there was none."""
        request = self._do_events()
        if request is not None:
            self._events = chain((request,), self._events)
            self._count -= 1
            return False
        self._sender.end_batch(self._count)
        self._count = 0
        return True


@final
class Waiter:
    """A task that waits for the answer to a request, and what it is woken with.

    Attributes:
        reads: whether it reads by itself, and so is awake.
    """

    __slots__ = ("outcome", "reads", "task")

    def __init__(self) -> None:
        self.task = trio.lowlevel.current_task()
        self.outcome: list[bytes] | BokbokError | None = None
        self.reads = False

    def wake(self, outcome: list[bytes] | BokbokError) -> None:
        """Let the task go on with that."""
        self.outcome = outcome
        if not self.reads:
            trio.lowlevel.reschedule(self.task)


def _raise(exc: Exception) -> Iterator[Event]:
    raise exc
    yield


async def _run_in(scope: HandlerScope, call: Coroutine[Any, Any, None]) -> None:
    with scope:
        await call


@coroutine
def _watch(work: Coroutine[Any, Any, None], on_wait: Callable[[], bool]) -> Generator[Any, Any, bool]:
    """Await some work. When it waits, call a function, until that returns true. Returns whether it waited.

    The work has context variables of its own, as a task has.
    """
    run = contextvars.copy_context().run
    step: Callable[[Any], Any] = work.send
    value: Any = None
    has_waited = is_told = False
    while True:
        try:
            message = run(step, value)
        except StopIteration:
            return has_waited
        finally:
            del value  # or what it waited for last would be kept for as long as it waits next
        has_waited = True
        is_told = is_told or on_wait()
        try:
            step, value = work.send, (yield message)
        except BaseException as exc:  # noqa: BLE001  (it is for the work)
            step, value = work.throw, exc
