"""The queues of packets that wait to be sent, and the order in which they leave.

Theory
======

Control packets leave first. Then a *batch* has small packets, in the order in which they were queued; items
of channels, which take turns; and one piece of a big packet, where big packets take turns too. So none waits
long for the others. The size of a batch depends on how long the last one took to send.

Packets of one id leave in the order in which they were queued. Only the first of them has a place in the
queues; the next one is blocked by order until the first has wholly departed.

Invariants
==========

- At most `MAX_IN_PIECES` packets have partly departed.
- The queues refer to the user's bytes without copying them. The bytes are copied when they are joined: those
  of a small packet when it is taken, those of a big one when its first piece is.
- A packet is fixed when its first byte is taken. Until then its timeout goes on.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Final, NamedTuple, final

from .packets import Chunks, encode_number, encode_packet
from .pieces import MAX_IN_PIECES, MAX_PIECE_SIZE, PartlySent
from .queued_packet import QueuedPacket

MAX_BATCH_SIZE: Final = 2**16
"""Bytes after which no further packet is added to a batch: enough to make system calls rare."""

MIN_BATCH_SIZE: Final = 2**14
"""The same on a slow link, where bytes in the socket delay all that comes after them. Trio asks the system to
be content with 16 KiB unsent; together that is a delay of 26 ms at 10 Mbit/s."""

SLOW_SEND: Final = 0.010
"""Seconds. While a batch takes longer to send, batches become smaller; under a quarter of it, they become
larger."""

MAX_TAIL_SIZE: Final = 2**12
"""Bytes of a last piece that leaves with the piece before it, because it is not worth a batch of its own."""

RESERVED_FRACTION: Final = 1 / 4
"""The part of each batch that is reserved for items if any wait, and the part that is reserved for a piece.
So small packets cannot starve them."""

QUANTUM: Final = 2**14
"""Bytes of items that a channel may send in its turn, as in deficit round robin. So a channel of small items
sends as much as one of large items."""

CHANNEL_KINDS: Final = frozenset({b"item", b"end"})
"""The kinds of packets that only channels have. They wait in a queue of their own."""


@final
class Batch(NamedTuple):
    """Packets that leave together.

    Attributes:
        chunks: the bytes, to be joined.
        departed: the ids of the requests and answers that wholly depart with this batch.
        items: the id of each item that wholly departs with it, and the size of its body.
    """

    chunks: Chunks
    departed: list[int]
    items: list[tuple[int, int]]

    def note_departed(self, packet: QueuedPacket) -> None:
        """Note that a packet wholly departs with this batch."""
        if packet.kind == b"item":
            self.items.append((packet.id, packet.body_size))
        elif packet.kind != b"end":
            self.departed.append(packet.id)


@final
class Outbox:
    """The queues of one direction. A packet is known by the id of its request or channel.

    Attributes:
        has_more: whether packets remained after the last `take`.
        is_all_encoded: whether all packets that wait are encoded. Then `take` needs no time and no room.
    """

    __slots__ = (
        "_batch_size",
        "_big",
        "_blocked_by_order",
        "_control",
        "_credits",
        "_in_pieces",
        "_items",
        "_next_number",
        "_overtaken",
        "_quantum_remaining",
        "_small",
        "has_more",
        "is_all_encoded",
    )

    def __init__(self) -> None:
        self.is_all_encoded = True
        self.has_more = False
        self._control: list[bytes] = []
        self._credits: dict[int, int] = {}  # bytes to grant, by channel
        self._small: OrderedDict[int, QueuedPacket | bytes] = OrderedDict()
        self._items: OrderedDict[int, QueuedPacket] = OrderedDict()  # the first one's turn is now
        self._quantum_remaining = QUANTUM  # bytes
        self._big: OrderedDict[int, QueuedPacket] = OrderedDict()
        self._in_pieces: OrderedDict[int, PartlySent] = OrderedDict()  # the first one's turn is now
        self._blocked_by_order: dict[int, deque[QueuedPacket]] = {}  # by id
        self._next_number = 0
        self._batch_size = MAX_BATCH_SIZE
        self._overtaken = 0  # bytes taken since the last piece, while another piece waited

    def __contains__(self, id: int) -> bool:
        """Whether a packet of that id has not wholly departed."""
        return id in self._small or id in self._items or id in self._big or id in self._in_pieces

    def __len__(self) -> int:
        """How many packets have not wholly departed."""
        queues = (self._control, self._credits, self._small, self._items, self._big, self._in_pieces)
        return sum(map(len, queues)) + sum(map(len, self._blocked_by_order.values()))

    def put_control(self, *fields: bytes) -> None:
        """Queue a control packet."""
        self._control.append(encode_packet(*fields))

    def put(self, packet: QueuedPacket) -> None:
        """Queue a packet. It leaves after the packets of its id that were queued before."""
        self.is_all_encoded = False
        if packet.id in self:
            self._blocked_by_order.setdefault(packet.id, deque()).append(packet)
        else:
            self._place(packet)

    def put_encoded(self, id: int, packet: bytes) -> None:
        """Queue a small packet while no other packet of its id waits: a request, or its only answer."""
        self._small[id] = packet

    def _place(self, packet: QueuedPacket) -> None:
        if packet.is_big:
            self._big[packet.id] = packet
        elif packet.kind in CHANNEL_KINDS:
            self._items[packet.id] = packet
        else:
            self._small[packet.id] = packet

    @property
    def is_empty(self) -> bool:
        """Whether no packet waits."""
        return not (
            self._small or self._control or self._credits or self._items or self._big or self._in_pieces
        )

    def put_credit(self, id: int, size: int) -> None:
        """Queue credit for a channel. Credit that waits already is added to it, in one packet."""
        self._credits[id] = self._credits.get(id, 0) + size

    def remove(self, id: int) -> bool:
        """Remove the packets of an id that have not wholly departed. Return whether there were any."""
        self._blocked_by_order.pop(id, None)
        if any(queue.pop(id, None) is not None for queue in (self._small, self._items, self._big)):
            return True
        partly_sent = self._in_pieces.pop(id, None)
        if partly_sent is not None:  # the peer holds the pieces so far
            self.put_control(b"drop", partly_sent.number)
        return partly_sent is not None

    def note_sent(self, seconds: float) -> None:
        """Adapt the size of batches to how long it took to send the last one."""
        if seconds > SLOW_SEND:
            self._batch_size = max(MIN_BATCH_SIZE, self._batch_size // 2)
        elif seconds < SLOW_SEND / 4:
            self._batch_size = min(MAX_BATCH_SIZE, self._batch_size * 2)

    @property
    def has_big(self) -> bool:
        """Whether a big packet waits, or has partly departed."""
        return bool(self._in_pieces or self._big)

    def take(self, now: float, room: int = MAX_BATCH_SIZE) -> Batch:
        """Take the next batch.

        Arguments:
            now: the time, in seconds, by the clock of the deadlines.
            room: bytes of a batch that has a piece in it, about. At 0 pieces wait, but they are not starved.
        """
        batch = Batch([], [], [])
        size = self._take_control(batch.chunks) if self._control or self._credits else 0
        # Mostly only small packets wait. They take this short way.
        if not (self._items or self._big or self._in_pieces):
            while self._small and size < self._batch_size:
                size += self._take_small(now, batch)
            if not (self._items or self._big):  # a packet that was taken may have blocked one of these
                self.has_more = bool(self._small)
                self.is_all_encoded = not self.has_more
                return batch
        # Small packets may overtake a piece while it waits for room, but not for ever.
        if room == 0 and self._overtaken >= MIN_BATCH_SIZE:
            room = MIN_BATCH_SIZE
        has_piece = self.has_big and room > 0
        most = min(self._batch_size, room) if has_piece else self._batch_size
        least = int(most * RESERVED_FRACTION)  # reserved for items, and again for the piece
        most_others = most - least if has_piece else most
        while size < most_others and (self._small or self._items):
            if self._small and (size < most_others - least or not self._items):
                size += self._take_small(now, batch)
            else:
                size += self._take_item(now, batch)
        if has_piece:
            self._take_piece(max(least, min(MAX_PIECE_SIZE, most - size)), now, batch)
        self._overtaken = self._overtaken + size if self.has_big and not has_piece else 0
        self.has_more = not self.is_empty
        return batch

    def _take_control(self, chunks: Chunks) -> int:
        chunks += self._control
        self._control.clear()
        for id, credit in self._credits.items():
            chunks.append(encode_packet(b"credit", encode_number(id), encode_number(credit)))
        self._credits.clear()
        return sum(map(len, chunks))

    def _take_small(self, now: float, batch: Batch) -> int:
        id, packet = self._small.popitem(last=False)
        if not isinstance(packet, bytes):
            return self._take_whole(packet, now, batch)
        batch.chunks.append(packet)
        batch.departed.append(id)
        return len(packet)

    def _take_whole(self, packet: QueuedPacket, now: float, batch: Batch) -> int:
        batch.note_departed(packet)
        if self._blocked_by_order:
            self._place_next(packet.id)
        return packet.encode(now, batch.chunks)

    def _take_item(self, now: float, batch: Batch) -> int:
        id, packet = self._items.popitem(last=False)
        size = self._take_whole(packet, now, batch)
        self._quantum_remaining -= size
        if self._quantum_remaining > 0 and id in self._items:
            self._items.move_to_end(id, last=False)  # it is still this channel's turn
        else:
            self._quantum_remaining = QUANTUM
        return size

    def _take_piece(self, size: int, now: float, batch: Batch) -> None:
        if self._big and len(self._in_pieces) < MAX_IN_PIECES:
            id, packet = self._big.popitem(last=False)
            partly_sent = PartlySent(self._next_number, packet, now)
            self._next_number += 1
        else:
            id, partly_sent = self._in_pieces.popitem(last=False)
        partly_sent.take(size, batch.chunks)
        if 0 < partly_sent.remaining <= MAX_TAIL_SIZE:
            partly_sent.take(MAX_TAIL_SIZE, batch.chunks)
        if partly_sent.remaining:
            self._in_pieces[id] = partly_sent
        else:
            batch.note_departed(partly_sent.packet)
            self._place_next(id)

    def _place_next(self, id: int) -> None:
        """Give the next packet of an id its place: the packet before it departs with this batch."""
        blocked = self._blocked_by_order.get(id)
        if blocked is not None:
            self._place(blocked.popleft())
            if not blocked:
                del self._blocked_by_order[id]
