"""Values as JSON: what travelled, as people and programs may read it."""

from __future__ import annotations

import base64
import datetime as dt
import json
import math
from typing import Any, TypeGuard


def encode_base64(data: bytes) -> str:
    """Bytes, as JSON has them where a schema says so."""
    return base64.b64encode(data).decode()


def as_text(field: bytes) -> Any:
    """A field of a request: a text where it is one, and else an object with its base64."""
    try:
        return field.decode()
    except UnicodeDecodeError:
        return {"base64": encode_base64(field)}


def is_object(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a value of JSON is an object."""
    return isinstance(value, dict)


def is_list(value: Any) -> TypeGuard[list[Any]]:
    """Whether a value of JSON is a list, or a tuple, which a literal of Python may be."""
    return isinstance(value, list | tuple)


def as_json(value: Any) -> Any:
    """A value that travelled, in the types of JSON; what these cannot tell becomes text.

    Bytes are base64, as the schemas of a listing have it, and numbers that are not finite are null.
    """
    if is_object(value):
        return {_as_name(name): as_json(each) for name, each in value.items()}
    if is_list(value):
        return list(map(as_json, value))
    if isinstance(value, bytes):
        return encode_base64(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dt.datetime):
        return value.isoformat()
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


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
