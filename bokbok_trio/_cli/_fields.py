r"""What stands on the command line for bytes: a text, ``@FILE``, or ``-`` for the standard input.

A backslash before the first character takes what follows as it is: ``\@home`` is ``@home``.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Final

from .._keys import KEY_PREFIX
from ._exits import CommandError, Exit

STDIN: Final = "-"
FILE: Final = "@"
ESCAPE: Final = "\\"

MAX_SIZE: Final = 2**24
"""Bytes of what is read at once, and of a line: more than a message may have, also in base64."""

KEY_TEXT: Final = re.compile(f"{KEY_PREFIX}1[0-9a-z]{{40}}", re.IGNORECASE)
"""What is a key, or was meant to be one."""

SECRET_OPTIONS: Final = ("--key", "--passphrase", "--password")

WHY_NOT: Final = (
    "no key and no passphrase is taken from the command line, where every process of this machine can read "
    "it and the shell keeps it in its history; use --key-file FILE or the variable BOKBOK_KEY_FILE"
)


def refuse_secrets(argv: list[str]) -> None:
    """Refuse a command line with a secret in it, without showing that.

    Raises:
        CommandError: there is one.
    """
    options = argv[: argv.index("--")] if "--" in argv else argv
    names = {each.partition("=")[0] for each in options}
    if not names.isdisjoint(SECRET_OPTIONS) or any(map(KEY_TEXT.search, argv)):
        raise CommandError(WHY_NOT, Exit.USAGE)


def read_file(path: str) -> bytes:
    """All of a file, or of the standard input if it is ``-``.

    Raises:
        CommandError: it cannot be read, or is too large for any message.
    """
    try:
        with open(0 if path == STDIN else path, "rb", closefd=path != STDIN) as file:
            data = file.read(MAX_SIZE + 1)
    except (OSError, ValueError) as exc:
        raise cannot_read(path, exc) from exc
    if len(data) > MAX_SIZE:
        raise CommandError(f"{name_file(path)} has more than {MAX_SIZE} bytes", Exit.BAD_ARGUMENTS)
    return data


def name_file(path: str) -> str:
    """A file, or the standard input, as errors call it."""
    return "the standard input" if path == STDIN else repr(path)


def cannot_read(path: str, error: OSError | ValueError) -> CommandError:
    """The error to raise where a file cannot be read."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return CommandError(f"cannot read {name_file(path)}: {reason}")


def parse_fields(texts: list[str]) -> list[bytes]:
    """The fields of a request, as they stand on the command line.

    Raises:
        CommandError: a file cannot be read, or the standard input is wanted twice.
    """
    if texts.count(STDIN) + texts.count(FILE + STDIN) > 1:
        raise CommandError("the standard input can be one field only", Exit.USAGE)
    return [_parse_field(text) for text in texts]


def _parse_field(text: str) -> bytes:
    if text == STDIN or text.startswith(FILE):
        return read_file(text.removeprefix(FILE))
    return os.fsencode(text.removeprefix(ESCAPE))  # the bytes that were typed, whatever they are


def ask_secret(prompt: str, *, twice: bool = False) -> str:
    """Ask for a secret where nobody can read along; or read a line of an input that is no terminal.

    Raises:
        CommandError: it cannot be read, or was not typed twice alike.
    """
    if not os.isatty(0):
        try:
            return read_file(STDIN).decode().split("\n")[0].removesuffix("\r")
        except UnicodeDecodeError:
            raise CommandError("the standard input is not text in UTF-8") from None
    from getpass import getpass  # noqa: PLC0415  (seldom needed)

    sys.stderr.flush()
    try:
        answer = getpass(f"{prompt}: ")
        if twice and getpass(f"{prompt} again: ") != answer:
            raise CommandError("the two are not alike")
    except EOFError:
        raise CommandError("nothing was typed") from None
    return answer
