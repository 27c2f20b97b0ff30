"""Handshakes made by hand, with known random bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from nacl.bindings import crypto_secretbox, crypto_secretbox_open

from bokbok_trio import AuthenticationError, Key
from bokbok_trio._keys import KEY_SIZE
from bokbok_trio._protocol.handshake import (
    NONCE_SIZE,
    OPEN_SIZE,
    ClientHandshake,
    ServerHandshake,
    encode_hello,
)
from bokbok_trio._protocol.key_schedule import DirectionKeys
from bokbok_trio._protocol.limits import Limits
from bokbok_trio._protocol.packets import LENGTH_SIZE, decode_body, encode_packet

from ..support.strategies import packet_bytes

K = Key(bytes(range(32)))
OTHER = Key(bytes(range(100, 132)))
CLIENT_LIMITS = Limits(65536, 10)
SERVER_LIMITS = Limits(1_000_000, 20)


def make_client(user: str | None = "myuser", key: Key | None = K, **options: Any) -> ClientHandshake:
    return ClientHandshake(**{"user": user, "key": key, "service": "", "limits": CLIENT_LIMITS, **options})


def make_server(*, sealed: bool = True, **options: Any) -> ServerHandshake:
    return ServerHandshake(**{"sealed": sealed, "service": "", "limits": SERVER_LIMITS, **options})


def make_plain() -> tuple[ClientHandshake, ServerHandshake]:
    return make_client(None, None), make_server(sealed=False)


def exchange_hello(client: ClientHandshake, server: ServerHandshake) -> None:
    server.receive_hello(client.hello)
    client.receive_hello(server.hello)


def send_open(client: ClientHandshake, server: ServerHandshake) -> None:
    exchange_hello(client, server)
    server.receive_open(client.open())


def shake(client: ClientHandshake, server: ServerHandshake, keys: Sequence[Key] = (K,)) -> list[bytes]:
    """Run a whole handshake, and return its four messages."""
    exchange_hello(client, server)
    opening = client.open()
    server.receive_open(opening)
    accepted = server.accept(keys)
    client.receive_reply(accepted)
    return [client.hello, server.hello, opening, accepted]


def fields_of(packet: bytes) -> list[bytes]:
    return decode_body(packet[LENGTH_SIZE:])


def flip(message: bytes, bit: int) -> bytes:
    flipped = bytearray(message)
    flipped[bit // 8 % len(message)] ^= 1 << bit % 8
    return bytes(flipped)


class Dice:
    """A source of random bytes that records them."""

    def __init__(self, seed: bytes) -> None:
        self.seed = seed
        self.given: list[bytes] = []

    def __call__(self, size: int) -> bytes:
        self.given.append(hashlib.shake_256(self.seed + bytes((len(self.given),))).digest(size))
        return self.given[-1]


def spec_hash(size: int, key: bytes, label: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=size, key=key, person=label.ljust(16, b"\0")).digest()


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Derive the keys as anyone can who has seen these messages and has these secrets, right or wrong."""

    messages: list[bytes]
    key: bytes
    ee: bytes
    session_key: bytes = b""
    service: bytes = b""
    h1: bytes = field(init=False)

    def __post_init__(self) -> None:
        *fields, _ = fields_of(self.messages[2])
        service = bytes((len(self.service),)) + self.service
        h1 = spec_hash(32, b"", b"bokbok1 open", self._h0() + service + encode_packet(*fields))
        object.__setattr__(self, "h1", h1)

    def _h0(self) -> bytes:
        return spec_hash(32, b"", b"bokbok1 hello", self.messages[0] + self.messages[1])

    def hs(self) -> bytes:
        return spec_hash(64, self.ee, b"bokbok1 shake", self._h0())

    def open_box(self) -> bytes:
        box = fields_of(self.messages[2])[-1]
        return crypto_secretbox_open(box, self.h1[:24], spec_hash(32, self.key, b"bokbok1 box", self.h1))

    def h2(self) -> bytes:
        box = fields_of(self.messages[2])[-1]
        *fields, _ = fields_of(self.messages[3])
        return spec_hash(32, b"", b"bokbok1 accept", self.h1 + box + encode_packet(*fields))

    def proof(self) -> bytes:
        return spec_hash(32, self.key, b"bokbok1 server", self.h2())

    def fk(self) -> bytes:
        return spec_hash(64, self.key, b"bokbok1 final", self.session_key + self.ee + self.h2())


def open_as(name: bytes, client: ClientHandshake, server_hello: bytes) -> bytes:
    """Make the `open` of a client with a name that the package would refuse to send."""
    fields = fields_of(client.open())
    assert client.key is not None
    fields[1], fields[-2] = name, b""
    fields[-2] = bytes(OPEN_SIZE - len(encode_packet(*fields)))
    messages = [client.hello, server_hello, encode_packet(*fields)]
    h1 = Schedule(messages=messages, key=client.key.raw, ee=b"").h1
    box_key = spec_hash(32, client.key.raw, b"bokbok1 box", h1)
    fields[-1] = crypto_secretbox(bytes(KEY_SIZE) + h1, h1[:NONCE_SIZE], box_key)
    return encode_packet(*fields)


def accepted_with(options: bytes, client: ClientHandshake, server: ServerHandshake, opening: bytes) -> bytes:
    """Make the `accepted` of a server that proves the key, with options that it would never declare."""
    fields = [b"accepted", *SERVER_LIMITS.fields(), options]
    if client.key is None:
        return encode_packet(*fields, b"")
    messages = [client.hello, server.hello, opening, encode_packet(*fields, b"")]
    return encode_packet(*fields, Schedule(messages=messages, key=client.key.raw, ee=b"").proof())


def options_with(dice: bytes) -> bytes:
    """Encode the options of a side that has only grease, made of these random bytes."""
    name = b"grease.%02x%02x" % (dice[0], dice[1])
    return packet_bytes([name, dice[3:][: dice[2] % 9]])[4:]


def both(keys: DirectionKeys | None) -> bytes:
    assert keys is not None
    return keys.c2s + keys.s2c


def check_fails_to_accept(client: ClientHandshake, server: ServerHandshake, keys: Sequence[Key]) -> str:
    with pytest.raises(AuthenticationError) as caught:
        server.accept(keys)
    assert server.final_keys is client.final_keys is None
    return str(caught.value)


def other_hello(side: ClientHandshake | ServerHandshake, public: bytes) -> bytes:
    return encode_hello("server" if side.side == "client" else "client", public)


def bits(message: bytes) -> range:
    return range(len(message) * 8)
