"""The context of a request: names and values that the asker sends along, such as trace ids.

On the wire a context is a body of name, value, name, value, and so on. No context at all is an empty field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from .._errors import ProtocolError
from .._types import Context, Field
from .events import NO_CONTEXT
from .packets import Buffer, decode_body, encode_body, encode_field

MAX_CONTEXT_PAIRS: Final = 32
"""Names in the context of a request: enough for trace ids and the like."""

MAX_CONTEXT_SIZE: Final = 2**13
"""Bytes of an encoded context: as much as most HTTP servers allow for all headers of a request."""

_NAME: Final = re.compile(r"[a-z0-9._-]{1,64}", re.ASCII)


class ContextTooLong(ValueError):  # noqa: N818  (the name says what is wrong)
    """A context has too many names, or takes up too many bytes."""


def encode_context(context: Context | None) -> bytes:
    """Check the context of a request and encode it.

    Raises:
        TypeError: it is not a mapping from str to bytes or str.
        ValueError: a name is not 1 to 64 lower-case ASCII letters, digits, ``.``, ``-`` or ``_``.
        ContextTooLong: there are more than 32 names, or more than 8 KiB.
    """
    if context is None:
        return b""
    if not isinstance(context, Mapping):
        raise TypeError(f"a context is a mapping from names to bytes or str, not {type(context).__name__}")
    if not context:
        return b""
    if len(context) > MAX_CONTEXT_PAIRS:
        raise ContextTooLong(f"a context has at most {MAX_CONTEXT_PAIRS} names, not {len(context)}")
    fields: list[bytes] = []
    for name, value in context.items():
        if not isinstance(name, str):
            raise TypeError(f"a name of a context is a str, not {type(name).__name__}")
        if _NAME.fullmatch(name) is None:
            raise ValueError(
                f"invalid name of a context: {name[:80]!r}; use 1 to 64 of a-z, 0-9, '.', '-' and '_'"
            )
        if not isinstance(value, Field):
            raise TypeError(f"the value of {name!r} in a context is bytes or str, not {type(value).__name__}")
        fields += (name.encode(), encode_field(value))
    encoded = b"".join(encode_body(fields, 2**32 - 1)[0])
    if len(encoded) > MAX_CONTEXT_SIZE:
        raise ContextTooLong(f"a context takes at most {MAX_CONTEXT_SIZE} bytes, not {len(encoded)}")
    return encoded


def decode_context(field: Buffer) -> Mapping[str, bytes]:
    """Decode the context of a request of the peer.

    Raises:
        ProtocolError: the field is not a context.
    """
    if not field:
        return NO_CONTEXT
    if len(field) > MAX_CONTEXT_SIZE:
        raise ProtocolError(f"a context of {len(field)} bytes exceeds the limit of {MAX_CONTEXT_SIZE}")
    fields = decode_body(field)
    if not fields or len(fields) % 2 or len(fields) > 2 * MAX_CONTEXT_PAIRS:
        raise ProtocolError(f"a context of {len(fields)} fields; it has 1 to 32 pairs of name and value")
    context: dict[str, bytes] = {}
    for at in range(0, len(fields), 2):
        name = fields[at].decode("latin-1")
        if _NAME.fullmatch(name) is None or name in context:
            raise ProtocolError(f"invalid or repeated name in a context: {fields[at][:20]!r}")
        context[name] = fields[at + 1]
    return MappingProxyType(context)
