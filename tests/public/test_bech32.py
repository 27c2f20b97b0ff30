from __future__ import annotations

import base64

import pytest
from hypothesis import given, strategies as st

from bokbok_trio._bech32 import CHARACTERS, MAX_SIZE, decode, encode, to_bytes, to_values

# The vectors of BIP-350.
VALID = [
    "A1LQFN3A",
    "a1lqfn3a",
    "an83characterlonghumanreadablepartthatcontainsthetheexcludedcharactersbioandnumber11sg7hg6",
    "abcdef1l7aum6echk45nj3s0wdvt2fg8x9yrzpqzd3ryx",
    f"11{'l' * 82}ludsr8",
    "split1checkupstagehandshakeupstreamerranterredcaperredlc445v",
    "?1v759aa",
]
INVALID = {
    " 1xj0phk": "does not begin with",
    "\x7f1g6xzxy": "does not begin with",
    "\x801vctc34": "does not begin with",
    "an84characterslonghumanreadablepartthatcontainsthetheexcludedcharactersbioandnumber11d6pts4": "has 91",
    "qyrz8wqd2c9m": "does not begin with",  # no separator
    "1qyrz8wqd2c9m": "does not begin with",  # no prefix
    "y1b0jsk6g": "character 3 ",
    "lt1igcx5c0": "character 4 ",
    "in1muywd": "it has 8 ",
    "mm1crxm3i": "character 9 ",
    "au1s5cgom": "character 8 ",
    "M1VUXWEZ": "checksum",
    "16plkw9": "does not begin with",  # no prefix
    "1p2gdwpf": "does not begin with",
}

# Those of BIP-173 are of another checksum.
BECH32 = [
    "A12UEL5L",
    "a12uel5l",
    "an83characterlonghumanreadablepartthatcontainsthenumber1andtheexcludedcharactersbio1tt5tgs",
    "abcdef1qpzry9x8gf2tvdw0s3jn54khce6mua7lmqqqxw",
    f"11{'q' * 82}c8247j",
    "split1checkupstagehandshakeupstreamerranterredcaperred2y9e3w",
    "?1ezyfcl",
]

values = st.lists(st.integers(0, 31), max_size=52)


def prefix_of(text: str) -> str:
    return text.lower().rpartition("1")[0]


@pytest.mark.parametrize("text", VALID)
def test_a_valid_vector(text: str) -> None:
    decoded = decode(prefix_of(text), text)
    assert encode(prefix_of(text), decoded) == text.lower()
    assert len(decoded) == len(text.rpartition("1")[2]) - 6
    at = text.rindex("1") + 1
    with pytest.raises(ValueError, match=r"checksum|character|mixed"):
        decode(prefix_of(text), text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :])


@pytest.mark.parametrize(("text", "message"), INVALID.items(), ids=map(ascii, INVALID))
def test_an_invalid_vector(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(prefix_of(text), text)


@pytest.mark.parametrize("text", BECH32)
def test_a_vector_of_the_older_checksum(text: str) -> None:
    with pytest.raises(ValueError, match="checksum"):
        decode(prefix_of(text), text)


def test_what_was_a_weakness_of_the_older_checksum() -> None:
    """A text that ends with p, and any number of q before that."""
    found = 0
    for value in range(32**2):
        text = encode("a", [value >> 5, value & 31])
        if text.endswith("p"):
            found += 1
            for size in (1, 2, 5):
                with pytest.raises(ValueError, match="checksum"):
                    decode("a", f"{text[:-1]}{'q' * size}p")
    assert found > 10


@given(values)
def test_what_was_encoded_is_decoded(values: list[int]) -> None:
    text = encode("test-", values)
    assert text.isascii()
    assert decode("test-", text) == decode("test-", text.upper()) == values


@given(values, st.data())
def test_every_mistake_in_up_to_four_characters_is_noticed(values: list[int], data: st.DataObject) -> None:
    text = encode("test-", values)
    start = len("test-1")
    positions = data.draw(st.sets(st.integers(start, len(text) - 1), min_size=1, max_size=4))
    wrong = list(text)
    for position in positions:
        wrong[position] = data.draw(st.sampled_from(CHARACTERS.replace(text[position], "")))
    with pytest.raises(ValueError, match="checksum"):
        decode("test-", "".join(wrong))


@given(values, st.data())
def test_a_text_that_is_cut_doubled_or_turned_round_is_noticed(
    values: list[int], data: st.DataObject
) -> None:
    """Not for certain: one in 10^9 of these is not."""
    text = encode("test-", values)
    at = data.draw(st.integers(6, len(text) - 1))
    end = data.draw(st.integers(at + 1, len(text)))
    head, middle, tail = text[:at], text[at:end], text[end:]
    for wrong in (head + tail, head + middle + middle + tail, head + middle[::-1] + tail):
        if wrong != text:
            with pytest.raises(ValueError, match=r"checksum|it has \d+ characters"):
                decode("test-", wrong)


@given(st.text(max_size=100))
def test_any_text_is_decoded_or_refused(text: str) -> None:
    for prefix in ("test-", prefix_of(text)):
        try:
            decoded = decode(prefix, text)
        except ValueError:
            continue
        assert len(text) <= MAX_SIZE
        assert encode(prefix, decoded) == text.lower()


def test_upper_and_lower_case_are_not_mixed() -> None:
    text = encode("test-", [1, 2, 3])
    with pytest.raises(ValueError, match="upper and lower case are mixed"):
        decode("test-", text.capitalize())


@given(st.binary(max_size=60))
def test_bytes_are_values_and_back(data: bytes) -> None:
    values = to_values(data)
    assert to_bytes(values) == data
    standard = base64.b32encode(data).decode().rstrip("=")
    assert "".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"[value] for value in values) == standard


@pytest.mark.parametrize("values", [[0], [0, 1], [0, 0, 0], [0] * 6, [31] * 52], ids=str)
def test_values_that_are_no_bytes(values: list[int]) -> None:
    with pytest.raises(ValueError, match="bits left over"):
        to_bytes(values)
