"""`SecretboxStream`: a `trio.abc.Stream` adapter that seals everything it sends, in `records`.

Theory of operation
===================

Sending and receiving share nothing but the transport. Either can break, and the other goes on.

If the transport's ``send_all`` raises anything, cancellation included, nobody knows how much of a record was
sent. No record can follow half a record, so sending is broken for good.

The keys must be used for this one stream only, or nonces repeat. That is why the class is not exported. A
forked child has the same keys and counters, so it seals and opens nothing: see `abandon`.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, suppress
from operator import index
from typing import Final, final

import trio

from .._fork import abandon_in_child
from .fast import FastStream, Load
from .records import HEADER_SIZE, MAX_PLAINTEXT_SIZE, MAX_RECORD_SIZE, Direction, Keyless, Opener
from .socket import make_fast

RECORDS_PER_SEND: Final = 4
"""Records that are sealed and handed to the transport at once. A big send is few system calls, and its whole
ciphertext is never held in memory."""

SPLIT_THRESHOLD: Final = 2**15
"""Bytes. A batch of at least this size is sealed and sent in two parts, a small one first."""

HEAD_START: Final = 2**13
"""Bytes of the first part. If it were half of the batch, the peer would mostly wake twice."""

_CLOSED: Final = "this stream was closed"


@final
class SecretboxStream(FastStream, trio.abc.HalfCloseableStream):
    """An encrypted, authenticated stream over another stream.

    Arguments:
        transport: the stream that carries the records. It is closed with this one.
        send_key, receive_key: 32 bytes each, used for this stream only.
        max_record_size: bytes of a record, without its header, that are accepted. Reads ask the transport for
            no more than a header and so many bytes.
    """

    _abandoned = False

    def __init__(
        self,
        transport: trio.abc.Stream,
        *,
        send_key: bytes,
        receive_key: bytes,
        max_record_size: int = MAX_RECORD_SIZE,
    ) -> None:
        self._transport = make_fast(transport)
        self._closed = False
        self._sealer = Direction(send_key)
        self._send_busy = False
        self._send_broken = False
        self._send_ended = False
        self._opener = Opener(Direction(receive_key), max_record_size)
        self._receive_busy = False
        abandon_in_child(self)

    def rekey(self, *, send_key: bytes, receive_key: bytes) -> None:
        """Use new keys from the next record on, in both directions.

        Counters start again at 0, which is safe because each key is used for one direction once. Records of
        full size are accepted from now on. Call it between two records, when the other side does the same.
        """
        self._sealer = Direction(send_key)
        self._opener.direction = Direction(receive_key)
        self._opener.max_record_size = MAX_RECORD_SIZE

    # ---- sending ----

    @contextmanager
    def _sending(self) -> Generator[None]:
        """Let one task at a time send."""
        if self._send_busy:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._check_open()
        if self._send_broken:
            raise trio.BrokenResourceError("sending failed before, and part of a record may have left")
        self._send_busy = True
        try:
            yield
        finally:
            self._send_busy = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Seal and send. See `trio.abc.SendStream.send_all`; empty data sends nothing.

        Raises:
            trio.BusyResourceError: another task is sending.
            trio.ClosedResourceError: this side was closed or half-closed.
            trio.BrokenResourceError: the transport is broken, or an earlier `send_all` did not end
                well, cancellation included.
        """
        with self._sending():
            self._check_not_ended()
            # Here a cancellation does no harm yet: no nonce is spent.
            await trio.lowlevel.checkpoint_if_cancelled()
            with memoryview(data) as view, view.cast("B") as plaintext:
                if not plaintext:
                    await self._send_rest()
                step = RECORDS_PER_SEND * MAX_PLAINTEXT_SIZE
                for start in range(0, len(plaintext), step):
                    await self._transmit(self._sealer.seal_all(plaintext[start : start + step]))

    async def _send_rest(self) -> None:
        """Send the rest of earlier records, if any is kept. This is always a checkpoint."""
        if self._transport.has_rest:
            await self._transmit(b"")
        else:
            await trio.lowlevel.checkpoint()

    @property
    def can_send_nowait(self) -> bool:
        """See `FastStream`."""
        return self._transport.can_send_nowait

    @property
    def has_rest(self) -> bool:
        """See `FastStream`. The rest consists of whole records, and the end of one."""
        return self._transport.has_rest

    def send_nowait(self, data: bytes | memoryview) -> bool:
        """See `FastStream`. Many bytes are sent in two parts, so that the peer wakes while the second one is
        sealed.

        Raises:
            trio.ClosedResourceError: this side was closed.
        """
        if len(data) < SPLIT_THRESHOLD:
            return self._transport.send_nowait(self._sealer.seal_all(data))
        view = memoryview(data)
        # If the transport keeps a rest of the first part, it appends the second one to that.
        self._transport.send_nowait(self._sealer.seal_all(view[:HEAD_START]))
        return self._transport.send_nowait(self._sealer.seal_all(view[HEAD_START:]))

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream.wait_send_all_might_not_block`. Raises as `send_all` does."""
        with self._sending():
            self._check_not_ended()
            await self._transport.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """Send the end record: nothing follows in this direction. A second call does nothing.

        Raises as `send_all` does.
        """
        with self._sending():
            if self._send_ended:
                await trio.lowlevel.checkpoint()
                return
            await trio.lowlevel.checkpoint_if_cancelled()
            self._send_ended = True
            await self._transmit(self._sealer.seal(b""))

    async def send_end(self) -> bool:
        """See `FastStream`."""
        if self._transport.has_rest:
            with self._sending():
                await self._send_rest()
        if not self._transport.can_send_nowait:
            await self.send_eof()
        elif not self.send_end_nowait():
            with self._sending():
                await self._send_rest()
        return True

    def send_end_nowait(self) -> bool:
        """See `FastStream`. This sends nothing if the end record must not be sent."""
        if not self._transport.can_send_nowait:
            return False
        end = self._seal_end()
        return not end or self._transport.send_nowait(end)

    def _seal_end(self) -> bytes:
        """Return the end record, which must be sent next. Empty: the record must not be sent."""
        if self._closed or self._send_ended or self._send_broken or self._send_busy:
            return b""
        # Receiving failed, so somebody may have tampered with the stream. The peer must not see an orderly
        # end.
        if self._opener.failure:
            return b""
        self._send_ended = True
        return self._sealer.seal(b"")

    def count_unacknowledged(self) -> int:
        """See `FastStream`."""
        return self._transport.count_unacknowledged()

    def is_drained(self) -> bool:
        """See `FastStream`."""
        return self._transport.is_drained()

    def load(self) -> Load | None:
        """See `FastStream`."""
        return self._transport.load()

    def _check_not_ended(self) -> None:
        if self._send_ended:
            raise trio.ClosedResourceError("the end of this direction was already sent")

    async def _transmit(self, records: bytes) -> None:
        try:
            await self._transport.send_all(records)
        except BaseException:
            # Nobody knows how much of the records was sent, so nothing can follow them.
            self._send_broken = True
            raise

    # ---- receiving ----

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive the plaintext of one record, or the rest of it.

        Arguments:
            max_bytes: at least 1. Further bytes of the record are kept for the next call.

        Returns:
            At least one byte, or ``b""`` for ever once the end record has come.

        Raises:
            trio.BusyResourceError: another task is receiving.
            trio.ClosedResourceError: this side was closed.
            trio.BrokenResourceError: the transport is broken; or it ended without an end record; or a record
                does not open. The last two break receiving for good.
        """
        if max_bytes is not None and index(max_bytes) < 1:
            raise ValueError("max_bytes must be at least 1")
        if self._receive_busy:
            raise trio.BusyResourceError("another task is receiving from this stream")
        self._check_open()
        self._receive_busy = True
        try:
            await self._fill()
        finally:
            self._receive_busy = False
        return self._opener.take(max_bytes)

    async def receive_view(self) -> bytes:
        """Receive as `receive_some` does, but all records that are here already, `MAX_AT_ONCE` at most.

        One task at a time may call it.
        """
        opener = self._opener
        if opener.failure is not None or opener.has_ended or opener.has_plaintext:
            return await self.receive_some()
        if opener.has_record():
            # The checkpoint comes first: if it came later, a cancellation would lose the opened records.
            await trio.lowlevel.checkpoint()
            if plaintext := opener.open_all(b""):
                return plaintext
        while not opener.has_ended:
            self._check_open()
            if plaintext := opener.open_all(opener.check(await self._transport.receive_view())):
                return plaintext
        return b""

    async def _fill(self) -> None:
        """Wait until there is plaintext, or the end; or raise. This is always a checkpoint."""
        opener = self._opener
        if opener.failure is not None:
            raise trio.BrokenResourceError(opener.failure)
        if opener.has_plaintext or opener.has_ended or opener.open_next(b""):
            await trio.lowlevel.checkpoint()
            return
        while True:
            data = await self._transport.receive_some(HEADER_SIZE + opener.max_record_size)
            if opener.open_next(opener.check(data)):
                return

    # ---- closing ----

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError(_CLOSED)

    def close_nowait(self) -> bool:
        """See `FastStream`. No end record is sent, and the keys are dropped."""
        if not self._transport.close_nowait():
            return False
        self._close()
        return True

    def _close(self) -> None:
        """Send and receive no more, and drop the keys."""
        self._closed = True
        if not self._abandoned:  # an abandoned stream has no keys, and a reason of its own
            self._drop_keys(_CLOSED)

    def _drop_keys(self, reason: str) -> None:
        self._sealer = self._opener.direction = Keyless(reason)

    async def aclose(self) -> None:
        """Send the end record, if nothing stands in the way, and close the transport.

        This waits until the transport has taken the end record. If this is cancelled, it closes the transport
        at once.
        """
        if self._abandoned:
            await trio.lowlevel.checkpoint()
            return
        end = self._seal_end()
        self._close()
        try:
            if end:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await self._transmit(end)
        finally:
            # If this is cancelled, the transport's aclose() still closes it, and raises Cancelled.
            await self._transport.aclose()

    def abandon(self) -> None:
        """See `Abandonable.abandon`. The keys are dropped, and the transport is not touched any more.

        Closing the transport could send something that its peer would notice, as TLS does.
        """
        self._abandoned = self._closed = True
        self._drop_keys("this stream belongs to the process that this one was forked from")
