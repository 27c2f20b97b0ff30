"""The credit of channels bounds the bytes of items that each side may send.

Theory
======

Each direction of a channel has a credit, in bytes. An item uses up its body and `ITEM_COST`. The receiver
grants the credit: first a *window* (`chan` grants it to the answerer, `credit` to the opener), then as much
as its user has consumed. The window is `WINDOW` while the budget allows it.

An item may be sent while any credit remains, so it can be of any size. Then the credit may be below zero, by
less than one item, and no further item is sent before it is above zero again.

Invariants
==========

- Items that were received and not consumed take up less than the window and one item.
- Items that wait in the queue take up less than `MAX_QUEUED` and one item, whatever the peer
  grants. Each counts `ITEM_OVERHEAD` besides its body, so this bounds the memory as well.
- Every queued item has its credit, so no queued packet ever waits for the peer's user.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, final

from .._errors import ProtocolError
from .._types import Fields
from .budget import MIN_WINDOW
from .outbox import Outbox
from .packets import Chunks, encode_body
from .queued_packet import QueuedPacket

WINDOW: Final = 2**18
"""Bytes of items that a side takes before its user has consumed any. A link of 20 Mbit/s carries as much in a
round trip of 0.1 s, and it is little enough for a hundred channels."""

ITEM_COST: Final = 64
"""Bytes of credit that an item uses up besides its body: an item of a few bytes takes up more memory than its
body. The wire fixes this number."""

MAX_QUEUED: Final = 2**16
"""Bytes of a channel's items that may wait in the queue; then the next item waits outside. It is as much as a
batch, so that the sender never lacks work."""

ITEM_OVERHEAD: Final = 512
"""Bytes of memory that a queued item takes up besides its body."""

MAX_CREDIT: Final = 2**32 - 1
"""Bytes of credit that a channel may have. No side can use so much memory, so a peer that grants more has
lost count."""


@final
class ChannelCredit:
    """The credit of one channel, in both directions.

    Arguments:
        send_credit, receive_credit: bytes, at the beginning.
        started: whether the peer knows of the channel, or will know before it receives any packet that is
            queued now.

    Attributes:
        send_credit: bytes that this side may still send.
        receive_credit: bytes that the peer may still send.
        window: bytes that the peer was granted first.
        queued: bytes of this side's items that wait to be sent, as they count for `MAX_QUEUED`.
        ended, peer_ended: whether this side, or the peer, sends no more items.
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
        """Use up credit for an item that is queued."""
        assert self.may_send
        assert not self.ended
        self.send_credit -= size + ITEM_COST
        self.queued += size + ITEM_OVERHEAD

    def item_departed(self, size: int) -> None:
        """Note that an item has wholly departed."""
        self.queued -= size + ITEM_OVERHEAD

    def add_credit(self, size: int) -> None:
        """Take more credit from the peer.

        Raises:
            ProtocolError: it exceeds `MAX_CREDIT` in all.
        """
        self.send_credit += size
        if self.send_credit > MAX_CREDIT:
            raise ProtocolError(f"credit of {self.send_credit} bytes exceeds the limit of {MAX_CREDIT}")

    def receive(self, size: int) -> None:
        """Use up the peer's credit for an item that came.

        Raises:
            ProtocolError: it came after the peer's end, or without credit.
        """
        if self.peer_ended:
            raise ProtocolError("`item` after `end`")
        if self.receive_credit <= 0:
            raise ProtocolError("`item` without credit")
        self.receive_credit -= size + ITEM_COST

    def receive_end(self) -> None:
        """Note that the peer sends no more items.

        Raises:
            ProtocolError: it has said so before.
        """
        if self.peer_ended:
            raise ProtocolError("`end` sent twice")
        self.peer_ended = True

    def consume(self, size: int) -> int:
        """Note that our user took an item. Return the credit to grant now, which is mostly 0.

        Credit is granted for half a window at a time.
        """
        self._consumed += size + ITEM_COST
        if self.peer_ended or self._consumed < self.window // 2:
            return 0
        due, self._consumed = self._consumed, 0
        return due


@final
class FlowControl:
    """The credit of all channels in flight, of both sides. An unknown id is ignored: its channel has ended.

    Arguments:
        outbox: where items, credit and ends are queued.
        max_body_size: bytes of an item.
        budget: bytes of the windows of all channels together, about.
        count_free: counts the bytes of the whole budget that requests and answers do not take up.

    Attributes:
        credits: the credit of each channel; for reading only.
        queued: bytes of the items that wait to be sent, as they count for `MAX_QUEUED`.
        held: bytes of the items that were received and that nobody has taken.
        total: how many channels there have been.
        writable: the channels that `take_writable` would return.
    """

    __slots__ = (
        "_budget",
        "_count_free",
        "_free",
        "_max_body_size",
        "_outbox",
        "credits",
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
        self._free = budget  # the part that no window takes up; below 0 with very many channels
        self._max_body_size = max_body_size
        self.credits: dict[int, ChannelCredit] = {}
        self.writable: dict[int, None] = {}  # an empty dict takes up less memory than an empty set
        self.queued = 0
        self.held = 0
        self.total = 0

    def __len__(self) -> int:
        return len(self.credits)

    # ---- beginning and ending ----

    def add_local(self, id: int) -> int:
        """Add a channel that this side opens. Return its window, which its `chan` grants."""
        window = self._take_window()
        self.credits[id] = ChannelCredit(send_credit=0, receive_credit=window, started=False)
        self.total += 1
        return window

    def add_remote(self, id: int, credit: int) -> None:
        """Add a channel that the peer opens, with the window that it grants.

        Raises:
            ProtocolError: the window exceeds `MAX_CREDIT`.
        """
        self.credits[id] = ChannelCredit(send_credit=credit, receive_credit=0, started=True)
        self.total += 1

    def _take_window(self) -> int:
        """Take the window of one more channel out of the budget: less than `WINDOW` if there are many."""
        # An eighth of the rest: windows shrink little by little, and each later channel still gets one.
        window = max(MIN_WINDOW, min(WINDOW, self._free // 8))
        self._free -= window
        return window

    def start(self, id: int) -> None:
        """Note that the `chan` of a channel was queued."""
        channel = self.credits.get(id)
        if channel is not None:
            channel.started = True
            if channel.ended:  # `end` must not be sent before `chan`, so it waited for this
                self._put_end(id)

    def remove(self, id: int) -> None:
        """Forget a channel, because its request has ended."""
        channel = self.credits.pop(id, None)
        if channel is not None:
            self._free += channel.window
            self.queued -= channel.queued
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
        channel = self.credits.get(id)
        return channel is not None and channel.may_send

    def send(self, id: int, body: Chunks, size: int) -> None:
        """Queue an item. `may_send` must be true."""
        channel = self.credits[id]
        channel.send(size)
        self.queued += size + ITEM_OVERHEAD
        self._outbox.put(QueuedPacket(b"item", id, body=body, body_size=size))

    def item_departed(self, id: int, size: int) -> None:
        """Note that an item has wholly departed."""
        channel = self.credits.get(id)
        if channel is not None:
            channel.item_departed(size)
            self.queued -= size + ITEM_OVERHEAD
            self._note_writable(id, channel)

    def end(self, id: int) -> None:
        """Send no more items. A second call does nothing."""
        channel = self.credits.get(id)
        if channel is not None and not channel.ended:
            channel.ended = True
            if channel.started:
                self._put_end(id)

    def take_writable(self) -> set[int]:
        """Return the channels that may queue an item again, since the last call."""
        writable = set(self.writable)
        self.writable.clear()
        return writable

    def _note_writable(self, id: int, channel: ChannelCredit) -> None:
        if channel.may_send:
            self.writable[id] = None

    def _put_end(self, id: int) -> None:
        self._outbox.put(QueuedPacket(b"end", id))

    # ---- receiving ----

    def accept(self, id: int) -> None:
        """Take items of a channel that the peer opened: grant its window."""
        self.credits[id].window = window = self._take_window()
        self.grant(id, window)

    def grant(self, id: int, size: int) -> None:
        """Grant more credit."""
        self.credits[id].receive_credit += size
        self._outbox.put_credit(id, size)

    def consume(self, id: int, size: int) -> bool:
        """Note that our user took an item, or never will. Return whether credit was granted for it."""
        channel = self.credits.get(id)
        due = 0 if channel is None else channel.consume(size)
        if due:
            self.grant(id, due)
        return due > 0

    def hold(self, size: int) -> bool:
        """Count an item until somebody takes it. Return False if it does not fit the budget beside others."""
        if self.held and self.held + size > max(self._budget, self._count_free()):
            return False
        self.held += size
        return True

    def release(self, size: int) -> None:
        """Stop counting an item: it was taken, or dropped."""
        self.held -= size

    def on_item(self, id: int, size: int) -> None:
        """Take an item that the peer sent on a channel in flight.

        Raises:
            ProtocolError: as `ChannelCredit.receive`.
        """
        self.credits[id].receive(size)

    def on_credit(self, id: int, size: int) -> None:
        """Take credit that the peer granted for a channel in flight.

        Raises:
            ProtocolError: as `ChannelCredit.add_credit`.
        """
        channel = self.credits[id]
        channel.add_credit(size)
        self._note_writable(id, channel)

    def on_end(self, id: int) -> None:
        """Take the end that the peer sent on a channel in flight.

        Raises:
            ProtocolError: as `ChannelCredit.receive_end`.
        """
        self.credits[id].receive_end()
