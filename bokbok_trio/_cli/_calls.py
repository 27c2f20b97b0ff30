"""`bokbok call` and `bokbok follow`: typed calls. The listing says how texts are converted to values.

If the other side lists nothing to this user, the call is made nevertheless, and texts are sent as texts. This
needs the extra ``interface``.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import AsyncExitStack, aclosing
from functools import partial
from typing import Any, NamedTuple

import trio

from .. import ProtocolError, RemoteError
from ..interface import list_interfaces
from ..interface._codec import make_decoder, make_encoder
from ..interface._coding import BAD_ARGUMENTS, Hooks, ValueCoder
from ..interface._exposing import CALL
from ..interface._streams import pump
from ._arguments import Arguments, Given, check_names, decode_text, naming, parse_arguments, to_values
from ._callbacks import Callbacks
from ._connecting import Session, run_connected
from ._exits import RAISED, CommandError, Exit
from ._listing import NO_ANSWER, Listed, explain_unlisted, find_method
from ._output import Output
from ._schemas import Mismatch, Schemas, is_bytes, parse_json
from ._streams import give, read_chunks, send_nothing, split_lines, write_items
from ._values import as_json, is_list

_decode = make_decoder(Any)
_encode = make_encoder()

UNLISTED = (
    "; so NAME=TEXT was sent as text: write NAME:=JSON for other values, "
    "and bokbok follow for a method that streams"
)


class _Prepared(NamedTuple):
    """A call, ready to be made.

    Attributes:
        fields: the fields of its request.
        source: the items that it sends; None if it sends none.
        is_stream: whether items come back.
        callbacks: the callbacks that the method must be given; None if there are none.
    """

    fields: list[bytes]
    source: AsyncIterable[Any] | None
    is_stream: bool
    callbacks: Callbacks | None


def call(options: Namespace, out: Output) -> None:
    """Call a method, and write its result or its items."""
    arguments = parse_arguments(options.argument)
    run_connected(options, partial(_call, arguments=arguments, out=out, must_stream=False))


def follow(options: Namespace, out: Output) -> None:
    """Call a method that streams, and write its items as they arrive."""
    arguments = parse_arguments(options.argument)
    run_connected(options, partial(_call, arguments=arguments, out=out, must_stream=True), is_stream=True)


async def _call(session: Session, *, arguments: Arguments, out: Output, must_stream: bool) -> None:
    path: str = session.options.method
    method = await _find(session, path)
    if must_stream and method is not None and method.info.items_out is None:
        raise CommandError(f"{path} does not stream: use bokbok call", Exit.USAGE)
    # Arguments may be read from a pipe or a terminal, which may take any time.
    session.allow_any_time()
    prepare = partial(_prepare, path, method, arguments, out)
    prepared = await trio.to_thread.run_sync(prepare, abandon_on_cancel=True)
    try:
        async with AsyncExitStack() as stack:
            if prepared.callbacks is not None:
                await stack.enter_async_context(prepared.callbacks.lent(session.connection))
            await _make(session, prepared, out, is_stream=must_stream or prepared.is_stream)
    except RemoteError as exc:
        raise _explain(exc, None if method is not None else explain_unlisted(session)) from exc


async def _find(session: Session, path: str) -> Listed | None:
    """Return the entry of a method in the listing; None if nothing is listed to this user."""
    try:
        interfaces = await list_interfaces(session.connection)
    except RemoteError:
        return None
    return find_method(interfaces, path)


async def _make(session: Session, prepared: _Prepared, out: Output, *, is_stream: bool) -> None:
    """Make the call, and write its result or its items."""
    source = prepared.source
    if source is None:
        sending = send_nothing
    else:
        sending = partial(pump, source, coder=ValueCoder("the command line gave", Any, Hooks()))
    if is_stream:
        await write_items(session, prepared.fields, partial(_show_item, out), out, sending)
        return
    if source is None:
        if prepared.callbacks is None:
            session.allow_usual_time()
        answer = await session.connection.request(prepared.fields)
    else:
        async with session.connection.open_channel(prepared.fields) as channel, sending(channel):
            answer = await channel.answer()
    await out.item(_show(_decode_one(answer), out))


def _decode_one(fields: list[bytes]) -> Any:
    try:
        [data] = fields
        return _decode(data)
    except ValueError as exc:
        raise ProtocolError(f"the answer is not a value: {exc}") from exc


def _show(value: Any, out: Output, *, is_item: bool = False) -> bytes:
    """Encode a value for the output: as JSON, or as it is."""
    if out.raw and isinstance(value, bytes | str):
        return out.encode_raw(value)
    return out.encode(as_json(value), is_item=is_item)


def _show_item(out: Output, fields: list[bytes]) -> bytes:
    return _show(_decode_one(fields), out, is_item=True)


# ---- arguments ----


def _prepare(path: str, method: Listed | None, arguments: Arguments, out: Output) -> _Prepared:
    """Make the request of a call.

    Raises:
        CommandError: an argument is wrong, or cannot be read.
    """
    source = callbacks = None
    if method is None:
        values = to_values(arguments, Schemas({}), {})
    else:
        if method.info.items_in is not None:
            arguments, source = _take_source(method, arguments, out)
        names = list(arguments) if isinstance(arguments, dict) else [each.name for each in arguments]
        check_names(names, method.names, path)
        callbacks = _make_callbacks(method, out)
        values = to_values(arguments, method.schemas, method.info.arguments)
    for name, value in values.items():
        with naming(name):
            _check_travels(value)
    if callbacks is not None:
        values |= callbacks.numbers
    is_stream = method is not None and method.info.items_out is not None
    fields = [CALL, path.encode(errors="surrogateescape"), _encode(values)]
    return _Prepared(fields, source, is_stream, callbacks)


def _make_callbacks(method: Listed, out: Output) -> Callbacks | None:
    callbacks = method.callbacks
    for name, result in callbacks.items():
        if result != "None":
            text = f"{name}: {method.path} takes a callback that returns {result}, and {NO_ANSWER}"
            raise CommandError(text, Exit.BAD_ARGUMENTS, BAD_ARGUMENTS)
    return Callbacks(list(callbacks), out) if callbacks else None


def _check_travels(value: Any) -> None:
    try:
        _encode(value)
    except ValueError as exc:  # mostly an integer that is too large
        raise Mismatch(str(exc)) from None


def _take_source(method: Listed, arguments: Arguments, out: Output) -> tuple[Arguments, AsyncIterable[Any]]:
    """Split the arguments into the values and the items of the stream."""
    name = method.stream
    if isinstance(arguments, dict):
        items = arguments.get(name)
        if is_list(items):
            return {key: value for key, value in arguments.items() if key != name}, _give(method, items)
    else:
        for given in arguments:
            if given.name == name:
                return [each for each in arguments if each is not given], _open_source(method, given, out)
    raise CommandError(
        f"{name}: {method.path} takes a stream of items here: {name}=@FILE, or @- for the standard input",
        Exit.BAD_ARGUMENTS,
        BAD_ARGUMENTS,
    )


def _open_source(method: Listed, given: Given, out: Output) -> AsyncIterable[Any]:
    """Return the items of a stream. A file gives chunks of bytes, or lines, which are texts or JSON."""
    schema = method.schemas.resolve(method.info.items_in)
    if given.file is None:
        with naming(given.name):
            if not given.is_json:
                return give([method.schemas.from_text(schema, given.read().decode())])
            items = parse_json(given.read())
        return _give(method, items if is_list(items) else [items])
    chunks = read_chunks(given.file, out)
    if is_bytes(schema) and not given.is_json:
        return chunks
    return _read_items(method, chunks, is_text=schema.get("type") == "string" and not given.is_json)


async def _read_items(method: Listed, chunks: AsyncGenerator[bytes], *, is_text: bool) -> AsyncGenerator[Any]:
    """Yield an item for each line, which is a text or JSON. Empty lines of JSON are skipped."""
    async with aclosing(split_lines(chunks)) as lines:
        async for line in lines:
            if is_text or line.strip():
                with naming(method.stream):
                    item = decode_text(line) if is_text else _parse_item(method, line)
                yield item


def _parse_item(method: Listed, line: bytes) -> Any:
    return _to_item(method, parse_json(line))


def _give(method: Listed, items: list[Any]) -> AsyncIterable[Any]:
    """Convert JSON values to the items of a stream."""
    with naming(method.stream):
        return give([_to_item(method, each) for each in items])


def _to_item(method: Listed, value: Any) -> Any:
    item = method.schemas.from_json(method.info.items_in, value)
    _check_travels(item)
    return item


# ---- errors ----


def _explain(error: RemoteError, unlisted: str | None) -> Exception:
    """Make the error to report of an error answer. A declared exception has its fields as details."""
    if error.code.startswith(RAISED):
        try:
            details = as_json(_decode(error.details))
        except ValueError:
            return error
        code = error.code.removeprefix(RAISED)
        return CommandError(error.message, Exit.HANDLER_SAID_NO, code, details)
    if error.code == BAD_ARGUMENTS and unlisted is not None:
        return RemoteError(f"{error.message}; {unlisted}{UNLISTED}", error.code, error.details)
    return error
