"""Types that users and every file may name: handlers, fields, and how a server knows its users.

The one file that names classes of higher files, for type checkers only.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, TypeVar, overload

from ._keys import Key

if TYPE_CHECKING:
    from ._combined import CombinedHandler as CombinedHandler
    from ._connection.channel import Channel as Channel
    from ._connection.connection import Connection as Connection
    from ._reconnecting import ReconnectingConnection as ReconnectingConnection
    from ._server import Server as Server
    from ._sockets import PeerCredentials

Side: TypeAlias = Literal["client", "server"]

Field: TypeAlias = bytes | bytearray | memoryview | str
"""What a user may give as a field. A str is sent as UTF-8; bytes is what arrives."""

_T_co = TypeVar("_T_co", covariant=True)


class _SequenceNotStr(Protocol[_T_co]):
    """A sequence, but not a str: a str contains only str, where this contains any object.

    Borrowed from the ``SequenceNotStr`` of ``useful-types``.
    """

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[_T_co]: ...
    def __reversed__(self) -> Iterator[_T_co]: ...
    def __contains__(self, value: object, /) -> bool: ...
    @overload
    def __getitem__(self, index: int, /) -> _T_co: ...
    @overload
    def __getitem__(self, index: slice, /) -> Sequence[_T_co]: ...


Fields: TypeAlias = _SequenceNotStr[Field]
"""What a user may give as the fields of a request, an answer or an item: 0 to 255 of them. Type checkers
refuse a str or bytes, which are sequences too, and mostly a mistake for a list of one field."""

Context: TypeAlias = Mapping[str, bytes | str]
"""What a user may give as the context of a request: at most 32 names and values, 8 KiB in all."""

RequestHandler: TypeAlias = "Callable[[Connection, list[bytes]], Awaitable[Fields | None]]"
"""``async def handler(connection, request)``; returns the fields of the answer; None means none.

It must leave every cancel scope and nursery that it enters before it returns, or its request fails.
``SystemExit`` and ``KeyboardInterrupt`` end the program, also where a request of the peer makes a handler
raise them, as `argparse` does; any other exception is the answer to its request.
"""

ChannelHandler: TypeAlias = "Callable[[Connection, list[bytes], Channel], Awaitable[Fields | None]]"
"""``async def handler(connection, request, channel)``; as a request handler, with a `Channel`."""

ConnectionHandler: TypeAlias = "Callable[[Connection], Awaitable[object]]"
"""``async def handler(connection)``: an open or a close handler."""

UserKeys: TypeAlias = Key | Sequence[Key] | None
UserKey: TypeAlias = Callable[[str], Awaitable[UserKeys]] | Mapping[str, Key | Sequence[Key]]
"""How a server finds a user's key: a mapping, or an async function; None for an unknown user."""

PeerUser: TypeAlias = "Callable[[PeerCredentials], str | None]"
"""How a plain server names who is at the other end of a UNIX socket; None refuses it."""
