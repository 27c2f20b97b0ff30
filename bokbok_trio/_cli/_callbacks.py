"""Callbacks: each call that a method makes of one is written as a line of JSON."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import trio

from .. import Channel, Connection, RequestError, add_handler
from ..interface._codec import make_decoder, make_encoder
from ..interface._coding import BAD_ARGUMENTS
from ..interface._references import NO_REFERENCE
from ..interface._serving import BACK
from ._exits import OutputError, ReaderGone
from ._output import Output, while_read
from ._values import as_json

_decode = make_decoder(list[Any])
_NOTHING = make_encoder()(None)


class Callbacks:
    """The callbacks of a call. When one is called, its arguments are written. It returns nothing.

    Arguments:
        names: the parameters that take callbacks.
        out: the output.

    Attributes:
        numbers: the number that is sent in the place of each callback, by parameter.
    """

    def __init__(self, names: Sequence[str], out: Output) -> None:
        self.numbers = {name: number for number, name in enumerate(names, 1)}
        self._names = {b"%d" % number: name for name, number in self.numbers.items()}
        self._out = out
        self._scope = trio.CancelScope()
        self._error: OutputError | ReaderGone | None = None

    @asynccontextmanager
    async def lent(self, connection: Connection) -> AsyncGenerator[None]:
        """Lend the callbacks for as long as the block.

        Raises:
            OutputError, ReaderGone: a call could not be written. That ends the block.
        """
        add_handler(connection, BACK, self)
        with self._scope:
            async with while_read():
                yield
        if self._error is not None:
            raise self._error

    async def handle_request(self, _connection: Connection, request: list[bytes]) -> list[bytes]:
        """Write a call of a callback."""
        match request:
            case [_, number, b"", arguments] if number in self._names:
                try:
                    values = _decode(arguments)
                except ValueError as exc:
                    raise RequestError(str(exc), BAD_ARGUMENTS) from exc
                await self._write({self._names[number]: as_json(values)})
                return [_NOTHING]
            case _:
                raise RequestError("nothing is lent by this number", NO_REFERENCE)

    async def handle_channel(
        self, _connection: Connection, _request: list[bytes], _channel: Channel
    ) -> NoReturn:
        """Refuse a call that streams."""
        raise RequestError("a callback of the command line streams nothing", BAD_ARGUMENTS)

    async def _write(self, call: dict[str, Any]) -> None:
        try:
            await self._out.item(self._out.encode(call, is_item=True))
        except (OutputError, ReaderGone) as exc:
            self._error = exc
            self._scope.cancel()
            raise RequestError("the call cannot be written any more") from exc
