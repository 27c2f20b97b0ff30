"""Shows the progress of a transfer on a terminal, if it takes more than a second."""

from __future__ import annotations

import math
import time
from typing import Final

from ._exits import OutputError, ReaderGone
from ._output import ERR, Output, write_all

SHOW_AFTER: Final = 1.0
"""Seconds until the progress of a transfer is shown."""

SHOW_EVERY: Final = 0.2
"""Seconds between two lines."""

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")
_STEP: Final = 1024


class Progress:
    """Shows a line of progress, which it overwrites, and wipes at the end.

    Arguments:
        out: the output, which tells whether anybody would see the line.
        total: bytes of the whole transfer, or None if that is not known.
        is_seen: whether the transferred data is shown itself. Then there is no line.
    """

    def __init__(self, out: Output, total: int | None = None, *, is_seen: bool = False) -> None:
        self._total = total
        self._count = 0
        self._is_shown = False
        self._begun = time.monotonic()
        self._due = self._begun + SHOW_AFTER if out.may_show_progress and not is_seen else math.inf

    def add(self, size: int) -> None:
        """Note that so many more bytes were transferred."""
        self._count += size
        now = time.monotonic()
        if now >= self._due:
            self._due = now + SHOW_EVERY
            self._is_shown = True
            rate = show_size(self._count / (now - self._begun))
            share = f" of {show_size(self._total)}, {self._count / self._total:.0%}" if self._total else ""
            self._write(f"\r\x1b[K{show_size(self._count)}{share}, {rate}/s")

    def end(self) -> None:
        """Wipe the line."""
        if self._is_shown:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        try:
            write_all(ERR, text.encode())
        except (OutputError, ReaderGone):  # the terminal is gone, and the transfer goes on
            self._due = math.inf


def show_size(size: float) -> str:
    """Format a number of bytes for people."""
    unit = 0
    while size >= _STEP and unit < len(_UNITS) - 1:
        size /= _STEP
        unit += 1
    return f"{size:.1f} {_UNITS[unit]}" if unit else f"{size:.0f} B"
