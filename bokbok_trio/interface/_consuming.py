"""`consume` makes stand-ins, which call the methods of an interface that the peer serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, TypeVar

from bokbok_trio import Connection, ReconnectingConnection

from ._calls import Middleware, check_middleware
from ._codec import DecodeHook, EncodeHook
from ._coding import Coders, Hooks, InterfaceCoder
from ._exposing import CALL
from ._inspection import inspect_interface
from ._serving import find_lender
from ._stand_ins import Options, change_options, make_class, make_stand_in

if TYPE_CHECKING:
    from typing_extensions import TypeForm

KEPT: Final = 128
"""How many interfaces are kept prepared: the most recently consumed ones."""

_T = TypeVar("_T")


def consume(
    connection: Connection | ReconnectingConnection,
    interface: TypeForm[_T],
    *,
    name: str | None = None,
    middleware: Sequence[Middleware] = (),
    encode_hook: EncodeHook | None = None,
    decode_hook: DecodeHook | None = None,
) -> _T:
    """Return a stand-in: an object with the methods of an interface, each of which calls the peer's method.

    ::

        files = consume(connection, Files)
        stat = await files.stat("/etc/hosts")
        async with files.follow("/var/log/syslog") as lines:
            async for line in lines: ...

    Making a stand-in sends nothing. For a time limit, put a cancel scope around a call. `with_options` sets
    other options of calls. Leaving the block of a stream cancels its method.

    A call raises:

    - the exceptions that its method declares with `raises`;
    - `RemoteError` for any other failure of the peer. Its code is ``"bad-arguments"`` if the arguments do
      not fit the peer's interface, and ``"no-method"`` if the peer does not have the method. In both cases
      the method did not run;
    - ``TypeError`` or ``ValueError`` if an argument cannot be sent. Nothing was sent;
    - `ProtocolError` if the result does not fit the interface. The connection goes on;
    - any exception of an async iterable that was passed to the method;
    - `ConnectionLost`, `ConnectionClosed`, `MessageTooLarge` and ``RecursionError``, as
      `Connection.request` does.

    Arguments:
        connection: the connection to the peer.
        interface: as for `expose`.
        name: the name of the interface on the wire, as in the peer's `expose`.
        middleware: functions that run around every call, the first one outermost; see `Middleware`.
        encode_hook, decode_hook: as for `expose`.

    Raises:
        TypeError: the interface cannot be called. The text lists all problems, and says how to mend each of
            them.
    """
    if not isinstance(connection, Connection | ReconnectingConnection):
        raise TypeError(f"consume takes a connection first, not {type(connection).__name__}")
    what: tuple[Any, ...] = (interface, name, encode_hook, decode_hook)
    coder, cls = (_prepare_kept if _can_be_kept(what) else _prepare)(*what)
    options = Options(
        connection=connection,
        head=(CALL,),
        can_repeat=isinstance(connection, ReconnectingConnection),
        middleware=check_middleware(middleware),
        lender=find_lender(connection) if coder.lends else None,
    )
    stand_in: _T = make_stand_in(cls, options)
    return stand_in


def _prepare(
    interface: Any, name: str | None, encode_hook: EncodeHook | None, decode_hook: DecodeHook | None
) -> tuple[InterfaceCoder, type[object]]:
    """Return the codecs of an interface, and the class of its stand-ins."""
    spec = inspect_interface(interface, name, has_hooks=encode_hook is not None and decode_hook is not None)
    coder = Coders(Hooks(encode_hook, decode_hook)).make(spec)
    return coder, make_class(coder, f"{spec.name}.")


# A server may consume the same interface in each call, and preparing it takes as long as many calls.
_prepare_kept = lru_cache(maxsize=KEPT)(_prepare)


def _can_be_kept(what: tuple[Any, ...]) -> bool:
    try:
        hash(what)
    except TypeError:  # a hook that is an object, say
        return False
    return True


def with_options(
    stand_in: _T, *, context: Mapping[str, bytes | str] | None = None, idempotent: bool | None = None
) -> _T:
    """Return a copy of a stand-in with other options for its calls.

    ::

        files = with_options(files, context={"trace-id": trace_id})

    Arguments:
        stand_in: a result of `consume`.
        context: names and values to send with each call, in place of the earlier ones; see
            `Connection.request`. None keeps the earlier ones.
        idempotent: whether to treat all its methods as if they were marked `idempotent`. None keeps the
            earlier choice.

    Raises:
        TypeError: `stand_in` is not a stand-in.
    """
    changes: dict[str, Any] = {}
    if context is not None:
        changes["context"] = dict(context)
    if idempotent is not None:
        changes["is_idempotent"] = idempotent
    return change_options(stand_in, **changes)  # type: ignore[no-any-return]
