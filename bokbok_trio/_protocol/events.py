"""What a `Session` says that its peer wants, or has answered."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple, TypeAlias

NO_CONTEXT: Final[Mapping[str, bytes]] = MappingProxyType({})


class Request(NamedTuple):
    """The peer asks.

    Attributes:
        timeout: the seconds it had left, or `math.inf`.
        depth: how many requests this one was made inside of.
        context: what the asker sent along; cannot be changed.
    """

    id: int
    timeout: float
    fields: list[bytes]
    has_channel: bool = False
    depth: int = 0
    context: Mapping[str, bytes] = NO_CONTEXT


class Cancel(NamedTuple):
    """The peer no longer wants the answer to a request of its own that has not been answered."""

    id: int


class Answer(NamedTuple):
    """The answer to a request of ours."""

    id: int
    fields: list[bytes]


class Failure(NamedTuple):
    """The answer to a request of ours that failed."""

    id: int
    code: str
    message: str
    details: bytes = b""


class Bye(NamedTuple):
    """The peer takes no new request of depth 0. Those of ours that waited for a slot will not be sent."""

    ids: list[int]


class Item(NamedTuple):
    """The peer sent an item.

    Attributes:
        size: bytes of its body.
        body: the same as `fields`, where it is small and so takes up less room; else None.
    """

    id: int
    size: int
    fields: list[bytes]
    body: bytes | None


class End(NamedTuple):
    """The peer will send no more items."""

    id: int


class Pong(NamedTuple):
    """The peer answered a ping of ours."""

    def __bool__(self) -> bool:
        """An event is something, though this one says nothing more."""
        return True


class Abort(NamedTuple):
    """The peer ends the connection, as we broke the protocol."""

    code: str
    message: str


Event: TypeAlias = Request | Cancel | Answer | Failure | Bye | Item | End | Pong | Abort
