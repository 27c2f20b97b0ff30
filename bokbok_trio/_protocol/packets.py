"""Packets to bytes and back: no Trio, no I/O.

A *packet* is a list of 0 to 255 byte strings, its *fields*. On the wire, all integers big-endian::

    u32 length | body               the body is `length` bytes long
    body = u8 count | count x field
    field = u32 size | bytes

Invariants: the sizes use up the length exactly, so every byte string is the encoding of at most one
list; a length over the limit in force is refused as soon as its four bytes are there; a decoder
holds at most one unfinished packet, so 4 + limit bytes, and what is left of the last receive.

What our own user gets wrong is a ``TypeError``, a ``ValueError`` or `MessageTooLarge`, raised before
anything is sent; what the peer gets wrong is a `ProtocolError`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from .._errors import MessageTooLarge, ProtocolError
from .._types import Context, Field, Fields
from .events import NO_CONTEXT

MAX_FIELDS: Final = 255
"""Fields of a packet: the count is a u8."""

LENGTH_SIZE: Final = 4
"""Bytes of the length before a body."""

MAX_CONTEXT_PAIRS: Final = 32
"""Names in the context of a request: enough for trace ids and the like."""

MAX_CONTEXT_SIZE: Final = 2**13
"""Bytes of an encoded context: as much as HTTP servers mostly allow for all headers of a request."""

_CONTEXT_NAME = re.compile(r"[a-z0-9._-]{1,64}", re.ASCII)

Chunks: TypeAlias = list[bytes | memoryview]
"""Bytes in pieces, to be joined once, when they are sent: a big field is not copied before that."""

Received: TypeAlias = bytes | memoryview
"""What was received. A memoryview is of a buffer that will be used again: it is good until the next
checkpoint, and what is kept of it must be copied."""

MAX_AT_ONCE: Final = 100
"""Packets that are decoded at once, and records that are opened, before other connections have their turn: a
batch of a busy connection, and less than a millisecond. A stream of tiny ones would take 20 ms else."""

LARGE: Final = 2**12
"""Fields of at least this many bytes are kept as views; smaller ones are copied."""

LARGE_BATCH: Final = 2**14
"""The same for a whole receive, which may hold many packets, or one."""

_U32 = struct.Struct(">I")
_HEAD = struct.Struct(">IB")
_COUNTS = [bytes((count,)) for count in range(256)]
_SIZES = [_U32.pack(size) for size in range(256)]  # a look-up takes a third of the time of a call
_LISTS: Final[tuple[type, ...]] = (list, tuple)
_NO_LISTS = (str, bytes, bytearray, memoryview)  # though they are sequences
_MAX_DIGITS = 18
_ZERO = ord("0")


def encode_fields(fields: Fields) -> list[bytes]:
    """Check a user's list, and take it as it is now: nothing in the result can change.

    Raises:
        TypeError, ValueError: as `encode_body` does.
    """
    if type(fields) not in _LISTS and (isinstance(fields, _NO_LISTS) or not isinstance(fields, Sequence)):
        raise TypeError(f"pass a list of fields such as ['ping'], not {type(fields).__name__}")
    if len(fields) > MAX_FIELDS:
        raise ValueError(f"a packet has at most {MAX_FIELDS} fields, not {len(fields)}")
    return [field if type(field) is bytes else _encode_field(field) for field in fields]


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


def size_of(fields: Sequence[bytes]) -> int:
    """Bytes of the body that fields are encoded as."""
    return 1 + LENGTH_SIZE * len(fields) + sum(map(len, fields))


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


class ContextTooLong(ValueError):  # noqa: N818  (what it is)
    """A context has too many names, or takes up too many bytes."""


def encode_context(context: Context | None) -> bytes:
    """Check the context of a request and encode it; no context at all is empty.

    Raises:
        TypeError: it is not a mapping from str to bytes or str.
        ValueError: a name is not 1 to 64 lower-case ASCII letters, digits, ``.``, ``-`` or ``_``.
        ContextTooLong: there are more than 32, or more than 8 KiB.
    """
    if context is None:
        return b""
    if not isinstance(context, Mapping):
        raise TypeError(f"a context is a mapping from names to bytes or str, not {type(context).__name__}")
    if not context:
        return b""
    if len(context) > MAX_CONTEXT_PAIRS:
        raise ContextTooLong(f"a context has at most {MAX_CONTEXT_PAIRS} names, not {len(context)}")
    fields: list[bytes] = []
    for name, value in context.items():
        if not isinstance(name, str):
            raise TypeError(f"a name of a context is a str, not {type(name).__name__}")
        if _CONTEXT_NAME.fullmatch(name) is None:
            raise ValueError(
                f"invalid name of a context: {name[:80]!r}; use 1 to 64 of a-z, 0-9, '.', '-' and '_'"
            )
        if not isinstance(value, Field):
            raise TypeError(f"the value of {name!r} in a context is bytes or str, not {type(value).__name__}")
        fields += (name.encode(), _encode_field(value))
    encoded = b"".join(encode_body(fields, 2**32 - 1)[0])
    if len(encoded) > MAX_CONTEXT_SIZE:
        raise ContextTooLong(f"a context takes at most {MAX_CONTEXT_SIZE} bytes, not {len(encoded)}")
    return encoded


def decode_context(field: Received) -> Mapping[str, bytes]:
    """Decode the context of a request of the peer.

    Raises:
        ProtocolError: it is not one.
    """
    if not field:
        return NO_CONTEXT
    if len(field) > MAX_CONTEXT_SIZE:
        raise ProtocolError(f"a context of {len(field)} bytes exceeds the limit of {MAX_CONTEXT_SIZE}")
    fields = decode_body(field)
    if not fields or len(fields) % 2 or len(fields) > 2 * MAX_CONTEXT_PAIRS:
        raise ProtocolError(f"a context of {len(fields)} fields: names and values take turns, 32 at most")
    context: dict[str, bytes] = {}
    for at in range(0, len(fields), 2):
        name = fields[at].decode("latin-1")
        if _CONTEXT_NAME.fullmatch(name) is None or name in context:
            raise ProtocolError(f"invalid or repeated name in a context: {fields[at][:20]!r}")
        context[name] = fields[at + 1]
    return MappingProxyType(context)


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
    raise ProtocolError(f"invalid number: {bytes(field[:20])!r}")


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

    Attributes:
        has_rest: whether something is left of what was taken in: decode on with no more bytes.
    """

    __slots__ = ("_buffer", "_limit", "_rest", "has_rest")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._rest: Received = b""  # more packets than are decoded at once
        self.has_rest = False

    @property
    def buffered(self) -> int:
        """How many bytes of an unfinished packet are held."""
        return len(self._buffer) + len(self._rest)

    def decode(self, received: Received | bytearray) -> Iterator[list[Received]]:
        """Take in more bytes; yield each packet that they complete, as `decode_ours` does.

        After `MAX_AT_ONCE` packets it stops, and keeps a rest, which goes before all that is taken in later.

        The packets before a bad one are yielded before it raises. After that the decoder is of no
        use: where the next packet begins is not known.

        Raises:
            ProtocolError: a length over the limit, or a malformed packet.
        """
        data: Received
        if self.has_rest:
            assert not received, "decode the rest first"
            data, self._rest = self._rest, b""
            self.has_rest = False
            size = len(data)
        else:
            # Views of small fields would cost more than copies, and so would a view for each of many packets.
            size = len(received)
            data = bytes(received) if size < LARGE_BATCH else memoryview(received)
        position = 0
        buffer = self._buffer
        if buffer:
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
            yield decode_ours(memoryview(buffer)[LENGTH_SIZE:])
        count = 0
        while size - position >= LENGTH_SIZE:
            start = position + LENGTH_SIZE
            end = start + self._check(_U32.unpack_from(data, position)[0])
            if end > size:
                break
            if count == MAX_AT_ONCE:
                self._rest = memoryview(bytes(data[position:]))
                self.has_rest = True
                return
            count += 1
            position = end
            yield _decode_fields(data, start, end) if type(data) is bytes else decode_ours(data[start:end])
        if position < size:
            self._buffer += data[position:]

    def _check(self, length: int) -> int:
        if length > self._limit:
            self._buffer.clear()
            raise ProtocolError(f"a packet of {length} bytes exceeds the limit of {self._limit}")
        return length
