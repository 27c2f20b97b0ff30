"""Serves a call of one method: decodes, calls and encodes, with streams and references."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, cast, final

from bokbok_trio import RequestError, add_handler, current_request, find_handler

from ._calls import Call, Middleware, run_middleware
from ._codec import BadValue
from ._coding import BAD_ARGUMENTS, InterfaceCoder, MethodCoder, split_leaves
from ._references import Lease, Lender
from ._stand_ins import Options, make_class, make_stand_in
from ._streams import Items, send_results

if TYPE_CHECKING:
    from bokbok_trio import Channel, Connection, Fields, ReconnectingConnection

BACK: Final = b"%back"
"""The first field of a call back. The lent object's number, the method's name and the arguments follow."""


async def serve(
    coder: MethodCoder,
    function: Callable[..., Any],
    connection: Connection,
    data: bytes,
    channel: Channel | None,
    *,
    middleware: tuple[Middleware, ...] = (),
) -> list[bytes]:
    """Call a method for the peer.

    Arguments:
        function: the method of the implementation.
        data: the encoded arguments.
        channel: the channel of the request, if it has one.

    Returns:
        The fields of the answer.

    Raises:
        RequestError: the arguments are wrong, and the method did not run; or it raised an exception that it
            declares.
    """
    if coder.method.needs_channel != (channel is not None):
        how = "streams, and takes a" if channel is None else "streams nothing, and takes no"
        raise RequestError(f"{coder.method.path} {how} channel", BAD_ARGUMENTS)
    arguments = decode_arguments(coder, data)
    current_request().method = coder.method.path
    lease = None
    if coder.references:
        lease = Lease()
        _borrow(coder.references, arguments, connection, lease)
    if coder.items_in is not None:
        assert channel is not None
        is_shared = coder.items_out is not None
        decode = coder.items_in.decode_argument
        arguments[coder.stream] = Items(channel, decode, coder.as_declared, is_shared=is_shared)
    try:
        if not middleware:
            result = await _call(coder, function, arguments, channel)
        else:
            call = Call(
                interface=coder.method.path.rpartition(".")[0],
                method=coder.method.name,
                arguments=arguments,
                context=current_request().context,
                connection=connection,
            )
            result = await run_middleware(
                middleware, call, lambda call: _call(coder, function, dict(call.arguments), channel)
            )
    except BaseException as exc:
        raise_declared(coder, exc)
        raise
    finally:
        if lease is not None:
            lease.end()
    return [coder.result.encode(result)]


def decode_arguments(coder: MethodCoder, data: bytes) -> Any:
    """Decode the arguments of a call.

    Raises:
        RequestError: they are wrong.
    """
    try:
        return coder.decode_arguments(data)
    except BadValue as exc:
        raise RequestError(f"{coder.method.path}: {exc}", BAD_ARGUMENTS) from exc


async def _call(
    coder: MethodCoder, function: Callable[..., Any], arguments: Any, channel: Channel | None
) -> Any:
    result = function(*arguments) if coder.method.is_positional else function(**arguments)
    if coder.items_out is None:
        return await result
    assert channel is not None
    await send_results(result, channel, coder.items_out, coder.method.path)
    return None


def raise_declared(coder: MethodCoder, error: BaseException) -> None:
    """Raise the error answer for an exception that the method declares, with the cancellations beside it."""
    errors, cancelled = split_leaves(error)
    answer = coder.as_request_error(errors[0]) if len(errors) == 1 else None
    if answer is None:
        return
    if cancelled:
        raise BaseExceptionGroup("a declared exception, and cancellations", [answer, *cancelled]) from error
    raise answer from error


# ---- references ----


def find_lender(connection: Connection | ReconnectingConnection) -> Lender:
    """Return the one lender of a connection. From now on the connection handles calls back."""
    handler = find_handler(connection, BACK)
    if handler is None:
        handler = _BackHandler()
        add_handler(connection, BACK, handler)
    return cast("_BackHandler", handler).lender


@final
class _BackHandler:
    """Handles calls back: calls of lent objects."""

    def __init__(self) -> None:
        self.lender = Lender()

    async def handle_request(self, connection: Connection, request: list[bytes]) -> Fields:
        return await self._handle(connection, request, None)

    async def handle_channel(self, connection: Connection, request: list[bytes], channel: Channel) -> Fields:
        return await self._handle(connection, request, channel)

    async def _handle(self, connection: Connection, request: list[bytes], channel: Channel | None) -> Fields:
        try:
            _, number, name, arguments = request
        except ValueError:
            raise RequestError("a call back has a number, a method and arguments", BAD_ARGUMENTS) from None
        lent = self.lender.find(number)
        coder, function = lent.find(name)
        with lent.loan.use():
            return await serve(coder, function, connection, arguments, channel)


def _borrow(
    references: dict[Any, InterfaceCoder], arguments: Any, connection: Connection, lease: Lease
) -> None:
    """Put stand-ins in the place of the numbers of lent objects."""
    for key, coder in references.items():
        if isinstance(arguments, dict) and key not in arguments:
            continue
        number = cast("int | None", arguments[key])
        if coder.stand_in_class is None:
            coder.stand_in_class = make_class(coder)
        if number is not None:
            options = Options(
                connection=connection,
                head=(BACK, b"%d" % number),
                lender=find_lender(connection) if coder.lends else None,
                lease=lease,
            )
            arguments[key] = make_stand_in(coder.stand_in_class, options)
