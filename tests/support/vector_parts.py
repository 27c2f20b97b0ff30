"""The common parts of the test vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import trio
import trio.testing

from bokbok_trio._keys import Key
from bokbok_trio._protocol.handshake import ClientHandshake, ServerHandshake
from bokbok_trio._protocol.limits import Limits
from bokbok_trio._protocol.packets import decode_body, encode_body, encode_packet
from bokbok_trio._stream.secretbox import SecretboxStream

Vectors: TypeAlias = dict[str, Any]

KEY = bytes(range(32))
OTHER_KEY = bytes(range(1, 33))
SESSION_KEY = bytes(range(0x40, 0x60))
# The secrets of RFC 7748, section 6.1, which also gives their shared secret.
CLIENT_SECRET = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
SERVER_SECRET = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
USER = "zoë"
SERVICE = "maps"
CLIENT_LIMITS = Limits(4194304, 100)
SERVER_LIMITS = Limits(65536, 7)
CLIENT_OPTIONS = {"example/1": b"\1"}
# Each handshake draws these random bytes in this order: the X25519 secret (mode sealed), then the 11 bytes of
# grease (two for the four hex digits of its name, one for its length modulo 9, eight for its value), then on
# the client the session key (mode sealed).
CLIENT_GREASE = bytes.fromhex("0a1b0cc0c1c2c3c4c5c6c7")  # a length of 12 modulo 9
SERVER_GREASE = bytes.fromhex("f00d00d0d1d2d3d4d5d6d7")
OPEN_LIMITS = Limits(2**20, 5)
OPEN_CREDIT = 140


def packet_of(*fields: bytes, body: Sequence[bytes] | None = None) -> bytes:
    if body is None:
        return encode_packet(*fields)
    chunks, size = encode_body(body, 2**32)
    return encode_packet(*fields, body_size=size) + b"".join(chunks)


def flip(data: bytes) -> bytes:
    """Flip the last bit."""
    return data[:-1] + bytes((data[-1] ^ 1,))


def client_handshake(key: bytes | None = KEY, service: str = SERVICE) -> ClientHandshake:
    random = iter([CLIENT_GREASE] if key is None else [CLIENT_SECRET, CLIENT_GREASE, SESSION_KEY])
    return ClientHandshake(
        user=None if key is None else USER,
        key=None if key is None else Key(key),
        service="" if key is None else service,
        limits=CLIENT_LIMITS,
        options=CLIENT_OPTIONS,
        randomness=lambda _: next(random),
    )


def server_handshake(*, sealed: bool = True) -> ServerHandshake:
    random = iter([SERVER_SECRET, SERVER_GREASE] if sealed else [SERVER_GREASE])
    return ServerHandshake(
        sealed=sealed,
        service=SERVICE if sealed else "",
        limits=SERVER_LIMITS,
        randomness=lambda _: next(random),
    )


def sealed_records(*steps: tuple[bytes, Sequence[bytes]]) -> list[str]:
    """Seal each plaintext as a stream does, under each key in turn; an empty one gives the end record."""

    async def run() -> list[str]:
        sent = []
        ours, theirs = trio.testing.memory_stream_pair()
        stream = SecretboxStream(ours, send_key=steps[0][0], receive_key=KEY)
        for key, plaintexts in steps:
            if key != steps[0][0]:
                stream.rekey(send_key=key, receive_key=KEY)
            for plaintext in plaintexts:
                await (stream.send_all(plaintext) if plaintext else stream.send_eof())
                sent.append((await theirs.receive_some()).hex())
        return sent

    return trio.run(run)


def encoded_body(*fields: bytes) -> bytes:
    return encode_packet(*fields)[4:]


BAD_OPTIONS = {
    "empty": b"",
    "a name without a value": encoded_body(b"a", b"", b"b"),
    "a name twice": encoded_body(b"a", b"1", b"a", b"2"),
    "an empty name": encoded_body(b"", b""),
    "a name of 33 bytes": encoded_body(b"a" * 33, b""),
    "a capital letter": encoded_body(b"A", b""),
    "an underscore": encoded_body(b"a_b", b""),
    "a space": encoded_body(b"a b", b""),
    "a line feed after a name": encoded_body(b"a\n", b""),
    "a letter that is not ASCII": encoded_body("ë".encode(), b""),
    "97 bytes": encoded_body(b"a", bytes(87)),
    "a byte after the last field": encoded_body(b"a", b"") + b"\0",
    "a value cut short": encoded_body(b"a", b"12")[:-1],
}


BAD_CONTEXTS = {
    "a body without fields": encoded_body(),
    "a name without a value": encoded_body(b"a", b"", b"b"),
    "a name twice": encoded_body(b"a", b"1", b"a", b"2"),
    "an empty name": encoded_body(b"", b""),
    "a name of 65 bytes": encoded_body(b"a" * 65, b""),
    "a capital letter": encoded_body(b"A", b""),
    "a slash": encoded_body(b"a/b", b""),
    "a letter that is not ASCII": encoded_body("ë".encode(), b""),
    "33 pairs": encoded_body(*(field for at in range(33) for field in (b"%d" % at, b""))),
    "8,193 bytes": encoded_body(b"a", bytes(8193 - 10)),
    "a byte after the last field": encoded_body(b"a", b"") + b"\0",
    "a value cut short": encoded_body(b"a", b"12")[:-1],
}


def fields_of(packet: bytes) -> list[bytes]:
    return decode_body(packet[4:])
