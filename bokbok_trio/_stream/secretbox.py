"""`SecretboxStream`: a `trio.abc.Stream` adapter that seals everything it sends.

Theory of operation
===================

What is sent leaves as *records*::

    u16 length, big-endian | secretbox(key, nonce, plaintext)       length of the box, 16 to 65,535

Each direction has a key of its own and counts its records from 0; the count, as 24 big-endian
bytes, is the nonce, and is never sent. So a record opens only as the very next one of its direction
under its key: one that was altered, repeated, left out, moved, or reflected does not open, and that
is the end of receiving. An empty plaintext (length 16) is the *end record*: the sender says, and
the seal proves, that nothing follows. The end of the transport anywhere else is truncation.

The keys must be used for this one stream only, or nonces repeat; hence the class is not exported.

Invariants
==========

- Sending and receiving share nothing but the transport. Either can break, and the other goes on.
- Once a record's sealing has begun, its nonce is spent. If the transport's ``send_all`` then raises
  anything, cancellation included, how much of it left is not known, so sending is broken for good.
- Ciphertext is opened one record at a time, when it is asked for, and what was read and not yet
  opened stays in ``_ciphertext``: cancelling `receive_some` loses nothing, and after `rekey` it is
  opened under the new key.
- A forked child has the same keys and counters, so it seals and opens nothing: see `abandon`.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, suppress
from operator import index
from typing import Final, final

import trio
from nacl.bindings import crypto_secretbox, crypto_secretbox_open
from nacl.exceptions import CryptoError

from .._fork import abandon_in_child
from .._protocol.packets import MAX_AT_ONCE, Buffer
from .fast import FastStream, Load
from .socket import make_fast

HEADER_SIZE: Final = 2
"""Bytes of a record's length."""

MAC_SIZE: Final = 16
"""Bytes that secretbox adds to a plaintext. A record of just that is the end record."""

MAX_RECORD_SIZE: Final = 2**16 - 1
"""Bytes of a record without its header: the length is a u16."""

MAX_PLAINTEXT_SIZE: Final = MAX_RECORD_SIZE - MAC_SIZE
"""Bytes of plaintext in one record."""

RECORDS_PER_SEND: Final = 4
"""Records sealed and handed to the transport at once, so that a big send is few system calls and
is never held in memory a second time as a whole."""

SPLIT_THRESHOLD: Final = 2**15
"""Bytes of a batch from which on a part of it is sealed and sent ahead."""

HEAD_START: Final = 2**13
"""Bytes of that part. With half of the batch ahead the peer mostly wakes twice."""

_NONCE_SIZE: Final = 24
_CLOSED: Final = "this stream was closed"


class _Direction:
    """The key and the record counter of one direction."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._counter = 0

    def _nonce(self) -> bytes:
        nonce = self._counter.to_bytes(_NONCE_SIZE, "big")
        self._counter += 1
        return nonce

    def seal(self, plaintext: bytes | memoryview) -> bytes:
        box = crypto_secretbox(plaintext, self._nonce(), self._key)  # type: ignore[arg-type]  # any buffer
        return len(box).to_bytes(HEADER_SIZE, "big") + box

    def open(self, box: memoryview) -> bytes:
        return crypto_secretbox_open(box, self._nonce(), self._key)  # type: ignore[arg-type]  # any buffer


@final
class _Keyless(_Direction):
    """A direction that is over, and why. It has no key."""

    def __init__(self, reason: str) -> None:
        super().__init__(b"")
        self._reason = reason

    def seal(self, plaintext: bytes | memoryview) -> bytes:  # noqa: ARG002
        raise trio.ClosedResourceError(self._reason)

    def open(self, box: memoryview) -> bytes:
        return self.seal(box)


@final
class SecretboxStream(FastStream, trio.abc.HalfCloseableStream):
    """An encrypted, authenticated stream over another stream.

    Arguments:
        transport: the stream to send records over. Closed with this one.
        send_key, receive_key: 32 bytes each, used for this stream only.
        max_record_size: bytes of a record, without its header, that will be accepted; reads ask the
            transport for no more than a header and so many bytes.
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
        self._sealer = _Direction(send_key)
        self._send_busy = False
        self._send_broken = False
        self._send_ended = False
        self._opener = _Direction(receive_key)
        self._max_record_size = max_record_size
        self._receive_busy = False
        self._receive_failure: str | None = None
        self._receive_ended = False
        self._ciphertext = bytearray()
        self._plaintext = b""
        self._position = 0  # of what was not yet received of it
        abandon_in_child(self)

    def rekey(self, *, send_key: bytes, receive_key: bytes) -> None:
        """Go on under new keys, from the next record on, in both directions.

        Counters start again at 0, and full-sized records are accepted. To be called between two
        records, when the other side does the same.
        """
        self._sealer = _Direction(send_key)
        self._opener = _Direction(receive_key)
        self._max_record_size = MAX_RECORD_SIZE

    # ---- sending ----

    @contextmanager
    def _sending(self) -> Generator[None]:
        """Let one task at a time send, and none after the end."""
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
            await trio.lowlevel.checkpoint_if_cancelled()
            with memoryview(data) as view, view.cast("B") as plaintext:
                if not plaintext:
                    await self._send_rest()
                step = RECORDS_PER_SEND * MAX_PLAINTEXT_SIZE
                for start in range(0, len(plaintext), step):
                    await self._transmit(self._seal(plaintext[start : start + step]))

    def _seal(self, data: bytes | memoryview) -> bytes:
        """The records of some data, which must leave next, and whole."""
        assert data, "an empty record would be the end"
        if len(data) <= MAX_PLAINTEXT_SIZE:
            return self._sealer.seal(data)
        return b"".join(
            [
                self._sealer.seal(data[at : at + MAX_PLAINTEXT_SIZE])
                for at in range(0, len(data), MAX_PLAINTEXT_SIZE)
            ]
        )

    async def _send_rest(self) -> None:
        """Send what of sealed records was kept; a checkpoint in any case."""
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
        """See `FastStream`. Kept are whole records, and the end of one."""
        return self._transport.has_rest

    def send_nowait(self, data: bytes | memoryview) -> bool:
        """See `FastStream`. Many bytes leave as two parts: the peer wakes while the second is being sealed.

        Raises:
            trio.ClosedResourceError: this side was closed.
        """
        if len(data) < SPLIT_THRESHOLD:
            return self._transport.send_nowait(self._seal(data))
        view = memoryview(data)
        self._transport.send_nowait(self._seal(view[:HEAD_START]))
        return self._transport.send_nowait(self._seal(view[HEAD_START:]))

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream.wait_send_all_might_not_block`. Raises as `send_all` does."""
        with self._sending():
            self._check_not_ended()
            await self._transport.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """Send the end record: nothing follows in this direction. Again does nothing.

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
        """See `FastStream`. Where it must not be said, nothing is sent."""
        if not self._transport.can_send_nowait:
            return False
        end = self._seal_end()
        return not end or self._transport.send_nowait(end)

    def _seal_end(self) -> bytes:
        """Return the end record, which must leave next; empty where it must not be sent.

        Nor must it where receiving failed: the other side would take what somebody spoiled for a close.
        """
        if self._closed or self._send_ended or self._send_broken or self._send_busy or self._receive_failure:
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
            # How much of the records left is not known, so nothing can follow them.
            self._send_broken = True
            raise

    # ---- receiving ----

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive the plaintext of one record, or the rest of one.

        Arguments:
            max_bytes: at least 1; what is over it is kept for the next call.

        Returns:
            At least one byte, or ``b""`` for ever once the end record has come.

        Raises:
            trio.BusyResourceError: another task is receiving.
            trio.ClosedResourceError: this side was closed.
            trio.BrokenResourceError: the transport is broken. Or it ended without an end record,
                or a record does not open, which breaks receiving for good.
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
        start = self._position
        end = len(self._plaintext) if max_bytes is None else start + max_bytes
        received = self._plaintext[start:end]
        self._position += len(received)
        return received

    async def receive_view(self) -> bytes:
        """As `receive_some`, but of the records that are here already, together: `MAX_AT_ONCE` at most.

        For one task at a time.
        """
        if self._receive_failure is not None or self._receive_ended or self._position < len(self._plaintext):
            return await self.receive_some()
        if self._has_record():
            # First, as what is opened below would be lost if this were cancelled.
            await trio.lowlevel.checkpoint()
            if plaintext := self._open_all(b""):
                return plaintext
        data: Buffer | bytearray
        while not self._receive_ended:
            self._check_open()
            data = await self._transport.receive_view()
            if plaintext := self._open_all(self._check_received(data)):
                return plaintext
        return b""

    def _open_all(self, data: Buffer | bytearray) -> bytes:
        """Open what more data completes, in one piece, up to `MAX_AT_ONCE` records.

        A record that does not open is the next call's.
        """
        if self._ciphertext:
            self._ciphertext += data
            data = self._ciphertext
        plaintexts: list[bytes] = []
        position = 0
        size = len(data)
        with memoryview(data) as view:
            try:
                while (
                    position < size
                    and len(plaintexts) < MAX_AT_ONCE
                    and (end := self._open_at(view, position)) > position
                ):
                    position = end
                    plaintexts.append(self._plaintext)
            except trio.BrokenResourceError:
                if not plaintexts:
                    raise
            else:
                # A copy, as the view is of what will be received over.
                self._ciphertext = bytearray(view[position:]) if position < size else bytearray()
        self._position = len(self._plaintext)
        return plaintexts[0] if len(plaintexts) == 1 else b"".join(plaintexts)

    async def _fill(self) -> None:
        """Have some plaintext, or the end, or raise. One checkpoint at least."""
        if self._receive_failure is not None:
            raise trio.BrokenResourceError(self._receive_failure)
        if (
            self._position < len(self._plaintext)
            or self._receive_ended
            or (self._ciphertext and self._open_next())
        ):
            await trio.lowlevel.checkpoint()
            return
        while True:
            data = await self._transport.receive_some(HEADER_SIZE + self._max_record_size)
            self._ciphertext += self._check_received(data)
            if self._open_next():
                return

    def _check_received(self, data: Buffer | bytearray) -> Buffer | bytearray:
        if not data:
            raise self._broken("the stream was cut short: it ended without an end record")
        return data

    def _has_record(self) -> bool:
        """Whether all of the next record is here."""
        data = self._ciphertext
        return len(data) >= HEADER_SIZE and len(data) >= HEADER_SIZE + (data[0] << 8 | data[1])

    def _open_next(self) -> bool:
        """Open the next record, if all of it is here. True: there is plaintext, or the end."""
        with memoryview(self._ciphertext) as view:
            end = self._open_at(view, 0)
        del self._ciphertext[:end]
        return end > 0

    def _open_at(self, data: memoryview, start: int) -> int:
        """Open the record that begins there, if all of it is there; return where it ends, or else `start`."""
        at = start + HEADER_SIZE
        if at > len(data) or self._receive_ended:
            return start
        size = data[start] << 8 | data[start + 1]
        if size < MAC_SIZE or size > self._max_record_size:
            raise self._broken(
                f"a record of {size} bytes, and {MAC_SIZE} to {self._max_record_size} are allowed"
            )
        end = at + size
        if end > len(data):
            return start
        try:
            plaintext = self._opener.open(data[at:end])
        except CryptoError:
            plaintext = None
        if plaintext is None:  # not inside of the `except`: the frames of that exception hold the key
            raise self._broken("a record did not open: it was not sealed as the next one under our key")
        self._plaintext = plaintext
        self._position = 0
        self._receive_ended = not plaintext
        return end

    def _broken(self, reason: str) -> trio.BrokenResourceError:
        """The exception to raise, as receiving is broken for good."""
        self._receive_failure = reason
        self._ciphertext = bytearray()
        return trio.BrokenResourceError(reason)

    # ---- closing ----

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError(_CLOSED)

    def close_nowait(self) -> bool:
        """See `FastStream`. No end is said, and the keys are dropped."""
        if not self._transport.close_nowait():
            return False
        self._close()
        return True

    def _close(self) -> None:
        """Send and receive no more, and drop the keys."""
        self._closed = True
        if not self._abandoned:  # then it has none
            self._sealer = self._opener = _Keyless(_CLOSED)

    async def aclose(self) -> None:
        """Send the end record, if nothing stands in the way, and close the transport.

        Waits for the transport to take the end record; cancelled, it closes the transport at once.
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
            # A cancelled aclose() of a transport closes it and raises Cancelled, as we then do.
            await self._transport.aclose()

    def abandon(self) -> None:
        """See `Abandonable.abandon`. The keys are dropped, and the transport is not touched any more.

        The transport may have a close of its own that its peer would notice, as TLS has.
        """
        self._abandoned = self._closed = True
        self._sealer = self._opener = _Keyless(
            "this stream belongs to the process that this one was forked from"
        )
