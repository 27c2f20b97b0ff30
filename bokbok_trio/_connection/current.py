"""`current_request`: the request that a handler, or a task it has started, handles."""

from __future__ import annotations

import math
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final, final

from .._errors import escape
from .._protocol.events import Request
from .._protocol.slots import MAX_DEPTH

if TYPE_CHECKING:
    from .._types import Connection


@final
class CurrentRequest:
    """The request being handled; see `current_request`.

    Attributes:
        connection: the connection that it came over.
        id: its number on that connection, for logs.
        deadline: the moment, by Trio's clock, until which the peer wants the answer; `math.inf`: no limit.
        context: the names and values that the peer sent along. They cannot be changed.
        depth: the number of requests that it is nested in, 0 to 15.
        has_channel: whether it came with a channel.
        method: for a call of an interface, its name, as in ``"Files.stat"``; else None.
    """

    __slots__ = ("_has_ended", "connection", "context", "deadline", "depth", "has_channel", "id", "method")

    def __init__(self, connection: Connection, request: Request, deadline: float = math.inf) -> None:
        # Not the request itself: tasks that outlive the handler would keep its fields.
        self.connection = connection
        self.id, _, _, self.has_channel, self.depth, self.context = request
        self.deadline = deadline
        self._has_ended = False  # whether its handler has ended
        self.method: str | None = None

    @property
    def user(self) -> str | None:
        """The user at the other end; see `Connection.user`."""
        return self.connection.user

    def __repr__(self) -> str:
        user = "" if self.user is None else f" of {escape(repr(self.user))}"
        return f"<bokbok_trio.CurrentRequest {self.id}{user}>"


CURRENT: Final[ContextVar[CurrentRequest]] = ContextVar("bokbok_trio current request")


def current_request() -> CurrentRequest:
    """Return the request being handled.

    This is a context variable, so it is right in a handler, and in the tasks and threads that it starts.

    Raises:
        RuntimeError: called anywhere else.
    """
    try:
        return CURRENT.get()
    except LookupError:
        raise RuntimeError(
            "no request is being handled here: call current_request() in a handler or in a task it started"
        ) from None


def next_depth() -> int:
    """Return the depth of a request that is made here: one more than that of the request being handled.

    A task that outlives the handler that started it makes requests of depth 0.

    Raises:
        RecursionError: the depth would be more than `MAX_DEPTH`.
    """
    current = CURRENT.get(None)
    if current is None or current._has_ended:
        return 0
    if current.depth >= MAX_DEPTH:
        raise RecursionError(
            f"a request may be nested in at most {MAX_DEPTH} others: handlers call back and forth without end"
        )
    return current.depth + 1
