"""`serve` and `open_server`: accept connections until told to stop.

Theory
======

Each listener has a task that accepts. These tasks are in a cancel scope of their own, so accepting can stop
while the connections, each a task in another nursery, go on. After `Server.stop` the accepting ends; every
connection drains: it takes no new request, finishes those it is handling, and closes; the connections that
are left when the grace is over are closed, which cancels the handlers; and the server has stopped when the
last task has ended.

A connection gets its place for the handshake (see `_places`) when it is accepted, and keeps it until the
handshake has ended. A client that was refused may then linger for a moment, without a place.

A connection's task never fails: what goes wrong in it is logged, and is over with it.
"""

from __future__ import annotations

import errno
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import Final, final

import trio

from ._accepting import ACCEPT_PAUSE, SHORTAGES, accept_one, fit_descriptors
from ._addresses import Address, AddressLike
from ._arguments import (
    check_backlog,
    check_flag,
    check_grace,
    check_handlers,
    check_peer_user,
    check_settings,
    check_unix_mode,
    check_user_key,
)
from ._client import end_reason
from ._combined import CombinedHandler, split_handler
from ._connection.connection import Connection
from ._errors import ConnectionRefused, HandshakeError
from ._instruments import watch_handshake
from ._listening import Listeners, open_listeners
from ._places import Place, Places, find_source
from ._settings import Settings
from ._sockets import listener_address
from ._statistics import ServerStatistics
from ._stream.establish import Displaced, Refusal, ServerStopped, establish_as_server, linger
from ._stream.handshake_io import NothingCame
from ._throttle import Throttle
from ._trio_util import bare_nursery, block, check_run, describe_error, isolate_failures, log_or_reraise
from ._types import ChannelHandler, ConnectionHandler, PeerUser, RequestHandler, UserKey

DEFAULT_GRACE: Final = 5.0
"""Seconds that requests in flight may take when a server stops."""

logger = logging.getLogger("bokbok_trio")


@final
class Server:
    """A running server, made by `serve` or `open_server`."""

    def __init__(
        self,
        listeners: Listeners,
        *,
        request_handler: RequestHandler | None,
        channel_handler: ChannelHandler | None,
        open_handler: ConnectionHandler | None,
        close_handler: ConnectionHandler | None,
        user_key: UserKey | None,
        peer_user: PeerUser | None,
        service: str,
        settings: Settings,
    ) -> None:
        self._listeners = list(listeners)
        found = map(listener_address, listeners)
        self._addresses = tuple(address for address in found if address is not None)
        self._request_handler = request_handler
        self._channel_handler = channel_handler
        self._open_handler = open_handler
        self._close_handler = close_handler
        self._user_key = user_key
        self._peer_user = peer_user
        self._service = service
        self._settings = settings
        self._name = repr(self)  # for log lines, which may be kept, and must keep nothing alive
        self._home = trio.lowlevel.current_trio_token()
        self._lingering = 0  # refused clients that may still have to read that
        self._throttle = Throttle(logger)
        self._connections: set[Connection] = set()
        self._admitted = 0
        self._of_user: Counter[str | None] = Counter()
        self._max_connections, self._max_handshakes, self._max_lingering = fit_descriptors(settings)
        self._places = Places(self._max_handshakes, settings.max_lookups)
        if self._max_connections < settings.max_connections:
            logger.info(
                "%s: takes %d connections at once, and not %d, as this process may not have more open files "
                "(raise that limit by ulimit -n)",
                self._name,
                self._max_connections,
                settings.max_connections,
            )
        self._accepting = trio.CancelScope()
        self._grace = trio.CancelScope()
        self._stopping = False
        self._idle = trio.Event()  # set when stopping and no connection is left
        self._stopped = trio.Event()

    def __repr__(self) -> str:
        return f"<bokbok_trio.Server on {', '.join(map(str, self._addresses)) or 'listeners'}>"

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where it listens: real addresses, port 0 resolved. None of listeners that are no sockets."""
        return self._addresses

    @property
    def connections(self) -> frozenset[Connection]:
        """The open connections, as of now."""
        return frozenset(connection for connection in self._connections if not connection.closed)

    def statistics(self) -> ServerStatistics:
        """Count what goes on, for logs and gauges."""
        return ServerStatistics(
            connections=self._admitted,
            max_connections=self._max_connections,
            handshakes=len(self._places),
            max_handshakes=self._max_handshakes,
            handlers_running=sum(len(each._handlers) for each in self._connections),
        )

    def stop(self, grace: float = DEFAULT_GRACE) -> None:
        """Stop: accept nothing more, let the requests in flight finish, then cancel. Returns at once.

        New requests are answered as not run. A connection closes when its last handler has ended.
        May be called from a handler, whose own request is then in flight. Calling it again may
        shorten the grace, and never lengthens it.

        Arguments:
            grace: seconds that the requests in flight may take; 0 cancels them at once.

        Raises:
            TypeError, ValueError: `grace` is not a number of seconds, or negative.
            RuntimeError: called from another thread or Trio run.
        """
        check_run(self._home, self)
        check_grace(grace)
        self._grace.deadline = min(self._grace.deadline, trio.current_time() + grace)
        if self._stopping:
            return
        self._stopping = True
        self._accepting.cancel()
        for connection in self._connections:
            connection.drain()
        # Whoever has said hello goes on, to be told that the server is stopping.
        self._places.cancel_all(silent_only=True)
        self._note_idle()

    async def wait_stopped(self) -> None:
        """Wait until it has stopped: all connections closed, all handlers ended.

        In a handler this waits for that handler too, so it lasts until the grace is over and the
        handler is cancelled.

        Raises:
            RuntimeError: called from another thread or Trio run.
        """
        check_run(self._home, self)
        await self._stopped.wait()

    # ---- its life ----

    @trio.lowlevel.enable_ki_protection
    async def _run(self, task_status: trio.TaskStatus[Server]) -> None:
        """Accept and serve until stopped, in this task."""
        try:
            async with bare_nursery() as nursery:
                try:
                    task_status.started(self)  # the listeners listen already
                    with self._accepting:
                        async with bare_nursery() as acceptors:
                            acceptors.start_soon(self._throttle.run)
                            for listener in self._listeners:
                                acceptors.start_soon(self._accept, listener, nursery)
                    with self._grace:
                        await self._idle.wait()
                finally:
                    # Stopped, cancelled, or unable to accept: nobody may be left behind.
                    self._stopping = True
                    self._places.cancel_all()
                    self._log_unfinished()
                    for connection in self._connections:
                        connection._close("the server stopped")
        finally:
            self._throttle.flush()
            self._stopped.set()

    @trio.lowlevel.enable_ki_protection
    async def _accept(self, listener: trio.abc.Listener[trio.abc.Stream], nursery: trio.Nursery) -> None:
        """Accept until cancelled, or until the listener breaks, which ends the server."""
        async with listener:
            while True:
                try:
                    stream, address = await accept_one(listener)
                except OSError as exc:
                    if exc.errno not in SHORTAGES:
                        raise
                    name = errno.errorcode[exc.errno]
                    text = "%s: accepting failed: %s (%s); trying again in %g seconds"
                    self._throttle.log(
                        "shortage", logging.ERROR, text, self._name, name, exc.strerror, ACCEPT_PAUSE
                    )
                    self._places.displace_early()  # or strangers could keep what there is for long
                    await trio.sleep(ACCEPT_PAUSE)
                    continue
                place = self._places.take(find_source(address))
                if place is None:
                    nursery.start_soon(self._turn_away, stream, address)
                else:
                    nursery.start_soon(self._serve_stream, stream, address, place)

    @trio.lowlevel.enable_ki_protection
    async def _turn_away(self, stream: trio.abc.Stream, address: Address | None) -> None:
        """Close a connection that got no place."""
        with isolate_failures(partial(self._log_failure, address)):
            try:
                with watch_handshake(self._settings._instruments, "server", address):
                    raise Displaced("there was no place for its handshake")
            finally:
                await trio.aclose_forcefully(stream)

    @trio.lowlevel.enable_ki_protection
    async def _serve_stream(self, stream: trio.abc.Stream, address: Address | None, place: Place) -> None:
        """Serve one connection, in a task of its own, and keep what goes wrong to it.

        As this lasts as long as the connection, what only the handshake needs is in frames of others.
        """
        connection: Connection | None = None
        try:
            connection = await self._shake_hands(stream, address, place)
            del place
            if connection is not None:
                began = trio.current_time()
                logger.info("%s: connected with %s, user %r", self._name, address, connection.user)
                await connection._run(self._open_handler)
                seconds = trio.current_time() - began
                logger.info(
                    "%s: the connection with %s, user %r, has ended after %.1f seconds, with %d requests "
                    "received and %d made: %s",
                    *(self._name, address, connection.user, seconds),
                    *(connection._session.received, connection._session.made, end_reason(connection)),
                )
        except BaseException as exc:  # noqa: BLE001  (what is not kept is raised on)
            log_or_reraise(exc, partial(self._log_failure, address))
        finally:
            if connection is None:
                await trio.aclose_forcefully(stream)
            else:  # it has closed it itself
                self._connections.discard(connection)
                self._connection_ended(connection.user)

    def _log_failure(self, address: Address | None, error: BaseException) -> None:
        if isinstance(error, NothingCame):
            logger.debug("%s: no connection with %s: %s", self._name, address, error)
        elif isinstance(error, HandshakeError):
            # Lines of one kind are throttled, and those about strangers must not hide those about users.
            kind, level = type(error).__name__, logging.WARNING
            if isinstance(error, ServerStopped) or (
                isinstance(error, ConnectionRefused) and error.code == "stopping"
            ):
                kind, level = "stopping", logging.INFO  # what was asked for
            self._throttle.log(
                kind,
                level,
                "%s: no connection with %s: %s",
                self._name,
                address,
                describe_error(error),
            )
        else:
            logger.error("%s: the connection with %s failed", self._name, address, exc_info=error)

    def _log_of_users(self, kind: str, message: str, *args: object, error: BaseException | None) -> None:
        """Log what the application's own functions did wrong: as often as strangers come."""
        self._throttle.log(kind, logging.ERROR, message, *args, error=error)

    def _find_refusal(self, user: str | None) -> Refusal | None:
        """Why one more client cannot stay; None: it can."""
        if self._stopping:
            return Refusal("stopping", "the server is stopping", "the server is stopping")
        if self._admitted >= self._max_connections:
            return Refusal(
                "busy",
                "the server has as many connections as it takes (see its max_connections); try again later",
                f"there are {self._max_connections} connections already",
            )
        most = self._settings.max_connections_per_user
        if most is not None and user is not None and self._of_user[user] >= most:
            return Refusal(
                "busy",
                f"this user has {most} connections, as many as it may (see max_connections_per_user)",
                f"user {user!r} has {most} connections already (max_connections_per_user)",
            )
        return None

    async def _shake_hands(
        self, stream: trio.abc.Stream, address: Address | None, place: Place
    ) -> Connection | None:
        """Open a connection. When this returns one, it counts, until `_connection_ended` is called.

        None: it came to nothing, which was logged, and the client had its time to read why.
        """
        admitted: tuple[str | None] | None = None  # the user, if it was

        def admit(user: str | None) -> Refusal | None:
            nonlocal admitted
            refusal = self._find_refusal(user)
            if refusal is None:
                self._admitted += 1
                self._of_user[user] += 1
                admitted = (user,)
            return refusal

        try:
            try:
                with watch_handshake(self._settings._instruments, "server", address):
                    opened = await establish_as_server(
                        stream,
                        user_key=self._user_key,
                        peer_user=self._peer_user,
                        service=self._service,
                        settings=self._settings,
                        admit=admit,
                        place=place,
                        log=self._log_of_users,
                    )
            finally:
                place.leave()
                self._note_idle()
            connection = Connection(
                opened,
                side="server",
                address=address,
                settings=self._settings,
                request_handler=self._request_handler,
                channel_handler=self._channel_handler,
                close_handler=self._close_handler,
                server=self,
            )
        except BaseException as exc:
            if admitted is not None:
                self._connection_ended(*admitted)
            if not isinstance(exc, HandshakeError):
                raise
            self._log_failure(address, exc)
            if not place.scope.cancel_called:
                await self._linger(stream)
            return None
        self._connections.add(connection)
        if self._stopping:
            connection.drain()
        return connection

    async def _linger(self, stream: trio.abc.Stream) -> None:
        """Let a client read why it was refused; as many at once as may shake hands."""
        if self._lingering < self._max_lingering:
            self._lingering += 1
            try:
                await linger(stream)
            finally:
                self._lingering -= 1

    def _log_unfinished(self) -> None:
        """Say which requests are in flight though the grace is over: the server waits for their handlers."""
        found = [
            f"{len(ids)} of user {each.user!r} at {each.address} ({', '.join(map(str, ids))})"
            for each in self._connections
            if (ids := sorted(each._handlers.ids))
        ]
        if found:
            number = sum(len(each._handlers) for each in self._connections)
            logger.info("%s: cancelling %d requests in flight: %s", self._name, number, "; ".join(found))

    def _connection_ended(self, user: str | None) -> None:
        """One connection less."""
        self._admitted -= 1
        self._of_user[user] -= 1
        if not self._of_user[user]:
            del self._of_user[user]
        self._note_idle()

    def _note_idle(self) -> None:
        if self._stopping and not self._admitted and not self._places.has_greeted:
            self._idle.set()


@trio.lowlevel.enable_ki_protection
async def serve(
    on: AddressLike | Sequence[AddressLike | trio.abc.Listener[trio.abc.Stream]],
    request_handler: RequestHandler | CombinedHandler | None = None,
    *,
    channel_handler: ChannelHandler | None = None,
    user_key: UserKey | None = None,
    peer_user: PeerUser | None = None,
    open_handler: ConnectionHandler | None = None,
    close_handler: ConnectionHandler | None = None,
    service: str = "",
    insecure: bool = False,
    backlog: int | None = None,
    unix_mode: int = 0o600,
    settings: Settings = Settings(),  # noqa: B008  (immutable)
    task_status: trio.TaskStatus[Server] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve connections until `Server.stop` is called, or this is cancelled.

    ::

        async with trio.open_nursery() as nursery:
            server = await nursery.start(serve, "localhost:0", handler)

    No failure of a handler, and nothing a peer does, comes out of it; see the ``bokbok_trio``
    logger. ``KeyboardInterrupt`` and ``SystemExit`` of a handler end it, and come out bare.

    Arguments:
        on: an address to listen on, as a str or parsed, or a path object; or a sequence of addresses and
            listeners, which are then the server's to close. A host name is all of its addresses that
            this machine has, with one port.
        request_handler: handles requests, many at once; see `RequestHandler`; or what
            handles these and channels, see `CombinedHandler`.
        channel_handler: handles requests with a channel, as `Connection.open_channel` makes them.
        user_key: how to find the pre-shared key of a user: an async function from the name to a
            `Key`, a sequence of keys (the old and the new, while one replaces the other; 16 at
            most are tried) or None; or a mapping, such as a `Keyring`. With it, connections are
            encrypted and authenticated; without, they are plain. Nothing ever falls back.
        peer_user: for plain connections over a UNIX socket, how to name who is at the other end: a
            function, not async, from `PeerCredentials` to the user's name, or None. It must not
            block. That name is `Connection.user`. Where there is none, or it raises, which is logged,
            or it is no user name, the peer is refused and raises `AuthenticationError`. Other users
            than this process's own can only connect where `unix_mode` lets them.
        open_handler: called when a connection is open, before any request on it is handled. What it
            raises closes the connection.
        close_handler: called once after a connection and all its handlers have ended, if the open
            handler returned. What it raises is logged. A stopping server waits for it, however long
            it takes.
        service: names what is served, at most 255 bytes of UTF-8; see `open_connection`.
        insecure: allow plain TCP on other interfaces than loopback.
        backlog: connections that may wait to be accepted, 0 or more; None for the system's choice.
        unix_mode: permissions of the file of a UNIX socket, as in ``0o660``; who may write may connect.
        settings: the bounds of each connection, and of their number.

    Returns:
        Through ``nursery.start``, the `Server`, as soon as it listens.

    Raises:
        TypeError, ValueError: an argument is wrong: a handler is not async, say, or takes other arguments
            than it is called with; or `user_key` is a dict with values that are no keys, or with a name that
            no user can have. Or `peer_user` comes with `user_key`.
        AddressError: no address, or one in use, or plain TCP elsewhere without `insecure`; or
            `peer_user` for TCP, or on another system than Linux.
        OSError: the system does not let it listen or accept.
    """
    check_user_key(user_key, service)
    check_peer_user(peer_user, user_key)
    on_request, on_channel = split_handler(request_handler, channel_handler)
    check_handlers(
        request_handler=on_request,
        channel_handler=on_channel,
        open_handler=open_handler,
        close_handler=close_handler,
    )
    check_flag("insecure", insecure)
    check_backlog(backlog)
    check_unix_mode(unix_mode)
    check_settings(settings)
    listeners = await open_listeners(
        on,
        backlog=backlog,
        mode=unix_mode,
        insecure=insecure or user_key is not None,
        credentials=peer_user is not None,
        timeout=settings.connect_timeout,
    )
    server = Server(
        listeners,
        request_handler=on_request,
        channel_handler=on_channel,
        open_handler=open_handler,
        close_handler=close_handler,
        user_key=user_key,
        peer_user=peer_user,
        service=service,
        settings=settings,
    )
    await server._run(task_status)


@block
async def open_server(
    on: AddressLike | Sequence[AddressLike | trio.abc.Listener[trio.abc.Stream]],
    request_handler: RequestHandler | CombinedHandler | None = None,
    *,
    channel_handler: ChannelHandler | None = None,
    user_key: UserKey | None = None,
    peer_user: PeerUser | None = None,
    open_handler: ConnectionHandler | None = None,
    close_handler: ConnectionHandler | None = None,
    service: str = "",
    insecure: bool = False,
    backlog: int | None = None,
    unix_mode: int = 0o600,
    settings: Settings = Settings(),  # noqa: B008  (immutable)
) -> AsyncGenerator[Server]:
    """Serve for as long as a block; the arguments and what is raised are those of `serve`.

    ::

        async with open_server("/run/app.sock", handler) as server:
            await server.wait_stopped()

    Leaving the block stops the server with the default grace of 5 s; by an exception, with none.
    What the block raises comes out as itself.
    """
    async with bare_nursery() as nursery:
        server = await nursery.start(
            partial(
                serve,
                on,
                request_handler,
                channel_handler=channel_handler,
                user_key=user_key,
                peer_user=peer_user,
                open_handler=open_handler,
                close_handler=close_handler,
                service=service,
                insecure=insecure,
                backlog=backlog,
                unix_mode=unix_mode,
                settings=settings,
            )
        )
        try:
            yield server
        except BaseException:
            server.stop(grace=0)
            raise
        server.stop()
