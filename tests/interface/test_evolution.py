"""The table of changes in docs/interfaces.rst: each row is checked with an old and a new interface."""

# Annotations are no strings here: those of classes within functions could not be evaluated.

import re
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol, TypeAlias

import msgspec
import pytest
import trio

from bokbok_trio import ProtocolError, RemoteError
from bokbok_trio.interface import consume, expose, idempotent, raises
from bokbok_trio.testing import open_connection_pair

DOCS = (Path(__file__).parents[2] / "docs" / "interfaces.rst").read_text()
WORKS = "works"

Asking: TypeAlias = Callable[[Any], Awaitable[object]]

Check: TypeAlias = Callable[..., Awaitable[None]]


def read_table() -> dict[str, tuple[str, str]]:
    """What happens after each change: to an old caller, and to a new one whose server is old."""
    _, _, rest = DOCS.partition("The change ")
    _, body, *_ = re.split(r"(?m)^=+ +=+ +=+\n", rest)
    rows = [re.split(r" {2,}", line.strip()) for line in body.splitlines()]
    return {change: (old.strip("`"), new.strip("`")) for change, old, new in rows}


def as_name(row: str) -> str:
    return re.sub(r"\W+", "_", row.lower())


def test_every_row_of_the_table_has_its_test() -> None:
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {as_name(row) for row in read_table()} == tests - {"every_row_of_the_table_has_its_test"}


async def ask(served: type[object], called: type[object], call: Asking) -> object:
    """Return the result of a call, or the name of its exception."""
    async with open_connection_pair(server_handler=expose(served, served(), name="It")) as (client, _):
        try:
            return await call(consume(client, called, name="It"))
        except RemoteError as exc:
            return exc.code
        except ProtocolError:
            return "ProtocolError"


@pytest.fixture
def check(request: pytest.FixtureRequest) -> Check:
    """Compares what happens with the row that the test is named after.

    Called with an old and a new interface, which implement themselves; a call of each; and what these give
    where they work: one for both, or each its own.
    """
    rows = {as_name(row): told for row, told in read_table().items()}
    expected = rows[request.node.name.removeprefix("test_")]

    async def check(
        old: type[object], new: type[object], call_old: Asking, call_new: Asking, gives: object = None
    ) -> None:
        happened = (await ask(new, old, call_old), await ask(old, new, call_new))
        given = gives if isinstance(gives, tuple) else (gives, gives)
        assert happened == tuple(
            give if told == WORKS else told for told, give in zip(expected, given, strict=True)
        )

    return check


# ---- methods ----


class Store:
    """An interface that implements itself."""

    async def find(self, name: str) -> str:
        return name


async def find(it: Store) -> str:
    return await it.find("a")


async def test_a_method_is_added(check: Check) -> None:
    class New(Store):
        async def count(self) -> int:
            return 3

    await check(Store, New, find, lambda it: it.count(), gives="a")


async def test_a_method_is_removed(check: Check) -> None:
    class Old(Store):
        async def count(self) -> int:
            return 3

    await check(Old, Store, lambda it: it.count(), find, gives="a")


async def test_a_method_is_renamed(check: Check) -> None:
    class New:
        async def look_up(self, name: str) -> str:
            return name

    await check(Store, New, find, lambda it: it.look_up("a"))


async def test_a_method_becomes_idempotent_or_no_longer_is(check: Check) -> None:
    class New:
        @idempotent
        async def find(self, name: str) -> str:
            return name

    await check(Store, New, find, find, gives="a")
    await check(New, Store, find, find, gives="a")


async def test_a_parameter_or_a_result_becomes_a_stream(check: Check) -> None:
    class In:
        async def find(self, name: AsyncIterable[str]) -> str:
            return "".join([each async for each in name])

    class Out:
        def find(self, name: str) -> AbstractAsyncContextManager[trio.abc.ReceiveChannel[str]]:
            return as_channel([name])

    async def names() -> AsyncGenerator[str]:
        yield "a"

    async def receive(it: Out) -> str:
        async with it.find("a") as names:
            return await names.receive()

    async def stream(it: In) -> str:
        return await it.find(names())

    await check(Store, In, find, stream)
    await check(Store, Out, find, receive)


@asynccontextmanager
async def as_channel(items: list[str]) -> AsyncGenerator[trio.abc.ReceiveChannel[str]]:
    send, receive = trio.open_memory_channel[str](len(items))
    for item in items:
        send.send_nowait(item)
    send.close()
    yield receive


# ---- parameters ----


class WithLimit:
    async def find(self, name: str, *, limit: int = 3) -> str:
        return f"{name}{limit}"


class OtherLimit:
    async def find(self, name: str, *, limit: int = 5) -> str:
        return f"{name}{limit}"


class NeedsLimit:
    async def find(self, name: str, *, limit: int) -> str:
        return f"{name}{limit}"


async def find_limited(it: Any) -> str:
    found: str = await it.find("a", limit=3)
    return found


async def test_a_parameter_with_a_default_is_added_and_left_out(check: Check) -> None:
    await check(Store, WithLimit, find, find, gives=("a3", "a"))


async def test_a_parameter_with_a_default_is_added_and_given(check: Check) -> None:
    await check(Store, WithLimit, find, find_limited, gives="a3")


async def test_a_parameter_without_a_default_is_added(check: Check) -> None:
    await check(Store, NeedsLimit, find, find_limited)


async def test_a_parameter_gets_a_default_and_is_left_out(check: Check) -> None:
    await check(NeedsLimit, WithLimit, find_limited, find, gives="a3")


async def test_a_parameter_with_a_default_is_removed(check: Check) -> None:
    await check(WithLimit, Store, find_limited, find, gives="a3")


async def test_a_parameter_is_renamed(check: Check) -> None:
    class New:
        async def find(self, key: str) -> str:
            return key

    await check(Store, New, find, find)


async def test_parameters_change_places_or_become_keyword_only(check: Check) -> None:
    class Old:
        async def join(self, a: str, b: str, c: str = "3") -> str:
            return a + b + c

    class New:
        async def join(self, b: str, a: str, *, c: str = "3") -> str:
            return a + b + c

    await check(Old, New, lambda it: it.join("1", "2", "3"), lambda it: it.join("2", "1", c="3"), gives="123")


async def test_a_default_changes(check: Check) -> None:
    await check(WithLimit, OtherLimit, find, find, gives=("a5", "a3"))


async def test_a_parameter_takes_more_types_or_wider_bounds(check: Check) -> None:
    await check(Narrow, Wide, lambda it: it.find(1), lambda it: it.find("a"), gives="1")
    await check(Bounded, Narrow, lambda it: it.find(1), lambda it: it.find(-1), gives="1")


async def test_a_parameter_takes_fewer_types_or_closer_bounds(check: Check) -> None:
    await check(Wide, Narrow, lambda it: it.find("a"), lambda it: it.find(1), gives="1")
    await check(Narrow, Bounded, lambda it: it.find(-1), lambda it: it.find(1), gives="1")


class Narrow:
    async def find(self, name: int) -> str:
        return str(name)


class Wide:
    async def find(self, name: int | str) -> str:
        return str(name)


class Bounded:
    async def find(self, name: Annotated[int, msgspec.Meta(ge=0)]) -> str:
        return str(name)


# ---- results ----


class MayFind:
    async def find(self, name: str) -> str | None:
        return None


async def test_a_result_has_more_types(check: Check) -> None:
    await check(Store, MayFind, find, find, gives="a")


async def test_a_result_has_fewer_types(check: Check) -> None:
    await check(MayFind, Store, find, find, gives="a")


# ---- dataclasses ----


@dataclass
class Job:
    name: str


@dataclass
class JobWithDefault:
    name: str
    priority: int = 3


@dataclass
class FullJob:
    name: str
    priority: int


class JobStruct(msgspec.Struct):
    name: str


class JobTuple(NamedTuple):
    name: str


def echo_of(type: Any) -> Any:
    """An interface with a method that returns its argument, of this type."""

    class Echo:
        async def echo(self, value: type) -> type:
            return value

    return Echo


def taker_of(type: Any) -> Any:
    """An interface with a method that takes an argument of this type."""

    class Taker:
        async def take(self, value: type) -> str:
            return "taken"

    return Taker


def giver_of(type: Any, value: object) -> Any:
    """An interface with a method that returns a value of this type."""

    class Giver:
        async def give(self) -> type:
            return value

    return Giver


def echoes(value: object) -> Asking:
    return lambda it: it.echo(value)


def takes(value: object) -> Asking:
    return lambda it: it.take(value)


async def give(it: Any) -> object:
    given: object = await it.give()
    return given


async def test_a_field_with_a_default_is_added_to_a_dataclass(check: Check) -> None:
    new = JobWithDefault("a", 5)
    gives = (Job("a"), JobWithDefault("a", 3))
    await check(echo_of(Job), echo_of(JobWithDefault), echoes(Job("a")), echoes(new), gives=gives)


async def test_a_field_with_a_default_is_removed_from_a_dataclass(check: Check) -> None:
    old = JobWithDefault("a", 5)
    gives = (JobWithDefault("a", 3), Job("a"))
    await check(echo_of(JobWithDefault), echo_of(Job), echoes(old), echoes(Job("a")), gives=gives)


async def test_a_field_without_a_default_is_added_to_an_argument(check: Check) -> None:
    calls = takes(Job("a")), takes(FullJob("a", 3))
    await check(taker_of(Job), taker_of(FullJob), *calls, gives="taken")


async def test_a_field_without_a_default_is_removed_from_an_argument(check: Check) -> None:
    calls = takes(FullJob("a", 3)), takes(Job("a"))
    await check(taker_of(FullJob), taker_of(Job), *calls, gives="taken")


async def test_a_field_without_a_default_is_added_to_a_result(check: Check) -> None:
    types = giver_of(Job, Job("a")), giver_of(FullJob, FullJob("a", 3))
    await check(*types, give, give, gives=Job("a"))


async def test_a_field_without_a_default_is_removed_from_a_result(check: Check) -> None:
    types = giver_of(FullJob, FullJob("a", 3)), giver_of(Job, Job("a"))
    await check(*types, give, give, gives=Job("a"))


async def test_a_dataclass_is_renamed_or_becomes_a_struct(check: Check) -> None:
    calls = echoes(Job("a")), echoes(JobStruct("a"))
    await check(echo_of(Job), echo_of(JobStruct), *calls, gives=(Job("a"), JobStruct("a")))


async def test_a_dataclass_becomes_a_namedtuple(check: Check) -> None:
    await check(echo_of(Job), echo_of(JobTuple), echoes(Job("a")), echoes(JobTuple("a")))


async def test_a_list_becomes_a_set_or_a_tuple(check: Check) -> None:
    for type, value in ((set[int], {1}), (tuple[int, ...], (1,))):
        calls = echoes([1]), echoes(value)
        await check(echo_of(list[int]), echo_of(type), *calls, gives=([1], value))


class Color(Enum):
    RED = "red"


class MoreColor(Enum):
    RED = "red"
    BLUE = "blue"


async def test_a_member_is_added_to_an_enum_of_arguments(check: Check) -> None:
    calls = takes(Color.RED), takes(MoreColor.BLUE)
    await check(taker_of(Color), taker_of(MoreColor), *calls, gives="taken")


async def test_a_member_is_added_to_an_enum_of_results(check: Check) -> None:
    types = giver_of(Color, Color.RED), giver_of(MoreColor, MoreColor.BLUE)
    await check(*types, give, give, gives=MoreColor.RED)


# ---- exceptions ----


@dataclass
class NoSuchFile(Exception):
    path: str


class Declares:
    @raises(NoSuchFile)
    async def stat(self, path: str) -> int:
        raise NoSuchFile(path)


class DeclaresNot:
    async def stat(self, path: str) -> int:
        raise NoSuchFile(path)


async def stat(it: Declares | DeclaresNot) -> object:
    try:
        return await it.stat("a")
    except NoSuchFile as exc:
        return exc.path


async def test_an_exception_is_declared(check: Check) -> None:
    await check(DeclaresNot, Declares, stat, stat)


async def test_an_exception_is_no_longer_declared(check: Check) -> None:
    await check(Declares, DeclaresNot, stat, stat)


async def test_a_field_with_a_default_is_added_to_an_exception(check: Check) -> None:
    @dataclass
    class WithReason(Exception):
        path: str
        reason: str = "it is not there"

    WithReason.__name__ = NoSuchFile.__name__

    class New:
        @raises(WithReason)
        async def stat(self, path: str) -> int:
            raise WithReason(path, "a reason")

    async def stat_with_reason(it: New) -> object:
        try:
            return await it.stat("a")
        except WithReason as exc:
            return exc.path, exc.reason

    await check(Declares, New, stat, stat_with_reason, gives=("a", ("a", "it is not there")))


# ---- what is lent ----


async def test_a_parameter_of_a_callback_is_added(check: Check) -> None:
    class Old:
        async def copy(self, progress: Callable[[float], Awaitable[None]]) -> None:
            await progress(0.5)

    class New:
        async def copy(self, progress: Callable[[float, str], Awaitable[None]]) -> None:
            await progress(0.5, "half")

    async def show(done: float, text: str = "") -> None:
        raise AssertionError

    await check(Old, New, lambda it: it.copy(show), lambda it: it.copy(show))


async def test_a_method_is_added_to_an_object_that_is_lent(check: Check) -> None:
    class Screen(Protocol):
        async def show(self, text: str) -> str: ...

    class NewScreen(Screen, Protocol):
        async def clear(self) -> None: ...

    class Terminal:
        async def show(self, text: str) -> str:
            return text

        async def clear(self) -> None: ...

    class Old:
        async def draw(self, screen: Screen) -> str:
            return await screen.show("drawn")

    class New:
        async def draw(self, screen: NewScreen) -> str:
            await screen.clear()
            return await screen.show("drawn")

    await check(Old, New, lambda it: it.draw(Terminal()), lambda it: it.draw(Terminal()), gives="drawn")
