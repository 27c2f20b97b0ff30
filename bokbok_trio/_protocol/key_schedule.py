"""The key schedule of the handshake: every hash and every key that is derived, each under a label of its own.

The user's key keys BLAKE2b under these labels and nothing else. ``docs/protocol.rst`` has the same in
formulas.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import final

from .._keys import KEY_SIZE, Key
from .._types import Side


@final
@dataclass(frozen=True, slots=True)
class DirectionKeys:
    """A key for each direction of the record stream."""

    c2s: bytes
    s2c: bytes

    @classmethod
    def split(cls, derived: bytes) -> DirectionKeys:
        return cls(derived[:KEY_SIZE], derived[KEY_SIZE:])

    def __repr__(self) -> str:
        return "<DirectionKeys>"

    def for_side(self, side: Side) -> dict[str, bytes]:
        """Return the keyword arguments of a `SecretboxStream` on that side."""
        client = side == "client"
        return {
            "send_key": self.c2s if client else self.s2c,
            "receive_key": self.s2c if client else self.c2s,
        }


def keyed_hash(size: int, key: bytes, label: bytes, data: bytes) -> bytes:
    """Compute the protocol's ``B``: BLAKE2b of so many bytes, personalised by a zero-padded label."""
    return hashlib.blake2b(data, digest_size=size, key=key, person=label).digest()


def hash_hellos(client_hello: bytes, server_hello: bytes) -> bytes:
    """Compute ``h0``."""
    return keyed_hash(32, b"", b"bokbok1 hello", client_hello + server_hello)


def derive_channel_keys(ee: bytes, h0: bytes) -> DirectionKeys:
    """Derive the keys of the anonymous channel, ``hs``, from the shared secret of the ephemeral keys."""
    return DirectionKeys.split(keyed_hash(64, ee, b"bokbok1 shake", h0))


def hash_open(h0: bytes, service: bytes, open_packet: bytes) -> bytes:
    """Compute ``h1``, of an `open` packet without its box."""
    return keyed_hash(32, b"", b"bokbok1 open", h0 + bytes((len(service),)) + service + open_packet)


def derive_box_key(key: Key, h1: bytes) -> bytes:
    """Derive the key under which the client seals the session key, from the user's key."""
    return keyed_hash(32, key.raw, b"bokbok1 box", h1)


def hash_accepted(h1: bytes, box: bytes, accepted_packet: bytes) -> bytes:
    """Compute ``h2``, of an `accepted` packet without its proof."""
    return keyed_hash(32, b"", b"bokbok1 accept", h1 + box + accepted_packet)


def make_proof(key: Key, h2: bytes) -> bytes:
    """Make the proof that the server knows the user's key."""
    return keyed_hash(32, key.raw, b"bokbok1 server", h2)


def derive_final_keys(key: Key, session_key: bytes, ee: bytes, h2: bytes) -> DirectionKeys:
    """Derive the keys of the open connection, ``fk``."""
    return DirectionKeys.split(keyed_hash(64, key.raw, b"bokbok1 final", session_key + ee + h2))
