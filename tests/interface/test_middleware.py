"""Middleware on both sides, around calls and streams, and the scope of its context variables."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol

import pytest
import trio
from trio.abc import ReceiveChannel
from trio.testing import MockClock

from bokbok_trio import RemoteError, RequestError, current_request
from bokbok_trio.interface import Call, Proceed, consume, expose, raises, with_options
from bokbok_trio.testing import consume_local, open_connection_pair
from tests.support.helpers import settle

USER: ContextVar[str] = ContextVar("user", default="nobody")


@dataclass
class Denied(Exception):
    method: str


class Things(Protocol):
    async def get(self, key: str, default: int = 0) -> int: ...
    @raises(Denied)
    async def put(self, key: str, value: int = 1) -> None: ...
    async def who(self, wait: bool = False) -> str: ...
    def follow(self, key: str = "") -> AbstractAsyncContextManager[ReceiveChannel[str]]: ...
    async def load(self, rows: AsyncIterable[int]) -> int: ...
    async def each(self, visit: Callable[[str], Awaitable[None]]) -> None: ...


class Implementation:
    def __init__(self) -> None:
        self.calls: list[str] = []

    async def get(self, key: str, default: int = 40) -> int:
        self.calls.append(f"get {key} {default}")
        if key == "missing":
            raise KeyError(key)
        return default

    async def put(self, key: str, value: int = 1) -> None:
        self.calls.append(f"put {key}")

    async def who(self, wait: bool = False) -> str:
        if wait:
            await settle()
        return USER.get()

    async def follow(self, key: str = "") -> AsyncGenerator[str]:
        try:
            yield USER.get()
            if key == "failing":
                raise KeyError(key)
            if key == "endless":
                await trio.sleep_forever()
            yield key
        finally:
            self.calls.append("follow ended")

    async def load(self, rows: AsyncIterable[int]) -> int:
        return sum([row async for row in rows])

    async def each(self, visit: Callable[[str], Awaitable[None]]) -> None:
        await visit(USER.get())


class Log:
    """Middleware that records its calls."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.lines: list[str] = []

    async def __call__(self, call: Call, proceed: Proceed) -> Any:
        self.lines.append(f"{self.name}> {call.interface}.{call.method} {dict(call.arguments)!r}")
        try:
            result = await proceed(call)
        except BaseException as exc:
            self.lines.append(f"{self.name}! {type(exc).__name__}")
            raise
        self.lines.append(f"{self.name}< {result!r}")
        return result


@asynccontextmanager
async def open_things(*, client: Any = (), server: Any = ()) -> AsyncGenerator[tuple[Things, Implementation]]:
    """Middleware of both sides, a stand-in, and its implementation."""
    things: Any = Implementation()
    async with open_connection_pair(server_handler=expose(Things, things, middleware=server)) as (ours, _):
        yield consume(ours, Things, middleware=client), things


class Echo(Protocol):
    def echo(self, words: AsyncIterable[str]) -> AbstractAsyncContextManager[ReceiveChannel[str]]: ...


class Echoing:
    async def echo(self, words: AsyncIterable[str]) -> AsyncGenerator[str]:
        async for word in words:
            yield word


@asynccontextmanager
async def open_echo(*middleware: Any) -> AsyncGenerator[Echo]:
    """A stand-in with middleware of its side."""
    echoing: Any = Echoing()
    async with open_connection_pair(server_handler=expose(Echo, echoing)) as (client, _):
        yield consume(client, Echo, middleware=middleware)


SIDES = pytest.mark.parametrize("side", ["client", "server"])


# ---- calls ----


@SIDES
async def test_it_sees_each_call_and_its_result(side: str) -> None:
    log = Log()
    async with open_things(**{side: [log]}) as (things, _):
        assert await things.get("a", default=3) == 3
        assert await things.put("b") is None  # type: ignore[func-returns-value]
    assert log.lines == [
        "> Things.get {'key': 'a', 'default': 3}",
        "< 3",
        "> Things.put {'key': 'b'}",
        "< None",
    ]


@SIDES
async def test_the_first_is_outermost(side: str) -> None:
    lines: list[str] = []
    logs = [Log("a"), Log("b")]
    for each in logs:
        each.lines = lines
    async with open_things(**{side: logs}) as (things, _):
        await things.get("x", 1)
    assert [line[:2] for line in lines] == ["a>", "b>", "b<", "a<"]


@SIDES
async def test_it_may_change_arguments_and_results(side: str) -> None:
    async def change(call: Call, proceed: Proceed) -> Any:
        arguments = dict(call.arguments, default=7)
        return 10 * await proceed(replace(call, arguments=arguments))

    async with open_things(**{side: [change]}) as (things, implementation):
        assert await things.get("a") == 70
        assert implementation.calls == ["get a 7"]


@SIDES
async def test_it_may_answer_for_itself(side: str) -> None:
    async def cached(call: Call, proceed: Proceed) -> Any:
        return 99

    async with open_things(**{side: [cached]}) as (things, implementation):
        assert await things.get("a") == 99
        assert not implementation.calls


@SIDES
async def test_it_may_refuse(side: str) -> None:
    async def refuse(call: Call, proceed: Proceed) -> Any:
        if call.method == "put":
            raise Denied(call.method)
        raise RequestError("not for you", code="forbidden")

    async with open_things(**{side: [refuse]}) as (things, implementation):
        with pytest.raises(Denied) as denied:
            await things.put("a")
        assert denied.value.method == "put"
        with pytest.raises((RemoteError, RequestError), match=r"not for you \[forbidden\]"):
            await things.get("a")
        assert not implementation.calls


@SIDES
async def test_it_may_try_again(side: str) -> None:
    tries = 0

    async def retry(call: Call, proceed: Proceed) -> Any:
        nonlocal tries
        for _ in range(2):
            tries += 1
            try:
                return await proceed(call)
            except (RemoteError, KeyError):
                call = replace(call, arguments={"key": "there"})
        raise AssertionError

    async with open_things(**{side: [retry]}) as (things, implementation):
        assert await things.get("missing") == 40
        assert implementation.calls == ["get missing 40", "get there 40"]


@SIDES
async def test_it_sees_what_goes_wrong(side: str) -> None:
    log = Log()
    async with open_things(**{side: [log]}) as (things, _):
        with pytest.raises(RemoteError, match="KeyError"):
            await things.get("missing")
    assert log.lines[1:] == ["! RemoteError" if side == "client" else "! KeyError"]


async def test_a_result_of_middleware_is_checked_as_one_of_the_method() -> None:
    async def wrong(call: Call, proceed: Proceed) -> Any:
        return "x"

    async with open_things(server=[wrong]) as (things, _):
        with pytest.raises(
            RemoteError, match=r"Things\.get returned a value that its interface does not allow"
        ):
            await things.get("a")


async def test_wrong_arguments_never_reach_it() -> None:
    log = Log()
    wrong: Any = 3
    async with open_things(server=[log]) as (things, _):
        with pytest.raises(RemoteError, match="expected str, got int"):
            await things.get(wrong)
    assert not log.lines


async def test_it_knows_context_and_connection_and_may_change_the_context() -> None:
    seen: list[Any] = []

    async def trace(call: Call, proceed: Proceed) -> Any:
        return await proceed(replace(call, context={**call.context, "trace": "7"}))

    async def look(call: Call, proceed: Proceed) -> Any:
        seen.extend([dict(call.context), call.connection is current_request().connection])
        return await proceed(call)

    async with open_things(client=[trace], server=[look]) as (things, _):
        await with_options(things, context={"a": "b"}).get("x")
        async with with_options(things, context={"a": "b"}).follow() as items:
            await items.receive()
    assert seen == 2 * [{"a": b"b", "trace": b"7"}, True]


@pytest.mark.parametrize("wrong", [3, [None], ["log"]])
def test_what_is_no_middleware_is_refused(wrong: Any) -> None:
    things: Any = Implementation()
    with pytest.raises(TypeError):
        expose(Things, things, middleware=wrong)


# ---- streams ----


@SIDES
async def test_a_call_lasts_as_long_as_its_stream(side: str) -> None:
    log = Log()
    async with open_things(**{side: [log]}) as (things, _):
        async with things.follow("k") as items:
            assert await items.receive() == "nobody"
            assert log.lines[0] == "> Things.follow {'key': 'k'}"
            assert len(log.lines) == 1 or side == "server"  # which is ahead
            assert [item async for item in items] == ["k"]
        await settle()
        assert log.lines[1:] == ["< None"]
        assert await things.load(numbers(4)) == 6
    assert log.lines[2].startswith("> Things.load {'rows': <")
    assert log.lines[3] == "< 6"


async def numbers(count: int) -> AsyncGenerator[int]:
    for number in range(count):
        yield number


async def test_the_server_sees_a_stream_that_is_left_as_cancelled() -> None:
    log = Log()
    async with open_things(server=[log]) as (things, implementation):
        async with things.follow("endless") as items:
            await items.receive()
        await settle()
        assert implementation.calls == ["follow ended"]
    assert log.lines[1:] == ["! Cancelled"]


async def test_the_client_sees_a_stream_that_is_left_as_ended() -> None:
    log = Log()
    async with open_things(client=[log]) as (things, _):
        async with things.follow("endless") as items:
            await items.receive()
        assert log.lines[1:] == ["< None"]


async def test_the_client_sees_what_the_block_raises_and_may_translate_it() -> None:
    async def translate(call: Call, proceed: Proceed) -> Any:
        try:
            return await proceed(call)
        except RemoteError as exc:
            raise LookupError(exc.message) from exc
        except ZeroDivisionError:
            return None

    async with open_things(client=[translate]) as (things, _):
        with pytest.raises(LookupError, match="KeyError"):
            async with things.follow("failing") as items:
                [item async for item in items]
        async with things.follow("endless"):
            raise ZeroDivisionError  # which the middleware keeps
        with pytest.raises(KeyError, match="mine"):
            async with things.follow("endless"):
                raise KeyError("mine")


async def test_streams_may_be_changed_on_their_way() -> None:
    async def double(call: Call, proceed: Proceed) -> Any:
        async def doubled(rows: AsyncIterable[int]) -> AsyncGenerator[int]:
            async for row in rows:
                yield 2 * row

        if "rows" in call.arguments:
            call = replace(call, arguments={"rows": doubled(call.arguments["rows"])})
        return await proceed(call)

    async with open_things(client=[double], server=[double]) as (things, _):
        assert await things.load(numbers(4)) == 24


async def test_a_stream_that_is_not_proceeded_with_is_an_error() -> None:
    async def lazy(call: Call, proceed: Proceed) -> Any:
        return None

    async with open_things(client=[lazy]) as (things, _):
        with pytest.raises(RuntimeError, match=r"middleware did not proceed with a stream of Things\.follow"):
            async with things.follow():
                raise AssertionError
    async with open_things(server=[lazy]) as (things, _):
        async with things.follow() as items:
            assert [item async for item in items] == []


async def test_a_stream_that_is_refused_raises_on_entering() -> None:
    async def refuse(call: Call, proceed: Proceed) -> Any:
        raise Denied(call.method)

    async with open_things(client=[refuse]) as (things, _):
        with pytest.raises(Denied):
            async with things.follow():
                raise AssertionError


async def test_a_stream_may_be_proceeded_with_once() -> None:
    outcome: list[BaseException] = []

    async def twice(call: Call, proceed: Proceed) -> Any:
        await proceed(call)
        try:
            return await proceed(call)
        except BaseException as exc:
            outcome.append(exc)
            raise

    async with open_things(client=[twice]) as (things, implementation):
        with pytest.raises(RuntimeError, match=r"middleware proceeded twice with a stream of Things\.follow"):
            async with things.follow("endless") as items:
                await items.receive()
        await settle()
        assert implementation.calls.count("follow ended") >= 1
    assert len(outcome) == 1


async def test_a_stream_both_ways_may_be_proceeded_with_once() -> None:
    async def twice(call: Call, proceed: Proceed) -> Any:
        await proceed(call)
        return await proceed(call)

    async def words() -> AsyncGenerator[str]:
        yield "a"
        await trio.sleep_forever()

    async with open_echo() as plain, open_echo(twice) as echo:
        for _ in range(2):  # nothing is left of the first one
            with pytest.raises(RuntimeError, match=r"middleware proceeded twice with a stream of Echo\.echo"):
                async with echo.echo(words()) as items:
                    assert await items.receive() == "a"
        async with plain.echo(words()) as items:
            assert await items.receive() == "a"


async def test_a_stream_that_failed_before_it_began_may_be_tried_again() -> None:
    tries: list[BaseException] = []

    async def retry(call: Call, proceed: Proceed) -> Any:
        try:
            return await proceed(replace(call, context={"No": "such name"}))
        except ValueError as exc:
            tries.append(exc)
            return await proceed(call)

    async with open_things(client=[retry]) as (things, _), things.follow("x") as items:
        assert [item async for item in items] == ["nobody", "x"]
    assert len(tries) == 1


async def test_a_stream_must_be_proceeded_with_in_the_same_task() -> None:
    async def in_a_nursery(call: Call, proceed: Proceed) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(proceed, call)

    async with open_things(client=[in_a_nursery]) as (things, _):
        with pytest.raises(ExceptionGroup) as caught:
            async with things.follow():
                raise AssertionError
        [error] = caught.value.exceptions
        assert "in a task of a nursery; await proceed itself" in str(error)
        await things.put("a")


async def test_a_time_limit_of_the_middlewares_holds_for_the_block(autojump_clock: MockClock) -> None:
    async def limit(call: Call, proceed: Proceed) -> Any:
        with trio.fail_after(5):
            return await proceed(call)

    async with open_things(client=[limit]) as (things, _):
        began = trio.current_time()
        with pytest.raises(trio.TooSlowError):
            async with things.follow("endless") as items:
                [item async for item in items]
        assert trio.current_time() - began == pytest.approx(5)
        async with things.follow("endless") as items:
            await items.receive()


async def test_callbacks_go_through_it_as_arguments() -> None:
    seen: list[str] = []

    async def visit(value: str) -> None:
        seen.append(value)

    async def wrap(call: Call, proceed: Proceed) -> Any:
        if call.method != "each":
            return await proceed(call)

        async def twice(value: str) -> None:
            await call.arguments["visit"](value + "!")

        return await proceed(replace(call, arguments={"visit": twice}))

    async with open_things(client=[wrap], server=[wrap]) as (things, _):
        await things.each(visit)
    assert seen == ["nobody!!"]


# ---- context variables ----


def as_user(name: str) -> Any:
    async def middleware(call: Call, proceed: Proceed) -> Any:
        USER.set(name)
        return await proceed(call)

    return middleware


async def test_what_is_set_before_is_seen_by_the_method_and_by_no_other_call() -> None:
    """A method that does not wait runs in the task that reads, and others after it in the same one."""

    async def by_key(call: Call, proceed: Proceed) -> Any:
        if call.context:
            USER.set(call.context["user"].decode())  # type: ignore[union-attr]
        return await proceed(call)

    async with open_things(server=[by_key]) as (things, _):
        answers: dict[str, str] = {}

        async def ask(user: str, wait: bool) -> None:
            stand_in = with_options(things, context={"user": user}) if user else things
            answers[f"{user} {wait}"] = await stand_in.who(wait)

        async with trio.open_nursery() as nursery:
            for wait in (False, True, False):
                for user in ("alice", "", "bob", ""):
                    nursery.start_soon(ask, user, wait)
        assert answers == {
            f"{user} {wait}": user or "nobody" for user in ("alice", "", "bob") for wait in (False, True)
        }
        async with with_options(things, context={"user": "carol"}).follow() as items:
            assert await items.receive() == "carol"
        async with things.follow() as items:
            assert await items.receive() == "nobody"
        assert await things.who() == "nobody"
    assert USER.get() == "nobody"


async def test_what_is_set_on_the_callers_side_does_not_stay_there(autojump_clock: MockClock) -> None:
    seen: list[str] = []

    async def look(call: Call, proceed: Proceed) -> Any:
        try:
            return await proceed(call)
        finally:
            seen.append(USER.get())

    async def visit(value: str) -> None:
        seen.append(value)

    async with open_things(client=[as_user("alice"), look]) as (things, _):
        assert await things.who(wait=True) == "nobody"  # it does not travel
        assert await things.load(generator_that_looks(seen)) == 1
        async with things.follow() as items:
            assert USER.get() == "nobody"
            await items.receive()
            USER.set("block")
        assert USER.get() == "block"
        await things.each(visit)
    assert seen == ["alice", "alice", "alice", "alice", "nobody", "alice"]


async def generator_that_looks(seen: list[str]) -> AsyncGenerator[int]:
    """It is pulled for the call, and so sees what the call does."""
    seen.append(USER.get())
    yield 1


async def test_a_callers_cancellation_and_failure_go_through_it(autojump_clock: MockClock) -> None:
    log = Log()
    async with open_things(client=[log]) as (things, _):
        with trio.move_on_after(1) as scope:
            async with things.follow("endless") as items:
                await items.receive()
                await items.receive()
        assert scope.cancelled_caught
        with trio.move_on_after(0):
            await things.get("a")
        assert [line for line in log.lines if line.startswith("!")] == ["! Cancelled", "! Cancelled"]


async def test_what_is_thrown_into_a_call_goes_through_it() -> None:
    """As by who runs coroutines by hand, or where a coroutine is dropped half-way."""
    log = Log()
    async with open_things(client=[log]) as (things, _):
        call: Any = things.who(wait=True)
        call.send(None)
        with pytest.raises(KeyError, match="thrown"):
            call.throw(KeyError("thrown"))
        call = things.who(wait=True)
        call.send(None)
        call.close()
    assert [line for line in log.lines if line.startswith("!")] == ["! KeyError", "! GeneratorExit"]


async def test_consume_local_takes_it_for_the_serving_side() -> None:
    async with consume_local(Things, Implementation(), middleware=[as_user("local")]) as things:
        assert await things.who() == "local"


def test_middleware_is_a_list() -> None:
    log: Any = Log()

    async def timing(call: Call, proceed: Proceed) -> Any: ...

    for wrong, name in ((timing, "timing"), (log, "...")):
        with pytest.raises(TypeError) as caught:
            expose(Things, Implementation(), middleware=wrong)  # type: ignore[arg-type]
        assert str(caught.value) == f"middleware is a list: write middleware=[{name}]"
