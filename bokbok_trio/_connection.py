"""`Connection`: a session over a stream, in a nursery.

Theory
======

`Connection._run` is the connection's whole life, in a task of its own, which is also the **sender**
(`Sender`): it alone waits for the stream to take something, and closes it, so closing needs no lock to
come after the last packet. Its nursery holds

- the **reader** (`Reader`), which decodes what arrives, hands answers to waiters and calls the handlers
  of requests; it never waits for user code, for a slot, or for room to send;
- a task per incoming request whose handler waits, with a channel or without, each in a cancel scope of
  its own;
- the open handler, while it runs.

The `Watchdog`, which pings a silent peer, and notices one that is gone, has no task here.

`request` queues a packet, has it sent and sleeps until the reader or `_end` wakes it; or it reads by
itself (see `Reader`), and `_end` lets it see the end of what is received.

Ending
======

`_end` is called once, by whoever first sees that it is over: `aclose`, the reader, the sender, or
the nursery being cancelled. It is synchronous: it sets the reason, cancels the reader and the
handlers, fails the waiters, and gives the sender `CLOSE_TIMEOUT` to say goodbye. Whatever happens
after that cannot be seen by a waiter. The handlers may take their time to end; `close_handler` runs
after the last of them.

Invariants
==========

- No task of the connection raises into anybody's nursery, except ``KeyboardInterrupt``,
  ``SystemExit`` and the like, which end the program; and ``Cancelled``, which comes from outside.
- A waiter is woken exactly once: by its answer, by `_end`, or by its own cancellation.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias, final

import trio

from ._channel import Channel, Channels
from ._errors import (
    BokbokError,
    ConnectionClosed,
    ConnectionLost,
    RemoteError,
)
from ._events import Answer, Bye, End, Event, Failure, Item
from ._handling import PEER_DRAINS, ChannelHandler, Handlers, RequestHandler
from ._nursery import Once, bare_nursery, contain, is_within, keep
from ._reader import Reader, Waiter
from ._sender import Sender
from ._session import Session
from ._statistics import ConnectionStatistics
from ._watchdog import Watchdog

if TYPE_CHECKING:
    from ._addresses import Address
    from ._handshake import Side
    from ._opening import Opened
    from ._packets import Field
    from ._server import Server
    from ._settings import Settings
    from ._sockets import PeerCredentials

CLOSE_TIMEOUT: Final = 1.0
"""Seconds that a send under way and the end record may take when the connection is closed, and
that a connection which can no longer send goes on receiving."""

ConnectionHandler: TypeAlias = "Callable[[Connection], Awaitable[object]]"
"""``async def handler(connection)``: an open or a close handler."""

logger = logging.getLogger("bokbok_trio")


@final
class Connection:
    """A two-way connection to a peer, made by `open_connection` or by a server.

    Attributes:
        data: the application's own; None at first.
    """

    __slots__ = (
        "__weakref__",
        "_address",
        "_channels",
        "_close_handler",
        "_done",
        "_handlers",
        "_make_error",
        "_opened",
        "_opening",
        "_over",
        "_reader",
        "_sender",
        "_server",
        "_session",
        "_settings",
        "_side",
        "_stream",
        "_stream_closed",
        "_task",
        "_waiters",
        "_watchdog",
        "data",
    )

    def __init__(
        self,
        opened: Opened,
        *,
        side: Side,
        address: Address | None,
        settings: Settings,
        request_handler: RequestHandler | None,
        channel_handler: ChannelHandler | None,
        close_handler: ConnectionHandler | None,
        server: Server | None = None,
    ) -> None:
        self.data: Any = None
        self._opened = opened
        self._stream = opened.stream
        self._side: Side = side
        self._address = address
        self._settings = settings
        self._close_handler = close_handler
        self._server = server
        self._session = Session(
            side,
            max_message_size=opened.max_message_size,
            max_requests=settings.max_requests,
            slots=opened.peer_max_requests,
        )
        self._waiters: dict[int, Waiter | Channel] = {}  # for the answers to what this side asked
        self._watchdog = Watchdog(
            settings.ping_after, settings.ping_timeout, ping=self._ping, lose=self._lose
        )
        self._sender = Sender(
            self._session,
            opened,
            self._watchdog,
            wake_writers=self._wake_writers,
            on_idle=self._on_idle,
        )
        self._channels = Channels(self._session.channels, self._sender.wake)
        self._handlers = Handlers(
            self,
            self._session,
            self._channels,
            request_handler=request_handler,
            channel_handler=channel_handler,
            describe_error=settings.describe_error,
            wake_sender=self._sender.flush,
        )
        self._reader = Reader(
            self,
            self._session,
            self._sender,
            self._watchdog,
            self._handlers,
            on_event=self._on_event,
            lose=self._lose,
        )
        self._make_error: Callable[[bool], BokbokError] | None = None  # set: it is over
        self._over = Once()
        self._opening: trio.CancelScope | None = None  # while the open handler runs
        self._stream_closed = Once()
        self._done = Once()
        self._task: trio.lowlevel.Task | None = None

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<bokbok_trio.Connection {self._side} {self._address} user={self.user!r} {state}>"

    # ---- what it is ----

    @property
    def side(self) -> Side:
        """``"client"`` where this side dialled, ``"server"`` where it accepted."""
        return self._side

    @property
    def user(self) -> str | None:
        """The user: with a key, whom both sides authenticated; else, on a server with `peer_user`, whom
        that named; else None.
        """
        return self._opened.user

    @property
    def encrypted(self) -> bool:
        """Whether the connection is encrypted and authenticated."""
        return self._opened.encrypted

    @property
    def address(self) -> Address | None:
        """The peer's address; of a UNIX socket its path; None of a stream that is no socket."""
        return self._address

    @property
    def peer_credentials(self) -> PeerCredentials | None:
        """Who is at the other end of a UNIX socket, by the system's word; None of other streams, and on
        systems but Linux.
        """
        return self._opened.peer_credentials

    @property
    def server(self) -> Server | None:
        """The server that accepted this connection, if it was one here."""
        return self._server

    @property
    def closed(self) -> bool:
        """Whether it is over: no request can be made any more. `wait_closed` waits for the rest."""
        return self._make_error is not None

    def statistics(self) -> ConnectionStatistics:
        """Count what goes on, for logs and gauges.

        Of a closed connection, the handlers that have not ended yet are what counts; it has no
        requests of its own any more.
        """
        session = self._session
        return ConnectionStatistics(
            used_slots=session.asked,
            total_slots=self._opened.peer_max_requests,
            requests_waiting=session.waiting,
            requests_cancelled=session.cancelled,
            handlers_running=len(self._handlers),
            max_requests=self._settings.max_requests,
            packets_queued=session.queued,
        )

    # ---- what it does ----

    async def request(self, fields: Sequence[Field]) -> list[bytes]:
        """Send a request and wait for its answer.

        Where the peer already has as many requests in flight as it takes, this waits its turn.
        Cancelled, it returns at once, and the handler over there is cancelled too; the connection
        and all other requests go on undisturbed. The deadline in force here holds for the handler
        over there as well, and for the requests that it makes in turn.

        Arguments:
            fields: 0 to 255 of bytes or str (sent as UTF-8).

        Returns:
            The fields of the answer.

        Raises:
            TypeError, ValueError: `fields` is no such list. Nothing was sent.
            MessageTooLarge: it is larger than the two sides agreed on. Nothing was sent.
            RemoteError: the other side answered with an error.
            ConnectionClosed: this side closed the connection.
            ConnectionLost: the connection was lost; see its `may_have_run`.
        """
        if self._make_error is not None or not self._session.may_ask:  # `_may_ask`, without its call
            await self._refuse()
        deadline = trio.current_effective_deadline()
        id = self._session.request(fields, deadline)
        waiter = self._waiters[id] = Waiter()
        self._sender.flush()

        def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
            self._cancel(id)
            return trio.lowlevel.Abort.SUCCEEDED

        reader = self._reader  # which is gone when the connection has ended
        if reader.may_lead:
            try:
                await reader.lead(waiter)
            except BaseException:
                self._cancel(id)
                raise
        if waiter.outcome is None:
            await trio.lowlevel.wait_task_rescheduled(abort)
            reader.give_back()
        outcome = waiter.outcome
        if isinstance(outcome, list):
            return outcome
        assert outcome is not None
        if isinstance(outcome, RemoteError) and outcome.code == "timeout" and deadline < math.inf:
            # The same deadline ran out over there first. The asker is to see its own cancellation.
            await trio.sleep_until(deadline)
        raise outcome

    @asynccontextmanager
    async def open_channel(self, fields: Sequence[Field]) -> AsyncGenerator[Channel]:
        """Send a request with a channel, which lasts for as long as the block, or until it is answered.

        ::

            async with connection.open_channel(["upload", name]) as channel:
                async for chunk in chunks:
                    await channel.send([chunk])
                await channel.end()
                answer = await channel.answer()

        Entering waits for nothing; a failure shows in the channel's methods. The deadline in force
        here, on entering, holds for the handler over there as well; it cannot be put off later, so a
        time limit for each item goes around `Channel.receive`. The channel takes up a slot, as a
        request does, for as long as it lasts.

        Leaving the block closes the channel, and cancels the handler over there unless its answer
        came; items that have not left yet are dropped. But if the block called `Channel.end`, and
        is left by no exception, then all was said, and leaving waits for the answer, as if by
        `Channel.answer` if that was not called; items that still come are dropped.

        Arguments:
            fields: 0 to 255 of bytes or str (sent as UTF-8).

        Raises:
            TypeError, ValueError: `fields` is no such list. Nothing was sent.
            MessageTooLarge: it is larger than the two sides agreed on. Nothing was sent.
            ConnectionClosed, ConnectionLost: it was over before. Nothing was sent.
            RemoteError: on leaving, where the answer is waited for: it is an error.
        """
        if not self._may_ask:
            await self._refuse()
        deadline = trio.current_effective_deadline()
        id = self._session.open_channel(fields, deadline)
        channel = self._waiters[id] = self._channels.open(id, partial(self._cancel, id), deadline)
        self._sender.wake()
        try:
            await trio.lowlevel.checkpoint()
            yield channel
            await channel._finish()
        finally:
            channel._close()
            self._channels.remove(id)

    @property
    def _may_ask(self) -> bool:
        return self._make_error is None and self._session.may_ask

    async def _refuse(self) -> NoReturn:
        """Raise why nothing can be asked any more."""
        await trio.lowlevel.checkpoint()
        if self._make_error is not None:
            raise self._make_error(False)
        raise ConnectionLost(PEER_DRAINS, may_have_run=False)

    def _cancel(self, id: int) -> None:
        """Nobody wants the answer any more, if it has not come."""
        if self._waiters.pop(id, None) is not None:
            self._session.cancel(id)
            self._sender.wake()

    async def aclose(self) -> None:
        """Close the connection, and wait until the transport is closed, for at most a second or so.

        Requests of this side that wait for an answer fail with `ConnectionClosed`, handlers are
        cancelled, but not waited for, so a handler may call this; being cancelled, it does not
        return to it. Again, or after the connection was lost, it does nothing. Cancelled, it
        returns at once, and the closing goes on.
        """
        self._close("this side closed the connection")
        await self._stream_closed.wait()

    def drain(self) -> None:
        """Take no new request, let those in flight finish both ways, and close. Returns at once.

        New requests of the peer's fail there as not run; those in flight may take their time, and
        their handlers may still ask the peer. `wait_closed` waits for the end, and `aclose` hastens it.
        """
        if not self.closed:
            self._session.drain()
            self._sender.wake()

    async def wait_closed(self) -> None:
        """Wait until all of it has ended: transport, handlers and close handler.

        Raises:
            RuntimeError: called from one of the connection's own tasks (a handler, or a task it
                started), which would wait for itself.
        """
        if is_within(self._task):
            raise RuntimeError("a task of the connection cannot wait until it has ended")
        await self._done.wait()

    # ---- its life ----

    async def _run(self, open_handler: ConnectionHandler | None = None) -> None:
        """Live, in this task, until the connection is over and all its tasks have ended."""
        self._task = trio.lowlevel.current_task()
        ended_by: BaseException | None = None
        try:
            async with bare_nursery() as nursery:
                self._watchdog.start()
                self._reader.start(nursery)
                if open_handler is None:
                    self._handlers.ready.set()
                else:
                    nursery.start_soon(self._open, open_handler)
                await self._send()
        except BaseException as exc:  # noqa: BLE001  (raised again below)
            ended_by = exc
        try:
            if self._handlers.ready.is_set() and self._close_handler is not None:
                with contain(partial(self._log, "the close handler failed")):
                    # Under a cancellation from outside, it gets that at its first checkpoint.
                    await self._close_handler(self)
        except trio.Cancelled as exc:
            ended_by = ended_by or exc  # it must not replace what ends the program
        finally:
            self._done.set()
            self._let_go()
        if ended_by is not None:
            raise ended_by

    def _let_go(self) -> None:
        """Drop what knows of this connection in turn, as it has ended and needs none of it.

        Left to the garbage collector, each connection would cost both sides together 30 us more.
        """
        del self._sender, self._reader
        self._handlers.forget()
        self._channels.forget()
        self._task = None

    async def _open(self, open_handler: ConnectionHandler) -> None:
        """Run the open handler, and let requests be handled if it returned; if not, it is over."""
        try:
            with trio.CancelScope() as self._opening, contain(partial(self._log, "the open handler failed")):
                await open_handler(self)
                self._handlers.ready.set()
                self._sender.wake()
        finally:
            if not self._handlers.ready.is_set():
                self._close("the open handler failed")

    def _log(self, what: str, error: BaseException) -> None:
        logger.error("%r: %s", self, what, exc_info=error)

    def _wake_writers(self) -> None:
        self._channels.wake_writers()

    def _on_idle(self) -> None:
        if self._session.is_drained and self._handlers.ready.is_set():
            self._close("this side drained the connection")

    def _ping(self) -> None:
        self._session.ping()
        self._sender.wake()

    def _close(self, reason: str) -> None:
        """Close from this side; `aclose` without the waiting."""
        self._end(lambda _: ConnectionClosed(reason), graceful=True)

    def _lose(self, reason: str) -> None:
        self._end(lambda may_have_run: ConnectionLost(reason, may_have_run), graceful=False)

    def _end(self, make_error: Callable[[bool], BokbokError], *, graceful: bool) -> None:
        """It is over. `make_error` makes a waiter's exception, given whether its request may have run."""
        if self._make_error is not None:
            return
        self._make_error = make_error
        self._over.set()
        self._sender.stop(trio.current_time() + CLOSE_TIMEOUT if graceful else -math.inf)
        self._reader.stop()
        self._watchdog.stop()
        if self._opening is not None:
            self._opening.cancel()
        # Handlers first: one that waits for an answer here is to end by its cancellation.
        self._handlers.cancel_all()
        waiters, self._waiters = self._waiters, {}
        for id, waiter in waiters.items():
            waiter.wake(make_error(not self._session.is_unsent(id)))
        self._channels.break_all(make_error(True))
        self._session.close()

    # ---- the sender ----

    async def _send(self) -> None:
        """Send until it is over, and close the stream."""
        is_closed = False
        try:
            try:
                await self._sender.run()
            except Exception as exc:  # noqa: BLE001  (whatever a stream raises, it is broken)
                # Answers that came before it broke are still good: the reader gets a moment for them.
                self._reader.stop_at(trio.current_time() + CLOSE_TIMEOUT, f"sending failed: {exc!r}")
                await self._over.wait()
            is_closed = await self._close_stream()
        except BaseException as exc:  # noqa: BLE001  (what is not kept is raised on)
            keep(exc, self._log_closing)
        finally:
            self._end(lambda _: ConnectionClosed("the connection was cancelled"), graceful=False)
            try:
                # Nothing to wait for here, and closing twice does no harm.
                if not is_closed and not self._sender.wire.close_now(end=False):
                    await trio.aclose_forcefully(self._stream)
            except BaseException as exc:  # noqa: BLE001  (as above)
                keep(exc, self._log_closing)
            finally:
                self._stream_closed.set()

    async def _close_stream(self) -> bool:
        """Close the stream, with an end record unless there is no time for it; return whether that is done.

        To close a socket without a turn of the event loop, and to close nothing twice, saves both sides
        together 120 us, sealed 200.
        """
        until = self._sender.until
        if self._sender.wire.close_now(end=trio.current_time() < until):
            return True
        with trio.CancelScope(deadline=until) as scope:
            await self._stream.aclose()
        return not scope.cancelled_caught

    def _log_closing(self, error: BaseException) -> None:
        self._log("closing the stream failed", error)

    # ---- what arrives ----

    def _on_event(self, event: Event) -> bool:
        """Do what an event says. Returns whether that has woken a `request`."""
        if isinstance(event, Answer):
            waiter = self._waiters.pop(event.id)
            waiter.wake(event.fields)
            return isinstance(waiter, Waiter)
        if isinstance(event, Failure):
            self._waiters.pop(event.id).wake(_as_error(event))
        elif isinstance(event, Bye):
            for id in event.ids:
                self._waiters.pop(id).wake(ConnectionLost(PEER_DRAINS, may_have_run=False))
        elif isinstance(event, Item | End):
            self._channels.on_event(event)
        else:
            self._handlers.cancel(event.id)
        return False


def _as_error(failure: Failure) -> BokbokError:
    """What the asker of a request that failed sees."""
    if failure.code == "closing":
        return ConnectionLost(failure.message, may_have_run=False)
    return RemoteError(failure.message, failure.code)
