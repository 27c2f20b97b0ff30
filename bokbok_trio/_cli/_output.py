"""Where commands write: data on the standard output, and all that is about it on the standard error.

Bytes go to the descriptors themselves, so each line has left when it is written, and an error of writing is
known at once, and not when the process ends.
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
"""What RFC 7464 has before each JSON text."""

_TOKENS: Final = re.compile(r'("(?:[^"\\]|\\.)*")(\s*:)?|\b(?:true|false|null)\b|-?\d[\d.eE+-]*')
_NAME, _STRING, _WORD, _NUMBER = "34", "32", "35", "36"  # blue, green, magenta, cyan

_STEERING: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What makes a terminal do something, but for the ends of lines and tabs."""


def open_missing_descriptors() -> None:
    """Take the numbers of standard descriptors that are closed, before a socket gets one.

    What is opened for them cannot be used in the direction that they have, so using one is an error.
    """
    for fd, flags in ((0, os.O_WRONLY), (OUT, os.O_RDONLY), (ERR, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)


def write_all(fd: int, data: bytes) -> None:
    """Write to a descriptor.

    Raises:
        ReaderGone: nobody reads it.
        OutputError: it cannot be written.
    """
    view = memoryview(data)
    try:
        while view:
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:  # who shares it with us made it so
                select.select([], [fd], [])
    except OSError as exc:
        if is_broken_pipe(exc):
            raise ReaderGone from None
        raise OutputError(f"cannot write the output: {describe_os_error(exc)}") from exc


class Output:
    """Writes what a command has to say.

    Arguments:
        json: errors are objects of JSON, and nothing is pretty.
        seq: JSON texts are records of RFC 7464.
        raw: texts and bytes are written as they are.
    """

    def __init__(self, *, json: bool = False, seq: bool = False, raw: bool = False) -> None:
        self.json = json
        self.raw = raw
        self.is_for_programs = json or seq
        self._seq = seq
        self.is_terminal = os.isatty(OUT)
        self.may_show_progress = os.isatty(ERR) and not json
        self._is_pretty = self.is_terminal and not self.is_for_programs
        self._has_colours = self._is_pretty and may_colour()

    def line(self, text: str) -> None:
        """Write a line of text, which cannot steer a terminal."""
        write_all(OUT, self.encode_raw(text))

    def data(self, data: bytes) -> None:
        """Write bytes as they are; but on a terminal as a line of text that does not steer it."""
        write_all(OUT, self.encode_raw(data))

    def encode_raw(self, value: bytes | str) -> bytes:
        """What `line` writes of a text, and `data` of bytes."""
        if isinstance(value, bytes):
            if not self.is_terminal:
                return value
            value = value.decode(errors="backslashreplace")
        return f"{self._tame(value)}\n".encode(errors="backslashreplace")

    def value(self, value: Any, *, is_item: bool = False) -> None:
        """Write a JSON text: indented where people read it, unless it is one of many."""
        write_all(OUT, self.encode(value, is_item=is_item))

    def encode(self, value: Any, *, is_item: bool = False) -> bytes:
        """What `value` writes."""
        text = dump(value, indent=2 if self._is_pretty and not is_item else None)
        text = self._tame(text)
        if self._has_colours:
            text = colour(text)
        return f"{RECORD_SEPARATOR if self._seq else ''}{text}\n".encode()

    async def item(self, data: bytes) -> None:
        """Write what is one of many. It may wait for whoever reads it, and the connection does not."""
        await trio.to_thread.run_sync(write_all, OUT, data, abandon_on_cancel=True)

    def note(self, text: str) -> None:
        """Write a line about what goes on; whether anyone sees it does not matter."""
        with suppress(OutputError, ReaderGone):
            write_all(ERR, f"bokbok: {escape(text)}\n".encode(errors="backslashreplace"))

    def failure(self, failure: Failure) -> None:
        """Write why a command failed: a line, or an object of JSON."""
        if failure.message and not self.json:
            self.note(failure.message)
        elif failure.message:
            with suppress(OutputError, ReaderGone):
                write_all(ERR, f"{dump(failure.as_object())}\n".encode())

    def _tame(self, text: str) -> str:
        if not self.is_terminal:
            return text
        return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def may_colour() -> bool:
    """Whether colours are wanted: see no-color.org."""
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
    """A block that ends by `ReaderGone` when nobody reads the output any more, also while nothing is written.

    Where the output is no pipe, or on another system than Linux, only writing tells.
    """
    async with bare_nursery() as nursery:
        nursery.start_soon(_wait_reader_gone)
        try:
            yield
        finally:
            nursery.cancel_scope.cancel()


async def _wait_reader_gone() -> None:
    if sys.platform == "linux" and stat.S_ISFIFO(os.fstat(OUT).st_mode):
        # This end is never readable, and Linux wakes who waits for that when the other one is closed.
        await trio.lowlevel.wait_readable(OUT)
        poll = select.poll()
        poll.register(OUT, 0)
        if poll.poll(0):
            raise ReaderGone
    await trio.sleep_forever()  # also where this is both ends of a pipe
