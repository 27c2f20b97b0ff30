"""The test vectors of an open connection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from bokbok_trio._protocol.packets import encode_number, encode_packet

from . import second_implementation as second
from .vector_parts import BAD_CONTEXTS, OPEN_CREDIT, OPEN_LIMITS, Vectors, encoded_body, fields_of, packet_of


def _req(id: int, *body: bytes, timeout: bytes = b"", depth: bytes = b"", context: bytes = b"") -> bytes:
    return packet_of(b"req", encode_number(id), timeout, depth, context, body=body)


def _chan(
    id: int,
    *body: bytes,
    credit: bytes = b"0",
    timeout: bytes = b"",
    depth: bytes = b"",
    context: bytes = b"",
) -> bytes:
    return packet_of(b"chan", encode_number(id), timeout, depth, context, credit, body=body)


def _part(number: int, remaining: int, piece: bytes) -> bytes:
    return encode_packet(b"part", encode_number(number), encode_number(remaining), piece)


def connection_packets() -> Vectors:
    """Return packets that a client may send first on an open connection, and some that it must not."""
    trace = encoded_body(b"trace-id", b"4bf92f3577b34da6", b"lang", b"eo")
    longest = encoded_body(b"a", bytes(8192 - 10))
    most = encoded_body(*(field for at in range(32) for field in (b"a.b-c_%d" % at, b"")))
    good = {
        "req": _req(0, b"ping", b"12345"),
        "req with a timeout of 1.5 s": _req(2, b"ping", b"12345", timeout=b"1500000"),
        "req with a timeout that has passed": _req(4, timeout=b"0"),
        "req with the longest timeout": _req(4, timeout=b"9" * 18),
        "req with no fields": _req(999999999999999998),
        "req of depth 1": _req(4, b"again?", depth=b"1"),
        "req of depth 15, with a context": _req(4, b"ping", depth=b"15", context=trace),
        "req with a context of one empty value": _req(4, context=encoded_body(b"a" * 64, b"")),
        "req with the longest context": _req(4, context=longest),
        "req with the most pairs in its context": _req(4, context=most),
        "cancel": _of(b"cancel 0"),
        "ok": packet_of(b"ok", b"1", body=[b"pong", b"12345"]),
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
        "item": packet_of(b"item", b"5", body=[b"line", b"12345"]),
        "item with no fields": packet_of(b"item", b"5", body=[]),
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
        "req of five fields": encode_packet(b"req", b"0", b"", b"", encoded_body()),
        "req with an id of the server's": _req(1),
        "req with an invalid id": packet_of(b"req", b"00", b"", b"", b"", body=[]),
        "req with an invalid timeout": _req(0, timeout=b"1.5"),
        "req with a timeout of 19 digits": _req(0, timeout=b"1" + b"0" * 18),
        "req with an invalid body": encode_packet(b"req", b"0", b"", b"", b"", b""),
        "ok to nothing": packet_of(b"ok", b"1", body=[]),
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
        "part, the only one, of no fields": _part(0, 0, encoded_body()),
        "drop of nothing": _of(b"drop 0"),
        "drop of three fields": encode_packet(b"drop", b"0", b""),
        "ping of two fields": encode_packet(b"ping", b"12345"),
        "pong of two fields": encode_packet(b"pong", b"12345"),
        "bye of two fields": encode_packet(b"bye", b""),
        "bye-ok without bye": _of(b"bye-ok"),
        "chan of six fields": encode_packet(b"chan", b"0", b"", b"", b"", encoded_body()),
        "chan with an id of the server's": _chan(1),
        "chan with an invalid id": packet_of(b"chan", b"00", b"", b"", b"", b"0", body=[]),
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
        "item with an invalid id": packet_of(b"item", b"-1", body=[]),
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
            {"name": name, "fields": [field.hex() for field in fields_of(packet)], "packet": packet.hex()}
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
    return packet_of(b"item", id, body=[b"a" * (size - 64 - 5)] if size > 65 else [])


def _channel_sequences() -> tuple[Sequences, Sequences]:
    """Return sequences for the client's channel 0, with a credit of 140, and for the server's channel 1."""
    chan, request = _chan(0, b"log", credit=b"100"), _req(0)
    most = _chan(0, credit=b"4294967295")
    tenth = _chan(10)
    five = [_chan(id) for id in range(0, 10, 2)]
    large, small, end, cancel = _item(b"0", 300), _item(b"0", 65), _of(b"end 0"), _of(b"cancel 0")
    a1, a2, a3 = _pieces(0, large, 10, 100)
    ok = packet_of(b"ok", b"1", body=[])
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


def sequences() -> Vectors:
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
            _pieces(0, _req(0, b"a", depth=b"1", context=encoded_body(b"a", bytes(200))), 50, 100),
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


_CALLS = [
    [b"chan", b"1", b"", b"", b"", b"262144", encoded_body()],
    [b"req", b"3", b"", b"", b"", encoded_body()],
]

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
