"""Writes data to the standard output, and messages to the standard error.

It writes to the descriptors themselves, without a buffer. So each line is out at once, and an error of
writing shows at once, and not when the process ends.
"""

from __future__ import annotations

import os
import re
import select
import stat
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import trio

from .._errors import escape
from .._trio_util import bare_nursery
from ._exits import Failure, OutputError, ReaderGone, describe_os_error, is_broken_pipe
from ._values import dump

OUT: Final = 1
ERR: Final = 2

RECORD_SEPARATOR: Final = "\x1e"
"""The character before each JSON text of RFC 7464."""

_TOKENS: Final = re.compile(r'("(?:[^"\\]|\\.)*")(\s*:)?|\b(?:true|false|null)\b|-?\d[\d.eE+-]*')
_NAME, _STRING, _WORD, _NUMBER = "34", "32", "35", "36"  # blue, green, magenta, cyan

_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""The characters that control a terminal, or change the order of text, except newlines and tabs."""


def open_missing_descriptors() -> None:
    """Open the standard descriptors that are closed, before a socket gets the number of one.

    Each is opened for the wrong direction, so using it is an error.
    """
    for fd, flags in ((0, os.O_WRONLY), (OUT, os.O_RDONLY), (ERR, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)


def write_all(fd: int, data: bytes) -> None:
    """Write to a descriptor.

    Raises:
        ReaderGone: nobody reads the output.
        OutputError: the output cannot be written.
    """
    view = memoryview(data)
    try:
        while view:
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:  # a process that shares the descriptor made it non-blocking
                select.select([], [fd], [])
    except OSError as exc:
        if is_broken_pipe(exc):
            raise ReaderGone from None
        raise OutputError(f"cannot write the output: {describe_os_error(exc)}") from exc


class Output:
    """Writes the output of a command.

    Arguments:
        json: whether errors are JSON objects, and nothing is indented or coloured.
        seq: whether JSON texts are records of RFC 7464.
        raw: whether texts and bytes are written as they are.
    """

    def __init__(self, *, json: bool = False, seq: bool = False, raw: bool = False) -> None:
        self.json = json
        self.raw = raw
        self.is_for_programs = json or seq
        self._seq = seq
        self._turn = trio.Lock()  # one item is written at a time
        self.is_terminal = os.isatty(OUT)
        self.may_show_progress = os.isatty(ERR) and not json
        self._is_pretty = self.is_terminal and not self.is_for_programs
        self._has_colours = self._is_pretty and may_colour()

    def line(self, text: str) -> None:
        """Write a line of text for people. It cannot control a terminal, even through a pager."""
        write_all(OUT, f"{tame(text)}\n".encode(errors="backslashreplace"))

    def data(self, data: bytes) -> None:
        """Write bytes as they are. On a terminal, write them as a line of text that does not control it."""
        write_all(OUT, self.encode_raw(data))

    def encode_raw(self, value: bytes | str) -> bytes:
        """Return the bytes that `line` writes for a text, or `data` for bytes."""
        if isinstance(value, bytes):
            if not self.is_terminal:
                return value
            value = value.decode(errors="backslashreplace")
        return f"{tame(value) if self.is_terminal else value}\n".encode(errors="backslashreplace")

    def value(self, value: Any, *, is_item: bool = False) -> None:
        """Write a JSON text. For people it is indented, unless it is one of many."""
        write_all(OUT, self.encode(value, is_item=is_item))

    def encode(self, value: Any, *, is_item: bool = False) -> bytes:
        """Return the bytes that `value` writes."""
        text = dump(value, indent=2 if self._is_pretty and not is_item else None)
        if self.is_terminal:
            text = _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)  # still JSON
        if self._has_colours:
            text = colour(text)
        return f"{RECORD_SEPARATOR if self._seq else ''}{text}\n".encode()

    async def item(self, data: bytes) -> None:
        """Write one of many items. It may wait for the reader; the connection goes on meanwhile."""
        async with self._turn:
            await trio.to_thread.run_sync(write_all, OUT, data, abandon_on_cancel=True)

    def note(self, text: str) -> None:
        """Write a message. An error of writing does not matter."""
        with suppress(OutputError, ReaderGone):
            write_all(ERR, f"bokbok: {escape(text)}\n".encode(errors="backslashreplace"))

    def failure(self, failure: Failure) -> None:
        """Write why a command failed: a line, or a JSON object."""
        if failure.message and not self.json:
            self.note(failure.message)
        elif failure.message:
            with suppress(OutputError, ReaderGone):
                write_all(ERR, f"{dump(failure.as_object())}\n".encode())


def tame(text: str) -> str:
    """Replace characters that control a terminal by escapes, as Python writes them."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def may_colour() -> bool:
    """Whether colours are wanted; see no-color.org."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def colour(text: str) -> str:
    """Colour a JSON text."""

    def paint(found: re.Match[str]) -> str:
        string, colon = found[1], found[2] or ""
        if string:
            return f"\x1b[{_NAME if colon else _STRING}m{string}\x1b[0m{colon}"
        return f"\x1b[{_WORD if found[0][0].isalpha() else _NUMBER}m{found[0]}\x1b[0m"

    return _TOKENS.sub(paint, text)


@asynccontextmanager
async def while_read() -> AsyncGenerator[None]:
    """End a block by `ReaderGone` when nobody reads the output any more, even if nothing is written.

    If the output is not a pipe, and on systems other than Linux, only writing shows that.
    """
    async with bare_nursery() as nursery:
        nursery.start_soon(_wait_reader_gone)
        try:
            yield
        finally:
            nursery.cancel_scope.cancel()


async def _wait_reader_gone() -> None:
    if sys.platform == "linux" and stat.S_ISFIFO(os.fstat(OUT).st_mode):
        # This end is never readable. Linux wakes a task that waits for that when the other end is closed.
        await trio.lowlevel.wait_readable(OUT)
        poll = select.poll()
        poll.register(OUT, 0)
        if poll.poll(0):
            raise ReaderGone
    await trio.sleep_forever()  # also if this process has both ends of the pipe
