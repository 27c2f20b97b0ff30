"""The budget: a bound on the bytes that the peer can make a side hold.

The budget of a side has three shares:

- *Requests* have five eighths, until they are answered. The side tells its peer how much that is, with the
  option `room`. The peer keeps requests that do not fit until there is room. A request that it sends
  nevertheless is answered `busy`, and does not run.
- *Answers* have three sixteenths, until they have departed. If they take up more, the handlers of requests of
  depth 0 do not begin until the peer has read some.
- *Items* have three sixteenths, until somebody receives them. The windows of all channels share them, and
  become smaller if there are many. An item of any size may be sent while any of a window remains, so the
  windows are not a strict bound. Therefore items may take up the whole rest of the budget, and a channel
  whose items do not fit even then breaks.

The pieces of unfinished packets do not count here; `MAX_IN_PIECES` bounds them.

Nobody waits for ever. The asker divides the peer's `room` among the slot classes (see `slots`). So a request
waits only for others of its class, these wait only for deeper ones, and one request of each class may always
be sent. Answers do not wait for ever either: if the peer does not read, the connection is lost.
"""

from __future__ import annotations

from typing import Final, NamedTuple, final

COUNTED: Final = 2**12
"""Bytes. Smaller requests are not counted; the slots bound them."""

MIN_WINDOW: Final = 2**12
"""Bytes of the smallest window, however many channels there are."""


@final
class Budget(NamedTuple):
    """The shares of a budget, in bytes."""

    requests: int
    answers: int
    items: int
    total: int

    @classmethod
    def share_out(cls, budget: int) -> Budget:
        """Share out a budget of so many bytes."""
        return cls(budget * 5 // 8, budget * 3 // 16, budget * 3 // 16, budget)


@final
class Room:
    """The bytes of our requests that the peer holds, by slot class.

    Each depth has half as many bytes as the depth before it. Three quarters of them are for requests, one
    quarter is for channels.

    Arguments:
        total: how many bytes the peer takes; None: it has not told.
    """

    __slots__ = ("_sizes", "_total", "_used")

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._used: dict[int, int] = {}  # by class
        self._sizes: dict[int, tuple[int, int]] = {}  # by id: the class, and the bytes

    def has(self, slot_class: int, size: int) -> bool:
        """Whether a request may be sent now: it fits, or it is small, or the only one of its class."""
        used = self._used.get(slot_class, 0)
        if self._total is None or size < COUNTED or not used:
            return True
        share = self._total * (1 if slot_class % 2 else 3) // 8  # at depth 0
        return used + size <= share >> (slot_class // 2)

    def add(self, id: int, slot_class: int, size: int) -> None:
        """Count a request that is sent."""
        if size >= COUNTED:
            self._used[slot_class] = self._used.get(slot_class, 0) + size
            self._sizes[id] = slot_class, size

    def remove(self, id: int) -> None:
        """Stop counting a request: it has ended."""
        if id in self._sizes:
            slot_class, size = self._sizes.pop(id)
            self._used[slot_class] -= size

    def clear(self) -> None:
        """Stop counting all requests."""
        self._used.clear()
        self._sizes.clear()
