"""Requests that are cancelled, and the handlers that they cancel."""

from __future__ import annotations

import pytest
import trio

from bokbok_trio import Connection, Settings
from bokbok_trio.testing import FaultyStream, open_connection_pair
from tests.support.connections import check_nothing_in_flight, faulty
from tests.support.helpers import busy_handler, settle


async def test_a_cancelled_request_cancels_the_handler(sealed: bool) -> None:
    seen: list[str] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        try:
            await trio.sleep_forever()
        finally:
            seen.append("cancelled")

    async with open_connection_pair(server_handler=handler, sealed=sealed) as (client, server):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.request, [])
                await settle()
                scope.cancel()
        assert seen == []
        await settle()
        assert seen == ["cancelled"]
        check_nothing_in_flight(client, server)


async def test_a_handler_may_answer_though_it_was_cancelled() -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        with trio.CancelScope() as inner:
            inner.cancel()
            await trio.sleep_forever()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            return  # it swallows its cancellation  # noqa: TRY203, RUF100

    async with open_connection_pair(server_handler=handler) as (client, server):
        with trio.move_on_after(0):
            await client.request([])
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.request, [])
                await settle()
                scope.cancel()
        await settle()
        check_nothing_in_flight(client, server)


async def test_a_crash_while_being_cancelled_is_logged_and_answered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def crash() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise KeyError("crashed")

    async def handler(connection: Connection, request: list[bytes]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(crash)

    async with open_connection_pair(server_handler=handler) as (client, server):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.request, [])
                await settle()
                scope.cancel()
        await settle()
        check_nothing_in_flight(client, server)
    assert "the handler of request 0 failed" in caplog.text


@pytest.mark.parametrize("stalled", [False, True], ids=["", "peer stopped reading"])
@pytest.mark.parametrize("slots", [10, 3], ids=["slots free", "slots taken"])
async def test_a_request_cancelled_at_any_step_comes_back_at_once_and_disturbs_nobody(
    sealed: bool, stalled: bool, slots: int
) -> None:
    """The request is cancelled after so many steps of the scheduler, from 0 until it would be done."""
    streams: list[FaultyStream] = []
    others: list[list[bytes]] = []
    answers = 0
    async with open_connection_pair(
        server_handler=busy_handler,
        sealed=sealed,
        server_settings=Settings(max_requests=slots),
        wrap=faulty(streams),
    ) as (client, server):

        async def other() -> None:
            others.append(await client.request(["ping", "other"]))

        async def cancel(scope: trio.CancelScope, steps: int, ended: list[bool]) -> None:
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            scope.cancel()
            for _ in range(2):
                await trio.lowlevel.checkpoint()
            assert ended, "it did not come back at once"
            streams[0].sending.resume()

        for steps in range(30):
            ended: list[bool] = []
            if stalled:
                streams[0].sending.stall()
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(other)
                await settle() if slots == 3 else None
                with trio.CancelScope() as scope:
                    nursery.start_soon(cancel, scope, steps, ended)
                    assert await client.request(["ping", "mine"]) == [b"pong", b"mine"]
                    answers += 1
                ended.append(scope.cancelled_caught)
            assert others == [[b"pong", b"other"]] * 3
            others.clear()
            assert await client.request(["ping", "after"]) == [b"pong", b"after"]
            await settle()
            check_nothing_in_flight(client, server)
    assert (answers == 0) if stalled else (0 < answers < 30)
