"""`expose` serves an interface with an object."""

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
"""The first field of a call. The name of the method follows, as in ``Files.stat``, and then the arguments."""

CALL_FIELDS: Final = 3

RESERVED: Final = b"%"
"""The beginning of the first fields that are reserved for this package."""

_T = TypeVar("_T")


class _Served(NamedTuple):
    """A method of an implementation."""

    coder: MethodCoder
    function: Callable[..., Any]
    middleware: tuple[Middleware, ...]

    @property
    def is_plain(self) -> bool:
        """Whether a call of it is just one request."""
        return not (self.middleware or self.coder.references or self.coder.method.needs_channel)


@final
class Exposed:
    """One or more interfaces with the objects that serve them, made by `expose`.

    It is a `CombinedHandler`: pass it where a server or a connection takes a handler. ``|`` combines several,
    and the last may be a plain handler, which gets all requests that are not calls of interfaces::

        expose(Files, files) | expose(Admin, admin) | handler

    Requests whose first field begins with ``%`` are reserved for interfaces, and never reach that handler.
    The handler gets channels too if it is a `CombinedHandler`.
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
        """Combine both. Requests that this one does not serve go to the other one.

        Raises:
            TypeError: this one ends with a plain handler already, which gets all other requests.
            ValueError: both serve an interface of the same name.
        """
        if self._rest is not None:
            raise TypeError(f"{self._rest!r} gets all other requests; put it last")
        if not isinstance(other, Exposed):
            is_handler = callable(other) or isinstance(other, CombinedHandler)
            if not is_handler or isinstance(other, type):
                return NotImplemented
            return Exposed(self._served, self._listed, other)
        if both := self._names.keys() & other._names.keys():
            raise ValueError(f"two interfaces are named {min(both)}; give one of them another name=")
        return Exposed(self._served | other._served, self._listed + other._listed, other._rest)

    async def handle_request(self, connection: Connection, request: list[bytes]) -> Fields | None:
        """Answer a call without streams, or a plain request."""
        if len(request) == CALL_FIELDS and request[0] == CALL and request[1] in self._plain:
            # Most calls come here. Fewer function calls make them faster.
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
                raise RequestError("this side lists no interfaces to you", "no-method")
            return [encode_listing(self._listed)]
        return await self._serve(connection, request, None)

    async def handle_channel(
        self, connection: Connection, request: list[bytes], channel: Channel
    ) -> Fields | None:
        """Answer a call with streams, or a plain request with a channel."""
        if not request or not request[0].startswith(RESERVED):
            if self._rest_channel is None:
                raise RequestError("this side handles channels of interfaces only", "no-channel")
            return await self._rest_channel(connection, request, channel)
        return await self._serve(connection, request, channel)

    async def _serve(self, connection: Connection, request: list[bytes], channel: Channel | None) -> Fields:
        if request[0] == BACK:  # a connection that lends anything has a handler of its own for these
            raise RequestError("nothing is lent over this connection", "no-reference")
        if request[0] != CALL:
            raise RequestError("no call of an interface begins like this", "no-method")
        if len(request) != CALL_FIELDS:
            raise RequestError("a call has a method and arguments", "bad-arguments")
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
    """Serve an interface with an object that has its methods.

    ::

        class FilesOnDisk(Files):
            async def stat(self, path: str) -> Stat: ...

        async with open_server("localhost:0", expose(Files, FilesOnDisk()), user_key=KEYS) as server: ...

    The peer can call the methods that the interface names, and nothing else of the object. A method that
    streams its results is an async generator, plain or under ``@trio.as_safe_channel``, or a function that
    returns an async context manager with an async iterable. If the class inherits from the interface, as
    above, type checkers compare each of its methods with the interface.

    Arguments:
        interface: a Protocol, or another class, with annotated methods. A generic one needs its types, as in
            ``Store[File]``.
        implementation: an object whose methods have the same parameters. Any more parameters need defaults.
        name: the name of the interface on the wire; None for the name of the class. Callers must use the
            same one.
        middleware: functions that run around every call, the first one outermost; see `Middleware`.
        listed: whether `list_interfaces` shows the interface to authenticated peers, those whose
            `Connection.user` is not None.
        encode_hook: converts a value of your own type to one that can be sent; see `EncodeHook`.
        decode_hook: converts it back, given the type and the value; see `DecodeHook`.

    Returns:
        A handler for `open_server`, `serve`, `open_connection` or `open_reconnecting`.

    Raises:
        TypeError: the interface cannot be served, or the implementation does not fit it. The text lists all
            problems, and says how to mend each of them.
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
