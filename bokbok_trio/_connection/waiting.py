"""`Waiter`: a task that waits for an outcome, which is an answer or a pong, or an error."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Generic, TypeVar

import trio

from .._errors import BokbokError

_T = TypeVar("_T")


class Waiter(Generic[_T]):
    """One task that waits, once.

    Attributes:
        outcome: the result, or an error; None as long as the task must wait.
    """

    __slots__ = ("_sleeper", "outcome")

    def __init__(self) -> None:
        self.outcome: _T | BokbokError | None = None
        self._sleeper: trio.lowlevel.Task | None = None

    def settle(self, outcome: _T | BokbokError) -> None:
        """Note the outcome, and wake the task if it waits."""
        self.outcome = outcome
        self._wake()

    def _wake(self) -> None:
        sleeper, self._sleeper = self._sleeper, None
        if sleeper is not None:
            trio.lowlevel.reschedule(sleeper)

    def settled(self) -> Awaitable[object]:
        """Return an awaitable that ends when there is an outcome. The caller must await it at once."""
        if self.outcome is not None:
            return trio.lowlevel.checkpoint()  # noqa: ASYNC105  (the caller awaits it)
        self._sleeper = trio.lowlevel.current_task()
        return trio.lowlevel.wait_task_rescheduled(self._abort)  # noqa: ASYNC105  (as above)

    def _abort(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._sleeper = None
        return trio.lowlevel.Abort.SUCCEEDED

    def take(self) -> _T:
        """Return the outcome, or raise the error."""
        outcome = self.outcome
        assert outcome is not None
        if not isinstance(outcome, BokbokError):
            return outcome
        try:
            raise outcome
        finally:
            self.outcome = None  # or the frames of the error would keep it alive
            del outcome
