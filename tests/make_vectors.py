"""Makes ``tests/vectors.json``, the test vectors of ``docs/protocol.rst``, from the package.

``python -m tests.make_vectors``; the same bytes every time, as all that is random is fixed here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import trio
import trio.testing
from nacl.bindings import crypto_secretbox

from bokbok_trio._events import Event, Item, Request
from bokbok_trio._handshake import (
    MAGIC,
    ClientHandshake,
    Limits,
    ServerHandshake,
    Side,
    _box_key,
    _hash_accepted,
    _proof,
    encode_hello,
    encode_refused,
    keyed_hash,
)
from bokbok_trio._keys import ARGON2ID_MEMORY, ARGON2ID_PASSES, Key, encode_user, passphrase_to_key
from bokbok_trio._packets import decode_body, encode_body, encode_head, encode_number
from bokbok_trio._secretbox_stream import SecretboxStream
from bokbok_trio._session import Session

Vectors: TypeAlias = dict[str, Any]

PATH = Path(__file__).with_name("vectors.json")

KEY = bytes(range(32))
OTHER_KEY = bytes(range(1, 33))
SESSION_KEY = bytes(range(0x40, 0x60))
# The secrets of RFC 7748, section 6.1, whose shared secret is given there too.
CLIENT_SECRET = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
SERVER_SECRET = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
USER = "zoë"
SERVICE = "maps"
CLIENT_LIMITS = Limits(4194304, 100)
SERVER_LIMITS = Limits(65536, 7)
OPEN_LIMITS = Limits(2**20, 5)
OPEN_CREDIT = 40


def _packet(*fields: bytes, body: Sequence[bytes] | None = None) -> bytes:
    if body is None:
        return encode_head(*fields)
    chunks, size = encode_body(body, 2**32)
    return encode_head(*fields, body_size=size) + b"".join(chunks)


def _flip(data: bytes) -> bytes:
    """Change the last bit."""
    return data[:-1] + bytes((data[-1] ^ 1,))


def _client(key: bytes | None = KEY, service: str = SERVICE) -> ClientHandshake:
    random = iter([CLIENT_SECRET, SESSION_KEY])
    return ClientHandshake(
        user=None if key is None else USER,
        key=None if key is None else Key(key),
        service="" if key is None else service,
        limits=CLIENT_LIMITS,
        randomness=lambda _: next(random),
    )


def _server(*, sealed: bool = True) -> ServerHandshake:
    return ServerHandshake(
        sealed=sealed,
        service=SERVICE if sealed else "",
        limits=SERVER_LIMITS,
        randomness=lambda _: SERVER_SECRET,
    )


def _records(*steps: tuple[bytes, Sequence[bytes]]) -> list[str]:
    """What a stream sends, by plaintext, under each key in turn; empty: the end record."""

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
            {"name": name, "fields": [field.hex() for field in fields], "packet": encode_head(*fields).hex()}
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


# ---- the handshake ----


def _sealed() -> Vectors:
    client, server = _client(), _server()
    server.receive_hello(client.hello)
    client.receive_hello(server.hello)
    open = client.open()
    server.receive_open(open)
    accepted = server.accept([Key(KEY)])
    client.receive_reply(accepted)
    h1, box = client._h1, client._box
    head = encode_head(b"accepted", *SERVER_LIMITS.fields())
    h2 = _hash_accepted(h1, box, head)
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
        "O": encode_head(*_fields(open)[:5]),
        "h1": h1,
        "session_key": SESSION_KEY,
        "box_key": _box_key(Key(KEY), h1),
        "box": box,
        "open": open,
        "A": head,
        "h2": h2,
        "proof": _proof(Key(KEY), h2),
        "accepted": accepted,
        "fk": fk.c2s + fk.s2c,
    }
    return {
        "user": USER,
        "key": KEY.hex(),
        "service": SERVICE,
        "client_limits": [CLIENT_LIMITS.max_message_size, CLIENT_LIMITS.max_requests],
        "server_limits": [SERVER_LIMITS.max_message_size, SERVER_LIMITS.max_requests],
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
    return {
        "client_limits": [CLIENT_LIMITS.max_message_size, CLIENT_LIMITS.max_requests],
        "server_limits": [SERVER_LIMITS.max_message_size, SERVER_LIMITS.max_requests],
        "C": client.hello.hex(),
        "S": server.hello.hex(),
        "open": open.hex(),
        "accepted": accepted.hex(),
        "client_sends": (client.hello + open).hex(),
        "server_sends": (server.hello + accepted).hex(),
    }


def _bad_hellos() -> list[Vectors]:
    """What a side must refuse as the other's hello; its own secret is that of the good handshake."""
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
            MAGIC + encode_head(b"hello", b"client", b"plain", bytes(33)),
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


def _open(*head: bytes, key: bytes = KEY, service: str = SERVICE) -> str:
    """An `open` made of any first fields, its box right for them."""
    client = _client(key, service)
    client.receive_hello(_server().hello)
    h1 = client._hash_open(head)
    box = crypto_secretbox(SESSION_KEY + h1, h1[:24], _box_key(Key(key), h1))
    return encode_head(*head, box).hex()


def _bad_opens() -> list[Vectors]:
    user, size, count = encode_user(USER), b"4194304", b"100"
    good = [b"open", user, size, count, bytes(385)]
    plain = [b"open", b"", size, count, b"", b""]
    authentication = "authentication"
    table: list[tuple[str, str, str | None, str]] = [
        ("sealed", "another key", authentication, _open(*good, key=OTHER_KEY)),
        ("sealed", "another service", authentication, _open(*good, service="mail")),
        ("sealed", "a bit of the box changed", authentication, _flip(bytes.fromhex(_open(*good))).hex()),
        ("sealed", "an unknown user", authentication, _open(b"open", b"zack", *good[2:])),
        ("sealed", "a user that is no name", authentication, _open(b"open", b"zo\xeb\n", *good[2:])),
        ("sealed", "no user", authentication, _open(b"open", b"", size, count, bytes(389))),
        ("sealed", "511 bytes", None, _open(*good[:4], bytes(384))),
        ("sealed", "513 bytes", None, _open(*good[:4], bytes(386))),
        ("sealed", "a pad that is not zeros", None, _open(*good[:4], _flip(bytes(385)))),
        ("sealed", "no box", None, encode_head(*good[:4], bytes(465), b"").hex()),
        ("sealed", "another first field", None, _open(b"nope", *good[1:])),
        ("sealed", "five fields", None, encode_head(*good[:4], bytes(469)).hex()),
        ("sealed", "messages of 4,095 bytes", None, _open(*good[:2], b"4095", count, bytes(388))),
        ("sealed", "no request at once", None, _open(*good[:3], b"0", bytes(387))),
        ("sealed", "1,000,001 requests at once", None, _open(*good[:3], b"1000001", bytes(381))),
        ("sealed", "a number with a leading zero", None, _open(*good[:3], b"0100", bytes(384))),
        ("plain", "a user", None, encode_head(b"open", user, *plain[2:]).hex()),
        ("plain", "a pad", None, encode_head(*plain[:4], b"\0", b"").hex()),
        ("plain", "a box", None, encode_head(*plain[:5], bytes(80)).hex()),
        ("plain", "messages of 4,095 bytes", None, encode_head(*plain[:2], b"4095", *plain[3:]).hex()),
    ]
    return [
        {"mode": mode, "name": name, "refused": refused, "open": packet}
        for mode, name, refused, packet in table
    ]


def _bad_replies(sealed: Vectors) -> list[Vectors]:
    h1, box, accepted = (bytes.fromhex(sealed[name]) for name in ("h1", "box", "accepted"))

    def accept(*head: bytes, key: bytes = KEY) -> bytes:
        return encode_head(*head, _proof(Key(key), _hash_accepted(h1, box, encode_head(*head))))

    size, count = SERVER_LIMITS.fields()
    proof = _fields(accepted)[3]
    table: list[tuple[str, str, bool, bytes]] = [
        ("sealed", "another key", True, accept(b"accepted", size, count, key=OTHER_KEY)),
        ("sealed", "a bit of the proof changed", True, _flip(accepted)),
        ("sealed", "a limit changed", True, encode_head(b"accepted", b"65537", count, proof)),
        ("sealed", "no proof", True, encode_head(b"accepted", size, count, b"")),
        ("sealed", "half a proof", True, encode_head(b"accepted", size, count, proof[:16])),
        ("sealed", "refused", True, encode_refused("authentication", "authentication failed")),
        ("sealed", "messages of 4,095 bytes", False, accept(b"accepted", b"4095", count)),
        ("sealed", "no request at once", False, accept(b"accepted", size, b"0")),
        ("sealed", "three fields", False, encode_head(b"accepted", size, count)),
        ("sealed", "a byte after the packet", False, accepted + b"\0"),
        ("sealed", "an unknown code", False, encode_head(b"refused", b"perhaps", b"")),
        ("sealed", "a message of 257 bytes", False, encode_head(b"refused", b"authentication", b"a" * 257)),
        ("plain", "a proof", False, accepted),
        ("plain", "refused", False, encode_refused("busy", "the server is busy")),
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


def _session(side: Side) -> Session:
    """A side of the connection of these vectors."""
    size, count = OPEN_LIMITS.max_message_size, OPEN_LIMITS.max_requests
    return Session(side, max_message_size=size, max_requests=count, slots=count)


def _part(number: int, left: int, piece: bytes) -> bytes:
    return encode_head(b"part", encode_number(number), encode_number(left), piece)


def _connection_packets() -> Vectors:
    """What a client sends first on an open connection, and what it must not."""
    asker, answerer = _session("client"), _session("client")
    asker.request(["ping", "12345"])
    req = asker.take(0.0)
    asker.request(["ping", "12345"], deadline=1.5)
    req_timeout = asker.take(0.0)
    asker.cancel(0)
    cancel = asker.take(0.0)
    asker.ping()
    ping = asker.take(0.0)
    asker.drain()
    bye = asker.take(0.0)
    answerer_events = list(answerer.receive(_packet(b"req", b"1", b"", body=[b"a"])))
    assert len(answerer_events) == 1
    answerer.answer(1, [b"pong", b"12345"])
    ok = answerer.take(0.0)
    list(answerer.receive(_packet(b"req", b"3", b"", body=[b"a"])))
    answerer.fail(3, "unknown-request", "no such request")
    err = answerer.take(0.0)
    asker.open_channel(["log"], deadline=1.5)
    chan = asker.take(0.0)
    list(answerer.receive(_packet(b"chan", b"5", b"", b"262144", body=[b"log"])))
    answerer.channels.send(5, *answerer.channels.encode([b"line", b"12345"]))
    item = answerer.take(0.0)
    answerer.channels.grant(5, 1000)
    credit = answerer.take(0.0)
    answerer.channels.end(5)
    end = answerer.take(0.0)
    list(answerer.receive(ping))
    pong = answerer.take(0.0)
    list(answerer.receive(bye))
    bye_ok = answerer.take(0.0)
    good = {
        "req": req,
        "req with a timeout of 1.5 s": req_timeout,
        "req with a timeout that has passed": _packet(b"req", b"4", b"0", body=[]),
        "req with the longest timeout": _packet(b"req", b"4", b"9" * 18, body=[]),
        "req with no fields": _packet(b"req", b"999999999999999998", b"", body=[]),
        "cancel": cancel,
        "ok": ok,
        "err": err,
        "part": _part(0, 3, b"abc"),
        "drop": encode_head(b"drop", b"0"),
        "ping": ping,
        "pong": pong,
        "bye": bye,
        "bye-ok": bye_ok,
        "chan with a timeout of 1.5 s": chan,
        "chan with no credit": _packet(b"chan", b"6", b"", b"0", body=[]),
        "chan with the most credit": _packet(b"chan", b"6", b"", b"4294967295", body=[]),
        "item": item,
        "item with no fields": _packet(b"item", b"5", body=[]),
        "credit": credit,
        "credit of nothing": encode_head(b"credit", b"5", b"0"),
        "end": end,
    }
    size = OPEN_LIMITS.max_message_size
    bad = {
        "no fields": encode_head(),
        "an unknown first field": encode_head(b"hello"),
        "66,561 bytes that are not in pieces, only the length of them": bytes.fromhex("00010401"),
        "req of three fields": encode_head(b"req", b"0", b""),
        "req with an id of the server's": _packet(b"req", b"1", b"", body=[]),
        "req with an id that is no number": _packet(b"req", b"00", b"", body=[]),
        "req with a timeout that is no number": _packet(b"req", b"0", b"1.5", body=[]),
        "req with a timeout of 19 digits": _packet(b"req", b"0", b"1" + b"0" * 18, body=[]),
        "req with a body that is none": encode_head(b"req", b"0", b"", b""),
        "ok to nothing": _packet(b"ok", b"1", body=[]),
        "err to nothing": encode_head(b"err", b"1", b"handler-error", b""),
        "cancel with an id of the server's": encode_head(b"cancel", b"1"),
        "cancel of three fields": encode_head(b"cancel", b"0", b""),
        "part of three fields": encode_head(b"part", b"0", b"3"),
        "part with a number that is none": encode_head(b"part", b"", b"3", b"abc"),
        "part with a left that is no number": encode_head(b"part", b"0", b"-3", b"abc"),
        "part with an empty piece": _part(0, 3, b""),
        "part with an empty piece and nothing left": _part(0, 0, b""),
        "part of a packet one byte over the limit": _part(0, size - 2, b"abc"),
        "part of a packet far over the limit": _part(0, 10**18 - 1, b"abc"),
        "part, the only one, of no body": _part(0, 0, b"\1"),
        "part, the only one, of no fields": _part(0, 0, encode_head()[4:]),
        "drop of nothing": encode_head(b"drop", b"0"),
        "drop of three fields": encode_head(b"drop", b"0", b""),
        "ping of two fields": encode_head(b"ping", b"12345"),
        "pong of two fields": encode_head(b"pong", b"12345"),
        "bye of two fields": encode_head(b"bye", b""),
        "bye-ok without bye": bye_ok,
        "chan of four fields": _packet(b"chan", b"0", b"", body=[]),
        "chan with an id of the server's": _packet(b"chan", b"1", b"", b"0", body=[]),
        "chan with an id that is no number": _packet(b"chan", b"00", b"", b"0", body=[]),
        "chan with a timeout that is no number": _packet(b"chan", b"0", b"1.5", b"0", body=[]),
        "chan with a credit that is no number": _packet(b"chan", b"0", b"", b"", body=[]),
        "chan with more credit than may be": _packet(b"chan", b"0", b"", b"4294967296", body=[]),
        "chan with a body that is none": encode_head(b"chan", b"0", b"", b"0", b""),
        "item of two fields": encode_head(b"item", b"0"),
        "item with an id that is no number": _packet(b"item", b"-1", body=[]),
        "item of nothing in flight, with a body that is none": encode_head(b"item", b"0", b"\1"),
        "credit of two fields": encode_head(b"credit", b"0"),
        "credit with an id that is no number": encode_head(b"credit", b"", b"5"),
        "credit of nothing in flight, with no number of bytes": encode_head(b"credit", b"0", b"05"),
        "end of three fields": encode_head(b"end", b"0", b""),
        "end with an id that is no number": encode_head(b"end", b"01"),
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
    """A packet in pieces of these sizes, and the rest of it."""
    parts = []
    rest = packet[4:]
    for size in (*sizes, len(rest) - sum(sizes)):
        piece, rest = rest[:size], rest[size:]
        parts.append(_part(number, len(rest), piece))
    return parts


Sequences: TypeAlias = dict[str, tuple[bool, list[bytes]]]


def _item(id: bytes, size: int) -> bytes:
    """An item of one field, or of none, whose body is so large."""
    return _packet(b"item", id, body=[b"a" * (size - 5)] if size > 1 else [])


def _channel_sequences() -> tuple[Sequences, Sequences]:
    """Those of the client's channel 0, to which the server grants 40, and of the server's channel 1."""
    chan, request = _packet(b"chan", b"0", b"", b"100", body=[b"log"]), _packet(b"req", b"0", b"", body=[])
    most = _packet(b"chan", b"0", b"", b"4294967295", body=[])
    tenth = _packet(b"chan", b"10", b"", b"0", body=[])
    five = [_packet(b"chan", encode_number(id), b"", b"0", body=[]) for id in range(0, 10, 2)]
    large, small, end, cancel = _item(b"0", 300), _item(b"0", 1), _of(b"end 0"), _of(b"cancel 0")
    a1, a2, a3 = _pieces(0, large, 10, 100)
    ok = _packet(b"ok", b"1", body=[])
    good: Sequences = {
        "a channel": (False, [chan]),
        "a channel in pieces": (False, _pieces(0, chan, 5)),
        "a channel and a cancel": (False, [chan, cancel]),
        "credit after cancel": (False, [chan, cancel, _of(b"credit 0 5")]),
        "an item for all of the credit": (False, [chan, _item(b"0", 40)]),
        "an item of no fields for the last byte of it": (False, [chan, _item(b"0", 39), small]),
        "an item that starts with one byte of it": (False, [chan, _item(b"0", 39), large]),
        "an item in three pieces, then the end": (False, [chan, a1, a2, a3, end]),
        "an item of another channel between pieces": (False, [chan, a1, _item(b"1", 9), a2, a3]),
        "a dropped item takes no credit": (False, [chan, a1, a2, _of(b"drop 0"), small, large]),
        "items, credit and the end of a channel of the server's": (
            False,
            [_item(b"1", 99), _of(b"credit 1 5"), _item(b"1", 1), _of(b"end 1"), _of(b"credit 1 5")],
        ),
        "credit of nothing": (False, [most, _of(b"credit 0 0")]),
        "the most credit": (False, [_of(b"credit 1 1"), _of(b"credit 1 4294967294")]),
        "item, credit and ends of a channel that never was": (
            False,
            [_item(b"6", 1), _of(b"credit 6 5"), _of(b"end 6"), _of(b"end 6"), _item(b"6", 1)],
        ),
        "the same, with an id of the server's": (
            False,
            [_item(b"7", 1), _of(b"credit 7 5"), _of(b"end 7"), _of(b"end 7"), _item(b"7", 1)],
        ),
        "the same, after the answer": (
            False,
            [ok, _item(b"1", 1), _of(b"credit 1 5"), _of(b"end 1"), _of(b"end 1"), _item(b"1", 1)],
        ),
        "more credit than may be, for a channel that never was": (False, [_of(b"credit 6 4294967296")]),
        "an item, before its channel has wholly come": (False, [*_pieces(0, chan, 5)[:1], small]),
        "an item and the end after bye": (False, [chan, _of(b"bye"), small, end]),
        "item, credit and end after bye-ok": (
            True,
            [_of(b"bye-ok"), _item(b"1", 9), _of(b"credit 1 5"), _of(b"end 1")],
        ),
        "a channel that crosses bye, and bye-ok": (True, [chan, _of(b"bye-ok")]),
    }
    bad: Sequences = {
        "a channel in flight": (False, [chan, chan]),
        "a channel with the id of a request in flight": (False, [request, chan]),
        "a request with the id of a channel in flight": (False, [chan, request]),
        "one request too many, with a channel": (False, [*five, tenth]),
        "one request too many, after channels": (False, [*five, _packet(b"req", b"10", b"", body=[])]),
        "a channel after bye-ok": (True, [_of(b"bye-ok"), chan]),
        "an item before any credit": (True, [chan, small]),
        "an item with a credit of 0": (False, [chan, _item(b"0", 40), small]),
        "an item with a credit below 0": (False, [chan, large, small]),
        "an item with a credit below 0, in pieces": (False, [chan, large, *_pieces(0, small, 5)]),
        "an item after the end": (False, [chan, end, small]),
        "an item after the end, of a channel of the server's": (False, [_of(b"end 1"), _item(b"1", 1)]),
        "the last piece of an item after the end": (False, [chan, a1, a2, end, a3]),
        "an item after cancel, with a credit below 0": (False, [chan, large, cancel, small]),
        "a second end": (False, [chan, end, end]),
        "a second end, of a channel of the server's": (False, [_of(b"end 1"), _of(b"end 1")]),
        "an item for a request": (False, [request, small]),
        "credit for a request": (False, [request, _of(b"credit 0 5")]),
        "the end of a request": (False, [request, end]),
        "an item for a request of the server's": (False, [_item(b"3", 1)]),
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
    """A packet of these fields."""
    return encode_head(*words.split())


def _sequences() -> Vectors:
    """Packets of a client whose meaning depends on those before; True: the server has said `bye`."""
    channels_good, channels_bad = _channel_sequences()
    first = _packet(b"req", b"0", b"", body=[b"ping", b"12345"])
    second = _packet(b"req", b"2", b"1500000", body=[b"a" * 30])
    a1, a2, a3 = _pieces(0, first, 10, 20)
    b1, b2 = _pieces(1, second, 40)
    ping, pong, bye, bye_ok = _of(b"ping"), _of(b"pong"), _of(b"bye"), _of(b"bye-ok")
    drop, cancel = _of(b"drop 0"), _of(b"cancel 0")
    size = OPEN_LIMITS.max_message_size
    four = [_part(number, size - 1, b"a") for number in range(4)]
    good: Sequences = {
        "a request in three pieces": (False, [a1, a2, a3]),
        "a request in a piece for each byte": (False, _pieces(0, first, *[1] * (len(first) - 5))),
        "a request in one piece": (False, _pieces(7, first)),
        "two requests in pieces, the second ends first": (False, [a1, b1, a2, b2, a3]),
        "a small request between pieces": (False, [a1, second, a2, a3]),
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
    }
    five = [_packet(b"req", encode_number(id), b"", body=[]) for id in range(0, 10, 2)]
    bad: Sequences = {
        "a request in flight": (False, [first, first]),
        "a request in flight, in pieces": (False, [first, a1, a2, a3]),
        "one request too many": (False, [*five, _packet(b"req", b"10", b"", body=[])]),
        "one request too many, in pieces": (
            False,
            [*five, *_pieces(0, _packet(b"req", b"10", b"", body=[]))],
        ),
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
        "err in pieces": (False, _pieces(0, encode_head(b"err", b"1", b"handler-error", b""), 5)),
        "ping in pieces": (False, _pieces(0, ping, 5)),
        "a piece in pieces": (False, _pieces(0, a1, 5)),
        "drop in pieces": (False, [a1, *_pieces(1, drop, 5)]),
        "an unknown first field in pieces": (False, _pieces(0, encode_head(b"hello"), 5)),
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


def server_of_a_sequence(has_bye: bool) -> tuple[Session, bytes]:
    """The server that it is sent to, with a channel and a request of its own; and what it sent before."""
    server = _session("server")
    server.open_channel([])
    server.request([])
    if has_bye:
        server.drain()
    return server, server.take(0.0)


def receive_sequence(server: Session, data: bytes) -> list[Event]:
    """Let that server take packets, and grant credit to the channels that it takes."""
    events = []
    for event in server.receive(data):
        events.append(event)
        if isinstance(event, Request) and event.has_channel and not server.is_draining:
            server.channels.grant(event.id, OPEN_CREDIT)
    return events


def _result(has_bye: bool, packets: Sequence[bytes]) -> Vectors:
    """What a server makes of a client's packets."""
    server, _ = server_of_a_sequence(has_bye)
    events = receive_sequence(server, b"".join(packets))

    def list_fields(kind: type[Request | Item]) -> list[Vectors]:
        return [
            {"id": event.id, "fields": [field.hex() for field in event.fields]}
            for event in events
            if isinstance(event, kind)
        ]

    return {
        "packets": [packet.hex() for packet in packets],
        "requests": list_fields(Request),
        "items": list_fields(Item),
        "replies": server.take(0.0).hex(),
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
        "about": "Test vectors of docs/protocol.rst, made by tests/make_vectors.py. Bytes are in hex.",
        "magic": MAGIC.hex(),
        "packets": _packets(),
        "numbers": _numbers(),
        "users": _users(),
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
    """JSON, with a vector on one line or a few."""
    if isinstance(value, dict) and (not indent or len(json.dumps(value)) > 1000):
        items = [f"{json.dumps(key)}: {dump(item, indent + ' ')}" for key, item in value.items()]
        return "{\n" + ",\n".join(f"{indent} {item}" for item in items) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = [dump(item, indent + " ") for item in value]
        return "[\n" + ",\n".join(f"{indent} {item}" for item in items) + f"\n{indent}]"
    return json.dumps(value)


if __name__ == "__main__":
    PATH.write_text(dump(make()) + "\n", encoding="ascii")
