"""Seals and opens the records of a `SecretboxStream`. Nothing here waits.

A record on the wire::

    u16 length, big-endian | secretbox(key, nonce, plaintext)       length of the box, 16 to 65,535

Each direction has a key of its own and counts its records from 0. The count, as 24 big-endian bytes, is the
nonce, and is never sent. So a record opens only as the very next one of its direction. A record that was
altered, repeated, left out, moved or reflected does not open, and receiving ends there.

An empty plaintext (length 16) is the *end record*: the sender says, and the seal proves, that nothing
follows. If the transport ends anywhere else, the stream was cut short.

Invariants
==========

- Once the sealing of a record has begun, its nonce is spent.
- `Opener` opens one record at a time, when it is asked to. Ciphertext that was received and not opened stays
  in ``_ciphertext``. So a cancelled receive loses nothing, and after a change of keys it is opened under the
  new key.
"""

from __future__ import annotations

from typing import Final, final

import trio
from nacl.bindings import crypto_secretbox, crypto_secretbox_open
from nacl.exceptions import CryptoError

from .._protocol.packets import MAX_AT_ONCE, Buffer

HEADER_SIZE: Final = 2
"""Bytes of a record's length."""

MAC_SIZE: Final = 16
"""Bytes that secretbox adds to a plaintext. A record of just that is the end record."""

MAX_RECORD_SIZE: Final = 2**16 - 1
"""Bytes of a record without its header: the length is a u16."""

MAX_PLAINTEXT_SIZE: Final = MAX_RECORD_SIZE - MAC_SIZE
"""Bytes of plaintext in one record."""

_NONCE_SIZE: Final = 24


class Direction:
    """The key and the record counter of one direction.

    Arguments:
        key: 32 bytes, used for this direction of this stream only; otherwise nonces would repeat.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._counter = 0

    def _nonce(self) -> bytes:
        # Counted before the nonce is used: whatever happens to the record, no other one gets this nonce.
        nonce = self._counter.to_bytes(_NONCE_SIZE, "big")
        self._counter += 1
        return nonce

    def seal(self, plaintext: bytes | memoryview) -> bytes:
        """Make the next record."""
        box = crypto_secretbox(plaintext, self._nonce(), self._key)  # type: ignore[arg-type]  # any buffer
        return len(box).to_bytes(HEADER_SIZE, "big") + box

    def seal_all(self, data: bytes | memoryview) -> bytes:
        """Make the records of some data. They must be sent next, and whole: their nonces are spent."""
        assert data, "an empty record would be the end"
        if len(data) <= MAX_PLAINTEXT_SIZE:
            return self.seal(data)
        starts = range(0, len(data), MAX_PLAINTEXT_SIZE)
        return b"".join([self.seal(data[start : start + MAX_PLAINTEXT_SIZE]) for start in starts])

    def open(self, box: memoryview) -> bytes:
        """Open the next record, or raise `CryptoError`."""
        return crypto_secretbox_open(box, self._nonce(), self._key)  # type: ignore[arg-type]  # any buffer


@final
class Keyless(Direction):
    """A direction that is over. It has no key any more.

    Arguments:
        reason: the text of the `trio.ClosedResourceError` that sealing and opening raise.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(b"")
        self._reason = reason

    def seal(self, plaintext: bytes | memoryview) -> bytes:  # noqa: ARG002
        raise trio.ClosedResourceError(self._reason)

    def open(self, box: memoryview) -> bytes:
        return self.seal(box)


@final
class Opener:
    """Opens the records of one direction, however their bytes are chunked.

    Arguments:
        direction: its key and counter.
        max_record_size: bytes of a record, without its header, that are accepted.

    Attributes:
        direction, max_record_size: as above; they may change between two records.
        failure: why receiving is broken for good; None: it is not.
        has_ended: whether the end record has come.
    """

    __slots__ = (
        "_ciphertext",
        "_plaintext",
        "_position",
        "direction",
        "failure",
        "has_ended",
        "max_record_size",
    )

    def __init__(self, direction: Direction, max_record_size: int) -> None:
        self.direction = direction
        self.max_record_size = max_record_size
        self.failure: str | None = None
        self.has_ended = False
        self._ciphertext = bytearray()
        self._plaintext = b""  # of the last record that was opened
        self._position = 0  # bytes of it that were taken

    @property
    def has_plaintext(self) -> bool:
        """Whether `take` would return any bytes."""
        return self._position < len(self._plaintext)

    def has_record(self) -> bool:
        """Whether all of the next record is here."""
        data = self._ciphertext
        return len(data) >= HEADER_SIZE and len(data) >= HEADER_SIZE + (data[0] << 8 | data[1])

    def take(self, max_bytes: int | None) -> bytes:
        """Return the rest of the last record's plaintext, or the first bytes of it."""
        start = self._position
        end = len(self._plaintext) if max_bytes is None else start + max_bytes
        taken = self._plaintext[start:end]
        self._position += len(taken)
        return taken

    def check(self, received: Buffer | bytearray) -> Buffer | bytearray:
        """Return the bytes that the transport received, or raise if the transport has ended."""
        if not received:
            raise self._broken("the stream was cut short: it ended without an end record")
        return received

    def open_next(self, received: Buffer | bytearray) -> bool:
        """Open the next record, if all of it is here. Return whether there is plaintext, or the end."""
        self._ciphertext += received
        with memoryview(self._ciphertext) as view:
            end = self._open_at(view, 0)
        del self._ciphertext[:end]
        return end > 0

    def open_all(self, received: Buffer | bytearray) -> bytes:
        """Open all records that are here, up to `MAX_AT_ONCE`, and return their plaintext in one piece.

        If a record does not open, the plaintext of those before it is returned, and the next call raises.
        """
        data = received  # in the most frequent case nothing is kept from earlier, and nothing is copied
        if self._ciphertext:
            self._ciphertext += received
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
                # A copy, because the buffer that `received` shows will be used again.
                self._ciphertext = bytearray(view[position:]) if position < size else bytearray()
        self._position = len(self._plaintext)
        return plaintexts[0] if len(plaintexts) == 1 else b"".join(plaintexts)

    def _open_at(self, data: memoryview, start: int) -> int:
        """Open the record at `start`, if all of it is there. Return its end; else `start`."""
        at = start + HEADER_SIZE
        if at > len(data) or self.has_ended:
            return start
        size = data[start] << 8 | data[start + 1]
        if size < MAC_SIZE or size > self.max_record_size:
            raise self._broken(f"a record of {size} bytes; {MAC_SIZE} to {self.max_record_size} are allowed")
        end = at + size
        if end > len(data):
            return start
        try:
            plaintext = self.direction.open(data[at:end])
        except CryptoError:
            plaintext = None
        # Raised outside of the `except`, or it would refer to an exception whose frames hold the key.
        if plaintext is None:
            raise self._broken("a record did not open: it was not sealed as the next one under our key")
        self._plaintext = plaintext
        self._position = 0
        self.has_ended = not plaintext
        return end

    def _broken(self, reason: str) -> trio.BrokenResourceError:
        """Break receiving for good, and return the exception to raise."""
        self.failure = reason
        self._ciphertext = bytearray()
        return trio.BrokenResourceError(reason)
