"""`Throttle`: logs lines that strangers can cause, at most one a second of each kind."""

from __future__ import annotations

import logging
import math
from typing import Final, final

import trio

LOG_INTERVAL: Final = 1.0
"""Seconds between two lines of one kind: a flood stays visible, and fills neither the disk nor the screen."""


@final
class Throttle:
    """Logs lines, and counts those that come too soon after one of the same kind.

    Arguments:
        logger: the logger that gets the lines.
    """

    __slots__ = ("_has_left_out", "_kinds", "_logger")

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._kinds: dict[str, _Kind] = {}
        self._has_left_out = trio.Event()

    def log(
        self, kind: str, level: int, message: str, *args: object, error: BaseException | None = None
    ) -> None:
        """Log a line, or count it.

        Arguments:
            kind: one of a few words; lines of one kind are alike.
            level, message, args: as for `logging.Logger.log`.
            error: the exception whose traceback is logged too, if any.
        """
        state = self._kinds.setdefault(kind, _Kind())
        now = trio.current_time()
        if now < state.quiet_until:
            state.left_out += 1
            self._has_left_out.set()
            return
        state.quiet_until = now + LOG_INTERVAL
        state.level, state.text = level, message % args
        more = f" (and {state.left_out} more like it)" if state.left_out else ""
        state.left_out = 0
        self._logger.log(level, "%s%s", state.text, more, exc_info=error)

    async def run(self) -> None:
        """Log how many lines were left out, at most an interval later, until cancelled."""
        while True:
            await self._has_left_out.wait()
            await trio.sleep(LOG_INTERVAL)
            self._has_left_out = trio.Event()
            self.flush()

    def flush(self) -> None:
        """Log how many lines were left out since the last of their kind."""
        for state in self._kinds.values():
            if state.left_out:
                self._logger.log(state.level, "%d more like: %s", state.left_out, state.text)
                state.left_out = 0
                state.quiet_until = trio.current_time() + LOG_INTERVAL


@final
class _Kind:
    """The state of the lines of one kind."""

    __slots__ = ("left_out", "level", "quiet_until", "text")

    def __init__(self) -> None:
        self.quiet_until = -math.inf
        self.left_out = 0  # since the last line
        self.level = logging.NOTSET  # of the last line
        self.text = ""
