"""The options of the handshake, by which the protocol grows: bytes in, bytes out.

Each side tells the other what more it understands, as names and values. That is no negotiation: a side acts
on the names it knows and ignores the others. Each side also always sends one option of a random name,
`grease`, so that no implementation gets away with refusing unknown names (RFC 8701).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, TypeAlias

from .._errors import HandshakeError, ProtocolError
from .packets import LENGTH_SIZE, decode_body, decode_number, encode_body

MAX_OPTIONS_SIZE: Final = 96
"""Bytes of one side's options, encoded. With the longest user name and numbers they fit `open`, which is
512 bytes in mode sealed."""

MAX_GREASE_SIZE: Final = 8
"""Bytes of the value of grease: enough that neither its length nor its content can be relied upon."""

GREASE: Final = "grease."
"""How the name of grease begins. No real option may begin so."""

GREASE_DICE: Final = 3 + MAX_GREASE_SIZE
"""Random bytes that make one grease: two for the name, one for the length, the rest for the value."""

MAX_OWN_OPTIONS_SIZE: Final = MAX_OPTIONS_SIZE - (2 * LENGTH_SIZE + len(GREASE) + 4 + MAX_GREASE_SIZE)
"""Bytes of our options, encoded, without grease: the longest grease must fit too."""

ROOM: Final = "room"
"""The option that says how many bytes of requests a side holds at once: a number. See `budget`."""

NO_OPTIONS: Final[Mapping[str, bytes]] = MappingProxyType({})

_NAME: Final = re.compile(r"[a-z0-9./-]{1,32}", re.ASCII)

Randomness: TypeAlias = Callable[[int], bytes]
"""Where random bytes come from: so many of them."""


def make_grease(randomness: Randomness) -> tuple[str, bytes]:
    """Make an option that means nothing: ``grease.`` and four hex digits, with 0 to 8 bytes."""
    dice = randomness(GREASE_DICE)
    return GREASE + dice[:2].hex(), dice[3 : 3 + dice[2] % (MAX_GREASE_SIZE + 1)]


def encode_options(options: Mapping[str, bytes], randomness: Randomness) -> bytes:
    """Check our options, add grease, and encode all of them.

    Raises:
        TypeError: a name is not a str, or a value is not bytes.
        ValueError: a name is not 1 to 32 of ``[a-z0-9./-]``, or begins with ``grease.``; or they
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
    """Decode the options of the peer, the unknown ones too.

    Raises:
        HandshakeError: they break a rule. Nothing of them may be used.
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
    """How many bytes of requests the peer holds at once; None: it has not told.

    Raises:
        HandshakeError: it is no number.
    """
    try:
        return decode_number(options[ROOM]) if ROOM in options else None
    except ProtocolError as exc:
        raise HandshakeError(f"invalid option {ROOM!r}: {exc}") from None
