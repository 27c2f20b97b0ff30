"""Recognize a ``timeout`` of the peer that is our own deadline, which ran out on its side first."""

from __future__ import annotations

from typing import Final

import trio

from .._errors import RemoteError

CLOCK_DRIFT: Final = 0.05
"""Seconds by which the peer's clock may be ahead of ours at the end of a deadline, besides a thousandth of
its span. The peer begins to count the same span later, so only drift lets it run out there first."""


def is_own_timeout(error: BaseException, deadline: float, asked_at: float) -> bool:
    """Whether an error says that our own deadline ran out on the peer's side first.

    Then the caller should see its own cancellation. If the deadline is farther off, the handler has chosen
    the code ``"timeout"`` for an error of its own.

    Arguments:
        error: the answer.
        deadline: the moment, by Trio's clock, until which the caller wants the answer.
        asked_at: the moment of the request.
    """
    return (
        isinstance(error, RemoteError)
        and error.code == "timeout"
        and deadline - trio.current_time() < CLOCK_DRIFT + (deadline - asked_at) / 1000
    )
