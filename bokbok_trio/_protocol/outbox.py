"""What waits to be sent, and in which order it leaves; and big packets, in pieces: no Trio, no I/O.

Control packets leave first. A packet over `MAX_WHOLE_SIZE` leaves as pieces::

    part n left bytes       a piece of packet n; so many bytes are still to come, 0 ends it
    drop n                  the pieces of n so far are void, the packet never existed

A batch is of small packets, in the order they were queued; of items of channels, which take turns;
and of one piece, of whatever big packet has its turn: so none waits long for the others. How large it
is depends on how long the last one took. Of the packets of one id only the first has a place in the
queues; the next takes one when that has wholly left, so they leave in order.

Invariants
==========

- At most `MAX_OPEN` packets have partly left, or partly arrived; what partly arrived takes up at
  most `MAX_OPEN` times the limit of a packet.
- The queues hold references to what the user gave, and no copies, until it is joined: a small packet
  when it is taken, a big one when its first piece is.
- A packet is fixed when the first byte of it is taken; until then its timeout goes on.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Final, NamedTuple, final

from .._errors import ProtocolError
from .packets import LENGTH_SIZE, Chunks, Received, encode_head, encode_number

MAX_BATCH_SIZE: Final = 2**16
"""Bytes after which no further packet is added to a batch: enough to make system calls rare."""

MIN_BATCH_SIZE: Final = 2**14
"""The same on a slow link, where what was handed to the system stands in the way of what comes next.
With 16 KiB unsent, which Trio asks the system to be content with, it is 26 ms at 10 Mbit/s."""

SLOW_SEND: Final = 0.010
"""Seconds. While sending a batch takes longer, batches become smaller; under a quarter, larger."""

MAX_WHOLE_SIZE: Final = 2**16 + 2**10
"""Bytes of the longest packet that travels whole; what is longer must come in pieces. So a field of 64
KiB, which many like to take, goes whole with what stands before it: in pieces its echo takes a fifth more."""

HEAD_ROOM: Final = 128
"""Bytes of a packet kept for everything but the user's fields and context: 93 for the longest head, with
three numbers of 18 digits. Always kept, so that the room does not depend on how many requests there were
before, or on a timeout."""

MAX_PIECE_SIZE: Final = 65_519 - 61
"""Bytes of a piece: with the longest head of `part` it fits one record."""

MAX_TAIL_SIZE: Final = 2**12
"""Bytes of a last piece that goes along with the one before it, as it is not worth a batch."""

SHARE: Final = 4
"""A quarter of each batch is kept for items that wait, and one for a piece, so that small packets
cannot starve them."""

TURN: Final = 2**14
"""Bytes of items that a channel may send before it is the next one's turn, so that one of small items
gets as much as one of large ones."""

ITEM_KINDS: Final = frozenset({b"item", b"end"})
"""What only channels have, and which so waits in a queue of its own."""

MAX_OPEN: Final = 4
"""Packets of one direction that may have partly arrived, each up to the limit of a packet."""

MAX_TIMEOUT: Final = 10**17
"""Microseconds: three thousand years. What is longer is no deadline, and a number has 18 digits."""


@final
class Outgoing:
    """A packet that waits to be sent: a few fields, and a user's body.

    Arguments:
        kind: its first field.
        id: its second one; a packet belongs to a request or channel.
        fields: those after that, before the body.
        body: in chunks, and its size in bytes; None for a packet without one.
        deadline: of a request, by the clock that `Outbox.take` is told; its timeout goes before
            `fields`. None where the packet has no such field.
    """

    __slots__ = ("_body", "_deadline", "_fields", "body_size", "id", "is_big", "kind")

    def __init__(
        self,
        kind: bytes,
        id: int,
        *fields: bytes,
        body: Chunks | None = None,
        body_size: int = 0,
        deadline: float | None = None,
    ) -> None:
        self.kind = kind
        self.id = id
        self.body_size = body_size
        # Whatever its timeout will be.
        self.is_big = body_size + sum(map(len, fields)) > MAX_WHOLE_SIZE - HEAD_ROOM
        self._fields = fields
        self._body = body
        self._deadline = deadline

    def encode(self, now: float, chunks: Chunks) -> int:
        """Append the packet to some chunks, as of now. Returns its size in bytes."""
        fields = self._fields
        if self._deadline is not None:
            left = max(0.0, self._deadline - now) * 1e6
            fields = (b"" if left > MAX_TIMEOUT else encode_number(int(left)), *fields)
        body_size = None if self._body is None else self.body_size
        head = encode_head(self.kind, encode_number(self.id), *fields, body_size=body_size)
        chunks.append(head)
        chunks += self._body or ()
        return len(head) + self.body_size


@final
class _Pieced:
    """A packet that has partly left.

    Arguments:
        number: of the pieces.
        packet: what it is.
        now: as of when.
    """

    __slots__ = ("_chunks", "left", "number", "packet")

    def __init__(self, number: int, packet: Outgoing, now: float) -> None:
        self.number = encode_number(number)
        self.packet = packet
        chunks: Chunks = []
        self.left = packet.encode(now, chunks) - LENGTH_SIZE  # bytes
        chunks[0] = chunks[0][LENGTH_SIZE:]
        self._chunks = deque(memoryview(chunk) for chunk in chunks)

    def take(self, size: int, chunks: Chunks) -> None:
        """Append its next piece, of at most so many bytes, to some chunks."""
        size = min(size, self.left)
        self.left -= size
        chunks.append(encode_head(b"part", self.number, encode_number(self.left), body_size=size))
        while size:
            chunk = self._chunks.popleft()
            if len(chunk) > size:
                self._chunks.appendleft(chunk[size:])
                chunk = chunk[:size]
            chunks.append(chunk)
            size -= len(chunk)


@final
class Taken(NamedTuple):
    """A batch.

    Attributes:
        chunks: of it, to be joined.
        left: the ids of the requests and answers that have thereby wholly left.
        items: the id of each item that has, and the size of its body.
    """

    chunks: Chunks
    left: list[int]
    items: list[tuple[int, int]]

    def note(self, packet: Outgoing) -> None:
        """A packet has wholly left."""
        if packet.kind == b"item":
            self.items.append((packet.id, packet.body_size))
        elif packet.kind != b"end":
            self.left.append(packet.id)


@final
class Outbox:
    """The queues of one direction. Packets are known by the id of their request or channel.

    Attributes:
        has_more: whether the last `take` left packets behind.
        is_all_encoded: whether only packets wait, if any, that are the same whenever they leave.
    """

    __slots__ = (
        "_batch_size",
        "_behind",
        "_big",
        "_control",
        "_credits",
        "_items",
        "_next_number",
        "_open",
        "_overtaken",
        "_small",
        "_turn",
        "has_more",
        "is_all_encoded",
    )

    def __init__(self) -> None:
        self.is_all_encoded = True
        self.has_more = False
        self._control: list[bytes] = []
        self._credits: dict[int, int] = {}  # what is to be granted, by channel
        self._small: OrderedDict[int, Outgoing | bytes] = OrderedDict()
        self._items: OrderedDict[int, Outgoing] = OrderedDict()  # the next one's turn is the first's
        self._turn = TURN  # how much is left of it
        self._big: OrderedDict[int, Outgoing] = OrderedDict()
        self._open: OrderedDict[int, _Pieced] = OrderedDict()  # the next one's turn is the first's
        self._behind: dict[int, deque[Outgoing]] = {}  # what waits for the packet before it, of its id
        self._next_number = 0
        self._batch_size = MAX_BATCH_SIZE
        self._overtaken = 0  # bytes that left since the last piece, while one waited

    def __contains__(self, id: int) -> bool:
        """Whether a packet of that id has not wholly left."""
        return id in self._small or id in self._items or id in self._big or id in self._open

    def __len__(self) -> int:
        """How many packets have not wholly left."""
        queues = (self._control, self._credits, self._small, self._items, self._big, self._open)
        return sum(map(len, queues)) + sum(map(len, self._behind.values()))

    def put_control(self, *fields: bytes) -> None:
        """Queue a control packet."""
        self._control.append(encode_head(*fields))

    def put(self, packet: Outgoing) -> None:
        """Queue a packet; it leaves after those of its id that were queued before."""
        self.is_all_encoded = False
        if packet.id in self:
            self._behind.setdefault(packet.id, deque()).append(packet)
        else:
            self._place(packet)

    def put_encoded(self, id: int, packet: bytes) -> None:
        """Queue a small packet, which must be the first of its id: a request, or its only answer."""
        self._small[id] = packet

    def _place(self, packet: Outgoing) -> None:
        if packet.is_big:
            self._big[packet.id] = packet
        elif packet.kind in ITEM_KINDS:
            self._items[packet.id] = packet
        else:
            self._small[packet.id] = packet

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits."""
        return not (self._small or self._control or self._credits or self._items or self._big or self._open)

    def put_credit(self, id: int, size: int) -> None:
        """Queue credit for a channel, in one packet with what waits already."""
        self._credits[id] = self._credits.get(id, 0) + size

    def remove(self, id: int) -> bool:
        """Take back what of that id has not wholly left. Returns whether there was anything."""
        self._behind.pop(id, None)
        if any(queue.pop(id, None) is not None for queue in (self._small, self._items, self._big)):
            return True
        pieced = self._open.pop(id, None)
        if pieced is not None:
            self.put_control(b"drop", pieced.number)
        return pieced is not None

    def note_sent(self, seconds: float) -> None:
        """Learn how long it took to send the last batch."""
        if seconds > SLOW_SEND:
            self._batch_size = max(MIN_BATCH_SIZE, self._batch_size // 2)
        elif seconds < SLOW_SEND / 4:
            self._batch_size = min(MAX_BATCH_SIZE, self._batch_size * 2)

    @property
    def has_big(self) -> bool:
        """Whether a big packet waits, or has partly left."""
        return bool(self._open or self._big)

    def take(self, now: float, room: int = MAX_BATCH_SIZE) -> Taken:
        """Take the next batch.

        Arguments:
            now: the time, in seconds, by the clock of the deadlines.
            room: bytes of a batch with a piece in it, about; at 0 pieces wait, but are not starved.
        """
        taken = Taken([], [], [])
        size = self._take_control(taken.chunks) if self._control or self._credits else 0
        if not (self._items or self._big or self._open):  # mostly; then the rest of this is not needed
            while self._small and size < self._batch_size:
                size += self._take_small(now, taken)
            if not (self._items or self._big):  # which may have been behind what left
                self.has_more = bool(self._small)
                self.is_all_encoded = not self.has_more
                return taken
        if room == 0 and self._overtaken >= MIN_BATCH_SIZE:
            room = MIN_BATCH_SIZE
        has_piece = self.has_big and room > 0
        most = min(self._batch_size, room) if has_piece else self._batch_size
        least = most // SHARE
        most_others = most - least if has_piece else most
        while size < most_others and (self._small or self._items):
            if self._small and (size < most_others - least or not self._items):
                size += self._take_small(now, taken)
            else:
                size += self._take_item(now, taken)
        if has_piece:
            self._take_piece(max(least, min(MAX_PIECE_SIZE, most - size)), now, taken)
        self._overtaken = self._overtaken + size if self.has_big and not has_piece else 0
        self.has_more = not self.is_empty
        return taken

    def _take_control(self, chunks: Chunks) -> int:
        chunks += self._control
        self._control.clear()
        for id, credit in self._credits.items():
            chunks.append(encode_head(b"credit", encode_number(id), encode_number(credit)))
        self._credits.clear()
        return sum(map(len, chunks))

    def _take_small(self, now: float, taken: Taken) -> int:
        id, packet = self._small.popitem(last=False)
        if not isinstance(packet, bytes):
            return self._take_whole(packet, now, taken)
        taken.chunks.append(packet)
        taken.left.append(id)
        return len(packet)

    def _take_whole(self, packet: Outgoing, now: float, taken: Taken) -> int:
        taken.note(packet)
        if self._behind:
            self._place_next(packet.id)
        return packet.encode(now, taken.chunks)

    def _take_item(self, now: float, taken: Taken) -> int:
        id, packet = self._items.popitem(last=False)
        size = self._take_whole(packet, now, taken)
        self._turn -= size
        if self._turn > 0 and id in self._items:
            self._items.move_to_end(id, last=False)
        else:
            self._turn = TURN
        return size

    def _take_piece(self, size: int, now: float, taken: Taken) -> None:
        if self._big and len(self._open) < MAX_OPEN:
            id, packet = self._big.popitem(last=False)
            pieced = _Pieced(self._next_number, packet, now)
            self._next_number += 1
        else:
            id, pieced = self._open.popitem(last=False)
        pieced.take(size, taken.chunks)
        if 0 < pieced.left <= MAX_TAIL_SIZE:
            pieced.take(MAX_TAIL_SIZE, taken.chunks)
        if pieced.left:
            self._open[id] = pieced
        else:
            taken.note(pieced.packet)
            self._place_next(id)

    def _place_next(self, id: int) -> None:
        """A packet has wholly left, or is about to: let the next one of its id take a place."""
        behind = self._behind.get(id)
        if behind is not None:
            self._place(behind.popleft())
            if not behind:
                del self._behind[id]


@final
class Reassembler:
    """Puts the pieces of the other side together.

    Arguments:
        limit: the most bytes a packet's length may be.
    """

    __slots__ = ("_limit", "_open")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: dict[int, tuple[bytearray, int]] = {}  # what came, and how much is still to come

    @property
    def held(self) -> int:
        """How many bytes of unfinished packets are held."""
        return sum(len(buffer) for buffer, _ in self._open.values())

    def add(self, number: int, left: int, piece: Received) -> memoryview | None:
        """Take in a piece; return the body of the packet that it completes.

        Raises:
            ProtocolError: it is empty, one packet too many, over the limit, or does not go on where
                the last one ended.
        """
        if not piece:
            raise ProtocolError("an empty piece")
        if number in self._open:
            buffer, expected = self._open[number]
            if left != expected - len(piece):
                raise ProtocolError(f"a piece with {left} bytes to come after one with {expected}")
        else:
            if len(piece) + left > self._limit:
                raise ProtocolError(
                    f"a packet of {len(piece) + left} bytes in pieces exceeds the limit of {self._limit}"
                )
            if len(self._open) >= MAX_OPEN:
                raise ProtocolError(f"more than {MAX_OPEN} packets in pieces at once")
            buffer = bytearray()
        buffer += piece
        if left:
            self._open[number] = (buffer, left)
            return None
        self._open.pop(number, None)
        return memoryview(buffer)

    def drop(self, number: int) -> int:
        """Forget the pieces of a packet, and return how many bytes they were.

        Raises:
            ProtocolError: there are none.
        """
        if number not in self._open:
            raise ProtocolError(f"`drop` of packet {number}, of which no piece has come")
        return len(self._open.pop(number)[0])
