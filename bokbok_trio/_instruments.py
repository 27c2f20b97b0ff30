"""`Instruments`: calls the instruments of a side, so that their errors do no harm."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, final

import trio

from ._errors import AuthenticationError, ConnectionRefused
from ._trio_util import describe_error, forget_traceback
from .instruments import (
    ConnectionEnded,
    ConnectionOpened,
    HandshakeEnded,
    HandshakeOutcome,
    HandshakeStarted,
    Instrument,
    ItemPassed,
    RequestEnded,
    RequestStarted,
)

if TYPE_CHECKING:
    from ._addresses import Address
    from ._types import Context, Side

METHODS: Final[dict[type[object], str]] = {
    HandshakeStarted: "handshake_started",
    HandshakeEnded: "handshake_ended",
    ConnectionOpened: "connection_opened",
    ConnectionEnded: "connection_ended",
    RequestStarted: "request_started",
    RequestEnded: "request_ended",
    ItemPassed: "item_passed",
}
"""The method that is called with each event."""

CONTEXT_FOR: Final = "context_for"

logger = logging.getLogger("bokbok_trio")


@final
class Instruments:
    """The instruments of a `Settings`. As in Trio, one that raises is logged, and never called again.

    Arguments:
        instruments: the instruments, in the order in which they are called.
    """

    __slots__ = ("_instruments", "_methods")

    def __init__(self, instruments: Sequence[Instrument]) -> None:
        self._keep(instruments)

    def _keep(self, instruments: Sequence[Instrument]) -> None:
        """Call these instruments from now on. Methods that `Instrument` itself has do nothing, and are left
        out.
        """
        self._instruments = instruments
        self._methods: dict[str, list[tuple[Instrument, Callable[[Any], Any]]]] = {
            name: [
                (each, getattr(each, name))
                for each in instruments
                if getattr(getattr(each, name), "__func__", None) is not getattr(Instrument, name)
            ]
            for name in (*METHODS.values(), CONTEXT_FOR)
        }

    def _drop(self, instrument: Instrument, method: str, error: BaseException) -> None:
        logger.error(
            "%s.%s failed, and this instrument is not called any more",
            *(type(instrument).__qualname__, method),
            exc_info=error,
        )
        forget_traceback(error)
        self._keep([each for each in self._instruments if each is not instrument])

    def tell(self, event: object) -> None:
        """Call the instruments with an event."""
        method = METHODS[type(event)]
        for instrument, call in self._methods[method]:
            try:
                call(event)
            except BaseException as exc:  # noqa: BLE001  (an observer must do no harm)
                self._drop(instrument, method, exc)

    def add_context(self, request: RequestStarted, fits: Callable[[Context], bool]) -> Context | None:
        """Return the context of a request, with the names and values that instruments add; None for an empty
        one.

        Arguments:
            request: the request.
            fits: returns whether a context is small enough to be sent.
        """
        context = dict(request.context)
        for instrument, call in self._methods[CONTEXT_FOR]:
            try:
                for name, value in call(request).items():
                    if name not in context:
                        longer = {**context, name: value}
                        if not fits(longer):
                            break
                        context = longer
            except BaseException as exc:  # noqa: BLE001  (as above)
                self._drop(instrument, CONTEXT_FOR, exc)
        return context or None


@contextmanager
def watch_handshake(instruments: Instruments | None, side: Side, address: Address | None) -> Generator[None]:
    """Tell the instruments of a handshake, which takes place in the block."""
    if instruments is None:
        yield
        return
    handshake = HandshakeStarted(side=side, address=address)
    began = trio.current_time()
    instruments.tell(handshake)
    outcome: HandshakeOutcome = "ok"
    code = error = ""
    try:
        yield
    except BaseException as exc:
        outcome, error = _classify(exc), describe_error(exc)
        code = exc.code if isinstance(exc, ConnectionRefused) else ""
        raise
    finally:
        seconds = trio.current_time() - began
        instruments.tell(
            HandshakeEnded(handshake=handshake, outcome=outcome, code=code, error=error, seconds=seconds)
        )


def _classify(error: BaseException) -> HandshakeOutcome:
    if isinstance(error, ConnectionRefused):
        return "refused"
    if isinstance(error, AuthenticationError):
        return "authentication"
    return "failed" if isinstance(error, Exception) else "cancelled"
