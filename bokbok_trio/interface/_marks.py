"""The decorators for the methods of an interface: `raises` and `idempotent`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

RAISES: Final = "__bokbok_raises__"
IDEMPOTENT: Final = "__bokbok_idempotent__"

_F = TypeVar("_F", bound=Callable[..., Any])


def raises(*errors: type[Exception]) -> Callable[[_F], _F]:
    """Declare exceptions of a method, so that its caller gets them as they are.

    ::

        @dataclass
        class NoSuchFile(Exception):
            path: str

        class Files(Protocol):
            @raises(NoSuchFile)
            async def stat(self, path: str) -> Stat: ...

    Each class must be a dataclass. Its fields are sent, up to 16 KiB. It cannot be frozen, because Python
    sets the traceback of an exception. An exception of a subclass arrives as one of the declared class,
    without the fields that the subclass adds. The caller gets the class of that name from its own interface,
    so the peer cannot choose a class. Exceptions that are not declared arrive as `RemoteError`.

    Arguments:
        errors: at least one exception class.

    Raises:
        TypeError: an argument is not an exception class, or there is none, as in ``@raises`` without
            parentheses.
    """
    if not errors or any(not isinstance(each, type) or not issubclass(each, Exception) for each in errors):
        raise TypeError("raises takes exception classes: @raises(NoSuchFile)")

    def mark(function: _F) -> _F:
        setattr(function, RAISES, errors)
        return function

    return mark


def idempotent(function: _F) -> _F:
    """Mark a method that does no harm if it runs more than once.

    If the connection is lost during a call of it, a `ReconnectingConnection` repeats the call, up to
    ``max_repeats`` times; see `ReconnectingConnection.request`. The method cannot have streams, because their
    items cannot be repeated.
    """
    setattr(function, IDEMPOTENT, True)
    return function
