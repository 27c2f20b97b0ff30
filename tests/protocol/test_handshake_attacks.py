"""Attacks on handshakes, and the secrecy of their keys."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from nacl.bindings import crypto_scalarmult, crypto_secretbox, crypto_secretbox_open
from nacl.exceptions import CryptoError

from bokbok_trio import AuthenticationError, HandshakeError
from bokbok_trio._protocol.handshake import EPHEMERAL_SIZE, encode_refused
from bokbok_trio._protocol.options import GREASE_DICE
from bokbok_trio._protocol.packets import encode_packet
from tests.support.handshakes import (
    OTHER,
    Dice,
    K,
    Schedule,
    bits,
    exchange_hello,
    fields_of,
    flip,
    make_client,
    make_server,
    other_hello,
    send_open,
    shake,
    spec_hash,
)

from ..support.helpers import check_holds_no_secret

# ---- attacks ----


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
        """Return the records that open for an attacker with all messages, who derives all four keys."""
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
    ee = crypto_scalarmult(client_dice.given[0], server.hello[-EPHEMERAL_SIZE:])
    secrets = [K.raw, OTHER.raw, hs.c2s, hs.s2c, fk.c2s, fk.s2c, ee]
    # The random bytes of grease are sent in the clear of a plain connection, and are no secret.
    secrets += [drawn for drawn in client_dice.given + server_dice.given if len(drawn) != GREASE_DICE]
    assert all(len(secret) == 32 for secret in secrets)
    for error in errors:
        check_holds_no_secret(error, *secrets)
    for thing in shown:
        for text in (repr(thing), str(thing), f"{thing}"):
            for secret in secrets:
                assert not any(form in text for form in shown_forms(secret))
