"""The test vectors of the handshake."""

from __future__ import annotations

from collections.abc import Mapping

from nacl.bindings import crypto_scalarmult, crypto_secretbox

from bokbok_trio._keys import Key, encode_service, encode_user
from bokbok_trio._protocol.handshake import (
    MAGIC,
    encode_hello,
    encode_refused,
)
from bokbok_trio._protocol.key_schedule import (
    derive_box_key,
    hash_accepted,
    hash_hellos,
    hash_open,
    make_proof,
)
from bokbok_trio._protocol.packets import encode_packet

from .vector_parts import (
    BAD_OPTIONS,
    CLIENT_LIMITS,
    CLIENT_SECRET,
    KEY,
    OTHER_KEY,
    SERVER_LIMITS,
    SERVER_SECRET,
    SERVICE,
    SESSION_KEY,
    USER,
    Vectors,
    client_handshake,
    encoded_body,
    fields_of,
    flip,
    sealed_records,
    server_handshake,
)


def _client_declares() -> list[bytes]:
    """Return the two numbers and the options that the client declares."""
    return fields_of(client_handshake(None).open())[2:5]


def _hash_hellos() -> bytes:
    """Return ``h0``."""
    return hash_hellos(client_handshake().hello, server_handshake().hello)


def _shown(options: Mapping[str, bytes]) -> dict[str, str]:
    return {name: value.hex() for name, value in options.items()}


def sealed_handshakes() -> Vectors:
    client, server = client_handshake(), server_handshake()
    server.receive_hello(client.hello)
    client.receive_hello(server.hello)
    open = client.open()
    server.receive_open(open)
    accepted = server.accept([Key(KEY)])
    client.receive_reply(accepted)
    h0 = _hash_hellos()
    h1 = hash_open(h0, encode_service(SERVICE), encode_packet(*fields_of(open)[:6]))
    box = fields_of(open)[-1]
    head = encode_packet(*fields_of(accepted)[:4])
    h2 = hash_accepted(h1, box, head)
    hs, fk = client.channel_keys(), client.final_keys
    assert fk is not None
    assert fk == server.final_keys
    values = {
        "client_secret": CLIENT_SECRET,
        "server_secret": SERVER_SECRET,
        "C": client.hello,
        "S": server.hello,
        "ee": crypto_scalarmult(CLIENT_SECRET, server.hello[-32:]),
        "h0": h0,
        "hs": hs.c2s + hs.s2c,
        "O": encode_packet(*fields_of(open)[:6]),
        "h1": h1,
        "session_key": SESSION_KEY,
        "box_key": derive_box_key(Key(KEY), h1),
        "box": box,
        "open": open,
        "A": head,
        "h2": h2,
        "proof": make_proof(Key(KEY), h2),
        "accepted": accepted,
        "fk": fk.c2s + fk.s2c,
    }
    return {
        "user": USER,
        "key": KEY.hex(),
        "service": SERVICE,
        "client_limits": [CLIENT_LIMITS.max_message_size, CLIENT_LIMITS.max_requests],
        "server_limits": [SERVER_LIMITS.max_message_size, SERVER_LIMITS.max_requests],
        "client_options": _shown(server.peer_options),
        "server_options": _shown(client.peer_options),
        **{name: value.hex() for name, value in values.items()},
        "client_sends": client.hello.hex() + "".join(sealed_records((hs.c2s, [open]))),
        "server_sends": server.hello.hex() + "".join(sealed_records((hs.s2c, [accepted]))),
    }


def plain_handshakes() -> Vectors:
    client, server = client_handshake(None), server_handshake(sealed=False)
    open = client.open()
    server.receive_open(open)
    accepted = server.accept([])
    client.receive_reply(accepted)
    return {
        "client_limits": [CLIENT_LIMITS.max_message_size, CLIENT_LIMITS.max_requests],
        "server_limits": [SERVER_LIMITS.max_message_size, SERVER_LIMITS.max_requests],
        "client_options": _shown(server.peer_options),
        "server_options": _shown(client.peer_options),
        "C": client.hello.hex(),
        "S": server.hello.hex(),
        "open": open.hex(),
        "accepted": accepted.hex(),
        "client_sends": (client.hello + open).hex(),
        "server_sends": (server.hello + accepted).hex(),
    }


def bad_hellos() -> list[Vectors]:
    """Return hellos that a side must refuse. Its own secret is the one of the good handshake."""
    client, server = client_handshake().hello, server_handshake().hello
    plain = encode_hello("client", b"")
    own_key = encode_hello("client", server_handshake().hello[-32:])
    low_order = bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800")
    table: list[tuple[str, str, str, bytes]] = [
        ("server", "sealed", "another magic", b"bokbok2\n" + client[8:]),
        ("server", "sealed", "another protocol", b"GET / HTTP/1.1\r\n".ljust(78, b"\n")),
        ("server", "sealed", "its own hello", server),
        ("server", "sealed", "its own key", own_key),
        ("server", "sealed", "mode plain", plain),
        (
            "server",
            "sealed",
            "mode plain in 78 bytes",
            MAGIC + encode_packet(b"hello", b"client", b"plain", bytes(33)),
        ),
        ("server", "sealed", "a key of 31 bytes", encode_hello("client", bytes(range(31)))),
        ("server", "sealed", "a key of zeros", encode_hello("client", bytes(32))),
        ("server", "sealed", "a key of low order", encode_hello("client", low_order)),
        ("server", "plain", "mode sealed", client),
        ("server", "plain", "its own hello", encode_hello("server", b"")),
        ("client", "sealed", "its own hello", client),
        ("client", "sealed", "mode plain", encode_hello("server", b"")),
        ("client", "sealed", "its own key", encode_hello("server", client_handshake().hello[-32:])),
        ("client", "plain", "its own hello", plain),
        ("client", "plain", "mode sealed", server),
    ]
    return [{"to": to, "mode": mode, "name": name, "hello": hello.hex()} for to, mode, name, hello in table]


def _open(*head: bytes, key: bytes = KEY, service: str = SERVICE, pad: int = 0) -> str:
    """Make a sealed `open` of any first five fields with the right box for them, `pad` bytes too long."""
    size = 512 - len(encode_packet(*head, b"", bytes(80)))
    return _open_padded(*head, bytes(size + pad), key=key, service=service)


def _open_padded(*head: bytes, key: bytes = KEY, service: str = SERVICE) -> str:
    h1 = hash_open(_hash_hellos(), encode_service(service), encode_packet(*head))
    box = crypto_secretbox(SESSION_KEY + h1, h1[:24], derive_box_key(Key(key), h1))
    return encode_packet(*head, box).hex()


def bad_opens() -> list[Vectors]:
    user = encode_user(USER)
    size, count, options = _client_declares()
    good = [b"open", user, size, count, options]
    plain = [b"open", b"", size, count, options, b"", b""]
    pad = fields_of(bytes.fromhex(_open(*good)))[5]
    authentication = "authentication"
    table: list[tuple[str, str, str | None, str]] = [
        ("sealed", "another key", authentication, _open(*good, key=OTHER_KEY)),
        ("sealed", "another service", authentication, _open(*good, service="mail")),
        ("sealed", "a bit of the box changed", authentication, flip(bytes.fromhex(_open(*good))).hex()),
        ("sealed", "an unknown user", authentication, _open(b"open", b"zack", *good[2:])),
        ("sealed", "a user that is no name", authentication, _open(b"open", b"zo\xeb\n", *good[2:])),
        ("sealed", "no user", authentication, _open(b"open", b"", *good[2:])),
        ("sealed", "511 bytes", None, _open(*good, pad=-1)),
        ("sealed", "513 bytes", None, _open(*good, pad=1)),
        ("sealed", "a pad that is not zeros", None, _open_padded(*good, flip(pad))),
        ("sealed", "no box", None, encode_packet(*good, pad + bytes(80), b"").hex()),
        ("sealed", "another first field", None, _open(b"nope", *good[1:])),
        ("sealed", "six fields", None, encode_packet(*good, pad + bytes(84)).hex()),
        ("sealed", "without options", None, _open(*good[:4])),
        ("sealed", "messages of 4,095 bytes", None, _open(*good[:2], b"4095", count, options)),
        ("sealed", "no request at once", None, _open(*good[:3], b"0", options)),
        ("sealed", "1,000,001 requests at once", None, _open(*good[:3], b"1000001", options)),
        ("sealed", "a number with a leading zero", None, _open(*good[:3], b"0100", options)),
        ("plain", "a user", None, encode_packet(b"open", user, *plain[2:]).hex()),
        ("plain", "a pad", None, encode_packet(*plain[:5], b"\0", b"").hex()),
        ("plain", "a box", None, encode_packet(*plain[:6], bytes(80)).hex()),
        ("plain", "messages of 4,095 bytes", None, encode_packet(*plain[:2], b"4095", *plain[3:]).hex()),
        ("plain", "without options", None, encode_packet(*plain[:4], *plain[5:]).hex()),
    ]
    for name, bad in BAD_OPTIONS.items():
        told = f"options: {name}"
        table += [
            ("sealed", told, None, _open(*good[:4], bad)),
            ("plain", told, None, encode_packet(*plain[:4], bad, b"", b"").hex()),
        ]
    return [
        {"mode": mode, "name": name, "refused": refused, "open": packet}
        for mode, name, refused, packet in table
    ]


def bad_replies(sealed: Vectors) -> list[Vectors]:
    h1, box, accepted = (bytes.fromhex(sealed[name]) for name in ("h1", "box", "accepted"))

    def accept(*declared: bytes, key: bytes = KEY) -> bytes:
        head = (b"accepted", *declared)
        return encode_packet(*head, make_proof(Key(key), hash_accepted(h1, box, encode_packet(*head))))

    size, count, options, proof = fields_of(accepted)[1:]
    other_options = encoded_body(b"grease.f00e", b"")
    table: list[tuple[str, str, bool, bytes]] = [
        ("sealed", "another key", True, accept(size, count, options, key=OTHER_KEY)),
        ("sealed", "a bit of the proof changed", True, flip(accepted)),
        ("sealed", "a limit changed", True, encode_packet(b"accepted", b"65537", count, options, proof)),
        ("sealed", "an option changed", True, encode_packet(b"accepted", size, count, other_options, proof)),
        ("sealed", "no proof", True, encode_packet(b"accepted", size, count, options, b"")),
        ("sealed", "half a proof", True, encode_packet(b"accepted", size, count, options, proof[:16])),
        ("sealed", "refused", True, encode_refused("authentication", "authentication failed")),
        ("sealed", "messages of 4,095 bytes", False, accept(b"4095", count, options)),
        ("sealed", "no request at once", False, accept(size, b"0", options)),
        ("sealed", "without options", False, accept(size, count)),
        ("sealed", "four fields", False, encode_packet(b"accepted", size, count, options)),
        ("sealed", "a byte after the packet", False, accepted + b"\0"),
        ("sealed", "an unknown code", False, encode_packet(b"refused", b"perhaps", b"")),
        ("sealed", "a message of 257 bytes", False, encode_packet(b"refused", b"authentication", b"a" * 257)),
        ("plain", "a proof", False, accepted),
        ("plain", "refused", False, encode_refused("busy", "the server is busy")),
        ("plain", "without options", False, encode_packet(b"accepted", size, count, b"")),
    ]
    for name, bad in BAD_OPTIONS.items():
        told = f"options: {name}"
        table += [
            ("sealed", told, False, accept(size, count, bad)),
            ("plain", told, False, encode_packet(b"accepted", size, count, bad, b"")),
        ]
    return [
        {"mode": mode, "name": name, "authentication": authentication, "reply": packet.hex()}
        for mode, name, authentication, packet in table
    ]


def refusals(sealed: Vectors) -> list[Vectors]:
    """Return refusals: the packet, and its record on a sealed connection, where it is the first."""
    key = bytes.fromhex(sealed["hs"])[32:]
    reasons = [
        encode_refused("authentication", "authentication failed"),
        encode_refused("busy", "the server is busy"),
        encode_refused("stopping", "the server is stopping"),
    ]
    return [{"packet": packet.hex(), "record": sealed_records((key, [packet]))[0]} for packet in reasons]
