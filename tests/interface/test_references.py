"""What is lent for a call: callbacks and objects, called in turn, failing, revoked, and by whom."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

import msgspec
import pytest
import trio
from trio.abc import ReceiveChannel
from trio.testing import MockClock

from bokbok_trio import (
    Connection,
    RemoteError,
    RequestError,
    current_request,
    open_reconnecting,
    open_server,
)
from bokbok_trio.interface import consume, expose, raises
from bokbok_trio.testing import consume_local, open_connection_pair
from tests.support.helpers import echo, settle

encode = msgspec.msgpack.encode
Note = Callable[[float], Awaitable[int]]


@dataclass
class Refused(Exception):
    why: str


class Screen(Protocol):
    """An object to lend."""

    @raises(Refused)
    async def show(self, text: str, *, loud: bool = False) -> int: ...
    def keys(self, count: int) -> AbstractAsyncContextManager[ReceiveChannel[str]]: ...
    async def paint(self, rows: AsyncIterable[bytes]) -> int: ...
    async def twice(self, then: Callable[[str], Awaitable[str]]) -> str: ...


class Named(Protocol):
    """A callback with names."""

    async def __call__(self, value: int, *, name: str = "x") -> str: ...


class Work(Protocol):
    async def run(self, progress: Note) -> int: ...
    async def use(self, screen: Screen, how: str = "show") -> Any: ...
    async def maybe(self, progress: Note | None = None, screen: Screen | None = None) -> str: ...
    async def named(self, call: Named) -> str: ...
    async def keep(self, progress: Note, screen: Screen) -> None: ...
    async def sleep(self, progress: Note) -> None: ...
    async def bounce(self, depth: int, back: Callable[[int], Awaitable[int]]) -> int: ...
    async def pass_on(self, take: Callable[[Note], Awaitable[int]]) -> int: ...
    def stream(self, progress: Note) -> AbstractAsyncContextManager[ReceiveChannel[int]]: ...
    async def upload(self, chunks: AsyncIterable[bytes], progress: Note) -> int: ...
    async def fail(self, progress: Note) -> None: ...


class Worker:
    def __init__(self) -> None:
        self.kept: list[Any] = []
        self.started = trio.Event()
        self.ended = trio.Event()
        self.error: BaseException | None = None

    async def run(self, progress: Note) -> int:
        return sum([await progress(0.5), await progress(1)])

    async def use(self, screen: Screen, how: str = "show") -> Any:  # noqa: PLR0911
        match how:
            case "refused":
                with pytest.raises(Refused) as caught:
                    await screen.show("no")
                return caught.value.why
            case "keys":
                async with screen.keys(3) as keys:
                    return [key async for key in keys]
            case "first key":
                async with screen.keys(10**6) as keys:
                    return await keys.receive()
            case "paint":
                return await screen.paint(rows())
            case "twice":
                return await screen.twice(exclaim)
            case "raise":
                await screen.show("no")
            case "unknown":
                with pytest.raises(AttributeError):
                    await screen.hide()  # type: ignore[attr-defined]
                return None
        return await screen.show("hello", loud=True)

    async def maybe(self, progress: Note | None = None, screen: Screen | None = None) -> str:
        return f"{progress is not None} {screen is not None}"

    async def named(self, call: Named) -> str:
        return await call(1) + await call(value=2, name="y")

    async def keep(self, progress: Note, screen: Screen) -> None:
        self.kept += [progress, screen]

    async def sleep(self, progress: Note) -> None:
        self.kept.append(progress)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(progress, 1)
                self.started.set()
                await trio.sleep_forever()
        finally:
            self.ended.set()

    async def bounce(self, depth: int, back: Callable[[int], Awaitable[int]]) -> int:
        return depth if depth == 0 else await back(depth - 1)

    async def pass_on(self, take: Callable[[Note], Awaitable[int]]) -> int:
        async def double(value: float) -> int:
            return int(2 * value)

        return await take(double)

    async def stream(self, progress: Note) -> AsyncGenerator[int]:
        for number in range(3):
            yield await progress(number)

    async def upload(self, chunks: AsyncIterable[bytes], progress: Note) -> int:
        return sum([await progress(len(chunk)) async for chunk in chunks])

    async def fail(self, progress: Note) -> None:
        await progress(1)
        raise ValueError("failed")


async def rows() -> AsyncGenerator[bytes]:
    yield b"abc"
    yield b"d"


async def exclaim(text: str) -> str:
    return text + "!"


class Terminal:
    def __init__(self) -> None:
        self.shown: list[object] = []

    async def show(self, text: str, *, loud: bool = False) -> int:
        if text == "no":
            raise Refused("quiet")
        self.shown += [text, loud]
        return len(text)

    async def keys(self, count: int) -> AsyncGenerator[str]:
        for number in range(count):
            yield str(number)

    async def paint(self, rows: AsyncIterable[bytes]) -> int:
        return sum([len(row) async for row in rows])

    async def twice(self, then: Callable[[str], Awaitable[str]]) -> str:
        return await then(await then("a"))

    async def secret(self) -> None:
        raise AssertionError


TERMINAL: Any = Terminal()


async def note(value: float) -> int:
    return int(10 * value)


@asynccontextmanager
async def open_work(client_handler: Any = None) -> AsyncGenerator[tuple[Work, Worker, Connection]]:
    worker: Any = Worker()
    async with open_connection_pair(client_handler, expose(Work, worker)) as (client, _):
        yield consume(client, Work), worker, client


async def check_usable(work: Work, connection: Connection) -> None:
    """All that a call took has been given back."""
    assert await work.maybe() == "False False"
    await settle()
    statistics = connection.statistics()
    assert (statistics.used_slots, statistics.handlers_running) == (0, 0)


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


class Half:
    async def show(self, text: str) -> int:
        return 0


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


# ---- revoked ----


async def test_what_was_lent_is_revoked_when_the_method_has_ended() -> None:
    async with open_work() as (work, worker, client):
        terminal: Any = Terminal()
        await work.keep(note, terminal)
        progress, screen = worker.kept
        with pytest.raises(trio.ClosedResourceError, match="the call that this was lent to has ended"):
            await progress(1)
        with pytest.raises(trio.ClosedResourceError):
            await screen.show("late")
        with pytest.raises(trio.ClosedResourceError):
            async with screen.keys(1):
                raise AssertionError
        with pytest.raises(trio.ClosedResourceError):
            await screen.paint(rows())
        assert not terminal.shown
        await check_usable(work, client)


async def test_a_late_call_is_a_checkpoint_nevertheless() -> None:
    async with open_work() as (work, worker, _):
        terminal: Any = Terminal()
        await work.keep(note, terminal)
        with trio.CancelScope() as scope:
            scope.cancel()
            await worker.kept[0](1)
        assert scope.cancelled_caught


@pytest.mark.parametrize("how", ["returns", "fails", "cancelled"])
async def test_calls_under_way_are_cancelled_with_the_call(how: str, autojump_clock: MockClock) -> None:
    """By a task of the method's side that outlives it."""
    outcomes: list[str] = []

    async def slow(value: float) -> int:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            outcomes.append("callback cancelled")
            raise
        raise AssertionError

    class Leaving(Worker):
        def __init__(self, nursery: trio.Nursery) -> None:
            super().__init__()
            self.nursery = nursery

        async def run(self, progress: Note) -> int:
            async def call() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await progress(1)
                outcomes.append("task told")

            self.nursery.start_soon(call)
            await trio.sleep(1)
            if how == "fails":
                raise ValueError("left")
            if how == "cancelled":
                await trio.sleep_forever()
            return 1

    async with trio.open_nursery() as nursery, consume_local(Work, Leaving(nursery)) as work:
        if how == "cancelled":
            with trio.move_on_after(2) as scope:
                await work.run(slow)
            assert scope.cancelled_caught
        elif how == "fails":
            with pytest.raises(RemoteError, match="left"):
                await work.run(slow)
        else:
            assert await work.run(slow) == 1
        assert "callback cancelled" in outcomes  # the call waits for that
        await settle()
        assert sorted(outcomes) == ["callback cancelled", "task told"]


async def test_a_call_waits_for_its_callbacks_but_not_for_ever(autojump_clock: MockClock) -> None:
    cleaned = trio.Event()

    async def stubborn(value: float) -> int:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(value)
                cleaned.set()
        raise AssertionError

    class Impatient(Worker):
        async def upload(self, chunks: AsyncIterable[bytes], progress: Note) -> int:
            seconds = float(await anext(aiter(chunks)))
            with trio.move_on_after(0.1):
                await progress(seconds)
            return 0

    async def one(chunk: bytes) -> AsyncGenerator[bytes]:
        yield chunk

    async with consume_local(Work, Impatient()) as work:
        began = trio.current_time()
        await work.upload(one(b"0.5"), stubborn)
        assert cleaned.is_set()
        cleaned = trio.Event()
        await work.upload(one(b"30"), stubborn)
        assert not cleaned.is_set()
        assert trio.current_time() - began < 2
        with trio.fail_after(60):
            await cleaned.wait()


async def test_a_cancelled_call_cancels_its_callbacks(autojump_clock: MockClock) -> None:
    ended = trio.Event()

    async def slow(value: float) -> int:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()
        raise AssertionError

    async with open_work() as (work, worker, client):
        with trio.move_on_after(1) as scope:
            await work.sleep(slow)
        assert scope.cancelled_caught
        assert ended.is_set()
        await worker.ended.wait()
        await check_usable(work, client)


async def test_a_callback_may_cancel_the_call_that_it_is_lent_to() -> None:
    with trio.CancelScope() as scope:

        async def cancel(value: float) -> int:
            scope.cancel()
            await trio.sleep_forever()
            raise AssertionError

        async with open_work() as (work, _, _):
            await work.sleep(cancel)
    assert scope.cancelled_caught


async def test_a_failed_call_revokes_too() -> None:
    async with open_work() as (work, _, client):
        with pytest.raises(RemoteError, match="failed"):
            await work.fail(note)
        await check_usable(work, client)


@pytest.mark.parametrize("ends_here", [True, False])
async def test_callbacks_end_with_the_connection(ends_here: bool) -> None:
    ended = trio.Event()

    async def slow(value: float) -> int:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()
        raise AssertionError

    worker: Any = Worker()
    async with open_connection_pair(server_handler=expose(Work, worker)) as (client, server):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def call() -> None:
                with pytest.raises((trio.BrokenResourceError, trio.ClosedResourceError)):
                    await consume(client, Work).sleep(slow)

            await settle()
            await (client if ends_here else server).aclose()
            await ended.wait()


# ---- by whom ----


async def code_of(connection: Connection, *fields: bytes) -> str:
    with pytest.raises(RemoteError) as caught:
        await connection.request(fields)
    return caught.value.code


async def test_only_what_is_lent_just_now_can_be_called_and_only_over_its_connection() -> None:
    class Prober(Worker):
        """It calls back by hand."""

        async def run(self, progress: Any) -> int:
            connection = current_request().connection
            number = progress._bokbok_options.head[1]
            assert await connection.request([b"%back", number, b"", encode([1])]) == [encode(10)]
            for fields, code in [
                ([b"%back", number + b"0", b"", encode([1])], "no-reference"),
                ([b"%back", b"", b"", encode([1])], "no-reference"),
                ([b"%back", b"-1", b"", encode([1])], "no-reference"),
                ([b"%back", b"0" + number, b"", encode([1])], "no-reference"),
                ([b"%back", number, b"__class__", encode([1])], "no-method"),
                ([b"%back", number, b"\xff", encode([1])], "no-method"),
                ([b"%back", number, b"", encode({"value": 1})], "bad-arguments"),
                ([b"%back", number, b"", encode([1, 2])], "bad-arguments"),
                ([b"%back", number, b"", b"\xc1"], "bad-arguments"),
                ([b"%back", number, b""], "bad-arguments"),
                ([b"%back"], "bad-arguments"),
                ([b"%back", number, b"", encode([1]), b""], "bad-arguments"),
            ]:
                assert await code_of(connection, *fields) == code
            with pytest.raises(RemoteError) as caught:
                async with connection.open_channel([b"%back", number, b"", encode([1])]) as channel:
                    await channel.answer()
            assert caught.value.code == "bad-arguments"
            self.kept.append((connection, number))
            return 7

        async def use(self, screen: Any, how: str = "show") -> Any:
            connection = current_request().connection
            number = screen._bokbok_options.head[1]
            for method in (b"secret", b"", b"__init__", b"shown"):
                assert await code_of(connection, b"%back", number, method, b"\x80") == "no-method"
            return None

    prober: Any = Prober()
    exposed = expose(Work, prober)
    async with (
        open_connection_pair(server_handler=exposed) as (client, _),
        open_connection_pair(server_handler=exposed) as (other_client, other_server),
    ):
        work = consume(client, Work)
        assert await work.run(note) == 7
        terminal: Any = Terminal()
        await work.use(terminal)
        connection, number = prober.kept[0]
        assert await code_of(connection, b"%back", number, b"", encode([1])) == "no-reference"

        async def sleep(value: float) -> int:
            async def call_from_elsewhere() -> str:
                return await code_of(other_server, b"%back", b"1", b"", encode([1]))

            assert await call_from_elsewhere() == "no-reference"
            return 0

        consume(other_client, Work)
        await work.upload(rows(), sleep)


async def test_a_peer_that_says_that_nothing_is_lent_revokes() -> None:
    async def lie(connection: Connection, request: list[bytes]) -> list[bytes]:
        raise RequestError("no", code="no-reference")

    class Told(Worker):
        async def run(self, progress: Note) -> int:
            with pytest.raises(trio.ClosedResourceError):
                await progress(1)
            return 1

    worker: Any = Told()
    async with open_connection_pair(lie, expose(Work, worker)) as (client, _):
        assert await client.request([b"%call", b"Work.run", encode({"progress": 99})]) == [encode(1)]


@pytest.mark.parametrize("number", ["x", 1.5, [1], None])
async def test_a_reference_that_is_no_number_is_a_bad_argument(number: object) -> None:
    async with open_work() as (_, worker, client):
        with pytest.raises(RemoteError) as caught:
            await client.request([b"%call", b"Work.keep", encode({"progress": number, "screen": 1})])
        assert caught.value.code == "bad-arguments"
        assert not worker.kept


async def test_a_reconnecting_client_lends_too() -> None:
    worker: Any = Worker()
    async with (
        open_server("127.0.0.1:0", expose(Work, worker)) as server,
        open_reconnecting(server.addresses, request_handler=echo) as client,
    ):
        work = consume(client, Work)
        for _ in range(2):
            assert await work.run(note) == 15
            for connection in server.connections:
                await connection.aclose()


async def test_a_closed_connection_lends_nothing() -> None:
    async with open_work() as (work, _, client):
        await client.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await work.run(note)


async def test_a_reconnecting_client_lends_and_borrows_by_one_table() -> None:
    """What it lends, and what its own interfaces lend in turn, are called over the same connection."""

    class Both(Worker):
        async def run(self, progress: Note) -> int:
            back = consume(current_request().connection, Work)
            return await back.pass_on(lambda_of(progress))

    def lambda_of(progress: Note) -> Callable[[Note], Awaitable[int]]:
        async def take(double: Note) -> int:
            return await double(3) + await progress(1)

        return take

    worker: Any = Both()
    for first in ("lend", "borrow"):
        async with (
            open_server("127.0.0.1:0", expose(Work, worker)) as server,
            open_reconnecting(server.addresses, request_handler=expose(Work, worker)) as client,
        ):
            if first == "borrow":
                [connection] = server.connections
                assert await consume(connection, Work).pass_on(lambda_of(note)) == 16
            work = consume(client, Work)
            assert await work.run(note) == 16
            assert await work.pass_on(lambda_of(note)) == 16


async def test_a_call_that_lends_what_cannot_be_lent_lends_nothing_at_all() -> None:
    class Prober(Worker):
        async def run(self, progress: Any) -> int:
            last = int(progress._bokbok_options.head[1])
            for number in range(1, last):
                connection = current_request().connection
                assert await code_of(connection, b"%back", b"%d" % number, b"", encode([1])) == "no-reference"
            return last

    prober: Any = Prober()
    async with consume_local(Work, prober) as work:
        with pytest.raises(TypeError):
            await work.keep(note, Half())  # type: ignore[arg-type]
        await work.keep(note, Terminal())  # type: ignore[arg-type]
        assert await work.run(note) > 1


async def test_of_objects_that_have_methods_of_their_own_each_is_looked_at() -> None:
    terminal = Terminal()
    whole: Any = SimpleNamespace(
        **{name: getattr(terminal, name) for name in ("show", "keys", "paint", "twice")}
    )
    async with open_work() as (work, _, _client):
        assert await work.use(whole) == 5
        half: Any = SimpleNamespace(show=terminal.show)
        with pytest.raises(TypeError, match="SimpleNamespace does not implement Screen"):
            await work.use(half)
