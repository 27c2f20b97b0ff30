"""How many bytes one connection may make a side hold, and who waits where that is used up.

A side's budget is shared out among what the peer can make it hold:

- *Requests*, until their handlers have ended: five eighths. The side tells its peer how much that is, by the
  option `room`, and the peer keeps what does not fit until there is room. What a peer sends nevertheless is
  answered `busy`, and does not run.
- *Answers*, until they have left: three sixteenths. Where they take up more, requests of depth 0 wait with
  their handlers, until the peer has read some.
- *Items* that no one has received: the windows of all channels share three sixteenths, and become smaller
  where there are many. As an item of any size may start while some of a window is left, this may not do. So
  items may take up all that is left of the budget, and a channel whose items do not fit then breaks.

Besides, the pieces of a few packets may have partly arrived (see `MAX_OPEN`).

Nobody waits for ever. Who asks keeps a share of `room` for each depth and kind of request, as with slots: so
a request waits only for others of its depth and kind, these wait only for deeper ones, and one of each may
always go. And answers leave, as a peer that does not read is lost.
"""

from __future__ import annotations

from typing import Final, NamedTuple, final

COUNTED: Final = 2**12
"""Bytes of a request from which on it counts: smaller ones are bounded by the slots."""

MIN_WINDOW: Final = 2**12
"""Bytes that a channel may send before its items are received, however many channels there are."""


@final
class Budget(NamedTuple):
    """The shares of a budget, in bytes."""

    requests: int
    answers: int
    items: int
    total: int

    @classmethod
    def share_out(cls, budget: int) -> Budget:
        """Share out so many bytes."""
        return cls(budget * 5 // 8, budget * 3 // 16, budget * 3 // 16, budget)


@final
class Room:
    """How many bytes of our requests are with the peer, which has told how many it takes.

    A *class* is of requests of one depth and kind, which share slots: two for each depth, the second of them
    for channels. Each depth has half as much as the one before, and of that requests have three quarters.

    Arguments:
        total: bytes; None: the peer has not told.
    """

    __slots__ = ("_sizes", "_total", "_used")

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._used: dict[int, int] = {}  # by class
        self._sizes: dict[int, tuple[int, int]] = {}  # by id: the class, and the bytes

    def has(self, slot_class: int, size: int) -> bool:
        """Whether a request of that size may go now: it fits, or is the only one of its class that counts."""
        used = self._used.get(slot_class, 0)
        if self._total is None or size < COUNTED or not used:
            return True
        share = self._total * (1 if slot_class % 2 else 3) // 8
        return used + size <= share >> (slot_class // 2)

    def add(self, id: int, slot_class: int, size: int) -> None:
        """A request goes."""
        if size >= COUNTED:
            self._used[slot_class] = self._used.get(slot_class, 0) + size
            self._sizes[id] = slot_class, size

    def remove(self, id: int) -> None:
        """It was answered, or never went."""
        if id in self._sizes:
            slot_class, size = self._sizes.pop(id)
            self._used[slot_class] -= size

    def clear(self) -> None:
        """None is left."""
        self._used.clear()
        self._sizes.clear()
