from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, strategies as st

from bokbok_trio import HandshakeError
from bokbok_trio._protocol.options import (
    GREASE_DICE,
    MAX_GREASE_SIZE,
    MAX_OPTIONS_SIZE,
    MAX_OWN_OPTIONS_SIZE,
    ROOM,
    decode_options,
    encode_options,
    make_grease,
)

from ..support.strategies import option_names, options, packet_bytes

LONGEST = "a" * 32


def body(*fields: bytes) -> bytes:
    return packet_bytes(list(fields))[4:]


@given(options(), st.binary(min_size=GREASE_DICE, max_size=GREASE_DICE))
def test_options_arrive_as_they_were_sent_with_grease_added(ours: dict[str, bytes], dice: bytes) -> None:
    encoded = encode_options(ours, lambda _: dice)
    assert len(encoded) <= MAX_OPTIONS_SIZE
    arrived = decode_options(encoded)
    name, value = make_grease(lambda _: dice)
    assert arrived == ours | {name: value}
    assert encoded == body(
        *(field for name, value in (*ours.items(), (name, value)) for field in (name.encode(), value))
    )


@given(st.binary(min_size=GREASE_DICE, max_size=GREASE_DICE))
def test_grease_has_any_digits_and_up_to_eight_bytes(dice: bytes) -> None:
    name, value = make_grease(lambda size: dice[:size])
    assert name == f"grease.{dice[0]:02x}{dice[1]:02x}"
    assert value == dice[3 : 3 + dice[2] % (MAX_GREASE_SIZE + 1)]


def test_grease_of_every_length_is_made() -> None:
    greases = [make_grease(bytes((roll,)).__mul__) for roll in range(256)]
    assert {len(value) for _, value in greases} == set(range(MAX_GREASE_SIZE + 1))


@given(st.dictionaries(option_names.filter(lambda name: name != ROOM), st.binary(max_size=40), max_size=6))
def test_every_body_of_good_names_is_taken_if_it_is_not_too_long(theirs: dict[str, bytes]) -> None:
    encoded = body(*(field for name, value in theirs.items() for field in (name.encode(), value)))
    if len(encoded) <= MAX_OPTIONS_SIZE:
        assert decode_options(encoded) == theirs
    else:
        with pytest.raises(HandshakeError, match="exceed the limit of 96"):
            decode_options(encoded)


@given(st.binary(max_size=MAX_OPTIONS_SIZE + 1))
def test_any_bytes_are_options_of_good_names_or_refused(encoded: bytes) -> None:
    try:
        arrived = decode_options(encoded)
    except HandshakeError:
        return
    fields = [field for name, value in arrived.items() for field in (name.encode(), value)]
    assert body(*fields) == encoded


@pytest.mark.parametrize(
    ("encoded", "told"),
    [
        (b"", "invalid options: a body without a count"),
        (b"\1", "invalid options: "),
        (b"\0\0", "invalid options: "),
        (body(b"name"), "a name without a value"),
        (body(b"a", b"", b"b"), "a name without a value"),
        (body(b"a", b"1", b"a", b"2"), "the option 'a' was sent twice"),
        (body(b"a", b"", b"b", b"", b"a", b""), "the option 'a' was sent twice"),
        (body(b"", b""), "invalid name of an option: b''"),
        (body(LONGEST.encode() + b"a", b""), "invalid name of an option"),
        *(
            (body(name, b""), "invalid name of an option")
            for name in (
                b"A",
                b"a b",
                b"a_b",
                b"a\n",
                b"a\0",
                b"a:b",
                b"\xe9",
                "ä".encode(),
                "\u0661".encode(),
            )
        ),
        (body(LONGEST.encode(), bytes(MAX_OPTIONS_SIZE - 1 - 8 - 32 + 1)), "options of 97 bytes exceed"),
    ],
)
def test_malformed_options_are_refused(encoded: bytes, told: str) -> None:
    with pytest.raises(HandshakeError, match=told):
        decode_options(encoded)


@given(options(), st.integers(0, 2**10), st.integers(1, 255))
def test_a_changed_byte_gives_other_options_or_none(ours: dict[str, bytes], at: int, change: int) -> None:
    encoded = bytearray(encode_options(ours, bytes))
    before = decode_options(bytes(encoded))
    encoded[at % len(encoded)] ^= change
    with suppress(HandshakeError):
        assert decode_options(bytes(encoded)) != before


def test_the_longest_options() -> None:
    longest = {LONGEST: bytes(MAX_OPTIONS_SIZE - 1 - 8 - 32)}
    assert decode_options(body(LONGEST.encode(), longest[LONGEST])) == longest
    ours = {LONGEST: bytes(MAX_OWN_OPTIONS_SIZE - 1 - 8 - 32)}
    assert len(encode_options(ours, lambda size: b"\10" * size)) == MAX_OPTIONS_SIZE
    with pytest.raises(ValueError, match="at most 69 bytes, not 70"):
        encode_options({LONGEST: ours[LONGEST] + b"a"}, bytes)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({b"a": b""}, TypeError),
        ({"a": "1"}, TypeError),
        ({"a": None}, TypeError),
        ({"": b""}, ValueError),
        ({"A": b""}, ValueError),
        ({"a" * 33: b""}, ValueError),
        ({"é": b""}, ValueError),
        ({"grease.0000": b""}, ValueError),
    ],
)
def test_options_that_nobody_may_send(wrong: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="option"):
        encode_options(wrong, bytes)


def test_options_cannot_be_changed() -> None:
    theirs: Any = decode_options(body(b"a", b""))
    with pytest.raises(TypeError):
        theirs["b"] = b""
