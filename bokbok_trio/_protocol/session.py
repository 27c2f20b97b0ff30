r"""The protocol engine of an open connection: bytes and calls in, bytes and events out.

No Trio, no I/O: `Session` never waits. `Connection` feeds it what was received, sends what it
`take`\\ s, and does what its events say.

Theory
======

A request has an id: the client's are even, the server's odd, counted up, never used twice. Of a
request *of ours* the engine knows one of these, and nothing once it is done:

========= ==================================================== ================================
state     what it means                                        where it is
========= ==================================================== ================================
backlog   no slot is free; the peer knows nothing              ``_backlog``
queued    it has a slot; it has not, or only partly, left      ``_asked``, outbox
asked     it was taken to be sent, and the answer is awaited   ``_asked``
cancelled as asked, but nobody wants the answer any more       ``_asked``
========= ==================================================== ================================

Of a request *of the peer's*: handled (``_handling``), then its answer is queued (``_handling`` and
the outbox), then it is done, at the very moment the last byte of the answer is taken to be sent.

A *channel* is a request with items both ways, in flight for as long as it is. `Flows` keeps its credit.
Items that have not left when it is cancelled or answered never do.

*Slots* are counted for each depth, and for requests and channels apart (`_class_of`): each side takes
`max_requests` of every class. A request made in a handler is one deeper than the one being handled. So who
holds a slot waits only for deeper slots, the deepest for none, and nested callbacks cannot lock up.

*Bytes* are bounded too, see `budget`. A request of ours that does not fit what the peer takes waits as if
for a slot; one of the peer's that does not fit is answered `busy`. How many bytes of answers wait is counted,
for whoever starts handlers.

Either side may *drain*: with `bye` it says that it takes no new request of depth 0; the other sends `bye-ok`
after its last one. What is in flight goes on, with all that is nested in it.

Invariants
==========

- Our requests of one class never pass the peer's slots; the peer's never pass ours.
- Every request of the peer's is answered exactly once, cancelled or not.
- A cancelled request that had not wholly left never existed: it leaves no `cancel`.
- At most one ping and one pong are queued.
- `receive` decodes many packets before anything of them is acted on, so whether one of them breaks the
  protocol does not depend on what handlers do meanwhile.

After a `ProtocolError` the engine only sends: `abort`, at most.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum, auto
from typing import Final, final

from .._errors import MAX_DETAILS_SIZE, MAX_ERROR_TEXT_SIZE, ProtocolError
from .._types import Context, Fields, Side
from .budget import COUNTED, Budget, Room
from .events import NO_CONTEXT, Abort, Answer, Bye, Cancel, End, Event, Failure, Item, Pong, Request
from .flow_control import ITEM_COST, WINDOW, Flows
from .outbox import HEAD_ROOM, MAX_BATCH_SIZE, MAX_WHOLE_SIZE, Outbox, Outgoing, Reassembler
from .packets import (
    LENGTH_SIZE,
    Chunks,
    ContextTooLong,
    PacketDecoder,
    Received,
    decode_body,
    decode_context,
    decode_number,
    decode_ours,
    decode_text,
    describe,
    encode_body,
    encode_context,
    encode_head,
    encode_number,
    encode_small,
    encode_start,
)

MAX_DEPTH: Final = 15
"""The deepest that a request may be nested in others: far deeper than programs call back and forth on
purpose, and little enough that the slots of all depths are a bound."""

MAX_ABORT_SIZE: Final = 256
"""Bytes of the text in `abort`."""

UNANSWERED: Final = -1
"""Stands for the size of an answer that is not there yet."""

NO_BUDGET: Final = Budget.share_out(2**62)
"""For tests, and whoever needs no bound."""

BUSY: Final = "busy"
"""The code of the answer to a request that does not fit this side's budget, and has not run."""

MAX_IGNORED: Final = 10_000
"""Packets that mean nothing, and are ignored, without any request: pings while a pong waits, mostly."""

CROSSING: Final = 2
"""Such packets for each request: its `cancel` crosses the answer, say."""

SMALL_DROP: Final = 2**11
"""Bytes of pieces under which to take them back is to have sent nothing. Pieces are mostly far larger."""

CROSSING_ITEMS: Final = 2 * WINDOW // ITEM_COST + 2
"""Such packets for each channel: as many items as there is credit for, a `credit` for each, and an `end` for
either direction."""

PIECED_KINDS: Final = frozenset({b"req", b"chan", b"ok", b"err", b"item"})
"""What may come in pieces: everything that carries bytes of the user's."""

_REQ: Final = encode_start(b"req", 6)
_OK: Final = encode_start(b"ok", 3)
_DEPTHS: Final = {b"%d" % depth: depth for depth in range(1, MAX_DEPTH + 1)} | {b"": 0}
_ENCODED_DEPTHS: Final = {depth: encoded for encoded, depth in _DEPTHS.items()}
_PLAIN_HEADS: Final = {  # by depth: no timeout, the depth, and no context, each with its size
    depth: bytes(LENGTH_SIZE) + len(encoded).to_bytes(LENGTH_SIZE, "big") + encoded + bytes(LENGTH_SIZE)
    for depth, encoded in _ENCODED_DEPTHS.items()
}
_CLASSES: Final = 2 * (MAX_DEPTH + 1)


def _class_of(depth: int, *, has_channel: bool) -> int:
    """Which requests share slots with one: those of its depth that have a channel too, or have none."""
    return 2 * depth + has_channel


class State(Enum):
    """Of a request of ours that has a slot."""

    QUEUED = auto()
    ASKED = auto()
    CANCELLED = auto()


@final
class Session:
    """One side of an open connection.

    Arguments:
        side: ours.
        max_message_size: bytes of a packet, as agreed.
        max_requests: how many of the peer's requests of each class we take at once: the peer's slots.
        slots: how many of our requests of each class the peer takes at once.
        budget: how many bytes the peer may make this side hold.
        peer_room: how many bytes of our requests the peer takes; None where it has not told.

    Attributes:
        answer_bytes: bytes of the answers that have not left.
        budget: as above.
        channels: sends and grants, for the channels in flight.
        error: how the peer broke the protocol, once it has.
        peer_drains: whether the peer takes no new request of depth 0.
        received: how many requests the peer has made since the connection was opened.
        has_more: whether the last `take` left packets behind.
        has_undecoded: whether `receive` has left packets: call it again, with no more data.
        has_spoken: whether the peer has asked or answered anything, and not only said that it is over.
        is_draining: whether this side takes none.
        is_holding_back: whether handlers wait for `has_room_for_answers`; set by whoever starts them.
        is_ping_queued: whether a ping has not left yet.
        on_slot: called with the id of each request of ours that gets the slot it waited for.
    """

    __slots__ = (
        "_abort",
        "_asked",
        "_asked_classes",
        "_backlogs",
        "_bye_ok_queued",
        "_decoder",
        "_flows",
        "_handling",
        "_handling_classes",
        "_handling_used",
        "_held",
        "_held_total",
        "_ignored",
        "_is_closed",
        "_max_body_size",
        "_max_requests",
        "_next_id",
        "_outbox",
        "_peer_aborted",
        "_peer_bye_ok",
        "_peer_parity",
        "_pieces",
        "_pong_queued",
        "_room",
        "_slots",
        "_used",
        "answer_bytes",
        "budget",
        "channels",
        "error",
        "has_more",
        "has_spoken",
        "has_undecoded",
        "is_draining",
        "is_holding_back",
        "is_ping_queued",
        "on_slot",
        "peer_drains",
        "received",
    )

    def __init__(
        self,
        side: Side,
        *,
        max_message_size: int,
        max_requests: int,
        slots: int,
        budget: Budget = NO_BUDGET,
        peer_room: int | None = None,
    ) -> None:
        self._decoder = PacketDecoder(min(max_message_size, MAX_WHOLE_SIZE))
        self._pieces = Reassembler(max_message_size)
        self._max_body_size = max_message_size - HEAD_ROOM
        self._max_requests = max_requests
        self._slots = slots
        self._next_id = 0 if side == "client" else 1
        self._peer_parity = 1 - self._next_id
        self._asked: dict[int, State] = {}
        self._asked_classes: dict[int, int] = {}  # of those that are not of class 0, as most are
        self._used = [0] * _CLASSES  # slots of the peer's, by class
        self._backlogs: dict[int, OrderedDict[int, Outgoing]] = {}  # by class; none of them is empty
        self._handling: dict[int, int] = {}  # the bytes of its answer; UNANSWERED until there is one
        self._handling_classes: dict[int, int] = {}  # of those that are not of class 0
        self._handling_used = [0] * _CLASSES  # slots of ours, by class
        self._outbox = Outbox()
        self.channels = Flows(self._outbox, self._max_body_size, budget.items, self._count_free)
        self.budget = budget
        self._room = Room(peer_room)
        self._held: dict[int, int] = {}  # bytes of the peer's requests, of those that count
        self._held_total = 0
        self.answer_bytes = 0
        self.is_holding_back = False
        self._flows = self.channels.by_id
        self.error: ProtocolError | None = None
        self.is_ping_queued = False
        self._pong_queued = False
        self.is_draining = False
        self._bye_ok_queued = False
        self.peer_drains = False
        self._peer_bye_ok = False
        self._peer_aborted = False
        self._abort: bytes | None = None  # to be sent last
        self.received = 0
        self.has_more = False
        self.has_spoken = False
        self.has_undecoded = False
        self._ignored = 0  # packets that meant nothing
        self.on_slot: Callable[[int], object] | None = None
        self._is_closed = False

    # ---- asking ----

    def request(
        self,
        fields: Fields,
        deadline: float = math.inf,
        *,
        depth: int = 0,
        context: Context | None = None,
    ) -> int:
        """Queue a request, or keep it until a slot is free, and return its id.

        Arguments:
            fields: the user's.
            deadline: until when the answer is wanted, by the clock that `take` is told.
            depth: how many requests it is made inside of, 0 to `MAX_DEPTH`.
            context: the user's.

        Raises:
            TypeError, ValueError, MessageTooLarge: as `encode_body` and `encode_context` do; nothing is
                queued.
        """
        if context is not None:
            return self._ask_large(b"req", fields, deadline, depth, context)
        body, size = encode_body(fields, self._max_body_size)
        id = self._next_id
        slot_class = 2 * depth  # `_class_of`, without its call
        if (
            size >= COUNTED
            or deadline < math.inf
            or self._used[slot_class] >= self._slots
            or slot_class in self._backlogs
        ):
            return self._ask(b"req", (body, size), deadline, depth=depth, context=b"")
        # The same for most requests, in fewer steps.
        self._next_id = id + 2
        self._asked[id] = State.QUEUED
        if slot_class:
            self._asked_classes[id] = slot_class
        self._used[slot_class] += 1
        self._outbox.put_encoded(id, encode_small(_REQ, id, _PLAIN_HEADS[depth], body[0]))
        return id

    def open_channel(
        self,
        fields: Fields,
        deadline: float = math.inf,
        *,
        depth: int = 0,
        context: Context | None = None,
    ) -> int:
        """Queue a request with a channel; all is as for `request`."""
        return self._ask_large(b"chan", fields, deadline, depth, context)

    def _ask_large(
        self, kind: bytes, fields: Fields, deadline: float, depth: int, context: Context | None
    ) -> int:
        encoded = encode_context(context)
        body = encode_body(fields, self._max_body_size - len(encoded))
        return self._ask(kind, body, deadline, depth=depth, context=encoded)

    def _ask(
        self, kind: bytes, body: tuple[Chunks, int], deadline: float, *, depth: int, context: bytes
    ) -> int:
        id = self._next_id
        self._next_id += 2
        has_channel = kind == b"chan"
        head = [_ENCODED_DEPTHS[depth], context]
        if has_channel:
            self.channels.add_ours(id)
            head.append(encode_number(self.channels.by_id[id].receive_credit))
        packet = Outgoing(kind, id, *head, body=body[0], body_size=body[1], deadline=deadline)
        slot_class = _class_of(depth, has_channel=has_channel)
        if slot_class:
            self._asked_classes[id] = slot_class
        if slot_class in self._backlogs or not self._may_go(packet, slot_class):
            self._backlogs.setdefault(slot_class, OrderedDict())[id] = packet
        else:
            self._use_slot(packet, slot_class)
        return id

    @property
    def next_id(self) -> int:
        """The id of the next request of ours."""
        return self._next_id

    def measure(self, fields: Fields, context: Context | None) -> int:
        """Return the bytes of a request's body, or raise what `request` would."""
        return encode_body(fields, self._max_body_size - len(encode_context(context)))[1]

    def has_room(self, size: int, context: Context) -> bool:
        """Whether a request with so many bytes of a body may have that context.

        Raises:
            TypeError, ValueError: nothing may have it, whatever its length.
        """
        try:
            return size + len(encode_context(context)) <= self._max_body_size
        except ContextTooLong:
            return False

    def cancel(self, id: int) -> None:
        """No longer want the answer to a request of ours. If it was answered, do nothing."""
        if self._remove_waiting(id):
            return
        state = self._asked.get(id)
        if state is None:
            return
        self._outbox.remove(id)  # it, or items of its channel
        if state is State.QUEUED:
            self._free_slot(id)
            return
        self._asked[id] = State.CANCELLED
        self._outbox.put_control(b"cancel", encode_number(id))

    def _remove_waiting(self, id: int) -> bool:
        """Forget a request that waits for a slot. Returns whether it did."""
        slot_class = self._asked_classes.get(id, 0)
        backlog = self._backlogs.get(slot_class)
        if backlog is None or backlog.pop(id, None) is None:
            return False
        if backlog:
            self._use_free_slots(slot_class)  # it may have been a big one, before small ones
        else:
            del self._backlogs[slot_class]
        self._asked_classes.pop(id, None)
        self.channels.remove(id)
        return True

    def is_waiting(self, id: int) -> bool:
        """Whether a request of ours waits for a slot."""
        return id in self._backlogs.get(self._asked_classes.get(id, 0), ())

    def oldest_waiting(self) -> int | None:
        """The request of ours that has waited for a slot for longest; None where none waits."""
        return min((next(iter(backlog)) for backlog in self._backlogs.values()), default=None)

    def is_unsent(self, id: int) -> bool:
        """Whether it is certain that no handler of the peer has seen a request of ours."""
        return self._asked.get(id) is State.QUEUED or self.is_waiting(id)

    def _may_go(self, packet: Outgoing, slot_class: int) -> bool:
        """Whether there is a slot for a request of ours, and room for its bytes."""
        return self._used[slot_class] < self._slots and self._room.has(slot_class, packet.body_size)

    def _use_slot(self, packet: Outgoing, slot_class: int) -> None:
        self._used[slot_class] += 1
        self._room.add(packet.id, slot_class, packet.body_size)
        self._asked[packet.id] = State.QUEUED
        self._outbox.put(packet)
        if packet.kind == b"chan":
            self.channels.start(packet.id)

    def _free_slot(self, id: int) -> None:
        if id in self._flows:
            self._outbox.remove(id)  # items that nobody wants
            self.channels.remove(id)
        del self._asked[id]
        slot_class = self._asked_classes.pop(id, 0)
        self._used[slot_class] -= 1
        self._room.remove(id)
        if self._backlogs and slot_class in self._backlogs:
            self._use_free_slots(slot_class)

    def _use_free_slots(self, slot_class: int) -> None:
        """Let requests of a class that wait go, in order, as far as they may."""
        backlog = self._backlogs[slot_class]
        while backlog and self._may_go(next(iter(backlog.values())), slot_class):
            id, packet = backlog.popitem(last=False)
            self._use_slot(packet, slot_class)
            if self.on_slot is not None:
                self.on_slot(id)
        if not backlog:
            del self._backlogs[slot_class]

    # ---- answering ----

    def answer(self, id: int, fields: Fields) -> None:
        """Queue the answer to a request of the peer's.

        Raises:
            TypeError, ValueError, MessageTooLarge: as `encode_body` does; it is still to be answered.
        """
        body, size = encode_body(fields, self._max_body_size)
        if len(body) > 1 or id in self._flows:
            self._queue_answer(id, Outgoing(b"ok", id, body=body, body_size=size), size)
        else:
            self._queue_answer(id, encode_small(_OK, id, b"", body[0]), size)

    def fail(self, id: int, code: str, message: str, details: bytes = b"") -> bool:
        """Queue an error as the answer to a request of the peer's. A long message is cut off.

        Returns:
            Whether the details fit. If not, the error goes without them.
        """
        encoded, text = code.encode(), _cut(message, MAX_ERROR_TEXT_SIZE)
        fits = len(encoded) + len(text) + len(details) <= self._max_body_size
        self._queue_answer(id, Outgoing(b"err", id, encoded, text, details if fits else b""), 0)
        return fits

    def _queue_answer(self, id: int, packet: Outgoing | bytes, size: int) -> None:
        assert self._handling[id] == UNANSWERED, "answered twice"
        self._handling[id] = size
        self.answer_bytes += size
        if self._held:
            self._held_total -= self._held.pop(id, 0)
        if self._is_closed:
            return
        if isinstance(packet, bytes):
            self._outbox.put_encoded(id, packet)
        else:
            self._outbox.put(packet)

    def answer_size(self, id: int) -> int:
        """Bytes of an answer that is queued."""
        return self._handling[id]

    # ---- how many there are ----

    @property
    def made(self) -> int:
        """How many requests this side has made since the connection was opened."""
        return self._next_id // 2

    @property
    def asked(self) -> int:
        """How many requests of ours have a slot."""
        return len(self._asked)

    @property
    def has_waiting(self) -> bool:
        """Whether a request of ours waits for a slot."""
        return bool(self._backlogs)

    @property
    def waiting(self) -> int:
        """How many requests of ours wait for a slot."""
        return sum(map(len, self._backlogs.values()))

    @property
    def cancelled(self) -> int:
        """How many of our requests with a slot have been cancelled, and are still to be answered."""
        return list(self._asked.values()).count(State.CANCELLED)

    @property
    def queued(self) -> int:
        """How many packets have not wholly left."""
        return len(self._outbox)

    @property
    def handling(self) -> int:
        """How many of the peer's requests are not done."""
        return len(self._handling)

    @property
    def has_queued(self) -> bool:
        """Whether a packet waits to be sent."""
        return self._bye_ok_queued or self._abort is not None or not self._outbox.is_empty

    @property
    def has_room_for_answers(self) -> bool:
        """Whether handlers may begin: not too many bytes of answers wait to be sent."""
        return self.answer_bytes <= self.budget.answers

    def _count_free(self) -> int:
        """How many bytes of the budget requests and answers do not take up."""
        return self.budget.total - self._held_total - self.answer_bytes

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the answers and items that wait to be sent."""
        return self.answer_bytes + self.channels.queued

    # ---- liveness, draining, closing ----

    def ping(self) -> None:
        """Ask for a sign of life."""
        self.is_ping_queued = True
        self._outbox.put_control(b"ping")

    def drain(self) -> None:
        """Say that no new request of depth 0 is taken. Again does nothing."""
        if not self.is_draining:
            self.is_draining = True
            self._outbox.put_control(b"bye")

    @property
    def is_drained(self) -> bool:
        """Whether both sides have sent everything, since this one said `bye`."""
        return self._peer_bye_ok and not self._asked and not self._backlogs and not self._handling

    def abort(self, text: str) -> None:
        """Tell the peer, last of all, that it broke the protocol. An `abort` of the peer is not answered."""
        if not self._peer_aborted:
            self._abort = encode_head(b"abort", b"protocol", _cut(text, MAX_ABORT_SIZE))

    def close(self) -> None:
        """It is over: only the answers and control packets that are queued still leave."""
        self._is_closed = True
        for id in self._asked:
            self._outbox.remove(id)
        for id in (*self._asked, *(id for backlog in self._backlogs.values() for id in backlog)):
            self.channels.remove(id)
        self._backlogs.clear()
        self._asked.clear()
        self._asked_classes.clear()
        self._used = [0] * _CLASSES
        self._room.clear()
        self._bye_ok_queued = False

    # ---- what leaves ----

    @property
    def has_big(self) -> bool:
        """Whether a big packet waits, or has partly left."""
        return self._outbox.has_big

    @property
    def is_plain_to_take(self) -> bool:
        """Whether nothing waits that depends on the time or the room that `take` is told."""
        return self._outbox.is_all_encoded

    def take(self, now: float, room: int = MAX_BATCH_SIZE) -> bytes:
        """Take the next batch to be sent, in one piece.

        The slots of the answers that wholly leave with it are free from here on, as the peer may use
        them as soon as it has read the answer, which may be before our send returns.

        Arguments:
            now: the time, in seconds, by the clock of the deadlines.
            room: see `Outbox.take`.
        """
        self.is_ping_queued = self._pong_queued = False
        chunks, left, items = self._outbox.take(now, room)
        for id in left:
            if id % 2 == self._peer_parity:
                self.answer_bytes -= self._handling.pop(id)
                self._handling_used[self._handling_classes.pop(id, 0)] -= 1
                if id in self._flows:
                    self.channels.remove(id)
            else:
                self._asked[id] = State.ASKED
        for id, size in items:
            self.channels.left(id, size)
        if self._bye_ok_queued and not self._has_queued_request():
            self._bye_ok_queued = False
            chunks.append(encode_head(b"bye-ok"))
        if self._abort is not None and self._outbox.is_empty:
            chunks.append(self._abort)
            self._abort = None
        self.has_more = self._outbox.has_more
        return b"".join(chunks)

    def _has_queued_request(self) -> bool:
        """Whether a request of depth 0 has not wholly left."""
        return any(
            state is State.QUEUED and self._asked_classes.get(id, 0) <= 1 for id, state in self._asked.items()
        )

    def note_sent(self, seconds: float) -> None:
        """Learn how long it took to send what was taken last."""
        self._outbox.note_sent(seconds)

    # ---- what arrives ----

    @property
    def is_mid_packet(self) -> bool:
        """Whether the end of the stream would cut a packet short."""
        return self._decoder.buffered > 0

    def receive(self, data: Received | bytearray) -> list[Event]:
        """Decode what was received, up to `MAX_AT_ONCE` packets; return what it says, as far as it is good.

        If the peer broke the protocol, `error` says how, and the events are those before that.
        """
        events: list[Event] = []
        try:
            # In C, but for what a packet means. Where this raises, the events before are in the list.
            events.extend(filter(None, map(self._interpret, self._decoder.decode(data))))
        except ProtocolError as exc:
            self.error = exc
        self.has_undecoded = self._decoder.has_rest and self.error is None
        if events and not self.has_spoken:
            self.has_spoken = not all(map(_is_farewell, events))
        return events

    def _interpret(self, fields: list[Received]) -> Event | None:
        kind = fields[0] if fields else b""
        known = _KINDS.get(kind) if type(kind) is bytes else None
        if known is None or known[0] != len(fields):
            self._peer_aborted |= kind == b"abort"  # a malformed one is not answered either
            raise ProtocolError(f"unknown packet: {describe(fields)}")
        return known[1](self, fields)

    # ---- requests and their answers ----

    def _fits(self, id: int, size: int) -> bool:
        """Hold a request of so many bytes. Where it does not fit, answer it: then it does not run."""
        self._held[id] = size
        self._held_total += size
        taken = self._held_total - size
        if not taken or self._held_total <= self.budget.requests:
            return True
        most = self.budget.requests
        self.fail(id, BUSY, f"not run: of {most} bytes of requests at once, {taken} are held already")
        return False

    def _on_req(self, fields: list[Received], credit: int | None = None) -> Request | None:
        """Note a request, or with `credit` for this side's items one with a channel."""
        has_channel = credit is not None
        _, id, timeout, depth, context, body = fields
        number = decode_number(id)
        self._check_parity(number)
        seconds = decode_number(timeout) / 1e6 if timeout else math.inf
        nested = _decode_depth(depth) if depth else 0
        pairs = decode_context(context) if context else NO_CONTEXT
        request = Request(number, seconds, decode_body(body), has_channel, nested, pairs)
        if number in self._handling:
            raise ProtocolError(f"request {number} is in flight already")
        slot_class = 2 * nested + has_channel  # `_class_of`, without its call
        if self._handling_used[slot_class] >= self._max_requests:
            kind = "channels" if has_channel else "requests"
            raise ProtocolError(f"more than {self._max_requests} {kind} of depth {nested} in flight")
        if self._peer_bye_ok and not nested:
            raise ProtocolError("a new request of depth 0 after `bye-ok`")
        self.received += 1
        self._handling[number] = UNANSWERED
        self._handling_used[slot_class] += 1
        if slot_class:
            self._handling_classes[number] = slot_class
        if credit is not None:
            self.channels.add_theirs(number, credit)
        if len(body) >= COUNTED and not self._fits(number, len(body)):
            return None
        return request

    def _on_ok(self, fields: list[Received]) -> Answer | None:
        _, id, body = fields
        answer = Answer(decode_number(id), decode_body(body))
        return answer if self._on_answered(answer.id) else None

    def _on_err(self, fields: list[Received]) -> Failure | None:
        _, id, code, message, details = fields
        if len(details) > MAX_DETAILS_SIZE:
            raise ProtocolError(f"details of {len(details)} bytes exceed the limit of {MAX_DETAILS_SIZE}")
        failure = Failure(decode_number(id), decode_text(code), decode_text(message), bytes(details))
        return failure if self._on_answered(failure.id) else None

    def _on_answered(self, id: int) -> bool:
        """Note an answer to a request of ours; False: nobody wants it any more."""
        state = self._asked.get(id)
        if state is None or state is State.QUEUED:
            raise ProtocolError(f"an answer to {id}, which is not awaited")
        self._free_slot(id)
        return state is State.ASKED

    def _on_cancel(self, fields: list[Received]) -> Cancel | None:
        id = decode_number(fields[1])
        self._check_parity(id)
        if self._handling.get(id) != UNANSWERED:
            self._ignore()  # never asked, answered, or done
            return None
        return Cancel(id)

    def drop_items(self, id: int) -> None:
        """Send no more items of a request of the peer's, as it has cancelled that."""
        self._outbox.remove(id)

    # ---- channels, of either side's ----

    def _on_chan(self, fields: list[Received]) -> Request | None:
        return self._on_req(fields, decode_number(fields.pop(5)))

    def _on_item(self, fields: list[Received]) -> Item | None:
        _, id, body = fields
        encoded = body if isinstance(body, bytes) else None
        item = Item(decode_number(id), len(body), decode_body(body), encoded)
        if not self._has_channel(item.id):
            self._ignore()
            return None
        self.channels.on_item(item.id, item.size)
        return item if self._is_wanted(item.id) else None

    def _on_credit(self, fields: list[Received]) -> None:
        id, more = decode_number(fields[1]), decode_number(fields[2])
        if self._has_channel(id):
            self.channels.on_credit(id, more)
        else:
            self._ignore()

    def _on_end(self, fields: list[Received]) -> End | None:
        id = decode_number(fields[1])
        if not self._has_channel(id):
            self._ignore()
            return None
        self.channels.on_end(id)
        return End(id) if self._is_wanted(id) else None

    def _ignore(self) -> None:
        """The peer sent a packet that means nothing, or a tiny piece that it took back.

        That happens where packets cross: as often as there are requests and items in flight. Without a bound
        a peer could keep this side busy for nothing.

        Raises:
            ProtocolError: it happens more often than packets can cross.
        """
        self._ignored += 1
        if self._ignored > MAX_IGNORED and self._ignored > (
            MAX_IGNORED + CROSSING * (self.made + self.received) + CROSSING_ITEMS * self.channels.total
        ):
            raise ProtocolError(f"{self._ignored} packets that mean nothing")

    def _has_channel(self, id: int) -> bool:
        """Whether there is one in flight. Where nothing is, that is what crossing looks like."""
        if id not in self._handling and self._asked.get(id) in (None, State.QUEUED):
            return False
        if id not in self._flows:
            raise ProtocolError(f"the request {id} has no channel")
        return True

    def _is_wanted(self, id: int) -> bool:
        return self._asked.get(id) is not State.CANCELLED

    # ---- what belongs to no request ----

    def _on_part(self, fields: list[Received]) -> Event | None:
        _, number, left, piece = fields
        body = self._pieces.add(decode_number(number), decode_number(left), piece)
        if body is None:
            return None
        fields = decode_ours(body)
        if not fields or fields[0] not in PIECED_KINDS:
            raise ProtocolError(f"a packet of this kind may not come in pieces: {describe(fields)}")
        return self._interpret(fields)

    def _on_drop(self, fields: list[Received]) -> None:
        if self._pieces.drop(decode_number(fields[1])) < SMALL_DROP:
            self._ignore()

    def _on_ping(self, _fields: list[Received]) -> None:
        if self._pong_queued:
            self._ignore()
        else:
            self._pong_queued = True
            self._outbox.put_control(b"pong")

    def _on_pong(self, _fields: list[Received]) -> Pong:
        return Pong()

    def _on_bye(self, _fields: list[Received]) -> Bye:
        if self.peer_drains:
            raise ProtocolError("`bye` sent twice")
        self.peer_drains = True
        self._bye_ok_queued = True
        bye = Bye([])
        for slot_class in (0, 1):
            for id in self._backlogs.pop(slot_class, ()):
                self._asked_classes.pop(id, None)
                self.channels.remove(id)
                bye.ids.append(id)
        return bye

    def _on_bye_ok(self, _fields: list[Received]) -> None:
        if not self.is_draining or self._peer_bye_ok:
            raise ProtocolError("`bye-ok` without `bye`")
        self._peer_bye_ok = True

    def _on_abort(self, fields: list[Received]) -> Abort:
        _, code, message = fields
        self._peer_aborted = True  # also where it is malformed
        if len(message) > MAX_ABORT_SIZE:
            raise ProtocolError(f"an `abort` of {len(message)} bytes exceeds the limit of {MAX_ABORT_SIZE}")
        return Abort(decode_text(code), decode_text(message))

    def _check_parity(self, id: int) -> None:
        if id % 2 != self._peer_parity:
            raise ProtocolError(f"the id {id} has the wrong parity for the other side")


def _is_farewell(event: Event) -> bool:
    """Whether an event says no more than that the peer is about to end."""
    return isinstance(event, Bye | Abort) or (isinstance(event, Failure) and event.code == "closing")


def _decode_depth(field: Received) -> int:
    depth = _DEPTHS.get(bytes(field[:3]))
    if depth is None:
        raise ProtocolError(f"invalid depth: {bytes(field[:20])!r}")
    return depth


def _cut(text: str, most: int) -> bytes:
    """Encode a text, and cut it off between two characters where it is too long."""
    encoded = text.encode(errors="backslashreplace")
    if len(encoded) <= most:
        return encoded
    # The rest of a character that was cut is no UTF-8, and is dropped.
    return encoded[:most].decode(errors="ignore").encode()


_KINDS: Final[dict[bytes, tuple[int, Callable[[Session, list[Received]], Event | None]]]] = {
    b"req": (6, Session._on_req),
    b"ok": (3, Session._on_ok),
    b"err": (5, Session._on_err),
    b"cancel": (2, Session._on_cancel),
    b"part": (4, Session._on_part),
    b"drop": (2, Session._on_drop),
    b"ping": (1, Session._on_ping),
    b"pong": (1, Session._on_pong),
    b"bye": (1, Session._on_bye),
    b"bye-ok": (1, Session._on_bye_ok),
    b"chan": (7, Session._on_chan),
    b"item": (3, Session._on_item),
    b"credit": (3, Session._on_credit),
    b"end": (2, Session._on_end),
    b"abort": (3, Session._on_abort),
}
"""Every kind of packet: how many fields it has, and what it does."""
