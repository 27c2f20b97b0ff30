"""All problems of an interface are reported at once, with what to write instead."""

from __future__ import annotations

import enum
import typing
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import InitVar, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, ParamSpec, Protocol, TypeVar, overload

import msgspec
import pytest
import trio
from trio.abc import ReceiveChannel

from bokbok_trio.interface import idempotent, raises
from bokbok_trio.interface._inspection import inspect_interface

from ..support.sample_interfaces import Listener, NoSuchFile, Plain, Stat, Store, TypeAliasType

if TYPE_CHECKING:
    from decimal import Decimal

T = TypeVar("T")
U = TypeVar("U")
P = ParamSpec("P")

Stream = AbstractAsyncContextManager[ReceiveChannel[int]]


@dataclass(frozen=True)
class Frozen(Exception):
    path: str


class NoDataclass(Exception):
    pass


@dataclass
class HasSocket(Exception):
    socket: Plain


@dataclass
class HasExtra(Exception):
    path: str
    extra: InitVar[int]
    more: InitVar[int] = 0


@dataclass
class HasCause(Exception):
    cause: NoSuchFile


@dataclass
class Registry(dict[str, int]):
    name: str


@dataclass
class HasDecimal(Exception):
    value: Decimal


def same_name() -> type[Exception]:
    @dataclass
    class NoSuchFile(Exception):
        code: int

    return NoSuchFile


def lose() -> None:
    raise NameError("lost")


LOST: Any = TypeAliasType("Lost", lose)

LONG: type[Exception] = dataclass(type("L" * 64, (Exception,), {}))


class Loud(Protocol):
    async def shout(self, text: str, *rest: str) -> None: ...


class Dunder(Protocol):
    def __len__(self) -> int: ...


class Wrong(Protocol):
    """Each method is wrong in one way. Its docstring is the expected message."""

    count: int
    LIMIT: ClassVar[int] = 3

    async def unannotated(self, path) -> None:  # type: ignore[no-untyped-def]
        """parameter path has no annotation; write path: int, say"""

    async def no_result(self, path: str):  # type: ignore[no-untyped-def]
        """its result has no annotation; write -> None, if there is none"""

    def not_async(self, path: str) -> int:
        """it is not async; write 'async def'"""
        ...

    async def generator(self) -> AsyncGenerator[int]:
        """it is an async generator; write def ...(...) -> AbstractAsyncContextManager[ReceiveChannel[...]]"""
        yield 1

    async def async_iterator(self) -> AsyncIterator[int]:
        """it streams, and is async; write def ...(...) -> AbstractAsyncContextManager[ReceiveChannel[...]]"""
        ...

    async def async_block(self) -> Stream:
        """it streams, and is async; write def ...(...) -> AbstractAsyncContextManager[ReceiveChannel[...]]"""
        ...

    def iterator(self) -> AsyncIterator[int]:
        """it returns AsyncIterator[int]; write def ...(...) -> AbstractAsyncContextManager"""
        ...

    def block_of_nothing(self) -> AbstractAsyncContextManager[int]:
        """returns AbstractAsyncContextManager[int]; write def ...(...) -> AbstractAsyncContextManager"""
        ...

    def block_of_items(self) -> AbstractAsyncContextManager[ReceiveChannel]:  # type: ignore[type-arg]
        """returns a stream of unknown items; write def ...(...) -> AbstractAsyncContextManager"""
        ...

    def bare_block(self) -> AbstractAsyncContextManager:  # type: ignore[type-arg]
        """returns AbstractAsyncContextManager; write def"""
        ...

    async def two_streams(self, a: AsyncIterable[int], b: AsyncIterable[int]) -> None:
        """a and b are both streams; a method takes one"""

    async def bare_stream(self, a: AsyncIterable) -> None:  # type: ignore[type-arg]
        """parameter a is a stream of unknown items; write AsyncIterable[int], say"""

    async def generator_argument(self, a: AsyncGenerator[int, None]) -> None:
        """parameter a is AsyncGenerator[int, None]; write AsyncIterable[...] for a stream"""

    async def block_argument(self, a: Stream) -> None:
        """write AsyncIterable[...] for a stream"""

    async def memory_channel(self, a: trio.MemoryReceiveChannel[int]) -> None:
        """write AsyncIterable[...] for a stream"""

    async def maybe_stream(self, a: AsyncIterable[int] | None = None) -> None:
        """parameter a is a stream that may be missing; write a method for each case"""

    async def odd_items(self, a: AsyncIterable[Plain]) -> None:
        """parameter a has items: Plain does not travel"""

    async def variadic(self, *paths: str) -> None:
        """*paths: 'str' has no fixed arguments; write each, or one list or dict of them"""

    async def keywords(self, **paths: str) -> None:
        """**paths: 'str' has no fixed arguments; write each, or one list or dict of them"""

    async def positional(self, path: str, /) -> None:
        """path is positional-only, and arguments travel by name; take the '/' away"""

    async def unknown_type(self, a: Plain) -> None:
        """parameter a: Plain does not travel; write a dataclass, or give encode_hook and decode_hook"""

    async def unknown_inside(self, a: dict[str, list[complex]]) -> None:
        """parameter a: complex does not travel"""

    async def unknown_result(self) -> Plain:
        """it returns: Plain does not travel"""
        ...

    async def anything(self, a: object) -> None:
        """parameter a: object is not a type of values; write Any"""

    async def ambiguous(self, a: list[int] | set[int]) -> None:
        """parameter a: Type unions may not contain more than one array-like"""

    async def callbacks_inside(self, a: list[Callable[[int], Awaitable[None]]]) -> None:
        """parameter a: Callable inside of another type; make it a parameter of its own"""

    async def streams_inside(self, a: dict[str, AsyncIterable[int]]) -> None:
        """parameter a: AsyncIterable inside of another type; make it a parameter of its own"""

    async def protocols_inside(self, a: list[Listener]) -> None:
        """parameter a: Listener inside of another type; make it a parameter of its own"""

    async def sync_callback(self, a: Callable[[int], None]) -> None:
        """parameter a is a callback that is not async; write Callable[[float], Awaitable[None]], say"""

    async def any_callback(self, a: Callable[..., Awaitable[None]]) -> None:
        """which does not give the types of its arguments; write Callable[[float], Awaitable[None]], say"""

    async def bare_callback(self, a: Callable) -> None:  # type: ignore[type-arg]
        """parameter a is Callable, which does not give the types of its arguments"""

    async def param_callback(self, a: Callable[P, Awaitable[None]]) -> None:
        """which does not give the types of its arguments"""

    async def streaming_callback(self, a: Callable[[AsyncIterable[int]], Awaitable[None]]) -> None:
        """parameter a is a callback with a stream; write a Protocol with a method"""

    async def odd_callback(self, a: Callable[[Plain], Awaitable[Plain]]) -> None:
        """parameter a: argument 0: Plain does not travel"""

    async def wrong_protocol(self, a: Loud) -> None:
        """Loud.shout: *rest: 'str' has no fixed arguments"""

    async def empty_protocol(self, a: Dunder) -> None:
        """Dunder: it has no methods"""

    async def open_protocol(self, a: Store) -> None:  # type: ignore[type-arg]
        """Store: T has no type; write Store[int], say"""

    async def returns_callback(self) -> Callable[[int], Awaitable[None]]:
        """a lent object lives only as long as a call; write methods of this interface, with a name or"""
        ...

    async def returns_protocol(self) -> Listener:
        """it returns Listener, and a lent object lives only as long as a call"""
        ...

    async def generic(self, a: T) -> T:
        """parameter a: T has no type; write one"""
        ...

    async def unknown_name(self, a: Decimal) -> None:
        """name 'Decimal' is not defined; import what they need at run time, and not under TYPE_CHECKING"""

    @overload
    async def overloaded(self, a: int) -> int: ...
    @overload
    async def overloaded(self, a: str) -> str: ...  # it is overloaded; write a method for each signature

    async def no_self() -> None:  # type: ignore[misc]
        """it has no self; write an ordinary method"""

    @staticmethod
    async def static(a: int) -> int: ...

    @classmethod
    async def of_class(cls, a: int) -> int: ...

    @property
    def size(self) -> int: ...

    @idempotent
    async def repeated_stream(self, a: AsyncIterable[int]) -> None:
        """a stream cannot be repeated; take @idempotent away"""

    @raises(NoDataclass)
    async def no_dataclass(self) -> None:
        """NoDataclass is not a dataclass; write @dataclass above it"""

    @raises(Frozen)
    async def frozen(self) -> None:
        """Frozen is frozen, and Python must set its traceback; take frozen away"""

    @raises(NoSuchFile, same_name())
    async def twice(self) -> None:
        """it raises two classes named NoSuchFile; rename one"""

    @raises(LONG)
    async def long(self) -> None:
        """is too long; the limit is 63 bytes"""

    @raises(HasSocket)
    async def odd_field(self) -> None:
        """HasSocket.socket: Plain does not travel"""

    @raises(HasExtra)
    async def extra_argument(self) -> None:
        """HasExtra: it takes extra, which is not one of its fields; give it a default"""

    @raises(HasCause)
    async def exception_in_an_error(self) -> None:
        """HasCause.cause: NoSuchFile inherits from Exception, and so cannot be made of its fields; write"""

    async def exception(self) -> list[NoSuchFile]:
        """it returns: NoSuchFile inherits from Exception, and so cannot be made of its fields; write a"""

    async def dictionary(self, a: Registry | None) -> None:
        """Registry inherits from dict"""

    @raises(HasDecimal)
    async def unknown_field(self) -> None:
        """HasDecimal: its annotations cannot be evaluated: name 'Decimal' is not defined"""

    async def class_variable(self, a: ClassVar[int]) -> None:  # type: ignore[misc]
        """ClassVar[int]"""

    async def final(self, a: Final[int]) -> None:  # type: ignore[valid-type]
        """Final[int] is not valid"""

    async def sends(self, a: trio.abc.SendChannel[int]) -> None:
        """parameter a is SendChannel[int]; write a callback to be given each item, or a stream of results"""

    async def unknown_alias(self, a: LOST) -> None:
        """parameter a is Lost, which cannot be evaluated: lost; import it at run time"""


EXPECTED: dict[str, str] = {
    **{name: str(member.__doc__) for name, member in vars(Wrong).items() if not name.startswith("_")},
    "overloaded": "it is overloaded; write a method for each signature",
    **dict.fromkeys(
        ("count", "LIMIT", "static", "of_class", "size"),
        "it is not a method; write an 'async def' method that returns it",
    ),
}


@pytest.fixture(scope="module")
def offences() -> list[str]:
    with pytest.raises(TypeError) as caught:
        inspect_interface(Wrong)
    first, *lines = str(caught.value).split("\n  ")
    assert first == "Wrong cannot be an interface"
    return lines


@pytest.mark.parametrize("name", EXPECTED)
def test_each_offence_is_told_with_what_to_write(name: str, offences: list[str]) -> None:
    text = EXPECTED[name]
    assert text
    if ": " in text and text.partition(":")[0] in {"Loud.shout", "Dunder", "Store"}:
        assert any(each.startswith(text) for each in offences)
    else:
        found = [each for each in offences if each.startswith(f"Wrong.{name}: ")]
        assert any(text in each for each in found), found


def test_nothing_else_is_told_and_nothing_twice(offences: list[str]) -> None:
    more = {"odd_callback": 2, "overloaded": 1}
    told = [each.partition(":")[0].removeprefix("Wrong.") for each in offences]
    assert len(offences) == len(set(offences))
    assert {each for each in told if told.count(each) != more.get(each, 1)} == {"generic"}
    assert set(told) == EXPECTED.keys() - {"wrong_protocol", "empty_protocol", "open_protocol"} | {
        *("Loud.shout", "Dunder", "Store")
    }


@pytest.mark.parametrize("wrong", [3, "Files", None, print, Callable[[int], Awaitable[None]]])
def test_what_is_no_class_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"an interface is a class|cannot be an interface"):
        inspect_interface(wrong)


class Open(Protocol[T]):  # type: ignore[misc]
    async def get(self) -> T: ...


def test_a_generic_interface_needs_its_types() -> None:
    with pytest.raises(TypeError, match=r"Open: T has no type; write Open\[int\], say"):
        inspect_interface(Open)


class Twice(Open[int], Protocol):
    count: int
    value: int


class Thrice(Twice, Protocol):
    count: int


def test_an_offence_that_is_inherited_is_told_once() -> None:
    with pytest.raises(TypeError) as caught:
        inspect_interface(Thrice)
    assert [line.partition(":")[0].strip() for line in str(caught.value).splitlines()[1:]] == [
        "Thrice.count",
        "Thrice.value",
    ]


class Nameless(Protocol):
    async def __call__(self, a: int) -> int: ...


def test_an_interface_is_no_callback() -> None:
    with pytest.raises(TypeError, match="only callbacks are called by no name; give the method a name"):
        inspect_interface(Nameless)


class TakesNameless(Protocol):
    async def use(self, a: Nameless) -> None: ...


def test_a_protocol_may_be_a_callback() -> None:
    reference = inspect_interface(TakesNameless).methods["use"].references[0].reference
    assert reference is not None
    assert list(reference.methods) == ["__call__"]


def test_an_empty_interface_is_refused() -> None:
    with pytest.raises(TypeError, match="Dunder: it has no methods; write 'async def' methods without '_'"):
        inspect_interface(Dunder)


def test_a_name_may_be_given_and_is_a_str() -> None:
    assert inspect_interface(Listener, "L").methods["heard"].path == "L.heard"
    assert inspect_interface(Listener, "L/2 \u00fc").name == "L/2 \u00fc"
    for wrong in ("", 3, "%x", "\0", "a\nb", "\udc80"):
        with pytest.raises(TypeError, match="a name of an interface is a printable str"):
            inspect_interface(Listener, wrong)  # type: ignore[arg-type]


class TakesPlain(Protocol):
    async def use(self, a: Plain) -> None: ...


def test_hooks_allow_other_types() -> None:
    assert inspect_interface(TakesPlain, has_hooks=True).methods["use"].parameters[0].type is Plain


@pytest.mark.parametrize("wrong", [(), (3,), (NoSuchFile("x"),), (BaseException,), (NoSuchFile, "x")])
def test_raises_takes_exception_classes(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"raises takes exception classes: @raises\(NoSuchFile\)"):
        raises(*wrong)


def test_raises_without_parentheses_is_refused_where_it_stands() -> None:
    async def stat(self: object) -> None: ...

    with pytest.raises(TypeError, match="raises takes exception classes"):
        raises(stat)  # type: ignore[arg-type]


class Two(Generic[T, U]):
    async def get(self, key: T) -> U: ...  # type: ignore[empty-body]


@dataclass
class Spot:
    x: int


class A(msgspec.Struct):
    pass


class B(msgspec.Struct):
    pass


@dataclass
class Unfinished:
    x: Missing  # type: ignore[name-defined]  # noqa: F821


class Coordinates(enum.Enum):
    A = (1, 2)


@pytest.mark.parametrize(
    ("annotation", "advice"),
    [
        (Stat | Spot, "write subclasses of msgspec.Struct with tag=True"),
        (A | B, "give each of them a tag of its own"),
        (str | bytes, "write a dataclass with a field for each"),
        (Coordinates, "give its members values of one of these types"),
        (Unfinished, "define it at the top of a module, and import it at run time"),
        (typing.Never, "write another type, or a dataclass"),
    ],
    ids=str,
)
def test_what_the_codec_cannot_take_is_told_with_what_to_write(annotation: Any, advice: str) -> None:
    class Wrong(Protocol):
        async def use(self, a: int) -> None: ...

    Wrong.use.__annotations__["a"] = annotation
    with pytest.raises(TypeError, match=f"Wrong.use: parameter a: .*; {advice}$"):
        inspect_interface(Wrong)


def test_a_generic_interface_is_told_how_many_types_it_takes() -> None:
    with pytest.raises(TypeError, match=r"Two: T, U has no type; write Two\[int, int\], say"):
        inspect_interface(Two)


@pytest.mark.parametrize(
    "wrong", [Listener | Plain, Listener | Two[int, str], typing.Annotated[Listener, "x"]], ids=str
)
def test_a_union_is_no_interface(wrong: Any) -> None:
    with pytest.raises(TypeError, match="an interface is a class, such as a Protocol, and not"):
        inspect_interface(wrong)
