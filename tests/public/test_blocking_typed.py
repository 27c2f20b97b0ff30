"""Typed calls for scripts: interfaces by blocking connections, with their streams."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Generator
from contextlib import AbstractAsyncContextManager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pytest
import trio
from trio.abc import ReceiveChannel

from bokbok_trio import ConnectionClosed, ProtocolError, Server, current_request, open_server
from bokbok_trio.blocking import Connection, Portal, Stream, connect
from bokbok_trio.interface import Call, Proceed, consume, expose, raises, with_options
from tests.support.helpers import documented_code
from tests.support.threads import Story, in_child, no_thread_but, sweep

STORY = Story()
NAME = ContextVar("NAME", default="nobody")


@dataclass
class Missing(Exception):
    what: str


class Shop(Protocol):
    """All that an interface may have."""

    @raises(Missing)
    async def price(self, what: str, *, count: int = 1) -> int: ...
    async def sleep(self) -> None: ...
    async def load(self, rows: AsyncIterable[int]) -> int: ...
    async def visit(self, see: Callable[[int], Awaitable[int]]) -> int: ...
    async def context(self) -> dict[str, bytes]: ...
    @raises(Missing)
    def count(self, upto: int) -> AbstractAsyncContextManager[ReceiveChannel[int]]: ...
    def double(self, rows: AsyncIterable[int]) -> AbstractAsyncContextManager[ReceiveChannel[int]]: ...


class Shopkeeper:
    async def price(self, what: str, *, count: int = 1) -> int:
        if what == "nothing":
            raise Missing(what)
        return len(what) * count

    async def sleep(self) -> None:
        STORY.tell(trio.current_effective_deadline() - trio.current_time())
        try:
            await trio.sleep_forever()
        finally:
            STORY.tell("cancelled")

    async def load(self, rows: AsyncIterable[int]) -> int:
        return sum([row async for row in rows])

    async def visit(self, see: Callable[[int], Awaitable[int]]) -> int:
        return await see(20) + 1

    async def context(self) -> dict[str, bytes]:
        return dict(current_request().context)

    async def count(self, upto: int) -> AsyncGenerator[int]:
        """Up to a number; from there on it waits if that is odd, and fails if it is negative."""
        try:
            for number in range(upto):
                yield number
            if upto < 0:
                raise Missing("numbers")
            if upto % 2:
                STORY.tell(trio.current_effective_deadline() - trio.current_time())
                await trio.sleep_forever()
        except BaseException as exc:
            STORY.tell(type(exc).__name__)
            raise

    async def double(self, rows: AsyncIterable[int]) -> AsyncGenerator[int]:
        async for row in rows:
            yield 2 * row


@pytest.fixture(autouse=True)
def leaves_no_thread() -> Generator[None]:
    STORY.forget()
    before = set(threading.enumerate())
    yield
    no_thread_but({thread for thread in threading.enumerate() if "Trio thread" in thread.name} | before)


def open_shop(path: Path) -> AbstractAsyncContextManager[Server]:
    keeper: Any = Shopkeeper()
    return open_server(f"{path}/s", expose(Shop, keeper))


@pytest.fixture
def address(tmp_path: Path) -> Generator[Any]:
    with Portal() as portal, portal.enter(open_shop(tmp_path)) as server:
        yield server.addresses[0]


@pytest.fixture
def c(address: Any) -> Generator[Connection]:
    with connect(address) as c:
        yield c


async def rows(*numbers: int) -> AsyncGenerator[int]:
    for number in numbers:
        yield number


# ---- calls ----


def test_a_call_has_its_arguments_result_and_errors(c: Connection) -> None:
    shop = c.consume(Shop)
    assert c.call(shop.price, "tea") == 3
    assert c.call(partial(shop.price, "tea", count=4), timeout=10) == 12
    assert [each.result(10) for each in [c.submit(shop.price, "a" * n) for n in range(20)]] == [*range(20)]
    with pytest.raises(Missing, match="nothing") as caught:
        c.call(shop.price, "nothing")
    assert caught.value.what == "nothing"
    with pytest.raises(TypeError, match="missing a required argument"):
        c.call(partial(shop.price))
    assert repr(shop) == f"<stand-in of Shop over {c.connection!r}>"


def test_streams_of_arguments_and_callbacks_are_async_and_run_in_the_trio_thread(c: Connection) -> None:
    async def see(number: int) -> int:
        STORY.tell(threading.current_thread().name)
        return 2 * number

    shop = c.consume(Shop)
    assert c.call(shop.load, rows(1, 2, 3)) == 6
    assert c.call(shop.visit, see) == 41
    assert STORY.next() == "bokbok_trio portal"


def test_a_thread_of_a_handler_does_not_close_what_waits_for_that_handler(address: Any) -> None:
    async def try_to_close(number: int) -> int:
        with pytest.raises(RuntimeError, match="would wait for the handler that calls it"):
            await trio.to_thread.run_sync(own.close)
        return number

    async def close(number: int) -> int:
        await own.connection.aclose()
        return number

    own = connect(address)
    shop = own.consume(Shop)
    assert isinstance(own.call(shop.visit, try_to_close), int)
    with pytest.raises(ConnectionClosed, match="this side closed the connection"):
        own.call(shop.visit, close)
    own.close()


def test_a_call_that_was_made_already_is_refused(c: Connection) -> None:
    shop: Any = c.consume(Shop)
    for act in (c.call, c.submit, c.portal.call, c.portal.submit):
        with pytest.raises(TypeError, match=r"an async function and its arguments, .*: call\(f, 1\)"):
            act(shop.price("tea"))
    with pytest.raises(TypeError, match="is not a stream: pass the result of a method that streams"):
        enter(c, shop.price)


def test_what_is_not_async_is_refused_by_its_name(c: Connection) -> None:
    shop: Any = c.consume(Shop)
    act: Any
    for act in (c.call, lambda *args: c.submit(*args).result(timeout=10), c.portal.call):
        with pytest.raises(TypeError, match=r"an async function: .*Shop.count.* returned .* to open_stream"):
            act(shop.count, 3)
        with pytest.raises(TypeError, match=r"an async function: <built-in function len> returned int$"):
            act(len, "abc")
    assert c.call(shop.price, "tea") == 3


@pytest.mark.parametrize("limit", ["5", b"5", 1j])
def test_a_time_limit_of_the_wrong_kind_is_named(limit: Any, c: Connection) -> None:
    for act in (
        lambda: c.request(["x"], timeout=limit),
        lambda: c.ping(timeout=limit),
        lambda: c.submit(c.connection.ping, timeout=limit),
        lambda: c.open_channel(["x"], timeout=limit).__enter__(),
    ):
        with pytest.raises(TypeError, match="timeout must be a number of seconds, not"):
            act()


def test_options_and_middleware_are_as_ever(c: Connection) -> None:
    async def log(call: Call, proceed: Proceed) -> Any:
        STORY.tell((call.method, NAME.get()))
        return await proceed(call)

    NAME.set("alice")  # as seen by what the calls of this thread run
    shop = with_options(c.consume(Shop, middleware=[log]), context={"trace": "7"})
    assert c.call(shop.context) == {"trace": b"7"}
    with c.open_stream(shop.count(2)) as numbers:
        assert list(numbers) == [0, 1]
    assert [STORY.next(), STORY.next()] == [("context", "alice"), ("count", "alice")]


def test_a_wrong_interface_or_name_is_told(c: Connection) -> None:
    with pytest.raises(TypeError, match="int cannot be an interface"):
        c.consume(int)
    with pytest.raises(Exception, match="no such method"):
        c.call(c.consume(Shop, name="Store").context)


def test_hooks_are_passed_on(c: Connection) -> None:
    class Paths(Protocol):
        async def price(self, what: Path) -> int: ...

    paths = c.consume(
        Paths,
        name="Shop",
        encode_hook=str,
        decode_hook=lambda cls, value: cls(value),
    )
    assert c.call(paths.price, Path("tea")) == 3


def test_a_time_limit_reaches_the_method(c: Connection) -> None:
    shop = c.consume(Shop)
    with pytest.raises(TimeoutError, match=r"longer than 0\.05 seconds"):
        c.call(shop.sleep, timeout=0.05)
    left = STORY.next()
    assert isinstance(left, float)
    assert 0 < left <= 0.05
    assert STORY.next() == "cancelled"


def test_this_side_may_serve_as_well(tmp_path: Path) -> None:
    class Asking:
        async def price(self, what: str, *, count: int = 1) -> int:
            shop = consume(current_request().connection, Shop)
            return 1 + await shop.price(what, count=count)

    class Prices(Protocol):
        async def price(self, what: str, *, count: int = 1) -> int: ...

    keeper: Any = Shopkeeper()
    with (
        Portal() as portal,
        portal.enter(open_server(f"{tmp_path}/s", expose(Prices, Asking()))) as server,
        connect(server.addresses[0], request_handler=expose(Shop, keeper)) as c,
    ):
        assert c.call(c.consume(Prices).price, "tea") == 4


def test_after_the_end_it_is_closed(address: Any) -> None:
    with connect(address) as c:
        shop = c.consume(Shop)
        with c.open_stream(shop.count(1)) as numbers:
            assert next(numbers) == 0
        with pytest.raises(ConnectionClosed):
            next(numbers)
    for act in (lambda: c.consume(Shop), lambda: c.call(shop.context), lambda: enter(c, shop.count(1))):
        with pytest.raises(ConnectionClosed, match="was closed"):
            act()


def enter(c: Connection, stream: Any) -> None:
    with c.open_stream(stream):
        raise AssertionError


# ---- streams ----


def test_a_stream_is_iterated_over(c: Connection) -> None:
    shop = c.consume(Shop)
    with c.open_stream(shop.count(4)) as numbers:
        assert isinstance(numbers, Stream)
        assert numbers.receive(timeout=10) == 0
        assert list(numbers) == [1, 2, 3]
        assert list(numbers) == []
        with pytest.raises(trio.EndOfChannel):
            numbers.receive()
    with c.open_stream(shop.double(rows(1, 2, 3))) as numbers:
        assert list(numbers) == [2, 4, 6]


def test_what_a_stream_raises_comes_after_its_items(c: Connection) -> None:
    shop = c.consume(Shop)
    with pytest.raises(Missing, match="numbers"), c.open_stream(shop.count(-1)) as numbers:
        next(numbers)
    assert STORY.next() == "Missing"
    with pytest.raises(TypeError, match="rows is a stream"):
        enter(c, shop.double([1]))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="can be entered once"):
        stream = shop.count(0)
        with c.open_stream(stream):
            pass
        enter(c, stream)


@pytest.mark.parametrize("error", [None, ValueError("x"), StopIteration("x"), GeneratorExit(), SystemExit(3)])
def test_leaving_a_stream_cancels_its_method(c: Connection, error: BaseException | None) -> None:
    shop = c.consume(Shop)
    with suppress(*[] if error is None else [type(error)]):
        with c.open_stream(shop.count(3)) as numbers:
            for number in numbers:
                if number == 2:
                    break
            assert STORY.next() == float("inf")
            if error is not None:
                raise error
    assert STORY.next() == "Cancelled"
    assert c.call(shop.price, "tea") == 3


def test_a_stream_may_have_a_time_limit_as_a_whole(c: Connection) -> None:
    shop = c.consume(Shop)
    with pytest.raises(TimeoutError, match=r"longer than 0\.05 seconds"):
        with c.open_stream(shop.count(1), timeout=0.05) as numbers:
            for _ in numbers:
                pass
    left = STORY.next()
    assert isinstance(left, float)
    assert 0 < left <= 0.05
    assert STORY.next() == "Cancelled"


def test_no_item_is_lost_by_a_time_limit(c: Connection) -> None:
    items, receive = trio.open_memory_channel[int](1)

    async def given() -> AsyncGenerator[int]:
        async for item in receive:
            yield item

    with c.open_stream(c.consume(Shop).double(given())) as numbers:
        with pytest.raises(TimeoutError):
            numbers.receive(timeout=0.01)
        c.call(items.send, 4)
        assert next(numbers) == 8


def test_a_wrong_item_is_told(c: Connection) -> None:
    class Texts(Protocol):
        def count(self, upto: int) -> AbstractAsyncContextManager[ReceiveChannel[str]]: ...

    with c.open_stream(c.consume(Texts, name="Shop").count(2)) as texts:
        with pytest.raises(ProtocolError, match="expected str, got int"):
            next(texts)


def test_a_stream_keeps_its_connection(address: Any) -> None:
    def open_one() -> AbstractAsyncContextManager[Any]:
        c = connect(address)
        return c.open_stream(c.consume(Shop).double(rows(1)))  # type: ignore[return-value]

    block: Any = open_one()
    with block as numbers:
        del block
        assert list(numbers) == [2]


# ---- interrupts ----


def use_all(address: Any) -> None:
    """Every kind of typed call."""
    with connect(address) as c:
        shop = c.consume(Shop)
        assert c.call(shop.price, "tea") == 3
        with suppress(TimeoutError):
            c.call(shop.sleep, timeout=0.001)
        with c.open_stream(shop.double(rows(1, 2))) as numbers:
            assert list(numbers) == [2, 4]


def test_ctrl_c_works_at_every_step_and_leaves_no_thread(tmp_path: Path) -> None:
    def act() -> str:
        with Portal() as portal, portal.enter(open_shop(tmp_path)):
            return sweep(lambda: use_all(tmp_path / "s"), 60)

    assert in_child(act) == "fine"


def test_ctrl_c_while_a_stream_waits(tmp_path: Path) -> None:
    def act() -> str:
        with (
            Portal() as portal,
            portal.enter(open_shop(tmp_path)),
            connect(tmp_path / "s") as c,
            suppress(KeyboardInterrupt),
            c.open_stream(c.consume(Shop).count(1)) as numbers,
        ):
            for _ in numbers:
                threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        STORY.next()
        return str(STORY.next())

    assert in_child(act) == "Cancelled"


# ---- the documentation ----


class Calculator:
    async def add(self, a: int, b: int) -> int:
        return a + b

    async def divide(self, a: float, b: float, *, digits: int = 9) -> float:
        return round(a / b, digits)

    async def total(self, numbers: AsyncIterable[int]) -> int:
        return sum([number async for number in numbers])

    async def count(self, upto: int) -> AsyncGenerator[int]:
        for number in range(upto):
            yield number


def test_the_program_of_the_documentation_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    [program] = documented_code("blocking.rst", "consume")
    names: dict[str, Any] = {}
    begin, rest = program.split("with connect(")
    exec(begin, names)
    exposed = expose(names["Calculator"], Calculator())
    with (
        Portal() as portal,
        portal.enter(open_server("127.0.0.1:0", exposed, user_key={"alice": names["key"]})) as server,
    ):
        exec("with connect(" + rest.replace("localhost:12345", str(server.addresses[0])), names)
    expected = re.findall(r"print\(.*\) +# (.*)", program)
    assert expected
    assert capsys.readouterr() == ("".join(f"{line}\n" for line in expected), "")
