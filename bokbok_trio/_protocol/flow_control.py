"""The credit of channels: how much each side of one may send, and what it must refuse. No Trio, no I/O.

Theory
======

Each direction of a channel has a credit, in bytes; an item takes up its body and `ITEM_COST` of it. The
receiver grants it: at first a window (with `chan` to the answerer, with `credit` to the opener), which is a
`WINDOW` while the budget allows, then as much as its user has consumed. An item may start while some is left,
so that it can be of any size; credit then is below zero by less than one item, and no further item starts
before it is above zero again.

Invariants
==========

- What has been received and not been consumed is less than the window and one item.
- What was queued and has not left is less than `MAX_QUEUED` and one item, whatever the peer grants;
  each item counts as `ITEM_OVERHEAD` more than its body, so this bounds the memory as well.
- Every item that was queued has its credit, so nothing that is queued ever waits for the peer's user.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, final

from .._errors import ProtocolError
from .._types import Fields
from .budget import MIN_WINDOW
from .outbox import Outbox, Outgoing
from .packets import Chunks, encode_body

WINDOW: Final = 2**18
"""Bytes of items that a side takes before its user has consumed any: what a link of 20 Mbit/s carries
in a round trip of 0.1 s, and little enough for a hundred channels."""

ITEM_COST: Final = 64
"""Bytes of credit that an item takes up besides its body, so that items of a few bytes, which take up more
memory than that, cannot fill it either. The wire fixes it."""

MAX_QUEUED: Final = 2**16
"""Bytes of a channel's items that wait to leave, from which on the next one waits outside. It is as
much as a batch, so that the sender never lacks work."""

ITEM_OVERHEAD: Final = 512
"""Bytes that an item takes up while it waits to leave, over those of its body."""

MAX_CREDIT: Final = 2**32 - 1
"""Bytes of credit that there may be at once: no side has use for so much memory, so a peer that
grants more has lost count."""


@final
class Flow:
    """The credit of one channel, both ways.

    Arguments:
        send_credit, receive_credit: bytes, at first.
        started: whether the peer knows of the channel, or will before what is queued now.

    Attributes:
        window: bytes of credit that the peer was granted first.
    """

    __slots__ = (
        "_consumed",
        "ended",
        "peer_ended",
        "queued",
        "receive_credit",
        "send_credit",
        "started",
        "window",
    )

    def __init__(self, *, send_credit: int, receive_credit: int, started: bool) -> None:
        self.send_credit = 0
        self.receive_credit = receive_credit
        self.window = receive_credit
        self.started = started
        self.ended = False
        self.peer_ended = False
        self.queued = 0
        self._consumed = 0
        self.add_credit(send_credit)

    @property
    def may_send(self) -> bool:
        """Whether an item may be queued now, of whatever size."""
        return self.send_credit > 0 and self.queued < MAX_QUEUED

    def send(self, size: int) -> None:
        """An item is queued."""
        assert self.may_send
        assert not self.ended
        self.send_credit -= size + ITEM_COST
        self.queued += size + ITEM_OVERHEAD

    def left(self, size: int) -> None:
        """An item has wholly left."""
        self.queued -= size + ITEM_OVERHEAD

    def add_credit(self, size: int) -> None:
        """The peer takes so many bytes more.

        Raises:
            ProtocolError: more than `MAX_CREDIT` in all.
        """
        self.send_credit += size
        if self.send_credit > MAX_CREDIT:
            raise ProtocolError(f"credit of {self.send_credit} bytes exceeds the limit of {MAX_CREDIT}")

    def receive(self, size: int) -> None:
        """The peer sent an item.

        Raises:
            ProtocolError: after its end, or without credit.
        """
        if self.peer_ended:
            raise ProtocolError("`item` after `end`")
        if self.receive_credit <= 0:
            raise ProtocolError("`item` without credit")
        self.receive_credit -= size + ITEM_COST

    def receive_end(self) -> None:
        """The peer sends no more items.

        Raises:
            ProtocolError: it has said so before.
        """
        if self.peer_ended:
            raise ProtocolError("`end` sent twice")
        self.peer_ended = True

    def consume(self, size: int) -> int:
        """Our user took an item. Return how much credit to grant now: only now and then there is any."""
        self._consumed += size + ITEM_COST
        if self.peer_ended or self._consumed < self.window // 2:
            return 0
        due, self._consumed = self._consumed, 0
        return due


@final
class Flows:
    """The channels in flight, those of both sides, by id. Where there is none of an id, nothing is done.

    Arguments:
        outbox: where items, credit and ends are queued.
        max_body_size: bytes of an item.
        budget: bytes of the windows of all channels together, about.
        count_free: counts the bytes that items may take up beyond that.

    Attributes:
        by_id: they themselves, to be looked at.
        queued: bytes of the items that wait to leave, as they count for `MAX_QUEUED`.
        held: bytes of the items that were received, and that nobody has taken.
        total: how many channels there have been.
        writable: those that `take_writable` would return.
    """

    __slots__ = (
        "_budget",
        "_count_free",
        "_free",
        "_max_body_size",
        "_outbox",
        "by_id",
        "held",
        "queued",
        "total",
        "writable",
    )

    def __init__(
        self, outbox: Outbox, max_body_size: int, budget: int, count_free: Callable[[], int]
    ) -> None:
        self._outbox = outbox
        self._count_free = count_free
        self._budget = budget
        self._free = budget  # what the windows leave of it; below 0 where there are very many
        self._max_body_size = max_body_size
        self.by_id: dict[int, Flow] = {}
        self.writable: dict[int, None] = {}  # takes up less than a set, where there is none
        self.queued = 0
        self.held = 0
        self.total = 0

    def __len__(self) -> int:
        return len(self.by_id)

    # ---- beginning and ending, for `Session` ----

    def add_ours(self, id: int) -> None:
        """A channel of ours. Its `chan` grants its first window."""
        window = self._take_window()
        self.by_id[id] = Flow(send_credit=0, receive_credit=window, started=False)
        self.total += 1

    def add_theirs(self, id: int, credit: int) -> None:
        """A channel of the peer's, which takes so many bytes at first.

        Raises:
            ProtocolError: more than `MAX_CREDIT`.
        """
        self.by_id[id] = Flow(send_credit=credit, receive_credit=0, started=True)
        self.total += 1

    def _take_window(self) -> int:
        """How many bytes a channel may send at first: a `WINDOW`, or less where there are many."""
        window = max(MIN_WINDOW, min(WINDOW, self._free // 8))
        self._free -= window
        return window

    def start(self, id: int) -> None:
        """The `chan` of a channel of ours was queued."""
        flow = self.by_id.get(id)
        if flow is not None:
            flow.started = True
            if flow.ended:
                self._put_end(id)

    def remove(self, id: int) -> None:
        """It is done, or never was."""
        flow = self.by_id.pop(id, None)
        if flow is not None:
            self._free += flow.window
            self.queued -= flow.queued
        self.writable.pop(id, None)

    # ---- sending ----

    def encode(self, fields: Fields) -> tuple[Chunks, int]:
        """Encode an item for `send`.

        Raises:
            TypeError, ValueError, MessageTooLarge: as `encode_body` does.
        """
        return encode_body(fields, self._max_body_size)

    def may_send(self, id: int) -> bool:
        """Whether an item may be queued now."""
        flow = self.by_id.get(id)
        return flow is not None and flow.may_send

    def send(self, id: int, body: Chunks, size: int) -> None:
        """Queue an item; `may_send` must be so."""
        flow = self.by_id[id]
        flow.send(size)
        self.queued += size + ITEM_OVERHEAD
        self._outbox.put(Outgoing(b"item", id, body=body, body_size=size))

    def left(self, id: int, size: int) -> None:
        """An item has wholly left."""
        flow = self.by_id.get(id)
        if flow is not None:
            flow.left(size)
            self.queued -= size + ITEM_OVERHEAD
            self._note_writable(id, flow)

    def end(self, id: int) -> None:
        """Send no more items. Again does nothing."""
        flow = self.by_id.get(id)
        if flow is not None and not flow.ended:
            flow.ended = True
            if flow.started:
                self._put_end(id)

    def take_writable(self) -> set[int]:
        """The channels of which an item may be queued, and perhaps could not be when last asked."""
        writable = set(self.writable)
        self.writable.clear()
        return writable

    def _note_writable(self, id: int, flow: Flow) -> None:
        if flow.may_send:
            self.writable[id] = None

    def _put_end(self, id: int) -> None:
        self._outbox.put(Outgoing(b"end", id))

    # ---- receiving ----

    def accept(self, id: int) -> None:
        """Take items of a channel of the peer's: grant its first window."""
        self.by_id[id].window = window = self._take_window()
        self.grant(id, window)

    def grant(self, id: int, size: int) -> None:
        """Take so many bytes more."""
        self.by_id[id].receive_credit += size
        self._outbox.put_credit(id, size)

    def consume(self, id: int, size: int) -> bool:
        """Our user has taken an item, or will take none. Returns whether credit was granted for it."""
        flow = self.by_id.get(id)
        due = 0 if flow is None else flow.consume(size)
        if due:
            self.grant(id, due)
        return due > 0

    def hold(self, size: int) -> bool:
        """Keep an item until somebody takes it. Returns whether it fits the budget, or is the only one."""
        if self.held and self.held + size > max(self._budget, self._count_free()):
            return False
        self.held += size
        return True

    def release(self, size: int) -> None:
        """It was taken, or dropped."""
        self.held -= size

    def on_item(self, id: int, size: int) -> None:
        """The peer sent an item of a channel in flight.

        Raises:
            ProtocolError: it may not.
        """
        self.by_id[id].receive(size)

    def on_credit(self, id: int, size: int) -> None:
        """The peer takes more items of a channel in flight.

        Raises:
            ProtocolError: too much.
        """
        flow = self.by_id[id]
        flow.add_credit(size)
        self._note_writable(id, flow)

    def on_end(self, id: int) -> None:
        """The peer sends no more items.

        Raises:
            ProtocolError: again.
        """
        self.by_id[id].receive_end()
