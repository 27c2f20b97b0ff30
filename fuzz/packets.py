"""The target `packets`: streams of packets, and what is in their fields."""

from __future__ import annotations

from typing import Final

from bokbok_trio import ProtocolError
from bokbok_trio._protocol.context import decode_context
from bokbok_trio._protocol.options import decode_options
from bokbok_trio._protocol.packets import PacketDecoder, decode_body, decode_number, decode_text, encode_body
from tests.support import second_implementation as second

from .scripts import (
    MAX_RECEIVES,
    Script,
    agree,
    check,
    decode_all,
    make_field,
    names_of,
    refuses,
    same,
)

LIMITS: Final = (66_560, 64, 300, 4096)
MAX_WRITTEN: Final = 8
"""Packets, or many of one kind, of a stream that is written by a script."""

SMALL: Final = 200
"""Bytes of a field that is decoded in every way."""


def split_stream(stream: bytes, limit: int) -> tuple[list[list[bytes]], bytes, bool]:
    """The packets of a stream, what is left of it, and whether it breaks a rule."""
    packets: list[list[bytes]] = []
    while len(stream) >= 4:
        length = int.from_bytes(stream[:4], "big")
        if length > limit:
            return packets, b"", True
        if len(stream) < 4 + length:
            break
        _, fields = refuses(lambda: second.unpack_body(stream[4 : 4 + length]))  # noqa: B023
        if fields is None:
            return packets, b"", True
        packets.append(fields)
        stream = stream[4 + length :]
    return packets, stream, False


def write_stream(script: Script, limit: int) -> bytes:
    """A stream of packets, mostly right ones."""
    stream = b""
    for _ in range(MAX_WRITTEN):
        operation, count = script.byte() % 4, script.byte()
        match operation:
            case 0:
                stream += script.take(count)
            case 1:
                stream += second.packet([make_field(script) for _ in range(count % 8)])
            case 2:
                stream += second.packet([bytes(limit - 6 + count % 3)])
            case _:
                stream += second.packet([]) * count
    return stream


def packets(data: bytes) -> None:
    """Any stream, received in any pieces, is cut into packets; and all that can be in a field is decoded."""
    script = Script(data)
    header = script.byte()
    limit = LIMITS[header % len(LIMITS)]
    size = script.byte() or 2**16
    stream = script.rest() if header < 128 else write_stream(script, limit)
    size = max(size, len(stream) // MAX_RECEIVES)
    due, left, is_bad = split_stream(stream, limit)
    decoder = PacketDecoder(limit)
    found: list[list[bytes]] = []
    error = None
    try:
        for at in range(0, len(stream), size):
            for fields in decode_all(decoder, stream[at : at + size]):
                found.append(fields)  # noqa: PERF402  (those before an error count)
            check(right=decoder.buffered <= 4 + limit, what="more than a packet is held")
    except ProtocolError as exc:
        error = exc
    same(found, due)
    same(error is not None, is_bad)
    if not is_bad:
        same(decoder.buffered, len(left))
    for fields in found[:MAX_WRITTEN]:
        chunks, _ = encode_body(fields, 2**32)
        same(b"".join(chunks), second.body(fields))
        for field in fields[:MAX_WRITTEN]:
            decode_field(field[:SMALL])
    decode_field(stream[:SMALL])


def decode_field(field: bytes) -> None:
    agree(lambda: decode_number(field), lambda: second.number(field))
    agree(lambda: decode_text(field), lambda: second.text(field))
    agree(lambda: decode_body(field), lambda: second.unpack_body(field))
    agree(lambda: names_of(decode_context(field)), lambda: second.context(field))
    agree(lambda: names_of(decode_options(field)), lambda: second.options(field))
