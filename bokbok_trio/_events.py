"""What a `Session` says that its peer wants, or has answered: no Trio, no I/O."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias


class Request(NamedTuple):
    """The peer asks. `timeout` is the seconds it had left, or `math.inf`."""

    id: int
    timeout: float
    fields: list[bytes]
    has_channel: bool = False


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


class Bye(NamedTuple):
    """The peer takes no new request. Those of ours that waited for a slot will not be sent."""

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


Event: TypeAlias = Request | Cancel | Answer | Failure | Bye | Item | End
