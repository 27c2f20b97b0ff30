from __future__ import annotations

import array
import re
from collections import UserList, deque
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, strategies as st

from bokbok_trio import Field, MessageTooLarge, ProtocolError
from bokbok_trio._protocol.context import decode_context, encode_context
from bokbok_trio._protocol.packets import (
    LARGE,
    LENGTH_SIZE,
    MAX_FIELDS,
    PacketDecoder,
    decode_body,
    decode_number,
    decode_text,
    encode_body,
    encode_number,
    encode_packet,
    encode_prefix,
    encode_small_packet,
)
from tests.support.helpers import decode as decode_all
from tests.support.strategies import chunked, fields, packet_bytes, packets, user_fields

LIMIT = 2**32 - 1


def decode(decoder: PacketDecoder, *chunks: bytes) -> list[list[bytes]]:
    return [packet for chunk in chunks for packet in decode_all(decoder, chunk)]


# ---- bodies ----


@given(packets)
def test_a_body_on_the_wire(packet: list[bytes]) -> None:
    chunks, size = encode_body(packet, LIMIT)
    body = b"".join(chunks)
    assert size.to_bytes(4, "big") + body == packet_bytes(packet)
    assert decode_body(body) == packet


@given(st.lists(user_fields, max_size=8))
def test_every_kind_of_field_arrives_as_bytes(given_fields: list[Field]) -> None:
    expected = [field.encode() if isinstance(field, str) else bytes(field) for field in given_fields]
    assert decode_body(b"".join(encode_body(given_fields, LIMIT)[0])) == expected


@pytest.mark.parametrize("sequence", [["a", b"b"], (b"a", "b"), deque(["a", "b"]), UserList("ab")])
def test_a_packet_is_any_sequence(sequence: Sequence[Field]) -> None:
    assert b"".join(encode_body(sequence, LIMIT)[0]) == packet_bytes([b"a", b"b"])[LENGTH_SIZE:]


@pytest.mark.parametrize("count", [0, 1, MAX_FIELDS])
def test_as_many_fields_as_a_packet_may_have(count: int) -> None:
    packet = [b"x"] * count
    assert decode_body(b"".join(encode_body(packet, LIMIT)[0])) == packet


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ("text", TypeError, "pass a list of fields such as ['ping'], not str"),
        (b"bytes", TypeError, "pass a list of fields such as ['ping'], not bytes"),
        (bytearray(b"x"), TypeError, "pass a list of fields such as ['ping'], not bytearray"),
        (memoryview(b"x"), TypeError, "pass a list of fields such as ['ping'], not memoryview"),
        (None, TypeError, "pass a list of fields such as ['ping'], not NoneType"),
        ({"a"}, TypeError, "pass a list of fields such as ['ping'], not set"),
        ({"a": "b"}, TypeError, "pass a list of fields such as ['ping'], not dict"),
        ({0: "a"}.values(), TypeError, "pass a list of fields such as ['ping'], not dict_values"),
        (iter(["a"]), TypeError, "pass a list of fields such as ['ping'], not list_iterator"),
        (["a", 1], TypeError, "a field is bytes or str, not int"),
        ([None], TypeError, "a field is bytes or str, not NoneType"),
        ([[b"a"]], TypeError, "a field is bytes or str, not list"),
        ([array.array("B", b"a")], TypeError, "a field is bytes or str, not array"),
        ([b""] * 256, ValueError, "a packet has at most 255 fields, not 256"),
        (["\ud800"], ValueError, "surrogates not allowed"),
    ],
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", repr(value)),
)
def test_what_the_user_gets_wrong(wrong: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        encode_body(wrong, LIMIT)


@given(packets)
def test_the_limit_holds_to_the_byte(packet: list[bytes]) -> None:
    size = len(packet_bytes(packet)) - LENGTH_SIZE
    assert encode_body(packet, size)[1] == size
    with pytest.raises(MessageTooLarge) as caught:
        encode_body(packet, size - 1)
    assert (caught.value.size, caught.value.limit) == (size, size - 1)


@pytest.mark.parametrize("view", [False, True])
def test_a_field_that_can_change_is_copied_at_once(view: bool) -> None:
    buffer = bytearray(b"before")
    chunks, _ = encode_body([memoryview(buffer) if view else buffer], LIMIT)
    buffer[:] = b"after!"
    assert decode_body(b"".join(chunks)) == [b"before"]


def test_bytes_are_not_copied() -> None:
    big = bytes(LARGE)
    assert any(chunk is big for chunk in encode_body([big], LIMIT)[0])


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (memoryview(b"abcdef")[::2], b"ace"),
        (memoryview(b"abc")[::-1], b"cba"),
        (memoryview(array.array("H", [1, 2])), array.array("H", [1, 2]).tobytes()),
        (memoryview(b"abcd").cast("B", (2, 2)), b"abcd"),
    ],
    ids=["every-other", "backwards", "of-shorts", "of-two-dimensions"],
)
def test_a_view_is_sent_as_its_bytes(view: memoryview, expected: bytes) -> None:
    chunks, size = encode_body([view], LIMIT)
    assert decode_body(b"".join(chunks)) == [expected]
    assert size == 1 + LENGTH_SIZE + len(expected)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "a body without a count"),
        (b"\1", "a packet that ends inside a field's size"),
        (b"\xff", "a packet that ends inside a field's size"),
        (b"\1\0\0\0", "a packet that ends inside a field's size"),
        (b"\2\0\0\0\0", "a packet that ends inside a field's size"),
        (b"\2\0\0\0\1a\0\0\0", "a packet that ends inside a field's size"),
        (b"\1\0\0\0\1", "a field that is larger than its packet"),
        (b"\1\0\0\0\4abc", "a field that is larger than its packet"),
        (b"\1\xff\xff\xff\xffabc", "a field that is larger than its packet"),
        (b"\2\0\0\0\6a\0\0\0\0", "a field that is larger than its packet"),
        (b"\0\0", "1 bytes after the last field of a packet"),
        (b"\1\0\0\0\1abcd", "3 bytes after the last field of a packet"),
        (b"\1\0\0\0\0\0\0\0\0", "4 bytes after the last field of a packet"),
    ],
)
def test_a_body_that_is_none(body: bytes, message: str) -> None:
    with pytest.raises(ProtocolError, match=f"^{message}$"):
        decode_body(body)
    with pytest.raises(ProtocolError, match=f"^{message}$"):
        decode(PacketDecoder(LIMIT), len(body).to_bytes(4, "big") + body)


@given(st.binary(max_size=30) | st.binary(max_size=9).map(lambda rest: b"\1\0\0\0" + rest))
def test_no_two_bodies_mean_the_same(body: bytes) -> None:
    try:
        packet = decode_body(body)
    except ProtocolError:
        return
    assert packet_bytes(packet)[LENGTH_SIZE:] == body


# ---- heads ----


@given(st.lists(fields, max_size=4), fields)
def test_a_head_is_a_packet_or_all_but_its_last_field(head: list[bytes], body: bytes) -> None:
    assert encode_packet(*head) == packet_bytes(head)
    assert encode_packet(*head, body_size=len(body)) + body == packet_bytes([*head, body])


@given(packets, st.integers(0, 10**18 - 1), st.booleans())
def test_a_small_packet_encoded_in_one_step_is_the_same(
    packet: list[bytes], id: int, has_timeout: bool
) -> None:
    body = b"".join(encode_body(packet, LIMIT)[0])
    fields = [b"kind", b"%d" % id, *[b""] * has_timeout, body]
    start = encode_prefix(b"kind", len(fields))
    assert encode_small_packet(start, id, bytes(LENGTH_SIZE) * has_timeout, body) == packet_bytes(fields)


# ---- the decoder ----


@given(st.data(), st.lists(packets, max_size=5))
def test_packets_arrive_however_they_are_chunked(data: st.DataObject, sent: list[list[bytes]]) -> None:
    stream = b"".join(map(packet_bytes, sent))
    decoder = PacketDecoder(LIMIT)
    assert decode(decoder, *data.draw(chunked(stream))) == sent
    assert decoder.buffered == 0


def test_packets_arrive_byte_by_byte() -> None:
    sent = [[], [b""], [b"ping", b"1"], [b"x"] * 255]
    stream = b"".join(map(packet_bytes, sent))
    assert decode(PacketDecoder(LIMIT), *(stream[i : i + 1] for i in range(len(stream)))) == sent


@given(st.data(), st.lists(packets, min_size=1, max_size=5))
def test_a_stream_cut_anywhere_gives_what_was_complete_and_keeps_the_rest(
    data: st.DataObject, sent: list[list[bytes]]
) -> None:
    stream = b"".join(map(packet_bytes, sent))
    cut = data.draw(st.integers(0, len(stream)))
    decoder = PacketDecoder(LIMIT)
    before = decode(decoder, *data.draw(chunked(stream[:cut])))
    consumed = b"".join(map(packet_bytes, before))
    assert before == sent[: len(before)]
    assert decoder.buffered == cut - len(consumed)
    if len(before) < len(sent):
        assert decoder.buffered < len(packet_bytes(sent[len(before)]))
    assert before + decode(decoder, stream[cut:]) == sent


@given(st.data(), st.lists(packets, min_size=1, max_size=3))
def test_a_changed_byte_never_passes_for_what_was_sent(data: st.DataObject, sent: list[list[bytes]]) -> None:
    stream = bytearray().join(map(packet_bytes, sent))
    stream[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    decoder = PacketDecoder(LIMIT)
    received: list[list[bytes]] = []
    failed = False
    try:
        for chunk in data.draw(chunked(bytes(stream))):
            received.extend(list(map(bytes, packet)) for packet in decoder.decode(chunk))
    except ProtocolError:
        failed = True
    # What was decoded is what was there, byte for byte, and nothing of it went missing.
    consumed = b"".join(map(packet_bytes, received))
    assert stream.startswith(consumed)
    assert failed or decoder.buffered == len(stream) - len(consumed)
    assert received != sent


@given(st.data(), st.integers(0, 40), st.binary(max_size=200) | st.lists(packets).map(repr).map(str.encode))
def test_no_more_than_a_packet_is_ever_held(data: st.DataObject, limit: int, stream: bytes) -> None:
    decoder = PacketDecoder(limit)
    for chunk in data.draw(chunked(stream)):
        try:
            decode(decoder, chunk)
        except ProtocolError:
            assert decoder.buffered == 0
            return
        assert decoder.buffered <= LENGTH_SIZE + limit


def test_the_most_that_is_held() -> None:
    stream = packet_bytes([bytes(95)])
    decoder = PacketDecoder(100)
    assert decode(decoder, stream * 3 + stream[:-1]) == [[bytes(95)]] * 3
    assert decoder.buffered == LENGTH_SIZE + 100 - 1
    assert decode(decoder, stream[-1:]) == [[bytes(95)]]


@pytest.mark.parametrize("length", [101, 2**16, 2**32 - 1])
def test_a_length_over_the_limit_is_refused_as_soon_as_it_is_there(length: int) -> None:
    decoder = PacketDecoder(100)
    head = length.to_bytes(4, "big")
    assert decode(decoder, head[:3]) == []
    with pytest.raises(ProtocolError, match=f"^a packet of {length} bytes exceeds the limit of 100$"):
        decode(decoder, head[3:])
    assert decoder.buffered == 0


def test_what_came_before_a_bad_packet_is_yielded_before_it_raises() -> None:
    decoder = PacketDecoder(100)
    arriving = decoder.decode(packet_bytes([b"good"]) + b"\0\0\0\1\1" + packet_bytes([b"never seen"]))
    assert next(arriving) == [b"good"]
    with pytest.raises(ProtocolError, match="ends inside a field's size"):
        next(arriving)
    assert decoder.buffered == 0


def test_fields_are_bytes_that_nothing_changes_later() -> None:
    decoder = PacketDecoder(100)
    data = bytearray(packet_bytes([b"first"]))
    [[field]] = decoder.decode(data)
    data[:] = bytes(len(data))
    decode(decoder, packet_bytes([b"other"]))
    assert type(field) is bytes
    assert field == b"first"


# ---- numbers and texts ----


@given(st.integers(0, 10**18 - 1))
def test_a_number_and_back(number: int) -> None:
    assert encode_number(number) == str(number).encode()
    assert decode_number(encode_number(number)) == number


@pytest.mark.parametrize(
    "field",
    [
        *(
            b"",
            b"1_0",
            b"+7",
            b"-1",
            b"-0",
            b" 7",
            b"7 ",
            b"1\n",
            b"\n1",
            b"01",
            b"00",
            b"0x1",
            b"1.0",
            b"1e3",
        ),
        *(b"1" * 19, b"9" * 400, b"1\0", b"1\n2", b"inf", "\u0663".encode(), "1\u0663".encode()),
        *("\uff11".encode(), b"\xb2"),
    ],
)
def test_no_number(field: bytes) -> None:
    with pytest.raises(ProtocolError, match=f"^{re.escape(f'invalid number: {field[:20]!r}')}$"):
        decode_number(field)


@given(st.binary(max_size=4))
def test_numbers_have_one_way_to_be_written(field: bytes) -> None:
    try:
        number = decode_number(field)
    except ProtocolError:
        return
    assert encode_number(number) == field


def test_a_text() -> None:
    assert decode_text("für".encode()) == "für"


@pytest.mark.parametrize("field", [b"\xff", b"a\xc3", b"\xed\xa0\x80", b"\xc0\x80"])
def test_no_text(field: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"^a text that is not UTF-8: "):
        decode_text(field)


# ---- contexts ----

names = st.text(alphabet="abcxyz019._-", min_size=1, max_size=64)


@given(st.dictionaries(names, st.binary(max_size=100), max_size=32))
def test_contexts_round_trip(context: dict[str, bytes]) -> None:
    decoded = decode_context(encode_context(context))
    assert decoded == context
    with pytest.raises(TypeError):
        decoded["more"] = b""  # type: ignore[index]


def test_a_context_takes_text_and_no_context_takes_no_room() -> None:
    assert decode_context(encode_context({"trace": "\xe9"})) == {"trace": "\xe9".encode()}
    assert encode_context({}) == encode_context(None) == b""


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (["trace"], TypeError, "a context is a mapping from names to bytes or str, not list"),
        ({1: b""}, TypeError, "a name of a context is a str, not int"),
        ({"a": 1}, TypeError, "the value of 'a' in a context is bytes or str, not int"),
        ({"": b""}, ValueError, "invalid name of a context: ''"),
        ({"A": b""}, ValueError, "invalid name of a context: 'A'"),
        ({"a" * 65: b""}, ValueError, "invalid name of a context"),
        ({f"n{n}": b"" for n in range(33)}, ValueError, "a context has at most 32 names, not 33"),
        ({"a": bytes(2**13)}, ValueError, "a context takes at most 8192 bytes, not"),
    ],
)
def test_contexts_that_cannot_be_sent(wrong: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        encode_context(wrong)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], "a context of 0 fields"),
        ([b"a"], "a context of 1 fields"),
        ([field for n in range(33) for field in (b"n%d" % n, b"")], "a context of 66 fields"),
        ([b"A", b""], "invalid or repeated name in a context: b'A'"),
        ([b"\xe9", b""], "invalid or repeated name in a context"),
        ([b"a", b"", b"a", b""], "invalid or repeated name in a context: b'a'"),
        ([b"a", bytes(2**13)], "exceeds the limit of 8192"),
    ],
)
def test_contexts_that_break_the_protocol(fields: list[bytes], message: str) -> None:
    with pytest.raises(ProtocolError, match=re.escape(message)):
        decode_context(b"".join(encode_body(fields, LIMIT)[0]))
