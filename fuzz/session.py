"""The target `session`: an open connection, at the server."""

from __future__ import annotations

import math
from typing import Final

from bokbok_trio import MessageTooLarge
from bokbok_trio._protocol.events import Abort, Answer, Bye, Cancel, End, Event, Failure, Item, Pong, Request
from bokbok_trio._protocol.packets import (
    PacketDecoder,
)
from bokbok_trio._protocol.session import NO_BUDGET, Session
from tests.support import second_implementation as second

from .scripts import (
    Fault,
    Script,
    check,
    decode_all,
    make_field,
    names_of,
    same,
)

MESSAGE_SIZE: Final = 2**17
SLOTS: Final = 2
IDS: Final = 12
"""Ids that a peer uses, of both parities: few, so that they are in flight now and then."""

RAW: Final = 30
"""The operation that sends bytes as they are. Those before it send packets, whole or in pieces."""

BEGIN: Final = 31
"""The one that begins another packet in pieces."""

RECEIVE: Final = 32
"""From here on: what was sent is received, but for some bytes at the end."""

ACT: Final = 40
"""From here on: all is received, and our user does something."""

OPERATIONS: Final = 64

MAX_PARTS: Final = 200
"""Pieces of a packet, which may be of a byte each."""

CONTEXT: Final = second.flat({b"a": b"1"})
CHOICES: Final = {
    "number": (b"0", b"1", b"64", b"300", b"100000", b"4294967295", b"4294967296", b"00", b"", b"9" * 19),
    "depth": (b"", b"", b"1", b"15", b"16", b"0", b"01"),
    "timeout": (b"", b"0", b"1000000", b"+1"),
    "context": (b"", b"", CONTEXT, b"\0", CONTEXT[:-1]),
    "body": (b"\0", second.body([b"x"]), second.body([b""] * 255), second.body([bytes(4050)]), b"", b"\1"),
}
FORMS: Final[tuple[tuple[bytes, tuple[str, ...]], ...]] = (
    (b"req", ("id", "timeout", "depth", "context", "body")),
    (b"chan", ("id", "timeout", "depth", "context", "number", "body")),
    (b"ok", ("id", "body")),
    (b"err", ("id", "text", "text", "text")),
    (b"cancel", ("id",)),
    (b"item", ("id", "body")),
    (b"credit", ("id", "number")),
    (b"end", ("id",)),
    (b"part", ("number", "number", "text")),
    (b"drop", ("number",)),
    (b"ping", ()),
    (b"pong", ()),
    (b"bye", ()),
    (b"bye-ok", ()),
    (b"abort", ("text", "text")),
)
"""What fields each kind of packet has."""


def make_packet(kind: int, script: Script) -> list[bytes]:
    """A packet of some kind, mostly a right one."""
    name, form = FORMS[kind]
    fields = [name]
    for each in form:
        if each == "id":
            fields.append(b"%d" % (script.byte() % IDS))
        elif each == "text":
            fields.append(make_field(script))
        else:
            fields.append(CHOICES[each][script.byte() % len(CHOICES[each])])
    return fields


def describe(event: Event) -> tuple[object, ...]:  # noqa: PLR0911  (one for each kind)
    """An event, as `Talk` says which one is due."""
    match event:
        case Request():
            kind = b"chan" if event.has_channel else b"req"
            return kind, event.id, event.timeout, event.depth, names_of(event.context), event.fields
        case Answer():
            return b"ok", event.id, event.fields
        case Failure():
            return b"err", event.id, event.code, event.message, event.details
        case Item():
            return b"item", event.id, event.fields
        case Cancel() | End():
            return type(event).__name__.lower().encode(), event.id
        case Abort():
            return b"abort", event.code, event.message
        case Bye() | Pong():
            return (type(event).__name__.lower().encode(),)


def describe_fields(fields: list[bytes]) -> tuple[object, ...]:
    """The same, of a packet that says something to the user."""
    match fields:
        case [b"req" | b"chan" as kind, id, timeout, depth, context, *_, body]:
            seconds = int(timeout) / 1e6 if timeout else math.inf
            pairs = second.context(context)
            return kind, int(id), seconds, int(depth or b"0"), pairs, second.unpack_body(body)
        case [b"ok" | b"item" as kind, id, body]:
            return kind, int(id), second.unpack_body(body)
        case [b"err", id, code, message, details]:
            return b"err", int(id), code.decode(), message.decode(), details
        case [b"abort", code, message]:
            return b"abort", code.decode(), message.decode()
        case [kind]:
            return (kind,)
        case [kind, id]:
            return kind, int(id)
        case _:
            raise AssertionError(fields)


class Talk:
    """A server's engine, an oracle in its place, and another in the place of its peer.

    What the engine sends is given to both, so that the oracle in its place knows what our user did. What the
    peer sends is given to the oracle first; only what that takes is noted for the peer.
    """

    def __init__(self) -> None:
        self.engine = Session(
            "server",
            max_message_size=MESSAGE_SIZE,
            max_requests=SLOTS,
            slots=SLOTS,
            budget=NO_BUDGET._replace(items=0),  # so that a channel's window is as small as it can be
        )
        self.due = second.Open(1, MESSAGE_SIZE, SLOTS, credit=0)
        self.peer = second.Open(0, MESSAGE_SIZE, SLOTS, credit=0)
        self.sent = PacketDecoder(2**20)
        self.pieces: dict[bytes, bytes] = {}  # of what the engine sends
        self.tail = b""  # what has come of a packet of the peer
        self.handling: list[int] = []  # requests of the peer that our user has not answered
        self.answered: set[int] = set()  # those whose answer has not left
        self.items: list[tuple[int, int]] = []  # that our user has not taken
        self.ours: list[int] = []
        self.cancelled: set[int] = set()
        self.ended: set[int] = set()

    # ---- what the engine sends ----

    def send(self, most: int = 2**20) -> None:
        """Let so many batches leave."""
        while most and (batch := self.engine.take(0.0)):
            most -= 1
            for fields in decode_all(self.sent, batch):
                self.note_sent(fields)

    def note_sent(self, fields: list[bytes]) -> None:
        try:
            self.peer.take(second.packet(fields))
        except second.Bad as exc:
            raise Fault(f"sent {fields[:2]!r}, which a peer must refuse: {exc}") from exc
        match fields:
            case [b"part", number, left, piece]:
                body = self.pieces[number] = self.pieces.get(number, b"") + piece
                if left == b"0":
                    del self.pieces[number]
                    self.note_whole(second.unpack_body(body))
            case [b"drop", number]:
                del self.pieces[number]
            case _:
                self.note_whole(fields)

    def note_whole(self, fields: list[bytes]) -> None:
        match fields:
            case [b"req" | b"chan", id, _, _, _, *credit, _]:  # also after a `bye`, where it had a slot
                self.due.asked.add(int(id))
                if credit:
                    self.due.to_send[int(id)], self.due.to_take[int(id)] = 0, int(credit[0])
            case [b"ok" | b"err", id, *_]:
                self.answered.remove(int(id))
                self.due.put(fields)
            case [b"credit", id, _] if int(id) not in self.due.to_take:
                pass  # it has crossed the end of that direction
            case [b"item" | b"credit" | b"bye", *_]:
                self.due.put(fields)
            case _:
                pass

    # ---- what the peer sends ----

    def receive(self, data: bytes) -> bool:
        """Receive some bytes. Returns whether the connection goes on."""
        due, is_bad = self.expect(data)
        events: list[Event] = []
        while self.engine.error is None:
            events += self.engine.receive(data)
            if not self.engine.has_undecoded:
                break
            data = b""
        aborted = next((n for n, event in enumerate(events) if isinstance(event, Abort)), None)
        if aborted is None:
            same((self.engine.error is not None, self.engine.error), (is_bad, self.engine.error))
        else:  # nothing after it counts, and the connection ends
            del events[aborted + 1 :]
            self.engine.close()
        same([describe(event) for event in events], due)
        for event in events:
            self.tell(event)
        check(right=self.engine._interpreter.reassembler.held <= 4 * MESSAGE_SIZE, what="too much is held")
        return self.engine.error is None and aborted is None

    def tell(self, event: Event) -> None:
        """What our user does at once."""
        if isinstance(event, Request):
            self.handling.append(event.id)
            if event.has_channel:
                self.engine.flow_control.accept(event.id)
                self.send()  # or the oracle would not know of the credit yet
        elif isinstance(event, Item):
            self.items.append((event.id, event.size))
        elif isinstance(event, Cancel):
            self.engine.drop_items(event.id)

    def expect(self, data: bytes) -> tuple[list[tuple[object, ...]], bool]:
        """The events that are due, and whether the bytes break a rule."""
        self.tail += data
        due: list[tuple[object, ...]] = []
        try:
            while len(self.tail) >= 4:
                end = 4 + int.from_bytes(self.tail[:4], "big")
                if end > 4 + min(MESSAGE_SIZE, second.MAX_WHOLE):
                    return due, True
                if len(self.tail) < end:
                    break
                packet, self.tail = self.tail[:end], self.tail[end:]
                fields = self.due.take(packet)
                if fields is None:
                    fields = second.unpack(packet, end)
                self.note_peer(fields)
                if self.is_told(fields):
                    due.append(describe_fields(fields))
                if fields[0] == b"abort":
                    return due, False
        except second.Bad:
            return due, True
        return due, False

    def is_told(self, fields: list[bytes]) -> bool:
        """Whether a good packet is an event for our user."""
        match fields:
            case [b"req" | b"chan" | b"abort" | b"bye" | b"pong", *_]:
                return True
            case [b"ok" | b"err", id, *_]:
                return int(id) not in self.cancelled
            case [b"item" | b"end", id, *_]:
                return int(id) not in self.cancelled and int(id) in self.due.to_send
            case [b"cancel", id]:
                return int(id) in self.due.asking and int(id) not in self.answered
            case _:
                return False

    def note_peer(self, fields: list[bytes]) -> None:
        """Tell the oracle in the peer's place what that has sent, which may be more than it should."""
        match fields:
            case [b"req" | b"chan", id, _, _, _, *credit, _]:
                self.peer.asked.add(int(id))
                if credit:
                    self.peer.to_send[int(id)], self.peer.to_take[int(id)] = 0, int(credit[0])
            case [b"ok" | b"err", id, *_]:
                del self.peer.asking[int(id)]
                self.peer.forget(int(id))
            case [b"credit", id, size] if int(id) in self.peer.to_take:
                self.peer.to_take[int(id)] += int(size)
            case [b"bye"]:
                self.peer.said_bye = True
            case _:
                pass

    # ---- what our user does ----

    def act(self, action: int, script: Script) -> None:
        which, size = script.byte(), (0, 10, 3000, 70_000)[script.byte() % 4]
        depth = (0, 0, 1, 15)[which % 4]
        try:
            match action:
                case 0 | 1 if depth or not self.engine.draining.peer_drains:
                    ask = self.engine.request if action else self.engine.open_channel
                    self.ours.append(ask([bytes(size)], depth=depth))
                case 2 | 3 if self.handling:
                    self.engine.answer(self.take_one(which), [bytes(size)])
                case 4 if self.handling:
                    self.engine.fail(self.take_one(which), "code", "message", bytes(size)[:10_000])
                case 5 if self.ours:
                    id = self.ours.pop(which % len(self.ours))
                    self.cancelled.add(id)
                    self.engine.cancel(id)
                case 6 | 7:
                    self.act_on_channel(which, size, ends=action == 7)
                case 8 if self.items:
                    self.engine.flow_control.consume(*self.items.pop(which % len(self.items)))
                    self.send()
                case 9:
                    self.engine.drain()
                    self.send()
                case 10:
                    self.engine.ping()
                case _:
                    self.send(which % 4)
        except MessageTooLarge:
            raise Fault("what fits is refused") from None

    def take_one(self, which: int) -> int:
        id = self.handling.pop(which % len(self.handling))
        self.answered.add(id)
        return id

    def act_on_channel(self, which: int, size: int, *, ends: bool) -> None:
        flows = self.engine.flow_control
        ids = [id for id in (*self.handling, *self.ours) if id in flows.credits and id not in self.ended]
        if ids and ends:
            self.ended.add(ids[which % len(ids)])
            flows.end(ids[which % len(ids)])
        elif ids and flows.may_send(ids[which % len(ids)]):
            flows.send(ids[which % len(ids)], *flows.encode([bytes(size)]))


def in_pieces(body: bytes, script: Script) -> bytes:
    """A packet in pieces, of which the first may say something wrong, or the last not come."""
    number, size, off = script.byte() % 6, script.short() + 1, script.byte()
    parts = []
    for at in range(0, len(body), size):
        left = max(0, len(body) - at - size) + (off if off < 3 and at == 0 else 0)
        parts.append([b"part", b"%d" % number, b"%d" % left, body[at : at + size]])
    if off == 3:
        parts.pop()
    return b"".join(map(second.packet, parts[:MAX_PARTS]))


def session(data: bytes) -> None:  # noqa: C901  (one case for each kind of operation)
    """A peer sends anything, and our user does anything."""
    script = Script(data)
    talk = Talk()
    buffer = b""
    begun = 6  # packets in pieces, numbered apart from all others
    while script:
        operation = script.byte() % OPERATIONS
        if operation < len(FORMS):
            buffer += second.packet(make_packet(operation, script))
        elif operation < 2 * len(FORMS):
            body = second.body(make_packet(operation - len(FORMS), script))
            buffer += in_pieces(body, script)
        elif operation == RAW:
            buffer += script.take(script.short())
        elif operation == BEGIN:
            begun += 1
            buffer += second.packet([b"part", b"%d" % begun, b"9", b"x"])
        elif operation < ACT:
            cut = script.byte()
            received, buffer = buffer[: len(buffer) - cut], buffer[len(buffer) - cut :] if cut else b""
            if not talk.receive(received):
                break
        else:
            if not talk.receive(buffer):
                break
            buffer = b""
            talk.act(operation - ACT, script)
            if script.byte() % 4:
                talk.send()
    else:
        talk.receive(buffer)
    if talk.engine.error is not None:
        talk.engine.abort(str(talk.engine.error))
    talk.send()
