"""Converts received values to JSON, for people and programs."""

from __future__ import annotations

import base64
import datetime as dt
import json
import math
from typing import Any, TypeGuard


def encode_base64(data: bytes) -> str:
    """Encode bytes as base64, which JSON has for bytes where a schema says so."""
    return base64.b64encode(data).decode()


def as_text(field: bytes) -> Any:
    """Convert a field of a request to a text if it is UTF-8; else to an object with its base64."""
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
    """Convert a received value to the types of JSON. Values that JSON does not have become text.

    Bytes become base64, as the schemas of a listing say, and numbers that are not finite become null.
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
    """Encode a value as JSON, in one line unless `indent` is given.

    Half a surrogate pair is escaped: JSON can express it, and UTF-8 cannot.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent, allow_nan=False)
    return text
