"""Requests cancelled while their handlers run, and cancellations from outside."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from bokbok_trio import Connection, Settings
from tests.support.handlers import in_memory_and_over_sockets
from tests.support.helpers import cancel, open_peer, outcomes, req, settle
from tests.support.inside import check_idle


@in_memory_and_over_sockets
async def test_a_cancel_in_the_same_receive_as_its_request(
    over_sockets: bool, autojump_clock: trio.testing.MockClock
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        if request:
            await trio.sleep(100)

    settings = Settings(max_requests=4)
    async with open_peer(handler, settings, over_sockets=over_sockets) as (connection, peer):
        # One has answered before; one waits; of two nobody has heard when they are cancelled.
        batch = req(1) + cancel(1) + req(3, b"x") + cancel(3) + req(5, b"x") + cancel(5) + req(7) + cancel(7)
        await peer.stream.send_all(batch)
        assert await outcomes(peer, 4) == {1: b"ok", 3: b"cancelled", 5: b"cancelled", 7: b"ok"}
        await settle()
        assert trio.current_time() == 0
        await settle()
        check_idle(connection)


async def test_the_cancelling_of_a_handler_leaves_alone_who_reads(
    autojump_clock: trio.testing.MockClock,
) -> None:
    seen: list[str] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            seen.append("cancelled")
            with trio.CancelScope(shield=True):
                await trio.sleep(1)
            raise

    async with open_peer(handler) as (connection, peer):
        await peer.stream.send_all(req(1))
        await settle()
        await peer.stream.send_all(cancel(1) + req(3))
        await settle()
        await peer.stream.send_all(cancel(3))
        assert await outcomes(peer, 2) == {1: b"cancelled", 3: b"cancelled"}
        await settle()
        check_idle(connection)
    assert seen == ["cancelled"] * 2


@pytest.mark.parametrize("steps", range(12))
async def test_a_cancellation_from_outside_at_any_step_ends_all(
    steps: int, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    running = 0

    async def handler(connection: Connection, request: list[bytes]) -> None:
        nonlocal running
        running += 1
        try:
            if request:
                await trio.sleep(100)
        finally:
            running -= 1

    with trio.CancelScope() as outer:
        async with open_peer(handler) as (connection, peer):
            await peer.stream.send_all(req(1) + req(3, b"x") + req(5, b"x"))
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            outer.cancel()
            await trio.lowlevel.checkpoint()
    assert (outer.cancelled_caught, running, trio.current_time()) == (True, 0, 0)
    assert connection.statistics().handlers_running == 0
    assert caplog.records == []
