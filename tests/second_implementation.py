"""A second implementation of the protocol, from ``docs/protocol.rst`` alone, to test that text with.

Bytes in, bytes out; no input or output, no time, and nothing of the package. `Bad` is what a receiver
refuses; `NotAuthentic` is the part of it that is about the key. The names are those of the text.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping

from nacl.bindings import (
    crypto_scalarmult,
    crypto_scalarmult_base,
    crypto_secretbox,
    crypto_secretbox_open,
    sodium_memcmp,
)
from nacl.exceptions import CryptoError

MAGIC = b"bokbok1\n"
SIDES = (b"client", b"server")


class Bad(Exception):
    """What the other side sent must be refused."""


class NotAuthentic(Bad):
    """The other side did not show that it has the key."""


# ---- packets, numbers, labels ----


def packet(fields: list[bytes]) -> bytes:
    """P(fields)."""
    data = struct.pack(">B", len(fields)) + b"".join(struct.pack(">I", len(x)) + x for x in fields)
    return struct.pack(">I", len(data)) + data


def body(fields: list[bytes]) -> bytes:
    return packet(fields)[4:]


def unpack_body(data: bytes) -> list[bytes]:
    if not data:
        raise Bad("no count")
    fields = []
    rest = data[1:]
    for _ in range(data[0]):
        if len(rest) < 4:
            raise Bad("no size")
        (size,) = struct.unpack(">I", rest[:4])
        if len(rest) < 4 + size:
            raise Bad("a field is cut short")
        fields.append(rest[4 : 4 + size])
        rest = rest[4 + size :]
    if rest:
        raise Bad("too long")
    return fields


def unpack(data: bytes, limit: int = 4096) -> list[bytes]:
    """The fields of exactly one packet."""
    (length,) = struct.unpack(">I", data[:4])
    if length > limit or length != len(data) - 4:
        raise Bad("length")
    return unpack_body(data[4:])


def number(field: bytes) -> int:
    if not (1 <= len(field) <= 18 and field.isdigit()) or (field[:1] == b"0" and field != b"0"):
        raise Bad("no number")
    return int(field)


def blake(size: int, key: bytes, label: bytes, data: bytes) -> bytes:
    """B(n, key, label, data)."""
    return hashlib.blake2b(data, digest_size=size, key=key, person=label.ljust(16, b"\0")).digest()


def limits(max_message_size: bytes, max_requests: bytes) -> tuple[int, int]:
    found = number(max_message_size), number(max_requests)
    if found[0] < 4096 or not 1 <= found[1] <= 1_000_000:
        raise Bad("limits")
    return found


# ---- records ----


class Records:
    """One direction of the record stream."""

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.counter = 0

    def nonce(self) -> bytes:
        self.counter += 1
        return struct.pack(">QQQ", 0, 0, self.counter - 1)

    def seal(self, plaintext: bytes) -> bytes:
        box = crypto_secretbox(plaintext, self.nonce(), self.key)
        return struct.pack(">H", len(box)) + box

    def open(self, record: bytes) -> bytes:
        """The plaintext of one whole record; empty: the end."""
        (length,) = struct.unpack(">H", record[:2])
        if length < 16 or length != len(record) - 2:
            raise Bad("record length")
        try:
            return crypto_secretbox_open(record[2:], self.nonce(), self.key)
        except CryptoError:
            raise Bad("record does not open") from None


# ---- the handshake ----


class Handshake:
    """What both sides do. `me` is 0 for the client and 1 for the server."""

    def __init__(
        self, me: int, mode: bytes, service: bytes, own_limits: tuple[int, int], secret: bytes
    ) -> None:
        self.me, self.mode, self.service, self.secret = me, mode, service, secret
        self.own_limits = [b"%d" % value for value in own_limits]
        self.peer_limits = (0, 0)
        self.ephemeral = crypto_scalarmult_base(secret) if mode == b"sealed" else b""
        self.own_hello = MAGIC + packet([b"hello", SIDES[me], mode, self.ephemeral])
        self.ee = self.h0 = self.hs = self.h1 = self.box_key = self.box = b""
        self.h2 = self.proof = self.session_key = self.fk = b""

    def take_hello(self, hello: bytes) -> None:
        theirs = hello[-32:] if self.ephemeral else b""
        if hello != MAGIC + packet([b"hello", SIDES[1 - self.me], self.mode, theirs]):
            raise Bad("hello")
        if self.mode == b"plain":
            return
        if theirs == self.ephemeral:
            raise Bad("own key")
        try:
            self.ee = crypto_scalarmult(self.secret, theirs)
        except RuntimeError:
            raise Bad("all-zero secret") from None
        both = [self.own_hello, hello]
        self.h0 = blake(32, b"", b"bokbok1 hello", both[self.me] + both[1 - self.me])
        self.hs = blake(64, self.ee, b"bokbok1 shake", self.h0)

    def hash_open(self, key: bytes, five: list[bytes]) -> None:
        service = struct.pack(">B", len(self.service)) + self.service
        self.h1 = blake(32, b"", b"bokbok1 open", self.h0 + service + packet(five))
        self.box_key = blake(32, key, b"bokbok1 box", self.h1)

    def hash_accepted(self, key: bytes, three: list[bytes]) -> None:
        self.h2 = blake(32, b"", b"bokbok1 accept", self.h1 + self.box + packet(three))
        self.proof = blake(32, key, b"bokbok1 server", self.h2)
        self.fk = blake(64, key, b"bokbok1 final", self.session_key + self.ee + self.h2)


class Client(Handshake):
    """The side that dialled; with an empty key in mode plain."""

    def __init__(
        self, user: bytes, key: bytes, service: bytes, own_limits: tuple[int, int], secret: bytes
    ) -> None:
        super().__init__(0, b"sealed" if key else b"plain", service, own_limits, secret)
        self.user, self.key = user, key

    def open(self, session_key: bytes) -> bytes:
        if not self.key:
            return packet([b"open", b"", *self.own_limits, b"", b""])
        five = [b"open", self.user, *self.own_limits, b""]
        five[4] = bytes(512 - len(packet([*five, bytes(80)])))
        self.hash_open(self.key, five)
        self.session_key = session_key
        self.box = crypto_secretbox(session_key + self.h1, self.h1[:24], self.box_key)
        return packet([*five, self.box])

    def take_reply(self, reply: bytes) -> None:
        fields = unpack(reply)
        if fields[:1] == [b"refused"] and len(fields) == 3 and len(fields[2]) <= 256:
            raise (NotAuthentic if fields[1] == b"authentication" else Bad)("refused")
        if fields[:1] != [b"accepted"] or len(fields) != 4:
            raise Bad("reply")
        if self.key:
            self.hash_accepted(self.key, fields[:3])
            if len(fields[3]) != 32 or not sodium_memcmp(fields[3], self.proof):
                raise NotAuthentic("proof")
        elif fields[3]:
            raise Bad("a proof in mode plain")
        self.peer_limits = limits(fields[1], fields[2])


class Server(Handshake):
    """The side that accepted; without `keys` in mode plain."""

    def __init__(
        self,
        keys: Mapping[bytes, bytes] | None,
        service: bytes,
        own_limits: tuple[int, int],
        secret: bytes,
    ) -> None:
        super().__init__(1, b"plain" if keys is None else b"sealed", service, own_limits, secret)
        self.keys = keys

    def take_open(self, data: bytes, dummy_key: bytes = bytes(32)) -> bytes:
        """Take `open` and make `accepted`. Where this raises `NotAuthentic`, `refused` is due."""
        fields = unpack(data)
        if len(fields) != 6 or fields[0] != b"open":
            raise Bad("open")
        _, user, max_message_size, max_requests, pad, self.box = fields
        self.peer_limits = limits(max_message_size, max_requests)
        three = [b"accepted", *self.own_limits]
        if self.keys is None:
            if user or pad or self.box:
                raise Bad("not empty in mode plain")
            return packet([*three, b""])
        if len(data) != 512 or len(self.box) != 80 or any(pad):
            raise Bad("padding")
        key = self.keys.get(user, dummy_key)
        self.hash_open(key, fields[:5])
        try:
            opened = crypto_secretbox_open(self.box, self.h1[:24], self.box_key)
        except CryptoError:
            raise NotAuthentic("box") from None
        if not sodium_memcmp(opened[32:], self.h1):
            raise NotAuthentic("box")
        self.session_key = opened[:32]
        self.hash_accepted(key, three)
        return packet([*three, self.proof])


# ---- an open connection ----

MAX_WHOLE = 66_560
MAX_PIECE = 65_458
MAX_OPEN = 4
MAX_CREDIT = 4_294_967_295
PONG = packet([b"pong"])
BYE_OK = packet([b"bye-ok"])


class Open:
    """One side of an open connection; `me` as above, `limit` and `slots` as agreed.

    What it sends leaves at once: nothing waits here but the `replies`, the packets that are due to
    what the other side sent. So is the first `credit` of each channel that it takes, of so many bytes.
    """

    def __init__(self, me: int, limit: int, slots: int, credit: int = 262_144) -> None:
        self.me, self.limit, self.slots, self.credit = me, limit, slots, credit
        self.asked: set[int] = set()  # own requests that are not answered
        self.asking: set[int] = set()  # those of the other side
        self.to_send: dict[int, int] = {}  # of those that are channels: credit for own items
        self.to_take: dict[int, int] = {}  # and for those of the other side, until its end
        self.pieces: dict[int, tuple[bytes, int]] = {}  # what came, and what is left
        self.count = 0  # own packets in pieces
        self.said_bye = self.heard_bye = self.heard_bye_ok = False
        self.replies: list[bytes] = []

    # what is sent

    def put(self, fields: list[bytes]) -> list[bytes]:
        """The packets that these fields are sent as."""
        match fields:
            case [b"req" | b"chan", id, _, *credit, _]:
                assert not self.heard_bye
                self.asked.add(int(id))
                if credit:
                    self.to_send[int(id)], self.to_take[int(id)] = 0, int(credit[0])
            case [b"ok" | b"err", id, *_]:
                self.asking.remove(int(id))
                self.forget(int(id))
            case [b"item", id, inner]:
                assert self.to_send[int(id)] > 0
                self.to_send[int(id)] -= len(inner)
            case [b"credit", id, size]:
                self.to_take[int(id)] += int(size)
            case [b"bye"]:
                self.said_bye = True
        data = body(fields)
        assert len(data) <= self.limit
        if len(data) <= MAX_WHOLE:
            return [packet(fields)]
        parts = []
        while data:
            piece, data = data[:MAX_PIECE], data[MAX_PIECE:]
            parts.append(packet([b"part", b"%d" % self.count, b"%d" % len(data), piece]))
        self.count += 1
        return parts

    def is_drained(self) -> bool:
        return self.heard_bye_ok and not self.asked and not self.asking and not self.replies

    # what is received

    def take(self, data: bytes) -> list[bytes] | None:
        """Take one packet; its fields, if it is one for the user, or ends one."""
        return self.interpret(unpack(data, min(self.limit, MAX_WHOLE)))

    def interpret(self, fields: list[bytes]) -> list[bytes] | None:
        match fields:
            case [b"req", id, timeout, inner]:
                self.take_request(self.other_id(id))
                if timeout:
                    number(timeout)
                unpack_body(inner)
            case [b"ok", id, inner]:
                self.take_answer(number(id))
                unpack_body(inner)
            case [b"err", id, code, message]:
                self.take_answer(number(id))
                text(code)
                text(message)
            case [b"cancel", id]:
                self.other_id(id)
            case [b"part", n, left, piece]:
                return self.take_piece(number(n), number(left), piece)
            case [b"drop", n]:
                if self.pieces.pop(number(n), None) is None:
                    raise Bad("drop")
                return None
            case [b"chan" | b"item" | b"credit" | b"end", *_]:
                return fields if self.take_of_channel(fields) else None
            case _:
                self.take_word(fields)
                return None
        return fields

    def take_word(self, fields: list[bytes]) -> None:
        match fields:
            case [b"ping"]:
                if PONG not in self.replies:
                    self.replies.insert(0, PONG)
            case [b"pong"]:
                pass
            case [b"bye"] if not self.heard_bye:
                self.heard_bye = True
                self.replies.append(BYE_OK)
            case [b"bye-ok"] if self.said_bye and not self.heard_bye_ok:
                self.heard_bye_ok = True
            case _:
                raise Bad("unknown, or not now")

    def other_id(self, field: bytes) -> int:
        id = number(field)
        if id % 2 == self.me:
            raise Bad("parity")
        return id

    def take_request(self, id: int) -> None:
        if id in self.asking or len(self.asking) == self.slots or self.heard_bye_ok:
            raise Bad("in flight, one too many, or too late")
        self.asking.add(id)

    def take_answer(self, id: int) -> None:
        if id not in self.asked:
            raise Bad("not awaited")
        self.asked.remove(id)
        self.forget(id)

    # channels

    def take_of_channel(self, fields: list[bytes]) -> bool:
        """Whether it is one for the user."""
        match fields:
            case [b"chan", id, timeout, credit, inner]:
                self.interpret([b"req", id, timeout, inner])
                self.begin(int(id), number(credit))
                return True
            case [b"item", id, inner]:
                unpack_body(inner)
                return self.take_item(number(id), len(inner))
            case [b"credit", id, size]:
                self.take_credit(number(id), number(size))
                return False
            case [b"end", id]:
                return self.take_end(number(id))
            case _:
                raise Bad("number of fields")

    def begin(self, id: int, credit: int) -> None:
        self.to_send[id] = self.to_take[id] = 0
        self.take_credit(id, credit)
        if not self.said_bye:
            self.replies += self.put([b"credit", b"%d" % id, b"%d" % self.credit])

    def forget(self, id: int) -> None:
        self.to_send.pop(id, None)
        self.to_take.pop(id, None)

    def is_channel(self, id: int) -> bool:
        if id in self.asked | self.asking and id not in self.to_send:
            raise Bad("no channel")
        return id in self.to_send

    def take_item(self, id: int, size: int) -> bool:
        if not self.is_channel(id):
            return False
        if self.to_take.get(id, 0) <= 0:
            raise Bad("no credit, or after the end")
        self.to_take[id] -= size
        return True

    def take_end(self, id: int) -> bool:
        if not self.is_channel(id):
            return False
        if self.to_take.pop(id, None) is None:
            raise Bad("a second end")
        return True

    def take_credit(self, id: int, size: int) -> None:
        if self.is_channel(id):
            self.to_send[id] += size
            if self.to_send[id] > MAX_CREDIT:
                raise Bad("too much credit")

    def take_piece(self, n: int, left: int, piece: bytes) -> list[bytes] | None:
        if not piece:
            raise Bad("empty piece")
        if n in self.pieces:
            data, before = self.pieces.pop(n)
            if left != before - len(piece):
                raise Bad("left")
        else:
            data = b""
            if len(piece) + left > self.limit or len(self.pieces) == MAX_OPEN:
                raise Bad("over the limit, or one too many")
        data += piece
        if left:
            self.pieces[n] = data, left
            return None
        fields = unpack_body(data)
        if fields[:1] not in ([b"req"], [b"chan"], [b"ok"], [b"item"]):
            raise Bad("not in pieces")
        return self.interpret(fields)


def text(field: bytes) -> str:
    try:
        return field.decode()
    except UnicodeDecodeError:
        raise Bad("no text") from None
