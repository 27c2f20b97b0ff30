"""`Wire`: the stream of a connection, as its sender and its reader use it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, final

import trio

from .._protocol.outbox import MAX_BATCH_SIZE
from .._protocol.packets import Received
from .secretbox import SecretboxStream
from .socket import DirectStream

LONG: Final = 2**15
"""Bytes of a batch from which on a part of it is sealed and sent ahead, so that the peer wakes while the rest
is being sealed."""

AHEAD: Final = 2**13
"""Bytes of that part. With half of the batch ahead the peer mostly wakes twice."""


@final
class Wire:
    """Takes batches, and sends them at once where that can be.

    Arguments:
        stream: sealed or plain.
        transport: what is below it, or it.

    Attributes:
        receive: receives what is there, or some of it, which is good until the next checkpoint; raises
            as the stream's `receive_some` does.
    """

    __slots__ = ("_direct", "_rest", "_sealed", "_stream", "receive")

    def __init__(self, stream: trio.abc.Stream, transport: trio.abc.Stream) -> None:
        self._stream = stream
        self._sealed = stream if isinstance(stream, SecretboxStream) else None
        self._direct = transport if isinstance(transport, DirectStream) else None
        self._rest = b""  # of what `send_now` was given
        self.receive: Callable[[], Awaitable[Received | bytearray]]
        if self._sealed is not None:
            self.receive = self._sealed.receive_available
        elif self._direct is not None:
            self.receive = self._direct.receive_view
        else:
            self.receive = partial(stream.receive_some, MAX_BATCH_SIZE)

    @property
    def has_rest(self) -> bool:
        """Whether something that `send_now` was given has not left: `send` is to be called."""
        return bool(self._rest)

    @property
    def can_send_now(self) -> bool:
        """Whether `send_now` may be called, if no `send` is under way."""
        return self._direct is not None and not self._rest

    def send_now(self, batch: bytes) -> bool:
        """Send what can leave at once, and keep the rest. Returns whether there is none."""
        assert self._direct is not None
        if self._sealed is None:
            self._rest = batch[self._direct.send_now(batch) :]
            return not self._rest
        view = memoryview(batch)
        for part in (batch,) if len(batch) < LONG else (view[:AHEAD], view[AHEAD:]):
            records = self._sealed.seal(part)
            if self._rest:
                self._rest += records
            else:
                self._rest = records[self._direct.send_now(records) :]
        return not self._rest

    async def send(self, batch: bytes) -> None:
        """Send the rest, if there is one, and a batch. Raises as the stream's `send_all` does."""
        if self._rest:
            await self.send_rest()
        await self._stream.send_all(batch)

    async def send_rest(self) -> None:
        """Send what `send_now` has kept. Raises as the stream's `send_all` does."""
        rest, self._rest = self._rest, b""
        if self._sealed is None:
            await self._stream.send_all(rest)
        else:
            await self._sealed.send_records(rest)

    async def send_end(self) -> bool:
        """Say that nothing follows in this direction. Returns whether the stream can say so.

        Raises as the stream's `send_eof` does.
        """
        if self._rest:
            await self.send_rest()
        if self._sealed is not None:
            if self._direct is None:
                await self._sealed.send_eof()
            elif not self.send_end_now():
                await self.send_rest()
            return True
        if self._direct is not None:
            self._direct.shutdown_send()
        elif isinstance(self._stream, trio.abc.HalfCloseableStream):
            await self._stream.send_eof()
        else:
            return False
        return True

    def send_end_now(self) -> bool:
        """As `send_end`, as far as nothing has to be waited for. Returns whether the end has left."""
        if self._direct is None or self._rest:
            return False
        if self._sealed is None:
            self._direct.shutdown_send()
        elif record := self._sealed.seal_end():
            self._rest = record[self._direct.send_now(record) :]
        return not self._rest

    def unacknowledged(self) -> int:
        """How many bytes were written and have not arrived; 0 where the system does not say."""
        return 0 if self._direct is None else self._direct.count_queued() or 0

    def close_now(self) -> bool:
        """Close the stream, if that needs no waiting; return whether it was so. Again does no harm."""
        if self._direct is None:
            return False
        if self._sealed is not None:
            self._sealed.close_now()
        self._direct.close_now()
        return True
