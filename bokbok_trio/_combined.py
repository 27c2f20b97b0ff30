"""One handler for requests and channels, and handlers that are added to an open connection.

`bokbok_trio.interface` needs both: one object serves calls and streams, and callbacks arrive on a connection
whose own handler knows nothing of them.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ._connection.connection import Connection
from ._connection.handlers import AddedHandlers
from ._types import ChannelHandler, RequestHandler

if TYPE_CHECKING:
    from ._connection.channel import Channel
    from ._types import Fields, ReconnectingConnection


@runtime_checkable
class CombinedHandler(Protocol):
    """A handler of requests and of requests with a channel in one object.

    Pass it in the place of a request handler: to `open_server`, `serve`, `open_connection`,
    `open_reconnecting` or `add_handler`. `bokbok_trio.interface.expose` makes such objects.
    """

    def handle_request(self, connection: Connection, request: list[bytes], /) -> Awaitable[Fields | None]:
        """Handle a request, as a `RequestHandler` does."""
        ...

    def handle_channel(
        self, connection: Connection, request: list[bytes], channel: Channel, /
    ) -> Awaitable[Fields | None]:
        """Handle a request with a channel, as a `ChannelHandler` does."""
        ...


def split_handler(
    request_handler: RequestHandler | CombinedHandler | None, channel_handler: ChannelHandler | None
) -> tuple[RequestHandler | None, ChannelHandler | None]:
    """Return the request handler and the channel handler that a user passed, as two or in one object.

    Raises:
        TypeError: the user passed a combined handler and a channel handler.
    """
    # Take a callable for a function, whatever attributes it has: a mock has all attributes.
    if callable(request_handler) or not isinstance(request_handler, CombinedHandler):
        return request_handler, channel_handler
    if channel_handler is not None:
        raise TypeError(
            f"{request_handler!r} handles channels itself: leave channel_handler out, or give two functions"
        )
    return request_handler.handle_request, request_handler.handle_channel


def add_handler(
    connection: Connection | ReconnectingConnection, first_field: bytes, handler: CombinedHandler
) -> None:
    """Let a handler handle all requests with a certain first field, from now on.

    This is for protocols on top of a connection, such as callbacks: the connection's own handler does not see
    these requests. An added handler cannot be removed. One that is added to a `ReconnectingConnection`
    handles the requests of all later connections too.

    Arguments:
        connection: the connection that the requests arrive on.
        first_field: the first field of the requests, as bytes.
        handler: handles these requests, with and without a channel.

    Raises:
        TypeError: `first_field` is not bytes, or `handler` is not a `CombinedHandler`.
        ValueError: requests with this first field have an added handler already.
    """
    if not isinstance(handler, CombinedHandler):
        raise TypeError(f"handler must have handle_request and handle_channel, unlike {handler!r}")
    if not isinstance(first_field, bytes):
        raise TypeError(f"the first field of requests is bytes, not {first_field!r}")
    handlers = _added_handlers(connection)
    if first_field in handlers:
        raise ValueError(f"requests with the first field {first_field!r} have a handler already")
    handlers[first_field] = handler


def find_handler(
    connection: Connection | ReconnectingConnection, first_field: bytes
) -> CombinedHandler | None:
    """Return the handler that `add_handler` added for requests with a certain first field; None if there is
    none.

    A `ReconnectingConnection` and its connections share their added handlers.
    """
    return _added_handlers(connection).get(first_field)


def _added_handlers(connection: Connection | ReconnectingConnection) -> AddedHandlers:
    if isinstance(connection, Connection):
        return connection._handlers.added
    return connection._dialler.added_handlers
