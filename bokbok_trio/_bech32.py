"""Bech32m: bytes as text that a person can copy, with a checksum that finds mistakes.

A text is a prefix that names its kind, the separator ``1``, and characters of 5 bits each. The last six are
the checksum. It finds every mistake in up to 4 characters, and all but one in 10^9 of the others.

Bech32m differs from Bech32 by a constant. Under Bech32 a text that ends with ``p`` stays valid when any
number of ``q`` is inserted before the ``p`` or removed there.

Source: BIP-350 for the constant, BIP-173 for the rest. Errors do not show the texts, which are secrets here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

CHARACTERS: Final = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
"""The characters after the separator, by their value of 5 bits. There is no 1, b, i or o."""

MAX_SIZE: Final = 90
"""Characters of a text at most: in longer texts the checksum finds less."""

_CHECKSUM_SIZE: Final = 6
_CHECKSUM: Final = 0x2BC830A3
_VALUES: Final = {character: value for value, character in enumerate(CHARACTERS)}
_GENERATOR: Final = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)


def _step(top: int) -> int:
    result = 0
    for bit, coefficient in enumerate(_GENERATOR):
        if top >> bit & 1:
            result ^= coefficient
    return result


_STEPS: Final = [_step(top) for top in range(32)]
"""By the five bits that leave the remainder at the top: the bits that they change in it."""


def _remainder(prefix: str, values: Iterable[int]) -> int:
    codes = prefix.encode("ascii")
    remainder = 1
    for value in (*(code >> 5 for code in codes), 0, *(code & 31 for code in codes), *values):
        remainder = (remainder & 0x1FFFFFF) << 5 ^ value ^ _STEPS[remainder >> 25]
    return remainder


def encode(prefix: str, values: Sequence[int]) -> str:
    """Return the text of values of 5 bits each. The prefix must be in lower case."""
    rest = _remainder(prefix, (*values, *bytes(_CHECKSUM_SIZE))) ^ _CHECKSUM
    checksum = [rest >> 5 * at & 31 for at in reversed(range(_CHECKSUM_SIZE))]
    return f"{prefix}1{''.join(CHARACTERS[value] for value in (*values, *checksum))}"


def decode(prefix: str, text: str) -> list[int]:
    """Return the values, of 5 bits each, of a text with this prefix, all in lower case or all in upper case.

    Raises:
        ValueError: the text is invalid. The message says what is wrong with it, and where.
    """
    if text not in {text.lower(), text.upper()}:
        raise ValueError("upper and lower case are mixed")
    text, start = text.lower(), len(prefix) + 1
    if (
        not text.startswith(f"{prefix}1")
        or not prefix
        or not all("!" <= character <= "~" for character in prefix)
    ):
        raise ValueError(f"it does not begin with {prefix}1")
    if not start + _CHECKSUM_SIZE <= len(text) <= MAX_SIZE:
        raise ValueError(f"it has {len(text)} characters")
    for position, character in enumerate(text[start:], start + 1):
        if character not in _VALUES:
            raise ValueError(f"character {position} cannot be there: 1, b, i and o never can")
    values = [_VALUES[character] for character in text[start:]]
    if _remainder(prefix, values) != _CHECKSUM:
        raise ValueError("the checksum is wrong: a character is wrong, missing, or one too many")
    return values[:-_CHECKSUM_SIZE]


def to_values(data: bytes) -> list[int]:
    """Return bytes as values of 5 bits each. Zeros fill up the last one."""
    size = -(-8 * len(data) // 5)
    number = int.from_bytes(data, "big") << 5 * size - 8 * len(data)
    return [number >> 5 * at & 31 for at in reversed(range(size))]


def to_bytes(values: Sequence[int]) -> bytes:
    """Return values of 5 bits each as bytes.

    Raises:
        ValueError: `to_values` makes such values of no bytes.
    """
    size, spare = divmod(5 * len(values), 8)
    number = 0
    for value in values:
        number = number << 5 | value
    if spare >= 5 or number & ((1 << spare) - 1):  # noqa: PLR2004  (bits of a value)
        raise ValueError("it has bits left over")
    return (number >> spare).to_bytes(size, "big")
