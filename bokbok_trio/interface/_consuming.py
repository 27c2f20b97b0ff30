"""`consume`: call the methods of an interface that the peer serves."""

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
"""How many interfaces are kept prepared, those that were consumed last."""

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
    """Return a stand-in: an object with the methods of an interface, each of which is a call of the peer's.

    ::

        files = consume(connection, Files)
        stat = await files.stat("/etc/hosts")
        async with files.follow("/var/log/syslog") as lines:
            async for line in lines: ...

    Nothing is sent for it. A time limit of a call is a cancel scope around it; what else a call may have,
    `with_options` gives.

    A call raises what its method declares by `raises`, and `RemoteError` for all else that goes wrong over
    there: its code is ``"bad-arguments"`` where the arguments are not what the peer's interface says, and
    ``"no-method"`` where the peer does not have the method; the method has not run then. An argument that
    cannot travel is a ``TypeError`` or ``ValueError`` here, and nothing is sent. A result that is not what
    the interface says is a `ProtocolError`, and the connection goes on. What `Connection.request` raises
    comes out as well: `ConnectionLost`, `ConnectionClosed`, `MessageTooLarge`, ``RecursionError``.

    Leaving the block of a stream cancels its method. What an async iterable raises that was passed to a
    method comes out of the call.

    Arguments:
        connection: to the peer.
        interface: as for `expose`.
        name: of the interface on the wire, as the peer's `expose` says it.
        middleware: around every call, the first one outermost; see `Middleware`.
        encode_hook, decode_hook: as for `expose`.

    Raises:
        TypeError: the interface cannot be called. The text has all offences, each with what to write instead.
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


# A server may consume an interface anew in each call, and to prepare one takes as long as many calls.
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
        stand_in: what `consume` returned.
        context: what travels beside each call, in place of what did so far; see `Connection.request`. None
            leaves that.
        idempotent: whether all its methods may run twice, as if each were marked `idempotent`; None leaves
            that.

    Raises:
        TypeError: `stand_in` is none.
    """
    changes: dict[str, Any] = {}
    if context is not None:
        changes["context"] = dict(context)
    if idempotent is not None:
        changes["is_idempotent"] = idempotent
    return change_options(stand_in, **changes)  # type: ignore[no-any-return]
