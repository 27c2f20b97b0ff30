"""What an engine must do, from ``docs/protocol.rst``.

`Model` is the wire between an engine and its peer. For all bytes that the engine receives it says which
events are due, or that the bytes must be refused. It checks all bytes that the engine sends.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, replace

from bokbok_trio._protocol.events import Abort, Answer, Bye, Cancel, End, Event, Failure, Item, Pong, Request
from bokbok_trio._protocol.flow_control import ITEM_OVERHEAD, MAX_QUEUED, WINDOW
from bokbok_trio._protocol.packets import LARGE
from bokbok_trio._protocol.session import Session
from tests.support.lies import FORMS, HEAD_ROOM, LIMIT

from ..support.second_implementation import (
    ITEM_COST,
    MAX_ABORT,
    MAX_CREDIT,
    MAX_DETAILS,
    MAX_OPEN,
    MAX_PIECE,
    MAX_WHOLE,
    PIECED,
    Bad,
    body,
    context,
    depth,
    number,
    packet,
    text,
    unpack_body,
)

MAX_BATCH = 2**16 + MAX_WHOLE + 2**10
"""Bytes of a batch besides control packets: one more packet if it has nearly 64 KiB, or 48 KiB and a piece
of a quarter of 64 KiB; and heads."""


@dataclass(eq=False)
class Talk:
    """A request of either side, with its channel if it has one. `in` is toward the engine."""

    has_channel: bool
    depth: int = 0
    has_left: bool = True  # wholly, if it is the engine's
    deadline: float = math.inf
    due: deque[list[bytes]] = field(default_factory=deque)  # of the engine, not wholly departed
    number: int | None = None  # of the first of these, if it has partly departed
    rest: bytes = b""  # the remaining bytes of that one
    is_cancelled: bool = False  # by the asker
    is_answered: bool = False  # by the engine's user
    has_begun: bool = False  # the engine's user has granted the first credit
    in_credit: int = 0  # as the engine counts it
    out_credit: int = 0  # likewise
    in_ended: bool = False
    out_ended: bool = False
    consumed: int = 0  # bytes for which no credit was granted yet
    held: deque[int] = field(default_factory=deque)  # sizes of the items that are not consumed

    @property
    def slots(self) -> tuple[int, bool]:
        """The slot class."""
        return self.depth, self.has_channel

    @property
    def may_send(self) -> bool:
        items = [packet[-1] for packet in self.due if packet[0] == b"item"]
        return self.out_credit > 0 and sum(map(len, items)) + ITEM_OVERHEAD * len(items) < MAX_QUEUED

    @property
    def room(self) -> int:
        """The credit that the peer may still grant, by the peer's own count."""
        items = [x for x in self.due if x[0] == b"item"]
        return MAX_CREDIT - self.out_credit - sum(len(x[-1]) + ITEM_COST for x in items)


class Model:
    """What the engine must do. `me` is the parity of its ids."""

    def __init__(self, me: int, max_requests: int, slots: int) -> None:
        self.me, self.max_requests, self.slots = me, max_requests, slots
        self.next_id = me
        self.backlog: dict[int, Talk] = {}  # the engine's requests without a slot
        self.ours: dict[int, Talk] = {}  # the engine's requests with a slot
        self.theirs: dict[int, Talk] = {}  # the peer's requests
        self.gone: list[int] = []  # ids of ended requests, of both sides
        # Packets that must leave, besides those of the talks.
        self.control: list[list[bytes]] = []
        self.credits: dict[int, int] = {}
        self.owes_bye_ok = False
        # The state of draining and closing, on both sides.
        self.is_draining = self.peer_drains = self.heard_bye_ok = self.is_closed = False
        self.partly_left: dict[int, int] = {}  # number of the packet in pieces -> id
        self.next_number = 0
        self.buffer = b""
        self.pieces: dict[int, tuple[bytes, int]] = {}

    def copy(self) -> Model:
        """Copy the model as `copy.deepcopy` does, and much faster."""
        other = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, dict | list):
                setattr(other, name, value.copy())
        for talks in (other.backlog, other.ours, other.theirs):
            for id, talk in talks.items():
                talks[id] = replace(talk, due=talk.due.copy(), held=talk.held.copy())
        return other

    # ---- the engine's user ----

    def ask(
        self, fields: list[bytes], deadline: float, *, has_channel: bool, depth: int, context: bytes
    ) -> int:
        id, self.next_id = self.next_id, self.next_id + 2
        kind, rest = (b"chan", [b"%d" % WINDOW]) if has_channel else (b"req", [])
        talk = self.backlog[id] = Talk(has_channel, depth, has_left=False, deadline=deadline)
        nested = b"%d" % depth if depth else b""
        talk.due.append([kind, b"%d" % id, b"", nested, context, *rest, body(fields)])
        self.use_slots()
        return id

    def use_slots(self) -> None:
        for id, talk in list(self.backlog.items()):
            if count(self.ours, talk.slots) < self.slots:
                self.ours[id] = self.backlog.pop(id)

    def free_slot(self, id: int) -> None:
        del self.ours[id]
        self.gone.append(id)
        self.use_slots()

    def cancel(self, id: int) -> None:
        if self.backlog.pop(id, None) is not None:
            self.gone.append(id)
            return
        talk = self.ours[id]
        self.take_back(talk)
        if talk.has_left:
            talk.is_cancelled = True
            talk.held.clear()
            self.control.append([b"cancel", b"%d" % id])
        else:
            self.free_slot(id)

    def take_back(self, talk: Talk) -> None:
        talk.due.clear()
        if talk.number is not None:
            self.control.append([b"drop", b"%d" % talk.number])
            del self.partly_left[talk.number]
            talk.number = None

    def answer(self, id: int, fields: list[bytes]) -> None:
        self.theirs[id].is_answered = True
        if not self.is_closed:
            self.theirs[id].due.append(fields)

    def send_item(self, id: int, inner: bytes) -> None:
        talk = self.talk(id)
        talk.due.append([b"item", b"%d" % id, inner])
        talk.out_credit -= len(inner) + ITEM_COST

    def end(self, id: int) -> None:
        talk = self.talk(id)
        if not talk.out_ended:
            talk.out_ended = True
            talk.due.append([b"end", b"%d" % id])

    def consume(self, id: int) -> None:
        talk = self.talk(id)
        talk.consumed += talk.held.popleft() + ITEM_COST
        if talk.consumed >= WINDOW // 2 and not talk.in_ended:
            self.grant(id, talk.consumed)
            talk.consumed = 0

    def grant(self, id: int, size: int) -> None:
        talk = self.talk(id)
        talk.has_begun = True
        talk.in_credit += size
        self.credits[id] = self.credits.get(id, 0) + size

    def drop_items(self, id: int) -> None:
        """Note that the peer has cancelled a request."""
        if id in self.theirs:
            self.take_back(self.theirs[id])

    def drain(self) -> None:
        if not self.is_draining:
            self.is_draining = True
            self.control.append([b"bye"])

    def close(self) -> None:
        self.is_closed = True
        for talk in self.ours.values():
            self.take_back(talk)
        self.ours.clear()
        self.backlog.clear()
        self.owes_bye_ok = False

    # ---- its state ----

    def talk(self, id: int) -> Talk:
        return (self.ours | self.theirs | self.backlog)[id]

    @property
    def in_flight(self) -> dict[int, Talk]:
        """Return the requests in flight, as the peer knows them."""
        return {id: talk for id, talk in (self.ours | self.theirs).items() if talk.has_left}

    @property
    def channels(self) -> dict[int, Talk]:
        every = self.ours | self.theirs | self.backlog
        return {id: talk for id, talk in every.items() if talk.has_channel}

    @property
    def unanswered(self) -> list[int]:
        return [id for id, talk in self.theirs.items() if not talk.is_answered]

    @property
    def used(self) -> list[int]:
        """Return the channels that the engine's user still has."""
        ours = [id for id, talk in self.channels.items() if id not in self.theirs and not talk.is_cancelled]
        return ours + [id for id in self.unanswered if self.theirs[id].has_channel]

    @property
    def queued(self) -> int:
        talks = (*self.ours.values(), *self.theirs.values())
        return len(self.control) + len(self.credits) + sum(len(talk.due) for talk in talks)

    # ---- sent packets ----

    def check_batch(self, batch: bytes, now: float) -> None:
        """Check that each packet of a batch is due, and each due packet is in it or has a reason to wait."""
        packets = split(batch)
        count = len(self.control)
        if self.is_closed:  # the order does not matter: everything ends at once
            assert sorted(packets[:count]) == sorted(self.control)
        else:
            assert packets[:count] == self.control
        self.control = []
        del packets[:count]
        credits = [(number(id), number(size)) for _, id, size in packets[: len(self.credits)]]
        assert sorted(credits) == sorted(self.credits.items())
        del packets[: len(credits)]
        self.credits = {}
        talks = (*self.ours.values(), *self.theirs.values())
        if not packets:
            assert not any(talk.due for talk in talks)
        must_have_piece = any(talk.number is not None or is_big(talk.due) for talk in talks)
        # A piece of one packet; the last bytes of another may be in the batch too.
        assert len({fields[1] for fields in packets if fields[0] == b"part"}) == must_have_piece
        for at, fields in enumerate(packets):
            match fields:
                case [b"part", n, left, piece]:
                    assert {fields[0] for fields in packets[at:]} <= {b"part", b"bye-ok"}
                    self.check_piece(number(n), number(left), piece, now)
                case [b"bye-ok"]:
                    assert self.owes_bye_ok
                    assert at == len(packets) - 1
                    assert not self.has_unsent
                    self.owes_bye_ok = False
                case _:
                    id = number(fields[1])
                    assert self.talk(id).number is None
                    assert fields == self.due(id, now)
                    self.on_left(id)
        if self.owes_bye_ok:
            assert self.has_unsent
        assert sum(len(packet(fields)) for fields in packets) <= MAX_BATCH

    @property
    def has_unsent(self) -> bool:
        """Whether a request of depth 0 must still leave before `bye-ok`."""
        return any(not talk.has_left and not talk.depth for talk in self.ours.values())

    def due(self, id: int, now: float) -> list[bytes]:
        """Return the packet of that id that must leave next."""
        fields = list((self.ours | self.theirs)[id].due[0])
        if fields[0] in (b"req", b"chan"):
            assert not self.peer_drains or self.owes_bye_ok or self.ours[id].depth
            if not is_big(self.ours[id].due):
                ours = self.ours.items()
                waiting = [id for id, talk in ours if not talk.has_left and not is_big(talk.due)]
                assert id == waiting[0], "in the order they took a slot"
            left = max(0.0, self.ours[id].deadline - now) * 10**6
            fields[2] = b"" if left > 10**17 else b"%d" % int(left)
        return fields

    def check_piece(self, n: int, left: int, piece: bytes, now: float) -> None:
        if n not in self.partly_left:
            assert n == self.next_number
            assert len(self.partly_left) < MAX_OPEN
            self.next_number += 1
            kind_size = int.from_bytes(piece[1:5], "big")
            id_size = int.from_bytes(piece[5 + kind_size : 9 + kind_size], "big")
            id = self.partly_left[n] = number(piece[9 + kind_size : 9 + kind_size + id_size])
            talk = self.talk(id)
            assert is_big(talk.due)
            talk.number, talk.rest = n, body(self.due(id, now))
            assert len(talk.rest) <= LIMIT
        id = self.partly_left[n]
        talk = self.talk(id)
        assert 0 < len(piece) <= MAX_PIECE
        assert talk.rest.startswith(piece)
        talk.rest = talk.rest[len(piece) :]
        assert left == len(talk.rest)
        if not left:
            del self.partly_left[n]
            talk.number = None
            self.on_left(id)

    def on_left(self, id: int) -> None:
        talk = self.talk(id)
        kind = talk.due.popleft()[0]
        if kind in (b"ok", b"err"):
            assert not talk.due
            del self.theirs[id]
            self.gone.append(id)
        elif kind in (b"req", b"chan"):
            talk.has_left = True
            talk.in_credit = WINDOW if talk.has_channel else 0

    # ---- received packets ----

    def judge(self, data: bytes) -> Iterator[Event]:
        """Return the events that the next bytes must cause. Raise `Bad` if they must be refused."""
        self.buffer += data
        while len(self.buffer) >= 4:
            length = int.from_bytes(self.buffer[:4], "big")
            if length > min(LIMIT, MAX_WHOLE):
                raise Bad("too long")
            if len(self.buffer) < 4 + length:
                break
            inner, self.buffer = self.buffer[4 : 4 + length], self.buffer[4 + length :]
            event = self.interpret(unpack_body(inner))
            if event is not None:
                yield event

    def interpret(self, fields: list[bytes]) -> Event | None:  # noqa: PLR0911  (one for each kind)
        self.check_form(fields)
        match fields:
            case [b"req" | b"chan", id, timeout, nested, along, *credit, inner]:
                request = Request(
                    int(id),
                    int(timeout) / 10**6 if timeout else math.inf,
                    unpack_body(inner),
                    bool(credit),
                    depth(nested),
                    {name.decode(): value for name, value in context(along).items()},
                )
                return self.on_request(request, int(credit[0]) if credit else 0)
            case [b"ok", id, inner]:
                return Answer(int(id), unpack_body(inner)) if self.is_wanted(int(id)) else None
            case [b"err", id, code, message, details]:
                failure = Failure(int(id), code.decode(), message.decode(), details)
                return failure if self.is_wanted(int(id)) else None
            case [b"cancel", id]:
                return self.on_cancel(int(id))
            case [b"item" | b"credit" | b"end", id, *_]:
                return self.on_channel(self.in_flight.get(int(id)), fields)
            case [b"part", n, left, piece]:
                return self.on_piece(int(n), int(left), piece)
            case [b"abort", code, message]:
                return Abort(code.decode(), message.decode())
            case [b"drop", n]:
                if self.pieces.pop(int(n), None) is None:
                    raise Bad("drop")
            case [word]:
                return self.on_word(word)
        return None

    def check_form(self, fields: list[bytes]) -> None:
        form = "iip" if fields[:1] == [b"part"] else FORMS.get(fields[0]) if fields else None
        if form is None or len(fields) != 1 + len(form):
            raise Bad("unknown, or of a wrong number of fields")
        for letter, value in zip(form, fields[1:], strict=True):
            if letter == "i" or (letter == "t" and value):
                number(value)
            elif letter == "d":
                depth(value)
            elif letter == "c":
                context(value)
            elif letter == "b":
                unpack_body(value)
            elif letter in "xm":
                text(value)
            if len(value) > {"n": MAX_DETAILS, "m": MAX_ABORT}.get(letter, math.inf):
                raise Bad("too long")

    def on_request(self, request: Request, credit: int) -> Event:
        id = request.id
        if id % 2 == self.me or id in self.theirs:
            raise Bad("id")
        talk = Talk(request.has_channel, request.depth, out_credit=credit)
        if self.is_full(talk.slots) or (self.heard_bye_ok and not talk.depth):
            raise Bad("too many, or too late")
        if credit > MAX_CREDIT:
            raise Bad("credit")
        self.theirs[id] = talk
        return request

    def is_full(self, slots: tuple[int, bool]) -> bool:
        """Whether the peer has used up the slots of a class."""
        return count(self.theirs, slots) == self.max_requests

    def is_wanted(self, id: int) -> bool:
        if id not in self.ours or not self.ours[id].has_left:
            raise Bad("not awaited")
        talk = self.ours[id]
        self.take_back(talk)
        self.free_slot(id)
        return not talk.is_cancelled

    def on_cancel(self, id: int) -> Event | None:
        if id % 2 == self.me:
            raise Bad("parity")
        if id not in self.theirs or self.theirs[id].is_answered:
            return None
        self.theirs[id].is_cancelled = True
        return Cancel(id)

    def on_channel(self, talk: Talk | None, fields: list[bytes]) -> Event | None:
        if talk is None:
            return None
        id = int(fields[1])
        if not talk.has_channel:
            raise Bad("no channel")
        is_dropped = id in self.ours and talk.is_cancelled
        match fields:
            case [b"item", _, inner]:
                if talk.in_ended or talk.in_credit <= 0:
                    raise Bad("ended, or without credit")
                talk.in_credit -= len(inner) + ITEM_COST
                if not is_dropped:
                    talk.held.append(len(inner))
                    return Item(id, len(inner), unpack_body(inner), inner if len(inner) < LARGE else None)
            case [_, _, size]:
                talk.out_credit += int(size)
                if talk.out_credit > MAX_CREDIT:
                    raise Bad("credit")
            case _:
                if talk.in_ended:
                    raise Bad("a second end")
                talk.in_ended = True
                return None if is_dropped else End(id)
        return None

    def on_piece(self, n: int, left: int, piece: bytes) -> Event | None:
        before, expected = self.pieces.get(n, (b"", None))
        if not piece or (expected is not None and left + len(piece) != expected):
            raise Bad("piece")
        if expected is None and (left + len(piece) > LIMIT or len(self.pieces) == MAX_OPEN):
            raise Bad("one too many, or too long")
        self.pieces[n] = before + piece, left
        if left:
            return None
        del self.pieces[n]
        fields = unpack_body(before + piece)
        if not fields or fields[0] not in PIECED:
            raise Bad("not in pieces")
        return self.interpret(fields)

    def on_word(self, word: bytes) -> Event | None:
        if word == b"ping" and [b"pong"] not in self.control:
            self.control.append([b"pong"])
        elif word == b"pong":
            return Pong()
        elif word == b"bye":
            if self.peer_drains:
                raise Bad("bye twice")
            self.peer_drains = self.owes_bye_ok = True
            ids = [
                id for kind in (False, True) for id, talk in self.backlog.items() if talk.slots == (0, kind)
            ]
            self.gone += ids
            for id in ids:
                del self.backlog[id]
            return Bye(ids)
        elif word == b"bye-ok":
            if not self.is_draining or self.heard_bye_ok:
                raise Bad("bye-ok without bye, or twice")
            self.heard_bye_ok = True
        return None


def request(id: int, nested: int, *, has_channel: bool, credit: int = 0) -> list[bytes]:
    """Make a request without a context."""
    head = [b"%d" % id, b"", b"%d" % nested if nested else b"", b""]
    if has_channel:
        return [b"chan", *head, b"%d" % credit, body([])]
    return [b"req", *head, body([])]


def split(batch: bytes) -> list[list[bytes]]:
    packets = []
    while batch:
        length = int.from_bytes(batch[:4], "big")
        assert length <= MAX_WHOLE
        assert len(batch) >= 4 + length, "a batch is of whole packets"
        packets.append(unpack_body(batch[4 : 4 + length]))
        batch = batch[4 + length :]
    return packets


def is_big(due: deque[list[bytes]]) -> bool:
    """Whether the first packet is sent in pieces, with the longest head and with the shortest."""
    if not due:
        return False
    kind, _, *rest = due[0]
    if kind in (b"req", b"chan"):
        del rest[0]  # its timeout
    return sum(map(len, rest)) > MAX_WHOLE - HEAD_ROOM


def count(talks: Mapping[int, Talk], slots: tuple[int, bool]) -> int:
    """Count the requests of a slot class."""
    return [talk.slots for talk in talks.values()].count(slots)


def is_refused(
    engine: Session, model: Model, data: bytes, size: int, events: list[Event] | None = None
) -> bool:
    """Receive bytes, so many at a time. The engine must do what the model says.

    Arguments:
        events: the list to which the events are added.
    """
    size = max(size, len(data) // 64)
    for at in range(0, len(data), size):
        chunk = data[at : at + size]
        due: list[Event] = []
        is_bad = False
        try:
            for event in model.judge(chunk):
                due.append(event)  # noqa: PERF402  (those before an error count)
        except Bad:
            is_bad = True
        told = engine.receive(chunk)
        if events is not None:
            events += told
        aborts = [at for at, event in enumerate(due) if isinstance(event, Abort)]
        if aborts:  # nothing after `abort` counts
            assert told[: aborts[0] + 1] == due[: aborts[0] + 1]
            check_last_words(engine, None)
            return False
        assert told == due
        assert (engine.error is not None) == is_bad
        if is_bad:
            if b"abort" not in data:
                check_last_words(engine, "you know why" + "\xe4" * 200)
            return True
    return False


def check_last_words(engine: Session, message: str | None) -> None:
    """Close an engine. Its last packet says why; None: the peer sent `abort` first, so it sends none."""
    engine.close()
    engine.abort(message or "not in answer to an abort")
    packets = []
    while batch := engine.take(0):
        packets += split(batch)
    if message is None:
        assert [b"abort"] not in [packet[:1] for packet in packets]
    else:
        kind, code, text = packets.pop()
        assert (kind, code) == (b"abort", b"protocol")
        assert message.startswith(text.decode())
        assert MAX_ABORT - 1 <= len(text) <= MAX_ABORT
