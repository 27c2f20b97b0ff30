"""Good and bad messages of a handshake."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings, strategies as st
from nacl.bindings import crypto_secretbox

from bokbok_trio import AuthenticationError, ConnectionRefused, HandshakeError
from bokbok_trio._protocol import key_schedule
from bokbok_trio._protocol.handshake import (
    BOX_SIZE,
    EPHEMERAL_SIZE,
    MAGIC,
    MAX_REASON_SIZE,
    OPEN_SIZE,
    ClientHandshake,
    ServerHandshake,
    encode_refused,
)
from bokbok_trio._protocol.limits import Limits
from bokbok_trio._protocol.options import MAX_OPTIONS_SIZE, decode_options
from bokbok_trio._protocol.packets import encode_packet
from tests.support.handshakes import (
    CLIENT_LIMITS,
    OTHER,
    Dice,
    K,
    Schedule,
    accepted_with,
    check_fails_to_accept,
    exchange_hello,
    fields_of,
    flip,
    make_client,
    make_plain,
    make_server,
    options_with,
    other_hello,
    send_open,
    shake,
    spec_hash,
)

from ..support.strategies import options, packet_bytes

# Every encoding of a point of small order, from https://cr.yp.to/ecdh.html: X25519 of it is zero,
# and the highest bit of an encoding is ignored.
LOW_ORDER = [
    bytes(32),
    b"\1" + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    bytes.fromhex("edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    bytes.fromhex("eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
]

# ---- hello ----


SEALED = [make_client, make_server]


@pytest.mark.parametrize("make", SEALED)
@pytest.mark.parametrize("high_bit", [0, 0x80])
@pytest.mark.parametrize("point", LOW_ORDER, ids=bytes.hex)
def test_a_point_of_low_order_is_refused(
    make: Callable[[], ClientHandshake | ServerHandshake], high_bit: int, point: bytes
) -> None:
    side = make()
    with pytest.raises(HandshakeError, match="all-zero"):
        side.receive_hello(other_hello(side, point[:-1] + bytes((point[-1] | high_bit,))))


@pytest.mark.parametrize("make", SEALED)
def test_our_own_key_is_refused(make: Callable[[], ClientHandshake | ServerHandshake]) -> None:
    side = make()
    with pytest.raises(HandshakeError, match="our own key"):
        side.receive_hello(other_hello(side, side.hello[-EPHEMERAL_SIZE:]))


@pytest.mark.parametrize("side", [make_client(), make_server(), *make_plain()])
def test_our_own_hello_is_refused(side: ClientHandshake | ServerHandshake) -> None:
    with pytest.raises(HandshakeError, match="our own hello"):
        side.receive_hello(side.hello)


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        (make_client(), make_plain()[1], "this side is sealed, and the peer may be plain"),
        (make_server(), make_plain()[0], "this side is sealed, and the peer may be plain"),
        (make_plain()[0], make_server(), "this side is plain, and the peer may be sealed"),
        (make_plain()[1], make_client(), "this side is plain, and the peer may be sealed"),
    ],
)
def test_the_other_mode_is_refused_as_soon_as_it_shows(
    ours: ClientHandshake | ServerHandshake, theirs: ClientHandshake | ServerHandshake, told: str
) -> None:
    both_need = min(len(ours.hello), len(theirs.hello))
    with pytest.raises(HandshakeError, match=told):
        ours.check_hello(theirs.hello[:both_need])
    with pytest.raises(HandshakeError):
        ours.receive_hello(theirs.hello)


@pytest.mark.parametrize("start", [b"G", b"GET / HTTP/1.1\r\n", b"\x16\x03\x01", b"bokbok2\n", b"bokbok1\r"])
def test_what_is_no_bokbok_is_refused_by_its_first_bytes(start: bytes) -> None:
    for side in (make_client(), make_server(), *make_plain()):
        with pytest.raises(HandshakeError, match="not a bokbok peer"):
            side.check_hello(start)


def test_a_right_hello_is_taken_at_any_length_so_far() -> None:
    for client, server in ((make_client(), make_server()), make_plain()):
        for ours, theirs in ((client, server), (server, client)):
            assert ours.hello_size == len(theirs.hello)
            for size in range(ours.hello_size + 1):
                ours.check_hello(theirs.hello[:size])
            ours.receive_hello(theirs.hello)


def test_a_hello_has_its_exact_length() -> None:
    for client, server in ((make_client(), make_server()), make_plain()):
        for ours, theirs in ((client, server), (server, client)):
            for wrong in (b"", theirs.hello[:-1], theirs.hello + b"\0"):
                with pytest.raises(HandshakeError, match=f"a hello of {len(wrong)} bytes instead of"):
                    ours.receive_hello(wrong)


@pytest.mark.parametrize("field_", range(3))
def test_every_fixed_field_of_a_hello_is_checked(field_: int) -> None:
    client, server = make_client(), make_server()
    fields = fields_of(client.hello[len(MAGIC) :])
    fields[field_] = fields[field_].swapcase()
    with pytest.raises(HandshakeError, match="does not fit"):
        server.receive_hello(MAGIC + encode_packet(*fields))


# ---- open ----


def with_open(**changes: bytes) -> tuple[ServerHandshake, bytes]:
    """A server that has had its hello, and an open of 512 bytes with these fields changed."""
    client, server = make_client(), make_server()
    exchange_hello(client, server)
    names = ["tag", "user", "size", "requests", "options", "pad", "box"]
    fields = dict(zip(names, fields_of(client.open()), strict=True)) | changes
    if "pad" not in changes:
        missing = OPEN_SIZE - len(encode_packet(*fields.values()))
        fields["pad"] = bytes(len(fields["pad"]) + missing)
    return server, encode_packet(*fields.values())


BAD_OPTIONS = [
    (b"", "invalid options: a body without a count"),
    (packet_bytes([b"name"])[4:], "a name without a value"),
    (packet_bytes([b"a", b"", b"a", b""])[4:], "the option 'a' was sent twice"),
    (packet_bytes([b"A", b""])[4:], "invalid name of an option: b'A'"),
    (packet_bytes([b"a", b""])[4:-1], "invalid options: "),
    (packet_bytes([b"a", bytes(MAX_OPTIONS_SIZE - 9)])[4:], "options of 97 bytes exceed the limit of 96"),
]

NOT_NUMBERS = [
    b"",
    b"05000",
    b"+5000",
    b"5_000",
    b" 5000",
    b"5000\n",
    b"-1",
    b"1e9",
    b"9" * 19,
    "٣".encode() * 4,
]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tag": b"accepted"}, "expected open, not b'accepted'"),
        ({"tag": b""}, "expected open, not b''"),
        ({"pad": b""}, "invalid padding"),
        ({"pad": bytes(300)}, "invalid padding"),
        ({"box": bytes(BOX_SIZE - 1)}, "invalid padding"),
        ({"box": bytes(BOX_SIZE + 1)}, "invalid padding"),
        ({"box": b""}, "invalid padding"),
        ({"size": b"4095"}, "messages of only 4095 bytes"),
        ({"size": b"0"}, "messages of only 0 bytes"),
        ({"requests": b"0"}, "takes 0 requests at once"),
        ({"requests": b"1000001"}, "takes 1000001 requests at once"),
        *(({"size": number}, "number: ") for number in NOT_NUMBERS),
        *(({"requests": number}, "number: ") for number in NOT_NUMBERS),
        *(({"options": wrong}, told) for wrong, told in BAD_OPTIONS),
    ],
)
def test_a_wrong_open_is_refused(changes: dict[str, bytes], told: str) -> None:
    server, packet = with_open(**changes)
    with pytest.raises(HandshakeError, match=told):
        server.receive_open(packet)


@pytest.mark.parametrize("place", [0, 150, -1])
def test_a_pad_is_all_zeros(place: int) -> None:
    _, packet = with_open(options=b"\0")
    pad = bytearray(fields_of(packet)[5])
    pad[place] = 1
    server, packet = with_open(options=b"\0", pad=bytes(pad))
    assert len(packet) == OPEN_SIZE
    with pytest.raises(HandshakeError, match="invalid padding"):
        server.receive_open(packet)


def test_the_least_and_the_most_that_may_be_declared() -> None:
    for size, requests in ((b"4096", b"1"), (b"9" * 18, b"1000000")):
        server, packet = with_open(size=size, requests=requests)
        server.receive_open(packet)
        assert server.peer_limits == Limits(int(size), int(requests))


@pytest.mark.parametrize("field_", [1, 5, 6])
def test_an_open_in_mode_plain_has_no_user_pad_or_box(field_: int) -> None:
    client, server = make_plain()
    exchange_hello(client, server)
    fields = fields_of(client.open())
    fields[field_] = b"\0"
    with pytest.raises(HandshakeError, match="in mode plain"):
        server.receive_open(encode_packet(*fields))


def not_one_packet(packet: bytes) -> list[bytes]:
    fields = fields_of(packet)
    return [
        b"",
        packet[:3],
        packet[:4],
        packet[:-1],
        packet + b"\0",
        packet * 2,
        bytes(4),
        encode_packet(),
        encode_packet(*fields[:-1]),
        encode_packet(*fields, b""),
        packet[:4] + b"\xff" + packet[5:],
        packet[:4] + b"\1" + packet[5:],
        packet[:5] + b"\xff" + packet[6:],
    ]


def test_what_is_not_exactly_one_packet_of_the_right_arity_is_refused() -> None:
    for client, server in ((make_client(), make_server()), make_plain()):
        exchange_hello(client, server)
        for wrong in not_one_packet(client.open()):
            with pytest.raises(HandshakeError):
                server.receive_open(wrong)
        server.receive_open(client.open())
        for wrong in not_one_packet(server.accept([K])):
            with pytest.raises(HandshakeError):
                client.receive_reply(wrong)
            assert client.final_keys is None


def test_a_box_under_the_right_key_must_hold_the_hash() -> None:
    client, server = make_client(), make_server()
    exchange_hello(client, server)
    opening = client.open()
    fields = fields_of(opening)
    h1 = Schedule(messages=[client.hello, server.hello, opening], key=K.raw, ee=b"").h1
    box_key = spec_hash(32, K.raw, b"bokbok1 box", h1)
    for inside, opens in ((bytes(32) + h1, True), (bytes(32) + flip(h1, 0), False), (bytes(64), False)):
        fields[-1] = crypto_secretbox(inside, h1[:24], box_key)
        server.receive_open(encode_packet(*fields))
        if opens:
            server.accept([K])
        else:
            with pytest.raises(AuthenticationError):
                server.accept([K])


# ---- accepted and refused ----


def test_a_server_must_prove_the_key() -> None:
    client, server = make_client(), make_server()
    send_open(client, server)
    *fields, proof = fields_of(server.accept([K]))
    for wrong in (b"", proof[:-1], proof + b"\0", bytes(32), proof[::-1]):
        with pytest.raises(AuthenticationError, match="did not prove"):
            client.receive_reply(encode_packet(*fields, wrong))
        assert client.final_keys is None


def test_a_server_that_only_knows_another_key_proves_nothing() -> None:
    client, server = make_client(), make_server()
    send_open(client, server)
    accepted = [b"accepted", b"1000000", b"20", b"\0"]
    messages = [client.hello, server.hello, client.open(), encode_packet(*accepted, b"")]
    spec = Schedule(messages=messages, key=OTHER.raw, ee=b"")
    for proof in (spec.proof(), key_schedule.make_proof(OTHER, spec.h2())):
        with pytest.raises(AuthenticationError, match="did not prove"):
            client.receive_reply(encode_packet(*accepted, proof))


def test_a_proof_in_mode_plain_is_refused() -> None:
    client, server = make_plain()
    send_open(client, server)
    with pytest.raises(HandshakeError, match="a proof in mode plain"):
        client.receive_reply(encode_packet(b"accepted", b"1000000", b"20", b"\0", bytes(32)))


@pytest.mark.parametrize("limits", [Limits(4095, 1), Limits(-1, 1), Limits(4096, 0), Limits(4096, 10**6 + 1)])
def test_limits_out_of_range_are_refused_though_proven(limits: Limits) -> None:
    for client, server in (
        (make_client(), make_server(limits=limits)),
        (make_client(None, None), make_server(sealed=False, limits=limits)),
    ):
        send_open(client, server)
        accepted = server.accept([K])
        with pytest.raises(HandshakeError) as caught:
            client.receive_reply(accepted)
        assert caught.type is HandshakeError
        assert client.peer_limits == CLIENT_LIMITS
        assert client.final_keys is None


@pytest.mark.parametrize(("wrong", "told"), BAD_OPTIONS)
@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "plain"])
def test_bad_options_are_refused_though_proven(sealed: bool, wrong: bytes, told: str) -> None:
    client, server = (make_client(), make_server()) if sealed else make_plain()
    exchange_hello(client, server)
    accepted = accepted_with(wrong, client, server, client.open())
    with pytest.raises(HandshakeError, match=told) as caught:
        client.receive_reply(accepted)
    assert caught.type is HandshakeError
    assert not client.peer_options
    assert client.final_keys is None


def test_bad_options_are_refused_in_mode_plain() -> None:
    client, server = make_plain()
    exchange_hello(client, server)
    with pytest.raises(HandshakeError, match="invalid options"):
        server.receive_open(encode_packet(b"open", b"", *CLIENT_LIMITS.fields(), b"", b"", b""))


def test_nothing_is_believed_before_the_proof() -> None:
    client, server = make_client(), make_server()
    send_open(client, server)
    with pytest.raises(AuthenticationError):
        client.receive_reply(encode_packet(b"accepted", b"no number", b"0", b"no options", bytes(32)))
    assert not client.peer_options


# ---- options ----


@settings(deadline=None)
@given(ours=options(), theirs=options(), dice=st.binary(min_size=1), sealed=st.booleans())
def test_each_side_has_the_options_of_the_other(
    ours: dict[str, bytes], theirs: dict[str, bytes], dice: bytes, sealed: bool
) -> None:
    """Any options, with grease of every size."""
    rolls = {"client": Dice(dice), "server": Dice(dice + b".")}
    client = make_client(*(() if sealed else (None, None)), options=ours, randomness=rolls["client"])
    server = make_server(sealed=sealed, options=theirs, randomness=rolls["server"])
    shake(client, server)
    for side, other, mine in ((client, server, ours), (server, client, theirs)):
        at = 1 if sealed else 0
        grease = decode_options(options_with(rolls[side.side].given[at]))
        assert other.peer_options == mine | dict(grease)
        assert len(other.peer_options) == len(mine) + 1


@pytest.mark.parametrize("size", range(256))
def test_grease_of_every_size_is_ignored(size: int) -> None:
    client = make_client(randomness=lambda count: bytes((size,)) * count)
    server = make_server()
    shake(client, server)
    [(name, value)] = server.peer_options.items()
    assert (name, value) == (f"grease.{size:02x}{size:02x}", bytes((size,)) * (size % 9))
    [(name, _)] = client.peer_options.items()
    assert name.startswith("grease.")


def test_options_are_not_believed_before_the_box_has_opened() -> None:
    client, server = make_client(options={"a": b"1"}), make_server()
    send_open(client, server)
    assert not server.peer_options
    check_fails_to_accept(client, server, [OTHER])
    assert not server.peer_options
    server.accept([K])
    assert server.peer_options["a"] == b"1"


@pytest.mark.parametrize("altered", ["open", "accepted"])
def test_options_are_bound_by_the_hashes(altered: str) -> None:
    client, server = make_client(options={"a": b"1"}), make_server(options={"a": b"1"})
    exchange_hello(client, server)
    opening = client.open()
    if altered == "open":
        server.receive_open(opening.replace(b"\0\0\0\1a\0\0\0\0011", b"\0\0\0\1a\0\0\0\0012"))
        with pytest.raises(AuthenticationError):
            server.accept([K])
    else:
        server.receive_open(opening)
        accepted = server.accept([K]).replace(b"\0\0\0\1a\0\0\0\0011", b"\0\0\0\1b\0\0\0\0011")
        with pytest.raises(AuthenticationError):
            client.receive_reply(accepted)
    assert client.final_keys is None


@pytest.mark.parametrize(
    ("packet", "error", "told"),
    [
        (encode_refused("authentication", "no"), AuthenticationError, "the server refused: 'no'"),
        (encode_refused("busy", "wait"), ConnectionRefused, r"the server refused: 'wait' \[busy\]"),
        (encode_refused("stopping", ""), ConnectionRefused, r"the server refused: '' \[stopping\]"),
        (encode_packet(b"refused", b"x" * 30, b""), HandshakeError, f"unknown code b'{'x' * 20}'"),
        (
            encode_packet(b"refused", b"busy", b"x" * MAX_REASON_SIZE),
            ConnectionRefused,
            "x" * MAX_REASON_SIZE,
        ),
        (
            encode_packet(b"refused", b"busy", b"x" * (MAX_REASON_SIZE + 1)),
            HandshakeError,
            "257 bytes exceeds",
        ),
        (encode_packet(b"refused", b"busy", b"\xff\x1b[2J"), ConnectionRefused, r"'\ufffd\\x1b\[2J'"),
        (encode_packet(b"refused", b"busy"), HandshakeError, "expected accepted or refused"),
        (encode_packet(b"pong", b""), HandshakeError, r"accepted or refused, got b'pong' with 2 fields"),
        (encode_packet(), HandshakeError, r"accepted or refused, got no field at all"),
    ],
)
def test_what_is_not_accepted(packet: bytes, error: type[HandshakeError], told: str) -> None:
    for client, server in ((make_client(), make_server()), make_plain()):
        send_open(client, server)
        with pytest.raises(HandshakeError, match=told) as caught:
            client.receive_reply(packet)
        assert caught.type is error
        if isinstance(caught.value, ConnectionRefused):
            assert caught.value.code in ("busy", "stopping")
        assert client.final_keys is None


def test_an_error_quotes_only_the_beginning_of_what_a_stranger_sent() -> None:
    client, server = make_client(), make_server()
    send_open(client, server)
    for receive in (client.receive_reply, server.receive_open):
        with pytest.raises(HandshakeError) as caught:
            receive(encode_packet(b"\xff" * 4000, *[b""] * 6))
        assert len(str(caught.value)) < 200
