"""Callbacks and objects that are lent for a call: called in turn, failing."""

from __future__ import annotations

from collections.abc import Awaitable
from functools import partial
from typing import Any

import pytest
import trio

from bokbok_trio import RemoteError, RequestError, current_request
from bokbok_trio.interface import consume, expose
from bokbok_trio.testing import consume_local, open_connection_pair

from ..support.helpers import echo
from ..support.lending import (
    TERMINAL,
    Half,
    Note,
    Screen,
    Terminal,
    Work,
    Worker,
    check_usable,
    note,
    open_work,
    rows,
)

# ---- called ----


@pytest.mark.parametrize("client_handler", [None, echo, expose(Screen, TERMINAL)])
async def test_a_callback_is_called_whatever_the_connection_has_for_a_handler(client_handler: Any) -> None:
    async with open_work(client_handler) as (work, _, client):
        assert await work.run(note) == 15
        assert await work.run(progress=note) == 15
        await check_usable(work, client)


@pytest.mark.parametrize(
    ("how", "result"),
    [
        ("show", 5),
        ("refused", "quiet"),
        ("keys", ["0", "1", "2"]),
        ("first key", "0"),
        ("paint", 4),
        ("twice", "a!!"),
    ],
)
async def test_an_object_is_called_by_all_its_methods(how: str, result: object) -> None:
    async with open_work() as (work, _, client):
        terminal: Any = Terminal()
        assert await work.use(terminal, how) == result
        if how == "show":
            assert terminal.shown == ["hello", True]
        await check_usable(work, client)


async def test_only_what_its_interface_names_can_be_called() -> None:
    async with open_work() as (work, _, _):
        terminal: Any = Terminal()
        await work.use(terminal, "unknown")


async def test_none_and_nothing_are_lent_as_such() -> None:
    async with open_work() as (work, _, _):
        terminal: Any = Terminal()
        assert await work.maybe() == "False False"
        assert await work.maybe(None) == "False False"
        assert await work.maybe(note, None) == "True False"
        assert await work.maybe(screen=terminal) == "False True"


async def test_a_callback_may_have_names_for_its_arguments() -> None:
    async def call(value: int, *, name: str = "z") -> str:
        return f"{value}{name} "

    async with open_work() as (work, _, _):
        assert await work.named(call) == "1z 2y "


async def test_all_kinds_of_async_callables_do() -> None:
    class Caller:
        async def __call__(self, value: float) -> int:
            return 1

        async def method(self, value: float) -> int:
            return 2

    async def add(a: int, value: float) -> int:
        return a

    async with open_work() as (work, _, _):

        def add_four(value: float) -> Awaitable[int]:
            return add(4, value)

        callables: list[tuple[Note, int]] = [
            (Caller(), 2),
            (Caller().method, 4),
            (partial(add, 3), 6),
            (add_four, 8),
            (lambda value: add(5, value), 10),
        ]
        for each, result in callables:
            assert await work.run(each) == result


def sync_note(value: float) -> int:
    return 1


class SyncCaller:
    def __call__(self, value: float) -> int:
        return 1


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (3, "int does not implement progress\n  __call__: it is 3, not a method"),
        (TERMINAL, "Terminal does not implement progress\n  __call__: it is <.*>, not a method"),
        (None, "NoneType does not implement progress\n  __call__: it is missing"),
        (len, "len does not implement progress\n  __call__: it is not async; write 'async def'"),
        (sync_note, "sync_note does not implement progress\n  __call__: it is not async"),
        (SyncCaller(), "SyncCaller does not implement progress\n  __call__: it is not async"),
        (rows, "rows does not implement progress\n  __call__: it is an async generator"),
        (Terminal, "Terminal is a class, and progress is served by an object"),
    ],
)
async def test_what_is_no_async_callable_is_a_type_error_here(wrong: Any, text: str) -> None:
    async with open_work() as (work, _, client):
        with pytest.raises(TypeError, match=text):
            await work.run(wrong)
        await check_usable(work, client)


async def test_what_only_its_call_shows_to_be_sync_fails_then(caplog: pytest.LogCaptureFixture) -> None:
    def unknown(value: NoSuchType) -> None:  # type: ignore[name-defined]  # noqa: F821
        pass

    async with open_work() as (work, _, client):
        wrong: list[Any] = [lambda _value: 1, unknown]
        for each in wrong:
            with pytest.raises(RemoteError, match="can't be used in 'await' expression"):
                await work.run(each)
        assert caplog.text.count("Traceback") == 4  # of the callback, and of the method, each time
        await check_usable(work, client)


async def test_an_object_without_its_interface_is_a_type_error_here() -> None:
    async with open_work() as (work, _, client):
        half: Any = Half()
        with pytest.raises(TypeError) as caught:
            await work.use(half)
        assert str(caught.value).splitlines() == [
            "Half does not implement Screen",
            "  show: it does not take loud; add it",
            "  keys: it is missing",
            "  paint: it is missing",
            "  twice: it is missing",
        ]
        with pytest.raises(TypeError, match="NoneType does not implement Screen"):
            await work.use(None)  # type: ignore[arg-type]
        await check_usable(work, client)


async def test_a_call_that_does_not_fit_a_callback_is_a_type_error_there() -> None:
    class Wrong(Worker):
        async def run(self, progress: Any) -> Any:
            for args in ((), (1, 2)):
                with pytest.raises(TypeError, match="argument"):
                    await progress(*args)
            with pytest.raises(TypeError, match="unexpected keyword argument"):
                await progress(1, value=2)
            with pytest.raises(RemoteError, match=r"\$\[0\]: expected float, got str") as caught:
                await progress("x")
            assert caught.value.code == "bad-arguments"
            return await progress(1)

    async with consume_local(Work, Wrong()) as work:
        assert await work.run(note) == 10


# ---- failing ----


async def test_a_failing_callback_fails_where_it_is_called(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(value: float) -> int:
        raise KeyError("broken")

    async with open_work() as (work, _, client):
        with pytest.raises(RemoteError, match="RemoteError: KeyError: 'broken'"):
            await work.run(broken)
        await check_usable(work, client)
    assert "KeyError: 'broken'" in caplog.text


async def test_a_wrong_result_of_a_callback_is_its_failure(caplog: pytest.LogCaptureFixture) -> None:
    async def wrong(value: float) -> Any:
        return "x"

    async with open_work() as (work, _, _):
        with pytest.raises(RemoteError, match="progress returned a value that its interface does not allow"):
            await work.run(wrong)


async def test_a_request_error_of_a_callback_is_its_answer() -> None:
    class Careful(Worker):
        async def run(self, progress: Note) -> int:
            with pytest.raises(RemoteError) as caught:
                await progress(1)
            assert (caught.value.code, caught.value.message) == ("no", "not now")
            return 0

    async def refuse(value: float) -> int:
        raise RequestError("not now", code="no")

    async with consume_local(Work, Careful()) as work:
        assert await work.run(refuse) == 0


async def test_an_error_that_an_object_declares_goes_on_only_where_it_is_declared() -> None:
    async with open_work() as (work, _, _):
        terminal: Any = Terminal()
        with pytest.raises(RemoteError, match="Refused: quiet") as caught:
            await work.use(terminal, "raise")
        assert caught.value.code == "handler-error"


# ---- in turn ----


async def test_callbacks_call_back_in_turn_to_any_depth() -> None:
    async with open_work() as (work, _, client):

        async def back(depth: int) -> int:
            return await work.bounce(depth, back)

        for depth in range(8):
            assert await back(depth) == 0
        with pytest.raises(RemoteError, match="RecursionError: a request may be nested in at most 15 others"):
            await back(8)
        await check_usable(work, client)


async def test_many_at_once_that_call_back_in_turn_do_not_lock_up() -> None:
    async with open_work() as (work, _, client):

        async def back(depth: int) -> int:
            await trio.lowlevel.checkpoint()
            return await work.bounce(depth, back)

        async with trio.open_nursery() as nursery:
            for _ in range(150):
                nursery.start_soon(back, 4)
        await check_usable(work, client)


async def test_callbacks_are_lent_to_callbacks() -> None:
    async def take(progress: Note) -> int:
        return await progress(21) + await progress(0)

    async with open_work() as (work, _, client):
        assert await work.pass_on(take) == 42
        await check_usable(work, client)


async def test_a_stand_in_or_a_callback_may_be_lent_on() -> None:
    class Between(Worker):
        def __init__(self, work: Work) -> None:
            super().__init__()
            self.work = work

        async def run(self, progress: Note) -> int:
            return await self.work.run(progress)

        async def use(self, screen: Screen, how: str = "show") -> Any:
            return await self.work.use(screen, how)

    terminal: Any = Terminal()
    async with open_work() as (work, _, _), consume_local(Work, Between(work)) as between:
        assert await between.run(note) == 15
        for how, result in [("show", 5), ("refused", "quiet"), ("keys", ["0", "1", "2"]), ("twice", "a!!")]:
            assert await between.use(terminal, how) == result


async def test_both_sides_lend_at_once() -> None:
    workers: list[Any] = [Worker(), Worker()]
    async with open_connection_pair(*(expose(Work, each) for each in workers)) as (client, server):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def ask_client() -> None:
                assert await consume(server, Work).run(note) == 15

            assert await consume(client, Work).run(note) == 15


async def test_streams_may_come_with_callbacks() -> None:
    async with open_work() as (work, _, client):
        async with work.stream(note) as numbers:
            assert [number async for number in numbers] == [0, 10, 20]
        assert await work.upload(rows(), note) == 40
        async with work.stream(note) as numbers:
            await numbers.receive()
        await check_usable(work, client)


async def test_a_callback_knows_what_request_it_handles() -> None:
    seen: list[object] = []

    async def look(value: float) -> int:
        current = current_request()
        seen.extend([current.method, current.depth, current.connection])
        return 0

    async with open_work() as (work, _, client):
        await work.run(look)
        assert seen[:3] == ["progress", 1, client]
