"""Values to bytes and back: round trips, refusals, and bounds on the data of a peer."""

from __future__ import annotations

import dataclasses
import decimal
import enum
import json
import math
import random
import re
import runpy
import sys
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, date, datetime, time, timedelta
from types import GenericAlias
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, TypedDict

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from bokbok_trio.interface import _codec
from bokbok_trio.interface._codec import (
    INTEGER_NAMES,
    MAX_DEPTH,
    BadValue,
    find_unsupported,
    make_decoder,
    make_encoder,
    make_schemas,
)

encode = make_encoder()


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Point(NamedTuple):
    x: int
    y: float = 0.5


class Options(TypedDict):
    name: str
    limit: NotRequired[int]


@dataclasses.dataclass
class Job:
    name: str
    priority: int = 0
    tags: list[str] = dataclasses.field(default_factory=list)
    color: Color | None = None


class Size(msgspec.Struct, frozen=True):
    width: int
    height: Annotated[int, msgspec.Meta(ge=0)] = 0


@dataclasses.dataclass
class Tree:
    value: int
    children: list[Tree] = dataclasses.field(default_factory=list)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
INT = st.integers(-(2**63), 2**64 - 1)
FLOAT = st.floats(allow_nan=False)
TREES: st.SearchStrategy[Tree] = st.recursive(
    st.builds(Tree, INT), lambda inner: st.builds(Tree, INT, st.lists(inner, max_size=3)), max_leaves=6
)

LEAVES: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (int, INT),
    (float, FLOAT),
    (bool, st.booleans()),
    (str, TEXT),
    (bytes, st.binary(max_size=8)),
    (None, st.none()),
    (datetime, st.datetimes(timezones=st.just(UTC))),
    (date, st.dates()),
    (time, st.times()),
    (timedelta, st.timedeltas(timedelta(-9999), timedelta(9999))),
    (uuid.UUID, st.uuids()),
    (decimal.Decimal, st.decimals(allow_nan=False, allow_infinity=False)),
    (Color, st.sampled_from(Color)),
    (Level, st.sampled_from(Level)),
    (Literal["a", "b"], st.sampled_from(["a", "b"])),
    (Point, st.builds(Point, INT, FLOAT)),
    (Options, st.fixed_dictionaries({"name": TEXT}, optional={"limit": INT})),
    (Job, st.builds(Job, TEXT, INT, st.lists(TEXT, max_size=2), st.none() | st.sampled_from(Color))),
    (Size, st.builds(Size, INT, st.integers(0, 9))),
    (Tree, TREES),
]
KEYS: list[tuple[Any, st.SearchStrategy[Any]]] = [LEAVES[0], LEAVES[3], LEAVES[10], LEAVES[12]]

Typed = tuple[Any, st.SearchStrategy[Any]]


def containers(inner: st.SearchStrategy[Typed]) -> st.SearchStrategy[Typed]:
    """Types made of others, each with its values."""

    def sequence(of: Typed) -> Typed:
        return GenericAlias(list, of[0]), st.lists(of[1], max_size=3)

    def pair(of: tuple[Typed, Typed]) -> Typed:
        (a, b) = of
        return GenericAlias(tuple, (a[0], b[0])), st.tuples(a[1], b[1])

    def mapping(of: tuple[Typed, Typed]) -> Typed:
        (key, value) = of
        return GenericAlias(dict, (key[0], value[0])), st.dictionaries(key[1], value[1], max_size=3)

    def optional(of: Typed) -> Typed:
        return of[0] | None, of[1] | st.none()

    return st.one_of(
        inner.map(sequence),
        st.tuples(inner, inner).map(pair),
        st.tuples(st.sampled_from(KEYS), inner).map(mapping),
        inner.filter(lambda each: each[0] is not None).map(optional),
    )


TYPES: st.SearchStrategy[Typed] = st.recursive(st.sampled_from(LEAVES), containers, max_leaves=4)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.data())
def test_values_of_every_type_come_back_as_they_were(data: st.DataObject) -> None:
    type, values = data.draw(TYPES)
    value = data.draw(values)
    assert find_unsupported(type) == []
    assert make_decoder(type)(encode(value)) == value


@pytest.mark.parametrize("value", [float("nan"), math.inf, -math.inf, -0.0])
def test_floats_that_are_no_numbers_come_back(value: float) -> None:
    assert repr(make_decoder(float)(encode(value))) == repr(value)


class Celsius:
    def __init__(self, degrees: float) -> None:
        self.degrees = degrees


def test_types_that_do_not_travel_do_by_hooks() -> None:
    def decode_hook(cls: type, value: Any) -> Any:
        assert cls is Celsius
        return Celsius(value)

    assert find_unsupported(list[Celsius]) == [Celsius]
    with pytest.raises(TypeError, match="Encoding objects of type Celsius is unsupported"):
        encode(Celsius(1))
    data = make_encoder(lambda value: value.degrees)([Celsius(20.5)])
    assert make_decoder(list[Celsius], decode_hook)(data)[0].degrees == 20.5


def test_what_a_type_needs_hooks_for_is_found_at_any_depth() -> None:
    @dataclasses.dataclass
    class Outer:
        inner: dict[str, list[Celsius | None]]
        pair: tuple[int, complex]

    assert find_unsupported(Annotated[list[Outer], msgspec.Meta(title="x")]) == [Celsius, complex]


ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, "\ud800", ENDLESS])
def test_what_cannot_be_encoded_is_a_value_error(value: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  (the text is the codec's)
        encode(value)


@pytest.mark.parametrize(
    ("type", "value", "text"),
    [
        (dict[str, Job], {"a": {"name": 1}}, "$[...].name: expected str, got int"),
        (list[Job], [{"name": "a"}, {}], "$[1]: object missing required field name"),
        (int, "1", "$: expected int, got str"),
        (bool, 1, "$: expected bool, got int"),
        (Size, {"width": 1, "height": -1}, "$.height: expected int >= 0"),
        (Color, "green", "$: invalid enum value 'green'"),
        (tuple[int, str], [1], "$: expected array of length 2, got 1"),
        (Tree, {"value": 1, "children": [{"value": "x"}]}, "$.children[0].value: expected int, got str"),
    ],
)
def test_what_is_wrong_is_told_with_its_path(type: Any, value: Any, text: str) -> None:
    with pytest.raises(BadValue) as caught:
        make_decoder(type)(encode(value))
    assert str(caught.value) == text


@pytest.mark.parametrize("type", [set[int], dict[int, int], list[int]])
def test_a_bound_is_checked_before_the_members_are_looked_at(type: Any) -> None:
    """Or a peer could choose members whose hashes are equal, and as many as it likes."""
    bounded = Annotated[type, msgspec.Meta(max_length=2)]
    wrong: Any = {"a": "b", "c": "d", "e": "f"}
    data = make_encoder()(wrong if type == dict[int, int] else list(wrong))
    with pytest.raises(BadValue, match="of length <= 2"):
        make_decoder(bounded)(data)


def test_unknown_fields_are_ignored() -> None:
    assert make_decoder(Job)(encode({"name": "a", "new": [1, {"x": None}]})) == Job("a")


# ---- closed maps, such as arguments ----


class Arguments(TypedDict):
    path: str
    depth: NotRequired[int]


decode_arguments = make_decoder(Arguments, is_closed=True)


@pytest.mark.parametrize("header", [b"\x82", b"\xde\x00\x02", b"\xdf\x00\x00\x00\x02"])
def test_a_closed_map_may_have_any_header(header: bytes) -> None:
    assert decode_arguments(header + encode("path") + encode("x") + encode("depth") + encode(3)) == {
        "path": "x",
        "depth": 3,
    }


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (encode({"path": "x", "deep": 3, "also": 4}), "$: unknown argument also"),
        (encode({"depth": 3}), "$: missing argument path"),
        (encode({"path": "x", "depth": None}), "$.depth: expected int, got None"),
        (b"\x82" + 2 * (encode("path") + encode("x")), "$: an argument is given twice"),
        (b"\xde\x00\x02" + 2 * (encode("path") + encode("x")), "$: an argument is given twice"),
        (encode({1: 2}), "key in $: expected str, got int"),
        (encode([]), "$: expected object, got array"),
        (encode({"path": "x"}) + b"\x00", "$: MessagePack data is malformed: trailing characters (byte 8)"),
        (b"", "$: input data was truncated"),
    ],
)
def test_a_closed_map_is_exactly_what_it_should_be(data: bytes, text: str) -> None:
    with pytest.raises(BadValue) as caught:
        decode_arguments(data)
    assert str(caught.value).lower() == text.lower()


def test_hundreds_of_keys_are_compared_too() -> None:
    type = TypedDict("type", {f"k{index}": int for index in range(300)})  # type: ignore[misc]
    decode = make_decoder(type, is_closed=True)
    values = {f"k{index}": index for index in range(300)}
    assert decode(encode(values)) == values
    with pytest.raises(BadValue, match="unknown argument more"):
        decode(encode(values | {"more": 1}))


# ---- depth ----


def nest(depth: int, innermost: Any = None) -> Any:
    """Nest so many lists."""
    value = [] if innermost is None else [innermost]
    for _ in range(depth - 1):
        value = [value]
    return value


@pytest.mark.parametrize("type", [Any, list, list[Any], dict[str, Any] | list[Any]])
def test_values_of_any_type_nest_to_a_depth_and_no_deeper(type: Any) -> None:
    decode = make_decoder(type)
    assert decode(encode(nest(MAX_DEPTH))) == nest(MAX_DEPTH)
    assert decode(encode(nest(MAX_DEPTH, 7))) == nest(MAX_DEPTH, 7)
    for too_deep in (nest(MAX_DEPTH + 1), nest(MAX_DEPTH, {}), nest(MAX_DEPTH, {"a": 1}), nest(10**4)):
        with pytest.raises(BadValue, match=f"nested deeper than {MAX_DEPTH}"):
            decode(encode_by_hand(too_deep))


def encode_by_hand(value: Any) -> bytes:
    """Encode nested lists at depths at which the encoder gives up."""
    data = b""
    while isinstance(value, list) and len(value) == 1:
        data += b"\x91"
        [value] = value
    return data + encode(value)


def test_types_that_hold_themselves_nest_to_the_same_depth() -> None:
    def grow(levels: int) -> Tree:
        tree = Tree(0)
        for _ in range(levels):
            tree = Tree(0, [tree])
        return tree

    decode = make_decoder(Tree)
    deepest = grow(MAX_DEPTH // 2 - 1)  # each is a map with a list
    assert decode(encode(deepest)) == deepest
    with pytest.raises(BadValue, match="nested deeper than"):
        decode(encode(Tree(0, [deepest])))


def test_what_looks_deep_and_is_not_is_decoded() -> None:
    flat = [{"a": [1, b"\x91" * 300, "\x11" * 200, 1.5]}, [], {}] * 100
    assert make_decoder(Any)(encode(flat)) == flat


def test_a_type_with_a_bound_refuses_what_is_deeper_than_itself() -> None:
    decode = make_decoder(list[list[int]])
    with pytest.raises(BadValue, match=r"\$\[0\]\[0\]: expected int, got array"):
        decode(encode(nest(MAX_DEPTH + 10)))


@pytest.mark.parametrize("levels", [990, 10**5])
def test_a_field_that_is_ignored_may_not_use_up_the_stack(levels: int) -> None:
    data = b"\x82" + encode("name") + encode("a") + encode("new") + b"\x91" * levels + b"\xc0"
    try:
        found = make_decoder(Job)(data)
    except BadValue as exc:
        found = str(exc)
    assert found in [Job("a"), f"$: nested deeper than {MAX_DEPTH}"]


# ---- what a peer may send ----

SCHEMAS: list[Any] = [type for type, _ in LEAVES] + [
    Any,
    list[int],
    dict[str, list[Any]],
    set[Any],
    dict[Any, Any],
    tuple[int, ...],
    int | str | None,
]
HOSTILE: list[bytes] = [
    b"",
    b"\xc1",
    *(header + b"\xff" * 4 for header in (b"\xc6", b"\xc9", b"\xdb", b"\xdd", b"\xdf")),
    *(header + b"\xff" * 2 for header in (b"\xc5", b"\xc8", b"\xda", b"\xdc", b"\xde")),
    b"\x91" * 100,
    b"\x81\xa1a" * 100,
    b"\x91" * 10**5,
    b"\x81\xa1a" * 10**5,
    b"\xdd\x00\x0f\xff\xff" * 200,
    b"\xdc\xff\xff" * 20000,
    b"\xdc\x00\x64" + b"\x91\xcf\xff\xff\xff\xff\xff\xff\xff\xff" * 70,  # cut short
    b"\xa1\xff",
    b"\xd7\xff" + b"\xff" * 8,  # a time long after the last
    b"\xc7\x0c\xff" + b"\xff" * 12,
    b"\x82\x90\x01\x90\x02",  # a list for a key
    b"\x91\x90",
    encode({"name": "x" * 100, "priority": 2**63}),
]


@pytest.mark.parametrize("data", HOSTILE, ids=lambda data: data[:6].hex())
@pytest.mark.parametrize("closed", [False, True])
def test_hostile_bytes_are_bad_values_or_values(data: bytes, closed: bool) -> None:
    decoders: list[Callable[[bytes], Any]] = [make_decoder(each) for each in SCHEMAS]
    for decode in [decode_arguments] if closed else decoders:
        with suppress(BadValue):
            decode(data)


@settings(deadline=None)
@given(st.sampled_from(SCHEMAS), st.binary(max_size=200))
@example(Any, b"\x91" * 70)
def test_no_bytes_make_anything_but_bad_values_or_values(type: Any, data: bytes) -> None:
    with suppress(BadValue):
        make_decoder(type)(data)


@settings(deadline=None)
@given(st.data())
def test_nor_do_bytes_that_were_right_and_changed(data: st.DataObject) -> None:
    type, values = data.draw(TYPES)
    good = bytearray(encode(data.draw(values)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(good) - 1))
        good[at] = data.draw(st.integers(0, 255))
    for decode in (make_decoder(type), make_decoder(Any)):
        with suppress(BadValue):
            decode(bytes(good))


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 300))
def test_the_depth_of_all_that_can_be_decoded_is_measured_right(seed: int, size: int) -> None:
    """Against a decoder that has no bound but Python's."""
    dice = random.Random(seed)

    def grow(levels: int) -> Any:
        kind = dice.choice("lllmsibf") if levels else "i"
        if kind == "l":
            return [grow(levels - 1) for _ in range(dice.choice([1, 1, 1, 2, 17]))][: size + 1]
        if kind == "m":
            return {str(each): grow(levels - 1) for each in range(dice.choice([1, 1, 2]))}
        return {
            "s": "x" * dice.choice([1, 40, 300]),
            "i": dice.randrange(-(2**40), 2**40),
            "b": b"\x91" * 70,
        }.get(kind, 0.5)

    def measure(value: Any) -> int:
        members = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return 0 if members is None else 1 + max(map(measure, members), default=0)

    value = grow(2)
    for _ in range(dice.randrange(MAX_DEPTH + 4)):
        value = [1, value, "x"] if dice.random() < 0.5 else {"a": value}
    try:
        assert make_decoder(Any)(encode(value)) == value
        assert measure(value) <= MAX_DEPTH
    except BadValue:
        assert measure(value) > MAX_DEPTH


class Fussy:
    pass


@pytest.mark.parametrize("error", [ValueError("no"), TypeError("no"), KeyError("no"), MemoryError("no")])
def test_what_a_hook_raises_is_a_bad_value(error: Exception) -> None:
    def decode_hook(cls: type, value: Any) -> Any:
        raise error

    with pytest.raises(BadValue, match=r"^\$: .*no"):
        make_decoder(Fussy, decode_hook)(encode(1))


def test_schemas_say_what_types_are() -> None:
    [job, number, fussy], definitions = make_schemas([Job, Annotated[int, msgspec.Meta(ge=1)], Fussy])
    assert job == {"$ref": "#/$defs/Job"}
    assert definitions["Job"]["properties"]["tags"]["items"] == {"type": "string"}
    assert number == {"type": "integer", "minimum": 1}
    assert fussy == {"title": "Fussy"}


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Number(enum.IntEnum):
    ONE = 1


class Keyed(msgspec.Struct, tag=True):
    names: dict[int, str]
    within: Keyed | None = None


class Other(msgspec.Struct, tag=True):
    texts: dict[str, int]
    numbers: dict[Number, int]


class Row(msgspec.Struct, array_like=True, tag=True):
    names: dict[int, str]


class Pair(NamedTuple):
    name: str
    names: dict[int, str]


class TypedKeys(TypedDict):
    names: dict[int, str]


@pytest.mark.parametrize(
    ("type", "maps"),
    [
        (dict[int, str], 1),
        (dict[Annotated[int, msgspec.Meta(ge=1)], Any], 1),
        (Annotated[dict[int, str], msgspec.Meta(description="of names")], 1),
        (dict[int, dict[int, str]], 2),
        (dict[str, dict[int, str]], 1),
        (list[dict[int, str]], 1),
        (tuple[str, dict[int, str]], 1),
        (tuple[dict[int, str], ...], 1),
        (dict[Number, str], 1),
        (dict[Literal[1, 2], str], 1),
        (dict[Literal["a"], str], 0),
        (dict[Colour, str], 0),
        (dict[str, str], 0),
        (dict[int | str, str], 0),
        (dict, 0),
        (list, 0),
        (Keyed, 1),
        (Pair, 1),
        (TypedKeys, 1),
        (Row, 1),
        (dict[int, str] | None, 1),
        (Colour | dict[int, str] | list[dict[int, str]] | None, 2),
        (Keyed | Other | None, 2),
        (Keyed | Other | list[dict[int, str]] | int | None, 3),
        (Keyed | Number | bytes, 1),
        (list[Keyed | Other] | None, 2),
    ],
)
def test_schemas_say_which_maps_have_integers_as_keys(type: Any, maps: int) -> None:
    [schema], definitions = make_schemas([type])
    assert json.dumps([schema, definitions]).count('"propertyNames": {"pattern": ') == maps


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("0", True),
        ("-7", True),
        ("18446744073709551615", True),
        ("07", False),
        ("-0", False),
        ("1" * 21, False),
    ],
)
def test_names_that_are_integers(name: str, fits: bool) -> None:
    assert bool(re.fullmatch(INTEGER_NAMES, name)) == fits


def test_without_msgspec_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "msgspec", None)
    with pytest.raises(ImportError, match=r"install bokbok-trio\[interface\]"):
        runpy.run_path(_codec.__file__)
