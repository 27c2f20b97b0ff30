from __future__ import annotations

import pytest
import trio
import trio.testing

from bokbok_trio import Connection, ConnectionClosed
from tests.helpers import packet, raw_peer, settle


def req(id: int, *fields: bytes, timeout: bytes = b"") -> bytes:
    """A request of the peer's that is made by hand."""
    return packet(b"req", b"%d" % id, timeout, body=list(fields))


async def wait_closing(connection: Connection) -> None:
    """Wait for the first time, and have the connection closed before any other task has its turn."""

    def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
        connection._close("in between")
        return trio.lowlevel.Abort.SUCCEEDED

    with trio.CancelScope() as scope:
        scope.cancel()
        await trio.lowlevel.wait_task_rescheduled(abort)


# ---- the end, in the middle of what was received ----


async def test_what_is_left_of_a_batch_when_the_connection_is_closed_is_not_handled(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    started: list[bytes] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        started.extend(request)
        await wait_closing(connection)
        await trio.sleep(100)

    async with raw_peer(handler) as (connection, peer), trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(ConnectionClosed, match="in between"):
                await connection.request([])

        nursery.start_soon(ask)
        assert (await peer.receive())[0] == b"req"
        await peer.stream.send_all(req(1, b"1") + req(3, b"3") + packet(b"ok", b"0", body=[]) + req(5, b"5"))
        await settle()
        assert started == [b"1"]
    assert trio.current_time() == 0  # so nobody was waited for
    assert caplog.records == []  # and no answer was taken for one that is not awaited
