"""What a command ends with: its exit codes, and what it says of an error."""

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
"""Before the name of a declared exception, in the code of an error; see ``docs/interfaces.rst``."""

INSECURE: Final = "insecure=True (or a key)"
"""What the library says to pass for plain TCP, which is an option of ours."""


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
"""What ``--graceful`` takes by its number."""


class CommandError(Exception):
    """What a command finds wrong itself.

    Arguments:
        message: one line.
        exit: the code to end with.
        code: of the error, for programs, where it has one.
        details: what else was answered, for programs.
    """

    def __init__(self, message: str, exit: Exit = Exit.OURS, code: str = "", details: Any = None) -> None:
        super().__init__(message)
        self.exit = exit
        self.code = code
        self.details = details


class OutputError(Exception):
    """The output cannot be written."""


class ReaderGone(Exception):  # noqa: N818  (what happened; it is no fault)
    """Nobody reads the output any more."""


class Failure(NamedTuple):
    """What is said of an error.

    Attributes:
        exit: the code to end with.
        message: one line; nothing is said where it is empty.
        code: of the error, for programs; mostly empty.
        details: what else was answered, for JSON.
    """

    exit: Exit
    message: str
    code: str = ""
    details: Any = None

    def as_object(self) -> dict[str, Any]:
        """The same, as an object of JSON."""
        shown = {"error": self.message, "exit": int(self.exit), "code": self.code, "details": self.details}
        return {name: value for name, value in shown.items() if value is not None and value != ""}


def find_leaf(error: BaseException) -> BaseException:
    """The error that counts, where a nursery put several together: Ctrl-C before all others."""
    while isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        interrupts = group.subgroup(KeyboardInterrupt)
        error = (interrupts or group).exceptions[0]
    return error


def explain(error: BaseException) -> Failure:
    """Say what an error means to who ran the command."""
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
    """An error of the system's in a line, without its number."""
    text = error.strerror or str(error)
    if error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {text}"
    return text


def is_broken_pipe(error: OSError) -> bool:
    """Whether nobody reads what is written any more."""
    return error.errno in {errno.EPIPE, errno.ECONNRESET}
