"""Stand-ins: objects whose methods call the methods of the peer.

Each interface gets one class of stand-ins, with a method for each method of the interface. A stand-in holds
only the `Options` of its calls. So it is cheap to make a new one for a callback in each call that lends it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

from bokbok_trio import RemoteError

from ._calls import Block, Call, HandOver, Middleware, run_apart, run_middleware
from ._coding import InterfaceCoder, MethodCoder
from ._references import NO_REFERENCE, Lease, Lender
from ._streams import Items, pump

if TYPE_CHECKING:
    from collections.abc import AsyncIterable

    from bokbok_trio import Channel, Connection, ReconnectingConnection

OPTIONS: Final = "_bokbok_options"
"""The attribute of a stand-in that holds its `Options`."""


@dataclass(frozen=True)
class Options:
    """The options that all calls of a stand-in share.

    Attributes:
        connection: the connection that carries the calls.
        head: the first fields of their requests.
        context: names and values sent with each call.
        is_idempotent: whether all methods may run twice.
        can_repeat: whether the connection can repeat requests.
        middleware: the functions that run around each call.
        lender: keeps the objects that calls lend; None if they lend nothing.
        lease: ends a stand-in that the peer lends to a method of this side; None for others.
        is_plain: whether a call needs no more than a request.
    """

    connection: Connection | ReconnectingConnection
    head: tuple[bytes, ...]
    context: Mapping[str, bytes | str] | None = None
    is_idempotent: bool = False
    can_repeat: bool = False
    middleware: tuple[Middleware, ...] = ()
    lender: Lender | None = None
    lease: Lease | None = None
    is_plain: bool = field(init=False)

    def __post_init__(self) -> None:
        is_plain = not self.middleware and self.lease is None and not self.is_idempotent
        object.__setattr__(self, "is_plain", is_plain)

    async def request(self, coder: MethodCoder, fields: list[bytes], context: Any) -> list[bytes]:
        """Make a request. The connection may repeat it if the method is idempotent."""
        try:
            if self.can_repeat and (self.is_idempotent or coder.method.is_idempotent):
                return await self.connection.request(fields, context=context, idempotent=True)  # type: ignore[call-arg]
            return await self.connection.request(fields, context=context)
        except RemoteError as exc:
            raise self.explain(coder, exc)  # noqa: B904  (its cause is set already)

    def explain(self, coder: MethodCoder, error: RemoteError) -> Exception:
        """Return the exception to raise for an error answer."""
        if self.lease is not None and error.code == NO_REFERENCE:
            return self.lease.as_closed()
        return coder.as_declared(error)


def make_class(coder: InterfaceCoder, prefix: str = "") -> type[object]:
    """Make the class of the stand-ins of an interface.

    Arguments:
        prefix: the beginning of the names of their methods on the wire.
    """
    interface = coder.interface

    def show(self: Any) -> str:
        return f"<stand-in of {interface.name} over {getattr(self, OPTIONS).connection!r}>"

    members: dict[str, Any] = {"__slots__": (OPTIONS,), "__doc__": interface.doc, "__repr__": show}
    for name, method in coder.methods.items():
        members[method.method.name] = _make_stub(_Stub(method, (prefix + name).encode()))
    return type(interface.name, (), members)


def make_stand_in(cls: type[object], options: Options) -> Any:
    """Make a stand-in with some options."""
    stand_in: Any = cls()
    setattr(stand_in, OPTIONS, options)
    return stand_in


def change_options(stand_in: Any, **changes: Any) -> Any:
    """Copy a stand-in, with other options.

    Raises:
        TypeError: `stand_in` is not a stand-in.
    """
    options = getattr(stand_in, OPTIONS, None)
    if not isinstance(options, Options):
        raise TypeError(f"{stand_in!r} is not a stand-in; pass a result of consume(...)")
    return make_stand_in(cast("type[object]", type(stand_in)), replace(options, **changes))


def _make_stub(stub: _Stub) -> Callable[..., Any]:
    """Make the method of a stand-in."""
    coder, wire_name = stub.coder, stub.wire_name
    method = coder.method
    bind = _make_binder(coder)
    decode = coder.result.decode
    is_plain = not coder.references and not method.needs_channel and not method.is_idempotent

    async def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        arguments = bind(args, kwargs)
        options: Options = self._bokbok_options
        if is_plain and options.is_plain:  # most calls; fewer function calls make them faster
            fields = [*options.head, wire_name, coder.encode_arguments(arguments)]
            try:
                return decode(await options.connection.request(fields, context=options.context))
            except RemoteError as exc:
                raise coder.as_declared(exc)  # noqa: B904  (its cause is set already)
        work = stub.call(options, arguments)
        return await (run_apart(work) if options.middleware else work)

    def call_streaming(self: Any, /, *args: Any, **kwargs: Any) -> Block:
        arguments = bind(args, kwargs)
        options: Options = self._bokbok_options
        return Block(partial(stub.call, options, arguments), method.path)

    made: Any = call if coder.items_out is None else call_streaming
    parameters = method.signature.parameters
    name = "self" if "self" not in parameters else "_self"  # a parameter may be named `self`
    itself = inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY)
    made.__signature__ = method.signature.replace(parameters=[itself, *parameters.values()])
    made.__name__, made.__qualname__, made.__doc__ = method.name, method.path, method.doc
    return made  # type: ignore[no-any-return]


def _make_binder(coder: MethodCoder) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """Make a function that binds positional and keyword arguments to the parameters of a method.

    It does the work of `inspect.Signature.bind`, which is much slower, and calls that only for its error.
    """
    signature = coder.method.signature
    if coder.method.is_positional:
        count = len(signature.parameters)

        def bind_positional(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
            if len(args) != count or kwargs:
                signature.bind(*args, **kwargs)
            return list(args)

        return bind_positional
    parameters = signature.parameters.values()
    positional = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    known = frozenset(signature.parameters)
    required = frozenset(each.name for each in parameters if each.default is each.empty)

    def bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        arguments = dict(zip(positional, args, strict=False))
        arguments.update(kwargs)
        if not required <= arguments.keys() <= known or len(arguments) != len(args) + len(kwargs):
            signature.bind(*args, **kwargs)
        return arguments

    return bind


@dataclass(frozen=True)
class _Stub:
    """A method of the peer, and calls of it with middleware, streams and references."""

    coder: MethodCoder
    wire_name: bytes

    async def call(self, options: Options, arguments: Any, hand_over: HandOver | None = None) -> Any:
        """Make a call through the middleware."""
        if not options.middleware:
            return await self._proceed(options, arguments, options.context, hand_over)
        call = Call(
            interface=self.coder.method.path.rpartition(".")[0],
            method=self.coder.method.name,
            arguments=arguments,
            context=options.context or {},
            connection=options.connection,
        )
        return await run_middleware(
            options.middleware,
            call,
            lambda call: self._proceed(options, dict(call.arguments), call.context, hand_over),
        )

    async def _proceed(
        self,
        options: Options,
        arguments: Any,
        context: Mapping[str, bytes | str] | None,
        hand_over: HandOver | None,
    ) -> Any:
        """Make a call: lend objects, send the request, run the streams, and end all these with the call."""
        coder = self.coder
        loan = None
        async with nullcontext() if options.lease is None else options.lease.use():
            try:
                if coder.references:
                    assert options.lender is not None
                    loan = options.lender.lend(coder, arguments)
                source = None if coder.stream is None else _take_stream(coder, arguments)
                fields = [*options.head, self.wire_name, coder.encode_arguments(arguments)]
                if coder.method.needs_channel:
                    async with options.connection.open_channel(fields, context=context) as channel:
                        return await self._stream(options, channel, source, hand_over)
                return coder.result.decode(await options.request(coder, fields, context))
            finally:
                if loan is not None:
                    await loan.end()

    async def _stream(
        self, options: Options, channel: Channel, source: Any, hand_over: HandOver | None
    ) -> Any:
        """Return the result of a call over a channel, or hand over the items of its results."""
        coder = self.coder
        async with nullcontext() if coder.items_in is None else pump(source, channel, coder.items_in):
            if hand_over is None:
                try:
                    answer = await channel.answer()
                except RemoteError as exc:
                    raise options.explain(coder, exc)  # noqa: B904  (its cause is set already)
                return coder.result.decode(answer)
            assert coder.items_out is not None
            await hand_over(Items(channel, coder.items_out.decode, partial(options.explain, coder)))
            # If all arguments were sent, leaving the channel's block would wait for the method.
            await channel.aclose()
            return None


def _take_stream(coder: MethodCoder, arguments: Any) -> AsyncIterable[Any]:
    """Take the stream out of the arguments: its items are sent over the channel.

    Raises:
        TypeError: the argument is not a stream.
    """
    source: AsyncIterable[Any] = arguments.pop(coder.stream, None)
    if not hasattr(source, "__aiter__"):
        raise TypeError(
            f"{coder.method.path}: {coder.stream} is a stream, and "
            f"{type(source).__qualname__} does not work with 'async for'; write an async generator"
        )
    return source
