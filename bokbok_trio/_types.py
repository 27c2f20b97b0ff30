"""Types that users and every file may name: handlers, fields, and how a server knows its users.

This is the one file that names classes of higher files, and only for type checkers.
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
"""A field as a user may pass it. A str is sent as UTF-8. Fields always arrive as bytes."""

_T_co = TypeVar("_T_co", covariant=True)


class _SequenceNotStr(Protocol[_T_co]):
    """A sequence that is not a str: ``str.__contains__`` takes only str, and this one takes any object.

    It is the ``SequenceNotStr`` of ``useful-types``.
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
"""The fields of a request, an answer or an item as a user may pass them: 0 to 255 of them. Type checkers
refuse a str or bytes, which are sequences too, and mostly a mistake for a list of one field."""

Context: TypeAlias = Mapping[str, bytes | str]
"""The context of a request as a user may pass it: at most 32 names with values, 8 KiB in all."""

RequestHandler: TypeAlias = "Callable[[Connection, list[bytes]], Awaitable[Fields | None]]"
"""``async def handler(connection, request)``: returns the fields of the answer; None stands for no fields.

A handler must leave every cancel scope and nursery that it enters before it returns, or its request fails.
``SystemExit`` and ``KeyboardInterrupt`` of a handler end the program, even if a request of the peer causes
them, as with `argparse`. Any other exception becomes the answer to its request.
"""

ChannelHandler: TypeAlias = "Callable[[Connection, list[bytes], Channel], Awaitable[Fields | None]]"
"""``async def handler(connection, request, channel)``: like a request handler, with a `Channel`."""

ConnectionHandler: TypeAlias = "Callable[[Connection], Awaitable[object]]"
"""``async def handler(connection)``: an open or a close handler."""

UserKeys: TypeAlias = Key | Sequence[Key] | None
UserKey: TypeAlias = Callable[[str], Awaitable[UserKeys]] | Mapping[str, Key | Sequence[Key]]
"""How a server finds the keys of a user: a mapping, or an async function that returns None for an unknown
user.
"""

PeerUser: TypeAlias = "Callable[[PeerCredentials], str | None]"
"""How a plain server names the peer of a UNIX socket; None refuses the peer."""
