"""The messages and keys of a handshake as specified, and the clients that it authenticates."""

from __future__ import annotations

import pytest
from nacl.bindings import crypto_scalarmult, crypto_scalarmult_base, crypto_secretbox_open

from bokbok_trio import AuthenticationError, Key
from bokbok_trio._keys import MAX_KEYS
from bokbok_trio._protocol import handshake, key_schedule
from bokbok_trio._protocol.handshake import BOX_SIZE, OPEN_SIZE, ClientHandshake, ServerHandshake
from bokbok_trio._protocol.key_schedule import DirectionKeys
from bokbok_trio._protocol.limits import Limits
from bokbok_trio._protocol.options import MAX_OPTIONS_SIZE, MAX_OWN_OPTIONS_SIZE
from bokbok_trio._protocol.packets import encode_packet
from tests.support.handshakes import (
    CLIENT_LIMITS,
    OTHER,
    SERVER_LIMITS,
    Dice,
    K,
    Schedule,
    both,
    check_fails_to_accept,
    exchange_hello,
    fields_of,
    make_client,
    make_server,
    open_as,
    options_with,
    send_open,
    shake,
)
from tests.support.inside import draw_as_nobodys_key

# ---- the key schedule, made from the specification alone ----


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
    draw_as_nobodys_key(monkeypatch, K)
    check_fails_to_accept(client, server, [])


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
    """Make the client claim a name that it would refuse to send."""
    exchange_hello(client, server)
    server.receive_open(open_as(name, client, server.hello))


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
    """Each takes as many tries. Otherwise the time would tell how many keys a user has."""
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
