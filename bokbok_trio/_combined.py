"""Handlers of requests and channels in one, and such that are added to a connection that is open.

What is built on requests needs both: `bokbok_trio.interface` serves calls and streams by one object, and
calls back into a connection whose own handler knows nothing of it.
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

    It goes where a request handler goes: to `open_server`, `serve`, `open_connection`, `open_reconnecting`
    and `add_handler`. `bokbok_trio.interface.expose` makes such objects.
    """

    def handle_request(self, connection: Connection, request: list[bytes], /) -> Awaitable[Fields | None]:
        """Handle a request; as a `RequestHandler`."""
        ...

    def handle_channel(
        self, connection: Connection, request: list[bytes], channel: Channel, /
    ) -> Awaitable[Fields | None]:
        """Handle a request with a channel; as a `ChannelHandler`."""
        ...


def split_handler(
    request_handler: RequestHandler | CombinedHandler | None, channel_handler: ChannelHandler | None
) -> tuple[RequestHandler | None, ChannelHandler | None]:
    """Return the two handlers that a user gave, as two or in one object.

    Raises:
        TypeError: one object, and a channel handler besides.
    """
    # What can be called is a function to us, whatever attributes it has: a mock has all.
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
    """Have the requests with a certain first field handled by a handler of their own, from now on.

    For what is built on a connection, such as callbacks: the connection's own handler need not know of it,
    and does not see these requests. There is no way to take it away again. Of a `ReconnectingConnection` it
    handles the requests on all connections to come as well.

    Arguments:
        connection: where the requests come from.
        first_field: of the requests.
        handler: of these, with a channel and without.

    Raises:
        TypeError: `first_field` is not bytes, or `handler` is no `CombinedHandler`.
        ValueError: these requests have such a handler already.
    """
    if not isinstance(handler, CombinedHandler):
        raise TypeError(f"a handler to be added has handle_request and handle_channel; {handler!r} has not")
    if not isinstance(first_field, bytes):
        raise TypeError(f"the first field of requests is bytes, not {first_field!r}")
    handlers = _added_handlers(connection)
    if first_field in handlers:
        raise ValueError(f"requests with the first field {first_field!r} have a handler already")
    handlers[first_field] = handler


def find_handler(
    connection: Connection | ReconnectingConnection, first_field: bytes
) -> CombinedHandler | None:
    """Return what `add_handler` has added for the requests with a certain first field; None if nothing.

    A `ReconnectingConnection` and its connections have the same.
    """
    return _added_handlers(connection).get(first_field)


def _added_handlers(connection: Connection | ReconnectingConnection) -> AddedHandlers:
    if isinstance(connection, Connection):
        return connection._handlers.added
    return connection._dialler.added_handlers
