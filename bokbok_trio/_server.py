"""`serve` and `open_server`: accept connections until told to stop.

Theory
======

Each listener has a task that accepts. These tasks share a cancel scope, so that accepting can stop while the
clients, each in a task of another nursery, go on. ``_admission.py`` decides which clients stay.

`Server.stop` ends the accepting and drains every connection: it takes no new request, finishes those that it
handles, and closes. When the grace is over, the remaining connections are closed, which cancels their
handlers. The server has stopped when its last task has ended.

The task of a client never fails: its errors are logged.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import Final, final

import trio

from ._accepting import ACCEPT_PAUSE, SHORTAGES, accept_one
from ._addresses import Address, AddressLike
from ._admission import Admission
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
from ._listening import Listeners, open_listeners
from ._places import Place
from ._settings import Settings
from ._sockets import listener_address
from ._statistics import ServerStatistics
from ._throttle import Throttle
from ._trio_util import bare_nursery, block, check_run, log_or_reraise
from ._types import ChannelHandler, ConnectionHandler, PeerUser, RequestHandler, UserKey

DEFAULT_GRACE: Final = 5.0
"""Seconds that requests in flight may take when a server stops."""

logger = logging.getLogger("bokbok_trio")


@final
class Server:
    """A running server. `serve` and `open_server` make it."""

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
        self._settings = settings
        self._name = repr(self)  # for log records, which must not keep the server alive
        self._home = trio.lowlevel.current_trio_token()
        self._throttle = Throttle(logger)
        self._admission = Admission(
            self._name,
            user_key=user_key,
            peer_user=peer_user,
            service=service,
            settings=settings,
            throttle=self._throttle,
        )
        self._connections: set[Connection] = set()
        self._accepting = trio.CancelScope()
        self._grace = trio.CancelScope()
        self._stopped = trio.Event()

    def __repr__(self) -> str:
        return f"<bokbok_trio.Server on {', '.join(map(str, self._addresses)) or 'listeners'}>"

    @property
    def addresses(self) -> tuple[Address, ...]:
        """The addresses on which it listens, with the real port where port 0 was asked for. A listener that
        is not a socket has no address here.
        """
        return self._addresses

    @property
    def connections(self) -> frozenset[Connection]:
        """The connections that are open now."""
        return frozenset(connection for connection in self._connections if not connection.closed)

    def statistics(self) -> ServerStatistics:
        """Return the present numbers of connections, handshakes and handlers, for logs and gauges."""
        return ServerStatistics(
            connections=self._admission.admitted,
            max_connections=self._admission.max_connections,
            handshakes=len(self._admission.places),
            max_handshakes=self._admission.max_handshakes,
            handlers_running=sum(len(each._handlers) for each in self._connections),
        )

    def stop(self, grace: float = DEFAULT_GRACE) -> None:
        """Stop accepting, let the requests in flight finish, then cancel the rest. Returns at once.

        A new request gets an answer that says that it did not run. A connection closes when its last handler
        has ended. A handler may call this too: its own request is then in flight. A second call may shorten
        the grace, but never lengthens it.

        Arguments:
            grace: seconds that the requests in flight may take, 0 or more; 0 cancels them at once.

        Raises:
            TypeError, ValueError: `grace` is not a number of seconds, or negative.
            RuntimeError: called from another thread or Trio run.
        """
        check_run(self._home, self)
        check_grace(grace)
        self._grace.deadline = min(self._grace.deadline, trio.current_time() + grace)
        if self._admission.is_stopping:
            return
        self._admission.stop()
        self._accepting.cancel()
        for connection in self._connections:
            connection.drain()

    async def wait_stopped(self) -> None:
        """Wait until all connections are closed and all handlers have ended.

        A handler that calls this waits for itself too: until the grace is over, and it is cancelled.

        Raises:
            RuntimeError: called from another thread or Trio run.
        """
        check_run(self._home, self)
        await self._stopped.wait()

    # ---- the tasks ----

    @trio.lowlevel.enable_ki_protection
    async def _run(self, task_status: trio.TaskStatus[Server]) -> None:
        """Accept and serve until stopped."""
        try:
            async with bare_nursery() as nursery:
                try:
                    task_status.started(self)  # now: the listeners listen already
                    with self._accepting:
                        async with bare_nursery() as acceptors:
                            acceptors.start_soon(self._throttle.run)
                            for listener in self._listeners:
                                acceptors.start_soon(self._accept, listener, nursery)
                    with self._grace:
                        await self._admission.idle.wait()
                finally:
                    # Stop in any case: the server may be cancelled, or a listener broken.
                    self._admission.stop(at_once=True)
                    self._log_unfinished()
                    for connection in self._connections:
                        connection._close("the server stopped")
        finally:
            self._throttle.flush()
            self._stopped.set()

    @trio.lowlevel.enable_ki_protection
    async def _accept(self, listener: trio.abc.Listener[trio.abc.Stream], nursery: trio.Nursery) -> None:
        """Accept until cancelled. An error of the listener ends the server."""
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
                    self._admission.places.displace_early()  # strangers may hold the descriptors
                    await trio.sleep(ACCEPT_PAUSE)
                    continue
                place = self._admission.take_place(address)
                if place is None:
                    nursery.start_soon(self._admission.turn_away, stream, address)
                else:
                    nursery.start_soon(self._serve_stream, stream, address, place)

    @trio.lowlevel.enable_ki_protection
    async def _serve_stream(self, stream: trio.abc.Stream, address: Address | None, place: Place) -> None:
        """Serve one client, in a task of its own. Its errors are logged and go no further.

        This frame lasts as long as the connection, so it refers to nothing that only the handshake needs.
        """
        connection: Connection | None = None
        try:
            connection = await self._open(stream, address, place)
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
        except BaseException as exc:  # noqa: BLE001  (`log_or_reraise` raises it on, if it must)
            log_or_reraise(exc, partial(self._admission.log_failure, address))
        finally:
            if connection is None:
                await trio.aclose_forcefully(stream)
            else:  # the connection has closed the stream
                self._connections.discard(connection)
                self._admission.leave(connection.user)

    async def _open(
        self, stream: trio.abc.Stream, address: Address | None, place: Place
    ) -> Connection | None:
        """Shake hands with a client, and return its connection; None: it was refused, or failed."""
        established = await self._admission.shake_hands(stream, address, place)
        if established is None:
            return None
        try:
            connection = Connection(
                established,
                side="server",
                address=address,
                settings=self._settings,
                request_handler=self._request_handler,
                channel_handler=self._channel_handler,
                close_handler=self._close_handler,
                server=self,
            )
        except BaseException:
            self._admission.leave(established.user)
            raise
        self._connections.add(connection)
        if self._admission.is_stopping:
            connection.drain()
        return connection

    def _log_unfinished(self) -> None:
        """Log the requests in flight: the server waits until their handlers have heeded the cancellation."""
        found = [
            f"{len(ids)} of user {each.user!r} at {each.address} ({', '.join(map(str, ids))})"
            for each in self._connections
            if (ids := sorted(each._handlers.ids))
        ]
        if found:
            number = sum(len(each._handlers) for each in self._connections)
            logger.info("%s: cancelling %d requests in flight: %s", self._name, number, "; ".join(found))


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
    """Serve connections until `Server.stop` is called or the task is cancelled.

    ::

        async with trio.open_nursery() as nursery:
            server = await nursery.start(serve, "localhost:0", handler)

    Errors of handlers and of peers are logged by the ``bokbok_trio`` logger, and `serve` does not raise them.
    A ``KeyboardInterrupt`` or ``SystemExit`` of a handler ends the server, and is raised as itself.

    Arguments:
        on: an address to listen on, as a str or parsed, or a path object; or a sequence of addresses and
            listeners, which the server closes. A host name stands for all of its addresses that this machine
            has, with one port.
        request_handler: handles requests, many at once; see `RequestHandler`. A `CombinedHandler` handles
            requests and channels.
        channel_handler: handles requests with a channel, as `Connection.open_channel` makes them.
        user_key: finds the pre-shared key of a user: an async function that takes the name, and returns a
            `Key`, a sequence of keys (the old and the new, while one replaces the other; at most 16 are
            tried) or None; or a mapping, such as a `Keyring`. With `user_key`, connections are encrypted and
            authenticated; without, they are plain. Neither falls back to the other.
        peer_user: names the peer of a plain connection over a UNIX socket: a function, not async, that takes
            `PeerCredentials` and returns the user's name, or None. It must not block. The name becomes
            `Connection.user`. The peer is refused, and raises `AuthenticationError`, if there is no name, if
            it is not a valid user name, or if the function raises, which is logged. Users other than that of
            this process can connect only if `unix_mode` lets them.
        open_handler: called when a connection is open, before any request on it is handled. If it raises, the
            connection is closed.
        close_handler: called once after a connection and all its handlers have ended, if the open handler
            returned. Its errors are logged. A stopping server waits for it, however long it takes.
        service: the name of the service, at most 255 bytes of UTF-8; see `open_connection`.
        insecure: allow plain TCP on interfaces other than loopback.
        backlog: connections that may wait to be accepted, 0 or more; None for the system's choice.
        unix_mode: permissions of the file of a UNIX socket, such as ``0o660``; users who may write to it may
            connect.
        settings: the bounds of each connection, and of their number.

    Returns:
        Through ``nursery.start``, the `Server`, as soon as it listens.

    Raises:
        TypeError, ValueError: an argument is wrong: for example, a handler is not async, or takes other
            arguments than it is called with; `user_key` is a dict with a value that is not a key, or with a
            name that no user can have; or `peer_user` comes with `user_key`.
        AddressError: an address is invalid or in use, or is plain TCP on an interface other than loopback,
            without `insecure`; or `peer_user` comes with TCP, or on a system other than Linux.
        OSError: the system does not let the server listen or accept.
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
    """Serve for as long as a block. The arguments and errors are those of `serve`.

    ::

        async with open_server("/run/app.sock", handler) as server:
            await server.wait_stopped()

    Leaving the block stops the server with the default grace of 5 seconds, or with none if the block raises.
    An exception of the block is raised as itself.
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
