r"""The arguments of a call as HTTPie writes them, or as a JSON object.

``name=text`` is a text, or what the listing says that it stands for; ``name:=json`` is a value of JSON;
``name=@file`` and ``name:=@file`` have the same in a file, ``@-`` in the standard input. ``name=\@text`` is a
text that begins with ``@``. One argument alone may be a JSON object, ``@file`` with one, or ``-``.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, cast

from ._exits import CommandError, Exit
from ._fields import ESCAPE, FILE, STDIN, read_file
from ._schemas import Mismatch, Schemas, is_bytes, parse_json

_ARGUMENT: Final = re.compile(r"([^\W\d]\w*)(:?=)(.*)", re.DOTALL)

_HOW: Final = "write NAME=TEXT, NAME:=JSON or NAME=@FILE, or one JSON object"


class Given(NamedTuple):
    """An argument as it stands on the command line.

    Attributes:
        name: of the parameter.
        is_json: its value is a JSON text.
        text: its value, or None where it is in a file.
        file: the file's path, ``-`` for the standard input.
    """

    name: str
    is_json: bool
    text: str | None
    file: str | None

    def read(self) -> bytes:
        """What stands there, or in the file.

        Raises:
            CommandError: the file cannot be read.
        """
        if self.file is not None:
            return read_file(self.file)
        return cast("str", self.text).encode(errors="surrogateescape")


Arguments = dict[str, Any] | list[Given]
"""Those of a call: an object of JSON, or one by one."""


def parse_arguments(texts: Sequence[str]) -> Arguments:
    """The arguments of a call.

    Raises:
        CommandError: they cannot be understood, or a file cannot be read.
    """
    if len(texts) == 1:
        [text] = texts
        if text == STDIN or text.startswith(FILE):
            return _parse_object(read_file(text.removeprefix(FILE)), "what was read")
        if text.lstrip().startswith("{"):
            return _parse_object(text, "the argument")
    given = [_parse_argument(text) for text in texts]
    names = [each.name for each in given]
    for name in names:
        if names.count(name) > 1:
            raise CommandError(f"{name} is given twice", Exit.USAGE)
    if [each.file for each in given].count(STDIN) > 1:
        raise CommandError("the standard input can be one argument only", Exit.USAGE)
    return given


def _parse_object(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except Mismatch as exc:
        raise CommandError(f"{what}: {exc}", Exit.BAD_ARGUMENTS) from None
    if not isinstance(value, dict):
        raise CommandError(f"{what} must be a JSON object of the arguments by name", Exit.BAD_ARGUMENTS)
    return cast("dict[str, Any]", value)


def _parse_argument(text: str) -> Given:
    found = _ARGUMENT.fullmatch(text)
    if found is None:
        raise CommandError(f"{text!r} is no argument: {_HOW}", Exit.USAGE)
    name, separator, value = found.groups()
    is_json = separator == ":="
    if value.startswith(FILE):
        return Given(name, is_json, None, value.removeprefix(FILE))
    return Given(name, is_json, value if is_json else value.removeprefix(ESCAPE), None)


def to_values(arguments: Arguments, schemas: Schemas, schema: Any) -> dict[str, Any]:
    """The values of arguments, as their schema says.

    Arguments:
        arguments: those that are values.
        schemas: what the schema refers to.
        schema: of the object that all of them are.

    Raises:
        CommandError: there is no such argument, or a value is wrong; the message begins with its name.
    """
    properties = schemas.properties(schema)
    values: dict[str, Any] = {}
    if isinstance(arguments, dict):
        for name, value in arguments.items():
            with naming(name):
                values[name] = schemas.from_json(properties.get(name), value)
    else:
        for given in arguments:
            with naming(given.name):
                values[given.name] = _to_value(given, schemas, properties.get(given.name))
    return values


def _to_value(given: Given, schemas: Schemas, schema: Any) -> Any:
    data = given.read()
    if given.is_json:
        return schemas.from_json(schema, parse_json(data))
    if is_bytes(schemas.resolve(schema)):
        return data
    text = decode_text(data)
    if given.file is not None and _is_no_text(schemas, schema):
        text = text.strip()
    return schemas.from_text(schema, text)


def decode_text(data: bytes) -> str:
    """A text.

    Raises:
        Mismatch: it is none.
    """
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise Mismatch("expected text in UTF-8") from None


def _is_no_text(schemas: Schemas, schema: Any) -> bool:
    """Whether the end of a line in a file cannot belong to the value."""
    return "text" not in schemas.name(schema)


@contextmanager
def naming(name: str) -> Generator[None]:
    """Say in the error of a wrong value which argument it is."""
    try:
        yield
    except Mismatch as exc:
        raise CommandError(f"{name}: {exc}", Exit.BAD_ARGUMENTS, "bad-arguments") from None


def check_names(names: Sequence[str], known: Sequence[str], path: str) -> None:
    """Refuse arguments that a method does not have.

    Raises:
        CommandError: there is one.
    """
    for name in names:
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise CommandError(
                f"{name}: {path} has no such argument; {takes}", Exit.BAD_ARGUMENTS, "bad-arguments"
            )
