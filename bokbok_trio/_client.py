"""`open_connection`: dial, shake hands, and run the connection for as long as a block."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import trio

from ._addresses import Address, AddressLike, as_address, require_loopback
from ._arguments import check_flag, check_handlers, check_key_arguments, check_settings
from ._combined import CombinedHandler, split_handler
from ._connection.connection import Connection
from ._errors import AuthenticationError, ConnectionRefused, HandshakeError
from ._instruments import watch_handshake
from ._keys import Key
from ._settings import Settings
from ._sockets import dial, stream_address
from ._stream.establish import establish_as_client
from ._trio_util import bare_nursery, block
from ._types import ChannelHandler, ConnectionHandler, RequestHandler


@block
async def open_connection(
    to: AddressLike | trio.abc.Stream,
    *,
    user: str | None = None,
    key: Key | None = None,
    service: str = "",
    insecure: bool = False,
    request_handler: RequestHandler | CombinedHandler | None = None,
    channel_handler: ChannelHandler | None = None,
    close_handler: ConnectionHandler | None = None,
    settings: Settings = Settings(),  # noqa: B008  (immutable)
) -> AsyncGenerator[Connection]:
    """Open a connection, which is closed when the block is left.

    ::

        async with open_connection("localhost:12345", user="myuser", key=key) as connection:
            answer = await connection.request(["ping", "12345"])

    An exception of the block is raised as itself. The loss of the connection raises nothing in the block: the
    requests that wait for an answer fail, and the block goes on.

    Arguments:
        to: an address, as a str or parsed, or the path of a UNIX socket as a path object; or an open
            stream, which then belongs to the connection.
        user, key: the user's name (1 to 255 bytes of UTF-8) and pre-shared key. With both, the connection is
            encrypted and authenticated both ways, or is not opened; with neither, it is plain. Neither falls
            back to the other.
        service: the name of the service to reach, at most 255 bytes of UTF-8 in normal form C. It is
            never sent. A server with another service is refused as if it had another key.
        insecure: allow plain TCP to another machine.
        request_handler: handles requests of the other side, many at once; see `RequestHandler`. A
            `CombinedHandler` handles requests and channels.
        channel_handler: handles requests with a channel, as `Connection.open_channel` makes them.
        close_handler: called once, after the connection and all its handlers have ended.
        settings: the bounds of this side.

    Raises:
        TypeError: `user` without `key`, `key` without `user`, or an argument of the wrong type.
        ValueError: the user name or the service is invalid, or `service` comes without a key, so that nothing
            could check it.
        AddressError: the address is invalid, or is plain TCP to another machine without `insecure`.
        OSError: the name is not found, or no server answers there, or not within ``connect_timeout``.
        HandshakeError: the peer does not speak bokbok, broke the rules, or was too slow.
        AuthenticationError: the server refused the user and key, or could not prove that it has the key; or,
            over a UNIX socket, it has no name for this process.
        ConnectionRefused: the server has no room, or is stopping.
    """
    check_key_arguments(user, key, service)
    on_request, on_channel = split_handler(request_handler, channel_handler)
    check_handlers(request_handler=on_request, channel_handler=on_channel, close_handler=close_handler)
    check_flag("insecure", insecure)
    check_settings(settings)
    connection = await connect(
        to if isinstance(to, trio.abc.Stream) else as_address(to),
        user=user,
        key=key,
        service=service,
        insecure=insecure,
        request_handler=on_request,
        channel_handler=on_channel,
        close_handler=close_handler,
        settings=settings,
    )
    async with bare_nursery() as nursery:
        nursery.start_soon(connection._run)
        try:
            yield connection
        finally:
            connection._close("this side closed the connection")


async def connect(
    to: Address | trio.abc.Stream,
    *,
    user: str | None,
    key: Key | None,
    service: str,
    insecure: bool,
    request_handler: RequestHandler | None,
    channel_handler: ChannelHandler | None,
    close_handler: ConnectionHandler | None,
    settings: Settings,
) -> Connection:
    """Dial and shake hands. The caller has checked the arguments, and must run the connection."""
    if isinstance(to, trio.abc.Stream):
        stream = to
    else:
        stream = await dial(to, insecure=insecure or key is not None, timeout=settings.connect_timeout)
    address = stream_address(stream)
    try:
        if key is None and not insecure:
            require_loopback(address)
        with watch_handshake(settings._instruments, "client", address):
            opened = await establish_as_client(stream, user=user, key=key, service=service, settings=settings)
    except HandshakeError as exc:
        await trio.aclose_forcefully(stream)
        raise _locate(exc, user, _name_place(to, address)) from exc.__cause__
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return Connection(
        opened,
        side="client",
        address=address,
        settings=settings,
        request_handler=request_handler,
        channel_handler=channel_handler,
        close_handler=close_handler,
    )


def _name_place(to: Address | trio.abc.Stream, address: Address | None) -> str:
    """Return the address that was dialled, for a message, and the one that answered, if they differ."""
    if isinstance(to, trio.abc.Stream):
        return "the other end of the stream" if address is None else str(address)
    return str(to) if address in {to, None} else f"{to} ({address})"


def _locate(error: HandshakeError, user: str | None, place: str) -> HandshakeError:
    """Return an error of the handshake with the user, the place, and what to check."""
    if isinstance(error, ConnectionRefused):
        return ConnectionRefused(f"{place}: {error.message}", error.code)
    if not isinstance(error, AuthenticationError):
        return HandshakeError(f"{place}: {error}")
    if user is None:
        return AuthenticationError(
            f"authentication failed at {place}: the server has no name for this process"
        )
    failed = f"authentication failed for user {user!r} at {place}"
    if "prove" in str(error):
        return AuthenticationError(f"{failed}: {error}")
    return AuthenticationError(f"{failed}: check the user name, the key and the service")


def end_reason(connection: Connection) -> str:
    """Return why a connection has ended, for a log line."""
    return connection.reason or "it is draining"
