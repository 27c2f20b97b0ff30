"""When a ``timeout`` of the peer's is our own deadline, which ran out over there first."""

from __future__ import annotations

from typing import Final

import trio

from .._errors import RemoteError

CLOCK_DRIFT: Final = 0.05
"""Seconds by which the peer's clock may be ahead of ours at the end of a deadline, besides a thousandth of
its span: the peer counts the same span from later on, so only drift makes it run out there first."""


def is_own_timeout(error: BaseException, deadline: float, asked_at: float) -> bool:
    """Whether an error says that our own deadline, as good as reached, ran out over there first.

    The asker should see its own cancellation then. Where the deadline is farther off, the handler chose the
    code ``"timeout"`` for an error of its own.

    Arguments:
        error: the answer.
        deadline, asked_at: until when we want the answer and since when, by Trio's clock.
    """
    return (
        isinstance(error, RemoteError)
        and error.code == "timeout"
        and deadline - trio.current_time() < CLOCK_DRIFT + (deadline - asked_at) / 1000
    )
