"""Pacing holds back pieces of big packets, so that small packets need not queue behind them.

Small packets cannot overtake bytes that were handed to the system. Those bytes wait in the socket, or in
the queue before the narrowest link of the path, which TCP keeps filling until it overflows. So their number
is bounded here, by the rate at which bytes were acknowledged recently::

    rate = bytes acknowledged in a span of time / that span
    bound = rate * (2 * round trip time of the empty path + QUEUE_TIME)

A piece waits while more bytes than that are unacknowledged, and the round trip time or the number of unsent
bytes shows a queue. The factor 2 is the one of BBR (Cardwell et al., ACM Queue 2016): with less, a long path
would not be used to the full. Small packets never wait.

A path that other flows keep full looks like a slow path. Beside a flow with a long standing queue, big
packets get less than their fair share, but at least `LEAST_BOUND` per round trip. If nothing is acknowledged
at all, a piece is sent after `MAX_WAIT`. Then the send is stuck, and the watchdog sees that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, final

from .._protocol.outbox import MAX_BATCH_SIZE, MIN_BATCH_SIZE
from .fast import Load

QUEUE_TIME: Final = 0.025
"""Seconds of queue that big packets may cause, beyond one round trip time."""

LEAST_BOUND: Final = 2 * MIN_BATCH_SIZE
"""Bytes that may always be unacknowledged, so that one batch can be under way while the next one is made."""

PAUSE: Final = 0.002
"""Seconds until the next look at the load: far less than `QUEUE_TIME`, and only some 500 looks a second."""

MAX_WAIT: Final = 0.5
"""Seconds that a piece waits at most. In this time a link of 0.5 Mbit/s carries `LEAST_BOUND`."""


@final
class Pacer:
    """Tells how many bytes of big packets may be sent.

    Arguments:
        load: returns the load. None: it is not known, and there is no bound.
        is_drained: returns whether nearly nothing is unacknowledged; False if that is not known.
    """

    __slots__ = ("_acknowledged", "_granted_at", "_is_drained", "_load", "_rate", "_since", "_was_idle")

    def __init__(
        self, load: Callable[[], Load | None], is_drained: Callable[[], bool] = lambda: False
    ) -> None:
        self._load = load
        self._is_drained = is_drained
        self._granted_at = 0.0  # when a piece was last allowed
        self._rate = 0.0  # bytes a second, in the last span that was not idle
        self._since = 0.0  # when the span under way began
        self._acknowledged = 0  # bytes, by then
        # Whether nearly nothing was queued at some time in the span. Such a span can only raise the rate.
        self._was_idle = True

    def room(self, now: float) -> int:
        """Return how many bytes of big packets may be sent now: none, or enough for a batch.

        Arguments:
            now: the time, in seconds.
        """
        if now < self._since + QUEUE_TIME and self._is_drained():
            # It is too early to measure, so the load would lead to the same result. But it would cost more.
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
        # After an idle time nothing is acknowledged for one round trip. So the next span is idle as well.
        self._since, self._acknowledged, self._was_idle = now, load.acknowledged, is_idle

    def _judge(self, load: Load) -> int:
        if load.queued < MIN_BATCH_SIZE:
            return MAX_BATCH_SIZE
        bound = max(LEAST_BOUND, int(self._rate * (2 * load.least_round_trip + QUEUE_TIME)))
        is_late = load.round_trip > load.least_round_trip + QUEUE_TIME / 2
        if load.queued > bound and (is_late or load.unsent > MIN_BATCH_SIZE):
            return 0
        return max(MIN_BATCH_SIZE, bound - load.queued)
