"""Packets to bytes and back: no Trio, no I/O.

A *packet* is a list of 0 to 255 byte strings, its *fields*. On the wire, all integers big-endian::

    u32 length | body               the body is `length` bytes long
    body = u8 count | count x field
    field = u32 size | bytes

Invariants: the sizes use up the length exactly, so every byte string is the encoding of at most one
list; a length over the limit in force is refused as soon as its four bytes are there; a decoder
holds at most one unfinished packet, so 4 + limit bytes.

What our own user gets wrong is a ``TypeError``, a ``ValueError`` or `MessageTooLarge`, raised before
anything is sent; what the peer gets wrong is a `ProtocolError`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any, Final, TypeAlias

from ._errors import MessageTooLarge, ProtocolError

MAX_FIELDS: Final = 255
"""Fields of a packet: the count is a u8."""

LENGTH_SIZE: Final = 4
"""Bytes of the length before a body."""

Field: TypeAlias = bytes | bytearray | memoryview | str
"""What a user may give as a field. A str is sent as UTF-8; bytes is what arrives."""

Chunks: TypeAlias = list[bytes | memoryview]
"""Bytes in pieces, to be joined once, when they are sent: a big field is not copied before that."""

Received: TypeAlias = bytes | memoryview
"""What was received. A memoryview is of a buffer that will be used again: it is good until the next
checkpoint, and what is kept of it must be copied."""

LARGE: Final = 2**12
"""Bytes from which on it is worth the while to leave a field where it is; what is smaller is copied."""

LARGE_BATCH: Final = 2**14
"""The same, of all that was received at once: it may be many packets, or one."""

_U32 = struct.Struct(">I")
_HEAD = struct.Struct(">IB")
_COUNTS = [bytes((count,)) for count in range(256)]
_SIZES = [_U32.pack(size) for size in range(256)]  # a look-up takes a third of the time of a call
_LISTS = (list, tuple)
_NO_LISTS = (str, bytes, bytearray, memoryview)  # though they are sequences
_MAX_DIGITS = 18
_ZERO = ord("0")


def encode_fields(fields: Sequence[Field]) -> list[bytes]:
    """Check a user's list, and take it as it is now: nothing in what is returned can change.

    Raises:
        TypeError, ValueError: as `encode_body` does.
    """
    if type(fields) not in _LISTS and (isinstance(fields, _NO_LISTS) or not isinstance(fields, Sequence)):
        raise TypeError(f"a packet is a list of fields, not {type(fields).__name__}")
    if len(fields) > MAX_FIELDS:
        raise ValueError(f"a packet has at most {MAX_FIELDS} fields, and not {len(fields)}")
    return [field if type(field) is bytes else _encode_field(field) for field in fields]


def encode_body(fields: Sequence[Field], limit: int) -> tuple[Chunks, int]:
    """Encode a user's list as a body.

    Arguments:
        fields: 0 to 255 of them. A bytearray or memoryview is copied here, so that the caller may
            go on to change it.
        limit: the most bytes the body may take.

    Returns:
        The body in chunks, and its size in bytes.

    Raises:
        TypeError: `fields` is not a list or other sequence, or one of them is no bytes and no str.
        ValueError: more than 255 fields, or a str that has no UTF-8 (a lone surrogate).
        MessageTooLarge: the body would be larger than `limit`.
    """
    if type(fields) not in _LISTS or len(fields) > MAX_FIELDS:
        fields = encode_fields(fields)
    chunks: Chunks = []
    small = [_COUNTS[len(fields)]]  # to be one chunk: that costs less to pass on than many
    size = 1
    for field in fields:
        encoded = field if type(field) is bytes else _encode_field(field)
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


def _encode_field(field: Field) -> bytes:
    if isinstance(field, str):
        return field.encode()
    if isinstance(field, bytes | bytearray | memoryview):
        return bytes(field)
    raise TypeError(f"a field is bytes or str, not {type(field).__name__}")


def encode_head(*fields: bytes, body_size: int | None = None) -> bytes:
    """Encode a packet of our own, or all but the last field's bytes of one.

    Arguments:
        fields: the fields, few and small.
        body_size: where given, one more field follows, of so many bytes, which the caller appends.
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


def encode_start(kind: bytes, count: int) -> bytes:
    """What `encode_small` takes: a packet's count of fields, and the first of them."""
    return _COUNTS[count] + _SIZES[len(kind)] + kind


def encode_small(start: bytes, id: int, between: bytes, body: bytes | memoryview) -> bytes:
    """Encode a packet with a body, in one step: as `encode_head` would, in two thirds of the time.

    Arguments:
        start: of `encode_start`.
        id: its second field.
        between: the fields before the last one, encoded with their sizes.
        body: its last field.
    """
    number = b"%d" % id
    size = len(start) + LENGTH_SIZE + len(number) + len(between) + LENGTH_SIZE + len(body)
    sizes = _U32.pack(size), _SIZES[len(number)], _U32.pack(len(body))
    return b"".join((sizes[0], start, sizes[1], number, between, sizes[2], body))


def _decode_fields(data: Received, start: int, end: int) -> list[Any]:
    """Cut the body that is at a place in some data into fields, of the same type as the data."""
    fields: list[Received] = []
    position = start + 1
    try:
        for _ in range(data[start]):
            at = position + LENGTH_SIZE
            position = at + _U32.unpack_from(data, position)[0]
            fields.append(data[at:position])
    except (IndexError, struct.error):
        position = -1
    # Positions only grow, so that one went past the end is still seen here: one look for all fields.
    if position != end:
        raise _find_fault(bytes(data[start:end]))
    return fields


def _find_fault(body: bytes) -> ProtocolError:
    """What is wrong with a body that is none."""
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


def decode_body(body: Received) -> list[bytes]:
    """Decode the bytes of a body into fields.

    Raises:
        ProtocolError: the sizes do not use up the bytes exactly.
    """
    fields = _decode_fields(body, 0, len(body))
    return fields if type(body) is bytes else list(map(bytes, fields))


def decode_ours(body: Received) -> list[Received]:
    """Decode the body of a packet of our own, and leave large fields where they are.

    Raises:
        ProtocolError: as `decode_body` does.
    """
    size = len(body)
    if size < LARGE:
        return _decode_fields(bytes(body), 0, size)
    return [field if len(field) >= LARGE else bytes(field) for field in _decode_fields(body, 0, size)]


def describe(fields: Sequence[Received]) -> str:
    """A packet in a few words, for an error: a peer must not choose how long they are."""
    return f"{bytes(fields[0][:20])!r} with {len(fields)} fields" if fields else "no field at all"


def encode_number(number: int) -> bytes:
    """Encode a number inside a packet: decimal text, at most 18 digits."""
    return b"%d" % number


def decode_number(field: Received) -> int:
    """Decode a number inside a packet.

    Raises:
        ProtocolError: it does not match ``0|[1-9][0-9]{0,17}``. ``int()`` alone would take more.
    """
    if 0 < len(field) <= _MAX_DIGITS and (field[0] != _ZERO or len(field) == 1):
        digits = bytes(field)
        if digits.isdigit():
            return int(digits)
    raise ProtocolError(f"no number: {bytes(field[:20])!r}")


def decode_text(field: Received) -> str:
    """Decode a text inside a packet of ours.

    Raises:
        ProtocolError: it is not UTF-8.
    """
    try:
        return str(field, "utf-8")
    except UnicodeDecodeError as exc:
        raise ProtocolError(f"a text that is not UTF-8: {exc}") from None


class PacketDecoder:
    """Cuts a stream of bytes into packets, however it is chunked.

    Arguments:
        limit: the most bytes a packet's length may be.
    """

    __slots__ = ("_buffer", "_data", "_limit")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._data: Received = b""  # what `decode` is at work on

    @property
    def buffered(self) -> int:
        """How many bytes of an unfinished packet are held."""
        return len(self._buffer)

    def decode(self, received: Received | bytearray) -> Iterator[list[Received]]:
        """Take in more bytes; yield each packet that they complete, as `decode_ours` does.

        The packets before a bad one are yielded before it raises. After that the decoder is of no
        use: where the next packet begins is not known.

        Raises:
            ProtocolError: a length over the limit, or a packet that is not one.
        """
        # Views of what is small would cost more than copies, and so would a view for each of many packets.
        size = len(received)
        self._data = bytes(received) if size < LARGE_BATCH else memoryview(received)
        position = 0
        buffer = self._buffer
        if buffer:
            position = max(0, LENGTH_SIZE - len(buffer))
            buffer += self._data[:position]
            if len(buffer) < LENGTH_SIZE:
                return
            end = LENGTH_SIZE + self._check(_U32.unpack_from(buffer)[0])
            missing = end - len(buffer)
            buffer += self._data[position : position + missing]
            if len(buffer) < end:
                return
            position += missing
            self._buffer = bytearray()
            yield decode_ours(memoryview(buffer)[LENGTH_SIZE:])
        while size - position >= LENGTH_SIZE:
            data = self._data
            start = position + LENGTH_SIZE
            end = start + self._check(_U32.unpack_from(data, position)[0])
            if end > size:
                break
            position = end
            yield _decode_fields(data, start, end) if type(data) is bytes else decode_ours(data[start:end])
        if position < size:
            buffer = self._buffer
            buffer += self._data[position:]
        self._data = b""

    def keep(self) -> None:
        """Copy what `decode` has not come to yet: it goes on to be good."""
        self._data = bytes(self._data)

    def _check(self, length: int) -> int:
        if length > self._limit:
            self._buffer.clear()
            raise ProtocolError(f"a packet of {length} bytes, and {self._limit} are allowed")
        return length
