"""The pre-shared keys of users, and their names.

A key is 32 bytes that only the user and the server know. It keys a hash in the handshake and
nothing else; see ``docs/protocol.rst``.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import unicodedata
from typing import Final, final

import trio
from nacl.bindings import crypto_pwhash_alg, crypto_pwhash_ALG_ARGON2ID13

KEY_SIZE: Final = 32
"""Bytes of a key."""

MAX_USER_SIZE: Final = 255
"""Bytes of a user name in UTF-8; the packet that carries it has a fixed size."""

ARGON2ID_PASSES: Final = 3
ARGON2ID_MEMORY: Final = 256 * 2**20
"""The cost of a guess at a passphrase: passes over so many bytes of memory, one lane. libsodium's
MODERATE, some 0.7 s on a desktop of 2018. Fixed, because both sides must come to the same key."""


@final
class Key:
    """The pre-shared key of one user.

    Arguments:
        raw: exactly 32 bytes. Best from `generate`.

    Raises:
        TypeError: `raw` is not bytes.
        ValueError: `raw` is not 32 bytes long.

    Keys compare equal when their bytes do, in constant time. Neither ``repr`` nor ``str`` shows them.
    """

    __slots__ = ("_raw",)

    def __init__(self, raw: bytes) -> None:
        if not isinstance(raw, bytes):
            raise TypeError(f"a key is made of bytes, not {type(raw).__name__}")
        if len(raw) != KEY_SIZE:
            raise ValueError(f"a key is {KEY_SIZE} bytes long, and not {len(raw)}")
        self._raw = raw

    @classmethod
    def generate(cls) -> Key:
        """Make a new key from the system's source of randomness."""
        return cls(secrets.token_bytes(KEY_SIZE))

    @property
    def raw(self) -> bytes:
        """The 32 bytes, to be stored where only its owner can read them."""
        return self._raw

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Key):
            return NotImplemented
        return hmac.compare_digest(self._raw, other._raw)

    def __hash__(self) -> int:
        return hash((Key, self._raw))

    def __repr__(self) -> str:
        return "<Key>"


def encode_user(user: str) -> bytes:
    """Check a user name and encode it.

    Raises:
        TypeError: it is not a str.
        ValueError: it is not 1 to 255 bytes of UTF-8 in normal form C without control characters.
    """
    if not isinstance(user, str):
        raise TypeError(f"a user name is a str, not {type(user).__name__}")
    encoded = user.encode()
    if not 1 <= len(encoded) <= MAX_USER_SIZE:
        raise ValueError(f"a user name is 1 to {MAX_USER_SIZE} bytes of UTF-8, and not {len(encoded)}")
    if user.isascii() and user.isprintable():
        return encoded  # it has one form only; not to look closer saves both sides together 2 us
    if unicodedata.normalize("NFC", user) != user:
        raise ValueError(f"the user name {user!r} is not in normal form C")
    if any(unicodedata.category(character) == "Cc" for character in user):
        raise ValueError(f"the user name {user!r} has a control character")
    return encoded


async def passphrase_to_key(passphrase: str, user: str) -> Key:
    """Derive a user's key from a passphrase, with Argon2id, in a worker thread.

    Prefer `Key.generate`: an active fake server that a client talks to learns something to test
    guesses of a weak passphrase against, and then guesses as fast as its memory allows. Derive once
    and keep the key; it takes 256 MiB of memory and about a second.

    Arguments:
        passphrase: not empty; it is brought to normal form C, as keyboards differ.
        user: the user name, which salts it: ``blake2b(user, 16 bytes, "bokbok1 argon2id")``.

    Raises:
        TypeError: either is not a str.
        ValueError: the passphrase is empty, or the user name cannot be one.

    Cancelling it returns at once; the thread ends by itself and its result is dropped.

    Source: RFC 9106, as libsodium's ``crypto_pwhash`` (version 1.3, one lane).
    """
    if not isinstance(passphrase, str):
        raise TypeError(f"a passphrase is a str, not {type(passphrase).__name__}")
    if not passphrase:
        raise ValueError("a passphrase must not be empty")
    # Not by encode()'s own error, which would show the passphrase.
    if any(unicodedata.category(character) == "Cs" for character in passphrase):
        raise ValueError("a passphrase must be text that UTF-8 can encode")
    secret = unicodedata.normalize("NFC", passphrase).encode()
    salt = hashlib.blake2b(encode_user(user), digest_size=16, person=b"bokbok1 argon2id").digest()

    def derive() -> bytes:
        return crypto_pwhash_alg(
            KEY_SIZE, secret, salt, ARGON2ID_PASSES, ARGON2ID_MEMORY, crypto_pwhash_ALG_ARGON2ID13
        )

    return Key(await trio.to_thread.run_sync(derive, abandon_on_cancel=True))
