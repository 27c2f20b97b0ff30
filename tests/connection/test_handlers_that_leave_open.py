"""Handlers that fail or leave scopes and nurseries open, in the tasks that read."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio
import trio.testing

from bokbok_trio import Connection, RemoteError, RequestError, Settings
from bokbok_trio._connection.handlers import LEFT_OPEN
from bokbok_trio.testing import open_connection_pair
from tests.support.handlers import Foreign, cancelled_in_its_handler, in_memory_and_over_sockets
from tests.support.helpers import open_peer, outcomes, req, settle
from tests.support.inside import check_idle


@pytest.mark.parametrize("waits_before", [False, True])
@pytest.mark.parametrize(
    "error", [RequestError("no"), ValueError("no"), ExceptionGroup("", [ValueError("no")]), StopIteration(1)]
)
async def test_a_failing_handler_is_one_error_wherever_it_runs(waits_before: bool, error: Exception) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        if request:
            if waits_before:
                await trio.lowlevel.checkpoint()
            raise error

    async with open_peer(handler) as (connection, peer):
        await peer.stream.send_all(req(1) + req(3, b"x") + req(5, b"x"))
        code = b"request-error" if isinstance(error, RequestError) else b"handler-error"
        assert await outcomes(peer, 3) == {1: b"ok", 3: code, 5: code}
        await settle()
        await settle()
        check_idle(connection)


@pytest.mark.parametrize("waits_before", [False, True])
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
async def test_what_ends_the_program_comes_out_wherever_the_handler_runs(
    waits_before: bool, position: int, error: type[BaseException]
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        if request == [b"wait"]:
            await trio.sleep_forever()
        if waits_before:
            await trio.lowlevel.checkpoint()
        raise error

    with pytest.raises(BaseExceptionGroup) as caught:
        async with open_peer(handler) as (_, peer):
            await peer.stream.send_all(req(1, b"wait") * position + req(3))
            await trio.sleep_forever()
    assert caught.group_contains(error)
    assert not caught.group_contains(Exception)


async def test_a_cancelled_kept_from_earlier_is_a_failure_wherever_it_is_raised() -> None:
    stale: list[trio.Cancelled] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        if not stale:
            with trio.CancelScope() as scope:
                scope.cancel()
                try:
                    await trio.sleep_forever()
                except trio.Cancelled as exc:
                    stale.append(exc)
                    raise
        raise stale[0]

    async with open_peer(handler) as (connection, peer):
        await peer.stream.send_all(req(1) + req(3))
        assert await outcomes(peer, 2) == {1: b"handler-error", 3: b"handler-error"}
        await peer.stream.send_all(req(5))
        assert await outcomes(peer, 1) == {5: b"handler-error"}
        await settle()
        await settle()
        check_idle(connection)


def count_left_open(caplog: pytest.LogCaptureFixture) -> int:
    return sum(str(record.exc_info and record.exc_info[1]) == LEFT_OPEN for record in caplog.records)


async def leave_open(deadline: float = math.inf, *, is_cancelled: bool = False) -> None:
    """Enter a scope, and never leave it."""
    scope = trio.CancelScope(deadline=deadline)
    scope.__enter__()
    if is_cancelled:
        scope.cancel()


@pytest.mark.parametrize(
    "leave", [leave_open, partial(leave_open, 5), partial(leave_open, is_cancelled=True)]
)
async def test_a_handler_that_waits_and_leaves_a_scope_open_harms_no_other(
    leave: Callable[[], Awaitable[None]],
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The same holds for an abandoned async generator that yields inside a scope."""

    async def handler(connection: Connection, request: list[bytes]) -> None:
        if request != [b"now"]:
            await trio.lowlevel.checkpoint()
        assert trio.current_effective_deadline() == math.inf
        if request == [b"bad"]:
            await leave()

    async with open_peer(handler, Settings(max_requests=5)) as (connection, peer):
        for _ in range(3):
            await peer.stream.send_all(
                req(1, b"bad") + req(3, b"bad") + req(5, b"now") + req(7, b"wait") + req(9, b"bad")
            )
            bad = b"handler-error"
            assert await outcomes(peer, 5) == {1: bad, 3: bad, 5: b"ok", 7: b"ok", 9: bad}
            await trio.sleep(10)
            await settle()
            check_idle(connection)
    assert count_left_open(caplog) == 9


async def test_the_deadline_of_a_scope_left_open_by_a_handler_that_has_waited_is_no_others(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        await trio.sleep(1)
        if request:
            await leave_open(trio.current_time() + 2)

    async with open_peer(handler) as (connection, peer):
        for n in range(6):  # two tasks take turns
            await peer.stream.send_all(req(1 + 2 * n, *[b"bad"] * (n < 2)))
            assert await outcomes(peer, 1) == {1 + 2 * n: b"handler-error" if n < 2 else b"ok"}
            await settle()
        await settle()
        check_idle(connection)


@pytest.mark.parametrize("is_cancelled", [False, True])
@in_memory_and_over_sockets
async def test_a_scope_left_open_by_a_handler_that_waits_for_nothing_harms_no_other(
    over_sockets: bool, is_cancelled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        if request == [b"bad"]:
            await leave_open(is_cancelled=is_cancelled)
        elif request == [b"wait"]:
            await trio.lowlevel.checkpoint()

    async with open_peer(handler, Settings(max_requests=4), over_sockets=over_sockets) as (connection, peer):
        await peer.stream.send_all(req(1, b"bad") + req(3) + req(5, b"wait") + req(7, b"bad"))
        bad = b"handler-error"
        assert await outcomes(peer, 4) == {1: bad, 3: b"ok", 5: b"ok", 7: bad}
        await settle()
        await peer.stream.send_all(req(1) + req(3, b"wait"))
        assert await outcomes(peer, 2) == {1: b"ok", 3: b"ok"}
        await settle()
        await settle()
        check_idle(connection)
    assert count_left_open(caplog) == 2


async def test_a_shield_left_open_by_a_handler_that_has_waited_does_not_keep_its_task(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        await trio.lowlevel.checkpoint()
        trio.CancelScope(shield=True).__enter__()

    async with open_peer(handler) as (connection, peer):
        await peer.stream.send_all(req(1))
        await outcomes(peer, 1)
        await settle()
        await connection.aclose()
        with trio.fail_after(1):
            await connection.wait_closed()


async def test_a_breach_is_noticed_though_a_scope_was_left_open(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        await leave_open()

    async with open_peer(handler) as (connection, peer):
        await peer.stream.send_all(req(1))
        await outcomes(peer, 1)
        await peer.send(b"nonsense")
        assert (await peer.receive())[0] == b"abort"
        await peer.stream.aclose()
        await connection.wait_closed()
    assert "the peer broke the protocol" in caplog.text
    assert count_left_open(caplog) == 1


@pytest.mark.parametrize("waits_before", [False, True])
@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_a_handler_that_leaves_a_nursery_open_fails_alone(
    waits_before: bool,
    is_cancelled: bool,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    left: list[object] = []
    has_child_ended = trio.Event()

    async def child() -> None:
        try:
            await trio.sleep_forever()
        finally:
            has_child_ended.set()

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        if not request:
            return []
        if waits_before:
            await trio.lowlevel.checkpoint()
        left.append(trio.open_nursery())
        nursery = await left[-1].__aenter__()  # type: ignore[attr-defined]
        nursery.start_soon(child)
        if is_cancelled:
            await trio.sleep_forever()
        return request

    async with open_connection_pair(server_handler=handler) as (client, server):
        for _ in range(2):
            if is_cancelled:
                async with cancelled_in_its_handler(server):
                    await client.request(["leave it"])
            else:
                with pytest.raises(RemoteError, match="left a cancel scope or a nursery open"):
                    await client.request(["leave it"])
            await has_child_ended.wait()
            assert await client.request([]) == []
        assert not server.closed
    # Newer Trio raises an error where the task ends, and it goes no further.
    assert ("a task of the connection ended badly" in caplog.text) is not trio.__version__.startswith("0.27.")


async def test_a_handler_that_awaits_something_foreign_is_told_and_may_go_on() -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        if request == [b"fail"]:
            await Foreign()
        elif request == [b"go on"]:
            with pytest.raises(TypeError, match="unrecognized yield message"):
                await Foreign()
            await trio.lowlevel.checkpoint()
            with pytest.raises(TypeError, match="unrecognized yield message"):
                await Foreign()
        return request

    async with open_peer(handler) as (connection, peer):
        await peer.stream.send_all(req(1, b"fail") + req(3, b"go on") + req(5, b"fail"))
        assert await outcomes(peer, 3) == {1: b"handler-error", 3: b"ok", 5: b"handler-error"}
        await peer.stream.send_all(req(1, b"go on"))
        assert await outcomes(peer, 1) == {1: b"ok"}
        await settle()
        await settle()
        check_idle(connection)
