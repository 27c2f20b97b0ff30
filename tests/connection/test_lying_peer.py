"""One engine, and a peer that does everything the protocol allows, in any crossing, and lies, and babbles.

`Model` is the wire between them, from ``docs/protocol.rst``: for everything that comes to the engine it says
which events are due, or that it must be refused, and it checks everything that leaves. `LyingPeer` plays both
the peer and the engine's user. A lie, noise or closing ends an engine, so it does these to a copy.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias, TypeVar

from hypothesis import settings, strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from bokbok_trio._protocol.events import Abort, Answer, Bye, Cancel, End, Event, Failure, Item, Pong, Request
from bokbok_trio._protocol.flow_control import ITEM_OVERHEAD, MAX_QUEUED, WINDOW
from bokbok_trio._protocol.packets import LARGE
from bokbok_trio._protocol.session import Session

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
    flat,
    number,
    packet,
    text,
    unpack_body,
)

T = TypeVar("T")

LIMIT = 2**18
"""Bytes of a packet: more than travels whole, and than a channel's credit."""

HEAD_ROOM = 128
"""Bytes of a packet that are not for the user's body and context."""

ITEM_ROOM = MAX_QUEUED - ITEM_OVERHEAD - 6
"""Bytes of the largest item's field behind which another may be queued."""

SIZES = (0, 20, 3000, 30_000, ITEM_ROOM, 65_430, 65_520, 150_000, LIMIT - HEAD_ROOM - 5)
"""Bytes of a user's field: small ones, as large as travels whole, in pieces, as large as may be."""

MAX_BATCH = 2**16 + MAX_WHOLE + 2**10
"""Bytes of a batch beside control packets: one more packet when it has 64 KiB already, or 48 KiB, and a
quarter of 64 KiB of a piece; and heads."""

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
"""What a field of each form must not be."""


def one_of(which: int, choices: list[T]) -> T | None:
    return choices[which % len(choices)] if choices else None


@dataclass(eq=False)
class Talk:
    """A request of either side, with its channel if it has one. `in` is toward the engine."""

    has_channel: bool
    depth: int = 0
    has_left: bool = True  # the engine's: wholly
    deadline: float = math.inf
    due: deque[list[bytes]] = field(default_factory=deque)  # of the engine's: what has not wholly left
    number: int | None = None  # of the first of these, where it has partly left
    rest: bytes = b""  # and what is left of that
    is_cancelled: bool = False  # by who asked
    is_answered: bool = False  # by the engine's user
    has_begun: bool = False  # the engine's user has granted the first credit
    in_credit: int = 0  # as the engine counts it
    out_credit: int = 0  # the same
    in_ended: bool = False
    out_ended: bool = False
    consumed: int = 0  # bytes for which no credit was granted yet
    held: deque[int] = field(default_factory=deque)  # sizes of the items that are not consumed

    @property
    def slots(self) -> tuple[int, bool]:
        """With which others it shares slots."""
        return self.depth, self.has_channel

    @property
    def may_send(self) -> bool:
        items = [packet[-1] for packet in self.due if packet[0] == b"item"]
        return self.out_credit > 0 and sum(map(len, items)) + ITEM_OVERHEAD * len(items) < MAX_QUEUED

    @property
    def room(self) -> int:
        """How much credit the peer may still grant, by its own count."""
        items = [x for x in self.due if x[0] == b"item"]
        return MAX_CREDIT - self.out_credit - sum(len(x[-1]) + ITEM_COST for x in items)


class Model:
    """What the engine must do. `me` is the parity of its ids."""

    def __init__(self, me: int, max_requests: int, slots: int) -> None:
        self.me, self.max_requests, self.slots = me, max_requests, slots
        self.next_id = me
        self.backlog: dict[int, Talk] = {}  # the engine's requests without a slot
        self.ours: dict[int, Talk] = {}  # those with one
        self.theirs: dict[int, Talk] = {}  # those of the peer
        self.gone: list[int] = []  # of either side
        # What is to leave besides what the talks have.
        self.control: list[list[bytes]] = []
        self.credits: dict[int, int] = {}
        self.owes_bye_ok = False
        # What has been said.
        self.is_draining = self.peer_drains = self.heard_bye_ok = self.is_closed = False
        self.partly_left: dict[int, int] = {}  # number of the packet in pieces -> id
        self.next_number = 0
        self.buffer = b""
        self.pieces: dict[int, tuple[bytes, int]] = {}

    def copy(self) -> Model:
        """As `copy.deepcopy`, and much faster."""
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
        """The peer has cancelled it."""
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

    # ---- what it has ----

    def talk(self, id: int) -> Talk:
        return (self.ours | self.theirs | self.backlog)[id]

    @property
    def in_flight(self) -> dict[int, Talk]:
        """As the peer knows it."""
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
        """The channels that the engine's user still has."""
        ours = [id for id, talk in self.channels.items() if id not in self.theirs and not talk.is_cancelled]
        return ours + [id for id in self.unanswered if self.theirs[id].has_channel]

    @property
    def queued(self) -> int:
        talks = (*self.ours.values(), *self.theirs.values())
        return len(self.control) + len(self.credits) + sum(len(talk.due) for talk in talks)

    # ---- what leaves ----

    def check_batch(self, batch: bytes, now: float) -> None:
        """All that is in it must be due, and all that is due must be in it or wait for a reason."""
        packets = split(batch)
        count = len(self.control)
        if self.is_closed:  # in any order: it is all over at once
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
        # Of one packet; its last bytes may go along.
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
        """Whether a request of depth 0 still leaves before `bye-ok`."""
        return any(not talk.has_left and not talk.depth for talk in self.ours.values())

    def due(self, id: int, now: float) -> list[bytes]:
        """What must leave next of that id."""
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

    # ---- what comes ----

    def judge(self, data: bytes) -> Iterator[Event]:
        """The events that are due to the next bytes; raises `Bad` where they must be refused."""
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
        """Whether the peer has used up such slots."""
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
    """A request without a context."""
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
    """Whether the first of them travels in pieces, with the longest head as with the shortest."""
    if not due:
        return False
    kind, _, *rest = due[0]
    if kind in (b"req", b"chan"):
        del rest[0]  # its timeout
    return sum(map(len, rest)) > MAX_WHOLE - HEAD_ROOM


def count(talks: Mapping[int, Talk], slots: tuple[int, bool]) -> int:
    """How many of these share such slots."""
    return [talk.slots for talk in talks.values()].count(slots)


def is_refused(
    engine: Session, model: Model, data: bytes, size: int, events: list[Event] | None = None
) -> bool:
    """Receive it, so many bytes at a time. The engine must do what the model says.

    Arguments:
        events: where the events go.
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
        if aborts:  # nothing after it counts
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
    """Close an engine; its last packet says why. None: the peer said so first, so that it must not."""
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


Acts: TypeAlias = list[tuple[str | bytes, int, int]]

ACTS = (
    *("ping", "ask", "ask", "ask", "answer", "cancel", "end", "drain", "say_bye", "drop_pieces"),
    *("send_item", "send_item", "send_item", "send_item", "consume", "consume", "consume", "grant"),
    *("take", "take", "take", "take", "take", "say_piece", "say_piece", "say_piece"),
    *(b"req", b"chan", b"chan", b"chan", b"ok", b"err", b"cancel", b"end", b"ping", b"pong"),
    *(b"bye-ok", b"bye-ok", b"item", b"item", b"item", b"item", b"item", b"item", b"credit", b"credit"),
)
"""What the engine's user and an honest peer do, and the kinds of packets that the peer sends."""


A_FEW = st.lists(
    st.tuples(st.sampled_from(ACTS), st.integers(0, 999), st.sampled_from(SIZES)), min_size=5, max_size=30
)


class LyingPeer(RuleBasedStateMachine):
    """The engine's user and its peer, in any order."""

    @initialize(
        me=st.integers(0, 1), max_requests=st.integers(1, 6), slots=st.integers(1, 6), grants=st.booleans()
    )
    def begin(self, me: int, max_requests: int, slots: int, grants: bool) -> None:
        self.me, self.max_requests, self.slots = me, max_requests, slots
        self.grants = grants  # credit at once to each channel of the peer's, or when it pleases
        self.model = Model(me, max_requests, slots)
        self.engine = self.make()
        self.log: list[Callable[[Session], object]] = []
        self.texts = 0
        self.next_id = 1 - me  # of the peer's
        # Packets that it sends in pieces: the slots that they take, id, the rest.
        self.sending: dict[int, tuple[tuple[int, bool] | None, int, bytes]] = {}
        self.next_number = 0

    def make(self) -> Session:
        return Session(
            "server" if self.me else "client",
            max_message_size=LIMIT,
            max_requests=self.max_requests,
            slots=self.slots,
        )

    def do(self, act: Callable[[Session], T]) -> T:
        self.log.append(act)
        return act(self.engine)

    def copy(self) -> tuple[Session, Model]:
        """Another engine in the same state, and its model."""
        engine = self.make()
        for act in self.log:
            act(engine)
        return engine, self.model.copy()

    def fields(self, size: int) -> list[bytes]:
        """Some that are like no others, so that what is mixed up shows."""
        self.texts += 1
        each = b"%d." % self.texts
        return [(each * (size // len(each) + 1))[:size]]

    # Each rule does some of what goes on, and then to a copy what ends an engine.

    def act(self, acts: Acts) -> None:
        """Many in one step, as a step costs more than they do."""
        for act, which, size in acts:
            if isinstance(act, bytes):
                self.say(act, which, size)
            else:
                getattr(self, act)(which, size)
            self.check()

    # ---- the engine's user ----

    def ask(self, which: int, size: int) -> None:
        nested, along = DEPTHS[which % 6], CONTEXTS[which // 6 % 4]
        if self.model.peer_drains and not nested:
            return
        encoded = flat(along) if along else b""
        fields = self.fields(min(size, LIMIT - HEAD_ROOM - 5 - len(encoded)))
        has_channel = which % 7 > 2
        timeout = (math.inf, -1.0, 0.25, 1e7, 1e12)[which % 5]
        given = {name.decode(): value for name, value in along.items()}

        def ask(engine: Session) -> int:
            call = engine.open_channel if has_channel else engine.request
            return call(fields, timeout, depth=nested, context=given)

        due = self.model.ask(fields, timeout, has_channel=has_channel, depth=nested, context=encoded)
        assert self.do(ask) == due

    def cancel(self, which: int, _size: int) -> None:
        wanted = [id for id, talk in self.model.ours.items() if not talk.is_cancelled]
        id = one_of(which, wanted + list(self.model.backlog))
        if id is not None:
            self.do(lambda engine: engine.cancel(id))
            self.model.cancel(id)

    def answer(self, which: int, size: int) -> None:
        id = one_of(which, self.model.unanswered)
        if id is None:
            return
        if which % 4:
            fields = self.fields(size)
            self.do(lambda engine: engine.answer(id, fields))
            self.model.answer(id, [b"ok", b"%d" % id, body(fields)])
        else:
            [message] = self.fields(min(size, 2048))
            details = bytes(min(size, MAX_DETAILS)) if which % 3 else b""
            self.do(lambda engine: engine.fail(id, "code", message.decode(), details))
            self.model.answer(id, [b"err", b"%d" % id, b"code", message, details])

    def send_item(self, which: int, size: int) -> None:
        ids = [id for id in self.model.used if not self.model.talk(id).out_ended]
        id = one_of(which, [id for id in ids if self.model.talk(id).out_credit > 0])
        if id is not None and self.engine.flow_control.may_send(id):
            fields = self.fields(size)
            self.do(lambda engine: engine.flow_control.send(id, *engine.flow_control.encode(fields)))
            self.model.send_item(id, body(fields))

    def end(self, which: int, _size: int) -> None:
        used = self.model.used
        id = one_of(which, [id for id in used if id in self.model.backlog and which % 2] or used)
        if id is not None:
            self.do(lambda engine: engine.flow_control.end(id))
            self.model.end(id)

    def grant(self, which: int, _size: int) -> None:
        """The first credit for the peer's items."""
        model = self.model
        new = [id for id in model.used if id in model.theirs and not model.theirs[id].has_begun]
        id = one_of(which, new)
        if id is not None:
            self.do(lambda engine: engine.flow_control.accept(id))
            self.model.grant(id, WINDOW)

    def consume(self, which: int, _size: int) -> None:
        id = one_of(which, [id for id in self.model.used if self.model.talk(id).held])
        if id is None:
            return
        talk = self.model.talk(id)
        for _ in range(len(talk.held) if which % 2 else 1):
            size, before = talk.held[0], talk.in_credit
            self.model.consume(id)
            granted = self.do(partial(lambda size, engine: engine.flow_control.consume(id, size), size))
            assert granted == (talk.in_credit > before)

    def ping(self, _which: int, _size: int) -> None:
        if not self.engine.is_ping_queued:
            self.do(lambda engine: engine.ping())
            self.model.control.append([b"ping"])

    def drain(self, which: int, _size: int) -> None:
        if which % 3 == 2:  # else no machine would go far
            self.do(lambda engine: engine.drain())
            self.model.drain()

    def take(self, which: int, _size: int) -> None:
        self.send((0.0, 0.25, 2.0, 1e9)[which % 4])
        self.do(lambda engine: engine.note_sent((0, 0, 0.005, 1)[which % 4]))

    def send(self, now: float) -> bytes:
        before = {id: talk.may_send for id, talk in self.model.channels.items()}
        batch = self.do(lambda engine: engine.take(now))
        self.model.check_batch(batch, now)
        self.check_writable(before)
        return batch

    def check_writable(self, before: dict[int, bool]) -> None:
        """Who waits to send an item must be told."""
        told = self.do(lambda engine: set(engine.flow_control.take_writable()))
        for id, talk in self.model.channels.items():
            if before.get(id) is False and talk.may_send and not talk.is_cancelled:
                assert id in told

    @rule(acts=A_FEW, late=st.integers(0, 3))
    def close(self, acts: Acts, late: int) -> None:
        self.act(acts)
        engine, model = self.copy()
        engine.close()
        model.close()
        for id in model.unanswered[:late]:
            engine.fail(id, "late", "")
            model.answer(id, [])
        batch = b"."
        while batch:
            batch = engine.take(0)
            model.check_batch(batch, 0)
        assert (engine.asked, engine.waiting, engine.cancelled, engine.queued) == (0, 0, 0, 0)
        assert engine.handling == len(model.theirs)

    # ---- the peer, honest ----

    def deliver(self, data: bytes, size: int = 10**6) -> None:
        before = {id: talk.may_send for id, talk in self.model.channels.items()}
        events: list[Event] = []
        assert not is_refused(self.engine, self.model, data, size, events), "the peer was honest"
        self.log.append(lambda engine: engine.receive(data))
        self.check_writable(before)
        for event in events:
            if isinstance(event, Cancel):
                self.drop_items(event.id)
        if self.grants:
            self.grant(0, 0)

    def drop_items(self, id: int) -> None:
        self.do(lambda engine: engine.drop_items(id))
        self.model.drop_items(id)

    def say(self, kind: bytes, which: int, size: int) -> None:
        if kind == b"item" and which % 3:
            size = 150_000  # more often, as credit is large
        fields = self.honest(kind, which, size)
        if fields is None:
            return
        chunk = (10**6, 10**6, 7, 1)[which // 5 % 4]
        if kind in PIECED and (which % 5 == 4 or len(body(fields)) > MAX_WHOLE):
            id = int(fields[1])
            if len(self.sending) == MAX_OPEN or (id in self.model.ours and id not in self.model.in_flight):
                return
            asks = (int(fields[3] or 0), kind == b"chan") if kind in (b"req", b"chan") else None
            self.sending[self.next_number] = (asks, id, body(fields))
            self.go_on(self.next_number, which % 90 + 1, to_the_end=which % 2 == 0)
            self.next_number += 1 + which % 3
        else:
            self.deliver(packet(fields), chunk)
        if kind in (b"req", b"chan"):
            self.next_id = int(fields[1]) + 2

    def honest(self, kind: bytes, which: int, size: int) -> list[bytes] | None:  # noqa: PLR0912  (the same)
        """A packet of that kind that the peer may send now, if there is one."""
        model = self.model
        busy = {id for _, id, _ in self.sending.values()}  # what comes next of them waits
        free = {id: talk for id, talk in model.in_flight.items() if id not in busy}
        open_to_items = [
            id
            for id, talk in free.items()
            if talk.has_channel and not talk.in_ended and not (talk.is_cancelled and id in model.theirs)
        ]
        asking = [slots for slots, _, _ in self.sending.values() if slots is not None]
        ids: list[int] = []
        rest: list[bytes] = []
        match kind:
            case b"req" | b"chan":
                slots = DEPTHS[which // 3 % 6], kind == b"chan"
                used = count(model.theirs, slots) + asking.count(slots)
                if used < model.max_requests and (slots[0] or not model.heard_bye_ok):
                    ids = [self.next_id, self.next_id + 2]
                timeout = (b"", b"0", b"1500000", b"9" * 18)[which % 4]
                along = CONTEXTS[which // 7 % 4]
                encoded = flat(along) if along else b""
                credit = [b"%d" % (0, 70_000, MAX_CREDIT)[which % 3]] if kind == b"chan" else []
                inner = body(self.fields(min(size, LIMIT - HEAD_ROOM - 5 - len(encoded))))
                rest = [timeout, b"%d" % slots[0] if slots[0] else b"", encoded, *credit, inner]
            case b"ok":
                ids = [id for id in free if id in model.ours]
                rest = [body(self.fields(size))]
            case b"err":
                ids = [id for id in free if id in model.ours]
                details = bytes(min(size, MAX_DETAILS)) if which % 3 else b""
                rest = [b"code", *self.fields(min(size, 3000)), details]
            case b"cancel":
                ids = [id for id, talk in free.items() if id in model.theirs and not talk.is_cancelled]
            case b"item":
                # As far as the peer knows of its credit.
                ids = [id for id in open_to_items if model.talk(id).in_credit > model.credits.get(id, 0)]
                rest = [body(self.fields(size))]
            case b"credit":
                ids = [id for id, talk in model.in_flight.items() if talk.has_channel]
                room = [model.talk(id).room for id in ids if id == one_of(which, ids)]
                rest = [b"%d" % min(*room, *2 * [(0, 1, 5000, 300_000, MAX_CREDIT)[which % 5]])]
            case b"end":
                ids = open_to_items
            case b"drop":
                number = one_of(which, list(model.pieces))
                return None if number is None else [b"drop", b"%d" % number]
            case b"bye":
                return None if model.peer_drains else [b"bye"]
            case b"bye-ok":
                may = model.is_draining and [b"bye"] not in model.control and not model.heard_bye_ok
                return [b"bye-ok"] if may and not any(depth == 0 for depth, _ in asking) else None
            case b"abort":
                return [b"abort", b"protocol", b"you know why"]
            case _:
                return [kind]
        if kind in (b"cancel", b"item", b"credit", b"end") and (not ids or which % 9 == 8):
            # One that is not in flight: it is taken for one that crossed.
            gone = [*model.gone[-4:], *model.ours, 10**17 + self.me, 10**17 + 1 - self.me]
            ids = [
                id for id in gone if id not in model.in_flight and (kind != b"cancel" or id % 2 != self.me)
            ]
        id = one_of(which, ids)
        return None if id is None else [kind, b"%d" % id, *rest]

    def say_piece(self, which: int, _size: int) -> None:
        n = one_of(which, list(self.sending))
        if n is not None:
            self.go_on(n, MAX_PIECE, to_the_end=which % 2 == 0)

    def go_on(self, n: int, size: int, *, to_the_end: bool) -> None:
        """Send one more piece of a packet, or all that there are."""
        slots, id, rest = self.sending.pop(n)
        piece, rest = rest[:size], rest[size:]
        if rest:
            self.sending[n] = (slots, id, rest)
        self.deliver(packet([b"part", b"%d" % n, b"%d" % len(rest), piece]))
        if rest and to_the_end:
            self.go_on(n, MAX_PIECE, to_the_end=True)

    def drop_pieces(self, which: int, _size: int) -> None:
        number = one_of(which, list(self.sending))
        if number is not None:
            del self.sending[number]
            self.deliver(packet([b"drop", b"%d" % number]))

    def say_bye(self, which: int, _size: int) -> None:
        if which % 3 == 2 and not self.model.peer_drains:
            self.deliver(packet([b"bye"]))

    # ---- the peer, lying ----

    def misshapen(self, which: int) -> Iterator[list[bytes]]:
        """Packets that would be good now, but for one field."""
        yield [(b"", b"Req", b"hello", b"req ", b"\xff")[which % 5]]
        for kind, form in FORMS.items():
            fields = self.honest(kind, which, 20)
            if fields is not None:
                wrong = [fields[:-1], [*fields, b""]]
                for at, letter in enumerate(form, 1):
                    wrong += ([*fields[:at], value, *fields[at + 1 :]] for value in WRONG[letter])
                yield wrong[which % len(wrong)]
                yield wrong[which // 5 % len(wrong)]

    def misplaced(self, which: int) -> Iterator[list[bytes]]:
        """Packets that would be good at another time, but not now."""
        if self.model.peer_drains:
            yield [b"bye"]
        if not self.model.is_draining or self.model.heard_bye_ok:
            yield [b"bye-ok"]
        yield from self.misplaced_requests(which)
        yield from self.misplaced_answers(which)
        yield from self.misplaced_items(which)
        yield from self.misplaced_pieces(which)

    def misplaced_requests(self, which: int) -> Iterator[list[bytes]]:
        model, new = self.model, self.next_id
        for id in (one_of(which, list(model.theirs)), one_of(which, [10**17 + self.me, *model.ours])):
            if id is not None:
                yield request(id, DEPTHS[which % 6], has_channel=which % 2 == 0)
        for has_channel in (False, True):
            for nested in {*DEPTHS}:
                if model.is_full((nested, has_channel)) or (model.heard_bye_ok and not nested):
                    yield request(new, nested, has_channel=has_channel)
        yield request(new, 2, has_channel=True, credit=MAX_CREDIT + 1)
        yield [b"cancel", b"%d" % (one_of(which, [*model.ours, model.next_id]) or self.me)]

    def misplaced_answers(self, which: int) -> Iterator[list[bytes]]:
        model = self.model
        unsent = [id for id, talk in model.ours.items() if not talk.has_left]
        for ids in (unsent, [*model.backlog, model.next_id], list(model.theirs), model.gone):
            id = one_of(which, ids)
            if id is not None:
                both = [b"ok", b"%d" % id, body([])], [b"err", b"%d" % id, b"code", b"", b""]
                yield both[which % 2]

    def misplaced_items(self, which: int) -> Iterator[list[bytes]]:
        for id, talk in self.model.in_flight.items():
            field = b"%d" % id
            item, end = [b"item", field, body(self.fields(which % 9))], [b"end", field]
            if not talk.has_channel:
                yield from (item, end, [b"credit", field, b"%d" % (which % 2)])
                continue
            if talk.in_ended or talk.in_credit <= 0:
                yield item
            if talk.in_ended:
                yield end
            yield [b"credit", field, b"%d" % (MAX_CREDIT + 1 - talk.out_credit)]

    def misplaced_pieces(self, which: int) -> Iterator[list[bytes]]:
        pieces = self.model.pieces
        unused = b"%d" % (self.next_number + which)
        yield [b"drop", unused]
        if len(pieces) == MAX_OPEN:
            yield [b"part", unused, b"1", b"x"]
            yield [b"part", unused, b"0", body([b"item", b"%d" % 10**17, body([])])]
        else:
            yield [b"part", unused, b"0", b""]
            yield [b"part", unused, b"%d" % (which + 1), b""]
            yield [b"part", unused, b"%d" % LIMIT, b"x"]
            yield [b"part", unused, b"0", (b"\xff", b"\x00", b"\x01")[which % 3]]
            for kind in (b"ping", b"pong", b"bye", b"end", b"credit", b"cancel", b"drop", b"abort"):
                fields = self.honest(kind, which, 20)
                if fields is not None:
                    yield [b"part", unused, b"0", body(fields)]
        for open_number, (_, left) in pieces.items():
            n = b"%d" % open_number
            yield [b"part", n, b"%d" % left, b""]
            yield [b"part", n, b"%d" % left, b"x"]
            yield [b"part", n, b"%d" % max(left - 2, 0), bytes(min(left, 9) + 2)]
            if left > 2:
                yield [b"part", n, b"%d" % (left - 2), b"x"]

    @rule(acts=A_FEW, which=st.integers(0, 999), chunk=st.sampled_from([10**6, 7, 1]))
    def lie(self, acts: Acts, which: int, chunk: int) -> None:
        self.act(acts)
        for at, fields in enumerate((*self.misshapen(which), *self.misplaced(which))):
            if (at + which) % 6 == 0:
                self.tell(fields, chunk, which % 7)
        self.announce(which)
        self.abort(which, chunk)

    def abort(self, which: int, chunk: int) -> None:
        """Tell a copy of the engine that it was in the wrong; nothing that comes after it counts."""
        engine, model = self.copy()
        last = packet([b"abort", (b"protocol", b"other")[which % 2], b"\xc3\xa4" * (which % 129)])
        assert not is_refused(engine, model, last + (b"", packet([b"ping"]), packet([]))[which % 3], chunk)

    def tell(self, fields: list[bytes], chunk: int, which: int) -> None:
        """A lie, to a copy of the engine: whole, or in pieces, or after what is none."""
        engine, model = self.copy()
        data = packet(fields)
        if which % 3 == 0 and fields and fields[0] in PIECED and len(model.pieces) < MAX_OPEN:
            half, rest = data[4 : len(data) // 2 + 4], data[len(data) // 2 + 4 :]
            n = b"%d" % (self.next_number + 5)
            data = packet([b"part", n, b"%d" % len(rest), half]) + packet([b"part", n, b"0", rest])
        elif which % 3 == 1:
            others = [self.honest(kind, which, 20) for kind in (b"ping", b"cancel", b"credit")]
            data = b"".join(packet(other) for other in others if other is not None) + data
        assert is_refused(engine, model, data, chunk), fields

    def announce(self, which: int) -> None:
        """The length of a packet, which must be refused at once, or not at all."""
        engine, model = self.copy()
        length = (MAX_WHOLE, MAX_WHOLE + 1, LIMIT, 2**32 - 1)[which % 4]
        assert is_refused(engine, model, length.to_bytes(4, "big"), 10**6) == (length > MAX_WHOLE)
        assert engine.is_mid_packet == (length <= MAX_WHOLE)

    @rule(
        acts=A_FEW,
        kinds=st.lists(st.sampled_from([*FORMS]), min_size=1, max_size=3),
        which=st.integers(0, 999),
        at=st.floats(0, 1, exclude_max=True),
        noise=st.binary(max_size=4),
        cut=st.integers(0, 4),
    )
    def babble(
        self, *, acts: Acts, kinds: list[bytes], which: int, at: float, noise: bytes, cut: int
    ) -> None:
        """Packets that were good, but for some bytes that were replaced, taken out or put in."""
        self.act(acts)
        packets = [self.honest(kind, which, 20) for kind in kinds]
        data = b"".join(packet(fields) for fields in packets if fields is not None)
        where = int(at * (len(data) + 1))
        engine, model = self.copy()
        is_refused(engine, model, data[:where] + noise + data[where + cut :], 10**6)

    # ---- what must hold ----

    def check(self) -> None:
        engine, model = self.engine, self.model
        assert engine.asked == len(model.ours)
        assert engine.handling == len(model.theirs)
        for talks, most in ((model.ours, self.slots), (model.theirs, self.max_requests)):
            assert all(count(talks, talk.slots) <= most for talk in talks.values())
        assert engine.waiting == len(model.backlog)
        assert engine.cancelled == sum(talk.is_cancelled for talk in model.ours.values())
        assert engine.queued == model.queued
        assert engine.draining.peer_drains == model.peer_drains
        assert engine.is_draining == model.is_draining
        over = model.heard_bye_ok and not (model.ours or model.backlog or model.theirs)
        assert engine.is_drained == over
        assert engine.is_mid_packet == bool(model.buffer)
        assert engine.is_ping_queued == ([b"ping"] in model.control)
        assert len(engine.flow_control) == len(model.channels)
        assert not any(engine.is_unsent(id) for id in model.gone[-4:])
        for id, talk in (model.ours | model.backlog).items():
            assert engine.is_unsent(id) == (not talk.has_left)
        assert sum(len(held) for held, _ in model.pieces.values()) <= MAX_OPEN * LIMIT
        assert len(model.partly_left) <= MAX_OPEN
        assert model.control.count([b"pong"]) <= 1
        for id, talk in model.channels.items():
            assert sum(talk.held) < WINDOW + LIMIT
            items = [len(x[-1]) + ITEM_OVERHEAD for x in talk.due if x[0] == b"item"]
            assert sum(items[:-1]) < MAX_QUEUED
            if not talk.is_cancelled:
                assert engine.flow_control.may_send(id) == talk.may_send

    def teardown(self) -> None:
        """When all are answered, all that waits leaves, and nothing stays."""
        if not hasattr(self, "engine"):
            return
        while self.sending:
            self.say_piece(0, 0)
        while self.model.ours:
            if (fields := self.honest(b"err", 0, 20)) is not None:
                self.deliver(packet(fields))
            else:
                self.send(0)
            self.check()
        while self.model.unanswered:
            self.answer(1, 20)
        while self.send(0):
            pass
        self.check()
        assert not self.model.theirs
        assert not self.engine.queued
        assert not len(self.engine.flow_control)


def test_an_engine_does_what_is_due_whatever_its_peer_does() -> None:
    run_state_machine_as_test(
        LyingPeer, settings=settings(max_examples=40, stateful_step_count=20, deadline=None)
    )
