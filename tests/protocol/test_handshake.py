from __future__ import annotations

import hashlib
import logging
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from nacl.bindings import (
    crypto_scalarmult,
    crypto_scalarmult_base,
    crypto_secretbox,
    crypto_secretbox_open,
)
from nacl.exceptions import CryptoError

from bokbok_trio import (
    AuthenticationError,
    ConnectionRefused,
    HandshakeError,
    Key,
)
from bokbok_trio._keys import MAX_KEYS
from bokbok_trio._protocol import handshake, key_schedule
from bokbok_trio._protocol.handshake import (
    BOX_SIZE,
    EPHEMERAL_SIZE,
    MAGIC,
    MAX_REASON_SIZE,
    OPEN_SIZE,
    ClientHandshake,
    ServerHandshake,
    encode_hello,
    encode_refused,
)
from bokbok_trio._protocol.key_schedule import DirectionKeys
from bokbok_trio._protocol.limits import Limits
from bokbok_trio._protocol.options import GREASE_DICE, MAX_OPTIONS_SIZE, MAX_OWN_OPTIONS_SIZE, decode_options
from bokbok_trio._protocol.packets import LENGTH_SIZE, decode_body, encode_packet

from ..support.helpers import check_holds_no_secret
from ..support.strategies import options, packet_bytes

K = Key(bytes(range(32)))
OTHER = Key(bytes(range(100, 132)))
CLIENT_LIMITS = Limits(65536, 10)
SERVER_LIMITS = Limits(1_000_000, 20)

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
    """Do all of it; the four messages."""
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
    """Randomness that remembers what it gave."""

    def __init__(self, seed: bytes) -> None:
        self.seed = seed
        self.given: list[bytes] = []

    def __call__(self, size: int) -> bytes:
        self.given.append(hashlib.shake_256(self.seed + bytes((len(self.given),))).digest(size))
        return self.given[-1]


# ---- the key schedule, made from the specification alone ----


def spec_hash(size: int, key: bytes, label: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=size, key=key, person=label.ljust(16, b"\0")).digest()


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What anyone derives who has seen these messages and knows, or believes to know, these secrets."""

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


def options_with(dice: bytes) -> bytes:
    """The options of a side that has none but grease made of these random bytes, encoded."""
    name = b"grease.%02x%02x" % (dice[0], dice[1])
    return packet_bytes([name, dice[3:][: dice[2] % 9]])[4:]


def both(keys: DirectionKeys | None) -> bytes:
    assert keys is not None
    return keys.c2s + keys.s2c


@pytest.mark.parametrize("service", ["", "mail", "é" * 127 + "x"])
def test_sealed_messages_and_keys_are_as_specified(service: str) -> None:
    client_dice, server_dice = Dice(b"client"), Dice(b"server")
    client = make_client(service=service, randomness=client_dice)
    server = make_server(service=service, randomness=server_dice)
    messages = shake(client, server)

    secret_c, grease_c, session_key = client_dice.given
    secret_s, grease_s = server_dice.given
    spec = Schedule(
        messages=messages,
        key=K.raw,
        ee=crypto_scalarmult(secret_c, crypto_scalarmult_base(secret_s)),
        session_key=session_key,
        service=service.encode(),
    )
    for side, secret, hello in ((b"client", secret_c, messages[0]), (b"server", secret_s, messages[1])):
        public = crypto_scalarmult_base(secret)
        assert hello == b"bokbok1\n" + encode_packet(b"hello", side, b"sealed", public)
    assert len(messages[2]) == 512
    *fields, _ = fields_of(messages[2])
    assert fields == [b"open", b"myuser", b"65536", b"10", options_with(grease_c), bytes(len(fields[-1]))]
    assert spec.open_box() == session_key + spec.h1
    assert fields_of(messages[3]) == [b"accepted", b"1000000", b"20", options_with(grease_s), spec.proof()]
    for side_keys in (client.channel_keys(), server.channel_keys()):
        assert both(side_keys) == spec.hs()
    for final_keys in (client.final_keys, server.final_keys):
        assert both(final_keys) == spec.fk()


def test_plain_messages_are_as_specified() -> None:
    client_dice, server_dice = Dice(b"client"), Dice(b"server")
    client = make_client(None, None, randomness=client_dice)
    server = make_server(sealed=False, randomness=server_dice)
    assert shake(client, server) == [
        b"bokbok1\n" + encode_packet(b"hello", b"client", b"plain", b""),
        b"bokbok1\n" + encode_packet(b"hello", b"server", b"plain", b""),
        encode_packet(b"open", b"", b"65536", b"10", options_with(*client_dice.given), b"", b""),
        encode_packet(b"accepted", b"1000000", b"20", options_with(*server_dice.given), b""),
    ]
    assert client.final_keys is server.final_keys is None
    assert server.user is None


@pytest.mark.parametrize("user", ["myuser", "é" * 127 + "x", "x"])
def test_both_sides_agree(user: str) -> None:
    client, server = make_client(user), make_server()
    shake(client, server)
    assert server.user == user
    assert client.peer_limits == SERVER_LIMITS
    assert server.peer_limits == CLIENT_LIMITS
    assert client.final_keys == server.final_keys


def test_keys_differ_by_direction_stage_and_connection() -> None:
    seen: list[bytes] = []
    for _ in range(2):
        client, server = make_client(), make_server()
        shake(client, server)
        for keys in (client.channel_keys(), client.final_keys):
            assert keys is not None
            seen += [keys.c2s, keys.s2c]
    assert len(set(seen)) == 8
    assert all(len(key) == 32 for key in seen)


def test_each_side_sends_with_what_the_other_receives_with() -> None:
    keys = DirectionKeys(b"c" * 32, b"s" * 32)
    assert keys.for_side("client") == {"send_key": b"c" * 32, "receive_key": b"s" * 32}
    assert keys.for_side("server") == {"send_key": b"s" * 32, "receive_key": b"c" * 32}


def test_the_hello_has_a_fresh_key_for_each_connection() -> None:
    assert make_client().hello != make_client().hello
    assert make_server().hello != make_server().hello


LONGEST_OPTIONS = {"a" * 32: bytes(MAX_OWN_OPTIONS_SIZE - 1 - 8 - 32)}
"""They leave room for the longest grease, and for no byte more."""


def longest_grease(size: int) -> bytes:
    return b"\10" * size


@pytest.mark.parametrize(
    ("user", "limits", "ours", "padding"),
    [
        ("x", Limits(4096, 1), {}, 361),
        ("x" * 255, Limits(2**32 - 1, 10**6), LONGEST_OPTIONS, 27),
        # Numbers of more than 32 bits may be declared by another implementation.
        ("x" * 255, Limits(10**18 - 1, 10**6), LONGEST_OPTIONS, 19),
    ],
)
def test_open_is_512_bytes_whatever_the_name_the_limits_and_the_options(
    user: str, limits: Limits, ours: dict[str, bytes], padding: int
) -> None:
    client = make_client(user, limits=limits, options=ours, randomness=longest_grease)
    server = make_server()
    messages = shake(client, server)
    fields = fields_of(messages[2])
    assert len(messages[2]) == OPEN_SIZE
    assert len(fields[4]) == (MAX_OPTIONS_SIZE if ours else 1 + 27)
    assert fields[5] == bytes(padding)
    assert server.peer_limits == limits


def test_a_stranger_costs_two_scalar_multiplications(monkeypatch: pytest.MonkeyPatch) -> None:
    client = make_client()
    calls: list[str] = []

    def spy(name: str) -> None:
        original = getattr(handshake, name)

        def call(*args: bytes) -> bytes:
            calls.append(name)
            result: bytes = original(*args)
            return result

        monkeypatch.setattr(handshake, name, call)

    spy("crypto_scalarmult")
    spy("crypto_scalarmult_base")
    server = make_server()
    server.receive_hello(client.hello)
    server.channel_keys()
    assert sorted(calls) == ["crypto_scalarmult", "crypto_scalarmult_base"]


# ---- who gets in ----


def test_any_key_of_a_sequence_fits() -> None:
    client, server = make_client(), make_server()
    shake(client, server, [OTHER, K])
    assert client.final_keys == server.final_keys is not None


@pytest.mark.parametrize(("place", "opens"), [(MAX_KEYS - 1, True), (MAX_KEYS, False)])
def test_no_more_than_max_keys_are_tried(*, place: int, opens: bool) -> None:
    client, server = make_client(), make_server()
    send_open(client, server)
    keys = [OTHER] * place + [K]
    if opens:
        client.receive_reply(server.accept(keys))
        assert client.final_keys == server.final_keys
    else:
        with pytest.raises(AuthenticationError):
            server.accept(keys)


def test_a_random_key_that_happens_to_fit_lets_nobody_in(monkeypatch: pytest.MonkeyPatch) -> None:
    client, server = make_client(), make_server()
    send_open(client, server)
    monkeypatch.setattr(handshake, "_NOBODYS_KEY", K)
    check_fails_to_accept(client, server, [])


def check_fails_to_accept(client: ClientHandshake, server: ServerHandshake, keys: Sequence[Key]) -> str:
    with pytest.raises(AuthenticationError) as caught:
        server.accept(keys)
    assert server.final_keys is client.final_keys is None
    return str(caught.value)


def test_a_node_that_serves_and_dials_can_be_led_to_itself_unless_services_have_names() -> None:
    """The key is that of all nodes, and somebody passes on to a node what it sends. See Selfie, 2019."""
    client, server = make_client(), make_server()
    shake(client, server)
    assert client.final_keys == server.final_keys is not None
    client, server = make_client(service="the other node"), make_server(service="this node")
    send_open(client, server)
    check_fails_to_accept(client, server, [K])


def test_a_service_mismatch_looks_like_a_wrong_key() -> None:
    errors = []
    for theirs, ours, keys in (("a", "b", [K]), ("", "b", [K]), ("a", "", [K]), ("a", "a", [OTHER])):
        client, server = make_client(service=theirs), make_server(service=ours)
        send_open(client, server)
        errors.append(check_fails_to_accept(client, server, keys))
    assert len(set(errors)) == 1


def test_the_service_is_never_sent() -> None:
    messages = shake(make_client(service="mailbox"), make_server(service="mailbox"))
    assert b"mailbox" not in b"".join(messages)


BAD_NAMES = [b"", b"x" * 256, b"\xff", b"e\xcc\x81", b"a\0b", b"a\nb"]


def send_open_as(name: bytes, client: ClientHandshake, server: ServerHandshake) -> None:
    """Have the client claim a name that it would refuse to claim by itself."""
    exchange_hello(client, server)
    client._user = name
    server.receive_open(client.open())


@pytest.mark.parametrize("name", BAD_NAMES)
def test_an_unusable_name_is_no_user(name: bytes) -> None:
    client, server = make_client(), make_server()
    send_open_as(name, client, server)
    assert server.user is None
    check_fails_to_accept(client, server, ())


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        (b"nobody", []),
        (b"a\0b", []),
        (b"myuser", [OTHER]),
        (b"myuser", [OTHER] * MAX_KEYS),
        (b"myuser", [OTHER] * (MAX_KEYS + 1)),
    ],
)
def test_whoever_does_not_get_in_takes_the_same_path(
    name: bytes, keys: list[Key], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which has as many tries, whoever it is: else the time would tell who has how many keys."""
    dice = Dice(b"server")
    client, server = make_client(), make_server(randomness=dice)
    send_open_as(name, client, server)
    drawn = len(dice.given)
    calls: list[tuple[object, ...]] = []
    hash_ = key_schedule.keyed_hash

    def spy_hash(size: int, key: bytes, label: bytes, data: bytes) -> bytes:
        calls.append(("hash", size, len(key), label, len(data)))
        return hash_(size, key, label, data)

    def spy_open(box: bytes, nonce: bytes, key: bytes) -> bytes:
        calls.append(("open", len(box), len(nonce), len(key)))
        return crypto_secretbox_open(box, nonce, key)

    monkeypatch.setattr(key_schedule, "keyed_hash", spy_hash)
    monkeypatch.setattr(handshake, "crypto_secretbox_open", spy_open)
    check_fails_to_accept(client, server, keys)
    assert calls == [("hash", 32, 32, b"bokbok1 box", 32), ("open", BOX_SIZE, 24, 32)] * MAX_KEYS
    assert len(dice.given) == drawn


# ---- hello ----

SEALED = [make_client, make_server]


def other_hello(side: ClientHandshake | ServerHandshake, public: bytes) -> bytes:
    return encode_hello("server" if side.side == "client" else "client", public)


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
    fields = fields_of(client.open())
    h1 = server._hash_open(fields[:-1])
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
    server._declared = (*SERVER_LIMITS.fields(), wrong)
    send_open(client, server)
    with pytest.raises(HandshakeError, match=told) as caught:
        client.receive_reply(server.accept([K]))
    assert caught.type is HandshakeError
    assert not client.peer_options
    assert client.final_keys is None


def test_bad_options_are_refused_in_mode_plain() -> None:
    client, server = make_plain()
    client._declared = (*CLIENT_LIMITS.fields(), b"")
    exchange_hello(client, server)
    with pytest.raises(HandshakeError, match="invalid options"):
        server.receive_open(client.open())


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
    """Whatever they are, and with grease of every size."""
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


# ---- attacks ----


def bits(message: bytes) -> range:
    return range(len(message) * 8)


@pytest.mark.parametrize("altered", ["client", "server"])
def test_no_changed_bit_of_a_hello_opens_a_connection(altered: str) -> None:
    client, server = make_client(), make_server()
    hellos = [client.hello, server.hello]
    for bit in bits(hellos[altered == "server"]):
        try:
            server.receive_hello(flip(hellos[0], bit) if altered == "client" else hellos[0])
            client.receive_hello(flip(hellos[1], bit) if altered == "server" else hellos[1])
            assert client.channel_keys() != server.channel_keys()
            server.receive_open(client.open())
            server.accept([K])
        except HandshakeError:
            assert server.final_keys is None
        else:
            raise AssertionError(bit)


def test_no_changed_bit_of_open_opens_a_connection() -> None:
    client, server = make_client(options={"a": b"value"}), make_server()
    exchange_hello(client, server)
    opening = client.open()
    for bit in bits(opening):
        with pytest.raises(HandshakeError):
            server.receive_open(flip(opening, bit))
            server.accept([K])
        assert server.final_keys is None
        assert not server.peer_options


def test_no_changed_bit_of_accepted_opens_a_connection() -> None:
    client, server = make_client(), make_server(options={"a": b"value"})
    send_open(client, server)
    accepted = server.accept([K])
    for bit in bits(accepted):
        with pytest.raises(HandshakeError):
            client.receive_reply(flip(accepted, bit))
        assert client.final_keys is None
        assert not client.peer_options


@settings(deadline=None)
@given(bit=st.integers(0, 255))
def test_changed_ephemeral_keys_give_channels_that_do_not_meet(bit: int) -> None:
    client, server = make_client(), make_server()
    server.receive_hello(client.hello)
    at = len(server.hello) * 8 - 256 + bit
    client.receive_hello(flip(server.hello, at))
    ours, theirs = client.channel_keys(), server.channel_keys()
    assert len({ours.c2s, ours.s2c, theirs.c2s, theirs.s2c}) == 4


def test_a_recorded_client_session_does_not_open_again() -> None:
    recorded = make_client()
    first = make_server()
    hello, _, opening, _ = shake(recorded, first)
    again = make_server()
    again.receive_hello(hello)
    assert again.channel_keys() != first.channel_keys()
    # Even if someone could say all of it again, inside the new channel:
    again.receive_open(opening)
    with pytest.raises(AuthenticationError):
        again.accept([K])


def test_a_recorded_server_session_does_not_open_again() -> None:
    first = make_client()
    _, hello, _, accepted = shake(first, make_server())
    again = make_client()
    again.receive_hello(hello)
    assert again.channel_keys() != first.channel_keys()
    again.open()
    with pytest.raises(AuthenticationError):
        again.receive_reply(accepted)


def test_someone_in_the_middle_without_the_key_cannot_pass_on_the_box() -> None:
    client, server = make_client(), make_server()
    fake_server, fake_client = make_server(), make_client(key=OTHER)
    exchange_hello(client, fake_server)
    exchange_hello(fake_client, server)
    server.receive_open(client.open())
    with pytest.raises(AuthenticationError):
        server.accept([K])


def test_a_box_for_one_user_opens_for_no_other_with_the_same_key() -> None:
    client, server = make_client("alice"), make_server()
    exchange_hello(client, server)
    fields = fields_of(client.open())
    fields[1] = b"carol"
    server.receive_open(encode_packet(*fields))
    assert server.user == "carol"
    with pytest.raises(AuthenticationError):
        server.accept([K])


def test_a_recording_stays_unreadable_to_who_has_the_key_later() -> None:
    client_dice, server_dice = Dice(b"client"), Dice(b"server")
    client, server = make_client(randomness=client_dice), make_server(randomness=server_dice)
    messages = shake(client, server)
    hs, fk = client.channel_keys(), client.final_keys
    assert fk is not None
    nonce = bytes(24)
    recording = [
        crypto_secretbox(messages[2], nonce, hs.c2s),
        crypto_secretbox(messages[3], nonce, hs.s2c),
        crypto_secretbox(b"request", nonce, fk.c2s),
        crypto_secretbox(b"answer", nonce, fk.s2c),
    ]

    def reads(spec: Schedule) -> list[bool]:
        """Which records open, for one who has all the messages and derives all four keys."""
        derived = spec.hs() + spec.fk()
        opened = []
        for number, box in enumerate(recording):
            try:
                crypto_secretbox_open(box, nonce, derived[32 * number : 32 * number + 32])
            except CryptoError:
                opened.append(False)
            else:
                opened.append(True)
        return opened

    # The attacker is given more than he has: the insides of the channel, which hold the session key.
    (ephemeral, _, session_key), (other_ephemeral, _) = client_dice.given, server_dice.given
    public_c, public_s = messages[0][-32:], messages[1][-32:]
    ee = crypto_scalarmult(ephemeral, public_s)
    spec = Schedule(messages=messages, key=K.raw, ee=ee, session_key=session_key)
    assert reads(spec) == [True] * 4
    assert spec.open_box()[:32] == session_key
    known = {K.raw, public_c, public_s, session_key, spec.h1, spec.h2(), spec.proof(), bytes(32), b""}
    known |= {
        crypto_scalarmult(scalar, public)
        for scalar in (K.raw, session_key)
        for public in (public_c, public_s)
    }
    known |= {spec_hash(32, K.raw, b"bokbok1 " + label, spec.h1) for label in (b"box", b"shake", b"server")}
    assert not known & {ee, ephemeral, other_ephemeral}
    for guess in known | {flip(ee, bit) for bit in range(256)}:
        assert reads(replace(spec, ee=guess)) == [False] * 4


# ---- nothing secret shows ----


def shown_forms(secret: bytes) -> list[str]:
    return [repr(secret)[2:-1], secret.hex(), secret.hex().upper(), str(list(secret))[1:-1]]


def test_nothing_secret_shows_in_a_repr_an_error_or_a_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    client_dice, server_dice = Dice(b"client"), Dice(b"server")
    client, server = make_client(randomness=client_dice), make_server(randomness=server_dice)
    shown: list[object] = []
    errors: list[BaseException] = []

    def fails(call: Callable[[Any], object], argument: object) -> None:
        with pytest.raises(HandshakeError) as caught:
            call(argument)
        shown.append("".join(traceback.format_exception(caught.value)))
        shown.append(caught.value)
        errors.append(caught.value)

    for hello in (b"", b"x", server.hello, other_hello(server, bytes(32)), flip(client.hello, 0)):
        fails(server.receive_hello, hello)
    for hello in (server.hello[:-1], client.hello, other_hello(client, client.hello[-32:])):
        fails(client.receive_hello, hello)
    exchange_hello(client, server)
    opening = client.open()
    for packet in (b"", opening[:-1], encode_packet(b"x"), flip(opening, 8 * 100)):
        fails(server.receive_open, packet)
    server.receive_open(opening)
    fails(server.accept, ())
    fails(server.accept, [OTHER])
    accepted = server.accept([K])
    for packet in (b"", encode_packet(b"x"), flip(accepted, 8 * 40), encode_refused("authentication", "no")):
        fails(client.receive_reply, packet)
    client.receive_reply(accepted)

    hs, fk = client.channel_keys(), client.final_keys
    assert fk is not None
    shown += [client, server, K, OTHER, hs, fk, [K], {"key": K}, client.peer_limits, server.peer_limits]
    shown += caplog.messages
    secrets = [K.raw, OTHER.raw, hs.c2s, hs.s2c, fk.c2s, fk.s2c, client._ee]
    # The random bytes of grease are sent in the clear of a plain connection, and are no secret.
    secrets += [drawn for drawn in client_dice.given + server_dice.given if len(drawn) != GREASE_DICE]
    assert all(len(secret) == 32 for secret in secrets)
    for error in errors:
        check_holds_no_secret(error, *secrets)
    for thing in shown:
        for text in (repr(thing), str(thing), f"{thing}"):
            for secret in secrets:
                assert not any(form in text for form in shown_forms(secret))
