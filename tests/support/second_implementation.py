"""A second implementation of the protocol. It follows ``docs/protocol.rst`` alone, and so tests that text.

Bytes in, bytes out; no input or output, no time, and nothing of the package. A receiver raises `Bad` for a
packet that it must refuse, and `NotAuthentic` if the key is wrong. The names are those of the text.
"""

from __future__ import annotations

import hashlib
import re
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
    """The other side sent something that must be refused."""


class NotAuthentic(Bad):
    """The other side did not prove that it has the key."""


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
    """Return the fields of exactly one packet."""
    if len(data) < 4:
        raise Bad("no length")
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


def pairs(data: bytes, most: int, name: bytes) -> dict[bytes, bytes]:
    """Decode the names and values of options or of a context. The names must match a pattern."""
    if len(data) > most:
        raise Bad("too long")
    fields = unpack_body(data)
    found = dict(zip(fields[::2], fields[1::2], strict=False))
    if len(fields) != 2 * len(found):
        raise Bad("an odd count, or a name twice")
    if not all(re.fullmatch(name, each) for each in found):
        raise Bad("name")
    return found


def options(data: bytes) -> dict[bytes, bytes]:
    found = pairs(data, 96, rb"[a-z0-9./-]{1,32}")
    if b"room" in found:
        number(found[b"room"])
    return found


def context(data: bytes) -> dict[bytes, bytes]:
    """Decode the context of a request; a request without one has an empty context."""
    found = pairs(data, 8192, rb"[a-z0-9._-]{1,64}") if data else {}
    if data and not 1 <= len(found) <= 32:
        raise Bad("number of pairs")
    return found


def flat(mapping: Mapping[bytes, bytes]) -> bytes:
    """Encode options, or a context, as a body."""
    return body([field for pair in mapping.items() for field in pair])


GREASE = {b"grease.c0de": b"second"}
"""The options that this implementation sends by default."""


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
        """Return the plaintext of one whole record; empty: the end."""
        (length,) = struct.unpack(">H", record[:2])
        if length < 16 or length != len(record) - 2:
            raise Bad("record length")
        try:
            return crypto_secretbox_open(record[2:], self.nonce(), self.key)
        except CryptoError:
            raise Bad("record does not open") from None


# ---- the handshake ----


class Handshake:
    """The part that both sides share. `me` is 0 for the client and 1 for the server."""

    def __init__(
        self,
        me: int,
        mode: bytes,
        service: bytes,
        own_limits: tuple[int, int],
        secret: bytes,
        *,
        own_options: Mapping[bytes, bytes],
    ) -> None:
        self.me, self.mode, self.service, self.secret = me, mode, service, secret
        self.own_limits = [b"%d" % value for value in own_limits]
        self.declared = [*self.own_limits, flat(own_options)]
        self.peer_limits = (0, 0)
        self.peer_options: dict[bytes, bytes] = {}
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

    def hash_open(self, key: bytes, six: list[bytes]) -> None:
        service = struct.pack(">B", len(self.service)) + self.service
        self.h1 = blake(32, b"", b"bokbok1 open", self.h0 + service + packet(six))
        self.box_key = blake(32, key, b"bokbok1 box", self.h1)

    def hash_accepted(self, key: bytes, four: list[bytes]) -> None:
        self.h2 = blake(32, b"", b"bokbok1 accept", self.h1 + self.box + packet(four))
        self.proof = blake(32, key, b"bokbok1 server", self.h2)
        self.fk = blake(64, key, b"bokbok1 final", self.session_key + self.ee + self.h2)


class Client(Handshake):
    """The side that dialled. In mode plain the key is empty."""

    def __init__(
        self,
        user: bytes,
        key: bytes,
        service: bytes,
        own_limits: tuple[int, int],
        secret: bytes,
        *,
        own_options: Mapping[bytes, bytes] = GREASE,
    ) -> None:
        mode = b"sealed" if key else b"plain"
        super().__init__(0, mode, service, own_limits, secret, own_options=own_options)
        self.user, self.key = user, key

    def open(self, session_key: bytes) -> bytes:
        if not self.key:
            return packet([b"open", b"", *self.declared, b"", b""])
        six = [b"open", self.user, *self.declared, b""]
        six[5] = bytes(512 - len(packet([*six, bytes(80)])))
        self.hash_open(self.key, six)
        self.session_key = session_key
        self.box = crypto_secretbox(session_key + self.h1, self.h1[:24], self.box_key)
        return packet([*six, self.box])

    def take_reply(self, reply: bytes) -> None:
        fields = unpack(reply)
        if fields[:1] == [b"refused"] and len(fields) == 3 and len(fields[2]) <= 256:
            raise (NotAuthentic if fields[1] == b"authentication" else Bad)("refused")
        if fields[:1] != [b"accepted"] or len(fields) != 5:
            raise Bad("reply")
        if self.key:
            self.hash_accepted(self.key, fields[:4])
            if len(fields[4]) != 32 or not sodium_memcmp(fields[4], self.proof):
                raise NotAuthentic("proof")
        elif fields[4]:
            raise Bad("a proof in mode plain")
        self.peer_limits, self.peer_options = limits(fields[1], fields[2]), options(fields[3])


class Server(Handshake):
    """The side that accepted. In mode plain there are no `keys`."""

    def __init__(
        self,
        keys: Mapping[bytes, bytes] | None,
        service: bytes,
        own_limits: tuple[int, int],
        secret: bytes,
        *,
        own_options: Mapping[bytes, bytes] = GREASE,
    ) -> None:
        mode = b"plain" if keys is None else b"sealed"
        super().__init__(1, mode, service, own_limits, secret, own_options=own_options)
        self.keys = keys

    def take_open(self, data: bytes, dummy_key: bytes = bytes(32)) -> bytes:
        """Take `open` and make `accepted`. If this raises `NotAuthentic`, send `refused`."""
        fields = unpack(data)
        if len(fields) != 7 or fields[0] != b"open":
            raise Bad("open")
        _, user, max_message_size, max_requests, encoded, pad, self.box = fields
        self.peer_limits, peer_options = limits(max_message_size, max_requests), options(encoded)
        four = [b"accepted", *self.declared]
        if self.keys is None:
            if user or pad or self.box:
                raise Bad("not empty in mode plain")
            self.peer_options = peer_options
            return packet([*four, b""])
        if len(data) != 512 or len(self.box) != 80 or any(pad):
            raise Bad("padding")
        key = self.keys.get(user, dummy_key)
        self.hash_open(key, fields[:6])
        try:
            opened = crypto_secretbox_open(self.box, self.h1[:24], self.box_key)
        except CryptoError:
            raise NotAuthentic("box") from None
        if not sodium_memcmp(opened[32:], self.h1):
            raise NotAuthentic("box")
        self.session_key, self.peer_options = opened[:32], peer_options
        self.hash_accepted(key, four)
        return packet([*four, self.proof])


# ---- an open connection ----

MAX_WHOLE = 66_560
MAX_PIECE = 65_458
MAX_OPEN = 4
MAX_CREDIT = 4_294_967_295
ITEM_COST = 64
MAX_DEPTH = 15
MAX_DETAILS = 16_384
MAX_ABORT = 256
PIECED = (b"req", b"chan", b"ok", b"err", b"item")
PONG = packet([b"pong"])
BYE_OK = packet([b"bye-ok"])


def depth(field: bytes) -> int:
    if field and (not 1 <= number(field) <= MAX_DEPTH):
        raise Bad("depth")
    return int(field or b"0")


class Open:
    """One side of an open connection; `me` as above, `limit` and `slots` as agreed.

    It sends everything at once. Only the `replies` wait here: the packets that answer packets of the other
    side, such as the first `credit` of each channel that it takes.
    """

    def __init__(self, me: int, limit: int, slots: int, credit: int = 262_144) -> None:
        self.me, self.limit, self.slots, self.credit = me, limit, slots, credit
        self.asked: set[int] = set()  # own requests that are not answered
        self.asking: dict[
            int, tuple[int, bool]
        ] = {}  # requests of the other side: the depth, and whether it is a channel
        self.to_send: dict[int, int] = {}  # by channel: credit for own items
        self.to_take: dict[int, int] = {}  # by channel: credit for items of the other side, until its end
        self.pieces: dict[int, tuple[bytes, int]] = {}  # the bytes so far, and how many remain
        self.count = 0  # own packets in pieces
        self.said_bye = self.heard_bye = self.heard_bye_ok = self.heard_abort = False
        self.replies: list[bytes] = []

    # sending

    def put(self, fields: list[bytes]) -> list[bytes]:
        """Return the packets that carry these fields."""
        match fields:
            case [b"req" | b"chan", id, _, nested, _, *credit, _]:
                assert nested or not self.heard_bye
                self.asked.add(int(id))
                if credit:
                    self.to_send[int(id)], self.to_take[int(id)] = 0, int(credit[0])
            case [b"ok" | b"err", id, *_]:
                del self.asking[int(id)]
                self.forget(int(id))
            case [b"item", id, inner]:
                assert self.to_send[int(id)] > 0
                self.to_send[int(id)] -= len(inner) + ITEM_COST
            case [b"credit", id, size]:
                self.to_take[int(id)] += int(size)
            case [b"bye"]:
                self.said_bye = True
        data = body(fields)
        assert len(data) <= self.limit
        if len(data) <= MAX_WHOLE:
            return [packet(fields)]
        assert fields[0] in PIECED
        parts = []
        while data:
            piece, data = data[:MAX_PIECE], data[MAX_PIECE:]
            parts.append(packet([b"part", b"%d" % self.count, b"%d" % len(data), piece]))
        self.count += 1
        return parts

    def abort(self, error: Bad) -> list[bytes]:
        """Return the packets to send after an error of the other side, before the end."""
        if self.heard_abort:
            return []
        return self.put([b"abort", b"protocol", str(error).encode()[:MAX_ABORT]])

    def is_drained(self) -> bool:
        return self.heard_bye_ok and not self.asked and not self.asking and not self.replies

    # receiving

    def take(self, data: bytes) -> list[bytes] | None:
        """Take one packet, and return its fields, or those that it completes, if they are for the user."""
        if self.heard_abort:
            return None
        return self.interpret(unpack(data, min(self.limit, MAX_WHOLE)))

    def interpret(self, fields: list[bytes]) -> list[bytes] | None:
        match fields:
            case [b"req", id, timeout, nested, along, inner]:
                self.check_request(timeout, along, inner)
                self.take_request(self.other_id(id), depth(nested), is_channel=False)
            case [b"ok", id, inner]:
                unpack_body(inner)
                self.take_answer(number(id))
            case [b"err", id, code, message, details]:
                text(code)
                text(message)
                if len(details) > MAX_DETAILS:
                    raise Bad("details")
                self.take_answer(number(id))
            case [b"cancel", id]:
                self.other_id(id)
            case [b"part", n, remaining, piece]:
                return self.take_piece(number(n), number(remaining), piece)
            case [b"drop", n]:
                if self.pieces.pop(number(n), None) is None:
                    raise Bad("drop")
                return None
            case [b"chan" | b"item" | b"credit" | b"end", *_]:
                return fields if self.take_of_channel(fields) else None
            case [b"abort", *rest]:
                self.heard_abort = True  # also if it is malformed
                code, message = rest if len(rest) == 2 else (b"", bytes(MAX_ABORT + 1))
                text(code)
                text(message)
                if len(message) > MAX_ABORT:
                    raise Bad("abort")
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
                raise Bad("unknown packet, or not allowed now")

    def other_id(self, field: bytes) -> int:
        id = number(field)
        if id % 2 == self.me:
            raise Bad("parity")
        return id

    def check_request(self, timeout: bytes, along: bytes, inner: bytes) -> None:
        if timeout:
            number(timeout)
        context(along)
        unpack_body(inner)

    def take_request(self, id: int, nested: int, *, is_channel: bool) -> None:
        if id in self.asking or (self.heard_bye_ok and not nested):
            raise Bad("in flight, or too late")
        if list(self.asking.values()).count((nested, is_channel)) == self.slots:
            raise Bad("one too many of its kind and depth")
        self.asking[id] = nested, is_channel

    def take_answer(self, id: int) -> None:
        if id not in self.asked:
            raise Bad("not awaited")
        self.asked.remove(id)
        self.forget(id)

    # channels

    def take_of_channel(self, fields: list[bytes]) -> bool:
        """Take a packet of a channel. Return whether it is for the user."""
        match fields:
            case [b"chan", id, timeout, nested, along, credit, inner]:
                self.check_request(timeout, along, inner)
                if number(credit) > MAX_CREDIT:
                    raise Bad("too much credit")
                self.take_request(self.other_id(id), depth(nested), is_channel=True)
                self.begin(int(id), int(credit))
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
        self.to_send[id], self.to_take[id] = credit, 0
        if not self.said_bye or self.asking[id][0]:
            self.replies += self.put([b"credit", b"%d" % id, b"%d" % self.credit])

    def forget(self, id: int) -> None:
        self.to_send.pop(id, None)
        self.to_take.pop(id, None)

    def is_channel(self, id: int) -> bool:
        if id in self.asked | self.asking.keys() and id not in self.to_send:
            raise Bad("no channel")
        return id in self.to_send

    def take_item(self, id: int, size: int) -> bool:
        if not self.is_channel(id):
            return False
        if self.to_take.get(id, 0) <= 0:
            raise Bad("no credit, or after the end")
        self.to_take[id] -= size + ITEM_COST
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

    def take_piece(self, n: int, remaining: int, piece: bytes) -> list[bytes] | None:
        if not piece:
            raise Bad("empty piece")
        if n in self.pieces:
            data, before = self.pieces.pop(n)
            if remaining != before - len(piece):
                raise Bad("remaining")
        else:
            data = b""
            if len(piece) + remaining > self.limit or len(self.pieces) == MAX_OPEN:
                raise Bad("over the limit, or one too many")
        data += piece
        if remaining:
            self.pieces[n] = data, remaining
            return None
        fields = unpack_body(data)
        if fields[:1] not in [[kind] for kind in PIECED]:
            raise Bad("not in pieces")
        return self.interpret(fields)


def text(field: bytes) -> str:
    try:
        return field.decode()
    except UnicodeDecodeError:
        raise Bad("no text") from None
