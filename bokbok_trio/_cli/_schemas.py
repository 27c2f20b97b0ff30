"""The JSON Schemas of a listing: they convert texts and JSON to values, and make templates.

A listing comes from the other side. If something in it is not a schema, it counts as a schema that allows
everything, because the other side checks the arguments anyway.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from shlex import quote
from typing import Any, Final, NoReturn

from ..interface._codec import INTEGER_NAMES
from ._values import dump, is_list, is_object

Schema = Mapping[str, Any]

MAX_DEPTH: Final = 64
"""Levels of schemas, and references in a row, that are followed. Deeper values are left as they are."""

TEMPLATE_DEPTH: Final = 8
"""Levels of objects in a template, because a type may contain itself."""

_WORD: Final = re.compile(r"[\w.-]+")

_INTEGER: Final = re.compile(r"[+-]?[0-9]+", re.ASCII)


class Mismatch(ValueError):  # noqa: N818  (the name says what happened)
    """A value does not match its schema; the message says what it should be."""


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON text. Extensions of JSON that only Python has are refused.

    Raises:
        Mismatch: the text is not JSON.
    """
    try:
        value = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_int=_parse_json_integer,
            parse_float=_parse_json_number,
            object_pairs_hook=_make_object,
        )
        json.dumps(value, ensure_ascii=False).encode()
    except Mismatch:
        raise
    except UnicodeEncodeError:
        raise Mismatch("half of a surrogate pair is not text") from None
    except RecursionError:
        raise Mismatch("expected JSON: it is nested too deeply") from None
    except UnicodeDecodeError:
        raise Mismatch("expected JSON: it is not text in UTF-8") from None
    except ValueError as exc:
        raise Mismatch(f"expected JSON: {exc}") from None
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise Mismatch(f"JSON has no {name}")


def _parse_json_integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # Python bounds their length
        raise Mismatch(f"a number of {len(text)} digits is too long") from None


def _parse_json_number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise Mismatch(f"{text} is too large for a number")
    return number


def _make_object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in members:
        if name in made:
            raise Mismatch(f"{name} is given twice")
        made[name] = value
    return made


def is_bytes(schema: Schema) -> bool:
    """Whether the values of a schema are bytes."""
    return schema.get("type") == "string" and schema.get("contentEncoding") == "base64"


class Schemas:
    """The schemas of an interface.

    Arguments:
        definitions: the schemas that others refer to, by name.
    """

    def __init__(self, definitions: Mapping[str, Any]) -> None:
        self._definitions = definitions

    def resolve(self, schema: Any) -> Schema:
        """Return the schema that a reference refers to, or the schema itself."""
        for _ in range(MAX_DEPTH):
            if not is_object(schema):
                return {}
            if "$ref" not in schema:
                return schema
            schema = self._definitions.get(str(schema["$ref"]).removeprefix("#/$defs/"))
        return {}

    def properties(self, schema: Any) -> dict[str, Any]:
        """Return the schemas of the members of an object, by name."""
        return _get_dict(self.resolve(schema), "properties")

    def required(self, schema: Any) -> frozenset[str]:
        """Return the names of the members that an object must have."""
        return frozenset(
            filter(lambda each: isinstance(each, str), _get_list(self.resolve(schema), "required"))
        )

    def _alternatives(self, schema: Schema) -> list[Schema]:
        """Return the schemas of a union. A union among them counts as a schema that allows everything."""
        found = map(self.resolve, _get_list(schema, "anyOf"))
        return [{} if "anyOf" in each else each for each in found]

    # ---- to values ----

    def from_text(self, schema: Any, text: str) -> Any:
        """Return the value that a text stands for. If the schema allows a text, that is the text itself.

        Raises:
            Mismatch: the schema does not allow it.
        """
        schema = self.resolve(schema)
        if "enum" in schema:
            choices = {
                each if isinstance(each, str) else dump(each): each for each in _get_list(schema, "enum")
            }
            if text not in choices:
                raise Mismatch(f"expected {self.name(schema)}, and got {text!r}")
            return choices[text]
        if alternatives := self._alternatives(schema):
            return self._from_text_of_any(schema, alternatives, text)
        if is_bytes(schema):
            return text.encode(errors="surrogateescape")
        parse = _PARSERS.get(str(schema.get("type")))
        if parse is None:
            return text
        try:
            return parse(text)
        except (KeyError, ValueError):
            raise Mismatch(f"expected {self.name(schema)}, and got {text!r}") from None

    def _from_text_of_any(self, schema: Schema, alternatives: list[Schema], text: str) -> Any:
        for each in sorted(alternatives, key=lambda each: each.get("type") != "string"):
            try:
                return self.from_text(each, text)
            except Mismatch:
                continue
        raise Mismatch(f"expected {self.name(schema)}, and got {text!r}")

    def from_json(self, schema: Any, value: Any, path: str = "$", depth: int = 0) -> Any:
        """Return the value that a JSON value stands for: base64 becomes bytes where the schema has bytes.

        Raises:
            Mismatch: a text is not base64, or a name not an integer, where the schema demands it. The message
                begins with the path.
        """
        schema = self.resolve(schema)
        if depth > MAX_DEPTH:
            return value
        for each in self._alternatives(schema):
            if self._may_be(each, value):
                return self.from_json(each, value, path, depth + 1)
        if isinstance(value, str) and is_bytes(schema):
            try:
                return base64.b64decode(value, validate=True)
            except ValueError:
                raise Mismatch(f"{path}: expected base64, and got {value!r}") from None
        if is_object(value):
            known, others = self.properties(schema), schema.get("additionalProperties")
            parse = partial(_parse_key, path=path) if _has_integer_names(schema) else str
            return {
                parse(name): self.from_json(known.get(name, others), each, f"{path}.{name}", depth + 1)
                for name, each in value.items()
            }
        if is_list(value):
            first, rest = _get_list(schema, "prefixItems"), schema.get("items")
            return [
                self.from_json(first[n] if n < len(first) else rest, each, f"{path}[{n}]", depth + 1)
                for n, each in enumerate(value)
            ]
        return value

    def _may_be(self, schema: Schema, value: Any) -> bool:
        """Whether a JSON value has the type of a schema. This is enough to choose between several schemas."""
        if "enum" in schema:
            return value in _get_list(schema, "enum")
        kind = schema.get("type")
        if kind is None:
            return True
        if not isinstance(value, _KINDS.get(str(kind), object)) or (
            isinstance(value, bool) and kind != "boolean"
        ):
            return False
        if is_object(value):
            known = self.properties(schema)
            return self.required(schema) <= value.keys() and all(
                self._may_be(self.resolve(known[name]), each)
                for name, each in value.items()
                if "enum" in self.resolve(known.get(name))  # a tag that distinguishes classes
            )
        return True

    # ---- for people ----

    def name(self, schema: Any) -> str:
        """Describe in words the values that a schema allows."""
        schema = self.resolve(schema)
        if "enum" in schema:
            return " or ".join(map(dump, _get_list(schema, "enum")))
        if alternatives := self._alternatives(schema):
            return " or ".join(dict.fromkeys(self.name(each) for each in alternatives))
        if is_bytes(schema):
            return "bytes"
        title, format = schema.get("title"), schema.get("format")
        kind = str(schema.get("type", "anything"))
        if kind == "object" and isinstance(title, str):
            return title
        if _has_integer_names(schema):
            return "an object with integers as names"
        return f"{format}" if kind == "string" and isinstance(format, str) else _NAMES.get(kind, kind)

    def template(self, schema: Any, depth: int = 0) -> Any:
        """Return a JSON value to fill in. Objects have all members, with empty values or null."""
        schema = self.resolve(schema)
        alternatives = self._alternatives(schema)
        kind = schema.get("type")
        if depth > TEMPLATE_DEPTH or any(each.get("type") == "null" for each in alternatives):
            return None
        if alternatives:
            return self.template(alternatives[0], depth + 1)
        if kind == "object":
            members = self.properties(schema)
            return {name: self._template_of(each, depth + 1) for name, each in members.items()}
        if kind == "array":
            return [self.template(each, depth + 1) for each in _get_list(schema, "prefixItems")]
        return next(iter(_get_list(schema, "enum")), _EMPTY.get(str(kind)))

    def _template_of(self, schema: Any, depth: int) -> Any:
        """Return the template of a member: its default, if it has one."""
        if is_object(schema) and "default" in schema:
            return schema["default"]
        return self.template(schema, depth)

    def placeholder(self, name: str, schema: Any) -> str:
        """Return the words for an argument in a shell command. Names of the other side are quoted."""
        schema = self.resolve(schema)
        name = quote(name)
        names = [self.name(each) for each in self._alternatives(schema)] or [self.name(schema)]
        choices = [each if isinstance(each, str) else dump(each) for each in _get_list(schema, "enum")]
        if choices and all(map(_WORD.fullmatch, choices)):
            return f"{name}={'|'.join(choices)}"
        if "bytes" in names:
            return f"{name}=@FILE"
        if "boolean" in names:
            return f"{name}=true|false"
        plain = {"text", "integer", "number", "null"}
        if (schema.get("type") == "string" and _WORD.fullmatch(names[0])) or plain.issuperset(names):
            return f"{name}={'|'.join(each.upper() for each in names if each != 'null')}"
        return f"{name}:=JSON"


def _has_integer_names(schema: Schema) -> bool:
    return _get_dict(schema, "propertyNames").get("pattern") == INTEGER_NAMES


def _parse_key(name: str, path: str) -> int:
    if not re.fullmatch(INTEGER_NAMES, name):
        raise Mismatch(f"{path}: expected an integer as a name, and got {name!r}")
    return int(name)


def _get_dict(schema: Schema, name: str) -> dict[str, Any]:
    found = schema.get(name)
    return found if is_object(found) else {}


def _get_list(schema: Schema, name: str) -> list[Any]:
    found = schema.get(name)
    return found if is_list(found) else []


def _parse_integer(text: str) -> int:
    if _INTEGER.fullmatch(text) is None:
        raise ValueError(text)
    return int(text)


def _parse_number(text: str) -> int | float:
    if _INTEGER.fullmatch(text):
        return int(text)
    number = float(text.replace("_", "?"))  # only Python accepts it
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _parse_container(text: str) -> Any:
    raise ValueError(text)


_PARSERS: Final[Mapping[str, Callable[[str], Any]]] = {
    "integer": _parse_integer,
    "number": _parse_number,
    "boolean": {"true": True, "false": False}.__getitem__,
    "null": {"null": None}.__getitem__,
    "array": _parse_container,
    "object": _parse_container,
}

_KINDS: Final[Mapping[str, type | tuple[type, ...]]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
    "array": list,
    "object": dict,
}

_NAMES: Final = {"string": "text", "array": "a list", "object": "an object"}
_EMPTY: Final[Mapping[str, Any]] = {"string": "", "integer": 0, "number": 0.0, "boolean": False}
