"""What stands at the methods of an interface: `raises` and `idempotent`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

RAISES: Final = "__bokbok_raises__"
IDEMPOTENT: Final = "__bokbok_idempotent__"

_F = TypeVar("_F", bound=Callable[..., Any])


def raises(*errors: type[Exception]) -> Callable[[_F], _F]:
    """Declare the exceptions that a method raises, so that its caller gets them as they are.

    ::

        @dataclass
        class NoSuchFile(Exception):
            path: str

        class Files(Protocol):
            @raises(NoSuchFile)
            async def stat(self, path: str) -> Stat: ...

    A class is a dataclass, whose fields travel, 16 KiB of them at most; it cannot be frozen, since Python
    sets the traceback of an exception. What a subclass has besides does not travel. The caller gets the class
    of its own interface that has the same name, and never one that the peer could choose. What is not
    declared is a `RemoteError` there.

    Raises:
        TypeError: no exception class is given, as by ``@raises`` without parentheses.
    """
    if not errors or any(not isinstance(each, type) or not issubclass(each, Exception) for each in errors):
        raise TypeError("raises takes exception classes: @raises(NoSuchFile)")

    def mark(function: _F) -> _F:
        setattr(function, RAISES, errors)
        return function

    return mark


def idempotent(function: _F) -> _F:
    """Mark a method that does no harm if it runs more than once.

    Through a `ReconnectingConnection` its call is repeated when the connection was lost with it in flight, as
    often as ``max_repeats`` allows; see `ReconnectingConnection.request`. Without streams only: what went
    through one cannot be repeated.
    """
    setattr(function, IDEMPOTENT, True)
    return function
