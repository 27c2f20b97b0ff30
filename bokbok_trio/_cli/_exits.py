"""The exit codes of commands, and their messages for errors."""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, cast

from .. import (
    AddressError,
    AuthenticationError,
    ConnectionClosed,
    ConnectionLost,
    ConnectionRefused,
    HandshakeError,
    MessageTooLarge,
    ProtocolError,
    RemoteError,
)
from .._errors import escape
from ._values import as_text

RAISED: Final = "%"
"""The prefix of the error code for a declared exception; see ``docs/interfaces.rst``."""

INSECURE: Final = "insecure=True (or a key)"
"""The advice of the library for plain TCP, which is an option here."""


class Exit(enum.IntEnum):
    """Exit codes; ``docs/cli.rst`` has the table."""

    DONE = 0
    OURS = 1
    USAGE = 2
    NO_CONNECTION = 3
    REFUSED = 4
    HANDLER_SAID_NO = 5
    BAD_ARGUMENTS = 6
    LOST = 7
    LOST_NOT_RUN = 8
    TIME_OUT = 124
    INTERRUPTED = 130
    NO_READER = 141


FORGIVABLE: Final = frozenset({*range(Exit.NO_CONNECTION, Exit.LOST_NOT_RUN + 1), Exit.TIME_OUT})
"""The exit codes that ``--graceful`` takes."""


class CommandError(Exception):
    """An error that a command finds itself.

    Arguments:
        message: one line.
        exit: the exit code.
        code: the code of the error, for programs; may be empty.
        details: the details of the answer, for programs.
    """

    def __init__(self, message: str, exit: Exit = Exit.OURS, code: str = "", details: Any = None) -> None:
        super().__init__(message)
        self.exit = exit
        self.code = code
        self.details = details


class OutputError(Exception):
    """The output cannot be written."""


class ReaderGone(Exception):  # noqa: N818  (the name says what happened; it is not an error)
    """Nobody reads the output any more."""


class Failure(NamedTuple):
    """The report of an error.

    Attributes:
        exit: the exit code.
        message: one line; empty: nothing is written.
        code: the code of the error, for programs; mostly empty.
        details: the details of the answer, for JSON.
    """

    exit: Exit
    message: str
    code: str = ""
    details: Any = None

    def as_object(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        shown = {"error": self.message, "exit": int(self.exit), "code": self.code, "details": self.details}
        return {name: value for name, value in shown.items() if value is not None and value != ""}


def find_leaf(error: BaseException) -> BaseException:
    """Return the error to report if a nursery raised several: Ctrl-C before all others."""
    while isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        interrupts = group.subgroup(KeyboardInterrupt)
        error = (interrupts or group).exceptions[0]
    return error


def explain(error: BaseException) -> Failure:
    """Make the report of an error for the user of the command."""
    message = escape(str(error)).replace(INSECURE, "--insecure (or a key)")
    if isinstance(error, CommandError):
        return Failure(error.exit, message, error.code, error.details)
    if isinstance(error, RemoteError):
        return _explain_answer(error)
    if isinstance(error, ConnectionLost | ConnectionClosed):
        exit, what = (Exit.LOST, "may have run") if error.may_have_run else (Exit.LOST_NOT_RUN, "did not run")
        return Failure(exit, f"the connection was lost, and it {what}: {message}")
    if isinstance(error, KeyboardInterrupt):
        return Failure(Exit.INTERRUPTED, "interrupted")
    if isinstance(error, MessageTooLarge):
        message += " (the smaller max_message_size of both sides); a stream may have any size"
    for cls, exit in _EXITS.items():
        if isinstance(error, cls):
            return Failure(exit, message)
    return Failure(Exit.OURS, f"{type(error).__name__}: {message} (this is a defect; --verbose shows where)")


_EXITS: Final[Mapping[type[BaseException], Exit]] = {
    OutputError: Exit.OURS,
    ProtocolError: Exit.OURS,
    AddressError: Exit.USAGE,
    AuthenticationError: Exit.REFUSED,
    ConnectionRefused: Exit.REFUSED,
    HandshakeError: Exit.NO_CONNECTION,
    MessageTooLarge: Exit.BAD_ARGUMENTS,
    ReaderGone: Exit.NO_READER,
}


def _explain_answer(error: RemoteError) -> Failure:
    exit = Exit.BAD_ARGUMENTS if error.code == "bad-arguments" else Exit.HANDLER_SAID_NO
    code = escape(error.code.removeprefix(RAISED))
    details = as_text(error.details) if error.details else None
    return Failure(exit, f"{escape(error.message)} [{code}]", code, details)


def describe_os_error(error: OSError) -> str:
    """Describe an error of the system in a line, without its number."""
    text = error.strerror or str(error)
    if error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {text}"
    return text


def is_broken_pipe(error: OSError) -> bool:
    """Whether an error says that nobody reads the output any more."""
    return error.errno in {errno.EPIPE, errno.ECONNRESET}
