r"""Reads fields from the command line: a text, ``@FILE``, or ``-`` for the standard input.

After a backslash at the beginning, the rest is a text: ``\@home`` is ``@home``.
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
"""Bytes of a file, and of a line: more than a message may have, even in base64."""

KEY_TEXT: Final = re.compile(f"{KEY_PREFIX}1[0-9a-z]{{40}}", re.IGNORECASE)
"""A key, or a text that was meant to be one."""

SECRET_OPTIONS: Final = ("--key", "--passphrase", "--password")

WHY_NOT: Final = (
    "keys and passphrases are not taken from the command line, where every process of this machine can read "
    "it and the shell keeps it in its history; use --key-file FILE or the variable BOKBOK_KEY_FILE"
)


def refuse_secrets(argv: list[str]) -> None:
    """Refuse a command line that contains a secret, and do not show the secret.

    Raises:
        CommandError: it contains one.
    """
    options = argv[: argv.index("--")] if "--" in argv else argv
    names = {each.partition("=")[0] for each in options}
    if not names.isdisjoint(SECRET_OPTIONS) or any(map(KEY_TEXT.search, argv)):
        raise CommandError(WHY_NOT, Exit.USAGE)


def decode_name(text: str) -> str:
    """Decode a name as UTF-8, whatever encoding the system has for arguments.

    Raises:
        CommandError: it is not UTF-8.
    """
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        raise CommandError(f"the name {text!r} is not text in UTF-8", Exit.USAGE) from None


def read_file(path: str) -> bytes:
    """Read a whole file, or the standard input if the path is ``-``.

    Raises:
        CommandError: the file cannot be read, or is too large for any message.
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
    """Name a file, or the standard input, for a message."""
    return "the standard input" if path == STDIN else repr(path)


def cannot_read(path: str, error: OSError | ValueError) -> CommandError:
    """Make the error for a file that cannot be read."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return CommandError(f"cannot read {name_file(path)}: {reason}")


def parse_fields(texts: list[str]) -> list[bytes]:
    """Parse the fields of a request.

    Raises:
        CommandError: a file cannot be read, or the standard input is used twice.
    """
    if texts.count(STDIN) + texts.count(FILE + STDIN) > 1:
        raise CommandError("the standard input can be one field only", Exit.USAGE)
    return [_parse_field(text) for text in texts]


def _parse_field(text: str) -> bytes:
    if text == STDIN or text.startswith(FILE):
        return read_file(text.removeprefix(FILE))
    return os.fsencode(text.removeprefix(ESCAPE))  # the bytes that were typed, whatever they are


def ask_secret(prompt: str, *, twice: bool = False) -> str:
    """Ask for a secret on the terminal, without showing it. If the input is no terminal, read a line of it.

    Raises:
        CommandError: the secret cannot be read, or the two texts typed differ.
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
            raise CommandError("the two differ")
    except EOFError:
        raise CommandError("nothing was typed") from None
    except KeyboardInterrupt:
        sys.stderr.write("\n")  # the prompt stands on a line of its own
        raise
    return answer
