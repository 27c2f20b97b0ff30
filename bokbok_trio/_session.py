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

A *channel* is a request with items both ways, in flight for as long as it is. Its credit is the
business of `Flows`, and what of it has not left when it is cancelled or answered never does.

Either side may *drain*: with `bye` it says that it takes no new request; the other sends `bye-ok`
after its last one. What is in flight goes on.

Invariants
==========

- ``len(_asked)`` never passes the peer's slots; ``len(_handling)`` never passes ours.
- Every request of the peer's is answered exactly once, cancelled or not.
- A cancelled request that had not wholly left never existed: it leaves no `cancel`.
- At most one ping and one pong are queued.

After a `ProtocolError` the engine is of no more use.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from enum import Enum, auto
from typing import Final, final

from ._errors import MAX_ERROR_TEXT_SIZE, ProtocolError
from ._events import Answer, Bye, Cancel, End, Event, Failure, Item, Request
from ._flow import WINDOW, Flows
from ._handshake import Side
from ._outbox import HEAD_ROOM, MAX_BATCH_SIZE, MAX_WHOLE_SIZE, Outbox, Outgoing, Reassembler
from ._packets import (
    LENGTH_SIZE,
    Field,
    PacketDecoder,
    Received,
    decode_body,
    decode_number,
    decode_ours,
    decode_text,
    describe,
    encode_body,
    encode_head,
    encode_number,
    encode_small,
    encode_start,
)

PIECED_KINDS: Final = frozenset({b"req", b"chan", b"ok", b"item"})
"""What may come in pieces: all that carries a body of the user's."""


_REQ: Final = encode_start(b"req", 4)
_OK: Final = encode_start(b"ok", 3)
_NO_TIMEOUT: Final = bytes(LENGTH_SIZE)


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
        max_requests: the peer's requests that we take at once: the peer's slots.
        slots: our requests that the peer takes at once.

    Attributes:
        channels: sends and grants, for the channels in flight.
        may_ask: whether the peer still takes new requests.
        is_draining: whether this side takes none.
        is_ping_queued: whether a ping has not left yet.
    """

    __slots__ = (
        "_asked",
        "_backlog",
        "_bye_ok_queued",
        "_decoder",
        "_flows",
        "_handling",
        "_is_closed",
        "_max_body_size",
        "_max_requests",
        "_next_id",
        "_outbox",
        "_peer_bye_ok",
        "_peer_parity",
        "_pieces",
        "_pong_queued",
        "_slots",
        "channels",
        "is_draining",
        "is_ping_queued",
        "may_ask",
    )

    def __init__(self, side: Side, *, max_message_size: int, max_requests: int, slots: int) -> None:
        self._decoder = PacketDecoder(min(max_message_size, MAX_WHOLE_SIZE))
        self._pieces = Reassembler(max_message_size)
        self._max_body_size = max_message_size - HEAD_ROOM
        self._max_requests = max_requests
        self._slots = slots
        self._next_id = 0 if side == "client" else 1
        self._peer_parity = 1 - self._next_id
        self._asked: dict[int, State] = {}
        self._handling: dict[int, bool] = {}  # whether it has been answered
        self._backlog: OrderedDict[int, Outgoing] = OrderedDict()
        self._outbox = Outbox()
        self.channels = Flows(self._outbox, self._max_body_size)
        self._flows = self.channels.by_id
        self.is_ping_queued = False
        self._pong_queued = False
        self.is_draining = False
        self._bye_ok_queued = False
        self.may_ask = True
        self._peer_bye_ok = False
        self._is_closed = False

    # ---- asking ----

    def request(self, fields: Sequence[Field], deadline: float = math.inf) -> int:
        """Queue a request, or keep it until a slot is free, and return its id.

        Arguments:
            fields: the user's.
            deadline: until when the answer is wanted, by the clock that `take` is told.

        Raises:
            TypeError, ValueError, MessageTooLarge: as `encode_body` does; nothing is queued.
        """
        body, size = encode_body(fields, self._max_body_size)
        id = self._next_id
        if len(body) > 1 or deadline < math.inf or self._backlog or len(self._asked) >= self._slots:
            return self._ask(Outgoing(b"req", id, body=body, body_size=size, deadline=deadline))
        # The same for most of them, in fewer steps.
        self._next_id = id + 2
        self._asked[id] = State.QUEUED
        self._outbox.put_encoded(id, encode_small(_REQ, id, _NO_TIMEOUT, body[0]))
        return id

    def open_channel(self, fields: Sequence[Field], deadline: float = math.inf) -> int:
        """Queue a request with a channel; all is as for `request`."""
        body, size = encode_body(fields, self._max_body_size)
        id = self._next_id
        self.channels.add_ours(id)
        credit = encode_number(WINDOW)
        return self._ask(Outgoing(b"chan", id, credit, body=body, body_size=size, deadline=deadline))

    def _ask(self, packet: Outgoing) -> int:
        self._next_id += 2
        if self._backlog or len(self._asked) >= self._slots:
            self._backlog[packet.id] = packet
        else:
            self._use_slot(packet)
        return packet.id

    def cancel(self, id: int) -> None:
        """No longer want the answer to a request of ours that has none yet."""
        if self._backlog.pop(id, None) is not None:
            self.channels.remove(id)
            return
        self._outbox.remove(id)  # it, or items of its channel
        if self._asked[id] is State.QUEUED:
            self._free_slot(id)
            return
        self._asked[id] = State.CANCELLED
        self._outbox.put_control(b"cancel", encode_number(id))

    def is_unsent(self, id: int) -> bool:
        """Whether it is certain that no handler of the peer's has seen a request of ours."""
        return self._asked.get(id) is State.QUEUED or id in self._backlog

    def _use_free_slots(self) -> None:
        while self._backlog and len(self._asked) < self._slots:
            self._use_slot(self._backlog.popitem(last=False)[1])

    def _use_slot(self, packet: Outgoing) -> None:
        self._asked[packet.id] = State.QUEUED
        self._outbox.put(packet)
        if packet.kind == b"chan":
            self.channels.start(packet.id)

    def _free_slot(self, id: int) -> None:
        if id in self._flows:
            self._outbox.remove(id)  # items that nobody wants
            self.channels.remove(id)
        del self._asked[id]
        if self._backlog:
            self._use_free_slots()

    # ---- answering ----

    def answer(self, id: int, fields: Sequence[Field]) -> None:
        """Queue the answer to a request of the peer's.

        Raises:
            TypeError, ValueError, MessageTooLarge: as `encode_body` does; it is still to be answered.
        """
        body, size = encode_body(fields, self._max_body_size)
        if len(body) > 1 or id in self._flows:
            self._queue_answer(id, Outgoing(b"ok", id, body=body, body_size=size))
        else:
            self._queue_answer(id, encode_small(_OK, id, b"", body[0]))

    def fail(self, id: int, code: str, message: str) -> None:
        """Queue an error as the answer to a request of the peer's. A long message is cut off."""
        text = message.encode(errors="backslashreplace")
        if len(text) > MAX_ERROR_TEXT_SIZE:
            # Cut between characters: what is left of one that was cut is no UTF-8, and is dropped.
            text = text[:MAX_ERROR_TEXT_SIZE].decode(errors="ignore").encode()
        self._queue_answer(id, Outgoing(b"err", id, code.encode(), text))

    def _queue_answer(self, id: int, packet: Outgoing | bytes) -> None:
        assert self._handling[id] is False, "answered twice"
        self._handling[id] = True
        if self._is_closed:
            return
        if isinstance(packet, bytes):
            self._outbox.put_encoded(id, packet)
        else:
            self._outbox.put(packet)

    # ---- what there is of them ----

    @property
    def asked(self) -> int:
        """How many requests of ours have a slot."""
        return len(self._asked)

    @property
    def waiting(self) -> int:
        """How many requests of ours wait for a slot."""
        return len(self._backlog)

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
        return self._bye_ok_queued or not self._outbox.is_empty

    # ---- liveness, draining, closing ----

    def ping(self) -> None:
        """Ask for a sign of life."""
        self.is_ping_queued = True
        self._outbox.put_control(b"ping")

    def drain(self) -> None:
        """Say that no new request is taken. Again does nothing."""
        if not self.is_draining:
            self.is_draining = True
            self._outbox.put_control(b"bye")

    @property
    def is_drained(self) -> bool:
        """Whether both sides have sent all there is, since this one said `bye`."""
        return self._peer_bye_ok and not self._asked and not self._backlog and not self._handling

    def close(self) -> None:
        """It is over: what leaves now is the answers and control packets that are queued, and no more."""
        self._is_closed = True
        for id in self._asked:
            self._outbox.remove(id)
        for id in (*self._asked, *self._backlog):
            self.channels.remove(id)
        self._backlog.clear()
        self._asked.clear()
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
                del self._handling[id]
                if id in self._flows:
                    self.channels.remove(id)
            else:
                self._asked[id] = State.ASKED
        for id, size in items:
            self.channels.left(id, size)
        if self._bye_ok_queued and State.QUEUED not in self._asked.values():
            self._bye_ok_queued = False
            chunks.append(encode_head(b"bye-ok"))
        return b"".join(chunks)

    def note_sent(self, seconds: float) -> None:
        """Learn how long it took to send what was taken last."""
        self._outbox.note_sent(seconds)

    # ---- what arrives ----

    @property
    def is_mid_packet(self) -> bool:
        """Whether the end of the stream would cut a packet short."""
        return self._decoder.buffered > 0

    def receive(self, data: Received | bytearray) -> Iterator[Event]:
        """Take in what was received; yield what it says, as far as it is good.

        Raises:
            ProtocolError: the peer broke the protocol.
        """
        # In C, but for what a packet means: a generator for this takes a tenth more.
        return filter(None, map(self._interpret, self._decoder.decode(data)))

    def keep(self) -> None:
        """Make what is left of what was received last good beyond the next checkpoint."""
        self._decoder.keep()

    def _interpret(self, fields: list[Received]) -> Event | None:
        kind = fields[0] if fields else b""
        known = _KINDS.get(kind) if type(kind) is bytes else None
        if known is None or known[0] != len(fields):
            raise ProtocolError(f"no packet of ours: {describe(fields)}")
        return known[1](self, fields)

    # ---- requests and their answers ----

    def _on_req(self, fields: list[Received]) -> Request:
        _, id, timeout, body = fields
        number = decode_number(id)
        self._check_parity(number)
        request = Request(number, decode_number(timeout) / 1e6 if timeout else math.inf, decode_body(body))
        if number in self._handling:
            raise ProtocolError(f"request {number} is in flight already")
        if len(self._handling) >= self._max_requests:
            raise ProtocolError(f"more than {self._max_requests} requests in flight")
        if self._peer_bye_ok:
            raise ProtocolError("a new request after bye-ok")
        self._handling[number] = False
        return request

    def _on_ok(self, fields: list[Received]) -> Answer | None:
        _, id, body = fields
        answer = Answer(decode_number(id), decode_body(body))
        return answer if self._on_answered(answer.id) else None

    def _on_err(self, fields: list[Received]) -> Failure | None:
        _, id, code, message = fields
        failure = Failure(decode_number(id), decode_text(code), decode_text(message))
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
        if self._handling.get(id) is not False:
            return None  # never asked, answered, or done: they crossed
        self._outbox.remove(id)  # items that nobody wants
        return Cancel(id)

    # ---- channels, of either side's ----

    def _on_chan(self, fields: list[Received]) -> Request:
        kind, id, timeout, credit, body = fields
        first_credit = decode_number(credit)
        request = self._on_req([kind, id, timeout, body])
        self.channels.add_theirs(request.id, first_credit)
        return request._replace(has_channel=True)

    def _on_item(self, fields: list[Received]) -> Item | None:
        _, id, body = fields
        encoded = body if isinstance(body, bytes) else None
        item = Item(decode_number(id), len(body), decode_body(body), encoded)
        if not self._has_channel(item.id):
            return None
        self.channels.on_item(item.id, item.size)
        return item if self._is_wanted(item.id) else None

    def _on_credit(self, fields: list[Received]) -> None:
        id, more = decode_number(fields[1]), decode_number(fields[2])
        if self._has_channel(id):
            self.channels.on_credit(id, more)

    def _on_end(self, fields: list[Received]) -> End | None:
        id = decode_number(fields[1])
        if not self._has_channel(id):
            return None
        self.channels.on_end(id)
        return End(id) if self._is_wanted(id) else None

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
            raise ProtocolError(f"this may not come in pieces: {describe(fields)}")
        return self._interpret(fields)

    def _on_drop(self, fields: list[Received]) -> None:
        self._pieces.drop(decode_number(fields[1]))

    def _on_ping(self, _fields: list[Received]) -> None:
        if not self._pong_queued:
            self._pong_queued = True
            self._outbox.put_control(b"pong")

    def _on_pong(self, _fields: list[Received]) -> None:
        """It was heard: that is all it is for."""

    def _on_bye(self, _fields: list[Received]) -> Bye:
        if not self.may_ask:
            raise ProtocolError("bye twice")
        self.may_ask = False
        self._bye_ok_queued = True
        for id in self._backlog:
            self.channels.remove(id)
        bye = Bye(list(self._backlog))
        self._backlog.clear()
        return bye

    def _on_bye_ok(self, _fields: list[Received]) -> None:
        if not self.is_draining or self._peer_bye_ok:
            raise ProtocolError("bye-ok without bye")
        self._peer_bye_ok = True

    def _check_parity(self, id: int) -> None:
        if id % 2 != self._peer_parity:
            raise ProtocolError(f"the id {id} is none of the other side's")


_KINDS: Final[dict[bytes, tuple[int, Callable[[Session, list[Received]], Event | None]]]] = {
    b"req": (4, Session._on_req),
    b"ok": (3, Session._on_ok),
    b"err": (4, Session._on_err),
    b"cancel": (2, Session._on_cancel),
    b"part": (4, Session._on_part),
    b"drop": (2, Session._on_drop),
    b"ping": (1, Session._on_ping),
    b"pong": (1, Session._on_pong),
    b"bye": (1, Session._on_bye),
    b"bye-ok": (1, Session._on_bye_ok),
    b"chan": (5, Session._on_chan),
    b"item": (3, Session._on_item),
    b"credit": (3, Session._on_credit),
    b"end": (2, Session._on_end),
}
"""Every kind of packet: how many fields it has, and what it does."""
