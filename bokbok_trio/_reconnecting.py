"""`open_reconnecting`: requests over the current connection, and over a new one when it is lost.

``_dialler.py`` opens the connections, ``_backoff.py`` says when. A request waits until there is a current
connection, and is sent over that one. If it fails, the connection knows whether the request has left, so that
it may have run. A request that may have run is not sent again, unless the caller said that it may run twice.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from functools import partial
from typing import Final, cast, final

import trio

from ._addresses import Address, AddressLike, as_address, check_dialable
from ._arguments import (
    check_flag,
    check_handlers,
    check_key_arguments,
    check_repeats,
    check_settings,
    is_several,
)
from ._backoff import Repeats
from ._client import connect
from ._combined import CombinedHandler, split_handler
from ._connection.channel import Channel
from ._connection.connection import Connection
from ._dialler import CLOSED, Dialler
from ._errors import ConnectionClosed, ConnectionLost
from ._keys import Key
from ._protocol.packets import encode_fields
from ._settings import Settings
from ._trio_util import bare_nursery, block, check_cancelled, check_run
from ._types import ChannelHandler, ConnectionHandler, Context, Fields, RequestHandler

DEFAULT_REPEATS: Final = 3
"""How often a request is repeated: one server that restarts, and then another, cost it two."""


@final
class ReconnectingConnection:
    """A client that opens a new connection when one is lost. `open_reconnecting` makes it."""

    def __init__(
        self,
        addresses: Sequence[Address],
        connect: Callable[[Address], Awaitable[Connection]],
        open_handler: ConnectionHandler | None,
        max_repeats: int,
    ) -> None:
        self._home = trio.lowlevel.current_trio_token()
        self._max_repeats = max_repeats
        self._dialler = Dialler(addresses, connect, open_handler)

    def __repr__(self) -> str:
        return repr(self._dialler)

    @property
    def connection(self) -> Connection | None:
        """The current connection; None while there is none.

        If you close or drain it, the next one is opened, as after a loss. To close the client, call
        `ReconnectingConnection.aclose` or leave the block.
        """
        return self._dialler.current

    @property
    def closed(self) -> bool:
        """Whether the client was closed, so that it takes no more requests."""
        return self._dialler.is_closed

    @trio.lowlevel.enable_ki_protection
    async def request(
        self, fields: Fields, *, idempotent: bool = False, context: Context | None = None
    ) -> list[bytes]:
        """Send a request over the current connection, or the next one, and wait for its answer.

        It waits as long as there is no connection: put a time limit around it. If the connection is lost, and
        the request certainly did not run, it is sent over the next connection. Any other request fails,
        unless it is idempotent.

        Arguments:
            fields: 0 to 255 fields, each bytes or str (sent as UTF-8). Later changes to them have no effect.
            context: as for `Connection.request`.
            idempotent: whether the request does no harm if it runs more than once. Then it is sent again when
                a connection was lost with it in flight: after a pause, of 0.2 s at first, and at most
                `max_repeats` times, because the request may be what ends the servers.

        Returns:
            The fields of the answer.

        Raises:
            TypeError, ValueError: `fields` is not such a sequence. Nothing was sent.
            MessageTooLarge: the request is larger than the two sides of this connection agreed on.
            RemoteError: the other side answered with an error.
            ConnectionLost: the connection was lost, or closed while the client was not, with the request in
                flight: it may have run. With an idempotent request, this happened once more than
                `max_repeats`.
            ConnectionClosed: the client was closed. The request may have run if it was in flight.
            RuntimeError: called by the open handler, which must send its requests over the connection that
                it was given. Or called from another thread or Trio run.
        """
        check_run(self._home, self)
        frozen = encode_fields(fields)
        repeats = Repeats(self, frozen, self._max_repeats)
        while True:
            await check_cancelled()
            connection = await self._dialler.wait_askable()
            try:
                answer = await connection.request(frozen, context=context)
            except ConnectionLost as exc:
                if exc.may_have_run:
                    if not idempotent:
                        raise
                    repeats.note_loss(exc)
            except ConnectionClosed as exc:
                if self.closed:
                    raise
                if exc.may_have_run:
                    if not idempotent:
                        raise ConnectionLost(str(exc)) from exc
                    repeats.note_loss(exc)
            else:
                return answer
            self._dialler.retire(connection)
            await self._dialler.pause(repeats.next_pause())

    @block
    async def open_channel(
        self, fields: Fields, *, context: Context | None = None
    ) -> AsyncGenerator[Channel]:
        """Send a request with a channel over the current connection, or the next one.

        It waits as long as there is no connection. The channel is one of `Connection.open_channel`: it is
        lost with its connection, and nothing is sent again.

        Arguments:
            fields: 0 to 255 fields, each bytes or str (sent as UTF-8).
            context: as for `Connection.request`.

        Raises:
            TypeError, ValueError: `fields` is not such a sequence. Nothing was sent.
            MessageTooLarge: the request is larger than the two sides of this connection agreed on.
            ConnectionClosed: the client was closed.
            RemoteError: as for `Connection.open_channel`.
            RuntimeError: as for `request`.
        """
        check_run(self._home, self)
        frozen = encode_fields(fields)
        await check_cancelled()
        has_entered = False
        while not has_entered:
            connection = await self._dialler.wait_askable()
            try:  # entering does not wait for the peer
                async with connection.open_channel(frozen, context=context) as channel:
                    has_entered = True
                    yield channel
            except (ConnectionLost, ConnectionClosed):
                if has_entered:
                    raise
                if self.closed:
                    raise ConnectionClosed(CLOSED) from None
                self._dialler.retire(connection)  # it was drained or closed since `wait_askable`

    @trio.lowlevel.enable_ki_protection
    async def aclose(self) -> None:
        """Close the client, and wait until all its streams are closed, for about a second at most.

        Requests that wait for an answer or for a connection raise `ConnectionClosed`. Otherwise this is like
        `Connection.aclose`, and a handler may call it too. If the call is cancelled, the client is closed
        nevertheless.

        Raises:
            RuntimeError: called from another thread or Trio run.
        """
        check_run(self._home, self)
        self._dialler.close()
        await trio.lowlevel.checkpoint()
        for connection in list(self._dialler.connections):
            await connection.aclose()


@block
async def open_reconnecting(
    to: AddressLike | Sequence[AddressLike],
    *,
    user: str | None = None,
    key: Key | None = None,
    service: str = "",
    insecure: bool = False,
    request_handler: RequestHandler | CombinedHandler | None = None,
    channel_handler: ChannelHandler | None = None,
    open_handler: ConnectionHandler | None = None,
    close_handler: ConnectionHandler | None = None,
    max_repeats: int = DEFAULT_REPEATS,
    settings: Settings = Settings(),  # noqa: B008  (immutable)
) -> AsyncGenerator[ReconnectingConnection]:
    """Stay connected for as long as a block: when a connection is lost, open the next one.

    ::

        async with open_reconnecting(["a.example:12345", "b.example:12345"], user="myuser", key=key,
                                     open_handler=subscribe) as client:
            with trio.fail_after(60):
                answer = await client.request(["ping", "12345"], idempotent=True)

    Entering the block waits until the first connection is open, however long that takes: put a time limit
    around it. The addresses are tried in turn. After the loss of a connection the next try is made at once,
    if the peer had asked or answered anything on it, or if it had lasted for ten seconds. After as many
    failed tries in a row as there are addresses, the client waits for a random time between half of a limit
    and the limit. The limit doubles with each round, from 0.2 s to 30 s. If a server had no room, or a
    handshake failed, it is at least 2 s for that one wait. ``docs/running.rst`` says how long a request may
    wait in all. A name is looked up each time it is dialled. The ``bokbok_trio`` logger gets failures as
    warnings, and orderly ends (the server stops, or this side closed or drained the connection) as
    information.

    An exception of the block is raised as itself. Leaving the block closes the client, and waits for the
    handlers and close handlers.

    Arguments:
        to: an address, as a str or parsed, or a sequence of addresses. A stream will not do, as nothing could
            open the next one.
        user, key, service, insecure, request_handler, channel_handler, settings: as for `open_connection`,
            for each connection.
        open_handler: called with each connection when it is open, before any other request is sent over it,
            and before any request of the peer is handled. So it can repeat whatever every connection must
            know, such as subscriptions. If it raises, the error is logged, the connection is closed, and the
            next is tried. It is cancelled when the connection is lost.
        close_handler: called once with each connection, after the connection and all its handlers have ended,
            if the open handler returned. Its errors are logged. The next connection may be open by then.
        max_repeats: how often an idempotent request is sent again after a connection was lost with it in
            flight; 0 or more. It is bounded because a request that kills its server also ends the requests of
            others.

    Raises:
        TypeError, ValueError, AddressError: as for `open_connection`; or there is no address, or
            `max_repeats` is not a whole number of at least 0. If plain TCP must not go to the machine that a
            name stands for, this is found when the name is dialled.
        AuthenticationError: a server refused the user and key, or could not prove that it has the key, before
            the first connection was open. Later it is one more failed try, because keys may be about to
            change. An ``OSError`` and any other `HandshakeError` are always failed tries.
    """
    check_key_arguments(user, key, service)
    on_request, on_channel = split_handler(request_handler, channel_handler)
    check_handlers(
        request_handler=on_request,
        channel_handler=on_channel,
        open_handler=open_handler,
        close_handler=close_handler,
    )
    check_flag("insecure", insecure)
    check_settings(settings)
    check_repeats(max_repeats)
    addresses = _as_addresses(to, insecure=insecure or key is not None)
    client = ReconnectingConnection(
        addresses,
        partial(
            connect,
            user=user,
            key=key,
            service=service,
            insecure=insecure,
            request_handler=on_request,
            channel_handler=on_channel,
            close_handler=close_handler,
            settings=settings,
        ),
        open_handler,
        max_repeats,
    )
    async with bare_nursery() as nursery:
        nursery.start_soon(client._dialler.run, nursery)
        try:
            await client._dialler.wait_current()
            yield client
        finally:
            client._dialler.close()


def _as_addresses(to: object, *, insecure: bool) -> Sequence[Address]:
    """Return the addresses that a user gave, as one or in a sequence.

    Raises:
        TypeError, ValueError, AddressError: there is none, or one cannot be dialled.
    """
    addresses = list(map(as_address, cast("Sequence[object]", to) if is_several(to) else [to]))
    if not addresses:
        raise ValueError("open_reconnecting takes at least one address")
    for address in addresses:
        check_dialable(address, insecure=insecure)  # a name is looked up only when it is dialled
    return addresses
