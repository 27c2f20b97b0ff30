"""Decides how long a dialler waits between addresses, and a request between connections. No I/O.

A try **worked** if the peer spoke on its connection, by an answer or a request, or if it lasted for
`STEADY` seconds. Then the next address is dialled at once when the connection has ended.

Every other try counts. After as many of these in a row as there are addresses, the dialler waits. It waits
longer if a handshake broke off than if there was no server: the server may have no room, and then clients
should not come back soon. But a server that was killed, or a link that failed, looks the same. So a handshake
that broke off makes only one wait longer.

A request that may run twice may also be the one that kills each server. So it is repeated a bounded number of
times, each after a longer pause, in which other requests use the new connection.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import Final, Literal, TypeAlias, final

import trio

from ._errors import ConnectionClosed, ConnectionLost, ConnectionRefused, HandshakeError

MIN_BACKOFF: Final = 0.1
"""Seconds at least between rounds of tries: a server that restarts is found soon, and one that is down is not
flooded."""

MAX_BACKOFF: Final = 30.0
"""Seconds at most between rounds of tries: after a long outage no client waits much longer than that."""

CROWDED_BACKOFF: Final = 2.0
"""Seconds: the least limit of a wait where a server may have no room. The wait is at least half of its limit:
about as long as a look-up takes on a server that is crowded because its look-ups are slow."""

STEADY: Final = 10.0
"""Seconds that a connection must have lasted to count as one that worked, if the peer said nothing on it."""

REPEAT_PAUSE: Final = 0.2
"""Seconds before the first repetition of a request that may have cost a connection."""

REPEAT_GROWTH: Final = 4
"""The factor by which each further pause is longer: with 0.2, 0.8 and 3.2 seconds, other requests have most
of the connections' time."""

MAX_NAME: Final = 40
"""Bytes of a request's first field that a log line shows."""

Outcome: TypeAlias = Literal["worked", "gone", "crowded"]
"""The outcome of a try. ``worked``: the peer spoke on the connection, or the connection lasted. ``gone``:
there was no server, or neither happened. ``crowded``: a server was there, and did not open a connection."""

logger = logging.getLogger("bokbok_trio")


def is_stopping(error: BaseException | None) -> bool:
    """Return whether an error says that the server is stopping, as each server does now and then."""
    return isinstance(error, ConnectionRefused) and error.code == "stopping"


def classify(error: BaseException | None) -> Outcome:
    """Return the outcome of a try that ended in an error."""
    if is_stopping(error):
        return "gone"  # not crowded: the server goes away, and may be back soon
    return "crowded" if isinstance(error, HandshakeError) else "gone"


def jitter(least: float, longest: float) -> float:
    """Return random seconds to wait, so that clients that lost a server together do not come back together.

    This is the "equal jitter" of https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.
    With its "full jitter", five tries may follow each other within a second, and the sixth then waits for
    long.
    """
    return random.uniform(least, longest)  # noqa: S311  (nothing secret)


@final
class Backoff:
    """How long a dialler waits after each try.

    Arguments:
        addresses: how many addresses there are; so many tries are a round.
    """

    __slots__ = ("_addresses", "_failures", "_is_crowded", "_limit")

    def __init__(self, addresses: int) -> None:
        self._addresses = addresses
        self._limit = MIN_BACKOFF
        self._failures = 0  # in a row
        self._is_crowded = False  # a server was there, in this round

    def next_pause(self, outcome: Outcome) -> float:
        """Note the outcome of a try, and return the seconds to wait before the next one."""
        if outcome == "worked":
            self._failures = 0
            self._limit = MIN_BACKOFF
            self._is_crowded = False
            return 0
        self._failures += 1
        self._is_crowded = self._is_crowded or outcome == "crowded"
        if self._failures % self._addresses:
            return 0
        self._limit = min(2 * self._limit, MAX_BACKOFF)
        # `_limit` itself stays: it would double from there, and the next failure after two handshakes that a
        # link broke would cost eight seconds.
        limit = max(self._limit, CROWDED_BACKOFF) if self._is_crowded else self._limit
        self._is_crowded = False
        return jitter(limit / 2, limit)


@final
class Repeats:
    """How often a request was in flight on a connection that was lost, and how long it waits after that.

    Arguments:
        client: the client, for log lines.
        fields: the fields of the request.
        most: how often it may be repeated.
    """

    __slots__ = ("_client", "_fields", "_losses", "_most", "_must_pause", "_since")

    def __init__(self, client: object, fields: Sequence[bytes], most: int) -> None:
        self._client = client
        self._fields = fields
        self._most = most
        self._losses = 0
        self._since = trio.current_time()
        self._must_pause = False

    def note_loss(self, error: ConnectionLost | ConnectionClosed) -> None:
        """Note that a connection was lost with the request in flight, which may be the cause.

        Raises:
            ConnectionLost: the request was repeated as often as it may.
        """
        self._losses += 1
        self._must_pause = True
        seconds = trio.current_time() - self._since
        if self._losses > 1:
            name = f"that begins with {self._fields[0][:MAX_NAME]!r}" if self._fields else "without fields"
            logger.warning(
                "%r: a request %s was in flight on %d connections that were lost, within %.1f seconds; "
                "it may be what ends them",
                *(self._client, name, self._losses, seconds),
            )
        if self._losses > self._most:
            times = "once" if self._losses == 1 else f"{self._losses} times in {seconds:.1f} seconds"
            raise ConnectionLost(
                f"the request was sent {times}, and the connection was lost each time; at last: {error}"
            ) from error

    def next_pause(self) -> float:
        """Return the seconds to wait before the next try; 0 unless a connection was lost since the last."""
        if not self._must_pause:
            return 0
        self._must_pause = False
        limit = min(REPEAT_PAUSE * REPEAT_GROWTH ** (self._losses - 1), MAX_BACKOFF)
        return jitter(limit / 2, limit)
