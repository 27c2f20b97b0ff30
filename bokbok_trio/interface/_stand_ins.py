"""Stand-ins: objects whose methods are calls of the peer's.

A class is made once for each interface, with a method for each of its own. An object of it has only what its
calls have in common, so one for a callback, made anew in each call that it is lent to, costs little.
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
"""The attribute of a stand-in that its `Options` are in."""


@dataclass(frozen=True)
class Options:
    """What the calls of a stand-in have in common.

    Attributes:
        connection: where they go.
        head: the first fields of their requests.
        context: what travels beside them.
        is_idempotent: all of them may run twice.
        can_repeat: the connection can repeat requests.
        middleware: around them.
        lender: where what they lend is kept; None where they lend nothing.
        lease: of what was lent to this side; None of a stand-in that lives as long as its connection.
        is_plain: its calls are nothing but requests.
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
        """Make a request, which may be repeated where that is known to do no harm."""
        try:
            if self.can_repeat and (self.is_idempotent or coder.method.is_idempotent):
                return await self.connection.request(fields, context=context, idempotent=True)  # type: ignore[call-arg]
            return await self.connection.request(fields, context=context)
        except RemoteError as exc:
            raise self.explain(coder, exc)  # noqa: B904  (it says itself what its cause is)

    def explain(self, coder: MethodCoder, error: RemoteError) -> Exception:
        """Return the exception to raise of an error that was answered."""
        if self.lease is not None and error.code == NO_REFERENCE:
            return self.lease.as_closed()
        return coder.as_declared(error)


def make_class(coder: InterfaceCoder, prefix: str = "") -> type[object]:
    """Make the class of the stand-ins of an interface.

    Arguments:
        prefix: what their methods' names on the wire begin with.
    """
    interface = coder.interface

    def show(self: Any) -> str:
        return f"<stand-in of {interface.name} over {getattr(self, OPTIONS).connection!r}>"

    members: dict[str, Any] = {"__slots__": (OPTIONS,), "__doc__": interface.doc, "__repr__": show}
    for name, method in coder.methods.items():
        members[method.method.name] = _make_stub(_Stub(method, (prefix + name).encode()))
    return type(interface.name, (), members)


def make_stand_in(cls: type[object], options: Options) -> Any:
    """Make a stand-in."""
    stand_in: Any = cls()
    setattr(stand_in, OPTIONS, options)
    return stand_in


def change_options(stand_in: Any, **changes: Any) -> Any:
    """Copy a stand-in, with other options.

    Raises:
        TypeError: it is none.
    """
    options = getattr(stand_in, OPTIONS, None)
    if not isinstance(options, Options):
        raise TypeError(f"{stand_in!r} is no stand-in; pass what consume(...) returned")
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
        if is_plain and options.is_plain:  # as most calls, so without further functions on the way
            fields = [*options.head, wire_name, coder.encode_arguments(arguments)]
            try:
                return decode(await options.connection.request(fields, context=options.context))
            except RemoteError as exc:
                raise coder.as_declared(exc)  # noqa: B904  (it says itself what its cause is)
        work = stub.call(options, arguments)
        return await (run_apart(work) if options.middleware else work)

    def call_streaming(self: Any, /, *args: Any, **kwargs: Any) -> Block:
        arguments = bind(args, kwargs)
        options: Options = self._bokbok_options
        return Block(partial(stub.call, options, arguments), method.path)

    made: Any = call if coder.items_out is None else call_streaming
    parameters = method.signature.parameters
    name = "self" if "self" not in parameters else "_self"  # it may be called `this` in the interface
    itself = inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY)
    made.__signature__ = method.signature.replace(parameters=[itself, *parameters.values()])
    made.__name__, made.__qualname__, made.__doc__ = method.name, method.path, method.doc
    return made  # type: ignore[no-any-return]


def _make_binder(coder: MethodCoder) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """Make a function from what a method is called with to its arguments, as they travel.

    It does what `inspect.Signature.bind` does, which takes ten times as long, and is asked only for its
    error.
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
    """A method of the peer's, and how to call it with all that a call may have."""

    coder: MethodCoder
    wire_name: bytes

    async def call(self, options: Options, arguments: Any, hand_over: HandOver | None = None) -> Any:
        """Make a call, through the middleware."""
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
        """Make a call: lend, stream, ask, and end all that with it."""
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
        """Return the result of a call over a channel, or hand over its items."""
        coder = self.coder
        async with nullcontext() if coder.items_in is None else pump(source, channel, coder.items_in):
            if hand_over is None:
                try:
                    answer = await channel.answer()
                except RemoteError as exc:
                    raise options.explain(coder, exc)  # noqa: B904  (it says itself what its cause is)
                return coder.result.decode(answer)
            assert coder.items_out is not None
            await hand_over(Items(channel, coder.items_out.decode, partial(options.explain, coder)))
            # Or leaving would wait for the method, if all arguments were sent.
            await channel.aclose()
            return None


def _take_stream(coder: MethodCoder, arguments: Any) -> AsyncIterable[Any]:
    """Take the stream out of the arguments, which do not travel with it.

    Raises:
        TypeError: it is none.
    """
    source: AsyncIterable[Any] = arguments.pop(coder.stream, None)
    if not hasattr(source, "__aiter__"):
        raise TypeError(
            f"{coder.method.path}: {coder.stream} is a stream, which goes by 'async for', and "
            f"{type(source).__qualname__} does not; write an async generator"
        )
    return source
