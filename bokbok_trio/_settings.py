"""What a user may choose of a connection and of a server: its bounds, and who watches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, cast, final

from ._instruments import Instruments
from .instruments import Instrument

MIN_MESSAGE_SIZE: Final = 4096
"""Bytes. Every packet of the handshake, and every error, must fit."""

MAX_MESSAGE_SIZE: Final = 2**32 - 1
"""Bytes. The packet's length is a u32."""

MIN_MESSAGES: Final = 16
"""Messages of the largest size that a budget must hold: so many that nested requests of that size need not
be refused, however deep."""

MAX_BUDGET: Final = 2**56
"""Bytes. The other side is told half of it, in a number of at most 18 digits."""

MAX_REQUESTS: Final = 10**6
"""Requests. A declared number above it is a mistake; it also keeps slot counts small integers."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The bounds of one connection, or of all the connections of a server.

    Arguments:
        max_message_size: bytes of one packet, 4 KiB to 4 GiB - 1. The smaller of what both sides
            declare holds for both. The user's fields may take up all but 128 bytes of it.
        max_requests: incoming requests in flight at once, 1 to 1,000,000. The other side waits
            before it sends more.
        budget: bytes that the other side can make this one hold by one connection; 16 times
            `max_message_size` at least, and by default, so 64 MiB. Five eighths are for requests whose
            handlers have not ended: the other side waits before it sends more, or is answered ``busy``. Three
            sixteenths are for answers that it has not read: where they take up more, handlers wait before
            they begin. Items of channels that nobody has received may take up what is left of it: a channel
            whose items do not fit breaks. What handlers hold of their own does not count, nor do messages
            that have partly arrived, four at most.
        least_rate: bytes a second that must leave while more than 1 MiB of answers and items wait for the
            other side; one that reads more slowly, over `ping_after` and `ping_timeout` together, is lost.
            With 0 none is.
        connect_timeout: seconds for dialling one address, the look-up of its name and all addresses of
            the name included, more than 0; `math.inf` for no limit but the system's. A server takes it for
            the look-up of a name to listen on, and for the lock on the directory of a UNIX socket.
        handshake_timeout: seconds for all of the handshake, more than 0; `math.inf` for no limit.
        ping_after: seconds of silence after which the peer is asked for a sign of life, more than 0.
        ping_timeout: seconds it then has to give one, more than 0, or is lost. A send that takes as
            long as both together is a loss too. With `math.inf` for either, nothing of this is done, nor is
            `least_rate` looked after.
        describe_error: a function from an exception of a handler to the text its asker is sent,
            for applications that do not want to show their insides. By default ``Type: message``.
        max_connections: connections of a server at once. One counts from the end of its handshake
            until it is closed and its handlers and close handler have ended. The next client, once
            it is authenticated, is told so: its `open_connection` raises `ConnectionRefused`, with the
            code ``busy``. A server takes fewer, and fewer handshakes, where this process may have fewer open
            files, and logs that.
        max_connections_per_user: of these, those of one user; None for no such bound. One more is told so in
            the same way.
        max_handshakes: unfinished handshakes of a server at once. One more closes one of them: of the network
            address that has most of them, and one that has sent nothing before others. A client whose user
            is being looked up, or waits for that, is not closed; where all are such, the newcomer is. The
            client that is closed is told nothing: its `open_connection` raises `HandshakeError`.
        max_lookups: calls of a server's `user_key` function at once. The other clients wait in order, and
            network addresses take turns. A client that has waited for half of `handshake_timeout` is told
            so: its `open_connection` raises `ConnectionRefused`, with the code ``busy``.
        instruments: objects that are told what goes on, in this order; see
            `bokbok_trio.instruments.Instrument`.

    Raises:
        TypeError: a number is not a number, `describe_error` cannot be called, or what is to be an instrument
            is none.
        ValueError: a number is out of range.
    """

    max_message_size: int = 4 * 2**20
    max_requests: int = 100
    budget: int | None = None
    least_rate: float = 16 * 2**10
    connect_timeout: float = 10.0
    handshake_timeout: float = 10.0
    ping_after: float = 20.0
    ping_timeout: float = 20.0
    describe_error: Callable[[BaseException], str] | None = None
    max_connections: int = 1000
    max_connections_per_user: int | None = None
    max_handshakes: int = 512
    max_lookups: int = 64
    instruments: Sequence[Instrument] = ()
    _instruments: Instruments | None = field(init=False, repr=False, compare=False)

    @property
    def effective_budget(self) -> int:
        """`budget`, in bytes, also where that is None."""
        return MIN_MESSAGES * self.max_message_size if self.budget is None else self.budget

    def __post_init__(self) -> None:
        _check_whole("max_message_size", self.max_message_size, MIN_MESSAGE_SIZE, MAX_MESSAGE_SIZE)
        _check_whole("max_requests", self.max_requests, 1, MAX_REQUESTS)
        if self.budget is not None:
            _check_whole("budget", self.budget, MIN_MESSAGES * self.max_message_size, MAX_BUDGET)
        _check_whole("max_connections", self.max_connections, 1, None)
        if self.max_connections_per_user is not None:
            _check_whole("max_connections_per_user", self.max_connections_per_user, 1, None)
        _check_whole("max_handshakes", self.max_handshakes, 1, None)
        _check_whole("max_lookups", self.max_lookups, 1, None)
        _check_seconds("connect_timeout", self.connect_timeout)
        _check_seconds("handshake_timeout", self.handshake_timeout)
        _check_seconds("ping_after", self.ping_after)
        _check_seconds("ping_timeout", self.ping_timeout)
        if not isinstance(self.least_rate, int | float):
            raise TypeError(f"least_rate must be a number, not {type(self.least_rate).__name__}")
        if not 0 <= self.least_rate < math.inf:
            raise ValueError(f"least_rate must be 0 or more bytes a second, not {self.least_rate}")
        if self.describe_error is not None and not callable(self.describe_error):
            raise TypeError("describe_error must be a function from an exception to a str")
        object.__setattr__(self, "instruments", _check_instruments(self.instruments))
        object.__setattr__(self, "_instruments", Instruments(self.instruments) if self.instruments else None)


def _check_instruments(instruments: object) -> tuple[Instrument, ...]:
    if not isinstance(instruments, Sequence):
        raise TypeError(f"instruments must be a list of them, not {type(instruments).__name__}")
    found: list[Instrument] = []
    for each in cast("Sequence[object]", instruments):
        if not isinstance(each, Instrument):
            hint = ": make an object of it" if isinstance(each, type) else ""
            raise TypeError(f"an instrument is an object of a class under Instrument, not {each!r}{hint}")
        found.append(each)
    return tuple(found)


def _check_whole(name: str, value: int, lowest: int, highest: int | None) -> None:
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if value < lowest or (highest is not None and value > highest):
        upper = "" if highest is None else f" and at most {highest}"
        raise ValueError(f"{name} must be at least {lowest}{upper}, not {value}")


def _check_seconds(name: str, value: float) -> None:
    if not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}")
    if math.isnan(value) or value <= 0:
        raise ValueError(f"{name} must be more than 0 seconds, not {value}")
