"""The requests of the peer: the user's handler for each, and its one answer.

Each handler runs in a cancel scope. While the handler waits, the scope cancels nothing else.

Whatever a handler does, its request is answered once: `Handlers._answer` makes an answer of its fields, and
`Handlers._fail` of its error; `Handlers.on_scope_exited` answers for a handler that was cancelled. Its task
raises nothing into the connection's nursery but exceptions that end the program (see `_trio_util`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context, copy_context
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeAlias, final

import trio

from .._errors import MessageTooLarge, RequestError
from .._protocol.events import Cancel, Request
from .._protocol.session import Session
from .._trio_util import (
    LazyEvent,
    call_user,
    call_user_sync,
    find_single,
    innermost_scope,
    isolate_failures,
    log_or_reraise,
)
from .._types import ChannelHandler, ConnectionHandler, Fields, RequestHandler
from .calls import DRAINING_MESSAGE
from .channel import Channel, Channels
from .current import CURRENT, CurrentRequest
from .ending import Ending, refer_up

if TYPE_CHECKING:
    from .._types import CombinedHandler, Connection
    from ..instruments import RequestOutcome
    from .observer import Observer

_AnyHandler: TypeAlias = Callable[..., Awaitable["Fields | None"]]

AddedHandlers: TypeAlias = "dict[bytes, CombinedHandler]"
"""The handlers that `add_handler` has added, by the first field of their requests."""

LEFT_OPEN: Final = "the handler left a cancel scope or a nursery open; enter them by `with` and `async with`"

logger = logging.getLogger("bokbok_trio")


@final
class HandlerScope:
    """A cancel scope in which handlers run one after another, until one of them waits.

    From then on the scope belongs to that handler alone, so cancelling it affects no other. Handlers that
    never wait share one scope and need none of their own.

    Arguments:
        handlers: the connection's.

    Attributes:
        cancel_scope: Trio's.
        handler: the handler that ran last.
        id: the id of its request.
        innermost: what `innermost_scope` returns while this is the innermost scope of its task.
        is_spoiled: whether a handler has left a scope or a nursery open within it.
    """

    __slots__ = ("_handlers", "cancel_scope", "handler", "id", "innermost", "is_spoiled")

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers
        self.cancel_scope = trio.CancelScope()
        self.handler: _AnyHandler | None = None
        self.id = -1
        self.innermost: object = None
        self.is_spoiled = False

    def __enter__(self) -> None:
        self.cancel_scope.__enter__()
        self.innermost = innermost_scope(trio.lowlevel.current_task())

    def __exit__(
        self,
        type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        try:
            is_caught = self.cancel_scope.__exit__(type, exc, traceback)
        except RuntimeError:  # a handler left a scope open, and Trio has left it
            self.is_spoiled = True
            self._handlers.on_scope_exited(self)
            return exc is None or isinstance(exc, trio.Cancelled)
        finally:
            del exc, traceback  # or the frames of a cancelled handler would live on in a cycle
        self._handlers.on_scope_exited(self)
        return is_caught


@final
class Handlers:
    """The handlers that run, by the ids of their requests.

    Arguments:
        connection: given to the handlers.
        session: queues their answers.
        channels: has the channels of their requests.
        request_handler, channel_handler: the user's.
        describe_error: as in `Settings`.
        packet_queued: `Sender.packet_queued`.
        answer_queued: `Sender.interactive_queued`.
        observer: reports them; None if there are no instruments.
        ending: the connection's.

    Attributes:
        ready: set once handlers of depth 0 may begin.
        added: the handlers of requests with a certain first field; see `add_handler`.
    """

    __slots__ = (
        "_answer_queued",
        "_channel_handler",
        "_channels",
        "_connection",
        "_context",
        "_describe_error",
        "_ending",
        "_observer",
        "_opening",
        "_packet_queued",
        "_request_handler",
        "_scopes",
        "_session",
        "_waiting",
        "added",
        "ready",
    )

    def __init__(
        self,
        connection: Connection,
        session: Session,
        channels: Channels,
        *,
        request_handler: RequestHandler | None,
        channel_handler: ChannelHandler | None,
        describe_error: Callable[[BaseException], str] | None,
        packet_queued: Callable[[], object],
        answer_queued: Callable[[], object],
        observer: Observer | None,
        ending: Ending,
    ) -> None:
        self._connection = refer_up(connection)
        self._session = session
        self._channels = channels
        self._request_handler = request_handler
        self._channel_handler = channel_handler
        self._describe_error = describe_error
        self._packet_queued = packet_queued
        self._answer_queued = answer_queued
        self._observer = observer
        self._ending = ending
        self._opening: trio.CancelScope | None = None  # of the open handler
        self._context = copy_context()  # only copied: a context cannot be entered twice
        self._scopes: dict[int, HandlerScope] = {}
        self.ready = LazyEvent()
        self.added: AddedHandlers = {}
        self._waiting: dict[trio.Event, None] = {}  # of handlers that wait to begin

    def __len__(self) -> int:
        return len(self._scopes)

    @property
    def ids(self) -> list[int]:
        """The ids of the requests whose handlers run."""
        return list(self._scopes)

    def accept(
        self, request: Request, scope: HandlerScope
    ) -> tuple[Coroutine[Any, Any, None], Context] | None:
        """Return a coroutine that handles a request, and the context to run it in. Run it in `scope`.

        None: the request was refused, and the error is queued.
        """
        handler: _AnyHandler | None = self._channel_handler if request.has_channel else self._request_handler
        if self.added and request.fields and request.fields[0] in self.added:
            added = self.added[request.fields[0]]
            handler = added.handle_channel if request.has_channel else added.handle_request
        if self._session.is_draining and not request.depth:
            self._session.fail(request.id, "closing", DRAINING_MESSAGE)
        elif handler is None:
            kind = "channel" if request.has_channel else "request"
            code = "no-channel" if request.has_channel else "no-handler"
            self._session.fail(request.id, code, f"this side handles no {kind}s")
        else:
            deadline = math.inf
            if request.timeout < math.inf:
                deadline = trio.current_time() + request.timeout
                scope.cancel_scope.deadline = min(scope.cancel_scope.deadline, deadline)
            channel = self._channels.take(request.id) if request.has_channel else None
            scope.id = request.id
            scope.handler = handler
            self._scopes[request.id] = scope
            context = self._context.copy()
            current = CurrentRequest(self._connection(), request, deadline)
            context.run(CURRENT.set, current)
            if self._observer is not None:
                self._observer.tell_received(request, deadline, context)
            return self._handle(request, channel, scope, current), context
        return None

    def start(self, nursery: trio.Nursery, open_handler: ConnectionHandler | None) -> None:
        """Allow handlers to begin, now or when the open handler has returned."""
        if open_handler is None:
            self.ready.set()
        elif not self._ending.is_over:  # it may be, before this task has begun
            self._opening = trio.CancelScope()  # now, as the connection may be over before that task runs
            nursery.start_soon(self._open, open_handler, self._opening)

    @trio.lowlevel.enable_ki_protection
    async def _open(self, open_handler: ConnectionHandler, scope: trio.CancelScope) -> None:
        """Run the open handler. If it does not return, the connection is over."""
        try:
            with scope, isolate_failures(partial(self._log, "the open handler failed")):
                await call_user(open_handler, self._connection())
                self.ready.set()
                self._packet_queued()  # a drained connection ends now
        finally:
            if not self.ready.has_happened:
                self._ending.close("the open handler failed")

    async def end(self, close_handler: ConnectionHandler | None) -> None:
        """Run the close handler, after all other handlers, and only if the open handler has returned."""
        if self.ready.has_happened and close_handler is not None:
            with isolate_failures(partial(self._log, "the close handler failed")):
                # If the connection was cancelled from outside, the close handler is too.
                await call_user(close_handler, self._connection())

    def name_task(self, context: Context) -> str:
        """Return the name of a handler's task, for debuggers."""
        request = context[CURRENT]
        handler = self._scopes[request.id].handler
        name = getattr(handler, "__qualname__", type(handler).__qualname__)
        return f"{name} (request {request.id})"

    def start_task(
        self,
        nursery: trio.Nursery,
        request: Request,
        sleep_until_end: Callable[[trio.lowlevel.Task], Awaitable[None]],
    ) -> None:
        """Handle a request in a task of its own from the beginning.

        Arguments:
            nursery: gets the task.
            request: the request.
            sleep_until_end: called at the end of the task if its handler left a nursery open.
        """
        scope = HandlerScope(self)
        call = self.accept(request, scope)
        if call is not None:
            # The task's context is a copy of the one that it is started in.
            work, context = call
            run = partial(_run_in, scope, work, sleep_until_end)
            context.run(partial(nursery.start_soon, run, name=self.name_task(context)))

    def new_context(self) -> Context:
        """Return a context for a task that handles nothing yet."""
        return self._context.copy()

    def on_scope_exited(self, scope: HandlerScope) -> None:
        """Answer a request whose handler has ended because it was cancelled."""
        if self._scopes.get(scope.id) is not scope:
            return
        within = scope.cancel_scope
        if within.cancelled_caught or (scope.is_spoiled and within.cancel_called):
            if trio.current_time() >= within.deadline:
                error = RequestError("the deadline of the request has passed", "timeout")
                self._fail(scope.id, error, "timeout")
            else:
                self._fail(scope.id, RequestError("the handler was cancelled", "cancelled"), "cancelled")
        else:  # cancelled from outside, with the connection: send no answer
            self._note_end(scope.id, "lost")
        self._answer_queued()

    def on_cancel(self, event: Cancel) -> None:
        """Cancel a handler whose answer the peer no longer wants. If the handler has ended, do nothing."""
        scope = self._scopes.get(event.id)
        if scope is not None:
            self._session.drop_items(event.id)
            scope.cancel_scope.cancel()
            self._channels.on_cancel(event.id)

    def cancel_all(self) -> None:
        """Cancel all handlers, because the connection is over."""
        if self._opening is not None:
            self._opening.cancel()
        for scope in list(self._scopes.values()):
            scope.cancel_scope.cancel()

    async def _handle(
        self, request: Request, channel: Channel | None, scope: HandlerScope, current: CurrentRequest
    ) -> None:
        """Handle a request and queue its one answer, unless it is cancelled."""
        task = trio.lowlevel.current_task()
        try:
            assert scope.handler is not None
            if channel is not None:
                fields = await self._use_channel(scope.handler, request, channel, current)
            else:
                if not (request.depth or (self.ready.has_happened and self._session.has_room_for_answers)):
                    await self._wait_to_begin(request.id)
                fields = await call_user(scope.handler, current.connection, request.fields)
            if task.child_nurseries or innermost_scope(task) is not scope.innermost:
                raise RuntimeError(LEFT_OPEN)
            self._answer(request.id, () if fields is None else fields)
        except BaseException as exc:  # noqa: BLE001  (`log_or_reraise` raises it on, if it ends the program)
            scope.is_spoiled = bool(task.child_nurseries) or innermost_scope(task) is not scope.innermost
            log_or_reraise(exc, partial(self._fail, request.id))
        finally:
            current._has_ended = True
            self._answer_queued()

    async def _wait_to_begin(self, id: int) -> None:
        """Wait for the open handler, and until the peer has read enough of earlier answers."""
        if self._observer is not None:
            self._observer.note_waiting(id)
        await self.ready.wait()
        while not self._session.has_room_for_answers:
            self._session.is_holding_back = True
            waiter = trio.Event()
            self._waiting[waiter] = None
            try:
                await waiter.wait()
            finally:
                self._waiting.pop(waiter, None)
        # The next handler checks after the first step of this one, which may take up the room.
        self.let_begin()
        if self._observer is not None:
            self._observer.note_begun(id)

    def let_begin(self) -> None:
        """Wake the first handler that waits, which checks whether it may begin."""
        if self._waiting:
            waiter = next(iter(self._waiting))
            del self._waiting[waiter]
            waiter.set()
        else:
            self._session.is_holding_back = False

    async def _use_channel(
        self, handler: ChannelHandler, request: Request, channel: Channel, current: CurrentRequest
    ) -> Fields | None:
        try:
            if not (request.depth or (self.ready.has_happened and self._session.has_room_for_answers)):
                await self._wait_to_begin(request.id)
            return await call_user(handler, current.connection, request.fields, channel)
        finally:
            channel._close(answered=True)  # before the answer is queued
            self._channels.remove(request.id)

    def _answer(self, id: int, fields: Fields) -> None:
        try:
            self._session.answer(id, fields)
        except MessageTooLarge as exc:
            logger.error("%r: the answer to request %d is too large: %s", self._connection(), id, exc)
            self._session.fail(id, "too-large", str(exc))
            self._note_end(id, "error", "too-large")
            return
        except (TypeError, ValueError) as exc:
            kind = ValueError if isinstance(exc, ValueError) else TypeError
            raise kind(f"the handler returned an invalid answer: {exc}") from exc
        self._note_end(id, "ok")

    def _note_end(self, id: int, outcome: RequestOutcome, code: str = "") -> None:
        """Forget a handler that has ended. Its answer is queued, if there is one."""
        del self._scopes[id]
        if self._observer is not None:
            self._observer.tell_handled(id, outcome, code)

    def _fail(self, id: int, error: BaseException, outcome: RequestOutcome = "error") -> None:
        """Queue the error for a request whose handler raised, or was stopped."""
        single = find_single(error)
        if isinstance(single, RequestError):
            code = single.code
            if not self._session.fail(id, code, single.message, single.details):
                logger.error(
                    "%r: request %d failed with %d bytes of details, which do not fit the agreed size",
                    self._connection(),
                    id,
                    len(single.details),
                )
        else:
            code = "handler-error"
            logger.error("%r: the handler of request %d failed", self._connection(), id, exc_info=error)
            self._session.fail(id, code, self._describe(single))
        self._note_end(id, outcome, code)

    def _describe(self, error: BaseException) -> str:
        text = type(error).__name__
        try:
            if self._describe_error is None:
                return f"{text}: {error}"
            return str(call_user_sync(self._describe_error, error))
        except BaseException as exc:  # noqa: BLE001  (as above)
            log_or_reraise(exc, partial(self._log, "describe_error failed"))
            return text

    def _log(self, what: str, error: BaseException) -> None:
        logger.error("%r: %s", self._connection(), what, exc_info=error)


@trio.lowlevel.enable_ki_protection
async def _run_in(
    scope: HandlerScope,
    work: Coroutine[Any, Any, None],
    sleep_until_end: Callable[[trio.lowlevel.Task], Awaitable[None]],
) -> None:
    task = trio.lowlevel.current_task()
    try:
        with scope:
            await work
    finally:
        if task.child_nurseries:
            await sleep_until_end(task)  # only the connection's end ends this
