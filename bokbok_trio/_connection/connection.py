"""`Connection`: a session over a stream, in a nursery.

Theory
======

`Connection._run` is the connection's whole life, in a task of its own. It opens the connection's nursery,
starts the **reader task** in it (`Reader`), and is itself the **sender task** (`Sender`), which holds the
`SendLock` whenever it is awake, and closes the stream. The nursery also holds **a task per incoming request**
whose handler waits, each in a cancel scope of its own; the open handler, while it runs; and for a moment the
task that warns where our requests wait for slots.

The `Watchdog`, which pings a silent peer, and notices one that is gone, has no task here.

`request` queues a packet, has it sent, and sleeps until the reader or `_end` wakes it.

Ending
======

`_end` is called once, by whoever first sees that it is over: `aclose`, the reader, the sender, or
the nursery being cancelled. It is synchronous: it sets the reason, cancels the handlers, fails the waiters,
and gives the sender `CLOSE_TIMEOUT` to say goodbye. Whatever happens after that cannot be seen by a waiter.
Where this side closes, it says so, and the reader goes on, and drops everything, until the peer has said so
too: to close a socket earlier may reset it, and destroy what the peer has not read yet. The handlers may take
their time to end; `close_handler` runs after the last of them.

Invariants
==========

- No task of the connection raises into anybody's nursery, except ``KeyboardInterrupt`` and
  ``SystemExit``, which end the program; and ``Cancelled``, which comes from outside.
- A waiter is woken at most once: by its answer, or by `_end`. Where a request ends in any other way, it is
  cancelled.
- All of it belongs to one Trio run, and what is public says so to others before it changes anything.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn, final

import trio

from .._errors import (
    ConnectionLost,
    ProtocolError,
    escape,
)
from .._protocol.budget import Budget
from .._protocol.events import Abort, Answer, Bye, Cancel, End, Failure, Item, Pong, Request
from .._protocol.options import find_room
from .._protocol.session import Session
from .._statistics import ConnectionStatistics
from .._trio_util import (
    bare_nursery,
    block,
    call_user,
    check_cancelled,
    check_run,
    current_task_is_under,
    describe_error,
    isolate_failures,
    log_or_reraise,
    split_exception,
)
from .._types import ChannelHandler, ConnectionHandler, RequestHandler
from .calls import Calls, as_error
from .channel import Channel, Channels
from .closing import CLOSE_TIMEOUT, Closing
from .current import next_depth
from .ending import Ending
from .handlers import DRAINING_MESSAGE, Handlers
from .observer import Observer
from .pings import Pings
from .reader import STREAM_ERRORS, DispatchTable, Reader, leave_to_reader
from .sender import Sender
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
        "_opening",
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
            budget=Budget.share_out(settings.effective_budget),
            peer_room=find_room(opened.peer_options),
        )
        watching = settings._instruments
        self._observer = None if watching is None else Observer(watching, self, self._session)
        on_item = None if self._observer is None else self._observer.tell_item
        self._ending = Ending()
        self._watchdog = Watchdog(
            settings.ping_after,
            settings.ping_timeout,
            ping=self._send_ping,
            fail=self._fail,
            least_rate=settings.least_rate,
            count_waiting=self._count_waiting,
        )
        self._sender = Sender(
            self._session,
            self._stream,
            self._watchdog,
            self._ending,
            wake_writers=self._wake_writers,
            on_idle=self._close_if_drained,
            on_defect=self._on_defect,
        )
        self._channels = Channels(self._session.flow_control, self._sender.packet_queued, on_item)
        self._calls = Calls(self._session, self._sender.packet_queued, self._observer)
        self._handlers = Handlers(
            self,
            self._session,
            self._channels,
            request_handler=request_handler,
            channel_handler=channel_handler,
            describe_error=settings.describe_error,
            packet_queued=self._sender.packet_queued,
            observer=self._observer,
        )
        self._reader = Reader(
            self._stream.receive_view,
            self._session,
            self._sender,
            self._watchdog,
            self._handlers,
            ending=self._ending,
            table=_DISPATCH,
            owner=self,
            on_protocol_error=self._on_protocol_error,
            fail=self._fail,
            on_defect=self._on_defect,
            log=self._log,
        )
        self._closing = Closing(self._stream, self._session, self._reader.ended, self._ending)
        self._pings = Pings()
        self._draining: trio.Event | None = None  # made for whoever asks first
        self._opening: trio.CancelScope | None = None  # while the open handler runs
        self._nursery: trio.Nursery | None = None
        self._task: trio.lowlevel.Task | None = None
        if self._observer is not None:
            self._observer.tell_opened()  # now: requests can be made before `_run` begins

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
        return self._opened.key_fingerprint is not None

    @property
    def key_fingerprint(self) -> str | None:
        """The `Key.fingerprint` of the user's key that the connection was opened with; None where it is
        plain.

        While a user has two keys, this tells which connections still need the old one.
        """
        return self._opened.key_fingerprint

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
        return self._ending.is_over

    @property
    def _is_ended_on_purpose(self) -> bool:
        """Whether it has ended, or is about to, because one of the sides wanted so."""
        drains = self._session.is_draining or self._session.peer_drains
        return drains or self._ending.is_local

    @property
    def reason(self) -> str | None:
        """Why the connection is over, in words; None while it is open."""
        return self._ending.reason

    @property
    def draining(self) -> trio.Event:
        """An event that is set once either side drains the connection, or it is over.

        A handler that sends items for as long as there are any should wait for it too, end its stream and
        return; else it uses up the grace of a stopping server, and is cancelled.
        """
        if self._draining is None:
            self._draining = trio.Event()
            if self._ending.is_over or self._session.is_draining or self._session.peer_drains:
                self._draining.set()
        return self._draining

    def statistics(self) -> ConnectionStatistics:
        """Count what goes on, for logs and gauges.

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

    # ---- what it does ----

    @trio.lowlevel.enable_ki_protection
    async def request(self, fields: Fields, *, context: Context | None = None) -> list[bytes]:
        """Send a request and wait for its answer.

        Where the peer already has as many requests in flight as it takes, this waits its turn.
        Cancelled, it returns at once, and the handler over there is cancelled too; the connection
        and all other requests go on undisturbed. The deadline in force here holds for the handler
        over there as well, and for the requests that it makes in turn. Under a cancelled scope or after the
        deadline, nothing is sent.

        Requests that are made at the same time may arrive in any order, large ones last. A request that was
        cancelled keeps its slot until its handler over there has ended.

        Arguments:
            fields: 0 to 255 of bytes or str (sent as UTF-8).
            context: names (1 to 64 lower-case ASCII letters, digits, ``.``, ``-``, ``_``) and values (bytes
                or str), 32 at most and 8 KiB in all, which the handler over there finds in
                `current_request`. Nothing passes them on by itself.

        Returns:
            The fields of the answer.

        Raises:
            TypeError, ValueError: `fields` or `context` cannot be sent. Nothing was.
            MessageTooLarge: it is larger than the two sides agreed on. Nothing was sent.
            RemoteError: the other side answered with an error.
            ConnectionClosed: this side closed the connection.
            ConnectionLost: the connection was lost; see its `may_have_run`.
            RecursionError: it is nested in more than 15 others, which handlers of both sides made.
            RuntimeError: called from another Trio run.
        """
        check_run(self._home, self)
        deadline = trio.current_effective_deadline()
        if deadline < math.inf and deadline <= trio.current_time():
            await trio.lowlevel.checkpoint()
        depth = next_depth()
        if not self._may_ask(depth):
            await self._refuse()
        call = self._calls.ask(fields, deadline, depth=depth, context=context)
        try:
            self._sender.packet_queued(interactive=True)
            if self._session.local.has_waiting:
                self._watch_slots()
            return await call.wait()
        except BaseException:
            self._calls.cancel(call)
            raise

    @block
    async def open_channel(
        self, fields: Fields, *, context: Context | None = None
    ) -> AsyncGenerator[Channel]:
        """Send a request with a channel, which lasts for as long as the block, or until it is answered.

        ::

            async with connection.open_channel(["upload", name]) as channel:
                async for chunk in chunks:
                    await channel.send([chunk])
                await channel.end()
                answer = await channel.answer()

        Entering does not wait for the peer; a failure shows in the channel's methods. The deadline in force
        here, on entering, holds for the handler over there as well; it cannot be put off later, so a
        time limit for each item goes around `Channel.receive`. The channel takes up a slot, as a
        request does, for as long as it lasts.

        Leaving the block closes the channel, and cancels the handler over there unless its answer
        came; items that have not left yet are dropped. But if the block called `Channel.end`, and
        is left by no exception, then all was said, and leaving waits for the answer, as if by
        `Channel.answer` if that was not called; items that still come are dropped.

        Arguments:
            fields: 0 to 255 of bytes or str (sent as UTF-8).
            context: as for `request`.

        Raises:
            TypeError, ValueError: `fields` or `context` cannot be sent. Nothing was.
            MessageTooLarge: it is larger than the two sides agreed on. Nothing was sent.
            ConnectionClosed, ConnectionLost: it was over before. Nothing was sent.
            RemoteError: on leaving, where the answer is waited for: it is an error.
            RecursionError, RuntimeError: as by `request`.
        """
        check_run(self._home, self)
        await trio.lowlevel.checkpoint()
        depth = next_depth()
        if not self._may_ask(depth):
            await self._refuse()
        deadline = trio.current_effective_deadline()
        call = self._calls.ask(fields, deadline, depth=depth, context=context, has_channel=True)
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
        """Whether the peer takes a request of that depth, as far as is known."""
        return not self._ending.is_over and (depth > 0 or not self._session.peer_drains)

    async def _refuse(self) -> NoReturn:
        """Raise why nothing can be asked any more."""
        await trio.lowlevel.checkpoint()
        if self._ending.is_over:
            raise self._ending.make_error(may_have_run=False)
        raise ConnectionLost(DRAINING_MESSAGE, may_have_run=False)

    def _watch_slots(self) -> None:
        if self._nursery is not None:
            self._calls.watch_slots(self._nursery, self)

    @trio.lowlevel.enable_ki_protection
    async def ping(self) -> float:
        """Ask the peer for a sign of life and wait for it.

        Returns:
            The round trip in seconds, with the time that the ping waits behind what is being sent.

        Raises:
            ConnectionClosed, ConnectionLost: the connection is over.
            RuntimeError: called from another Trio run.
        """
        check_run(self._home, self)
        await check_cancelled()
        if self._ending.is_over:
            await self._refuse()
        return await self._pings.ask(self._send_ping)

    @trio.lowlevel.enable_ki_protection
    async def aclose(self) -> None:
        """Close the connection, and wait until the transport is closed, for at most a second or so.

        Requests of this side that wait for an answer fail with `ConnectionClosed`, handlers are
        cancelled, but not waited for, so a handler may call this; being cancelled, it does not
        return to it. Again, or after the connection was lost, it does nothing. Cancelled, it
        returns at once, and the closing goes on.

        Raises:
            RuntimeError: called from another Trio run.
        """
        check_run(self._home, self)
        self._close("this side closed the connection")
        await self._ending.stream_closed.wait()

    @trio.lowlevel.enable_ki_protection
    def drain(self) -> None:
        """Take no new request, let those in flight finish both ways, and close. Returns at once.

        New requests of the peer fail there as not run; those in flight may take their time, with all
        requests that their handlers, here and there, make in turn. `wait_closed` waits for the end, and
        `aclose` hastens it.

        Raises:
            RuntimeError: called from another Trio run.
        """
        check_run(self._home, self)
        if not self._ending.is_over:
            self._session.drain()
            self._note_draining()
            self._sender.packet_queued()

    def _note_draining(self) -> None:
        if self._draining is not None:
            self._draining.set()

    async def wait_closed(self) -> None:
        """Wait until all of it has ended: transport, handlers and close handler.

        Raises:
            RuntimeError: called from one of the connection's own tasks (a handler, or a task it
                started), which would wait for itself; or from another Trio run.
        """
        check_run(self._home, self)
        if current_task_is_under(self._task):
            raise RuntimeError("a task of the connection cannot wait until it has ended")
        await self._ending.ended.wait()

    # ---- its life ----

    @trio.lowlevel.enable_ki_protection
    async def _run(self, open_handler: ConnectionHandler | None = None) -> None:
        """Live, in this task, until the connection is over and all its tasks have ended."""
        self._task = trio.lowlevel.current_task()
        ended_by: BaseException | None = None
        try:
            async with bare_nursery() as nursery:
                self._nursery = nursery
                self._watchdog.start()
                self._reader.start(nursery)
                if open_handler is None:
                    self._handlers.ready.set()
                else:
                    self._opening = trio.CancelScope()  # now, as it may be over before that task runs
                    nursery.start_soon(self._open, open_handler, self._opening)
                await self._send()
        except Exception as exc:
            # But one that a handler left a nursery open in, for which Trio raises this at its end.
            logger.error("%r: a task of the connection ended badly", self, exc_info=exc)
        except BaseException as exc:  # noqa: BLE001  (raised again below)
            ended_by = exc
        try:
            if self._handlers.ready.is_set() and self._close_handler is not None:
                with isolate_failures(partial(self._log, "the close handler failed")):
                    # Under a cancellation from outside, it gets that at its first checkpoint.
                    await call_user(self._close_handler, self)
        except trio.Cancelled as exc:
            ended_by = ended_by or exc  # it must not replace what ends the program
        finally:
            self._ending.ended.set()
            if self._observer is not None:
                self._observer.tell_ended()
            self._break_cycles()
        if ended_by is not None:
            try:
                raise ended_by
            finally:
                del ended_by  # or this frame and its traceback would keep each other alive

    def _break_cycles(self) -> None:
        """Break the reference cycles, so that the connection is freed at once."""
        del self._sender, self._reader
        self._handlers.forget()
        self._channels.forget()
        self._calls.forget()
        self._task = self._nursery = self._observer = None

    @trio.lowlevel.enable_ki_protection
    async def _open(self, open_handler: ConnectionHandler, scope: trio.CancelScope) -> None:
        """Run the open handler, and let requests be handled if it returned; if not, it is over."""
        try:
            with scope, isolate_failures(partial(self._log, "the open handler failed")):
                await call_user(open_handler, self)
                self._handlers.ready.set()
                self._sender.wake_task()  # a drained connection ends now
        finally:
            if not self._handlers.ready.is_set():
                self._close("the open handler failed")

    def _log(self, what: str, error: BaseException) -> None:
        logger.error("%r: %s", self, what, exc_info=error)

    def _wake_writers(self) -> None:
        self._channels.wake_writers()
        if self._session.has_room_for_answers:
            self._handlers.let_begin()

    def _count_waiting(self) -> int:
        return self._session.waiting_bytes

    def _send_ping(self) -> None:
        """Queue a ping. The watchdog's go also where one is out that the peer has not answered."""
        if not self._pings.is_out:
            self._pings.start_round()
        self._session.ping()
        self._sender.packet_queued()

    # ---- its end ----

    def _close_if_drained(self) -> None:
        if self._session.is_drained and self._handlers.ready.is_set():
            self._close("this side drained the connection")

    def _close(self, reason: str) -> None:
        """Close from this side; `aclose` without the waiting."""
        self._end(reason, is_local=True, graceful=True)
        self._closing.hasten()

    def _fail(self, reason: str, cause: BaseException | None = None, *, graceful: bool = False) -> None:
        peer = self._describe_peer()
        self._end(f"{reason} ({peer})" if peer else reason, is_local=False, cause=cause, graceful=graceful)

    def _describe_peer(self) -> str:
        user = f"user {self.user!r}" if self.user is not None and self._side == "server" else ""
        where = "" if self._address is None else f"at {self._address}"
        return " ".join(filter(None, (user, where)))

    def _on_defect(self, error: BaseException) -> None:
        logger.error("%r: a defect of bokbok_trio ends the connection", self, exc_info=error)
        self._fail(f"internal error: {describe_error(error)}", error)

    def _on_protocol_error(self, error: ProtocolError) -> None:
        logger.warning("%r: the peer broke the protocol: %s", self, error)
        self._session.abort(str(error))
        self._fail(f"the peer broke the protocol: {error}", error, graceful=True)

    def _end(
        self, reason: str, *, is_local: bool, graceful: bool, cause: BaseException | None = None
    ) -> None:
        """It is over. `graceful`: send what is queued, and say so to the peer, within `CLOSE_TIMEOUT`."""
        until = trio.current_time() + CLOSE_TIMEOUT if graceful else -math.inf
        if not self._ending.begin(reason, is_local=is_local, until=until, cause=cause):
            return
        self._note_draining()
        self._sender.stop()
        self._reader.discard()
        self._watchdog.stop()
        if self._opening is not None:
            self._opening.cancel()
        # Handlers first: one that waits for an answer here must end by its cancellation.
        self._handlers.cancel_all()
        self._calls.fail_all(self._ending)
        self._pings.end(partial(self._ending.make_error, may_have_run=True))
        self._channels.break_all(self._ending.make_error(may_have_run=True))
        self._session.close()

    # ---- the sender ----

    async def _send(self) -> None:
        """Send until it is over, and close the stream."""
        try:
            try:
                await self._sender.run()
            except BaseException as exc:  # noqa: BLE001  (whatever a stream raises, it is broken)
                error, rest = split_exception(exc)
                if error is not None:
                    await self._note_send_failure(error)
                if rest is not None:
                    self._part()
                    try:
                        raise rest from rest.__cause__
                    finally:
                        del error, rest  # or this frame and the traceback would keep each other alive
            else:
                await self._closing.say_end()
        except BaseException as exc:  # noqa: BLE001  (what is not logged is raised on)
            log_or_reraise(exc, self._log_closing)
        finally:
            self._end("the connection was cancelled", is_local=True, graceful=False)
            self._reader.stop()
            try:
                if not self._stream.close_nowait():
                    await trio.aclose_forcefully(self._stream)
            except BaseException as exc:  # noqa: BLE001  (as above)
                log_or_reraise(exc, self._log_closing)
            finally:
                self._ending.stream_closed.set()

    def _part(self) -> None:
        """Cancelled from outside, let the peer know: else this looks like a stream that somebody cut."""
        if self._server is not None:
            self._session.drain()  # it is the server that ends
        self._sender.say_end_now()

    async def _note_send_failure(self, error: BaseException) -> None:
        """Sending failed. Answers that came before are still good: the reader gets a moment for them."""
        if not self._sender.is_in_stream:
            self._on_defect(error)
            return
        if not isinstance(error, STREAM_ERRORS) and not self._ending.is_over:
            logger.error("%r: a stream raised an error that streams do not raise", self, exc_info=error)
        with trio.move_on_after(CLOSE_TIMEOUT):
            await self._ending.over.wait()
        self._fail(f"sending failed: {describe_error(error)}", error)

    def _log_closing(self, error: BaseException) -> None:
        self._log("closing the stream failed", error)

    # ---- what arrives ----

    def _on_answer(self, answer: Answer) -> None:
        self._calls.settle(answer.id, answer.fields)

    def _on_failure(self, failure: Failure) -> None:
        self._calls.settle(failure.id, as_error(failure))

    def _on_channel(self, event: Item | End) -> None:
        self._channels.on_event(event)

    def _on_cancel(self, event: Cancel) -> None:
        self._handlers.cancel(event.id)

    def _on_bye(self, bye: Bye) -> None:
        self._note_draining()
        for id in bye.ids:
            self._calls.settle(id, ConnectionLost(DRAINING_MESSAGE, may_have_run=False))

    def _on_pong(self, _pong: Pong) -> None:
        if self._pings.on_pong():
            self._send_ping()

    def _on_abort(self, abort: Abort) -> None:
        text = f"this side broke the protocol, says the peer: {escape(abort.message)} [{escape(abort.code)}]"
        logger.warning("%r: %s", self, text)
        self._fail(text)


_DISPATCH: Final[DispatchTable] = {
    Request: leave_to_reader,
    Answer: Connection._on_answer,
    Failure: Connection._on_failure,
    Item: Connection._on_channel,
    End: Connection._on_channel,
    Cancel: Connection._on_cancel,
    Bye: Connection._on_bye,
    Pong: Connection._on_pong,
    Abort: Connection._on_abort,
}
