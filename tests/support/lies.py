"""The fields of each packet of a peer, and the bad values of each field."""

from __future__ import annotations

from bokbok_trio._protocol.flow_control import ITEM_OVERHEAD, MAX_QUEUED

from ..support.second_implementation import MAX_ABORT, MAX_DETAILS, body

LIMIT = 2**18
"""Bytes of a packet: more than are sent whole, and more than a channel's credit."""

HEAD_ROOM = 128
"""Bytes of a packet besides the user's body and context."""

ITEM_ROOM = MAX_QUEUED - ITEM_OVERHEAD - 6
"""Bytes of the field of the largest item after which another may be queued."""

SIZES = (0, 20, 3000, 30_000, ITEM_ROOM, 65_430, 65_520, 150_000, LIMIT - HEAD_ROOM - 5)
"""Bytes of a user's field: small ones, the largest sent whole, one sent in pieces, the largest of all."""

DEPTHS = (0, 0, 0, 1, 1, 15)
CONTEXTS: tuple[dict[bytes, bytes], ...] = ({}, {}, {b"trace": b"\0\xff"}, {b"a": bytes(5000), b"b": b""})

FORMS = {
    b"req": "itdcb",
    b"chan": "itdcib",
    b"ok": "ib",
    b"err": "ixxn",
    b"abort": "xm",
    b"cancel": "i",
    b"item": "ib",
    b"credit": "ii",
    b"end": "i",
    b"drop": "i",
    b"ping": "",
    b"pong": "",
    b"bye": "",
    b"bye-ok": "",
}
"""The fields of each kind: numbers (i), a timeout (t), a depth (d), a context (c), a body (b), texts (x),
details (n), and the message of an abort (m)."""

WRONG = {
    "i": (b"", b"00", b"-1", b"1_0", b" 1", b"1\n", "\u0661".encode(), b"1" * 19),
    "t": (b"00", b"-1", b"1.5", b"1e9", b"1" * 19),
    "b": (b"", b"\x01", b"\x00\x00", b"\x01\x00\x00\x00\x02a"),
    "d": (b"0", b"16", b"01", b"-1", b"1.0", b"1" * 19),
    "c": (
        *(b"\0", body([b"a"]), body([b"a", b"", b"a", b""]), body([b"A", b""]), body([b"", b""])),
        *(body([b"a" * 65, b""]), body([b"a", bytes(8192)]), body([b"a/b", b""]), b"\x01"),
    ),
    "x": (b"\xff", b"\xed\xa0\x80", b"\xc0\x80"),
    "n": (bytes(MAX_DETAILS + 1),),
    "m": (b"\xff", b"a" * (MAX_ABORT + 1)),
}
"""Bad values of a field, by its form."""
