"""`expose`: serve an interface by an object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar, final

from bokbok_trio import ChannelHandler, CombinedHandler, RequestError, RequestHandler, current_request

from ._calls import Middleware, check_middleware
from ._codec import DecodeHook, EncodeHook
from ._coding import Coders, Hooks, MethodCoder
from ._fit import check_fit
from ._inspection import inspect_interface
from ._listing import LIST, InterfaceInfo, describe, encode_listing
from ._serving import BACK, decode_arguments, raise_declared, serve

if TYPE_CHECKING:
    from typing_extensions import TypeForm

    from bokbok_trio import Channel, Connection, Fields

CALL: Final = b"%call"
"""The first field of a call; the method's name, as in ``Files.stat``, and the arguments follow."""

CALL_FIELDS: Final = 3

RESERVED: Final = b"%"
"""What first fields begin with that are kept for this module."""

_T = TypeVar("_T")


class _Served(NamedTuple):
    """A method of an implementation."""

    coder: MethodCoder
    function: Callable[..., Any]
    middleware: tuple[Middleware, ...]

    @property
    def is_plain(self) -> bool:
        """Its calls are nothing but requests."""
        return not (self.middleware or self.coder.references or self.coder.method.needs_channel)


@final
class Exposed:
    """Interfaces that are served, made by `expose`: a `CombinedHandler`, to be passed where a handler goes.

    ``|`` puts several together, and a plain handler at the end, which gets the requests that are no calls of
    interfaces::

        expose(Files, files) | expose(Admin, admin) | handler

    It never sees a request whose first field begins with ``%``, which are kept for interfaces. If it is a
    `CombinedHandler`, it gets channels too.
    """

    def __init__(
        self,
        served: dict[bytes, _Served],
        listed: tuple[InterfaceInfo, ...],
        rest: RequestHandler | CombinedHandler | None = None,
    ) -> None:
        self._served = served
        self._listed = listed
        self._rest = rest
        self._plain = {name: each for name, each in served.items() if each.is_plain}
        self._rest_request: RequestHandler | None
        self._rest_channel: ChannelHandler | None
        if isinstance(rest, CombinedHandler):
            self._rest_request, self._rest_channel = rest.handle_request, rest.handle_channel
        else:
            self._rest_request, self._rest_channel = rest, None

    def __repr__(self) -> str:
        rest = [] if self._rest is None else [repr(self._rest)]
        return f"<bokbok_trio.interface.Exposed {' | '.join([*self._names, *rest])}>"

    @property
    def _names(self) -> dict[str, None]:
        """The names of the interfaces, in order."""
        return dict.fromkeys(each.coder.method.path.rpartition(".")[0] for each in self._served.values())

    def __or__(self, other: Exposed | CombinedHandler | RequestHandler) -> Exposed:
        """Serve what the other does not, by the other. It must not serve an interface of the same name."""
        if self._rest is not None:
            raise TypeError(f"{self._rest!r} gets all that is left; put it last")
        if not isinstance(other, Exposed):
            is_handler = callable(other) or isinstance(other, CombinedHandler)
            if not is_handler or isinstance(other, type):
                return NotImplemented
            return Exposed(self._served, self._listed, other)
        if both := self._names.keys() & other._names.keys():
            raise ValueError(f"two interfaces are named {min(both)}; give one of them another name=")
        return Exposed(self._served | other._served, self._listed + other._listed, other._rest)

    async def handle_request(self, connection: Connection, request: list[bytes]) -> Fields | None:
        """Answer a call without streams, or a request that is no call."""
        if len(request) == CALL_FIELDS and request[0] == CALL and request[1] in self._plain:
            # As most calls, so without further functions on the way.
            coder, function, _ = self._plain[request[1]]
            arguments = decode_arguments(coder, request[2])
            current_request().method = coder.method.path
            try:
                result = await function(**arguments)
            except BaseException as exc:
                raise_declared(coder, exc)
                raise
            return [coder.result.encode(result)]
        if not request or not request[0].startswith(RESERVED):
            if self._rest_request is None:
                raise RequestError("this side handles calls of interfaces only", "no-handler")
            return await self._rest_request(connection, request)
        if request == [LIST]:
            if not self._listed or connection.user is None:
                raise RequestError("this side lists nothing to you", "no-method")
            return [encode_listing(self._listed)]
        return await self._serve(connection, request, None)

    async def handle_channel(
        self, connection: Connection, request: list[bytes], channel: Channel
    ) -> Fields | None:
        """Answer a call with streams, or a request with a channel that is no call."""
        if not request or not request[0].startswith(RESERVED):
            if self._rest_channel is None:
                raise RequestError("this side handles channels of interfaces only", "no-channel")
            return await self._rest_channel(connection, request, channel)
        return await self._serve(connection, request, channel)

    async def _serve(self, connection: Connection, request: list[bytes], channel: Channel | None) -> Fields:
        if request[0] == BACK:  # lenders handle those that anything was lent for
            raise RequestError("nothing is lent over this connection", "no-reference")
        if request[0] != CALL:
            raise RequestError("no call of an interface begins so", "no-method")
        if len(request) != CALL_FIELDS:
            raise RequestError("a call is a method and arguments", "bad-arguments")
        _, name, arguments = request
        served = self._served.get(name)
        if served is None:
            raise RequestError(f"no such method: {name[:100].decode(errors='replace')}", "no-method")
        coder, function, middleware = served
        return await serve(coder, function, connection, arguments, channel, middleware=middleware)


def expose(
    interface: TypeForm[_T],
    implementation: _T,
    *,
    name: str | None = None,
    middleware: Sequence[Middleware] = (),
    listed: bool = False,
    encode_hook: EncodeHook | None = None,
    decode_hook: DecodeHook | None = None,
) -> Exposed:
    """Serve an interface by an object that has its methods.

    ::

        class FilesOnDisk(Files):
            async def stat(self, path: str) -> Stat: ...

        async with open_server("localhost:0", expose(Files, FilesOnDisk()), user_key=KEYS) as server: ...

    What the interface names can be called, and nothing else of the object. A method that streams is an async
    generator under ``@trio.as_safe_channel``, or a plain async generator, or returns a block with an async
    iterable. Where the class inherits from the interface, as above, type checkers compare each method with
    it; here none does.

    Arguments:
        interface: a Protocol, or another class, with annotated methods; it may have been given types, as in
            ``Store[File]``.
        implementation: an object whose methods have the same parameters; more of these need defaults.
        name: of the interface on the wire; its class's if None. Callers must use the same.
        middleware: around every call, the first one outermost; see `Middleware`.
        listed: whether `list_interfaces` shows it, to peers that were authenticated: those of connections
            whose `Connection.user` is not None.
        encode_hook: a function from a value whose type does not travel by itself to one whose type does.
        decode_hook: a function from the type and such a value to the value of that type.

    Returns:
        What `open_server`, `serve`, `open_connection` and `open_reconnecting` take for a handler.

    Raises:
        TypeError: the interface cannot be served, or the implementation does not have it. The text has all
            offences, each with what to write instead.
    """
    spec = inspect_interface(interface, name, has_hooks=encode_hook is not None and decode_hook is not None)
    check_fit(spec, implementation)
    coder = Coders(Hooks(encode_hook, decode_hook)).make(spec)
    around = check_middleware(middleware)
    served = {
        method.method.path.encode(): _Served(method, getattr(implementation, method.method.name), around)
        for method in coder.methods.values()
    }
    return Exposed(served, (describe(spec),) if listed else ())
