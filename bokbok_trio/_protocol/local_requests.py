"""The requests that this side makes. They are encoded, wait for a slot, are sent, and are answered.

The client's ids are even, the server's odd. They are counted up and never used twice. A request is in one of
these states; once it has been answered, nothing of it is kept:

========= ============================================================ =======================
state     meaning                                                      where it is
========= ============================================================ =======================
waiting   it has no slot, and the peer knows nothing of it             ``_backlogs``
queued    it has a slot; it has not departed, or only in part          ``states``, the outbox
sent      all of it has been taken to be sent; its answer is awaited   ``states``
cancelled as sent, but nobody wants the answer any more                ``states``
========= ============================================================ =======================

Invariants
==========

- The requests of one slot class that have a slot never exceed the peer's slots.
- Requests of one class get their slots in the order in which they were made.
- If a request is cancelled before it has wholly departed, the peer never handles it, and no `cancel` follows.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum, auto
from typing import Final, final

from .._errors import ProtocolError
from .._types import Context, Fields
from .budget import COUNTED, Room
from .context import ContextTooLong, encode_context
from .flow_control import FlowControl
from .outbox import Outbox
from .packets import LENGTH_SIZE, Chunks, encode_body, encode_number, encode_prefix, encode_small_packet
from .queued_packet import QueuedPacket
from .slots import CLASS_COUNT, MAX_DEPTH, slot_class_of

ENCODED_DEPTHS: Final = (b"", *(b"%d" % depth for depth in range(1, MAX_DEPTH + 1)))
"""The field `depth`, by the depth."""

_REQ: Final = encode_prefix(b"req", 6)

_PLAIN_FIELDS: Final = [
    bytes(LENGTH_SIZE) + len(depth).to_bytes(LENGTH_SIZE, "big") + depth + bytes(LENGTH_SIZE)
    for depth in ENCODED_DEPTHS
]
"""The fields between id and body of a request without timeout and context, by the depth."""


class State(Enum):
    """How far a request with a slot has come."""

    QUEUED = auto()
    SENT = auto()
    CANCELLED = auto()


@final
class LocalRequests:
    """The requests that this side has made and the peer has not answered.

    Arguments:
        first_id: 0 for the client, 1 for the server.
        slots: how many of our requests of each class the peer takes at once.
        peer_room: how many bytes of our requests the peer takes; None: it has not told.
        max_body_size: bytes of a body.
        outbox, flow_control: the session's.

    Attributes:
        next_id: the id of the next request.
        on_slot: called with the id of each request that gets the slot it waited for.
        states: the requests that have a slot.
    """

    __slots__ = (
        "_backlogs",
        "_classes",
        "_flow_control",
        "_max_body_size",
        "_outbox",
        "_room",
        "_slots",
        "_used",
        "next_id",
        "on_slot",
        "states",
    )

    def __init__(
        self,
        first_id: int,
        *,
        slots: int,
        peer_room: int | None,
        max_body_size: int,
        outbox: Outbox,
        flow_control: FlowControl,
    ) -> None:
        self.next_id = first_id
        self.on_slot: Callable[[int], object] | None = None
        self.states: dict[int, State] = {}
        self._classes: dict[int, int] = {}  # slot classes, of all requests but those of class 0
        self._used = [0] * CLASS_COUNT  # slots, by class
        self._backlogs: dict[int, OrderedDict[int, QueuedPacket]] = {}  # by class; no backlog is empty
        self._slots = slots
        self._room = Room(peer_room)
        self._max_body_size = max_body_size
        self._outbox = outbox
        self._flow_control = flow_control

    # ---- making one ----

    def request(
        self,
        fields: Fields,
        deadline: float = math.inf,
        depth: int = 0,
        context: Context | None = None,
    ) -> int:
        """Queue a request, or keep it until a slot is free, and return its id.

        Arguments:
            fields: the user's.
            deadline: the time, by the clock of `Session.take`, after which nobody wants the answer.
            depth: the number of requests that this one is nested in, 0 to `MAX_DEPTH`.
            context: the user's.

        Raises:
            TypeError, ValueError, MessageTooLarge: as `encode_body` and `encode_context` do; nothing is
                queued.
        """
        if context is not None:
            return self._encode_and_add(b"req", fields, deadline, depth, context)
        body, size = encode_body(fields, self._max_body_size)
        slot_class = 2 * depth  # `slot_class_of`, without its call
        if (
            size >= COUNTED
            or deadline < math.inf
            or self._used[slot_class] >= self._slots
            or slot_class in self._backlogs
        ):
            return self._add(b"req", body, size, deadline, depth=depth, context=b"")
        # Most requests are small, have no deadline and find a slot free. They take this short way, on which
        # the packet is encoded in one step.
        id = self.next_id
        self.next_id = id + 2
        self.states[id] = State.QUEUED
        if slot_class:
            self._classes[id] = slot_class
        self._used[slot_class] += 1
        self._outbox.put_encoded(id, encode_small_packet(_REQ, id, _PLAIN_FIELDS[depth], body[0]))
        return id

    def open_channel(
        self,
        fields: Fields,
        deadline: float = math.inf,
        depth: int = 0,
        context: Context | None = None,
    ) -> int:
        """Queue a request with a channel. Arguments and exceptions are those of `request`."""
        return self._encode_and_add(b"chan", fields, deadline, depth, context)

    def _encode_and_add(
        self, kind: bytes, fields: Fields, deadline: float, depth: int, context: Context | None
    ) -> int:
        encoded = encode_context(context)
        body, size = encode_body(fields, self._max_body_size - len(encoded))
        return self._add(kind, body, size, deadline, depth=depth, context=encoded)

    def _add(
        self, kind: bytes, body: Chunks, size: int, deadline: float, *, depth: int, context: bytes
    ) -> int:
        """Queue a request, or put it on the backlog of its class."""
        id = self.next_id
        self.next_id += 2
        fields = [ENCODED_DEPTHS[depth], context]
        has_channel = kind == b"chan"
        if has_channel:
            fields.append(encode_number(self._flow_control.add_local(id)))
        packet = QueuedPacket(kind, id, *fields, body=body, body_size=size, deadline=deadline)
        slot_class = slot_class_of(depth, has_channel=has_channel)
        if slot_class:
            self._classes[id] = slot_class
        if slot_class in self._backlogs or not self._may_start(packet, slot_class):
            self._backlogs.setdefault(slot_class, OrderedDict())[id] = packet
        else:
            self._start(packet, slot_class)
        return id

    def measure(self, fields: Fields, context: Context | None) -> int:
        """Return the bytes of a request's body, or raise as `request` does."""
        return encode_body(fields, self._max_body_size - len(encode_context(context)))[1]

    def has_room(self, size: int, context: Context) -> bool:
        """Whether a request whose body has `size` bytes may have that context.

        Raises:
            TypeError, ValueError: no request may have that context, however short its body is.
        """
        try:
            return size + len(encode_context(context)) <= self._max_body_size
        except ContextTooLong:
            return False

    # ---- slots ----

    def _may_start(self, packet: QueuedPacket, slot_class: int) -> bool:
        """Whether there is a slot for a request, and room for its bytes."""
        return self._used[slot_class] < self._slots and self._room.has(slot_class, packet.body_size)

    def _start(self, packet: QueuedPacket, slot_class: int) -> None:
        """Give a request a slot, and queue it."""
        self._used[slot_class] += 1
        self._room.add(packet.id, slot_class, packet.body_size)
        self.states[packet.id] = State.QUEUED
        self._outbox.put(packet)
        if packet.kind == b"chan":
            self._flow_control.start(packet.id)

    def _start_waiting(self, slot_class: int) -> None:
        """Start the first requests of a backlog, as many as may start."""
        backlog = self._backlogs[slot_class]
        while backlog and self._may_start(next(iter(backlog.values())), slot_class):
            id, packet = backlog.popitem(last=False)
            self._start(packet, slot_class)
            if self.on_slot is not None:
                self.on_slot(id)
        if not backlog:
            del self._backlogs[slot_class]

    def _free_slot(self, id: int) -> None:
        """Forget a request that has a slot."""
        if id in self._flow_control.credits:
            self._outbox.remove(id)  # items that nobody wants any more
            self._flow_control.remove(id)
        del self.states[id]
        slot_class = self._classes.pop(id, 0)
        self._used[slot_class] -= 1
        self._room.remove(id)
        if self._backlogs and slot_class in self._backlogs:
            self._start_waiting(slot_class)

    # ---- ending one ----

    def cancel(self, id: int) -> None:
        """Cancel a request. If it was answered, do nothing."""
        if self._cancel_waiting(id):
            return
        state = self.states.get(id)
        if state is None:
            return
        self._outbox.remove(id)  # the request, or items of its channel
        if state is State.QUEUED:
            self._free_slot(id)
            return
        self.states[id] = State.CANCELLED
        self._outbox.put_control(b"cancel", encode_number(id))

    def _cancel_waiting(self, id: int) -> bool:
        """Forget a request that waits for a slot. Return whether it did wait."""
        slot_class = self._classes.get(id, 0)
        backlog = self._backlogs.get(slot_class)
        if backlog is None or backlog.pop(id, None) is None:
            return False
        if backlog:
            self._start_waiting(slot_class)  # a big request may have stood in the way of small ones
        else:
            del self._backlogs[slot_class]
        self._forget_waiting(id)
        return True

    def _forget_waiting(self, id: int) -> None:
        self._classes.pop(id, None)
        self._flow_control.remove(id)

    def end_answered(self, id: int) -> bool:
        """End a request, because its answer came. Return whether somebody still wants the answer.

        Raises:
            ProtocolError: no answer is due.
        """
        state = self.states.get(id)
        if state is None or state is State.QUEUED:
            raise ProtocolError(f"an answer to {id}, which is not awaited")
        self._free_slot(id)
        return state is State.SENT

    def drop_waiting(self) -> list[int]:
        """Forget the requests of depth 0 that wait for a slot, and return their ids."""
        dropped: list[int] = []
        for slot_class in (0, 1):
            dropped += self._backlogs.pop(slot_class, ())
        for id in dropped:
            self._forget_waiting(id)
        return dropped

    def close(self) -> None:
        """Forget all requests."""
        for id in self.states:
            self._outbox.remove(id)
        for id in (*self.states, *(id for backlog in self._backlogs.values() for id in backlog)):
            self._flow_control.remove(id)
        self._backlogs.clear()
        self.states.clear()
        self._classes.clear()
        self._used = [0] * CLASS_COUNT
        self._room.clear()

    # ---- how many there are ----

    def is_waiting(self, id: int) -> bool:
        """Whether a request waits for a slot."""
        return id in self._backlogs.get(self._classes.get(id, 0), ())

    def oldest_waiting(self) -> int | None:
        """Return the request that has waited longest for a slot; None: none waits."""
        return min((next(iter(backlog)) for backlog in self._backlogs.values()), default=None)

    @property
    def has_waiting(self) -> bool:
        """Whether a request waits for a slot."""
        return bool(self._backlogs)

    def count_waiting(self) -> int:
        """Count the requests that wait for a slot."""
        return sum(map(len, self._backlogs.values()))

    def count_cancelled(self) -> int:
        """Count the requests with a slot that were cancelled and are not answered yet."""
        return list(self.states.values()).count(State.CANCELLED)

    def has_queued_at_depth_0(self) -> bool:
        """Whether a request of depth 0 has a slot and has not wholly departed."""
        return any(
            state is State.QUEUED and self._classes.get(id, 0) <= 1 for id, state in self.states.items()
        )
