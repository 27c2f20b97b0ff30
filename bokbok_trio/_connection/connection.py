"""`Connection`: a session over a stream, in a nursery.

Theory
======

`Connection._run` is the whole life of a connection, in a task of its own. It opens the connection's nursery
and starts the **reader task** in it (`Reader`). It is itself the **sender task** (`Sender`), which holds the
`SendLock` whenever it is awake, and closes the stream. The nursery also has **a task per incoming request**
whose handler waits, each in a cancel scope of its own; the open handler, while it runs; and the task that
warns when requests wait long for slots.

The `Watchdog`, which pings a silent peer and notices a peer that is gone, has no task here.

`Connection.request` queues a packet, and sleeps until its answer comes or the connection is over.

Ending
======

`Ending` takes the first reason why the connection is over, from any part, and calls `Connection._stop`. That
cancels the handlers and gives all waiters their errors, without a checkpoint, so a waiter sees nothing that
happens later. Then `Closing` sends the end, and closes the stream. The handlers may take their time to end;
`close_handler` runs after the last of them.

Invariants
==========

- No task of the connection raises into anybody's nursery, except ``KeyboardInterrupt`` and
  ``SystemExit``, which end the program; and ``Cancelled``, which comes from outside.
- A waiter is woken at most once: by its answer, or by `_stop`. A cancellation is the only other end of its
  wait.
- A connection belongs to one Trio run. In any other run its public methods raise, before they change
  anything.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, final

import trio

from .._errors import ConnectionLost
from .._protocol.budget import Budget
from .._protocol.events import Abort, Answer, Bye, Cancel, End, Failure, Item, Pong, Request
from .._protocol.options import find_room
from .._protocol.session import Session
from .._statistics import ConnectionStatistics
from .._trio_util import (
    bare_nursery,
    block,
    check_cancelled,
    check_run,
    current_task_is_under,
)
from .._types import ChannelHandler, ConnectionHandler, RequestHandler
from .calls import DRAINING_MESSAGE, Calls
from .channel import Channel, Channels
from .closing import Closing
from .current import next_depth
from .ending import Ending
from .handlers import Handlers
from .observer import Observer
from .pings import Pings
from .reader import DispatchTable, Reader
from .sender import Sender, SendLock
from .watchdog import Watchdog

if TYPE_CHECKING:
    from .._addresses import Address
    from .._settings import Settings
    from .._sockets import PeerCredentials
    from .._stream.establish import Established
    from .._types import Context, Fields, Server, Side

logger = logging.getLogger("bokbok_trio")


@final
class Connection:
    """A two-way connection to a peer, made by `open_connection` or by a server.

    It belongs to the Trio run that made it: its methods raise ``RuntimeError`` in another run or thread,
    before they do anything. From there, use `trio.from_thread.run`.

    Attributes:
        data: the application's own; None at first.
    """

    __slots__ = (
        "__weakref__",
        "_address",
        "_calls",
        "_channels",
        "_close_handler",
        "_closing",
        "_draining",
        "_ending",
        "_handlers",
        "_home",
        "_nursery",
        "_observer",
        "_opened",
        "_pings",
        "_reader",
        "_sender",
        "_server",
        "_session",
        "_settings",
        "_side",
        "_stream",
        "_task",
        "_watchdog",
        "data",
    )

    def __init__(
        self,
        opened: Established,
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
        self._home = trio.lowlevel.current_trio_token()
        self._opened = opened
        self._stream = stream = opened.stream
        self._side: Side = side
        self._address = address
        self._settings = settings
        self._close_handler = close_handler
        self._server = server
        self._ending = ending = Ending(self)
        self._session = session = _make_session(side, opened, settings)
        self._draining = session.draining
        watching = settings._instruments
        self._observer = observer = None if watching is None else Observer(watching, self, session)
        self._watchdog = self._make_watchdog()
        self._sender = Sender(
            session, stream, self._watchdog, ending=ending, lock=SendLock(), connection=self
        )
        packet_queued = self._sender.packet_queued
        self._pings = Pings(session, packet_queued)
        self._calls = Calls(session, ending, packet_queued, observer)
        on_item = None if observer is None else observer.tell_item
        self._channels = Channels(session.flow_control, packet_queued, on_item)
        self._handlers = self._make_handlers(request_handler, channel_handler)
        self._reader = Reader(
            stream.receive_view,
            session,
            self._sender,
            self._watchdog,
            self._handlers,
            ending=ending,
            table=self._make_dispatch_table(),
        )
        self._closing = Closing(
            stream, session, self._reader, self._sender, ending=ending, is_server=server is not None
        )
        self._nursery: trio.Nursery | None = None  # while it runs
        self._task: trio.lowlevel.Task | None = None  # until all has ended
        if observer is not None:
            observer.tell_opened()  # now: requests can be made before `_run` begins

    def _make_watchdog(self) -> Watchdog:
        return Watchdog(
            self._settings.ping_after,
            self._settings.ping_timeout,
            ping=lambda: self._pings.send(),  # noqa: PLW0108  (`_pings` is made later)
            fail=self._ending.fail,
            least_rate=self._settings.least_rate,
            count_waiting=lambda: self._session.waiting_bytes,
        )

    def _make_handlers(
        self, request_handler: RequestHandler | None, channel_handler: ChannelHandler | None
    ) -> Handlers:
        return Handlers(
            self,
            self._session,
            self._channels,
            request_handler=request_handler,
            channel_handler=channel_handler,
            describe_error=self._settings.describe_error,
            packet_queued=self._sender.packet_queued,
            answer_queued=self._sender.interactive_queued,
            observer=self._observer,
            ending=self._ending,
        )

    def _make_dispatch_table(self) -> DispatchTable:
        return {
            Request: None,
            Answer: self._calls.on_answer,
            Failure: self._calls.on_failure,
            Item: self._channels.on_event,
            End: self._channels.on_event,
            Cancel: self._handlers.on_cancel,
            Bye: self._calls.on_bye,
            Pong: self._pings.on_pong,
            Abort: self._ending.on_abort,
        }

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<bokbok_trio.Connection {self._side} {self._address} user={self.user!r} {state}>"

    # ---- properties ----

    @property
    def side(self) -> Side:
        """``"client"`` if this side dialled, ``"server"`` if it accepted."""
        return self._side

    @property
    def user(self) -> str | None:
        """The user of this connection, or None.

        If the connection has a key, both sides have authenticated the user. On a plain connection, a server
        with `peer_user` has the name that this function returned.
        """
        return self._opened.user

    @property
    def encrypted(self) -> bool:
        """Whether the connection is encrypted and authenticated."""
        return self._opened.key_fingerprint is not None

    @property
    def key_fingerprint(self) -> str | None:
        """The `Key.fingerprint` of the key that the connection was opened with; None if it is plain.

        While a user has two keys, this tells which connections still need the old one.
        """
        return self._opened.key_fingerprint

    @property
    def address(self) -> Address | None:
        """The peer's address: the path of a UNIX socket; None if the stream is not a socket."""
        return self._address

    @property
    def peer_credentials(self) -> PeerCredentials | None:
        """The process at the other end of a UNIX socket, as the system reports it.

        None for other streams, and on systems other than Linux.
        """
        return self._opened.peer_credentials

    @property
    def server(self) -> Server | None:
        """The server that accepted this connection; None if this side dialled."""
        return self._server

    @property
    def closed(self) -> bool:
        """Whether the connection is over: no request can be made. `wait_closed` waits for its last task."""
        return self._ending.is_over

    @property
    def _is_ended_on_purpose(self) -> bool:
        """Whether a side wanted the end of the connection."""
        drains = self._session.is_draining or self._draining.peer_drains
        return drains or self._ending.is_local

    @property
    def reason(self) -> str | None:
        """Why the connection is over, in words; None while it is open."""
        return self._ending.reason

    @property
    def draining(self) -> trio.Event:
        """An event that is set once either side drains the connection, or the connection is over.

        A handler that sends items without end should wait for this event too, and then end its stream and
        return. Otherwise it uses up the grace of a server that stops, and is cancelled.
        """
        return self._ending.draining.event

    def statistics(self) -> ConnectionStatistics:
        """Count requests, handlers and packets, for logs and gauges.

        A closed connection has no requests of its own; only handlers that have not ended are counted.
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

    # ---- methods ----

    @trio.lowlevel.enable_ki_protection
    async def request(self, fields: Fields, *, context: Context | None = None) -> list[bytes]:
        """Send a request and wait for its answer.

        The peer bounds the requests in flight. If there are as many already, this one waits for a slot.

        If the caller is cancelled, this ends at once, and the peer's handler is cancelled too. The connection
        and all other requests go on. The deadline in force here also holds for the peer's handler, and for
        the requests that it makes in turn. In a cancelled scope, or after the deadline, nothing is sent.

        Requests that are made at the same time may arrive in any order, large ones last. A cancelled request
        keeps its slot until the peer's handler has ended.

        Arguments:
            fields: 0 to 255 of bytes or str (sent as UTF-8).
            context: names (1 to 64 lower-case ASCII letters, digits, ``.``, ``-``, ``_``) and values (bytes
                or str), at most 32 of them and 8 KiB in all. The peer's handler finds them in
                `current_request`. They are not passed on to the requests that it makes.

        Returns:
            The fields of the answer.

        Raises:
            TypeError, ValueError: `fields` or `context` cannot be sent. Nothing was sent.
            MessageTooLarge: the request is larger than the two sides agreed on. Nothing was sent.
            RemoteError: the other side answered with an error.
            ConnectionClosed: this side closed the connection.
            ConnectionLost: the connection was lost; see its `may_have_run`.
            RecursionError: the request is nested in more than 15 others, made by handlers of both sides.
            RuntimeError: called from another Trio run.
        """
        check_run(self._home, self)
        deadline = trio.current_effective_deadline()
        if deadline < math.inf and deadline <= trio.current_time():
            await trio.lowlevel.checkpoint()
        depth = next_depth()
        if self._ending.is_over or (self._draining.peer_drains and not depth):
            await self._refuse()
        call = self._calls.ask(fields, deadline, depth, context)
        try:
            self._sender.interactive_queued()
            if self._session.local.has_waiting:
                self._watch_slots()
            await call.settled()
            if call.embargo is not None:
                await trio.sleep_until(call.embargo)
            return call.take()
        except BaseException:
            self._calls.cancel(call)
            raise

    @block
    async def open_channel(
        self, fields: Fields, *, context: Context | None = None
    ) -> AsyncGenerator[Channel]:
        """Send a request with a channel, which lasts until the block ends or the answer comes.

        ::

            async with connection.open_channel(["upload", name]) as channel:
                async for chunk in chunks:
                    await channel.send([chunk])
                await channel.end()
                answer = await channel.answer()

        Entering the block does not wait for the peer; a failure shows in the channel's methods. The deadline
        in force on entering also holds for the peer's handler. It cannot be put off later, so put a time
        limit for each item around `Channel.receive`. The channel takes up a slot, as a request does, for as
        long as it lasts.

        Leaving the block closes the channel. The peer's handler is cancelled unless its answer came, and
        items that have not left are dropped. But if the block called `Channel.end`, and no exception leaves
        it, then leaving waits for the answer, as `Channel.answer` does; items that still arrive are dropped.

        Arguments:
            fields: 0 to 255 of bytes or str (sent as UTF-8).
            context: as for `request`.

        Raises:
            TypeError, ValueError: `fields` or `context` cannot be sent. Nothing was sent.
            MessageTooLarge: the request is larger than the two sides agreed on. Nothing was sent.
            ConnectionClosed, ConnectionLost: the connection was over before. Nothing was sent.
            RemoteError: on leaving, if that waits for the answer, and the answer is an error.
            RecursionError, RuntimeError: as by `request`.
        """
        check_run(self._home, self)
        await trio.lowlevel.checkpoint()
        depth = next_depth()
        if not self._may_ask(depth):
            await self._refuse()
        deadline = trio.current_effective_deadline()
        call = self._calls.open_channel(fields, deadline, depth, context)
        channel = self._channels.open(call, partial(self._calls.cancel, call))
        try:
            self._sender.packet_queued()
            if self._session.local.has_waiting:
                self._watch_slots()
            yield channel
            await channel._finish()
        finally:
            channel._close()
            self._channels.remove(call.id)

    def _may_ask(self, depth: int = 0) -> bool:
        """Whether the peer takes a request of that depth, as far as this side knows."""
        return not self._ending.is_over and (depth > 0 or not self._draining.peer_drains)

    async def _refuse(self) -> NoReturn:
        """Raise the reason why no request can be made."""
        await trio.lowlevel.checkpoint()
        if self._ending.is_over:
            raise self._ending.make_error(may_have_run=False)
        raise ConnectionLost(DRAINING_MESSAGE, may_have_run=False)

    def _watch_slots(self) -> None:
        if self._nursery is not None:
            self._calls.watch_slots(self._nursery, self)

    @trio.lowlevel.enable_ki_protection
    async def ping(self) -> float:
        """Ask the peer for a sign of life, and wait for it.

        Returns:
            The round trip in seconds. The time that the ping waits behind other packets is part of it.

        Raises:
            ConnectionClosed, ConnectionLost: the connection is over.
            RuntimeError: called from another Trio run.
        """
        check_run(self._home, self)
        await check_cancelled()
        if self._ending.is_over:
            await self._refuse()
        return await self._pings.ask()

    @trio.lowlevel.enable_ki_protection
    async def aclose(self) -> None:
        """Close the connection, and wait until the transport is closed, for at most a second or so.

        Requests of this side that wait for an answer fail with `ConnectionClosed`. Handlers are cancelled,
        but this does not wait for them. So a handler may call this; it is cancelled there. A second call, or
        one after the connection was lost, does nothing. If the caller is cancelled, this returns at once, and
        the closing goes on.

        Raises:
            RuntimeError: called from another Trio run.
        """
        check_run(self._home, self)
        self._close("this side closed the connection")
        await self._ending.stream_closed.wait()

    @trio.lowlevel.enable_ki_protection
    def drain(self) -> None:
        """Accept no new request, let the requests in flight on both sides finish, and close. Return at once.

        New requests of the peer fail there, with an error that says that they did not run. Requests in flight
        may take their time, and so may all requests that their handlers make in turn, on both sides.
        `wait_closed` waits for the end, and `aclose` closes sooner.

        Raises:
            RuntimeError: called from another Trio run.
        """
        check_run(self._home, self)
        if not self._ending.is_over:
            self._session.drain()
            self._ending.draining.set()
            self._sender.packet_queued()

    async def wait_closed(self) -> None:
        """Wait until the transport is closed, and all handlers and the close handler have ended.

        Raises:
            RuntimeError: called from one of the connection's own tasks (a handler, or a task that it
                started), which would wait for itself; or from another Trio run.
        """
        check_run(self._home, self)
        if current_task_is_under(self._task):
            raise RuntimeError("a task of the connection cannot wait until it has ended")
        await self._ending.ended.wait()

    # ---- running ----

    @trio.lowlevel.enable_ki_protection
    async def _run(self, open_handler: ConnectionHandler | None = None) -> None:
        """Run the connection, in this task, until it is over and all its tasks have ended."""
        self._task = trio.lowlevel.current_task()
        ended_by: BaseException | None = None
        try:
            async with bare_nursery() as nursery:
                self._nursery = nursery
                self._watchdog.start()
                nursery.start_soon(self._reader.run, nursery)  # it starts a task for each request that waits
                self._handlers.start(nursery, open_handler)
                async with self._closing:
                    await self._sender.run()  # this task holds the send lock whenever it writes
        except Exception as exc:
            # A handler left a nursery open in its task, for which Trio raises this when the task ends.
            logger.error("%r: a task of the connection ended badly", self, exc_info=exc)
        except BaseException as exc:  # noqa: BLE001  (raised again below)
            ended_by = exc
        try:
            await self._handlers.end(self._close_handler)
        except trio.Cancelled as exc:
            ended_by = ended_by or exc  # it must not replace an exception that ends the program
        finally:
            self._nursery = self._task = None
            self._ending.ended.set()
            if self._observer is not None:
                self._observer.tell_ended()
        if ended_by is not None:
            try:
                raise ended_by
            finally:
                del ended_by  # or this frame and its traceback would keep each other alive

    def _wake_writers(self) -> None:
        self._channels.wake_writers()
        if self._session.has_room_for_answers:
            self._handlers.let_begin()

    # ---- ending ----

    def _close_if_drained(self) -> None:
        if self._session.is_drained and self._handlers.ready.has_happened:
            self._close("this side drained the connection")

    def _close(self, reason: str) -> None:
        """Close from this side, as `aclose` does, but do not wait."""
        self._ending.close(reason)
        self._closing.hasten()

    def _stop(self) -> None:
        """Stop all parts. `Ending` calls this, once."""
        self._sender.stop()
        self._reader.discard()
        self._watchdog.stop()
        # Handlers first: one that waits for an answer here must end by its cancellation.
        self._handlers.cancel_all()
        self._calls.fail_all()
        self._pings.end(partial(self._ending.make_error, may_have_run=True))
        self._channels.break_all(self._ending.make_error(may_have_run=True))
        self._session.close()

    def _describe_peer(self) -> str:
        user = f"user {self.user!r}" if self.user is not None and self._side == "server" else ""
        where = "" if self._address is None else f"at {self._address}"
        return " ".join(filter(None, (user, where)))


def _make_session(side: Side, opened: Established, settings: Settings) -> Session:
    return Session(
        side,
        max_message_size=opened.max_message_size,
        max_requests=settings.max_requests,
        slots=opened.peer_max_requests,
        budget=Budget.share_out(settings.effective_budget),
        peer_room=find_room(opened.peer_options),
    )
