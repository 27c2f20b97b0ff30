"""Packets to bytes and back.

A *packet* is a list of 0 to 255 byte strings, its *fields*. On the wire, all integers big-endian::

    u32 length | body               the body is `length` bytes long
    body = u8 count | count x field
    field = u32 size | bytes

A *protocol packet* is one of the packets that the protocol defines: its first field is its kind, and few
fields follow. The body that a user sends is the last of these fields. It is itself an encoded list of fields.

Invariants
==========

- The sizes use up the length exactly, so every byte string encodes at most one list.
- A length over the limit is refused as soon as its four bytes are there. So a decoder holds at most 4 bytes
  and one unfinished packet, besides the rest of the last receive.

A mistake of this side's user raises ``TypeError``, ``ValueError`` or `MessageTooLarge` before anything is
sent. A mistake of the peer raises `ProtocolError`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeAlias

from .._errors import MessageTooLarge, ProtocolError
from .._types import Field, Fields

MAX_FIELDS: Final = 255
"""Fields of a packet: the count is a u8."""

LENGTH_SIZE: Final = 4
"""Bytes of the length before a body."""

Chunks: TypeAlias = list[bytes | memoryview]
"""Bytes in parts, to be joined when they are sent. Until then a big field is not copied."""

Buffer: TypeAlias = bytes | memoryview
"""Received bytes. A memoryview shows a buffer that will be used again: copy bytes that must last beyond the
next checkpoint."""

MAX_AT_ONCE: Final = 100
"""Packets that are decoded at once, and records that are opened at once. Then other connections have their
turn: a receive full of tiny packets would keep them waiting too long."""

LARGE: Final = 2**12
"""Fields of at least this many bytes are kept as views; smaller ones are copied."""

LARGE_BATCH: Final = 2**14
"""The same for a whole receive, which may hold many packets, or one."""

_U32 = struct.Struct(">I")
_HEAD = struct.Struct(">IB")
_COUNTS = [bytes((count,)) for count in range(256)]
_SIZES = [_U32.pack(size) for size in range(256)]  # a look-up is faster than a call
_LISTS: Final[tuple[type, ...]] = (list, tuple)
_NO_LISTS = (str, bytes, bytearray, memoryview)  # sequences, but not lists of fields
_MAX_DIGITS = 18
_ZERO = ord("0")


def encode_fields(fields: Fields) -> list[bytes]:
    """Check a user's list, and copy it, so that nothing in the result can change.

    Raises:
        TypeError, ValueError: as `encode_body` does.
    """
    if type(fields) not in _LISTS and (isinstance(fields, _NO_LISTS) or not isinstance(fields, Sequence)):
        raise TypeError(f"pass a list of fields such as ['ping'], not {type(fields).__name__}")
    if len(fields) > MAX_FIELDS:
        raise ValueError(f"a packet has at most {MAX_FIELDS} fields, not {len(fields)}")
    return [field if type(field) is bytes else encode_field(field) for field in fields]


def encode_body(fields: Fields, limit: int) -> tuple[Chunks, int]:
    """Encode a user's list as a body.

    Arguments:
        fields: 0 to 255 of them. A bytearray or memoryview is copied here, so that the caller may
            go on to change it.
        limit: the most bytes the body may take.

    Returns:
        The body in chunks, and its size in bytes.

    Raises:
        TypeError: `fields` is not a list or other sequence, or one of them is neither bytes nor str.
        ValueError: more than 255 fields, or a str that has no UTF-8 (a lone surrogate).
        MessageTooLarge: the body would be larger than `limit`.
    """
    if type(fields) not in _LISTS or len(fields) > MAX_FIELDS:
        fields = encode_fields(fields)
    chunks: Chunks = []
    small = [_COUNTS[len(fields)]]  # joined into one chunk, which is cheaper to pass on than many
    size = 1
    for field in fields:
        encoded = field if type(field) is bytes else encode_field(field)
        length = len(encoded)
        size += LENGTH_SIZE + length
        if length < LARGE:
            small += (_SIZES[length] if length < len(_SIZES) else _U32.pack(length), encoded)
        else:
            small.append(_U32.pack(length))
            chunks += (b"".join(small), encoded)
            small = []
    if size > limit:
        raise MessageTooLarge(size, limit)
    if small:
        chunks.append(b"".join(small))
    return chunks, size


def size_of(fields: Sequence[bytes]) -> int:
    """Return the bytes of the body that encodes some fields."""
    return 1 + LENGTH_SIZE * len(fields) + sum(map(len, fields))


def encode_field(field: Field) -> bytes:
    """Encode one field of a user's list, or raise ``TypeError``."""
    if isinstance(field, str):
        return field.encode()
    if isinstance(field, bytes | bytearray | memoryview):
        return bytes(field)
    raise TypeError(f"a field is bytes or str, not {type(field).__name__}")


def encode_packet(*fields: bytes, body_size: int | None = None) -> bytes:
    """Encode a protocol packet. With `body_size`, leave out the bytes of its last field.

    Arguments:
        fields: few and small ones.
        body_size: one more field of so many bytes follows; the caller appends the bytes.
    """
    parts: Chunks = [b""]
    size = 1
    for field in fields:
        length = len(field)
        size += LENGTH_SIZE + length
        parts += (_SIZES[length] if length < len(_SIZES) else _U32.pack(length), field)
    count = len(fields)
    if body_size is not None:
        count += 1
        size += LENGTH_SIZE + body_size
        parts.append(_U32.pack(body_size))
    parts[0] = _HEAD.pack(size, count)
    return b"".join(parts)


def encode_prefix(kind: bytes, count: int) -> bytes:
    """Encode the beginning of a packet, for `encode_small_packet`: the count of its fields, and its kind."""
    return _COUNTS[count] + _SIZES[len(kind)] + kind


def encode_small_packet(prefix: bytes, id: int, between: bytes, body: bytes | memoryview) -> bytes:
    """Encode a packet with a body in one step, which is faster than `encode_packet`.

    Arguments:
        prefix: from `encode_prefix`.
        id: the second field.
        between: the fields between the second and the last one, each encoded with its size.
        body: the last field.
    """
    number = b"%d" % id
    size = len(prefix) + LENGTH_SIZE + len(number) + len(between) + LENGTH_SIZE + len(body)
    sizes = _U32.pack(size), _SIZES[len(number)], _U32.pack(len(body))
    return b"".join((sizes[0], prefix, sizes[1], number, between, sizes[2], body))


def cut_text(text: str, limit: int) -> bytes:
    """Encode a text, and cut it between two characters if it is too long."""
    encoded = text.encode(errors="backslashreplace")
    if len(encoded) <= limit:
        return encoded
    # If the limit falls inside a character, its first bytes are not UTF-8, and are dropped.
    return encoded[:limit].decode(errors="ignore").encode()


def _decode_fields(data: Buffer, start: int, end: int) -> list[Any]:
    """Decode the body in `data[start:end]` into fields of the same type as `data`."""
    fields: list[Buffer] = []
    position = start + 1
    try:
        for _ in range(data[start]):
            at = position + LENGTH_SIZE
            position = at + _U32.unpack_from(data, position)[0]
            fields.append(data[at:position])
    except (IndexError, struct.error):
        position = -1
    # Positions only grow. So if any field went past the end, this one comparison sees it.
    if position != end:
        raise _find_fault(bytes(data[start:end]))
    return fields


def _find_fault(body: bytes) -> ProtocolError:
    """Make the error for a malformed body."""
    end = len(body)
    if not end:
        return ProtocolError("a body without a count")
    position = 1
    for _ in range(body[0]):
        if position + LENGTH_SIZE > end:
            return ProtocolError("a packet that ends inside a field's size")
        position += LENGTH_SIZE + _U32.unpack_from(body, position)[0]
        if position > end:
            return ProtocolError("a field that is larger than its packet")
    return ProtocolError(f"{end - position} bytes after the last field of a packet")


def decode_body(body: Buffer) -> list[bytes]:
    """Decode the bytes of a body into fields.

    Raises:
        ProtocolError: the sizes do not use up the bytes exactly.
    """
    fields = _decode_fields(body, 0, len(body))
    return fields if type(body) is bytes else list(map(bytes, fields))


def decode_protocol_packet(body: Buffer) -> list[Buffer]:
    """Decode the body of a protocol packet. Large fields are views of it; all others are copied.

    Raises:
        ProtocolError: as `decode_body` does.
    """
    size = len(body)
    if size < LARGE:
        return _decode_fields(bytes(body), 0, size)
    return [field if len(field) >= LARGE else bytes(field) for field in _decode_fields(body, 0, size)]


def describe(fields: Sequence[Buffer]) -> str:
    """Describe a packet for an error message, whose length the peer must not choose."""
    return f"{bytes(fields[0][:20])!r} with {len(fields)} fields" if fields else "no field at all"


def encode_number(number: int) -> bytes:
    """Encode a number inside a packet: decimal text, at most 18 digits."""
    return b"%d" % number


def decode_number(field: Buffer) -> int:
    """Decode a number inside a packet.

    Raises:
        ProtocolError: it does not match ``0|[1-9][0-9]{0,17}``. ``int()`` alone would take more.
    """
    if 0 < len(field) <= _MAX_DIGITS and (field[0] != _ZERO or len(field) == 1):
        digits = bytes(field)
        if digits.isdigit():
            return int(digits)
    raise ProtocolError(f"invalid number: {bytes(field[:20])!r}")


def decode_text(field: Buffer) -> str:
    """Decode a text inside a packet.

    Raises:
        ProtocolError: it is not UTF-8.
    """
    try:
        return str(field, "utf-8")
    except UnicodeDecodeError as exc:
        raise ProtocolError(f"a text that is not UTF-8: {exc}") from None


class PacketDecoder:
    """Decodes a stream of bytes into packets, however the stream is chunked.

    Arguments:
        limit: the most bytes a packet's length may be.

    Attributes:
        has_rest: whether received packets remain to be decoded: call `decode` again, without bytes.
    """

    __slots__ = ("_buffer", "_limit", "_rest", "has_rest")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._rest: Buffer = b""  # packets beyond `MAX_AT_ONCE`
        self.has_rest = False

    @property
    def buffered(self) -> int:
        """How many bytes are held of packets that were not decoded."""
        return len(self._buffer) + len(self._rest)

    def decode(self, received: Buffer | bytearray) -> Iterator[list[Buffer]]:
        """Take more bytes, and yield each packet that they complete, as `decode_protocol_packet` does.

        After `MAX_AT_ONCE` packets it stops and keeps the rest, which must be decoded before more bytes come.

        The packets before a malformed one are yielded first. After the exception the decoder is useless,
        because nobody knows where the next packet begins.

        Raises:
            ProtocolError: a length over the limit, or a malformed packet.
        """
        data: Buffer
        if self.has_rest:
            assert not received, "decode the rest first"
            data, self._rest = self._rest, b""
            self.has_rest = False
            size = len(data)
        else:
            # Copies of small fields cost less than views of them.
            size = len(received)
            data = bytes(received) if size < LARGE_BATCH else memoryview(received)
        position = 0
        buffer = self._buffer
        if buffer:
            # The last receive ended inside a packet. These bytes complete first its length, then its body.
            position = max(0, LENGTH_SIZE - len(buffer))
            buffer += data[:position]
            if len(buffer) < LENGTH_SIZE:
                return
            end = LENGTH_SIZE + self._check(_U32.unpack_from(buffer)[0])
            missing = end - len(buffer)
            buffer += data[position : position + missing]
            if len(buffer) < end:
                return
            position += missing
            self._buffer = bytearray()
            yield decode_protocol_packet(memoryview(buffer)[LENGTH_SIZE:])
        count = 0
        while size - position >= LENGTH_SIZE:
            start = position + LENGTH_SIZE
            end = start + self._check(_U32.unpack_from(data, position)[0])
            if end > size:
                break
            if count == MAX_AT_ONCE:
                # A copy: other streams receive into the same buffer before the rest is decoded.
                self._rest = memoryview(bytes(data[position:]))
                self.has_rest = True
                return
            count += 1
            position = end
            yield (
                _decode_fields(data, start, end)
                if type(data) is bytes
                else decode_protocol_packet(data[start:end])
            )
        if position < size:
            self._buffer += data[position:]

    def _check(self, length: int) -> int:
        if length > self._limit:
            self._buffer.clear()  # nobody decodes the rest of this stream
            raise ProtocolError(f"a packet of {length} bytes exceeds the limit of {self._limit}")
        return length
