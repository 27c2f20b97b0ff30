"""`Coalescing`: the policy that sends a queued packet at once, or later with others. No Trio, no I/O.

The rule:

1. A packet that is queued while the events of a receive are dispatched is held back, and leaves with all
   others when the last event is dispatched.
2. Any other packet leaves when the sender task runs next, with all that is queued by then; but in interactive
   traffic the first request or answer leaves at once, and no other one does until that task has been idle, or
   another receive has been dispatched.
3. Every 16th request or answer (`EARLY_FLUSH_PACKETS`) makes all queued packets leave at once.

Traffic is interactive while each of the last `INTERACTIVE_RECEIVES` receives brought one event. Then the
packet that is queued next is probably alone too, and waiting for others would only cost time. A burst is
faster when its packets leave together.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final, final

INTERACTIVE_RECEIVES: Final = 3
"""Receives of one event in a row that make traffic interactive. With fewer, four callers are split into
groups that each pay for their own wakes."""

EARLY_FLUSH_PACKETS: Final = 16
"""Requests and answers after which all queued packets leave, though more may follow soon: the peer can begin
with them meanwhile."""

MAX_BATCHES_IN_A_ROW: Final = 4
"""Batches that are written at once before other tasks have their turn. The sender task writes the rest."""


class When(Enum):
    """When queued packets are sent.

    Attributes:
        NOW: at once, all of them.
        LATER: by the sender task, which must be awake.
        HOLD: after `Coalescing.uncork`.
    """

    NOW = auto()
    LATER = auto()
    HOLD = auto()


NOW: Final = When.NOW
LATER: Final = When.LATER
HOLD: Final = When.HOLD


@final
class Coalescing:
    """Decides when the packets of one connection are sent.

    Attributes:
        is_corked: whether packets are held back.
    """

    __slots__ = ("_may_leave_at_once", "_queued", "_received", "_single_receives", "is_corked")

    def __init__(self) -> None:
        self.is_corked = False
        self._received = 0  # events of the receive that is being dispatched
        self._single_receives = INTERACTIVE_RECEIVES  # in a row; a connection begins as interactive
        self._may_leave_at_once = True  # the next request or answer, if it is not held back
        self._queued = 0  # requests and answers since the last early flush, or since the sender was idle

    def queued(self) -> When:
        """Note that a packet was queued. Return when it must be sent."""
        return HOLD if self.is_corked else LATER

    def interactive_queued(self) -> When:
        """Do the same for a request or an answer: a task waits for it, and may say nothing more."""
        self._queued += 1
        if self._queued >= EARLY_FLUSH_PACKETS:
            self._queued = 0
            return NOW
        if self.is_corked:
            return HOLD
        if self._may_leave_at_once:
            self._may_leave_at_once = False
            self._queued = 0
            return NOW
        return LATER

    def cork(self, received: int) -> None:
        """Hold packets back from now on: the events of a receive are being dispatched.

        Arguments:
            received: how many events; 0 (of a ping, say) tells nothing about the traffic.
        """
        self.is_corked = True
        self._received = received

    def uncork(self) -> None:
        """Note that all events are dispatched: all queued packets are sent now. It may be called twice."""
        self.is_corked = False
        self._queued = 0
        received, self._received = self._received, 0
        if received == 1:
            self._single_receives += 1
            self._may_leave_at_once = self._single_receives >= INTERACTIVE_RECEIVES
        elif received:
            self._single_receives = 0
            self._may_leave_at_once = False

    def idle(self) -> None:
        """Note that the sender task has sent everything that was queued, and goes to sleep."""
        self._queued = 0
        self._may_leave_at_once = self._single_receives >= INTERACTIVE_RECEIVES
