"""The codec: values to checked bytes, and back. No other module knows msgspec, or MessagePack.

The other modules use `make_encoder`, `make_decoder`, `find_unsupported` and `make_schemas`, so another codec
could replace this one.

Nesting is bounded before anything is decoded. Most types bound it themselves: values of a list of dataclasses
have a fixed depth, and the decoder refuses data at the first container that is deeper. A type that holds
itself, or ``Any``, has no such depth. Only then `_check_depth` scans the bytes first, and only if they are
long enough to be too deep.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import BuiltinMethodType
from typing import Any, Final, TypeAlias, get_origin

try:
    import msgspec
    from msgspec import inspect as described
except ImportError as exc:
    raise ImportError("bokbok_trio.interface needs msgspec: install bokbok-trio[interface]") from exc

MAX_DEPTH: Final = 64
"""Containers within each other in a decoded value: more than real data has, and far below the depth at which
Python raises `RecursionError`."""

EncodeHook: TypeAlias = Callable[[Any], Any]
"""Converts a value of your own type to a value that an interface can send, such as a dict."""

DecodeHook: TypeAlias = Callable[[type, Any], Any]
"""Converts such a value back to a value of the given type."""

_FIRST_CONTAINER = 0x80  # of the one-byte headers, which are 16 maps and 16 arrays
_ARRAY16, _ARRAY32, _MAP16, _MAP32 = range(0xDC, 0xE0)
_HEADERS: Final = bytes([*range(_FIRST_CONTAINER, 0xA0), *range(_ARRAY16, _MAP32 + 1)])
# The size of the length of a bin, str or ext, in bytes. So many bytes as the length says follow; an ext has
# one more, its type.
_LENGTHS: Final = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xC7: 1, 0xC8: 2, 0xC9: 4}
_EXT: Final = range(0xC7, 0xCA)
# The whole size of integers, floats, exts of a fixed size and short strs, in bytes.
_SIZES: Final = {0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9, 0xD0: 2, 0xD1: 3, 0xD2: 5, 0xD3: 9, 0xCA: 5, 0xCB: 9}
_SIZES.update({0xD4: 3, 0xD5: 4, 0xD6: 6, 0xD7: 10, 0xD8: 18})
_SIZES.update({0xA0 + length: 1 + length for length in range(0x20)})
_ONE_BYTE: Final = re.compile(rb"[\x00-\x7f\xc0-\xc3\xe0-\xff]*")  # nil, bool, small integers
_ONE_BYTE_OR_EMPTY: Final = re.compile(rb"[\x00-\x80\x90\xc0-\xc3\xe0-\xff]*")  # and empty containers


INTEGER_NAMES: Final = r"^(0|-?[1-9][0-9]{0,19})$"
"""In the schema of a map whose keys are integers, the pattern of its names: JSON has texts there."""

_FIELDS: Final = (
    described.TypedDictType,
    described.NamedTupleType,
    described.DataclassType,
    described.StructType,
)

_ADVICE: Final = {
    "dataclass or attrs type": "write subclasses of msgspec.Struct with tag=True",
    "multiple Struct types": "give each of them a tag of its own",
    "more than one": "write a dataclass with a field for each",
    "recursion": "write Any",
    "is not defined": "define it at the top of a module, and import it at run time",
    "Enums must": "give its members values of one of these types",
    "": "write another type, or a dataclass",
}
"""Advice for a type that the codec cannot take, by a part of the text of the codec's error."""


class BadValue(ValueError):  # noqa: N818  (the name says what is wrong)
    """Bytes that do not encode a value of the required type. The text says where and why."""


def make_encoder(hook: EncodeHook | None = None) -> Callable[[object], bytes]:
    """Return a function from a value to bytes.

    If a value cannot be encoded, the function raises ``TypeError`` or ``ValueError``, or the exception of the
    hook.
    """
    encode = msgspec.msgpack.Encoder(enc_hook=hook).encode

    def encode_checked(value: object) -> bytes:
        try:
            return encode(value)
        except (OverflowError, RecursionError) as exc:
            raise ValueError(str(exc)) from exc

    return encode_checked


def make_decoder(
    type: Any, hook: DecodeHook | None = None, *, is_closed: bool = False
) -> Callable[[bytes], Any]:
    """Return a function from bytes to a value of a type.

    Whatever the bytes are, the function raises nothing but `BadValue`.

    Arguments:
        type: an annotation.
        hook: converts values of types that the codec does not know.
        is_closed: whether unknown keys are refused, and not ignored. The type is a ``TypedDict`` then.

    Raises:
        TypeError: the codec cannot take the type.
    """
    decode = msgspec.msgpack.Decoder(type, dec_hook=hook).decode
    is_bounded = _measure(described.type_info(type), {}) <= MAX_DEPTH

    def decode_checked(data: bytes) -> Any:
        if not is_bounded and len(data) > MAX_DEPTH:
            _check_depth(data)
        try:
            value = decode(data)
            # The header of a small map is one byte that holds its length. If it fits, no key is unknown.
            if is_closed and data[0] != _FIRST_CONTAINER | len(value):
                _check_keys(data, value)
        except Exception as exc:
            raise exc if isinstance(exc, BadValue) else BadValue(_describe(exc)) from exc
        return value

    return decode_checked


def find_unsupported(type: Any) -> list[Any]:
    """Return the types in an annotation that need hooks.

    Raises:
        TypeError: the codec cannot take the annotation at all. The text says why, and what to write instead.
    """
    try:
        msgspec.msgpack.Decoder(type)
    except Exception as exc:
        advice = next(each for text, each in _ADVICE.items() if text in str(exc))
        raise TypeError(f"{exc}; {advice}") from exc
    found = list(_walk(described.type_info(type), {}))
    for each in found:
        if isinstance(each, described.DataclassType):
            _check_base(each.cls)
    return list(dict.fromkeys(each.cls for each in found if isinstance(each, described.CustomType)))


def make_schemas(types: Sequence[Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return a JSON Schema for each type, and the schemas that these refer to as ``#/$defs/NAME``, by name.

    Raises:
        TypeError: two types have the same name, and so have their modules.
    """
    try:
        schemas, definitions = msgspec.json.schema_components(
            types, schema_hook=lambda cls: {"title": cls.__name__}, ref_template="#/$defs/{name}"
        )
    except KeyError as exc:
        name = getattr(exc.args[0], "__qualname__", exc.args[0])
        raise TypeError(f"there are two types named {name}; rename one, or do not list them") from exc
    done: set[str] = set()
    for info, schema in zip(described.multi_type_info(types), schemas, strict=True):
        _mark_keys(info, schema, definitions, done)
    return list(schemas), definitions


def _mark_keys(
    info: described.Type, schema: dict[str, Any], definitions: dict[str, Any], done: set[str]
) -> None:
    """Say of maps whose keys are integers that they are, which the schemas of msgspec leave open.

    Arguments:
        info: a type.
        schema: of this type.
        definitions: what schemas refer to.
        done: the names of those that are done.
    """
    info = _bare(info)
    if "$ref" in schema:
        name = schema["$ref"].removeprefix("#/$defs/")
        if name in done:
            return
        done.add(name)
        schema = definitions[name]
    if isinstance(info, described.DictType) and _is_integer(info.key_type):
        schema["propertyNames"] = {"pattern": INTEGER_NAMES}
    for child, part in _parts(info, schema):
        _mark_keys(child, part, definitions, done)


def _bare(info: described.Type) -> described.Type:
    while isinstance(info, described.Metadata):
        info = info.type
    return info


def _is_integer(info: described.Type) -> bool:
    info = _bare(info)
    values: Iterable[Any] = ()
    if isinstance(info, described.EnumType):
        values = [each.value for each in info.cls]
    elif isinstance(info, described.LiteralType):
        values = info.values
    return isinstance(info, described.IntType) or (
        bool(values) and all(isinstance(each, int) for each in values)
    )


def _parts(info: described.Type, schema: dict[str, Any]) -> Iterator[tuple[described.Type, dict[str, Any]]]:
    """The types within a type that may hold maps, with their schemas."""
    found: Iterable[tuple[described.Type, Any]] = ()
    if isinstance(info, described.UnionType):
        found = _alternatives(info, schema)
    elif isinstance(info, described.DictType):
        found = [(info.value_type, schema.get("additionalProperties"))]
    elif isinstance(info, described.CollectionType):
        found = [(info.item_type, schema.get("items"))]
    elif isinstance(info, described.TupleType):
        found = zip(info.item_types, schema.get("prefixItems", ()), strict=False)
    elif isinstance(info, _FIELDS):
        members = schema.get("properties", {})
        items = schema.get("prefixItems", ())[-len(info.fields) :]  # an array may begin with a tag
        schemas = items or [members.get(field.encode_name) for field in info.fields]
        found = zip([field.type for field in info.fields], schemas, strict=False)
    for child, part in found:
        if part:
            yield child, part


def _alternatives(info: described.UnionType, schema: dict[str, Any]) -> Iterator[tuple[described.Type, Any]]:
    """Those of a union, which has one map and one list at most; of its classes the structs come last."""
    schemas = [part for each in schema.get("anyOf", ()) for part in each.get("anyOf", [each])]
    types = list(map(_bare, info.types))
    references = [each for each in schemas if "$ref" in each]
    classes = [each for each in types if isinstance(each, (*_FIELDS, described.EnumType))]
    classes.sort(key=lambda each: isinstance(each, described.StructType) and not each.array_like)
    yield from zip(classes, references, strict=False)
    for each in types:
        kind = "object" if isinstance(each, described.DictType) else "array"
        if isinstance(each, described.DictType | described.CollectionType | described.TupleType):
            yield each, next((part for part in schemas if part.get("type") == kind), None)


# ---- types ----


def _children(info: described.Type) -> Iterator[described.Type]:
    if isinstance(info, described.Metadata):
        yield info.type
    elif isinstance(info, described.UnionType):
        yield from info.types
    elif isinstance(info, described.CollectionType):
        yield info.item_type
    elif isinstance(info, described.TupleType):
        yield from info.item_types
    elif isinstance(info, described.DictType):
        yield info.key_type
        yield info.value_type
    elif isinstance(info, _FIELDS):
        for field in info.fields:
            yield field.type


def _walk(info: described.Type, seen: dict[int, described.Type]) -> Iterator[described.Type]:
    """Yield all types within a type, each once: a type may hold itself."""
    if id(info) not in seen:
        seen[id(info)] = info
        yield info
        for child in _children(info):
            yield from _walk(child, seen)


def _check_base(cls: Any) -> None:
    """Refuse a dataclass that is an exception, a dict or the like.

    The codec makes an object without calling ``__new__``, and sets its fields. An object of these classes
    would not be initialised, and Python crashes when it shows such an exception or uses such a deque.
    """
    made: type[object] = get_origin(cls) or cls
    for base in made.__mro__[:-1]:
        if isinstance(vars(base).get("__new__"), BuiltinMethodType):
            raise TypeError(
                f"{made.__qualname__} inherits from {base.__name__}, and so cannot be made of its fields; "
                "write a dataclass that does not"
            )


def _measure(info: described.Type, known: dict[int, float]) -> float:
    """Return how deep containers in values of a type can be nested; `math.inf`: there is no bound."""
    if id(info) in known:
        return known[id(info)]
    known[id(info)] = math.inf  # the answer if one of the types within it holds it
    if not isinstance(info, described.AnyType | described.CustomType | described.RawType | described.ExtType):
        depths = [_measure(child, known) for child in _children(info)]
        is_container = not isinstance(info, described.Metadata | described.UnionType) and bool(depths)
        known[id(info)] = max(depths, default=0) + is_container
    return known[id(info)]


# ---- bytes ----


def _check_depth(data: bytes) -> None:
    """Refuse bytes that hold more than `MAX_DEPTH` containers within each other.

    It passes bytes that are cut short or not MessagePack: the decoder refuses them before it gets deeper.
    """
    # Most values end here: so few bytes could be headers of containers that they cannot be too deep.
    if len(data) - len(data.translate(None, _HEADERS)) <= MAX_DEPTH:
        return
    at = 0
    claimed = 1  # values that all containers so far should hold
    remaining = 1  # values to come in the innermost container
    outer: list[int] = []  # values to come in the containers around it
    while True:
        while not remaining:
            if not outer:
                return
            remaining = outer.pop()
        small = _ONE_BYTE if len(outer) == MAX_DEPTH else _ONE_BYTE_OR_EMPTY
        # The regular expression skips runs of small values much faster than a loop.
        skipped = small.match(data, at, at + remaining)
        assert skipped is not None
        remaining -= skipped.end() - at
        at = skipped.end()
        if not remaining:
            continue
        if at >= len(data):
            return
        remaining -= 1
        if data[at] not in _HEADERS:
            at = _skip(data, at)
            continue
        outer.append(remaining)
        if len(outer) > MAX_DEPTH:
            raise BadValue(f"$: nested deeper than {MAX_DEPTH}")
        remaining, at = _read_header(data, at)
        claimed += remaining
        if claimed > len(data):
            return  # each value takes at least one byte, so the data is cut short


def _skip(data: bytes, at: int) -> int:
    """Return the end of the value that begins at `at` and is not a container."""
    kind = data[at]
    if kind in _SIZES:
        return at + _SIZES[kind]
    begin = at + 1 + _LENGTHS[kind]
    return begin + int.from_bytes(data[at + 1 : begin], "big") + (kind in _EXT)


def _read_header(data: bytes, at: int) -> tuple[int, int]:
    """Return how many values a container holds, keys included, and where they begin."""
    kind = data[at]
    if kind < _ARRAY16:
        count = kind & 0x0F
        is_map = kind < _FIRST_CONTAINER + 0x10
        at += 1
    else:
        width = 2 if kind in {_ARRAY16, _MAP16} else 4
        count = int.from_bytes(data[at + 1 : at + 1 + width], "big")
        is_map = kind >= _MAP16
        at += 1 + width
    return (2 * count if is_map else count), at


def _check_keys(data: bytes, known: Mapping[str, Any]) -> None:
    """Refuse a map that has unknown keys, or one key twice."""
    count, _ = _read_header(data, 0)
    if count == 2 * len(known):
        return
    keys: Mapping[str, Any] = msgspec.msgpack.decode(data, type=dict[str, msgspec.Raw])
    unknown = sorted(keys.keys() - known.keys())
    raise BadValue(f"$: unknown argument {unknown[0]}" if unknown else "$: an argument is given twice")


def _describe(error: Exception) -> str:
    """Describe the error of a value, as in ``$.job.priority: expected int, got str``."""
    if isinstance(error, RecursionError):
        return f"$: nested deeper than {MAX_DEPTH}"
    if not isinstance(error, msgspec.DecodeError):
        return f"$: {type(error).__name__}: {error}"
    text, _, path = str(error).rpartition(" - at ")
    if not text:
        text, path = path, "$"
    path, text = path.replace("`", ""), text.replace("`", "")
    if path == "$":
        text = text.replace("Object missing required field", "missing argument")
    return f"{path}: {text[:1].lower()}{text[1:]}"
