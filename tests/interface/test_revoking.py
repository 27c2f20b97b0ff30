"""References are revoked at the end of their call, and only the borrower can call them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from bokbok_trio import Connection, RemoteError, RequestError, current_request, open_reconnecting, open_server
from bokbok_trio.interface import consume, expose
from bokbok_trio.testing import consume_local, open_connection_pair

from ..support.helpers import echo, settle
from ..support.inside import reference_number
from ..support.lending import Half, Note, Terminal, Work, Worker, check_usable, encode, note, open_work, rows

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
        """A method that calls back by hand."""

        async def run(self, progress: Any) -> int:
            connection = current_request().connection
            number = reference_number(progress)
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
            number = reference_number(screen)
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
    """References in both directions are called over the same connection."""

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
            last = int(reference_number(progress))
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
