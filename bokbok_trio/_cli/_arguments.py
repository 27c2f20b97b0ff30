r"""Parses the arguments of a call, written as for HTTPie or as a JSON object.

``name=text`` is a text, or the value that the text stands for by the listing; ``name:=json`` is a value of
JSON; ``name=@file`` and ``name:=@file`` take the same from a file, ``@-`` from the standard input.
``name=\@text`` is a text that begins with ``@``. One argument alone may be a JSON object, ``@file`` with one,
or ``-``.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, cast

from ._exits import CommandError, Exit
from ._fields import ESCAPE, FILE, STDIN, name_file, read_file
from ._schemas import Mismatch, Schemas, is_bytes, parse_json

_ARGUMENT: Final = re.compile(r"([^\W\d]\w*)(:?=)(.*)", re.DOTALL)

_HOW: Final = "write NAME=TEXT, NAME:=JSON or NAME=@FILE, or one JSON object"


class Given(NamedTuple):
    """An argument as it stands on the command line.

    Attributes:
        name: the name of the parameter.
        is_json: whether the value is a JSON text.
        text: the value, or None if it is in a file.
        file: the path of the file, or ``-`` for the standard input.
    """

    name: str
    is_json: bool
    text: str | None
    file: str | None

    def read(self) -> bytes:
        """Return the bytes of the value, from the command line or from the file.

        Raises:
            CommandError: the file cannot be read.
        """
        if self.file is not None:
            return read_file(self.file)
        return cast("str", self.text).encode(errors="surrogateescape")


Arguments = dict[str, Any] | list[Given]
"""The arguments of a call: a JSON object, or a list of single arguments."""


def parse_arguments(texts: Sequence[str]) -> Arguments:
    """Parse the arguments of a call.

    Raises:
        CommandError: an argument is malformed, or a file cannot be read.
    """
    if len(texts) == 1:
        [text] = texts
        if text == STDIN or text.startswith(FILE):
            path = text.removeprefix(FILE)
            return _parse_object(read_file(path), name_file(path))
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
        raise CommandError(f"{text!r} is not an argument: {_HOW}", Exit.USAGE)
    name, separator, value = found.groups()
    is_json = separator == ":="
    if value.startswith(FILE):
        return Given(name, is_json, None, value.removeprefix(FILE))
    return Given(name, is_json, value if is_json else value.removeprefix(ESCAPE), None)


def to_values(arguments: Arguments, schemas: Schemas, schema: Any) -> dict[str, Any]:
    """Convert arguments to values by their schema.

    Arguments:
        arguments: the arguments that are values.
        schemas: the schemas that the schema refers to.
        schema: the schema of the object of all arguments.

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
    """Decode a text in UTF-8.

    Raises:
        Mismatch: the bytes are not UTF-8.
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
    """Put the name of the argument before the message about a wrong value."""
    try:
        yield
    except Mismatch as exc:
        raise CommandError(f"{name}: {exc}", Exit.BAD_ARGUMENTS, "bad-arguments") from None


def check_names(names: Sequence[str], known: Sequence[str], path: str) -> None:
    """Refuse arguments that a method does not have.

    Raises:
        CommandError: it does not have one of them.
    """
    for name in names:
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise CommandError(
                f"{name}: {path} has no such argument; {takes}", Exit.BAD_ARGUMENTS, "bad-arguments"
            )
