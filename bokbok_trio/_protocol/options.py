"""The options of the handshake, by which the protocol grows: bytes in, bytes out.

Each side tells the other, in names and values, which additions to the protocol it understands. This is not a
negotiation: a side uses the names that it knows and ignores the others. Each side also sends one option of a
random name, the *grease*. So an implementation that refuses unknown names is noticed at once (RFC 8701).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, TypeAlias

from .._errors import HandshakeError, ProtocolError
from .packets import LENGTH_SIZE, decode_body, decode_number, encode_body

MAX_OPTIONS_SIZE: Final = 96
"""Bytes of one side's options, encoded. They fit `open`, which is 512 bytes in mode sealed, together with the
longest user name and numbers."""

MAX_GREASE_SIZE: Final = 8
"""Bytes of the grease's value, at most: enough that nobody can rely on its length or content."""

GREASE: Final = "grease."
"""The beginning of the grease's name. No other option may begin like this."""

GREASE_DICE: Final = 3 + MAX_GREASE_SIZE
"""Random bytes from which a grease is made: two for the name, one for the length, the rest for the value."""

MAX_OWN_OPTIONS_SIZE: Final = MAX_OPTIONS_SIZE - (2 * LENGTH_SIZE + len(GREASE) + 4 + MAX_GREASE_SIZE)
"""Bytes of our options, encoded, without the grease. The longest grease must fit beside them."""

ROOM: Final = "room"
"""The option that tells how many bytes of requests a side holds at once, as a number. See `budget`."""

NO_OPTIONS: Final[Mapping[str, bytes]] = MappingProxyType({})

_NAME: Final = re.compile(r"[a-z0-9./-]{1,32}", re.ASCII)

Randomness: TypeAlias = Callable[[int], bytes]
"""Returns that many random bytes."""


def make_grease(randomness: Randomness) -> tuple[str, bytes]:
    """Make an option without a meaning, named ``grease.`` and four hex digits, with 0 to 8 bytes."""
    dice = randomness(GREASE_DICE)
    return GREASE + dice[:2].hex(), dice[3 : 3 + dice[2] % (MAX_GREASE_SIZE + 1)]


def encode_options(options: Mapping[str, bytes], randomness: Randomness) -> bytes:
    """Check our options, add a grease, and encode all of them.

    Raises:
        TypeError: a name is not a str, or a value is not bytes.
        ValueError: a name is not 1 to 32 of ``[a-z0-9./-]``, or it begins with ``grease.``; or the options
            take more than `MAX_OWN_OPTIONS_SIZE` bytes.
    """
    fields: list[bytes] = []
    for name, value in options.items():
        if not isinstance(name, str) or not isinstance(value, bytes):
            raise TypeError(f"an option is a str and bytes, not {name!r}: {value!r}")
        if _NAME.fullmatch(name) is None or name.startswith(GREASE):
            raise ValueError(f"invalid name of an option: {name!r}")
        fields += (name.encode(), value)
    own_size = encode_body(fields, 2**32 - 1)[1]
    if own_size > MAX_OWN_OPTIONS_SIZE:
        raise ValueError(f"options take at most {MAX_OWN_OPTIONS_SIZE} bytes, not {own_size}")
    name, value = make_grease(randomness)
    chunks, _ = encode_body([*fields, name, value], MAX_OPTIONS_SIZE)
    return b"".join(chunks)


def decode_options(encoded: bytes) -> Mapping[str, bytes]:
    """Decode the options of the peer, unknown ones included.

    Raises:
        HandshakeError: they break a rule. None of them may be used.
    """
    if len(encoded) > MAX_OPTIONS_SIZE:
        raise HandshakeError(f"options of {len(encoded)} bytes exceed the limit of {MAX_OPTIONS_SIZE}")
    try:
        fields = decode_body(encoded)
    except ProtocolError as exc:
        raise HandshakeError(f"invalid options: {exc}") from None
    if len(fields) % 2:
        raise HandshakeError("invalid options: a name without a value")
    options: dict[str, bytes] = {}
    for at in range(0, len(fields), 2):
        name = fields[at].decode("latin-1")
        if _NAME.fullmatch(name) is None:
            raise HandshakeError(f"invalid name of an option: {fields[at][:20]!r}")
        if name in options:
            raise HandshakeError(f"the option {name!r} was sent twice")
        options[name] = fields[at + 1]
    find_room(options)
    return MappingProxyType(options)


def find_room(options: Mapping[str, bytes]) -> int | None:
    """Return how many bytes of requests the peer holds at once; None: it has not told.

    Raises:
        HandshakeError: the value is not a number.
    """
    try:
        return decode_number(options[ROOM]) if ROOM in options else None
    except ProtocolError as exc:
        raise HandshakeError(f"invalid option {ROOM!r}: {exc}") from None
