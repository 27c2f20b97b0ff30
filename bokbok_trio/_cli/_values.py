"""Values as JSON: what travelled, as people and programs may read it."""

from __future__ import annotations

import base64
import datetime
import json
import math
from collections.abc import Mapping, Sequence, Set as AbstractSet
from typing import Any, cast


def encode_base64(data: bytes) -> str:
    """Bytes, as JSON has them where a schema says so."""
    return base64.b64encode(data).decode()


def as_text(field: bytes) -> Any:
    """A field of a request: a text where it is one, and else an object with its base64."""
    try:
        return field.decode()
    except UnicodeDecodeError:
        return {"base64": encode_base64(field)}


def as_json(value: Any) -> Any:
    """A value that travelled, in the types of JSON; what these cannot tell becomes text.

    Bytes are base64, as the schemas of a listing have it, and numbers that are not finite are null.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case bytes() | bytearray():
            return encode_base64(bytes(value))
        case datetime.datetime():
            return value.isoformat()
        case Mapping():
            pairs = cast("Mapping[Any, Any]", value)
            return {_as_name(name): as_json(each) for name, each in pairs.items()}
        case Sequence() | AbstractSet():
            return [as_json(each) for each in cast("Sequence[Any]", value)]
        case _:
            return str(value)


def _as_name(key: Any) -> str:
    plain = as_json(key)
    return plain if isinstance(plain, str) else dump(plain)


def dump(value: Any, *, indent: int | None = None) -> str:
    """A JSON text, in one line unless it is indented.

    Half a surrogate pair, which JSON can name but UTF-8 cannot have, is escaped.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent, allow_nan=False)
    return text
