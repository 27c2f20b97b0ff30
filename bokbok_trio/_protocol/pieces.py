"""Big packets are sent in pieces, and put together again.

A packet over `MAX_WHOLE_SIZE` leaves in pieces, so that others can leave between them::

    part n remaining bytes  a piece of packet n; `remaining` bytes are still to come, 0 ends the packet
    drop n                  the pieces of n so far are void, the packet never existed

At most `MAX_IN_PIECES` packets of each direction are unfinished at a time. So the unfinished packets of the
peer take up at most that many times the limit of a packet.
"""

from __future__ import annotations

from collections import deque
from typing import Final, final

from .._errors import ProtocolError
from .packets import LENGTH_SIZE, Buffer, Chunks, encode_number, encode_packet
from .queued_packet import QueuedPacket

MAX_PIECE_SIZE: Final = 65_519 - 61
"""Bytes of a piece: with the longest head of `part` it fits one record."""

MAX_IN_PIECES: Final = 4
"""Packets of one direction that may be in pieces at once, each up to the limit of a packet."""


@final
class PartlySent:
    """A big packet while its pieces are sent.

    Arguments:
        number: the number of its pieces.
        packet: the packet.
        now: the time, for its timeout.

    Attributes:
        number: encoded.
        packet: the packet.
        remaining: bytes that have not departed.
    """

    __slots__ = ("_chunks", "number", "packet", "remaining")

    def __init__(self, number: int, packet: QueuedPacket, now: float) -> None:
        self.number = encode_number(number)
        self.packet = packet
        chunks: Chunks = []
        self.remaining = packet.encode(now, chunks) - LENGTH_SIZE
        chunks[0] = chunks[0][LENGTH_SIZE:]
        self._chunks = deque(memoryview(chunk) for chunk in chunks)

    def take(self, size: int, chunks: Chunks) -> None:
        """Append the next piece, of at most `size` bytes, to some chunks."""
        size = min(size, self.remaining)
        self.remaining -= size
        chunks.append(encode_packet(b"part", self.number, encode_number(self.remaining), body_size=size))
        while size:
            chunk = self._chunks.popleft()
            if len(chunk) > size:
                self._chunks.appendleft(chunk[size:])
                chunk = chunk[:size]
            chunks.append(chunk)
            size -= len(chunk)


@final
class Reassembler:
    """Puts the peer's pieces together.

    Arguments:
        limit: the most bytes that the length of a packet may be.
    """

    __slots__ = ("_in_pieces", "_limit")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_pieces: dict[int, tuple[bytearray, int]] = {}  # the bytes so far, and how many remain

    @property
    def held(self) -> int:
        """How many bytes of unfinished packets are held."""
        return sum(len(buffer) for buffer, _ in self._in_pieces.values())

    def add(self, number: int, remaining: int, piece: Buffer) -> memoryview | None:
        """Take a piece. Return the body of the packet if this was its last piece.

        Raises:
            ProtocolError: the piece is empty, does not continue its packet, exceeds the limit of a packet, or
                begins one packet too many.
        """
        if not piece:
            raise ProtocolError("an empty piece")
        if number in self._in_pieces:
            buffer, expected = self._in_pieces[number]
            if remaining != expected - len(piece):
                raise ProtocolError(f"a piece with {remaining} bytes to come after one with {expected}")
        else:
            total = len(piece) + remaining
            if total > self._limit:
                raise ProtocolError(f"a packet of {total} bytes in pieces exceeds the limit of {self._limit}")
            if len(self._in_pieces) >= MAX_IN_PIECES:
                raise ProtocolError(f"more than {MAX_IN_PIECES} packets in pieces at once")
            buffer = bytearray()
        buffer += piece
        if remaining:
            self._in_pieces[number] = (buffer, remaining)
            return None
        self._in_pieces.pop(number, None)
        return memoryview(buffer)

    def drop(self, number: int) -> int:
        """Forget the pieces of a packet. Return how many bytes they were.

        Raises:
            ProtocolError: no piece of the packet has come.
        """
        if number not in self._in_pieces:
            raise ProtocolError(f"`drop` of packet {number}, of which no piece has come")
        return len(self._in_pieces.pop(number)[0])
