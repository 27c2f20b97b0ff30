"""Makes ``tests/support/vectors.json``, the test vectors of ``docs/protocol.rst``.

``python -m tests.support.make_vectors`` writes the same bytes each time: all random values are fixed here.
The package makes the handshakes, records and keys; what a server replies to packets of an open connection
comes from the second implementation, so ``test_engine_vectors.py`` compares the engine with both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import trio
import trio.testing
from nacl.bindings import crypto_secretbox

from bokbok_trio._keys import ARGON2ID_MEMORY, ARGON2ID_PASSES, Key, encode_user, passphrase_to_key
from bokbok_trio._protocol.handshake import (
    MAGIC,
    ClientHandshake,
    ServerHandshake,
    encode_hello,
    encode_refused,
)
from bokbok_trio._protocol.key_schedule import derive_box_key, hash_accepted, keyed_hash, make_proof
from bokbok_trio._protocol.limits import Limits
from bokbok_trio._protocol.packets import decode_body, encode_body, encode_number, encode_packet
from bokbok_trio._stream.secretbox import SecretboxStream

from . import second_implementation as second

Vectors: TypeAlias = dict[str, Any]

PATH = Path(__file__).with_name("vectors.json")

KEY = bytes(range(32))
OTHER_KEY = bytes(range(1, 33))
SESSION_KEY = bytes(range(0x40, 0x60))
# The secrets of RFC 7748, section 6.1, which also gives their shared secret.
CLIENT_SECRET = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
SERVER_SECRET = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
USER = "zoë"
SERVICE = "maps"
CLIENT_LIMITS = Limits(4194304, 100)
SERVER_LIMITS = Limits(65536, 7)
CLIENT_OPTIONS = {"example/1": b"\1"}
# Each handshake draws these random bytes in this order: the X25519 secret (mode sealed), then the 11 bytes of
# grease (two for the four hex digits of its name, one for its length modulo 9, eight for its value), then on
# the client the session key (mode sealed).
CLIENT_GREASE = bytes.fromhex("0a1b0cc0c1c2c3c4c5c6c7")  # a length of 12 modulo 9
SERVER_GREASE = bytes.fromhex("f00d00d0d1d2d3d4d5d6d7")
OPEN_LIMITS = Limits(2**20, 5)
OPEN_CREDIT = 140


def _packet(*fields: bytes, body: Sequence[bytes] | None = None) -> bytes:
    if body is None:
        return encode_packet(*fields)
    chunks, size = encode_body(body, 2**32)
    return encode_packet(*fields, body_size=size) + b"".join(chunks)


def _flip(data: bytes) -> bytes:
    """Change the last bit."""
    return data[:-1] + bytes((data[-1] ^ 1,))


def _client(key: bytes | None = KEY, service: str = SERVICE) -> ClientHandshake:
    random = iter([CLIENT_GREASE] if key is None else [CLIENT_SECRET, CLIENT_GREASE, SESSION_KEY])
    return ClientHandshake(
        user=None if key is None else USER,
        key=None if key is None else Key(key),
        service="" if key is None else service,
        limits=CLIENT_LIMITS,
        options=CLIENT_OPTIONS,
        randomness=lambda _: next(random),
    )


def _server(*, sealed: bool = True) -> ServerHandshake:
    random = iter([SERVER_SECRET, SERVER_GREASE] if sealed else [SERVER_GREASE])
    return ServerHandshake(
        sealed=sealed,
        service=SERVICE if sealed else "",
        limits=SERVER_LIMITS,
        randomness=lambda _: next(random),
    )


def _records(*steps: tuple[bytes, Sequence[bytes]]) -> list[str]:
    """Seal each plaintext as a stream does, under each key in turn; an empty one gives the end record."""

    async def run() -> list[str]:
        sent = []
        ours, theirs = trio.testing.memory_stream_pair()
        stream = SecretboxStream(ours, send_key=steps[0][0], receive_key=KEY)
        for key, plaintexts in steps:
            if key != steps[0][0]:
                stream.rekey(send_key=key, receive_key=KEY)
            for plaintext in plaintexts:
                await (stream.send_all(plaintext) if plaintext else stream.send_eof())
                sent.append((await theirs.receive_some()).hex())
        return sent

    return trio.run(run)


# ---- packets, numbers, user names ----


def _packets() -> Vectors:
    good = {
        "no fields": [],
        "one empty field": [b""],
        "two fields": [b"ping", b"12345"],
        "bytes of any value": [bytes((0, 255, 10)), b"", "ë".encode()],
        "255 fields": [b""] * 255,
    }
    bad = {
        "no count": "00000000",
        "a count and no field": "0000000101",
        "a field's size cut short": "0000000401000000",
        "a field larger than the packet": "000000060100000002" + "61",
        "a field of 4 GiB - 1": "0000000501ffffffff",
        "a byte after the last field": "00000007010000000161" + "62",
        "fewer fields than counted": "0000000602" + "0000000161",
        "a length over the limit, nothing else": "00001001",
    }
    return {
        "good": [
            {
                "name": name,
                "fields": [field.hex() for field in fields],
                "packet": encode_packet(*fields).hex(),
            }
            for name, fields in good.items()
        ],
        "bad": [{"name": name, "limit": 4096, "packet": packet} for name, packet in bad.items()],
    }


def _numbers() -> Vectors:
    bad = [b"", b"00", b"01", b"+7", b"-1", b"1_0", b" 7", b"7 ", b"7\n", b"1.0", b"1e3", b"0x7", b"7\0"]
    bad += [b"1000000000000000000", "\u0667".encode()]
    return {
        "good": [
            {"number": number, "field": encode_number(number).hex()}
            for number in (0, 7, 10, 4194304, 10**18 - 1)
        ],
        "bad": [field.hex() for field in bad],
    }


def _users() -> Vectors:
    bad = {
        "empty": b"",
        "256 bytes": b"a" * 256,
        "not in normal form C": "zoe\u0308".encode(),
        "a zero": b"a\0b",
        "a line feed": b"a\n",
        "a control character over U+007F": "a\u0085".encode(),
        "not UTF-8": b"zo\xeb",
        "a surrogate": b"\xed\xa0\x80",
        "an overlong form": b"\xc0\xaf",
    }
    return {
        "good": [
            {"user": user, "field": encode_user(user).hex()}
            for user in ("a", USER, "two words", "\u65e5\u672c", "\u00e9" * 127 + "x")
        ],
        "bad": [{"name": name, "field": field.hex()} for name, field in bad.items()],
    }


def _body(*fields: bytes) -> bytes:
    return encode_packet(*fields)[4:]


BAD_OPTIONS = {
    "empty": b"",
    "a name without a value": _body(b"a", b"", b"b"),
    "a name twice": _body(b"a", b"1", b"a", b"2"),
    "an empty name": _body(b"", b""),
    "a name of 33 bytes": _body(b"a" * 33, b""),
    "a capital letter": _body(b"A", b""),
    "an underscore": _body(b"a_b", b""),
    "a space": _body(b"a b", b""),
    "a line feed after a name": _body(b"a\n", b""),
    "a letter that is not ASCII": _body("ë".encode(), b""),
    "97 bytes": _body(b"a", bytes(87)),
    "a byte after the last field": _body(b"a", b"") + b"\0",
    "a value cut short": _body(b"a", b"12")[:-1],
}
BAD_CONTEXTS = {
    "a body without fields": _body(),
    "a name without a value": _body(b"a", b"", b"b"),
    "a name twice": _body(b"a", b"1", b"a", b"2"),
    "an empty name": _body(b"", b""),
    "a name of 65 bytes": _body(b"a" * 65, b""),
    "a capital letter": _body(b"A", b""),
    "a slash": _body(b"a/b", b""),
    "a letter that is not ASCII": _body("ë".encode(), b""),
    "33 pairs": _body(*(field for at in range(33) for field in (b"%d" % at, b""))),
    "8,193 bytes": _body(b"a", bytes(8193 - 10)),
    "a byte after the last field": _body(b"a", b"") + b"\0",
    "a value cut short": _body(b"a", b"12")[:-1],
}


def _options() -> Vectors:
    good = {
        "none": {},
        "one": {b"grease.c0de": b"\0\377"},
        "an empty value": {b"a": b""},
        "names of every kind of character": {b"bokbok/0.9-z": b"1", b"/": b"", b"-.": b""},
        "a name of 32 bytes": {b"a" * 32: b"1"},
        "96 bytes": {b"a": bytes(86)},
    }
    return {
        "good": [
            {
                "name": name,
                "options": {each.decode(): value.hex() for each, value in options.items()},
                "body": second.flat(options).hex(),
            }
            for name, options in good.items()
        ],
        "bad": [{"name": name, "body": body.hex()} for name, body in BAD_OPTIONS.items()],
    }


# ---- the handshake ----


def _declared(handshake: ClientHandshake | ServerHandshake) -> list[bytes]:
    """Return the declaration of a side: its two numbers, and its options."""
    return list(handshake._declared)


def _shown(options: Mapping[str, bytes]) -> dict[str, str]:
    return {name: value.hex() for name, value in options.items()}


def _sealed() -> Vectors:
    client, server = _client(), _server()
    server.receive_hello(client.hello)
    client.receive_hello(server.hello)
    open = client.open()
    server.receive_open(open)
    accepted = server.accept([Key(KEY)])
    client.receive_reply(accepted)
    h1, box = client._h1, client._box
    head = encode_packet(b"accepted", *_declared(server))
    h2 = hash_accepted(h1, box, head)
    hs, fk = client.channel_keys(), client.final_keys
    assert fk is not None
    assert fk == server.final_keys
    values = {
        "client_secret": CLIENT_SECRET,
        "server_secret": SERVER_SECRET,
        "C": client.hello,
        "S": server.hello,
        "ee": client._ee,
        "h0": client._h0,
        "hs": hs.c2s + hs.s2c,
        "O": encode_packet(*_fields(open)[:6]),
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
        "client_sends": client.hello.hex() + "".join(_records((hs.c2s, [open]))),
        "server_sends": server.hello.hex() + "".join(_records((hs.s2c, [accepted]))),
    }


def _fields(packet: bytes) -> list[bytes]:
    return decode_body(packet[4:])


def _plain() -> Vectors:
    client, server = _client(None), _server(sealed=False)
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


def _bad_hellos() -> list[Vectors]:
    """Return hellos that a side must refuse. Its own secret is the one of the good handshake."""
    client, server = _client().hello, _server().hello
    plain = encode_hello("client", b"")
    own_key = encode_hello("client", _server()._public)
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
        ("client", "sealed", "its own key", encode_hello("server", _client()._public)),
        ("client", "plain", "its own hello", plain),
        ("client", "plain", "mode sealed", server),
    ]
    return [{"to": to, "mode": mode, "name": name, "hello": hello.hex()} for to, mode, name, hello in table]


def _open(*head: bytes, key: bytes = KEY, service: str = SERVICE, pad: int = 0) -> str:
    """Make a sealed `open` of any first five fields with the right box for them, `pad` bytes too long."""
    size = 512 - len(encode_packet(*head, b"", bytes(80)))
    return _open_padded(*head, bytes(size + pad), key=key, service=service)


def _open_padded(*head: bytes, key: bytes = KEY, service: str = SERVICE) -> str:
    client = _client(key, service)
    client.receive_hello(_server().hello)
    h1 = client._hash_open(head)
    box = crypto_secretbox(SESSION_KEY + h1, h1[:24], derive_box_key(Key(key), h1))
    return encode_packet(*head, box).hex()


def _bad_opens() -> list[Vectors]:
    user = encode_user(USER)
    size, count, options = _declared(_client())
    good = [b"open", user, size, count, options]
    plain = [b"open", b"", size, count, options, b"", b""]
    pad = _fields(bytes.fromhex(_open(*good)))[5]
    authentication = "authentication"
    table: list[tuple[str, str, str | None, str]] = [
        ("sealed", "another key", authentication, _open(*good, key=OTHER_KEY)),
        ("sealed", "another service", authentication, _open(*good, service="mail")),
        ("sealed", "a bit of the box changed", authentication, _flip(bytes.fromhex(_open(*good))).hex()),
        ("sealed", "an unknown user", authentication, _open(b"open", b"zack", *good[2:])),
        ("sealed", "a user that is no name", authentication, _open(b"open", b"zo\xeb\n", *good[2:])),
        ("sealed", "no user", authentication, _open(b"open", b"", *good[2:])),
        ("sealed", "511 bytes", None, _open(*good, pad=-1)),
        ("sealed", "513 bytes", None, _open(*good, pad=1)),
        ("sealed", "a pad that is not zeros", None, _open_padded(*good, _flip(pad))),
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


def _bad_replies(sealed: Vectors) -> list[Vectors]:
    h1, box, accepted = (bytes.fromhex(sealed[name]) for name in ("h1", "box", "accepted"))

    def accept(*declared: bytes, key: bytes = KEY) -> bytes:
        head = (b"accepted", *declared)
        return encode_packet(*head, make_proof(Key(key), hash_accepted(h1, box, encode_packet(*head))))

    size, count, options = _declared(_server())
    proof = _fields(accepted)[4]
    other_options = _body(b"grease.f00e", b"")
    table: list[tuple[str, str, bool, bytes]] = [
        ("sealed", "another key", True, accept(size, count, options, key=OTHER_KEY)),
        ("sealed", "a bit of the proof changed", True, _flip(accepted)),
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


def _refused(sealed: Vectors) -> list[Vectors]:
    """Refusals: the packet, and the record it is on a sealed connection, where it is the first."""
    key = bytes.fromhex(sealed["hs"])[32:]
    reasons = [
        encode_refused("authentication", "authentication failed"),
        encode_refused("busy", "the server is busy"),
        encode_refused("stopping", "the server is stopping"),
    ]
    return [{"packet": packet.hex(), "record": _records((key, [packet]))[0]} for packet in reasons]


# ---- records ----


def _record_vectors() -> Vectors:
    first, second = keyed_hash(32, b"", b"first", b""), keyed_hash(32, b"", b"second", b"")
    texts: list[tuple[bytes, list[bytes]]] = [(first, [b"a", b"bcd" * 20]), (second, [b"e", b"f", b""])]
    a = _records((first, [b"a", b"b", b""]))
    return {
        "stream": [
            {"key": key.hex(), "plaintexts": [text.hex() for text in plaintexts]} for key, plaintexts in texts
        ],
        "records": _records(*texts),
        "bad": [
            {"name": name, "key": first.hex(), "record": record}
            for name, record in {
                "a bit changed": _flip(bytes.fromhex(a[0])).hex(),
                "the second record, as the first": a[1],
                "the end record of another place": a[2],
                "under another key": _records((second, [b"a"]))[0],
                "a length of 15": "000f" + "00" * 15,
                "a length of 0": "0000",
            }.items()
        ],
    }


# ---- an open connection ----


def _req(id: int, *body: bytes, timeout: bytes = b"", depth: bytes = b"", context: bytes = b"") -> bytes:
    return _packet(b"req", encode_number(id), timeout, depth, context, body=body)


def _chan(
    id: int,
    *body: bytes,
    credit: bytes = b"0",
    timeout: bytes = b"",
    depth: bytes = b"",
    context: bytes = b"",
) -> bytes:
    return _packet(b"chan", encode_number(id), timeout, depth, context, credit, body=body)


def _part(number: int, remaining: int, piece: bytes) -> bytes:
    return encode_packet(b"part", encode_number(number), encode_number(remaining), piece)


def _connection_packets() -> Vectors:
    """Return packets that a client may send first on an open connection, and some that it must not."""
    trace = _body(b"trace-id", b"4bf92f3577b34da6", b"lang", b"eo")
    longest = _body(b"a", bytes(8192 - 10))
    most = _body(*(field for at in range(32) for field in (b"a.b-c_%d" % at, b"")))
    good = {
        "req": _req(0, b"ping", b"12345"),
        "req with a timeout of 1.5 s": _req(2, b"ping", b"12345", timeout=b"1500000"),
        "req with a timeout that has passed": _req(4, timeout=b"0"),
        "req with the longest timeout": _req(4, timeout=b"9" * 18),
        "req with no fields": _req(999999999999999998),
        "req of depth 1": _req(4, b"again?", depth=b"1"),
        "req of depth 15, with a context": _req(4, b"ping", depth=b"15", context=trace),
        "req with a context of one empty value": _req(4, context=_body(b"a" * 64, b"")),
        "req with the longest context": _req(4, context=longest),
        "req with the most pairs in its context": _req(4, context=most),
        "cancel": _of(b"cancel 0"),
        "ok": _packet(b"ok", b"1", body=[b"pong", b"12345"]),
        "err": encode_packet(b"err", b"3", b"unknown-request", b"no such request", b""),
        "err with details": encode_packet(b"err", b"3", b"no-room", b"the disk is full", b"\0\xff"),
        "err with the longest details": encode_packet(b"err", b"3", b"no-room", b"", bytes(16_384)),
        "part": _part(0, 3, b"abc"),
        "drop": _of(b"drop 0"),
        "ping": _of(b"ping"),
        "pong": _of(b"pong"),
        "bye": _of(b"bye"),
        "bye-ok": _of(b"bye-ok"),
        "chan with a timeout of 1.5 s": _chan(4, b"log", timeout=b"1500000", credit=b"262144"),
        "chan with no credit": _chan(6),
        "chan with the most credit": _chan(6, credit=b"4294967295"),
        "chan of depth 2, with a context": _chan(6, b"log", depth=b"2", context=trace, credit=b"100"),
        "item": _packet(b"item", b"5", body=[b"line", b"12345"]),
        "item with no fields": _packet(b"item", b"5", body=[]),
        "credit": encode_packet(b"credit", b"5", b"1000"),
        "credit of nothing": encode_packet(b"credit", b"5", b"0"),
        "end": _of(b"end 5"),
        "abort": encode_packet(b"abort", b"protocol", b"`item` without credit"),
        "abort with the longest text": encode_packet(b"abort", b"protocol", b"a" * 256),
    }
    size = OPEN_LIMITS.max_message_size
    bad = {
        "no fields": encode_packet(),
        "an unknown first field": encode_packet(b"hello"),
        "66,561 bytes that are not in pieces, only the length of them": bytes.fromhex("00010401"),
        "req of five fields": encode_packet(b"req", b"0", b"", b"", _body()),
        "req with an id of the server's": _req(1),
        "req with an invalid id": _packet(b"req", b"00", b"", b"", b"", body=[]),
        "req with an invalid timeout": _req(0, timeout=b"1.5"),
        "req with a timeout of 19 digits": _req(0, timeout=b"1" + b"0" * 18),
        "req with an invalid body": encode_packet(b"req", b"0", b"", b"", b"", b""),
        "ok to nothing": _packet(b"ok", b"1", body=[]),
        "err to nothing": encode_packet(b"err", b"1", b"handler-error", b"", b""),
        "err of four fields": encode_packet(b"err", b"1", b"handler-error", b""),
        "cancel with an id of the server's": _of(b"cancel 1"),
        "cancel of three fields": encode_packet(b"cancel", b"0", b""),
        "part of three fields": encode_packet(b"part", b"0", b"3"),
        "part with an invalid number": encode_packet(b"part", b"", b"3", b"abc"),
        "part with an invalid left": encode_packet(b"part", b"0", b"-3", b"abc"),
        "part with an empty piece": _part(0, 3, b""),
        "part with an empty piece and nothing left": _part(0, 0, b""),
        "part of a packet one byte over the limit": _part(0, size - 2, b"abc"),
        "part of a packet far over the limit": _part(0, 10**18 - 1, b"abc"),
        "part, the only one, of no body": _part(0, 0, b"\1"),
        "part, the only one, of no fields": _part(0, 0, _body()),
        "drop of nothing": _of(b"drop 0"),
        "drop of three fields": encode_packet(b"drop", b"0", b""),
        "ping of two fields": encode_packet(b"ping", b"12345"),
        "pong of two fields": encode_packet(b"pong", b"12345"),
        "bye of two fields": encode_packet(b"bye", b""),
        "bye-ok without bye": _of(b"bye-ok"),
        "chan of six fields": encode_packet(b"chan", b"0", b"", b"", b"", _body()),
        "chan with an id of the server's": _chan(1),
        "chan with an invalid id": _packet(b"chan", b"00", b"", b"", b"", b"0", body=[]),
        "chan with an invalid timeout": _chan(0, timeout=b"1.5"),
        "chan with an invalid credit": _chan(0, credit=b""),
        "chan with more than the most credit": _chan(0, credit=b"4294967296"),
        "chan with an invalid body": encode_packet(b"chan", b"0", b"", b"", b"", b"0", b""),
        "chan of depth 16": _chan(0, depth=b"16"),
        "abort of two fields": encode_packet(b"abort", b"protocol"),
        "abort with a code that is not UTF-8": encode_packet(b"abort", b"\xff", b""),
        "abort with a text that is not UTF-8": encode_packet(b"abort", b"protocol", b"\xff"),
        "abort with a text of 257 bytes": encode_packet(b"abort", b"protocol", b"a" * 257),
        **{
            f"req with the depth {depth.decode()}": _req(0, depth=depth)
            for depth in (b"0", b"16", b"01", b"-1", b"+1", b"1.0", b" 1", b"1" + b"0" * 17)
        },
        **{f"req with a context: {name}": _req(0, context=context) for name, context in BAD_CONTEXTS.items()},
        "chan with a context: a name twice": _chan(0, context=BAD_CONTEXTS["a name twice"]),
        "item of two fields": encode_packet(b"item", b"0"),
        "item with an invalid id": _packet(b"item", b"-1", body=[]),
        "item of nothing in flight, with an invalid body": encode_packet(b"item", b"0", b"\1"),
        "credit of two fields": encode_packet(b"credit", b"0"),
        "credit with an invalid id": encode_packet(b"credit", b"", b"5"),
        "credit of nothing in flight, with an invalid number of bytes": encode_packet(b"credit", b"0", b"05"),
        "end of three fields": encode_packet(b"end", b"0", b""),
        "end with an invalid id": encode_packet(b"end", b"01"),
    }
    return {
        "max_message_size": OPEN_LIMITS.max_message_size,
        "max_requests": OPEN_LIMITS.max_requests,
        "credit": OPEN_CREDIT,
        "good": [
            {"name": name, "fields": [field.hex() for field in _fields(packet)], "packet": packet.hex()}
            for name, packet in good.items()
        ],
        "bad": [{"name": name, "packet": packet.hex()} for name, packet in bad.items()],
    }


def _pieces(number: int, packet: bytes, *sizes: int) -> list[bytes]:
    """Cut a packet into pieces of these sizes, and a last piece with the remaining bytes."""
    parts = []
    rest = packet[4:]
    for size in (*sizes, len(rest) - sum(sizes)):
        piece, rest = rest[:size], rest[size:]
        parts.append(_part(number, len(rest), piece))
    return parts


Sequences: TypeAlias = dict[str, tuple[bool, list[bytes]]]


def _item(id: bytes, size: int) -> bytes:
    """Make an item of one field, or of none, that uses up so much credit: at least 65."""
    return _packet(b"item", id, body=[b"a" * (size - 64 - 5)] if size > 65 else [])


def _channel_sequences() -> tuple[Sequences, Sequences]:
    """Return sequences for the client's channel 0, with a credit of 140, and for the server's channel 1."""
    chan, request = _chan(0, b"log", credit=b"100"), _req(0)
    most = _chan(0, credit=b"4294967295")
    tenth = _chan(10)
    five = [_chan(id) for id in range(0, 10, 2)]
    large, small, end, cancel = _item(b"0", 300), _item(b"0", 65), _of(b"end 0"), _of(b"cancel 0")
    a1, a2, a3 = _pieces(0, large, 10, 100)
    ok = _packet(b"ok", b"1", body=[])
    good: Sequences = {
        "a channel": (False, [chan]),
        "a channel in pieces": (False, _pieces(0, chan, 5)),
        "a channel and a cancel": (False, [chan, cancel]),
        "credit after cancel": (False, [chan, cancel, _of(b"credit 0 5")]),
        "an item for all of the credit": (False, [chan, _item(b"0", 140)]),
        "an item of no fields for the last byte of it": (False, [chan, _item(b"0", 139), small]),
        "an item that starts with one byte of it": (False, [chan, _item(b"0", 139), large]),
        "three items of no fields, for 195 of 140 bytes": (False, [chan, small, small, small]),
        "an item in three pieces, then the end": (False, [chan, a1, a2, a3, end]),
        "an item of another channel between pieces": (False, [chan, a1, _item(b"1", 79), a2, a3]),
        "a dropped item takes no credit": (False, [chan, a1, a2, _of(b"drop 0"), small, large]),
        "items, credit and the end of a channel of the server's": (
            False,
            [_item(b"1", 99), _of(b"credit 1 5"), _item(b"1", 65), _of(b"end 1"), _of(b"credit 1 5")],
        ),
        "credit of nothing": (False, [most, _of(b"credit 0 0")]),
        "the most credit": (False, [_of(b"credit 1 1"), _of(b"credit 1 4294967294")]),
        "item, credit and ends of a channel that never was": (
            False,
            [_item(b"6", 65), _of(b"credit 6 5"), _of(b"end 6"), _of(b"end 6"), _item(b"6", 65)],
        ),
        "the same, with an id of the server's": (
            False,
            [_item(b"7", 65), _of(b"credit 7 5"), _of(b"end 7"), _of(b"end 7"), _item(b"7", 65)],
        ),
        "the same, after the answer": (
            False,
            [ok, _item(b"1", 65), _of(b"credit 1 5"), _of(b"end 1"), _of(b"end 1"), _item(b"1", 65)],
        ),
        "more credit than may be, for a channel that never was": (False, [_of(b"credit 6 4294967296")]),
        "an item, before its channel has wholly come": (False, [*_pieces(0, chan, 5)[:1], small]),
        "an item and the end after bye": (False, [chan, _of(b"bye"), small, end]),
        "item, credit and end after bye-ok": (
            True,
            [_of(b"bye-ok"), _item(b"1", 79), _of(b"credit 1 5"), _of(b"end 1")],
        ),
        "a channel that crosses bye, and bye-ok": (True, [chan, _of(b"bye-ok")]),
        "a channel of depth 1 after bye-ok": (True, [_of(b"bye-ok"), _chan(0, b"log", depth=b"1"), small]),
        "all slots for channels, and all for requests": (
            False,
            [*five, *(_req(id) for id in range(10, 20, 2))],
        ),
        "all slots for channels of two depths": (
            False,
            [*five, *(_chan(id, depth=b"1") for id in range(10, 20, 2))],
        ),
    }
    bad: Sequences = {
        "a channel in flight": (False, [chan, chan]),
        "a channel with the id of a request in flight": (False, [request, chan]),
        "a request with the id of a channel in flight": (False, [chan, request]),
        "one channel too many": (False, [*five, tenth]),
        "one channel of depth 15 too many": (
            False,
            [*(_chan(id, depth=b"15") for id in range(0, 12, 2))],
        ),
        "a channel after bye-ok": (True, [_of(b"bye-ok"), chan]),
        "an item before any credit": (True, [chan, small]),
        "an item with a credit of 0": (False, [chan, _item(b"0", 140), small]),
        "a fourth item of no fields, with 140 bytes": (False, [chan, small, small, small, small]),
        "an item with a credit below 0": (False, [chan, large, small]),
        "an item with a credit below 0, in pieces": (False, [chan, large, *_pieces(0, small, 5)]),
        "an item after the end": (False, [chan, end, small]),
        "an item after the end, of a channel of the server's": (False, [_of(b"end 1"), _item(b"1", 65)]),
        "the last piece of an item after the end": (False, [chan, a1, a2, end, a3]),
        "an item after cancel, with a credit below 0": (False, [chan, large, cancel, small]),
        "a second end": (False, [chan, end, end]),
        "a second end, of a channel of the server's": (False, [_of(b"end 1"), _of(b"end 1")]),
        "an item for a request": (False, [request, small]),
        "credit for a request": (False, [request, _of(b"credit 0 5")]),
        "the end of a request": (False, [request, end]),
        "an item for a request of the server's": (False, [_item(b"3", 65)]),
        "credit for a request of the server's": (False, [_of(b"credit 3 5")]),
        "the end of a request of the server's": (False, [_of(b"end 3")]),
        "more credit than may be": (False, [_of(b"credit 1 4294967296")]),
        "more credit than may be, in all": (False, [_of(b"credit 1 4294967295"), _of(b"credit 1 1")]),
        "more credit than may be, with that of chan": (False, [most, _of(b"credit 0 1")]),
        "end in pieces": (False, [chan, *_pieces(0, end, 5)]),
        "credit in pieces": (False, [chan, *_pieces(0, _of(b"credit 0 5"), 5)]),
    }
    return good, bad


def _of(words: bytes) -> bytes:
    """Make a packet of these fields."""
    return encode_packet(*words.split())


def _sequences() -> Vectors:
    """Return packets of a client whose meaning depends on those before; True: the server has said `bye`."""
    channels_good, channels_bad = _channel_sequences()
    first, other = _req(0, b"ping", b"12345"), _req(2, b"a" * 30, timeout=b"1500000")
    nested = _req(4, b"again?", depth=b"1")
    a1, a2, a3 = _pieces(0, first, 10, 20)
    b1, b2 = _pieces(1, other, 40)
    err = encode_packet(b"err", b"3", b"no-room", b"", bytes(300))
    abort = encode_packet(b"abort", b"protocol", b"unknown packet")
    five = [_req(id) for id in range(0, 10, 2)]
    five_deeper = [_req(id, depth=b"1") for id in range(10, 20, 2)]
    ping, pong, bye, bye_ok = _of(b"ping"), _of(b"pong"), _of(b"bye"), _of(b"bye-ok")
    drop, cancel = _of(b"drop 0"), _of(b"cancel 0")
    size = OPEN_LIMITS.max_message_size
    four = [_part(number, size - 1, b"a") for number in range(4)]
    good: Sequences = {
        "a request in three pieces": (False, [a1, a2, a3]),
        "a request in a piece for each byte": (False, _pieces(0, first, *[1] * (len(first) - 5))),
        "a request in one piece": (False, _pieces(7, first)),
        "two requests in pieces, the second ends first": (False, [a1, b1, a2, b2, a3]),
        "a small request between pieces": (False, [a1, other, a2, a3]),
        "a dropped request, then another": (False, [a1, a2, drop, b1, b2]),
        "four open packets of the size of the limit, one dropped, one more": (
            False,
            [*four, drop, *_pieces(4, first, 9)],
        ),
        "a cancel of a request that is there only in part": (False, [a1, cancel, a2, a3]),
        "a cancel of a request that never was": (False, [cancel]),
        "a pong that nobody asked for": (False, [pong, pong]),
        "ping": (False, [ping]),
        "three pings, one pong": (False, [ping, ping, ping]),
        "a ping between pieces": (False, [a1, ping, a2, a3]),
        "bye": (False, [bye]),
        "bye between pieces of a request": (False, [a1, bye, a2, a3]),
        "a request after bye": (False, [bye, first]),
        "a request that crosses bye, and bye-ok": (True, [first, bye_ok]),
        "both say bye": (True, [bye, bye_ok]),
        "both say bye, the other way round": (True, [bye_ok, bye]),
        "cancel, ping and pong after bye-ok": (True, [first, bye_ok, cancel, ping, pong]),
        "an error in pieces": (False, _pieces(0, err, 100, 200)),
        "a request of depth 1 with a context, in pieces": (
            False,
            _pieces(0, _req(0, b"a", depth=b"1", context=_body(b"a", bytes(200))), 50, 100),
        ),
        "a request of depth 1 after bye": (False, [bye, nested]),
        "a request of depth 1 that crosses bye": (True, [nested]),
        "a request of depth 1 after bye-ok": (True, [bye_ok, nested]),
        "all slots of two depths": (False, [*five, *five_deeper]),
        "all slots of every depth": (
            False,
            [*five]
            + [
                _req(10 * depth + id, depth=encode_number(depth))
                for depth in range(1, 16)
                for id in range(0, 10, 2)
            ],
        ),
        "abort": (False, [first, abort]),
        "an abort that crosses a bye": (True, [abort]),
    }
    bad: Sequences = {
        "a request in flight": (False, [first, first]),
        "a request in flight, in pieces": (False, [first, a1, a2, a3]),
        "one request too many": (False, [*five, _req(10)]),
        "one request too many, in pieces": (False, [*five, *_pieces(0, _req(10))]),
        "one request of depth 1 too many": (False, [*five_deeper, _req(20, depth=b"1")]),
        "one request too many, after deeper ones": (False, [*five, *five_deeper, _req(20)]),
        "a request of another depth with an id in flight": (False, [first, _req(0, depth=b"1")]),
        "details of 16,385 bytes": (False, [encode_packet(b"err", b"3", b"no-room", b"", bytes(16_385))]),
        "a left that is too large": (False, [a1, _part(0, len(first) - 4 - 29, first[14:34])]),
        "a left that is too small": (False, [a1, _part(0, len(first) - 4 - 31, first[14:34])]),
        "a left of 0 too early": (False, [a1, _part(0, 0, first[14:34])]),
        "a piece that is longer than what was left": (False, [a1, _part(0, 0, first[14:] + b"\0")]),
        "an empty piece in between": (False, [a1, _part(0, len(first) - 4 - 10, b"")]),
        "a fifth open packet": (False, [*four, _part(4, 1, b"a")]),
        "a fifth open packet of one piece": (False, [*four, *_pieces(4, first)]),
        "a second drop": (False, [a1, drop, drop]),
        "a drop after the last piece": (False, [a1, a2, a3, drop]),
        "a drop of another packet": (False, [b1, drop]),
        "one piece, without the last byte of the packet": (False, _pieces(0, first[:-1])),
        "cancel in pieces": (False, [first, *_pieces(0, cancel, 5)]),
        "abort in pieces": (False, _pieces(0, abort, 5)),
        "ping in pieces": (False, _pieces(0, ping, 5)),
        "a piece in pieces": (False, _pieces(0, a1, 5)),
        "drop in pieces": (False, [a1, *_pieces(1, drop, 5)]),
        "an unknown first field in pieces": (False, _pieces(0, encode_packet(b"hello"), 5)),
        "bye twice": (False, [bye, bye]),
        "bye-ok twice": (True, [bye_ok, bye_ok]),
        "bye-ok to the client's own bye": (False, [bye, bye_ok]),
        "a request after bye-ok": (True, [bye_ok, first]),
        "the last piece of a request after bye-ok": (True, [a1, a2, bye_ok, a3]),
    }
    return {
        "good": [
            {"name": name, "bye": has_bye, **_result(has_bye, packets)}
            for name, (has_bye, packets) in (good | channels_good).items()
        ],
        "bad": [
            {"name": name, "bye": has_bye, "packets": [packet.hex() for packet in packets]}
            for name, (has_bye, packets) in (bad | channels_bad).items()
        ],
    }


def server_of_a_sequence(has_bye: bool) -> second.Open:
    """Make the server that gets these packets. It has opened a channel and made a request of its own."""
    server = second.Open(1, OPEN_LIMITS.max_message_size, OPEN_LIMITS.max_requests, OPEN_CREDIT)
    for fields in SENT_BEFORE[has_bye]:
        server.put(fields)
    return server


_CALLS = [[b"chan", b"1", b"", b"", b"", b"262144", _body()], [b"req", b"3", b"", b"", b"", _body()]]
SENT_BEFORE = {False: _CALLS, True: [[b"bye"], *_CALLS]}
"""The packets that this server has sent, by whether it has said `bye`."""


def _result(has_bye: bool, packets: Sequence[bytes]) -> Vectors:
    """Return the reaction of a server to a client's packets."""
    server = server_of_a_sequence(has_bye)
    taken = [fields for packet in packets if (fields := server.take(packet))]

    def list_fields(*kinds: bytes) -> list[Vectors]:
        return [
            {"id": int(fields[1]), "fields": [field.hex() for field in second.unpack_body(fields[-1])]}
            for fields in taken
            if fields[0] in kinds
        ]

    return {
        "packets": [packet.hex() for packet in packets],
        "requests": list_fields(b"req", b"chan"),
        "items": list_fields(b"item"),
        "replies": b"".join(server.replies).hex(),
    }


# ---- passphrases ----


def _passphrases() -> list[Vectors]:
    passphrase = "correct horse battery zoe\u0308"
    salt = keyed_hash(16, b"", b"bokbok1 argon2id", encode_user(USER))
    return [
        {
            "passphrase": passphrase,
            "user": USER,
            "passes": ARGON2ID_PASSES,
            "memory": ARGON2ID_MEMORY,
            "salt": salt.hex(),
            "key": trio.run(passphrase_to_key, passphrase, USER).raw.hex(),
        }
    ]


def make() -> Vectors:
    sealed = _sealed()
    return {
        "about": "Test vectors of docs/protocol.rst, made by tests.support.make_vectors. Bytes are in hex.",
        "magic": MAGIC.hex(),
        "packets": _packets(),
        "numbers": _numbers(),
        "users": _users(),
        "options": _options(),
        "sealed": sealed,
        "plain": _plain(),
        "refused": _refused(sealed),
        "bad_hellos": _bad_hellos(),
        "bad_opens": _bad_opens(),
        "bad_replies": _bad_replies(sealed),
        "records": _record_vectors(),
        "connection": _connection_packets(),
        "sequences": _sequences(),
        "passphrases": _passphrases(),
    }


def dump(value: object, indent: str = "") -> str:
    """Encode JSON with each vector on one line or a few."""
    if isinstance(value, dict) and (not indent or len(json.dumps(value)) > 1000):
        items = [f"{json.dumps(key)}: {dump(item, indent + ' ')}" for key, item in value.items()]
        return "{\n" + ",\n".join(f"{indent} {item}" for item in items) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = [dump(item, indent + " ") for item in value]
        return "[\n" + ",\n".join(f"{indent} {item}" for item in items) + f"\n{indent}]"
    return json.dumps(value)


if __name__ == "__main__":
    PATH.write_text(dump(make()) + "\n", encoding="ascii")
