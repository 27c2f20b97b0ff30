"""`Settings`: the bounds of a connection and of a server, and the instruments that watch them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, cast, final

from ._instruments import CONTEXT_FOR, METHODS, Instruments
from .instruments import Instrument

MIN_MESSAGE_SIZE: Final = 4096
"""Bytes. Every packet of the handshake and every error must fit."""

MAX_MESSAGE_SIZE: Final = 2**32 - 1
"""Bytes. The length of a packet is a u32."""

MIN_MESSAGES: Final = 16
"""Messages of the largest size that a budget must hold: with these, nested requests of that size need not be
refused, however deep they are."""

MAX_BUDGET: Final = 2**56
"""Bytes. A side declares half of its budget to the other, as a number of at most 18 digits."""

MAX_REQUESTS: Final = 10**6
"""Requests. A higher number is a mistake; the bound also keeps counts of slots small."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The bounds of one connection, or of all the connections of a server.

    Arguments:
        max_message_size: bytes of one packet, 4 KiB to 4 GiB - 1. Each side declares its own, and the smaller
            one holds for both. The user's fields may take up all but 128 bytes of it.
        max_requests: requests of the other side in flight at once, 1 to 1,000,000. The other side waits
            before it sends more.
        budget: bytes that one connection may make this side hold, at least 16 times `max_message_size`; None
            for exactly that, which is 64 MiB by default. Five eighths are for requests whose handlers have
            not ended: the other side waits before it sends more, or gets the error ``busy``. Three sixteenths
            are for answers that it has not read: while these take up more, new handlers wait. The rest is for
            items of channels that have not been received: a channel whose items do not fit breaks. Memory
            that handlers take for themselves does not count, nor do messages that have partly arrived, of
            which there are at most four.
        least_rate: bytes a second, 0 or more, that the other side must read while more than 1 MiB of answers
            and items wait for it. If it reads more slowly, over `ping_after` and `ping_timeout` together, the
            connection is lost; never with 0.
        connect_timeout: seconds for dialling one address, more than 0, including the look-up of a name and
            all addresses of that name; `math.inf` for no limit but the system's. A server uses it for the
            look-up of a name to listen on, and for the lock on the directory of a UNIX socket.
        handshake_timeout: seconds for the whole handshake, more than 0; `math.inf` for no limit.
        ping_after: seconds of silence after which the peer is pinged, more than 0.
        ping_timeout: seconds that the peer then has to send anything, more than 0; otherwise the connection
            is lost. A send that takes as long as both times together loses it too. With `math.inf` for either
            time, none of this is checked, nor is `least_rate`.
        describe_error: a function that takes the exception of a handler, and returns the text for its asker.
            Use it to hide the internals of an application. None for ``Type: message``.
        max_connections: connections of a server at once, 1 or more. One counts from the end of its handshake
            until it is closed and its handlers and close handler have ended. The next client is refused once
            it is authenticated: its `open_connection` raises `ConnectionRefused` with the code ``busy``. A
            server takes fewer connections and handshakes, and logs that, if its process may have too few open
            files.
        max_connections_per_user: connections of one user at once, 1 or more; None for no such bound. The next
            one is refused in the same way.
        max_handshakes: unfinished handshakes of a server at once, 1 or more. One more closes one of them: of
            the network address that has the most, and first one that has sent nothing. A client whose user is
            being looked up, or waits for that, is not closed; if all are such clients, the new one is closed.
            A client that is closed gets no message: its `open_connection` raises `HandshakeError`.
        max_lookups: calls of a server's `user_key` function at once, 1 or more. Other clients wait in order,
            and network addresses take turns. A client that has waited for half of `handshake_timeout` is
            refused: its `open_connection` raises `ConnectionRefused` with the code ``busy``.
        instruments: objects that get the events, in this order; see `bokbok_trio.instruments.Instrument`.

    Raises:
        TypeError: a number is not a number, `describe_error` cannot be called, or a member of `instruments`
            is not an instrument, or has an async method.
        ValueError: a number is out of range, or the same instrument is there twice.
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
        """The budget in bytes: `budget`, or its default if that is None."""
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
        raise TypeError(f"instruments must be a list of instruments, not {type(instruments).__name__}")
    found: list[Instrument] = []
    for each in cast("Sequence[object]", instruments):
        if not isinstance(each, Instrument):
            hint = ": make an object of it" if isinstance(each, type) else ""
            raise TypeError(f"an instrument is an object of a class under Instrument, not {each!r}{hint}")
        if any(each is other for other in found):
            raise ValueError(f"{each!r} is in instruments twice, and would get each event twice")
        for name in (*METHODS.values(), CONTEXT_FOR):
            if inspect.iscoroutinefunction(getattr(each, name)):
                raise TypeError(f"{type(each).__qualname__}.{name} must not be async: nothing awaits it")
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
