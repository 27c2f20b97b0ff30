"""Hold pieces of big packets back while what TCP has of them stands in the way of small packets.

What was handed to the system can no longer be overtaken: it is in the socket, where TCP has not sent
it, or in the queue before the narrowest link, which TCP keeps filling until it overflows. Both are
bounded here, by what drained of late::

    rate = what the other side acknowledged in a while / that while
    bound = rate * (2 * round trip of the empty way + QUEUE_TIME)

A piece waits while more than that is unacknowledged, and either the round trip or what TCP has not
sent says that there is a queue. Twice the way, since that is what BBR (Cardwell et al., ACM Queue
2016) allows itself, and with less a long way would not be used to the full. Small packets never wait.

A way that others fill looks like a slow one, so beside a flow that fills a long queue big packets get
less than their share: at least `LEAST_BOUND` for each round trip. Where nothing
drains, a piece is sent nevertheless after `MAX_WAIT`: then the send is stuck, which the watchdog sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, final

from .._protocol.outbox import MAX_BATCH_SIZE, MIN_BATCH_SIZE
from .fast import Load

QUEUE_TIME: Final = 0.025
"""Seconds of queue, over as long as the way itself, that big packets may make."""

LEAST_BOUND: Final = 2 * MIN_BATCH_SIZE
"""Bytes that may always be unacknowledged, so that one batch can arrive while the next is made."""

PAUSE: Final = 0.002
"""Seconds after which to look again: far less than `QUEUE_TIME`, and some 500 looks in a second."""

MAX_WAIT: Final = 0.5
"""Seconds that a piece waits at most; `LEAST_BOUND` drains in that at 0.5 Mbit/s."""


@final
class Pacer:
    """Says how much of big packets may be sent.

    Arguments:
        load: asks for the load; None is no bound.
        is_drained: asks whether nearly nothing is queued; False where that is not known.
    """

    __slots__ = ("_acknowledged", "_granted_at", "_is_drained", "_load", "_rate", "_since", "_was_idle")

    def __init__(
        self, load: Callable[[], Load | None], is_drained: Callable[[], bool] = lambda: False
    ) -> None:
        self._load = load
        self._is_drained = is_drained
        self._granted_at = 0.0  # when a piece was last let go
        self._rate = 0.0  # bytes a second, as of the last span of time that tells
        self._since = 0.0  # when the span under way began, and what was acknowledged by then
        self._acknowledged = 0
        self._was_idle = True  # nearly nothing was queued at a time in it: it can only raise the rate

    def room(self, now: float) -> int:
        """How many bytes of big packets may be sent now: none, or enough for a batch.

        Arguments:
            now: the time, in seconds.
        """
        if now < self._since + QUEUE_TIME and self._is_drained():
            # It is too early to measure, so this is what the load would lead to. Asking for that each
            # time takes 7 us of an echo of 64 KiB.
            self._was_idle = True
            self._granted_at = now
            return MAX_BATCH_SIZE
        load = self._load()
        if load is None:
            return MAX_BATCH_SIZE
        self._measure(load, now)
        room = self._judge(load)
        if room == 0:
            if now < self._granted_at + MAX_WAIT:
                return 0
            room = MIN_BATCH_SIZE
        self._granted_at = now
        return room

    def _measure(self, load: Load, now: float) -> None:
        is_idle = load.queued < MIN_BATCH_SIZE
        self._was_idle |= is_idle
        span = now - self._since
        if span < load.least_round_trip + QUEUE_TIME:
            return
        rate = (load.acknowledged - self._acknowledged) / span
        if rate > self._rate or not self._was_idle:
            self._rate = rate
        # After idleness nothing is acknowledged for a round trip, so that counts in the next span too.
        self._since, self._acknowledged, self._was_idle = now, load.acknowledged, is_idle

    def _judge(self, load: Load) -> int:
        if load.queued < MIN_BATCH_SIZE:
            return MAX_BATCH_SIZE
        bound = max(LEAST_BOUND, int(self._rate * (2 * load.least_round_trip + QUEUE_TIME)))
        is_late = load.round_trip > load.least_round_trip + QUEUE_TIME / 2
        if load.queued > bound and (is_late or load.unsent > MIN_BATCH_SIZE):
            return 0
        return max(MIN_BATCH_SIZE, bound - load.queued)
