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
        connection: where it came from.
        id: its number on that connection, for logs.
        deadline: until when its asker wants the answer, by Trio's clock; `math.inf` if it did not say.
        context: the names and values that its asker sent along, which cannot be changed.
        depth: how many requests it was made inside of, 0 to 15.
        has_channel: whether it came with a channel.
        method: what it calls, as in ``"Files.stat"``, where it is a call of an interface; else None.
    """

    __slots__ = ("_has_ended", "connection", "context", "deadline", "depth", "has_channel", "id", "method")

    def __init__(self, connection: Connection, request: Request, deadline: float = math.inf) -> None:
        # Not the request itself: tasks that outlive the handler would keep its fields.
        self.connection = connection
        self.id, _, _, self.has_channel, self.depth, self.context = request
        self.deadline = deadline
        self._has_ended = False  # its handler has
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

    It is a context variable: it is right in a handler, and in the tasks and threads that it starts.

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
    """How deep a request made here is nested: one deeper than the request being handled here.

    A task that outlives the handler that started it makes requests that are nested in none.

    Raises:
        RecursionError: that is too deep.
    """
    current = CURRENT.get(None)
    if current is None or current._has_ended:
        return 0
    if current.depth >= MAX_DEPTH:
        raise RecursionError(
            f"a request may be nested in at most {MAX_DEPTH} others: handlers call back and forth without end"
        )
    return current.depth + 1
