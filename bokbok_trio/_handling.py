"""The requests of the peer's: the user's handler for each, in a cancel scope of its own, and its one answer.

Whatever a handler does, it is answered once, and its task raises into nobody's nursery (but for what
ends the program, see `_nursery`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias, final

import trio

from ._channel import Channel, Channels
from ._errors import MessageTooLarge, RequestError
from ._events import Request
from ._nursery import Once, keep
from ._packets import Field
from ._session import Session

if TYPE_CHECKING:
    from ._connection import Connection

RequestHandler: TypeAlias = "Callable[[Connection, list[bytes]], Awaitable[Sequence[Field] | None]]"
"""``async def handler(connection, request)``; returns the fields of the answer; None means none.

From when it first waits until it ends, a task is its own. Before that it runs in one that calls others
after it, with a copy of the context variables: so what belongs to a task, such as a `trio.Lock` taken by
`acquire_nowait`, must not outlast a handler that waits for nothing.
"""

ChannelHandler: TypeAlias = "Callable[[Connection, list[bytes], Channel], Awaitable[Sequence[Field] | None]]"
"""``async def handler(connection, request, channel)``; as a request handler, with a `Channel`."""

PEER_DRAINS: Final = "the peer takes no new request"

logger = logging.getLogger("bokbok_trio")


@final
class Handlers:
    """Those that run, by the ids of their requests.

    Arguments:
        connection: what the handlers get.
        session: where their answers are queued.
        channels: where the channels of their requests are.
        request_handler, channel_handler: the user's.
        describe_error: of `Settings`.
        wake_sender: to be called when something was queued.

    Attributes:
        ready: set once they may begin.
    """

    __slots__ = (
        "_channel_handler",
        "_channels",
        "_connection",
        "_describe_error",
        "_request_handler",
        "_scopes",
        "_session",
        "_wake_sender",
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
        wake_sender: Callable[[], object],
    ) -> None:
        self._connection = connection
        self._session = session
        self._channels = channels
        self._request_handler = request_handler
        self._channel_handler = channel_handler
        self._describe_error = describe_error
        self._wake_sender = wake_sender
        self._scopes: dict[int, trio.CancelScope] = {}
        self.ready = Once()

    def __len__(self) -> int:
        return len(self._scopes)

    def accept(self, request: Request) -> Coroutine[Any, Any, None] | None:
        """What is to be run to handle a request; None where it is answered already, that it is not."""
        if self._session.is_draining:
            self._session.fail(request.id, "closing", PEER_DRAINS)
        elif request.has_channel and self._channel_handler is None:
            self._session.fail(request.id, "no-channel", "this side handles no channels")
        elif not request.has_channel and self._request_handler is None:
            self._session.fail(request.id, "no-handler", "this side handles no requests")
        else:
            channel = self._channels.take(request.id) if request.has_channel else None
            scope = trio.CancelScope()
            if request.timeout < math.inf:
                scope.deadline = trio.current_time() + request.timeout
            self._scopes[request.id] = scope
            return self._handle(request, channel, scope)
        return None

    def cancel(self, id: int) -> None:
        """The peer no longer wants the answer, and the handler has not ended."""
        self._scopes[id].cancel()
        self._channels.on_cancel(id)

    def cancel_all(self) -> None:
        """Nobody wants any answer."""
        for scope in list(self._scopes.values()):
            scope.cancel()

    def forget(self) -> None:
        """There will be no more of them: forget the connection."""
        del self._connection, self._wake_sender

    async def _handle(self, request: Request, channel: Channel | None, scope: trio.CancelScope) -> None:
        """Handle a request and queue its one answer."""
        fields: Sequence[Field] | None = None
        try:
            with scope:
                if not self.ready.is_set():
                    await self.ready.wait()
                if channel is None:
                    assert self._request_handler is not None
                    fields = await self._request_handler(self._connection, request.fields)
                else:
                    fields = await self._use_channel(request, channel)
            # Only now, as leaving the scope may raise: a handler can leave one of its own open.
            if scope.cancelled_caught and trio.current_time() >= scope.deadline:
                self._session.fail(request.id, "timeout", "the deadline of the request has passed")
            elif scope.cancelled_caught:
                self._session.fail(request.id, "cancelled", "the handler was cancelled")
            else:
                self._answer(request.id, () if fields is None else fields)
        except BaseException as exc:  # noqa: BLE001  (what is not kept is raised on)
            keep(exc, partial(self._fail, request.id))
        finally:
            del self._scopes[request.id]
            self._wake_sender()

    async def _use_channel(self, request: Request, channel: Channel) -> Sequence[Field] | None:
        assert self._channel_handler is not None
        try:
            return await self._channel_handler(self._connection, request.fields, channel)
        finally:
            channel._close(answered=True)  # before the answer is queued
            self._channels.remove(request.id)

    def _answer(self, id: int, fields: Sequence[Field]) -> None:
        try:
            self._session.answer(id, fields)
        except MessageTooLarge as exc:
            logger.error("%r: the answer to request %d is too large: %s", self._connection, id, exc)
            self._session.fail(id, "too-large", str(exc))

    def _fail(self, id: int, error: BaseException) -> None:
        """Queue the answer to a request whose handler raised."""
        if isinstance(error, RequestError):
            self._session.fail(id, error.code, error.message)
            return
        logger.error("%r: the handler of request %d failed", self._connection, id, exc_info=error)
        try:
            describe = self._describe_error
            text = str(describe(error)) if describe else f"{type(error).__name__}: {error}"
        except Exception:
            logger.exception("%r: describing that failed", self._connection)
            text = type(error).__name__
        self._session.fail(id, "handler-error", text)
