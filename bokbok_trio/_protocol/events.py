"""The events of a `Session`: the packets of the peer, checked and decoded."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple, TypeAlias

NO_CONTEXT: Final[Mapping[str, bytes]] = MappingProxyType({})


class Request(NamedTuple):
    """The peer made a request.

    Attributes:
        timeout: seconds until its deadline, or `math.inf`.
        depth: the number of requests that this one is nested in.
        context: the asker's names and values; nobody can change them.
    """

    id: int
    timeout: float
    fields: list[bytes]
    has_channel: bool = False
    depth: int = 0
    context: Mapping[str, bytes] = NO_CONTEXT


class Cancel(NamedTuple):
    """The peer no longer wants the answer to its request, which has not been answered."""

    id: int


class Answer(NamedTuple):
    """The peer answered a request of this side."""

    id: int
    fields: list[bytes]


class Failure(NamedTuple):
    """The peer answered a request of this side with an error."""

    id: int
    code: str
    message: str
    details: bytes = b""


class Bye(NamedTuple):
    """The peer takes no new request of depth 0.

    Attributes:
        ids: this side's requests that waited for a slot. They will not be sent.
    """

    ids: list[int]


class Item(NamedTuple):
    """The peer sent an item.

    Attributes:
        size: bytes of its body.
        body: the encoded body of a small item, which takes up less memory than `fields`; else None.
    """

    id: int
    size: int
    fields: list[bytes]
    body: bytes | None


class End(NamedTuple):
    """The peer will send no more items."""

    id: int


class Pong(NamedTuple):
    """The peer answered a ping of this side."""

    def __bool__(self) -> bool:
        """Return True, although the tuple is empty: `Session.receive` drops false events."""
        return True


class Abort(NamedTuple):
    """The peer ends the connection, because this side broke the protocol."""

    code: str
    message: str


Event: TypeAlias = Request | Cancel | Answer | Failure | Bye | Item | End | Pong | Abort
